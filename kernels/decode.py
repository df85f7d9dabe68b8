"""Attention of one new token per row over a KV cache in which every prompt lies once.

    prompt cache   slot 0 [ prompt a ......... ]   slot 1 [ prompt b .... ]          (S, Hkv, P, K)
    row cache      row 0  [ own tokens ... ]  of a                                   (B, Hkv, R, K)
                   row 1  [ own ]             of b
                   row 2  [ own tokens ....... ]  of a

    prefix pass    one program per prompt (64 rows x query heads) and KV head
                   [ row 0, heads 0-5 ]
                   [ row 2, heads 0-5 ]  x  [ prompt a ......... ]   ->  state (m, l, acc) of both rows
    suffix pass    one program per row and KV head
                   [ row 2, heads 0-5 ]  x  [ own tokens ....... ]   ->  goes on with that state, divides: out

A decode step does nothing but read the cache, so its time is bytes / bandwidth. 8 rollouts of a 1,024-token
prompt that are 1,024 tokens long themselves, Qwen2.5-1.5B (28,672 bytes a token): 470 MB a step with a copy
of the prompt for each, 264 MB with one.

The state is passed on, not merged: a merge of two finished halves would round where the trainer, who walks
over prompt and rollout in one go, does not. Both run `attend_keys` over the same key tiles in the same order,
and arrive at the same bits. (Splitting long rows over several programs would end that; it would pay below
about 64 rows, where there are too few programs to draw the full bandwidth.)
"""
import torch

import kernels
from kernels import tl, triton
from kernels.attention import attend_keys, blocks, scale2

PREFIX_TILE = 64                         # rows x query heads of a prefix program: one wgmma tile
SUFFIX_TILE = dict(fast=16, bitwise=64)  # query heads of a row, padded: a tensor core takes 16 at least; 64 are
                                         # the trainer's instruction (if 16 give its bits is not known yet)


# ---- who continues what, and the reference ----

class Rows:
    """Which prompt each of B rows continues, and how many tokens of its own it has cached.

    Tensors are changed in place, never replaced: a CUDA graph captured with them reads the new values.
    """

    def __init__(self, B, S, heads_per_kv, device):
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.long, device=device)
        self.prompt = zeros(B)             # slot of the row's prompt
        self.prompt_lens = zeros(S)        # tokens of each prompt
        self.lengths = zeros(B)            # own tokens in the cache, the new one included; 0: an idle row
        self.busy = zeros(B)               # 1 where a rollout is decoded, 0 where the row is idle
        self.longest = (0, 0)              # bounds of prompt_lens and lengths: as far as torch looks
        self.order = zeros(B)              # rows sorted by prompt, so that those of one prompt are neighbours
        self.items = zeros(B, 3).int()     # work of the prefix pass: first place in `order`, rows, slot
        self.heads_per_kv = heads_per_kv
        self.cell = zeros(B)               # place of each row in a grid (S, M), M rows at most for a prompt
        self.grid = (S, 1)

    def place(self, prompt):
        """prompt: the slot of every row, -1 for an idle one. Call it whenever a row changes hands."""
        prompt = torch.tensor(prompt)
        order = prompt.argsort(stable=True)
        slot = prompt[order]
        rank = torch.arange(len(slot)) - torch.searchsorted(slot, slot)                  # within its prompt
        rows_per_item = max(1, PREFIX_TILE // self.heads_per_kv)
        first = torch.nonzero((rank % rows_per_item == 0) & (slot >= 0)).squeeze(1)
        items = torch.stack([first, first.diff(append=torch.tensor([len(slot)])), slot[first]], dim=1)
        S, M = len(self.prompt_lens), int(rank[slot >= 0].max()) + 1
        cell = torch.where(slot >= 0, slot * M + rank, S * M)                        # idle: behind the grid
        self.grid = (S, M)
        self.cell[order.to(self.cell.device)] = cell.to(self.cell.device)
        self.prompt.copy_(prompt.clamp(min=0))
        self.busy.copy_(prompt >= 0)
        self.lengths.mul_(self.busy)
        self.order.copy_(order)
        self.items.zero_()[:len(items)] = items.to(self.items)
        self.longest = (self.prompt_lens[self.prompt].max().item(), self.lengths.max().item())

    def keep(self, live):
        """Rows without all others but `live`, a list; to be placed."""
        kept = Rows(len(live), len(self.prompt_lens), self.heads_per_kv, self.prompt.device)
        kept.prompt_lens, kept.lengths = self.prompt_lens, self.lengths[live]
        return kept

    def times_prompts(self, x, y):
        """x (B, Hkv, rep, i), y (S, Hkv, i, j) -> (B, Hkv, rep, j): each row times its prompt's matrix."""
        (_, Hkv, rep, i), j, (S, M) = x.shape, y.shape[-1], self.grid
        grid = x.new_zeros(S * M + 1, Hkv, rep, i)
        grid[self.cell] = x
        grid = grid[:-1].view(S, M, Hkv, rep, i).transpose(1, 2).reshape(S, Hkv, M * rep, i)
        out = (grid @ y).view(S, Hkv, M, rep, j).transpose(1, 2).reshape(S * M, Hkv, rep, j)
        return out[self.cell.clamp(max=S * M - 1)]


def decode_reference(q, prompt_k, prompt_v, row_k, row_v, rows):
    """The arguments and result of `decode`: scores over prompt and own tokens, side by side, one softmax."""
    (B, H, K), Hkv, (P, R) = q.shape, row_k.shape[1], rows.longest
    q = q.view(B, Hkv, H // Hkv, K) * K ** -0.5
    scores = torch.cat([rows.times_prompts(q, prompt_k[:, :, :P].transpose(2, 3)),
                        q @ row_k[:, :, :R].transpose(2, 3)], dim=-1)                # (B, Hkv, rep, P + R)
    place = torch.arange(max(P, R), device=q.device)
    unseen = torch.cat([place[:P] >= rows.prompt_lens[rows.prompt, None],
                        place[:R] >= rows.lengths[:, None]], dim=1)                      # (B, P + R)
    weights = scores.masked_fill(unseen[:, None, None], -torch.inf).float().softmax(dim=-1).to(q.dtype)
    out = rows.times_prompts(weights[..., :P], prompt_v[:, :, :P]) + weights[..., P:] @ row_v[:, :, :R]
    return out.view(B, H, K)


# ---- kernels ----

@triton.jit
def attend_all(acc, l, m, q, k_ptr, v_ptr, length, scale2,
               BM: tl.constexpr, BN: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    """The queries q (BM, K) see all of `length` keys: whole tiles, then a masked tail, as in the trainer."""
    everything = tl.full((BM,), 2**31 - 1, tl.int32)
    whole = length // BN * BN
    acc, l, m = attend_keys(acc, l, m, q, k_ptr, v_ptr, K, 0, whole, everything, scale2,
                            False, BN, K, PRECISION)
    acc, l, m = attend_keys(acc, l, m, q, k_ptr, v_ptr, K, whole, length, everything, scale2,
                            True, BN, K, PRECISION)
    return acc, l, m


@triton.jit
def prefix_kernel(q_ptr, k_ptr, v_ptr, m_ptr, l_ptr, acc_ptr, order, items, prompt_lens, slot_stride,
                  head_stride, scale2, H: tl.constexpr, Hkv: tl.constexpr, K: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):
    """Rows of one prompt, all query heads of one KV head: let them see the prompt, store their state."""
    item, kv_head = tl.program_id(0), tl.program_id(1)
    items += item * 3
    first, count, slot = tl.load(items), tl.load(items + 1), tl.load(items + 2)
    if count > 0:
        GROUP: tl.constexpr = H // Hkv
        place = tl.arange(0, BM)
        real = place // GROUP < count
        row = tl.load(order + first + place // GROUP, mask=real, other=0)
        state = row * H + kv_head * GROUP + place % GROUP                                # (BM,) of B x H
        at = state[:, None] * K + tl.arange(0, K)[None, :]
        q = tl.load(q_ptr + at, mask=real[:, None], other=0.0)
        base = slot.to(tl.int64) * slot_stride + kv_head * head_stride
        length = tl.load(prompt_lens + slot).to(tl.int32)
        acc, l = tl.zeros((BM, K), tl.float32), tl.zeros((BM,), tl.float32)
        m = tl.full((BM,), -1e30, tl.float32)
        acc, l, m = attend_all(acc, l, m, q, k_ptr + base, v_ptr + base, length, scale2, BM, BN, K, PRECISION)
        tl.store(m_ptr + state, m, mask=real)
        tl.store(l_ptr + state, l, mask=real)
        tl.store(acc_ptr + at, acc, mask=real[:, None])


@triton.jit
def suffix_kernel(q_ptr, k_ptr, v_ptr, m_ptr, l_ptr, acc_ptr, out_ptr, lengths, row_stride, head_stride,
                  scale2, H: tl.constexpr, Hkv: tl.constexpr, K: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):
    """One row, all query heads of a KV head: go on over its own tokens; an idle row (length 0) gets zeros."""
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    GROUP: tl.constexpr = H // Hkv
    place = tl.arange(0, BM)
    length = tl.load(lengths + row).to(tl.int32)
    real = place < GROUP
    state = row * H + kv_head * GROUP + place
    at = state[:, None] * K + tl.arange(0, K)[None, :]
    busy = real & (length > 0)
    q = tl.load(q_ptr + at, mask=busy[:, None], other=0.0)
    m = tl.load(m_ptr + state, mask=busy, other=0.0)
    l = tl.load(l_ptr + state, mask=busy, other=1.0)
    acc = tl.load(acc_ptr + at, mask=busy[:, None], other=0.0)
    base = row * row_stride + kv_head * head_stride
    acc, l, m = attend_all(acc, l, m, q, k_ptr + base, v_ptr + base, length, scale2, BM, BN, K, PRECISION)
    tl.store(out_ptr + at, (acc / l[:, None]).to(out_ptr.dtype.element_ty), mask=real[:, None])


# ---- wrapper ----

def decode(q, prompt_k, prompt_v, row_k, row_v, rows):
    """One new token for each row: q (B, H, K), caches as above, `rows` -> (B, H, K). Scale 1 / sqrt(K).

    The row caches hold the new token already. Idle rows get something finite.
    """
    kind = kernels.chosen(q.device)
    if kind == "torch":
        return decode_reference(q, prompt_k, prompt_v, row_k, row_v, rows)
    (B, H, K), Hkv, BN = q.shape, row_k.shape[1], blocks(q)["forward"][1]
    q, precision, pipeline = q.contiguous(), kernels.precision(q), kernels.options(kind, 4, 3)
    out, acc = torch.empty_like(q), torch.empty(B, H, K, dtype=torch.float32, device=q.device)
    m, l = torch.empty(2, B, H, dtype=torch.float32, device=q.device)
    prefix_kernel[(B, Hkv)](q, prompt_k, prompt_v, m, l, acc, rows.order, rows.items, rows.prompt_lens,
                            prompt_k.stride(0), prompt_k.stride(1), scale2(K), H, Hkv, K, PREFIX_TILE, BN,
                            precision, **pipeline)
    suffix_kernel[(B, Hkv)](q, row_k, row_v, m, l, acc, out, rows.lengths, row_k.stride(0), row_k.stride(1),
                            scale2(K), H, Hkv, K, SUFFIX_TILE[kind], BN, precision, **pipeline)
    return out
