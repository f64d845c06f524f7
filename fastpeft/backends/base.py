"""The base of a layer, dense or in 4 bits, as one thing: y = x Wᵀ + bias and dx = dy W.

The only place that asks what a weight is. A device's `project_dense`, `combine_dense`, `project_4bit` and `combine_4bit`
(in its folder, beside its passes) take what is of one kind; PyTorch's GEMM (`gemm.py`) is the common way for dense weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..weight4bit import Weight4bit

Base = torch.Tensor | Weight4bit


def project(device: Any, x: torch.Tensor, weights: Sequence[Base], biases: Sequence[torch.Tensor | None]) -> list:
    """[x W_iᵀ + bias_i], each [M, N_i], of x [M, K], W_i [N_i, K], bias_i [N_i] or None"""
    if packed(weights) is False:
        return device.project_dense(x, weights, biases)
    kinds = [isinstance(w, Weight4bit) for w in weights]
    ys: list[Any] = [None] * len(kinds)
    for way, wanted in ((device.project_dense, False), (device.project_4bit, True)):
        of = [i for i, kind in enumerate(kinds) if kind == wanted]
        found = way(x, [weights[i] for i in of], [biases[i] for i in of]) if of else []
        for i, y in zip(of, found):
            ys[i] = y
    return ys


def combine(device: Any, dys: Sequence[torch.Tensor], weights: Sequence[Base]) -> torch.Tensor:
    """Σ dy_i W_i [M, K] of dy_i [M, N_i]"""
    plain = [(dy, w) for dy, w in zip(dys, weights) if not isinstance(w, Weight4bit)]
    in_4bit = [(dy, w) for dy, w in zip(dys, weights) if isinstance(w, Weight4bit)]
    dx = device.combine_dense(*zip(*plain)) if plain else None
    if not in_4bit:
        return dx
    rest = device.combine_4bit(*zip(*in_4bit))
    return rest if dx is None else dx.add_(rest)


def packed(weights: Sequence[Base]) -> bool | None:
    """Whether all are in 4 bits; None: some are."""
    kinds = {isinstance(w, Weight4bit) for w in weights}
    return kinds.pop() if len(kinds) == 1 else None


def dense(weight: Base, dtype: torch.dtype) -> torch.Tensor:
    """[N, K] on the weight's device: a 4-bit one decoded into `dtype`, a dense one as it is."""
    return weight.dequantize(dtype) if isinstance(weight, Weight4bit) else weight
