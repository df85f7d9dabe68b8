"""Is it the thinking, or something cheaper? Controls and ablations of RPT on the embedded model, in one table.

    python controls.py --seeds 0 1 2                        about 35 minutes a seed on one core
    python controls.py --seeds 0 --only rpt ntp             some of them; a new start continues

Every seed has its own corpus, base model and filter (demo.py), and everything below starts from that base:
    rpt           the run that is explained
    ntp           next-token prediction on the same text, for the FLOPs that rpt has spent
    ntp-hard      the same with a loss only for tokens that rpt may train on: those above its threshold
    sft-own       supervised training on the base's own right rollouts: as many rollouts as rpt has sampled,
                  then as many FLOPs as rpt's updates
    no-thought    RPT whose prompt closes the thought at once; its steps are short, so it takes more of them
    others        rpt with one flag changed, see VARIANTS
Then all of them answer the same held-out positions, guessing (ntp), thinking (reasoning) and with an empty
thought; rpt's checkpoints are fitted (scaling.py); and base, ntp and rpt are trained with the same budget on
questions with exact answers that the text does not hold (Table 2 of the paper).
"""
import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # the repository, not paper/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from plumbing.checkpoint import latest_checkpoint, write
from plumbing.flags import speak_once
from demo import BASE_STEPS, RPT_STEPS, STAGES, run_stages

RPT = ("train_rpt.py --init {base} --corpus {run}/corpus --template short --entropy-threshold 0.5 "
       "--batch-size 32 --rollouts 8 --max-new-tokens 64 --temperature 1.0 --lr 1e-4 --grad-clip 1.0 "
       "--seed {seed} --resume --steps {rpt_steps} --save-every 10 --out-dir {run}/")
NTP = "train_ntp.py --corpus {run}/corpus --init {base} --match-compute {run}/rpt --seed {seed} --resume "
SFT = "--updates-only --strings {run}/own.jsonl --documents-per-step 0 --strings-per-step 32 --lr 3e-4 "
EVAL = ("eval.py lm --corpus {run}/corpus --proxy {base} --template short --max-new-tokens 64 "
        "--temperature 0.8 --positions 500 --samples 4 --max-prompt-tokens 128 ")
ANSWERS = ("train_rpt.py --task answers --data {run}/corpus/questions.jsonl --template short --batch-size 32 "
           "--rollouts 8 --max-new-tokens 96 --temperature 1.0 --lr 1e-4 --grad-clip 1.0 --seed {seed} "
           "--resume --steps 50 --out-dir {run}/")
ASK = ("eval.py answers --data {run}/corpus/questions_val.jsonl --template short --max-new-tokens 96 "
       "--samples 4 ")

VARIANTS = {  # name: what differs from rpt (a later flag wins)
    "no-thought": "--no-thought --steps 800",  # twice the FLOPs of rpt
    "first-token": "--reward first-token", "dense": "--reward dense",
    "conditional-dense": "--reward conditional-dense",
    "G-4": "--rollouts 4 --batch-size 64", "G-16": "--rollouts 16 --batch-size 16",
    "all-positions": "--entropy-threshold 0", "hard-positions": "--entropy-threshold 1.5",
    "dynamic": "--dynamic-sampling-from 0",
    "normalised": "--normalize-advantage"}
TRAINED = ["rpt", "ntp", "ntp-hard", "sft-own", *VARIANTS]
TUNED = {"base": "{base}", "ntp": "{ntp}", "rpt": "{rpt}",  # for Table 2: what RL on questions starts from
         "longer": "{base} --steps 200"}                    # as many steps as rpt and its RL together
FITTED = [10, 20, 30, 40, 60, 80, 100, 125, 150]      # steps of rpt, for the scaling fit


def stages_of(names):
    """Names of what to train -> the stages of one seed, as demo.run_stages takes them."""
    stages = list(STAGES[:2])
    stage = lambda why, command, result: stages.append((why, command, result))
    why, command, result = STAGES[2]
    stage(why, command.replace(" --documents 1200", ""), result)  # all: nobody shall see a document many times
    stage("RPT.", RPT + "rpt --save-every 5", "{run}/rpt/done")
    if "ntp" in names:
        stage("Control: next-token prediction for the same FLOPs.",
              NTP + "--documents-per-step 24 --lr 1e-3 --out-dir {run}/ntp", "{run}/ntp/done")
    if "ntp-hard" in names:
        stage("Control: the same, a loss only for tokens that RPT may train on.",
              NTP + "--documents-per-step 24 --lr 1e-3 --entropy-threshold 0.5 --proxy {base} "
              "--out-dir {run}/ntp-hard", "{run}/ntp-hard/done")
    if "sft-own" in names:
        stage("The base's own rollouts that were right: as many sampled as in RPT.",
              "data/warmstart.py --own --corpus {run}/corpus --proxy {base} --template short --count {positions} "
              "--samples 8 --max-new-tokens 64 --seed {seed} --out {run}/own.jsonl", "{run}/own.jsonl")
        stage("Control: supervised training on them.",
              NTP + SFT + "--out-dir {run}/sft-own", "{run}/sft-own/done")
    for name in names:
        if name in VARIANTS:
            stage(f"RPT with {VARIANTS[name]}.", RPT + f"{name} {VARIANTS[name]}", f"{{run}}/{name}/done")
    stage("Everything on the same held-out positions.",
          EVAL + "--mode all --dump {run}/thoughts.jsonl --out {run}/results.json --checkpoints {base} {trained}", "{run}/results.json")
    stage("RPT's checkpoints, for the scaling fit.",
          EVAL + "--mode reasoning --out {run}/rpt/results.json --checkpoints {rpt_checkpoints}",
          "{run}/rpt/results.json")
    stage("The fit.", "paper/scaling.py {run}/rpt --out {run}/scaling.json", "{run}/scaling.json")
    for name, init in TUNED.items():
        if name in ("base", "longer", *names):
            stage(f"RL on questions with exact answers: {name}.",
                  ANSWERS + f"tuned-{name} --init {init}", f"{{run}}/tuned-{name}/done")
    stage("Held-out questions, before and after.", ASK + "--out {run}/answers.json --checkpoints {tuned}",
          "{run}/answers.json")
    return stages


def newest(run, names):
    """-> checkpoint folders of runs that exist, in this order."""
    return [folder for folder in (latest_checkpoint(f"{run}/{name}") for name in names) if folder]


def forget_tables(run, names):
    """Delete results that lack one of these: of a call with other names."""
    tuned = {f"tuned-{name}" for name in TUNED if name in ("base", "longer", *names)}
    for file, wanted in (("results.json", set(names)), ("answers.json", tuned)):
        path = Path(run, file)
        if path.exists() and not wanted <= {Path(r["checkpoint"]).parent.name for r in json.loads(path.read_text())}:
            path.unlink()


def run_seed(run, seed, names):
    """Everything of one seed into the folder `run`; what is there already is not done again."""
    base = f"{run}/base/step_{BASE_STEPS:06d}"
    forget_tables(run, names)

    def words():
        tuned = [folder for name in TUNED
                 for folder in (newest(run, [name]) or [base]) + newest(run, [f"tuned-{name}"])]
        rpt = newest(run, ["rpt"])
        return dict(run=run, seed=seed, base=base, base_steps=BASE_STEPS, rpt_steps=RPT_STEPS,
                    ntp=" ".join(newest(run, ["ntp"])), rpt=" ".join(rpt), positions=RPT_STEPS * 32,
                    trained=" ".join(newest(run, names)), tuned=" ".join(dict.fromkeys(tuned)),
                    rpt_checkpoints=" ".join(f"{run}/rpt/step_{step:06d}" for step in FITTED))

    run_stages(stages_of(names), words)


def flops(run, name):
    path = Path(run, name, "metrics.jsonl")
    return sum(json.loads(line)["flops"] for line in open(path)) if path.exists() else 0


def cell(values):
    """Accuracies of the seeds -> their mean and themselves."""
    return f"{np.mean(values):.1f} ({', '.join(f'{v:.1f}' for v in values)})" if values else "-"


def table(out_dir, seeds, split="medium"):
    """results.json and answers.json of all seeds -> Markdown: mean (each seed), in percent."""
    runs = [f"{out_dir}/seed-{seed}" for seed in seeds]
    read = lambda run, name: json.loads(Path(run, name).read_text())
    name_of = lambda line: Path(line["checkpoint"]).parent.name
    lines = [line for run in runs for line in read(run, "results.json") if line["split"] == split]
    names = list(dict.fromkeys(map(name_of, lines)))
    rows = [f"| {split} positions, seeds {', '.join(map(str, seeds))} | guessing | thinking | one of 4 thoughts | "
            "empty thought | FLOPs |", "|---|---|---|---|---|---|"]
    for name in names:
        cells = [cell([line[key] for line in lines if name_of(line) == name and line["mode"] == mode])
                 for mode, key in (("ntp", "accuracy"), ("reasoning", "accuracy"), ("reasoning", "pass_at_k"),
                                   ("empty", "accuracy"))]
        rows.append(f"| {name} | {' | '.join(cells)} | {np.mean([flops(run, name) for run in runs]):.1e} |")
    rows += ["", "| questions, from | before RL | after RL | FLOPs after the base |", "|---|---|---|---|"]
    lines = [line for run in runs for line in read(run, "answers.json")]
    for name in TUNED:
        before, after = ([line["accuracy"] for line in lines if name_of(line) == n]
                         for n in (name, f"tuned-{name}"))
        spent = [flops(run, f"tuned-{name}") + (name != "base") * flops(run, name) for run in runs]
        rows.append(f"| {name} | {cell(before)} | {cell(after)} | {np.mean(spent):.1e} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.excepthook = speak_once
    parser = argparse.ArgumentParser(description="Controls and ablations of RPT on the embedded model.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of corpus, base and runs")
    parser.add_argument("--only", nargs="+", default=argparse.SUPPRESS, choices=TRAINED, metavar="NAME",
                        help=f"rpt and these alone, of {', '.join(TRAINED)}")
    parser.add_argument("--out-dir", default="runs/controls", help="folder for everything, below this repository")
    args = parser.parse_args()
    only = getattr(args, "only", TRAINED)
    os.chdir(Path(__file__).resolve().parent.parent)
    for seed in args.seeds:
        run_seed(f"{args.out_dir}/seed-{seed}", seed, list(dict.fromkeys(["rpt", *only])))
    words = table(args.out_dir, args.seeds)
    write(f"{args.out_dir}/table.md", words + "\n")
    print(f"\n{words}\n\nwritten to {args.out_dir}/table.md")
