"""The inference lane of lora_linear: a plain call goes from the public function straight to the kernels.

Stands between `lora_linear.py`, which asks here first, and the native passes: no checks with sentences, no registered op,
no table of backends. What it leaves alone takes the full path, by `lora_linear_op.py` to `lora_linear_cpu.py`, which
computes the same.
"""

from __future__ import annotations

import functools

import torch
from torch._C import _is_any_autocast_enabled

from .. import _native
from .._native import CODES
from . import _backend
from ._library import plain_call
from .lora_linear_cpu import MAX_RANK, SMALL_M, check_status, project


def lean(x, weight, a, b, scale, bias, lora_bias):
    """A plain call without gradients, straight to the native kernels; None where it is anything else.

    On tiny inputs such a call is all Python, so everything that must hold is asked for at once, by the cheapest question,
    and helpers are written out (8.4 -> 7.1 µs). A wrong argument goes on to the full path, which says what is wrong.
    Past SMALL_M rows it saves 30 of the 60 µs that the full path adds to a GEMM of half a millisecond.
    """
    if _is_any_autocast_enabled() or not plain_call(x) or _backend._forced not in ("", "cpu"):
        return None
    native, dtype, shape = _native.cpu(), x.dtype, x.shape
    try:
        (n, k), (r, a_k), (b_n, b_r) = weight.shape, a.shape, b.shape
        rows = x.numel() // k
        usual = (
            native is not None
            and rows > 0
            and shape[-1] == k == a_k
            and b_n == n > 0
            and b_r == r <= MAX_RANK
            and weight.dtype is dtype
            and not weight.requires_grad
            and x.is_cpu and weight.is_cpu and a.is_cpu and b.is_cpu
            and x.is_contiguous() and weight.is_contiguous() and a.is_contiguous() and b.is_contiguous()
        )  # fmt: skip
        if not usual:
            return None
        small = rows <= SMALL_M[native.isa()][dtype]
        scale_ptr, code, a_code, b_code = constant(scale).data_ptr(), CODES[dtype], CODES[a.dtype], CODES[b.dtype]
        bias_ptr, bias_code = (0, 0) if bias is None else vector(bias, n)
        lora_bias_ptr, lora_bias_code = (0, 0) if lora_bias is None else vector(lora_bias, n)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    threads = torch.get_num_threads()
    if small:
        y = torch.empty_strided((rows, n), (n, 1), dtype=dtype)  # half the price of x.new_empty
        status = native.lora_linear_small(
            code, x.data_ptr(), rows, k, k, weight.data_ptr(), k, n, bias_ptr, bias_code, y.data_ptr(), n, 0, r, r,
            a.data_ptr(), a_code, k, b.data_ptr(), b_code, r, scale_ptr, 0, lora_bias_ptr, lora_bias_code, threads,
        )  # fmt: skip
    else:
        s = torch.empty_strided((rows, r), (r, 1), dtype=dtype)
        status = native.lora_linear_down(
            code, x.data_ptr(), rows, k, k, s.data_ptr(), r, [(a.data_ptr(), a_code, r, k, 0, 0)], 0, 0.0, 0, threads
        )
        y = project(x if len(shape) == 2 else x.view(rows, k), [weight], [bias])[0]
        status = status or native.lora_linear_up(
            code, y.data_ptr(), rows, n, n, s.data_ptr(), r, r, b.data_ptr(), b_code, r, scale_ptr, 0,
            lora_bias_ptr, lora_bias_code, threads,
        )  # fmt: skip
    if status:
        check_status(status, "lora_linear", rows, k, n, r)
    return y if len(shape) == 2 else y.view(*shape[:-1], n)


def vector(t, n: int) -> tuple[int, int]:
    """Pointer and dtype of a bias [n] that the kernel can read as it is; ValueError otherwise."""
    if t.shape != (n,) or not t.is_cpu or not t.is_contiguous():
        raise ValueError
    return t.data_ptr(), CODES[t.dtype]


@functools.lru_cache(maxsize=1024, typed=True)  # typed: True == 1, and a bool must not find the tensor of a 1
def constant(value: float) -> torch.Tensor:
    """A number as a float32 CPU tensor, made once."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError("constant: a number is needed")
    with torch.inference_mode(False):
        return torch.full((), value, dtype=torch.float32, device="cpu")
