"""Checked arguments as the passes take them: under autocast, plain memory, scales as tensors. lists: as `lora_linear.run`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.compiler import is_compiling


def autocast(x, lists):
    """Under autocast everything computes in its dtype, as `torch.nn.functional.linear` does."""
    if not isinstance(x, torch.Tensor) or x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x, lists
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(t: Any) -> Any:
        narrow = isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype != torch.float64
        return t.to(dtype) if narrow else t

    return cast(x), (tuple(map(cast, lists[0])), *lists[1:])


def as_passes_read(x, lists):
    """Nothing lazily negated or zero, adapters and biases contiguous, a float64 bias beside a narrower x in float32."""

    def of(t: Any, contiguous: bool = True, narrow: bool = False) -> Any:
        if not isinstance(t, torch.Tensor):
            return t
        t = t.resolve_neg()
        if not is_compiling() and t._is_zerotensor():
            t = t.clone()
        if narrow and t.dtype == torch.float64 != x.dtype:
            t = t.float()
        return t.contiguous() if contiguous else t

    as_it_is, narrow = partial(of, contiguous=False), partial(of, narrow=True)
    ways = as_it_is, narrow, of, of, of, narrow
    return as_it_is(x), tuple(tuple(map(way, ts)) for way, ts in zip(ways, lists))


def with_tensor_scales(x, lists):
    *rest, a, b, scales, lora_biases = lists
    return *rest, a, b, tuple([None if a_i is None else scale(s, x) for a_i, s in zip(a, scales)]), lora_biases


def scale(value: Any, x: torch.Tensor) -> torch.Tensor:
    """[] or [R], float32 (float64 with x), on x's device: as a tensor it can change without recompiling."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if isinstance(value, torch.Tensor):
        return value.to(wide)
    return torch.full((), value, dtype=wide, device=x.device)


def any_trained(scales) -> bool:
    return any([isinstance(scale, torch.Tensor) and scale.requires_grad for scale in scales])
