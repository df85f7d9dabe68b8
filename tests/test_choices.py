"""paper/choices.py: the fields of every data set, letters however dressed, likelihoods by hand."""
import json
from types import SimpleNamespace

import pytest
import torch

import paper.answers
import paper.choices
from data.questions import read_lines
from data.tokenizer import Tokenizer
from paper.choices import Choice, evaluate, is_letter, lettered, option_logprobs, parse_choice
from tiny import base, run_here, tiny_model, write_lines


# ---- reading ----

@pytest.mark.parametrize("fields, options, right, subject", [
    # MMLU-Pro
    (dict(question_id=70, options=["a x", "b x", "c x"], answer="C", answer_index=2, cot_content="",
          category="business", src="ori"), None, 2, "business"),
    # SuperGPQA: the answer is the text
    (dict(uuid="f", options=["a x", "b x", "c x"], answer="b x", answer_letter="B",
          discipline="Law", field="Legal", subfield="Tax", difficulty="hard"), None, 1, "Law"),
    (dict(options=["a x", "b x"], answer="b x"), None, 1, ""),
    (dict(options=["a x", "b x"], answer="B"), None, 1, ""),
    (dict(options=["a x", "b x"], answer=0), None, 0, ""),
    (dict(options=["a x", "b x"], answer="B", topic="algebra"), None, 1, "algebra"),
    (dict(options=["L", "R", "1/C", "C"], answer="C"), None, 2, ""),  # the letter, not the capacity
    (dict(options=["L", "R", "1/C", "C"], answer="C", answer_index=3), None, 3, ""),
    (dict(options=[10, 0.50, "7"], answer="0.50"), ["10", "0.50", "7"], 1, ""),  # as written
    (dict(options=list("abcdefghijklmnop"), answer="P"), None, 15, ""),
])
def test_the_fields_of_every_data_set_name_the_same_things(tmp_path, fields, options, right,
                                                           subject):
    text = json.dumps(dict(question="Which?") | fields).replace("0.5,", "0.50,")
    [choice] = read_lines(write_lines(tmp_path / "data.jsonl", text), parse_choice)
    assert choice == Choice("Which?", options or fields["options"], right, subject)


@pytest.mark.parametrize("fields, complaint", [
    (dict(options=["a"], answer="A"), "'options' must be a list of 2 to 26"),
    (dict(options="ab", answer="A"), "'options' must be a list of 2 to 26"),
    (dict(options=["a", None], answer="A"), "option B must be a string, got null"),
    (dict(options=["a", ""], answer="A"), "option B is empty"),
    (dict(options=["a", "b"], answer="C"), "answer 'C' is no letter from A to B"),
    (dict(options=["a", "b"], answer=""), "answer '' is no letter"),
    (dict(options=["a", "b"], answer="AB"), "answer 'AB' is no letter"),
    (dict(options=["a", "b"], answer=2), "no index from 0 to 1 and no option"),
    (dict(options=["a", "b"], answer=True), "answer True is no letter"),
    (dict(options=["a", "b"]), "'answer_letter' or 'answer_index' or 'answer'"),
    (dict(question="", options=["a", "b"], answer="A"), "'question' is empty"),
])
def test_a_bad_line_says_what_is_wrong(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse_choice(dict(question="Q") | fields)


# ---- reasoning ----

def test_a_letter_counts_however_it_is_dressed_and_with_its_option():
    right = ["B", " B ", "(B)", "B.", r"\text{B}", r"  \text{B}", "(b)", "B)", "(B).", "B:", "B\n",
             "$B$", r"\mathbf{B}", r"\textbf{(B)}", r"\mathrm{B}", "B. two", "B) 42", "(B) two",
             "B: two\nof them"]
    wrong = ["b", "A", "", "BB", "B, C", "B and C", "B or C", "option B", "Because", "A. B",
             "(A) B", "B two", "C)"]
    assert [form for form in right if not is_letter(form.encode(), "B")] == []
    assert [form for form in wrong if is_letter(form.encode(), "B")] == []
    assert not is_letter(None, "B")


def test_options_are_lettered_in_their_order():
    text = lettered(Choice("Which one?", [f"number {i}" for i in range(16)], 3, ""))
    assert text.startswith("Which one?\n\nA. number 0\nB. number 1\n")
    assert "\nP. number 15\n" in text and r"\boxed{}" in text


CHOICES = [
    Choice("Is two even or odd?", ["even", "odd", " even and odd, both"], 0, "parity"),
    Choice("One?", ["a", "the number one of them all", "b", "c"], 1, "words"),
    Choice("Which digit follows the digit six in the row of them?", ["seven", "eight"], 0, "words"),
    Choice("Leo works out 2+2.", ["four", "five", "six"], 2, ""),
]


def test_choices_are_judged_by_their_letter_and_counted_by_subject(base, monkeypatch):
    box = "</think>\\boxed{{{}}}".format
    responses = [[box("A"), box("(A)"), box("even")], [box("B."), "B", box("C")],
                 [box("b"), box("a"), box("B")], [box(" C ")] * 3]

    def scripted(model, tokenizer, prompts, args, desc):
        return [[SimpleNamespace(tokens=tokenizer.encode(text)) for text in row]
                for row in responses]
    monkeypatch.setattr(paper.answers, "sample_rollouts", scripted)
    args = SimpleNamespace(mode="reasoning", device="cpu", dtype=None, seed=4, samples=3, temperature=0.8,
                           template="short", max_new_tokens=1, skip_long=False, dump=None)
    lines = {line["subject"]: line for line in evaluate(base, CHOICES, args)}
    assert {name: (line["accuracy"], line["n"]) for name, line in lines.items()} == {
        "all": (50.0, 4), "parity": (66.67, 1), "words": (16.67, 2)}
    assert (lines["all"]["pass_at_k"], lines["words"]["format_rate"]) == (75.0, 83.33)


# ---- likelihood ----

@pytest.fixture
def checkpoint(tmp_path):
    """A random model with distributions far from flat, and its tokenizer."""
    tokenizer = Tokenizer.load("embedded")
    model = tiny_model(tokenizer.vocab_size)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5 if weight.ndim == 2 else 1)
    model.save_pretrained(tmp_path / "random")
    tokenizer.save(tmp_path / "random")
    return model, tokenizer, str(tmp_path / "random")


def by_hand(model, tokenizer, choice):
    """Each option alone after its question, token by token."""
    sums = []
    for option in choice.options:
        tokens = tokenizer.encode(f"Question: {choice.question}\nAnswer:")
        total = 0.0
        for token in tokenizer.encode(" " + option):
            logits = model(torch.tensor([tokens]))[0, -1].double()
            total += logits.log_softmax(dim=-1)[token].item()
            tokens.append(token)
        sums.append(total)
    return sums


@pytest.mark.parametrize("budget", [8192, 60, 1])  # tokens of a pass: all at once, some, one by one
def test_the_likelihood_of_an_option_is_that_of_its_tokens_one_by_one(checkpoint, monkeypatch,
                                                                      budget):
    model, tokenizer, _ = checkpoint
    monkeypatch.setattr(paper.choices, "TOKENS_PER_PASS", budget)
    for choice, sums in zip(CHOICES, option_logprobs(model, tokenizer, CHOICES), strict=True):
        assert sums == pytest.approx(by_hand(model, tokenizer, choice), abs=1e-3)


def test_likelihood_takes_the_best_sum_and_its_norm_the_best_per_byte(checkpoint):
    model, tokenizer, folder = checkpoint
    args = SimpleNamespace(mode="likelihood", device="cpu", dtype=None, seed=0, skip_long=False)
    plain, norm = [], []
    for choice in CHOICES:
        sums = by_hand(model, tokenizer, choice)
        plain.append(sums.index(max(sums)))
        per_byte = [total / len(option.encode()) for total, option in zip(sums, choice.options)]
        norm.append(per_byte.index(max(per_byte)))
    assert plain != norm
    for answers in (plain, norm, [0, 0, 0, 0]):
        choices = [choice._replace(answer=answer) for choice, answer in zip(CHOICES, answers)]
        found = {(line["mode"], line["subject"]): (line["accuracy"], line["n"])
                 for line in evaluate(folder, choices, args)}
        for mode, best in (("likelihood", plain), ("likelihood_norm", norm)):
            hits = [100.0 * (a == b) for a, b in zip(answers, best)]
            assert found[mode, "all"] == (sum(hits) / 4, 4)
            assert found[mode, "parity"] == (hits[0], 1)
            assert found[mode, "words"] == (sum(hits[1:3]) / 2, 2)
        assert len(found) == 6  # no line for the empty subject


@pytest.mark.parametrize("mode", ["likelihood", "both"])
def test_a_question_whose_option_has_no_room_is_named_and_can_be_left_out(base, capsys, mode):
    choices = [CHOICES[0], Choice("One?", ["a", "b c " * 60], 0, ""), CHOICES[1]]
    args = SimpleNamespace(mode=mode, device="cpu", dtype=None, seed=4, samples=1, temperature=0.8, kv_gb=None,
                           template="short", max_new_tokens=1, skip_long=False, dump=None,
                           max_rows=8, top_k=0, top_p=1.0, min_p=0.0)
    with pytest.raises(ValueError, match=r"1 of 3 questions.* 128 tokens: 'One.' .*--skip-long"):
        evaluate(base, choices, args)
    args.skip_long = True
    assert {line["n"] for line in evaluate(base, choices, args) if line["subject"] == "all"} == {2}
    assert "left out: no room for 1 of 3 questions" in capsys.readouterr().out


# ---- command line ----

SMALL = ["--template", "short", "--max-new-tokens", 8]


def test_choices_from_file_to_file(base, tmp_path):
    path = write_lines(tmp_path / "data.jsonl", *[
        dict(question=f"{i}+1=", answer="A", options=["2", "3"], topic="sums") for i in range(9)])
    code, text, err = run_here("paper/choices.py", "--data", path, "--checkpoints", base, *SMALL,
                               "--limit", 5, "--samples", 2, "--out", tmp_path / "choices.json")
    assert (code, err) == (0, "") and f"{base}: 5 questions" in text
    results = json.loads((tmp_path / "choices.json").read_text())
    assert [(line["mode"], line["subject"]) for line in results] == [
        (mode, part) for mode in ("likelihood", "likelihood_norm", "reasoning")
        for part in ("all", "sums")]
    for line in results:
        assert 0 <= line["low"] <= line["accuracy"] <= line["high"] <= 100 and line["n"] == 5
    # The table has a row for each: all questions first, then the subjects, modes in order.
    rows = [row.split() for row in text.splitlines() if str(base) in row][1:]
    assert [row[:3] for row in rows] == [
        [part, mode, str(base)] for part in ("all", "sums")
        for mode in ("likelihood", "likelihood_norm", "reasoning")]
    shown = {(row[1], row[0]): [*map(float, (row[3], row[4].strip("[,"), row[5].strip("]")))] for row in rows}
    for line in results:
        exact = [line["accuracy"], line["low"], line["high"]]
        assert shown[line["mode"], line["subject"]] == pytest.approx(exact, abs=0.051)


@pytest.mark.parametrize("flags, complaint", [
    (["--max-new-tokens", 100], "questions, longer than 28 tokens"),
    (["--mode", "guess"], "invalid choice: 'guess'"),
    (["--data", "no.jsonl"], "no.jsonl"),
])
def test_what_a_user_can_mend_is_one_line(base, tmp_path, flags, complaint):
    path = write_lines(tmp_path / "data.jsonl",
                       dict(question="Q " * 40, options=["a", "b"], answer="A"))
    code, _, err = run_here("paper/choices.py", "--data", path, "--checkpoints", base, *SMALL,
                            *flags)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("choices.py: ") and complaint in err
