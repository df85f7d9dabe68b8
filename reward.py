r"""The verifier: does a prediction match the text that really follows?

Reward 1 iff the predicted bytes equal the first l bytes of the true continuation and l is the end of one of
its tokens (RPT eq. 3). Bytes, never strings: a token may end inside a UTF-8 character. Standard library only.

    truth  = [b" the", b" answer", b" is"]          # raw bytes of the tokens that really follow
    b" the"         -> 1.0      one token
    b" the answer"  -> 1.0      two tokens are worth the same as one
    b" th"          -> 0.0      ends inside a token
    b"the"          -> 0.0      the leading space counts
    b""  or  None   -> 0.0      nothing predicted

The prediction is what stands in the last \boxed{...} after the thought, byte for byte, nothing stripped:

    \boxed{ the}         ->  ` the`           and `\boxed{ }` is a space
    \boxed{\frac{a}{b}}  ->  `\frac{a}{b}`    balanced braces belong to the content
    \boxed{\}}           ->  `\}`             a backslash escapes the next byte: that } closes nothing
    \boxed{\frac{}       ->  `\frac{`         never balances: everything up to the final }
    \boxed{}}            ->  ``               balances at once: no text with a } before its { fits
"""
import re

# All that can open, close or hide a brace. A backslash hides the byte behind it, but \\boxed{ (as in an
# escaped string) still opens a box.
MARK = re.compile(rb"\\boxed\{|\\(?!\\boxed\{).|[{}]", re.DOTALL)


def extract_prediction(response: bytes) -> bytes | None:
    r"""The bytes inside the last \boxed{...} after the last </think>; None where there is no such box.

    A box inside a box is content: the text may well say `\boxed{4}` itself, so `\boxed{\boxed{4}}` predicts
    `\boxed{4}`. A box that nobody closed holds no other: in `\boxed{a, no, \boxed{b}` the last box is `b`.
    """
    _, tag, answer = response.rpartition(b"</think>")
    if not tag:
        return None
    open_braces = []  # (where the content starts, is it a box) for each brace that still waits for its }
    last = None  # (start, end) of the box that closed last: those that closed before are ahead of it or in it
    for mark in MARK.finditer(answer):
        if mark[0] in (b"{", b"\\boxed{"):
            open_braces.append((mark.end(), mark[0] != b"{"))
        elif mark[0] == b"}" and open_braces:
            start, is_box = open_braces.pop()
            if is_box:
                last = start, mark.start()
    unclosed = max((start for start, is_box in open_braces if is_box), default=-1)
    if last is None or unclosed > last[0]:
        last = unclosed, answer.rfind(b"}")
    start, end = last
    return answer[start:end] if 0 <= start <= end else None


def prefix_match(prediction: bytes | None, truth: list[bytes]) -> float:
    """1.0 iff the prediction is the first k >= 1 true tokens, joined; truth holds the tokens' raw bytes."""
    if not prediction:
        return 0.0
    joined = b""
    for token in truth:
        joined += token
        if len(joined) >= len(prediction):
            return float(joined == prediction)
    return 0.0
