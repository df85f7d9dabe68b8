"""How fast the update is: a shared prompt against copies of it, and the MFU of a GPU.

    python bench/train.py                      # the alternative of row 1 takes about 20 GB

    row 1  an update of 4 groups of 8, prompts of 1,024, rollouts of 64, shapes of SmolLM2-135M:
           a prompt once for its group, against every rollout behind its own copy of the prompt
        2  on a GPU: an update and a step of Qwen2.5 shapes, bf16; the update against its FLOPs at
           the speed that bench/common.py has for the GPU, which gives the MFU

Every rollout has an advantage, so every group is computed; the learning rate is 0, so all updates
are the same. Row 1 has 8 rollouts in a micro-batch on either side. It has no unmeasured turn and
has to come first, because its memory is the most that the process has held so far. bench/cpu.py has
the update and the whole step on a CPU.
"""
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":  # the repository, not bench/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from plumbing import flags, parallel  # before torch: how its threads wait
import torch
import kernels
import sample
import train_rpt
from bench.common import (QWEN, SMOLLM2, held_gb, limits, medians, pairs, parse_args, print_row,
                          random_prompts, run_rows)
from model import GPT
from objectives import Base, Group, Question
from plumbing.batch import pack
from plumbing.optimizer import make_optimizer

# What policy_update reads of the flags of train_rpt.py.
UPDATE = SimpleNamespace(temperature=1.0, updates_per_batch=1, clip_low=0.2, clip_high=0.2,
                         importance_cap=0.0, grad_clip=0.2, out_dir=".")


def trainer(config, compute_dtype=torch.float32):
    """A random model and its optimizer, with a learning rate of 0."""
    torch.manual_seed(0)
    model = GPT(config, compute_dtype)
    return model, make_optimizer(model, 0.0, train_rpt.BETAS)


def random_groups(config, count, prompt, lengths):
    """Groups of random tokens: each a prompt and rollouts of these lengths."""
    groups = []
    for tokens in random_prompts(config, count, prompt + sum(lengths)):
        context, *rollouts = torch.tensor(tokens).split([prompt, *lengths])
        rollouts = [sample.Rollout(ids.tolist(), [0.0] * len(ids)) for ids in rollouts]
        groups.append(Group(Question(context.tolist(), [], [], 0), rollouts))
    return groups


def prompts_of(groups):
    return [group.question.prompt for group in groups]


def update(model, optimizer, groups, budget):
    """An update with a gradient for every rollout -> its metrics. budget: of a micro-batch."""
    advantages = [[1.0] * len(group.rollouts) for group in groups]
    examples, tokens = Base.examples(None, groups, advantages, 0)
    batches = pack(examples, budget, model.device)
    return train_rpt.policy_update(model, optimizer, batches, tokens, UPDATE)


def generate(model, prompts, G, new, max_rows=256):
    """Rollouts as train_rpt.py samples them, from a copy of the weights in bf16 on a GPU."""
    return sample.generate(parallel.gathered(model), prompts, G, new, 1.0, [], seed=0,
                           max_rows=max_rows)


# ---- row 1 ----

def against_own_prompts(repeats, config=SMOLLM2, count=4, prompt=1024, G=8, new=64):
    model, optimizer = trainer(config)
    groups = random_groups(config, count, prompt, [new] * G)
    apart = [Group(group.question, [rollout]) for group in groups for rollout in group.rollouts]
    ours, others = [], []
    for _ in range(repeats):
        ours.append(measure(model, optimizer, groups, prompt + G * new))
        others.append(measure(model, optimizer, apart, G * (prompt + new)))
    seconds, other_seconds = (statistics.median(run[0] for run in runs) for runs in (ours, others))
    _, gb, norm = ours[0]
    _, other_gb, other_norm = others[0]
    off = f"gradient norm off by {abs(other_norm / norm - 1):.0e}"
    print_row(1, f"{count} groups of {G} rollouts of {new}, prompts of {prompt}",
              f"{seconds:.2f} s", f"own prompts {other_seconds:.2f} s, {off}",
              f"{other_seconds / seconds:.2f}")
    print_row(1, f"most memory held, {G} rollouts in a micro-batch", f"{gb:.2f} GB",
              f"own prompts {other_gb:.2f} GB", f"{other_gb / gb:.2f}")


def measure(model, optimizer, groups, budget):
    """One update -> its seconds, the most GB that this process has held, norm of the gradient."""
    start = time.perf_counter()
    norm = update(model, optimizer, groups, budget)["grad_norm"]
    return time.perf_counter() - start, held_gb(), norm


# ---- row 2 ----

def model_flops(model, groups):
    """FLOPs that an update of groups [(prompt_len, [rollout_len, ...])] has to make.

    6 for each weight and token, with the head for rollout tokens only; 12 for each pair of a query
    and a key that it sees, channel and layer.
    """
    config, drawn = model.config, sum(sum(rollouts) for _, rollouts in groups)
    weights = sum(weight.numel() for weight in model.layers.parameters() if weight.ndim == 2)
    tokens = sum(prompt for prompt, _ in groups) + drawn
    attention = 12 * config.n_layers * config.n_heads * config.head_dim * pairs(groups)
    return 6 * (weights * tokens + model.head.numel() * drawn) + attention


def against_flops(repeats, configs=QWEN, count=64, prompt=1024, lengths=range(128, 1025, 128),
                  new=256, budget=16_384, device="cuda"):
    flops, _ = limits(device)
    tokens, G = count * (prompt + sum(lengths)), len(lengths)
    for title, config in configs.items():
        with torch.device(device):
            model, optimizer = trainer(config, torch.bfloat16)
        groups = random_groups(config, count, prompt, lengths)
        sampled = random_groups(config, count, prompt, [new] * G)
        least = model_flops(model, [(prompt, list(lengths))] * count) / flops
        for backend in ("fast", "bitwise"):
            kernels.set_backend(backend)
            took, sampling, updating = medians(
                repeats, partial(update, model, optimizer, groups, budget),
                partial(generate, model, prompts_of(sampled), G, new),
                partial(update, model, optimizer, sampled, budget))
            print_row(2, f"{title} {backend}, update: {count} prompts of {prompt}, {G} rollouts "
                      f"each of {lengths[0]} to {lengths[-1]}",
                      f"{took:.2f} s, {tokens / took:,.0f} tok/s",
                      f"its FLOPs at {flops / 1e12:.0f} TFLOP/s {least:.2f} s",
                      f"{least / took:.3f}")
            step = sampling + updating
            print_row(2, f"{title} {backend}, step: {G} rollouts each of {new}",
                      f"{step:.2f} s, {count * G * new / step:,.0f} tok/s",
                      f"sampling {sampling:.2f} s, {sampling / step:.1%} of the step", "")


ROWS = {"1": against_own_prompts, "2": against_flops}

if __name__ == "__main__":
    sys.excepthook = flags.speak_once
    run_rows(ROWS, parse_args("Measure the update.", "1 shared prompts, 2 MFU of a GPU", repeats=1),
             on_gpu="2")
