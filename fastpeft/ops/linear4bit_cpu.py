"""4-bit weights on the CPU: what the native kernels of `csrc/linear4bit.h` do for `lora_linear_cpu.py` and `dequantize`."""

from __future__ import annotations

import torch

from .. import _native
from .._native import CODES
from ..reference import linear4bit as reference
from ..weight4bit import Weight4bit


def arguments(weight: Weight4bit) -> tuple[int, ...]:
    """The weight as the native functions take it (the tensors must stay alive over the call)."""
    nested, offset = weight.nested_absmax, weight.offset
    return (
        *weight.shape,
        weight.blocksize,
        weight.tiled,
        weight.data.data_ptr(),
        weight.scales.data_ptr(),
        0 if nested is None else nested.data_ptr(),
        0 if offset is None else offset.data_ptr(),
        reference.codebook(weight.quant_type).data_ptr(),
        reference.dynamic_map().data_ptr(),
    )


def dequantize(weight: Weight4bit, out: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
    """out [rows, columns] = that part of the weight, in out's dtype; out's last dimension is contiguous"""
    status = _native.cpu().linear4bit_dequantize(
        CODES[out.dtype], out.data_ptr(), out.stride(0), *arguments(weight), rows.start, rows.stop, columns.start,
        columns.stop, torch.get_num_threads(),
    )  # fmt: skip
    if status:
        raise MemoryError(f"linear4bit_dequantize: no memory (status {status})")
    return out
