"""The base of a layer, dense or in 4 bits, as one thing: y = x Wᵀ + bias and dx = dy W.

The only place that asks what a weight is. A device's `project_dense`, `combine_dense`, `project_4bit` and `combine_4bit`
(in its folder, beside its passes) take what is of one kind; PyTorch's GEMM is the common way for dense weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import native
from ..reference import linear4bit as reference
from ..weight4bit import Weight4bit, set_decoder
from . import choice
from .cpu import linear4bit as cpu
from .cuda import linear4bit as cuda
from .triton import linear4bit as triton

Base = torch.Tensor | Weight4bit


def project(device: Any, x: torch.Tensor, weights: Sequence[Base], biases: Sequence[torch.Tensor | None]) -> list:
    """[x W_iᵀ + bias_i], each [M, N_i], of x [M, K], W_i [N_i, K], bias_i [N_i] or None"""
    packed = [isinstance(w, Weight4bit) for w in weights]
    if not any(packed):
        return device.project_dense(x, weights, biases)
    ys: list[Any] = [None] * len(packed)
    for way, wanted in ((device.project_dense, False), (device.project_4bit, True)):
        of = [i for i, is_packed in enumerate(packed) if is_packed == wanted]
        found = way(x, [weights[i] for i in of], [biases[i] for i in of]) if of else []
        for i, y in zip(of, found):
            ys[i] = y
    return ys


def combine(device: Any, dys: Sequence[torch.Tensor], weights: Sequence[Base]) -> torch.Tensor:
    """Σ dy_i W_i [M, K] of dy_i [M, N_i]"""
    dense = [(dy, w) for dy, w in zip(dys, weights) if not isinstance(w, Weight4bit)]
    packed = [(dy, w) for dy, w in zip(dys, weights) if isinstance(w, Weight4bit)]
    dx = device.combine_dense(*zip(*dense)) if dense else None
    if not packed:
        return dx
    rest = device.combine_4bit(*zip(*packed))
    return rest if dx is None else dx.add_(rest)


def dense(weight: Base, dtype: torch.dtype) -> torch.Tensor:
    """[N, K] on the weight's device: a 4-bit one decoded into `dtype`, a dense one as it is."""
    return decode(weight, dtype) if isinstance(weight, Weight4bit) else weight


def decode(weight: Weight4bit, dtype: torch.dtype) -> torch.Tensor:
    """[N, K] of `dtype`: codebook[code] · scale in float32, rounded once"""
    device = weight.device.type
    if dtype in native.CODES:
        if device == "cpu" and choice.allows("cpu") and native.cpu():
            return cpu.dequantize(weight, dtype)
        if device == "cuda" and choice.allows("cuda") and native.cuda():
            return cuda.dequantize(weight, dtype)
        if device == "cuda" and choice.allows("triton") and native.triton("linear4bit"):
            return triton.dequantize(weight, dtype)
    return reference.dense(weight, dtype)


set_decoder(decode)


def gemm(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x Wᵀ + bias by PyTorch"""
    return torch.mm(x, w.t()) if bias is None else torch.addmm(bias.to(x.dtype), x, w.t())


def gemms(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> list:
    return [gemm(x, w, bias) for w, bias in zip(weights, biases)]


def grad_gemms(dys: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Σ dy_i W_i by PyTorch"""
    dx = torch.mm(dys[0], weights[0])
    for dy, w in zip(dys[1:], weights[1:]):
        dx.addmm_(dy, w)
    return dx


# ---- rows ------------------------------------------------------------------------------------------------------------


def rows(x: torch.Tensor) -> torch.Tensor:
    """[..., K] -> [M, K], contiguous, no lazy negation.

    Contiguous also because of PyTorch 2.13 on CPUs with AMX: a bf16 matmul of row-strided rows with odd K reads one element
    past each row, and NaN there reaches the result.
    """
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x.resolve_neg().contiguous()


def shaped(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[M, N] -> [..., N] as x has it; no view to autograd, so that the caller may change a Function's output in place."""
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[1]))
