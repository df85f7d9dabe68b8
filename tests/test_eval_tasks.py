"""Multiple choice, exact answers, patterns: the fields of every data set, likelihoods and counts by hand."""
import json
import zlib
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
import eval_tasks
from data.tokenizer import Tokenizer
from eval import choose_questions, evaluate_answers, evaluate_choices
from eval_tasks import (KEYWORDS, Choice, describe, is_letter, keyword_regex, lettered, option_logprobs,
                        patterns, question_prompt, read_choices, read_questions, read_responses)
from tiny import base, run_here, tiny_model


@pytest.fixture
def lines(tmp_path):
    """lines(record or text, ...) -> path of a JSONL file of them."""
    def write(*records):
        path = tmp_path / "data.jsonl"
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
        return path
    return write


# ---- reading -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fields, options, right, subject", [
    # MMLU-Pro
    (dict(question_id=70, options=["a x", "b x", "c x"], answer="C", answer_index=2, cot_content="",
          category="business", src="ori"), None, 2, "business"),
    # SuperGPQA: the answer is the text
    (dict(uuid="f", options=["a x", "b x", "c x"], answer="b x", answer_letter="B", discipline="Law",
          field="Legal", subfield="Tax", difficulty="hard"), None, 1, "Law"),
    (dict(options=["a x", "b x"], answer="b x"), None, 1, ""),
    (dict(options=["a x", "b x"], answer="B"), None, 1, ""),
    (dict(options=["a x", "b x"], answer=0), None, 0, ""),
    (dict(options=["a x", "b x"], answer="B", topic="algebra"), None, 1, "algebra"),
    (dict(options=["L", "R", "1/C", "C"], answer="C"), None, 2, ""),             # the letter, not the capacity
    (dict(options=["L", "R", "1/C", "C"], answer="C", answer_index=3), None, 3, ""),
    (dict(options=[10, 0.50, "7"], answer="0.50"), ["10", "0.50", "7"], 1, ""),  # numbers as they are written
    (dict(options=list("abcdefghijklmnop"), answer="P"), None, 15, ""),
])
def test_the_fields_of_every_data_set_name_the_same_things(lines, fields, options, right, subject):
    text = json.dumps(dict(question="Which?") | fields).replace("0.5,", "0.50,")
    [choice] = read_choices(lines(text))
    assert choice == Choice("Which?", options or fields["options"], right, subject)


@pytest.mark.parametrize("fields, truth", [
    (dict(question="Q", answer="6 / 2 = <<6/2=3>>3\n#### 3"), "3"),
    (dict(question="Q", answer="#### 1\nno, \\boxed{2}\n#### 1,234 "), "1,234"),
    (dict(problem="Q", answer="\\boxed{1} or rather \\boxed{\\frac{1}{2}}."), r"\frac{1}{2}"),
    (dict(problem="Q", solution="so $x = \\boxed{\\{1,2\\}}$"), r"\{1,2\}"),
    (dict(problem="Q", solution="long, \\boxed{9}", answer="8"), "8"),              # Omni-MATH has both
    (dict(question="Q", answer=" 42\n"), "42"),
    (dict(question="Q", answer=42), "42"),
    (dict(question="Q", problem=None, answer=0.50), "0.5"),
])
def test_the_exact_answer_follows_the_last_mark_or_stands_in_the_last_box(lines, fields, truth):
    assert read_questions(lines("", fields, "\ufeff" + json.dumps(fields))) == [("Q", truth)] * 2


GOOD = {read_choices: dict(question="Q", options=["a", "b"], answer="A"),
        read_questions: dict(question="Q", answer="1"),
        lambda path: read_responses([path]): dict(checkpoint="c", response="r")}
READ_CHOICES, READ_QUESTIONS, READ_RESPONSES = GOOD


@pytest.mark.parametrize("read, line, complaint", [
    *((read, line, complaint) for read in GOOD for line, complaint in [
        ("[1]", "expected an object, got a list"), ("{", "broken JSON at column 2"),
        ('{"question": "\\ud800"}', "surrogates not allowed"), ('{"question": NaN}', "NaN is not JSON"),
        ('{"a": 1, "b": 2}', "got one with 'a', 'b'"), ("[" * 100_000, "recursion")]),
    (READ_CHOICES, dict(question="Q", options=["a"], answer="A"), "'options' must be a list of 2 to 26"),
    (READ_CHOICES, dict(question="Q", options="ab", answer="A"), "'options' must be a list of 2 to 26"),
    (READ_CHOICES, dict(question="Q", options=["a", None], answer="A"), "option B must be a string, got nu"),
    (READ_CHOICES, dict(question="Q", options=["a", ""], answer="A"), "option B is empty"),
    (READ_CHOICES, dict(question="Q", options=["a", "b"], answer="C"), "answer 'C' is no letter from A to B"),
    (READ_CHOICES, dict(question="Q", options=["a", "b"], answer=""), "answer '' is no letter"),
    (READ_CHOICES, dict(question="Q", options=["a", "b"], answer="AB"), "answer 'AB' is no letter"),
    (READ_CHOICES, dict(question="Q", options=["a", "b"], answer=2), "no index from 0 to 1 and no option"),
    (READ_CHOICES, dict(question="Q", options=["a", "b"], answer=True), "answer True is no letter"),
    (READ_CHOICES, dict(question="Q", options=["a", "b"]), "'answer_letter' or 'answer_index' or 'answer'"),
    (READ_CHOICES, dict(question="", options=["a", "b"], answer="A"), "'question' is empty"),
    (READ_QUESTIONS, dict(question="Q", answer="a ####  "), "the exact answer is empty"),
    (READ_QUESTIONS, dict(question="Q", answer=["1"]), "the answer must be a string, got a list"),
    (READ_QUESTIONS, dict(question=7, answer="1"), "'question' must be a string, got a number"),
    (READ_QUESTIONS, dict(answer="1"), "with 'question' or 'problem', got one with 'answer'"),
    (READ_RESPONSES, dict(checkpoint="c", response=None), "expected an object with 'response'"),
    (READ_RESPONSES, dict(checkpoint=["c"], response="r"), "'checkpoint' and 'response' must be strings"),
])
def test_a_bad_line_is_named_by_file_and_number(lines, read, line, complaint):
    path = lines(GOOD[read], "", line)
    with pytest.raises(ValueError) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f"{path} line 3: ") and complaint in message and "\n" not in message


def test_a_file_without_lines_is_refused(lines):
    with pytest.raises(ValueError, match="no line in it"):
        read_questions(lines("", " "))


# ---- asking and judging ------------------------------------------------------------------------------------
def test_a_letter_counts_however_it_is_dressed_and_with_its_option():
    right = ["B", " B ", "(B)", "B.", r"\text{B}", r"  \text{B}", "(b)", "B)", "(B).", "B:", "B\n", "$B$", r"\mathbf{B}",
             r"\textbf{(B)}", r"\mathrm{B}", "B. two", "B) 42", "(B) two", "B: two\nof them"]
    wrong = ["b", "A", "", "BB", "B, C", "B and C", "B or C", "option B", "Because", "A. B", "(A) B", "B two", "C)"]
    assert [form for form in right if not is_letter(form.encode(), "B")] == []
    assert [form for form in wrong if is_letter(form.encode(), "B")] == []
    assert not is_letter(None, "B")


def test_options_are_lettered_in_their_order():
    text = lettered(Choice("Which one?", [f"number {i}" for i in range(16)], 3, ""))
    assert text.startswith("Which one?\n\nA. number 0\nB. number 1\n") and "\nP. number 15\n" in text
    assert r"\boxed{}" in text


def test_a_question_is_asked_in_chat_turns_where_there_are_some_and_cannot_end_its_turn():
    plain = Tokenizer.load("embedded")
    turns = {"<|im_start|>": 390, "<|im_end|>": 391}
    chat = Tokenizer(plain.ranks, plain.special | turns, plain.pattern)
    text = "What is <|im_end|> in <think>?"
    prompt = question_prompt(chat, text)
    assert chat.decode_bytes(prompt).decode() == (
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n<think>\n")
    assert [prompt.count(turns["<|im_start|>"]), prompt.count(turns["<|im_end|>"])] == [2, 1]
    assert prompt.count(chat.special["<think>"]) == 1
    assert plain.decode_bytes(question_prompt(plain, text)).decode() == f"{text}\n\n<think>\n"
    for known in (plain, chat):
        assert question_prompt(known, text, "short") == known.encode(text) + [known.special["<think>"]]


CHOICES = [Choice("Is two even or odd?", ["even", "odd", " even and odd, both"], 0, "parity"),
           Choice("One?", ["a", "the number one of them all", "b", "c"], 1, "words"),
           Choice("Which digit follows the digit six in the row of digits?", ["seven", "eight"], 0, "words"),
           Choice("Leo works out 2+2.", ["four", "five", "six"], 2, "")]


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


@pytest.mark.parametrize("budget", [8192, 60, 1])  # tokens of a forward: all at once, in parts, one by one
def test_the_likelihood_of_an_option_is_that_of_its_tokens_one_by_one(checkpoint, monkeypatch, budget):
    model, tokenizer, _ = checkpoint
    monkeypatch.setattr(eval_tasks, "TOKENS_PER_PASS", budget)
    for choice, sums in zip(CHOICES, option_logprobs(model, tokenizer, CHOICES), strict=True):
        assert sums == pytest.approx(by_hand(model, tokenizer, choice), abs=1e-3)


def test_likelihood_takes_the_best_sum_and_its_norm_the_best_per_byte(checkpoint):
    model, tokenizer, folder = checkpoint
    args = SimpleNamespace(mode="likelihood", device="cpu", seed=0)
    sums = [by_hand(model, tokenizer, choice) for choice in CHOICES]
    plain = [max(range(len(s)), key=lambda i: s[i]) for s in sums]
    norm = [max(range(len(s)), key=lambda i: s[i] / len(c.options[i].encode()))
            for c, s in zip(CHOICES, sums)]
    assert plain != norm
    for answers in (plain, norm, [0, 0, 0, 0]):
        choices = [choice._replace(answer=answer) for choice, answer in zip(CHOICES, answers)]
        found = {(r["mode"], r["subject"]): (r["accuracy"], r["n"])
                 for r in evaluate_choices(folder, choices, args)}
        for mode, best in (("likelihood", plain), ("likelihood_norm", norm)):
            hits = [100.0 * (a == b) for a, b in zip(answers, best)]
            assert found[mode, "all"] == (sum(hits) / 4, 4)
            assert found[mode, "parity"] == (hits[0], 1)
            assert found[mode, "words"] == (sum(hits[1:3]) / 2, 2)
        assert len(found) == 6  # no line for the empty subject


def test_an_option_longer_than_the_models_positions_is_named(checkpoint):
    model, tokenizer, _ = checkpoint
    with pytest.raises(ValueError, match="question 'One.'... and an option take .* has 128 positions"):
        option_logprobs(model, tokenizer, [CHOICES[0], Choice("One?", ["a", "b c " * 60], 0, "")])


@pytest.fixture
def scripted(monkeypatch):
    """scripted([[response, ...] for each question]): what sampling gives instead."""
    def script(responses):
        def sample_responses(model, tokenizer, prompts, args, desc):
            assert len(prompts) == len(responses)
            return [[SimpleNamespace(tokens=tokenizer.encode(text)) for text in row] for row in responses]
        monkeypatch.setattr(evaluation, "sample_responses", sample_responses)
    return script


ARGS = SimpleNamespace(mode="reasoning", device="cpu", seed=4, samples=3, temperature=0.8, template="short",
                       max_new_tokens=8, dump=None)


def test_accuracy_of_answers_is_a_mean_over_samples_and_pass_at_k_over_questions(base, scripted, tmp_path):
    box = "<think>so</think>\\boxed{{{}}}".format
    scripted([[box("3"), box("3.0"), box("4")], [box("1"), "thought", "\\boxed{7}"]])
    args = SimpleNamespace(**vars(ARGS) | dict(dump=str(tmp_path / "dump.jsonl")))
    [line] = evaluate_answers(base, [("one?", "3"), ("two?", "7")], args)
    assert {k: line[k] for k in ("mode", "subject", "n", "seed", "samples")} == dict(
        mode="reasoning", subject="all", n=2, seed=4, samples=3)
    assert (line["accuracy"], line["pass_at_k"], line["format_rate"]) == (33.33, 50.0, 66.67)
    assert (line["low"], line["high"]) == (0, 66.67)  # of two questions: both the one, both the other
    first, second = [json.loads(text) for text in (tmp_path / "dump.jsonl").read_text().splitlines()]
    assert first == dict(checkpoint=base, mode="reasoning", question="one?", truth="3",
                         response=box("3"), extracted="3", reward=1.0)
    assert (second["truth"], second["extracted"], second["reward"]) == ("7", "1", 0.0)


def test_choices_are_judged_by_their_letter_and_counted_by_subject(base, scripted):
    box = "</think>\\boxed{{{}}}".format
    scripted([[box("A"), box("(A)"), box("even")], [box("B."), "B", box("C")],
              [box("b"), box("a"), box("B")], [box(" C ")] * 3])
    args = SimpleNamespace(**vars(ARGS) | dict(max_new_tokens=1))
    lines = {r["subject"]: r for r in evaluate_choices(base, CHOICES, args)}
    assert {name: (r["accuracy"], r["n"]) for name, r in lines.items()} == {
        "all": (50.0, 4), "parity": (66.67, 1), "words": (16.67, 2)}
    assert (lines["all"]["pass_at_k"], lines["words"]["format_rate"]) == (75.0, 83.33)


def test_a_limit_takes_questions_by_the_seed_and_leaves_their_order():
    questions = list(range(50))
    assert choose_questions(questions, 0, seed=1) == choose_questions(questions, 99, seed=2) == questions
    some = choose_questions(questions, 7, seed=1)
    assert some == sorted(set(some)) and len(some) == 7
    assert some == choose_questions(questions, 7, seed=1) != choose_questions(questions, 7, seed=2)


# ---- patterns ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("group, text, found", [
    ("reflection", "Wait, no", True), ("reflection", "the waiter", False), ("reflection", "await", False),
    ("reflection", "looking\nback at it", True), ("reflection", "looking backwards", False),
    ("divergent", "a, b, etc.", True), ("divergent", "sketch etc and", False), ("divergent", "fetc.", False),
    ("divergent", "neither", False), ("divergent", "Either way", True), ("divergent", "the option", False),
    ("hypothesis", "something like 3", True), ("hypothesis", "something alike", False),
    ("breakdown", "let me break this down", True), ("breakdown", "a breakdown", False),
    ("transition", "think differently", True), ("transition", "alternative", False),
    ("deduction", "(finally)", True), ("deduction", "in conclusions", False), ("deduction", "logically_", 0)])
def test_a_keyword_counts_as_a_whole_word_in_any_case(group, text, found):
    assert bool(keyword_regex(KEYWORDS[group]).search(text.lower())) == found
    assert describe([text, "nothing here"])[group] == (50 if found else 0)


def test_patterns_are_counted_as_by_hand():
    line, = patterns({"c": ["Wait. wait a b", "a b a b</think> so finally", ""]})
    assert line["n"] == 3 and line["words_mean"] == (4 + 6 + 0) / 3
    assert (line["reflection"], line["deduction"], line["transition"]) == (100 / 3, 100 / 3, 0)
    # words: Wait. wait a b | a b a b</think> so finally
    assert line["distinct_1"] == 7 / 10   # Wait. wait a b b</think> so finally
    assert line["distinct_2"] == 7 / 8    # (a, b) twice
    assert line["distinct_3"] == 1
    thoughts = b"Wait. wait a ba b a b"  # up to </think>, where there is one
    assert line["compression"] == len(zlib.compress(thoughts, 9)) / len(thoughts)
    assert describe(["</think>\\boxed{x}"])["compression"] is None  # no thought, nothing to compress


def test_a_template_repeated_compresses_better_than_different_thoughts():
    same = ["the next token may be this or that, most likely this"] * 20
    other = [" ".join(str((7919 * i + 104729 * j) % 9973) for j in range(12)) for i in range(20)]
    assert describe(same)["compression"] < 0.2 < describe(other)["compression"]
    assert describe(same)["distinct_2"] < 0.1 < describe(other)["distinct_2"]
    raw = "".join(other).encode()
    best, fastest = (len(zlib.compress(raw, level)) / len(raw) for level in (9, 1))
    assert describe(other)["compression"] == best < fastest


def test_checkpoints_are_compared_with_the_first_and_empty_thoughts_left_out(lines, tmp_path):
    dump = lambda checkpoint, response, **more: dict(checkpoint=checkpoint, response=response) | more
    first = lines(dump("base", "probably 1", mode="reasoning"), dump("base", "2"), dump("base", "wait"),
                  dump("base", "probably 4"), dump("rpt", "probably 5", mode="empty"))
    second = tmp_path / "second.jsonl"
    second.write_text("\n".join(map(json.dumps, [dump("rpt", "probably and finally"), dump("base", "0")])))
    found = read_responses([first, second])
    assert found == {"base": ["probably 1", "2", "wait", "probably 4", "0"], "rpt": ["probably and finally"]}
    base_line, rpt = patterns(found)
    assert (base_line["hypothesis"], rpt["hypothesis"]) == (40, 100)
    assert rpt["change"]["hypothesis"] == pytest.approx(150) and rpt["change"]["reflection"] == -100
    assert base_line["change"]["hypothesis"] == 0
    assert rpt["change"]["deduction"] is None  # from 0 % on there is no relative change


def test_a_dump_of_empty_thoughts_alone_is_refused(lines):
    with pytest.raises(ValueError, match="data.jsonl: only empty thoughts"):
        read_responses([lines(dict(checkpoint="c", response="</think>1", mode="empty"))])


# ---- command lines -----------------------------------------------------------------------------------------
SMALL = ["--template", "short", "--max-new-tokens", 8]


def test_choices_answers_and_patterns_from_files_to_files(base, lines, tmp_path):
    path = lines(*(dict(question=f"{i}+1=", answer="#### 2", answer_letter="A", options=["2", "3"], topic="sums")
                   for i in range(9)))
    every = {"likelihood", "likelihood_norm", "reasoning"}
    for task, modes in (("choices", every), ("answers", {"reasoning"})):
        out = tmp_path / f"{task}.json"
        code, text, err = run_here("eval.py", task, "--data", path, "--checkpoints", base, *SMALL, "--limit", 5,
                                   "--samples", 2, "--out", out, "--dump", tmp_path / "dump.jsonl")
        assert (code, err) == (0, "") and f"{base}: 5 questions" in text and f"written to {out}" in text
        results = json.loads(out.read_text())
        assert {r["mode"] for r in results} == modes
        assert all({"checkpoint", "mode", "subject", "accuracy", "low", "high", "n", "seed"} <= r.keys()
                   and 0 <= r["low"] <= r["accuracy"] <= r["high"] <= 100 and r["n"] == 5 for r in results)
        assert ("sums" in {r["subject"] for r in results}) == (task == "choices")
    code, text, err = run_here("eval.py", "patterns", "--dump", tmp_path / "dump.jsonl",
                               "--out", tmp_path / "patterns.json")
    assert (code, err) == (0, "") and "hypothesis" in text and "compression" in text
    [line] = json.loads((tmp_path / "patterns.json").read_text())
    assert (line["checkpoint"], line["n"]) == (base, 10)  # one rollout of each question


@pytest.mark.parametrize("task, flags, complaint", [
    ("answers", ["--limit", -1], "--limit must be at least 0"),
    ("answers", ["--samples", 0], "--samples must be at least 1"),
    ("choices", ["--max-new-tokens", 100], "tokens; --max-new-tokens leaves 28 of the model's 128 positions"),
    ("choices", ["--data", "no.jsonl"], "no.jsonl"),
])
def test_what_a_user_can_mend_is_one_line(base, lines, task, flags, complaint):
    path = lines(dict(question="Q " * 40, options=["a", "b"], answer="A"))
    code, _, err = run_here("eval.py", task, "--data", path, "--checkpoints", base, *SMALL, *flags)
    assert code == 2 and err.count("\n") == 1 and err.startswith("eval.py: ") and complaint in err


@pytest.mark.parametrize("task, words", [
    ("lm", ["held-out positions for each split (default: 200)", "all: empty thoughts too (default: both)"]),
    ("choices", ["thoughts for each question (default: 1)", "chosen by --seed; 0: all (default: 0)"]),
    ("answers", [r"may end in #### N or hold a \boxed{N}"]),
    ("patterns", ["what the other tasks' --dump wrote"])])
def test_every_task_has_its_own_help_and_the_first_page_has_them_all(task, words):
    for arguments in ([task, "--help"], ["--help"]):
        code, out, _ = run_here("eval.py", *arguments)
        assert code == 0 and all(part in " ".join(out.split()) for part in words)
