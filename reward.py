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

Three more rewards of the paper, in its words comparable to this one (appendix A), stand at the end.
"""


def extract_prediction(response: bytes) -> bytes | None:
    r"""The bytes inside the last \boxed{...} after the last </think>; None where there is no such box.

    The scan starts at the last `\boxed{`, so of a box inside a box the inner one counts.
    """
    _, thought, answer = response.rpartition(b"</think>")
    _, box, content = answer.rpartition(rb"\boxed{")
    if not (thought and box):
        return None
    depth, escaped = 1, False
    for end, byte in enumerate(content):
        if escaped:
            escaped = False
        elif byte == ord("\\"):
            escaped = True
        elif byte in b"{}":
            depth += 1 if byte == ord("{") else -1
            if depth == 0:
                return content[:end]
    end = content.rfind(b"}")
    return content[:end] if end >= 0 else None


def box_at_once(answer: bytes) -> bytes | None:
    r"""The bytes in the box of an answer that has to do without a thought: one \boxed{...}, and nothing before it."""
    answer = answer.removeprefix(b"</think>").lstrip()
    if not answer.startswith(rb"\boxed{") or answer.count(rb"\boxed{") > 1 or b"</think>" in answer:
        return None
    return extract_prediction(b"</think>" + answer)


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


def first_token_match(prediction: bytes | None, truth: list[bytes]) -> float:
    """1.0 iff the prediction begins with the bytes of the first true token; whatever follows is ignored.

    The paper compares tokens. Bytes have no tokens of their own, so here " theory" begins with " the".
    """
    first = next((token for token in truth if token), None)
    return float(bool(prediction and first and prediction.startswith(first)))


def dense(match: float, probability: float) -> float:
    """1.0 for a first-token match, else the model's P(predicted first token | context), in [0, 1]."""
    return 1.0 if match else probability


def conditional_dense(matches: list[float], probabilities: list[float]) -> list[float]:
    """Dense rewards of a group of G with at least one match; zeros for a group without."""
    hit = any(matches)
    return [dense(m, p) if hit else 0.0 for m, p in zip(matches, probabilities, strict=True)]
