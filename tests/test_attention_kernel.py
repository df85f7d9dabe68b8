"""The attention kernels against plain torch in fp64, and against themselves bit for bit.

Interpreted on a CPU (a program runs in Python, so problems are tiny), compiled on a GPU.
"""
import random
from functools import partial

import pytest
import torch

pytest.importorskip("triton")
from conftest import DEVICE
from interpreter import canaries, guarded, shuffled_grid

from kernels import dot_precision, launch_options, tl, triton
from kernels.attention import (BLOCKS, attend_keys, attention, attention_torch, load_rows,
                               make_layout, scale2, store_rows)

FORWARD = {torch.float32: 2e-6, torch.bfloat16: 3e-3}    # allowed ||ours - fp64|| / ||fp64||
BACKWARD = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
DTYPES = list(FORWARD)
BM, BN = 64, 16                                          # tiles of head sizes 16 and 32
EDGES = [(BM + 1, [1, BN - 1, BN]), (BN + 1, [BM, 33, 32, 1]), (1, []), (BN, [BN + 1])]


@pytest.fixture
def fast(use_kernels):
    use_kernels("fast")


def rows(groups):
    return sum(prompt + sum(rollouts) for prompt, rollouts in groups)


def random_inputs(groups, H=2, Hkv=1, K=16, dtype=torch.float32, seed=0):
    """q, k, v and the gradient of the output, as the device will see them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows(groups), heads, K, generator=generator).to(dtype).to(DEVICE)
            for heads in (H, Hkv, Hkv, H)]


def run(function, q, k, v, dout, groups):
    """-> output, dq, dk, dv."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = function(q, k, v, make_layout(groups, DEVICE))
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def exact(inputs, groups):
    return run(attention_torch, *(x.double() for x in inputs), groups)


def error(ours, truth):
    return ((ours.double() - truth).norm() / truth.norm()).item()


def assert_close(ours, truth, dtype):
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, truth):
        limit = (FORWARD if name == "out" else BACKWARD)[dtype]
        assert error(a, b) <= limit, f"{name}: {error(a, b):.1e}"  # NaN is not <= anything


def assert_same_bits(ours, theirs):
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, theirs):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths_on_both_sides_of_a_tile_stay_in_bounds_and_agree_with_fp64(
        fast, monkeypatch, dtype):
    inputs = random_inputs(EDGES, dtype=dtype)
    with canaries(monkeypatch):
        ours = run(attention, *map(guarded, inputs), EDGES)
    assert_close(ours, exact(inputs, EDGES), dtype)


def near_a_tile(rng):
    return rng.choice([1, BN - 1, BN, BN + 1, BM, BM + 1, rng.randint(2, 50)])


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow),
                                  pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("H, Hkv", [(2, 2), (4, 2), (3, 1), pytest.param(6, 1, marks=pytest.mark.slow)])
def test_random_layouts_with_every_ratio_of_heads_agree_with_fp64(fast, H, Hkv, seed):
    rng = random.Random(100 * H + seed)
    groups = []
    for _ in range(rng.randint(1, 2)):
        prompt = near_a_tile(rng)
        groups.append((prompt, [near_a_tile(rng) for _ in range(rng.randint(0, 3))]))
    for K, dtype in ((16, torch.float32), (32, torch.bfloat16)):
        inputs = random_inputs(groups, H, Hkv, K, dtype, seed)
        assert_close(run(attention, *inputs, groups), exact(inputs, groups), dtype)


@pytest.mark.parametrize("K", [64, 128])
def test_the_tiles_that_a_gpu_uses_agree_with_fp64(fast, monkeypatch, K):
    groups = [(150, [129, 40]), (64, [])]
    inputs = random_inputs(groups, K=K, dtype=torch.bfloat16)
    with canaries(monkeypatch):
        ours = run(attention, *map(guarded, inputs), groups)
    assert_close(ours, exact(inputs, groups), torch.bfloat16)


def test_a_shared_prompt_is_G_copies_whose_prompt_gradients_add_up(fast):
    P, lengths = 21, [18, 1, 5]
    groups = [(P, lengths)]
    q, k, v, dout = random_inputs(groups)
    dout[:P] = 0  # the loss of RPT is on rollout tokens; the prompt is reached through them
    shared = run(attention, q, k, v, dout, groups)
    summed = [torch.zeros_like(x) for x in (q, k, v)]
    end = P
    for length in lengths:
        end += length
        copy = [*range(P), *range(end - length, end)]
        out, *gradients = run(attention, q[copy], k[copy], v[copy], dout[copy], [(len(copy), [])])
        assert error(out, shared[0][copy].double()) <= 2e-6
        for total, gradient in zip(summed, gradients):
            total[copy] += gradient
    for ours, theirs in zip(shared[1:], summed):
        assert error(ours, theirs.double()) <= 2e-6


@pytest.mark.filterwarnings("ignore:All-NaN")
@pytest.mark.parametrize("victim", range(3))
def test_another_groups_nan_never_leaks_in_neither_forward_nor_backward(fast, victim):
    groups = [(20, [3, 17]), (2, []), (18, [1, 5])]
    sizes = torch.tensor([rows([group]) for group in groups])
    others = torch.repeat_interleave(torch.arange(3), sizes) != victim
    inputs = random_inputs(groups)
    before = run(attention, *inputs, groups)
    for x in inputs:
        x[~others] = float("nan")
    after = run(attention, *inputs, groups)
    assert_same_bits([x[others] for x in after], [x[others] for x in before])
    assert all(x[~others].isnan().any() for x in after)


@pytest.mark.filterwarnings("ignore:All-NaN")
def test_a_siblings_nan_never_leaks_in(fast):
    groups = [(5, [18, 20])]
    inputs = random_inputs(groups)
    before = run(attention, *inputs, groups)
    for x in inputs:
        x[5:23] = float("nan")
    out, dq, dk, dv = run(attention, *inputs, groups)
    for ours, theirs in ((out, before[0]), (dq, before[1])):
        assert torch.equal(ours[:5], theirs[:5]) and torch.equal(ours[23:], theirs[23:])
    assert torch.equal(dk[23:], before[2][23:]) and torch.equal(dv[23:], before[3][23:])
    assert dk[:5].isnan().all()  # the prompt's gradient has a share of every rollout


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_neither_on_the_order_of_programs_nor_on_the_run(use_kernels, dtype):
    use_kernels("bitwise")
    groups = [(20, [9, 18]), (17, [])]
    inputs = random_inputs(groups, 4, 2, dtype=dtype)
    first = run(attention, *inputs, groups)
    assert_same_bits(run(attention, *inputs, groups), first)
    if DEVICE == "cpu":  # a GPU shuffles by itself
        for seed in range(2):
            with shuffled_grid(seed):
                assert_same_bits(run(attention, *inputs, groups), first)


def test_a_group_gets_the_same_bits_wherever_it_lies_in_the_batch(use_kernels):
    use_kernels("bitwise")
    groups = [(20, [9, 18]), (33, []), (2, [5])]
    sizes = [rows([group]) for group in groups]
    inputs = random_inputs(groups, dtype=torch.bfloat16)
    before = run(attention, *inputs, groups)
    order = [2, 0, 1]
    moved = torch.cat([torch.arange(sum(sizes[:g]), sum(sizes[:g + 1])) for g in order])
    after = run(attention, *(x[moved] for x in inputs), [groups[g] for g in order])
    assert_same_bits(after, [x[moved] for x in before])


def test_bits_of_the_forward_do_not_depend_on_the_number_of_queries_in_a_tile(
        use_kernels, monkeypatch):
    use_kernels("bitwise")
    groups = [(70, [100, 10]), (129, [])]
    q, k, v, _ = random_inputs(groups, K=64, dtype=torch.bfloat16)
    outs = []
    for queries, warps in ((64, 4), (128, 8)):  # 16 rows a warp
        monkeypatch.setitem(BLOCKS, 64, BLOCKS[64] | dict(forward=(queries, 64, warps, 3)))
        outs.append(attention(q, k, v, make_layout(groups, DEVICE)))
    assert torch.equal(*outs)


@triton.jit
def one_row_kernel(q_ptr, k_ptr, v_ptr, out_ptr, row, prompt_end, start, scale,
                   K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):
    """One token of one head as a decoder meets it: prompt, then own keys, every tile masked."""
    rows = row + tl.arange(0, BM)  # all but the first are idle
    end = row + 1
    q = load_rows(q_ptr, rows, end, K, True, K)
    acc, l = tl.zeros((BM, K), tl.float32), tl.zeros((BM,), tl.float32)
    m = tl.full((BM,), -1e30, tl.float32)
    acc, l, m = attend_keys(acc, l, m, q, k_ptr, v_ptr, K, 0, 0, prompt_end, rows, scale,
                            BN, K, PRECISION)
    acc, l, m = attend_keys(acc, l, m, q, k_ptr, v_ptr, K, start, start, end, rows, scale,
                            BN, K, PRECISION)
    store_rows(out_ptr, acc / l[:, None], rows - row, 1, K, K)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_decoder_that_walks_the_same_keys_repeats_the_row_bit_for_bit(use_kernels, dtype):
    # The order of the walk and the boundaries of its tiles are the same, and a mask changes no
    # visible entry.
    use_kernels("bitwise")
    P, R = 2 * BN + 5, BM + 6
    q, k, v, _ = random_inputs([(P, [3, R])], H=1, Hkv=1, dtype=dtype)
    out = attention(q, k, v, make_layout([(P, [3, R])], DEVICE))
    for own in (1, BN - 1, BN, BN + 1, BM, BM + 1, R):
        row, alone = P + 3 + own - 1, torch.empty_like(q[:1])
        one_row_kernel[1,](q, k, v, alone, row, P, P + 3, scale2(16), 16, BM, BN, dot_precision(q),
                           **launch_options("bitwise", *BLOCKS[16]["forward"][2:]))
        assert torch.equal(alone[0], out[row]), own


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_without_what_follows_and_without_siblings(use_kernels, dtype):
    use_kernels("bitwise")
    P, R = 21, BM + 6
    q, k, v, _ = random_inputs([(P, [3, R])], dtype=dtype)
    out = attention(q, k, v, make_layout([(P, [3, R])], DEVICE))
    for length in (1, BN, BM + 1):
        seen = [*range(P), *range(P + 3, P + 3 + length)]
        alone = attention(q[seen], k[seen], v[seen], make_layout([(P, [length])], DEVICE))
        assert torch.equal(alone[-1], out[P + 3 + length - 1]), length


# Where nothing is seen or stored, anything may be computed.
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_logits_of_120_stay_finite_and_right(fast, sign, dtype):
    # At -120 a hidden key, scored 0, stands e^120 above every visible one: 0 * inf would be NaN.
    groups = [(37, [20, 5, 1])]
    inputs = random_inputs(groups, dtype=dtype)
    q, k = inputs[:2]
    q.mul_(0.1)[..., 0] = 1
    k.mul_(0.1)[..., 0] = sign * 120 * 16 ** 0.5
    ours, truth = run(attention, *inputs, groups), exact(inputs, groups)
    theirs = run(attention_torch, *inputs, groups)
    assert all(x.isfinite().all() for x in ours)
    # Column 0 of dq sums terms of +-480 to almost nothing: in bf16 torch errs by 380% there.
    # In fp32 an H100 errs 2.1 times as much as torch there (2.6e-4), the interpreter less.
    assert error(ours[1], truth[1]) <= 4 * error(theirs[1], truth[1])
    # A logit of 120 leaves fp32 seven bits less.
    limit = 2e-5 if dtype == torch.float32 else BACKWARD[dtype]
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, truth):
        if name == "dq":
            a, b = a[..., 1:], b[..., 1:]
        assert error(a, b) <= limit, f"{name}: {error(a, b):.1e}"


def test_heads_cut_from_one_projection_and_an_expanded_gradient_give_the_same_bits(fast):
    groups = [(18, [4])]
    q, k, v, _ = random_inputs(groups, 4, 2)
    fused = torch.cat([q, k, v], dim=1)                                    # (T, H + 2 Hkv, K)
    dout = torch.ones((), device=DEVICE).expand_as(q)
    assert_same_bits(run(attention, fused[:, :4], fused[:, 4:6], fused[:, 6:], dout, groups),
                     run(attention, q, k, v, dout.contiguous(), groups))


def test_only_a_head_size_with_kernels_is_taken(use_kernels):
    for backend in ("fast", "bitwise"):
        use_kernels(backend)
        for wrong in (dict(K=24), dict(dtype=torch.float16)):
            q, k, v, _ = random_inputs([(3, [2])], **wrong)
            said = "16, 32, 64, 128 in bfloat16 or float32, not (24|16) in"
            with pytest.raises(ValueError, match=said):
                attention(q, k, v, make_layout([(3, [2])], DEVICE))


def test_tiles_never_straddle_two_segments_and_the_heaviest_comes_first():
    # rows    0-4 prompt, 5-7 rollout   8-16 prompt
    layout = make_layout([(5, [3]), (9, [])], DEVICE)
    a, rollout, b = [0, 5, 0, 0, 8], [5, 8, 0, 5, 8], [8, 17, 8, 8, 17]
    # Keys seen: 9, 8, 5 + 3, 5, 4, 4.
    assert layout.tiles("query", 4).tolist() == [
        [16, *b], [5, *rollout], [12, *b], [4, *a], [0, *a], [8, *b]]
    # Queries that see them: 9, 8, 5, 4, 3, 1.
    assert layout.tiles("key", 4).tolist() == [
        [8, *b], [0, *a], [12, *b], [4, *a], [5, *rollout], [16, *b]]
    assert layout.tiles("key", 4) is layout.tiles("key", 4)  # built once, not once per layer
    assert make_layout([(5, [3])], "meta").tiles("key", 4).device.type == "meta"


def test_the_torch_backend_differentiates_right():
    groups = [(2, [2, 1]), (1, [])]
    q, k, v, _ = (x.cpu().requires_grad_() for x in random_inputs(groups, K=3, dtype=torch.float64))
    attend = partial(attention_torch, layout=make_layout(groups))
    assert torch.autograd.gradcheck(attend, (q, k, v))
