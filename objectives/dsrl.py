"""DSRL (arXiv 2604.14142): first unlearn what is wrong without the prompt, then ordinary RL.

    steps 0 to WARM_UP - 1      rollouts worse than their group, behind no prompt (nsr and prerl)
    later                       RPT's update (--corpus), or that of questions (--data)

The authors advise 10 to 25 steps of warm-up. What differs: their scripts multiply the loss of the
warm-up by 0.01 by default. Adam divides that out again, but at the switch its second moments are
then too small by a factor of 1e-4. Here nothing is scaled.
"""
from objectives import Base, nsr
from objectives.prerl import check_cap, without_prompts

WARM_UP = 20    # steps


class Objective(nsr.Objective):
    def __init__(self, args, tokenizer, config):
        super().__init__(args, tokenizer, config)
        check_cap(args)

    def examples(self, groups, advantages, step):
        if step >= WARM_UP:
            return Base.examples(self, groups, advantages, step)
        examples, size = super().examples(groups, advantages, step)
        return without_prompts(examples, self.tokenizer), size
