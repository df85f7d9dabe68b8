"""The verifier compares bytes: worked cases for the box, and the reward against brute force."""
import random
import re
import time

import pytest

from objectives.first_token import first_token_match
from reward import box_at_once, extract_prediction, prefix_match

THE_ANSWER = [b" the", b" answer", b" is"]
SNOWMAN = [b"\xe2\x98", b"\x83", b"!"]  # the character U+2603 split over two tokens

# (what it guards, what follows </think>, the prediction, the true tokens, the reward)
CASES = [
    ("one token", rb"\boxed{ the}", b" the", THE_ANSWER, 1),
    ("two tokens are worth as much as one", rb"\boxed{ the answer}", b" the answer", THE_ANSWER, 1),
    ("all the tokens there are", rb"\boxed{ the answer is}", b" the answer is", THE_ANSWER, 1),
    ("longer than the truth", rb"\boxed{ the answer is 4}", b" the answer is 4", THE_ANSWER, 0),
    ("ends inside the first token", rb"\boxed{ th}", b" th", THE_ANSWER, 0),
    ("ends inside the second token", rb"\boxed{ the ans}", b" the ans", THE_ANSWER, 0),
    ("right length, wrong bytes", rb"\boxed{ The}", b" The", THE_ANSWER, 0),
    ("second token without the first", rb"\boxed{ answer}", b" answer", THE_ANSWER, 0),
    ("missing leading space", rb"\boxed{the}", b"the", THE_ANSWER, 0),
    ("extra leading space", rb"\boxed{  the}", b"  the", THE_ANSWER, 0),
    ("extra trailing space", rb"\boxed{ the }", b" the ", THE_ANSWER, 0),
    ("trailing space that is real", rb"\boxed{ the }", b" the ", [b" the ", b"end"], 1),
    ("a lone space is an answer", rb"\boxed{ }", b" ", [b" ", b"5"], 1),
    ("a lone newline is an answer", b"\\boxed{\n}", b"\n", [b"\n"], 1),
    ("a typed \\n is not a newline", rb"\boxed{\n}", rb"\n", [b"\n"], 0),
    ("a typed \\n where the text has one", rb"\boxed{\n}", rb"\n", [b"\\", b"n"], 1),
    ("CRLF is two bytes", b"\\boxed{\r\n}", b"\r\n", [b"\r\n"], 1),
    ("LF is not CRLF", b"\\boxed{\n}", b"\n", [b"\r\n"], 0),
    ("LF, then a blank line", b"\\boxed{.\n\n}", b".\n\n", [b".", b"\n\n", b"So"], 1),
    ("NUL and 0xff pass through", b"\\boxed{\x00\xff}", b"\x00\xff", [b"\x00", b"\xff"], 1),
    ("a character over two tokens", b"\\boxed{\xe2\x98\x83}", b"\xe2\x98\x83", SNOWMAN, 1),
    ("half a character is a whole token", b"\\boxed{\xe2\x98}", b"\xe2\x98", SNOWMAN, 1),
    ("one byte of that half is none", b"\\boxed{\xe2}", b"\xe2", SNOWMAN, 0),
    ("no Unicode folding: e + accent", b"\\boxed{e\xcc\x81}", b"e\xcc\x81", ["\u00e9".encode()], 0),
    ("tokens of zero bytes change nothing",
     rb"\boxed{ the}", b" the", [b"", b" the", b"", b" answer"], 1),
    ("balanced braces belong to the content",
     rb"\boxed{\frac{a}{b}}", rb"\frac{a}{b}", [rb"\frac{a}{b}"], 1),
    ("target {", rb"\boxed{{}", b"{", [b"{", b"x"], 1),
    ("target { in a sentence with braces", rb"\boxed{{} is likely.", b"{", [b"{"], 1),
    ("target \\frac{", rb"\boxed{\frac{}", rb"\frac{", [b"\\frac", b"{"], 1),
    ("target \\{", rb"\boxed{\{}", rb"\{", [b"\\{"], 1),
    ("target \\}", rb"\boxed{\}}", rb"\}", [b"\\", b"}"], 1),
    ("target \\\\", rb"\boxed{\\}", rb"\\", [b"\\\\"], 1),
    ("target backslash", rb"\boxed{ \}", b" \\", [b" \\", b"frac"], 1),
    ("target } balances at once", rb"\boxed{}}", b"", [b"}"], 0),
    ("target x} stops early", rb"\boxed{x}}", b"x", [b"x}"], 0),
    ("} inside a balanced pair", rb"\boxed{{x}}", b"{x}", [b"{", b"x", b"}"], 1),
    ("empty box", rb"\boxed{}", b"", THE_ANSWER, 0),
    ("empty box, empty token", rb"\boxed{}", b"", [b"", b"x"], 0),
    ("nothing follows", rb"\boxed{ the}", b" the", [], 0),
    ("no box", b"the answer", None, THE_ANSWER, 0),
    ("unclosed box", rb"\boxed{ the", None, THE_ANSWER, 0),
    ("unclosed box, a brace ahead of it", rb"{x} \boxed{ the", None, THE_ANSWER, 0),
    ("unclosed box after a good one", rb"\boxed{ the} \boxed{ a", None, THE_ANSWER, 0),
    ("two boxes: the last counts", rb"\boxed{ a} no, \boxed{ the}", b" the", THE_ANSWER, 1),
    ("a good box before a bad one", rb"\boxed{ the} no, \boxed{ a}", b" a", THE_ANSWER, 0),
    ("a { box before the last", rb"\boxed{{} no, \boxed{ the}", b" the", THE_ANSWER, 1),
    ("a good box before a { box", rb"\boxed{ the} no, \boxed{{}", b"{", [b"{"], 1),
    ("an unclosed box holds no other", rb"\boxed{ a, no, \boxed{ the}", b" the", THE_ANSWER, 1),
    ("a box in a box: the inner one", rb"\boxed{\boxed{4}}", b"4", [b"4", b"}"], 1),
    ("two boxes in a box: the last", rb"\boxed{\boxed{1}, \boxed{2}}", b"2", [b"1"], 0),
    ("a box as in an escaped string", rb"\\boxed{ the}", b" the", THE_ANSWER, 1),
    ("a box behind a LaTeX line break", rb"x \\\boxed{ the}", b" the", THE_ANSWER, 1),
    ("an open brace in the prose before", rb"So { is likely: \boxed{ the}", b" the", THE_ANSWER, 1),
    ("text and an end token behind the box", rb"\boxed{ the}.<|im_end|>", b" the", THE_ANSWER, 1),
    ("special-token text in the corpus",
     rb"\boxed{<|im_end|>}", b"<|im_end|>", [b"<|im", b"_end|>"], 1),
    ("an opening tag in the box", rb"\boxed{<think>}", b"<think>", [b"<think", b">"], 1),
    ("a closing tag in the box ends a thought", rb"\boxed{</think>}", None, [b"</think>"], 0),
    ("not a box", rb"\fbox{ the} boxed{ the}", None, THE_ANSWER, 0),
]


NAMES = [case[0] for case in CASES]


@pytest.mark.parametrize("name, answer, prediction, truth, reward", CASES, ids=NAMES)
def test_the_box_is_read_byte_for_byte_and_pays_for_whole_tokens(
        name, answer, prediction, truth, reward):
    response = b"<think>\nMaybe { or \\boxed{ a}.\n</think>\n\n" + answer
    assert extract_prediction(response) == prediction
    assert prefix_match(prediction, truth) == reward


@pytest.mark.parametrize("response, prediction", [
    (rb"\boxed{ the}", None),  # never thought
    (rb"<think>so \boxed{ the}", None),  # still thinking: truncated
    (rb"<think>so \boxed{ the}</think>", None),  # the guess inside the thought is no answer
    (rb"so</think>\boxed{ the}", b" the"),  # the prompt may have opened the thought
    (rb"</think>\boxed{ a}</think>\boxed{ the}", b" the"),
    (rb"</think>\boxed{ the}</think>", None),
    (rb"<think></think >\boxed{ the}", None),
    (b"", None),
])
def test_only_a_box_after_the_last_thought_counts(response, prediction):
    assert extract_prediction(response) == prediction


def test_every_text_with_balanced_braces_survives_the_box():
    rng = random.Random(0)
    for _ in range(3000):
        pieces = [b" ", b"a", b"\n", b"{", b"}", b"{}", rb"\{", rb"\}", rb"\\", b"\xff"]
        text = b"".join(rng.choices(pieces, k=6))
        bare = text.replace(rb"\\", b"").replace(rb"\{", b"").replace(rb"\}", b"")
        depths = [bare[:i].count(b"{") - bare[:i].count(b"}") for i in range(len(bare) + 1)]
        if min(depths) == 0 == depths[-1]:
            assert extract_prediction(b"</think>\\boxed{ x} \\boxed{" + text + b"}") == text


def balanced(content):
    """Content up to where the box closes, counted afresh for every possible end."""
    bare = re.sub(rb"\\.", b"..", content, flags=re.DOTALL)
    ends = [i for i in range(len(bare)) if bare[i:i + 1] == b"}"]
    return next((content[:i] for i in ends if bare[:i].count(b"{") == bare[:i].count(b"}")),
                content[:content.rfind(b"}")] if b"}" in content else None)


def test_random_responses_are_read_as_by_a_count_of_all_braces():
    rng = random.Random(3)
    pieces = [b"\\boxed{", b"\\fbox{", b"\\boxed ", b"{", b"}", b"\\", b"\\{", b"\\}", b"</think>",
              b" ", b"a", b"\n", b"\xff"]
    found = 0
    for _ in range(20_000):
        response = rng.choice([b"", b"</think>\\boxed{"])
        response += b"".join(rng.choices(pieces, k=rng.randint(0, 14)))
        answer = response.split(b"</think>")[-1]
        expected = None
        if b"</think>" in response and rb"\boxed{" in answer:
            expected = balanced(answer.split(rb"\boxed{")[-1])
        assert extract_prediction(response) == expected
        found += expected is not None
    assert found > 2000


def test_reward_is_one_exactly_for_the_first_tokens_joined():
    rng = random.Random(1)
    pieces = [b"", b"a", b"b", b"ab", b" ", b"\n", b"\xe2", b"\x98\x83", b"\xe2\x98", b"\x83", b"{",
              b"}"]
    hits = 0
    for _ in range(5000):
        truth = rng.choices(pieces, k=rng.randint(0, 5))
        joins = {b"".join(truth[:k]) for k in range(1, len(truth) + 1)} - {b""}
        text = b"".join(truth) + rng.choice(pieces)
        beginnings = {text[:l] for l in range(len(text) + 1)}
        for prediction in beginnings | {b"".join(rng.choices(pieces, k=2))}:
            assert prefix_match(prediction, truth) == (prediction in joins), (prediction, truth)
            hits += prediction in joins
    assert hits > 5000  # both outcomes were really tried


def test_a_rollout_that_repeats_the_box_forever_is_read_in_linear_time():
    start = time.process_time()
    assert extract_prediction(b"</think>" + b"\\boxed{" * 100_000) is None
    assert time.process_time() - start < 2


@pytest.mark.parametrize("name, prediction, truth, reward", [
    ("the first token", b" the", THE_ANSWER, 1),
    ("a right second token changes nothing", b" the answer", THE_ANSWER, 1),
    ("a wrong second token is ignored", b" the question", THE_ANSWER, 1),
    ("half a second token is ignored", b" the ans", THE_ANSWER, 1),
    ("bytes cannot tell a longer first token", b" theory", THE_ANSWER, 1),
    ("half the first token", b" th", THE_ANSWER, 0),
    ("the second token alone", b" answer", THE_ANSWER, 0),
    ("missing leading space", b"the", THE_ANSWER, 0),
    ("half a character is a whole token", b"\xe2\x98", SNOWMAN, 1),
    ("another second half of the character", b"\xe2\x98\x84", SNOWMAN, 1),
    ("a token of zero bytes is not the first", b" a", [b"", b" the"], 0),
    ("the first token with bytes", b" the", [b"", b" the"], 1),
    ("only tokens of zero bytes", b" the", [b""], 0),
    ("nothing follows", b" the", [], 0),
    ("nothing predicted", b"", THE_ANSWER, 0),
    ("no box", None, THE_ANSWER, 0),
])
def test_the_first_token_alone_earns_the_first_token_reward(name, prediction, truth, reward):
    assert first_token_match(prediction, truth) == reward


@pytest.mark.parametrize("answer, content", [
    (rb"\boxed{ odd}<|end|>", b" odd"),
    (rb"</think>\boxed{ odd}", b" odd"),  # closes the thought itself
    (b"\n\n\\boxed{}} and so on", b""),
    (rb"Well, \boxed{ odd}", None),  # a thought without tags
    (rb"It is odd.</think>\boxed{ odd}", None),
    (rb"\boxed{ even}. No, \boxed{ odd}", None),
    (rb"\boxed{ even}</think>\boxed{ odd}", None),
    (rb"\boxed{ odd", None),
    (b"", None)])
def test_behind_a_closed_thought_nothing_stands_before_the_box(answer, content):
    assert box_at_once(answer) == content


def test_a_prefix_match_is_a_first_token_match_and_not_the_reverse():
    rng = random.Random(2)
    rewards = set()
    for _ in range(3000):
        truth = rng.choices([b"", b"a", b"b", b"ab"], k=rng.randint(0, 4))
        prediction = b"".join(rng.choices([b"", b"a", b"b"], k=3))
        rewards.add((prefix_match(prediction, truth), first_token_match(prediction, truth)))
    assert rewards == {(0, 0), (0, 1), (1, 1)}
