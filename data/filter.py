"""Which positions are worth a thought? The entropy of a proxy model says so (RPT, section 3.3).

    python data/filter.py --corpus corpora/omni --proxy SmolLM2-135M --documents 200

For every position of a solution: the entropy over the proxy's 16 most probable next tokens (with
their probabilities in the full softmax, not renormalised), and whether the most probable one is
right. data/positions.py finds these scores beside the corpus and applies the threshold. A document
that has scores keeps them, whatever the --dtype.
"""
import os
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

if __name__ == "__main__":  # imports start at the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from plumbing import flags  # before torch: how its threads wait
import torch
from data.corpus import load_corpus
from data.positions import SPLITS, scores_path
from data.tokenizer import Tokenizer
from model import GPT
from plumbing.batch import flatten

TOP = 16          # tokens over which the entropy is taken
PIECE = 2**25     # logits at a time, 134 MB in fp32, and as many probabilities
SAVE_EVERY = 100  # documents; Ctrl-C loses no more


@torch.no_grad()
def score_document(model, tokens, first, bos=()):
    """tokens (T,) of a document -> (T - first, 2) fp32: the scores of predicting tokens[first:].

    A document longer than the model is read in windows. All but the first are half context or more;
    each begins with the tokenizer's BOS, if there is one.
    """
    tokens = np.array(tokens)  # a copy, because each window gets its BOS
    window, vocab, parts = model.config.max_positions, model.config.vocab_size, []
    while first < len(tokens):
        start = max(0, min(first - window // 2, len(tokens) - window))
        tokens[start:start + len(bos)] = bos
        ids, layout = flatten([(tokens[start:start + window].tolist(), [])], model.device)
        hidden = model.hidden(ids, layout.positions, layout.attend)             # (window, D)
        # Logits a piece at a time, because those of 32,768 positions may take 20 GB.
        places = torch.arange(first - start, len(ids), device=model.device)
        for piece in places.split(max(1, PIECE // vocab)):
            probs = model.logits(hidden[piece - 1]).softmax(dim=-1)             # (n, V)
            probs, best = probs.topk(min(TOP, vocab), dim=-1)
            entropy = -(probs * probs.clamp_min(1e-12).log()).sum(dim=-1)
            parts.append(torch.stack([entropy, (best[:, 0] == ids[piece]).float()], dim=1))
        first = start + len(ids)
    return model.finite(torch.cat(parts).cpu()).numpy()


def score_corpus(corpus, proxy, documents=0, device="cpu", compute_dtype=torch.float32):
    """Score the solutions of the first `documents` documents of each split (0: of all) -> path.

    The file is (tokens of the corpus, 2) fp32: entropy in nats, 1 where the most probable token is
    right; NaN: not computed. It is saved every SAVE_EVERY documents; the next call continues it.
    """
    path = scores_path(corpus, proxy)
    tokenizer = Tokenizer.load(proxy, for_model=True)
    corpus.check(tokenizer, proxy)
    scores = np.full((len(corpus.tokens), 2), np.nan, np.float32)
    if os.path.exists(path):
        scores = np.load(path)
    todo = []
    for is_val in (0, 1):
        docs = corpus.docs[corpus.docs[:, 3] == is_val]
        todo += [doc for doc in docs[:documents or None] if np.isnan(scores[doc[1]:doc[2]]).any()]
    if not todo:
        return path

    model = GPT.from_pretrained(proxy, compute_dtype, device)
    try:
        bar = tqdm(todo, desc="filter", unit="doc", disable=None)
        for i, (start, solution, end, _) in enumerate(bar, start=1):
            scores[solution:end] = score_document(model, corpus.tokens[start:end], solution - start,
                                                  tokenizer.bos)
            if i % SAVE_EVERY == 0:
                save_scores(path, scores)
    finally:  # also after Ctrl-C
        if not np.isnan(scores).all():
            save_scores(path, scores)
    return path


def save_scores(path, scores):
    """Replace the file in one move."""
    with open(path + ".tmp", "wb") as file:
        np.save(file, scores)
    os.replace(path + ".tmp", path)


def parse_args():
    parser = flags.Parser("Entropy of every solution position under a proxy model.")
    add = parser.add_argument
    add("--corpus", required=True, help="folder written by data/prepare.py")
    add("--proxy", required=True,
        help="checkpoint folder; a small one of the same tokenizer will do")
    add("--documents", type=flags.at_least(0), default=0,
        help="score this many documents of each split; 0: all")
    flags.add_device_flag(add)
    return parser.parse_args()


if __name__ == "__main__":
    sys.excepthook = flags.speak_once
    args = parse_args()
    path = score_corpus(load_corpus(args.corpus), args.proxy, args.documents, args.device,
                        flags.compute_dtype(args))
    scores = np.load(path)
    scores = scores[~np.isnan(scores[:, 0])]
    print(f"written to {path}")
    print(f"{len(scores):,} positions, argmax right at {100 * scores[:, 1].mean():.1f} %")
    for name, threshold in SPLITS.items():
        chosen = scores[scores[:, 0] > threshold]
        share = 100 * len(chosen) / len(scores)
        right = f", argmax right at {100 * chosen[:, 1].mean():.1f} %" if len(chosen) else ""
        print(f"{name:>8} (entropy > {threshold}): {share:5.1f} % of them{right}")
