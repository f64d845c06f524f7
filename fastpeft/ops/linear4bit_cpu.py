"""4-bit weights on the CPU: what the native kernels of `csrc/linear4bit.h` do for `lora_linear_cpu.py` and `dequantize`."""

from __future__ import annotations

import functools
import json
import threading
from pathlib import Path

import torch

from .. import _machine, _native
from .._native import CODES
from ..reference import linear4bit as reference
from ..weight4bit import Weight4bit


@functools.cache
def dot() -> int:
    """1 where bf16 rows take AVX512-BF16's dot product: AMD has it at twice the rate of FMAs, Intel below theirs."""
    cpu = _machine.cpu()
    return int("AVX512-BF16" in cpu["isa"] and "AMD" in cpu["model"])


def arguments(weight: Weight4bit) -> tuple[int, ...]:
    """The weight as the native functions take it (the tensors must stay alive over the call).

    Kept with the weight: after a large GEMM the caches hold none of Python's data, and making it anew was 20 µs of the 600
    of a 4096² layer's decoding step.
    """
    kept = weight.pointers
    if kept and kept[0][4] == weight.data.data_ptr() and kept[0][5] == weight.scales.data_ptr():
        return kept[0]
    nested, offset = weight.nested_absmax, weight.offset
    found = (
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
    kept[:] = [found]
    return found


_PLANS = json.loads(Path(__file__).with_name("lora_linear.plans.json").read_text())["cpu"]
ROOM = _PLANS["decode"]["room"]  # elements of a slab
_local = threading.local()


def room(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """[rows, columns] of this thread's workspace for decoded slabs, valid until the next call here. It is kept: fresh memory
    of this size costs more in page faults than the decoding itself (4096²: 13 ms, and 2 ms)."""
    bytes_needed = rows * columns * dtype.itemsize
    buffer = getattr(_local, "buffer", None)
    if buffer is None or buffer.numel() < bytes_needed:
        with torch.inference_mode(False):
            buffer = _local.buffer = torch.empty(max(bytes_needed, 4 * ROOM), dtype=torch.uint8, device="cpu")
    return buffer[:bytes_needed].view(dtype).view(rows, columns)


def dequantize(weight: Weight4bit, out: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
    """out [rows, columns] = that part of the weight, in out's dtype; out's last dimension is contiguous"""
    status = _native.cpu().linear4bit_dequantize(
        CODES[out.dtype], out.data_ptr(), out.stride(0), *arguments(weight), rows.start, rows.stop, columns.start,
        columns.stop, torch.get_num_threads(),
    )  # fmt: skip
    if status:
        raise MemoryError(f"linear4bit_dequantize: no memory (status {status})")
    return out


def grad_small(dy: torch.Tensor, weight: Weight4bit) -> torch.Tensor:
    """dx [M, K] = dy W, for few rows dy [M, N], contiguous, and a tiled weight"""
    (m, n), k = dy.shape, weight.shape[1]
    dx = dy.new_empty(m, k)
    status = _native.cpu().linear4bit_grad_small(
        CODES[dy.dtype], dy.data_ptr(), m, n, *arguments(weight), dx.data_ptr(), k, torch.get_num_threads()
    )
    if status:
        raise MemoryError(
            f"linear4bit_grad_small: no memory for its workspace at M={m}, N={n}, K={k} (status {status})"
        )
    return dx
