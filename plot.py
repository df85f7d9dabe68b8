"""Pictures of runs, from the files in their folders: PNG, or the format that --out ends in.

    curves    the first four of PANELS that some run has numbers for: reward, accuracy, length ...
              over the steps of metrics.jsonl; held-out accuracy by difficulty, from results.json
    table1    results.json with its numbers: checkpoints and modes on easy, medium, hard positions

So a run of train_ntp.py shows its loss and gradient norm. Whiskers are 95 % intervals.

    python plot.py runs/rpt                                          # writes runs/rpt/curves.png
    python plot.py runs/seed1 runs/seed2 --out seeds.png --smooth 21
    python plot.py runs/rpt more_results.json --kind table1          # writes runs/rpt/table1.png

paper/scaling.py draws accuracy over compute, paper/patterns.py keywords of thoughts.
"""
import json
import sys
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import numpy as np

from plumbing import flags
from plumbing.log import read_metrics

PANELS = {  # metric: (title, unit, factor from file to picture); the first four are drawn
    "reward": ("Reward", "mean over rollouts", 1),
    "held_out": ("Held-out accuracy", "percent of positions, with 95 % intervals", 1),
    "format_rate": ("Well-formed answers", "percent", 100),  # if nothing is held out
    "len_mean": ("Response length", "tokens", 1),
    "entropy": ("Entropy", "nats per token", 1),
    "loss": ("Loss", "mean per token", 1),
    "grad_norm": ("Gradient norm", "of all weights, before clipping", 1),
}
DASHED = {  # metric: (the share that is drawn over it as a thin dashed line, its note)
    "format_rate": ("frac_zero_std", "dashed: groups whose rewards are all equal"),
    "len_mean": ("frac_truncated", "dashed: percent cut off (right axis)"),
}
SPLITS = ["easy", "medium", "hard"]
BEST = "best other decoding"                     # of the modes that have no name of their own
MODES = {"ntp": "NTP", "empty": "empty thought", "swapped": "another's thought",
         "reasoning": "reasoning", "majority": BEST,
         "forced": BEST, "forced-majority": BEST, "greedy": BEST, "forced-greedy": BEST}
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe-Ito
GREY = "#777777"  # small print
FILLS = {"NTP": "white", "empty thought": "#B3D4E8", "another's thought": "#DDDDDD",
         "reasoning": "#0072B2", BEST: "#56B4E9"}
HATCHES = {"empty thought": "////", "another's thought": "xxxx", BEST: "...."}
COLUMN = 3.5      # inches, of a paper
STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.titlepad": 17, "axes.edgecolor": "#AAAAAA", "axes.spines.top": False,
    "axes.spines.right": False, "axes.axisbelow": True, "grid.color": "#E6E6E6",
    "xtick.color": GREY, "ytick.color": GREY, "ytick.major.size": 0, "axes.labelcolor": GREY,
    "legend.frameon": False, "figure.constrained_layout.h_pad": 0.08, "pdf.fonttype": 42,
    "figure.dpi": 200,
}
SMALL = STYLE | {  # for a column
    "font.size": 7.5, "axes.titlesize": 8.5, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "figure.dpi": 300, "ytick.labelcolor": "black", "figure.constrained_layout.h_pad": 0.03,
}
FIELDS = {"checkpoint", "mode", "split", "accuracy", "low", "high", "n"}  # of results.json


def read_results(path):
    """results.json or its folder -> its lines: the accuracy of a checkpoint, mode and split."""
    path = Path(path)
    if path.is_dir():
        path = path / "results.json"
    try:
        lines = json.loads(path.read_bytes())
        for line in lines:
            if not FIELDS <= set(line) or line["split"] not in SPLITS or line["mode"] not in MODES:
                raise ValueError(f"expected {', '.join(sorted(FIELDS))}, one of {', '.join(MODES)} "
                                 f"and one of {', '.join(SPLITS)}, got {line}")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not what eval.py lm writes: {error}") from None
    return lines


def read_bars(paths):
    """results.json files or folders -> {(checkpoint, mode): {split: (accuracy, low, high)}}.

    Checkpoints are in the order of the files, modes in that of MODES. A later file replaces what an
    earlier one says, so that a base model with which several runs were compared is drawn once.
    """
    lines = {}
    for path in paths:
        for line in read_results(path):
            lines[line["checkpoint"], line["mode"], line["split"]] = line
    bars = {}
    for (checkpoint, mode, split), line in lines.items():
        bar = bars.setdefault((checkpoint, MODES[mode]), {})
        # Of several decodings the one with the highest accuracy on this split.
        bar[split] = max(bar.get(split, (-1,)), (line["accuracy"], line["low"], line["high"]))
    names = dict.fromkeys(MODES.values())
    return {bar: bars[bar] for bar in product(checkpoints_of(bars), names) if bar in bars}


def checkpoints_of(bars):
    return list(dict.fromkeys(checkpoint for checkpoint, _ in bars))


def series(rows, metric, factor):
    """-> the steps that measured this metric (others have null), and its values."""
    measured = [row for row in rows if row.get(metric) is not None]
    return [row["step"] for row in measured], [factor * row[metric] for row in measured]


def running_mean(values, n):
    """Mean of the n values around each one, fewer near the ends."""
    windows = [values[max(0, i - (n - 1) // 2) : i + n // 2 + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def short_names(paths):
    """The last parts that tell paths apart: runs/base/latest, runs/rpt/step_120 -> base, rpt."""
    parts = [Path(path).parts for path in paths]
    runs = [p[:-1] if len(p) > 1 and p[-1].startswith(("latest", "step_")) else p for p in parts]
    # Several checkpoints of a run keep their own names behind that of the run: rpt/step_60.
    parts = [run if runs.count(run) == 1 else p for run, p in zip(runs, parts)]
    names = []
    for run, p in zip(runs, parts):
        depth = 1 if p == run else 2
        while any(p[-depth:] == other[-depth:] for other in parts if other != p):
            depth += 1
        names.append("/".join(p[-depth:]))
    return names


# ---- what pictures share ----

@contextmanager
def picture(out, width, height, style):
    """A figure of this size in inches, which is saved in the file `out` at the end."""
    try:
        # Figure, unlike pyplot, needs no screen.
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plot.py needs matplotlib: pip install matplotlib") from None
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(out)


def add_title(ax, title, note):
    ax.set_title(title)
    ax.annotate(note, (0, 1), (0, 5), "axes fraction", "offset points", color=GREY,
                fontsize=ax.title.get_fontsize() - 2)


def draw_whisker_bars(ax, y, values, intervals, height, **look):
    """Horizontal bars with 95 % intervals and a number at the end of each."""
    low, high = np.array(intervals).T
    whiskers = np.maximum([values - low, high - values], 0)
    ax.barh(y, values, height, xerr=whiskers, capsize=1.2, linewidth=0.7,
            error_kw={"linewidth": 0.6, "capthick": 0.6}, **look)
    for place, value, end in zip(y, values, high):
        ax.annotate(f"{value:.1f}", (max(value, end), place), (2, 0), textcoords="offset points",
                    va="center_baseline", fontsize=6.5)


# ---- curves ----

def draw_curves(runs, out, smooth=9):
    """Run folders -> the picture in the file `out`; smooth: steps in the running mean."""
    if len(runs) > len(COLOURS):
        raise ValueError(f"plot.py: at most {len(COLOURS)} runs, got {len(runs)}")
    metrics = [read_metrics(run) for run in runs]
    every_row = sum(metrics, [])
    names = short_names([Path(run).resolve() for run in runs])
    bars = read_bars([run for run in runs if (Path(run) / "results.json").exists()])
    panels = choose_panels(every_row, bars)
    if not panels:
        raise ValueError(f"{runs[0]}: nothing to draw, its metrics.jsonl has none of "
                         f"{', '.join(PANELS)}")

    columns, rows = min(2, len(panels)), (len(panels) + 1) // 2
    with picture(out, 3.6 * columns, 2.6 * rows + 0.3, STYLE) as figure:
        from matplotlib.lines import Line2D
        for i, metric in enumerate(panels):
            ax = figure.add_subplot(rows, columns, i + 1)
            ax.grid(True, axis="y")
            title, note, factor = PANELS[metric]
            if metric == "held_out":
                draw_bars(ax, bars, names)
            else:
                draw_metric(ax, metrics, metric, factor, smooth)
            share, share_note = DASHED.get(metric, ("", ""))
            if any((row.get(share) or 0) > 0.02 for row in every_row):  # else it cannot be seen
                draw_shares(ax if factor == 100 else ax.twinx(), metrics, share, smooth)
                note += "; " + share_note
            add_title(ax, title, note)
        if len(runs) > 1:
            lines = [Line2D([], [], color=colour, linewidth=2) for colour in COLOURS[:len(runs)]]
            figure.legend(lines, names, loc="outside upper center", ncols=3, borderaxespad=0)


def choose_panels(rows, bars):
    """-> the first four of PANELS that some run has numbers for."""
    measured = {metric for metric in PANELS if any(row.get(metric) is not None for row in rows)}
    if bars:
        measured = measured - {"format_rate"} | {"held_out"}
    return [metric for metric in PANELS if metric in measured][:4]


def draw_metric(ax, metrics, metric, factor, smooth):
    """A metric over steps, with a colour for each run: faint dots and their running mean."""
    for rows, colour in zip(metrics, COLOURS):
        steps, values = series(rows, metric, factor)
        ax.plot(steps, values, ".", color=colour, alpha=0.3, markeredgewidth=0, markersize=5,
                clip_on=False)
        ax.plot(steps, running_mean(values, smooth), color=colour, linewidth=2)
    ax.locator_params(axis="x", integer=True)
    # The loss of a policy gradient can be negative.
    if ax.dataLim.ymin >= 0:
        ax.set_ylim(bottom=0)
    ax.set_xlabel("step")


def draw_shares(ax, metrics, metric, smooth):
    """A share in percent over the metric, as a thin dashed line; ax may be a right axis."""
    for rows, colour in zip(metrics, COLOURS):
        steps, values = series(rows, metric, 100)
        ax.plot(steps, running_mean(values, smooth), "--", color=colour, linewidth=1, alpha=0.7)
    ax.set_ylim(0, 100)


def draw_bars(ax, bars, runs):
    """A group of bars for each split; guessing is hollow, a thought full."""
    checkpoints = checkpoints_of(bars)
    inks, names = choose_inks(checkpoints, runs), short_names(checkpoints)
    width = 0.8 / len(bars)
    for i, ((checkpoint, mode), splits) in enumerate(bars.items()):
        n = checkpoints.index(checkpoint)
        middles = [SPLITS.index(split) - 0.4 + (i + 0.5) * width for split in splits]
        accuracy, low, high = np.array(list(splits.values())).T
        ax.bar(middles, accuracy, 0.8 * width, yerr=[accuracy - low, high - accuracy],
               edgecolor=inks[n], facecolor=inks[n] if mode == "reasoning" else "white",
               hatch=HATCHES.get(mode), linewidth=1, capsize=2,
               error_kw={"linewidth": 0.8}, label=f"{names[n]}, {mode}")
    ax.set_xticks(range(len(SPLITS)), SPLITS)
    ax.set_ylim(bottom=0)
    # Below the axes the legend hides no bar.
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, fontsize=8,
              handlelength=1.4, handletextpad=0.6, columnspacing=1.2)


def choose_inks(checkpoints, runs):
    """-> (colour, opacity) of each checkpoint: that of its run, paler for its earlier checkpoints.

    A checkpoint of none of these runs, such as the base model, is grey.
    """
    colours = [GREY] * len(checkpoints)
    for n, checkpoint in enumerate(checkpoints):
        for run, colour in zip(runs, COLOURS):
            if f"/{run}/" in f"/{checkpoint}/":
                colours[n] = colour
    return [(colour, colours[:n + 1].count(colour) / colours.count(colour))
            for n, colour in enumerate(colours)]


# ---- table1 ----

def draw_table1(paths, out):
    """A panel for each split, a block of rows for each checkpoint, a row for each mode."""
    bars = read_bars(paths)
    if not bars:
        raise ValueError(f"{paths[0]}: no accuracy in it, nothing to draw")
    heads, rows, bottom = place_rows(bars)
    measured = set().union(*bars.values())
    splits = [split for split in SPLITS if split in measured]
    end = max(max(high for _, _, high in bar.values()) for bar in bars.values())

    with picture(out, COLUMN, 0.6 + 0.15 * bottom, SMALL) as figure:
        panels = figure.subplots(1, len(splits), sharex=True, sharey=True, squeeze=False)[0]
        for ax, split in zip(panels, splits):
            draw_split(ax, split, bars, rows)
        for name, y in zip(short_names(list(heads)), heads.values()):
            # A long name may cross panels.
            panels[0].annotate(name, (0.015, y), xycoords=("figure fraction", "data"), va="center",
                               fontweight="bold", fontsize=7, in_layout=False)
        panels[0].set_yticks(list(rows.values()), [mode for _, mode in rows])
        # The first row is at the top, and numbers have space on the right.
        panels[0].set_ylim(bottom - 0.4, -0.5)
        panels[0].set_xlim(0, 1.38 * end or 1)
        panels[0].locator_params(axis="x", nbins=3)
        shown = min(100, panels[0].get_xlim()[1])    # nothing is right in more than 100 %
        panels[0].set_xticks([tick for tick in panels[0].get_xticks() if 0 <= tick <= shown])
        figure.supxlabel("next-token accuracy, percent, with 95 % intervals", fontsize=7,
                         color=GREY)


def place_rows(bars):
    """-> y of each checkpoint's name, y of each (checkpoint, mode), and the lower end."""
    heads, rows, y = {}, {}, -0.3
    for checkpoint, mode in bars:
        if checkpoint not in heads:
            heads[checkpoint] = y + 0.3
            y += 1.2
        rows[checkpoint, mode] = y
        y += 1
    return heads, rows, y


def draw_split(ax, split, bars, rows):
    """The panel of one split; rows: y of each (checkpoint, mode)."""
    for mode, fill in FILLS.items():
        shown = [row for row in rows if row[1] == mode and split in bars[row]]
        if shown:
            numbers = np.array([bars[row][split] for row in shown])   # accuracy, low, high
            edge = GREY if fill == "white" else FILLS["reasoning"]
            draw_whisker_bars(ax, [rows[row] for row in shown], numbers[:, 0], numbers[:, 1:], 0.72,
                              color=fill, edgecolor=edge)
    ax.set_title(split, pad=4)
    ax.spines["left"].set_visible(False)
    ax.patch.set_visible(False)


def parse_args():
    parser = flags.Parser("Draw runs from the files in their folders.")
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN",
        help="folders that hold a metrics.jsonl; for table1 also files like results.json")
    add("--kind", default="curves", choices=["curves", "table1"], help="what to draw")
    add("--out", help="the picture; default: KIND.png in the folder of the first RUN")
    add("--smooth", type=flags.at_least(1), default=9, help="curves: steps in the running mean")
    return parser.parse_args()


if __name__ == "__main__":
    sys.excepthook = flags.speak_once
    args = parse_args()
    first = Path(args.runs[0])
    folder = first.parent if first.is_file() else first
    out = args.out or folder / f"{args.kind}.png"
    if args.kind == "curves":
        draw_curves(args.runs, out, args.smooth)
    else:
        draw_table1(args.runs, out)
    print(out)
