"""4-bit weights in CUDA C++ (`csrc/cuda/linear4bit.cu`): up to 16 rows read the codes themselves, at the rate of memory.

More go the way of `backends/triton`, but for what decodes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ... import native
from ..triton import linear4bit as triton


def dequantize(weight, dtype: torch.dtype) -> torch.Tensor:
    """[N, K]"""
    return native.cuda().linear4bit_dequantize(weight.untile(), native.CODES[dtype])


def fused(x, ws) -> Callable | None:
    """As in `backends/triton`"""
    module = native.cuda()
    return module.linear4bit_small if module.linear4bit_small_is_fast(x, ws) else triton.fused(x, ws)


def project_4bit(x, ws, biases) -> list:
    return triton.project_by(fused, dequantize, x, ws, biases)


def combine_4bit(dys, ws) -> torch.Tensor:
    return triton.combine_by(dequantize, dys, ws)
