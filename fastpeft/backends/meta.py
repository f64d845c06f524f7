"""What native kernels, of the CPU and of GPUs, take: asked of dtypes and ranks alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from ..native import CODES

MAX_RANK = 512
Meta = tuple[torch.Tensor, Sequence[torch.Tensor | None], Sequence[torch.Tensor | None]]  # x, [a_i], [b_i]


def unfit(meta: Meta) -> str | None:
    """Why no native kernel takes these dtypes and ranks; None if it does."""
    x, a, b = meta
    if x.dtype not in CODES:
        return f"x is {x.dtype}, not among float32, bfloat16, float16"
    for a_i, b_i in zip(a, b):
        if a_i is None or b_i is None:
            continue
        if a_i.dtype not in CODES or b_i.dtype not in CODES:
            return f"a is {a_i.dtype} and b {b_i.dtype}: it takes float32, bfloat16 and float16"
        if a_i.shape[0] > MAX_RANK:
            return f"a and b have rank {a_i.shape[0]}: it takes up to {MAX_RANK}"
    return None


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """A GPU's compute capability."""
    return torch.cuda.get_device_capability(device)
