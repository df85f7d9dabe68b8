"""Is it the thinking, or something cheaper? Controls and ablations of RPT on the embedded model.

    python paper/controls.py --seeds 0 1 2                about two hours a seed on one core
    python paper/controls.py --seeds 0 --only rpt ntp     some of them

After Ctrl-C the same command continues. Each seed has its own corpus, base model and filter
(demo.py), and all of these start from its base:
    rpt           the run that the controls explain
    ntp           next-token prediction on the same text, for the FLOPs that rpt has spent
    ntp-hard      the same with a loss only for tokens that rpt may train on, above its threshold
    sft-own       supervised training on the base's own right rollouts: as many rollouts as rpt has
                  sampled, then as many FLOPs as rpt's updates
    mixed-sft     plain text and the strings that the base has met, in one stage
    mixed-own     plain text and the base's own right rollouts, in one stage
    no-thought    RPT whose prompt closes the thought at once; more steps, because they are short
    rlp, nsr ...  other objectives (docs/objectives.md) until they have spent rpt's FLOPs,
                  or for OBJECTIVES steps
    calibrated    the base, taught by its own thoughts with the truth behind them how far to trust
                  them; rlp-calibrated and rpt-calibrated start there
    others        rpt with other flags, see VARIANTS
All are evaluated on the same held-out positions: guessing (ntp), thinking (reasoning) and with an
empty thought. paper/scaling.py fits rpt's checkpoints. Finally RL with the same budget trains base,
ntp and rpt on questions with exact answers that the text does not hold (Table 2).
"""
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

if __name__ == "__main__":  # the repository, not paper/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
import demo
from data.positions import SPLITS
from paper.patterns import describe, read_responses
from plumbing import flags
from plumbing.files import latest_checkpoint, write

VARIANTS = {  # name: the flags by which it differs from rpt
    "no-thought": "--objective no_thought --steps 800",  # twice the FLOPs of rpt
    "first-token": "--objective first_token",
    "dense": "--objective dense",
    "conditional-dense": "--objective conditional_dense",
    "G-4": "--rollouts 4 --batch-size 64",
    "G-16": "--rollouts 16 --batch-size 16",
    "all-positions": "--entropy-threshold 0",
    "hard-positions": "--entropy-threshold 1.5",
    "dynamic": "--dynamic-sampling-from 0",
    "normalised": "--normalize-advantage"}
# Name: the most steps. The first three soon stop thinking, and would then take thousands.
OBJECTIVES = dict(rlp=100, gain_n=100, ra3=100, markovian=400, nsr=400, nsr_wrong=400, prerl=400,
                  dsrl=400)
VARIANTS |= {name: f"--objective {name} --steps {steps} --match-compute {{run}}/rpt"
             for name, steps in OBJECTIVES.items()}
LESSONS = {  # name: the flags of its next-token training
    "ntp": "--documents-per-step 24 --lr 1e-3",
    "ntp-hard": "--documents-per-step 24 --lr 1e-3 --entropy-threshold 0.5 --proxy {base}",
    "sft-own": "--updates-only --strings {run}/own.jsonl --documents-per-step 0 "
               "--strings-per-step 32 --lr 3e-4",
    "mixed-sft": "--strings {run}/corpus/strings.jsonl --documents-per-step 6 "
                 "--strings-per-step 24 --problem-weight 0.3 --lr 1e-3",
    "mixed-own": "--updates-only --strings {run}/own.jsonl --documents-per-step 6 "
                 "--strings-per-step 24 --problem-weight 0.3 --lr 1e-3"}
OWN = ["sft-own", "mixed-own"]  # these train on the base's own right rollouts
CALIBRATED = {  # name: the flags by which it differs from rpt
    "rlp-calibrated": "--objective rlp",
    "rpt-calibrated": ""}
CALIBRATION_STEPS = 300
TRAINED = ["rpt", *LESSONS, *VARIANTS, "calibrated", *CALIBRATED]
POSITIONS = 32                                        # of a step of rpt
FITTED = [10, 20, 30, 40, 60, 80, 100, 150, 200]      # steps of rpt, for the scaling fit
TUNED = ["base", "ntp", "rpt", "longer"]              # what RL on questions starts from
QUESTION_STEPS = 50
LONGER_STEPS = QUESTION_STEPS + demo.RPT_STEPS        # "longer": from the base, without RPT


# ---- checkpoints ----

def base(run):
    return f"{run}/base/step_{demo.BASE_STEPS:06d}"


def tuned(names):
    return [name for name in TUNED if name in ("base", "longer", *names)]


def start_of(run, name):
    """The checkpoint from which RL on questions starts."""
    return base(run) if name in ("base", "longer") else latest_checkpoint(f"{run}/{name}")


def newest(run, names):
    """Checkpoint folders of these runs."""
    return [latest_checkpoint(f"{run}/{name}") for name in names]


# ---- commands ----

def rpt_command(run, seed, name, different=""):
    """different: flags that come last and so replace those before them."""
    return (f"train_rpt.py --init {base(run)} --corpus {run}/corpus --out-dir {run}/{name} "
            f"--template short --entropy-threshold 0.5 --steps {demo.RPT_STEPS} "
            f"--batch-size {POSITIONS} --rollouts 8 --max-new-tokens 64 --temperature 1.0 "
            f"--lr 3e-4 --grad-clip 1.0 --save-every 10 --seed {seed} --resume {different}")


def ntp_command(run, seed, name):
    """Next-token prediction for the FLOPs of rpt."""
    lessons = LESSONS[name].format(run=run, base=base(run))
    return (f"train_ntp.py --init {base(run)} --corpus {run}/corpus --out-dir {run}/{name} "
            f"--match-compute {run}/rpt --seed {seed} --resume {lessons}")


def own_rollouts_command(run, seed, objective, out):
    return (f"paper/own_rollouts.py --init {base(run)} --objective {objective} "
            f"--corpus {run}/corpus "
            f"--template short --count {demo.RPT_STEPS * POSITIONS} --rollouts 8 "
            f"--max-new-tokens 64 --seed {seed} --out {out}")


def eval_command(run, mode, checkpoints, out):
    return (f"eval.py lm --corpus {run}/corpus --proxy {base(run)} --template short --mode {mode} "
            "--positions 500 --samples 4 --max-new-tokens 64 --temperature 0.8 "
            f"--max-prompt-tokens 128 --out {out} --checkpoints {' '.join(checkpoints)}")


def questions_command(run, seed, name, init, steps):
    return (f"train_rpt.py --objective answers --init {init} --data {run}/corpus/questions.jsonl "
            f"--out-dir {run}/{name} --template short --steps {steps} --batch-size 32 --rollouts 8 "
            "--max-new-tokens 96 --temperature 1.0 --lr 1e-4 --grad-clip 1.0 "
            f"--seed {seed} --resume")


def answers_command(run, checkpoints):
    return (f"paper/answers.py --data {run}/corpus/questions_val.jsonl --template short "
            f"--max-new-tokens 96 --samples 4 --out {run}/answers.json "
            f"--checkpoints {' '.join(checkpoints)}")


# ---- stages, as demo.run_stages takes them: why, the command, the file that shows it is done ----

def training(run, seed, names):
    """The corpus, the base, and what is trained from it."""
    corpus, train_base, score = (stage._replace(seconds=0) for stage in demo.STAGES[:3])
    # All documents are scored, so that no control trains on one of them many times.
    score = score._replace(command=score.command.replace(" --documents 1800", ""))
    stages = [corpus, train_base, score,
              ("RPT.", rpt_command(run, seed, "rpt", "--save-every 5"), f"{run}/rpt/done")]
    for name in names:
        if name in LESSONS and name not in OWN:
            stages.append((f"Control: {name}.", ntp_command(run, seed, name), f"{run}/{name}/done"))
        if name in VARIANTS:
            different = VARIANTS[name].format(run=run)
            stages.append((f"RPT with {different}.", rpt_command(run, seed, name, different),
                           f"{run}/{name}/done"))
    return stages


def imitating(run, seed, names):
    """Supervised training on rollouts of the base."""
    out = f"{run}/own.jsonl"
    stages = []
    for name in names:
        if name in OWN:
            stages.append(("The base's own right rollouts: as many are sampled as in RPT.",
                           own_rollouts_command(run, seed, "rpt", out), out))
            stages.append((f"Control: {name}.", ntp_command(run, seed, name), f"{run}/{name}/done"))
    return stages


def calibrating(run, seed, names):
    """Training on the base's own thoughts with the truth behind them, and RL from there."""
    wanted = [name for name in names if name in CALIBRATED]
    if not wanted and "calibrated" not in names:
        return []
    start = f"{run}/calibrated/step_{CALIBRATION_STEPS:06d}"
    strings = f"{run}/calibration.jsonl"
    sample = own_rollouts_command(run, seed, "rlp", strings) + " --count 2000"
    train = (f"train_ntp.py --init {base(run)} --corpus {run}/corpus --out-dir {run}/calibrated "
             f"--strings {strings} --documents-per-step 0 --strings-per-step 32 --lr 3e-4 "
             f"--steps {CALIBRATION_STEPS} --seed {seed} --resume")
    stages = [("The base's thoughts, and what is true behind each.", sample, strings),
              ("How far to trust them.", train, f"{run}/calibrated/done")]
    for name in wanted:
        flags = f"{CALIBRATED[name]} --init {start} --steps 400 --match-compute {run}/rpt"
        stages.append((f"RL from there: {name}.", rpt_command(run, seed, name, flags),
                       f"{run}/{name}/done"))
    return stages


def measuring(run, seed, names):
    """Everything on the same held-out positions, and the checkpoints of rpt."""
    trained = [base(run), *newest(run, names)]
    on_the_way = [f"{run}/rpt/step_{step:06d}" for step in FITTED]
    results, rpt_results = f"{run}/results.json", f"{run}/rpt/results.json"
    return [
        ("Everything on the same held-out positions.",
         eval_command(run, "all", trained, results) + f" --dump {run}/thoughts.jsonl", results),
        ("RPT's checkpoints, for the scaling fit.",
         eval_command(run, "reasoning", on_the_way, rpt_results), f"{run}/rpt/measured"),
        ("The fit.", f"paper/scaling.py {run}/rpt --out {run}/scaling.json", f"{run}/scaling.json")]


def tuning(run, seed, names):
    """RL on questions, from each checkpoint to start from."""
    stages = []
    for name in tuned(names):
        steps = LONGER_STEPS if name == "longer" else QUESTION_STEPS
        stages.append((f"RL on questions with exact answers: {name}.",
                       questions_command(run, seed, f"tuned-{name}", start_of(run, name), steps),
                       f"{run}/tuned-{name}/done"))
    return stages


def asking(run, seed, names):
    """Held-out questions, before and after RL."""
    checkpoints = []
    for name in tuned(names):
        checkpoints += [start_of(run, name), *newest(run, [f"tuned-{name}"])]
    command = answers_command(run, list(dict.fromkeys(checkpoints)))
    return [("Held-out questions, before and after RL.", command, f"{run}/answers.json")]


def forget_tables(run, names):
    """Delete tables that lack one of these names, from an earlier call with fewer."""
    answered = {f"tuned-{name}" for name in tuned(names)}
    for file, wanted in (("results.json", set(names)), ("answers.json", answered)):
        path = Path(run, file)
        if path.exists() and not wanted <= {run_of(line) for line in read_json(path)}:
            path.unlink()


def run_seed(run, seed, names):
    """Everything of one seed, in the folder `run`; finished stages are not run again."""
    forget_tables(run, names)
    # One group after the other, because commands name checkpoints that earlier groups make.
    args = SimpleNamespace(out_dir=run, seed=seed)
    for stages in (training, imitating, calibrating, measuring, tuning, asking):
        demo.run_stages(stages(run, seed, names), demo.names, args)


# ---- the table ----

def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def run_of(line):
    """The run of a line of results.json."""
    return Path(line["checkpoint"]).parent.name


def flops(run, name):
    path = Path(run, name, "metrics.jsonl")
    if not path.exists():
        return 0
    return sum(json.loads(line)["flops"] for line in path.read_text(encoding="utf-8").splitlines())


def cell(lines, name, key="accuracy", **same):
    """One run's results for all seeds -> their mean, and in parentheses each of them."""
    values = [line[key] for line in lines if run_of(line) == name and same.items() <= line.items()]
    if not values:
        return "-"
    return f"{np.mean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})"


def accuracies(runs, split):
    """results.json of all seeds -> rows of Markdown: mean (each seed), in percent."""
    rows = [f"| {split} positions | guessing | thinking | one of 4 thoughts | empty thought | "
            "FLOPs |", "|---|---|---|---|---|---|"]
    lines = sum((read_json(f"{run}/results.json") for run in runs), [])
    lines = [line for line in lines if line["split"] == split]
    for name in dict.fromkeys(map(run_of, lines)):
        cells = [cell(lines, name, mode="ntp"), cell(lines, name, mode="reasoning"),
                 cell(lines, name, "pass_at_k", mode="reasoning"), cell(lines, name, mode="empty")]
        spent = np.mean([flops(run, name) for run in runs])
        rows.append(f"| {name} | {' | '.join(cells)} | {spent:.1e} |")
    return rows


def questions(runs):
    """answers.json of all seeds -> rows of Markdown, as above."""
    rows = ["| questions, from | before RL | after RL | FLOPs after the base |",
            "|---|---|---|---|"]
    lines = sum((read_json(f"{run}/answers.json") for run in runs), [])
    for name in TUNED:
        spent = np.mean([flops(run, f"tuned-{name}") for run in runs])
        if name != "base":
            spent += np.mean([flops(run, name) for run in runs])
        before, after = cell(lines, name), cell(lines, f"tuned-{name}")
        rows.append(f"| {name} | {before} | {after} | {spent:.1e} |")
    return rows


def minutes(run, name):
    """What training took, without saving."""
    path = Path(run, name, "metrics.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return sum(seconds for line in map(json.loads, lines) for key, seconds in line.items()
               if key.startswith("dt_")) / 60


def shapes(runs):
    """What thoughts look like and what they cost -> rows of Markdown: means over the seeds."""
    rows = ["| thoughts | tokens | words | distinct-2 | compressed to | FLOPs | minutes |",
            "|---|---|---|---|---|---|---|"]
    lines = sum((read_json(f"{run}/results.json") for run in runs), [])
    described = {}
    for run in runs:
        for checkpoint, some in read_responses([f"{run}/thoughts.jsonl"]).items():
            described.setdefault(Path(checkpoint).parent.name, []).append(describe(some))
    for name in dict.fromkeys(map(run_of, lines)):
        tokens = np.mean([line["len_mean"] for line in lines
                          if run_of(line) == name and line["mode"] == "reasoning"])
        words, distinct, compressed = (np.mean([line[key] for line in described[name]])
                                       for key in ("words_mean", "distinct_2", "compression"))
        spent = np.mean([flops(run, name) for run in runs])
        took = np.mean([minutes(run, name) for run in runs])
        rows.append(f"| {name} | {tokens:.0f} | {words:.1f} | {distinct:.3f} | {compressed:.3f} | "
                    f"{spent:.1e} | {took:.1f} |")
    return rows


def table(out_dir, seeds):
    """Everything as Markdown."""
    runs = [f"{out_dir}/seed-{seed}" for seed in seeds]
    rows = [f"Seeds {', '.join(map(str, seeds))}", ""]
    for split in SPLITS:
        rows += [*accuracies(runs, split), ""]
    return "\n".join([*rows, *questions(runs), "", *shapes(runs)])


def parse_args():
    parser = flags.Parser("Controls and ablations of RPT on the embedded model.")
    add = parser.add_argument
    add("--seeds", type=flags.at_least(0), nargs="+", default=[0, 1, 2],
        help="of corpus, base and runs")
    add("--only", nargs="+", default=TRAINED, choices=TRAINED, metavar="NAME",
        help="rpt and these alone")
    add("--out-dir", default="runs/controls", help="folder for everything, below this repository")
    args = parser.parse_args()
    if len(args.out_dir.split()) != 1:
        raise ValueError(f"--out-dir {args.out_dir!r}: take a name without blanks")
    return args


if __name__ == "__main__":
    sys.excepthook = flags.speak_once
    args = parse_args()
    os.chdir(flags.ROOT)
    for seed in args.seeds:
        names = ["rpt", *args.only]
        if CALIBRATED.keys() & set(names):
            names.append("calibrated")
        run_seed(f"{args.out_dir}/seed-{seed}", seed, list(dict.fromkeys(names)))
    words = table(args.out_dir, args.seeds)
    write(f"{args.out_dir}/table.md", words + "\n")
    print(f"\n{words}\n\nwritten to {args.out_dir}/table.md")
