"""NSR, negative samples alone: rollouts worse than their group are made less likely (2604.14142).

    advantage    min(A, 0), where A = r - mean r is GRPO's
    loss         a mean over the tokens of these rollouts

No rollout is imitated, so that the policy keeps its variety. Groups that are all wrong have A = 0,
and no say. Text (--corpus) or questions (--data).

The name has a second reading, objectives/nsr_wrong.py: every wrong rollout has the advantage -1.
"""
from objectives import OnAnyTask


class Objective(OnAnyTask):
    def examples(self, groups, advantages, step):
        negative = [[min(a, 0) for a in values] for values in advantages]
        examples, _ = super().examples(groups, negative, step)
        return examples, sum(len(rollout) for example in examples for rollout in example.rollouts)
