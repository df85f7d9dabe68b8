"""paper/answers.py: accuracies counted by hand, and the command from file to file."""
import json
from types import SimpleNamespace

import pytest

import paper.answers
from paper.answers import choose_questions, evaluate
from tiny import base, run_here, write_lines

SMALL = ["--template", "short", "--max-new-tokens", 8]


def test_accuracy_is_a_mean_over_thoughts_and_pass_at_k_over_questions(base, monkeypatch, tmp_path):
    box = "<think>so</think>\\boxed{{{}}}".format
    responses = [[box("3"), r"<think>so</think>\fbox{3.0}", box("4")], [box("1"), "thought", "\\boxed{7}"]]

    def scripted(model, tokenizer, prompts, args, desc):
        return [[SimpleNamespace(tokens=tokenizer.encode(text)) for text in row]
                for row in responses]
    monkeypatch.setattr(paper.answers, "sample_rollouts", scripted)
    args = SimpleNamespace(device="cpu", dtype=None, seed=4, samples=3, temperature=0.8, template="short",
                           max_new_tokens=8, skip_long=False, dump=str(tmp_path / "dump.jsonl"))
    [line] = evaluate(base, [("one?", "3"), ("two?", "7")], args)

    known = dict(checkpoint=base, mode="reasoning", subject="all", n=2, seed=4, samples=3)
    assert known.items() <= line.items()
    assert (line["accuracy"], line["pass_at_k"], line["format_rate"]) == (33.33, 50.0, 66.67)
    # The bootstrap's: one question twice. Wilson's: 2 thirds of 2 trials.
    assert (line["low"], line["high"]) == (0, 84.06)
    first, second = map(json.loads, (tmp_path / "dump.jsonl").read_text().splitlines())
    assert first == dict(checkpoint=base, mode="reasoning", question="one?", truth="3",
                         response=box("3"), extracted="3", reward=1.0)
    assert (second["truth"], second["extracted"], second["reward"]) == ("7", "1", 0.0)


def test_a_limit_takes_questions_by_the_seed_and_leaves_their_order():
    questions = list(range(50))
    assert choose_questions(questions, 0, seed=1) == questions
    assert choose_questions(questions, 99, seed=2) == questions
    some = choose_questions(questions, 7, seed=1)
    assert some == sorted(set(some)) and len(some) == 7
    assert some == choose_questions(questions, 7, seed=1) != choose_questions(questions, 7, seed=2)


def test_answers_from_file_to_file(base, tmp_path):
    path = write_lines(tmp_path / "data.jsonl",
                       *[dict(question=f"{i}+1=", answer="#### 2") for i in range(9)])
    code, text, err = run_here("paper/answers.py", "--data", path, "--checkpoints", base, *SMALL,
                               "--limit", 5, "--samples", 2, "--out", tmp_path / "answers.json",
                               "--dump", tmp_path / "dump.jsonl")
    assert (code, err) == (0, "") and f"{base}: 5 questions" in text
    [line] = json.loads((tmp_path / "answers.json").read_text())
    assert list(line) == ["checkpoint", "mode", "subject", "accuracy", "low", "high", "n", "seed",
                          "commit", "torch", "pass_at_k", "format_rate", "samples", "temperature", "len_mean"]
    assert 0 <= line["low"] <= line["accuracy"] <= line["high"] <= 100 and line["n"] == 5
    # One thought about each question.
    assert len((tmp_path / "dump.jsonl").read_text().splitlines()) == 5


def test_questions_without_room_are_counted_and_left_out(base, tmp_path):
    path = write_lines(tmp_path / "data.jsonl",
                       *[dict(question="Q " * (90 * (i == 1) + 1), answer="2") for i in range(4)])
    line = ["paper/answers.py", "--data", path, "--checkpoints", base, *SMALL,
            "--out", tmp_path / "answers.json"]
    code, _, err = run_here(*line)
    assert code == 2 and "no room for 1 of 4 questions, longer than 120 tokens: '" in err
    assert err.count("\n") == 1 and err.endswith("or leave them out with --skip-long\n")
    code, text, err = run_here(*line, "--skip-long")
    assert (code, err) == (0, "") and "left out: no room for 1 of 4 questions" in text
    [line] = json.loads((tmp_path / "answers.json").read_text())
    assert line["n"] == 3


@pytest.mark.parametrize("flags, complaint", [
    (["--limit", -1], "--limit must be at least 0"),
    (["--samples", 0], "--samples must be at least 1"),
    (["--top-p", 2], "top-p in (0, 1]"),
    (["--max-new-tokens", 100], "no room for 1 of 1 questions, longer than 28 tokens"),
    (["--data", "no.jsonl"], "no.jsonl"),
])
def test_what_a_user_can_mend_is_one_line(base, tmp_path, flags, complaint):
    path = write_lines(tmp_path / "data.jsonl", dict(question="Q " * 40, answer="2"))
    code, _, err = run_here("paper/answers.py", "--data", path, "--checkpoints", base, *SMALL,
                            *flags)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("answers.py: ") and complaint in err


def test_the_help_says_what_a_line_holds_and_what_happens_without_a_flag():
    code, out, _ = run_here("paper/answers.py", "--help")
    words = " ".join(out.split())
    assert code == 0 and r"may end in #### N or hold a \boxed{N}" in words
    assert "chosen by --seed; 0: all (default: 0)" in words
    assert "thoughts for each question (default: 1)" in words
