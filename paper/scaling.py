"""How far would more compute take a run? The paper's law P(C) = A / C^alpha + P*, fitted to its checkpoints.

C is training compute in FLOPs, P accuracy in percent, P* where it would end. A is negative if accuracy rises.

    RUN/metrics.jsonl   `flops` of every step, rollouts included (README has the formula). Their sum up to a
                        checkpoint is its C; what the run started from is not counted
    RUN/results.json    what eval.py found for the checkpoints RUN/step_NNNNNN

    python eval.py lm --checkpoints RUN/step_* ... --out RUN/results.json
    python scaling.py RUN --mode reasoning --out scaling.json
    python plot.py RUN --kind scaling                               # the same as a picture

For a given alpha the law is a straight line, and least squares gives A and P*; alpha is searched. Points
weigh by their intervals. The fit's own 95 % intervals are a parametric bootstrap: accuracies are drawn around
the curve with the points' standard errors (enlarged if the points scatter more), and each draw is fitted.

What a fit does not show: three parameters follow almost any six points that rise and bend. So R2 is weak
evidence, and the R2 of a straight line in log C, with a parameter less, stands beside it. P* lies outside
the data: a wide interval says that the run was too short to tell. Checkpoints that answer the same positions
err partly together; here each errs alone, which makes alpha's interval rather too wide. No interval knows of
another training seed.
"""
import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # the repository, not paper/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from plumbing.flags import speak_once

ALPHAS = 0.01, 3.0  # the search: from nearly a straight line in log C to a jump after the first point
EDGES = 1.001 * ALPHAS[0], ALPHAS[1] / 1.001
SPLITS = ["easy", "medium", "hard"]
MODES = {"ntp": "NTP", "empty": "empty thought", "reasoning": "reasoning"}  # in results.json: in words
GOLDEN = (5 ** 0.5 - 1) / 2
KEYS = {"checkpoint", "mode", "split", "accuracy", "low", "high", "n"}  # of a line of results.json


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


def result_lines(path):
    """results.json, or the folder it lies in -> its lines: one accuracy each, on a split, in a mode."""
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    try:
        lines = json.loads(path.read_bytes())
        known = all(KEYS <= set(line) and line["split"] in SPLITS and line["mode"] in MODES for line in lines)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not what eval.py lm writes: {error}") from None
    if not known:
        raise ValueError(f"{path}: not what eval.py lm writes, objects with {', '.join(sorted(KEYS))}, "
                         f"modes {', '.join(MODES)} and splits {', '.join(SPLITS)}")
    return lines


def compute_at(run):
    """Run folder -> {step: FLOPs spent on this and all earlier steps}."""
    rows = read_metrics(run)
    steps = [row["step"] for row in rows]
    if steps != list(range(1, len(rows) + 1)) or any(row.get("flops") is None for row in rows):
        raise ValueError(f"{run}/metrics.jsonl: compute needs the 'flops' of every step from 1 on")
    return dict(zip(steps, np.cumsum([float(row["flops"]) for row in rows]).tolist()))


def read_points(run, mode):
    """Run folder -> {split: [lines of results.json in this mode with their `compute`, in order of it]}.

    A checkpoint is the run's own if the folder that holds it has the run's name; a base model is passed over.
    """
    spent, name = compute_at(run), Path(run).resolve().name
    points = {}
    for line in result_lines(run):
        own = re.search(rf"(?:^|/){re.escape(name)}/step_(\d+)/?$", line["checkpoint"])
        if own and line["mode"] == mode:
            step = int(own[1])
            if step not in spent:
                raise ValueError(f"{run}/results.json: {line['checkpoint']} is beyond the {len(spent)} steps "
                                 "of metrics.jsonl; evaluate this run's own checkpoints")
            some = points.setdefault(line["split"], {})
            if step in some:
                raise ValueError(f"{run}/results.json: two {mode} accuracies of {name}/step_{own[1]} on "
                                 f"{line['split']}; keep one (are there two runs of this name?)")
            some[step] = line | {"compute": spent[step]}
    if not points:
        raise ValueError(f"{run}/results.json: no {mode} accuracy of {name}/step_*; "
                         f"measure them with eval.py lm --checkpoints {run}/step_*")
    return {split: [some[step] for step in sorted(some)] for split, some in points.items()}


def bend(log_compute, alpha):
    """The law's shape, 0 at the first point: a line for small alpha, then ever more bent, and never large.
    Fitting this is well-conditioned; A and P* themselves are huge for small alpha and nearly cancel."""
    return -np.expm1(-alpha * log_compute) / alpha


def straight_line(log_compute, alpha, accuracy, weight):
    """Least squares of offset + slope * bend at a given alpha, for each of M draws. log_compute (n,), alpha a
    number or (M, 1), accuracy (M, n), weight (n,) -> misfit, offset, slope (M,)."""
    bent, weight_sum = bend(log_compute, alpha), weight.sum()                          # (n,) or (M, n)
    middle, level = (bent @ weight)[..., None] / weight_sum, (accuracy @ weight)[:, None] / weight_sum
    bent, risen = bent - middle, accuracy - level
    slope = (bent * risen) @ weight / (bent ** 2 @ weight)
    misfit = (risen - slope[:, None] * bent) ** 2 @ weight
    return misfit, level[:, 0] - slope * middle[..., 0], slope


def best_alpha(log_compute, accuracy, weight):
    """(M, n) accuracies -> (M,) the alpha of least misfit for each: on a grid, then by golden section."""
    misfit = lambda log_alpha: straight_line(log_compute, np.exp(log_alpha), accuracy, weight)[0]
    grid = np.linspace(*np.log(ALPHAS), 100)
    best = np.argmin([misfit(log_alpha) for log_alpha in grid], axis=0)
    low, high = grid[np.maximum(best - 1, 0)], grid[np.minimum(best + 1, len(grid) - 1)]
    for _ in range(60):  # each round keeps 0.618 of the span
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        rising = misfit(left[:, None]) < misfit(right[:, None])
        low, high = np.where(rising, low, left), np.where(rising, right, high)
    return np.exp((low + high) / 2)


def fit_draws(compute, accuracy, weight):
    """compute (n,), accuracy (M, n), weight (n,) -> A, alpha, P* (M,) of each draw."""
    log_compute = np.log(compute / compute.min())
    alpha = best_alpha(log_compute, accuracy, weight)
    _, offset, slope = straight_line(log_compute, alpha[:, None], accuracy, weight)
    return -slope / alpha * compute.min() ** alpha, alpha, offset + slope / alpha


def law(compute, A, alpha, p_star):
    """FLOPs -> accuracy in percent."""
    return A / compute ** alpha + p_star


def at_edge(alpha):
    return (alpha < EDGES[0]) | (alpha > EDGES[1])


def fit(compute, accuracy, error=None, draws=1000, seed=0):
    """FLOPs (n,), percent (n,), standard errors in percent (n,) -> dict of A, alpha, p_star, each with its
    95 % `_interval`, r2, r2_line (a straight line in log C), at_edge, draws_at_edge (share of the bootstrap).

    at_edge: alpha is as small or as large as the search goes; the points do not bend as the law does, and A
    and P* mean nothing. Without errors all points weigh the same and their scatter about the curve stands in,
    which says little for few points: the intervals are then too narrow.
    """
    compute, accuracy = np.asarray(compute, float), np.asarray(accuracy, float)
    if len(set(compute)) < 4 or compute.min() <= 0:
        raise ValueError(f"three parameters need checkpoints at 4 or more different computes above 0, "
                         f"got {len(set(compute[compute > 0]))}")
    if np.ptp(accuracy) == 0:
        raise ValueError(f"accuracy is {accuracy[0]} at every checkpoint, there is nothing to fit")
    weight = np.ones(len(compute)) if error is None else 1 / np.asarray(error, float) ** 2
    found = [float(value[0]) for value in fit_draws(compute, accuracy[None], weight)]
    fitted, log_compute = law(compute, *found), np.log(compute / compute.min())
    scatter = ((accuracy - fitted) ** 2 @ weight / (len(compute) - 3)) ** 0.5  # about 1 if errors explain it
    sigma = (scatter if error is None else max(1.0, scatter)) / weight ** 0.5
    drawn = fitted + sigma * np.random.default_rng(seed).standard_normal((draws, len(compute)))
    redrawn = fit_draws(compute, drawn, weight)
    _, offset, slope = straight_line(log_compute, 1e-9, accuracy[None], weight)
    r2 = lambda curve: float(1 - ((accuracy - curve) ** 2).sum() / ((accuracy - accuracy.mean()) ** 2).sum())
    result = {}
    for name, value, values in zip(("A", "alpha", "p_star"), found, redrawn):
        result |= {name: value, name + "_interval": np.percentile(values, [2.5, 97.5]).tolist()}
    return result | dict(r2=r2(fitted), r2_line=r2(offset + slope * log_compute),
                         at_edge=bool(at_edge(found[1])), draws_at_edge=float(at_edge(redrawn[1]).mean()))


def fit_run(run, mode):
    """Run folder -> one dict for each split that has been measured: split, mode, what `fit` found, points."""
    points, fits = read_points(run, mode), []
    for split in sorted(points, key=SPLITS.index):
        compute, accuracy, low, high, n = (np.array([float(line[key]) for line in points[split]])
                                           for key in ("compute", "accuracy", "low", "high", "n"))
        error = np.maximum((high - low) / 3.92, 100 / n)  # not 0 where nothing, or everything, was right
        try:
            found = fit(compute, accuracy, error)
        except ValueError as problem:
            raise ValueError(f"{run}, {mode}, {split}: {problem}") from None
        fits.append(dict(split=split, mode=mode) | found | dict(points=points[split]))
    return fits


def interval_text(found, name, form):
    """The interval of a parameter: open where the search ends (alpha) or no accuracy can be (P*)."""
    least, most = dict(alpha=EDGES, p_star=(0, 100), A=(-np.inf, np.inf))[name]
    low, high = found[name + "_interval"]
    return (f"[{f'<{least:.2g}' if low < least else format(low, form)}, "
            f"{f'>{most:.0f}' if high > most else format(high, form)}]")


def print_table(fits):
    """One row for each split: parameters [95 % interval], and what to hold against them."""
    print(f"{'':6}  {'points':>6}  {'A':>30}  {'alpha':>18}  {'P*, %':>19}  {'R2':>6}  R2 of a line in log C")
    for f in fits:
        A, alpha, p_star = (f"{f[name]:{form}} {interval_text(f, name, form)}"
                            for name, form in (("A", ".3g"), ("alpha", ".2f"), ("p_star", ".1f")))
        print(f"{f['split']:6}  {len(f['points']):6}  {A:>30}  {alpha:>18}  {p_star:>19}  "
              f"{f['r2']:6.3f}  {f['r2_line']:.3f}")
    for f in fits:
        if f["at_edge"]:
            print(f"{f['split']}: alpha is at the edge of the search ({ALPHAS[0]} to {ALPHAS[1]}); "
                  "the points do not bend as the law does, A and P* mean nothing")
        elif f["draws_at_edge"] > 0.025:
            print(f"{f['split']}: for {f['draws_at_edge']:.0%} of the bootstrap alpha is at the edge of the "
                  f"search ({ALPHAS[0]} to {ALPHAS[1]}): the intervals are open on that side")
    print("Few points and three parameters: a high R2 is weak evidence; look at the intervals.")


if __name__ == "__main__":
    sys.excepthook = speak_once
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", metavar="RUN", help="folder with metrics.jsonl and results.json")
    parser.add_argument("--mode", default="reasoning", choices=list(MODES),
                        help="which accuracies of results.json (default: reasoning)")
    parser.add_argument("--out", help="write parameters and points here as JSON")
    args = parser.parse_args()
    fits = fit_run(args.run, args.mode)
    print_table(fits)
    if args.out:
        Path(args.out).write_text(json.dumps(fits, indent=1))
        print(f"written to {args.out}")
