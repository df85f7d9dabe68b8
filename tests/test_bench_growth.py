"""bench/growth.py at tiny sizes: points, their slopes, tables and picture, again from the file."""
import json
import math

import pytest

from bench import growth
from test_bench import cells
from test_plot import figures
from tiny import run_here


@pytest.fixture
def found(monkeypatch):
    """What a command with two factors of tiny points measures, in this process."""
    tiny = growth.MIDDLE | growth.TINY
    monkeypatch.setattr(growth, "MIDDLE", tiny)
    monkeypatch.setattr(growth, "FACTORS", {
        "rows": ("rows", {4: dict(prompts=2), 8: dict(prompts=4)}),
        "shared": ("both", {(16, 4): dict(context=16, rollouts=4)})})
    monkeypatch.setattr(growth, "alone", lambda function, *arguments: (0.5, 0.25))
    return dict(command="python bench/growth.py", dtype="fp32", threads=1, commit="abc", torch="2",
                points=list(growth.measure_factors(["rows", "shared"], "fp32")))


@pytest.mark.parametrize("task", growth.TASKS)
def test_a_point_is_measured_in_a_fresh_process(task):
    """Its memory is at least weights and, for an update, gradients and moments, in fp32."""
    point = growth.TINY | dict(model=growth.llama(128, 1, 2, 2048))
    seconds, gb = growth.alone(growth.measure, task, "fp32", False, point)
    weights = 4 * (4096 * 128 + 3 * 128 * 2048 + 2 * 128 * 192) / 1e9
    assert 0 < seconds < 5 and (4 if task == "update" else 1) * 0.8 * weights < gb < 0.3


@pytest.mark.parametrize("own, prompts", [(False, [16]), (True, [16] * 4)])
def test_with_its_own_copy_each_rollout_stands_behind_a_prompt(monkeypatch, own, prompts):
    seen = []
    monkeypatch.setattr(growth, "generate", lambda model, texts, n, *_, **__: seen.append((texts, n)))
    point = growth.TINY | dict(context=16, rollouts=4)
    growth.prepare("sampling", "fp32", own, point)()
    (texts, n), = seen
    assert list(map(len, texts)) == prompts and n * len(texts) == 4 and texts == texts[:1] * len(texts)
    _, _, groups, _ = growth.prepare("update", "bf16", own, point).args
    assert [len(group.rollouts) for group in groups] == [4 // len(prompts)] * len(prompts)


def test_each_factor_and_task_is_a_point_and_shared_has_its_copies(found):
    assert [(point["x"], point["task"], point["own"]) for point in found["points"]] == [
        *((x, task, False) for x in (4, 8) for task in growth.TASKS),
        *(((16, 4), task, own) for task in growth.TASKS for own in (False, True))]


def test_slopes_are_those_of_the_last_points(found, capsys):
    assert growth.slope([1, 2, 4], [1, 7, 14]) == 1
    assert growth.slope([49.3, 134.5], [49.3 ** 2, 134.5 ** 2]) == pytest.approx(2)
    found["points"][3]["seconds"] = 0.5 * 2 ** 1.5
    growth.print_slopes(found["points"], ["rows"])
    assert cells(capsys)[-1] == ["rows", "4", "8", "0.00", "0.00", "1.50 (superlinear)", "0.00"]


def test_shared_prompts_stand_beside_the_ratio_of_tokens(found, capsys):
    found["points"][5]["seconds"] = 2.0
    growth.print_shared(found["points"][4:])
    sampling, update = cells(capsys)[-2:]
    # 4 copies of 16 + 2 tokens against 16 + 4 x 2.
    assert sampling == ["16", "4", "sampling", "0.50 s, 0.25 GB", "2.00 s, 0.25 GB", "4.00", "1.00", "3.00"]
    assert update[5:] == ["1.00", "1.00", "3.00"]


def test_what_was_measured_is_drawn_again(found, figures, tmp_path):
    """The command itself, from a file; panels of seconds and GB, a line and a slope for each task."""
    path = tmp_path / "growth.json"
    path.write_text(json.dumps(found))
    code, out, err = run_here("bench/growth.py", "--read", path, "--picture", tmp_path / "out.png")
    assert code == 0 and "| rows | 4 | 8 |" in out and "| 16 | 4 | update |" in out, err
    assert (tmp_path / "out.png").stat().st_size > 1000
    seconds, gb = figures[0].axes
    for ax, value in ((seconds, 0.5), (gb, 0.25)):
        line, slope_1 = ax.get_lines()[:2]
        assert list(line.get_xdata()) == [4, 8] and list(line.get_ydata()) == [value, value]
        assert math.isclose(slope_1.get_ydata()[0], value / 2)
        assert [text.get_text() for text in ax.texts] == ["0.00", "0.00"]
    code, _, err = run_here("bench/growth.py", "--factors", "rows,depth")
    assert code == 2 and "--factors rows,depth: expected some of rows,context" in err
