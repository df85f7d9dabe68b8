r"""Attention over packed groups: every prompt once, its G rollouts behind it.

    tokens   [ prompt a | rollout 1 | rollout 2 ][ prompt b | rollout 1 | rollout 2 ] ...        (T,)
    position   0 1 2 3    4 5 6       4 5          0 1 2      3 4         3 4 5 6
    sees       itself     prompt a    prompt a
               causally   + itself    + itself     (never another rollout, never another group)

RPT samples G thoughts for one context. Packed this way the context costs one forward and one backward, not
G: P + G*R tokens instead of G*(P + R). A group without rollouts is an ordinary sequence, so the same call
also serves plain next-token training and prefill. Masks come from lengths alone; no token id means anything
here, and not even another group's NaN gets in.

`attention_reference` says it in plain torch. The kernels cut the square of scores into tiles:

    queries     keys of   prompt a    rollout 1   rollout 2   prompt b
    prompt a              # # # \                                            #  whole tile: no mask
    rollout 1             # # # |     # \                                    |  the prompt's last tile, cut at
    rollout 2             # # # |                 # \                           its end
    prompt b                                                  # # \          \  diagonal: key <= query

    forward   a program owns a row of tiles: walks its keys left to right with a running softmax
    dQ        the same walk; the softmax is recomputed from one number per query, its log-sum-exp
    dK, dV    a program owns a column: walks down, through every query head that shares the kv head.
              Rollouts lie right behind their prompt, so a column is one range and the test key <= query
              is right everywhere.
    Every gradient has one owner: no atomics, the same bits every time. The price is 7 products per tile in
    the backward, where a single kernel would need 5.

One layer of Qwen2.5-1.5B (H 12, Hkv 2, K 128), prompt 1,024 and 8 rollouts of 1,024, bf16:
    FLOPs, forward   80 G that rows see; 103 G with a copy of the prompt per rollout; 522 G as a masked square
    memory           28 MB of output and 0.4 MB of log-sum-exp are written; the scores that the rows see,
                     315 MB, and the reference's 8 copies of the prompt's keys and values never exist

Key tiles begin at the prompt's start and at the segment's own start, never where a query tile happens to
begin, and are visited in ascending order. A decoder that walks the cache with the same `attend_keys` thus
repeats a row of the trainer operation by operation.
"""
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import kernels
from kernels import tl, triton


@dataclass
class Layout:
    """Which row belongs to which prompt or rollout; built once per micro-batch by `make_layout`.

    N groups, M rollouts, S segments (prompts and rollouts), P and R the longest prompt and rollout, T rows.
    """
    positions: torch.Tensor        # (T,)    position of each row in its own sequence
    prompts: torch.Tensor          # (N, P)  row of each prompt token, its first row where there is none
    prompt_lens: torch.Tensor      # (N,)
    rollouts: torch.Tensor         # (M, R)  row of each rollout token, its first row where there is none
    rollout_lens: torch.Tensor     # (M,)
    owner: torch.Tensor            # (M,)    group of each rollout
    unpack: torch.Tensor           # (T,)    where row t lies in [prompts, rollouts] without padding
    response_rows: torch.Tensor    # (all rollout tokens,)  their rows, in order
    predict_rows: torch.Tensor     # (same)  row whose hidden state predicts that token: the one before it
    last_rows: torch.Tensor        # (N,)    last row of each prompt
    segments: torch.Tensor         # (S, 5)  CPU: start, end, prefix start, prefix end, end of who sees it
    tables: dict = field(default_factory=dict)

    def tiles(self, kind, block):
        """kind "query" or "key" -> int32 (tiles, 6): a tile's first row and its segment; heaviest first.

        The longest walks start first, so that none of them is what everything waits for at the end.
        """
        if (kind, block) not in self.tables:
            start, end = self.segments[:, 0], self.segments[:, 1]
            count = (end - start + block - 1) // block
            segment = torch.repeat_interleave(count)
            nth = torch.arange(len(segment)) - (count.cumsum(0) - count)[segment]
            first = start[segment] + nth * block
            start, end, prefix, prefix_end, seen_until = self.segments[segment].unbind(1)
            if kind == "query":
                work = prefix_end - prefix + torch.minimum(first + block, end) - start
            else:
                work = seen_until - first
            table = torch.cat([first[:, None], self.segments[segment]], dim=1)
            table = table[work.argsort(descending=True, stable=True)]
            self.tables[kind, block] = table.int().to(self.positions.device)
        return self.tables[kind, block]


def make_layout(groups, device="cpu"):
    """groups: [(prompt_len, [rollout_len, ...]), ...], all lengths at least 1 -> Layout."""
    lens = torch.tensor([length for prompt, rollouts in groups for length in (prompt, *rollouts)])  # (S,)
    count = torch.tensor([1 + len(rollouts) for _, rollouts in groups])                             # (N,)
    end, group = lens.cumsum(0), torch.repeat_interleave(count)
    start, first = end - lens, count.cumsum(0) - count              # of each segment; each group's prompt
    is_prompt = torch.zeros(len(lens), dtype=torch.bool).index_fill(0, first, True)
    prefix = torch.where(is_prompt, start, start[first][group])
    prefix_end = torch.where(is_prompt, start, end[first][group])
    seen_until = torch.where(is_prompt, end[first + count - 1][group], end)

    segment = torch.repeat_interleave(lens)                         # (T,) of each row
    row, in_prompt = torch.arange(len(segment)), is_prompt[segment]
    response_rows = row[~in_prompt]
    before = torch.where(row == start[segment], prefix_end[segment], row) - 1   # the prompt's last: G times

    def rows_of(start, lens):  # one line each, padded with its first row
        width = torch.arange(int(lens.max()) if len(lens) else 0)
        return start[:, None] + width * (width < lens[:, None])

    layout = Layout(
        positions=row - start[segment] + (prefix_end - prefix)[segment],
        prompts=rows_of(start[is_prompt], lens[is_prompt]), prompt_lens=lens[is_prompt],
        rollouts=rows_of(start[~is_prompt], lens[~is_prompt]), rollout_lens=lens[~is_prompt],
        owner=group[~is_prompt], unpack=torch.cat([row[in_prompt], response_rows]).argsort(),
        response_rows=response_rows, predict_rows=before[~in_prompt], last_rows=end[is_prompt] - 1,
        segments=torch.stack([start, end, prefix, prefix_end, seen_until], dim=1))
    for name in vars(layout).keys() - {"segments", "tables"}:
        setattr(layout, name, getattr(layout, name).to(device))
    return layout


def attention_reference(q, k, v, layout):
    """`attention` in plain torch: every prompt and rollout padded to a row of its own."""
    heads_first = lambda x: x.transpose(1, 2)                                # (N, P, H, K) <-> (N, H, P, K)
    sdpa = lambda q, k, v, **mask: heads_first(F.scaled_dot_product_attention(
        heads_first(q), heads_first(k), heads_first(v), enable_gqa=True, **mask))
    P, R = layout.prompts.shape[1], layout.rollouts.shape[1]
    kp, vp = k[layout.prompts], v[layout.prompts]                                        # (N, P, Hkv, K)
    rows = [sdpa(q[layout.prompts], kp, vp, is_causal=True)[real(layout.prompt_lens, P)]]
    if R:
        keys = torch.cat([kp[layout.owner], k[layout.rollouts]], dim=1)                  # (M, P + R, Hkv, K)
        values = torch.cat([vp[layout.owner], v[layout.rollouts]], dim=1)
        causal = torch.ones(R, R, dtype=torch.bool, device=q.device).tril()
        prompt = real(layout.prompt_lens, P)[layout.owner][:, None].expand(-1, R, -1)    # (M, R, P)
        mask = torch.cat([prompt, causal.expand(len(prompt), R, R)], dim=2)              # (M, R, P + R)
        out = sdpa(q[layout.rollouts], keys, values, attn_mask=mask[:, None])
        rows.append(out[real(layout.rollout_lens, R)])
    return torch.cat(rows)[layout.unpack]                                                # (T, H, K)


def real(lens, width):
    """(N,) lengths -> (N, width) True where a row is more than padding."""
    return torch.arange(width, device=lens.device) < lens[:, None]


# Head size -> queries BM, keys BN, warps, stages of the software pipeline; dK/dV holds BN keys, BM queries
# pass. 128 x 64 is the largest tile that lives in registers at K 128 (128 x 128 spills), and at K 64 two
# forward programs share a multiprocessor. The forward's BN is part of the result: another one rounds
# differently. BM is not, while a warp has 16 rows to itself: warps that share a row sum it in another order.
SMALL = dict(forward=(64, 16, 4, 2), dq=(32, 16, 8, 2), dkv=(16, 32, 4, 2))  # for tests, and for fp32
BLOCKS = {
    16: SMALL, 32: SMALL,
    64: dict(forward=(128, 64, 8, 3), dq=(128, 64, 8, 2), dkv=(64, 128, 8, 2)),
    128: dict(forward=(128, 64, 8, 3), dq=(128, 64, 8, 2), dkv=(64, 128, 8, 2)),
}


def blocks(x):
    """The line of BLOCKS for a tensor with this head size and dtype."""
    K = x.shape[-1]
    if K not in BLOCKS or x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"attention kernels know head sizes {', '.join(map(str, BLOCKS))} in bfloat16 or "
                         f"float32, not {K} in {str(x.dtype).removeprefix('torch.')}; --kernels torch does")
    return SMALL if x.dtype == torch.float32 else BLOCKS[K]  # fp32 needs twice the memory and no tensor core


@triton.jit
def load_rows(ptr, rows, end, stride, MASKED: tl.constexpr, K: tl.constexpr):
    """(len(rows), K) elements. MASKED: a row from `end` on is not read and counts as zeros."""
    at = ptr + rows[:, None].to(tl.int64) * stride + tl.arange(0, K)[None, :]
    if MASKED:
        x = tl.load(at, mask=rows[:, None] < end, other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def store_rows(ptr, x, rows, end, stride, K: tl.constexpr):
    at = ptr + rows[:, None].to(tl.int64) * stride + tl.arange(0, K)[None, :]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=rows[:, None] < end)


@triton.jit
def attend_keys(acc, l, m, q, k_ptr, v_ptr, stride, lo, hi, rows, scale2,
                MASKED: tl.constexpr, BN: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    """Let the queries q (BM, K) see keys [lo, hi), BN at a time, ascending: a stretch of their softmax.

    m (BM,) is the largest score so far in units of log 2, l (BM,) the sum of 2^(score - m), acc (BM, K) the
    values weighted so; at first -1e30, 0, 0. MASKED: a row sees keys up to rows (BM,) and below hi, and must
    see one in its very first tile. Otherwise BN divides hi - lo and every row sees every key: the same
    numbers, faster. -1e30 stands for minus infinity, which would make NaN of its difference with itself.
    """
    for tile in range(lo, hi, BN):
        keys = tile + tl.arange(0, BN)
        k = load_rows(k_ptr, keys, hi, stride, MASKED, K)
        scores = tl.dot(q, k.T, input_precision=PRECISION)                              # (BM, BN)
        if MASKED:
            scores = tl.where((keys[None, :] <= rows[:, None]) & (keys[None, :] < hi), scores, -1e30)
        m_new = tl.maximum(m, tl.max(scores, 1) * scale2)
        p = tl.exp2(scores * scale2 - m_new[:, None])
        shrink = tl.exp2(m - m_new)
        l = l * shrink + tl.sum(p, 1)
        v = load_rows(v_ptr, keys, hi, stride, MASKED, K)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        m = m_new
    return acc, l, m


@triton.jit
def forward_kernel(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, table, T, scale2,
                   H: tl.constexpr, Hkv: tl.constexpr, K: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):
    head, table = tl.program_id(0), table + tl.program_id(1) * 6
    first, start, end = tl.load(table), tl.load(table + 1), tl.load(table + 2)
    prefix, prefix_end = tl.load(table + 3), tl.load(table + 4)
    rows = first + tl.arange(0, BM)
    q = load_rows(q_ptr + head * K, rows, end, H * K, True, K)
    k_ptr += head // (H // Hkv) * K
    v_ptr += head // (H // Hkv) * K

    acc, l = tl.zeros((BM, K), tl.float32), tl.zeros((BM,), tl.float32)
    m = tl.full((BM,), -1e30, tl.float32)
    tail = prefix + (prefix_end - prefix) // BN * BN
    diagonal = start + (first - start) // BN * BN          # the first row sees this key, so every row does
    acc, l, m = attend_keys(acc, l, m, q, k_ptr, v_ptr, Hkv * K, prefix, tail, rows, scale2,
                            False, BN, K, PRECISION)
    acc, l, m = attend_keys(acc, l, m, q, k_ptr, v_ptr, Hkv * K, tail, prefix_end, rows, scale2,
                            True, BN, K, PRECISION)
    acc, l, m = attend_keys(acc, l, m, q, k_ptr, v_ptr, Hkv * K, start, diagonal, rows, scale2,
                            False, BN, K, PRECISION)
    acc, l, m = attend_keys(acc, l, m, q, k_ptr, v_ptr, Hkv * K, diagonal, tl.minimum(first + BM, end), rows,
                            scale2, True, BN, K, PRECISION)
    store_rows(out_ptr + head * K, acc / l[:, None], rows, end, H * K, K)
    tl.store(lse_ptr + head * T + rows, m + tl.log2(l), mask=rows < end)


@triton.jit
def add_dq(dq, q, dout, lse, delta, k_ptr, v_ptr, stride, lo, hi, rows, scale2,
           MASKED: tl.constexpr, BN: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    """What keys [lo, hi) add to the gradient of the queries; arguments as in `attend_keys`."""
    for tile in range(lo, hi, BN):
        keys = tile + tl.arange(0, BN)
        k = load_rows(k_ptr, keys, hi, stride, MASKED, K)
        v = load_rows(v_ptr, keys, hi, stride, MASKED, K)
        p = tl.exp2(tl.dot(q, k.T, input_precision=PRECISION) * scale2 - lse[:, None])  # (BM, BN)
        if MASKED:  # chosen, not multiplied: what is hidden may be infinite here
            p = tl.where((keys[None, :] <= rows[:, None]) & (keys[None, :] < hi), p, 0.0)
        ds = p * (tl.dot(dout, v.T, input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def dq_kernel(q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, table, T, scale, scale2,
              H: tl.constexpr, Hkv: tl.constexpr, K: tl.constexpr,
              BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):
    head, table = tl.program_id(0), table + tl.program_id(1) * 6
    first, start, end = tl.load(table), tl.load(table + 1), tl.load(table + 2)
    prefix, prefix_end = tl.load(table + 3), tl.load(table + 4)
    rows = first + tl.arange(0, BM)
    q = load_rows(q_ptr + head * K, rows, end, H * K, True, K)
    out = load_rows(out_ptr + head * K, rows, end, H * K, True, K)
    dout = load_rows(dout_ptr + head * K, rows, end, H * K, True, K)
    lse = tl.load(lse_ptr + head * T + rows, mask=rows < end, other=0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)   # the sum over keys of p * dp, without p
    tl.store(delta_ptr + head * T + rows, delta, mask=rows < end)
    k_ptr += head // (H // Hkv) * K
    v_ptr += head // (H // Hkv) * K

    dq = tl.zeros((BM, K), tl.float32)
    tail = prefix + (prefix_end - prefix) // BN * BN
    diagonal = start + (first - start) // BN * BN
    dq = add_dq(dq, q, dout, lse, delta, k_ptr, v_ptr, Hkv * K, prefix, tail, rows, scale2,
                False, BN, K, PRECISION)
    dq = add_dq(dq, q, dout, lse, delta, k_ptr, v_ptr, Hkv * K, tail, prefix_end, rows, scale2,
                True, BN, K, PRECISION)
    dq = add_dq(dq, q, dout, lse, delta, k_ptr, v_ptr, Hkv * K, start, diagonal, rows, scale2,
                False, BN, K, PRECISION)
    dq = add_dq(dq, q, dout, lse, delta, k_ptr, v_ptr, Hkv * K, diagonal, tl.minimum(first + BM, end), rows,
                scale2, True, BN, K, PRECISION)
    store_rows(dq_ptr + head * K, dq * scale, rows, end, H * K, K)


@triton.jit
def dkv_kernel(q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, table, T, scale, scale2,
               H: tl.constexpr, Hkv: tl.constexpr, K: tl.constexpr,
               BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):
    kv_head, table = tl.program_id(0), table + tl.program_id(1) * 6
    first, end, seen_until = tl.load(table), tl.load(table + 2), tl.load(table + 5)
    keys = first + tl.arange(0, BN)
    k = load_rows(k_ptr + kv_head * K, keys, end, Hkv * K, True, K)
    v = load_rows(v_ptr + kv_head * K, keys, end, Hkv * K, True, K)
    dk, dv = tl.zeros((BN, K), tl.float32), tl.zeros((BN, K), tl.float32)
    tiles = tl.cdiv(seen_until - first, BM)
    for i in range(tiles * (H // Hkv)):  # one flat loop over heads and tiles: nested ones spill registers
        head = kv_head * (H // Hkv) + i // tiles
        rows = first + i % tiles * BM + tl.arange(0, BM)
        q = load_rows(q_ptr + head * K, rows, seen_until, H * K, True, K)
        dout = load_rows(dout_ptr + head * K, rows, seen_until, H * K, True, K)   # zeros add nothing
        lse = tl.load(lse_ptr + head * T + rows, mask=rows < seen_until, other=0.0)
        delta = tl.load(delta_ptr + head * T + rows, mask=rows < seen_until, other=0.0)
        p = tl.exp2(tl.dot(k, q.T, input_precision=PRECISION) * scale2 - lse[None, :])  # (BN, BM)
        p = tl.where(keys[:, None] <= rows[None, :], p, 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        ds = p * (tl.dot(v, dout.T, input_precision=PRECISION) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    store_rows(dk_ptr + kv_head * K, dk * scale, keys, end, Hkv * K, K)
    store_rows(dv_ptr + kv_head * K, dv, keys, end, Hkv * K, K)


class PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, layout, kind):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        (T, H, K), Hkv = q.shape, k.shape[1]
        BM, BN, warps, stages = blocks(q)["forward"]
        out, lse = torch.empty_like(q), torch.empty(H, T, dtype=torch.float32, device=q.device)
        table = layout.tiles("query", BM)
        forward_kernel[H, len(table)](
            q, k, v, out, lse, table, T, scale2(K),
            H, Hkv, K, BM, BN, kernels.precision(q), **kernels.options(kind, warps, stages))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.kind = layout, kind
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        (T, H, K), Hkv = q.shape, k.shape[1]
        dout = dout.contiguous()
        dq, dk, dv, delta = (torch.empty_like(x) for x in (q, k, v, lse))
        BM, BN, warps, stages = blocks(q)["dq"]            # first: it writes the delta that dK/dV reads
        table = ctx.layout.tiles("query", BM)
        dq_kernel[H, len(table)](
            q, k, v, out, dout, lse, delta, dq, table, T, K ** -0.5, scale2(K),
            H, Hkv, K, BM, BN, kernels.precision(q), **kernels.options(ctx.kind, warps, stages))
        BM, BN, warps, stages = blocks(q)["dkv"]
        table = ctx.layout.tiles("key", BN)
        dkv_kernel[Hkv, len(table)](
            q, k, v, dout, lse, delta, dk, dv, table, T, K ** -0.5, scale2(K),
            H, Hkv, K, BM, BN, kernels.precision(q), **kernels.options(ctx.kind, warps, stages))
        return dq, dk, dv, None, None


def scale2(K):
    """1 / sqrt(K) in units of log 2: the kernels compute 2^x, one instruction, where softmax says e^x."""
    return K ** -0.5 * 1.4426950408889634


def attention(q, k, v, layout):
    """q (T, H, K), k and v (T, Hkv, K), H a multiple of Hkv -> (T, H, K). Scale 1 / sqrt(K)."""
    kind = kernels.chosen(q.device)
    if kind == "torch":
        return attention_reference(q, k, v, layout)
    return PackedAttention.apply(q, k, v, layout, kind)
