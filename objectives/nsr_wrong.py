"""NSR in its other reading (arXiv 2506.01347): wrong rollouts have the advantage -1, right ones 0.

    loss         a mean over the tokens of all rollouts

So groups that are all wrong count, and count most: where a policy is right in 3 of 100 rollouts,
this makes nearly everything that it does less likely. Dynamic sampling replaces groups that are all
right. In objectives/nsr.py "wrong" means worse than the group. Text (--corpus) or questions
(--data).
"""
from objectives import OnAnyTask


class Objective(OnAnyTask):
    def __init__(self, args, tokenizer, config):
        super().__init__(args, tokenizer, config)
        if args.normalize_advantage:
            raise ValueError("--objective nsr_wrong cannot take --normalize-advantage: what is "
                             "wrong has the advantage -1")

    def trains(self, group):
        return not all(group.hits)

    def examples(self, groups, advantages, step):
        wrong = [[0.0 if hit else -1.0 for hit in group.hits] for group in groups]
        return super().examples(groups, wrong, step)
