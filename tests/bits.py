"""Which results are equal to the last bit: two runs, sampler and trainer, rows alone and in company."""
import functools

import torch
import torch.nn.functional as F

import kernels
from kernels import decode as decoding
from kernels import linear as by_rows
from kernels.attention import attention, make_layout
from kernels.decode import Rows, decode
from kernels.logprob import logprob, sample
from bench.measure import OURS, ours, randn, short

TEMPERATURE = 0.8


def decode_as_trained(kind, H, Hkv, K, groups, device, dtype):
    """Last token of every rollout by the decoder and by the training forward -> (M, H, K) each."""
    layout = make_layout(groups, device)
    q, k, v = (randn(len(layout.positions), heads, K, device=device, dtype=dtype, seed=i)
               for i, heads in enumerate((H, Hkv, Hkv)))
    kernels.use(kind)
    trained = attention(q, k, v, layout)
    caches = [x[at].transpose(1, 2).contiguous() for at in (layout.prompts, layout.rollouts) for x in (k, v)]
    rows = Rows(len(layout.owner), len(groups), H // Hkv, device)
    rows.prompt_lens.copy_(layout.prompt_lens)
    rows.lengths.copy_(layout.rollout_lens)
    rows.place(layout.owner.tolist())
    last = layout.rollouts.gather(1, layout.rollout_lens[:, None] - 1).squeeze(1)
    return decode(q[last], *caches, rows), trained[last]


def with_suffix_tile(size, f):
    before = decoding.SUFFIX_TILE
    decoding.SUFFIX_TILE = before | dict(bitwise=size)
    try:
        return f()
    finally:
        decoding.SUFFIX_TILE = before


def rows_that_differ(multiply, x, weight, counts):
    """Numbers of rows M for which the first M rows alone give other bits than all rows together."""
    everything = multiply(x, weight)
    return [M for M in counts if not torch.equal(multiply(x[:M], weight), everything[:M])]


def twice(f, *inputs):
    """Do two runs, forward and backward, give the same bits?"""
    runs = [(out := f(*inputs), *torch.autograd.grad(out.sum(), inputs)) for _ in range(2)]
    return all(torch.equal(a, b) for a, b in zip(*runs))


def head_inputs(N, D, V, device, dtype):
    """Hidden states and weights whose logits have standard deviation 3."""
    weight = randn(V, D, device=device, dtype=dtype, seed=1).mul_(3 / D ** 0.5)
    return randn(N, D, device=device, dtype=dtype), weight


def bit_tests(heads, groups, N, D, V, counts, device, dtype):
    """{what: test}; a test gives True, False, or a list of what differs. "?": nobody has promised it."""
    layout, make = make_layout(groups, device), functools.partial(randn, device=device, dtype=dtype)
    head_and = lambda targets: (*(t.requires_grad_() for t in head_inputs(N, D, V, device, dtype)), targets)

    def same_decode(kind, shape):
        return torch.equal(*decode_as_trained(kind, *shape, groups, device, dtype))

    def same_tiles(shape):
        run = lambda: decode_as_trained("bitwise", *shape, groups, device, dtype)[0]
        return torch.equal(with_suffix_tile(16, run), with_suffix_tile(64, run))

    def same_linear(multiply, inner, outer):
        return rows_that_differ(multiply, make(max(counts), inner), make(outer, inner, seed=1), counts)

    def same_sample(kind, B):
        hidden, weight, bits = head_and(torch.arange(N, device=device) * 0x1E3779B97F4A7C15 % 2**62)
        kernels.use(kind)
        tokens, sampler = sample(hidden[:B].detach(), weight.detach(), bits[:B], TEMPERATURE)
        return torch.equal(sampler, logprob(hidden, weight, F.pad(tokens, (0, N - B)), TEMPERATURE)[0][:B])

    def attention_twice(kind, shape):
        q, k, v = (make(len(layout.positions), h, shape[2]).requires_grad_() for h in (*shape[:2], shape[1]))
        return twice(lambda q, k, v: ours(kind, attention)(q, k, v, layout), q, k, v)

    def logprob_twice(kind):
        hidden, weight, targets = head_and(torch.arange(N, device=device) % V)
        return twice(lambda h, w: ours(kind, logprob)(h, w, targets)[0], hidden, weight)

    tests, test = {}, functools.partial
    for kind in OURS:
        mark = "" if kind == "bitwise" else "?"
        for shape in heads:
            name = "/".join(map(str, shape))
            tests[f"{kind}: decoding = training forward, {name}{mark}"] = test(same_decode, kind, shape)
            tests[f"{kind}: attention and gradients, two runs, {name}"] = test(attention_twice, kind, shape)
        for B in (min(64, N), min(256, N)):
            what = f"{kind}: log-probs of sampling {B} rows = of training on {N}{mark}"
            tests[what] = test(same_sample, kind, B)
        tests[f"{kind}: log-probs and gradients, two runs"] = test(logprob_twice, kind)
    for shape in heads:
        tests[f"decoding in tiles of 16 rows = of 64, {'/'.join(map(str, shape))}?"] = test(same_tiles, shape)
    for inner, outer in ((D, 4 * D), (4 * D, D)):
        what = f"rows of {inner} x {outer} alone = among {max(counts)}"
        tests[f"bitwise: {what}"] = test(same_linear, ours("bitwise", by_rows.linear), inner, outer)
        tests[f"cuBLAS: {what}?"] = test(same_linear, F.linear, inner, outer)
    return tests


def verdict(name, test):
    """-> equal, or FAIL where equality was promised, or how it differs."""
    try:
        result = test()
    except Exception as error:  # as in `measure`
        return short(error)
    if result is True or result == []:
        return "equal"
    different = "differs" if result is False else f"differs for {', '.join(map(str, result))} rows"
    return different if name.endswith("?") else f"FAIL: {different}"
