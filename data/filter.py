"""Which positions are worth a thought? The entropy of a proxy model's next token says so (RPT section 3.3).

    python data/filter.py --corpus data/omni --proxy SmolLM2-135M --documents 200

For every position of a solution: the entropy over the proxy's 16 most probable next tokens (with their
probabilities in the full softmax, not renormalised) and whether its most probable token is the true one. The
scores lie beside the corpus, one file for each proxy; a threshold is applied only when positions are loaded,
so trying another is free.

    easy / medium / hard = entropy > 0.5 / 1.0 / 1.5 nats: nested, as in the paper's Table 1
"""
import argparse
import hashlib
import os
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

if __name__ == "__main__":  # the repository, not data/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from plumbing.flags import speak_once
from data.prepare import load_corpus
from data.tokenizer import Tokenizer
from model import GPT, weight_files

TOP = 16
SPLITS = dict(easy=0.5, medium=1.0, hard=1.5)  # entropy above this many nats
SAVE_EVERY = 100                               # documents; Ctrl-C loses at most these


def scores_path(corpus, proxy):
    """Where the scores of this corpus under this proxy lie, named after its weights and not its path."""
    digest = hashlib.sha256(open(f"{proxy}/config.json", "rb").read())
    for path in weight_files(proxy):
        with open(path, "rb") as file:  # ends and size tell checkpoints apart; 28 GB would take minutes
            digest.update(file.read(1 << 20))
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read() + size.to_bytes(8, "little"))
    return f"{corpus.folder}/scores-{digest.hexdigest()[:12]}.npy"


@torch.no_grad()
def score_document(model, tokens, first):
    """tokens (T,) of a document -> entropy and correctness of predicting tokens[first:], (T - first, 2) fp32.

    A document longer than the model is read in windows of which the first half is context only.
    """
    window, parts = model.config.max_positions, []
    while first < len(tokens):
        start = max(0, min(first - window // 2, len(tokens) - window))
        ids = torch.tensor(tokens[start:start + window].astype(np.int64), device=model.device)
        logits = model(ids[None])[0, first - start - 1:-1]               # (n, V), predict ids[first - start:]
        probs, best = logits.softmax(dim=-1).topk(min(TOP, logits.shape[-1]), dim=-1)
        entropy = -(probs * probs.clamp_min(1e-12).log()).sum(dim=-1)
        parts.append(torch.stack([entropy, (best[:, 0] == ids[first - start:]).float()], dim=1))
        first = start + len(ids)
    return torch.cat(parts).cpu().numpy()


def score_corpus(corpus, proxy, documents=0, device="cpu", desc="filter"):
    """Score the solutions of the first `documents` documents of each split (0: of all) -> path of the scores.

    The file is (tokens of the corpus, 2) fp32: entropy in nats, 1 where argmax is right; NaN: not computed.
    It is written every SAVE_EVERY documents and continued by the next call.
    """
    path = scores_path(corpus, proxy)
    corpus.check(Tokenizer.load(proxy), proxy)
    scores = np.load(path) if os.path.exists(path) else np.full((len(corpus.tokens), 2), np.nan, np.float32)
    sides = [np.flatnonzero(corpus.docs[:, 3] == is_val) for is_val in (0, 1)]
    chosen = np.concatenate([side[:documents or None] for side in sides])
    todo = [doc for doc in corpus.docs[chosen] if np.isnan(scores[max(doc[1], doc[0] + 1):doc[2]]).any()]
    if not todo:
        return path
    model = GPT.from_pretrained(proxy, torch.bfloat16 if device == "cuda" else torch.float32, device)

    def save():
        with open(path + ".tmp", "wb") as file:
            np.save(file, scores)
        os.replace(path + ".tmp", path)

    try:
        for i, (start, solution, end, _) in enumerate(tqdm(todo, desc=desc, unit="doc", disable=None)):
            first = max(solution - start, 1)
            scores[start + first:end] = score_document(model, corpus.tokens[start:end], first)
            if i % SAVE_EVERY == SAVE_EVERY - 1:
                save()
    finally:
        save()
    return path


def load_positions(corpus, scores, threshold, split):
    """Positions (indices into corpus.tokens) of "train" or "val" solutions above `threshold` nats of entropy.

    Returns (n, 3) int64: position, start and end of its document. ValueError when nothing is left.
    """
    entropy = np.load(scores, mmap_mode="r")[:, 0]
    positions = [(t, start, end) for start, solution, end, is_val in corpus.docs if is_val == (split == "val")
                 for t in solution + np.flatnonzero(entropy[solution:end] > threshold)]
    if not positions:
        known = entropy[~np.isnan(entropy)]
        raise ValueError(f"{corpus.folder}: no {split} position has an entropy above {threshold} nats "
                         f"(the highest of {len(known)}: {known.max(initial=0):.2f}); "
                         "lower the threshold or score more")
    return np.array(positions, dtype=np.int64)


def find_scores(corpus, proxy=None):
    """Path of the scores under `proxy`, or of the only scores there are."""
    if proxy:
        path = scores_path(corpus, proxy)
        found = [path] if os.path.exists(path) else []
    else:
        found = sorted(f"{corpus.folder}/{name}" for name in os.listdir(corpus.folder)
                       if name.startswith("scores-") and name.endswith(".npy"))
    if not found:
        raise ValueError(f"{corpus.folder}: no entropies{f' under {proxy}' if proxy else ''} yet; run "
                         f"python data/filter.py --corpus {corpus.folder} --proxy {proxy or 'CHECKPOINT'}")
    if len(found) > 1:
        raise ValueError(f"{corpus.folder}: scored by {len(found)} proxies; choose with --proxy CHECKPOINT")
    return found[0]


if __name__ == "__main__":
    sys.excepthook = speak_once
    parser = argparse.ArgumentParser(description="Entropy of every solution position under a proxy model.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--corpus", required=True, help="folder written by data/prepare.py")
    add("--proxy", required=True, help="checkpoint folder; a small one of the same tokenizer will do")
    add("--documents", type=int, default=0, help="score this many documents of each split; 0: all")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    if args.documents < 0:
        raise ValueError(f"--documents must be at least 0, got {args.documents}")
    corpus = load_corpus(args.corpus)
    path = score_corpus(corpus, args.proxy, args.documents, args.device)
    scores = np.load(path)
    scores = scores[~np.isnan(scores[:, 0])]
    print(f"{len(scores):,} positions, argmax right at {100 * scores[:, 1].mean():.1f} %, written to {path}")
    for name, threshold in SPLITS.items():
        chosen = scores[scores[:, 0] > threshold]
        right = f", argmax right at {100 * chosen[:, 1].mean():.1f} %" if len(chosen) else ""
        print(f"{name:>8} (entropy > {threshold}): {100 * len(chosen) / len(scores):5.1f} % of them{right}")
