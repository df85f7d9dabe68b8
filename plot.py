"""Pictures of runs from the files in their folders: PNG, or what else --out ends in (.pdf, .svg).

    curves     up to four panels. metrics.jsonl, one line per step: reward, response length, entropy (or loss,
               gradient norm); results.json, what eval.py lm found: held-out accuracy by difficulty
    table1     only results.json, with numbers: checkpoints and modes on easy, medium and hard positions
    scaling    accuracy of a run's checkpoints over the compute spent on them, and the law scaling.py fits
    patterns   what eval.py patterns found: how many responses hold keywords of each kind of thought

Of the curves' panels those for which no run has numbers are left out and the next one in the list moves up,
so a run of train_ntp.py shows its loss and gradient norm. Whiskers are 95 % intervals. The last three kinds
are as wide as a column of a paper.

    python plot.py runs/rpt                                           # writes runs/rpt/curves.png
    python plot.py runs/seed1 runs/seed2 --out seeds.png --smooth 21
    python plot.py runs/rpt more_results.json --kind table1           # writes runs/rpt/table1.png
    python plot.py runs/rpt --kind scaling --mode reasoning --out scaling.pdf
    python plot.py patterns.json --kind patterns
"""
import argparse
import json
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from plumbing.flags import speak_once
from paper.scaling import MODES, SPLITS, fit_run, interval_text, law, read_metrics, result_lines

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
GROUPS = ["Transition", "Reflection", "Breakdown", "Hypothesis", "Divergent", "Deduction"]  # of patterns
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe-Ito: colour-blind safe
GREY = "#777777"  # small print
FILLS = {"NTP": "white", "empty thought": "#B3D4E8", "reasoning": "#0072B2"}
COLUMN = 3.5  # inches: the width of a column of a paper
STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.titlepad": 17, "axes.edgecolor": "#AAAAAA", "axes.spines.top": False, "axes.spines.right": False,
    "axes.axisbelow": True, "grid.color": "#E6E6E6",
    "xtick.color": GREY, "ytick.color": GREY, "ytick.major.size": 0, "axes.labelcolor": GREY,
    "legend.frameon": False, "figure.constrained_layout.h_pad": 0.08, "pdf.fonttype": 42, "figure.dpi": 200,
}
SMALL = STYLE | {  # for a column
    "font.size": 7.5, "axes.titlesize": 8.5, "xtick.labelsize": 7, "ytick.labelsize": 7, "figure.dpi": 300,
    "ytick.labelcolor": "black", "figure.constrained_layout.h_pad": 0.03,
}


def read_results(path):
    """results.json, or the run that has it -> {(checkpoint, mode): {split: (accuracy, low, high)}}."""
    bars = {}
    for line in result_lines(path):
        bar = bars.setdefault((line["checkpoint"], MODES[line["mode"]]), {})
        bar[SPLITS.index(line["split"])] = line["accuracy"], line["low"], line["high"]
    return bars


def read_patterns(path):
    """What eval.py patterns --out wrote -> [(checkpoint, n responses, {group: percent of them})]."""
    lines = []
    try:
        for line in json.loads(Path(path).read_bytes()):
            shares = {group: float(line[group.lower()]) for group in GROUPS}
            lines.append((line["checkpoint"], line["n"], shares))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not what eval.py patterns writes: {error!r}") from None
    return lines


def wilson(percent, n):
    """95 % interval of a share of n answers, in percent; sensible at 0 and 100 too."""
    share, z2 = percent / 100, 1.96 ** 2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = (z2 * share * (1 - share) / n + (z2 / (2 * n)) ** 2) ** 0.5 / (1 + z2 / n)
    return 100 * (middle - half), 100 * (middle + half)


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


def in_order(bars):
    """The bars' (checkpoint, mode): checkpoints as they came, modes as in MODES."""
    checkpoints, modes = list(dict.fromkeys(checkpoint for checkpoint, _ in bars)), list(MODES.values())
    return sorted(bars, key=lambda bar: (checkpoints.index(bar[0]), modes.index(bar[1])))


def draw_bars(ax, bars, runs):
    """A group of bars per split: hollow for next-token prediction, hatched for an empty thought, filled for
    reasoning."""
    checkpoints = list(dict.fromkeys(checkpoint for checkpoint, _ in bars))
    names = short_names(checkpoints)
    palette = list(zip(runs, COLOURS))
    colours = [next((colour for run, colour in palette if f"/{run}/" in f"/{checkpoint}/"), GREY)
               for checkpoint in checkpoints]  # grey: of none of these runs, such as the base model
    width = 0.8 / len(bars)
    for i, (checkpoint, mode) in enumerate(in_order(bars)):
        n = checkpoints.index(checkpoint)
        # of several checkpoints of one run, the earlier ones are paler
        ink = colours[n], colours[:n + 1].count(colours[n]) / colours.count(colours[n])
        splits, intervals = zip(*bars[checkpoint, mode].items())
        accuracy, low, high = zip(*intervals)
        whiskers = [[a - l for a, l in zip(accuracy, low)], [h - a for a, h in zip(accuracy, high)]]
        ax.bar([split - 0.4 + (i + 0.5) * width for split in splits], accuracy, 0.8 * width, yerr=whiskers,
               edgecolor=ink, facecolor=ink if mode == "reasoning" else "white", label=f"{names[n]}, {mode}",
               hatch="////" if mode == "empty thought" else None,
               linewidth=1, capsize=2, error_kw={"linewidth": 0.8})
    ax.set_xticks(range(len(SPLITS)), SPLITS)
    ax.set_ylim(bottom=0)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, fontsize=8,  # below: hides no bar
              handlelength=1.4, handletextpad=0.6, columnspacing=1.2)


def draw_whisker_bars(ax, y, values, intervals, height, **look):
    """Horizontal bars with 95 % intervals, and each number at the end of its own."""
    low, high = np.array(intervals).T
    whiskers = np.maximum([values - low, high - values], 0)
    ax.barh(y, values, height, xerr=whiskers, capsize=1.2, linewidth=0.7,
            error_kw={"linewidth": 0.6, "capthick": 0.6}, **look)
    for place, value, end in zip(y, values, high):
        ax.annotate(f"{value:.1f}", (max(value, end), place), (2, 0), textcoords="offset points",
                    va="center_baseline", fontsize=6.5)


@contextmanager
def picture(out, width, height, style):
    """A figure of this size in inches; what is drawn in it is saved in the file out."""
    try:
        import matplotlib
        from matplotlib.figure import Figure  # without pyplot: no screen, the canvas of a PNG is Agg
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


def draw_table1(paths, out):
    """Table 1: a panel for each split, a block of rows for each checkpoint, a row for each mode."""
    bars = {}
    for path in paths:
        bars |= read_results(path)
    if not bars:
        raise ValueError(f"{paths[0]}: no accuracy in it, nothing to draw")
    checkpoints = list(dict.fromkeys(checkpoint for checkpoint, _ in bars))
    splits = sorted({split for bar in bars.values() for split in bar})
    heads, rows, y = {}, {}, -0.3
    for checkpoint, mode in in_order(bars):
        if checkpoint not in heads:  # its name has a line of its own
            heads[checkpoint] = y + 0.3
            y += 1.2
        rows[checkpoint, mode] = y
        y += 1
    end = max(high for bar in bars.values() for _, _, high in bar.values())
    with picture(out, COLUMN, 0.6 + 0.15 * y, SMALL) as figure:
        panels = figure.subplots(1, len(splits), sharex=True, sharey=True, squeeze=False)[0]
        for ax, split in zip(panels, splits):
            for mode, fill in FILLS.items():
                some = [row for row in rows if row[1] == mode and split in bars[row]]
                if some:
                    accuracy, low, high = zip(*(bars[row][split] for row in some))
                    draw_whisker_bars(ax, [rows[row] for row in some], accuracy, list(zip(low, high)), 0.72,
                                      color=fill, edgecolor=GREY if fill == "white" else FILLS["reasoning"])
            ax.set_title(SPLITS[split], pad=4)
            ax.spines["left"].set_visible(False)
            ax.patch.set_visible(False)
        for name, place in zip(short_names(checkpoints), heads.values()):
            panels[0].annotate(name, (0.015, place), xycoords=("figure fraction", "data"), va="center",
                               fontweight="bold", fontsize=7, in_layout=False)  # a long one may cross panels
        panels[0].set_yticks(list(rows.values()), [mode for _, mode in rows])
        panels[0].set_ylim(y - 0.4, -0.5)  # the first row on top
        panels[0].set_xlim(0, 1.38 * end or 1)  # with room for the numbers
        panels[0].locator_params(axis="x", nbins=3)
        figure.supxlabel("next-token accuracy, percent, with 95 % intervals", fontsize=7, color=GREY)


def draw_scaling(run, out, mode="reasoning"):
    """Accuracy over training compute and the fitted law for each split, its parameters below."""
    fits = fit_run(run, mode)
    with picture(out, COLUMN, 1.9 + 0.32 * len(fits), SMALL) as figure:
        from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter
        ax = figure.add_subplot()
        ax.set_xscale("log")
        ax.grid(True, axis="y")
        for found in fits:
            colour, marker = list(zip(COLOURS, "os^"))[SPLITS.index(found["split"])]
            compute, accuracy, low, high = (np.array([point[key] for point in found["points"]])
                                            for key in ("compute", "accuracy", "low", "high"))
            along = np.geomspace(compute[0], compute[-1], 200)
            curve = law(along, found["A"], found["alpha"], found["p_star"])
            ax.plot(along, curve, color=colour, linewidth=1.2)
            whiskers = np.maximum([accuracy - low, high - accuracy], 0)
            ax.errorbar(compute, accuracy, whiskers, fmt=marker, color=colour, markersize=3.5, linewidth=0.8,
                        capsize=1.5, label=describe_fit(found))
        short = ax.dataLim.xmax < 30 * ax.dataLim.xmin  # powers of ten would be one or two
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if short else (1,)))
        ax.xaxis.set_major_formatter(LogFormatterSciNotation(minor_thresholds=(9, 9)))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel("FLOPs of training, rollouts included")
        add_title(ax, "Accuracy over compute", f"percent, {MODES[mode]}, with 95 % intervals")
        figure.legend(loc="outside lower left", fontsize=6.5, handletextpad=0.6, labelspacing=0.7,
                      borderaxespad=0)


def describe_fit(found):
    """A fit as a legend has it: the law on the first line, how sure that is on the second."""
    r2 = f"R² {found['r2']:.3f} (straight line {found['r2_line']:.3f})"
    if found["at_edge"]:
        return f"{found['split']}:  not this law, α is at the edge of the search\n{r2}"
    mantissa, power = f"{found['A']:.1e}".split("e")
    return (f"{found['split']}:  $P = {mantissa} \\cdot 10^{{{int(power)}}} / C^{{{found['alpha']:.2f}}} "
            f"{found['p_star']:+.1f}$\nα {interval_text(found, 'alpha', '.2f')},  "
            f"P* {interval_text(found, 'p_star', '.1f')},  {r2}")


def draw_patterns(paths, out):
    """A block of bars for each group of keywords, one bar for each checkpoint; the first one is grey."""
    lines = [line for path in paths for line in read_patterns(path)]
    colours = [GREY, *COLOURS]
    if not 1 <= len(lines) <= len(colours):
        raise ValueError(f"{paths[0]}: patterns of 1 to {len(colours)} checkpoints fit, got {len(lines)}")
    names, height = short_names([checkpoint for checkpoint, _, _ in lines]), 0.8 / len(lines)
    with picture(out, COLUMN, 1 + 0.86 * len(lines), SMALL) as figure:
        ax = figure.add_subplot()
        ax.grid(True, axis="x")
        for i, (name, (_, n, groups)) in enumerate(zip(names, lines)):
            y = [group - 0.4 + (i + 0.5) * height for group in range(len(GROUPS))]
            values = [groups[group] for group in GROUPS]
            draw_whisker_bars(ax, y, values, [wilson(value, n) for value in values], 0.85 * height,
                              color=colours[i], label=f"{name} (n = {n:,})")
        ax.set_yticks(range(len(GROUPS)), GROUPS)
        ax.set_ylim(len(GROUPS) - 0.5, -0.5)
        ax.set_xlim(0, 1.12 * ax.dataLim.xmax)
        ax.set_xlabel("percent of responses with such a keyword")
        figure.legend(loc="outside upper left", ncols=2, fontsize=7, handlelength=1.2, borderaxespad=0)


def draw(runs, out, smooth=9):
    """Run folders -> the picture in the file out; smooth is the length of the running mean in steps."""
    if len(runs) > len(COLOURS) or smooth < 1:
        raise ValueError(f"plot.py: at most {len(COLOURS)} runs and --smooth 1 or more, "
                         f"got {len(runs)} and {smooth}")
    metrics = [read_metrics(run) for run in runs]
    names = short_names([Path(run).resolve() for run in runs])
    bars = {}
    for run in runs:  # the base model that several runs were compared with is drawn once, from the last run
        bars |= read_results(run) if (Path(run) / "results.json").exists() else {}
    measured = {key for rows in metrics for row in rows for key in row if row[key] is not None}
    if bars:
        measured = measured - {"format_rate"} | {"accuracy"}
    panels = [metric for metric in PANELS if metric in measured][:4]
    if not panels:
        raise ValueError(f"{runs[0]}: nothing to draw, its metrics.jsonl has none of {', '.join(PANELS)}")
    columns, rows = min(2, len(panels)), (len(panels) + 1) // 2
    with picture(out, 3.6 * columns, 2.6 * rows + 0.3, STYLE) as figure:
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
            add_title(ax, title, note)
        from matplotlib.lines import Line2D
        lines = [Line2D([], [], color=colour, linewidth=2) for colour in COLOURS[:len(runs)]]
        figure.legend(lines, names, loc="outside upper center", ncols=3, borderaxespad=0)


if __name__ == "__main__":
    sys.excepthook = speak_once
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that hold a metrics.jsonl; for "
                        "table1 also files like results.json; for patterns what eval.py patterns wrote")
    parser.add_argument("--kind", default="curves", choices=["curves", "table1", "scaling", "patterns"],
                        help="what to draw (default: curves)")
    parser.add_argument("--mode", default="reasoning", choices=list(MODES),
                        help="of scaling: which accuracies (default: reasoning)")
    parser.add_argument("--out", help="the picture (default: KIND.png in the folder of the first RUN)")
    parser.add_argument("--smooth", type=int, default=9,
                        help="of curves: steps in the running mean (default: 9)")
    args = parser.parse_args()
    first = Path(args.runs[0])
    out = args.out or (first.parent if first.is_file() else first) / f"{args.kind}.png"
    if args.kind == "curves":
        draw(args.runs, out, args.smooth)
    elif args.kind == "table1":
        draw_table1(args.runs, out)
    elif args.kind == "patterns":
        draw_patterns(args.runs, out)
    elif len(args.runs) > 1:
        raise ValueError(f"plot.py --kind scaling draws one run, got {len(args.runs)}")
    else:
        draw_scaling(args.runs[0], out, args.mode)
    print(out)
