"""Triton's interpreter, with bf16 mended: as shipped (3.6 to 3.9) it multiplies bit patterns and truncates.

Here a bf16 value is widened to fp32, computed on, and rounded to nearest even, as a GPU does. Import this before the
first kernel runs. Tests only.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def mend() -> None:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    shipped = {
        name: getattr(builder, name) for name in ("cast_impl", "binary_op", "unary_op", "create_dot", "create_fma")
    }

    def is_bf16(h):
        return h.dtype.scalar == tl.bfloat16

    def fp32(h):
        return handle(widen(h.data), tl.float32) if is_bf16(h) else h

    def bf16(values):
        return handle(narrow(values), tl.bfloat16)

    def cast_impl(self, source, dtype):
        to_bf16 = dtype.scalar == tl.bfloat16
        if is_bf16(source) and not to_bf16:
            wide = fp32(source)
            return wide if dtype.scalar == tl.float32 else shipped["cast_impl"](self, wide, dtype)
        if to_bf16 and not is_bf16(source):
            return bf16(source.data.astype(np.float32))
        return shipped["cast_impl"](self, source, dtype)

    def binary_op(self, left, right, op):
        if not is_bf16(left):
            return shipped["binary_op"](self, left, right, op)
        with np.errstate(all="ignore"):
            result = op(widen(left.data), widen(right.data))
        return handle(result, tl.int1) if result.dtype == bool else bf16(result)

    def unary_op(self, argument, op):
        if is_bf16(argument):
            return bf16(op(widen(argument.data)))
        return shipped["unary_op"](self, argument, op)

    def create_dot(self, a, b, accumulator, precision, imprecise):
        return shipped["create_dot"](self, fp32(a), fp32(b), accumulator, precision, imprecise)

    def create_fma(self, x, y, z):
        if is_bf16(x):
            return bf16(widen(x.data) * widen(y.data) + widen(z.data))
        return shipped["create_fma"](self, x, y, z)

    for function in (cast_impl, binary_op, unary_op, create_dot, create_fma):
        setattr(builder, function.__name__, function)


mend()
