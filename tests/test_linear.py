"""Matrix product, RMSNorm, RoPE and SwiGLU by Triton: right, and blind to the rows beside a row."""
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from conftest import DEVICE
from interpreter import canaries, guarded, shuffled_grid
from kernels import pointwise
from kernels.linear import linear
from kernels.pointwise import rms_norm, rotate, rotate_torch, swiglu

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 5e-3}  # relative error of the forward, as a norm


def random(*shape, dtype=torch.float32, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).to(DEVICE)


def error(ours, theirs):
    """||ours - theirs|| / ||theirs||; NaN is no small number."""
    distance = (ours.double() - theirs.double()).norm() / theirs.double().norm()
    assert distance.isfinite()
    return distance.item()


def gradients(out, inputs):
    return torch.autograd.grad(out, inputs, random(*out.shape, dtype=out.dtype, seed=9))


@pytest.fixture(autouse=True)
def bitwise(use_kernels):
    use_kernels("bitwise")


def norm(x, weight):
    return rms_norm(x, weight, 1e-5)


def exact_norm(x, weight):
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-5) * weight


def angles(T, half):
    """cos and sin of (T, 1, half) angles"""
    turn = random(T, 1, half, seed=7) * 3
    return turn.cos(), turn.sin()


def turned(q, k):
    """All rows by the same angles; queries and keys side by side."""
    cos, sin = (part.expand(len(q), -1, -1) for part in angles(1, q.shape[-1] // 2))
    return torch.cat(rotate(q, k, cos, sin), dim=1)


def exact_turned(q, k):
    """A product of complex numbers."""
    x = torch.cat([q, k], dim=1)
    a, b = x.chunk(2, dim=-1)
    turn = torch.complex(*(part.to(x.dtype) for part in angles(1, x.shape[-1] // 2)))
    y = torch.complex(a, b) * turn
    return torch.cat([y.real, y.imag], dim=-1)


def exact_swiglu(gate, up):
    return gate / (1 + (-gate).exp()) * up


def plus_residual(x, weight, residual):
    return linear(x, weight, residual=residual)


# The operation, its formula for fp64, the shapes of its inputs.
CASES = {
    "linear": (linear, F.linear, [(70, 96), (150, 96), (150,)]),
    "linear, odd sizes": (linear, F.linear, [(65, 33), (129, 33), (129,)]),
    "no bias": (linear, F.linear, [(1, 64), (128, 64)]),
    "residual": (plus_residual, lambda x, weight, residual: residual + x @ weight.T,
                 [(70, 33), (129, 33), (70, 129)]),
    "rms_norm": (norm, exact_norm, [(5, 48), (48,)]),
    "rms_norm of heads": (norm, exact_norm, [(5, 3, 16), (16,)]),
    "rotate": (turned, exact_turned, [(40, 3, 16), (40, 1, 16)]),
    "swiglu": (swiglu, exact_swiglu, [(7, 150), (7, 150)]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_kernels_agree_with_the_formula_and_stay_inside_their_tensors(name, dtype, monkeypatch):
    operation, formula, shapes = CASES[name]
    inputs = [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    ours = [guarded(x).requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    with canaries(monkeypatch):
        out = operation(*ours)
    expected = formula(*exact)
    assert out.dtype == dtype and error(out, expected) < DTYPES[dtype]
    for a, b in zip(gradients(out, ours), gradients(expected.double(), exact)):
        assert a.dtype == dtype and error(a, b) < 3 * DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_the_torch_backend_agrees_with_the_formula_forward_and_backward(use_kernels, name, dtype):
    use_kernels("torch")
    operation, formula, shapes = CASES[name]
    inputs = [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    exact = [x.double().requires_grad_() for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    out, expected = operation(*inputs), formula(*exact)
    with torch.no_grad():
        assert torch.equal(operation(*inputs), out)
    assert out.dtype == dtype and error(out, expected) < DTYPES[dtype]
    for a, b in zip(gradients(out, inputs), gradients(expected.double(), exact)):
        assert a.dtype == dtype and error(a, b) < 3 * DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(name, dtype):
    operation, _, shapes = CASES[name]
    inputs = [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    rows = len(inputs[0])
    out = operation(*inputs)
    has_rows = [len(x) == rows and x.ndim > 1 for x in inputs]
    for chosen in (slice(0, 1), slice(rows - 1, rows), torch.randperm(rows)[:3]):
        some = [x[chosen] if cut else x for x, cut in zip(inputs, has_rows)]
        assert torch.equal(operation(*some), out[chosen])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rotation_has_the_bits_of_torchs_and_back_again_is_the_same(dtype):
    inputs = [random(5, heads, 16, dtype=dtype, seed=heads).requires_grad_() for heads in (6, 2)]
    cos, sin = angles(5, 8)
    outs = rotate(*inputs, cos, sin)
    backs = torch.autograd.grad(outs, inputs, [out.detach() for out in outs])  # rotates backwards
    for x, out, back in zip(inputs, outs, backs):
        assert torch.equal(out, rotate_torch(x, cos, sin))  # single products and sums, rounded once each
        assert error(back, x) < 3 * DTYPES[dtype]


def test_columns_of_one_product_have_the_bits_of_tensors_of_their_own():
    together = random(5, 96)
    q, k = (x.unflatten(1, (-1, 16)) for x in together.split([64, 32], dim=1))
    gate, up = together.chunk(2, dim=1)
    cos, sin = angles(5, 8)
    for operation, inputs in ((swiglu, (gate, up)), (lambda *x: rotate(*x, cos, sin)[0], (q, k)),
                              (lambda *x: rotate(*x, cos, sin)[1], (q, k))):
        apart = [x.contiguous().requires_grad_() for x in inputs]
        views = [x.detach().requires_grad_() for x in inputs]
        assert not any(x.is_contiguous() for x in views)
        out, expected = operation(*views), operation(*apart)
        assert torch.equal(out, expected)
        assert all(map(torch.equal, torch.autograd.grad(out.sum(), views),
                       torch.autograd.grad(expected.sum(), apart)))


@pytest.mark.parametrize("rows", [1, 7, 29])
def test_programs_that_take_several_rows_several_times_miss_none(monkeypatch, rows):
    monkeypatch.setattr(pointwise, "PROGRAMS", 3)  # of 12 rows at 29
    monkeypatch.setattr(pointwise, "TILE", 256)    # 4 rows at a time
    inputs = [guarded(x).requires_grad_() for x in (random(rows, 48), random(48, seed=1))]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    with canaries(monkeypatch):
        ours = gradients(norm(*inputs), inputs)
    for a, b in zip(ours, gradients(exact_norm(*exact), exact)):
        assert error(a, b) < 6e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_of_64_and_of_128_rows_give_equal_bits(dtype):
    x, weight = random(600, 80, dtype=dtype), random(130, 80, dtype=dtype, seed=1)
    many = linear(x, weight)                       # above 512 rows a tile has 128
    assert torch.equal(linear(x[100:140], weight), many[100:140])


@pytest.mark.parametrize("name", CASES)
def test_the_order_of_programs_changes_nothing(name):
    operation, _, shapes = CASES[name]
    inputs = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    expected = operation(*inputs)
    for seed in range(3):
        with shuffled_grid(seed):
            assert torch.equal(operation(*inputs), expected)


def test_large_gates_overflow_nothing():
    gate = torch.tensor([[-1e4, -200.0, -88.0, 0.0, 88.0, 1e4]], device=DEVICE)
    out = swiglu(gate, torch.ones_like(gate))
    assert torch.equal(out[0, 3:].cpu(), torch.tensor([0.0, 88.0, 1e4])) and out.isfinite().all()


def test_no_rows_are_no_error():
    empty = torch.zeros(0, 16, device=DEVICE)
    assert linear(empty, torch.ones(8, 16, device=DEVICE)).shape == (0, 8)
    assert rms_norm(empty, torch.ones(16, device=DEVICE), 1e-5).shape == (0, 16)
    assert swiglu(empty, empty).shape == (0, 16)


def test_the_product_is_fp32_and_not_tf32():
    x = torch.full((1, 64), 1 + 2**-12, device=DEVICE)  # TF32 keeps 10 bits behind the point
    assert linear(x, torch.ones(8, 64, device=DEVICE))[0, 0].item() == 64 * (1 + 2**-12)


@pytest.mark.parametrize("backend", ["fast", "bitwise"])
def test_the_gradient_of_an_fp32_master_is_never_rounded_to_bf16(use_kernels, backend):
    use_kernels(backend)
    x, weight, bias = random(70, 96, dtype=torch.bfloat16), random(40, 96, seed=1), random(40, seed=2)
    masters = [weight.requires_grad_(), bias.requires_grad_()]
    dweight, dbias = gradients(linear(x, *masters), masters)
    dout = random(70, 40, dtype=torch.bfloat16, seed=9).double()
    assert dweight.dtype == dbias.dtype == torch.float32
    assert error(dweight, dout.T @ x.double()) < 1e-6     # rounded to bf16 it would be 2e-3
    assert error(dbias, dout.sum(dim=0)) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_residual_is_added_with_the_bits_of_an_addition_of_its_own(use_kernels, dtype):
    inputs = [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate([(70, 33), (129, 33), (70, 129)])]
    x, weight, residual = inputs
    assert torch.equal(linear(x, weight, residual=residual), residual + linear(x, weight))
    for backend in ("fast", "torch"):
        use_kernels(backend)
        inputs = [x.detach().requires_grad_() for x in inputs]
        out, expected = plus_residual(*inputs), inputs[2].double() + inputs[0].double() @ inputs[1].double().T
        assert error(out, expected) < DTYPES[dtype]
        assert all(error(a, b) < 3 * DTYPES[dtype]
                   for a, b in zip(gradients(out, inputs), gradients(expected, inputs)))


def test_gate_and_up_with_strides_of_their_own_and_more_than_a_block(use_kernels):
    use_kernels("bitwise")
    gate, up = random(3, 2500)[:, :1100], random(3, 1800, seed=1)[:, 700:]
    assert torch.equal(swiglu(gate, up), swiglu(gate.contiguous(), up.contiguous()))
    assert error(swiglu(gate, up), F.silu(gate.double()) * up.double()) < 2e-6


@pytest.mark.parametrize("backend", ["fast", "bitwise"])
def test_a_residual_may_lie_anywhere_and_go_with_a_bias(use_kernels, backend):
    use_kernels(backend)
    x, weight, bias = random(5, 7), random(9, 7, seed=1), random(9, seed=2)
    for residual in (random(9, 5, seed=3).T, random(1, 9, seed=4).expand(5, 9), random(5, 20, seed=5)[:, 3:12]):
        expected = residual.double() + x.double() @ weight.double().T + bias.double()
        assert error(linear(x, weight, bias, residual), expected) < 2e-6
        assert error(linear(x, weight, None, residual), expected - bias.double()) < 2e-6
