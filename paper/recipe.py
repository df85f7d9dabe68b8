"""RPT on your own model and text: from a folder of the hub to a table and a picture.

    python paper/recipe.py --model SmolLM2-135M --text omni.jsonl --out-dir runs/omni
    python paper/recipe.py --model SmolLM2-135M --text omni.jsonl --out-dir runs/omni --controls

It is a chain of ordinary commands, printed as they run; each can be repeated, edited or continued
by hand. A finished one is not run again, so the same command continues after Ctrl-C. --text is
what data/prepare.py reads. --controls spends the FLOPs of RPT (without those of the warm start) on
    ntp     plain text, from the warm start
    mixed   plain text and drafts in one stage, from the model itself
    own     the warm start's own right rollouts: RPT without its wrong ones
    empty   RPT from the warm start whose prompt closes the thought at once
    blind   RPT from another warm start, on drafts of one token: thoughts that do not look ahead
On a GPU: --steps 2400 --batch-size 256 --documents 2000, and a larger --model.
"""
import json
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # the repository, not paper/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
import demo
from demo import Stage
from plumbing import flags
from plumbing.files import latest_checkpoint, lock, read_json, sign, write

DRAFT_STEPS = 400        # updates of the warm start
STRINGS = 4              # prompts in each of them, with 6 drafts or fewer
MICRO_BATCH = dict(cpu=2048, cuda=16384)   # tokens
TEXT = "--corpus {run}/corpus --dtype {dtype} --seed {seed} "
ASK = "--template short --max-prompt-tokens 128 "
DRAFT = "data/warmstart.py --proxy {model} " + TEXT + ASK + "--device {device} --count {count} "
NTP = "train_ntp.py " + TEXT + "--tokens-per-micro-batch {tokens} --resume "
# A little plain text keeps the model from ending a thought where there is none.
WARM = (NTP + "--init {model} --documents-per-step 1 --max-tokens 128 --strings-per-step {strings} "
        "--steps {draft_steps} --lr 1e-4 --warmup-steps 4 ")
RPT = ("train_rpt.py " + TEXT + ASK + "--entropy-threshold 0.5 --max-new-tokens 40 --batch-size "
       "{batch} --rollouts 8 --temperature 1.0 --lr {lr} --grad-clip 1.0 --save-every 25 "
       "--dynamic-sampling-from -1 --tokens-per-micro-batch {tokens} --resume ")
SAME = "--match-compute {run}/rpt "
EVAL = ("eval.py lm " + TEXT + ASK + "--max-new-tokens 64 --positions {positions} --samples 4 "
        "--hits {run}/hits.jsonl --dump {run}/thoughts.jsonl ")
MODES = "--mode ntp reasoning majority greedy empty swapped --out "

STAGES = [
    Stage("Make a corpus of the text.",
          "data/prepare.py {text} --tokenizer {model} --out {run}/corpus",
          "{run}/prepared"),
    Stage("Find the tokens that are hard to guess: the entropy of the model's prediction at every "
          "position of some documents.",
          "data/filter.py --corpus {run}/corpus --proxy {model} --documents {documents} "
          "--dtype {dtype}",
          "{run}/filtered"),
    Stage("Let the model continue the text at such places; a thought is such a draft, and the box "
          "holds its first token.",
          DRAFT + "--out {run}/drafts.jsonl",
          "{run}/drafts.jsonl"),
    Stage("Teach it this form.",
          WARM + "--strings {run}/drafts.jsonl --out-dir {run}/warm",
          "{run}/warm/done"),
    Stage("Reinforcement pre-training: think, predict, and let the text say who was right.",
          RPT + "--init {warm} --steps {steps} --out-dir {run}/rpt",
          "{run}/rpt/done"),
    Stage("Measure the model's guessing on text that it has not been trained on.",
          EVAL + "--mode ntp --out {run}/base.json --checkpoints {model}",
          "{run}/guessed"),
    Stage("Measure guessing and thinking after the warm start and after RPT on the same positions.",
          EVAL + MODES + "{run}/rpt/results.json --beside {run}/base.json "
          "--checkpoints {warm} {rpt}",
          "{run}/measured"),
    Stage("Draw the run.", "plot.py {run}/rpt", "{run}/rpt/curves.png"),
    Stage("Draw the table.", "plot.py {run}/rpt --kind table1", "{run}/rpt/table1.png"),
    Stage("What has changed, on the same positions, against the model's own guessing?",
          "paper/paired.py {run}/hits.jsonl --corpus {run}/corpus --against {model} ntp "
          "--out {run}/paired.md",
          "{run}/paired.md"),
]
CONTROLS = [
    Stage("Control ntp: plain text.",
          NTP + SAME + "--init {warm} --documents-per-step 8 --max-tokens 128 --lr {lr} "
          "--out-dir {run}/ntp",
          "{run}/ntp/done"),
    Stage("Control mixed: plain text and drafts.",
          NTP + SAME + "--init {model} --documents-per-step 4 --max-tokens 128 --lr 1e-4 "
          "--strings {run}/drafts.jsonl --strings-per-step {strings} --out-dir {run}/mixed",
          "{run}/mixed/done"),
    Stage("Sample the warm start's own rollouts, as many as RPT has.",
          "paper/own_rollouts.py --init {warm} " + TEXT + ASK + "--device {device} "
          "--max-new-tokens 40 --count {own} --rollouts 8 --out {run}/own.jsonl",
          "{run}/own.jsonl"),
    Stage("Control own: those that were right.",
          NTP + SAME + "--init {warm} --updates-only --documents-per-step 0 --lr {lr} "
          "--strings {run}/own.jsonl --strings-per-step 16 --out-dir {run}/own",
          "{run}/own/done"),
    Stage("Control empty: RPT without a thought.",
          RPT + SAME + "--init {warm} --objective no_thought --steps {many} --out-dir {run}/empty",
          "{run}/empty/done"),
    Stage("Drafts of one token.",
          DRAFT + "--draft-tokens 1 --out {run}/blind.jsonl",
          "{run}/blind.jsonl"),
    Stage("A warm start on them.",
          WARM + "--strings {run}/blind.jsonl --out-dir {run}/warm-blind",
          "{run}/warm-blind/done"),
    Stage("Control blind: RPT from there.",
          RPT + SAME + "--init {warm_blind} --steps {many} --out-dir {run}/blind",
          "{run}/blind/done"),
    Stage("Measure the controls on the same positions.",
          EVAL + MODES + "{run}/controls.json --beside {run}/rpt/results.json "
          "--checkpoints {ntp} {mixed} {own_run} {empty} {warm_blind} {blind}",
          "{run}/controls-measured"),
    Stage("Compare them with the model's own guessing.",
          "paper/paired.py {run}/hits.jsonl --corpus {run}/corpus --against {model} ntp "
          "--out {run}/controls.md",
          "{run}/controls.md"),
]


def check_flags(args):
    """A run that continues has the flags that it began with; ValueError names one that differs."""
    path, chosen = Path(args.out_dir, "recipe.json"), dict(vars(args), controls=None)
    if not path.exists():
        write(str(path), json.dumps(chosen))
    for name, value in read_json(path).items():
        if chosen[name] != value:
            raise ValueError(f"{args.out_dir} was begun with --{name.replace('_', '-')} {value}, "
                             f"not {chosen[name]}; take the same flags or another --out-dir")


def names(args):
    """-> what fills the braces of the commands."""
    run = args.out_dir
    newest = {name: latest_checkpoint(f"{run}/{name}")
              for name in ("warm", "rpt", "ntp", "mixed", "empty", "blind")}
    return newest | dict(
        run=run, model=args.model, text=args.text, seed=args.seed, dtype=args.dtype, lr=args.lr,
        device=args.device, documents=args.documents, positions=args.positions, steps=args.steps,
        batch=args.batch_size, many=20 * args.steps, own=args.steps * args.batch_size,
        tokens=MICRO_BATCH[args.device], strings=STRINGS, draft_steps=DRAFT_STEPS,
        count=STRINGS * DRAFT_STEPS, own_run=latest_checkpoint(f"{run}/own"),
        warm_blind=latest_checkpoint(f"{run}/warm-blind"))


def parse_args():
    parser = flags.Parser("RPT on your own model and text, from a folder of the hub to a table.")
    add, at_least = parser.add_argument, flags.at_least
    add("--model", required=True, help="checkpoint folder (Hugging Face layout)")
    add("--text", required=True, help="what data/prepare.py reads: .jsonl, .txt or a folder")
    add("--out-dir", required=True, help="folder for everything")
    add("--steps", type=at_least(1), default=120, help="of RPT")
    add("--batch-size", type=at_least(1), default=24, help="positions in a step of RPT")
    add("--lr", type=at_least(0, float), default=2e-5,
        help="of RPT and of the controls that start where it does")
    add("--documents", type=at_least(2), default=150,
        help="documents to score, so many to train on and so many held out")
    add("--positions", type=at_least(1), default=400, help="held-out positions of each split")
    add("--controls", action="store_true", help="also spend RPT's FLOPs in other ways")
    add("--seed", type=at_least(0), default=0, help="of everything")
    flags.add_device_flag(add, dtype="auto")
    return parser.parse_args()


if __name__ == "__main__":
    sys.excepthook = flags.speak_once
    args = parse_args()
    if os.getcwd() != flags.ROOT:  # commands are run, and printed, from the repository
        args.model, args.text, args.out_dir = map(os.path.abspath,
                                                  (args.model, args.text, args.out_dir))
        os.chdir(flags.ROOT)
    locked = lock(args.out_dir)
    sign(locked)
    check_flags(args)
    start = time.perf_counter()
    demo.run_stages(STAGES + CONTROLS * args.controls, names, args)
    minutes = (time.perf_counter() - start) / 60
    tables = "controls.md" if args.controls else "paired.md"
    print(f"\n{minutes:.0f} minutes. In {args.out_dir}: {tables} and rpt/table1.png (the tables), "
          "rpt/curves.png, thoughts.jsonl (what each model thought about each position)")
