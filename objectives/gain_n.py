"""Quiet-STaR's reward (arXiv 2403.09629): what a thought adds to the next n tokens.

    reward       r = log p(next n true tokens | x_<t, c) - log p(the same | x_<t), in nats
    advantage    r - mean r, over the thoughts about the same position
    loss         a mean over all thought tokens, as in GRPO

As in RLP the second term is the same for all thoughts, and drops out. The authors' code has n = 4.

What differs: this is the reward, and not the model. Quiet-STaR thinks after every token at once,
mixes the predictions with and without the thought by a learned head, learns embeddings that begin
and end a thought, and trains on plain text as well. It also drops negative advantages, for
stability: to try that, take max(a, 0) of the advantages in `examples`.
"""
from objectives import Base, rlp


class Objective(rlp.Objective):
    TARGETS = 4
    examples = Base.examples
