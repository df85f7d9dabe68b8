"""Attention over packed groups: every prompt once, its G rollouts behind it.

    tokens   [ prompt a | rollout 1 | rollout 2 ][ prompt b | rollout 1 | rollout 2 ] ...        (T,)
    position   0 1 2 3    4 5 6       4 5          0 1 2      3 4         3 4 5 6
    sees       itself     prompt a    prompt a
               causally   + itself    + itself     (never another rollout, never another group)

RPT samples G thoughts for one context. Packed this way the context costs one forward and one backward, not
G: P + G*R tokens instead of G*(P + R). A group without rollouts is an ordinary sequence, so the same call
also serves plain next-token training and prefill.

Masks come from lengths alone; no token id means anything here. Shorter sequences are padded behind their end,
where causality hides it, and with a row of their own: not even another group's NaN gets in.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence


@dataclass
class Layout:
    """Which row belongs to which prompt or rollout; built once per micro-batch by `make_layout`.

    N groups, M rollouts in all, P and R the longest prompt and rollout, T rows in all.
    """
    positions: torch.Tensor        # (T,)    position of each row in its own sequence
    prompts: torch.Tensor          # (N, P)  row of each prompt token, its first row where there is none
    prompt_lens: torch.Tensor      # (N,)
    rollouts: torch.Tensor         # (M, R)  row of each rollout token, its first row where there is none
    rollout_lens: torch.Tensor     # (M,)
    owner: torch.Tensor            # (M,)    group of each rollout
    unpack: torch.Tensor           # (T,)    where row t lies in [prompts, rollouts] without padding
    response_rows: torch.Tensor    # (S,)    rows of all rollout tokens, in order
    predict_rows: torch.Tensor     # (S,)    row whose hidden state predicts that token: the one before it
    last_rows: torch.Tensor        # (N,)    last row of each prompt


def make_layout(groups, device="cpu"):
    """groups: [(prompt_len, [rollout_len, ...]), ...], all lengths at least 1 -> Layout."""
    prompts, rollouts, owner, positions, predict_rows, response_rows = [], [], [], [], [], []
    row = 0
    for group, (prompt_len, rollout_lens) in enumerate(groups):
        prompts.append(torch.arange(row, row + prompt_len))
        positions.append(torch.arange(prompt_len))
        row += prompt_len
        last = row - 1
        for length in rollout_lens:
            rows = torch.arange(row, row + length)
            rollouts.append(rows)
            owner.append(group)
            positions.append(torch.arange(prompt_len, prompt_len + length))
            response_rows.append(rows)
            predict_rows.append(torch.cat([torch.tensor([last]), rows[:-1]]))  # the prompt's last: G times
            row += length
    none = torch.zeros(0, dtype=torch.long)
    pad = lambda rows: pad_sequence(rows, batch_first=True) if rows else none.view(0, 0)
    own = lambda rows: rows.maximum(rows[:, :1])  # padding is 0; the first row of a sequence is its smallest
    cat = lambda rows: torch.cat(rows) if rows else none
    packed = torch.cat(prompts + rollouts)
    layout = Layout(
        positions=cat(positions),
        prompts=own(pad(prompts)), prompt_lens=torch.tensor([len(rows) for rows in prompts]),
        rollouts=own(pad(rollouts)), rollout_lens=torch.tensor([len(rows) for rows in rollouts]).long(),
        owner=torch.tensor(owner).long(), unpack=torch.argsort(packed),
        response_rows=cat(response_rows), predict_rows=cat(predict_rows),
        last_rows=torch.tensor([rows[-1] for rows in prompts]))
    return Layout(**{name: tensor.to(device) for name, tensor in vars(layout).items()})


def attention(q, k, v, layout):
    """q (T, H, K), k and v (T, Hkv, K), H a multiple of Hkv -> (T, H, K). Scale 1 / sqrt(K)."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    heads_first = lambda x: x.transpose(1, 2)                                # (N, P, H, K) <-> (N, H, P, K)
    sdpa = lambda q, k, v, **mask: heads_first(
        F.scaled_dot_product_attention(heads_first(q), heads_first(k), heads_first(v), **mask))
    P, R = layout.prompts.shape[1], layout.rollouts.shape[1]
    kp, vp = k[layout.prompts], v[layout.prompts]                                        # (N, P, H, K)
    rows = [sdpa(q[layout.prompts], kp, vp, is_causal=True)[real(layout.prompt_lens, P)]]
    if R:
        keys = torch.cat([kp[layout.owner], k[layout.rollouts]], dim=1)                  # (M, P + R, H, K)
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
