r"""Attention over packed groups: every prompt once, its G rollouts behind it.

    tokens    [ prompt a | rollout 1 | rollout 2 ][ prompt b | rollout 1 | rollout 2 ] ...   (T,)
    position    0 1 2 3    4 5 6       4 5          0 1 2      3 4         3 4 5 6
    sees        itself     prompt a    prompt a
                causally   + itself    + itself     (no other rollout, no other group)

Packed this way a prompt costs one forward and one backward pass instead of G: P + G*R tokens, not
G*(P + R). A group without rollouts is an ordinary sequence, so the same call also serves next-token
training and prefill. Masks come from lengths alone, never from token ids, and not even a NaN passes
from one group to another.

`attention_torch` does this in plain torch. The kernels cut the square of scores into tiles:

    queries     keys of   prompt a    rollout 1   rollout 2   prompt b
    prompt a              # # # \                                        #  whole tile, no mask
    rollout 1             # # # |     # \                                |  the prompt's last tile
    rollout 2             # # # |                 # \                    \  key <= query
    prompt b                                                  # # \

    forward   a program owns a row of tiles and walks along its keys with a running softmax
    dQ        the same walk; one number per query, its log-sum-exp, restores the softmax
    dK, dV    a program owns a column of tiles of one query head and walks down it; heads that
              share a kv head are added up afterwards. Rollouts lie right behind their prompt, so
              a column is one range of queries, and the test key <= query is right everywhere.
    Every gradient has one owner: no atomics, the same bits every time. The price is 7 products per
    tile in the backward pass, where a single kernel would need 5.

One layer of Qwen2.5-1.5B (H 12, Hkv 2, K 128), prompt 1,024 and 8 rollouts of 1,024, bf16:
    FLOPs, forward   80 G; with a prompt for each rollout 103 G, as a masked square 522 G
    memory           28 MB of output and 0.4 MB of log-sum-exp are written; the 315 MB of scores
                     and the 8 copies of the prompt's keys and values never exist

Key tiles begin at the start of the prompt and at the start of the segment, wherever the query tile
begins, and are visited in ascending order. So a decoder that walks the cache with the same
`attend_keys` repeats a row of the trainer operation by operation.
"""
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import kernels
from kernels import tl, triton


@dataclass
class Layout:
    """Which row of a packed (T, ...) tensor belongs to what; `make_layout` builds it from lengths.

    N groups, M rollouts with S tokens, N + M segments (prompts and rollouts), P and R the longest.
    """
    positions: torch.Tensor        # (T,)    position of each row in its own sequence
    prompts: torch.Tensor          # (N, P)  row of each prompt token; its first row as padding
    prompt_lens: torch.Tensor      # (N,)
    rollouts: torch.Tensor         # (M, R)  row of each rollout token; its first row as padding
    rollout_lens: torch.Tensor     # (M,)
    owner: torch.Tensor            # (M,)    group of each rollout
    unpack: torch.Tensor           # (T,)    where row t lies in [prompts, rollouts] without padding
    rollout_rows: torch.Tensor     # (S,)    rows of the rollout tokens, in order
    predict_rows: torch.Tensor     # (S,)    row that predicts each of them: the one before it
    last_rows: torch.Tensor        # (N,)    last row of each prompt
    segments: torch.Tensor         # (N + M, 5) on the CPU: start, end, start and end of the prefix
    #                                that it sees, end of the rows that see it
    tables: dict = field(default_factory=dict)     # what `tiles` and `parts` computed

    def attend(self, layer, q, k, v):
        return attention(q, k, v, self)

    def tiles(self, axis, block):
        """axis "query" or "key" -> int32 (tiles, 6): the first row of each tile, and its segment.

        The longest walks come first, so that the launch does not end waiting for one of them.
        """
        if (axis, block) not in self.tables:
            start, end = self.segments[:, 0], self.segments[:, 1]
            count = (end - start + block - 1) // block
            segment = torch.repeat_interleave(count)
            nth = torch.arange(len(segment)) - (count.cumsum(0) - count)[segment]
            first = start[segment] + nth * block
            start, end, prefix, prefix_end, seen_until = self.segments[segment].unbind(1)
            if axis == "query":
                work = prefix_end - prefix + torch.minimum(first + block, end) - start
            else:
                work = seen_until - first
            table = torch.cat([first[:, None], self.segments[segment]], dim=1)
            table = table[work.argsort(descending=True, stable=True)]
            self.tables[axis, block] = table.int().to(self.positions.device)
        return self.tables[axis, block]

    def parts(self, dtype):
        """What AttentionCPU computes, a list of:

        rows of queries (n, length), which of them are no padding, rows of keys (n, keys), a mask
        (n, 1, 1, keys) of padded keys. No mask: segments over themselves, causally. In that order.
        """
        if ("parts", dtype) in self.tables:
            return self.tables["parts", dtype]
        start, end, prefix, prefix_end, seen_until = self.segments.unbind(1)
        lens, tail = end - start, (seen_until - end) * (prefix == prefix_end)  # behind a prompt
        parts = []
        for some in buckets(lens):
            rows = padded_rows(start[some], lens[some])
            parts.append((rows, real_places(lens[some], rows), rows, None))
        for some in buckets(tail):
            rows, keys = (padded_rows(first[some], count[some])
                          for first, count in ((end, tail), (start, lens)))
            unseen = ~is_real(lens[some], keys.shape[1])[:, None, None]
            mask = torch.zeros(unseen.shape, dtype=dtype).masked_fill(unseen, -torch.inf)
            parts.append((rows, real_places(tail[some], rows), keys, mask))
        self.tables["parts", dtype] = parts
        return parts


def make_layout(groups, device="cpu"):
    """groups: [(prompt_len, [rollout_len, ...]), ...], all lengths at least 1 -> Layout."""
    # Where each segment begins and ends, and which group it belongs to: (N + M,) each.
    lens = torch.tensor([n for prompt, rollouts in groups for n in (prompt, *rollouts)])
    count = torch.tensor([1 + len(rollouts) for _, rollouts in groups])                      # (N,)
    end = lens.cumsum(0)
    start = end - lens
    group = torch.repeat_interleave(count)
    prompt_of = count.cumsum(0) - count                            # (N,) segment of the prompt
    is_prompt = torch.zeros(len(lens), dtype=torch.bool).index_fill(0, prompt_of, True)

    # Which rows a segment sees besides its own, and the end of the rows that see it.
    prefix = torch.where(is_prompt, start, start[prompt_of][group])
    prefix_end = torch.where(is_prompt, start, end[prompt_of][group])
    seen_until = torch.where(is_prompt, end[prompt_of + count - 1][group], end)

    # The segment of each row, and the row before it: before a rollout comes the end of its prompt.
    segment = torch.repeat_interleave(lens)                                                  # (T,)
    row = torch.arange(len(segment))
    in_prompt = is_prompt[segment]
    rollout_rows = row[~in_prompt]
    before = torch.where(row == start[segment], prefix_end[segment], row) - 1

    layout = Layout(
        positions=row - start[segment] + (prefix_end - prefix)[segment],
        prompts=padded_rows(start[is_prompt], lens[is_prompt]),
        prompt_lens=lens[is_prompt],
        rollouts=padded_rows(start[~is_prompt], lens[~is_prompt]),
        rollout_lens=lens[~is_prompt],
        owner=group[~is_prompt],
        unpack=torch.cat([row[in_prompt], rollout_rows]).argsort(),
        rollout_rows=rollout_rows,
        predict_rows=before[~in_prompt],
        last_rows=end[is_prompt] - 1,
        segments=torch.stack([start, end, prefix, prefix_end, seen_until], dim=1))
    for name in vars(layout).keys() - {"segments", "tables"}:
        setattr(layout, name, getattr(layout, name).to(device))
    return layout


def padded_rows(start, lens):
    """First rows and lengths of n segments -> (n, longest) their rows, padded with the first."""
    nth = torch.arange(int(lens.max()) if len(lens) else 0)
    return start[:, None] + nth * (nth < lens[:, None])


def is_real(lens, width):
    """(n,) lengths -> (n, width), True where a place is not padding."""
    return torch.arange(width, device=lens.device) < lens[:, None]


def real_places(lens, rows):
    """-> which places of rows.flatten() are no padding."""
    return is_real(lens, rows.shape[1]).flatten().nonzero().squeeze(1)


def buckets(lens):
    """Lists of the lengths that are not 0, of similar ones: up to 16, 32, 64 ... tokens."""
    size = lens.clamp(min=16).double().log2().ceil() * (lens > 0)
    return [torch.nonzero(size == some).squeeze(1) for some in size.unique() if some]


# ---- torch ----

def attention_torch(q, k, v, layout):
    """`attention` in plain torch, with prompts and rollouts unpacked to padded batches."""
    P, R = layout.prompts.shape[1], layout.rollouts.shape[1]
    prompt_k, prompt_v = k[layout.prompts], v[layout.prompts]                # (N, P, Hkv, K)
    out = sdpa(q[layout.prompts], prompt_k, prompt_v, is_causal=True)
    rows = [out[is_real(layout.prompt_lens, P)]]
    if R:
        keys = torch.cat([prompt_k[layout.owner], k[layout.rollouts]], dim=1)   # (M, P + R, ...)
        values = torch.cat([prompt_v[layout.owner], v[layout.rollouts]], dim=1)
        sees_prompt = is_real(layout.prompt_lens, P)[layout.owner]              # (M, P)
        causal = torch.ones(R, R, dtype=torch.bool, device=q.device).tril()
        mask = torch.cat([sees_prompt[:, None].expand(-1, R, -1),
                          causal.expand(len(sees_prompt), R, R)], dim=2)        # (M, R, P + R)
        out = sdpa(q[layout.rollouts], keys, values, attn_mask=mask[:, None])
        rows.append(out[is_real(layout.rollout_lens, R)])
    return torch.cat(rows)[layout.unpack]                                       # (T, H, K)


def sdpa(q, k, v, **mask):
    """(n, length, heads, K) -> the same; torch wants heads before length."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **mask).transpose(1, 2)


# ---- torch, on a CPU ----

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class AttentionCPU(torch.autograd.Function):
    """`attention` by torch's flash attention, with no copy of a prompt and little padding:

        segments of similar length     over themselves, causally        (n, length) queries
        a group's rollouts, in a row   over their prompt

    What a rollout's token sees is in two halves, whose log-sum-exps say what each weighs. Given the
    output and log-sum-exp of the whole, the backward pass of a half gives that half's gradients.
    In fp32 whatever the dtype, because torch's backward pass in bf16 takes two to seven times as
    long.
    """

    @staticmethod
    def forward(ctx, q, k, v, layout):
        inputs = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v)]
        out, lse = torch.empty_like(inputs[0]), torch.empty_like(inputs[0][..., 0])
        for queries, real, keys, mask in layout.parts(out.dtype):
            rows, sees_itself = queries.flatten()[real], mask is None
            part = flash(*padded(inputs, queries, keys), 0.0, sees_itself, attn_mask=mask)
            part, part_lse = (x.transpose(1, 2).flatten(0, 1).index_select(0, real) for x in part)
            if not sees_itself:
                own, own_lse = out.index_select(0, rows), lse.index_select(0, rows)
                part = part.lerp(own, (own_lse - part_lse).sigmoid()[..., None])
                part_lse = torch.logaddexp(own_lse, part_lse)
            out.index_copy_(0, rows, part)
            lse.index_copy_(0, rows, part_lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout = layout
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx, dout):
        *inputs, out, lse = ctx.saved_tensors
        dtypes = [x.dtype for x in inputs]
        inputs, dout = [x.to(out.dtype) for x in inputs], dout.to(out.dtype)
        grads = [torch.zeros_like(x) for x in inputs]
        for queries, real, keys, mask in ctx.layout.parts(out.dtype):
            # A row of padding has the log-sum-exp infinity, so that it gives no key a weight.
            part_lse = torch.full((queries.numel(), lse.shape[1]), torch.inf, dtype=lse.dtype)
            part_lse[real] = lse.index_select(0, queries.flatten()[real])
            part_lse = part_lse.view(*queries.shape, -1).transpose(1, 2).contiguous()
            part = flash_backward(
                pick(dout, queries), *padded(inputs, queries, keys), pick(out, queries), part_lse,
                0.0, mask is None, attn_mask=mask)
            for grad, more, rows in zip(grads, part, (queries, keys, keys)):
                # Padding has the gradient 0.
                grad.index_add_(0, rows.flatten(), more.transpose(1, 2).flatten(0, 1))
        return *(grad.to(dtype) for grad, dtype in zip(grads, dtypes)), None


def padded(inputs, queries, keys):
    """q, k, v and rows (n, length) of them -> (n, heads, length, K) each."""
    return [pick(x, rows) for x, rows in zip(inputs, (queries, keys, keys))]


def pick(x, rows):
    """x (T, heads, K), rows (n, length) -> (n, heads, length, K); x[rows] would take longer."""
    return x.index_select(0, rows.flatten()).view(*rows.shape, *x.shape[1:]).transpose(1, 2)


# ---- kernels ----

# Head size -> queries BM and keys BN of a tile, warps, stages of the software pipeline. 128 x 64 is
# the largest tile that fits in registers at K = 128 (128 x 128 spills); at K = 64 two forward
# programs share a multiprocessor. The forward's BN is part of the result, because another one sums
# in another order. BM is not, as long as a warp has 16 rows to itself: warps that share a row would
# sum it in another order. SMALL is for tests, and for fp32, which takes twice the memory.
SMALL = dict(forward=(64, 16, 4, 2), dq=(32, 16, 8, 2), dkv=(16, 32, 4, 2))
LARGE = dict(forward=(128, 64, 8, 3), dq=(128, 64, 8, 3), dkv=(64, 64, 4, 2))
BLOCKS = {16: SMALL, 32: SMALL, 64: LARGE, 128: LARGE}


def blocks(x):
    """The line of BLOCKS for a tensor with this head size and dtype."""
    K = x.shape[-1]
    if K not in BLOCKS or x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"attention kernels know head sizes {', '.join(map(str, BLOCKS))} in "
                         f"bfloat16 or float32, not {K} in {str(x.dtype).removeprefix('torch.')}; "
                         "--kernels torch does")
    return SMALL if x.dtype == torch.float32 else BLOCKS[K]


def scale2(K):
    """1 / sqrt(K) in units of log 2: kernels compute 2^x, one instruction, instead of e^x."""
    return K ** -0.5 * 1.4426950408889634


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
def attend_keys(acc, l, m, q, k_ptr, v_ptr, stride, lo, whole, hi, rows, scale2,
                BN: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    """Continue the softmax of the queries q (BM, K) over keys [lo, hi), BN at a time, ascending.

    m (BM,) is the largest score so far in units of log 2, l (BM,) the sum of 2^(score - m), acc
    (BM, K) the sum of the values with these weights. They begin as -1e30, 0, 0; minus infinity
    would give NaN when it is subtracted from itself.
    Below `whole`, a multiple of BN away from lo, every query sees every key and no mask is needed.
    From there on a query sees keys up to rows (BM,); in its very first tile it must see one.
    """
    for first in range(lo, whole, BN):
        acc, l, m = attend_tile(acc, l, m, q, k_ptr, v_ptr, stride, first, hi, rows, scale2,
                                False, BN, K, PRECISION)
    for first in range(whole, hi, BN):
        acc, l, m = attend_tile(acc, l, m, q, k_ptr, v_ptr, stride, first, hi, rows, scale2,
                                True, BN, K, PRECISION)
    return acc, l, m


@triton.jit
def attend_tile(acc, l, m, q, k_ptr, v_ptr, stride, first, hi, rows, scale2,
                MASKED: tl.constexpr, BN: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    """The step of `attend_keys` over the tile of keys from `first` on."""
    keys = first + tl.arange(0, BN)
    k = load_rows(k_ptr, keys, hi, stride, MASKED, K)
    scores = tl.dot(q, k.T, input_precision=PRECISION)                                # (BM, BN)
    if MASKED:
        scores = tl.where((keys[None, :] <= rows[:, None]) & (keys[None, :] < hi), scores, -1e30)
    m_new = tl.maximum(m, tl.max(scores, 1) * scale2)
    p = tl.exp2(scores * scale2 - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    l = l * shrink + tl.sum(p, 1)
    v = load_rows(v_ptr, keys, hi, stride, MASKED, K)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, l, m_new


@triton.jit(do_not_specialize=["T"])
def forward_kernel(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, table_ptr, T, scale2,
                   H: tl.constexpr, Hkv: tl.constexpr, K: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):
    """A tile of BM queries of one head walks over the prompt's keys, then over its own."""
    head = tl.program_id(0)
    table_ptr += tl.program_id(1) * 6
    first, start, end = tl.load(table_ptr), tl.load(table_ptr + 1), tl.load(table_ptr + 2)
    prefix, prefix_end = tl.load(table_ptr + 3), tl.load(table_ptr + 4)
    rows = first + tl.arange(0, BM)
    q = load_rows(q_ptr + head * K, rows, end, H * K, True, K)
    k_ptr += head // (H // Hkv) * K
    v_ptr += head // (H // Hkv) * K

    acc = tl.zeros((BM, K), tl.float32)
    l = tl.zeros((BM,), tl.float32)
    m = tl.full((BM,), -1e30, tl.float32)
    # Below `tail` and below `diagonal` every row of the tile sees every key.
    tail = prefix + (prefix_end - prefix) // BN * BN
    diagonal = start + (first - start) // BN * BN
    acc, l, m = attend_keys(acc, l, m, q, k_ptr, v_ptr, Hkv * K, prefix, tail, prefix_end, rows,
                            scale2, BN, K, PRECISION)
    acc, l, m = attend_keys(acc, l, m, q, k_ptr, v_ptr, Hkv * K, start, diagonal,
                            tl.minimum(first + BM, end), rows, scale2, BN, K, PRECISION)
    store_rows(out_ptr + head * K, acc / l[:, None], rows, end, H * K, K)
    # The log-sum-exp of each query, in units of log 2.
    tl.store(lse_ptr + head * T + rows, m + tl.log2(l), mask=rows < end)


@triton.jit
def dq_tile(dq, q, dout, lse, delta, k_ptr, v_ptr, stride, first, hi, rows, scale2,
            MASKED: tl.constexpr, BN: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    """What one tile of keys adds to the gradient of the queries, before the factor 1 / sqrt(K)."""
    keys = first + tl.arange(0, BN)
    k = load_rows(k_ptr, keys, hi, stride, MASKED, K)
    v = load_rows(v_ptr, keys, hi, stride, MASKED, K)
    p = tl.exp2(tl.dot(q, k.T, input_precision=PRECISION) * scale2 - lse[:, None])    # (BM, BN)
    if MASKED:
        # Not p * mask, because the p of a hidden key may be infinite.
        p = tl.where((keys[None, :] <= rows[:, None]) & (keys[None, :] < hi), p, 0.0)
    ds = p * (tl.dot(dout, v.T, input_precision=PRECISION) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def add_dq(dq, q, dout, lse, delta, k_ptr, v_ptr, stride, lo, whole, hi, rows, scale2,
           BN: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    """What keys [lo, hi) add to the gradient of the queries; arguments as in `attend_keys`."""
    for first in range(lo, whole, BN):
        dq = dq_tile(dq, q, dout, lse, delta, k_ptr, v_ptr, stride, first, hi, rows, scale2,
                     False, BN, K, PRECISION)
    for first in range(whole, hi, BN):
        dq = dq_tile(dq, q, dout, lse, delta, k_ptr, v_ptr, stride, first, hi, rows, scale2,
                     True, BN, K, PRECISION)
    return dq


@triton.jit(do_not_specialize=["T"])
def dq_kernel(q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, table_ptr, T,
              scale, scale2, H: tl.constexpr, Hkv: tl.constexpr, K: tl.constexpr,
              BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):
    """The walk of `forward_kernel`, for dQ; also leaves delta, which dK and dV need."""
    head = tl.program_id(0)
    table_ptr += tl.program_id(1) * 6
    first, start, end = tl.load(table_ptr), tl.load(table_ptr + 1), tl.load(table_ptr + 2)
    prefix, prefix_end = tl.load(table_ptr + 3), tl.load(table_ptr + 4)
    rows = first + tl.arange(0, BM)
    q = load_rows(q_ptr + head * K, rows, end, H * K, True, K)
    out = load_rows(out_ptr + head * K, rows, end, H * K, True, K)
    dout = load_rows(dout_ptr + head * K, rows, end, H * K, True, K)
    lse = tl.load(lse_ptr + head * T + rows, mask=rows < end, other=0.0)
    # delta is the sum of p * dp over all keys, computed without p.
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + head * T + rows, delta, mask=rows < end)
    k_ptr += head // (H // Hkv) * K
    v_ptr += head // (H // Hkv) * K

    dq = tl.zeros((BM, K), tl.float32)
    tail = prefix + (prefix_end - prefix) // BN * BN
    diagonal = start + (first - start) // BN * BN
    dq = add_dq(dq, q, dout, lse, delta, k_ptr, v_ptr, Hkv * K, prefix, tail, prefix_end, rows,
                scale2, BN, K, PRECISION)
    dq = add_dq(dq, q, dout, lse, delta, k_ptr, v_ptr, Hkv * K, start, diagonal,
                tl.minimum(first + BM, end), rows, scale2, BN, K, PRECISION)
    store_rows(dq_ptr + head * K, dq * scale, rows, end, H * K, K)


@triton.jit(do_not_specialize=["T"])
def dkv_kernel(q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, table_ptr, T,
               scale, scale2, H: tl.constexpr, Hkv: tl.constexpr, K: tl.constexpr,
               BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):
    """A tile of BN keys; the queries of one head that see it pass, BM at a time.

    Heads that share a kv head have programs of their own: the keys of a prompt are seen by all its
    rollouts, and one program for all heads would still run when the others have long ended.
    """
    head = tl.program_id(0)
    table_ptr += tl.program_id(1) * 6
    first, end, seen_until = tl.load(table_ptr), tl.load(table_ptr + 2), tl.load(table_ptr + 5)
    keys = first + tl.arange(0, BN)
    kv_head = head // (H // Hkv)
    k = load_rows(k_ptr + kv_head * K, keys, end, Hkv * K, True, K)
    v = load_rows(v_ptr + kv_head * K, keys, end, Hkv * K, True, K)
    dk, dv = tl.zeros((BN, K), tl.float32), tl.zeros((BN, K), tl.float32)
    # Queries from seen_until on are read as zeros, which add nothing.
    for start in range(first, seen_until, BM):
        rows = start + tl.arange(0, BM)
        q = load_rows(q_ptr + head * K, rows, seen_until, H * K, True, K)
        dout = load_rows(dout_ptr + head * K, rows, seen_until, H * K, True, K)
        lse = tl.load(lse_ptr + head * T + rows, mask=rows < seen_until, other=0.0)
        delta = tl.load(delta_ptr + head * T + rows, mask=rows < seen_until, other=0.0)
        p = tl.exp2(tl.dot(k, q.T, input_precision=PRECISION) * scale2 - lse[None, :])    # (BN, BM)
        p = tl.where(keys[:, None] <= rows[None, :], p, 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        ds = p * (tl.dot(v, dout.T, input_precision=PRECISION) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    store_rows(dk_ptr + head * K, dk * scale, keys, end, H * K, K)
    store_rows(dv_ptr + head * K, dv, keys, end, H * K, K)


# ---- what model and sampler call ----

class PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, layout, backend):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        (T, H, K), Hkv = q.shape, k.shape[1]
        BM, BN, warps, stages = blocks(q)["forward"]
        out = torch.empty_like(q)
        lse = torch.empty(H, T, dtype=torch.float32, device=q.device)
        table = layout.tiles("query", BM)
        forward_kernel[H, len(table)](
            q, k, v, out, lse, table, T, scale2(K), H, Hkv, K, BM, BN, kernels.dot_precision(q),
            **kernels.launch_options(backend, warps, stages))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.backend = layout, backend
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        (T, H, K), Hkv = q.shape, k.shape[1]
        dout = dout.contiguous()
        dq, delta = torch.empty_like(q), torch.empty_like(lse)
        # The gradients that each query head has for its keys and values.
        dk, dv = torch.empty(2, T, H, K, dtype=torch.float32, device=q.device)
        precision = kernels.dot_precision(q)
        # dQ comes first, because it writes the delta that dK and dV read.
        BM, BN, warps, stages = blocks(q)["dq"]
        table = ctx.layout.tiles("query", BM)
        dq_kernel[H, len(table)](
            q, k, v, out, dout, lse, delta, dq, table, T, K ** -0.5, scale2(K),
            H, Hkv, K, BM, BN, precision, **kernels.launch_options(ctx.backend, warps, stages))
        BM, BN, warps, stages = blocks(q)["dkv"]
        table = ctx.layout.tiles("key", BN)
        dkv_kernel[H, len(table)](
            q, k, v, dout, lse, delta, dk, dv, table, T, K ** -0.5, scale2(K),
            H, Hkv, K, BM, BN, precision, **kernels.launch_options(ctx.backend, warps, stages))
        dk, dv = (x.view(T, Hkv, -1, K).sum(dim=2).to(k.dtype) for x in (dk, dv))
        return dq, dk, dv, None, None


def attention(q, k, v, layout):
    """q (T, H, K), k and v (T, Hkv, K), H a multiple of Hkv -> (T, H, K). Scale 1 / sqrt(K)."""
    backend = kernels.backend(q.device)
    if backend == "torch":
        on_cpu = q.device.type == "cpu"
        return AttentionCPU.apply(q, k, v, layout) if on_cpu else attention_torch(q, k, v, layout)
    return PackedAttention.apply(q, k, v, layout, backend)
