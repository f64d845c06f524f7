"""4-bit weights on the CPU (`csrc/cpu/linear4bit.cpp`): few rows read the codes themselves, many take decoded slabs."""

from __future__ import annotations

import threading

import torch

from ... import native
from .. import plans
from . import slabs

_cpu = native.cpu()
_local = threading.local()


def few(x, ws, biases) -> list:
    """x W_iᵀ + bias_i, of a dense or a 4-bit W_i, where the plan has the kernels of few rows for it, else None"""
    if x.shape[0] > plans.current.most_rows:
        return [None] * len(ws)
    none = (None,)
    found = [_cpu.lora_linear_few(x, (w,), (bias,), none, none, none, none) for w, bias in zip(ws, biases)]
    return [y and y[0][0] for y in found]


def project_4bit(x, ws, biases) -> list:
    ys = few(x, ws, biases)
    rest = [i for i, y in enumerate(ys) if y is None]
    if rest:
        dtype, parts = _dtype(x), ([ws[i] for i in rest], [biases[i] for i in rest])
        for i, y in zip(rest, slabs.project(x, *parts, dtype, _part, _size)):
            ys[i] = y
    return ys


def combine_4bit(dys, ws):
    dx = _cpu.linear4bit_grad_few(dys[0], ws[0]) if len(ws) == 1 else None
    return slabs.combine(dys, ws, _dtype(dys[0]), _part, _size) if dx is None else dx


def dequantize(weight, dtype: torch.dtype) -> torch.Tensor:
    """[N, K]"""
    (n, k), out = weight.shape, torch.empty(weight.shape, dtype=dtype, device="cpu")
    _cpu.linear4bit_dequantize(weight, out, 0, n, 0, k)
    return out


def _dtype(x) -> torch.dtype:
    """In which dtype a slab is multiplied: PyTorch's fp16 GEMM is slow on every CPU, its bf16 one on some."""
    narrow = x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and plans.current.widens)
    return torch.float32 if narrow else x.dtype


def _size(length: int) -> int:
    return max(64, plans.current.slab["elements_4bit"] // length // 64 * 64)


def _part(weight, n: slice, k: slice, dtype: torch.dtype) -> torch.Tensor:
    """That part of the weight in this thread's workspace, valid until the next call here. It is kept: fresh memory of this
    size costs more in page faults than the decoding itself (4096²: 13 ms, and 2 ms)."""
    rows, columns = n.stop - n.start, k.stop - k.start
    needed = rows * columns * dtype.itemsize
    buffer = getattr(_local, "buffer", None)
    if buffer is None or buffer.numel() < needed:
        with torch.inference_mode(False):
            most = max(needed, 4 * plans.current.slab["elements_4bit"])
            buffer = _local.buffer = torch.empty(most, dtype=torch.uint8, device="cpu")
    out = buffer[:needed].view(dtype).view(rows, columns)
    _cpu.linear4bit_dequantize(weight, out, n.start, n.stop, k.start, k.stop)
    return out
