"""Will it fit? The memory of a training step, counted before a weight is loaded.

    python train_rpt.py --plan --init FOLDER --gpus 8 --gpu-gb 80 ...    your flags; config.json is enough
    python plan.py                                     the README's table: Qwen2.5 on 1 and on 8 GPUs

A step has two peaks. They do not add up: the sampler's copy and cache are freed before the update.

            sampling                                   update
    both    fp32 weights and AdamW's moments, spread over the ranks
    and     the whole weights as matrix products       gathered weights; what autograd keeps of the largest
            read them; KV cache; a prefill, or the     micro-batch; gradients and buffers where they are most:
            next token of every row                    at the log-probs, in a block, or at the embedding

Each formula is read off the code, a term for each tensor; the tests hold them against counted allocations.
Prompts and responses are as long as the flags allow. Not counted: CUDA context and graphs, NCCL, fragments in
the allocator; a reserve of 6 % and 1 GB stands for them. Measured on a CPU only: what a GPU and FSDP2 hold is
read off the code. GB are 10^9 bytes.
"""
import sys
from pathlib import Path
from argparse import Namespace
from itertools import combinations

if __name__ == "__main__":  # the repository, not bench/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from plumbing.flags import speak_once
from kernels import logprob
from model import GPTConfig, read_config
from sample import PREFILL_TOKENS, cache_size

RESERVE = 0.06, 1e9  # share of the memory, and bytes
QWEN = {             # Qwen2.5: width, layers, heads, kv heads, width of the MLP, vocabulary, tied head
    "0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "7B": (3584, 28, 28, 4, 18944, 152064, False),
    "14B": (5120, 48, 40, 8, 13824, 152064, False),
    "32B": (5120, 64, 40, 8, 27648, 152064, False)}


def qwen(name):
    D, layers, H, Hkv, F, V, tied = QWEN[name]
    return GPTConfig(V, D, layers, H, Hkv, D // H, F, 32768, 1e6, 1e-6, tied, "qwen2")


def count_parameters(config):
    """-> parameters of one block, and of the whole model."""
    D, H, Hkv, K = config.width, config.n_heads, config.n_kv_heads, config.head_dim
    block = 2 * D * K * (H + Hkv) + 3 * D * config.ffn_width + 2 * D
    block += dict(llama=0, qwen2=K * (H + 2 * Hkv), qwen3=2 * K)[config.family]
    return block, config.n_layers * block + D + config.vocab_size * D * (1 if config.tied_head else 2)


def state(config, args):
    """-> {what: bytes} that a rank holds all the time, and the bytes of its gradients."""
    total, ranks = count_parameters(config)[1], args.ranks_per_copy or args.gpus
    if args.gpus % ranks:
        raise ValueError(f"--ranks-per-copy {ranks} does not divide --gpus {args.gpus}")
    moments, size = ("moments, bf16", 4) if args.bf16_moments else ("moments, fp32", 8)
    return {"weights, fp32": 4 * total / ranks, moments: size * total / ranks}, 4 * total / ranks


def activation_bytes(args):
    return 2 if args.device == "cuda" else 4


def reserve(args):
    return RESERVE[0] * args.gpu_gb * 1e9 + RESERVE[1]


def lengths(config, args):
    """-> P, R: the longest prompt and response that train_rpt.py lets pass."""
    R = args.max_new_tokens
    P = min(args.max_prompt_tokens, config.max_positions - R, args.tokens_per_micro_batch - R)
    if P < 1:
        raise ValueError(f"--max-new-tokens {R} leaves no room for a prompt: the model has "
                         f"{config.max_positions} positions, --tokens-per-micro-batch is "
                         f"{args.tokens_per_micro_batch}")
    return P, R


def micro_batch(config, args):
    """-> the largest micro-batch as groups for make_layout, and whether there are others."""
    (P, R), groups = lengths(config, args), []
    left, waiting = args.tokens_per_micro_batch, -(-args.batch_size // args.gpus) * args.rollouts
    while left > P and waiting:
        rollouts = [R] * min(args.rollouts, waiting, -(-(left - P) // R))
        rollouts[-1] = min(R, left - P - R * (len(rollouts) - 1))
        groups.append((P, rollouts))
        left, waiting = left - P - sum(rollouts), waiting - len(rollouts)
    return groups, waiting > 0


# ---- update. c: bytes of an activation, T: rows, S of them responses ---------------------------------------
def attention_saved(config, groups, kind, c):
    """Bytes autograd keeps of `attention` and its result, which the next product reads."""
    H, Hkv, K = config.n_heads, config.n_kv_heads, config.head_dim
    T = sum(P + sum(rollouts) for P, rollouts in groups)
    if kind != "torch":  # q, k, v, out; log-sum-exp
        return c * T * K * 2 * (H + Hkv) + 4 * T * H
    N, M, P = len(groups), sum(len(rollouts) for _, rollouts in groups), max(P for P, _ in groups)
    R = max((length for _, rollouts in groups for length in rollouts), default=0)
    padded = 2 * H * (N * P + M * R) + 2 * Hkv * (N * P + M * (P + R))       # q, out; k, v, with the prompt's
    return c * K * (padded + T * H) + c * M * R * (P + R) + 4 * H * (N * P + M * R)      # mask; log-sum-exp


def block_saved(config, groups, kind, c):
    """Bytes autograd keeps of one block. RMSNorm in torch: input in fp32, input over its norm, output; the
    kernel: input, output. SwiGLU: gate, up, their product, in torch silu(gate)."""
    T, bitwise = sum(P + sum(rollouts) for P, rollouts in groups), kind == "bitwise"
    norms = 2 * T * config.width * (2 * c if bitwise else 2 * c + 4) + (0 if bitwise else 8 * T)
    if config.family == "qwen3":  # of q and k; nobody keeps the outputs
        heads = T * (config.n_heads + config.n_kv_heads)
        norms += heads * config.head_dim * (c if bitwise else c + 4) + (0 if bitwise else 4 * heads)
    mlp = (3 if bitwise else 4) * c * T * config.ffn_width
    return norms + attention_saved(config, groups, kind, c) + mlp


def head_backward(config, S, args, c):
    """Log-probs of S rows -> bytes at the peak of their backward."""
    V, D = config.vocab_size, config.width
    weight = 4 * V * D
    if args.kernels == "torch":
        chunk = 4 * V * min(S, max(1, logprob.CHUNK_LOGITS // V))
        more = 4 * S * V > chunk                       # chunks, whose gradients of the weights add up
        return max((5 if args.entropy_coef else 4) * chunk + more * weight, chunk + (1 + more) * weight,
                   more * (chunk + 3 * weight))
    chunk = min(V, logprob.CHUNK)
    backward = c * S * chunk + 4 * chunk * D + (4 + c) * S * D + (weight if args.gpus == 1 else c * V * D)
    return max(backward, 16 * S * V // logprob.SPLIT + c * V * D)      # forward: splits, cast weights


def update(config, args):
    """-> {what: bytes} on one rank at the peak of the update."""
    (block, total), V, D, L = count_parameters(config), config.vocab_size, config.width, config.n_layers
    c, kind, again = activation_bytes(args), args.kernels, args.checkpoint_activations
    (parts, gradients), (groups, several) = state(config, args), micro_batch(config, args)
    S = sum(sum(rollouts) for _, rollouts in groups)
    T, root = S + sum(P for P, _ in groups), total - L * block
    log_probs = head_backward(config, S, args, c)
    saved = block_saved(config, groups, kind, c)
    kept = L * (c * T * D if again else saved) + (4 + c) * T * D + c * S * D           # blocks, norm, head
    kept += 4 * (T + config.max_positions) * config.head_dim                             # rotary angles
    in_block = c * T * (2 * D + (3 if kind == "bitwise" else 2) * config.ffn_width) + (saved if again else 0)
    if args.gpus == 1:    # autograd keeps what the fp32 weights of matrix products were cast to
        gathered, last, at_end = (0, 0, 0) if c == 4 else (c * block * (1 if again else L), c * block, 0)
        d_head = 0 if several and not config.tied_head else 4 * V * D
        d_ends = 4 * V * D * (3 if config.tied_head else 1)
    else:                 # FSDP2: gradients of a block, of two in fp32 on their way, one gathered ahead
        last = c * (2 * block + root)
        gathered, at_end = last if args.reshard else c * total, c * root
        d_head, d_ends = c * V * D, c * V * D * (3 if config.tied_head else 2) + 4 * root
        in_block += (2 * c + 8) * block
    before = gradients if several else 0
    adamw16 = 5 * V * D * gradients / total if args.bf16_moments else 0   # moments, random bits: 20 bytes
    moments = {  # gradients, gathered, activations, buffers
        "the log-probs": (before, gathered, kept, log_probs),
        "the last block": (before, gathered, kept, d_head + in_block),
        "the first block": (gradients, last, 0 if again else saved, d_head + in_block),
        "the embedding": (gradients, at_end, 0, max(d_ends, adamw16))}
    where = max(moments, key=lambda where: sum(moments[where]))
    names = "gradients", "gathered weights", f"activations of {T:,} tokens", f"buffers at {where}"
    return parts | dict(zip(names, moments[where]))


# ---- sampling ----------------------------------------------------------------------------------------------
def sampling(config, args):
    """-> {what: bytes} on one rank at the peak of sampling, rows of the KV cache (0: no rollout has room)."""
    c, V, D, F = activation_bytes(args), config.vocab_size, config.width, config.ffn_width
    (parts, _), (P, R), N = state(config, args), lengths(config, args), -(-args.batch_size // args.gpus)
    parts["gathered weights"] = c * count_parameters(config)[1] if args.gpus > 1 or c < 4 else 0
    R, token = max(1, R - 1), 2 * config.n_layers * config.n_kv_heads * config.head_dim * c
    free = args.gpu_gb * 1e9 - (sum(parts.values()) + reserve(args) if args.device == "cuda" else 0)
    budget, rows, slots = free / 2 if args.kv_gb is None else args.kv_gb * 1e9, 0, 0
    if (P + R) * token <= budget:
        rows, slots = cache_size(N, args.rollouts, P, R, token, args.max_rows, budget)
    T = P * min(slots, max(1, PREFILL_TOKENS // P))
    draw = max(28 * V, 16 * config.n_heads * (P + R)) if args.kernels == "torch" else 20 * V // logprob.SPLIT
    return parts | {f"KV cache, {rows} of {N * args.rollouts} rows": (slots * P + rows * R) * token,
                    "buffers of the sampler": max(3 * c * T * (F + D), rows * draw)}, rows


# ---- does it fit? ------------------------------------------------------------------------------------------
def fits(config, args):
    """-> is there room, {what: bytes} while sampling, {what: bytes} in the update; the reserve is in both."""
    spare = dict(reserve=reserve(args))
    (sampler, rows), trainer = sampling(config, args), update(config, args)
    peaks = sampler | spare, trainer | spare
    return rows > 0 and all(sum(peak.values()) <= args.gpu_gb * 1e9 for peak in peaks), *peaks


def leanest(config, args):
    """-> the fewest flags besides those of args with which it fits, {name: value}; None: no flags help."""
    flags = dict(checkpoint_activations=True, reshard=args.gpus > 1, bf16_moments=True,
                 tokens_per_micro_batch=sum(lengths(config, args)))
    flags = {name: value for name, value in flags.items() if value != getattr(args, name)}
    for n in range(len(flags) + 1):
        for names in combinations(flags, n):
            chosen = {name: flags[name] for name in names}
            if fits(config, Namespace(**vars(args) | chosen))[0]:
                return chosen


def advice(config, args):
    """Which flags, and if need be how many GPUs, make it fit."""
    if args.kv_gb is not None and not sampling(config, args)[1]:
        return f"--kv-gb {args.kv_gb:g} has no room for one prompt with its response"
    for gpus in (args.gpus * 2 ** n for n in range(8)):
        flags = leanest(config, Namespace(**vars(args) | dict(gpus=gpus)))
        if flags is not None:
            flags |= dict(gpus=gpus) if gpus > args.gpus else {}
            return "with " + " ".join(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
                                      for name, value in flags.items()) + " it does"
    return "larger GPUs, a smaller model or fewer --max-new-tokens could"


def report(args):
    """Print the plan of train_rpt.py --plan."""
    config = read_config(args.init)
    fit, *peaks = fits(config, args)
    print(f"{args.init}: {count_parameters(config)[1] / 1e9:.3g} B parameters, --gpus {args.gpus} --gpu-gb "
          f"{args.gpu_gb:g} --device {args.device} --kernels {args.kernels}")
    P, R = lengths(config, args)
    cut = P < min(args.max_prompt_tokens, config.max_positions - R)
    print(f"prompts of {P:,} tokens, responses of {R:,}" + cut * (
        f"; a longer prompt would be refused: --tokens-per-micro-batch is {args.tokens_per_micro_batch:,}"))
    print(f"{'GB (10^9 bytes) each':32}    sampling      update")
    for name in sorted(peaks[0] | peaks[1], key="reserve".__eq__):
        print(f"{name:32}" + "".join(f"{peak[name] / 1e9:12.2f}" if name in peak else f"{'-':>12}"
                                     for peak in peaks))
    print(f"{'peak':32}" + "".join(f"{sum(peak.values()) / 1e9:12.2f}" for peak in peaks))
    print("it fits" if fit else f"it does not fit; {advice(config, args)}")


if __name__ == "__main__":
    sys.excepthook = speak_once
    from train_rpt import parse_args
    letters = dict(checkpoint_activations="c", reshard="r", bf16_moments="m", tokens_per_micro_batch="t")
    print("| Qwen2.5 | GPUs | 24 GB | 80 GB | 141 GB |\n|---|---|---|---|---|")
    for name in QWEN:
        for gpus in (1, 8):
            cells = []
            for gb in (24, 80, 141):
                args = parse_args(f"--plan --init . --device cuda --gpus {gpus} --gpu-gb {gb}".split())
                flags = leanest(qwen(name), args)
                if flags is None:
                    cells.append("no")
                    continue
                _, *peaks = fits(qwen(name), Namespace(**vars(args) | flags))
                sizes = " / ".join(f"{sum(peak.values()) / 1e9:.0f}" for peak in peaks)
                cells.append(f"{sizes} {''.join(letters[flag] for flag in flags)}".strip())
            print(f"| {name} | {gpus} | {' | '.join(cells)} |")
