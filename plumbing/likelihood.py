"""How likely a model finds texts that it did not write: log-probs of given tokens."""
from itertools import accumulate

import torch

from kernels.logprob import logprob, sample
from plumbing.batch import cut, flatten


@torch.no_grad()
def read(model, groups, budget):
    """Log-probs of target tokens after what is given, and what the model expected instead.

    groups: [(prompt, [(given, targets), ...]), ...], all lists of ids; given may be empty. A prompt
    is computed once for its continuations. A forward pass takes at most `budget` tokens, or a group
    alone, which is never cut.
    -> for each group a list of (log-probs of its targets at temperature 1, nats; the id that was
    most probable in place of the first target)
    """
    scores = []
    for run in cut(groups, budget, count_tokens):
        texts = [(prompt, [given + targets for given, targets in pairs]) for prompt, pairs in run]
        tokens, layout = flatten(texts, model.device)
        hidden = model.hidden(tokens, layout.positions, layout.attend)                   # (T, D)
        # Of the rollout tokens only the targets matter, which are the last ones of each.
        counts = [len(targets) for _, pairs in run for _, targets in pairs]
        ends = layout.rollout_lens.cumsum(0).tolist()
        chosen = [i for end, n in zip(ends, counts) for i in range(end - n, end)]
        chosen = torch.tensor(chosen, device=model.device)
        hidden = hidden[layout.predict_rows[chosen]]
        ids = tokens[layout.rollout_rows[chosen]]
        logprobs = model.finite(logprob(hidden, model.head, ids, with_entropy=False)[0]).tolist()
        # At temperature 0 the random bits are not used.
        likeliest = sample(hidden, model.head, torch.zeros_like(ids), 0)[0].tolist()
        of_texts = ((logprobs[end - n:end], likeliest[end - n])
                    for n, end in zip(counts, accumulate(counts)))
        scores += [[next(of_texts) for _ in pairs] for _, pairs in run]
    return scores


def count_tokens(group):
    prompt, pairs = group
    return len(prompt) + sum(len(given) + len(targets) for given, targets in pairs)
