"""Pictures of runs: up to four panels in one PNG, from two files that a run leaves in its folder.

    metrics.jsonl   one line per step  -> curves: reward, response length, entropy (or loss, gradient norm)
    results.json    what eval.py found -> bars: held-out accuracy by difficulty, with 95 % intervals

A panel for which no run has numbers is left out and the next one in the list moves up, so a run of
train_ntp.py shows its loss and gradient norm. This file computes nothing but running means.

    python plot.py runs/rpt                                           # writes runs/rpt/curves.png
    python plot.py runs/seed1 runs/seed2 --out seeds.png --smooth 21
"""
import argparse
import json
import sys
from pathlib import Path

from data import speak_once

PANELS = {  # metric: (title, unit, factor from file to picture); the first four that have numbers are drawn
    "reward": ("Reward", "percent of predictions that are right", 100),
    "accuracy": ("Held-out accuracy", "percent of positions, with 95 % intervals", 1),
    "format_rate": ("Well-formed answers", "percent", 100),  # only while there is no accuracy
    "len_mean": ("Response length", "tokens", 1),
    "entropy": ("Entropy", "nats per token", 1),
    "loss": ("Loss", "mean per token", 1),
    "grad_norm": ("Gradient norm", "of all weights, before clipping", 1),
}
DASHED = {  # metric: (the share that is drawn with it as a thin dashed line, what to call it)
    "format_rate": ("frac_zero_std", "dashed: groups whose rewards are all equal"),
    "len_mean": ("frac_truncated", "dashed: percent cut off (right axis)"),
}
MODES = {"ntp": "NTP", "reasoning": "reasoning"}  # as results.json has it: as a legend has it
SPLITS = ["easy", "medium", "hard"]
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe-Ito: colour-blind safe
GREY = "#777777"  # small print
STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.titlepad": 17, "axes.edgecolor": "#AAAAAA", "axes.spines.top": False, "axes.spines.right": False,
    "axes.axisbelow": True, "grid.color": "#E6E6E6",
    "xtick.color": GREY, "ytick.color": GREY, "ytick.major.size": 0, "axes.labelcolor": GREY,
    "legend.frameon": False, "figure.constrained_layout.h_pad": 0.08,
}


def read_metrics(run):
    """Run folder -> one dict per step. A kill may tear the last line: that one is ignored, no other is."""
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, so {run} is not the folder of a training run")
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise ValueError(f"{path} line {number}: not JSON: {line[:60]!r}") from None
        if not isinstance(row, dict) or "step" not in row:
            raise ValueError(f"{path} line {number}: expected an object with 'step', got {line[:60]!r}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no complete line in it")
    return rows


def read_results(run):
    """Run folder -> {(checkpoint, mode): {split: (accuracy, low, high)}}; empty if never evaluated."""
    path = Path(run) / "results.json"
    bars = {}
    try:
        for entry in json.loads(path.read_bytes()) if path.exists() else []:
            bar = bars.setdefault((entry["checkpoint"], MODES[entry["mode"]]), {})
            bar[SPLITS.index(entry["split"])] = entry["accuracy"], entry["low"], entry["high"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not what eval.py writes: {error!r}") from None
    return bars


def series(rows, metric, factor):
    """The steps that measured this metric (null means they did not), and what they measured."""
    points = [(row["step"], factor * row[metric]) for row in rows if row.get(metric) is not None]
    return [step for step, _ in points], [value for _, value in points]


def running_mean(values, n):
    """Mean of the n values around each one; near the ends, of those that exist."""
    windows = [values[max(0, i - (n - 1) // 2) : i + n // 2 + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def short_names(paths):
    """The last parts that tell paths apart: runs/base/latest, runs/rpt/step_120 -> base, rpt."""
    parts = [Path(path).parts for path in paths]
    runs = [p[:-1] if len(p) > 1 and p[-1].startswith(("latest", "step_")) else p for p in parts]
    parts = [run if runs.count(run) == 1 else p for run, p in zip(runs, parts)]
    names = []
    for run, p in zip(runs, parts):
        depth = 1 if p == run else 2  # rpt/step_60: of several checkpoints of a run, each with the run's name
        while any(p[-depth:] == other[-depth:] for other in parts if other != p):
            depth += 1
        names.append("/".join(p[-depth:]))
    return names


def draw_curves(ax, metrics, metric, factor, smooth):
    """One metric over steps, one colour per run: a faint dot for every step, the running mean as a line."""
    for rows, colour in zip(metrics, COLOURS):
        steps, values = series(rows, metric, factor)
        ax.plot(steps, values, ".", color=colour, alpha=0.3, markeredgewidth=0, markersize=5, clip_on=False)
        ax.plot(steps, running_mean(values, smooth), color=colour, linewidth=2)
    if ax.dataLim.ymin >= 0:  # the loss of a policy gradient can be negative
        ax.set_ylim(bottom=0)
    ax.set_xlabel("step")


def draw_shares(ax, metrics, metric, smooth):
    """A second metric over the first, thin and dashed, in percent; ax may be a right axis of its own."""
    for rows, colour in zip(metrics, COLOURS):
        steps, values = series(rows, metric, 100)
        ax.plot(steps, running_mean(values, smooth), "--", color=colour, linewidth=1, alpha=0.7)
    ax.set_ylim(0, 100)


def draw_bars(ax, bars, runs):
    """A group of bars per split: hollow for plain next-token prediction, filled for reasoning."""
    checkpoints = list(dict.fromkeys(checkpoint for checkpoint, _ in bars))
    names = short_names(checkpoints)
    palette = list(zip(runs, COLOURS))
    colours = [next((colour for run, colour in palette if f"/{run}/" in f"/{checkpoint}/"), GREY)
               for checkpoint in checkpoints]  # grey: of none of these runs, such as the base model
    width = 0.8 / len(bars)
    for i, (checkpoint, mode) in enumerate(sorted(bars, key=lambda bar: (checkpoints.index(bar[0]), bar[1]))):
        n = checkpoints.index(checkpoint)
        # of several checkpoints of one run, the earlier ones are paler
        ink = colours[n], colours[:n + 1].count(colours[n]) / colours.count(colours[n])
        splits, intervals = zip(*bars[checkpoint, mode].items())
        accuracy, low, high = zip(*intervals)
        whiskers = [[a - l for a, l in zip(accuracy, low)], [h - a for a, h in zip(accuracy, high)]]
        ax.bar([split - 0.4 + (i + 0.5) * width for split in splits], accuracy, 0.8 * width, yerr=whiskers,
               edgecolor=ink, facecolor=ink if mode == "reasoning" else "white", label=f"{names[n]}, {mode}",
               linewidth=1, capsize=2, error_kw={"linewidth": 0.8})
    ax.set_xticks(range(len(SPLITS)), SPLITS)
    ax.set_ylim(bottom=0)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, fontsize=8,  # below: hides no bar
              handlelength=1.4, handletextpad=0.6, columnspacing=1.2)


def draw(runs, out, smooth=9):
    """Run folders -> the picture in the file out; smooth is the length of the running mean in steps."""
    try:
        import matplotlib
        from matplotlib.figure import Figure  # without pyplot: no screen, the canvas of a PNG is Agg
    except ImportError:
        raise ValueError("plot.py needs matplotlib: pip install matplotlib") from None
    if len(runs) > len(COLOURS) or smooth < 1:
        raise ValueError(f"plot.py: at most {len(COLOURS)} runs and --smooth 1 or more, "
                         f"got {len(runs)} and {smooth}")
    metrics = [read_metrics(run) for run in runs]
    names = short_names([Path(run).resolve() for run in runs])
    bars = {}
    for run in runs:  # the base model that several runs were compared with is drawn once, from the last run
        bars |= read_results(run)
    measured = {key for rows in metrics for row in rows for key in row if row[key] is not None}
    if bars:
        measured = measured - {"format_rate"} | {"accuracy"}
    panels = [metric for metric in PANELS if metric in measured][:4]
    if not panels:
        raise ValueError(f"{runs[0]}: nothing to draw, its metrics.jsonl has none of {', '.join(PANELS)}")
    with matplotlib.rc_context(STYLE):
        columns, rows = min(2, len(panels)), (len(panels) + 1) // 2
        figure = Figure(figsize=(3.6 * columns, 2.6 * rows + 0.3), dpi=200, layout="constrained")
        for i, metric in enumerate(panels):
            ax = figure.add_subplot(rows, columns, i + 1)
            ax.grid(True, axis="y")
            title, note, factor = PANELS[metric]
            if metric == "accuracy":
                draw_bars(ax, bars, names)
            else:
                draw_curves(ax, metrics, metric, factor, smooth)
            share, share_note = DASHED.get(metric, ("", ""))
            if any(row.get(share) for run in metrics for row in run):  # something was cut off, or equal
                draw_shares(ax if factor == 100 else ax.twinx(), metrics, share, smooth)
                note += "; " + share_note
            ax.set_title(title)
            ax.annotate(note, (0, 1), (0, 5), "axes fraction", "offset points", color=GREY, fontsize=8)
        lines = [matplotlib.lines.Line2D([], [], color=colour, linewidth=2) for colour in COLOURS[:len(runs)]]
        figure.legend(lines, names, loc="outside upper center", ncols=3, borderaxespad=0)
        figure.savefig(out)


if __name__ == "__main__":
    sys.excepthook = speak_once
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that hold a metrics.jsonl")
    parser.add_argument("--out", help="the picture (default: curves.png in the first RUN)")
    parser.add_argument("--smooth", type=int, default=9, help="steps in the running mean (default: 9)")
    args = parser.parse_args()
    out = args.out or Path(args.runs[0]) / "curves.png"
    draw(args.runs, out, args.smooth)
    print(out)
