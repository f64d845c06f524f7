"""The CUDA C++ kernels of 4-bit weights, as `lora_linear_gpu.py` calls them: tensors turned into pointers.

A weight is read as bitsandbytes has it (`tiled` False), its scales decoded in the same kernel.
"""

from __future__ import annotations

import torch

from .. import native
from ..native import CODES
from ..weight4bit import QUANT_TYPES, Weight4bit
from .lora_linear_cpu import _ptr, _stride
from .lora_linear_cuda import _call, _matrix

SMALL_M = 16  # rows that `small` takes


def dequantize(weight: Weight4bit, out: torch.Tensor) -> torch.Tensor:
    """out [N, K], contiguous: codebook[code] · scale in float32, rounded once to out's dtype"""
    _call("linear4bit_dequantize", out, _weight(weight), out.data_ptr(), CODES[out.dtype])
    return out


def small(x, weight: Weight4bit, bias, lora_bias, s, b, span, scale) -> torch.Tensor:
    """y [M, N] = x Wᵀ + s (scale·B)ᵀ + bias + lora_bias in one kernel; x [M, K] with M <= 16, bfloat16 or float16; B [N, R]
    or None, s [M, ΣR] whose columns from span.first on are those of B"""
    m, n = x.shape[0], weight.shape[0]
    y = x.new_empty(m, n)
    s_of, adapter = (0, 0, 0), (0, 0, 0, 0, 0, 0, 0)
    if b is not None and span.rank:
        s_of = (s.data_ptr() + span.first * s.element_size(), s.stride(0), CODES[s.dtype])
        adapter = (span.rank, b.data_ptr(), CODES[b.dtype], b.stride(0), b.stride(1), scale.data_ptr(), _stride(scale))
    _call(
        "linear4bit_small",
        x,
        _weight(weight),
        _matrix(x),
        m,
        _matrix(y),
        _vector(bias),
        _vector(lora_bias),
        s_of,
        adapter,
    )
    return y


def is_fast(x, weight: Weight4bit) -> bool:
    """Whether `small` runs at the rate of memory: K % 64 == 0, blocks of 64 or more, rows that start at 16 bytes."""
    return native.cuda().linear4bit_small_is_fast(_weight(weight), _matrix(x))


def _weight(w: Weight4bit) -> tuple[int, ...]:
    return (
        *w.shape, w.data.data_ptr(), w.scales.data_ptr(), _ptr(w.nested_absmax), _ptr(w.offset), w.blocksize.bit_length() - 1,
        QUANT_TYPES.index(w.quant_type),
    )  # fmt: skip


def _vector(t) -> tuple[int, int]:
    return (0, 0) if t is None else (t.data_ptr(), CODES[t.dtype])
