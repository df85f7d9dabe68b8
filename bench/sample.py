"""Every speed that the README claims, beside what people would otherwise use, in one run.

    python bench.py kernels                          # on a GPU: our Triton kernels and their alternatives
    python bench.py kernels --rows 3,6 --json bench.json
    python bench.py sample                           # here: the sampler, 20 minutes on two cores
    python bench.py sample --rows 2,3 --repeats 3
    python bench.py train                            # here: the update, on the CPU; 11 GB of memory

    sample, row 1  8 prompts x 8 rollouts x 64 tokens, shapes of SmolLM2-135M, against transformers' generate
               2  lengths as thoughts have them: refilled rows against rows that wait for the slowest
               3  the embedded model in 256 rows: tokens/s, and what its matrix products alone would allow
               4  on a GPU: a decode step of Qwen2.5 shapes, against the time to read weights and cache once
    train          the update and the whole step; its rows are in bench_train.py

Models have random weights: speed does not depend on them. Ours and the alternative take turns, each once
unmeasured; times are medians, ratios are of medians, above 1 ours is faster.
"""
import argparse
import itertools
import sys
from pathlib import Path
import tempfile
from datetime import datetime
from functools import partial
from unittest.mock import patch

if __name__ == "__main__":  # the repository, not bench/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
import torch
import torch.nn.functional as F

import kernels
import sample
from bench.train import QWEN, SMOLLM2, TRAIN, limits, medians, random_prompts
from plumbing.flags import speak_once
from bench.kernels import bench_kernels, commit
from model import GPT, GPTConfig
from train_ntp import SMALL, check_range

EMBEDDED = GPTConfig(vocab_size=390, **SMALL | dict(max_positions=640))  # of the demo, with room for row 2


def against_transformers(repeats, config=SMOLLM2, lengths=(512, 64), new=64):
    from transformers import AutoModelForCausalLM
    model = GPT(config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for length in lengths:
        prompts = random_prompts(config, 8, length)
        ours, other = medians(
            repeats, lambda seed: sample.generate(model, prompts, 8, new, 1.0, [], seed),
            lambda seed: theirs.generate(
                torch.tensor(prompts), do_sample=True, top_k=0, num_return_sequences=8, max_new_tokens=new,
                min_new_tokens=new, eos_token_id=None, pad_token_id=0,
                attention_mask=torch.ones(8, length).long()))
        print(f"| 1 | prompts of {length} | {ours:.2f} s, {64 * new / ours:,.0f} tok/s | "
              f"transformers {other:.2f} s | {other / ours:.2f} |", flush=True)


def with_random_lengths(mean, stop):
    """sample.draw_next that ends a rollout with probability 1 / mean after every token."""
    real = sample.draw_next

    def draw_next(model, hidden, bits, *rest):
        tokens, logprobs = real(model, hidden, bits, *rest)
        ends = (sample.mix(bits) >> 11 & (1 << 53) - 1) < (1 << 53) / mean
        return torch.where(ends, stop, torch.where(tokens == stop, stop + 1, tokens)), logprobs

    return patch.object(sample, "draw_next", draw_next)


def against_waiting(repeats, config=EMBEDDED, rows=64, count=128, mean=64, cap=512):
    model, prompts, stats, lengths = GPT(config), random_prompts(config, count, 64), {}, []

    def refilled(seed):
        rollouts = sample.generate(model, prompts, 8, cap, 1.0, [0], seed, max_rows=rows, stats=stats)
        lengths[:] = [len(rollout.tokens) for group in rollouts for rollout in group]

    def in_batches(seed):
        for first in range(0, count, rows // 8):
            sample.generate(model, prompts[first:first + rows // 8], 8, cap, 1.0, [0], seed,
                            first_prompt=first, max_rows=rows)

    def waiting(seed):
        with patch.object(sample.Cache, "keep_live", lambda cache: None):
            in_batches(seed)

    with with_random_lengths(mean, 0):
        ours, other, dropping = medians(repeats, refilled, waiting, in_batches)
    mean = sum(lengths) / len(lengths)
    shape = f"{rows} rows, {len(lengths)} rollouts of {mean:.0f} tokens, {max(lengths)} at most"
    rate = f"{ours:.2f} s, {sum(lengths) / ours:,.0f} tok/s, {stats['occupancy']:.1%} of the rows in use"
    for what, seconds in (("wait", other), ("drop finished rows", dropping)):
        print(f"| 2 | {shape} | {rate} | batches that {what} {seconds:.2f} s | {seconds / ours:.2f} |",
              flush=True)


def against_products(repeats, config=EMBEDDED, rows=256, new=64):
    model, prompts, stats = GPT(config), random_prompts(config, rows // 4, 40), {}
    weights = [weight.detach() for weight in model.parameters() if weight.ndim == 2]  # one is the head, too
    x = {weight.shape[1]: torch.randn(rows, weight.shape[1]) for weight in weights}

    def products(_):
        for _ in range(new):
            for weight in weights:
                F.linear(x[weight.shape[1]], weight)

    ours, floor = medians(
        repeats, lambda seed: sample.generate(model, prompts, 4, new, 1.0, [], seed, stats=stats), products)
    rates = [f"{seconds:.2f} s, {rows * new / seconds:,.0f} tok/s" for seconds in (ours, floor)]
    print(f"| 3 | {rows} rows, prompts of 40, {new} tokens | {rates[0]} | products alone {rates[1]} | "
          f"{floor / ours:.2f} |", flush=True)


def against_bandwidth(repeats, configs=QWEN, batches=(64, 256), contexts=(1024, 4096), new=(32, 160),
                      device="cuda"):
    """A step is the difference of two lengths: no prefill. Prompts are shared by 8 rows and read once."""
    flops, bandwidth = limits(device)
    for title, config in configs.items():
        with torch.device(device):
            model = GPT(config, torch.bfloat16).to(torch.bfloat16)
        parameters = sum(weight.numel() for weight in model.parameters())
        token_bytes = 2 * config.n_layers * config.n_kv_heads * config.head_dim * 2
        for B, context, kind in itertools.product(batches, contexts, ("fast", "bitwise")):
            kernels.use(kind)
            prompts = random_prompts(config, B // 8, context)
            run = lambda tokens: lambda seed: sample.generate(model, prompts, 8, tokens, 1.0, [], seed,
                                                              max_rows=B)
            short, long = medians(repeats, *map(run, new))
            step = (long - short) / (new[1] - new[0])
            cached = token_bytes * (B // 8 * context + B * sum(new) / 2)
            floor = max(2 * parameters / bandwidth, 2 * parameters * B / flops) + cached / bandwidth
            print(f"| 4 | {title} {kind}, {B} rows, context {context} | {1e3 * step:.2f} ms a step, "
                  f"{B / step:,.0f} tok/s | weights and cache read once {1e3 * floor:.2f} ms | "
                  f"{floor / step:.2f} |", flush=True)


def bench_rows(tasks, args):
    """Run some rows: functions of the number of repeats. The last one needs a GPU."""
    (*here, last), gpu = tasks, torch.cuda.is_available()
    rows = args.rows.split(",") if args.rows else [*here, last] if gpu else here
    if not set(rows) <= tasks.keys():
        raise ValueError(f"--rows {args.rows}: expected numbers from 1 to {last} with commas between, "
                         "such as 1,3")
    if last in rows and not gpu:
        raise ValueError(f"--rows {last} is timed on a GPU, and torch finds none (CUDA)")
    asked = kernels.asked
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, fp32, commit {commit()}, "
          f"{datetime.now():%Y-%m-%d %H:%M}\npython {' '.join(sys.argv)}: medians of {args.repeats}\n\n"
          "| row | what | ours | alternative | alternative / ours |\n|---|---|---|---|---|", flush=True)
    for row in rows:
        kernels.use(asked)  # rows on a GPU leave theirs behind
        tasks[row](args.repeats)


SAMPLE = {"1": against_transformers, "2": against_waiting, "3": against_products, "4": against_bandwidth}
TASKS = {"kernels": bench_kernels, "sample": partial(bench_rows, SAMPLE), "train": partial(bench_rows, TRAIN)}


def parse_args():
    parser = argparse.ArgumentParser(description="Measure speed.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("task", choices=TASKS,
                        help="kernels: on a GPU, sample, train: on the CPU, last row on a GPU")
    add = parser.add_argument
    add("--rows", default=None,
        help="kernels: 1, 2 attention, 3 decoding, 4 log-probs, 5 sampling, 6 bits; sample: 1 transformers, "
             "2 refill, 3 embedded model, 4 bandwidth of a GPU; train: 1 shared prompts, 2 parts of a step, "
             "3 MFU of a GPU; default: all that run here")
    add("--repeats", type=int, default=None,
        help="sample, train: runs of which the median is taken; default: 5 for sample, 1 for train")
    add("--quick", action="store_true", help="kernels: one or two shapes a row")
    add("--minutes", type=float, default=8, help="kernels: begin no shape after this many minutes")
    add("--json", default=None, metavar="FILE",
        help="kernels: write times (ms), errors and peaks (MB) here, too")
    args = parser.parse_args()
    if args.repeats is None:
        args.repeats = 1 if args.task == "train" else 5  # a run of train takes minutes
    check_range(args, 1, "repeats")
    return args


if __name__ == "__main__":
    sys.excepthook = speak_once
    args = parse_args()
    TASKS[args.task](args)
