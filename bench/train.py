"""How fast the update is, and the whole step. `python bench.py train` runs these rows:

    row 1  an update of 4 groups of 8, prompts of 1,024, rollouts of 64, shapes of SmolLM2-135M: every prompt
           once a group, against the same rollouts each behind its own copy of the prompt
        2  where a step spends its time on a CPU: 4 positions x 8 rollouts x 64 tokens, contexts of 256
        3  on a GPU: an update and a step of Qwen2.5 shapes, bf16; the update against its FLOPs at the speed
           that bench/measure.py knows for the GPU: their ratio is the MFU

Every rollout has an advantage, so every group is computed; learning rate 0, so all updates are the same.
Rows 1 and 2 have no unmeasured turn. In row 1 every update is the first of a new process, whose largest memory
is told, with 8 rollouts in a micro-batch on either side; with own prompts that takes about 20 GB.

Here is also what the rows of bench.py share: shapes, timer, prompts.
"""
import os
import random
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from types import SimpleNamespace
from unittest.mock import patch

import torch

import kernels
import sample
from bench.kernels import pairs
from bench.measure import LIMITS
from model import GPT, GPTConfig
from plumbing.optimizer import make_optimizer
from task import TRUTH_TOKENS, Group, Question, score
from train_rpt import policy_step

SMOLLM2 = GPTConfig(vocab_size=49_152, width=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64,
                    ffn_width=1536, max_positions=2048)
QWEN = {"0.5B": GPTConfig(vocab_size=151_936, width=896, n_layers=24, n_heads=14, n_kv_heads=2, head_dim=64,
                          ffn_width=4864, max_positions=32_768, family="qwen2"),
        "1.5B": GPTConfig(vocab_size=151_936, width=1536, n_layers=28, n_heads=12, n_kv_heads=2, head_dim=128,
                          ffn_width=8960, max_positions=32_768, family="qwen2")}


def medians(repeats, *calls):
    """Seconds of each call, the median of `repeats`; the calls take turns, after one unmeasured turn."""
    seconds = [[] for _ in calls]
    for turn in range(repeats + 1):
        for times, call in zip(seconds, calls):
            start = time.perf_counter()
            call(turn)
            if turn:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def limits(device):
    """FLOP/s and bytes/s of this GPU; one that is not known counts as an H200."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((limits for gpu, limits in LIMITS.items() if gpu in name), LIMITS["H200"])


def random_prompts(config, count, length):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (count, length), generator=generator).tolist()


def random_groups(config, count, prompt, lengths):
    """Groups of random tokens: each a prompt and rollouts of these lengths."""
    groups = []
    for tokens in random_prompts(config, count, prompt + sum(lengths)):
        context, *responses = (part.tolist() for part in torch.tensor(tokens).split([prompt, *lengths]))
        rollouts = [sample.Rollout(response, [0.0] * len(response)) for response in responses]
        groups.append(Group(Question([], context, [], 0), rollouts, [], []))
    return groups


def trainer(config, compute_dtype=torch.float32):
    """A random model and its optimizer, whose learning rate of 0 makes all updates the same."""
    torch.manual_seed(0)
    model = GPT(config, compute_dtype)
    return model, make_optimizer(model, 0.0, (0.9, 0.999), 0.01)


def update(model, optimizer, groups, budget):
    """policy_step, with a gradient for every rollout -> its metrics. budget: tokens of a micro-batch."""
    args = SimpleNamespace(tokens_per_micro_batch=budget, temperature=1.0, updates_per_batch=1, clip_low=0.2,
                           clip_high=0.2, importance_cap=0.0, entropy_coef=0.0, grad_clip=0.2, out_dir=".")
    return policy_step(model, optimizer, groups, [[1.0] * len(group.rollouts) for group in groups], args)


def peak_gb():
    """The most memory that this process has held. On Linux ru_maxrss would begin with the parent's."""
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024 / 1e9
    import resource  # Windows has none
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9                      # macOS: bytes


def update_here(shared, config, count, prompt, G, new):
    """One update in micro-batches of G rollouts -> its seconds, GB of memory, norm of the gradient.

    shared: a prompt runs once a group; else once a rollout."""
    model, optimizer = trainer(config)
    groups, budget = random_groups(config, count, prompt, [new] * G), prompt + G * new
    if not shared:
        groups = [Group(group.question, [rollout], [], []) for group in groups for rollout in group.rollouts]
        budget = G * (prompt + new)
    start = time.perf_counter()
    norm = update(model, optimizer, groups, budget)["grad_norm"]
    return time.perf_counter() - start, peak_gb(), norm


def alone(function, *args):
    """function(*args) in a new process, whose memory is its own."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *args).result()
    except BrokenProcessPool:
        raise ValueError(f"{function.__name__}: its process ended without a result; most likely memory ran "
                         "out") from None


def against_own_prompts(repeats, config=SMOLLM2, count=4, prompt=1024, G=8, new=64):
    runs = [[alone(update_here, shared, config, count, prompt, G, new) for shared in (True, False)]
            for _ in range(repeats)]                                                     # (repeats, 2, 3)
    ours, other = (statistics.median(seconds for seconds, _, _ in variant) for variant in zip(*runs))
    (_, ours_gb, norm), (_, other_gb, other_norm) = runs[0]
    print(f"| 1 | {count} groups of {G} rollouts of {new}, prompts of {prompt} | {ours:.2f} s | "
          f"own prompts {other:.2f} s, gradient norm off by {abs(other_norm / norm - 1):.0e} | "
          f"{other / ours:.2f} |", flush=True)
    print(f"| 1 | most memory held, {G} rollouts in a micro-batch | {ours_gb:.2f} GB | "
          f"own prompts {other_gb:.2f} GB | {other_gb / ours_gb:.2f} |", flush=True)


def stopwatch(spent, owner, name):
    """Patch owner.name: what its calls take is added to spent[name], seconds."""
    real, spent[name] = getattr(owner, name), 0.0

    def call(*args):
        start = time.perf_counter()
        result = real(*args)
        spent[name] += time.perf_counter() - start
        return result

    return patch.object(owner, name, call)


def step_seconds(model, optimizer, prompts, G, new, budget, seed):
    """A whole RPT step, every token a few random bytes -> seconds of its parts, metrics of its update.

    A GPU still works when prefill and optimizer return: there only the sum with their neighbour holds.
    """
    rng, spent, clock = random.Random(0), {}, time.perf_counter
    words = [rng.randbytes(rng.randint(1, 8)) for _ in range(model.config.vocab_size)]
    box = lambda ids: b"".join(words[id] for id in ids) + rb"</think>\boxed{" + words[ids[-1]] + b"}"
    tokenizer = SimpleNamespace(decode_bytes=box)
    with stopwatch(spent, sample, "prefill"), stopwatch(spent, optimizer, "step"):
        start = clock()
        rollouts = sample.generate(model, prompts, G, new, 1.0, [], seed)
        sampled = clock()
        questions = [Question([], prompt, words[:TRUTH_TOKENS], 0) for prompt in prompts]
        groups = [score(tokenizer, question, r) for question, r in zip(questions, rollouts)]
        scored = clock()
        metrics = update(model, optimizer, groups, budget)
        end = clock()
    return {"prefill": spent["prefill"], "decoding": sampled - start - spent["prefill"],
            "reward": scored - sampled, "forward and backward": end - scored - spent["step"],
            "optimizer": spent["step"]}, metrics


def parts_of_a_step(repeats, config=SMOLLM2, count=4, prompt=256, G=8, new=64):
    model, optimizer = trainer(config)
    prompts, responses = random_prompts(config, count, prompt), count * G * new
    runs = [step_seconds(model, optimizer, prompts, G, new, 16_384, seed) for seed in range(repeats)]
    seconds = {part: statistics.median(run[part] for run, _ in runs) for part in runs[0][0]}
    whole, trained = sum(seconds.values()), int(runs[0][1]["trained_tokens"])
    tokens = {"prefill": count * prompt, "forward and backward": trained}
    for part, took in seconds.items():
        n = tokens.get(part, responses)
        print(f"| 2 | {part}, {n:,} tokens | {took:.3f} s, {n / took:,.0f} tok/s | "
              f"{took / whole:.1%} of the step | |", flush=True)
    print(f"| 2 | step of {count} x {G} x {new} tokens, contexts of {prompt} | "
          f"{whole:.3f} s, {responses / whole:,.0f} tok/s | | |", flush=True)


def model_flops(model, groups):
    """FLOPs that an update of groups [(prompt_len, [rollout_len, ...])] cannot do without: 6 a weight and
    token, the head for response tokens alone; 12 a query and key that see each other, channel and layer."""
    config, responses = model.config, sum(sum(rollouts) for _, rollouts in groups)
    weights = sum(weight.numel() for weight in model.layers.parameters() if weight.ndim == 2)
    tokens = sum(prompt for prompt, _ in groups) + responses
    attention = 12 * config.n_layers * config.n_heads * config.head_dim * pairs(groups)
    return 6 * (weights * tokens + model.head.numel() * responses) + attention


def against_flops(repeats, configs=QWEN, count=64, prompt=1024, lengths=range(128, 1025, 128), new=256,
                  budget=16_384, device="cuda"):
    flops, _ = limits(device)
    for title, config in configs.items():
        with torch.device(device):
            model, optimizer = trainer(config, torch.bfloat16)
        groups = random_groups(config, count, prompt, lengths)
        shape, G = [(prompt, list(lengths))] * count, len(lengths)
        tokens, least = count * (prompt + sum(lengths)), model_flops(model, shape) / flops
        for kind in ("fast", "bitwise"):
            kernels.use(kind)
            [took] = medians(repeats, lambda _: update(model, optimizer, groups, budget))
            print(f"| 3 | {title} {kind}, update: {count} prompts of {prompt}, {G} rollouts each of "
                  f"{lengths[0]} to {lengths[-1]} | {took:.2f} s, {tokens / took:,.0f} tok/s | its FLOPs at "
                  f"{flops / 1e12:.0f} TFLOP/s {least:.2f} s | {least / took:.3f} |", flush=True)
            prompts = [group.question.prompt for group in groups]
            runs = [step_seconds(model, optimizer, prompts, G, new, budget, seed)
                    for seed in range(repeats + 1)][1:]
            took = statistics.median(sum(parts.values()) for parts, _ in runs)
            sampling = statistics.median(parts["prefill"] + parts["decoding"] for parts, _ in runs)
            print(f"| 3 | {title} {kind}, step: {G} rollouts each of {new} | {took:.2f} s, "
                  f"{count * G * new / took:,.0f} tok/s, logp_gap {runs[0][1]['logp_gap']:.1e} | "
                  f"sampling {sampling:.2f} s, {sampling / took:.1%} of the step | |", flush=True)


TRAIN = {"1": against_own_prompts, "2": parts_of_a_step, "3": against_flops}
