"""How time and memory of sampling and of the update grow, one factor at a time.

    python bench/growth.py --picture growth.png                     # 15 minutes on one thread
    python bench/growth.py --factors context,shared --dtype bf16
    python bench/growth.py --read growth.json --picture growth.png  # drawn again, not measured

Around 4 prompts of 256 x 8 rollouts x 64 tokens of a model with 4 M parameters vary the rows that
are decoded at a time, tokens of a prompt, rollouts of a prompt (of 1,024 tokens), tokens of a
thought, and the model. A slope is that of the last two points in log-log: 1 is proportional to the
factor, 2 quadratic.

`shared` asks what it is worth to compute a prompt once: a long one that its rollouts share, against
each rollout behind its own copy. Beside it stands what the number of tokens would give,
G (P + R) / (P + G R) for G rollouts of R tokens; pairs of tokens, which attention computes, would
give up to G.

Each point is a process of its own, and so is its memory: the most that it holds beyond Python and
torch, with weights, gradients and moments. An update is a single micro-batch, so nothing bounds its
memory; --tokens-per-micro-batch of train_rpt.py would. A time is the least of the runs that fit
into three seconds, of two at least where they take less than five.
"""
import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # the repository, not bench/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from plumbing import flags  # before torch: how its threads wait
import torch
from tqdm import tqdm
from bench.common import DTYPES, SMOLLM2, alone, clocked, held_gb, print_row
from bench.train import generate, prompts_of, random_groups, trainer, update
from model import GPTConfig
from objectives import Group
from plot import COLOURS, GREY, SMALL, picture
from plumbing.files import read_json, write

SUPERLINEAR = 1.15   # slopes above it are marked
TASKS = "sampling", "update"
UNITS = dict(seconds="seconds", GB="gb")   # in words, and in a point


def llama(width, n_layers, n_heads, ffn_width):
    return GPTConfig(vocab_size=4096, width=width, n_layers=n_layers, n_heads=n_heads,
                     n_kv_heads=n_heads // 2, head_dim=64, ffn_width=ffn_width, max_positions=2048)


MODELS = {1.3: llama(128, 4, 2, 384), 4: llama(256, 4, 4, 704), 14.6: llama(384, 8, 6, 1024),
          49.3: llama(512, 16, 8, 1408), 134.5: SMOLLM2}  # by millions of parameters
TINY = dict(prompts=1, context=8, rollouts=2, thought=2, model=llama(64, 1, 2, 64))
MIDDLE = dict(prompts=4, context=256, rollouts=8, thought=64, model=MODELS[4])
# What is varied: {factor: (its name in the picture, {its value: what differs from the middle})}.
FACTORS = {
    "rows": ("rows", {8 * n: dict(prompts=n) for n in (1, 2, 4, 8, 16, 32, 64)}),
    "context": ("tokens of a prompt", {n: dict(context=n) for n in
                                       (128, 256, 512, 1024, 2048, 4096, 8192)}),
    "rollouts": ("rollouts of a prompt", {n: dict(rollouts=n, context=1024, prompts=1)
                                          for n in (2, 4, 8, 16, 32)}),
    "thought": ("tokens of a thought", {n: dict(thought=n) for n in
                                        (16, 32, 64, 128, 256, 512, 1024)}),
    "model": ("million parameters", {size: dict(model=model) for size, model in MODELS.items()}),
    "shared": ("tokens of a prompt and rollouts of it", {
        (context, rollouts): dict(prompts=1, context=context, rollouts=rollouts)
        for context in (4096, 8192) for rollouts in (4, 8)}),
}


# ---- a point ----

def prepare(task, dtype, own, point):
    """A model and a call that makes it work; own: each rollout has its copy of the prompt."""
    prompts, context, rollouts, thought, shape = point.values()
    config = replace(shape, max_positions=max(shape.max_positions, context + thought))
    model, optimizer = trainer(config, DTYPES[dtype])
    groups = random_groups(config, prompts, context, [thought] * rollouts)
    if own:
        groups = [Group(group.question, [rollout]) for group in groups
                  for rollout in group.rollouts]
        rollouts = 1
    if task == "update":
        return partial(update, model, optimizer, groups, sys.maxsize)
    return partial(generate, model, prompts_of(groups), rollouts, thought, max_rows=sys.maxsize)


def measure(task, dtype, own, point):
    """-> seconds and GB of sampling or of an update, in a fresh process."""
    prepare(task, dtype, own, TINY)()  # loads libraries
    before, seconds = held_gb("VmRSS"), []
    call = prepare(task, dtype, own, point)
    while sum(seconds) < 3 or len(seconds) == 1 and seconds[0] < 5:
        seconds.append(clocked(call)[0])
    return min(seconds), held_gb() - before


def measure_factors(factors, dtype):
    """Yield points: dicts of factor, x, task, own, seconds, gb."""
    jobs = [(factor, x, task, own) for factor in factors for x in FACTORS[factor][1]
            for task in TASKS for own in ((False, True) if factor == "shared" else (False,))]
    for factor, x, task, own in tqdm(jobs, desc="growth", unit="point", disable=None):
        seconds, gb = alone(measure, task, dtype, own, MIDDLE | FACTORS[factor][1][x])
        yield dict(factor=factor, x=x, task=task, own=own, seconds=seconds, gb=gb)


# ---- tables ----

def curve(points, factor, task, key):
    """-> x and y of a curve, y at least a millisecond or MB for the logarithm."""
    chosen = [point for point in points if point["factor"] == factor and point["task"] == task]
    return [point["x"] for point in chosen], [max(point[key], 1e-3) for point in chosen]


def slope(x, y):
    """Of the last two points, in log-log."""
    return math.log(y[-1] / y[-2]) / math.log(x[-1] / x[-2])


def print_slopes(points, factors):
    print_row("factor", "from", "to", *(f"{task}, {unit}" for task in TASKS for unit in UNITS))
    print_row(*["---"] * 7)
    for factor in factors:
        cells = []
        for task in TASKS:
            for key in UNITS.values():
                x, y = curve(points, factor, task, key)
                mark = " (superlinear)" if slope(x, y) > SUPERLINEAR else ""
                cells.append(f"{slope(x, y):.2f}{mark}")
        print_row(FACTORS[factor][0], x[-2], x[-1], *cells)


def print_shared(points):
    print_row("prompt", "rollouts", "task", "shared", "own copies", "ratio of seconds", "of GB",
              "of tokens")
    print_row(*["---"] * 8)
    R = MIDDLE["thought"]
    for shared, own in zip(points[0::2], points[1::2]):
        P, G = shared["x"]
        print_row(P, G, shared["task"],
                  *(f"{point['seconds']:.2f} s, {point['gb']:.2f} GB" for point in (shared, own)),
                  *(f"{own[key] / shared[key]:.2f}" for key in UNITS.values()),
                  f"{G * (P + R) / (P + G * R):.2f}")


# ---- the picture ----

def draw(found, factors, out):
    """Seconds above and GB below, a column for each factor."""
    with picture(out, 1.45 * len(factors) + 0.4, 3.3, SMALL) as figure:
        panels = figure.subplots(2, len(factors), squeeze=False, sharex="col")
        for (unit, key), row in zip(UNITS.items(), panels):
            row[0].set_ylabel(unit)
            for factor, ax in zip(factors, row):
                draw_panel(ax, found["points"], factor, key)
        for factor, ax in zip(factors, panels[1]):
            ax.set_xlabel(FACTORS[factor][0])
        lines = panels[0, 0].get_lines()[::2]
        figure.legend(lines, TASKS, loc="outside upper left", ncols=2, borderaxespad=0)
        note = (f"{found['dtype']}, threads: {found['threads']}; dashed: slope 1; "
                "numbers: slope of the last step")
        figure.text(0.99, 0.99, note, ha="right", va="top", color=GREY, fontsize=6.5)


def draw_panel(ax, points, factor, key):
    """A factor's curves in log-log, each with a line of slope 1 through its last point."""
    from matplotlib.ticker import LogLocator
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.grid(True)
    curves = [curve(points, factor, task, key) for task in TASKS]
    values = [value for _, y in curves for value in y]
    for (x, y), colour in zip(curves, COLOURS):
        ax.plot(x, y, ".-", color=colour, linewidth=1.2, markersize=4)
        ax.plot(x, [y[-1] * here / x[-1] for here in x], "--", color=colour, linewidth=0.6)
        is_upper = y[-1] == max(y[-1] for _, y in curves)
        ax.annotate(f"{slope(x, y):.2f}", (x[-1], y[-1]), (2, 0), textcoords="offset points",
                    color=colour, fontsize=6.5, va="bottom" if is_upper else "top")
    ax.set_ylim(min(values) / 1.5, max(values) * 1.5)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_yticks([], minor=True)
    ax.set_xticks([x[0], x[-1]], [f"{end:,}" for end in (x[0], x[-1])])
    ax.set_xticks([], minor=True)


def parse_args():
    parser = flags.Parser("How time and memory grow with rows, lengths and the model.")
    add = parser.add_argument
    add("--factors", default=",".join(FACTORS), help="which to vary")
    add("--dtype", choices=list(DTYPES), default="fp32",
        help="compute_dtype: of activations and matrix products")
    add("--out", default="growth.json", help="write what was measured here")
    add("--read", metavar="FILE", help="what --out wrote: show it, measure nothing")
    add("--picture", metavar="FILE", help="draw it here: .png, .pdf or .svg")
    args = parser.parse_args()
    args.factors = args.factors.split(",")
    if not set(args.factors) <= FACTORS.keys():
        raise ValueError(f"--factors {','.join(args.factors)}: expected some of "
                         f"{','.join(FACTORS)}")
    return args


if __name__ == "__main__":
    sys.excepthook = flags.speak_once
    args = parse_args()
    if args.read:
        found = read_json(args.read)
    else:
        found = dict(command=f"python {' '.join(sys.argv)}", dtype=args.dtype,
                     threads=torch.get_num_threads(), points=[], **flags.versions())
        for point in measure_factors(args.factors, args.dtype):
            found["points"].append(point)
            write(args.out, json.dumps(found, indent=1))
    points = found["points"]
    measured = dict.fromkeys(point["factor"] for point in points)
    curves = [factor for factor in measured if factor != "shared"]
    print(f"{found['command']}\n{found['dtype']}, {found['threads']} threads, "
          f"torch {found['torch']}, commit {found['commit']}\n")
    if curves:
        print_slopes(points, curves)
    if "shared" in measured:
        print()
        print_shared([point for point in points if point["factor"] == "shared"])
    if args.picture and curves:
        draw(found, curves, args.picture)
        print(f"\ndrawn in {args.picture}")
