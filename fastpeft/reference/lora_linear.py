"""y = out_scale · ((x·in_scale) Wᵀ + (drop(x) Aᵀ) (scale·B)ᵀ + lora_bias) + bias   (LoRA: Hu et al. 2021, equation 3)

`lora_linear` is the definition, differentiable by autograd. `forward` and `backward` are the same in closed form, for a
group of projections of one x: the `torch` backend. Shapes: x [..., K], W [N, K] (dense or a Weight4bit), A [R, K], B [N, R],
scale [] or [R].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .linear4bit import dense
from .philox import dropout_mask


def drop(x: torch.Tensor, p: float, seed: torch.Tensor | None, projection: int = 0) -> torch.Tensor:
    if p == 0.0:
        return x
    keep = dropout_mask(seed, tuple(x.shape), p, projection)
    return torch.where(keep, x * (0.0 if p == 1.0 else 1.0 / (1.0 - p)), 0.0)


def lora_linear(
    x: torch.Tensor,
    weight: Any,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    *,
    scale: torch.Tensor | float = 1.0,
    bias: torch.Tensor | None = None,
    lora_bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    in_scale: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    projection: int = 0,
) -> torch.Tensor:
    y = F.linear(x if in_scale is None else x * in_scale.to(x.dtype), dense(weight, x.dtype))
    if a is not None and b is not None:
        s = F.linear(drop(x, dropout_p, seed, projection), a.to(x.dtype))
        y = y + F.linear(s, (b * scale).to(x.dtype))
    if lora_bias is not None:
        y = y + lora_bias.to(x.dtype)
    if out_scale is not None:
        y = y * out_scale.to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)


def forward(x, weights, biases, a, b, scales, lora_biases, dropout_p, seed):
    """-> ys (each [..., N_i]) and s [M, ΣR], the rank-R activations that backward reads."""
    x2, ys, parts = contiguous_rows(x), [], []
    for i, weight in enumerate(weights):
        y = F.linear(x2, dense(weight, x.dtype), None if biases[i] is None else biases[i].to(x.dtype))
        if a[i] is not None:
            s = drop(x2, dropout_p, seed, i) @ a[i].to(x.dtype).t()
            y.addmm_(s, (b[i] * scales[i]).to(x.dtype).t())
            parts.append(s)
        if lora_biases[i] is not None:
            y += lora_biases[i].to(x.dtype)
        ys.append(leading_shape(y, x))
    return ys, torch.cat(parts, dim=1) if parts else x2.new_empty(x2.shape[0], 0)


def backward(dys, x, s, weights, a, b, scales, dropout_p, seed, needs_x, needs_a, needs_b, needs_bias):
    """-> dx, [dA_i], [dB_i], [dbias_i] (None where not needed).

    ds = dy (scale·B);  dB = scale·dyᵀ s;  dA = dsᵀ drop(x);  dx = dy W + drop'(ds A);  dbias = Σ_m dy
    """
    x2 = None if x is None else contiguous_rows(x)
    rows = next(dy.shape[:-1] for dy in dys if dy is not None)
    dx, das, dbs, dbiases = None, [], [], []
    column = 0
    for i, weight in enumerate(weights):
        dy = None if dys[i] is None else contiguous_rows(dys[i])
        da = db = dbias = None
        if dy is not None:
            if needs_x:
                w = dense(weight, dy.dtype)
                dx = dy @ w if dx is None else dx.addmm_(dy, w)
            if needs_bias[i]:
                dbias = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
        rank = 0 if a[i] is None else a[i].shape[0]
        if dy is not None and rank:
            if needs_b[i]:
                db = ((dy.t() @ s[:, column : column + rank]).to(b[i].dtype) * scales[i]).to(b[i].dtype)
            ds = dy @ (b[i] * scales[i]).to(dy.dtype)
            if needs_a[i]:
                da = (ds.t() @ drop(x2, dropout_p, seed, i)).to(a[i].dtype)
            if needs_x and dropout_p == 0.0:
                dx.addmm_(ds, a[i].to(dy.dtype))
            elif needs_x:
                dx += drop(ds @ a[i].to(dy.dtype), dropout_p, seed, i)
        column += rank
        das.append(da)
        dbs.append(db)
        dbiases.append(dbias)
    return None if dx is None else dx.view(*rows, weights[0].shape[1]), das, dbs, dbiases


def contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., K] -> [M, K], contiguous.

    Also because of PyTorch 2.13 on CPUs with AMX: a bf16 matmul of row-strided rows with odd K reads one element past
    each row, and NaN there reaches the result.
    """
    return x.reshape(-1, x.shape[-1]).contiguous()


def leading_shape(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[M, N] -> [..., N] as x has it; no view to autograd, so that users may change a Function's output in place."""
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[1]))
