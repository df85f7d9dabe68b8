"""From prompts and rollouts to packed micro-batches, for both trainers.

    Example        a prompt and what follows it: G rollouts, or the rest of a document
    MicroBatch     several Examples as one sequence of tokens, with what the loss needs

Next-token prediction is the special case in which the "rollout" is the true text and every token
of it has the advantage 1: the gradient of -advantage x logprob is then that of the cross-entropy.
"""
import math
from dataclasses import dataclass

import torch

from kernels.attention import Layout, make_layout


@dataclass
class Example:
    """A prompt and G rollouts behind it; the inner lists have an entry for each token."""
    prompt: list[int]
    rollouts: list[list[int]]
    advantages: list[list[float]]  # the weight of each token in the loss
    logprobs: list[list[float]]    # the sampler's, of each token; plain text has none


@dataclass
class MicroBatch:
    """T tokens of packed examples, of which the S rollout tokens have a loss."""
    tokens: torch.Tensor                       # (T,)
    layout: Layout
    advantages: torch.Tensor                   # (S,)
    sampled_logprobs: torch.Tensor             # (S,) of the sampler
    old_logprobs: torch.Tensor | None = None   # (S,) of the trainer before the first update


def flatten(groups, device):
    """[(prompt, [rollout, ...]), ...], all lists of ids -> tokens (T,) and their Layout."""
    tokens, lengths = [], []
    for prompt, rollouts in groups:
        tokens += prompt
        for rollout in rollouts:
            tokens += rollout
        lengths.append((len(prompt), [len(rollout) for rollout in rollouts]))
    return torch.tensor(tokens, device=device), make_layout(lengths, device)


def cut(items, budget, size):
    """Cut a list into runs whose sizes add up to at most `budget`; a larger item is a run alone."""
    runs, room = [], 0
    for item in items:
        if not runs or size(item) > room:
            runs.append([])
            room = budget
        runs[-1].append(item)
        room -= size(item)
    return runs


def split(example, budget):
    """Cut an Example by rollouts into parts of at most `budget` tokens, the prompt in each."""
    parts, size = [], math.inf
    for i, rollout in enumerate(example.rollouts):
        if size + len(rollout) > budget:
            parts.append(Example(example.prompt, [], [], []))
            size = len(example.prompt)
        parts[-1].rollouts.append(rollout)
        parts[-1].advantages.append(example.advantages[i])
        parts[-1].logprobs.append(example.logprobs[i])
        size += len(rollout)
    return parts


def count_tokens(example):
    return len(example.prompt) + sum(map(len, example.rollouts))


def pack(examples, budget, device):
    """Examples -> MicroBatches of at most `budget` tokens, or of a single rollout with its prompt.

    An example with more tokens is split, and its prompt is computed once for every part.
    """
    parts = []
    for example in examples:
        parts += split(example, budget)
    return [make_micro_batch(run, device) for run in cut(parts, budget, count_tokens)]


def make_micro_batch(examples, device):
    advantages, logprobs = [], []
    for example in examples:
        for rollout in example.advantages:
            advantages += rollout
        for rollout in example.logprobs:
            logprobs += rollout
    tokens, layout = flatten([(example.prompt, example.rollouts) for example in examples], device)
    return MicroBatch(tokens, layout, torch.tensor(advantages, device=device),
                      torch.tensor(logprobs, device=device))


def idle_micro_batch(device):
    """One token with advantage 0: what a rank computes while others still have work."""
    return make_micro_batch([Example([0], [[0]], [[0.0]], [[0.0]])], device)
