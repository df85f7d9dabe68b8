"""The whole story on a laptop: `python train_rpt.py` without arguments runs this.

It is a chain of ordinary commands, printed as they run; each can be repeated, edited or continued
by hand. A finished stage is not run again, so the same command continues after Ctrl-C.

    python demo.py --out-dir runs/demo-1 --seed 1              the same with other random numbers
    python demo.py --out-dir runs/demo-1 --seed 1 --control    and the next-token control
"""
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from plumbing import flags
from plumbing.checkpoint import latest_checkpoint

BASE_STEPS, RPT_STEPS = 3000, 150
EVAL = ("eval.py lm --corpus {run}/corpus --template short --max-new-tokens 64 --positions 500 "
        "--samples 4 --seed {seed} --out ")
NTP = "train_ntp.py --corpus {run}/corpus --problem-weight 0.3 --seed {seed} --resume "

# What a stage does and why, its command, and the file that shows that it is done.
STAGES = [
    ("Write a corpus: sums to be worked out from left to right, with their answers in words.",
     "data/toy.py --out {run}/corpus --seed {seed}",
     "{run}/corpus/strings.jsonl"),
    ("Train a small base model on that text and on thoughts of mixed quality: most are skipped, "
     "some are wrong.",
     NTP + "--out-dir {run}/base --strings {run}/corpus/strings.jsonl --steps {base_steps} "
     "--documents-per-step 6 --strings-per-step 24 --lr 2e-3 --save-every 500",
     "{base}/config.json"),
    ("Find the tokens that are hard to guess: the entropy of the base model's prediction at every "
     "position.",
     "data/filter.py --corpus {run}/corpus --proxy {base} --documents 1200",
     "{run}/corpus/filtered"),
    ("Measure the base on text it has not seen: guessing at once (ntp) and thinking first "
     "(reasoning).",
     EVAL + "{run}/before.json --checkpoints {base}",
     "{run}/before.json"),
    ("Reinforcement pre-training: think, predict, and let the text itself say whether that was "
     "right.",
     "train_rpt.py --init {base} --corpus {run}/corpus --out-dir {run}/rpt --template short "
     "--entropy-threshold 0.5 --steps {rpt_steps} --batch-size 32 --rollouts 8 "
     "--max-new-tokens 64 --temperature 1.0 --lr 1e-4 --grad-clip 1.0 --seed {seed} --resume",
     "{rpt}/config.json"),
    ("Measure both on the same unseen positions.",
     EVAL + "{run}/rpt/results.json --checkpoints {base} {rpt} --dump {run}/thoughts.jsonl",
     "{run}/rpt/results.json"),
    ("Draw what happened.",
     "plot.py {run}/rpt",
     "{run}/rpt/curves.png"),
]
CONTROL = [
    ("The control: next-token prediction on the same text, from the same base, for the FLOPs that "
     "RPT has spent.",
     NTP + "--out-dir {run}/control --init {base} --match-compute {run}/rpt "
     "--documents-per-step 24 --lr 1e-3",
     "{run}/control/done"),
    ("Measure base, control and RPT on the same unseen positions.",
     EVAL + "{run}/control/results.json --checkpoints {base} {control} {rpt}",
     "{run}/control/results.json"),
]
ENDING = """
{seconds:.0f} s. Everything lies in {run}:
    rpt/curves.png       the picture             rpt/results.json     the table
    rpt/samples.jsonl    thoughts of every step  rpt/metrics.jsonl    numbers of every step
Next:
    echo -n "Problem: Mia works out 3+4*7 from left to right and keeps the last digit.
Solution: The digit is" | python sample.py --model {rpt} --think --template short \\
                                           --max-new-tokens 64 --n 4
    python demo.py --control                the same compute spent on next-token prediction
    docs/own_text.md                        the same with a real checkpoint and your own text"""


def run_stages(stages, names, args):
    """Run the commands whose result is not there yet. names(args) fills in their braces."""
    for number, (why, command, result) in enumerate(stages, 1):
        command, result = command.format(**names(args)), result.format(**names(args))
        print(f"\n[{number}/{len(stages)}] {why}\n$ python {command}", flush=True)
        if os.path.exists(result):
            print("    done before")
            continue
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *shlex.split(command)])
        stopped = pass_on_signals(process)
        code = process.wait()
        if code or stopped:
            print("the same command continues here" if stopped else f"stage {number} failed",
                  flush=True)
            sys.exit(code or 130)
        Path(result).touch()  # marks a stage that leaves no such file as done
        print(f"    {time.perf_counter() - start:.0f} s")


def pass_on_signals(process):
    """-> a list that Ctrl-C or SIGTERM fills; the command that runs saves and ends with 0."""
    stopped = []

    def handle(number, frame):
        stopped.append(number)
        if number == signal.SIGTERM:  # Ctrl-C has reached the command already
            process.terminate()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return stopped


def show_a_thought(path, base, rpt):
    """Print the first position that the base gets wrong and RPT gets right."""
    with open(path, encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    befores = {r["context"]: r for r in records if r["checkpoint"] == base}
    afters = {r["context"]: r for r in records if r["checkpoint"] == rpt}
    for context, after in afters.items():
        before = befores[context]
        if after["reward"] and not before["reward"]:
            print("\nThe first held-out position that the base gets wrong and RPT gets right:\n"
                  f"{context}\n    before {before['response']}\n    after  {after['response']}\n"
                  f"    truth  {after['truth']!r}")
            return


def names(args):
    """-> what fills the braces of the commands."""
    run = args.out_dir
    return dict(run=run, seed=args.seed, base_steps=BASE_STEPS, rpt_steps=RPT_STEPS,
                base=f"{run}/base/step_{BASE_STEPS:06d}", rpt=f"{run}/rpt/step_{RPT_STEPS:06d}",
                control=latest_checkpoint(f"{run}/control"))


def parse_args():
    parser = flags.Parser("Corpus, base, filter, RPT, table and picture in five to ten minutes.")
    add = parser.add_argument
    add("--out-dir", default="runs/demo", help="folder for everything, below this repository")
    add("--seed", type=flags.at_least(0), default=0,
        help="of everything: corpus, weights, order and sampling")
    add("--control", action="store_true", help="also train and measure next-token prediction")
    return parser.parse_args()


if __name__ == "__main__":
    sys.excepthook = flags.speak_once
    args = parse_args()
    os.chdir(flags.ROOT)
    start = time.perf_counter()
    run_stages(STAGES, names, args)
    show_a_thought(f"{args.out_dir}/thoughts.jsonl", names(args)["base"], names(args)["rpt"])
    if args.control:
        run_stages(CONTROL, names, args)
    print(ENDING.format(seconds=time.perf_counter() - start, **names(args)))
