"""What bitsandbytes knows a 4-bit layer by, and Linear4bit from a layer of bitsandbytes and back: the same bytes and scales.

This module imports bitsandbytes: it is imported where that is needed, never by `import fastpeft`.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import nn

from ..reference import linear4bit as reference
from ..weight4bit import DTYPES, Weight4bit
from .linear4bit_weight import Held, Looked, order, set_kind

_CLASSES = (bnb.nn.Linear4bit, bnb.nn.LinearNF4, bnb.nn.LinearFP4)
_PACKED_ROWS = 32  # bitsandbytes' eval path on a CPU holds this many rows side by side


class Params4bit(Looked, bnb.nn.Params4bit):
    """The weight of a Linear4bit of ours. Whoever constructs one (PEFT's merge does) gets bitsandbytes' own, which
    `layer.weight = ...` takes.
    """

    __slots__ = ("_held",)
    from_prequantized = bnb.nn.Params4bit.from_prequantized

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return bnb.nn.Params4bit(*args, **kwargs)

    @staticmethod
    def about(held: Held) -> dict[str, Any]:
        """Its `__dict__`: what the constructor takes."""
        form = held.form
        return {
            "blocksize": form.blocksize, "compress_statistics": form.nested, "quant_type": form.quant_type,
            "quant_storage": held.storage, "bnb_quantized": True, "module": None,
        }  # fmt: skip

    @property
    def quant_state(self) -> QuantState:
        """Of the layer's own scales; a new one at each reading, for `QuantState.to` changes it in place."""
        order(self)
        return state_of(self._held.form)

    @quant_state.setter
    def quant_state(self, state: QuantState) -> None:
        order(self)
        whole = weight_of(self.data, state)
        if whole.shape != self._held.form.shape:
            raise ValueError(
                f"Linear4bit: quant_state must be of {list(self._held.form.shape)}, got {list(whole.shape)}"
            )
        self._held.keep(whole)

    def to(self, *args: Any, **kwargs: Any) -> bnb.nn.Params4bit:
        """bitsandbytes' own, of the same memory where nothing moves."""
        return self.theirs().to(*args, **kwargs)

    def theirs(self) -> bnb.nn.Params4bit:
        return bnb.nn.Params4bit(self.data, self.requires_grad, self.quant_state, **self.__dict__)

    def __copy__(self) -> bnb.nn.Params4bit:
        return self.theirs()


def _of_state(*path: str) -> property:
    """bitsandbytes' Parameter shows its state's tensors under the names that checkpoints have (FSDP looks them up)."""

    def get(self):
        found = self.quant_state
        for name in path:
            found = getattr(found, name)
        return found

    return property(get)


for _name, _path in {
    "absmax": ("absmax",), "code": ("code",), "quant_map": ("code",), "offset": ("offset",), "state2": ("state2",),
    "nested_absmax": ("state2", "absmax"), "nested_blocksize": ("state2", "blocksize"),
    "nested_quant_map": ("state2", "code"), "nested_dtype": ("state2", "dtype"), "nested_offset": ("offset",),
}.items():  # fmt: skip
    setattr(Params4bit, _name, _of_state(*_path))
set_kind(Params4bit)


class Known(bnb.nn.Linear4bit):
    """The side of a Linear4bit of ours that faces bitsandbytes: what its layer has beside the weight."""

    compute_type_is_set = True  # nothing is set by the first x: None means x's dtype
    support_avx512bf16_for_cpu = False  # its eval forward, which repacks the weight, never runs

    @property
    def quant_state(self) -> QuantState | None:
        return getattr(self.weight, "quant_state", None)

    @quant_state.setter
    def quant_state(self, state: QuantState) -> None:
        """bitsandbytes writes a new weight's state here before it is assigned: `weight` brings it along."""


def state_of(form: Weight4bit) -> QuantState:
    """Of scales in bitsandbytes' order, which it shares."""
    nested = None
    if form.nested_absmax is not None:
        code = form.codebook.clone()
        nested = QuantState(form.nested_absmax, code=code, blocksize=reference.NESTED_BLOCK, dtype=torch.float32)
    return QuantState(
        form.scales, torch.Size(form.shape), form.quant_map + 0.0, form.blocksize, form.quant_type, form.dtype,
        form.offset, nested,
    )  # fmt: skip


def weight_of(data: torch.Tensor, state: QuantState, name: str = "weight") -> Weight4bit:
    """Of bitsandbytes' bytes and their state, whose tensors are kept. Raises ValueError where they do not fit."""
    if getattr(state, "packing_format_for_cpu", False):
        return _unpacked(data, state, name)
    parts = {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    return Weight4bit.from_state_dict(parts | {"weight": data})


def why_not(layer: Any) -> str | None:
    """Why this is no layer that `read` takes, or None."""
    kind = type(layer)
    if kind not in _CLASSES:
        return f"a {kind.__name__}, not a bitsandbytes.nn.Linear4bit"
    if type(layer.weight) is not bnb.nn.Params4bit:
        return f"of which the weight is a {type(layer.weight).__name__}"
    if _state(layer) is None:
        return "not quantised yet (move it to its device first)"
    return "on the meta device" if layer.weight.is_meta else None


def read(cls, layer: Any, tile: bool):
    """See `Linear4bit.from_bitsandbytes`."""
    why = why_not(layer)
    if why is not None:
        raise ValueError(
            f"Linear4bit.from_bitsandbytes: layer must be a quantised bitsandbytes.nn.Linear4bit, got {why}"
        )
    weight = weight_of(layer.weight.data, _state(layer), type(layer).__name__)
    compute_dtype, storage = _compute_dtype(layer), layer.weight.quant_storage
    made = cls(weight.tile() if tile else weight, layer.bias, compute_dtype=compute_dtype, quant_storage=storage)
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
    weight = layer.weight4bit.untile()
    origin = layer._origin or {"class": "Linear4bit", "layer": {}, "weight": {}, "module": True}
    made = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=layer.compute_dtype, device="meta",
        compress_statistics=weight.nested, quant_type=weight.quant_type, quant_storage=layer.quant_storage,
    )  # fmt: skip
    made.__class__ = getattr(bnb.nn, origin["class"])
    made.__dict__.update(origin["layer"])
    made.compute_dtype = layer.compute_dtype
    made.bias = layer.bias
    state = weight.state_dict("weight")
    state = {k.removeprefix("weight."): v for k, v in state.items()}
    data = state.pop("weight").view(-1).view(layer.quant_storage).view(-1, 1)
    owner = made if origin["module"] else None
    made.weight = bnb.nn.Params4bit.from_prequantized(data, state, device=data.device, module=owner)
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


def _unpacked(data: torch.Tensor, state: Any, name: str) -> Weight4bit:
    """What an eval forward on a CPU has repacked: codes [N/32, K/2, 32] with two rows' nibbles in a byte, scales transposed."""
    n, k = state.shape
    packed = data.reshape(-1, _PACKED_ROWS)
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
        stacklevel=5,
    )
    data = codes[::2] << 4 | codes[1::2]
    dtype, quant_type = state.original_dtype, state.quant_type
    weight = Weight4bit(data, scales, nested, offset, (n, k), dtype, quant_type, state.blocksize)
    return replace(weight, scales=weight.scales.contiguous())
