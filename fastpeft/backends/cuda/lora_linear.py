"""The passes of lora_linear in CUDA C++ (`csrc/cuda/lora_linear.cu` by `csrc/python/lora_linear_cuda.cpp`), around
PyTorch's GEMM; over 4-bit weights the rank-R term goes into the kernel that decodes, where the plan has one.
"""

from __future__ import annotations

import torch

from ... import native
from .. import base, gemm
from ..meta import Meta, capability, unfit
from .linear4bit import combine_4bit as combine_4bit
from .linear4bit import fused as fused_4bit
from .linear4bit import project_4bit as project_4bit

project_dense, combine_dense = gemm.gemms, gemm.grad_gemms


def can(meta: Meta) -> str | None:
    x = meta[0]
    if not x.is_cuda:
        return f"tensors are on {x.device}"
    if native.cuda() is None:
        return native.why_not_cuda()
    if x.dtype == torch.float32:
        return "x is torch.float32: it takes bfloat16 and float16"
    if capability(x.device) < (8, 0):
        return "it takes GPUs from compute capability 8.0 on"
    return unfit(meta)


def down(x, a, p, seed):
    return native.cuda().lora_linear_down(x, a, p, seed)


def up(ys, s, b, scales, lora_biases):
    return native.cuda().lora_linear_up(ys, s, b, scales, lora_biases)


def grad_up(dys, s, b, scales, wants_t, needs_b, needs_bias):
    return native.cuda().lora_linear_grad_up(dys, s, b, scales, wants_t, needs_b, needs_bias)


def grad_down(dx, x, t, a, live, needs_a, p, seed):
    return native.cuda().lora_linear_grad_down(dx, x, t, a, live, needs_a, p, seed)


def fused(x, weights, biases, a, b, scales, lora_biases, p, seed):
    """-> ys, s over 4-bit weights; None where the plan has another way"""
    if not base.packed(weights):
        return None
    rows, ws = gemm.rows(x), [w.untile() for w in weights]
    way = fused_4bit(rows, ws)
    if way is None:
        return None
    s = down(rows, a, p, seed)
    return [gemm.shaped(y, x) for y in way(rows, ws, biases, s, b, scales, lora_biases)], s


def fused_dx(dys, weights, t, a, live, p, seed):
    """PyTorch's GEMM takes no rank-R term."""
    return None
