"""paper/patterns.py: keywords as whole words, counts by hand, and the picture opened again."""
import json
import zlib

import pytest

from paper.patterns import (KEYWORDS, compare, describe, draw_patterns, keyword_regex,
                            read_responses)
from tiny import run_here, write_lines


@pytest.mark.parametrize("group, text, found", [
    ("reflection", "Wait, no", True), ("reflection", "the waiter", False),
    ("reflection", "await", False), ("reflection", "looking\nback at it", True),
    ("reflection", "looking backwards", False), ("divergent", "a, b, etc.", True),
    ("divergent", "sketch etc and", False), ("divergent", "fetc.", False),
    ("divergent", "neither", False), ("divergent", "Either way", True),
    ("divergent", "the option", False), ("hypothesis", "something like 3", True),
    ("hypothesis", "something alike", False), ("breakdown", "let me break this down", True),
    ("breakdown", "a breakdown", False), ("transition", "think differently", True),
    ("transition", "alternative", False), ("deduction", "(finally)", True),
    ("deduction", "in conclusions", False), ("deduction", "logically_", False)])
def test_a_keyword_counts_as_a_whole_word_in_any_case(group, text, found):
    assert bool(keyword_regex(KEYWORDS[group]).search(text.lower())) == found
    assert describe([text, "nothing here"])[group] == (50 if found else 0)


def test_patterns_are_counted_as_by_hand():
    [line] = compare({"c": ["Wait. wait a b", "a b a b</think> so finally", ""]})
    assert line["n"] == 3 and line["words_mean"] == (4 + 6 + 0) / 3
    assert (line["reflection"], line["deduction"], line["transition"]) == (100 / 3, 100 / 3, 0)
    # words: Wait. wait a b | a b a b</think> so finally
    assert line["distinct_1"] == 7 / 10  # Wait. wait a b b</think> so finally
    assert line["distinct_2"] == 7 / 8   # (a, b) twice
    assert line["distinct_3"] == 1
    thoughts = b"Wait. wait a ba b a b"  # up to </think>, where there is one
    assert line["compression"] == len(zlib.compress(thoughts, 9)) / len(thoughts)
    assert describe(["</think>\\boxed{x}"])["compression"] is None  # there is no thought


def test_a_template_repeated_compresses_better_than_different_thoughts():
    same = ["the next token may be this or that, most likely this"] * 20
    other = [" ".join(str((7919 * i + 104729 * j) % 9973) for j in range(12)) for i in range(20)]
    assert describe(same)["compression"] < 0.2 < describe(other)["compression"]
    assert describe(same)["distinct_2"] < 0.1 < describe(other)["distinct_2"]


def dumped(checkpoint, response, mode="reasoning"):
    return dict(checkpoint=checkpoint, response=response, mode=mode)


def test_checkpoints_are_compared_with_the_first_and_empty_thoughts_left_out(tmp_path):
    first = write_lines(tmp_path / "first.jsonl", dumped("base", "probably 1"), dumped("base", "2"),
                        dumped("base", "wait"), dumped("base", "probably 4"),
                        dumped("rpt", "probably 5", mode="empty"))
    second = write_lines(tmp_path / "second.jsonl", dumped("rpt", "probably and finally"),
                         dict(checkpoint="base", response="0"))
    found = read_responses([first, second])
    assert found == {"base": ["probably 1", "2", "wait", "probably 4", "0"],
                     "rpt": ["probably and finally"]}
    base, rpt = compare(found)
    assert (base["hypothesis"], rpt["hypothesis"]) == (40, 100)
    assert rpt["change"]["hypothesis"] == pytest.approx(150) and rpt["change"]["reflection"] == -100
    assert base["change"]["hypothesis"] == 0
    assert rpt["change"]["deduction"] is None  # from 0 % on there is no relative change


@pytest.mark.parametrize("line, complaint", [
    (dict(checkpoint="c", response=None), "line 1: expected an object with 'response'"),
    (dict(checkpoint=["c"], response="r"), "line 1: 'checkpoint' and 'response' must be strings"),
    (dict(checkpoint="c", response="</think>1", mode="empty"), "only empty thoughts"),
])
def test_a_dump_that_cannot_be_described_is_named(tmp_path, line, complaint):
    with pytest.raises(ValueError, match=f"dump.jsonl:? {complaint}"):
        read_responses([write_lines(tmp_path / "dump.jsonl", line)])


# ---- picture and command line ----

@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, to look at what they show."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    saved, savefig = [], figure.savefig

    def save(self, out):
        saved.append(self)
        savefig(self, out)
    monkeypatch.setattr(figure, "savefig", save)
    return saved


def test_the_picture_shows_each_share_beside_that_of_the_other_checkpoint(tmp_path, figures):
    base, rpt = [40, 90, 8, 22, 61, 0], [45, 80, 2, 57.5, 70, 100]
    lines = [dict(checkpoint="runs/base/step_9", n=200, **dict(zip(KEYWORDS, base))),
             dict(checkpoint="runs/rpt/step_9", n=200, **dict(zip(KEYWORDS, rpt)))]
    draw_patterns(lines, tmp_path / "patterns.png")
    assert (tmp_path / "patterns.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    [ax] = figures[0].axes
    assert [label.get_text().lower() for label in ax.get_yticklabels()] == list(KEYWORDS)
    legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert legend == ["base (n = 200)", "rpt (n = 200)"]
    for first, shares in ((0, base), (6, rpt)):
        bars = ax.patches[first:first + 6]
        assert [bar.get_width() for bar in bars] == shares
        assert [round(bar.get_y() + bar.get_height() / 2) for bar in bars] == [0, 1, 2, 3, 4, 5]
    ends = sorted((bar.get_y(), bar.get_y() + bar.get_height()) for bar in ax.patches)
    assert all(upper[1] <= lower[0] for upper, lower in zip(ends, ends[1:]))  # no bar hides another
    whiskers = [segment[:, 0] for lines in ax.collections for segment in lines.get_segments()]
    assert whiskers[5] == pytest.approx((0, 1.885), abs=0.001)  # 0 of 200: not "0 for certain"


def test_more_checkpoints_than_colours_are_refused(tmp_path):
    line = dict(n=3, **dict.fromkeys(KEYWORDS, 50))
    with pytest.raises(ValueError, match="room for 7 checkpoints, got 8"):
        draw_patterns([line | dict(checkpoint=f"c{i}") for i in range(8)], tmp_path / "p.png")


def test_patterns_from_files_to_files(tmp_path):
    pytest.importorskip("matplotlib")
    dump = write_lines(tmp_path / "dump.jsonl", dumped("base", "wait, 7"), dumped("rpt", "so 7"))
    code, text, err = run_here("paper/patterns.py", "--dump", dump, "--out", tmp_path / "p.json",
                               "--picture", tmp_path / "p.png")
    assert (code, err) == (0, "") and "hypothesis" in text and "compression" in text
    assert "0.0 (-100.0 %)" in text  # no reflection is left in rpt
    lines = json.loads((tmp_path / "p.json").read_text())
    assert [(line["checkpoint"], line["n"]) for line in lines] == [("base", 1), ("rpt", 1)]
    assert (tmp_path / "p.png").stat().st_size > 5000
