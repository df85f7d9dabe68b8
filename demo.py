"""The whole story on a laptop: `python train_rpt.py` without arguments runs this.

A chain of ordinary commands, printed as they run; each can be repeated, edited or continued by hand. A finished
stage is not run again: Ctrl-C and a new start go on where the last one stopped.

    python demo.py --out-dir runs/demo-1 --seed 1               the same with other random numbers
    python demo.py --out-dir runs/demo-1 --seed 1 --control     and the next-token control at equal compute
"""
import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time

from plumbing.checkpoint import latest_checkpoint
from plumbing.flags import speak_once

BASE_STEPS, RPT_STEPS = 3000, 150
EVAL = ("eval.py lm --corpus {run}/corpus --template short --max-new-tokens 64 --positions 500 --samples 4 "
        "--seed {seed} --out ")
NTP = "train_ntp.py --corpus {run}/corpus --problem-weight 0.3 --seed {seed} --resume "

# (what happens and why, the command, the file that says it is done)
STAGES = [
    ("Write a corpus: sums to be worked out from left to right, with their answers in words.",
     "data/toy.py --out {run}/corpus --seed {seed}",
     "{run}/corpus/strings.jsonl"),
    ("Train a small base model on that text and on thoughts of mixed quality: most are skipped, many are wrong.",
     NTP + "--out-dir {run}/base --strings {run}/corpus/strings.jsonl --steps {base_steps} "
     "--documents-per-step 6 --strings-per-step 24 --lr 2e-3 --save-every 500",
     "{base}/config.json"),
    ("Find the tokens that are hard to guess: the entropy of the base model's prediction at every position.",
     "data/filter.py --corpus {run}/corpus --proxy {base} --documents 1200",
     "{run}/corpus/filtered"),
    ("Measure the base on text it has not seen: guessing at once (ntp) and thinking first (reasoning).",
     EVAL + "{run}/before.json --checkpoints {base}",
     "{run}/before.json"),
    ("Reinforcement pre-training: think, predict, and let the text itself say whether that was right.",
     "train_rpt.py --init {base} --corpus {run}/corpus --out-dir {run}/rpt --template short "
     "--entropy-threshold 0.5 --steps {rpt_steps} --batch-size 32 --rollouts 8 --max-new-tokens 64 "
     "--temperature 1.0 --lr 1e-4 --grad-clip 1.0 --seed {seed} --resume",
     "{rpt}/config.json"),
    ("Measure both on the same unseen positions.",
     EVAL + "{run}/rpt/results.json --checkpoints {base} {rpt} --dump {run}/thoughts.jsonl",
     "{run}/rpt/results.json"),
    ("Draw what happened.",
     "plot.py {run}/rpt",
     "{run}/rpt/curves.png"),
]
CONTROL = [
    ("The control: next-token prediction on the same text, from the same base, for the FLOPs that RPT has spent.",
     NTP + "--out-dir {run}/control --init {base} --match-compute {run}/rpt --documents-per-step 24 --lr 1e-3",
     "{run}/control/done"),
    ("Measure base, control and RPT on the same unseen positions.",
     EVAL + "{run}/control/results.json --checkpoints {base} {control} {rpt}",
     "{run}/control/results.json"),
]


def run_stages(stages, names):
    """Run the commands whose result is not there yet. names(): what stands in their braces."""
    for number, (why, command, result) in enumerate(stages, 1):
        command, result = command.format(**names()), result.format(**names())
        print(f"\n[{number}/{len(stages)}] {why}\n$ python {command}", flush=True)
        if os.path.exists(result):
            print("    done before")
            continue
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *shlex.split(command)])
        stopped = pass_on_signals(process)
        code = process.wait()
        if code or stopped:
            print("the same command continues here" if stopped else f"stage {number} failed", flush=True)
            sys.exit(code or 130)
        open(result, "a").close()  # for the stages that leave no file of that name
        print(f"    {time.perf_counter() - start:.0f} s")


def pass_on_signals(process):
    """-> a list that Ctrl-C or SIGTERM fills: the command saves and ends with 0, and no other shall follow."""
    stopped = []

    def handle(number, frame):
        stopped.append(number)
        if number == signal.SIGTERM:  # Ctrl-C has reached the command already
            process.terminate()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return stopped


def show_a_thought(path, base, rpt):
    """The first position that the base gets wrong and RPT gets right, in words."""
    with open(path) as file:
        records = [json.loads(line) for line in file]
    before = {r["context"]: r for r in records if r["checkpoint"] == base}
    for after in records:
        if after["checkpoint"] == rpt and after["reward"] and not before[after["context"]]["reward"]:
            print(f"\nOne held-out position, before and after RPT:\n{after['context']}\n"
                  f"    before {before[after['context']]['response']}\n"
                  f"    after  {after['response']}\n"
                  f"    truth  {after['truth']!r}")
            return


def run(out_dir="runs/demo", seed=0, control=False):
    """Everything, into out_dir (relative to this repository) -> exit code."""
    os.chdir(os.path.dirname(os.path.abspath(__file__)))
    start = time.perf_counter()
    base, rpt = f"{out_dir}/base/step_{BASE_STEPS:06d}", f"{out_dir}/rpt/step_{RPT_STEPS:06d}"
    names = lambda: dict(run=out_dir, seed=seed, base=base, base_steps=BASE_STEPS, rpt=rpt, rpt_steps=RPT_STEPS,
                         control=latest_checkpoint(f"{out_dir}/control"))
    run_stages(STAGES, names)
    show_a_thought(f"{out_dir}/thoughts.jsonl", base, rpt)
    if control:
        run_stages(CONTROL, names)
    print(f"""
{time.perf_counter() - start:.0f} s. Everything lies in {out_dir}:
    rpt/curves.png       the picture             rpt/results.json     the table
    rpt/samples.jsonl    thoughts of every step  rpt/metrics.jsonl    numbers of every step
Next:
    echo -n "Problem: Mia works out 3+4*7 from left to right and keeps the last digit.
Solution: The digit is" | python sample.py --model {rpt} --think --template short --max-new-tokens 64 --n 4
    python demo.py --control                the same compute spent on next-token prediction
    README.md, "Your own model and text"    the same with a real checkpoint""")
    return 0


if __name__ == "__main__":
    sys.excepthook = speak_once
    parser = argparse.ArgumentParser(description="Corpus, base, filter, RPT, table and picture in a few minutes.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out-dir", default="runs/demo", help="folder for everything, below this repository")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--control", action="store_true", help="also train and measure the next-token control")
    args = parser.parse_args()
    sys.exit(run(args.out_dir, args.seed, args.control))
