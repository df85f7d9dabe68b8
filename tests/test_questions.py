"""Questions with exact answers: the fields of every data set, bad lines, prompts."""
import json

import pytest

from data.prompt import question_prompt
from data.questions import read_questions
from data.tokenizer import Tokenizer
from tiny import write_lines


@pytest.mark.parametrize("fields, truth", [
    (dict(question="Q", answer="6 / 2 = <<6/2=3>>3\n#### 3"), "3"),
    (dict(question="Q", answer="#### 1\nno, \\boxed{2}\n#### 1,234 "), "1,234"),
    (dict(problem="Q", answer="\\boxed{1} or rather \\boxed{\\frac{1}{2}}."), r"\frac{1}{2}"),
    (dict(problem="Q", solution="so $x = \\boxed{\\{1,2\\}}$"), r"\{1,2\}"),
    (dict(problem="Q", solution="long, \\boxed{9}", answer="8"), "8"),  # Omni-MATH has both
    (dict(question="Q", answer=" 42\n"), "42"),
    (dict(question="Q", answer=42), "42"),
    (dict(question="Q", problem=None, answer=0.50), "0.5"),
])
def test_the_exact_answer_follows_the_last_mark_or_stands_in_the_last_box(tmp_path, fields, truth):
    path = write_lines(tmp_path / "data.jsonl", "", fields, "\ufeff" + json.dumps(fields))
    assert read_questions(path) == [("Q", truth)] * 2


@pytest.mark.parametrize("line, complaint", [
    ("[1]", "expected an object, got a list"),
    ("{", "broken JSON at column 2"),
    ('{"question": "\\ud800"}', "surrogates not allowed"),
    ('{"question": NaN}', "NaN is not JSON"),
    ('{"a": 1, "b": 2}', "got one with 'a', 'b'"),
    ("[" * 100_000, "recursion"),
    (dict(question="Q", answer="a ####  "), "the exact answer is empty"),
    (dict(question="Q", answer=["1"]), "the answer must be a string, got a list"),
    (dict(question=7, answer="1"), "'question' must be a string, got a number"),
    (dict(answer="1"), "with 'question' or 'problem', got one with 'answer'"),
])
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, complaint):
    path = write_lines(tmp_path / "data.jsonl", dict(question="Q", answer="1"), "", line)
    with pytest.raises(ValueError) as error:
        read_questions(path)
    message = str(error.value)
    assert message.startswith(f"{path} line 3: ") and complaint in message and "\n" not in message


def test_a_file_without_lines_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no line in it"):
        read_questions(write_lines(tmp_path / "data.jsonl", "", " "))


def test_a_question_is_asked_in_chat_turns_where_there_are_some_and_cannot_end_its_turn():
    plain = Tokenizer.load("embedded")
    turns = {"<|im_start|>": plain.vocab_size, "<|im_end|>": plain.vocab_size + 1}
    chat = Tokenizer(plain.ranks, plain.special | turns, plain.pattern)
    text = "What is <|im_end|> in <think>?"
    prompt = question_prompt(chat, text)
    assert chat.decode_bytes(prompt).decode() == (
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n<think>\n")
    assert [prompt.count(turns["<|im_start|>"]), prompt.count(turns["<|im_end|>"])] == [2, 1]
    assert prompt.count(chat.special["<think>"]) == 1
    assert plain.decode_bytes(question_prompt(plain, text)).decode() == f"{text}\n\n<think>\n"
    for known in (plain, chat):
        short = known.encode(text) + [known.special["<think>"]]
        assert question_prompt(known, text, "short") == short
