"""Linear4bit from a layer of bitsandbytes and back: the same bytes and scales, and the settings of the layer it was."""

from __future__ import annotations

import importlib
import sys
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..reference import linear4bit as reference
from ..weight4bit import DTYPES, Weight4bit

_CLASSES = ("Linear4bit", "LinearNF4", "LinearFP4")
_PACKED_ROWS = 32  # bitsandbytes' eval path on a CPU holds this many rows side by side


def why_not(layer: Any) -> str | None:
    """Why this is no layer that `read` takes, or None. Imports nothing: a layer can exist only if its library does."""
    bnb = sys.modules.get("bitsandbytes")
    kind = type(layer)
    if bnb is None or kind not in [getattr(bnb.nn, name, None) for name in _CLASSES]:
        return f"a {kind.__name__}, not a bitsandbytes.nn.Linear4bit"
    if type(layer.weight) is not bnb.nn.Params4bit:
        return f"of which the weight is a {type(layer.weight).__name__}"
    if _state(layer) is None:
        return "not quantised yet (move it to its device first)"
    return "on the meta device" if layer.weight.is_meta else None


def read(cls, layer: nn.Module, tile: bool):
    """See `Linear4bit.from_bitsandbytes`."""
    why = why_not(layer)
    if why is not None:
        raise ValueError(
            f"Linear4bit.from_bitsandbytes: layer must be a quantised bitsandbytes.nn.Linear4bit, got {why}"
        )
    packed = getattr(_state(layer), "packing_format_for_cpu", False)
    weight = _unpacked(layer) if packed else _plain(layer)
    made = cls(weight.tile() if tile else weight, layer.bias, compute_dtype=_compute_dtype(layer))
    made._tile = tile
    made.quant_storage = layer.weight.quant_storage
    made.train(layer.training)
    own = nn.Module().__dict__
    p = layer.weight
    made._origin = {
        "class": type(layer).__name__,
        "layer": {k: v for k, v in layer.__dict__.items() if k not in own and k != "quant_state"},
        "weight": {"compress_statistics": p.compress_statistics, "quant_storage": p.quant_storage},
        "module": p.module is not None,  # Params4bit names its layer only where it was made with it
    }
    return made


def write(layer) -> nn.Module:
    """See `Linear4bit.to_bitsandbytes`."""
    bnb: Any = importlib.import_module("bitsandbytes.nn")
    weight = layer.weight4bit.untile()
    origin = layer._origin or {"class": "Linear4bit", "layer": {}, "weight": {}, "module": True}
    made = bnb.Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=layer.compute_dtype, device="meta",
        compress_statistics=weight.nested, quant_type=weight.quant_type, quant_storage=layer.quant_storage,
    )  # fmt: skip
    made.__class__ = getattr(bnb, origin["class"])
    made.__dict__.update(origin["layer"])
    made.compute_dtype = layer.compute_dtype
    made.bias = layer.bias
    state = weight.state_dict("weight")
    state = {k.removeprefix("weight."): v for k, v in state.items()}
    data = state.pop("weight").view(-1).view(layer.quant_storage).view(-1, 1)
    owner = made if origin["module"] else None
    made.weight = bnb.Params4bit.from_prequantized(data, state, device=data.device, module=owner)
    made.weight.__dict__.update(origin["weight"])
    made.quant_state = made.weight.quant_state
    return made.train(layer.training)


def _state(layer: Any) -> Any:
    """The quantisation state; a weight that lost it (FSDP makes new parameters) finds it on its layer."""
    state = getattr(layer.weight, "quant_state", None)
    return state if state is not None else getattr(layer, "quant_state", None)


def _compute_dtype(layer: Any) -> torch.dtype | None:
    dtype = layer.compute_dtype
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(
            f"Linear4bit.from_bitsandbytes: compute_dtype must be None or one of {list(DTYPES)}, got {dtype}"
        )
    return dtype


def _plain(layer: Any) -> Weight4bit:
    state = {f"weight.{k}": v for k, v in _state(layer).as_dict(packed=True).items()}
    return Weight4bit.from_state_dict(state | {"weight": layer.weight.data})


def _unpacked(layer: Any) -> Weight4bit:
    """What an eval forward on a CPU has repacked: codes [N/32, K/2, 32] with two rows' nibbles in a byte, scales transposed."""
    state, name = _state(layer), type(layer).__name__
    n, k = state.shape
    packed = layer.weight.data.reshape(-1, _PACKED_ROWS)
    codes = torch.cat([packed & 15, packed >> 4], dim=1).view(n // _PACKED_ROWS, k // 2, _PACKED_ROWS, 2)
    codes = codes.transpose(1, 2).reshape(-1)
    scales, nested, offset = state.absmax.t().reshape(-1).float(), None, None
    if state.original_nested:
        scales, nested, offset = reference.quantize_absmax(scales)
    warnings.warn(
        f"bitsandbytes rounded the scales of this {name} ({n} x {k}) to bfloat16 in an eval forward on the CPU: its codes are "
        f"restored, its scales stay rounded{' and were quantised again' if nested is not None else ''}. "
        "Load the checkpoint again for the original ones",
        UserWarning,
        stacklevel=4,
    )
    data = codes[::2] << 4 | codes[1::2]
    dtype, quant_type = state.original_dtype, state.quant_type
    weight = Weight4bit(data, scales, nested, offset, (n, k), dtype, quant_type, state.blocksize)
    return replace(weight, scales=weight.scales.contiguous())
