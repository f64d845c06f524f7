"""A GEMM over a weight that is converted a slab at a time: dense bf16 widened to fp32, or 4 bits decoded.

Where PyTorch's bf16 GEMM is slower than its fp32 one, slabs of the operands are widened: exact products, one rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import plans

# part(w, n, k, dtype) -> w[n, k] in `dtype`
Part = Callable[[Any, slice, slice, torch.dtype], torch.Tensor]


def project(
    x: torch.Tensor, ws: Sequence[Any], biases: Sequence[torch.Tensor | None], dtype: torch.dtype, part: Part, size: Callable
) -> list[torch.Tensor]:
    """[x W_iᵀ + bias_i] computed in `dtype`; size(length): how many rows of that length make a slab"""
    ys = [x.new_empty(x.shape[0], w.shape[0]) for w in ws]
    for m in slabs(x.shape[0], plans.current.slab["rows"]):
        rows = x[m].to(dtype)
        for y, w, bias in zip(ys, ws, biases):
            everything = slice(0, w.shape[1])
            for n in slabs(w.shape[0], size(w.shape[1])):
                slab = part(w, n, everything, dtype).t()
                y[m, n] = rows @ slab if bias is None else torch.addmm(bias[n].to(dtype), rows, slab)
    return ys


def combine(dys: Sequence[torch.Tensor], ws: Sequence[Any], dtype: torch.dtype, part: Part, size: Callable) -> torch.Tensor:
    """Σ dy_i W_i, as `project`"""
    first, k_all = dys[0], ws[0].shape[1]
    dx = first.new_empty(first.shape[0], k_all)
    for m in slabs(first.shape[0], plans.current.slab["rows"]):
        rows = [dy[m].to(dtype) for dy in dys]
        for k in slabs(k_all, size(ws[0].shape[0])):
            total = rows[0] @ part(ws[0], slice(0, ws[0].shape[0]), k, dtype)
            for dy, w in zip(rows[1:], ws[1:]):
                total.addmm_(dy, part(w, slice(0, w.shape[0]), k, dtype))
            dx[m, k] = total
    return dx


def slabs(n: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]
