"""The inference lane over 4-bit weights: a plain call of few rows goes from the public function straight to the kernel.

As `lora_linear_lean.py` for dense weights: what it leaves alone takes the full path, which computes the same and says what
is wrong. A decoding step of a 2048² layer is 90 µs; the full path would add 40.
"""

from __future__ import annotations

import torch
from torch._C import _is_any_autocast_enabled

from .. import _native
from .._native import CODES
from ..weight4bit import Weight4bit
from . import _backend, linear4bit_cpu
from ._library import plain_call
from .lora_linear_cpu import MAX_RANK, check_status, small_m
from .lora_linear_lean import constant, vector

NO_ADAPTER = (0,) * 8
ALWAYS_SMALL_M = 4  # on every instruction set: no need to ask which


def lean(x, weight: Weight4bit, a, b, scale, bias, lora_bias) -> torch.Tensor | None:
    """y [..., N] of a plain call without gradients; a and b may be None. None where it is anything else."""
    if _is_any_autocast_enabled() or not plain_call(x) or _backend._forced not in ("", "cpu"):
        return None
    native, dtype, shape = _native.cpu(), x.dtype, x.shape
    try:
        (n, k), r = weight.shape, 0
        rows = x.numel() // k
        usual = (
            native is not None
            and shape[-1] == k
            and weight.dtype is dtype
            and weight.tiled
            and (0 < rows <= ALWAYS_SMALL_M or 0 < rows <= small_m(native, dtype, weight))
            and x.is_cpu and x.is_contiguous()
        )  # fmt: skip
        if not usual:
            return None
        adapter = NO_ADAPTER
        if a is not None or b is not None:
            (r, a_k), (b_n, b_r) = a.shape, b.shape
            fits = a_k == k and b_n == n and b_r == r <= MAX_RANK and a.is_cpu and b.is_cpu
            if not (fits and a.is_contiguous() and b.is_contiguous()):
                return None
            scale_ptr = constant(scale).data_ptr()
            adapter = (a.data_ptr(), CODES[a.dtype], k, b.data_ptr(), CODES[b.dtype], r, scale_ptr, 0)
        first = (0, 0) if bias is None else vector(bias, n)
        second = (0, 0) if lora_bias is None else vector(lora_bias, n)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    y = torch.empty_strided((rows, n), (n, 1), dtype=dtype)
    status = native.linear4bit_small(
        CODES[dtype], x.data_ptr(), rows, k, *linear4bit_cpu.arguments(weight), *first, y.data_ptr(), n, 0, r, r, *adapter,
        *second, linear4bit_cpu.dot(), torch.get_num_threads(),
    )  # fmt: skip
    if status:
        check_status(status, "linear4bit_small", rows, k, n, r)
    return y if len(shape) == 2 else y.view(*shape[:-1], n)
