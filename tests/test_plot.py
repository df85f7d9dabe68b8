"""Pictures of runs: worked cases for reading, smoothing and naming, and pictures opened again as files."""
import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import plot

ROOT = Path(plot.__file__).parent
DPI = 200


def write_run(folder, rows, end=""):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return folder


def rpt_rows(n=20):
    """Metrics as train_rpt.py logs them: the reward rises, a cut-off response here and there."""
    return [{"step": step, "reward": step / n, "format_rate": 0.9, "frac_zero_std": 0.5,
             "len_mean": 50.0 + step, "frac_truncated": 0.1 * (step % 2), "entropy": 1.5 - step / n,
             "loss": -0.01, "grad_norm": 1.0} for step in range(n)]


def result(checkpoint, mode, split, accuracy):
    return {"checkpoint": checkpoint, "mode": mode, "split": split, "accuracy": accuracy, "low": accuracy - 2,
            "high": accuracy + 3, "n": 1000, "seed": 1}


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


@pytest.fixture
def figures(monkeypatch):
    """The figures that draw() saved, to look at what they show."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    saved, savefig = [], figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, out: (saved.append(self), savefig(self, out)))
    return saved


def titles(figure):
    return [ax.get_title(loc="left") for ax in figure.axes if ax.get_title(loc="left")]


def run_script(*arguments):
    command = [sys.executable, str(ROOT / "plot.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_torn_last_line_is_ignored(tmp_path):
    run = write_run(tmp_path / "run", rpt_rows(3), end='{"step": 3, "rewa')
    assert [row["step"] for row in plot.read_metrics(run)] == [0, 1, 2]


def test_a_character_torn_in_its_middle_is_ignored_too(tmp_path):
    run = write_run(tmp_path / "run", rpt_rows(3))
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 3, "note": "\xe2\x98')
    assert len(plot.read_metrics(run)) == 3


def test_a_whole_last_line_without_its_newline_counts(tmp_path):
    assert len(plot.read_metrics(write_run(tmp_path / "run", rpt_rows(2), end='{"step": 2}'))) == 3


@pytest.mark.parametrize("broken", ['{"step": 2, "rewa', "", "[1, 2]", "7", '{"reward": 0.5}'])
def test_a_broken_middle_line_is_named_by_file_and_line(tmp_path, broken):
    run = write_run(tmp_path / "run", rpt_rows(2), end=broken + '\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"run/metrics\.jsonl line 3: "):
        plot.read_metrics(run)


@pytest.mark.parametrize("content", ["", '{"step": 0, "rew'])
def test_a_run_killed_before_its_first_step_says_so(tmp_path, content):
    with pytest.raises(ValueError, match="no complete line"):
        plot.read_metrics(write_run(tmp_path / "run", [], end=content))


def test_null_is_no_measurement_and_no_zero():
    rows = [{"step": 0, "reward": 0.25}, {"step": 1, "reward": None}, {"step": 2}, {"step": 3, "reward": 0}]
    assert plot.series(rows, "reward", 100) == ([0, 3], [25, 0])


def test_running_mean_is_centred_and_shrinks_at_the_ends():
    assert plot.running_mean([1, 2, 6, 4, 5], 3) == [1.5, 3, 4, 5, 4.5]
    assert plot.running_mean([1, 2, 6, 4], 2) == [1.5, 4, 5, 4]  # an even window looks one step further ahead
    assert plot.running_mean([1, 2, 6], 1) == [1, 2, 6]
    assert plot.running_mean([1, 2, 6], 99) == [3, 3, 3]
    assert plot.running_mean([], 9) == []


@pytest.mark.parametrize("paths, names", [
    (["runs/base/latest", "runs/rpt/step_000120"], ["base", "rpt"]),
    (["runs/base", "runs/rpt/step_60", "runs/rpt/step_120"], ["base", "rpt/step_60", "rpt/step_120"]),
    (["a/rpt", "b/rpt"], ["a/rpt", "b/rpt"]),
    (["rpt", "b/rpt"], ["rpt", "b/rpt"]),  # one is the end of the other
    (["Qwen/Qwen3-0.6B"], ["Qwen3-0.6B"]),
    (["latest"], ["latest"]),
    (["runs/rpt", "runs/rpt"], ["rpt", "rpt"]),
])
def test_names_are_short_and_still_differ(paths, names):
    assert plot.short_names(paths) == names


def test_a_run_without_results_shows_its_format_instead(tmp_path, figures):
    run, out = write_run(tmp_path / "rpt", rpt_rows()), tmp_path / "curves.png"
    plot.draw([run], out)
    width, height = png_size(out)
    assert 6 <= width / DPI <= 8 and 4 <= height / DPI <= 7  # inches: the width of a page's text
    assert titles(figures[0]) == ["Reward", "Well-formed answers", "Response length", "Entropy"]
    dots, line = figures[0].axes[0].lines
    assert list(dots.get_ydata())[:3] == pytest.approx([0, 5, 10])  # percent
    assert line.get_ydata()[10] == pytest.approx(50)


def test_every_run_has_its_name_and_colour_in_all_panels(tmp_path, figures):
    runs = [write_run(tmp_path / name, rpt_rows()) for name in ("seed1", "seed2", "seed3")]
    plot.draw(runs, tmp_path / "curves.png")
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["seed1", "seed2", "seed3"]
    for ax in figures[0].axes:
        assert {line.get_color() for line in ax.lines} == set(plot.COLOURS[:3])


def test_bars_carry_their_own_numbers_and_whiskers(tmp_path, figures):
    run = write_run(tmp_path / "rpt", rpt_rows())
    results = [result(checkpoint, mode, split, accuracy + 10 * plot.SPLITS.index(split))
               for mode, accuracy in (("reasoning", 30), ("ntp", 20))  # not in the order of the picture
               for split in ("hard", "easy", "medium") for checkpoint in ("base/latest", "runs/rpt/step_9")]
    (run / "results.json").write_text(json.dumps(results[:-1]))  # rpt was not measured with NTP on medium
    plot.draw([run], tmp_path / "curves.png")
    assert titles(figures[0]) == ["Reward", "Held-out accuracy", "Response length", "Entropy"]
    ax = figures[0].axes[1]
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["base, NTP", "base, reasoning", "rpt, NTP", "rpt, reasoning"]
    bars = sorted(ax.patches, key=lambda bar: bar.get_x())
    assert [bar.get_height() for bar in bars] == [20, 30, 20, 30, 30, 40, 40, 40, 50, 40, 50]
    whiskers = {(low, high) for lines in ax.collections for (_, low), (_, high) in lines.get_segments()}
    assert whiskers == {(18, 23), (28, 33), (38, 43), (48, 53)}


def test_the_base_model_of_two_runs_is_drawn_once(tmp_path, figures):
    runs = [write_run(tmp_path / name, rpt_rows()) for name in ("seed1", "seed2")]
    for run in runs:
        entries = [result("base", "ntp", "easy", 40), result(f"runs/{run.name}/latest", "ntp", "easy", 50)]
        (run / "results.json").write_text(json.dumps(entries))
    plot.draw(runs, tmp_path / "curves.png")
    labels = [text.get_text() for text in figures[0].axes[1].get_legend().get_texts()]
    assert labels == ["base, NTP", "seed1, NTP", "seed2, NTP"]


UNKNOWN_SPLIT = json.dumps([result("base", "ntp", "all", 40)])


@pytest.mark.parametrize("content", ["[{", "[7]", '[{"mode": "ntp"}]', UNKNOWN_SPLIT])
def test_broken_results_are_named_by_file(tmp_path, content):
    run = write_run(tmp_path / "rpt", rpt_rows())
    (run / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"rpt/results\.json: "):
        plot.read_results(run)


def test_a_next_token_run_shows_loss_and_gradient_norm(tmp_path, figures):
    rows = [{"step": step, "loss": 9 - step, "grad_norm": 1.0, "reward": None} for step in range(5)]
    plot.draw([write_run(tmp_path / "ntp", rows)], tmp_path / "curves.png")
    assert titles(figures[0]) == ["Loss", "Gradient norm"]


def test_a_negative_policy_loss_is_not_cut_off(tmp_path, figures):
    run = write_run(tmp_path / "run", [{"step": 0, "loss": -0.5}, {"step": 1, "loss": 0.5}])
    plot.draw([run], tmp_path / "curves.png")
    assert figures[0].axes[0].get_ylim()[0] < -0.5


def test_the_right_axis_is_there_only_if_something_was_cut_off(tmp_path, figures):
    cut = write_run(tmp_path / "cut", rpt_rows())
    whole = write_run(tmp_path / "whole", [row | {"frac_truncated": 0.0} for row in rpt_rows()])
    plot.draw([cut], tmp_path / "cut.png")
    plot.draw([whole], tmp_path / "whole.png")
    assert [len(figure.axes) for figure in figures] == [5, 4]


def test_nothing_to_draw_and_impossible_settings_are_refused(tmp_path):
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "run", [{"step": 0, "lr": 1e-3, "reward": None}])
    with pytest.raises(ValueError, match="nothing to draw"):
        plot.draw([run], tmp_path / "curves.png")
    with pytest.raises(ValueError, match="--smooth 1 or more"):
        plot.draw([run], tmp_path / "curves.png", smooth=0)
    with pytest.raises(ValueError, match="at most 6 runs"):
        plot.draw([run] * 7, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def whiskers(ax):
    """The ends of all horizontal whiskers in the order in which they were drawn."""
    return [(float(low), float(high)) for lines in ax.collections
            for (low, _), (high, _) in lines.get_segments()]


def test_an_empty_thought_is_told_from_guessing_and_thinking(tmp_path, figures):
    run = write_run(tmp_path / "rpt", rpt_rows())
    results = [result("base", mode, "easy", accuracy)
               for mode, accuracy in (("reasoning", 30), ("empty", 25), ("ntp", 20))]
    (run / "results.json").write_text(json.dumps(results))
    plot.draw([run], tmp_path / "curves.png")
    ax = figures[0].axes[1]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "base, NTP", "base, empty thought", "base, reasoning"]
    bars = [(bar.get_height(), bar.get_hatch()) for bar in ax.patches]
    assert bars == [(20, None), (25, "////"), (30, None)]


def test_table_1_shows_each_number_in_its_row_and_panel(tmp_path, figures):
    run = write_run(tmp_path / "rpt", rpt_rows(1))
    (run / "results.json").write_text(json.dumps(
        [result("runs/rpt/step_9", mode, split, accuracy + more)
         for split, more in (("hard", 20), ("easy", 0))
         for mode, accuracy in (("reasoning", 40), ("ntp", 30), ("empty", 35))]))
    (tmp_path / "base.json").write_text(json.dumps([result("runs/base/step_7", "ntp", "easy", 20)]))
    plot.draw_table1([tmp_path / "base.json", run], tmp_path / "table1.png")
    width, height = png_size(tmp_path / "table1.png")
    assert width / 300 == pytest.approx(plot.COLUMN, abs=0.01) and height / 300 < 3
    easy, hard = figures[0].axes  # no panel for a split that nobody measured
    assert titles(figures[0]) == ["easy", "hard"]
    rows = [label.get_text() for label in easy.get_yticklabels()]
    assert rows == ["NTP", "NTP", "empty thought", "reasoning"]
    base, *rpt = [float(tick) for tick in easy.get_yticks()]

    def drawn(ax):
        return {round(bar.get_y() + bar.get_height() / 2, 6): bar.get_width() for bar in ax.patches}
    assert drawn(easy) == dict(zip(np.round([base, *rpt], 6), [20, 30, 35, 40]))
    assert drawn(hard) == dict(zip(np.round(rpt, 6), [50, 55, 60]))  # the base was not measured there
    assert set(whiskers(hard)) == {(48, 53), (53, 58), (58, 63)}
    words = [text.get_text() for text in easy.texts]
    assert words[-2:] == ["base", "rpt"] and set(words[:-2]) == {"20.0", "30.0", "35.0", "40.0"}
    places = [text.xy[1] for text in easy.texts[-2:]]
    assert places[0] < base < places[1] < min(rpt)  # each name stands above its own rows
    assert easy.get_ylim()[0] > easy.get_ylim()[1]  # and rows go down


def test_table_1_without_any_accuracy_says_so(tmp_path):
    (tmp_path / "none.json").write_text("[]")
    with pytest.raises(ValueError, match="none.json: no accuracy"):
        plot.draw_table1([tmp_path / "none.json"], tmp_path / "table1.png")


def scaled_run(folder, accuracy_at):
    """Six checkpoints of a run that spends 1e15 FLOPs a step; accuracy_at(FLOPs, split) in percent."""
    run = write_run(folder, [{"step": step + 1, "flops": 1e15} for step in range(60)])
    (run / "results.json").write_text(json.dumps(
        [result(f"runs/{folder.name}/step_{step:06d}", "reasoning", split, accuracy_at(step * 1e15, split))
         for split in ("hard", "easy") for step in (60, 5, 10, 20, 40, 50)]))
    return run


def test_scaling_draws_the_planted_law_through_its_points(tmp_path, figures):
    def law(compute, split):
        return (40 if split == "easy" else 20) - 8 * (compute / 5e15) ** -0.5
    plot.draw_scaling(scaled_run(tmp_path / "rpt", law), tmp_path / "scaling.png")
    ax, = figures[0].axes
    assert ax.get_xscale() == "log"
    curves = [line for line in ax.lines if len(line.get_xdata()) == 200]
    points = [container.lines[0] for container in ax.containers]
    assert len(curves) == len(points) == 2
    for split, curve, dots in zip(("easy", "hard"), curves, points):
        colour = plot.COLOURS[plot.SPLITS.index(split)]  # the split's own, also where medium is missing
        assert curve.get_color() == dots.get_color() == colour
        assert list(dots.get_xdata()) == pytest.approx([5e15, 1e16, 2e16, 4e16, 5e16, 6e16])
        assert dots.get_ydata() == pytest.approx([law(compute, split) for compute in dots.get_xdata()])
        assert curve.get_ydata() == pytest.approx([law(compute, split) for compute in curve.get_xdata()])
    easy, hard = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert easy.startswith("easy:  $P = -5.7 \\cdot 10^{8} / C^{0.50} +40.0$")  # 8 * 5e15 ** 0.5
    assert hard.startswith("hard:  $P = -5.7 \\cdot 10^{8} / C^{0.50} +20.0$")
    assert "R² 1.000 (straight line 0.9" in easy
    low, high = ax.containers[0].lines[2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((30, 35))  # the interval of the first point, 32


def test_a_law_that_does_not_hold_is_not_printed(tmp_path, figures):
    run = scaled_run(tmp_path / "rpt", lambda compute, split: 20 + compute / 1e16)  # bends upwards in log C
    plot.draw_scaling(run, tmp_path / "scaling.png")
    for text in figures[0].legends[0].get_texts():
        assert "not this law" in text.get_text() and "P*" not in text.get_text()


def test_a_short_run_still_has_numbers_on_its_compute_axis(tmp_path, figures):
    run = scaled_run(tmp_path / "rpt", lambda compute, split: 40 - (compute / 5e15) ** -0.5)
    plot.draw_scaling(run, tmp_path / "scaling.png")
    ax, = figures[0].axes
    low, high = ax.get_xlim()
    labels = [label.get_text().replace(" ", "") for label in ax.get_xticklabels()
              if low <= label.get_position()[0] <= high]
    for number in ("5\\times10^{15}", "10^{16}", "5\\times10^{16}"):
        assert any(number in label for label in labels)


def shares(*percents):
    return dict(zip(plot.GROUPS, percents))


def test_patterns_draw_each_share_beside_that_of_the_other_checkpoint(tmp_path, figures):
    base, rpt = shares(40, 90, 8, 22, 61, 0), shares(45, 80, 2, 57.5, 70, 100)
    lines = [{"checkpoint": f"runs/{name}/step_9", "n": 200, "compression": 0.3}
             | {group.lower(): share for group, share in groups.items()}
             for name, groups in (("base", base), ("rpt", rpt))]
    (tmp_path / "patterns.json").write_text(json.dumps(lines))
    plot.draw_patterns([tmp_path / "patterns.json"], tmp_path / "patterns.png")
    ax, = figures[0].axes
    assert [label.get_text() for label in ax.get_yticklabels()] == plot.GROUPS
    legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert legend == ["base (n = 200)", "rpt (n = 200)"]
    for first, groups in ((0, base), (6, rpt)):
        bars = ax.patches[first:first + 6]
        assert [bar.get_width() for bar in bars] == list(groups.values())
        assert [round(bar.get_y() + bar.get_height() / 2) for bar in bars] == [0, 1, 2, 3, 4, 5]
    ends = sorted(((bar.get_y(), bar.get_y() + bar.get_height()) for bar in ax.patches))
    assert all(upper[1] <= lower[0] for upper, lower in zip(ends, ends[1:]))  # no bar hides another
    assert whiskers(ax)[5] == pytest.approx((0, 1.885), abs=0.001)  # 0 of 200: not "0 for certain"


@pytest.mark.parametrize("content", ["[{", "7", "[7]", '[{"checkpoint": "a", "n": 3, "transition": 1}]'])
def test_broken_patterns_are_named_by_file(tmp_path, content):
    (tmp_path / "broken.json").write_text(content)
    with pytest.raises(ValueError, match="broken.json: not what eval.py patterns writes"):
        plot.draw_patterns([tmp_path / "broken.json"], tmp_path / "patterns.png")


@pytest.mark.parametrize("hits, n", [(0, 10), (3, 10), (57, 200), (200, 200)])
def test_wilson_ends_are_the_shares_that_the_data_just_do_not_contradict(hits, n):
    for share, side in zip(plot.wilson(100 * hits / n, n), (1, -1)):
        p = share / 100
        assert hits / n - p == pytest.approx(side * 1.96 * (p * (1 - p) / n) ** 0.5, abs=1e-7)


def test_each_kind_writes_its_own_file_and_prints_where(tmp_path):
    pytest.importorskip("matplotlib")
    run = scaled_run(tmp_path / "rpt", lambda compute, split: 40 - (compute / 5e15) ** -0.5)
    for arguments, where in (((run, "--kind", "scaling"), run / "scaling.png"),
                             ((run / "results.json", "--kind", "table1"), run / "table1.png"),
                             ((run, "--kind", "table1", "--out", tmp_path / "t.pdf"), tmp_path / "t.pdf")):
        done = run_script(*arguments)
        assert (done.returncode, done.stdout) == (0, f"{where}\n"), done.stderr
        assert where.stat().st_size > 5000
    for arguments, problem in (((run, run, "--kind", "scaling"), "draws one run, got 2"),
                               ((run, "--kind", "scaling", "--mode", "ntp"), "no ntp accuracy of rpt/step_"),
                               ((tmp_path / "no.json", "--kind", "table1"), "no.json")):
        done = run_script(*arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and problem in done.stderr


def test_missing_matplotlib_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="^plot.py needs matplotlib: pip install matplotlib$"):
        plot.draw([write_run(tmp_path / "run", rpt_rows())], tmp_path / "curves.png")


def test_the_script_writes_into_the_first_run_and_prints_where(tmp_path):
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "rpt", rpt_rows())
    done = run_script(run)
    assert (done.returncode, done.stdout) == (0, f"{run / 'curves.png'}\n"), done.stderr
    assert min(png_size(run / "curves.png")) > 800


def test_a_missing_run_exits_with_2_and_one_line(tmp_path):
    pytest.importorskip("matplotlib")
    done = run_script(tmp_path / "nowhere")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "nowhere/metrics.jsonl" in done.stderr
