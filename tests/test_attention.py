"""Packed attention against a loop over every row in fp64: who sees whom, forward and backward."""
import random
import subprocess
import sys

import pytest
import torch

from kernels.attention import attention, make_layout
from tiny import ENVIRONMENT, ROOT

GROUPS = [
    [(5, [])],                                                  # one sequence: training, prefill
    [(1, [1])],                                                 # the smallest group
    [(3, []), (7, []), (1, [])],
    [(4, [3, 2]), (3, [2, 4])],
    [(6, [1, 9, 1]), (2, []), (1, [5]), (8, [2, 2, 2, 2])],     # some groups without rollouts
]


def random_qkv(groups, seed=0, H=4, Hkv=2, K=8):
    """q, k, v in fp64 with gradients for the T rows of `groups`."""
    T = sum(p + sum(rollouts) for p, rollouts in groups)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(T, heads, K, dtype=torch.float64, generator=generator)
               for heads in (H, Hkv, Hkv))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def visible_rows(groups):
    """For every row, in order: the rows that it may see."""
    visible, row = [], 0
    for prompt_len, rollouts in groups:
        prompt = list(range(row, row + prompt_len))
        visible += [prompt[:i + 1] for i in range(prompt_len)]
        row += prompt_len
        for length in rollouts:
            own = list(range(row, row + length))
            visible += [prompt + own[:i + 1] for i in range(length)]
            row += length
    return visible


def attention_by_loop(q, k, v, visible):
    """One row and one head at a time, as in a textbook."""
    repeat = q.shape[1] // k.shape[1]
    out = []
    for t, seen in enumerate(visible):
        for h in range(q.shape[1]):
            scores = torch.stack([q[t, h] @ k[s, h // repeat] for s in seen]) / q.shape[2] ** 0.5
            out.append(scores.softmax(dim=0) @ v[seen, h // repeat])
    return torch.stack(out).view(q.shape)


def gradients(out, inputs, seed=1):
    """Gradients of a random projection of `out`."""
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(seed))
    return torch.autograd.grad((out * weights).sum(), inputs)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("H, Hkv", [(4, 4), (4, 2), (3, 1)])
def test_every_row_sees_its_prompt_and_its_own_past_and_nothing_else(groups, H, Hkv):
    q, k, v = random_qkv(groups, H=H, Hkv=Hkv)
    packed = attention(q, k, v, make_layout(groups))
    loop = attention_by_loop(q, k, v, visible_rows(groups))
    torch.testing.assert_close(packed, loop, rtol=0, atol=1e-13)
    for ours, theirs in zip(gradients(packed, (q, k, v)), gradients(loop, (q, k, v))):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_random_ragged_layouts_agree_with_the_loop():
    rng = random.Random(0)
    for seed in range(15):
        groups = [(rng.randint(1, 6), [rng.randint(1, 5) for _ in range(rng.randint(0, 3))])
                  for _ in range(rng.randint(1, 4))]
        q, k, v = random_qkv(groups, seed)
        packed = attention(q, k, v, make_layout(groups))
        loop = attention_by_loop(q, k, v, visible_rows(groups))
        torch.testing.assert_close(packed, loop, rtol=0, atol=1e-13)


def attention_by_square(q, k, v, visible):
    """The same for long sequences: all scores, with minus infinity where a row may not look."""
    seen = torch.zeros(len(q), len(q), dtype=torch.bool)
    for t, rows in enumerate(visible):
        seen[t, rows] = True
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("thk,shk->hts", q, k) / q.shape[2] ** 0.5
    return torch.einsum("hts,shk->thk", scores.masked_fill(~seen, -torch.inf).softmax(dim=-1), v)


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 2e-5),
                                         (torch.bfloat16, 0.05)])
def test_lengths_in_many_buckets_agree_with_a_masked_square(dtype, atol):
    """Lengths on both sides of powers of two, as prompts, as rollouts and as their sums."""
    groups = [(1, [130]), (65, []), (17, [1, 16, 33]), (128, [1]), (40, [64, 1, 129]), (3, [])]
    exact = [x.detach().to(dtype).double().requires_grad_() for x in random_qkv(groups)]
    inputs = [x.detach().to(dtype).requires_grad_() for x in exact]
    packed = attention(*inputs, make_layout(groups))
    square = attention_by_square(*exact, visible_rows(groups))
    weights = torch.randn(square.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert packed.dtype == dtype
    torch.testing.assert_close(packed.double(), square, rtol=0, atol=atol)
    ours, theirs = (torch.autograd.grad(out, x, weights.to(out.dtype))
                    for out, x in ((packed, inputs), (square, exact)))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.double(), b, rtol=0.01, atol=10 * atol)


def test_a_shared_prompt_is_G_copies_whose_prompt_gradients_add_up():
    P, lengths = 5, [3, 1, 4]
    q, k, v = random_qkv([(P, lengths)])
    ends = torch.tensor(lengths).cumsum(0) + P
    rows = [torch.cat([torch.arange(P), torch.arange(end - R, end)])
            for R, end in zip(lengths, ends)]
    copies = [tuple(x.detach()[r].requires_grad_() for x in (q, k, v)) for r in rows]
    shared = attention(q, k, v, make_layout([(P, lengths)]))
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(shared.shape, dtype=shared.dtype, generator=generator)
    weights[:P] = 0  # the loss of RPT is on rollout tokens; the prompt is reached through them
    shared_gradients = torch.autograd.grad((shared * weights).sum(), (q, k, v))
    summed = [torch.zeros_like(x) for x in (q, k, v)]
    for copy, r in zip(copies, rows):
        out = attention(*copy, make_layout([(len(r), [])]))
        torch.testing.assert_close(out, shared[r], rtol=0, atol=1e-13)
        for total, gradient in zip(summed, torch.autograd.grad((out * weights[r]).sum(), copy)):
            total[r] += gradient
    for ours, theirs in zip(shared_gradients, summed):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert shared_gradients[1][:P].abs().min() > 0


@pytest.mark.parametrize("poison", [100.0, float("nan")])
@pytest.mark.parametrize("victim", range(3))
def test_another_group_never_leaks_in_not_even_its_nan(poison, victim):
    groups = [(4, [3, 2]), (2, []), (3, [1, 5])]
    q, k, v = (x.detach() for x in random_qkv(groups))
    sizes = [p + sum(rollouts) for p, rollouts in groups]
    group = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(sizes))
    before = attention(q, k, v, make_layout(groups))
    for x in (q, k, v):
        x[group == victim] += poison
    after = attention(q, k, v, make_layout(groups))
    assert torch.equal(before[group != victim], after[group != victim])
    assert not torch.equal(before[group == victim], after[group == victim])


def test_a_sibling_rollout_never_leaks_in():
    q, k, v = (x.detach() for x in random_qkv([(4, [3, 2])]))
    before = attention(q, k, v, make_layout([(4, [3, 2])]))
    for x in (q, k, v):
        x[4:7] += 100  # the first rollout
    after = attention(q, k, v, make_layout([(4, [3, 2])]))
    assert torch.equal(before[:4], after[:4]) and torch.equal(before[7:], after[7:])
    assert not torch.equal(before[4:7], after[4:7])


def test_the_rows_of_the_picture():
    # rows        0-2 prompt, 3-4, 5   6-7 prompt   8 prompt, 9-11
    layout = make_layout([(3, [2, 1]), (2, []), (1, [3])])
    assert layout.positions.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 0, 1, 2, 3]
    assert layout.rollout_rows.tolist() == [3, 4, 5, 9, 10, 11]
    # Row 2, the end of prompt a, predicts twice.
    assert layout.predict_rows.tolist() == [2, 3, 2, 8, 9, 10]
    assert layout.last_rows.tolist() == [2, 7, 8]
    assert layout.owner.tolist() == [0, 0, 2]
    assert layout.prompt_lens.tolist() == [3, 2, 1] and layout.rollout_lens.tolist() == [2, 1, 3]


def test_a_layout_without_rollouts_predicts_nothing():
    layout = make_layout([(3, []), (2, [])])
    assert layout.predict_rows.tolist() == layout.rollout_rows.tolist() == []
    for rows in (layout.predict_rows, layout.owner, layout.rollout_lens):
        assert rows.dtype == torch.long


def test_without_triton_plain_torch_runs():
    script = """
import sys
sys.modules["triton"] = None   # as on macOS and Windows
import torch
from model import GPT, GPTConfig
import sample, train_rpt, train_ntp
model = GPT(GPTConfig(40, 32, 1, 4, 2, 8, 48, 64))
model(torch.arange(6)[None]).sum().backward()
print(len(sample.generate(model, [[1, 2]], 2, 3, 1.0, [], 0)[0]))
"""
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True,
                         env=ENVIRONMENT)
    assert ran.stdout == "2\n", ran.stderr
