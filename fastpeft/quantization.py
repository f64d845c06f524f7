"""quantize: every dense `nn.Linear` of a model becomes a frozen `nn.Linear4bit`, one layer at a time."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .nn import Linear4bit
from .weight4bit import BLOCKSIZES, DTYPES, QUANT_TYPES

Place = tuple[nn.Module | None, str]  # a parent and the name there; no parent: the model itself


def quantize(
    model: nn.Module, quant_type: str, *, blocksize: int, double_quant: bool, skip: Iterable[str], tile: bool
) -> nn.Module:
    """See `fastpeft.quantize`."""
    skip = _check(model, quant_type, blocksize, skip)
    layers, left = _find(model, skip)
    if not layers:
        raise ValueError(_nothing(model, skip, left))
    for name, places in layers:
        _check_weight(name, _get(model, places[0]).weight)
    while layers:
        name, places = layers.pop(0)
        old = _get(model, places[0])
        new = Linear4bit.from_linear(old, quant_type, blocksize=blocksize, double_quant=double_quant, tile=tile)
        new.requires_grad_(False)
        for parent, attribute in places:
            if parent is None:
                model = new
            else:
                parent._modules[attribute] = new
        del old, new  # the dense weight goes before the next layer comes
    if left:
        rows = "\n".join(f"  {name}: {reason}" for name, reason in left)
        warnings.warn(
            f"fastpeft.quantize left {len(left)} dense layers as they are:\n{rows}", UserWarning, stacklevel=3
        )
    return model


def _check(model, quant_type, blocksize, skip) -> tuple[str, ...]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastpeft.quantize: model must be a torch.nn.Module, got {type(model).__name__}")
    if any(hasattr(p, "full_tensor") for p in model.parameters()):
        raise RuntimeError("fastpeft.quantize: FSDP2 has already sharded this model; quantize before fully_shard")
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"fastpeft.quantize: quant_type must be 'nf4' or 'fp4', got {quant_type!r}")
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise ValueError(f"fastpeft.quantize: blocksize must be a power of two from 32 to 4096, got {blocksize!r}")
    names = None if isinstance(skip, str) or not isinstance(skip, Iterable) else tuple(skip)
    if names is None or not all(isinstance(name, str) for name in names):
        raise TypeError(f"fastpeft.quantize: skip must be a sequence of module names, got {skip!r}")
    return names


def _find(model: nn.Module, skip: tuple[str, ...]) -> tuple[list[tuple[str, list[Place]]], list[tuple[str, str]]]:
    """The layers to replace, each with all its places, and those left dense for another reason than `skip`."""
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                owners.setdefault(id(p), set()).add(id(module))
    adapters, wide = set(_adapter_parts(model)), _kept_wide(model)
    found: dict[int, tuple[str, list[Place]]] = {}
    why: dict[int, tuple[str, str | None]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, nn.Linear) or id(module) in adapters or isinstance(module, Linear4bit):
            continue
        parent_name, _, attribute = name.rpartition(".")
        parent = model.get_submodule(parent_name) if name else None
        found.setdefault(id(module), (name, []))[1].append((parent, attribute))
        reason, parts = _reason(module, parent), set(name.split("."))
        if len(owners.get(id(module._parameters.get("weight")), ())) > 1:
            reason = "its weight is shared with another module (tied to an embedding?)"
        if wide & parts:
            reason = "transformers keeps it in float32 (_keep_in_fp32_modules)"
        if parts.intersection(skip):
            why[id(module)] = name, None
        elif reason is not None:
            why.setdefault(id(module), (name, reason))
    left = [(name, reason) for name, reason in why.values() if reason is not None]
    return [places for key, places in found.items() if key not in why], left


def _reason(module: nn.Linear, parent: nn.Module | None) -> str | None:
    """Why a dense layer must stay so."""
    if hasattr(module, "parametrizations"):
        return "it has parametrisations"
    if type(module) is not nn.Linear:
        return f"it is a {type(module).__name__}, not exactly an nn.Linear"
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks) or "forward" in module.__dict__:
        return "it has hooks, or a forward of its own"
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "nn.TransformerEncoderLayer reads its weight without calling it"
    weight = module.weight
    if type(weight) is not nn.Parameter or type(weight.data) is not torch.Tensor:
        return f"its weight is a {type(weight.data).__name__}"
    return None


def _adapter_parts(model: nn.Module) -> Iterator[int]:
    """What PEFT trains or saves beside the base: adapters, and `modules_to_save` with their originals."""
    tuners, others = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.utils.other")
    for module in model.modules() if tuners and others else ():
        if isinstance(module, others.AuxiliaryTrainingWrapper):
            yield from map(id, module.modules())
        elif isinstance(module, tuners.BaseTunerLayer):
            for name in module.adapter_layer_names:
                part = getattr(module, name, None)
                if isinstance(part, nn.Module):
                    yield from map(id, part.modules())


def _kept_wide(model: nn.Module) -> set[str]:
    """Layers whose weight's dtype transformers' models read (T5 casts x to `wo.weight.dtype`)."""
    names: set[str] = set()
    for module in model.modules():
        kept = getattr(module, "_keep_in_fp32_modules", None)
        names |= set(kept) if isinstance(kept, (list, set, tuple)) else set()
    return names


def _check_weight(name: str, weight: torch.Tensor) -> None:
    place = f"fastpeft.quantize: {name or 'the model'}.weight must be"
    if weight.is_meta:
        raise ValueError(f"{place} loaded, got one on the meta device; nothing was changed")
    if weight.dtype not in DTYPES.values():
        raise ValueError(f"{place} one of {', '.join(DTYPES)}, got {weight.dtype}; nothing was changed")
    if not torch.isfinite(weight).all():
        raise ValueError(f"{place} finite, got NaN or Inf in it; nothing was changed")


def _get(model: nn.Module, place: Place) -> Any:
    parent, attribute = place
    return model if parent is None else parent._modules[attribute]


def _nothing(model: nn.Module, skip: tuple[str, ...], left: list[tuple[str, str]]) -> str:
    done = sum(isinstance(module, Linear4bit) for module in model.modules())
    rows = "".join(f"\n  {name or 'the model'}: left, {reason}" for name, reason in left)
    return (
        f"fastpeft.quantize: nothing to quantize in this {type(model).__name__}. Looked for modules of exactly "
        f"torch.nn.Linear without {', '.join(map(repr, skip)) or 'anything'} in their dotted name; "
        f"{done} layers are in 4 bits already{rows}"
    )
