"""Attention of one new token per row over a KV cache that holds every prompt once.

    prompt cache   slot 0 [ prompt a ......... ]   slot 1 [ prompt b .... ]          (S, Hkv, P, K)
    row cache      row 0  [ own tokens ... ]  of a                                   (B, Hkv, R, K)
                   row 1  [ own ]             of b
                   row 2  [ own tokens ....... ]  of a

    prefix pass    one program per prompt (64 rows x query heads at most) and KV head
                   [ row 0, heads 0-5 ]
                   [ row 2, heads 0-5 ]  x  [ prompt a ......... ]   ->  state (m, l, acc) of both
                   and program i appends the new key and value of row i to its cache
    suffix pass    one program per row and KV head
                   [ row 2, heads 0-5 ]  x  [ own tokens ....... ]   ->  continues that state: out

A decode step does little but read the cache, so its time is bytes / bandwidth. For 8 rollouts of
1,024 tokens behind a prompt of 1,024, Qwen2.5-1.5B (28,672 bytes a token) reads 470 MB a step if
each rollout has a copy of the prompt, and 264 MB if they share one.

The suffix pass continues the state, because merging two finished halves would round where the
trainer, which walks over prompt and rollout in one go, does not. Both run `attend_keys` over the
same key tiles in the same order and arrive at the same bits. (That rules out splitting long rows
over several programs, as would pay below about 64 rows, which are too few to fill the GPU.)
"""
import torch
import torch.nn.functional as F

import kernels
from kernels import tl, triton
from kernels.attention import attend_keys, blocks, scale2

PREFIX_TILE = 64  # rows x query heads of a prefix program: one wgmma tile
# Query heads of a row in a suffix program, padded. A tensor core takes at least 16; with 64 it runs
# the trainer's instruction. Whether 16 would give the same bits on a GPU is not known yet.
SUFFIX_TILE = dict(fast=16, bitwise=64)


class Rows:
    """Which prompt each of B rows continues, and how many tokens of its own it has cached.

    Tensors are changed in place, never replaced, so that a captured CUDA graph sees the changes.
    """

    def __init__(self, B, S, heads_per_kv, device):
        self.heads_per_kv = heads_per_kv
        self.prompt_lens = integers(S, device=device)   # tokens in each slot
        self.slot = integers(B, device=device)          # of the row's prompt
        self.lengths = integers(B, device=device)       # own tokens, the new one included
        self.busy = integers(B, device=device)          # 0 where the row is idle, else 1
        # For the kernels: rows sorted by slot, and for each prefix program the place in that order
        # where its rows begin, how many they are, and their slot.
        self.order = integers(B, device=device)
        self.work = integers(B, 3, device=device).int()
        # For torch: bounds of prompt_lens and lengths, and the place of each row in a grid (S, M).
        self.longest = (0, 0)
        self.M = 1
        self.place_in_grid = integers(B, device=device)
        self.index = torch.arange(B, device=device)
        self.tables = {}                                # that all layers of a step share

    def place(self, slots):
        """slots: that of each row's prompt, -1 for an idle row. Call it when rows change hands."""
        slots = torch.tensor(slots)
        order = slots.argsort(stable=True)                               # idle rows first
        slot = slots[order]
        nth = torch.arange(len(slot)) - torch.searchsorted(slot, slot)   # among rows of its slot

        rows_per_program = max(1, PREFIX_TILE // self.heads_per_kv)
        first = torch.nonzero((nth % rows_per_program == 0) & (slot >= 0)).squeeze(1)
        count = first.diff(append=torch.tensor([len(slot)]))
        work = torch.stack([first, count, slot[first]], dim=1)

        S, self.M = len(self.prompt_lens), int(nth[slot >= 0].max()) + 1
        in_grid = torch.where(slot >= 0, slot * self.M + nth, S * self.M)  # idle: behind the grid
        self.place_in_grid[order.to(self.order.device)] = in_grid.to(self.order.device)
        self.slot.copy_(slots.clamp(min=0))
        self.busy.copy_(slots >= 0)
        self.lengths.mul_(self.busy)
        self.order.copy_(order)
        self.work.zero_()[:len(work)] = work.to(self.work)
        self.longest = (self.prompt_lens[self.slot].max().item(), self.lengths.max().item())
        self.tables = {}

    def advance(self, R):
        """Count the token that is about to be cached; there is room for R.

        A row that goes on after its rollout has ended may be full; the clamp makes it overwrite its
        own last place.
        """
        self.lengths.add_(self.busy).clamp_(max=R)
        self.longest = (self.longest[0], min(self.longest[1] + 1, R))
        self.tables = {}

    def keep(self, rows):
        """-> Rows with only these (indices); `place` has to follow."""
        kept = Rows(len(rows), len(self.prompt_lens), self.heads_per_kv, self.slot.device)
        kept.prompt_lens, kept.lengths = self.prompt_lens, self.lengths[rows]
        return kept


def integers(*shape, device):
    return torch.zeros(*shape, dtype=torch.long, device=device)


def decode_reference(q, prompt_k, prompt_v, row_k, row_v, rows):
    """For tests, slow and plain: each row with a copy of its prompt before its (stored) tokens."""
    out = torch.zeros_like(q)
    for row in torch.nonzero(rows.lengths).flatten():
        slot = rows.slot[row]
        P, R = rows.prompt_lens[slot], rows.lengths[row]
        k = torch.cat([prompt_k[slot, :, :P], row_k[row, :, :R]], dim=1)        # (Hkv, P + R, K)
        v = torch.cat([prompt_v[slot, :, :P], row_v[row, :, :R]], dim=1)
        out[row] = F.scaled_dot_product_attention(
            q[row, None, :, None], k[None], v[None], enable_gqa=True)[0, :, 0]
    return out


# ---- torch ----

def decode_torch(q, k, v, prompt_k, prompt_v, row_k, row_v, rows):
    """`decode` without copies: scores over prompt and own tokens side by side, one softmax."""
    (B, H, K), Hkv, (P, R) = q.shape, row_k.shape[1], rows.longest
    if not rows.tables:
        rows.tables = step_tables(rows, *row_k.shape[1:3])
    tables, dtype = rows.tables, row_k.dtype
    for new, cache in ((k, row_k), (v, row_v)):
        cache.view(-1, K).index_copy_(0, tables["newest"], new.to(dtype).reshape(-1, K))
    q = (q.to(dtype) * K ** -0.5).view(B, Hkv, H // Hkv, K)
    over_prompt = times_prompts(q, prompt_k[:, :, :P].transpose(2, 3), rows)
    over_own = q @ row_k[:, :, :R].transpose(2, 3)
    scores = torch.cat([over_prompt, over_own], dim=-1)                  # (B, Hkv, rep, P + R)
    weights = scores.add_(tables["mask"]).softmax(dim=-1)
    out = times_prompts(weights[..., :P], prompt_v[:, :, :P], rows)
    return out.add_(weights[..., P:] @ row_v[:, :, :R]).view(B, H, K).to(k.dtype)


def step_tables(rows, Hkv, R):
    """What all layers of a step share. R: places of a row's cache."""
    (P, longest), (S, M), B = rows.longest, (len(rows.prompt_lens), rows.M), len(rows.index)
    heads = torch.arange(Hkv, device=rows.slot.device)
    place = torch.arange(max(P, longest), device=rows.slot.device)
    unseen = torch.cat([place[:P] >= rows.prompt_lens[rows.slot, None],
                        place[:longest] >= rows.lengths[:, None]], dim=1)
    mask = torch.zeros(unseen.shape, device=unseen.device).masked_fill_(unseen, -torch.inf)
    # Of each row and head, or of each place in the grid and head: where it lies in the other. An
    # idle row has no place; it has length 0 and caches its token in its last place, which is
    # written again before it is read.
    row_of = torch.zeros(S * M + 1, dtype=torch.long, device=rows.slot.device)
    row_of[rows.place_in_grid] = rows.index
    to_grid = row_of[:-1].view(S, 1, M) * Hkv + heads[:, None]                       # (S, Hkv, M)
    at = rows.place_in_grid.clamp(max=S * M - 1)[:, None]
    from_grid = (at // M * Hkv + heads) * M + at % M                                 # (B, Hkv)
    newest = (rows.index[:, None] * Hkv + heads) * R + (rows.lengths[:, None] - 1) % R
    return dict(mask=mask.view(B, 1, 1, -1), to_grid=to_grid.flatten(),
                from_grid=from_grid.flatten(), newest=newest.flatten())


def times_prompts(x, y, rows):
    """x (B, Hkv, rep, i), y (S, Hkv, i, j) -> (B, Hkv, rep, j): each row times its prompt's matrix.

    Rows move to a grid in which those of a prompt stand side by side, at most M of them. Each slot
    is then one matrix product, and no prompt is copied:

        slot 0  [ row 0 | row 2 |   -   ]  x  prompt a
        slot 1  [ row 1 |   -   |   -   ]  x  prompt b
    """
    (B, Hkv, rep, i), (S, j) = x.shape, (len(y), y.shape[-1])
    grid = x.reshape(B * Hkv, rep * i).index_select(0, rows.tables["to_grid"])
    out = grid.view(S, Hkv, -1, i) @ y                                   # (S, Hkv, M rep, j)
    out = out.view(-1, rep * j).index_select(0, rows.tables["from_grid"])
    return out.view(B, Hkv, rep, j)


# ---- kernels ----

@triton.jit
def append(new_ptr, new_stride, cache_ptr, row, kv_head, length, row_stride, head_stride,
           K: tl.constexpr):
    """The new key or value of a row goes into its cache, behind the others."""
    channel = tl.arange(0, K)
    new = tl.load(new_ptr + row * new_stride + kv_head * K + channel)
    at = row * row_stride + kv_head * head_stride + (length - 1) * K + channel
    tl.store(cache_ptr + at, new, mask=length > 0)


@triton.jit
def prefix_kernel(q_ptr, k_ptr, v_ptr, new_k_ptr, new_v_ptr, row_k_ptr, row_v_ptr, m_ptr, l_ptr,
                  acc_ptr, order_ptr, work_ptr, prompt_lens_ptr, lengths_ptr, k_stride, v_stride,
                  row_stride, own_stride, slot_stride, head_stride, scale2,
                  H: tl.constexpr, Hkv: tl.constexpr, K: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):
    """Rows of one prompt, all query heads of one KV head: attend to the prompt, store the state.

    There are as many programs as rows and KV heads, so each also appends a key and a value, which
    the suffix pass will read. A launch of its own would take longer than the copy.
    """
    program, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    own = tl.load(lengths_ptr + program)
    append(new_k_ptr, k_stride, row_k_ptr, program, kv_head, own, row_stride, own_stride, K)
    append(new_v_ptr, v_stride, row_v_ptr, program, kv_head, own, row_stride, own_stride, K)

    work_ptr += program * 3
    first, count, slot = tl.load(work_ptr), tl.load(work_ptr + 1), tl.load(work_ptr + 2)
    if count > 0:
        HEADS: tl.constexpr = H // Hkv
        place = tl.arange(0, BM)
        real = place // HEADS < count
        row = tl.load(order_ptr + first + place // HEADS, mask=real, other=0)
        head = row * H + kv_head * HEADS + place % HEADS                          # (BM,) of B x H
        at = head[:, None] * K + tl.arange(0, K)[None, :]
        q = tl.load(q_ptr + at, mask=real[:, None], other=0.0)
        acc, l = tl.zeros((BM, K), tl.float32), tl.zeros((BM,), tl.float32)
        m = tl.full((BM,), -1e30, tl.float32)

        prompt = slot.to(tl.int64) * slot_stride + kv_head * head_stride
        length = tl.load(prompt_lens_ptr + slot).to(tl.int32)
        everything = tl.full((BM,), 2**31 - 1, tl.int32)           # no key is hidden
        whole = length // BN * BN
        acc, l, m = attend_keys(acc, l, m, q, k_ptr + prompt, v_ptr + prompt, K, 0, whole, length,
                                everything, scale2, BN, K, PRECISION)
        tl.store(m_ptr + head, m, mask=real)
        tl.store(l_ptr + head, l, mask=real)
        tl.store(acc_ptr + at, acc, mask=real[:, None])


@triton.jit
def suffix_kernel(q_ptr, k_ptr, v_ptr, m_ptr, l_ptr, acc_ptr, out_ptr, lengths_ptr, row_stride,
                  head_stride, scale2, H: tl.constexpr, Hkv: tl.constexpr, K: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):
    """One row, all query heads of a KV head: continue over its own tokens. Idle rows get zeros."""
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    HEADS: tl.constexpr = H // Hkv
    place = tl.arange(0, BM)
    length = tl.load(lengths_ptr + row).to(tl.int32)
    real = place < HEADS
    busy = real & (length > 0)
    head = row * H + kv_head * HEADS + place                                      # (BM,) of B x H
    at = head[:, None] * K + tl.arange(0, K)[None, :]
    q = tl.load(q_ptr + at, mask=busy[:, None], other=0.0)
    m = tl.load(m_ptr + head, mask=busy, other=0.0)
    l = tl.load(l_ptr + head, mask=busy, other=1.0)
    acc = tl.load(acc_ptr + at, mask=busy[:, None], other=0.0)

    own = row * row_stride + kv_head * head_stride
    everything = tl.full((BM,), 2**31 - 1, tl.int32)
    whole = length // BN * BN
    acc, l, m = attend_keys(acc, l, m, q, k_ptr + own, v_ptr + own, K, 0, whole, length,
                            everything, scale2, BN, K, PRECISION)
    tl.store(out_ptr + at, (acc / l[:, None]).to(out_ptr.dtype.element_ty), mask=real[:, None])


# ---- what the sampler calls ----

def decode(q, k, v, prompt_k, prompt_v, row_k, row_v, rows):
    """One new token for each row: q (B, H, K), k and v (B, Hkv, K), caches as above -> (B, H, K).

    Scale 1 / sqrt(K). rows.lengths counts the new token, whose k and v are appended to the row
    caches. Idle rows get finite numbers.
    """
    backend = kernels.backend(q.device)
    if backend == "torch":
        return decode_torch(q, k, v, prompt_k, prompt_v, row_k, row_v, rows)
    (B, H, K), Hkv, BN = q.shape, row_k.shape[1], blocks(q)["forward"][1]
    if H // Hkv > PREFIX_TILE:
        raise ValueError(f"decode kernels know at most {PREFIX_TILE} query heads to a key-value "
                         f"head, not {H // Hkv}; --kernels torch does")
    BM = max(SUFFIX_TILE[backend], triton.next_power_of_2(H // Hkv))
    q, precision = q.contiguous(), kernels.dot_precision(q)
    options = kernels.launch_options(backend, num_warps=4, num_stages=3)
    out = torch.empty_like(q)
    acc = torch.empty(B, H, K, dtype=torch.float32, device=q.device)
    m, l = torch.empty(2, B, H, dtype=torch.float32, device=q.device)
    prefix_kernel[B, Hkv](
        q, prompt_k, prompt_v, k, v, row_k, row_v, m, l, acc, rows.order, rows.work,
        rows.prompt_lens, rows.lengths, k.stride(0), v.stride(0), row_k.stride(0), row_k.stride(1),
        prompt_k.stride(0), prompt_k.stride(1), scale2(K), H, Hkv, K, PREFIX_TILE, BN, precision,
        **options)
    suffix_kernel[B, Hkv](
        q, row_k, row_v, m, l, acc, out, rows.lengths, row_k.stride(0), row_k.stride(1), scale2(K),
        H, Hkv, K, BM, BN, precision, **options)
    return out
