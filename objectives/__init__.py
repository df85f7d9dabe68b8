"""Objectives: what is asked, what counts as right, and what the update sees. One file for each.

`train_rpt.py --objective NAME` takes the class `Objective` of objectives/NAME.py:

    Objective(args, tokenizer, config)   reads its data; config is the model's
    take(cursor, n)                      -> the next n positions
    question(position)                   -> Question: what the model sees, what would be right
    longest_prompt()                     -> tokens of the longest prompt there is
    score(policy, groups)                fills in the predictions and rewards of each Group
    is_right(prediction, truth)          the yardstick of the metric "accuracy", whatever is paid
    trains(group)                        -> is it worth keeping, where dynamic sampling chooses?
    is_end(tokens)                       -> does a rollout end here, beside the usual stop tokens?
    examples(groups, advantages, step)   -> what the update sees, and the size that its loss is
                                         divided by: by default every rollout behind its prompt,
                                         its advantage on each token, and the number of tokens

`Base` implements all but `question`, `longest_prompt` and `score`. A file that you add to this
folder is found by its name; docs/objectives.md compares them and shows how to write one.
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
    measures: dict = field(default_factory=dict)         # {name: numbers}, for metrics.jsonl
    scored: list = field(default_factory=list)           # what `score` leaves for `examples`

    @property
    def has_signal(self):
        """Rewards that are all equal say nothing about which rollout was better."""
        return len(set(self.rewards)) > 1


class Base:
    """What most objectives share. Subclasses set `positions`, a list or array."""
    is_end = None   # or a method: tokens of a rollout so far -> whether it ends here

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

    def trains(self, group):
        """Does it have a gradient? Dynamic sampling replaces groups that have none."""
        return group.has_signal

    def examples(self, groups, advantages, step):
        """Groups, and G advantages for each -> Examples for `pack`, and the size of the batch.

        A rollout without an advantage has no gradient and is left out, but its tokens count: the
        loss is a mean over all rollout tokens of the batch.
        """
        examples, size = [], 0
        for group, values in zip(groups, advantages):
            size += sum(len(rollout.tokens) for rollout in group.rollouts)
            trained = [(a, rollout) for a, rollout in zip(values, group.rollouts) if a]
            if trained:
                examples.append(Example(
                    prompt=group.question.prompt,
                    rollouts=[rollout.tokens for _, rollout in trained],
                    advantages=[[a] * len(rollout.tokens) for a, rollout in trained],
                    logprobs=[rollout.logprobs for _, rollout in trained]))
        return examples, size

    def lessons(self, group):
        """-> rollouts worth imitating, lists of ids (paper/own_rollouts.py)."""
        return [rollout.tokens for rollout, prediction in zip(group.rollouts, group.predictions)
                if self.is_right(prediction, group.question.truth)]


class OnAnyTask(Base):
    """For objectives that only change the update: about text (--corpus) or questions (--data)."""

    def __init__(self, args, tokenizer, config):
        super().__init__(args, tokenizer, config)
        if bool(args.corpus) == bool(args.data):
            raise ValueError(f"--objective {args.objective} needs either --corpus or --data")
        self.task = load("answers" if args.data else "rpt")(args, tokenizer, config)
        self.positions = self.task.positions

    def question(self, position):
        return self.task.question(position)

    def longest_prompt(self):
        return self.task.longest_prompt()

    def score(self, policy, groups):
        self.task.score(policy, groups)

    def is_right(self, prediction, truth):
        return self.task.is_right(prediction, truth)


def names():
    """The names of all objectives: the files of this folder."""
    files = sorted(os.listdir(os.path.dirname(__file__)))
    return [file.removesuffix(".py") for file in files if file.endswith(".py") and file[0] != "_"]


def load(name):
    """-> the class Objective of objectives/{name}.py."""
    return importlib.import_module(f"objectives.{name}").Objective
