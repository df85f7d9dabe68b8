"""Matrix product in which a row's result does not depend on the other rows.

    torch      a row may change in its last bit when the number of rows does: cuBLAS picks another
               tile or splits the sum over D
    bitwise    one order of summation, whatever the number of rows

               D                     O = 16 to 256 a tile           O
        rows [ 64 ... 64 ]  x   D [ 64            ]   ->   rows [ 64 or 128, 16 to 256 ]
             [ 64 ... 64 ]        [ 64            ]             fp32 sum over D, 64 at a time, in
             rows past the end are masked                       ascending order, by one program

A trainer that computes 16,384 rows at once and a sampler that computes 256 at a time then agree to
the bit, and so do the log-probs at the end of the model. Only the bitwise backend runs this kernel,
and only forward: nothing has to agree with a gradient, so the backward pass is torch's.

The price on an H100, against cuBLAS, which may split D to fill all multiprocessors: 256 rows by
8,960 x 1,536 weights take 24 instead of 16 us, by 1,536 x 8,960 weights 29 instead of 20;
16,384 rows 20 to 35 % longer.
"""
import math
import time
from contextlib import contextmanager

import torch
import torch.nn.functional as F

import kernels
from kernels import tl, triton

BK = 64                          # the step along D
ACROSS = 8                       # row tiles that share a column tile while it is in L2
PROCESSORS = 132                 # multiprocessors of an H100 or H200


def tile(N, O, dtype):
    """-> rows and columns of a tile, warps, stages; for bf16 the fastest of 12 on an H100.

    All give a row the same bits, because a tensor core sums a dot product in the same order
    whatever the size of the tile.
    """
    if dtype == torch.float32:
        return 64 if N <= 512 else 128, 128, 8, 2
    if N > 512:
        return 128, 256 if O >= 1024 else 128, 8, 3
    # Few rows: reading the weights takes the time, so many programs should read them. The narrowest
    # tile with which all programs still run at once does best.
    for columns in (16, 32, 64):
        if triton.cdiv(N, 64) * triton.cdiv(O, columns) <= PROCESSORS:
            return 64, columns, 4, 6
    return 64, 64, 4, 4


# ---- kernel ----

@triton.jit(do_not_specialize=["N"])
def linear_kernel(x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, N, O, D, BIAS: tl.constexpr,
                  RESIDUAL: tl.constexpr, ACROSS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                  BK: tl.constexpr, PRECISION: tl.constexpr):
    """out (N, O) = residual (N, O) + (x (N, D) @ weight (O, D).T + bias): one tile of it."""
    # Tiles are numbered in bands of ACROSS row tiles, down the columns of each band.
    program, row_tiles, column_tiles = tl.program_id(0), tl.cdiv(N, BM), tl.cdiv(O, BN)
    band = program // (ACROSS * column_tiles) * ACROSS
    height = tl.minimum(row_tiles - band, ACROSS)
    place = program % (ACROSS * column_tiles)
    rows = (band + place % height) * BM + tl.arange(0, BM)
    columns = place // height * BN + tl.arange(0, BN)
    real_rows, real_columns = rows[:, None] < N, columns[:, None] < O

    x_ptr += rows.to(tl.int64)[:, None] * D
    weight_ptr += columns.to(tl.int64)[:, None] * D
    total = tl.zeros((BM, BN), tl.float32)
    tl.assume(D > 0)                              # as in logits_tile of logprob.py
    for start in range(0, D, BK):
        step = (start + tl.arange(0, BK))[None, :]
        x = tl.load(x_ptr + step, mask=real_rows & (step < D), other=0.0)
        w = tl.load(weight_ptr + step, mask=real_columns & (step < D), other=0.0)
        total = tl.dot(x, w.T, total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias_ptr + columns, mask=columns < O, other=0.0).to(tl.float32)[None, :]
    at = rows.to(tl.int64)[:, None] * O + columns[None, :]
    inside, out = real_rows & (columns[None, :] < O), total.to(out_ptr.dtype.element_ty)
    if RESIDUAL:
        # Rounded twice, as two operations of torch would.
        out = tl.load(residual_ptr + at, mask=inside, other=0.0) + out
    tl.store(out_ptr + at, out, mask=inside)


# ---- launch ----

def launch_linear(x, weight, bias, residual):
    x, weight = x.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    (N, D), O = x.shape, weight.shape[0]
    out = torch.empty(N, O, dtype=x.dtype, device=x.device)
    if N:
        BM, BN, warps, stages = tile(N, O, x.dtype)
        linear_kernel[triton.cdiv(N, BM) * triton.cdiv(O, BN),](
            x, weight, bias, residual, out, N, O, D, bias is not None, residual is not None,
            ACROSS, BM, BN, BK, kernels.dot_precision(x),
            **kernels.launch_options("bitwise", warps, stages))
    return out


class Linear(torch.autograd.Function):
    """`linear_kernel` or cuBLAS forward; backward always torch's products."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, backend):
        cast = weight.to(x.dtype)
        ctx.save_for_backward(x, cast)
        ctx.dtype = weight.dtype
        ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
        bias = None if bias is None else bias.to(x.dtype)
        if backend == "bitwise":
            return launch_linear(x, cast, bias, residual)
        if residual is not None and bias is None:
            return torch.addmm(residual, x, cast.T)  # cuBLAS adds it in the same launch
        out = F.linear(x, cast, bias)
        return out if residual is None else residual + out

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = grad @ weight
        if ctx.needs_input_grad[1]:
            # An fp32 master gets the sum over all rows as it was accumulated, not rounded to bf16.
            is_master = ctx.dtype == torch.float32
            dweight = product(grad.T, x) if is_master else grad.T @ x
        if ctx.has_bias:
            dbias = grad.sum(dim=0, dtype=ctx.dtype)
        return dx, dweight, dbias, grad if ctx.has_residual else None, None


def product(a, b):
    """a @ b in a's dtype, but accumulated and returned in fp32."""
    b = b.to(a.dtype)
    if a.dtype != torch.bfloat16:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    with bf16_products():
        return a.float() @ b.float()


# ---- torch, on a CPU ----

CAN_PACK = {torch.float32: torch.backends.mkl.is_available(),
            torch.bfloat16: (torch.backends.mkldnn.is_available()
                             and torch.ops.mkldnn._is_mkldnn_bf16_supported())}


class Packed:
    """Weights (O, D) of layers that read the same x, in the order in which a CPU multiplies them.

    By itself a product puts them in order each time, which takes a third of it where x has 32 rows.
    The order of MKL, for fp32, is for one number of rows; that of oneDNN, for bf16, is for any.
    """

    def __init__(self, weights, biases, rows, is_head=False):
        """is_head: the result is fp32 although x is bf16, as in `product`."""
        weight = torch.cat(weights)
        self.in_bf16, self.is_head, self.rows = weight.dtype == torch.bfloat16, is_head, rows
        self.bias = None if biases[0] is None else torch.cat(biases).to(weight.dtype)
        if self.in_bf16:
            weight = weight.float() if is_head else weight
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        else:
            self.weight = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
            self.shape_only = weight[:1, :1].clone().expand(weight.shape)  # takes no memory

    def fits(self, x):
        return self.in_bf16 or len(x) == self.rows

    def __call__(self, x):
        """x (N, D) -> (N, O)."""
        if not self.in_bf16:
            return torch.ops.mkl._mkl_linear(x, self.weight, self.shape_only, self.bias, self.rows)
        if not self.is_head:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        with bf16_products():
            return torch.ops.mkldnn._linear_pointwise(x.float(), self.weight, None, "none", [], "")


def bf16_is_faster(N=256, D=512):
    """Does this CPU multiply bf16 at least 1.5 times as fast as fp32? Many emulate it."""
    seconds = dict.fromkeys((torch.float32, torch.bfloat16), math.inf)
    for _ in range(4):
        for dtype in seconds:
            x, weight = torch.ones(N, D, dtype=dtype), torch.ones(D, D, dtype=dtype)
            start = time.perf_counter()
            F.linear(x, weight)
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return seconds[torch.float32] > 1.5 * seconds[torch.bfloat16]


@contextmanager
def bf16_products():
    """Products of fp32 matrices on a CPU: their numbers are rounded to bf16, sums stay fp32."""
    settings = torch.backends.mkldnn.matmul
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


# ---- what the model calls ----

def linear(x, weight, bias=None, residual=None):
    """x (N, D), weight (O, D), bias (O,) -> (N, O), computed in x's dtype; plus residual (N, O).

    weight and bias may be fp32 masters beside a bf16 x; their gradients are then fp32 as well.
    """
    backend = kernels.backend(x.device)
    if backend != "torch":
        return Linear.apply(x, weight, bias, residual, backend)
    out = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return out if residual is None else residual + out
