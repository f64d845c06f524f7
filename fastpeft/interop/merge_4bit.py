"""Merging adapters into a 4-bit base: dequantise, add, quantise again, and keep the original so that it comes back exactly.

PEFT requantises once an adapter, loses the original bits, and (in its bitsandbytes layer) adds lora_bias unscaled.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge

from ..nn import Linear4bit

_KEPT = "_fastpeft_original"  # on the layer while something is merged: the base's Weight4bit, and its bias


@torch.no_grad()
def merge(layer: Any, adapter_names: list[str] | None) -> None:
    """W + Σ scaling·B A, of the original W and all merged adapters, quantised once, as W was.

    `base_layer.merge_error` is the relative RMS error of that. Raises ValueError for NaN or Inf, RuntimeError for a
    lora_bias without a base bias; nothing is changed then.
    """
    names = [name for name in check_adapters_to_merge(layer, adapter_names) or () if name in layer.lora_A]
    if not names:
        return
    base: Linear4bit = layer.get_base_layer()
    weight, bias = layer.__dict__.get(_KEPT) or (
        base.weight4bit,
        None if base.bias is None else base.bias.detach().clone(),
    )
    every = [*layer.merged_adapters, *names]
    exact, merged_bias = weight.dequantize(torch.float32), bias
    with _unmerged(layer, exact):
        for name in every:
            if name in layer.lora_variant:  # DoRA and the like read the base as it is so far
                with _instead(base, exact):
                    exact = layer.lora_variant[name].merge_safe(layer, name, exact)
            else:
                exact = exact + layer.get_delta_weight(name)
            if layer.lora_bias[name]:
                if merged_bias is None:
                    raise RuntimeError(
                        "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias."
                    )
                merged_bias = merged_bias + layer.lora_B[name].bias * layer.scaling[name]
    if not torch.isfinite(exact).all() or not (merged_bias is None or torch.isfinite(merged_bias).all()):
        raise ValueError(f"NaNs detected in the merged weights. One of the adapters {every} seems to be broken")
    base.requantize_(exact.float())
    if merged_bias is not None:
        base.bias.copy_(merged_bias)
    layer.__dict__[_KEPT] = weight, bias
    layer.merged_adapters[:] = every
    warnings.warn(
        "merging into a 4-bit base quantises it again: base_layer.merge_error is the relative RMS error, unmerge restores "
        "the original bits",
        UserWarning,
        stacklevel=4,
    )


@torch.no_grad()
def unmerge(layer: Any) -> None:
    """The original bits again."""
    if not layer.merged_adapters:
        warnings.warn("Already unmerged. Nothing to do.", UserWarning, stacklevel=3)
        return
    base: Linear4bit = layer.get_base_layer()
    weight, bias = layer.__dict__.pop(_KEPT)
    base.set_weight(weight)
    base.merge_error = None
    if bias is not None:
        base.bias.copy_(bias)
    for name in layer.merged_adapters:
        layer._caches.pop(f"{name}-weight_norm", None)  # DoRA's merge keeps it for its unmerge
    layer.merged_adapters.clear()


def holds_original(layer: Any) -> bool:
    return _KEPT in layer.__dict__


def forget_original(layer: Any) -> None:
    layer.__dict__.pop(_KEPT, None)


@contextlib.contextmanager
def _unmerged(layer: Any, dense: torch.Tensor) -> Iterator[None]:
    """Where PEFT's variants look for the base without merged adapters (they would unmerge for it)."""
    layer._caches["unmerged_base_weight"] = dense
    try:
        yield
    finally:
        layer._caches.pop("unmerged_base_weight", None)


@contextlib.contextmanager
def _instead(base: Linear4bit, dense: torch.Tensor) -> Iterator[None]:
    """`base.dequantize()` gives `dense`: what is merged so far, before it is rounded."""
    base.__dict__["dequantize"] = lambda: dense
    try:
        yield
    finally:
        del base.__dict__["dequantize"]
