"""The passes of lora_linear in Triton, launched by `fastpeft_kernels/lora_linear_launch.py`: around PyTorch's GEMM, or, by
plan, with the rank-R term inside a GEMM of Triton's.
"""

from __future__ import annotations

import os
from typing import Any

from ... import native
from .. import base, gemm, plans
from ..meta import Meta, unfit
from . import linear4bit
from .linear4bit import combine_4bit as combine_4bit
from .linear4bit import project_4bit as project_4bit

project_dense, combine_dense = gemm.gemms, gemm.grad_gemms


def can(meta: Meta) -> str | None:
    if not meta[0].is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"tensors are on {meta[0].device}"
    if native.triton("lora_linear") is None:
        return native.why_not_triton("lora_linear")
    return unfit(meta)


def down(x, a, p, seed):
    return native.triton("lora_linear").down(x, a, p, seed)


def up(ys, s, b, scales, lora_biases):
    return native.triton("lora_linear").up(ys, s, b, scales, lora_biases)


def grad_up(dys, s, b, scales, wants_t, needs_b, needs_bias):
    return native.triton("lora_linear").grad_up(dys, s, b, scales, wants_t, needs_b, needs_bias)


def grad_down(dx, x, t, a, live, needs_a, p, seed):
    return native.triton("lora_linear").grad_down(dx, x, t, a, live, needs_a, p, seed)


def fused(x, weights, biases, a, b, scales, lora_biases, p, seed):
    """-> ys, s; None where the plan has PyTorch's GEMM"""
    kernels = _kernels(x.shape[:-1].numel(), x, weights)
    if kernels is None:
        return None
    rows = gemm.rows(x)
    s = down(rows, a, p, seed)
    ys = kernels.project(rows, weights, biases, s, b, scales, lora_biases)
    return [gemm.shaped(y, x) for y in ys], s


def fused_dx(dys, weights, t, a, live, p, seed):
    """-> Σ dy_i W_i + drop_i(t_i A_i); None where the plan has PyTorch's GEMM"""
    dy = next(dy for dy in dys if dy is not None)
    kernels = _kernels(dy.shape[0], dy, weights)
    return kernels and kernels.combine(dys, weights, t, a, live, p, seed)


def _kernels(m: int, x, weights) -> Any:
    """The launchers of the GEMM that takes the rank-R term, where the plan has it for m rows over these weights, else None"""
    packed = base.packed(weights)
    if packed:
        return linear4bit.kernels(m)
    at_least = plans.fused_from(x.device, x.dtype) if packed is False else None
    return native.triton("lora_linear") if at_least is not None and m >= at_least else None
