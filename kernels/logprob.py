"""Log-probability and entropy of given tokens, and sampling, from hidden states, without the logits.

At N = 16,384 rows, D = 1,536 and V = 151,936 the logits are 10 GB in fp32, softmax and gradient as much
again. Yet a row needs only its maximum m, s = sum e^(x - m), and one logit. So logits live in registers, a
tile at a time, and the backward computes them again:

                     weight.T (D, V)
                split 0    split 1   ...             scan      a program keeps BM rows and walks one split of
              +----------+----------+----+                     the vocabulary, BM x BN logits at a time; it
    hidden BM |[BN]>>>>>>|[BN]>>>>>>|    |                     leaves four or five numbers a row
    (N, D) BM |[BN]>>>>>>|[BN]>>>>>>|    |           combine   a program a row: its splits in a fixed order
              +----------+----------+----+           backward  d logits of CHUNK tokens (268 MB in bf16), then
                                                               two library products: dW[chunk] is complete,
                                                               dH adds up in fp32

A split is SPLIT tokens long however many rows or processors there are: a row's bits depend on nothing else.
Sampling is the same scan: the token drawn is the argmax of logit + Gumbel noise, its log-prob falls out.
Chunks of the vocabulary, not of rows: chunks of rows would each read and write all 0.9 GB of an fp32 dW.
"""
import torch
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import tl, triton

CHUNK_LOGITS = 2**26  # reference: logits alive at a time, 256 MB in fp32

# Block sizes; bench/compile.py checks them. In the bitwise kind they are part of the result.
SPLIT = 1024          # tokens of the vocabulary a program walks: 149 splits of 151,936, for 132 processors
CHUNK = 8192          # tokens whose d logits are in memory at a time
BN = 128              # 256 would spill registers once noise or gradient joins the tile
BK = {torch.bfloat16: 64, torch.float32: 32}  # 128 bytes, a line of memory
WARPS = {64: 4, 128: 8}  # BM: warps. Four warps to 64 rows in both, so both sum a row in the same order
STAGES = 4            # tiles on their way from memory: 131 KB of the 227 KB that a program may have
FEW_ROWS = 128        # up to here BM = 64: smaller programs, two on a processor
GROUP = 8             # backward: row tiles that use a tile of weights while it is in L2


# ---- references --------------------------------------------------------------------------------------------
def logprob_reference(hidden, weight, targets, temperature=1.0):
    """Rows a chunk at a time; a chunk's logits are computed a second time in the backward."""
    size = max(1, CHUNK_LOGITS // weight.shape[0])
    chunks = [
        checkpoint(logprob_of_chunk, h, weight, t, temperature, use_reentrant=False, preserve_rng_state=False)
        for h, t in zip(hidden.split(size), targets.split(size))]
    logprobs, entropy = zip(*chunks)
    return torch.cat(logprobs), torch.cat(entropy)


def logprob_of_chunk(hidden, weight, targets, temperature):
    logits = hidden @ weight.to(hidden.dtype).T                                          # (n, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    logprobs, ignored = logits.log_softmax(dim=-1), targets == -1
    entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
    chosen = logprobs.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    return chosen.masked_fill(ignored, 0), entropy.masked_fill(ignored, 0)


def sample_reference(hidden, weight, bits, temperature):
    return draw((hidden @ weight.to(hidden.dtype).T).float(), temperature, bits)


def draw(logits, temperature, bits):
    """logits (B, V), bits (B,) random int64 -> one token and its log-prob for each row."""
    if temperature == 0:
        tokens = logits.argmax(dim=-1)
        return tokens, logits.log_softmax(dim=-1).gather(1, tokens[:, None]).squeeze(1)
    logprobs = (logits / temperature).log_softmax(dim=-1)
    cumulative = logprobs.exp().cumsum(dim=-1, dtype=torch.float64)                 # (B, V), fp64: V is large
    uniform = (bits >> 11 & (1 << 53) - 1).double() / (1 << 53)                          # in [0, 1)
    tokens = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)
    tokens = tokens.clamp(max=logits.shape[1] - 1)  # a row of NaN finds no place: let its log-prob tell
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)


# ---- kernels -----------------------------------------------------------------------------------------------
@triton.jit
def logits_tile(H, W, rows, columns, V, D, inv_temp, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                PRECISION: tl.constexpr):
    """hidden[rows] @ weight[columns].T / temperature -> (BM, BN) in fp32; rows and columns are int64."""
    tl.assume(D > 0)  # or Triton 3.6 lets every tensor-core product wait for the one before
    columns = tl.minimum(columns, V - 1)
    inner = tl.arange(0, BK)
    x = tl.zeros((BM, BN), tl.float32)
    for k in range(0, D, BK):
        inside = (k + inner < D)[None, :]
        h = tl.load(H + rows[:, None] * D + (k + inner)[None, :], mask=inside, other=0.0)
        w = tl.load(W + columns[:, None] * D + (k + inner)[None, :], mask=inside, other=0.0)
        x = tl.dot(h, w.T, x, input_precision=PRECISION)
    return x * inv_temp


@triton.jit
def gumbel(bits, start, BN: tl.constexpr):
    """Noise -log(E), E exponential, for the tokens start .. start + BN - 1 -> (BM, BN).

    A row's bits seed SplitMix64, whose output number t belongs to token t. The largest noise comes from the
    smallest E. -log(-log u) with u in fp32 ends at 16.6, because nothing lies between 1 - 2**-24 and 1, and
    among 150,000 tokens that is felt. Floats are dense at 0: E = -log(1 - v) with v down to 2**-33 (noise
    22.9), and as a series where 1 - v would round v away.
    """
    STEP: tl.constexpr = 0x9E3779B97F4A7C15
    z = bits.to(tl.uint64, bitcast=True) + tl.cast(start + 1, tl.uint64) * STEP
    z = z[:, None] + (tl.arange(0, BN).to(tl.uint64) * STEP)[None, :]
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    v = ((z >> 32).to(tl.uint32).to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2**-32
    v = tl.minimum(v, 0.99999994)
    return -tl.log(tl.where(v < 0.00390625, v + v * v * 0.5, -tl.log(1 - v)))


@triton.jit
def scan(H, W, TARGETS, BITS, M, S, E, X, TOKENS, N, V, D, splits, inv_temp,
         BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, SAMPLE: tl.constexpr,
         NOISE: tl.constexpr, PRECISION: tl.constexpr):
    """BM rows over one split. Row tiles are neighbours in the grid: they share the split's weights in L2.

    Leaves m, s and X, the logit of the target (0 if another split has it) or of the token drawn in this
    split. E gets sum e^(x - m) (x - m), for the entropy; or the score of the token drawn, TOKENS the token.
    """
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    real, rows = rows < N, tl.minimum(rows, N - 1)  # behind the last row the last again: cheaper than masks
    split = tl.program_id(1)
    m = tl.full((BM,), -1e30, tl.float32)
    s = tl.zeros((BM,), tl.float32)
    e = tl.zeros((BM,), tl.float32)
    picked = tl.zeros((BM,), tl.float32)
    if SAMPLE:
        bits = tl.load(BITS + rows)
        best = tl.full((BM,), -1e30, tl.float32)
        token = tl.zeros((BM,), tl.int32)
    else:
        target = tl.load(TARGETS + rows)
    for start in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, V), BN):
        columns = start + tl.arange(0, BN).to(tl.int64)
        x = logits_tile(H, W, rows, columns, V, D, inv_temp, BM, BN, BK, PRECISION)
        x = tl.where((columns < V)[None, :], x, -1e30)
        if SAMPLE:
            score = x
            if NOISE:
                score = x + gumbel(bits, start, BN)
            top, place = tl.max(score, 1, return_indices=True)  # the lowest of equals
            better = top > best                                 # never for NaN: s tells of that
            here = tl.sum(tl.where(tl.arange(0, BN)[None, :] == place[:, None], x, 0.0), 1)
            best = tl.where(better, top, best)
            picked = tl.where(better, here, picked)
            token = tl.where(better, start + place, token)
        bigger = tl.maximum(m, tl.max(x, 1))
        shrink, p = tl.exp(m - bigger), tl.exp(x - bigger[:, None])
        if not SAMPLE:  # around the maximum, where nothing cancels however large the logits are
            e = (e + (m - bigger) * s) * shrink + tl.sum(p * (x - bigger[:, None]), 1)
            picked += tl.sum(tl.where(columns[None, :] == target[:, None], x, 0.0), 1)
        s = s * shrink + tl.sum(p, 1)
        m = bigger
    at = rows * splits + split
    tl.store(M + at, m, mask=real)
    tl.store(S + at, s, mask=real)
    tl.store(X + at, picked, mask=real)
    if SAMPLE:
        tl.store(E + at, best, mask=real)
        tl.store(TOKENS + at, token, mask=real)
    else:
        tl.store(E + at, e, mask=real)


@triton.jit
def combine(TARGETS, M, S, E, X, TOKENS, LOGPROBS, ENTROPY, LSE, DRAWN, splits,
            SPLIT: tl.constexpr, PADDED: tl.constexpr, SAMPLE: tl.constexpr):
    """One row: its splits, padded to a power of two, reduced by the same tree whatever the other rows are."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, PADDED)
    at, there = row * splits + split, split < splits
    ms = tl.load(M + at, mask=there, other=-1e30)
    m = tl.max(ms, 0)
    shrink = tl.exp(ms - m)
    ss = tl.load(S + at, mask=there, other=0.0)
    s = tl.sum(ss * shrink, 0)
    es = tl.load(E + at, mask=there, other=-2e30)
    log_s = tl.log(s)  # below x - m - log s, not x - (m + log s): 120 + 0.3 has lost digits of the 0.3
    if SAMPLE:
        _, place = tl.max(es, 0, return_indices=True)
        tl.store(DRAWN + row, tl.load(TOKENS + row * splits + place).to(tl.int64))
        tl.store(LOGPROBS + row, tl.load(X + row * splits + place) - m - log_s)
    else:
        target = tl.load(TARGETS + row)
        ignored = target < 0
        x = tl.load(X + row * splits + tl.maximum(target, 0) // SPLIT)
        e = tl.sum(tl.where(there, (es + (ms - m) * ss) * shrink, 0.0), 0)
        tl.store(LOGPROBS + row, tl.where(ignored, 0.0, x - m - log_s))
        tl.store(ENTROPY + row, tl.where(ignored, 0.0, log_s - e / s))
        tl.store(LSE + row, m + log_s)


@triton.jit
def logits_gradient(H, W, TARGETS, LSE, ENTROPY, D_LOGPROBS, D_ENTROPY, OUT, N, V, D, stride, first, inv_temp,
                    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
                    WITH_ENTROPY: tl.constexpr, PRECISION: tl.constexpr):
    """d logits of V vocabulary entries from `first` on. W, OUT and V belong to this chunk alone."""
    tiles = tl.cdiv(N, BM)
    in_group = GROUP * tl.cdiv(V, BN)
    group, place = tl.program_id(0) // in_group, tl.program_id(0) % in_group
    height = tl.minimum(tiles - group * GROUP, GROUP)  # row tiles of this group; the last has fewer
    rows = (group * GROUP + place % height).to(tl.int64) * BM + tl.arange(0, BM)
    real, rows = rows < N, tl.minimum(rows, N - 1)
    columns = (place // height).to(tl.int64) * BN + tl.arange(0, BN)
    x = logits_tile(H, W, rows, columns, V, D, inv_temp, BM, BN, BK, PRECISION)
    target = tl.load(TARGETS + rows)
    counts = target >= 0
    logp = x - tl.load(LSE + rows)[:, None]
    p = tl.exp(logp)
    hit = (columns + first)[None, :] == target[:, None]
    out = tl.load(D_LOGPROBS + rows, mask=counts, other=0.0)[:, None] * (tl.where(hit, 1.0, 0.0) - p)
    if WITH_ENTROPY:
        entropy = tl.load(ENTROPY + rows, mask=counts, other=0.0)
        out -= tl.load(D_ENTROPY + rows, mask=counts, other=0.0)[:, None] * p * (logp + entropy[:, None])
    tl.store(OUT + rows[:, None] * stride + columns[None, :], (out * inv_temp).to(OUT.dtype.element_ty),
             mask=real[:, None] & (columns < V)[None, :])


# ---- launches ----------------------------------------------------------------------------------------------
def forward(kind, hidden, weight, temperature, targets=None, bits=None, noise=False):
    """targets -> log-probs, entropy, log-sum-exp (N,); random bits -> tokens, log-probs (N,)."""
    (N, D), V, sample = hidden.shape, weight.shape[0], bits is not None
    splits = triton.cdiv(V, SPLIT)
    BM = 64 if N <= FEW_ROWS else 128
    empty = lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device=hidden.device)
    m, s, e, x = (empty(N, splits) for _ in range(4))
    best = empty(N, splits, dtype=torch.int32) if sample else None
    scan[triton.cdiv(N, BM), splits](
        hidden, weight, targets, bits, m, s, e, x, best, N, V, D, splits, 1 / temperature,
        SPLIT=SPLIT, SAMPLE=sample, NOISE=noise, **tile(kind, hidden, BM))
    logprobs = empty(N)
    entropy, lse = (None, None) if sample else (empty(N), empty(N))
    tokens = empty(N, dtype=torch.int64) if sample else None
    combine[N,](
        targets, m, s, e, x, best, logprobs, entropy, lse, tokens, splits, SPLIT=SPLIT,
        PADDED=triton.next_power_of_2(splits), SAMPLE=sample, **kernels.options(kind, num_warps=1))
    return (tokens, logprobs) if sample else (logprobs, entropy, lse)


def tile(kind, hidden, BM):
    """How hidden states meet weights: the same in every launch, so a logit has the same bits in each."""
    return dict(BM=BM, BN=BN, BK=BK[hidden.dtype], PRECISION=kernels.precision(hidden),
                **kernels.options(kind, WARPS[BM], STAGES))


class LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, kind):
        hidden, targets = hidden.contiguous(), targets.contiguous()
        logprobs, entropy, lse = forward(
            kind, hidden, weight.to(hidden.dtype).contiguous(), temperature, targets=targets)
        ctx.save_for_backward(hidden, weight, targets, entropy, lse)
        ctx.temperature, ctx.kind = temperature, kind
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, d_logprobs, d_entropy):
        hidden, weight, targets, entropy, lse = ctx.saved_tensors
        (N, D), V, BM = hidden.shape, weight.shape[0], 128
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        with_entropy = d_entropy is not None
        d_logprobs = torch.zeros_like(lse) if d_logprobs is None else d_logprobs.contiguous()
        d_entropy = d_entropy.contiguous() if with_entropy else None
        d_logits = torch.empty(N, min(CHUNK, V), dtype=hidden.dtype, device=hidden.device)
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs_hidden else None
        d_weight = torch.empty_like(weight) if needs_weight else None
        for first in range(0, V, CHUNK):
            w = weight[first:first + CHUNK].to(hidden.dtype).contiguous()
            d = d_logits[:, :len(w)]
            logits_gradient[triton.cdiv(N, BM) * triton.cdiv(len(w), BN),](
                hidden, w, targets, lse, entropy, d_logprobs, d_entropy, d, N, len(w), D, d.stride(0), first,
                1 / ctx.temperature, GROUP=GROUP, WITH_ENTROPY=with_entropy, **tile(ctx.kind, hidden, BM))
            if needs_weight:
                d_weight[first:first + CHUNK] = product(d.T, hidden)
            if needs_hidden:
                d_hidden += product(d, w)
        return d_hidden.to(hidden.dtype) if needs_hidden else None, d_weight, None, None, None


def product(a, b):
    """a @ b, accumulated and returned in fp32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


# ---- what the trainer and the sampler call -----------------------------------------------------------------
def logprob(hidden, weight, targets, temperature=1.0):
    """hidden (N, D), weight (V, D), targets (N,) -> log-probs (N,) and entropy in nats (N,), both fp32.

    Both belong to softmax(hidden @ weight.T / temperature): the distribution that was sampled from. A target
    of -1 marks a row to ignore: 0, 0, no gradient. weight may be an fp32 master beside bf16 hidden states.
    """
    kind = kernels.chosen(hidden.device)
    if kind == "torch":
        return logprob_reference(hidden, weight, targets, temperature)
    return LogProb.apply(hidden, weight, targets, temperature, kind)


@torch.no_grad()
def sample(hidden, weight, bits, temperature):
    """hidden (B, D), weight (V, D), bits (B,) random int64 -> tokens (B,) int64, their log-probs (B,) fp32.

    One token a row from softmax(hidden @ weight.T / temperature), decided by that row's bits alone.
    Temperature 0: the most probable, with log-probs of temperature 1. A row of NaN gets the log-prob NaN.
    """
    kind = kernels.chosen(hidden.device)
    if kind == "torch":
        return sample_reference(hidden, weight, bits, temperature)
    return forward(kind, hidden.contiguous(), weight.to(hidden.dtype).contiguous(), temperature or 1.0,
                   bits=bits.contiguous(), noise=temperature != 0)
