"""y = out_scale · ((x·in_scale) Wᵀ + (drop(x) Aᵀ) (scale·B)ᵀ + lora_bias) + bias   (LoRA: Hu et al. 2021, equation 3)

`lora_linear` is the definition, differentiable by autograd. The passes below are the same in closed form, for a group of
projections of one x: the `torch` backend. Shapes: x [..., K], W [N, K], A [R, K], B [N, R], scale [] or [R]; in the passes
x [M, K], s and t [M, ΣR], of `ranks_dtype`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .linear4bit import dense
from .philox import dropout_mask


def ranks_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of s and t, in which the rank-R terms are computed, for x of `dtype`.

    fp16's range is too small for them: scale·B after the first steps of training, t of a small dy, s of a large x. bf16 has
    float32's range; there s and t are rounded once, which makes dA and dB 1.4 times as inexact as rounding A and scale·B alone
    (2.3e-3 against 1.6e-3, relative; `benches/LOG.md`), at half the bytes saved.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def scaled(b: torch.Tensor, scale: torch.Tensor | float, dtype: torch.dtype) -> torch.Tensor:
    """scale·B in `dtype`; of an fp16 B not by way of fp16"""
    return ((b.float() if b.dtype == torch.float16 else b) * scale).to(dtype)


def drop(x: torch.Tensor, p: float, seed: torch.Tensor | None, projection: int = 0) -> torch.Tensor:
    if p == 0.0:
        return x
    keep = dropout_mask(seed, tuple(x.shape), p, projection)
    return torch.where(keep, x * (0.0 if p == 1.0 else 1.0 / (1.0 - p)), 0.0)


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
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
    y = F.linear(x if in_scale is None else x * in_scale.to(x.dtype), weight)
    if a is not None and b is not None:
        wide = ranks_dtype(x.dtype)
        s = F.linear(drop(x.to(wide), dropout_p, seed, projection), a.to(wide))
        y = (y + F.linear(s, scaled(b, scale, wide))).to(x.dtype)
    if lora_bias is not None:
        y = y + lora_bias.to(x.dtype)
    if out_scale is not None:
        y = y * out_scale.to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)


# ---- the passes ------------------------------------------------------------------------------------------------------


def can(meta) -> None:
    return None


def down(x, a, p, seed):
    """-> s = drop(x) Aᵀ of all projections"""
    x = x.to(ranks_dtype(x.dtype))
    parts = [drop(x, p, seed, i) @ a_i.to(x.dtype).t() for i, a_i in enumerate(a) if a_i is not None]
    return torch.cat(parts, dim=1) if parts else x.new_empty(x.shape[0], 0)


def up(ys, s, b, scales, lora_biases):
    """ys, to each of which s_i (scale·B_i)ᵀ + lora_bias_i was added in place"""
    for y, s_i, b_i, scale, lora_bias in zip(ys, split(s, b), b, scales, lora_biases):
        if b_i is not None:
            _add_product(y, s_i, scaled(b_i, scale, s.dtype).t())
        if lora_bias is not None:
            y += lora_bias.to(y.dtype)
    return ys


def grad_up(dys, s, b, scales, wants_t, needs_b, needs_bias):
    """-> t = dy (scale·B), or None; [dB_i = scale·dy_iᵀ s_i]; [dbias_i = Σ_m dy_i]; None where not needed or without dy_i"""
    ts, dbs, dbiases = [], [], []
    for dy, s_i, b_i, scale, needs, needs_sum in zip(dys, split(s, b), b, scales, needs_b, needs_bias):
        wide = None if dy is None else dy.to(s.dtype)
        if b_i is not None:
            ts.append(torch.zeros_like(s_i) if wide is None else wide @ scaled(b_i, scale, s.dtype))
        db = None
        if wide is not None and needs and b_i is not None:
            db = ((wide.t() @ s_i).to(torch.promote_types(s.dtype, b_i.dtype)) * scale).to(b_i.dtype)
        dbs.append(db)
        summed = wide is not None and needs_sum
        dbiases.append(dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)) if summed else None)
    return torch.cat(ts, dim=1) if wants_t else None, dbs, dbiases


def grad_down(dx, x, t, a, live, needs_a, p, seed):
    """-> dx (or None), to which Σ_i drop_i(t_i A_i) was added in place; [dA_i = t_iᵀ drop_i(x)]"""
    das = []
    for i, (t_i, a_i) in enumerate(zip(split(t, [None if a_i is None else a_i.t() for a_i in a]), a)):
        da = None
        if a_i is not None and live[i]:
            if needs_a[i]:
                da = (t_i.t() @ drop(x.to(t.dtype), p, seed, i)).to(a_i.dtype)
            if dx is not None and p == 0.0:
                _add_product(dx, t_i, a_i.to(t.dtype))
            elif dx is not None:
                dx += drop(t_i @ a_i.to(t.dtype), p, seed, i)
        das.append(da)
    return dx, das


def _add_product(y, left, right):
    """y += left · right in place, rounded once"""
    if y.dtype == left.dtype:
        y.addmm_(left, right)
    else:
        y += left @ right


def split(s, b):
    """[M, ΣR] -> [s_i [M, R_i]] for B_i [N_i, R_i]"""
    return s.split([0 if b_i is None else b_i.shape[1] for b_i in b], dim=1)


# ---- the base --------------------------------------------------------------------------------------------------------


def fused(x, weights, biases, a, b, scales, lora_biases, p, seed):
    return None


def fused_dx(dys, weights, t, a, live, p, seed):
    return None


def project_dense(x, ws, biases):
    return [F.linear(x, w, None if bias is None else bias.to(x.dtype)) for w, bias in zip(ws, biases)]


def combine_dense(dys, ws):
    return sum(dy @ w for dy, w in zip(dys, ws))


def project_4bit(x, ws, biases):
    return project_dense(x, [dense(w, x.dtype) for w in ws], biases)


def combine_4bit(dys, ws):
    return combine_dense(dys, [dense(w, dy.dtype) for dy, w in zip(dys, ws)])
