"""RMSNorm, rotary positions and SwiGLU: operations that do little but read and write.

    torch      every step reads its operands from memory and writes its result back
    kernels    one pass forward, one backward

    RMSNorm    forward     a program owns a row
               backward    a program owns a run of rows: their dx, and one row of a matrix whose
                           sum over programs is dweight; no atomics, the same bits every time
    RoPE       a program owns a block of pairs (x[i], x[i + K/2]) of queries or of keys; the
               gradient of a rotation is the rotation backwards, so that one kernel does both
    SwiGLU     a program owns a block of elements

Rows of q, k, gate and up may lie apart: the sampler computes them as columns of one product.
A row's result does not depend on the rows beside it, which the bitwise backend needs: a reduction
in torch picks another tree when the number of rows changes, a CPU loop ends in a scalar tail.
Nothing has to agree with a gradient to the bit, so the backward kernels only have to be right.
"""
import torch
import torch.nn.functional as F

import kernels
from kernels import tl, triton

BLOCK = 1024      # elements of a program of SwiGLU, pairs of one of RoPE
PROGRAMS = 512    # of RMSNorm's backward pass: rows of the matrix that sums up to dweight
TILE = 2048       # elements that one of them reads at a time, if a row is not longer


# ---- torch ----

def rms_norm_torch(x, weight, eps):
    """-> x / rms(x) * weight, 1 / rms(x)."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (y.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return (y * scale).to(x.dtype) * weight.to(x.dtype), scale


class RMSNormTorch(torch.autograd.Function):
    """By hand, because what autograd makes of so many small operations takes twice as long."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        out, scale = rms_norm_torch(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx, dout):
        # As in rms_norm_backward_kernel; the mean of dout * weight * y is a product with weight.
        x, weight, scale = ctx.saved_tensors
        y, dout = x.to(scale.dtype) * scale, dout.to(scale.dtype)
        dy = dout * y
        dweight = dy.flatten(0, -2).sum(dim=0).to(weight.dtype)
        mean = (dy @ weight.to(dy.dtype) / x.shape[-1])[..., None]
        dx = (dout * weight.to(y.dtype)).sub_(y.mul_(mean)).mul_(scale)
        return dx.to(x.dtype), dweight, None


class RotateTorch(torch.autograd.Function):
    """The gradient of a rotation is the rotation backwards."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate_torch(x, cos, sin)

    @staticmethod
    def backward(ctx, dout):
        cos, sin = ctx.saved_tensors
        return rotate_torch(dout, cos, -sin), None, None


def rotate_torch(x, cos, sin):
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def swiglu_torch(gate, up):
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


@triton.jit(do_not_specialize=["N", "count"])
def rms_norm_backward_kernel(x_ptr, weight_ptr, dout_ptr, dx_ptr, dweight_ptr, N, D, eps, count,
                             ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """`count` rows, ROWS at a time: with y = x / rms(x) and dy = dout * weight,

    dx = (dy - y * mean(dy * y)) / rms(x), and dweight gets the sum of dout * y.
    """
    program = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    inside = column < D
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    weight = weight.to(dx_ptr.dtype.element_ty).to(tl.float32)    # as the forward pass rounds it
    dweight = tl.zeros((WIDTH,), tl.float32)
    end = tl.minimum(program * count + count, N)
    for first in range(program * count, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        real = (rows < end)[:, None] & inside[None, :]
        at = rows.to(tl.int64)[:, None] * D + column[None, :]
        x = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + at, mask=real, other=0.0).to(tl.float32)
        over_rms = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        y = x * over_rms
        dy = dout * weight[None, :]
        dx = (dy - y * (tl.sum(dy * y, 1) / D)[:, None]) * over_rms
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=real)
        dweight += tl.sum(dout * y, 0)
    tl.store(dweight_ptr + program.to(tl.int64) * D + column, dweight, mask=inside)


@triton.jit
def rotate_heads(x_ptr, stride, cos_ptr, sin_ptr, out_ptr, T, H: tl.constexpr, HALF: tl.constexpr,
                 BACKWARDS: tl.constexpr, BLOCK: tl.constexpr):
    """A block of the pairs of x (T, H, 2 HALF), by the angles of their tokens, (T, HALF)."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    head, i = pair // HALF, pair % HALF                      # of T x H heads, of HALF pairs
    token, real = head // H, head < T * H
    x_ptr += token * stride + head % H * (HALF * 2) + i
    a = tl.load(x_ptr, mask=real, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + HALF, mask=real, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + token * HALF + i, mask=real, other=0.0)
    sin = tl.load(sin_ptr + token * HALF + i, mask=real, other=0.0)
    if BACKWARDS:
        sin = -sin
    dtype = out_ptr.dtype.element_ty
    at = out_ptr + head * (HALF * 2) + i
    tl.store(at, (a * cos - b * sin).to(dtype), mask=real)
    tl.store(at + HALF, (b * cos + a * sin).to(dtype), mask=real)


@triton.jit(do_not_specialize=["T"])
def rotate_kernel(q_ptr, k_ptr, q_stride, k_stride, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, T,
                  H: tl.constexpr, Hkv: tl.constexpr, HALF: tl.constexpr, BACKWARDS: tl.constexpr,
                  BLOCK: tl.constexpr):
    """Programs (i, 0) turn the queries, programs (i, 1) the keys, so that one launch does both."""
    if tl.program_id(1) == 0:
        rotate_heads(q_ptr, q_stride, cos_ptr, sin_ptr, q_out_ptr, T, H, HALF, BACKWARDS, BLOCK)
    else:
        rotate_heads(k_ptr, k_stride, cos_ptr, sin_ptr, k_out_ptr, T, Hkv, HALF, BACKWARDS, BLOCK)


@triton.jit
def swiglu_kernel(gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, F, BLOCK: tl.constexpr):
    """gate / (1 + exp(-gate)) * up, with silu rounded before the product, as in torch."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0)
    silu = gate / (1 + tl.exp(-gate))
    tl.store(out_ptr + row * F + column, silu.to(up.dtype) * up, mask=inside)


@triton.jit
def swiglu_backward_kernel(gate_ptr, up_ptr, dout_ptr, dgate_ptr, dup_ptr, size,
                           BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-gate))
    silu = gate * sigmoid
    dgate = dout * up * (sigmoid + silu * (1 - sigmoid))
    dtype = dgate_ptr.dtype.element_ty
    tl.store(dgate_ptr + at, dgate.to(dtype), mask=inside)
    tl.store(dup_ptr + at, (dout * silu).to(dtype), mask=inside)


# ---- launches ----

class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, backend):
        x, D = x.contiguous(), x.shape[-1]
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.backend = eps, backend
        out = torch.empty_like(x)
        if x.numel():
            rms_norm_kernel[x.numel() // D,](x, weight, out, D, eps, triton.next_power_of_2(D),
                                             **kernels.launch_options(backend, num_warps=4))
        return out

    @staticmethod
    def backward(ctx, dout):
        x, weight = ctx.saved_tensors
        dout, D = dout.contiguous(), x.shape[-1]
        N, WIDTH = x.numel() // D, triton.next_power_of_2(D)
        ROWS = max(1, TILE // WIDTH)
        count = ROWS * triton.cdiv(N, ROWS * PROGRAMS)         # rows of a program
        programs = triton.cdiv(N, count) if N else 0
        dx = torch.empty_like(x)
        dweight = torch.empty(programs, D, dtype=torch.float32, device=x.device)
        if N:
            rms_norm_backward_kernel[programs,](
                x, weight, dout, dx, dweight, N, D, ctx.eps, count, ROWS, WIDTH,
                **kernels.launch_options(ctx.backend, num_warps=4 if WIDTH <= 2048 else 8))
        return dx, dweight.sum(dim=0).to(weight.dtype), None, None


class Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, backend):
        ctx.save_for_backward(cos, sin)
        ctx.backend = backend
        return launch_rotate(q, k, cos, sin, backend, backwards=False)

    @staticmethod
    def backward(ctx, dq, dk):
        dq, dk = launch_rotate(dq, dk, *ctx.saved_tensors, ctx.backend, backwards=True)
        return dq, dk, None, None, None


def launch_rotate(q, k, cos, sin, backend, backwards):
    q, k = by_rows(q), by_rows(k)
    (T, H, K), Hkv = q.shape, k.shape[1]
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
    if T:
        rotate_kernel[triton.cdiv(T * H * K // 2, BLOCK), 2](
            q, k, q.stride(0), k.stride(0), cos.contiguous(), sin.contiguous(), *outs, T, H, Hkv,
            K // 2, backwards, BLOCK, **kernels.launch_options(backend, num_warps=4))
    return tuple(outs)


def by_rows(x):
    """x, or a copy of it unless each row x[i] is contiguous; rows may lie apart."""
    return x if x[:1].is_contiguous() else x.contiguous()


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, backend):
        gate, up = by_rows(gate), by_rows(up)
        ctx.save_for_backward(gate, up)
        ctx.backend = backend
        N, F = gate.shape
        out = torch.empty(N, F, dtype=gate.dtype, device=gate.device)
        if N:
            swiglu_kernel[N, triton.cdiv(F, BLOCK)](
                gate, up, out, gate.stride(0), up.stride(0), F, BLOCK,
                **kernels.launch_options(backend, num_warps=4))
        return out

    @staticmethod
    def backward(ctx, dout):
        gate, up = (x.contiguous() for x in ctx.saved_tensors)
        dgate, dup, size = torch.empty_like(gate), torch.empty_like(up), gate.numel()
        if size:
            swiglu_backward_kernel[triton.cdiv(size, BLOCK),](
                gate, up, dout.contiguous(), dgate, dup, size, BLOCK,
                **kernels.launch_options(ctx.backend, num_warps=4))
        return dgate, dup, None


# ---- what the model calls ----

def rms_norm(x, weight, eps):
    """x (..., D), weight (D,) -> x / sqrt(mean(x^2) + eps) * weight, normalised in fp32."""
    backend = kernels.backend(x.device)
    if backend != "torch":
        return RMSNorm.apply(x, weight, eps, backend)
    if torch.is_grad_enabled():
        return RMSNormTorch.apply(x, weight, eps)
    return rms_norm_torch(x, weight, eps)[0]


def rotate(q, k, cos, sin):
    """Rotate the pairs (x[i], x[i + K/2]) of q (T, H, K) and k (T, Hkv, K) -> both.

    Pairs are in the half-split order of Hugging Face. cos, sin: (T, 1, K / 2) fp32, of each token's
    angles; they get no gradient.
    """
    backend = kernels.backend(q.device)
    if backend != "torch":
        return Rotate.apply(q, k, cos, sin, backend)
    turn = RotateTorch.apply if torch.is_grad_enabled() else rotate_torch
    return turn(q, cos, sin), turn(k, cos, sin)


def swiglu(gate, up):
    """gate, up (N, F) -> silu(gate) * up."""
    backend = kernels.backend(gate.device)
    if backend == "torch":
        return swiglu_torch(gate, up)
    return SwiGLU.apply(gate, up, backend)
