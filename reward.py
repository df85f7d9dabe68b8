r"""The verifier: does a prediction match the text that really follows?

The reward is 1 iff the predicted bytes are the first k >= 1 tokens of the true continuation, joined
(RPT eq. 3). Bytes, never strings, because a token may end inside a UTF-8 character.

    truth  = [b" the", b" answer", b" is"]          # raw bytes of the tokens that really follow
    b" the"         -> 1.0      one token
    b" the answer"  -> 1.0      two tokens are worth the same as one
    b" th"          -> 0.0      ends inside a token
    b"the"          -> 0.0      the leading space counts
    b""  or  None   -> 0.0      nothing predicted

The prediction is the content of the last \boxed{...} after the thought; nothing is stripped:

    \boxed{ the}         ->  ` the`           the space counts, and `\boxed{ }` predicts one
    \boxed{\frac{a}{b}}  ->  `\frac{a}{b}`    balanced braces belong to the content
    \boxed{\}}           ->  `\}`             a backslash escapes the brace: it closes nothing
    \boxed{\frac{}       ->  `\frac{`         the braces never balance: everything up to the last }
    \boxed{}}            ->  ``               the first } closes: an unmatched } cannot be boxed

This is the yardstick of eval.py and of the metric "accuracy". To pay for something else, edit
objectives/rpt.py: Objective.reward. The other rewards of the paper's appendix A are in
objectives/first_token.py and dense.py.
"""


def extract_prediction(response: bytes) -> bytes | None:
    r"""The bytes inside the last \boxed{...} after the last </think>; None if there is no such box.

    The scan starts at the last `\boxed{`, so of a box inside a box the inner one counts.
    """
    _, thought, answer = response.rpartition(b"</think>")
    _, box, content = answer.rpartition(rb"\boxed{")
    end = closing_brace(content) if thought and box else None
    return None if end is None else content[:end]


def closing_brace(content: bytes) -> int | None:
    """What follows an open brace -> where that one closes, or else the last }; None without a }."""
    depth, escaped = 1, False
    for end, byte in enumerate(content):
        if escaped:
            escaped = False
        elif byte == ord("\\"):
            escaped = True
        elif byte in b"{}":
            depth += 1 if byte == ord("{") else -1
            if depth == 0:
                return end
    end = content.rfind(b"}")
    return end if end >= 0 else None


def prefix_match(prediction: bytes | None, truth: list[bytes]) -> float:
    """1.0 iff the prediction is the first k >= 1 tokens of the truth, joined; else 0.0."""
    if not prediction:
        return 0.0
    joined = b""
    for token in truth:
        joined += token
        if len(joined) >= len(prediction):
            return float(joined == prediction)
    return 0.0


def box_at_once(answer: bytes) -> bytes | None:
    r"""The prediction of a model that may not think: its only \boxed{...}, no text before it."""
    answer = answer.removeprefix(b"</think>").lstrip()
    if not answer.startswith(rb"\boxed{") or answer.count(rb"\boxed{") > 1 or b"</think>" in answer:
        return None
    return extract_prediction(b"</think>" + answer)
