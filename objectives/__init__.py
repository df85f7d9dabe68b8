"""Objectives: what is asked, what counts as right, and what the update sees. One file for each.

`train_rpt.py --objective NAME` takes the class `Objective` of objectives/NAME.py:

    Objective(args, tokenizer, config)   reads its data; config is the model's
    take(cursor, n)                      -> the next n positions
    question(position)                   -> Question: what the model sees, what would be right
    longest_prompt()                     -> tokens of the longest prompt there is
    score(policy, groups)                fills in the predictions and rewards of each Group
    is_right(prediction, truth)          the yardstick of the metric "accuracy", whatever is paid
    examples(groups, advantages)         -> what the update sees: by default every rollout behind
                                         its prompt, with its advantage on each token

`Base` implements `take`, `is_right` and `examples`. A file that you add to this folder is found by
its name.
"""
import importlib
import os
from dataclasses import dataclass, field

from data.positions import shuffled
from plumbing.batch import Example
from reward import prefix_match


@dataclass
class Question:
    """What the model sees, and what would be right."""
    prompt: list[int]            # template, context (or its end), template
    truth: list[bytes] | str     # raw bytes of each of the next tokens; or the exact answer
    context: list[int]           # ids of the text before the position; or of the question
    position: int                # in the corpus; or number of the question


@dataclass
class Group:
    """A question, its G rollouts, and what they are worth."""
    question: Question
    rollouts: list                                       # sample.Rollout
    predictions: list = field(default_factory=list)      # bytes in the box, or None
    rewards: list = field(default_factory=list)          # numbers
    hits: list = field(default_factory=list)             # whether each prediction is right
    scoring_tokens: int = 0                              # read by the policy to score the group

    @property
    def has_signal(self):
        """Rewards that are all equal say nothing about which rollout was better."""
        return len(set(self.rewards)) > 1


class Base:
    """What most objectives share. Subclasses set `positions`, a list or array."""

    def __init__(self, args, tokenizer, config):
        self.args = args
        self.tokenizer = tokenizer
        # How many tokens a prompt may have.
        self.longest = min(args.max_prompt_tokens, config.max_positions - args.max_new_tokens)

    def take(self, cursor, n):
        """n positions, from number `cursor` on, of an endless walk; each round visits them all."""
        chosen = shuffled(len(self.positions), cursor, n, self.args.seed)
        return [self.positions[i] for i in chosen]

    def is_right(self, prediction, truth):
        """Is it what really follows? As in eval.py, and not to be edited along with a reward."""
        return prefix_match(prediction, truth) == 1

    def examples(self, groups, advantages):
        """Groups, and G advantages for each -> Examples for `pack`, where there is a gradient."""
        examples = []
        for group, values in zip(groups, advantages):
            if any(values):
                rollouts = [rollout.tokens for rollout in group.rollouts]
                examples.append(Example(
                    prompt=group.question.prompt,
                    rollouts=rollouts,
                    advantages=[[a] * len(tokens) for a, tokens in zip(values, rollouts)],
                    logprobs=[rollout.logprobs for rollout in group.rollouts]))
        return examples


def names():
    """The names of all objectives: the files of this folder."""
    files = sorted(os.listdir(os.path.dirname(__file__)))
    return [file.removesuffix(".py") for file in files if file.endswith(".py") and file[0] != "_"]


def load(name):
    """-> the class Objective of objectives/{name}.py."""
    return importlib.import_module(f"objectives.{name}").Objective
