"""How far would more compute take a run? The paper's law P(C) = A / C^alpha + P*, fitted.

C is the compute of a run in FLOPs, rollouts included: the sum of `flops` in RUN/metrics.jsonl. P is
the accuracy of its checkpoints in RUN/results.json, in percent, and P* the value that it would
approach; A is negative if accuracy rises.

    python eval.py lm --checkpoints RUN/step_* ... --out RUN/results.json
    python paper/scaling.py RUN --mode reasoning --out scaling.json --picture scaling.png

For a given alpha least squares gives A and P*; alpha is searched. Points are weighted by their
intervals. The intervals of A, alpha and P* are a parametric bootstrap: accuracies are drawn around
the curve with the points' errors (enlarged if they scatter more) and fitted again.

Three parameters fit almost any six points that rise and bend. So R2 is weak evidence, and the R2 of
a straight line in log C, with one parameter fewer, is printed beside it. P* lies outside the data:
a wide interval says that the run was too short to tell. Checkpoints share positions, so their
errors are correlated; treating them as independent makes alpha's interval rather too wide.
"""
import json
import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # the repository, not paper/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from plot import COLOURS, COLUMN, MODES, SMALL, SPLITS, add_title, picture, read_results
from plumbing import flags
from plumbing.files import write
from plumbing.log import read_metrics

ALPHAS = 0.01, 3.0  # from nearly a straight line in log C to a jump after the first point
EDGES = 1.001 * ALPHAS[0], ALPHAS[1] / 1.001
LIMITS = dict(A=(-np.inf, np.inf), alpha=EDGES, p_star=(0, 100))  # ends beyond them are open
GOLDEN = (5 ** 0.5 - 1) / 2
MARKERS = dict(zip(SPLITS, zip(COLOURS, "os^")))


def read_points(run, mode):
    """Run folder -> {split: [lines of results.json with their `compute`, in order of it]}.

    Only this run's checkpoints (by the name of its folder) and this mode count.
    """
    spent = np.cumsum([float(row["flops"]) for row in read_metrics(run)]).tolist()
    points = {split: {} for split in SPLITS}
    for line in read_results(run):
        checkpoint = Path(line["checkpoint"])
        if checkpoint.parent.name == Path(run).resolve().name and line["mode"] == mode:
            step = int(checkpoint.name.removeprefix("step_"))
            if step > len(spent) or step in points[line["split"]]:
                raise ValueError(f"{run}/results.json: {checkpoint} on {line['split']} is there "
                                 f"twice, or beyond the {len(spent)} steps of metrics.jsonl; "
                                 "evaluate this run's own checkpoints, once")
            points[line["split"]][step] = line | {"compute": spent[step - 1]}
    return {split: [lines[step] for step in sorted(lines)]
            for split, lines in points.items() if lines}


def law(compute, A, alpha, p_star):
    """FLOPs -> accuracy in percent."""
    return A / compute ** alpha + p_star


def straight_line(log_compute, alpha, accuracy, weight):
    """Least squares of offset + slope * bent for each of M draws -> misfit, offset, slope (M,).

    log_compute (n,), 0 at the first point; alpha a number or (M, 1); accuracy (M, n); weight (n,).
    """
    # The law's shape: a line in log C for small alpha, more bent for large alpha, never large.
    # Fitting A and P* would be ill-conditioned, because for small alpha they are huge and cancel.
    bent = -np.expm1(-alpha * log_compute) / alpha                       # (n,) or (M, n)
    middle = (bent @ weight)[..., None] / weight.sum()
    level = (accuracy @ weight)[:, None] / weight.sum()
    bent, risen = bent - middle, accuracy - level
    slope = (bent * risen) @ weight / (bent ** 2 @ weight)
    misfit = (risen - slope[:, None] * bent) ** 2 @ weight
    return misfit, level[:, 0] - slope * middle[..., 0], slope


def best_alpha(log_compute, accuracy, weight):
    """(M, n) accuracies -> (M,) the alpha of least misfit for each."""
    grid = np.linspace(*np.log(ALPHAS), 100)
    misfits = [straight_line(log_compute, np.exp(x), accuracy, weight)[0] for x in grid]
    best = np.argmin(misfits, axis=0)
    low, high = grid[np.maximum(best - 1, 0)], grid[np.minimum(best + 1, len(grid) - 1)]

    # Golden section: each round keeps 0.618 of the span.
    for _ in range(60):
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        misfit, *_ = straight_line(log_compute, np.exp(left[:, None]), accuracy, weight)
        other, *_ = straight_line(log_compute, np.exp(right[:, None]), accuracy, weight)
        low, high = np.where(misfit < other, low, left), np.where(misfit < other, right, high)
    return np.exp((low + high) / 2)


def fit_draws(compute, accuracy, weight):
    """compute (n,), accuracy (M, n), weight (n,) -> A, alpha, P* (M,) of each draw."""
    log_compute = np.log(compute / compute.min())
    alpha = best_alpha(log_compute, accuracy, weight)
    _, offset, slope = straight_line(log_compute, alpha[:, None], accuracy, weight)
    return -slope / alpha * compute.min() ** alpha, alpha, offset + slope / alpha


def at_edge(alpha):
    return (alpha < EDGES[0]) | (alpha > EDGES[1])


def r_squared(accuracy, curve):
    return float(1 - ((accuracy - curve) ** 2).sum() / ((accuracy - accuracy.mean()) ** 2).sum())


def fit(compute, accuracy, error, draws=1000, seed=0):
    """FLOPs, percent, standard errors in percent, (n,) each -> a dict:

    A, alpha, p_star, each with its 95 % `_interval`; r2; r2_line, of a straight line in log C;
    at_edge: alpha is as small or as large as the search goes, so the points do not bend as the law
    does, and A and P* mean nothing; draws_at_edge: the share of bootstrap draws with such an alpha.
    """
    weight = 1 / error ** 2
    found = [float(value[0]) for value in fit_draws(compute, accuracy[None], weight)]
    fitted = law(compute, *found)
    log_compute = np.log(compute / compute.min())
    _, offset, slope = straight_line(log_compute, 1e-9, accuracy[None], weight)

    # The scatter is about 1 if the errors explain how far the points lie from the curve.
    scatter = ((accuracy - fitted) ** 2 @ weight / (len(compute) - 3)) ** 0.5
    noise = np.random.default_rng(seed).standard_normal((draws, len(compute)))
    redrawn = fit_draws(compute, fitted + max(1.0, scatter) / weight ** 0.5 * noise, weight)
    result = {}
    for name, value, values in zip(LIMITS, found, redrawn):
        result |= {name: value, name + "_interval": np.percentile(values, [2.5, 97.5]).tolist()}
    return result | dict(r2=r_squared(accuracy, fitted),
                         r2_line=r_squared(accuracy, offset + slope * log_compute),
                         at_edge=bool(at_edge(found[1])),
                         draws_at_edge=float(at_edge(redrawn[1]).mean()))


def fit_run(run, mode):
    """Run folder -> a dict for each split: split, mode, what `fit` found, points."""
    fits = []
    for split, points in read_points(run, mode).items():
        compute, accuracy, low, high, n = columns(points, "compute", "accuracy", "low", "high", "n")
        if len(points) < 4 or np.ptp(accuracy) == 0:
            raise ValueError(f"{run}, {mode}, {split}: three parameters need 4 or more checkpoints "
                             f"of different accuracy, got {accuracy.tolist()}")
        # An interval of width 0, as eval.py once wrote them, is no certainty.
        error = np.maximum((high - low) / 3.92, 100 / n)
        found = fit(compute, accuracy, error)
        fits.append(dict(split=split, mode=mode) | found | dict(points=points))
    if not fits:
        raise ValueError(f"{run}/results.json: no {mode} accuracy of this run's checkpoints; "
                         f"measure them with eval.py lm --checkpoints {run}/step_*")
    return fits


def columns(points, *keys):
    return [np.array([float(point[key]) for point in points]) for key in keys]


def interval_text(found, name, form):
    """A parameter's interval, open beyond the search (alpha) and beyond 0 to 100 % (P*)."""
    least, most = LIMITS[name]
    low, high = found[name + "_interval"]
    low_text = f"<{least:.2g}" if low < least else format(low, form)
    high_text = f">{most:.0f}" if high > most else format(high, form)
    return f"[{low_text}, {high_text}]"


def print_table(fits):
    """A row for each split: parameters [95 % interval] and R2, then what weakens them."""
    print(f"{'':6}  {'points':>6}  {'A':>30}  {'alpha':>18}  {'P*, %':>19}  {'R2':>6}  "
          "R2 of a line in log C")
    for found in fits:
        A, alpha, p_star = (f"{found[name]:{form}} {interval_text(found, name, form)}"
                            for name, form in (("A", ".3g"), ("alpha", ".2f"), ("p_star", ".1f")))
        print(f"{found['split']:6}  {len(found['points']):6}  {A:>30}  {alpha:>18}  {p_star:>19}  "
              f"{found['r2']:6.3f}  {found['r2_line']:.3f}")
    for found in fits:
        if found["at_edge"]:
            print(f"{found['split']}: alpha is at the edge of the search ({ALPHAS[0]} to "
                  f"{ALPHAS[1]}); the points do not bend as the law does, A and P* mean nothing")
        elif found["draws_at_edge"] > 0.025:
            share = f"{found['draws_at_edge']:.0%}"
            print(f"{found['split']}: for {share} of the bootstrap alpha is at the edge of the "
                  "search: the intervals are open on that side")
    print("Few points and three parameters: a high R2 is weak evidence; look at the intervals.")


def draw(fits, out):
    """Accuracy over training compute and the fitted law for each split, its parameters below."""
    with picture(out, COLUMN, 1.9 + 0.32 * len(fits), SMALL) as figure:
        from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter
        ax = figure.add_subplot()
        ax.set_xscale("log")
        ax.grid(True, axis="y")
        for found in fits:
            colour, marker = MARKERS[found["split"]]
            compute, accuracy, low, high = columns(found["points"], "compute", "accuracy", "low",
                                                   "high")
            along = np.geomspace(compute[0], compute[-1], 200)
            curve = law(along, found["A"], found["alpha"], found["p_star"])
            ax.plot(along, curve, color=colour, linewidth=1.2)
            whiskers = np.maximum([accuracy - low, high - accuracy], 0)
            ax.errorbar(compute, accuracy, whiskers, fmt=marker, color=colour, markersize=3.5,
                        linewidth=0.8, capsize=1.5, label=describe_fit(found))
        # A short run spans only one or two powers of ten, too few for labels.
        short = ax.dataLim.xmax < 30 * ax.dataLim.xmin
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if short else (1,)))
        ax.xaxis.set_major_formatter(LogFormatterSciNotation(minor_thresholds=(9, 9)))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel("FLOPs of training, rollouts included")
        mode = MODES[fits[0]["mode"]]
        add_title(ax, "Accuracy over compute", f"percent, {mode}, with 95 % intervals")
        figure.legend(loc="outside lower left", fontsize=6.5, handletextpad=0.6, labelspacing=0.7,
                      borderaxespad=0)


def describe_fit(found):
    """A fit in words for the legend: the law on the first line, its certainty on the second."""
    r2 = f"R² {found['r2']:.3f} (straight line {found['r2_line']:.3f})"
    if found["at_edge"]:
        return f"{found['split']}:  not this law, α is at the edge of the search\n{r2}"
    mantissa, power = f"{found['A']:.1e}".split("e")
    return (f"{found['split']}:  $P = {mantissa} \\cdot 10^{{{int(power)}}} / "
            f"C^{{{found['alpha']:.2f}}} {found['p_star']:+.1f}$\n"
            f"α {interval_text(found, 'alpha', '.2f')},  "
            f"P* {interval_text(found, 'p_star', '.1f')},  {r2}")


def parse_args():
    parser = flags.Parser("A run's accuracy over its compute, and the paper's law through it.")
    add = parser.add_argument
    add("run", metavar="RUN", help="folder with metrics.jsonl and results.json")
    add("--mode", default="reasoning", choices=list(MODES), help="which accuracies of results.json")
    add("--out", help="write parameters and points here as JSON")
    add("--picture", metavar="FILE", help="draw them here: .png, .pdf or .svg")
    return parser.parse_args()


if __name__ == "__main__":
    sys.excepthook = flags.speak_once
    args = parse_args()
    fits = fit_run(args.run, args.mode)
    print_table(fits)
    if args.out:
        write(args.out, json.dumps(fits, indent=1))
        print(f"written to {args.out}")
    if args.picture:
        draw(fits, args.picture)
        print(f"drawn in {args.picture}")
