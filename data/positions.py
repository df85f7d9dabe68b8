"""Positions: places in a corpus where a proxy model is uncertain, and the order in which they come.

data/filter.py computes the entropies and keeps them beside the corpus, one file for each proxy. The
threshold is applied when positions are loaded, so trying another one costs nothing.
"""
import hashlib
import os

import numpy as np

from plumbing.hf import config_path, weight_files
from reward import extract_prediction

SPLITS = dict(easy=0.5, medium=1.0, hard=1.5)  # nats; nested, as in Table 1
END_BYTES = 1 << 20                            # hashed at either end


def scores_path(corpus, proxy):
    """Path of this corpus's scores under a proxy, named after its weights and not its folder."""
    with open(config_path(proxy), "rb") as file:
        digest = hashlib.sha256(file.read())
    for path in weight_files(proxy):
        # Both ends and the size tell checkpoints apart; hashing 28 GB would take minutes.
        with open(path, "rb") as file:
            digest.update(file.read(END_BYTES))
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - END_BYTES))
            digest.update(file.read() + size.to_bytes(8, "little"))
    return f"{corpus.folder}/scores-{digest.hexdigest()[:12]}.npy"


def find_scores(corpus, proxy=None):
    """Path of the scores under `proxy`, or of the only scores that there are; else ValueError."""
    if proxy:
        path = scores_path(corpus, proxy)
        found = [path] if os.path.exists(path) else []
    else:
        found = sorted(f"{corpus.folder}/{name}" for name in os.listdir(corpus.folder)
                       if name.startswith("scores-") and name.endswith(".npy"))
    if not found:
        under = f" under {proxy}" if proxy else ""
        raise ValueError(f"{corpus.folder}: no entropies{under} yet; run python data/filter.py "
                         f"--corpus {corpus.folder} --proxy {proxy or 'CHECKPOINT'}")
    if len(found) > 1:
        raise ValueError(f"{corpus.folder}: scored by {len(found)} proxies; "
                         "choose with --proxy CHECKPOINT")
    return found[0]


def answerable(tokenizer):
    r"""(vocab,) bool: the tokens that the verifier reads out of a box as they are.

    A lone } closes the box. Where the true token begins with it no thought can be right, so nobody
    asks there.
    """
    tokens = [tokenizer.decode_bytes([id]) for id in range(tokenizer.vocab_size)]
    return np.array([extract_prediction(rb"</think>\boxed{" + raw + b"}") == raw for raw in tokens])


def load_positions(corpus, scores, threshold, split, fits=None):
    """Positions of "train" or "val" solutions with an entropy above `threshold` nats: (n, 3) int64.

    A row is an index into corpus.tokens, start and end of its document; n = 0 is a ValueError.
    fits: (vocab,) bool, only positions whose true token is one of these; None: all.
    Held-out positions come from here too: choose others to train on in objectives/rpt.py.
    """
    entropy = np.load(scores, mmap_mode="r")[:, 0]
    positions = []
    docs = corpus.docs[corpus.docs[:, 3] == (split == "val")]
    if not len(docs):
        raise ValueError(f"{corpus.folder}: no {split} document; the corpus needs two or more")
    for start, solution, end, _ in docs:
        above = solution + np.flatnonzero(entropy[solution:end] > threshold)
        if fits is not None:
            above = above[fits[corpus.tokens[above]]]
        positions += [(t, start, end) for t in above]
    if not positions:
        known = entropy[~np.isnan(entropy)]
        raise ValueError(f"{corpus.folder}: no {split} position has an entropy above {threshold} "
                         f"nats (the highest of {len(known)}: {known.max(initial=0):.2f}); "
                         "lower the threshold or score more")
    return np.array(positions, dtype=np.int64)


def choose_positions(corpus, scores, count, seed, fits=None):
    """`count` validation positions for each of SPLITS -> positions (n, 3), {split: indices}."""
    positions = load_positions(corpus, scores, SPLITS["easy"], "val", fits)
    positions = np.random.default_rng(seed).permutation(positions)
    entropy = np.load(scores, mmap_mode="r")[positions[:, 0], 0]
    chosen = {name: np.flatnonzero(entropy > nats)[:count] for name, nats in SPLITS.items()}
    # Most positions belong to several splits; each is returned once.
    used = np.unique(np.concatenate(list(chosen.values())))
    places = {name: np.searchsorted(used, some) for name, some in chosen.items() if len(some)}
    return positions[used], places


def shuffled(n, start, count, seed):
    """Indices start .. start + count of an endless walk over range(n), reordered each round."""
    rounds = range(start // n, (start + count) // n + 1)
    walk = np.concatenate([np.random.default_rng((seed, r)).permutation(n) for r in rounds])
    return walk[start - rounds.start * n:][:count]
