"""Are the kernels fast, and are they right? Ours beside what one would use otherwise, on one GPU.

    python bench/kernels.py              # begins no shape after 8 minutes, compilation included
    python bench/kernels.py --rows 1,3 --quick --json kernels.json

    row 1  attention, plain causal      SDPA with FlashAttention; FlexAttention
        2  attention, shared prompts    flash, every rollout behind a copy of its prompt; flex
        3  decoding over the KV cache   SDPA with a mask; varlen_attn; both with a copy per row
        4  log-probs of given tokens    log_softmax of all logits; Liger, or else compiled chunks
        5  sampling one token per row   multinomial; compiled Gumbel noise

Each cell has the median time of a call, and the share of it that the necessary work would take at
the limits of the GPU. If "best alternative / fast" is above 1, ours is faster. Necessary work is

    attention    4 FLOPs per pair of query and key, head and channel; 14 with the backward pass
    decoding     the bytes of keys and values, a prompt once for all rows that share it
    log-probs    2 N D V FLOPs, 6 with the backward pass
    sampling     2 B D V FLOPs, or the bytes of the weights

Every result is compared with fp32 or fp64 before it is timed. One that is off is marked WRONG and
enters no ratio; neither does a bound, in parentheses. A method that fails or is not installed gets
a line with the reason. Inputs are random, the L2 cache is emptied before every call, block masks
and tile tables are not timed. Decoding and sampling run as CUDA graphs.
"""
import importlib.util
import json
import sys
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

if __name__ == "__main__":  # the repository, not bench/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
import kernels
from bench.common import limits, pairs
from kernels.attention import attention, is_real, make_layout
from kernels.decode import Rows, decode, decode_reference
from kernels.logprob import logprob, sample
from plumbing import flags
from plumbing.files import write

OURS = ("fast", "bitwise")
PASSES = ("fwd", "fwd+bwd")
HEADS = {"1.5B": (12, 2, 128), "0.5B": (14, 2, 64), "Qwen3": (16, 8, 128)}  # H, Hkv, K
PACK = 32_768        # tokens of a batch in rows 1 and 2
VOCABULARY = 151_936
CHUNK = 2048         # rows of a compiled chunk
TEMPERATURE = 0.8
# Largest relative error of a right result: bf16 has errors of about 0.004, sums kept in bf16 of
# 0.02, and log-probs of about -12 of 0.001.
ALLOWED = dict(out=0.05, dq=0.05, dk=0.05, dv=0.05, logp=0.01, dH=0.05, dW=0.05)


# ---- measuring ----

@dataclass
class Method:
    """A call to check and time; with `dout`, the gradient of its result, backward as well.

    check(result, *gradients of all inputs) -> {what: (error, allowed)}; a bound has no check.
    """
    call: Callable
    inputs: list
    check: Callable | None = None
    dout: torch.Tensor | None = None
    graph: bool = False  # time it as a CUDA graph

    def forward(self):
        return self.call(*self.inputs)

    def forward_backward(self):
        """-> result, *gradients"""
        inputs = [x.detach().requires_grad_() for x in self.inputs]
        result = self.call(*inputs)
        return result.detach(), *torch.autograd.grad(result, inputs, self.dout)


def in_fp32(names, call, inputs, dout):
    """-> {name: the result, then the gradients}, by our plain torch backend."""
    kernels.set_backend("torch")
    method = Method(call, [x.float() for x in inputs], dout=dout.float())
    return dict(zip(names, method.forward_backward()))


def compare(exact, *got):
    """exact: {what: tensor}; got: the same in order -> {what: (relative error, allowed)}."""
    checked = {}
    for x, (what, y) in zip(got, exact.items()):
        error = (x.double().reshape(y.shape) - y.double()).norm() / y.double().norm()
        checked[what] = error.item(), ALLOWED[what]
    return checked


def measure(method):
    """Check it, then time it -> {errors, wrong, ms of each pass, peak} or {reason: why not}."""
    backward = method.dout is not None
    try:
        got = method.forward_backward() if backward else (method.forward(),)
        checked = method.check(*got) if method.check else {}
        del got
        # NaN is not <= anything.
        wrong = [f"{what} off by {error:.1e}" for what, (error, allowed) in checked.items()
                 if not error <= allowed]
        record = dict(errors={what: checked[what][0] for what in checked}, wrong=", ".join(wrong))
        record["fwd"] = time_ms(method.forward, method.graph)
        if backward:
            record["fwd+bwd"] = time_ms(method.forward_backward)
            record["peak"] = peak_mb(method.forward_backward)
        return record
    # Libraries may raise anything on shapes that they do not know; the table shows it.
    except Exception as error:
        return dict(reason=short(error))


def short(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}".replace("|", "/")[:70]


def time_ms(function, graph=False):
    """Median milliseconds of function(). do_bench overwrites the L2 cache before every call."""
    from triton.testing import do_bench
    # Without a graph a decoding step would take as long as Python takes to launch it.
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            function()
        function = captured.replay
    return do_bench(function, warmup=10, rep=60, return_mode="median")


def peak_mb(function):
    """MB that function() needs beyond what is allocated already, its results included."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


# ---- rows 1 and 2: attention ----

def packed_attention(device, dtype, heads, P, G=0, R=0):
    """Groups of a prompt of P tokens and G rollouts of R."""
    H, Hkv, K = HEADS[heads]
    groups = [(P, [R] * G)] * (PACK // (P + G * R))
    layout = make_layout(groups, device)
    make = partial(torch.randn, len(layout.positions), device=device, dtype=dtype)
    qkv = [make(H, K), make(Hkv, K), make(Hkv, K)]
    dout = make(H, K)
    call = partial(attention, layout=layout)
    exact = in_fp32(("out", "dq", "dk", "dv"), call, qkv, dout)
    check = partial(compare, exact)
    methods = dict.fromkeys(OURS, Method(call, qkv, check, dout))

    # FlashAttention cannot share prompts, so it gets every rollout behind a copy of its prompt. The
    # gradients of several copies are only parts of ours, so then only the output is compared.
    copies = [[*range(prefix, prefix_end), *range(start, end)]
              for start, end, prefix, prefix_end, seen_until in layout.segments.tolist()
              if seen_until == end]  # no rollout continues it
    copies = torch.tensor(copies, device=device)                                 # (M, P + R)
    names = ["out"] if G else exact
    of_copies = partial(compare, {name: exact[name][copies] for name in names})
    methods["SDPA flash"] = Method(causal_flash, [x[copies] for x in qkv], of_copies, dout[copies])
    methods["FlexAttention"] = Method(partial(flex, mask=block_mask(layout)), qkv, check, dout)
    flops = 4 * pairs(groups) * H * K
    return {"fwd": (flops, 0), "fwd+bwd": (3.5 * flops, 0)}, methods


def causal_flash(q, k, v):
    """(M, L, heads, K) each"""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


def flex(q, k, v, mask):
    """(T, heads, K) each"""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return compiled_flex(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)


compiled_flex = torch.compile(flex_attention, dynamic=False)


def block_mask(layout):
    """The layout as FlexAttention wants it."""
    lens = layout.segments[:, 1] - layout.segments[:, 0]
    of_rows = layout.segments.repeat_interleave(lens, dim=0).T.to(layout.positions.device)
    start, _, prefix, prefix_end, _ = of_rows.contiguous()                       # (T,) each

    def sees(batch, head, query, key):
        in_prompt = (key >= prefix[query]) & (key < prefix_end[query])
        return (key <= query) & ((key >= start[query]) | in_prompt)

    return create_block_mask(sees, None, None, len(start), len(start), device=start.device)


# ---- row 3: decoding ----

def decoding(device, dtype, heads, B, G, P, R):
    """B rows, G to a prompt of P tokens, with R/4 to R tokens of their own."""
    H, Hkv, K = HEADS[heads]
    rows = Rows(B, B // G, H // Hkv, device)
    rows.prompt_lens.fill_(P)
    rows.lengths.copy_(torch.randint(R // 4, R + 1, (B,)))
    rows.place([row // G for row in range(B)])
    make = partial(torch.randn, device=device, dtype=dtype)
    q = make(B, H, K)
    prompt_k, prompt_v = make(2, B // G, Hkv, P, K)
    row_k, row_v = make(2, B, Hkv, R, K)
    exact = decode_reference(*(x.float() for x in (q, prompt_k, prompt_v, row_k, row_v)), rows)
    check = partial(compare, dict(out=exact))
    # The newest token of each row is in its cache, and is written there once more.
    newest = [cache[rows.index, :, rows.lengths - 1] for cache in (row_k, row_v)]
    inputs = [q, *newest, prompt_k, prompt_v, row_k, row_v]
    methods = dict.fromkeys(OURS, Method(partial(decode, rows=rows), inputs, check, graph=True))

    k = torch.cat([prompt_k[rows.slot], row_k], dim=2)                     # (B, Hkv, P + R, K)
    v = torch.cat([prompt_v[rows.slot], row_v], dim=2)
    seen = is_real(P + rows.lengths, P + R)                                  # (B, P + R)
    methods["SDPA (cuDNN or math)"] = Method(
        partial(masked_sdpa, mask=seen[:, None, None]), [q[:, :, None], k, v], check, graph=True)
    ends = F.pad(seen.sum(dim=1).cumsum(0), (1, 0)).int()
    methods["varlen_attn"] = Method(
        partial(varlen, nth=torch.arange(B + 1, device=device).int(), ends=ends, longest=P + R),
        [q, k.transpose(1, 2)[seen], v.transpose(1, 2)[seen]], check, graph=True)
    cached = B // G * P + int(rows.lengths.sum())
    return {"fwd": (0, 2 * cached * Hkv * K * q.itemsize)}, methods


def masked_sdpa(q, k, v, mask):
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH], set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def varlen(q, k, v, nth, ends, longest):
    """q (B, H, K); k, v (all tokens, Hkv, K): those of row b are ends[b] to ends[b + 1]."""
    from torch.nn.attention.varlen import varlen_attn
    return varlen_attn(q, k, v, nth, ends, 1, longest, enable_gqa=True)


# ---- row 4: log-probs ----

def logprobs(device, dtype, N, D):
    inputs = head_inputs(device, dtype, N, D)
    targets = torch.randint(VOCABULARY, (N,), device=device)
    ones = torch.ones(N, device=device)
    call = partial(our_logprobs, targets=targets)
    exact = in_fp32(("logp", "dH", "dW"), call, inputs, ones)
    check = partial(compare, exact)
    methods = dict.fromkeys(OURS, Method(call, inputs, check, ones))
    methods["naive"] = Method(partial(naive_logprobs, targets=targets), inputs, check, ones)
    if importlib.util.find_spec("liger_kernel"):
        check = partial(compare, exact | dict(logp=exact["logp"].sum()))
        liger = partial(liger_logprobs, targets=targets)
        methods["Liger"] = Method(liger, inputs, check, torch.ones((), device=device))
    else:
        chunked = partial(chunked_logprobs, targets=targets)
        methods["compiled chunks"] = Method(chunked, inputs, check, ones)
    dlogits = torch.randn(N, VOCABULARY, device=device, dtype=dtype)
    methods["(products alone)"] = Method(F.linear, inputs, dout=dlogits)
    flops = 2 * N * D * VOCABULARY
    return {"fwd": (flops, 0), "fwd+bwd": (3 * flops, 0)}, methods


def head_inputs(device, dtype, N, D):
    """-> hidden (N, D) and weight (V, D), whose logits have standard deviation 3."""
    weight = torch.randn(VOCABULARY, D, device=device, dtype=dtype).mul_(3 / D ** 0.5)
    return [torch.randn(N, D, device=device, dtype=dtype), weight]


def our_logprobs(hidden, weight, targets):
    return logprob(hidden, weight, targets)[0]


def naive_logprobs(hidden, weight, targets):
    logp = (hidden @ weight.T).log_softmax(dim=-1, dtype=torch.float32)      # (N, V)
    return logp.gather(1, targets[:, None]).squeeze(1)


def chunked_logprobs(hidden, weight, targets):
    return torch.cat([checkpoint(compiled_logprobs, h, weight, t, use_reentrant=False)
                      for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK))])


compiled_logprobs = torch.compile(naive_logprobs, dynamic=False)


def liger_logprobs(hidden, weight, targets):
    """-> their sum"""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    return -LigerFusedLinearCrossEntropyFunction.apply(
        hidden, weight, targets, None, None, -100, 0.0, 0.0, "sum")[0]


# ---- row 5: sampling ----

def sampling(device, dtype, B, D):
    inputs = head_inputs(device, dtype, B, D)
    hidden, weight = (x.double() for x in inputs)
    exact = (hidden @ weight.T / TEMPERATURE).log_softmax(dim=-1)            # (B, V)
    check = partial(compare_draws, exact)
    bits = torch.randint(2**62, (B,), device=device)
    call = partial(sample, bits=bits, temperature=TEMPERATURE)
    methods = dict.fromkeys(OURS, Method(call, inputs, check, graph=True))
    # No graph here, because multinomial may read its argument on the CPU.
    methods["multinomial"] = Method(multinomial_sample, inputs, check)
    methods["compiled Gumbel"] = Method(gumbel_sample, inputs, check, graph=True)
    return {"fwd": (2 * B * D * VOCABULARY, inputs[1].nbytes)}, methods


def compare_draws(exact, drawn):
    """Check each token's log-prob, and that the mean over drawn tokens is minus the entropy."""
    tokens, logp = drawn
    true = exact.gather(1, tokens[:, None]).squeeze(1)
    mean = (exact.exp() * exact).sum(dim=-1)
    variance = (exact.exp() * exact.square()).sum(dim=-1) - mean.square()
    deviation = (true - mean).sum().abs() / variance.sum().sqrt()
    return {"logp": ((logp - true).abs().max().item(), 0.2),  # bf16 logits: 0.05
            "mean logp, in standard errors,": (deviation.item(), 6)}


def multinomial_sample(hidden, weight):
    logp = ((hidden @ weight.T).float() / TEMPERATURE).log_softmax(dim=-1)
    tokens = torch.multinomial(logp.exp(), 1)
    return tokens.squeeze(1), logp.gather(1, tokens).squeeze(1)


@torch.compile(dynamic=False)
def gumbel_sample(hidden, weight):
    logits = (hidden @ weight.T).float() / TEMPERATURE
    tokens = (logits - torch.log(-torch.log(torch.rand_like(logits)))).argmax(dim=-1)
    return tokens, logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(dim=-1)


# ---- the tables ----

# Title, function, shapes (--quick: the first one). The function takes device, dtype and a shape
# -> {pass: (FLOPs, bytes)} that are necessary, {name: Method}.
ROWS = {
    "1": ("attention, plain causal: heads, length", packed_attention,
          [("1.5B", 2048), ("1.5B", 1024), ("1.5B", 4096), ("0.5B", 2048), ("Qwen3", 2048)]),
    "2": ("attention, a prompt of P and G rollouts of R: heads, P, G, R", packed_attention,
          [("1.5B", 1024, 8, 1024), ("1.5B", 512, 8, 512), ("1.5B", 3072, 8, 1024),
           ("1.5B", 4096, 8, 512), ("0.5B", 1024, 8, 1024)]),
    "3": ("decoding, G rows to a prompt of P, R/4 to R of their own: heads, B, G, P, R", decoding,
          [("1.5B", 256, 8, 1024, 1024), ("1.5B", 64, 8, 1024, 1024), ("1.5B", 16, 8, 1024, 1024),
           ("1.5B", 256, 1, 1024, 1024), ("1.5B", 256, 8, 2048, 6144), ("1.5B", 512, 8, 512, 1024),
           ("0.5B", 256, 8, 1024, 1024), ("Qwen3", 256, 8, 1024, 1024)]),
    "4": ("log-probs: N, D", logprobs, [(16_384, 1536), (4096, 896), (16_384, 2048)]),
    "5": ("sampling: B, D", sampling, [(256, 1536), (16, 1536), (64, 1536), (512, 1536)]),
}


def measure_shape(build, shape, limit, device, dtype, quick=False):
    """Print what is measured at one shape -> a record for every method.

    quick: leave out what torch.compile builds, which takes up to a minute each.
    """
    torch.manual_seed(0)
    label = " ".join(map(str, shape))
    try:
        work, methods = build(device, dtype, *shape)
    except Exception as error:  # as in `measure`
        show(label, short(error))
        return []

    records = []
    for name, method in methods.items():
        if quick and ("Flex" in name or "compiled" in name):
            continue
        if name in OURS:
            kernels.set_backend(name)
        record = measure(method)
        cells = [cell(record, name, work, limit) for name in PASSES]
        peak = f"{record['peak']:,.0f}" if "peak" in record else ""
        mark = f"WRONG ({record['wrong']})" if record.get("wrong") else record.get("reason", "")
        show(label, name, *cells, peak, mark)
        records.append(dict(shape=shape, method=name, work=work) | record)
        torch.cuda.empty_cache()
    show(label, "best alternative / fast", *(best_over_fast(records, name) for name in PASSES))
    return records


def show(*cells):
    print("| " + " | ".join([*cells, *[""] * (6 - len(cells))]) + " |", flush=True)


def cell(record, name, work, limit):
    """The time of a pass, and the share of it that its work would take at the limit."""
    if name not in record:
        return ""
    flops, moved = work[name]
    least = 1e3 * max(flops / limit[0], moved / limit[1])
    return f"{record[name]:.3f} ms, {least / record[name]:.0%}"


def best_over_fast(records, name):
    """Time of the best alternative / time of `fast`; a name in parentheses is a bound."""
    right = {r["method"]: r[name] for r in records if name in r and not r["wrong"]}
    others = [method for method in right if method not in OURS and not method.startswith("(")]
    if "fast" not in right or not others:
        return ""
    best = min(others, key=right.get)
    return f"{right[best] / right['fast']:.2f} {best}"


def run(args, device, dtype):
    """Print header and tables, write the records."""
    start = time.monotonic()
    limit = limits(device.type)
    header = (f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton "
              f"{kernels.triton.__version__}, CUDA {torch.version.cuda}, commit {flags.commit()}, "
              f"{time.strftime('%Y-%m-%d %H:%M')}\npython {' '.join(sys.argv)}, shares of "
              f"{limit[0] / 1e12:.0f} TFLOP/s in bf16 and {limit[1] / 1e12:.1f} TB/s")
    print(header)
    records = []
    for number in args.rows:
        title, build, shapes = ROWS[number]
        print(f"\n{number}. {title}\n")
        show("shape", "method", *PASSES, "peak MB", "")
        show(*["---"] * 6)
        for shape in shapes[:1] if args.quick else shapes:
            if time.monotonic() > start + 60 * args.minutes:
                show(" ".join(map(str, shape)), "not begun: the minutes are over")
            else:
                measured = measure_shape(build, shape, limit, device, dtype, args.quick)
                records += [dict(row=number) | record for record in measured]
            if args.json:  # after every shape and at once, so that a kill loses only one shape
                results = dict(header=header, results=records)
                write(args.json, json.dumps(results, indent=1))
    print(f"\n{(time.monotonic() - start) / 60:.1f} minutes")


def parse_args():
    parser = flags.Parser("Speed of the kernels on a GPU, beside their alternatives.")
    add = parser.add_argument
    add("--rows", default=",".join(ROWS),
        help="1, 2 attention, 3 decoding, 4 log-probs, 5 sampling")
    add("--quick", action="store_true",
        help="one shape a row, and no method that torch.compile has to build")
    add("--minutes", type=flags.at_least(0, float), default=8,
        help="begin no shape after this many minutes")
    add("--json", metavar="FILE", help="write times (ms), errors and peaks (MB) here, too")
    args = parser.parse_args()
    rows = args.rows.split(",")
    if not set(rows) <= ROWS.keys():
        raise ValueError(f"--rows {args.rows}: expected numbers from 1 to 5 with commas between, "
                         "such as 1,4")
    args.rows = rows
    return args


if __name__ == "__main__":
    sys.excepthook = flags.speak_once
    args = parse_args()
    if not torch.cuda.is_available():
        raise ValueError("kernels are timed on a GPU, and torch finds none (CUDA); "
                         "python bench/compile.py shows what can be known without one")
    if args.json:
        Path(args.json).touch()  # better now than after 8 minutes
    # A backend of SDPA that refuses a shape warns at length.
    warnings.filterwarnings("ignore")
    # Past its limit of recompilations torch.compile would silently run eagerly.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    run(args, torch.device("cuda"), torch.bfloat16)
