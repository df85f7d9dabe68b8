r"""RA3, Reasoning as Action Abstractions (arXiv 2509.25810): thoughts about segments, at a price.

    reward       r = log p(segment | x_<t, c) - log p(segment | x_<t) - PRICE [c is not empty], nats
    advantage    r - mean r
    loss         a mean over all thought tokens, as in GRPO

The segment is the text up to the end of its sentence or line, and counts as a sum over its tokens.
The price is inside of the advantage, so that a thought competes with not thinking: a rollout that
closes its thought at once pays nothing. That is the first half of the paper's method, which finds
thoughts; the second, next-token training on text with the thoughts found, is

    python paper/own_rollouts.py --objective ra3 --init RUN/step_000100 --out own.jsonl ...
    python train_ntp.py --init BASE --strings own.jsonl ...

What differs: the paper's prior lets a thought last over several segments and charges for changing
it; here each position is thought about anew, and all who think pay the same. Its segments are lines
of code. We choose the price.
"""
from objectives import Base, rlp
from objectives.rpt import TRUTH_TOKENS

PRICE = 0.1          # nats
ENDS = b".", b"!", b"?"     # of a segment, and every line break


class Objective(rlp.Objective):
    TARGETS = TRUTH_TOKENS
    examples = Base.examples

    def targets(self, question):
        tokens = super().targets(question)
        for n, raw in enumerate(question.truth, start=1):
            if b"\n" in raw or raw.rstrip().endswith(ENDS):
                return tokens[:n]
        return tokens

    def worth(self, gain, rollout):
        return gain - PRICE if self.thought(rollout).strip() else gain

    def lessons(self, group):
        """The best thought, if it pays."""
        best = max(range(len(group.rewards)), key=lambda i: group.rewards[i])
        return [self.lesson(group, group.rollouts[best])] if group.rewards[best] > 0 else []
