"""Log-probability and entropy of given tokens, from hidden states, without keeping the logits.

At V = 151,936 the logits of 16,384 rows are 10 GB in fp32, and softmax and gradient want as much again. Rows
are therefore taken a chunk at a time, and a chunk's logits are computed a second time in the backward.
"""
import torch
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 2**26  # logits alive at a time: 256 MB in fp32


def logprob(hidden, weight, targets, temperature=1.0):
    """hidden (N, D), weight (V, D), targets (N,) -> log-probs (N,) and entropy in nats (N,), both fp32.

    Both belong to softmax(hidden @ weight.T / temperature): the distribution that was sampled from.
    """
    size = max(1, CHUNK_LOGITS // weight.shape[0])
    chunks = [
        checkpoint(logprob_of_chunk, h, weight, t, temperature, use_reentrant=False, preserve_rng_state=False)
        for h, t in zip(hidden.split(size), targets.split(size))]
    logprobs, entropy = zip(*chunks)
    return torch.cat(logprobs), torch.cat(entropy)


def logprob_of_chunk(hidden, weight, targets, temperature):
    logits = (hidden @ weight.to(hidden.dtype).T).float() / temperature             # (n, V)
    logprobs = logits.log_softmax(dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
    return logprobs.gather(1, targets[:, None]).squeeze(1), entropy
