"""Angles of rotary positions, also of models whose context was stretched after pre-training.

`linear` slows every angle down, `llama3` the slow ones, and `yarn` the slow ones while it enlarges
queries and keys. The frequencies of `dynamic` and `longrope` follow from the length of a sequence:
a longer rollout would have to turn the keys of its prompt again, which all rollouts share. So
plumbing/hf.py refuses them. The arithmetic is that of transformers, operation by operation.
"""
import math

import torch


def frequencies(K, theta, scaling, device):
    """-> radians per position (K / 2,), fp32, and a factor for all cosines and sines.

    scaling: {field of rope_scaling in config.json: value}; {} for plain rotary positions.
    """
    periods = theta ** (torch.arange(0, K, 2, device=device).float() / K)     # positions a radian
    plain, kind = 1 / periods, scaling.get("rope_type")
    if kind == "linear":
        return plain / scaling["factor"], 1.0
    if kind == "llama3":
        return llama3(plain, **scaling), 1.0
    if kind == "yarn":
        return yarn(K, theta, periods, **scaling)
    return plain, 1.0


def llama3(plain, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings, **_):
    """Angles with few turns in the original context are slowed down, those with many are not."""
    turns = original_max_position_embeddings / (2 * math.pi / plain)
    kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    between = (1 - kept) * plain / factor + kept * plain
    slowed = torch.where(turns < low_freq_factor, plain / factor, between)
    return torch.where(turns > high_freq_factor, plain, slowed)


def yarn(K, theta, periods, factor, original_max_position_embeddings, attention_factor=None,
         beta_fast=32, beta_slow=1, mscale=None, mscale_all_dim=None, truncate=True, **_):
    """YaRN (arXiv 2309.00071): a ramp over the pairs, from beta_fast turns down to beta_slow."""
    def pair_with(turns):
        longest = original_max_position_embeddings / (turns * 2 * math.pi)
        return K * math.log(longest) / (2 * math.log(theta))

    def growth(scale):
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    first, last = pair_with(beta_fast), pair_with(beta_slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, K - 1)
    ramp = torch.arange(K // 2, device=periods.device).float() - first
    kept = 1 - (ramp / (last - first or 0.001)).clamp(0, 1)
    if attention_factor is None:
        both = mscale and mscale_all_dim
        attention_factor = growth(mscale) / growth(mscale_all_dim) if both else growth(1)
    return (1 - kept) * (1 / (factor * periods)) + kept * (1 / periods), attention_factor
