"""The GPU backends of lora_linear: fused passes around the base GEMM, or inside it.

Forward: s = drop(x) Aᵀ of all projections in one read of x; then y = x Wᵀ + s (scale·B)ᵀ in one fused GEMM, or PyTorch's
GEMM and the rank-R term added in place. Backward: one read of dy gives ds, dB and dbias; dx = dy W + drop'(ds A) likewise;
one read of x gives every dA. The passes are those of `lora_linear_cuda.py` (CUDA C++) or of
`fastpeft_kernels/lora_linear_launch.py` (Triton, which has the fused GEMM too); `lora_linear.plans.json` says, by
measurement, from how many rows on the fused GEMM runs.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F

from .. import native
from ..reference.lora_linear import leading_shape
from ..weight4bit import Weight4bit
from . import linear4bit_gpu, lora_linear_cpu, lora_linear_cuda

_PLANS = json.loads(Path(__file__).with_name("lora_linear.plans.json").read_text())["triton"]


def can_cuda(meta) -> str | None:
    x = meta[0]
    if not x.is_cuda:
        return f"tensors are on {x.device}"
    if native.cuda() is None:
        return native.why_not_cuda()
    if x.dtype == torch.float32:
        return "x is torch.float32: it takes bfloat16 and float16"
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return "it takes GPUs from compute capability 8.0 on"
    return lora_linear_cpu.unfit(meta)


def can_triton(meta) -> str | None:
    x, a, _, _ = meta
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"tensors are on {x.device}"
    if native.triton("lora_linear") is None:
        return native.why_not_triton("lora_linear")
    if len({t.dtype for t in a if t is not None}) > 1:
        return "the a of a group differ in dtype"
    return lora_linear_cpu.unfit(meta)


def cuda_passes():
    return lora_linear_cuda


def triton_passes():
    return native.triton("lora_linear")


def forward(passes, x, weights, biases, a, b, scales, lora_biases, dropout_p, seed):
    kernels = passes()
    x2 = rows(x)
    a, b = [_contiguous(t) for t in a], [_contiguous(t) for t in b]
    spans = _spans(kernels, a)
    live = [i for i, span in enumerate(spans) if span.rank]
    s = x2.new_empty(x2.shape[0], sum(span.rank for span in spans))
    kernels.down(x2, [a[i] for i in live], [spans[i] for i in live], s, dropout_p, seed)
    fuses, ys = _fuses(kernels, x2), []
    for weight, bias, b_i, span, scale, lora_bias in zip(weights, biases, b, spans, scales, lora_biases):
        if isinstance(weight, Weight4bit):
            y = linear4bit_gpu.project(kernels, x2, weight, bias, lora_bias, s, b_i, span, scale)
        elif fuses:
            y = kernels.project(x2, weight, bias, lora_bias, s, b_i, span, scale)
        else:
            y = F.linear(x2, weight, None if bias is None else bias.to(x.dtype))
            if b_i is not None or lora_bias is not None:
                kernels.up(y, s, b_i, span, scale, lora_bias)
        ys.append(leading_shape(y, x))
    return ys, s


def backward(passes, dys, x, s, weights, a, b, scales, dropout_p, seed, needs_x, needs_a, needs_b, needs_bias):
    kernels = passes()
    a, b = [_contiguous(t) for t in a], [_contiguous(t) for t in b]
    spans = _spans(kernels, a)
    k, n = weights[0].shape[1], len(weights)
    das, dbs, dbiases = [None] * n, [None] * n, [None] * n
    live = [i for i in range(n) if dys[i] is not None]
    dy = {i: rows(dys[i]) for i in live}
    through = [i for i in live if spans[i].rank and (needs_x or needs_a[i])]  # the projections whose ds is wanted
    t = torch.empty_like(s) if len(through) == n else torch.zeros_like(s)
    for i in live:
        span = spans[i]
        columns = slice(span.first, span.first + span.rank)
        ds = t[:, columns] if i in through else None
        dbs[i] = torch.empty_like(b[i]) if needs_b[i] else None
        dbiases[i] = s.new_empty(weights[i].shape[0], dtype=torch.float32) if needs_bias[i] else None
        if not (ds is None and dbs[i] is None and dbiases[i] is None):
            kernels.grad_up(dy[i], s[:, columns], b[i], scales[i], ds, dbs[i], dbiases[i])
    dx = None
    if needs_x:
        dx = _dx(kernels, dy, weights, live, s, k, t, a, spans, through, dropout_p, seed)
        dx = dx.view(*dys[live[0]].shape[:-1], k)
    trains = [i for i in through if needs_a[i]]
    for i in trains:
        das[i] = torch.empty_like(a[i])
    if trains:
        kernels.grad_down(rows(x), t, [das[i] for i in trains], [spans[i] for i in trains], dropout_p, seed)
    return dx, das, dbs, dbiases


def _dx(kernels, dy, weights, live, s, k, t, a, spans, through, dropout_p, seed):
    """Σ_i dy_i W_i + drop_i(t_i A_i); the rank-R terms go with the last GEMM."""
    down = ([a[i] for i in through], [spans[i] for i in through], dropout_p, seed)
    if _fuses(kernels, s) and not any(isinstance(weights[i], Weight4bit) for i in live):
        dx = s.new_empty(s.shape[0], k)
        for i in live:
            kernels.combine(dy[i], weights[i], dx, i != live[0], t, *(down if i == live[-1] else ([], [], 0.0, None)))
        return dx
    dx = None
    for i in live:
        if isinstance(weights[i], Weight4bit):
            dx = linear4bit_gpu.add_grad(kernels, dy[i], weights[i], dx)
        else:
            dx = dy[i] @ weights[i] if dx is None else dx.addmm_(dy[i], weights[i])
    kernels.add_down(dx, t, *down)
    return dx


def rows(x: torch.Tensor) -> torch.Tensor:
    """[..., K] -> [M, K] whose rows are contiguous, whatever their stride"""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _spans(kernels, a):
    spans, first = [], 0
    for i, t in enumerate(a):
        spans.append(kernels.Span(first, 0 if t is None else t.shape[0], i))
        first += spans[-1].rank
    return spans


def _contiguous(t):
    return None if t is None else t.contiguous()


def _fuses(kernels, x) -> bool:
    """Whether the rank-R term goes into the base GEMM's accumulator: from a measured number of rows on."""
    if not hasattr(kernels, "project"):
        return False
    at_least = _fused_from(x.device).get(str(x.dtype).removeprefix("torch."))
    return at_least is not None and x.shape[0] >= at_least


@functools.cache
def _fused_from(device) -> dict[str, int]:
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return _PLANS["fused_from_m"].get(kind, {})
