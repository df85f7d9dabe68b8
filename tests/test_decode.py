"""One-token attention over the cache: against its plain definition in fp64, and bit for bit against
the trainer's attention."""
import random

import pytest
import torch

pytest.importorskip("triton")
from conftest import DEVICE
from interpreter import canaries, guarded, shuffled_grid
from kernels.attention import attention, make_layout
from kernels.decode import Rows, decode, decode_reference

BN = 16  # keys of a tile at head size 16: the lengths around it are where masks go wrong
PROMPTS = [5, BN, 2 * BN + 1, 1, BN - 1]
# Slot of the prompt (-1: idle) and own tokens of each row.
ROWS = [(0, 3), (2, BN), (1, 1), (2, BN + 1), (4, 2 * BN), (-1, 0), (2, BN - 1), (0, 7), (3, 1)]


def random_cache(prompts=PROMPTS, rows=ROWS, H=4, Hkv=2, K=16, dtype=torch.float32, seed=0):
    """q, the four caches with NaN behind every length, and Rows."""
    generator = torch.Generator().manual_seed(seed)
    P, R = max(prompts) + 3, max(length for _, length in rows) + 2
    shapes = [(len(prompts), Hkv, P, K)] * 2 + [(len(rows), Hkv, R, K)] * 2 + [(len(rows), H, K)]
    *caches, q = (torch.randn(shape, generator=generator).to(dtype).to(DEVICE) for shape in shapes)
    for cache in caches[:2]:
        for slot, length in enumerate(prompts):
            cache[slot, :, length:] = float("nan")
    for cache in caches[2:]:
        for row, (_, length) in enumerate(rows):
            cache[row, :, length:] = float("nan")
    table = Rows(len(rows), len(prompts), H // Hkv, DEVICE)
    table.prompt_lens.copy_(torch.tensor(prompts))
    table.lengths.copy_(torch.tensor([length for _, length in rows]))
    table.place([slot for slot, _ in rows])
    return q, caches, table


def take_newest(caches, rows):
    """-> the last own key and value of each row, which `decode` has to append; NaN is left there."""
    newest = []
    for cache in caches[2:]:
        newest.append(cache[rows.index, :, rows.lengths - 1].clone())
        cache[rows.index, :, rows.lengths - 1] = float("nan")
    return newest


def decode_all(q, caches, rows):
    """`decode` of rows whose caches hold all tokens but the newest; afterwards they hold it."""
    complete = [cache.clone() for cache in caches]
    k, v = take_newest(caches, rows)
    out = decode(q, k, v, *caches, rows)
    busy = rows.busy.bool()
    for before, after in zip(complete[2:], caches[2:]):
        assert torch.equal(before[busy].nan_to_num(), after[busy].nan_to_num())
    return out


def exact(q, caches, rows):
    """The definition in fp64; an idle row gets zeros."""
    return decode_reference(q.double(), *(cache.double() for cache in caches), rows)


def finite(caches):
    """The torch backend multiplies what a row does not see by zero, so it must be finite there."""
    return [cache.nan_to_num(nan=9.0) for cache in caches]


def error(ours, theirs):
    distance = (ours.double() - theirs.double()).norm() / theirs.double().norm()
    assert distance.isfinite()
    return distance.item()


@pytest.mark.parametrize("backend", ["fast", "bitwise"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 3e-3)])
@pytest.mark.parametrize("H, Hkv", [(2, 2), (4, 2), (6, 1), (10, 2), (24, 1)])
def test_a_row_sees_its_prompt_and_its_own_tokens_and_nothing_else(
        use_kernels, backend, dtype, tolerance, H, Hkv):
    use_kernels(backend)
    q, caches, rows = random_cache(H=H, Hkv=Hkv, dtype=dtype)
    out, busy = decode_all(q, caches, rows), rows.busy.bool()
    assert error(out[busy], exact(q, caches, rows)[busy]) < tolerance
    assert (out[~busy] == 0).all()


def test_too_many_query_heads_to_a_kv_head_are_refused(use_kernels):
    use_kernels("fast")
    q, caches, rows = random_cache(H=80, Hkv=1)
    with pytest.raises(ValueError, match="at most 64 query heads"):
        decode_all(q, caches, rows)


@pytest.mark.parametrize("seed", range(20))
def test_torch_says_what_the_definition_says(use_kernels, seed):
    """Ragged prompts, some without rows, shared or not; idle rows; every ratio of heads."""
    use_kernels("torch")
    rng = random.Random(seed)
    prompts = [rng.randint(1, 12) for _ in range(rng.randint(1, 5))]
    rows = [(0, rng.randint(1, 9))]
    for _ in range(rng.randint(0, 8)):
        slot = rng.randrange(-1, len(prompts))
        rows.append((slot, rng.randint(1, 9) if slot >= 0 else 0))
    rng.shuffle(rows)
    H, Hkv = rng.choice([(1, 1), (4, 4), (4, 2), (6, 1)])
    q, caches, table = random_cache(prompts, rows, H, Hkv, K=8, dtype=torch.float64, seed=seed)
    out, busy = decode_all(q, finite(caches), table), table.busy.bool()
    # Its softmax is in fp32 whatever its inputs are.
    assert error(out[busy], exact(q, caches, table)[busy]) < 3e-7
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 0.01)])
def test_torch_is_as_good_as_its_dtype(use_kernels, dtype, tolerance):
    use_kernels("torch")
    q, caches, rows = random_cache(H=6, Hkv=2, dtype=dtype)
    out, busy = decode_all(q, finite(caches), rows), rows.busy.bool()
    assert out.dtype == dtype and error(out[busy], exact(q, caches, rows)[busy]) < tolerance


@pytest.mark.parametrize("backend", ["torch", "fast", "bitwise"])
def test_more_rows_of_a_prompt_than_a_program_takes(use_kernels, backend):
    use_kernels(backend)
    rng = random.Random(0)
    # 32 rows of 2 heads fill a tile.
    rows = [(rng.choice([0, 0, 0, 1]), rng.randint(1, 5)) for _ in range(75)]
    q, caches, table = random_cache([4, 3], rows, H=2, Hkv=1)
    assert error(decode_all(q, finite(caches), table), exact(q, caches, table)) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("H, Hkv, K", [(4, 2, 16), (3, 1, 32), (2, 1, 64)])
def test_decoding_gives_the_bits_of_the_training_forward(use_kernels, dtype, H, Hkv, K):
    use_kernels("bitwise")
    groups = [(5, [3, 17, 40]), (33, [1, 16]), (64, [15, 66]), (1, [2])]
    layout = make_layout(groups, DEVICE)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(len(layout.positions), heads, K, generator=generator).to(DEVICE, dtype)
               for heads in (H, Hkv, Hkv))
    trained = attention(q, k, v, layout)
    prompts = [size for size, _ in groups]
    lasts = [(i, length) for i, (_, lengths) in enumerate(groups) for length in lengths]
    _, caches, rows = random_cache(prompts, lasts, H=H, Hkv=Hkv, K=K, dtype=dtype)
    for slot, size in enumerate(prompts):
        for cache, x in zip(caches[:2], (k, v)):
            cache[slot, :, :size] = x[layout.prompts[slot, :size]].transpose(0, 1)
    for row, (_, length) in enumerate(lasts):
        for cache, x in zip(caches[2:], (k, v)):
            cache[row, :, :length] = x[layout.rollouts[row, :length]].transpose(0, 1)
    for back in range(3):  # the last token of every rollout, and the ones before it
        alive = [(slot if length > back else -1) for slot, length in lasts]
        rows.lengths.copy_(torch.tensor([max(0, length - back) for _, length in lasts]))
        rows.place(alive)
        chosen = [row for row, slot in enumerate(alive) if slot >= 0]
        at = torch.stack([layout.rollouts[row, max(0, length - 1 - back)]
                          for row, (_, length) in enumerate(lasts)])
        assert torch.equal(decode_all(q[at], caches, rows)[chosen], trained[at][chosen])


@pytest.mark.parametrize("backend", ["fast", "bitwise"])
def test_a_row_has_the_same_bits_alone_and_in_any_company(use_kernels, backend):
    use_kernels(backend)
    q, caches, rows = random_cache()
    together = decode_all(q, caches, rows)
    for row, (slot, _) in enumerate(ROWS):
        if slot >= 0:
            alone = Rows(len(ROWS), len(PROMPTS), 2, DEVICE)
            alone.prompt_lens.copy_(rows.prompt_lens)
            alone.lengths.copy_(rows.lengths)
            alone.place([slot if i == row else -1 for i in range(len(ROWS))])
            assert torch.equal(decode_all(q, caches, alone)[row], together[row])


def test_nothing_is_read_or_written_outside_and_no_program_waits_for_another(
        use_kernels, monkeypatch):
    use_kernels("fast")
    q, caches, rows = random_cache()
    expected = decode_all(q, caches, rows)
    with canaries(monkeypatch):
        copies = [cache.clone() for cache in caches]
        inputs = [q, *take_newest(copies, rows), *copies]
        out = decode(*(guarded(x) for x in inputs), rows)
    assert torch.equal(out, expected)
    for seed in range(3):
        with shuffled_grid(seed):
            assert torch.equal(decode_all(q, caches, rows), expected)


def test_rows_are_read_afresh_so_a_captured_graph_may_replay(use_kernels):
    use_kernels("fast")
    q, caches, rows = random_cache()
    tensors = [x.data_ptr() for x in vars(rows).values() if isinstance(x, torch.Tensor)]
    rows.place([0, 0, 1, 2, 2, 2, -1, -1, 4])
    rows.lengths.copy_(torch.tensor([1, 2, 3, 4, 5, 6, 0, 0, 7]))
    assert [x.data_ptr() for x in vars(rows).values() if isinstance(x, torch.Tensor)] == tensors
    caches = finite(caches)
    busy = rows.busy.bool()
    assert error(decode_all(q, caches, rows)[busy], exact(q, caches, rows)[busy]) < 2e-6


def test_the_work_of_the_prefix_pass():
    rows = Rows(7, 3, 32, "cpu")  # 32 query heads for a KV head: two rows fill a tile
    rows.place([2, 0, -1, 2, 2, 0, 2])
    assert rows.order.tolist() == [2, 1, 5, 0, 3, 4, 6]
    # First place in that order, rows, slot.
    assert rows.work.tolist() == [[1, 2, 0], [3, 2, 2], [5, 2, 2]] + [[0, 0, 0]] * 4
    assert rows.busy.tolist() == [1, 1, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("backend", ["fast", "bitwise"])
def test_new_keys_and_values_may_lie_apart_and_idle_rows_write_nothing(use_kernels, backend):
    use_kernels(backend)
    q, caches, rows = random_cache()
    copies = [cache.clone() for cache in caches]
    k, v = (x.nan_to_num(nan=7.0) for x in take_newest(copies, rows))
    before = [cache.clone() for cache in copies]
    wide = torch.cat([v.flatten(1), k.flatten(1), q.flatten(1)], dim=1)
    wider = torch.cat([k.flatten(1), q.flatten(1), q.flatten(1)], dim=1)
    v_apart, k_apart = wide[:, :32].unflatten(1, (2, 16)), wider[:, :32].unflatten(1, (2, 16))
    assert len({k_apart.stride(0), v_apart.stride(0), k.stride(0)}) == 3
    out = decode(q, k_apart, v_apart, *copies, rows)
    busy = rows.busy.bool()
    assert error(out[busy], exact(q, caches, rows)[busy]) < 2e-6
    for new, cache, old in zip((k, v), copies[2:], before[2:]):
        old[rows.index[busy], :, rows.lengths[busy] - 1] = new[busy]
        assert torch.equal(cache.nan_to_num(nan=9.0), old.nan_to_num(nan=9.0))   # and nothing else
