"""Triton's CPU interpreter, made to round like a GPU; applied whenever TRITON_INTERPRET=1 is set.

The interpreter keeps bf16 as 16-bit integers and computes on the bit patterns: every bf16 dot, sum
or product is silently wrong, and the cast from fp32 truncates where a GPU rounds to nearest even.
Its dot is a BLAS call, in which a row's last bit depends on the place of the row in the tile; a
tensor core treats all rows alike. `repair` mends both: bf16 is computed in fp32 and rounded once, a
dot in fp64 and rounded once.
"""
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle, Builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
IEEE = interpreter._ir.INPUT_PRECISION.IEEE


def to_float(bits):
    """bf16 bit patterns -> fp32, exactly."""
    raised = np.ascontiguousarray(bits).astype(np.uint32) << 16
    return raised.view(np.float32).reshape(np.shape(bits))


def to_bits(x):
    """fp32 -> bf16 bit patterns, round to nearest even; NaN stays NaN."""
    x = np.asarray(x, dtype=np.float32)
    bits = np.ascontiguousarray(x).view(np.uint32).reshape(x.shape).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def is_bf16(handle):
    return handle.dtype.scalar == tl.bfloat16


def as_fp32(handle):
    return Handle(to_float(handle.data), tl.float32) if is_bf16(handle) else handle


def repair():
    """Replace the interpreter's methods that compute; once, or they would wrap themselves."""
    if getattr(Builder, "repaired", False):
        return
    Builder.repaired = True
    binary, unary, cast = Builder.binary_op, Builder.unary_op, Builder.cast_impl

    def bf16_result(out):
        return Handle(out, tl.int1) if out.dtype == np.bool_ else Handle(to_bits(out), tl.bfloat16)

    def binary_op(self, lhs, rhs, op):
        if is_bf16(lhs) and is_bf16(rhs):
            return bf16_result(op(to_float(lhs.data), to_float(rhs.data)))
        return binary(self, lhs, rhs, op)

    def unary_op(self, arg, op):
        return bf16_result(op(to_float(arg.data))) if is_bf16(arg) else unary(self, arg, op)

    def cast_impl(self, source, to):
        if is_bf16(source) and to.scalar != tl.bfloat16:
            source = as_fp32(source)
            return source if to.scalar == tl.float32 else cast(self, source, to)
        if to.scalar == tl.bfloat16 and not is_bf16(source):
            return Handle(to_bits(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, to)

    def create_dot(self, a, b, d, precision, *_):
        # A GPU would keep 10 bits of each factor, which no result here would show.
        assert is_bf16(a) or precision == IEEE, "a product of fp32 in TF32: see dot_precision"
        a, b = (as_fp32(x).data.astype(np.float64) for x in (a, b))
        return Handle((np.matmul(a, b) + d.data).astype(d.data.dtype), d.dtype.scalar)

    def create_atomic_rmw(self, *_):
        raise AssertionError("an atomic: its order, and so the last bit, changes from run to run")

    for method in (binary_op, unary_op, cast_impl, create_dot, create_atomic_rmw):
        setattr(Builder, method.__name__, method)
