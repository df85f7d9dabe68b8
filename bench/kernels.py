"""How fast is it, and is it right? Ours beside what else can be had, on one GPU.

    python bench.py kernels          # begins no shape after --minutes 8, compilation included

    row 1  attention, plain causal              4  log-probs of given tokens
        2  attention, prompts shared            5  sampling one token a row
        3  decoding over the KV cache           6  equal bits: yes or no

A cell is the median time of a call, the rate of the work that is necessary (not of what a method does
besides), and its share of what the GPU can. The last column is the time of the best alternative by that of
`fast`: above 1 ours is faster. `bitwise` is ours too; bwd is fwd+bwd less fwd. Necessary work:

    attention   4 FLOPs a pair of query and key, head and channel forward; 2.5 times that backward
    decoding    the bytes of keys and values, a prompt once for all rows that share it
    head        2 N D V FLOPs forward, 6 with the backward; sampling: 2 N D V, or the bytes of the weights

Every result is compared with fp32 or fp64 before it is timed; one that is off is marked WRONG and competes
with nobody, nor does a bound in parentheses. What is not installed or fails says so in its cell. Inputs are
random, the L2 cache is emptied before every call, block masks and tile tables are not timed. Decoding and
sampling run as CUDA graphs.
"""
import functools
import inspect
import json
import math
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from datetime import datetime

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import kernels
from plumbing.flags import ROOT
from kernels.attention import attention, attention_reference, make_layout, real
from tests.bits import bit_tests, head_inputs, verdict
from kernels.decode import Rows, decode, decode_reference
from kernels.logprob import logprob, logprob_reference, sample
from bench.measure import (LIMITS, OURS, Method, against_best, cell, compiled, measure, ours, randn, relative,
                             short)

WRONG_FROM = 0.05         # relative error. bf16 is good to about 0.004, sums kept in bf16 to about 0.02
TEMPERATURE = 0.8


# ---- rows 1 and 2: attention -------------------------------------------------------------------------------

def pairs(groups):
    """(query, key) pairs that see each other, a head."""
    causal = lambda n: n * (n + 1) // 2
    return sum(causal(P) + sum(R * P + causal(R) for R in rollouts) for P, rollouts in groups)


def ragged_groups(P, R, G, tokens):
    """Groups of a prompt and G rollouts of R/4 to R tokens, about `tokens` in all: a multiple of 128, because
    FlexAttention has been known to fail on others."""
    generator, groups = torch.Generator().manual_seed(0), []
    while not groups or sum(P + sum(rollouts) for P, rollouts in groups) < tokens:
        groups.append((P, torch.randint(max(1, R // 4), R + 1, (G,), generator=generator).tolist()))
    groups[-1][1][-1] += -sum(P + sum(rollouts) for P, rollouts in groups) % 128
    return groups


def exact_attention(q, k, v, dout, groups):
    """Packed out, dq, dk, dv in fp32, a group at a time."""
    parts, first = [], 0
    for P, rollouts in groups:
        here, first = slice(first, first + P + sum(rollouts)), first + P + sum(rollouts)
        x = [t[here].detach().float().requires_grad_() for t in (q, k, v)]
        with sdpa_kernel(SDPBackend.MATH):
            out = attention_reference(*x, make_layout([(P, rollouts)], q.device))
        parts.append((out.detach(), *torch.autograd.grad(out, x, dout[here].float())))
    return [torch.cat(part) for part in zip(*parts)]


def varlen(q, k, v, ends_q, ends_k, max_q, max_k, causal):
    """torch's varlen_attn, whose arguments have changed with every version; grouped heads may be implied."""
    from torch.nn.attention.varlen import varlen_attn
    known = inspect.signature(varlen_attn).parameters
    options = dict(enable_gqa=True) if "enable_gqa" in known else {}
    if causal:
        options |= dict(window_size=(-1, 0)) if "window_size" in known else dict(is_causal=True)
    return varlen_attn(q, k, v, ends_q, ends_k, max_q, max_k, **options)


def ends(lens):
    return F.pad(lens.cumsum(0), (1, 0)).int()


def attention_case(H, Hkv, K, groups, device, dtype):
    """Work and methods. What knows no shared prompts gets a copy of the prompt for every rollout."""
    layout, shared = make_layout(groups, device), any(rollouts for _, rollouts in groups)
    T, make = len(layout.positions), functools.partial(randn, device=device, dtype=dtype)
    *packed, dout = (make(T, heads, K, seed=i) for i, heads in enumerate((H, Hkv, Hkv, H)))
    exact = exact_attention(*packed, dout, groups)
    if shared:
        copies = torch.cat([layout.prompts[layout.owner], layout.rollouts], dim=1)       # (M, P + R)
        lens = layout.prompt_lens[layout.owner] + layout.rollout_lens
    else:
        copies, lens = layout.prompts, layout.prompt_lens
    there = real(lens, copies.shape[1])

    def compare(rows, *got):
        """got: out, dq, dk, dv, of which the gradients of copies are only parts of ours."""
        named = zip(("out", "dq", "dk", "dv"), got[:1] if shared and rows is not None else got, exact)
        return {what: (relative(x, y if rows is None else y[rows]), WRONG_FROM) for what, x, y in named}

    def leaves(tensors, form):
        return tuple(form(x).detach().requires_grad_() for x in tensors)

    def packed_method(call, form=lambda x: x.clone(), back=lambda x: x):
        return Method(call, leaves(packed, form), lambda out, grads: compare(None, *map(back, (out, *grads))),
                      form(dout))

    def batch_method(call):
        heads_first = lambda x: x[copies].transpose(1, 2)                                # (M, H, L, K)
        back = lambda x: x.transpose(1, 2)[there]
        return Method(call, leaves(packed, heads_first),
                      lambda out, grads: compare(copies[there], *map(back, (out, *grads))),
                      heads_first(dout) * there[:, None, :, None])

    def sdpa(backend):
        def call(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return lambda: batch_method(call)

    def flex():
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        L = T if shared else copies.shape[1]
        lens = layout.segments[:, 1] - layout.segments[:, 0]
        of_rows = layout.segments[torch.repeat_interleave(lens)].T.contiguous().to(device)  # (5, T)
        start, _, prefix, prefix_end, _ = of_rows
        causal = lambda b, h, i, j: j <= i
        sees = lambda b, h, i, j: (j <= i) & ((j >= start[i]) | ((j >= prefix[i]) & (j < prefix_end[i])))
        mask = create_block_mask(sees if shared else causal, None, None, L, L, device=device)

        def method(dynamic):
            run = compiled(flex_attention, dynamic)
            call = lambda q, k, v: run(q, k, v, block_mask=mask, enable_gqa=True)
            if shared:
                return packed_method(call, lambda x: x[None].transpose(1, 2), lambda x: x.transpose(1, 2)[0])
            return batch_method(call)
        try:
            any_length = method(dynamic=True)
            torch.autograd.grad(any_length.call(*any_length.inputs), any_length.inputs, any_length.dout)
            return any_length
        except Exception:  # such masks have failed to compile for every length at once: not a reason to lose
            return method(dynamic=False)

    def varlen_method():
        rows, at, longest = copies[there], ends(lens), int(lens.max())
        return Method(lambda q, k, v: varlen(q, k, v, at, at, longest, longest, True),
                      leaves(packed, lambda x: x[rows]), lambda out, grads: compare(rows, out, *grads),
                      dout[rows])

    def own(kind):
        return lambda: packed_method(ours(kind, lambda q, k, v: attention(q, k, v, layout)))

    flops = 4 * pairs(groups) * H * K
    return {"fwd": (flops, 0), "bwd": (2.5 * flops, 0), "fwd+bwd": (3.5 * flops, 0)}, {
        **{kind: own(kind) for kind in OURS}, "flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION), "flex": flex, "varlen": varlen_method}


# ---- row 3: decoding ---------------------------------------------------------------------------------------

def decode_case(B, G, P, R, H, Hkv, K, device, dtype):
    """B rows, G to a prompt of P tokens, with R/4 to R tokens of their own; alternatives read full copies."""
    S, make = B // G, functools.partial(randn, device=device, dtype=dtype)
    q, caches = make(B, H, K), [make(S, Hkv, P, K, seed=1), make(S, Hkv, P, K, seed=2),
                                make(B, Hkv, R, K, seed=3), make(B, Hkv, R, K, seed=4)]
    rows = Rows(B, S, H // Hkv, device)
    rows.prompt_lens.fill_(P)
    rows.lengths.copy_(torch.randint(max(1, R // 4), R + 1, (B,), generator=torch.Generator().manual_seed(0)))
    rows.place([row // G for row in range(B)])
    exact = decode_reference(q.float(), *(cache.float() for cache in caches), rows)
    check = lambda out, _: dict(out=(relative(out.view(B, H, K), exact), WRONG_FROM))
    kv = lambda i: torch.cat([caches[i][rows.prompt], caches[i + 2]], dim=2)             # (B, Hkv, P + R, K)
    seen = real(P + rows.lengths, P + R)                                                 # (B, P + R)

    def sdpa(backend, mask=seen[:, None, None], check=check):
        def call(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return lambda: Method(call, (q[:, :, None], kv(0), kv(1)), check, graph=True)

    def varlen_method():
        k, v = (kv(i).transpose(1, 2)[seen] for i in (0, 1))                             # (tokens, Hkv, K)
        at_q, at_k = torch.arange(B + 1, device=device).int(), ends(P + rows.lengths)
        return Method(lambda *x: varlen(*x, at_q, at_k, 1, P + R, False), (q, k, v), check, graph=True)

    def own(kind):
        return lambda: Method(ours(kind, lambda *x: decode(*x, rows)), (q, *caches), check, graph=True)

    moved = 2 * (S * P + int(rows.lengths.sum())) * Hkv * K * q.element_size()
    return {"fwd": (0, moved)}, {
        **{kind: own(kind) for kind in OURS}, "cudnn, mask": sdpa(SDPBackend.CUDNN_ATTENTION),
        "math, mask": sdpa(SDPBackend.MATH), "varlen": varlen_method,
        "(flash, as if no row were shorter)": sdpa(SDPBackend.FLASH_ATTENTION, None, lambda *_: {})}


# ---- rows 4 and 5: the head --------------------------------------------------------------------------------

def naive_logprob(hidden, weight, targets):
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logprobs = (hidden @ weight.T).log_softmax(dim=-1, dtype=dtype)                      # (N, V)
    return logprobs.gather(1, targets[:, None]).squeeze(1)


def logprob_case(N, D, V, device, dtype, chunk=2048):
    hidden, weight = head_inputs(N, D, V, device, dtype)
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(2)).to(device)
    some = torch.arange(0, N, max(1, N // 128), device=device)
    exact = naive_logprob(hidden[some].double(), weight.double(), targets[some])
    x = [t.float().requires_grad_() for t in (hidden, weight)]
    total = logprob_reference(*x, targets)[0].sum()
    gradients, total = [g.to(dtype) for g in torch.autograd.grad(total, x)], total.item()
    del x

    def check(result, got):
        if result.ndim:
            errors = {"logp": ((result[some].double() - exact).abs().max().item(), 0.2)}  # bf16 logits: 0.05
        else:  # a sum tells only of the sum
            errors = {"sum": (abs(result.item() / total - 1), WRONG_FROM)}
        named = zip(("dH", "dW"), got, gradients)
        return errors | {what: (relative(x, y), WRONG_FROM) for what, x, y in named}

    def method(call, check=check, dout=lambda: torch.ones(N, device=device)):
        leaf = lambda x: x.clone().requires_grad_()
        return lambda: Method(call, (leaf(hidden), leaf(weight)), check, dout())

    def chunked(hidden, weight):
        part = lambda h, t: checkpoint(compiled(naive_logprob), h, weight, t, use_reentrant=False)
        return torch.cat([part(h, t) for h, t in zip(hidden.split(chunk), targets.split(chunk))])

    def liger(hidden, weight):
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Fused
        return -Fused.apply(hidden, weight, targets, None, None, -100, 0.0, 0.0, "sum")[0]

    def cut(hidden, weight):
        from cut_cross_entropy import linear_cross_entropy
        return -linear_cross_entropy(hidden, weight, targets, reduction="none", filter_eps=None)

    def torchs(hidden, weight):
        if not hasattr(F, "linear_cross_entropy"):
            raise ModuleNotFoundError  # 2.13 has it
        return -F.linear_cross_entropy(hidden, weight, targets, reduction="sum",
                                       options=torch.nn.LinearCrossEntropyOptions())

    scalar, flops = lambda: None, 2 * N * D * V
    logits = lambda: randn(N, V, device=device, dtype=dtype, seed=3)
    return {"fwd": (flops, 0), "fwd+bwd": (3 * flops, 0)}, {
        **{kind: method(ours(kind, lambda h, w: logprob(h, w, targets)[0])) for kind in OURS},
        "naive": method(lambda h, w: naive_logprob(h, w, targets)), "compiled chunks": method(chunked),
        "liger": method(liger, dout=scalar), "cut cross-entropy": method(cut),
        "torch linear CE": method(torchs, dout=scalar),
        "(products alone)": method(lambda h, w: h @ w.T, lambda *_: {}, logits)}


def gumbel_sample(hidden, weight):
    logits = (hidden @ weight.T).float() / TEMPERATURE                                   # (B, V)
    tokens = (logits - torch.log(-torch.log(torch.rand_like(logits)))).argmax(dim=-1)
    return tokens, logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(dim=-1)


def multinomial_sample(hidden, weight):
    logprobs = ((hidden @ weight.T).float() / TEMPERATURE).log_softmax(dim=-1)
    tokens = torch.multinomial(logprobs.exp(), 1)
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)


def sampling_case(B, D, V, device, dtype):
    hidden, weight = head_inputs(B, D, V, device, dtype)
    bits = torch.randint(2**62, (B,), generator=torch.Generator().manual_seed(2)).to(device)
    exact = (hidden.double() @ weight.double().T / TEMPERATURE).log_softmax(dim=-1)      # (B, V)
    entropy = -(exact.exp() * exact).sum(dim=-1)
    spread = ((exact.exp() * exact.square()).sum(dim=-1) - entropy.square()).mean().div(B).sqrt().item()

    def check(result, _):
        """The log-prob is that of the token, and the mean over tokens drawn is minus the entropy."""
        tokens, logprobs = result
        drawn = exact.gather(1, tokens[:, None]).squeeze(1)
        return {"logp": ((logprobs.double() - drawn).abs().max().item(), 0.2),
                "mean logp, in standard errors,": (abs((drawn + entropy).mean().item()) / spread, 6)}

    method = lambda call, graph=True: lambda: Method(call, (hidden, weight), check, graph=graph)
    return {"fwd": (2 * B * D * V, V * D * weight.element_size())}, {
        **{kind: method(ours(kind, lambda h, w: sample(h, w, bits, TEMPERATURE))) for kind in OURS},
        "multinomial": method(multinomial_sample, graph=False),  # it may look at its argument on the CPU
        "compiled gumbel": method(lambda h, w: compiled(gumbel_sample)(h, w))}


# ---- the run -----------------------------------------------------------------------------------------------

HEADS = {"1.5B": (12, 2, 128), "0.5B": (14, 2, 64), "Qwen3": (16, 8, 128)}  # H, Hkv, K: Qwen2.5, Qwen3-1.7B
V, PACK = 151_936, 32_768                                                   # vocabulary; tokens of a batch
ROWS = {  # number: title, function, shapes (the first few are the quick ones), how many are quick
    1: ("attention, plain causal: heads, S",
        lambda heads, S: (attention_case, *HEADS[heads], [(S, [])] * (PACK // S)),
        [("1.5B", 2048), ("1.5B", 1024), ("1.5B", 8192), ("0.5B", 2048), ("Qwen3", 2048)], 1),
    2: ("attention, a prompt of P and 8 rollouts of R/4 to R (flash, cudnn, varlen: 8 copies): heads, P, R",
        lambda heads, P, R: (attention_case, *HEADS[heads], ragged_groups(P, R, 8, PACK)),
        [("1.5B", 1024, 1024), ("1.5B", 512, 512), ("1.5B", 3072, 1024), ("1.5B", 4096, 512),
         ("0.5B", 1024, 1024)], 1),
    3: ("decoding, one layer, G rows a prompt of P, R/4 to R of their own: heads, B, G, P, R",
        lambda heads, B, G, P, R: (decode_case, B, G, P, R, *HEADS[heads]),
        [("1.5B", 256, 8, 1024, 1024), ("1.5B", 64, 8, 1024, 1024), ("1.5B", 16, 8, 1024, 1024),
         ("1.5B", 256, 1, 1024, 1024), ("1.5B", 256, 8, 2048, 6144), ("1.5B", 512, 8, 512, 1024),
         ("0.5B", 256, 8, 1024, 1024), ("Qwen3", 256, 8, 1024, 1024)], 2),
    4: ("log-probs: N, D", lambda N, D: (logprob_case, N, D, V),
        [(16_384, 1536), (4096, 896), (16_384, 2048)], 1),
    5: ("sampling: B, D", lambda B, D: (sampling_case, B, D, V),
        [(256, 1536), (16, 1536), (64, 1536), (512, 1536)], 1),
}
BITS = dict(heads=[HEADS["1.5B"], HEADS["0.5B"]], groups=[(200, [64, 1, 300]), (1024, [129, 700]), (1, [63])],
            N=1024, D=1536, V=V, counts=[1, 2, 3, 8, 16, 17, 64, 65, 128, 256, 512, 513, 1024, 2048, 4096])


def show(*cells):
    with tqdm.external_write_mode():
        print("| " + " | ".join(cells) + " |", flush=True)


def run_row(number, shapes, limits, device, dtype, until=math.inf):
    """Measure and print one of the rows 1 to 5 -> a list of what was measured."""
    (title, arguments, *_), records = ROWS[number], []
    print(f"\n{number}. {title}\n", flush=True)
    for shape in tqdm(shapes, desc=f"row {number}", unit="shape", disable=None):
        label = " ".join(map(str, shape))
        if time.monotonic() > until:
            show(label, "not begun: the minutes are over")
            continue
        try:
            case, *rest = arguments(*shape)
            work, methods = case(*rest, device, dtype)
        except Exception as error:  # as in `measure`
            show(label, short(error))
            continue
        if not records:
            show("shape", "", *methods, "best / fast")
            show(*["---"] * (len(methods) + 3))
        results = {name: measure(build, work) for name, build in methods.items()}
        for name in work:
            cells = [cell(result, name, work[name], limits) for result in results.values()]
            show(label, name, *cells, against_best(results, name))
        if number == 4:
            peaks = [r.get("peak") for r in results.values()]
            show(label, "peak MB", *("-" if mb is None else f"{mb:,.0f}" for mb in peaks), "")
            errors = [r.get("errors", {}).get("logp") for r in results.values()]
            show(label, "largest error of logp", *("-" if e is None else f"{e:.1e}" for e in errors), "")
        records += [dict(row=number, shape=shape, method=name, work=work) | r for name, r in results.items()]
    return records


def run_bits(arguments, device, dtype):
    print("\n6. equal bits (a question mark: nobody promised)\n", flush=True)
    records = []
    for name, test in bit_tests(**arguments, device=device, dtype=dtype).items():
        records.append(dict(row=6, test=name, result=verdict(name, test)))
        show(name, records[-1]["result"])
    return records


def commit():
    """The commit of this tree, with -dirty if it was changed since."""
    with suppress(OSError):  # no git
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
        return git.stdout.strip() or "unknown"
    return "unknown"


def header(limits, known):
    """Two lines: on what and with what this was measured."""
    unlike = "" if known else " (an H200's: this GPU's are not known)"
    versions = f"torch {torch.__version__}, triton {kernels.triton.__version__}, CUDA {torch.version.cuda}"
    return (f"{torch.cuda.get_device_name()}, {versions}, commit {commit()}, {datetime.now():%Y-%m-%d %H:%M}\n"
            f"python {' '.join(sys.argv)}, shares of {limits[0] / 1e12:.0f} TFLOP/s in bf16 and "
            f"{limits[1] / 1e12:.1f} TB/s{unlike}")


def bench_kernels(args):
    rows = (args.rows or "1,2,3,4,5,6").split(",")
    if not set(rows) <= {*map(str, ROWS), "6"}:
        raise ValueError(f"--rows {args.rows}: expected numbers from 1 to 6 with commas between, such as 1,4")
    if not torch.cuda.is_available():
        raise ValueError("kernels are timed on a GPU, and torch finds none (CUDA); python bench/compile.py "
                         "shows what can be known without one")
    if args.json:
        open(args.json, "a").close()  # a file that cannot be written should not be found out after 8 minutes
    warnings.filterwarnings("ignore")  # a backend that declines explains itself at length
    device, dtype, start, records = torch.device("cuda"), torch.bfloat16, time.monotonic(), []
    known = [limits for name, limits in LIMITS.items() if name in torch.cuda.get_device_name()]
    limits = (known or [LIMITS["H200"]])[0]
    top = header(limits, known)
    print(top, flush=True)
    for number in map(int, rows):
        if number == 6:
            records += run_bits(BITS, device, dtype)
        else:
            *_, shapes, quick = ROWS[number]
            shapes = shapes[:quick] if args.quick else shapes
            records += run_row(number, shapes, limits, device, dtype, start + 60 * args.minutes)
        if args.json:
            with open(args.json, "w") as file:
                json.dump(dict(header=top, results=records), file, indent=1)
    print(f"\n{(time.monotonic() - start) / 60:.1f} minutes")
