"""The whole story on a laptop: `python train_rpt.py` without arguments runs this.

It is a chain of ordinary commands, printed as they run; each can be repeated, edited or continued
by hand. A finished stage is not run again, so the same command continues after Ctrl-C.

    python demo.py --out-dir runs/demo-1 --seed 1              the same with other random numbers
    python demo.py --out-dir runs/demo-1 --seed 1 --control    and two controls
"""
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # nothing is there to be saved while torch is imported
    signal.signal(signal.SIGINT, signal.SIG_DFL)
from plumbing import flags
from plumbing.checkpoint import latest_checkpoint, on_interrupts
from plumbing.files import lock, sign

BASE_STEPS, RPT_STEPS = 2400, 200
THREADS = 4         # at most, for so small a model
EVAL = ("eval.py lm --corpus {run}/corpus --template short --max-new-tokens 64 --positions 500 "
        "--samples 8 --seed {seed} --dump {run}/thoughts.jsonl --out ")
NTP = "train_ntp.py --corpus {run}/corpus --problem-weight 0.3 --seed {seed} --resume "


class Stage(NamedTuple):
    why: str
    command: str           # braces are filled in by `names`
    result: str            # the file that shows that the stage is done
    seconds: int = 0       # on two cores that do nothing else; 0: not known


STAGES = [
    Stage("Write a corpus: sums to be worked out from left to right, and what they come to.",
          "data/toy.py --out {run}/corpus --seed {seed}",
          "{run}/corpus/strings.jsonl", 5),
    Stage("Train a small base model on that text and on thoughts of mixed quality: most give up "
          "before the last step, some are skipped, some are wrong.",
          NTP + "--out-dir {run}/base --strings {run}/corpus/strings.jsonl --steps {base_steps} "
          "--documents-per-step 6 --strings-per-step 24 --lr 2e-3 --save-every 500",
          "{base}/config.json", 170),
    Stage("Find the tokens that are hard to guess: the entropy of the base model's prediction at "
          "every position.",
          "data/filter.py --corpus {run}/corpus --proxy {base} --documents 1800",
          "{run}/corpus/filtered", 13),
    Stage("Measure the base on text it has not seen: guessing at once (ntp), thinking first "
          "(reasoning), and what any other decoding can get out of it.",
          EVAL + "{run}/before.json --mode decodings --checkpoints {base}",
          "{run}/before.json", 20),
    Stage("Reinforcement pre-training: think, predict, and let the text itself say whether that "
          "was right. Watch the reward rise, and the thoughts grow (len).",
          "train_rpt.py --init {base} --corpus {run}/corpus --out-dir {run}/rpt --template short "
          "--entropy-threshold 0.5 --steps {rpt_steps} --batch-size 32 --rollouts 8 "
          "--max-new-tokens 64 --temperature 1.0 --lr 3e-4 --grad-clip 1.0 --seed {seed} --resume",
          "{rpt}/config.json", 80),
    Stage("Measure RPT on the same unseen positions.",
          EVAL + "{run}/rpt/results.json --mode all --beside {run}/before.json "
          "--checkpoints {rpt}",
          "{run}/rpt/results.json", 13),
    Stage("Draw what happened.",
          "plot.py {run}/rpt",
          "{run}/rpt/curves.png", 3),
]
CONTROL = [
    Stage("A control: next-token prediction on the same text, from the same base, for the FLOPs "
          "that RPT has spent.",
          NTP + "--out-dir {run}/control --init {base} --match-compute {run}/rpt "
          "--documents-per-step 24 --lr 1e-3",
          "{run}/control/done", 60),
    Stage("Another control: more of what made the base, text and thoughts of mixed quality, for "
          "as many FLOPs.",
          NTP + "--out-dir {run}/mixed --init {base} --match-compute {run}/rpt "
          "--strings {run}/corpus/strings.jsonl --documents-per-step 6 --strings-per-step 24 "
          "--lr 1e-3",
          "{run}/mixed/done", 60),
    Stage("Measure the controls on the same unseen positions, beside base and RPT.",
          EVAL + "{run}/control/results.json --mode all --beside {run}/rpt/results.json "
          "--checkpoints {control} {mixed}",
          "{run}/control/measured", 30),
    Stage("Draw all of them.",
          "plot.py {run}/control/results.json --kind table1",
          "{run}/control/table1.png", 3),
]
# For a shell, which drops the backslash and the end of its line.
PROMPT = """\"Problem: Mia works out 5+4*7*3 from left to right and keeps \\
the last digit. Which digit is it?
Solution: It is\""""


# ---- stages ----

def run_stages(stages, names, args):
    """Run the commands whose result is not there yet. names(args) fills in their braces."""
    stages = [Stage(*stage) for stage in stages]
    whole = sum(stage.seconds for stage in stages)
    running = []
    stopped = pass_on_signals(running)
    for number, stage in enumerate(stages, 1):
        known = names(args)
        result = stage.result.format(**known)
        # In a command, a folder may have blanks in its name.
        quoted = {name: shlex.quote(str(value)) for name, value in known.items()}
        words = shlex.split(stage.command.format(**quoted)) + options(stage.command, args)
        print("\n" + textwrap.fill(f"[{number}/{len(stages)}] {stage.why}", 80), flush=True)
        if stage.seconds:
            print(f"about {stage.seconds} s on two cores, "
                  f"{100 * stage.seconds / whole:.0f} % of the whole")
        print(shell_lines(["python", *words]), flush=True)
        if os.path.exists(result):
            print("    done before")
            continue
        start = time.perf_counter()
        # In a session of its own, because Ctrl-C on a terminal reaches all processes of one.
        if not stopped:
            running[:] = [subprocess.Popen([sys.executable, *words], start_new_session=True)]
            code = running[0].wait()
        if stopped or code:
            print("the same command continues here" if stopped else f"stage {number} failed",
                  flush=True)
            sys.exit(130 if stopped else code)
        Path(result).touch()  # marks a stage that leaves no such file as done
        print(f"    {time.perf_counter() - start:.0f} s")


def options(command, args):
    """The flags that a stage takes over from this command."""
    device = getattr(args, "device", None)
    takes_device = command.startswith(("train_", "eval.py", "data/filter.py"))
    return ["--device", device] if device and takes_device else []


def shell_lines(words):
    """A command as one types it, in lines of 80 columns, flags beside their values."""
    pieces = []
    for word in words:
        if word.startswith("--") or not pieces:
            pieces.append(shlex.quote(word))
        else:
            pieces[-1] += " " + shlex.quote(word)
    lines = ["$"]
    for piece in pieces:
        if len(lines[-1]) + len(piece) > 77 and lines[-1] != "$":
            lines.append("   ")
        lines[-1] += " " + piece
    return " \\\n".join(lines)


def pass_on_signals(running):
    """-> a list that Ctrl-C and others fill; running: a list with the current command.

    The command saves what it can and ends; at a second Ctrl-C it ends at once.
    """
    stopped = []

    def react(number, is_second_press):
        for process in running:
            if is_second_press:
                process.kill()
            else:
                # A command whose terminal is gone has to know; for the rest SIGTERM will do.
                hangup = number == getattr(signal, "SIGHUP", None)
                process.send_signal(number if hangup else signal.SIGTERM)
        stopped.append(number)

    on_interrupts(react)
    return stopped


# ---- threads ----

def choose_threads(run):
    """Set OMP_NUM_THREADS, unless it is set: as this run began, or as many as cores are free.

    Threads wait for each other, so one that has to share its core holds up the others. And another
    number of threads rounds differently, so a run that continues keeps the number in RUN/threads.
    """
    path = Path(run, "threads")
    if "OMP_NUM_THREADS" not in os.environ:
        threads = path.read_text(encoding="utf-8") if path.exists() else str(free_cores())
        os.environ["OMP_NUM_THREADS"] = threads
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(os.environ["OMP_NUM_THREADS"], encoding="utf-8")


def free_cores():
    """How many cores nothing else keeps busy during a second: 1 to THREADS."""
    cores, busy = os.cpu_count() or 1, 0
    if os.path.exists("/proc/stat"):  # Linux; elsewhere all cores count as free
        idle, everything = ticks()
        time.sleep(1)
        idle_later, everything_later = ticks()
        busy = cores * (1 - (idle_later - idle) / (everything_later - everything))
    return max(1, min(THREADS, round(cores - busy)))


def ticks():
    """-> idle and all ticks of all cores since the machine was started."""
    line = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0]
    user, nice, system, idle, iowait, *rest = map(int, line.split()[1:9])
    return idle + iowait, user + nice + system + idle + iowait + sum(rest)


# ---- what it shows at the end ----

def read_thoughts(path, checkpoint):
    """A dump of eval.py -> {context: the first thought that was sampled about it}."""
    with open(path, encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return {r["context"]: r for r in records
            if (r["checkpoint"], r["mode"]) == (checkpoint, "reasoning")}


def show_steps(befores, afters):
    """Print accuracy and length of the thoughts by number of steps of the problem."""
    by_steps = {}
    for context in afters:
        problem = re.search(r"\d([+*]\d)+", context)
        if problem:
            by_steps.setdefault(len(problem[0]) // 2, []).append(context)
    print("\none thought each, by steps of the problem"
          + "".join(f"{steps:>7}" for steps in sorted(by_steps)))
    for name, records in (("base", befores), ("RPT", afters)):
        right, length = [], []
        for _, contexts in sorted(by_steps.items()):
            some = [records[context] for context in contexts]
            right.append(100 * sum(r["reward"] for r in some) / len(some))
            length.append(sum(r["response"].count("=") for r in some) / len(some))
        print(f"    {name + ': right, %':37}" + "".join(f"{value:7.1f}" for value in right))
        print(f"    {name + ': steps of the thought':37}"
              + "".join(f"{value:7.1f}" for value in length))


def show_thoughts(befores, afters):
    """Print the first position that RPT mends, and the first that it spoils."""
    for better, worse, what in ((afters, befores, "base gets wrong and RPT gets right"),
                                (befores, afters, "base gets right and RPT gets wrong")):
        found = [context for context in afters
                 if better[context]["reward"] and not worse[context]["reward"]]
        print(f"\nPositions that the {what}: {len(found)} of {len(afters)}"
              + (", the first:" if found else ""))
        for context in found[:1]:
            lines = [textwrap.fill(line, 80) for line in context.split("\n")]
            print("\n".join(lines) + f"\n    before {befores[context]['response']}\n"
                  f"    after  {afters[context]['response']}\n"
                  f"    truth  {afters[context]['truth']!r}")


def ending(args, seconds):
    """Where everything lies, and what to do next."""
    run, me = shlex.quote(args.out_dir), "python demo.py"
    if args.out_dir != "runs/demo":
        me += f" --out-dir {run}"
    if args.seed:
        me += f" --seed {args.seed}"
    lines = [f"\n{seconds:.0f} s. Everything lies in {run}:",
             "    rpt/curves.png       the picture",
             f"    {'control' if args.control else 'rpt'}/results.json     the table"
             + (", drawn in control/table1.png" if args.control else ""),
             "    thoughts.jsonl       what base and RPT thought about each position",
             "    rpt/metrics.jsonl    the numbers of every step",
             "    rpt/samples.jsonl    thoughts of every step",
             "Next:",
             "    let it think about another text (9, then 63, then 3*3: nine):",
             f"        python sample.py --model {shlex.quote(names(args)['rpt'])} --think \\",
             "            --template short --max-new-tokens 64 --n 4 --prompt \\",
             PROMPT,
             "    edit the reward in objectives/rpt.py, train again from the same base:",
             "        README.md, What to edit"]
    if not args.control:
        lines += ["    spend the same compute on supervised training:", f"        {me} --control"]
    lines += ["    a real checkpoint and your own text:", "        docs/own_text.md"]
    return "\n".join(lines)


# ---- command line ----

def names(args):
    """-> what fills the braces of the commands."""
    run = args.out_dir
    return dict(run=run, seed=args.seed, base_steps=BASE_STEPS, rpt_steps=RPT_STEPS,
                base=f"{run}/base/step_{BASE_STEPS:06d}", rpt=f"{run}/rpt/step_{RPT_STEPS:06d}",
                control=latest_checkpoint(f"{run}/control"),
                mixed=latest_checkpoint(f"{run}/mixed"))


def parse_args():
    parser = flags.Parser("Corpus, base, filter, RPT, table and picture in five to ten minutes.")
    add = parser.add_argument
    add("--out-dir", default="runs/demo", help="folder for everything, below this repository")
    add("--seed", type=flags.at_least(0), default=0,
        help="of everything: corpus, weights, order and sampling")
    add("--control", action="store_true",
        help="also spend RPT's compute on next-token prediction, and on more of the base's lessons")
    add("--device", choices=["cpu", "cuda"],
        help="where to compute; default: the GPU, if there is one")
    add("--kernels", help="torch, fast or bitwise (kernels/__init__.py)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.excepthook = flags.speak_once
    args = parse_args()
    os.chdir(flags.ROOT)
    if args.kernels:
        os.environ["NANORPT_KERNELS"] = args.kernels
    locked = lock(args.out_dir)
    sign(locked)
    choose_threads(args.out_dir)
    print(f"{os.environ['OMP_NUM_THREADS']} of {os.cpu_count()} cores (OMP_NUM_THREADS=N changes "
          "that)", flush=True)
    start = time.perf_counter()
    run_stages(STAGES, names, args)
    befores, afters = (read_thoughts(f"{args.out_dir}/thoughts.jsonl", names(args)[name])
                       for name in ("base", "rpt"))
    show_steps(befores, afters)
    show_thoughts(befores, afters)
    if args.control:
        run_stages(CONTROL, names, args)
    print(ending(args, time.perf_counter() - start))
