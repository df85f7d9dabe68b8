"""Cut off improbable or banned tokens: for sampling by hand and evaluation, never for training."""
from functools import partial

import torch


def truncation(top_k=0, top_p=1.0, min_p=0.0, banned=()):
    """-> a function for `truncate`, or None if nothing is to be cut off; banned: ids."""
    if not (top_k >= 0 and 0 < top_p <= 1 and 0 <= min_p <= 1):
        raise ValueError("top-k must be at least 0, top-p in (0, 1], min-p in [0, 1], "
                         f"got {top_k}, {top_p}, {min_p}")
    if top_k or top_p < 1 or min_p or banned:
        return partial(truncate_logits, top_k, top_p, min_p, list(banned))
    return None


def truncate_logits(top_k, top_p, min_p, banned, logits):
    """Logits (B, V), divided by the temperature -> the same with -inf for what is cut off.

    Of the tokens that are not banned keeps the top_k most probable; of these the fewest that
    together have the probability top_p; of these the ones with at least min_p times the probability
    of the best.
    """
    if banned:
        logits = logits.clone()
        logits[:, banned] = -torch.inf
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ordered[:, top_k:] = -torch.inf
    probs = ordered.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs
    ordered[before >= top_p] = -torch.inf
    probs = ordered.softmax(dim=-1)
    ordered[probs < min_p * probs[:, :1]] = -torch.inf
    return torch.empty_like(logits).scatter_(1, order, ordered)
