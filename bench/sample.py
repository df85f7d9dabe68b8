"""How fast the sampler is, beside what people would otherwise use.

    python bench/sample.py                     # 3 minutes on two cores
    python bench/sample.py --rows 1 --repeats 3

    row 1  random lengths, like those of thoughts: refill against waiting for the slowest row
        2  on a GPU: a decode step of Qwen2.5 shapes, against reading weights and cache once

bench/cpu.py has the sampler on a CPU beside transformers and beside its matrix products.
Models have random weights, because speed does not depend on them. Ours and the alternative take
turns, each first once unmeasured. Times are medians; if their ratio is above 1, ours is faster.
"""
import sys
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import patch

if __name__ == "__main__":  # the repository, not bench/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from plumbing import flags  # before torch: how its threads wait
import torch
import kernels
import sample
from bench.common import QWEN, limits, medians, parse_args, print_row, random_prompts, run_rows
from model import GPT, GPTConfig

# The demo's model, with room for the rollouts of row 1.
EMBEDDED = GPTConfig(vocab_size=390, width=128, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=32,
                     ffn_width=384, max_positions=640)
STOP = 0  # the token that ends a rollout in row 1


def draw_random_lengths(draw_next, mean, drawn, model, temperature, truncate, hidden, bits):
    """`draw_next` that ends a rollout with probability 1 / mean at each token; notes `drawn`."""
    tokens, logprobs = draw_next(model, temperature, truncate, hidden, bits)
    drawn.append(len(tokens))
    ends = (sample.mix(bits) >> 11 & (1 << 53) - 1) < (1 << 53) / mean
    tokens = torch.where(tokens == STOP, STOP + 1, tokens)
    return torch.where(ends, STOP, tokens), logprobs


def in_batches(generate, prompts, rows):
    for first in range(0, len(prompts), rows // 8):
        generate(prompts[first:first + rows // 8], first_prompt=first)


def in_waiting_batches(generate, prompts, rows):
    """As in_batches, but rows whose rollout has ended are decoded until the whole batch has."""
    with patch.dict(sample.BUSY_SHARE, cpu=0, cuda=0):
        in_batches(generate, prompts, rows)


def against_waiting(repeats, config=EMBEDDED, rows=64, count=128, mean=64, cap=512):
    prompts, drawn = random_prompts(config, count, 64), []
    generate = partial(sample.generate, GPT(config), n=8, max_new_tokens=cap, temperature=1.0,
                       stop_ids=[STOP], seed=0, max_rows=rows)
    draw_next = partial(draw_random_lengths, sample.draw_next, mean, drawn)
    with patch.object(sample, "draw_next", draw_next):
        lengths = [len(rollout.tokens) for group in generate(prompts) for rollout in group]
        n, tokens = len(lengths), sum(lengths)
        # Prefills draw the first token of each rollout, decode steps the others.
        occupancy = (tokens - n) / (sum(drawn) - n)
        ours, *others = medians(repeats, partial(generate, prompts),
                                partial(in_waiting_batches, generate, prompts, rows),
                                partial(in_batches, generate, prompts, rows))
    what = f"{rows} rows, {n} rollouts of {tokens / n:.0f} tokens, {max(lengths)} at most"
    rate = f"{ours:.2f} s, {tokens / ours:,.0f} tok/s, {occupancy:.1%} of the rows in use"
    for name, seconds in zip(("wait", "drop finished rows"), others):
        print_row(1, what, rate, f"batches that {name} {seconds:.2f} s", f"{seconds / ours:.2f}")


def against_bandwidth(repeats, configs=QWEN, batches=(64, 256), contexts=(1024, 4096),
                      new=(32, 160), device="cuda"):
    """A step's time is the difference of two lengths, so without prefill; 8 rows share a prompt."""
    flops, bandwidth = limits(device)
    for title, config in configs.items():
        with torch.device(device):
            model = GPT(config, torch.bfloat16).to(torch.bfloat16)
        parameters = sum(weight.numel() for weight in model.parameters())
        token_bytes = 2 * config.n_layers * config.n_kv_heads * config.head_dim * 2
        for rows, context, backend in product(batches, contexts, ("fast", "bitwise")):
            kernels.set_backend(backend)
            prompts = random_prompts(config, rows // 8, context)
            generate = partial(sample.generate, model, prompts, 8, temperature=1.0, stop_ids=[],
                               seed=0, max_rows=rows)
            short, long = medians(repeats, *(partial(generate, max_new_tokens=n) for n in new))
            step = (long - short) / (new[1] - new[0])
            cached = token_bytes * (rows // 8 * context + rows * sum(new) / 2)
            floor = max(2 * parameters / bandwidth, 2 * parameters * rows / flops)
            floor += cached / bandwidth
            print_row(2, f"{title} {backend}, {rows} rows, context {context}",
                      f"{1e3 * step:.2f} ms a step, {rows / step:,.0f} tok/s",
                      f"weights and cache read once {1e3 * floor:.2f} ms", f"{floor / step:.2f}")


ROWS = {"1": against_waiting, "2": against_bandwidth}

if __name__ == "__main__":
    sys.excepthook = flags.speak_once
    run_rows(ROWS, parse_args("Measure the sampler.", "1 refill, 2 bandwidth of a GPU", repeats=5),
             on_gpu="2")
