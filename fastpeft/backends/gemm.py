"""PyTorch's GEMM for dense weights, and matrices of rows for it. Weights may be made one at a time, as they are asked for."""

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
