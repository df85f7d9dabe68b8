"""What is a thought worth? Next-token accuracy with and without reasoning, on easy, medium, hard positions.

    python eval.py lm --corpus C --checkpoints BASE RPT --mode both --positions 200 --out results.json

Held-out positions are split by the entropy of one reference model, as in the paper's Table 1: easy, medium
and hard are entropy > 0.5, 1.0 and 1.5 nats, nested. Every checkpoint answers the same positions:
    ntp         the most probable next token after the context alone: right or wrong
    reasoning   K sampled thoughts with a prediction: mean reward, and pass@K (any of the K right)
Intervals are 95 % bootstrap intervals over documents: positions of one document stand and fall together.
"""
import argparse
import json
import sys

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import append, write
from data import speak_once
from data.filter import SPLITS, find_scores, load_positions
from data.prepare import load_corpus
from data.prompt import stop_ids, template_ids
from data.tokenizer import Tokenizer
from kernels.attention import make_layout
from model import GPT
from sample import generate, rollout_bar, truncation
from train_ntp import check_range, micro_batches
from train_rpt import make_question, sample_record, score

BOOTSTRAP = 1000
TOKENS_PER_PASS = 8192  # of a next-token forward; bounds memory


def choose_positions(corpus, scores, count, seed):
    """`count` held-out positions for each split -> positions (n, 3), {split: indices into them}."""
    positions = load_positions(corpus, scores, SPLITS["easy"], "val")
    positions = positions[np.random.default_rng(seed).permutation(len(positions))]
    entropy = np.load(scores, mmap_mode="r")[positions[:, 0], 0]
    splits = {name: np.flatnonzero(entropy > threshold)[:count] for name, threshold in SPLITS.items()}
    used = np.unique(np.concatenate(list(splits.values())))  # nested splits: most positions serve twice
    places = {name: np.searchsorted(used, chosen) for name, chosen in splits.items() if len(chosen)}
    return positions[used], places


@torch.no_grad()
def ntp_hits(model, corpus, positions, room):
    """(n, 3) positions -> (n,) 1.0 where the likeliest token after (at most `room` tokens of) context is true."""
    hits = []
    contexts = [corpus.tokens[max(start, t - room):t].tolist() for t, start, _ in positions]
    with tqdm(total=len(contexts), desc="next token", unit="position", disable=None) as bar:
        for batch in micro_batches(contexts, TOKENS_PER_PASS, len):
            layout = make_layout([(len(context), []) for context in batch], model.device)
            tokens = torch.tensor(sum(batch, []), device=model.device)
            hidden = model.packed_hidden(tokens, layout)[layout.last_rows]
            hits += (hidden @ model.head.to(hidden.dtype).T).argmax(dim=-1).tolist()
            bar.update(len(batch))
    return (np.array(hits) == corpus.tokens[positions[:, 0]]).astype(float)


def reasoning_groups(model, tokenizer, corpus, positions, args):
    """(n, 3) positions -> a Group of args.samples scored rollouts for each."""
    template = template_ids(tokenizer, args.template)
    room = min(args.max_prompt_tokens, model.config.max_positions - args.max_new_tokens)
    questions = [make_question(corpus, tokenizer, position, template, room) for position in positions]
    with rollout_bar(len(questions) * args.samples, "reasoning") as progress:
        rollouts = generate(model, [q.prompt for q in questions], args.samples, args.max_new_tokens,
                            args.temperature, stop_ids(tokenizer), (args.seed, 1 << 20), progress=progress,
                            max_rows=args.max_rows, kv_gb=args.kv_gb,
                            truncate=truncation(args.top_k, args.top_p, args.min_p))
    return [score(tokenizer, question, r) for question, r in zip(questions, rollouts)]


def interval(values, documents, seed):
    """(n,) values and the document of each -> ends of the 95 % bootstrap interval of their mean."""
    _, document = np.unique(documents, return_inverse=True)
    sums, counts = np.bincount(document, weights=values), np.bincount(document)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(BOOTSTRAP, len(sums)))
    return np.percentile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), [2.5, 97.5])


def result(checkpoint, mode, split, values, documents, seed, **more):
    """One line of results.json; accuracies in percent."""
    low, high = interval(values, documents, seed)
    percent = lambda x: round(100 * float(x), 2)
    line = dict(checkpoint=checkpoint, mode=mode, split=split, accuracy=percent(values.mean()),
                low=percent(low), high=percent(high), n=len(values), seed=seed)
    return line | {name: percent(x.mean()) for name, x in more.items()}


def evaluate(checkpoint, corpus, positions, splits, args):
    """One checkpoint on all positions -> lines of results.json."""
    tokenizer = Tokenizer.load(checkpoint)
    corpus.check(tokenizer, checkpoint)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model = GPT.from_pretrained(checkpoint, dtype, args.device)
    documents, results = positions[:, 1], []
    if args.mode in ("ntp", "both"):
        room = min(model.config.max_positions, args.max_prompt_tokens)  # as much context as reasoning gets
        hits = ntp_hits(model, corpus, positions, room)
        results += [result(checkpoint, "ntp", split, hits[i], documents[i], args.seed)
                    for split, i in splits.items()]
    if args.mode in ("reasoning", "both"):
        groups = reasoning_groups(model, tokenizer, corpus, positions, args)
        rewards = np.array([g.rewards for g in groups])                                  # (n, K)
        boxed = np.array([[p is not None for p in g.predictions] for g in groups])
        length = np.array([np.mean([len(r.tokens) for r in g.rollouts]) for g in groups])
        for split, i in splits.items():
            line = result(checkpoint, "reasoning", split, rewards[i].mean(axis=1), documents[i], args.seed,
                          pass_at_k=rewards[i].max(axis=1), format_rate=boxed[i])
            results.append(line | dict(samples=args.samples, temperature=args.temperature,
                                       len_mean=round(length[i].mean(), 1)))
        if args.dump:
            records = [sample_record(tokenizer, 0, group, 0) for group in groups]
            append(args.dump, [dict(checkpoint=checkpoint) | record for record in records])
    return results


def print_table(results):
    """One row for each checkpoint and mode: accuracy [95 % interval] on each split."""
    splits = [s for s in SPLITS if any(r["split"] == s for r in results)]
    rows = list(dict.fromkeys((r["checkpoint"], r["mode"]) for r in results))
    width = max(len(checkpoint) for checkpoint, _ in rows)
    titles = "  ".join(f"{s + f' > {SPLITS[s]}':>20}" for s in splits)
    print(f"\n{'next-token accuracy, %':{width}}  {'mode':9}  {titles}")
    for row in rows:
        cells = {r["split"]: f"{r['accuracy']:.1f} [{r['low']:.1f}, {r['high']:.1f}]" for r in results
                 if (r["checkpoint"], r["mode"]) == row}
        print(f"{row[0]:{width}}  {row[1]:9}  " + "  ".join(f"{cells[s]:>20}" for s in splits))
    n = {r["split"]: r["n"] for r in results}
    print(f"{'positions':{width}}  {'':9}  " + "  ".join(f"{n[s]:>20}" for s in splits))


def parse_args():
    parser = argparse.ArgumentParser(description="Next-token accuracy with and without reasoning.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("task", choices=["lm"], help="lm: next tokens of held-out text")
    add = parser.add_argument
    add("--corpus", required=True, help="folder written by data/prepare.py and scored by data/filter.py")
    add("--checkpoints", required=True, nargs="+", help="checkpoint folders, side by side")
    add("--proxy", default=None,
        help="checkpoint whose entropies split the positions; default: the only one there is")
    add("--mode", default="both", choices=["ntp", "reasoning", "both"])
    add("--positions", type=int, default=200, help="held-out positions for each split")
    add("--samples", type=int, default=1, metavar="K", help="thoughts for each position")
    add("--temperature", type=float, default=0.8, help="of sampling; 0 is greedy")
    add("--template", default="v0", help="prompt of data/prompt.py: v0 to v6, or short")
    add("--max-prompt-tokens", type=int, default=4096, help="longer contexts lose their beginning")
    add("--max-new-tokens", type=int, default=8192, help="tokens of a response")
    add("--top-k", type=int, default=0, help="sample only from the K most probable tokens; 0: all")
    add("--top-p", type=float, default=1.0, help="only from the fewest tokens that have this much probability")
    add("--min-p", type=float, default=0.0, help="only from tokens with this share of the best one's probability")
    add("--max-rows", type=int, default=256, help="rollouts decoded at a time")
    add("--kv-gb", type=float, default=None, help="memory for keys and values; default: half of what is there")
    add("--out", default=None, help="write the table here as JSON")
    add("--dump", default=None, help="append one rollout for each position here, as JSON lines")
    add("--seed", type=int, default=0, help="chooses positions and thoughts")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    check_range(args, 1, "positions samples max_prompt_tokens max_new_tokens max_rows")
    check_range(args, 0, "temperature seed")
    truncation(args.top_k, args.top_p, args.min_p)
    return args


if __name__ == "__main__":
    sys.excepthook = speak_once
    args = parse_args()
    corpus = load_corpus(args.corpus)
    positions, splits = choose_positions(corpus, find_scores(corpus, args.proxy), args.positions, args.seed)
    results = []
    for checkpoint in args.checkpoints:
        print(f"{checkpoint}: {len(positions)} held-out positions", flush=True)
        results += evaluate(checkpoint, corpus, positions, splits, args)
    print_table(results)
    if args.out:
        write(args.out, json.dumps(results, indent=1))
        print(f"written to {args.out}")
