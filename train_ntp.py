"""Next-token prediction: the base that RPT starts from, the warm start, and the control beside it.

    python train_ntp.py --corpus C --out-dir runs/base
            from scratch: a small model (SMALL), 0.6 million parameters on the demo's corpus
    python train_ntp.py --corpus C --out-dir runs/warm --init DIR --strings S.jsonl \\
                        --documents-per-step 0
            warm start: learn the form <think>..</think>\\boxed{..}
    python train_ntp.py --corpus C --out-dir runs/control --init DIR --match-compute runs/rpt
            control: plain text for as many FLOPs as that RPT run has spent
            (--entropy-threshold 1: with a loss only on tokens that RPT may train on)

A step trains on documents and, if given, on think/answer strings (data/warmstart.py): a prompt
without a loss, then text with a loss. The loss is the mean over all target tokens of the step,
whatever the micro-batches and ranks. torchrun works as it does for train_rpt.py.
"""
import json
import math
import sys
from functools import partial

from plumbing import flags, parallel  # before torch: how its threads wait
import numpy as np
import torch
from tqdm import tqdm

from data.corpus import load_corpus
from data.positions import find_scores, load_positions, shuffled
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig
from plumbing.batch import Example, count_tokens, idle_micro_batch, pack
from plumbing.checkpoint import Run
from plumbing.log import append, flops_of_run
from plumbing.optimizer import clip_gradients, make_optimizer

# The model of the demo: it can learn to think one step at a time, but not all steps at once.
SMALL = dict(width=128, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=32, ffn_width=384,
             max_positions=256)
BETAS = 0.9, 0.95      # of AdamW
LINE_EVERY = 100       # steps between lines where there is no terminal for a bar


def document_examples(corpus, documents, end_id, max_tokens, problem_weight, rng, counts=None,
                      bos=()):
    """Documents -> Examples: the first token is the prompt, the rest of the text has a loss.

    A document longer than max_tokens gives a random window, which begins with the tokenizer's BOS,
    if there is one. problem_weight: loss weight of tokens before the solution. counts: for each
    token of the corpus, whether it has a loss; None: all do.
    """
    examples = []
    for start, solution, end, _ in corpus.docs[documents]:
        ids = [*corpus.tokens[start:end].tolist(), end_id]
        weights = [problem_weight] * (solution - start) + [1.0] * (len(ids) - solution + start)
        if counts is not None:
            weights = [w * c for w, c in zip(weights, counts[start:end].tolist() + [False])]
        first = int(rng.integers(max(len(ids) - max_tokens, 0) + 1))
        ids, weights = ids[first:first + max_tokens], weights[first:first + max_tokens]
        ids[:len(bos)] = bos
        weights[:len(bos)] = [0.0] * len(bos)
        examples.append(make_example(ids[:1], ids[1:], weights[1:]))
    return examples


def make_example(prompt, text, weights):
    """Text as a "rollout" that was not sampled; its loss weights take the place of advantages."""
    return Example(prompt, [text], [weights], [[0.0] * len(text)])


def read_strings(path, config):
    """Think/answer strings -> [Example], one for each line.

    A line is {"prompt": ids, "response": ids}, or has several "responses" to the same prompt, which
    is then computed once.
    """
    examples = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            prompt, responses = parse_strings(line, config.vocab_size)
            if not prompt:
                raise ValueError(f"{path} line {number}: expected an object with 'prompt' and "
                                 "'response' (or 'responses', a list of them), non-empty lists of "
                                 f"ids below {config.vocab_size}; data/warmstart.py writes such "
                                 "files")
            length = len(prompt) + max(map(len, responses))
            if length > config.max_positions:
                raise ValueError(f"{path} line {number}: {length} tokens, but the model has "
                                 f"{config.max_positions} positions")
            examples.append(Example(prompt, responses, [[1.0] * len(r) for r in responses],
                                    [[0.0] * len(r) for r in responses]))
    return examples


def parse_strings(line, vocab_size):
    """A line of JSON -> prompt ids, [response ids, ...]; empty lists if it holds anything else."""
    try:
        record = json.loads(line)
        prompt = record["prompt"]
        responses = record["responses"] if "responses" in record else [record["response"]]
        ids = sum(responses, prompt)
        are_ids = {*map(type, ids)} == {int} and 0 <= min(ids) <= max(ids) < vocab_size
        if prompt and responses and all(responses) and are_ids:
            return prompt, responses
    except (ValueError, KeyError, TypeError):
        pass
    return [], []


def ntp_update(model, optimizer, batches, total_weight, grad_clip):
    """One step on this rank's MicroBatches -> loss (nats per weighted token), gradient norm.

    total_weight: of the tokens of all ranks, so that micro-batches and ranks change nothing.
    """
    loss = torch.zeros((), device=model.device)
    optimizer.zero_grad()
    for batch in parallel.padded(batches, idle_micro_batch(model.device)):
        logprobs = model.logprobs(batch.tokens, batch.layout)                        # (S,)
        part = -(batch.advantages * logprobs).sum() / total_weight
        part.backward()
        loss += part.detach()
    [loss] = parallel.total(loss.item())
    model.finite(torch.tensor(loss))
    grad_norm = clip_gradients(model, grad_clip)
    if not math.isfinite(grad_norm):
        raise ValueError(f"gradient norm is {grad_norm}: the update was not applied; lower --lr")
    optimizer.step()
    return loss, grad_norm


class Lessons:
    """What each step trains on: a function of the seed and the step."""

    def __init__(self, args, corpus, tokenizer, config):
        self.args = args
        self.corpus = corpus
        self.bos, self.end_id = tokenizer.bos, tokenizer.eos_id
        self.max_tokens = min(args.max_tokens, config.max_positions)
        self.documents = np.flatnonzero(corpus.docs[:, 3] == 0)
        self.counts = None
        if args.entropy_threshold is not None:
            self.keep_positions()
        self.strings = read_strings(args.strings, config) if args.strings else []
        self.n_strings = args.strings_per_step if self.strings else 0
        if args.documents_per_step + self.n_strings == 0:
            raise ValueError("nothing to train on: --documents-per-step is 0 and there are no "
                             "--strings")

    def keep_positions(self):
        """Keep the loss on tokens above --entropy-threshold, and the documents that have one."""
        scores = find_scores(self.corpus, self.args.proxy)
        positions = load_positions(self.corpus, scores, self.args.entropy_threshold, "train")
        self.counts = np.zeros(len(self.corpus.tokens), dtype=bool)
        self.counts[positions[:, 0]] = True
        starts = self.corpus.docs[self.documents, 0]
        self.documents = self.documents[np.isin(starts, positions[:, 1])]

    def cursor_at(self, step):
        """What so many steps use, if all are of the size that is asked for now."""
        return dict(documents=step * self.args.documents_per_step, strings=step * self.n_strings)

    def examples(self, step, cursor):
        """The Examples of one step, for all ranks. cursor: what the steps before it have used."""
        seed, n = self.args.seed, self.args.documents_per_step
        documents = self.documents[shuffled(len(self.documents), cursor["documents"], n, seed)]
        examples = document_examples(self.corpus, documents, self.end_id, self.max_tokens,
                                     self.args.problem_weight, np.random.default_rng((seed, step)),
                                     self.counts, self.bos)
        if self.n_strings:
            chosen = shuffled(len(self.strings), cursor["strings"], self.n_strings, seed)
            examples += [self.strings[i] for i in chosen]
        return examples

    def tokens_per_step(self):
        """The mean over 100 steps."""
        return np.mean([sum(map(count_tokens, self.examples(step, self.cursor_at(step))))
                        for step in range(100)])


def learning_rate(step, args):
    """Linear warm-up, then constant, then linear to zero over the second half."""
    warmup = (step + 1) / max(1, args.warmup_steps)
    decay = 2 * (args.steps - step) / args.steps
    return args.lr * min(1, warmup, decay)


def parse_args():
    parser = flags.Parser("Next-token prediction: base model, warm start, control.")
    add, at_least = parser.add_argument, flags.at_least
    add("--corpus", required=True, help="folder written by data/prepare.py")
    add("--out-dir", required=True, help="folder of this run")
    add("--init", help="checkpoint folder to start from; none: a small model at random")
    add("--strings", help="JSON lines of think/answer strings (data/warmstart.py)")
    add("--steps", type=at_least(1), default=1000, help="updates")
    add("--match-compute", metavar="RUN",
        help="instead of --steps: as many FLOPs as this RPT run has spent")
    add("--updates-only", action="store_true",
        help="--match-compute: count only that run's updates, where --strings had to be sampled "
             "as well")
    add("--entropy-threshold", type=at_least(0, float),
        help="a loss only on tokens that RPT may train on, above this entropy, nats; default: all")
    add("--proxy", help="--entropy-threshold: whose entropies; default: the only one there is")
    add("--documents-per-step", type=at_least(0), default=48, help="documents in an update")
    add("--strings-per-step", type=at_least(0), default=48,
        help="lines of --strings in an update, if there are any")
    add("--max-tokens", type=at_least(2), default=256,
        help="tokens of a document; a longer one gives a random window of this size")
    add("--problem-weight", type=at_least(0, float), default=1.0,
        help="loss weight of tokens before the solution")
    add("--lr", type=at_least(0, float), default=3e-3, help="peak learning rate of AdamW")
    add("--warmup-steps", type=at_least(0), default=50, help="updates")
    add("--grad-clip", type=at_least(1e-3, float), default=1.0, help="largest gradient norm")
    flags.add_update_flags(add)
    flags.add_run_flags(add, save_every=200)
    return parser.parse_args()


if __name__ == "__main__":
    sys.excepthook = flags.speak_once
    args = parse_args()
    device = parallel.start(args.device)
    corpus = load_corpus(args.corpus)
    run = Run(args)
    source = run.checkpoint or args.init
    tokenizer = Tokenizer.load(source or f"{args.corpus}/tokenizer", for_model=True)
    corpus.check(tokenizer, source or args.corpus)
    torch.manual_seed(args.seed)
    compute_dtype = flags.compute_dtype(args)
    shard = partial(parallel.shard, reshard=args.reshard, ranks_per_copy=args.ranks_per_copy)
    if source:
        model = GPT.from_pretrained(source, device=device, compute_dtype=compute_dtype, shard=shard)
    else:
        model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **SMALL), compute_dtype).to(device)
        shard(model)
    model.checkpoint_activations = args.checkpoint_activations
    optimizer = make_optimizer(model, args.lr, BETAS, bf16_moments=args.bf16_moments)
    lessons = Lessons(args, corpus, tokenizer, model.config)
    parameters = sum(weight.numel() for weight in model.parameters())
    if args.match_compute:
        budget = flops_of_run(args.match_compute, parameters, args.updates_only)
        args.steps = max(1, round(budget / (6 * parameters * lessons.tokens_per_step())))
        parallel.print0(f"{args.match_compute} spent {budget:.2e} FLOPs; that is {args.steps} "
                        "steps here")
    run.open(model, optimizer)
    # A new run has no cursor, and neither has a checkpoint of an older version.
    run.cursor = lessons.cursor_at(run.step) | (run.cursor or {})
    strings = sum(len(example.rollouts) for example in lessons.strings)
    parallel.print0(f"{parameters:,} parameters, {len(lessons.documents):,} documents, "
                    f"{strings:,} strings for {len(lessons.strings):,} prompts, "
                    f"steps {run.step} to {args.steps}")

    bar = tqdm(range(run.step, args.steps), initial=run.step, total=args.steps, desc="ntp",
               disable=parallel.NO_BAR)
    for step in bar:
        start = parallel.clock()
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # All ranks make the same examples, and each packs its share of them.
        examples = lessons.examples(step, run.cursor)
        total_weight = sum(sum(map(sum, example.advantages)) for example in examples) or 1
        mine = examples[parallel.share(len(examples))]
        batches = pack(mine, args.tokens_per_micro_batch, device)
        loss, grad_norm = ntp_update(model, optimizer, batches, total_weight, args.grad_clip)

        seconds, tokens = parallel.clock() - start, sum(map(count_tokens, examples))
        run.step = step + 1
        run.cursor = {name: run.cursor[name] + n for name, n in lessons.cursor_at(1).items()}
        is_over = run.is_over()
        speed = f"{tokens / seconds:,.0f} tok/s"
        bar.set_postfix_str(f"loss {loss:.3f}, {speed}")
        if parallel.RANK == 0:
            append(f"{args.out_dir}/metrics.jsonl", [dict(
                step=run.step, loss=loss, grad_norm=grad_norm, lr=lr, tokens=tokens,
                flops=6 * parameters * tokens, train_tok_s=tokens / seconds, dt_train=seconds)])
        if bar.disable and run.step % LINE_EVERY == 0:
            parallel.print0(f"step {run.step:05d}/{args.steps:05d} | loss {loss:.3f} | {speed}")
        if is_over or run.is_due():
            run.save(model, tokenizer, optimizer)
        if is_over:
            break
    bar.close()
    run.farewell()
