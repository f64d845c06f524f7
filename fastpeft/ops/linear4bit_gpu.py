"""4-bit weights in the GPU backends of lora_linear: by the number of rows, which kernel multiplies by the weight.

Up to 16 rows (bf16 and fp16): one CUDA C++ kernel at the rate of memory. Then a Triton GEMM that decodes the weight tile by
tile. From the plan's row count on, decoding costs more in the GEMM than once before it: the weight is decoded by one kernel
into a buffer that PyTorch's allocator hands out again and again, and PyTorch's GEMM does the rest.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F

from .. import native
from ..weight4bit import Weight4bit
from . import linear4bit_cuda, lora_linear_cuda

# rows; predicted (benches/LOG.md), not measured on any GPU yet
_FUSED_TO = json.loads(Path(__file__).with_name("lora_linear.plans.json").read_text())["gpu_4bit"]["fused_to_m"]


def project(kernels, x, weight: Weight4bit, bias, lora_bias, s, b, span, scale) -> torch.Tensor:
    """y [M, N] = x Wᵀ + s (scale·B)ᵀ + bias + lora_bias, with `kernels` for what is not 4-bit"""
    weight, m = weight.untile(), x.shape[0]
    if kernels is lora_linear_cuda and 0 < m <= linear4bit_cuda.SMALL_M and linear4bit_cuda.is_fast(x, weight):
        return linear4bit_cuda.small(x, weight, bias, lora_bias, s, b, span, scale)
    fused = _triton(kernels, x)
    if fused is not None and m <= _FUSED_TO:
        return fused.project(x, weight, bias, lora_bias, s, b, span, scale)
    y = F.linear(x, dense(kernels, weight, x.dtype), None if bias is None else bias.to(x.dtype))
    if b is not None or lora_bias is not None:
        kernels.up(y, s, b, span, scale, lora_bias)
    return y


def add_grad(kernels, dy, weight: Weight4bit, dx: torch.Tensor | None) -> torch.Tensor:
    """dx [M, K] + dy W, or dy W where dx is None"""
    weight, fused = weight.untile(), _triton(kernels, dy)
    if fused is not None and dy.shape[0] <= _FUSED_TO:
        out = dy.new_empty(dy.shape[0], weight.shape[1]) if dx is None else dx
        fused.combine(dy, weight, out, dx is not None, dy, (), [], 0.0, None)
        return out
    w = dense(kernels, weight, dy.dtype)
    return dy @ w if dx is None else dx.addmm_(dy, w)


def dense(kernels, weight: Weight4bit, dtype: torch.dtype) -> torch.Tensor:
    """[N, K] of `dtype`, decoded by one kernel"""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if kernels is lora_linear_cuda:
        return linear4bit_cuda.dequantize(weight, out)
    native.triton("linear4bit").dequantize(weight, out)
    return out


def _triton(kernels, x):
    """The Triton kernels of 4-bit weights, where they can run beside `kernels`."""
    if kernels is lora_linear_cuda and not x.is_cuda:  # in emulation
        return None
    return native.triton("linear4bit")
