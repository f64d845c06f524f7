"""How a 4-bit weight becomes a dense one: by its device's backend. Importing this gives `Weight4bit.dequantize` its way."""

from __future__ import annotations

import torch

from .. import native
from ..reference import linear4bit as reference
from ..weight4bit import Weight4bit, set_decoder
from . import choice
from .cpu import linear4bit as cpu
from .cuda import linear4bit as cuda
from .triton import linear4bit as triton


def decode(weight: Weight4bit, dtype: torch.dtype) -> torch.Tensor:
    """[N, K] of `dtype`: codebook[code] · scale in float32, rounded once"""
    device = weight.device.type
    if dtype in native.CODES:
        if device == "cpu" and choice.allows("cpu") and native.cpu():
            return cpu.dequantize(weight, dtype)
        if device == "cuda" and choice.allows("cuda") and native.cuda():
            return cuda.dequantize(weight, dtype)
        if device == "cuda" and choice.allows("triton") and native.triton("linear4bit"):
            return triton.dequantize(weight, dtype)
    return reference.dense(weight, dtype)


set_decoder(decode)
