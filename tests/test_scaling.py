"""The fitted law: planted parameters found again, a brute-force oracle, honest intervals."""
import json

import numpy as np
import pytest

import plot
from paper import scaling
from test_plot import figures
from tiny import run_here

PAPER_STEPS = np.array([100, 200, 400, 800, 1000, 1200])


def planted(compute, alpha, fall=-20.0, p_star=47.0):
    """Accuracies that start `fall` away from p_star, and the A that belongs to it."""
    A = fall * compute.min() ** alpha
    return A, A / compute ** alpha + p_star


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.35, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("compute", [
    PAPER_STEPS * 1e10, PAPER_STEPS * 1e15, PAPER_STEPS * 1e20, np.geomspace(1e10, 1e22, 6),
    np.geomspace(1e19, 1e20, 4)])
@pytest.mark.parametrize("fall", [-20.0, 5.0])
def test_planted_parameters_are_found_exactly_without_noise(compute, alpha, fall):
    A, accuracy = planted(compute, alpha, fall)
    found = scaling.fit(compute, accuracy, np.ones(len(compute)), draws=2)
    assert found["alpha"] == pytest.approx(alpha, rel=1e-9)
    assert found["p_star"] == pytest.approx(47, rel=1e-9)
    assert found["A"] == pytest.approx(A, rel=1e-9)
    assert found["r2"] == pytest.approx(1) and found["r2_line"] < 0.9999 and not found["at_edge"]


def test_a_fit_by_hand_with_alpha_one():
    """1 / C at C = 1, 2, 4, 8 is 1, 1/2, 1/4, 1/8, so 30 - 8 / C is 22, 26, 28, 29."""
    found = scaling.fit(np.array([1, 2, 4, 8]), np.array([22, 26, 28, 29]), np.ones(4), draws=2)
    assert (found["A"], found["alpha"], found["p_star"]) == pytest.approx((-8, 1, 30))
    # 22.8 + 2.3 log2 C misses by .8, .9, .6, .7.
    assert found["r2_line"] == pytest.approx(1 - 2.3 / 28.75)


def test_no_other_parameters_fit_noisy_points_better():
    """Oracle: weighted least squares by numpy for 3,000 alphas, on points with unequal errors."""
    rng = np.random.default_rng(0)
    compute, alphas = PAPER_STEPS * 1e17, np.geomspace(*scaling.ALPHAS, 3000)
    for alpha in rng.uniform(0.2, 1.0, 10):
        error = rng.uniform(0.2, 0.8, 6)
        accuracy = planted(compute, alpha)[1] + error * rng.standard_normal(6)
        found = scaling.fit(compute, accuracy, error, draws=2)
        misfit = []
        for a in alphas:
            design = np.stack([(compute / compute[0]) ** -a, np.ones(6)], axis=1) / error[:, None]
            best, *_ = np.linalg.lstsq(design, accuracy / error, rcond=None)
            misfit.append(((design @ best - accuracy / error) ** 2).sum())
        ours = scaling.law(compute, found["A"], found["alpha"], found["p_star"])
        assert (((ours - accuracy) / error) ** 2).sum() <= min(misfit) * (1 + 1e-9)
        assert found["alpha"] == pytest.approx(alphas[np.argmin(misfit)], rel=0.003)
        squares = ((ours - accuracy) ** 2).sum()
        assert found["r2"] == pytest.approx(1 - squares / (6 * accuracy.var()))


@pytest.mark.parametrize("compute, alpha, error", [(PAPER_STEPS * 1e17, 0.3, 0.4),
                                                   (np.geomspace(1e18, 1e21, 8), 0.6, 0.5)])
def test_intervals_hold_the_planted_parameters_in_about_95_of_100_runs(compute, alpha, error):
    A, accuracy = planted(compute, alpha)
    runs, hits = 120, dict(A=0, alpha=0, p_star=0)
    for seed in range(runs):
        noisy = accuracy + error * np.random.default_rng(100 + seed).standard_normal(len(compute))
        found = scaling.fit(compute, noisy, np.full(len(compute), error), draws=150, seed=seed)
        for name, truth in (("A", A), ("alpha", alpha), ("p_star", 47)):
            low, high = found[name + "_interval"]
            hits[name] += low <= truth <= high
            assert low <= high
    assert all(0.85 * runs <= count for count in hits.values()), hits
    # An interval that held everything would not shrink with the errors.
    found = [scaling.fit(compute, accuracy, np.full(len(compute), e), draws=150)
             for e in (error / 10, error)]
    assert 5 * np.ptp(found[0]["alpha_interval"]) < np.ptp(found[1]["alpha_interval"])


def test_small_errors_give_the_intervals_of_linear_theory():
    """Oracle: standard errors from the law's derivatives in A, alpha and P*."""
    compute, error, alpha = PAPER_STEPS * 1e17, np.array([1, 1, 2, 1, 1, 2]) * 1e-4, 0.5
    A, accuracy = planted(compute, alpha)
    slopes = np.stack([compute ** -alpha, -A * np.log(compute) * compute ** -alpha, np.ones(6)],
                      axis=1)
    scale = np.array([abs(A), 1, 1])  # keeps the matrix well-conditioned
    weighted = slopes * scale / error[:, None]
    sigma = scale * np.sqrt(np.diag(np.linalg.inv(weighted.T @ weighted)))
    found = scaling.fit(compute, accuracy, error)
    for name, truth, width in zip(("A", "alpha", "p_star"), (A, alpha, 47), sigma):
        low, high = found[name + "_interval"]
        assert high - truth == pytest.approx(1.96 * width, rel=0.2)
        assert truth - low == pytest.approx(1.96 * width, rel=0.2)


def test_points_weigh_by_their_errors():
    compute = np.geomspace(1e18, 1e20, 6)
    _, accuracy = planted(compute, 0.5)
    accuracy[2] += 10  # far off, and known to be
    found = scaling.fit(compute, accuracy, np.array([0.1, 0.1, 1e6, 0.1, 0.1, 0.1]), draws=2)
    assert (found["alpha"], found["p_star"]) == pytest.approx((0.5, 47), rel=1e-4)


def test_scatter_beyond_the_errors_widens_the_intervals():
    compute = np.geomspace(1e18, 1e20, 8)
    _, accuracy = planted(compute, 0.5)
    wobble = accuracy + 1.0 * np.tile([1, -1], 4)
    calm, shaken = (np.ptp(scaling.fit(compute, some, np.full(8, 0.1))["p_star_interval"])
                    for some in (accuracy, wobble))
    assert shaken > 4 * calm


LINE = np.linspace(18, 20, 6)  # straight in log C


@pytest.mark.parametrize("accuracy, edge", [
    (LINE, 0.01), (LINE ** 3 / 100, 0.01),          # straight, bent upwards
    (np.array([30, 35, 35, 35, 35, 35.0]), 3.0)])   # a jump after the first point
def test_points_that_do_not_bend_like_the_law_are_at_the_edge(accuracy, edge):
    compute = np.geomspace(1e18, 1e20, 6)
    found = scaling.fit(compute, accuracy, np.full(6, 0.01), draws=50)
    assert found["at_edge"] and found["alpha"] == pytest.approx(edge)
    low, high = scaling.interval_text(found, "alpha", ".2f")[1:-1].split(", ")
    assert (low == "<0.01") if edge < 1 else (high == ">3")


def test_open_intervals_are_written_as_open():
    found = dict(alpha_interval=[0.2, 3.0], p_star_interval=[45.55, 412.0],
                 A_interval=[-1e30, -20.0])
    assert scaling.interval_text(found, "alpha", ".2f") == "[0.20, >3]"
    assert scaling.interval_text(found, "p_star", ".1f") == "[45.5, >100]"
    assert scaling.interval_text(found, "A", ".3g") == "[-1e+30, -20]"
    low_open = dict(p_star_interval=[-3.0, 99.96])
    assert scaling.interval_text(low_open, "p_star", ".1f") == "[<0, 100.0]"


def write_run(folder, flops, results, end=""):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": i + 1, "flops": f}) + "\n" for i, f in enumerate(flops)) + end)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def line(checkpoint, accuracy, mode="reasoning", split="easy", half=1.0):
    return dict(checkpoint=checkpoint, mode=mode, split=split, accuracy=accuracy,
                low=accuracy - half, high=accuracy + half, n=500, seed=0)


def full_run(folder, splits=("hard", "easy")):
    """Ten steps of 2e15 FLOPs each, checkpoints 1, 2, 4, 8, 10 on 45 - 10 / C^0.5 (C in 2e15)."""
    results = [line(f"{folder.name}/step_{step:06d}", 45 - 10 * step ** -0.5, split=split)
               for split in splits for step in (8, 1, 2, 4, 10)]
    return write_run(folder, [2e15] * 10, results)


def test_compute_is_the_running_sum_and_a_torn_line_is_ignored(tmp_path):
    results = [line(f"rpt/step_{step:06d}", 20 + step) for step in (1, 2, 3)]
    run = write_run(tmp_path / "rpt", [1e15, 3e15, 2e15], results, end='{"step": 4, "fl')
    points = scaling.read_points(run, "reasoning")["easy"]
    assert [point["compute"] for point in points] == [1e15, 4e15, 6e15]


def test_points_are_the_runs_own_checkpoints_in_order_of_compute(tmp_path):
    run = write_run(tmp_path / "rpt", [1e15, 3e15, 2e15], [
        line("runs/rpt/step_000003", 30), line("runs/base/step_000002", 10),
        line("runs/my_rpt/step_000001", 11),
        line("runs/rpt/step_000001/", 20),
        line("runs/rpt/step_000001", 5, mode="ntp"),
        line("runs/rpt/step_000002", 15, split="hard")])
    points = scaling.read_points(run, "reasoning")
    easy = [(point["compute"], point["accuracy"]) for point in points["easy"]]
    hard = [(point["compute"], point["accuracy"]) for point in points["hard"]]
    assert (easy, hard, set(points)) == ([(1e15, 20), (6e15, 30)], [(4e15, 15)], {"easy", "hard"})


def test_two_runs_of_the_same_name_are_not_mixed(tmp_path):
    results = [line("seed1/rpt/step_000001", 30), line("seed2/rpt/step_000001", 31)]
    run = write_run(tmp_path / "rpt", [1e15], results)
    with pytest.raises(ValueError, match="seed2/rpt/step_000001 on easy is there twice"):
        scaling.read_points(run, "reasoning")


def test_a_checkpoint_that_this_run_never_reached_is_refused(tmp_path):
    run = write_run(tmp_path / "rpt", [1e15] * 3, [line("other/rpt/step_000009", 30)])
    with pytest.raises(ValueError, match="rpt/step_000009 on easy is .* beyond the 3 steps"):
        scaling.read_points(run, "reasoning")


def test_a_mode_nobody_measured_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="no empty accuracy .* measure them with eval.py lm"):
        scaling.fit_run(full_run(tmp_path / "rpt"), "empty")


@pytest.mark.parametrize("accuracy", [[20.0, 25.0, 27.0], [20.0] * 5])
def test_three_points_or_a_flat_line_are_not_fitted(tmp_path, accuracy):
    results = [line(f"rpt/step_{i + 1:06d}", a) for i, a in enumerate(accuracy)]
    run = write_run(tmp_path / "rpt", [1e15] * 5, results)
    with pytest.raises(ValueError, match="rpt, reasoning, easy: three parameters need 4 or more"):
        scaling.fit_run(run, "reasoning")


def test_a_run_is_fitted_split_by_split(tmp_path):
    easy, hard = scaling.fit_run(full_run(tmp_path / "rpt"), "reasoning")
    assert (easy["split"], hard["split"], easy["mode"]) == ("easy", "hard", "reasoning")
    assert (hard["alpha"], hard["p_star"]) == pytest.approx((0.5, 45))
    assert hard["A"] == pytest.approx(-10 * 2e15 ** 0.5)
    assert [point["compute"] for point in hard["points"]] == [2e15, 4e15, 8e15, 1.6e16, 2e16]
    low, high = easy["p_star_interval"]
    assert low < 45 < high and high - low > 1  # the intervals of the points, 2 wide, were used


def test_an_interval_of_width_0_does_not_outweigh_everything(tmp_path):
    """Nothing right at the first checkpoint: its interval is [0, 0], which is no certainty."""
    accuracy, half = [0.0, 12.0, 20.0, 22.0, 25.0], [0.0, 3.0, 3.0, 3.0, 3.0]
    results = [line(f"rpt/step_{i + 1:06d}", accuracy[i], half=half[i]) for i in range(5)]
    run = write_run(tmp_path / "rpt", [1e15] * 5, results)
    found, = scaling.fit_run(run, "reasoning")
    error = np.array([100 / 500] + [6 / 3.92] * 4)
    expected = scaling.fit(1e15 * np.arange(1, 6), np.array(accuracy), error)
    assert {name: found[name] for name in expected} == expected


def test_the_command_prints_a_row_for_each_split_and_writes_and_draws_the_same(tmp_path):
    pytest.importorskip("matplotlib")
    run = full_run(tmp_path / "rpt")
    out, drawn = tmp_path / "scaling.json", tmp_path / "scaling.png"
    code, printed, err = run_here("paper/scaling.py", run, "--out", out, "--picture", drawn)
    assert (code, err) == (0, "")
    fits, rows = json.loads(out.read_text()), printed.splitlines()
    assert [found["split"] for found in fits] == ["easy", "hard"]
    for row, found in zip(rows[1:], fits):
        assert row.startswith(found["split"]) and found["alpha"] == pytest.approx(0.5)
        assert "-4.47e+08 [" in row and "0.50 [" in row and "45.0 [" in row
        assert row.endswith(f"1.000  {found['r2_line']:.3f}")
    assert "weak evidence" in printed and drawn.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("changes, words", [
    (dict(), None),
    (dict(draws_at_edge=0.56), "easy: for 56% of the bootstrap alpha is at the edge of the search"),
    (dict(draws_at_edge=0.56, at_edge=True), "easy: alpha is at the edge of the search (0.01 to 3.0)")])
def test_the_table_says_what_weakens_a_fit(tmp_path, capsys, changes, words):
    easy, _ = scaling.fit_run(full_run(tmp_path / "rpt"), "reasoning")
    scaling.print_table([easy | dict(at_edge=False, draws_at_edge=0.0) | changes])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("easy:")]
    assert len(said) == (words is not None) and (not words or said[0].startswith(words))


def test_too_few_checkpoints_end_the_command_with_one_line(tmp_path):
    results = [line(f"rpt/step_{i + 1:06d}", 20 + i) for i in range(3)]
    code, out, err = run_here("paper/scaling.py", write_run(tmp_path / "rpt", [1e15] * 3, results))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "rpt, reasoning, easy: three parameters need 4 or more checkpoints" in err


# ---- the picture ----

COMPUTE = 1e15 * np.array([5, 10, 20, 40, 50, 60])


def drawn_fits(folder, **accuracies):
    """{split: accuracies of a run at COMPUTE} -> its fits, drawn into the folder."""
    results = [line(f"rpt/step_{round(compute / 1e15):06d}", accuracy, split=split)
               for split, values in accuracies.items()
               for compute, accuracy in zip(COMPUTE, values)]
    fits = scaling.fit_run(write_run(folder / "rpt", [1e15] * 60, results), "reasoning")
    scaling.draw(fits, folder / "scaling.png")
    return fits


def test_the_picture_shows_the_planted_law_through_its_points(tmp_path, figures):
    fall = 8 * (COMPUTE / 5e15) ** -0.5
    drawn_fits(tmp_path, hard=20 - fall, easy=40 - fall)
    [ax] = figures[0].axes
    assert ax.get_xscale() == "log"
    curves = [line for line in ax.lines if len(line.get_xdata()) == 200]
    points = [container.lines[0] for container in ax.containers]
    assert len(curves) == len(points) == 2
    # The colours are those of the splits, also where medium is missing.
    for curve, dots, p_star, colour in zip(curves, points, (40, 20), plot.COLOURS[::2]):
        assert curve.get_color() == dots.get_color() == colour
        assert list(dots.get_xdata()) == pytest.approx(COMPUTE)
        assert dots.get_ydata() == pytest.approx(p_star - fall)
        expected = p_star - 8 * (curve.get_xdata() / 5e15) ** -0.5
        assert curve.get_ydata() == pytest.approx(expected)
    easy, hard = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert easy.startswith("easy:  $P = -5.7 \\cdot 10^{8} / C^{0.50} +40.0$")  # 8 * 5e15 ** 0.5
    assert hard.startswith("hard:  $P = -5.7 \\cdot 10^{8} / C^{0.50} +20.0$")
    assert "R² 1.000 (straight line 0.9" in easy
    low, high = ax.containers[0].lines[2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((31, 33))


def test_a_law_that_does_not_hold_is_not_printed(tmp_path, figures):
    drawn_fits(tmp_path, easy=20 + COMPUTE / 1e16)  # bends upwards in log C
    [text] = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert "not this law" in text and "P*" not in text


def test_a_short_run_has_numbers_on_its_compute_axis(tmp_path, figures):
    drawn_fits(tmp_path, easy=40 - (COMPUTE / 5e15) ** -0.5)
    [ax] = figures[0].axes
    low, high = ax.get_xlim()
    labels = [label.get_text().replace(" ", "") for label in ax.get_xticklabels()
              if low <= label.get_position()[0] <= high]
    for number in ("5\\times10^{15}", "10^{16}", "5\\times10^{16}"):
        assert any(number in label for label in labels)
