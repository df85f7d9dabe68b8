"""PreRL, RL in the pre-training space (arXiv 2604.14142): the update does not see the prompt.

    prompt, rollout, reward, advantage      RPT's (--corpus), or those of questions (--data)
    update                                  on log p(rollout) behind a single token that begins a
                                            text, in place of log p(rollout | prompt)

What has helped at some position becomes more likely everywhere. The probability ratio compares the
update's own log-probs, so sampler and trainer speak of different distributions: logp_gap is null
and --importance-cap is refused. The authors begin with <|im_start|> (Qwen); here the tokenizer's
BOS comes first, where it has one.
"""
import math

from objectives import OnAnyTask


class Objective(OnAnyTask):
    def __init__(self, args, tokenizer, config):
        super().__init__(args, tokenizer, config)
        check_cap(args)

    def examples(self, groups, advantages, step):
        examples, size = super().examples(groups, advantages, step)
        return without_prompts(examples, self.tokenizer), size


def without_prompts(examples, tokenizer):
    """Put a token that begins a text in place of each prompt; forget the sampler's log-probs."""
    start = tokenizer.bos or [tokenizer.special.get("<|im_start|>", tokenizer.eos_id)]
    for example in examples:
        example.prompt = start
        example.logprobs = [[math.nan] * len(rollout) for rollout in example.rollouts]
    return examples


def check_cap(args):
    if args.importance_cap:
        raise ValueError(f"--objective {args.objective} cannot take --importance-cap: the update "
                         "sees other prompts than the sampler")
