"""4-bit weights in Triton (`fastpeft_kernels/linear4bit.py`): a GEMM that decodes tile by tile, up to the plan's row count;
beyond it decoding costs more there than once before PyTorch's GEMM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ... import native
from .. import plans
from ..gemm import gemms, grad_gemms


def dequantize(weight, dtype: torch.dtype) -> torch.Tensor:
    """[N, K]"""
    return native.triton("linear4bit").dequantize(weight, dtype)


def kernels(m: int) -> Any:
    """The launchers, where the plan has the GEMM that decodes for so many rows; else None"""
    return native.triton("linear4bit") if m <= plans.current.gpu["fused_to_m_4bit"] else None


def fused(x, ws) -> Callable | None:
    """The plan's way(x, ws, biases, s, b, scales, lora_biases) -> [y_i], rank-R terms included (s None: there are none), for
    x [M, K] and weights in bitsandbytes' order; None: they are decoded first."""
    found = kernels(x.shape[0])
    return found and found.project


def project_4bit(x, ws, biases) -> list:
    return project_by(fused, dequantize, x, ws, biases)


def combine_4bit(dys, ws) -> torch.Tensor:
    return combine_by(dequantize, dys, ws)


# ---- for backends/cuda too -------------------------------------------------------------------------------------------


def project_by(choose: Callable, decode: Callable, x, ws, biases) -> list:
    ws, none = [w.untile() for w in ws], [None] * len(ws)
    way = choose(x, ws)
    if way is None:
        return gemms(x, (decode(w, x.dtype) for w in ws), biases)
    return way(x, ws, biases, None, none, none, none)


def combine_by(decode: Callable, dys, ws) -> torch.Tensor:
    found = kernels(dys[0].shape[0])
    if found is None:
        return grad_gemms(dys, (decode(w, dy.dtype) for dy, w in zip(dys, ws)))
    return found.combine(dys, ws)
