"""The base of a layer by PyTorch's GEMM. Weights may be made one at a time, as they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch


def gemms(
    x: torch.Tensor, weights: Iterable[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    """[x W_iᵀ + bias_i]"""
    return [_gemm(x, w, bias) for w, bias in zip(weights, biases)]


def _gemm(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.mm(x, w.t()) if bias is None else torch.addmm(bias.to(x.dtype), x, w.t())


def grad_gemms(dys: Sequence[torch.Tensor], weights: Iterable[torch.Tensor]) -> torch.Tensor:
    """Σ dy_i W_i"""
    dx = None
    for dy, w in zip(dys, weights):
        dx = torch.mm(dy, w) if dx is None else dx.addmm_(dy, w)
    return dx
