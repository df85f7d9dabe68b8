"""Pictures of runs: worked cases for reading, smoothing and naming, and what the pictures show."""
import json
import struct
import sys

import numpy as np
import pytest

import plot
from tiny import run_here

DPI = 200


def write_run(folder, rows, end=""):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return folder


def rpt_rows(n=20):
    """Metrics as train_rpt.py logs them: the reward rises, a cut-off rollout here and there."""
    return [{"step": step, "reward": step / n, "format_rate": 0.9, "frac_zero_std": 0.5,
             "len_mean": 50.0 + step, "frac_truncated": 0.1 * (step % 2), "entropy": 1.5 - step / n,
             "loss": -0.01, "grad_norm": 1.0} for step in range(n)]


def result(checkpoint, mode, split, accuracy):
    return {"checkpoint": checkpoint, "mode": mode, "split": split, "accuracy": accuracy,
            "low": accuracy - 2, "high": accuracy + 3, "n": 1000, "seed": 1}


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, to look at what they show."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    saved, savefig = [], figure.savefig

    def keep(self, out):
        saved.append(self)
        savefig(self, out)

    monkeypatch.setattr(figure, "savefig", keep)
    return saved


def titles(figure):
    return [ax.get_title(loc="left") for ax in figure.axes if ax.get_title(loc="left")]


def whiskers(ax, axis):
    """The ends of all whiskers along x (0) or y (1), in the order in which they were drawn."""
    segments = [segment for lines in ax.collections for segment in lines.get_segments()]
    return [(float(low[axis]), float(high[axis])) for low, high in segments]


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
    rows = [{"step": 0, "reward": 0.25}, {"step": 1, "reward": None}, {"step": 2},
            {"step": 3, "reward": 0}]
    assert plot.series(rows, "reward", 100) == ([0, 3], [25, 0])


def test_running_mean_is_centred_and_shrinks_at_the_ends():
    assert plot.running_mean([1, 2, 6, 4, 5], 3) == [1.5, 3, 4, 5, 4.5]
    assert plot.running_mean([1, 2, 6, 4], 2) == [1.5, 4, 5, 4]  # looks a step ahead
    assert plot.running_mean([1, 2, 6], 1) == [1, 2, 6]
    assert plot.running_mean([1, 2, 6], 99) == [3, 3, 3]
    assert plot.running_mean([], 9) == []


@pytest.mark.parametrize("paths, names", [
    (["runs/base/latest", "runs/rpt/step_000120"], ["base", "rpt"]),
    (["runs/base", "runs/rpt/step_60", "runs/rpt/step_120"],
     ["base", "rpt/step_60", "rpt/step_120"]),
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
    plot.draw_curves([run], out)
    width, height = png_size(out)
    assert 6 <= width / DPI <= 8 and 4 <= height / DPI <= 7  # inches: the width of a page's text
    assert titles(figures[0]) == ["Reward", "Well-formed answers", "Response length", "Entropy"]
    dots, line = figures[0].axes[0].lines
    assert list(dots.get_ydata())[:3] == pytest.approx([0, 0.05, 0.1])
    assert line.get_ydata()[10] == pytest.approx(0.5)


def test_every_run_has_its_name_and_colour_in_all_panels(tmp_path, figures):
    runs = [write_run(tmp_path / name, rpt_rows()) for name in ("seed1", "seed2", "seed3")]
    plot.draw_curves(runs, tmp_path / "curves.png")
    names = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert names == ["seed1", "seed2", "seed3"]
    for ax in figures[0].axes:
        assert {line.get_color() for line in ax.lines} == set(plot.COLOURS[:3])


def test_bars_carry_their_own_numbers_and_whiskers(tmp_path, figures):
    run = write_run(tmp_path / "rpt", rpt_rows())
    # In another order than that of the picture.
    results = [result(checkpoint, mode, split, accuracy + 10 * plot.SPLITS.index(split))
               for mode, accuracy in (("reasoning", 30), ("ntp", 20))
               for split in ("hard", "easy", "medium")
               for checkpoint in ("base/latest", "runs/rpt/step_9")]
    # All but the last: rpt was not measured with NTP on medium.
    (run / "results.json").write_text(json.dumps(results[:-1]))
    plot.draw_curves([run], tmp_path / "curves.png")
    assert titles(figures[0]) == ["Reward", "Held-out accuracy", "Response length", "Entropy"]
    ax = figures[0].axes[1]
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["base, NTP", "base, reasoning", "rpt, NTP", "rpt, reasoning"]
    bars = sorted(ax.patches, key=lambda bar: bar.get_x())
    assert [bar.get_height() for bar in bars] == [20, 30, 20, 30, 30, 40, 40, 40, 50, 40, 50]
    assert set(whiskers(ax, 1)) == {(18, 23), (28, 33), (38, 43), (48, 53)}


def test_of_all_other_decodings_the_best_on_each_split_is_drawn(tmp_path):
    import eval as evaluation
    modes = evaluation.MODES["decodings"]
    assert sorted(plot.MODES) == sorted([*modes, "swapped"])
    lines = [result("base", mode, split, 30 + (7 * i + 3 * (split == "hard") * i) % 11)
             for i, mode in enumerate(modes) for split in ("easy", "hard")]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(lines))
    bars = plot.read_bars([path])
    assert [mode for _, mode in bars] == ["NTP", "empty thought", "reasoning", plot.BEST]
    others = [line for line in lines if plot.MODES[line["mode"]] == plot.BEST]
    assert len({line["accuracy"] for line in others}) > 3
    for split, (accuracy, low, high) in bars["base", plot.BEST].items():
        best = max((line for line in others if line["split"] == split), key=lambda line: line["accuracy"])
        assert (accuracy, low, high) == (best["accuracy"], best["low"], best["high"])


def test_the_base_model_of_two_runs_is_drawn_once(tmp_path, figures):
    runs = [write_run(tmp_path / name, rpt_rows()) for name in ("seed1", "seed2")]
    for run in runs:
        entries = [result("base", "ntp", "easy", 40),
                   result(f"runs/{run.name}/latest", "ntp", "easy", 50)]
        (run / "results.json").write_text(json.dumps(entries))
    plot.draw_curves(runs, tmp_path / "curves.png")
    labels = [text.get_text() for text in figures[0].axes[1].get_legend().get_texts()]
    assert labels == ["base, NTP", "seed1, NTP", "seed2, NTP"]


UNKNOWN_MODE = json.dumps([result("base", "magic", "easy", 40)])
UNKNOWN_SPLIT = json.dumps([result("base", "ntp", "all", 40)])


@pytest.mark.parametrize("content", ["[{", "7", "[7]", '["a"]', '{"a": 1}', '[{"mode": "ntp"}]',
                                     UNKNOWN_MODE, UNKNOWN_SPLIT])
def test_broken_results_are_named_by_file(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"/results\.json: not what eval.py lm writes"):
        plot.read_results(tmp_path)


def test_a_next_token_run_shows_loss_and_gradient_norm(tmp_path, figures):
    rows = [{"step": step, "loss": 9 - step, "grad_norm": 1.0, "reward": None} for step in range(5)]
    plot.draw_curves([write_run(tmp_path / "ntp", rows)], tmp_path / "curves.png")
    assert titles(figures[0]) == ["Loss", "Gradient norm"]


def test_a_negative_policy_loss_is_not_cut_off(tmp_path, figures):
    run = write_run(tmp_path / "run", [{"step": 0, "loss": -0.5}, {"step": 1, "loss": 0.5}])
    plot.draw_curves([run], tmp_path / "curves.png")
    assert figures[0].axes[0].get_ylim()[0] < -0.5


def test_the_right_axis_is_there_only_if_something_was_cut_off(tmp_path, figures):
    cut = write_run(tmp_path / "cut", rpt_rows())
    whole = write_run(tmp_path / "whole", [row | {"frac_truncated": 0.0} for row in rpt_rows()])
    plot.draw_curves([cut], tmp_path / "cut.png")
    plot.draw_curves([whole], tmp_path / "whole.png")
    assert [len(figure.axes) for figure in figures] == [5, 4]


def test_nothing_to_draw_and_impossible_settings_are_refused(tmp_path):
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "run", [{"step": 0, "lr": 1e-3, "reward": None}])
    with pytest.raises(ValueError, match="nothing to draw"):
        plot.draw_curves([run], tmp_path / "curves.png")
    with pytest.raises(ValueError, match="at most 6 runs"):
        plot.draw_curves([run] * 7, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_an_empty_thought_is_told_from_guessing_and_thinking(tmp_path, figures):
    run = write_run(tmp_path / "rpt", rpt_rows())
    results = [result("base", mode, "easy", accuracy)
               for mode, accuracy in (("reasoning", 30), ("empty", 25), ("ntp", 20))]
    (run / "results.json").write_text(json.dumps(results))
    plot.draw_curves([run], tmp_path / "curves.png")
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
    assert drawn(hard) == dict(zip(np.round(rpt, 6), [50, 55, 60]))  # without the base
    assert set(whiskers(hard, 0)) == {(48, 53), (53, 58), (58, 63)}
    words = [text.get_text() for text in easy.texts]
    assert words[-2:] == ["base", "rpt"] and set(words[:-2]) == {"20.0", "30.0", "35.0", "40.0"}
    places = [text.xy[1] for text in easy.texts[-2:]]
    assert places[0] < base < places[1] < min(rpt)  # each name stands above its own rows
    assert easy.get_ylim()[0] > easy.get_ylim()[1]  # and rows go down


def test_table_1_without_any_accuracy_says_so(tmp_path):
    (tmp_path / "none.json").write_text("[]")
    with pytest.raises(ValueError, match="none.json: no accuracy"):
        plot.draw_table1([tmp_path / "none.json"], tmp_path / "table1.png")


def test_each_kind_writes_its_own_file_and_prints_where(tmp_path):
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "rpt", rpt_rows())
    (run / "results.json").write_text(json.dumps([result("base", "ntp", "easy", 40)]))
    pdf = tmp_path / "t.pdf"
    for arguments, where in (((run,), run / "curves.png"),
                             ((run / "results.json", "--kind", "table1"), run / "table1.png"),
                             ((run, "--kind", "table1", "--out", pdf), pdf)):
        assert run_here("plot.py", *arguments) == (0, f"{where}\n", "")
        assert where.stat().st_size > 5000


@pytest.mark.parametrize("arguments, problem", [
    (["nowhere"], "nowhere/metrics.jsonl: no such file"),
    (["no.json", "--kind", "table1"], "no.json"),
    (["run", "--smooth", "0"], "--smooth must be at least 1"),
])
def test_a_missing_file_or_an_impossible_setting_ends_with_one_line(tmp_path, arguments, problem):
    pytest.importorskip("matplotlib")
    code, out, err = run_here("plot.py", tmp_path / arguments[0], *arguments[1:])
    assert (code, out, err.count("\n")) == (2, "", 1) and problem in err


def test_missing_matplotlib_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="^plot.py needs matplotlib: pip install matplotlib$"):
        plot.draw_curves([write_run(tmp_path / "run", rpt_rows())], tmp_path / "curves.png")
