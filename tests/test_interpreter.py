"""The tools of the kernel tests can fail: bf16 rounds as in torch, and planted bugs are caught."""
import pytest
import torch

pytest.importorskip("triton")
import kernels
from interpreter import canaries, guarded, shuffled_grid
from kernels import tl, triton


@triton.jit
def bf16_arithmetic(a, b, total, product, quotient, root, rounded, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(a + i), tl.load(b + i)
    tl.store(total + i, x + y)
    tl.store(product + i, x * y)
    tl.store(quotient + i, (x.to(tl.float32) / y.to(tl.float32)).to(tl.bfloat16))
    tl.store(root + i, tl.sqrt(tl.abs(x).to(tl.float32)).to(tl.bfloat16))
    tl.store(rounded + i, tl.where(x > y, x, -y))


def test_bf16_arithmetic_is_that_of_torch():
    a, b = torch.randn(2, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = [torch.empty_like(a) for _ in range(5)]
    bf16_arithmetic[(1,)](a, b, *out, 4096)
    expected = a + b, a * b, a / b, a.abs().sqrt(), torch.where(a > b, a, -b)
    for ours, theirs in zip(out, expected):
        assert torch.equal(ours, theirs)


@triton.jit
def bf16_product(a, b, c, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None] * N, tl.arange(0, N)[None, :]
    tl.store(c + i + j, tl.dot(tl.load(a + i + j), tl.load(b + i + j)))


def test_a_bf16_dot_is_the_exact_product_rounded_once():
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    c = torch.empty(64, 64)
    bf16_product[(1,)](a, b, c, 64)
    assert torch.equal(c, (a.double() @ b.double()).float())


@triton.jit
def fp32_product(a, b, c, N: tl.constexpr, PRECISION: tl.constexpr):
    i, j = tl.arange(0, N)[:, None] * N, tl.arange(0, N)[None, :]
    tl.store(c + i + j, tl.dot(tl.load(a + i + j), tl.load(b + i + j), input_precision=PRECISION))


def test_a_product_of_fp32_in_tf32_is_refused():
    a, b, c = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    fp32_product[(1,)](a, b, c, 16, kernels.dot_precision(a))
    assert torch.equal(c, (a.double() @ b.double()).float())
    with pytest.raises(Exception, match="a product of fp32 in TF32"):
        fp32_product[(1,)](a, b, c, 16, "tf32")


@triton.jit
def everybody_writes_the_same_place(x, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i % 8, tl.load(x + i))


def test_a_race_is_caught_by_shuffling_the_programs():
    x, out = torch.arange(64.0), torch.empty(8)
    results = []
    for seed in range(4):
        with shuffled_grid(seed):
            everybody_writes_the_same_place[(8,)](x, out, 8)
        results.append(out.tolist())
    assert len(set(map(tuple, results))) > 1


@triton.jit
def shift(x, out, by, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i + by, tl.load(x + i + 1))


def test_reads_and_writes_outside_are_caught(monkeypatch):
    x = torch.ones(64)
    out = torch.empty(64)
    shift[(1,)](guarded(x), out, 0, 64)
    assert out[:63].tolist() == [1] * 63 and out[63].isnan()
    with pytest.raises(AssertionError, match="wrote outside"):
        with canaries(monkeypatch):
            shift[(1,)](x, torch.empty(63), 0, 64)
    with pytest.raises(AssertionError, match="wrote outside"):
        with canaries(monkeypatch):
            shift[(1,)](x, torch.empty(64), -1, 64)


@triton.jit
def add_atomically(out):
    tl.atomic_add(out, 1.0)


def test_atomics_are_refused():
    with pytest.raises(Exception, match="atomic"):
        add_atomically[(1,)](torch.zeros(1))
