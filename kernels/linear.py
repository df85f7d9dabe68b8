"""RMSNorm, SwiGLU and matrix product whose rows do not know of each other.

    torch      y[r] may change in its last bit when the number of rows changes: cuBLAS picks another tile or
               splits the sum over D, a reduction picks another tree, a CPU loop ends in a scalar tail
    here       one tile shape and one order of summation, whatever the number of rows

               D                     O = 128 a tile                     O
        rows [ 64 ... 64 ]  x   D [ 64            ]    ->   rows [ 64 or 128, 128 ]
             [ 64 ... 64 ]        [ 64            ]              fp32 sum over D in steps of 64, ascending:
             tiles past the last row are masked                  never split over programs

A trainer that computes 16,384 rows at once and a sampler that computes 256 at a time then agree to the bit,
and so do the log-probs at the end of the model. Only the kind "bitwise" runs these kernels, and only forward:
nothing has to agree with a gradient, so the backward is plain torch. RoPE needs no kernel: its table is
computed once, and products and sums of single elements are exact IEEE wherever they stand.

The price, at 256 rows: a product of width 1,536 is 12 x 4 tiles on 132 multiprocessors, where cuBLAS would
split D to fill them all.
"""
import torch
import torch.nn.functional as F

import kernels
from kernels import tl, triton

BN, BK = 128, 64                           # columns of a tile, and the step along D
TILE = {64: (4, 4), 128: (8, 3)}           # rows of a tile: warps, stages. A warpgroup of 4 warps multiplies
                                           # 64 rows at a time either way, so both give a row the same bits
ACROSS = 8                                 # row tiles that share a column tile while it is in L2


# ---- references ----

def rms_norm_reference(x, weight, eps):
    """x (..., D), weight (D,) -> x / sqrt(mean(x^2) + eps) * weight, normalised in fp32 whatever x is."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + eps)
    return weight.to(x.dtype) * y.to(x.dtype)


def swiglu_reference(gate, up):
    """gate, up (N, F) -> silu(gate) * up."""
    return F.silu(gate) * up


# ---- kernels ----

@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, out_ptr, D, eps, WIDTH: tl.constexpr):
    """One program per row; WIDTH is D rounded up to a power of two."""
    column = tl.arange(0, WIDTH)
    inside = column < D
    at = tl.program_id(0).to(tl.int64) * D + column
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + at, weight.to(dtype) * x.to(dtype), mask=inside)


@triton.jit
def swiglu_kernel(gate_ptr, up_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """gate / (1 + exp(-gate)) * up; silu is rounded to the dtype before the product, as in the reference."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0)
    silu = gate / (1 + tl.exp(-gate))
    tl.store(out_ptr + at, silu.to(up.dtype) * up, mask=inside)


@triton.jit
def linear_kernel(x_ptr, weight_ptr, bias_ptr, out_ptr, N, O, D, BIAS: tl.constexpr, ACROSS: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """out (N, O) = x (N, D) @ weight (O, D).T + bias: one tile of it."""
    program, row_tiles, column_tiles = tl.program_id(0), tl.cdiv(N, BM), tl.cdiv(O, BN)
    band = program // (ACROSS * column_tiles) * ACROSS                   # bands of ACROSS row tiles
    height = tl.minimum(row_tiles - band, ACROSS)
    place = program % (ACROSS * column_tiles)
    rows = (band + place % height) * BM + tl.arange(0, BM)
    columns = place // height * BN + tl.arange(0, BN)
    x_ptr += rows.to(tl.int64)[:, None] * D
    weight_ptr += columns.to(tl.int64)[:, None] * D
    total = tl.zeros((BM, BN), tl.float32)
    tl.assume(D > 0)
    for start in range(0, D, BK):
        step = start + tl.arange(0, BK)
        x = tl.load(x_ptr + step[None, :], mask=(rows[:, None] < N) & (step[None, :] < D), other=0.0)
        w = tl.load(weight_ptr + step[None, :], mask=(columns[:, None] < O) & (step[None, :] < D), other=0.0)
        total = tl.dot(x, w.T, total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias_ptr + columns, mask=columns < O, other=0.0).to(tl.float32)[None, :]
    at = out_ptr + rows.to(tl.int64)[:, None] * O + columns[None, :]
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=(rows[:, None] < N) & (columns[None, :] < O))


# ---- wrappers ----

class ForwardByKernel(torch.autograd.Function):
    """Forward by a kernel; backward by differentiating the reference at the same inputs."""

    @staticmethod
    def forward(ctx, kernel, reference, *inputs):
        ctx.reference = reference
        ctx.save_for_backward(*inputs)
        return kernel(*inputs)

    @staticmethod
    def backward(ctx, grad):
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = ctx.reference(*inputs)
        return None, None, *torch.autograd.grad(out, inputs, grad)


class RowLinear(torch.autograd.Function):
    """F.linear with the product of linear_kernel in the forward and torch's in the backward."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.bias = bias is not None
        return multiply(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        dx = grad @ weight if ctx.needs_input_grad[0] else None
        dweight = grad.T @ x if ctx.needs_input_grad[1] else None
        return dx, dweight, grad.sum(dim=0) if ctx.bias else None


def multiply(x, weight, bias):
    """x (N, D), weight (O, D), bias (O,) or None -> (N, O) by linear_kernel."""
    x, weight, (N, D), O = x.contiguous(), weight.contiguous(), x.shape, weight.shape[0]
    out = torch.empty(N, O, dtype=x.dtype, device=x.device)
    BM = 64 if N <= 512 else 128
    if N:
        warps, stages = TILE[BM] if x.dtype == torch.bfloat16 else (8, 2)
        linear_kernel[(triton.cdiv(N, BM) * triton.cdiv(O, BN),)](
            x, weight, bias, out, N, O, D, bias is not None, ACROSS, BM, BN, BK, kernels.precision(x),
            **kernels.options("bitwise", warps, stages))
    return out


def norm_rows(x, weight, eps):
    x, D = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    if x.numel():
        rms_norm_kernel[(x.numel() // D,)](x, weight, out, D, eps, triton.next_power_of_2(D),
                                           **kernels.options("bitwise", 4))
    return out


def gate_rows(gate, up):
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if gate.numel():
        swiglu_kernel[(triton.cdiv(gate.numel(), 1024),)](gate, up, out, gate.numel(), 1024,
                                                          **kernels.options("bitwise", 4))
    return out


def linear(x, weight, bias=None):
    """x (N, D), weight (O, D), bias (O,) -> (N, O), computed in x's dtype."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if kernels.chosen(x.device) != "bitwise":
        return F.linear(x, weight, bias)
    return RowLinear.apply(x, weight, bias)


def rms_norm(x, weight, eps):
    """x (..., D), weight (D,) -> x / sqrt(mean(x^2) + eps) * weight."""
    if kernels.chosen(x.device) != "bitwise":
        return rms_norm_reference(x, weight, eps)
    return ForwardByKernel.apply(
        lambda x, w: norm_rows(x, w, eps), lambda x, w: rms_norm_reference(x, w, eps), x, weight)


def swiglu(gate, up):
    """gate, up (N, F) -> silu(gate) * up."""
    if kernels.chosen(gate.device) != "bitwise":
        return swiglu_reference(gate, up)
    return ForwardByKernel.apply(gate_rows, swiglu_reference, gate, up)
