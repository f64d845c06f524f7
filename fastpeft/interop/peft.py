"""Hugging Face PEFT's LoRA layers on fastpeft's op: `apply` swaps their class, `revert` swaps it back.

Nothing else changes: parameters, names, hooks and PEFT's own methods stay; a bitsandbytes base becomes a layer of ours with
its bytes (`peft_4bit.py`). A call takes the fast path when `legal.py`
finds nothing against it, else PEFT's forward; siblings that read one x run together (`siblings.py`).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import MultiheadAttention
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from .. import ops
from ..nn import Linear4bit
from ..nn.linear4bit import no_autocast
from . import legal, merge_4bit, siblings
from .legal import Terms
from .report import Report, has_prompt, known
from .siblings import Group, Seat

if TYPE_CHECKING:
    Base = PeftLinear
else:
    Base = object


class Fast(Base):
    """The fused forward, over the PEFT class that stands behind it in the method resolution order."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x [..., K] -> [..., N], as PEFT's; other arguments (`adapter_names`, ...) run PEFT's code."""
        if args or kwargs:
            return super().forward(x, *args, **kwargs)
        found = legal.terms(self)
        if found is legal.UNMERGE_FIRST:
            self.unmerge()
            found = legal.terms(self)
        refused = None if isinstance(found, str) else legal.refusal(self, x, found)
        compiling = torch.compiler.is_compiling()
        if not compiling:
            seat = self.__dict__["_fastpeft"]
            seat.called, seat.refused = True, refused is not None
            seat.last = found if isinstance(found, str) else refused
        if isinstance(found, str) or refused is not None:
            return super().forward(x)
        if not compiling and seat.group is not None:  # compiled: whether siblings share x depends on data (versions)
            y = seat.group.call(seat.index, self, x, found, _forward_all)
            if y is not None:
                return y if found.base is None else y.to(x.dtype)
        if found.base is None:
            return _forward(x, found)
        dtype = found.dtype(x)
        with no_autocast(x, dtype):
            return _forward(x.to(dtype), found).to(x.dtype)

    def fast_terms(self, x: torch.Tensor | None) -> Terms | str:
        """What the fast path computes for x, or why this call is PEFT's. None: whatever x (for the report)."""
        found = legal.terms(self)
        if found is legal.UNMERGE_FIRST and x is not None:
            self.unmerge()
            found = legal.terms(self)
        if x is None or isinstance(found, str):
            return found
        return legal.refusal(self, x, found) or found

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As PEFT's. A 4-bit base is quantised again and keeps its original: see `merge_4bit`."""
        if isinstance(self.get_base_layer(), Linear4bit):
            merge_4bit.merge(self, adapter_names)
        else:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge(self) -> None:
        """As PEFT's; a 4-bit base gets its original bits back."""
        if isinstance(self.get_base_layer(), Linear4bit):
            merge_4bit.unmerge(self)
        else:
            super().unmerge()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copied or unpickled: take the old place among the siblings, which are being copied too (or stay alone)."""
        super().__setstate__(state)
        seat = self._fastpeft
        if seat.group is not None:
            seat.group.join(seat.index, self)


class FastLoraLinear(Fast, PeftLinear):
    """PEFT's `lora.Linear` with a fused forward: what `apply` makes of it. Never constructed."""

    peft_class = PeftLinear

    def _get_name(self) -> str:
        return PeftLinear.__name__  # repr is PEFT's


def apply(model: nn.Module) -> Report:
    """See `fastpeft.apply`."""
    _check(model, "apply")
    fast = _classes()
    layers = [module for module in model.modules() if type(module) in fast]
    if not any(known(module) for module in model.modules()):
        raise ValueError(
            f"fastpeft.apply: nothing to apply in this {type(model).__name__}. Looked for peft.tuners.lora.layer.Linear "
            "and peft.tuners.lora.bnb.Linear4bit (the fast paths), prefix tuning, PEFT's other adapter layers (reported) and "
            "fastpeft.nn.LoraLinear (already fast). "
            "Wrap the model first: peft.get_peft_model(model, LoraConfig(...))"
        )
    inside = {
        id(part) for module in model.modules() if isinstance(module, MultiheadAttention) for part in module.modules()
    }
    swapped: list[nn.Module] = []
    made = WeakIdKeyDictionary()
    left: dict[str, str] = {}
    try:
        for name, module in model.named_modules():
            if has_prompt(module) and not _is_fast_prefix(module):
                try:
                    _prefix().apply(module)
                    swapped.append(module)
                except ValueError as error:
                    left[name] = str(error)
        for layer in layers:
            if id(layer) in inside:  # PEFT's attention layer reads its projections' weights and never calls them
                continue
            four_bit = type(layer) is not PeftLinear
            if four_bit and _four_bit().why_left(layer) is not None:
                continue
            swapped.append(layer)
            layer._fastpeft = Seat()
            if four_bit:
                _four_bit().take_base(layer, made)
            layer.__class__ = fast[type(layer)]
        _group(model)
    except BaseException:
        _swap_back(swapped)
        raise
    return Report(model, left)


def revert(model: nn.Module) -> None:
    """See `fastpeft.revert`."""
    _check(model, "revert")
    layers = [module for module in model.modules() if isinstance(module, Fast) or _is_fast_prefix(module)]
    for layer in layers:
        if type(layer) is FastLoraLinear and merge_4bit.holds_original(layer):
            raise RuntimeError(
                "fastpeft.revert: an adapter is merged into a 4-bit base, which PEFT's lora.Linear cannot undo: "
                "call unmerge_adapter() first"
            )
    _swap_back(layers)


def _four_bit():
    """`peft_4bit`, which imports bitsandbytes: only where PEFT has done so."""
    from . import peft_4bit

    return peft_4bit


def _prefix():
    """`peft_prefix`, which registers an attention with transformers: only where there is prefix tuning."""
    from . import peft_prefix

    return peft_prefix


def _is_fast_prefix(module: nn.Module) -> bool:
    return has_prompt(module) and isinstance(module, _prefix().FastPrefix)


def _classes() -> dict[type, type]:
    """PEFT's classes and the fast ones for them."""
    classes: dict[type, type] = {PeftLinear: FastLoraLinear}
    if "peft.tuners.lora.bnb" in sys.modules and hasattr(sys.modules["peft.tuners.lora.bnb"], "Linear4bit"):
        classes[_four_bit().PeftLinear4bit] = _four_bit().FastLoraLinear4bit
    return classes


def _check(model: nn.Module, what: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastpeft.{what}: model must be a torch.nn.Module, got {type(model).__name__}")
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules()):
        hint = (
            "call apply before fully_shard"
            if what == "apply"
            else "revert before fully_shard, or keep the fast classes"
        )
        raise RuntimeError(f"fastpeft.{what}: FSDP2 (fully_shard) has already swapped classes in this model: {hint}")


def _group(model: nn.Module) -> None:
    for layers in siblings.find(model, tuple(_classes().values())):
        if any(layer._fastpeft.group is None for _, layer in layers):
            group = Group(tuple(name for name, _ in layers))
            for index, (_, layer) in enumerate(layers):
                layer._fastpeft = Seat(group, index)
                group.join(index, layer)


def _swap_back(layers: Sequence[nn.Module]) -> None:
    made = WeakIdKeyDictionary()
    for layer in layers:
        if _is_fast_prefix(layer):
            _prefix().revert(layer)
            continue
        seat = layer.__dict__.pop("_fastpeft", None)
        if seat is not None and seat.group is not None:
            seat.group.leave(seat.index)
        merge_4bit.forget_original(layer)
        if not isinstance(layer, PeftLinear):
            _four_bit().give_base_back(layer, made)
        if isinstance(layer, Fast):
            layer.__class__ = layer.peft_class
        for name in ("forward", "_old_forward"):  # accelerate keeps and restores bound methods
            if getattr(layer.__dict__.get(name), "__func__", None) is Fast.forward:
                setattr(layer, name, type(layer).forward.__get__(layer))


def _forward(x: torch.Tensor, found: Terms) -> torch.Tensor:
    weight, a, b, scale, bias, lora_bias = _arguments(found)
    return ops.lora_linear(x, weight, a, b, scale=scale, bias=bias, lora_bias=lora_bias, dropout_p=found.dropout_p)


def _forward_all(x: torch.Tensor, every: Sequence[Terms]) -> list[torch.Tensor]:
    """Outputs in the dtype that they are computed in (a cast would hide from `Group` that backward has run)."""
    dtype, packed = x.dtype, any(found.base is not None for found in every)
    if packed:
        dtype = every[0].dtype(x)  # all the same: `Group` asked
    arguments = zip(*(_arguments(found) for found in every), strict=True)
    weights, a, b, scales, biases, lora_biases = arguments
    with no_autocast(x, dtype) if packed else contextlib.nullcontext():
        return ops.lora_linear_group(
            x.to(dtype), weights, a, b, scales=scales, biases=biases, lora_biases=lora_biases,
            dropout_p=every[0].dropout_p,
        )  # fmt: skip


def _arguments(found: Terms) -> tuple[Any, ...]:
    """weight, a, b, scale, bias, lora_bias for the op. Several adapters are one of rank ΣR, with a scale for each row."""
    weight = found.weight.t() if found.transposed else found.weight
    if found.off is not None:
        return weight, None, None, 1.0, found.bias, None
    if len(found.adapters) == 1:
        (a, b, bias, scale) = found.adapters[0]
        return weight, a, b, scale, found.bias, None if bias is None else bias * scale
    every_a, every_b, _, scalings = zip(*found.adapters, strict=True)
    scale = torch.cat([_spread(scaling, a) for a, scaling in zip(every_a, scalings, strict=True)])
    lora_biases = [bias * scaling for _, _, bias, scaling in found.adapters if bias is not None]
    lora_bias = sum(lora_biases) if lora_biases else None
    return weight, torch.cat(every_a), torch.cat(every_b, dim=1), scale, found.bias, lora_bias


def _spread(scaling: float | torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """scaling as a float32 [R] beside a [R, K]"""
    if isinstance(scaling, torch.Tensor):
        return scaling.to(a.device, torch.float32).expand(a.shape[0])
    return torch.full(a.shape[:1], scaling, dtype=torch.float32, device=a.device)
