"""Log-probs and entropy of given tokens, and sampling, from hidden states, without the logits.

At N = 16,384 rows, D = 1,536 and V = 151,936 the logits are 10 GB in fp32, and softmax and gradient
as much again each. Yet a row needs only its maximum m, s = sum e^(x - m), and one logit. So logits
live in registers, a tile at a time, and the backward pass computes them again:

                     weight.T (D, V)          scan      a program holds BM rows and walks one split
                split 0    split 1   ...                of the vocabulary, BM x BN logits at a time;
              +----------+----------+----+              it leaves four or five numbers a row
    hidden BM |[BN]>>>>>>|[BN]>>>>>>|    |    combine   one program a row reduces its splits
    (N, D) BM |[BN]>>>>>>|[BN]>>>>>>|    |    backward  d logits of CHUNK tokens (268 MB in bf16),
              +----------+----------+----+              then two library products: dW[chunk] is
                                                        complete, dH adds up in fp32

A split is SPLIT tokens long however many rows or processors there are, so that a row's bits do not
depend on them. Sampling is the same scan: it draws a tile of BN tokens by the sums of their e^x,
then a second kernel computes the logits of this tile again and draws the token. So random numbers
are made for tiles and for one tile's tokens; made for each logit, they took a third of the time.
The backward pass cuts the vocabulary into chunks, not the rows, because every chunk of rows would
read and write all 0.9 GB of an fp32 dW.
"""
import torch

import kernels
from kernels import tl, triton
from kernels.linear import product

BLOCK = 256           # torch backend: tokens among which one is drawn, once their block has been
CHUNK_LOGITS = 2**26  # torch backend: logits alive at a time, 256 MB in fp32

# Block sizes; bench/compile.py checks them. In the bitwise backend they are part of the result.
SPLIT = 1024          # tokens of the vocabulary that a program walks: 149 splits of 151,936
CHUNK = 8192          # tokens whose d logits are in memory at a time
BN = 128              # 256 would spill registers once the gradient joins the tile
BK = {torch.bfloat16: 64, torch.float32: 32}  # 128 bytes, a line of memory
WARPS = {64: 4, 128: 8}  # BM: warps; 4 per 64 rows in both, so both sum a row in the same order
STAGES = 4            # tiles on their way from memory: 131 KB of the 227 KB that a program may have
FEW_ROWS = 128        # up to this many BM = 64: smaller programs, two on a processor
GROUP = 8             # backward: row tiles that use a tile of weights while it is in L2


# ---- torch ----

def logprob_torch(hidden, weight, targets, temperature=1.0, with_entropy=True):
    """Rows a chunk at a time, so that few logits are in memory."""
    size = max(1, CHUNK_LOGITS // weight.shape[0])
    chunks = [LogProbTorch.apply(h, weight, t, temperature, with_entropy, len(hidden) <= size)
              for h, t in zip(hidden.split(size), targets.split(size))]
    logprobs, entropy = zip(*chunks)
    return torch.cat(logprobs), torch.cat(entropy) if with_entropy else None


def soft(hidden, weight, temperature):
    """-> logits less the largest of each row, (n, V) fp32; their exponentials, whose sum is (n, 1).

    Summed in fp64: torch's own log_softmax may be off by 5e-6 for 50,000 tokens.
    """
    logits = product(hidden, weight.T)
    logits = logits if temperature == 1 else logits.mul_(1 / temperature)
    logits = logits.sub_(logits.amax(dim=-1, keepdim=True))
    weights = logits.exp()
    return logits, weights, block_sums(weights).sum(dim=-1, keepdim=True, dtype=torch.float64)


def block_sums(weights):
    """(n, V) -> (n, V / BLOCK rounded up): sums over BLOCK neighbours."""
    whole = weights.shape[1] // BLOCK * BLOCK
    sums = weights[:, :whole].unflatten(1, (-1, BLOCK)).sum(dim=-1)
    if whole == weights.shape[1]:
        return sums
    return torch.cat([sums, weights[:, whole:].sum(dim=-1, keepdim=True)], dim=1)


class LogProbTorch(torch.autograd.Function):
    """By hand, because autograd would keep several (n, V) matrices, and compute more of them."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, with_entropy, keep):
        """keep: the exponentials until the backward pass, which otherwise computes them again."""
        logits, weights, total = soft(hidden, weight, temperature)
        ignored, log_total = targets == -1, total.log().to(logits.dtype)
        chosen = logits.gather(1, targets.clamp(min=0)[:, None]) - log_total
        entropy = None
        if with_entropy:
            mean = logits.mul_(weights).sum(dim=-1, keepdim=True) / total
            entropy = (log_total - mean.to(logits.dtype)).squeeze(1).masked_fill(ignored, 0)
        keep = keep and not with_entropy
        ctx.save_for_backward(hidden, weight, targets, *((weights, total) if keep else ()))
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return chosen.squeeze(1).masked_fill(ignored, 0), entropy

    @staticmethod
    def backward(ctx, dchosen, dentropy):
        hidden, weight, targets, *kept = ctx.saved_tensors
        logits, weights, total = [None, *kept] if kept else soft(hidden, weight, ctx.temperature)
        # d logits = (dchosen (1 at the target, - p) - dentropy p (log p + entropy)) / temperature.
        ignored, inverse = (targets == -1)[:, None], (1 / total).to(weights.dtype)
        zeros = torch.zeros_like(inverse)
        dchosen = zeros if dchosen is None else dchosen[:, None].masked_fill(ignored, 0)
        if dentropy is None:
            dlogits = weights * (-inverse * dchosen / ctx.temperature)
        else:
            probs = weights * inverse
            dentropy = dentropy[:, None].masked_fill(ignored, 0)
            mean = (probs * logits).sum(dim=-1, keepdim=True)            # log p less its mean
            dlogits = probs * (-dchosen - dentropy * (logits - mean)) / ctx.temperature
        dlogits.scatter_add_(1, targets.clamp(min=0)[:, None], dchosen / ctx.temperature)
        dlogits = dlogits.to(hidden.dtype)
        dhidden = dlogits @ weight.to(hidden.dtype) if ctx.needs_input_grad[0] else None
        dweight = (dlogits.T @ hidden).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return dhidden, dweight, None, None, None, None


def sample_torch(hidden, weight, bits, temperature):
    return draw(product(hidden, weight.T), temperature, bits)


def draw(logits, temperature, bits):
    """logits (B, V), bits (B,) random int64 -> one token and its log-prob for each row.

    The logits are overwritten. As in the kernels, first a block of the vocabulary is drawn, then
    one of its tokens; a single sum over V would take most of the time.
    """
    if temperature == 0:
        tokens = logits.argmax(dim=-1)
        return tokens, logits.log_softmax(dim=-1).gather(1, tokens[:, None]).squeeze(1)
    V = logits.shape[1]
    weights = logits.sub_(logits.amax(dim=-1, keepdim=True))
    weights = (weights if temperature == 1 else weights.mul_(1 / temperature)).exp_()
    sums = block_sums(weights)
    uniform = (bits >> 11 & (1 << 53) - 1).double() / (1 << 53)          # in [0, 1)
    block, left = draw_one(sums, uniform[:, None])
    places = block * BLOCK + torch.arange(BLOCK, device=bits.device)                 # (B, BLOCK)
    inside = weights.gather(1, places.clamp(max=V - 1)).masked_fill(places >= V, 0)
    token, _ = draw_one(inside, left)
    # In a row of NaN the search runs past the end. Its log-prob, NaN too, stops the sampler.
    tokens = (block * BLOCK + token).clamp(max=V - 1)
    total = sums.sum(dim=1, keepdim=True, dtype=torch.float64)
    logprobs = (weights.gather(1, tokens) / total).log().float()
    return tokens.squeeze(1), logprobs.squeeze(1)


def draw_one(weights, uniform):
    """weights (B, n), uniform (B, 1) in [0, 1) -> a place in each row, and a uniform number again.

    What is left of the number, once it has chosen, is uniform within the place that it chose. fp64,
    because in fp32 the rounding of the sum would distort the rare places.
    """
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    at = uniform * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, at, right=True).clamp(max=weights.shape[1] - 1)
    width = weights.gather(1, place)
    left = (at - cumulative.gather(1, place) + width) / width
    return place, left.clamp(min=0, max=1 - 2**-53)


# ---- kernels: what both scans share ----

@triton.jit
def logits_tile(hidden_ptr, weight_ptr, rows, columns, V, D, inv_temp, BM: tl.constexpr,
                BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """hidden[rows] @ weight[columns].T / temperature -> (BM, BN) fp32; rows, columns are int64."""
    # Otherwise Triton 3.6 makes every tensor-core product wait for the one before.
    tl.assume(D > 0)
    columns = tl.minimum(columns, V - 1)
    inner = tl.arange(0, BK)
    x = tl.zeros((BM, BN), tl.float32)
    for k in range(0, D, BK):
        step = (k + inner)[None, :]
        h = tl.load(hidden_ptr + rows[:, None] * D + step, mask=step < D, other=0.0)
        w = tl.load(weight_ptr + columns[:, None] * D + step, mask=step < D, other=0.0)
        x = tl.dot(h, w.T, x, input_precision=PRECISION)
    return x * inv_temp


@triton.jit
def grow_softmax(m, x):
    """Largest logit so far m (BM,), a tile x (BM, BN) -> the new m, e^(old - new), e^(x - new)."""
    m_new = tl.maximum(m, tl.max(x, 1))
    return m_new, tl.exp(m - m_new), tl.exp(x - m_new[:, None])


@triton.jit
def combine_softmax(m_ptr, s_ptr, row, splits, PADDED: tl.constexpr):
    """-> m and s of each split of a row, e^(m of the split - m of the row), and m and s of the row.

    Splits are padded to a power of two and reduced by a tree. Its shape depends on the number of
    warps, which must be the same wherever a row's bits have to be.
    """
    split = tl.arange(0, PADDED)
    there = split < splits
    m_split = tl.load(m_ptr + row * splits + split, mask=there, other=-1e30)
    s_split = tl.load(s_ptr + row * splits + split, mask=there, other=0.0)
    m = tl.max(m_split, 0)
    shrink = tl.exp(m_split - m)
    return m_split, s_split, shrink, m, tl.sum(s_split * shrink, 0)


# ---- kernels: log-probs ----

@triton.jit(do_not_specialize=["N"])
def logprob_scan_kernel(hidden_ptr, weight_ptr, targets_ptr, m_ptr, s_ptr, e_ptr, x_ptr, N, V, D,
                        splits, inv_temp, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                        SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """BM rows over one split. Row tiles are neighbours in the grid: they share the weights in L2.

    Leaves m, s, e = sum e^(x - m) (x - m) for the entropy, and the target's logit (0 elsewhere).
    """
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    # Beyond the end the last row is computed again, which is cheaper than masks.
    real, rows = rows < N, tl.minimum(rows, N - 1)
    split = tl.program_id(1)
    target = tl.load(targets_ptr + rows)
    m = tl.full((BM,), -1e30, tl.float32)
    s = tl.zeros((BM,), tl.float32)
    e = tl.zeros((BM,), tl.float32)
    picked = tl.zeros((BM,), tl.float32)
    for start in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, V), BN):
        columns = start + tl.arange(0, BN).to(tl.int64)
        x = logits_tile(hidden_ptr, weight_ptr, rows, columns, V, D, inv_temp, BM, BN, BK,
                        PRECISION)
        x = tl.where((columns < V)[None, :], x, -1e30)
        picked += tl.sum(tl.where(columns[None, :] == target[:, None], x, 0.0), 1)
        m_new, shrink, p = grow_softmax(m, x)
        # e sums x - m rather than x, so that nothing cancels however large the logits are.
        e = (e + (m - m_new) * s) * shrink + tl.sum(p * (x - m_new[:, None]), 1)
        s = s * shrink + tl.sum(p, 1)
        m = m_new
    at = rows * splits + split
    tl.store(m_ptr + at, m, mask=real)
    tl.store(s_ptr + at, s, mask=real)
    tl.store(e_ptr + at, e, mask=real)
    tl.store(x_ptr + at, picked, mask=real)


@triton.jit
def logprob_combine_kernel(targets_ptr, m_ptr, s_ptr, e_ptr, x_ptr, logprobs_ptr, entropy_ptr,
                           lse_ptr, splits, SPLIT: tl.constexpr, PADDED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    m_split, s_split, shrink, m, s = combine_softmax(m_ptr, s_ptr, row, splits, PADDED)
    there = tl.arange(0, PADDED) < splits
    e_split = tl.load(e_ptr + row * splits + tl.arange(0, PADDED), mask=there, other=0.0)
    e = tl.sum(tl.where(there, (e_split + (m_split - m) * s_split) * shrink, 0.0), 0)
    target = tl.load(targets_ptr + row)
    ignored = target < 0
    x = tl.load(x_ptr + row * splits + tl.maximum(target, 0) // SPLIT)
    log_s = tl.log(s)
    # x - m - log s, not x - (m + log s), because 120 + 0.3 loses digits of the 0.3.
    tl.store(logprobs_ptr + row, tl.where(ignored, 0.0, x - m - log_s))
    tl.store(entropy_ptr + row, tl.where(ignored, 0.0, log_s - e / s))
    tl.store(lse_ptr + row, m + log_s)


@triton.jit(do_not_specialize=["N"])
def dlogits_kernel(hidden_ptr, weight_ptr, targets_ptr, lse_ptr, entropy_ptr, dlogprobs_ptr,
                   dentropy_ptr, out_ptr, N, V, D, stride, first, inv_temp,
                   BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
                   WITH_ENTROPY: tl.constexpr, PRECISION: tl.constexpr):
    """d logits of the chunk of the vocabulary from `first` on; weight, out and V are the chunk's.

    d x = (dlogprob (1[target] - p) - dentropy p (log p + entropy)) / temperature
    """
    tiles = tl.cdiv(N, BM)
    in_group = GROUP * tl.cdiv(V, BN)
    group, place = tl.program_id(0) // in_group, tl.program_id(0) % in_group
    height = tl.minimum(tiles - group * GROUP, GROUP)  # row tiles of this group; the last has fewer
    rows = (group * GROUP + place % height).to(tl.int64) * BM + tl.arange(0, BM)
    real, rows = rows < N, tl.minimum(rows, N - 1)
    columns = (place // height).to(tl.int64) * BN + tl.arange(0, BN)
    x = logits_tile(hidden_ptr, weight_ptr, rows, columns, V, D, inv_temp, BM, BN, BK, PRECISION)
    target = tl.load(targets_ptr + rows)
    counts = target >= 0
    logp = x - tl.load(lse_ptr + rows)[:, None]
    p = tl.exp(logp)
    hit = (columns + first)[None, :] == target[:, None]
    dlogprobs = tl.load(dlogprobs_ptr + rows, mask=counts, other=0.0)
    out = dlogprobs[:, None] * (tl.where(hit, 1.0, 0.0) - p)
    if WITH_ENTROPY:
        entropy = tl.load(entropy_ptr + rows, mask=counts, other=0.0)
        dentropy = tl.load(dentropy_ptr + rows, mask=counts, other=0.0)
        out -= dentropy[:, None] * p * (logp + entropy[:, None])
    out = (out * inv_temp).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * stride + columns[None, :], out,
             mask=real[:, None] & (columns < V)[None, :])


# ---- kernels: sampling ----

@triton.jit
def gumbel(bits, number):
    """Gumbel noise -log(E), E exponential, from a row's bits and the number of the outcome.

    The outcome with the largest log-probability + noise is drawn with its probability. The bits
    seed SplitMix64, whose outputs are numbered. The usual -log(-log u) ends at 16.6 in fp32,
    because no number lies between 1 - 2**-24 and 1, and rare outcomes need more. Large noise is a
    small E, and floats are dense at 0: so E = -log(1 - v), with v down to 2**-33 (noise 22.9), and
    as a series where 1 - v would round v away.
    """
    z = bits.to(tl.uint64, bitcast=True) + (number + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    v = ((z >> 32).to(tl.uint32).to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2**-32
    v = tl.minimum(v, 0.99999994)
    return -tl.log(tl.where(v < 0.00390625, v + v * v * 0.5, -tl.log(1 - v)))


@triton.jit(do_not_specialize=["N"])
def sample_scan_kernel(hidden_ptr, weight_ptr, bits_ptr, m_ptr, s_ptr, score_ptr, tile_ptr, N, V, D,
                       splits, inv_temp, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                       SPLIT: tl.constexpr, NOISE: tl.constexpr, PRECISION: tl.constexpr):
    """As logprob_scan_kernel; leaves m, s, and the split's best tile (its first token) and score.

    A tile's number continues those of the tokens, so that its noise is that of no token.
    """
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    real, rows = rows < N, tl.minimum(rows, N - 1)
    split = tl.program_id(1)
    bits = tl.load(bits_ptr + rows)
    m = tl.full((BM,), -1e30, tl.float32)
    s = tl.zeros((BM,), tl.float32)
    best = tl.full((BM,), -1e30, tl.float32)
    tile = tl.zeros((BM,), tl.int32) + split * SPLIT
    for start in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, V), BN):
        columns = start + tl.arange(0, BN).to(tl.int64)
        x = logits_tile(hidden_ptr, weight_ptr, rows, columns, V, D, inv_temp, BM, BN, BK,
                        PRECISION)
        x = tl.where((columns < V)[None, :], x, -1e30)
        m_new, shrink, p = grow_softmax(m, x)
        here = tl.sum(p, 1)
        if NOISE:
            score = m_new + tl.log(here) + gumbel(bits, V + start // BN)
        else:
            score = tl.max(x, 1)
        better = score > best                               # false for NaN, which s reports
        best = tl.where(better, score, best)
        tile = tl.where(better, start, tile)
        s = s * shrink + here
        m = m_new
    at = rows * splits + split
    tl.store(m_ptr + at, m, mask=real)
    tl.store(s_ptr + at, s, mask=real)
    tl.store(score_ptr + at, best, mask=real)
    tl.store(tile_ptr + at, tile, mask=real)


@triton.jit
def sample_token_kernel(hidden_ptr, weight_ptr, bits_ptr, m_ptr, s_ptr, score_ptr, tile_ptr,
                        tokens_ptr, logprobs_ptr, V, D, splits, inv_temp, BM: tl.constexpr,
                        BN: tl.constexpr, BK: tl.constexpr, PADDED: tl.constexpr,
                        NOISE: tl.constexpr, PRECISION: tl.constexpr):
    """One program per row: it computes the best tile's logits again and draws one of its tokens."""
    row = tl.program_id(0).to(tl.int64)
    _, _, _, m, s = combine_softmax(m_ptr, s_ptr, row, splits, PADDED)
    split = tl.arange(0, PADDED)
    scores = tl.load(score_ptr + row * splits + split, mask=split < splits, other=-2e30)
    _, best = tl.max(scores, 0, return_indices=True)
    start = tl.load(tile_ptr + row * splits + best)
    columns = start + tl.arange(0, BN).to(tl.int64)

    # A tensor core takes no fewer rows than BM, so all of them are this one.
    rows = row + tl.zeros((BM,), tl.int64)
    x = logits_tile(hidden_ptr, weight_ptr, rows, columns, V, D, inv_temp, BM, BN, BK, PRECISION)
    x = tl.where((columns < V)[None, :], x, -1e30)
    score = x
    if NOISE:
        score = x + gumbel(tl.load(bits_ptr + row), columns)[None, :]
    _, place = tl.max(score, 1, return_indices=True)        # (BM,), first of equals
    x = tl.sum(tl.where(tl.arange(0, BN)[None, :] == place[:, None], x, 0.0), 1)
    # In a row of NaN the place may be behind the vocabulary.
    token = tl.minimum(start + tl.max(place, 0), V - 1)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(logprobs_ptr + row, tl.max(x, 0) - m - tl.log(s))


# ---- launches ----

def tile_options(backend, hidden, BM):
    """How hidden @ weight.T is cut: the same in every launch, so that a logit has the same bits."""
    return dict(BM=BM, BN=BN, BK=BK[hidden.dtype], PRECISION=kernels.dot_precision(hidden),
                **kernels.launch_options(backend, WARPS[BM], STAGES))


def empty(*shape, like, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device=like.device)


def launch_logprob(backend, hidden, weight, targets, temperature):
    """-> log-probs, entropy and log-sum-exp, (N,) each."""
    (N, D), V = hidden.shape, weight.shape[0]
    splits, BM = triton.cdiv(V, SPLIT), 64 if N <= FEW_ROWS else 128
    m, s, e, x = (empty(N, splits, like=hidden) for _ in range(4))
    logprob_scan_kernel[triton.cdiv(N, BM), splits](
        hidden, weight, targets, m, s, e, x, N, V, D, splits, 1 / temperature, SPLIT=SPLIT,
        **tile_options(backend, hidden, BM))
    logprobs, entropy, lse = (empty(N, like=hidden) for _ in range(3))
    # As many warps as sample_token_kernel has, so that both sum the splits of a row in one order.
    logprob_combine_kernel[N,](
        targets, m, s, e, x, logprobs, entropy, lse, splits, SPLIT=SPLIT,
        PADDED=triton.next_power_of_2(splits), **kernels.launch_options(backend, WARPS[64]))
    return logprobs, entropy, lse


def launch_sample(backend, hidden, weight, bits, temperature):
    """-> tokens and their log-probs, (B,) each."""
    (B, D), V = hidden.shape, weight.shape[0]
    splits, BM = triton.cdiv(V, SPLIT), 64 if B <= FEW_ROWS else 128
    m, s, score = (empty(B, splits, like=hidden) for _ in range(3))
    tile = empty(B, splits, like=hidden, dtype=torch.int32)
    inv_temp, noise = 1 / (temperature or 1.0), temperature != 0
    sample_scan_kernel[triton.cdiv(B, BM), splits](
        hidden, weight, bits, m, s, score, tile, B, V, D, splits, inv_temp, SPLIT=SPLIT,
        NOISE=noise, **tile_options(backend, hidden, BM))
    tokens, logprobs = empty(B, like=hidden, dtype=torch.int64), empty(B, like=hidden)
    sample_token_kernel[B,](
        hidden, weight, bits, m, s, score, tile, tokens, logprobs, V, D, splits, inv_temp,
        PADDED=triton.next_power_of_2(splits), NOISE=noise, **tile_options(backend, hidden, 64))
    return tokens, logprobs


class LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, backend):
        hidden, targets = hidden.contiguous(), targets.contiguous()
        logprobs, entropy, lse = launch_logprob(
            backend, hidden, weight.to(hidden.dtype).contiguous(), targets, temperature)
        ctx.save_for_backward(hidden, weight, targets, entropy, lse)
        ctx.temperature, ctx.backend = temperature, backend
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, dlogprobs, dentropy):
        hidden, weight, targets, entropy, lse = ctx.saved_tensors
        (N, D), V, BM = hidden.shape, weight.shape[0], 128
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        with_entropy = dentropy is not None
        dlogprobs = torch.zeros_like(lse) if dlogprobs is None else dlogprobs.contiguous()
        dentropy = dentropy.contiguous() if with_entropy else None
        dlogits = empty(N, min(CHUNK, V), like=hidden, dtype=hidden.dtype)
        dhidden = torch.zeros_like(hidden, dtype=torch.float32) if needs_hidden else None
        dweight = torch.empty_like(weight) if needs_weight else None
        for first in range(0, V, CHUNK):
            w = weight[first:first + CHUNK].to(hidden.dtype).contiguous()
            d = dlogits[:, :len(w)]
            dlogits_kernel[triton.cdiv(N, BM) * triton.cdiv(len(w), BN),](
                hidden, w, targets, lse, entropy, dlogprobs, dentropy, d, N, len(w), D, d.stride(0),
                first, 1 / ctx.temperature, GROUP=GROUP, WITH_ENTROPY=with_entropy,
                **tile_options(ctx.backend, hidden, BM))
            if needs_weight:
                dweight[first:first + CHUNK] = product(d.T, hidden)
            if needs_hidden:
                dhidden += product(d, w)
        return dhidden.to(hidden.dtype) if needs_hidden else None, dweight, None, None, None


# ---- what the trainer and the sampler call ----

def logprob(hidden, weight, targets, temperature=1.0, with_entropy=True):
    """hidden (N, D), weight (V, D), targets (N,) -> log-probs (N,), entropy (N,) in nats, fp32.

    with_entropy: False spares torch the entropy, which is then None; the kernels have it anyway.

    Both are those of softmax(hidden @ weight.T / temperature), the distribution sampled from. A row
    whose target is -1 is ignored: 0, 0, no gradient. weight may be an fp32 master beside bf16
    hidden states.
    """
    backend = kernels.backend(hidden.device)
    if backend == "torch":
        return logprob_torch(hidden, weight, targets, temperature, with_entropy)
    return LogProb.apply(hidden, weight, targets, temperature, backend)


@torch.no_grad()
def sample(hidden, weight, bits, temperature):
    """hidden (B, D), weight (V, D), bits (B,) random int64 -> tokens (B,), log-probs (B,) fp32.

    A token for each row from softmax(hidden @ weight.T / temperature); the row's bits decide which.
    Temperature 0: the most probable one, with its log-prob at temperature 1. A row of NaN gets the
    log-prob NaN.
    """
    backend = kernels.backend(hidden.device)
    if backend == "torch":
        return sample_torch(hidden, weight, bits, temperature)
    return launch_sample(backend, hidden.contiguous(), weight.to(hidden.dtype).contiguous(),
                         bits.contiguous(), temperature)
