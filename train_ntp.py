"""Next-token prediction: the base that RPT starts from, the warm start, and the control it is compared with.

    python train_ntp.py --corpus C --out-dir runs/base
            from scratch: about half a million parameters
    python train_ntp.py --corpus C --out-dir runs/warm --init DIR --strings S.jsonl --documents-per-step 0
            warm start: learn the form <think>..</think>\\boxed{..}
    python train_ntp.py --corpus C --out-dir runs/control --init DIR --match-compute runs/rpt
            control: plain text for as many FLOPs as that RPT run has spent
            (--entropy-threshold 1: with a loss only for tokens that RPT may train on)

A step sees documents and, if given, think/answer strings (data/warmstart.py makes them from any text): a prompt
without loss, a response with loss. The loss is the mean over all target tokens of the step, whatever the
micro-batches and ranks. torchrun --standalone --nproc_per_node=8 works as it does for train_rpt.py.
"""
import argparse
import json
import math
import sys
import time
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from plumbing import parallel
from plumbing.checkpoint import (append, catch_interrupts, checkpoint_to_resume, latest_checkpoint, load_trainer, open_run,
                        save_checkpoint)
from plumbing.flags import speak_once
from data.filter import find_scores, load_positions
from data.prepare import load_corpus
from data.tokenizer import Tokenizer
from kernels.attention import make_layout
from model import GPT, GPTConfig
from plumbing.optimizer import make_optimizer
from plumbing.parallel import print0

# The small model of the demo: enough to think one step at a time, too shallow to think five at once.
SMALL = dict(width=128, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=32, ffn_width=384, max_positions=256)


def shuffled(n, start, count, seed):
    """Items start .. start + count of an endless walk over range(n), every round in a new order."""
    rounds = range(start // n, (start + count) // n + 1)
    walk = np.concatenate([np.random.default_rng((seed, r)).permutation(n) for r in rounds])
    return walk[start - rounds.start * n:][:count]


def document_sequences(corpus, indices, end_id, max_tokens, problem_weight, rng, counts=None):
    """Documents -> [(prompt ids, response ids, weights)]; the whole text is 'response' to its first token.

    counts: a bool for each token of the corpus, whether it has a loss; None: all have.
    """
    sequences = []
    for start, solution, end, _ in corpus.docs[indices]:
        ids = [*corpus.tokens[start:end].tolist(), end_id]
        weights = [problem_weight] * (solution - start) + [1.0] * (len(ids) - solution + start)
        if counts is not None:
            weights = [w * c for w, c in zip(weights, counts[start:end].tolist() + [False])]
        first = int(rng.integers(max(len(ids) - max_tokens, 0) + 1))  # of a long document a window
        ids, weights = ids[first:first + max_tokens], weights[first:first + max_tokens]
        sequences.append((ids[:1], ids[1:], weights[1:]))
    return sequences


def read_strings(path, config):
    """Think/answer strings, one {"prompt": ids, "response": ids} a line -> [(prompt, response, weights)]."""
    strings, vocab = [], config.vocab_size
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                prompt, response = record["prompt"], record["response"]
                ids = prompt + response
                valid = (prompt and response and {*map(type, ids)} == {int}
                         and 0 <= min(ids) <= max(ids) < vocab)
            except (ValueError, KeyError, TypeError):
                valid = False
            if not valid:
                raise ValueError(f"{path} line {number}: expected an object with 'prompt' and 'response', "
                                 f"non-empty lists of ids below {vocab}; data/warmstart.py writes such files")
            if len(ids) > config.max_positions:
                raise ValueError(f"{path} line {number}: {len(ids)} tokens, but the model has "
                                 f"{config.max_positions} positions")
            strings.append((prompt, response, [1.0] * len(response)))
    return strings


def micro_batches(groups, tokens, size):
    """Cut a list of groups into runs of at most `tokens` tokens, but at least one group. size: of a group."""
    batch, total = [], 0
    for group in groups:
        if batch and total + size(group) > tokens:
            yield batch
            batch, total = [], 0
        batch.append(group)
        total += size(group)
    if batch:
        yield batch


def weighted_loss(model, sequences):
    """[(prompt, response, weights)] -> sum over response tokens of weight x negative log-likelihood, nats."""
    device = model.device
    layout = make_layout([(len(prompt), [len(response)]) for prompt, response, _ in sequences], device)
    tokens = torch.tensor([t for prompt, response, _ in sequences for t in prompt + response], device=device)
    weights = torch.tensor([w for _, _, weights in sequences for w in weights], device=device)
    logprobs, _ = model.logprobs(tokens, layout)                                         # (S,)
    return -(weights * logprobs).sum()


def join_idly(model):
    """A forward and a backward without effect: other ranks still have work, and FSDP needs everyone."""
    logprobs, _ = model.logprobs(torch.zeros(2, dtype=torch.long, device=model.device),
                                 make_layout([(1, [1])], model.device))
    (0 * logprobs.sum()).backward()


def ntp_step(model, optimizer, sequences, tokens_per_micro_batch, grad_clip):
    """One update on this rank's share of `sequences` -> loss (nats per weighted token), gradient norm."""
    total = sum(sum(weights) for _, _, weights in sequences) or 1               # of all ranks: one normaliser
    loss = torch.zeros((), device=model.device)
    optimizer.zero_grad()
    size = lambda sequence: len(sequence[0]) + len(sequence[1])
    mine = sequences[parallel.share(len(sequences))]
    for batch in parallel.padded(list(micro_batches(mine, tokens_per_micro_batch, size))):
        if batch is None:
            join_idly(model)
            continue
        part = weighted_loss(model, batch) / total
        part.backward()
        loss += part.detach()
    grad_norm = clip_gradients(model, grad_clip)
    if not math.isfinite(grad_norm):
        raise ValueError(f"gradient norm is {grad_norm}: the update was not applied; lower --lr")
    optimizer.step()
    return parallel.sum_over_ranks(loss).item(), grad_norm


def clip_gradients(model, largest):
    """Scale the gradients so that their norm, over all ranks, is at most this -> the norm before."""
    return parallel.whole(torch.nn.utils.clip_grad_norm_(model.parameters(), largest)).item()


def learning_rate(step, args):
    """Linear warm-up, constant, linear to zero over the second half."""
    return args.lr * min(1, (step + 1) / max(1, args.warmup_steps), 2 * (args.steps - step) / args.steps)


def flops_of_run(run, parameters, updates_only=False):
    """FLOPs an RPT run has spent on sampling and updates, or on updates alone, from its metrics.jsonl."""
    with open(f"{run}/metrics.jsonl") as file:
        steps = [json.loads(line) for line in file]
    return sum(6 * parameters * step["trained_tokens"] if updates_only else step["flops"] for step in steps)


def check_range(args, low, names):
    """ValueError for the first of these arguments that is below `low`, infinite or NaN."""
    for name in names.split():
        value = getattr(args, name)
        if not low <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {low} and finite, got {value}")


def parse_args():
    parser = argparse.ArgumentParser(description="Next-token prediction: base model, warm start, control.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--corpus", required=True, help="folder written by data/prepare.py")
    add("--out-dir", required=True, help="folder of this run")
    add("--init", default=None, help="checkpoint folder to start from; none: a small model at random")
    add("--strings", default=None, help="JSONL of think/answer strings (data/warmstart.py)")
    add("--steps", type=int, default=1000, help="updates")
    add("--match-compute", default=None, metavar="RUN",
        help="instead of --steps: as many FLOPs as this RPT run has spent")
    add("--updates-only", action="store_true",
        help="--match-compute: count that run's updates alone (its sampling stands against sampled strings)")
    add("--entropy-threshold", type=float, default=None,
        help="a loss only for tokens that RPT may train on, above this entropy in nats; default: for all")
    add("--proxy", default=None, help="--entropy-threshold: whose entropies; default: the only one there is")
    add("--documents-per-step", type=int, default=48, help="documents in an update")
    add("--strings-per-step", type=int, default=48, help="strings in an update, if there are any")
    add("--max-tokens", type=int, default=256, help="of a longer document a random window of so many tokens")
    add("--problem-weight", type=float, default=1.0, help="loss weight of tokens before the solution")
    add("--lr", type=float, default=3e-3, help="peak learning rate of AdamW(0.9, 0.95)")
    add("--warmup-steps", type=int, default=50, help="updates")
    add("--grad-clip", type=float, default=1.0, help="largest gradient norm")
    add("--tokens-per-micro-batch", type=int, default=16384, help="bounds memory; changes nothing else")
    add("--checkpoint-activations", action="store_true",
        help="keep one activation a block and compute the rest again in the backward: a quarter more work")
    add("--bf16-moments", action="store_true", help="AdamW's moments in bf16: 4 bytes a parameter less")
    add("--reshard", action="store_true",
        help="above one rank: free a block's gathered weights after its forward, gather them again")
    add("--ranks-per-copy", type=int, default=0, metavar="N",
        help="above one rank: N of them share the weights, the others hold copies (HSDP); 0: all share")
    add("--save-every", type=int, default=200, help="updates between checkpoints")
    add("--resume", action="store_true", help="continue the run in --out-dir, if there is one")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    check_range(args, 2, "max_tokens")
    check_range(args, 1, "steps tokens_per_micro_batch save_every")
    check_range(args, 0, "documents_per_step strings_per_step problem_weight lr warmup_steps ranks_per_copy seed")
    check_range(args, 1e-3, "grad_clip")
    return args


if __name__ == "__main__":
    sys.excepthook = speak_once
    args = parse_args()
    device = parallel.start(args.device)
    corpus = load_corpus(args.corpus)
    train_docs = np.flatnonzero(corpus.docs[:, 3] == 0)
    checkpoint = checkpoint_to_resume(args)
    source = checkpoint or args.init
    tokenizer = Tokenizer.load(source or f"{args.corpus}/tokenizer")
    corpus.check(tokenizer, source or args.corpus)
    torch.manual_seed(args.seed)
    small = GPTConfig(vocab_size=tokenizer.vocab_size, **SMALL)
    compute_dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    shard = partial(parallel.shard, reshard=args.reshard, ranks_per_copy=args.ranks_per_copy)
    if source:
        model = GPT.from_pretrained(source, device=device, compute_dtype=compute_dtype, shard=shard)
    else:
        model = GPT(small, compute_dtype).to(device)
        shard(model)
    model.checkpoint_activations = args.checkpoint_activations
    optimizer = make_optimizer(model, args.lr, (0.9, 0.95), weight_decay=0.01, bf16_moments=args.bf16_moments)
    step = load_trainer(checkpoint, model, optimizer)["step"] if checkpoint else 0
    counts = None
    if args.entropy_threshold is not None:
        positions = load_positions(corpus, find_scores(corpus, args.proxy), args.entropy_threshold, "train")
        counts = np.zeros(len(corpus.tokens), dtype=bool)
        counts[positions[:, 0]] = True
        train_docs = train_docs[np.isin(corpus.docs[train_docs, 0], positions[:, 1])]
    strings = read_strings(args.strings, model.config) if args.strings else []
    n_documents, n_strings = args.documents_per_step, args.strings_per_step if strings else 0
    if n_documents + n_strings == 0:
        raise ValueError("nothing to train on: --documents-per-step is 0 and there are no --strings")
    max_tokens = min(args.max_tokens, model.config.max_positions)
    parameters = sum(p.numel() for p in model.parameters())

    def batch(step):
        """The sequences of one update: a function of the seed and the step."""
        rng = np.random.default_rng((args.seed, step))
        documents = train_docs[shuffled(len(train_docs), step * n_documents, n_documents, args.seed)]
        chosen = shuffled(len(strings), step * n_strings, n_strings, args.seed) if n_strings else []
        return document_sequences(corpus, documents, tokenizer.eos_id, max_tokens, args.problem_weight, rng,
                                  counts) + [strings[i] for i in chosen]

    count = lambda sequences: sum(len(prompt) + len(response) for prompt, response, _ in sequences)
    if args.match_compute:
        budget = flops_of_run(args.match_compute, parameters, args.updates_only)
        tokens = np.mean([count(batch(step)) for step in range(100)])                    # of an update
        args.steps = max(1, round(budget / (6 * parameters * tokens)))
        print0(f"{args.match_compute} spent {budget:.2e} FLOPs; that is {args.steps} steps here")
    parallel.on_rank_0(lambda: open_run(args, checkpoint))
    print0(f"{parameters:,} parameters, {len(train_docs):,} documents, {len(strings):,} strings, "
           f"steps {step} to {args.steps}")
    interrupted = catch_interrupts()
    bar = tqdm(range(step, args.steps), initial=step, total=args.steps, desc="ntp",
               disable=None if parallel.RANK == 0 else True)
    for step in bar:
        start = time.perf_counter()
        sequences = batch(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        loss, grad_norm = ntp_step(model, optimizer, sequences, args.tokens_per_micro_batch, args.grad_clip)
        seconds, tokens = time.perf_counter() - start, count(sequences)
        bar.set_postfix_str(f"loss {loss:.3f}, {tokens / seconds:,.0f} tok/s")
        stop = any(parallel.gather_lists([bool(interrupted)]))
        if parallel.RANK == 0:
            record = dict(step=step + 1, loss=loss, grad_norm=grad_norm, lr=group["lr"], tokens=tokens,
                          flops=6 * parameters * tokens, train_tok_s=tokens / seconds, dt_train=seconds)
            append(f"{args.out_dir}/metrics.jsonl", [record])
            if (step + 1) % 100 == 0 and bar.disable:
                speed = f"{tokens / seconds:,.0f} tok/s"
                print0(f"step {step + 1:05d}/{args.steps:05d} | loss {loss:.3f} | {speed}")
        if stop or (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_checkpoint(args.out_dir, step + 1, model, tokenizer, optimizer)
        if stop:
            print0(f"\nstopped after step {step + 1} and saved; the same command with --resume continues")
            sys.exit(0)
    print0(f"done: {latest_checkpoint(args.out_dir)}")
