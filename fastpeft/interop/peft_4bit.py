"""PEFT's LoRA layer over bitsandbytes' 4-bit layer (QLoRA) on fastpeft's op: the base's bytes go into our `nn.Linear4bit`.

The bytes and scales, and with them the state_dict, stay as they were; bitsandbytes' parameter is given up, so that its memory
goes. `revert` makes a bitsandbytes layer of them again. A base that is ours already (`fastpeft.quantize`) stays. This module
imports bitsandbytes: it is loaded only where PEFT did so.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch import nn

from ..nn import Linear4bit
from ..nn.linear4bit_bitsandbytes import why_not
from .legal import noticed
from .peft import Fast


class FastLoraLinear4bit(Fast, PeftLinear4bit):
    """PEFT's `lora.bnb.Linear4bit` with a fused forward: what `apply` makes of it. Never constructed."""

    peft_class = PeftLinear4bit

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """For PEFT's `unload` and `merge_and_unload`: the layer that was there before `apply`."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        base = self.get_base_layer()
        return base.to_bitsandbytes() if _taken(base) else base

    def _get_name(self) -> str:
        return PeftLinear4bit.__name__


def why_left(layer: Any) -> str | None:
    """Why `apply` leaves this layer to PEFT, or None."""
    base = layer._modules["base_layer"]
    why = None if isinstance(base, Linear4bit) else why_not(base)
    if why is not None:
        return f"its base layer is {why}"
    if noticed(base):
        return "its base layer has hooks, or a forward of its own"
    if layer.merged_adapters:
        return "its adapters were merged by PEFT's code, which keeps no original: unmerge them first"
    return None


def take_base(layer: Any, made: MutableMapping) -> None:
    """made: what came of layers and weights, which other layers may share; keyed weakly, so that each goes before the next."""
    base = layer._modules["base_layer"]
    if isinstance(base, Linear4bit):
        return
    if base not in made:
        made[base] = new = Linear4bit.from_bitsandbytes(base)
        new._origin["apply"] = True
        new.weight = made.setdefault(base.weight, new.weight)  # PEFT's layer_replication shares weights, not layers
    layer._modules["base_layer"] = made[base]


def give_base_back(layer: Any, made: MutableMapping) -> None:
    """made: see `take_base`."""
    base = layer._modules["base_layer"]
    if not _taken(base):
        return
    if base not in made:
        made[base] = new = base.to_bitsandbytes()
        new.weight = made.setdefault(base.weight, new.weight)
    layer._modules["base_layer"] = made[base]


def _taken(base: nn.Module) -> bool:
    """Whether `apply` made it of a bitsandbytes layer."""
    return isinstance(base, Linear4bit) and base._origin is not None and "apply" in base._origin
