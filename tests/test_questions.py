"""Questions with exact answers: the fields of every data set, bad lines, prompts."""
import json
import time

import pytest

from data.prompt import question_prompt
from data.answers import answers_equal
from data.questions import boxed_answer, leave_out_long, read_questions
from data.tokenizer import Tokenizer
from tiny import write_lines


@pytest.mark.parametrize("fields, truth", [
    (dict(question="Q", answer="6 / 2 = <<6/2=3>>3\n#### 3"), "3"),
    (dict(question="Q", answer="#### 1\nno, \\boxed{2}\n#### 1,234 "), "1,234"),
    (dict(problem="Q", answer="\\boxed{0.5}, in short \\boxed{\\frac{1}{2}}."), r"\frac{1}{2}"),
    (dict(problem="Q", solution=r"The roots are \boxed{2} and $\boxed{5}$."), "2, 5"),
    (dict(problem="Q", solution=r"So $\boxed{(1,2)}, \boxed{3}$, and $y = \boxed{4}$"), "(1,2), 3, y = 4"),
    (dict(problem="Q", solution=r"either \boxed{2} or \boxed{5}"), "2 or 5"),
    (dict(problem="Q", solution=r"no comma of thousands: \boxed{1},\boxed{234}"), "1, 234"),
    (dict(problem="Q", solution=r"this gives $\boxed 9$."), "9"),
    (dict(problem="Q", solution=r"this gives $\boxed \frac{\sqrt{3}}2$."), r"\frac{\sqrt{3}}2"),
    (dict(problem="Q", solution=r"this gives $\fbox{9}$."), "9"),
    (dict(problem="Q", solution=r"this gives $\framebox[2cm][c]{9}$."), "9"),
    (dict(problem="Q", solution=r"this gives $\boxed {10}$."), "10"),
    (dict(problem="Q", answer="all real numbers"), "all real numbers"),
    (dict(problem="Q", answer="12 miles per hour"), "12 miles per hour"),
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
    (dict(question="Q", solution="Six and six make twelve, so the sum is 12."), "expected #### or \\boxed{}"),
    (dict(question="Q", answer="The sum is 12."), "nothing but the answer, got 'The sum is 12.'"),
    (dict(question="Q", answer=r"see the \boxed answer"), "nothing but the answer"),
    (dict(question="Q", answer="He pays 7 dollars."), "nothing but the answer"),
    (dict(question="Q", answer="Thus, 7"), "nothing but the answer"),
    (dict(question="Q", answer="Answer: 7"), "nothing but the answer"),
    (dict(question="Q", answer=r"(a) \boxed{3}, then (b) \boxed{4}"), "is the exact answer 3 or 4?"),
    (dict(question="Q", answer="}"), "no box can hold the exact answer '}'"),
    (dict(question="Q", answer="#### $"), "no box can hold the exact answer '$'"),
    (dict(question=7, answer="1"), "'question' must be a string, got a number"),
    (dict(answer="1"), "with 'question' or 'problem', got one with 'answer'"),
])
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, complaint):
    path = write_lines(tmp_path / "data.jsonl", dict(question="Q", answer="1"), "", line)
    with pytest.raises(ValueError) as error:
        read_questions(path)
    message = str(error.value)
    assert message.startswith(f"{path} line 3: ") and complaint in message and "\n" not in message


def test_bad_lines_can_be_left_out_and_are_counted(tmp_path, capsys):
    good = dict(question="Q", answer="1")
    path = write_lines(tmp_path / "data.jsonl", good, "{", dict(question="Q", answer="It is 1."), good)
    assert read_questions(path, skip_bad=True) == [("Q", "1")] * 2
    said = capsys.readouterr().out
    assert said.startswith(f"left out: 2 bad lines, the first: {path} line 2: ") and said.count("\n") == 1
    path = write_lines(tmp_path / "bad.jsonl", "{", "[1]")
    with pytest.raises(ValueError, match="2 bad lines, the first: .* line 1: broken JSON"):
        read_questions(path, skip_bad=True)
    with pytest.raises(ValueError, match="line 1: broken JSON.*; --skip-bad leaves such lines out"):
        read_questions(path)


def test_questions_without_room_are_named_at_once_and_can_be_left_out(capsys):
    texts, sizes = [f"text {i}" for i in range(6)], [9, 12, 10, 11, 1500, 13]
    named = r"no room for 4 of 6 questions, longer than 10 tokens: 'text 1' \(12 tokens\), " \
            r"'text 3' \(11 tokens\), 'text 4' \(1,500 tokens\), ..."
    with pytest.raises(ValueError, match=named + "; mend it, or leave them out with --skip-long$"):
        leave_out_long(texts, sizes, 10, False, "mend it")
    assert leave_out_long(texts, sizes, 10, True, "mend it") == [0, 2]
    said = capsys.readouterr().out
    assert said.startswith("left out: no room for 4 of 6 questions") and said.count("\n") == 1
    for skip in (False, True):
        assert leave_out_long(texts, sizes, 1500, skip, "mend it") == list(range(6))
        with pytest.raises(ValueError, match="6 of 6 .* than 0 tokens.*, ...; mend it$"):
            leave_out_long(texts, sizes, -3, skip, "mend it")
    assert capsys.readouterr().out == ""


# (what follows the thought, what is in its boxes)
BOXES = [
    (r"It is $\boxed{\frac{5}{6}}$.", r"\frac{5}{6}"),
    (r"First \boxed{4}, corrected: \boxed{9}.", "9"),
    (r"\boxed {9}", "9"), (r"$\boxed 9$", "9"), (r"\boxed9.", "9"), (r"\boxed 1,250.50.", "1,250.50"),
    (r"\boxed -3", "-3"), (r"\boxed\frac12$", r"\frac12"), (r"\boxed \pi", r"\pi"), (r"\boxed B", "B"),
    (r"\fbox{9}", "9"), (r"\framebox{9}", "9"), (r"\framebox[3em]{9}", "9"), ("\\boxed\n{\n9\n}", "\n9\n"),
    (r"\boxed{\boxed{9}}", "9"), (r"\fbox{so \boxed{9}}", "9"), (r"\boxed{\boxed{2} and \boxed{5}}", "2, 5"),
    (r"\boxed{2} and \boxed{5}", "2, 5"), (r"$\boxed{2}$, $\boxed{5}$ and $\boxed{7}$", "2, 5, 7"),
    (r"\boxed{2}\text{ and }\boxed 5", "2, 5"), (r"\boxed{2};\quad\boxed{5}", "2, 5"),
    (r"$x=\boxed{2}$ and $y=\boxed{5}$", "2, y=5"),
    (r"\boxed{2} or \boxed{5}", "2 or 5"),  # to hedge earns nothing
    (r"\boxed{2}. \boxed{5}", "5"), (r"\boxed{2}, but no, \boxed{5}", "5"),
    (r"\\boxed{9}", "9"), (r"\boxed{\{2,5\}}", r"\{2,5\}"), (r"\boxed{}", ""),
    (r"in a \boxed answer", None), (r"\mathrm{boxed}{9}", None), (r"\boxed{9}</think>", None),
    (r"\boxed{9} and \boxed{5", None), (r"\boxedx{9}", None), ("9", None),
]


@pytest.mark.parametrize("answer, content", BOXES, ids=[pair[0] for pair in BOXES])
def test_the_answer_is_in_the_last_box_or_in_all_that_belong_together(answer, content):
    response = r"Maybe \boxed{7}, </think>".encode() + answer.encode()
    assert boxed_answer(response) == (content if content is None else content.encode())
    assert boxed_answer(answer.replace("</think>", "").encode()) is None  # still thinking


def test_a_hedge_earns_nothing_and_a_list_what_it_lists():
    roots = rb"</think>\boxed{5} and \boxed{2}"
    assert answers_equal(boxed_answer(roots), "2, 5") and not answers_equal(boxed_answer(roots), "2")
    assert not answers_equal(boxed_answer(roots.replace(b"and", b"or")), "2")


@pytest.mark.parametrize("piece", [rb"\boxed{", rb"\boxed{1}, ", rb"\boxed 1 and ", rb"\boxed{1", rb"\boxed\frac{",
                                   rb"\boxed\frac{{}", b" ", rb"\boxed ", rb"\boxed[", rb"\boxed{1}" + b"}" * 99])
def test_a_response_that_repeats_itself_is_read_in_linear_time(piece):
    start = time.process_time()
    boxed_answer(b"</think>\\boxed{2}" + (piece * 50_000)[:100_000] + rb"\boxed{3")
    boxed_answer(b"</think>\\boxed{2}" + (piece * 50_000)[:100_000])
    assert time.process_time() - start < 1


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
