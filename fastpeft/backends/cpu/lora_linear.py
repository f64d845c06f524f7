"""The CPU's passes of lora_linear (`csrc/cpu/lora_linear.cpp` by `csrc/python/lora_linear.cpp`), and its way with a dense base.

Forward: s = drop(x) Aᵀ of all projections in one read of x; y = x Wᵀ + bias; y += s (scale·B)ᵀ + lora_bias in place.
Backward: one read of dy gives t, dB and dbias; dx = dy W; one pass over x and dx gives dA and adds t A.
For few rows without dropout the forward is a single native call, base included.
"""

from __future__ import annotations

import torch

from ... import native
from .. import plans
from ..gemm import gemms, grad_gemms
from ..meta import Meta, unfit
from . import slabs
from .linear4bit import combine_4bit as combine_4bit
from .linear4bit import few
from .linear4bit import project_4bit as project_4bit

_cpu = native.cpu()
if _cpu is not None:  # else `can` says why not, and nothing here is called
    down, up = _cpu.lora_linear_down, _cpu.lora_linear_up
    grad_up, grad_down = _cpu.lora_linear_grad_up, _cpu.lora_linear_grad_down


def can(meta: Meta) -> str | None:
    if native.cpu() is None:
        return native.why_not_cpu()
    if meta[0].device.type != "cpu":
        return f"tensors are on {meta[0].device}"
    return unfit(meta)


def fused(x, weights, biases, a, b, scales, lora_biases, p, seed):
    """-> ys, s in one call; None where the plan has another way"""
    if p or x.numel() > plans.current.most_rows * x.shape[-1]:
        return None
    return _cpu.lora_linear_few(x, weights, biases, a, b, scales, lora_biases)


def fused_dx(dys, weights, t, a, live, p, seed):
    """The base's GEMM takes no rank-R term here."""
    return None


def project_dense(x, ws, biases):
    ys = few(x, ws, biases)
    rest = [i for i, y in enumerate(ys) if y is None]
    if rest:
        ws, biases = [ws[i] for i in rest], [biases[i] for i in rest]
        found = slabs.project(x, ws, biases, torch.float32, _part, _size) if _widens(x) else gemms(x, ws, biases)
        for i, y in zip(rest, found):
            ys[i] = y
    return ys


def combine_dense(dys, ws):
    return slabs.combine(dys, ws, torch.float32, _part, _size) if _widens(dys[0]) else grad_gemms(dys, ws)


def _widens(x) -> bool:
    plan = plans.current
    return plan.widens and x.dtype == torch.bfloat16 and x.shape[0] >= plan.slab["min_rows"]


def _part(w, n: slice, k: slice, dtype):
    return w[n, k].to(dtype)


def _size(length: int) -> int:
    return plans.current.slab["columns"]
