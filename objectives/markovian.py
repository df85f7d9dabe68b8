r"""Markovian thoughts (arXiv 2404.18988): what follows is predicted from the thought alone.

    reward       r = log p(x_t | c) - log p(x_t | x_<t), nats: behind the thought, without context
    advantage    A = (r - mean r) / std r, over the thoughts about the same position;
                 0 where std r is below LEAST_STD, and then there is no second term either
    loss         -A log p(c | x_<t), a mean over the tokens of each thought,
                 - log p(x_t | c) / std r: the reward depends on the policy and has a gradient too

So the thought has to carry all that the prediction needs, and is worth reading. The easy way is to
copy the context, hence the metric "overlap": how much of the thought the context holds.

What differs: in the authors' code with --parallel the second term is -A itself, whose sum over a
batch is 0 whatever the weights, so it has no gradient; here mean and std are constants, as in the
paper's derivation. Their baseline, the frozen start model, depends on the position alone and drops
out of A; the one in the logged reward is the policy that sees the context. There is no KL penalty
(theirs: 0.1). They predict 100 tokens from thoughts of 50, or an answer; here it is TARGETS tokens,
of which there are TRUTH_TOKENS at most (objectives/rpt.py). The update divides logits by
--temperature, which has to be 1 for the second term to be right.
"""
from objectives import rlp
from plumbing.batch import Example

REWARD_GRADIENT = 1.0   # weight of the second term; 0: a policy gradient alone
LEAST_STD = 0.01        # nats; rewards that are closer may differ by rounding alone
PIECE = 8               # bytes


class Objective(rlp.Objective):
    def __init__(self, args, tokenizer, config):
        super().__init__(args, tokenizer, config)
        if args.temperature != 1:
            raise ValueError(f"--objective markovian needs --temperature 1, got {args.temperature}:"
                             " what follows is scored, and its gradient taken, at 1")
        if args.normalize_advantage:
            raise ValueError("--objective markovian cannot take --normalize-advantage: it divides "
                             "by the standard deviation itself")

    def with_thoughts(self, group):
        targets = self.targets(group.question)
        return [(self.tokenizer.bos + self.closed(r), [([], targets)]) for r in group.rollouts]

    def score(self, policy, groups):
        super().score(policy, groups)
        for group in groups:
            context = self.tokenizer.decode_bytes(group.question.context)
            group.measures["overlap"] = [overlap(self.thought(r), context) for r in group.rollouts]

    def examples(self, groups, advantages, step):
        examples, thoughts = [], 0
        for group, values in zip(groups, advantages):
            thoughts += len(group.rollouts)
            std = (sum(a * a for a in values) / (len(values) - 1)) ** 0.5
            # Divided by next to nothing, one group would outweigh all others.
            if std < LEAST_STD:
                continue
            tokens = [rollout.tokens for rollout in group.rollouts]
            examples.append(Example(
                prompt=group.question.prompt,
                rollouts=tokens,
                advantages=[[a / std / len(ids)] * len(ids) for a, ids in zip(values, tokens)],
                logprobs=[rollout.logprobs for rollout in group.rollouts]))
            # The reward's own gradient: what follows the thought, as if it were a rollout.
            weight = REWARD_GRADIENT / std
            texts = self.with_thoughts(group)
            for (alone, [(_, targets)]), (scores, _) in zip(texts, group.scored):
                examples.append(Example(alone, [targets], [[weight] * len(targets)], [scores]))
        return examples, thoughts


def overlap(thought, context):
    """Share of the pieces of a thought, PIECE bytes each, that the context holds, too."""
    pieces = {thought[i:i + PIECE] for i in range(len(thought) - PIECE + 1)}
    return sum(piece in context for piece in pieces) / max(len(pieces), 1)
