"""Will it fit? The memory of a training step, counted before any weight is loaded.

    python bench/memory.py --init FOLDER --gpus 8 --gpu-gb 80 ...   config.json is enough
    python bench/memory.py                                          a table of Qwen2.5 shapes

The other flags are those of train_rpt.py that matter. A step has two peaks, which do not add up,
because the sampler's copy and cache are freed before the update:

    both       fp32 weights and AdamW's moments, spread over the ranks
    sampling   gathered weights; KV cache; buffers of a prefill, or of drawing tokens
    update     gradients; packed tokens; gathered weights; what autograd keeps of the largest
               micro-batch; buffers where they are largest: at the log-probs, in a block, or at the
               embedding

The formulas have a term for each tensor; tests/test_memory.py compares them with allocations on a
CPU. Not measured is what a GPU and FSDP2 hold. Prompts and rollouts are as long as the flags allow.
A reserve of 6 % and 1 GB stands for CUDA context and graphs, NCCL, and fragments in the allocator.
GB are 10^9 bytes.
"""
import sys
from argparse import Namespace
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

if __name__ == "__main__":  # the repository, not bench/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
import kernels
from bench.common import QWEN
from kernels import logprob
from model import read_config
from plumbing import flags
from sample import CPU_SHARE, KV_SHARE, PREFILL_TOKENS, cache_size, slot_size
from train_rpt import MAX_NEW_TOKENS, check_prompts_fit

RESERVE = 0.06, 1e9  # share of the memory, and bytes
FULL = 0.75          # from this share on micro-batches count as well filled
LARGE = replace(QWEN["1.5B"], vocab_size=152_064, tied_head=False)
SHAPES = QWEN | {
    "7B": replace(LARGE, width=3584, n_heads=28, n_kv_heads=4, ffn_width=18_944),
    "14B": replace(LARGE, width=5120, n_layers=48, n_heads=40, n_kv_heads=8, ffn_width=13_824),
    "32B": replace(LARGE, width=5120, n_layers=64, n_heads=40, n_kv_heads=8, ffn_width=27_648)}


def count_parameters(config):
    """-> parameters of one block, and of the whole model."""
    heads, kv_heads, head_dim = config.n_heads, config.n_kv_heads, config.head_dim
    block = config.width * (2 * head_dim * (heads + kv_heads) + 3 * config.ffn_width + 2)
    if config.family == "qwen2":
        block += head_dim * (heads + 2 * kv_heads)  # biases
    if config.family == "qwen3":
        block += 2 * head_dim                       # norms of q and k
    ends = config.vocab_size * (1 if config.tied_head else 2) + 1
    return block, config.n_layers * block + ends * config.width


def state(config, args):
    """-> {what: bytes} that a rank holds all the time, and the bytes of its gradients."""
    ranks = args.ranks_per_copy or args.gpus
    if args.gpus % ranks:
        raise ValueError(f"--ranks-per-copy {ranks} does not divide --gpus {args.gpus}")
    fp32 = 4 * count_parameters(config)[1] / ranks
    moments = {"moments, bf16": fp32} if args.bf16_moments else {"moments, fp32": 2 * fp32}
    return {"weights, fp32": fp32} | moments, fp32


def activation_size(args):
    return flags.compute_dtype(args).itemsize


def groups_of_a_rank(args):
    return -(-args.batch_size // args.gpus)


def lengths(config, args):
    """-> tokens of the longest prompt and of the longest rollout, which a micro-batch must hold."""
    rollout = flags.new_tokens(args.max_new_tokens, MAX_NEW_TOKENS, config.max_positions)
    prompt = min(args.max_prompt_tokens, config.max_positions - rollout)
    if prompt < 1:
        raise ValueError(f"--max-new-tokens {rollout} leaves no room for a prompt: the "
                         f"model has {config.max_positions} positions")
    check_prompts_fit(prompt, Namespace(**vars(args) | dict(max_new_tokens=rollout)))
    return prompt, rollout


# ---- update ----

def largest_micro_batch(config, args):
    """-> its groups, as make_layout takes them."""
    prompt, longest = lengths(config, args)
    waiting = groups_of_a_rank(args) * args.rollouts
    left, groups = args.tokens_per_micro_batch, []
    while left > prompt and waiting:
        rollouts = [longest] * min(args.rollouts, waiting, -(-(left - prompt) // longest))
        rollouts[-1] = min(longest, left - prompt - longest * (len(rollouts) - 1))
        groups.append((prompt, rollouts))
        left -= prompt + sum(rollouts)
        waiting -= len(rollouts)
    return groups


def count_tokens(groups):
    """-> tokens, and those of rollouts."""
    rollouts = sum(sum(rollouts) for _, rollouts in groups)
    return sum(prompt for prompt, _ in groups) + rollouts, rollouts


def filled(config, args):
    """-> share of a micro-batch that groups fill, and the next larger budget that they fill whole.

    A micro-batch holds whole groups; if a group is longer, a prompt and some of its rollouts.
    """
    prompt, rollout = lengths(config, args)
    budget, group = args.tokens_per_micro_batch, prompt + args.rollouts * rollout
    if group <= budget:
        empty, more = budget % group, group
    else:
        empty, more = (budget - prompt) % rollout, rollout
    return 1 - empty / budget, budget - empty + more


def packed_bytes(config, args):
    """Bytes of all micro-batches of a step, which are packed before the first is computed."""
    prompt, rollout = lengths(config, args)
    behind_a_prompt = (args.tokens_per_micro_batch - prompt) // rollout
    prompts = groups_of_a_rank(args) * -(-args.rollouts // behind_a_prompt)
    rollouts = groups_of_a_rank(args) * args.rollouts
    # int64: tokens, positions, prompts or rollouts, unpack; and for rollouts rollout_rows and
    # predict_rows. fp32: advantages, sampled and old log-probs.
    return 4 * 8 * prompts * prompt + (6 * 8 + 3 * 4) * rollouts * rollout


def attention_saved(config, groups, backend, size):
    """Bytes that autograd keeps of `attention`, and of its result for the next product."""
    heads, K = config.n_heads, config.head_dim
    tokens, _ = count_tokens(groups)
    q_k_v_out = 2 * (heads + config.n_kv_heads) * K
    # In bf16 torch keeps its result in fp32 as well. The rest is the log-sum-exp.
    again = 4 * heads * K if backend == "torch" and size < 4 else 0
    return tokens * (size * q_k_v_out + again + 4 * heads)


def block_saved(config, groups, backend, size):
    """Bytes that autograd keeps of one block."""
    # A norm keeps its input and output; the outputs of Qwen3's norms are not kept. An MLP keeps
    # gate, up and product, in torch silu(gate).
    mlp = 3 * size if backend != "torch" else 4 * size
    channels = 4 * size * config.width + mlp * config.ffn_width
    if config.family == "qwen3":
        channels += size * (config.n_heads + config.n_kv_heads) * config.head_dim
    tokens, _ = count_tokens(groups)
    return tokens * channels + attention_saved(config, groups, backend, size)


def head_peak(config, rollout_tokens, args, size):
    """Bytes of the log-probs at the peak of their backward pass."""
    vocab, width = config.vocab_size, config.width
    d_weight = 4 * vocab * width
    if args.kernels == "torch":
        # Two tensors like a chunk's logits, or one and d weight; d weights of chunks are summed.
        chunk = 4 * vocab * min(rollout_tokens, max(1, logprob.CHUNK_LOGITS // vocab))
        if chunk == 4 * vocab * rollout_tokens:
            return 2 * chunk + d_weight
        return max(2 * chunk, chunk + 2 * d_weight) + d_weight
    chunk = min(vocab, logprob.CHUNK)
    buffers = size * rollout_tokens * chunk + 4 * chunk * width  # d logits, d weight of a chunk
    buffers += (4 + size) * rollout_tokens * width               # d hidden, and its cast
    return buffers + (d_weight if args.gpus == 1 else size * vocab * width)


def update(config, args):
    """-> {what: bytes} on one rank at the peak of the update, after the first micro-batch."""
    size, width, again = activation_size(args), config.width, args.checkpoint_activations
    parts, gradients = state(config, args)
    block, total = count_parameters(config)
    groups = largest_micro_batch(config, args)
    tokens, rollout_tokens = count_tokens(groups)

    # Kept are every block, the last norm, the rows that the head reads, and rotary angles.
    saved = block_saved(config, groups, args.kernels, size)
    kept = config.n_layers * (size * tokens * width if again else saved)
    kept += (4 + size) * tokens * width + size * rollout_tokens * width
    kept += 4 * (tokens + config.max_positions) * config.head_dim
    # In a block: d residual, d norm, d gate, d up; of the kernels d product; what is recomputed.
    in_mlp = 3 if args.kernels != "torch" else 2
    in_block = size * tokens * (2 * width + in_mlp * config.ffn_width) + (saved if again else 0)

    # Weights and gradients that are not there all the time.
    head = config.vocab_size * width                                # parameters
    ends = total - config.n_layers * block                          # embedding, last norm, head
    if args.gpus == 1:
        # Autograd keeps the bf16 casts of fp32 weights; d head is kept until d embedding is added.
        gathered = 0 if size == 4 else size * block * (1 if again else config.n_layers)
        in_block += 4 * head if config.tied_head else 0
        at_embedding = 4 * head * (3 if config.tied_head else 1)
    else:
        # FSDP2: gradients of a block, of two in fp32 that are being sent, one block gathered ahead.
        gathered = size * (2 * block + ends if args.reshard else total)
        in_block += size * head + (2 * size + 8) * block
        at_embedding = (size + 4) * ends + size * head * (3 if config.tied_head else 2)
    if args.bf16_moments:  # AdamW16 unpacks one parameter at a time: 20 bytes for each element
        at_embedding = max(at_embedding, 5 * gradients * head / total)

    log_probs = head_peak(config, rollout_tokens, args, size)
    moments = {"the log-probs": (gathered, kept, log_probs),
               "the last block": (gathered, kept, in_block),
               "the embedding": (0, 0, at_embedding)}
    where = max(moments, key=lambda where: sum(moments[where]))
    names = "gathered weights", f"activations of {tokens:,} tokens", f"buffers at {where}"
    packed = {"gradients": gradients, "packed tokens": packed_bytes(config, args)}
    return parts | packed | dict(zip(names, moments[where]))


# ---- sampling ----

def sampling(config, args):
    """-> {what: bytes} on one rank at its peak, rows of the KV cache (0: not one rollout fits)."""
    size, vocab = activation_size(args), config.vocab_size
    prompt, rollout = lengths(config, args)
    parts, _ = state(config, args)
    is_copied = args.gpus > 1 or size < 4
    parts["gathered weights"] = size * count_parameters(config)[1] if is_copied else 0
    if args.device == "cpu" and args.kernels == "torch":
        block, _ = count_parameters(config)
        parts["packed weights"] = config.n_layers * block * size + 4 * vocab * config.width

    # The cache takes its share of what is free. The last token of a rollout is never cached.
    cached, slot = max(1, rollout - 1), slot_size(prompt, args.device)
    token = 2 * config.n_layers * config.n_kv_heads * config.head_dim
    token *= kernels.cache_dtype(flags.compute_dtype(args), torch.device(args.device)).itemsize
    budget = CPU_SHARE * args.gpu_gb * 1e9
    if args.device == "cuda":
        budget = KV_SHARE * (args.gpu_gb * 1e9 - sum(parts.values()) - reserve(args))
    if args.kv_gb is not None:
        budget = args.kv_gb * 1e9
    count, rows, slots = groups_of_a_rank(args), 0, 0
    if (slot + cached) * token <= budget:
        rows, slots = cache_size(count, args.rollouts, slot, cached, token, args.max_rows, budget)
    cache = (slots * slot + rows * cached) * token

    # Buffers hold gate, up and their product in a prefill, or what drawing a token for a row takes.
    prefilled = prompt * min(slots, max(1, PREFILL_TOKENS // prompt))
    prefill = 3 * size * (config.ffn_width + config.width) * prefilled
    draw = 16 * -(-vocab // logprob.SPLIT)  # four numbers for each split
    if args.kernels == "torch":
        draw = max(8 * vocab, 16 * config.n_heads * (prompt + cached))  # logits, or scores
    parts[f"KV cache, {rows} of {count * args.rollouts} rows"] = cache
    parts["buffers of the sampler"] = max(prefill, rows * draw)
    return parts, rows


# ---- does it fit? ----

def reserve(args):
    return RESERVE[0] * args.gpu_gb * 1e9 + RESERVE[1]


def fits(config, args):
    """-> whether it fits, {what: bytes} while sampling, {what: bytes} in the update."""
    spare = dict(reserve=reserve(args))
    sampler, rows = sampling(config, args)
    peaks = sampler | spare, update(config, args) | spare
    return rows > 0 and all(sum(peak.values()) <= args.gpu_gb * 1e9 for peak in peaks), *peaks


def leanest(config, args):
    """-> {name: value}: flags added in this order until it fits; None: all of them do not help."""
    ladder = dict(checkpoint_activations=True, reshard=args.gpus > 1, bf16_moments=True,
                  tokens_per_micro_batch=sum(lengths(config, args)))
    missing = [(name, value) for name, value in ladder.items() if value != getattr(args, name)]
    for n in range(len(missing) + 1):
        added = dict(missing[:n])
        if fits(config, Namespace(**vars(args) | added))[0]:
            return added
    return None


def print_plan(config, args):
    fit, *peaks = fits(config, args)
    prompt, rollout = lengths(config, args)
    print(f"{args.init}: {count_parameters(config)[1] / 1e9:.3g} B parameters, --gpus {args.gpus} "
          f"--gpu-gb {args.gpu_gb:g} --device {args.device} --kernels {args.kernels}\n"
          f"prompts of {prompt:,} tokens, rollouts of {rollout:,}\n"
          f"{'GB (10^9 bytes) each':32}    sampling      update")
    for name in sorted(peaks[0] | peaks[1], key="reserve".__eq__):
        cells = [f"{peak[name] / 1e9:.2f}" if name in peak else "-" for peak in peaks]
        print(f"{name:32}{cells[0]:>12}{cells[1]:>12}")
    cells = [f"{sum(peak.values()) / 1e9:.2f}" for peak in peaks]
    print(f"{'peak':32}{cells[0]:>12}{cells[1]:>12}")
    added = leanest(config, args)
    if fit:
        print("it fits")
    elif added:
        words = [f"--{name.replace('_', '-')} {'' if value is True else value}".strip()
                 for name, value in added.items()]
        print(f"it does not fit; with {' '.join(words)} it does")
    else:
        print("it does not fit; larger or more GPUs, fewer --max-new-tokens, another --kv-gb could")
    share, fuller = filled(config, args)
    if share < FULL:
        larger = Namespace(**vars(args) | dict(tokens_per_micro_batch=fuller))
        verdict = "fits" if fits(config, larger)[0] else "does not fit"
        print(f"micro-batches are {share:.0%} full; --tokens-per-micro-batch {fuller} would fill "
              f"them, and {verdict}")


def print_table(args):
    """Both peaks, with a letter for each flag that is needed; docs/memory.md explains them."""
    letters = dict(checkpoint_activations="c", reshard="r", bf16_moments="m",
                   tokens_per_micro_batch="t")
    print("| Qwen2.5 | GPUs | 24 GB | 80 GB | 141 GB |\n|---|---|---|---|---|")
    for (name, config), gpus in product(SHAPES.items(), (1, 8)):
        cells = [name, str(gpus)]
        for gb in (24, 80, 141):
            here = Namespace(**vars(args) | dict(gpus=gpus, gpu_gb=gb))
            added = leanest(config, here)
            if added is None:
                cells.append("no")
                continue
            _, *peaks = fits(config, Namespace(**vars(here) | added))
            sizes = " / ".join(f"{sum(peak.values()) / 1e9:.0f}" for peak in peaks)
            cells.append(f"{sizes} {''.join(letters[flag] for flag in added)}".strip())
        print(f"| {' | '.join(cells)} |")


def parse_args(words=None):
    parser = flags.Parser("Count the memory of a training step.")
    add, at_least = parser.add_argument, flags.at_least
    add("--init", help="checkpoint folder; default: the table of Qwen2.5 shapes")
    add("--gpus", type=at_least(1), default=8, help="GPUs (with --device cpu: processes)")
    add("--gpu-gb", type=at_least(1, float), default=80, help="memory of each, 10^9 bytes")
    add("--device", default="cuda", choices=["cpu", "cuda"])
    add("--dtype", choices=[*flags.DTYPES], help="default: bf16 on a GPU, fp32 on a CPU")
    add("--kernels", default=kernels.requested, help="default: bitwise on a GPU, torch on a CPU")
    # as in train_rpt.py
    add("--batch-size", type=at_least(1), default=256, help="positions in a batch, over all ranks")
    add("--rollouts", type=at_least(2), default=8, metavar="G", help="thoughts about each position")
    add("--max-prompt-tokens", type=at_least(1), default=4096, help="of the longest prompt")
    flags.add_length_flag(add, MAX_NEW_TOKENS)
    flags.add_cache_flags(add)
    flags.add_update_flags(add)
    args = parser.parse_args(words)
    kernels.set_backend(args.kernels)
    args.kernels = kernels.backend(torch.device(args.device))
    return args


if __name__ == "__main__":
    sys.excepthook = flags.speak_once
    args = parse_args()
    if args.init:
        print_plan(read_config(args.init), args)
    else:
        print_table(args)
