"""Differences on the same positions: by brute force, by hand, and from the files of eval.py."""
import json

import numpy as np
import pytest

from paper.paired import difference, kind_of, read_hits
from tiny import base, corpus, run_here, thinker, write_lines


def test_a_difference_is_that_of_resampled_documents():
    rng = np.random.default_rng(3)
    documents = np.repeat(np.arange(30), rng.integers(1, 9, size=30))
    easy = rng.random(len(documents)) < 0.4                      # of positions, for both
    first, second = easy + 0.2, easy * 0.9
    mean, low, high = difference(first, second, documents)
    assert mean == pytest.approx((first - second).mean())
    by_hand = []
    for _ in range(2000):
        drawn = rng.integers(30, size=30)
        some = np.concatenate([(first - second)[documents == d] for d in drawn])
        by_hand.append(some.mean())
    assert (low, high) == pytest.approx(np.percentile(by_hand, [2.5, 97.5]), abs=4e-3)
    # What makes positions easy or hard for both cancels.
    assert high - low < 0.5 * np.subtract(*difference(first, 0 * first, documents)[:0:-1])


@pytest.mark.parametrize("before, token, kind", [
    (b"the", b" sum", "word start"), (b"the", b"re", "inside a word"), (b"x=", b"abc", "word start"),
    (b"", b"So", "word start"), (b"the", b" 7", "number"), (b"1", b"2", "number"),
    (b"the", b"\n\n", "symbol"), (b"\\", b"frac", "word start"), (b"a", b"}", "symbol"),
    ("é".encode(), "à".encode(), "inside a word"), (b"the", b" (", "symbol"),
    (b"b", b"\xc3", "symbol"), (b"the", b"\nHence", "word start")])
def test_kinds_of_tokens(before, token, kind):
    assert kind_of(before, token) == kind


def evaluated(corpus, tmp_path, *words):
    code, _, err = run_here("eval.py", "lm", "--corpus", corpus.folder, "--positions", 12, "--template",
                            "short", "--max-new-tokens", 24, "--hits", tmp_path / "hits.jsonl",
                            "--out", tmp_path / "out.json", *words)
    assert (code, err) == (0, "")
    return json.loads((tmp_path / "out.json").read_text())


def test_hits_are_those_of_the_table_and_the_differences_follow(corpus, base, thinker, tmp_path):
    for _ in range(2):  # a repeated command replaces its lines
        results = evaluated(corpus, tmp_path, "--checkpoints", base, thinker, "--samples", 3, "--mode",
                            "ntp", "reasoning", "majority")
    positions, splits, hits = read_hits(tmp_path / "hits.jsonl")
    assert list(hits) == [(c, m) for c in (base, thinker) for m in ("ntp", "reasoning", "majority")]
    code, out, err = run_here("paper/paired.py", tmp_path / "hits.jsonl", "--corpus", corpus.folder,
                              "--against", base, "reasoning")
    assert (code, err) == (0, "")
    by_difficulty = out.split("\n\n")[1]
    rows = {tuple(cells[:2]): cells[2:] for line in by_difficulty.splitlines()[2:]
            for cells in [[cell.strip() for cell in line.strip("|").split("|")]]}
    # The accuracies are those of the table, each with its own positions.
    for i, split in enumerate(dict.fromkeys(line["split"] for line in results)):
        for line in [line for line in results if line["split"] == split]:
            cell = rows[line["checkpoint"], line["mode"]][i]
            assert float(cell.split()[0]) == pytest.approx(line["accuracy"], abs=0.06)
            gained = hits[line["checkpoint"], line["mode"]] - hits[base, "reasoning"]
            shown = float(cell.split("(")[1].split()[0].strip(")")) if "(" in cell else 0
            assert shown == pytest.approx(100 * gained[splits[split]].mean(), abs=0.06)
    assert rows[base, "reasoning"][0].count("(") == 0
    entropies, kinds = ([int(part.split(")")[0]) for part in grouping.split("(n = ")[1:]]
                        for grouping in out.split("\n\n")[2:])
    assert sum(entropies) == len(positions) and sum(kinds) == len(splits["easy"])


def test_files_that_do_not_fit_are_refused(corpus, base, tmp_path):
    path = tmp_path / "hits.jsonl"
    line = dict(checkpoint="a", mode="ntp", splits={"easy": [0]}, positions=[[1, 0, 2]], hits=[1.0])
    wrong = "line 2: not what eval.py --hits writes"
    for second, message in ((dict(line, positions=[[3, 0, 2]]), "line 2: other positions than in line 1"),
                            (dict(line, hits="x"), wrong), (dict(line, hits=[1, 1]), wrong), (7, wrong),
                            (dict(line, positions=[]), wrong), (dict(line, hits=[None]), wrong),
                            (dict(line, positions=[1, 0, 2]), wrong), (None, "no line")):
        path.write_text("".join(json.dumps(one) + "\n" for one in (line, second)) if second else "")
        with pytest.raises(ValueError, match=message):
            read_hits(path)
    path.write_text(json.dumps(line) + "\n")
    code, _, err = run_here("paper/paired.py", path, "--corpus", corpus.folder, "--against", "b", "ntp")
    assert code == 2 and "hits.jsonl has a ntp" in err
    start, _, end, _ = corpus.docs[0].tolist()  # its first token has no entropy
    write_lines(path, dict(line, positions=[[start, start, end]]))
    code, _, err = run_here("paper/paired.py", path, "--corpus", corpus.folder)
    assert code == 2 and "has no entropy for some of these positions" in err and err.count("\n") == 1
