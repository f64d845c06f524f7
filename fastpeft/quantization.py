"""quantize: every dense linear layer of a model becomes a frozen `nn.Linear4bit`, one layer at a time."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import nn

from .interop import transformers
from .nn import Linear4bit
from .weight4bit import BLOCKSIZES, DTYPES, QUANT_TYPES

Place = tuple[nn.Module | None, str]  # a parent and the name there; no parent: the model itself
SMALL = 0.5  # a share of the linear weights below which a warning names all that is left


class Left(NamedTuple):
    """What stays dense; `quiet`: the user's `skip` or the model's own kind asks for it."""

    name: str
    reason: str
    size: int
    quiet: bool


def quantize(
    model: nn.Module, quant_type: str, *, blocksize: int, double_quant: bool, skip: Iterable[str], tile: bool
) -> nn.Module:
    """See `fastpeft.quantize`."""
    skip = _check(model, quant_type, blocksize, skip)
    adapters = set(_adapter_parts(model))
    layers, left = _find(model, skip, adapters)
    if not layers:
        raise ValueError(_nothing(model, skip, left))
    for name, places in layers:
        _check_weight(name, _get(model, places[0]).weight)
    while layers:
        name, places = layers.pop(0)
        old = _get(model, places[0])
        new = Linear4bit.from_linear(
            _linear(old), quant_type, blocksize=blocksize, double_quant=double_quant, tile=tile
        )
        new.requires_grad_(False)
        for parent, attribute in places:
            if parent is None:
                model = new
            else:
                parent._modules[attribute] = new
        del old, new  # the dense weight goes before the next layer comes
    for its in transformers.pretrained(model):
        transformers.mark(its, quant_type, double_quant, adapters)
    _say(model, left)
    return model


def _linear(layer: Any) -> nn.Linear:
    """Conv1D as an nn.Linear on the same memory."""
    if not transformers.is_conv1d(layer):
        return layer
    k, n = layer.weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(layer.weight.detach().t(), requires_grad=False)
    linear.bias = layer.bias
    return linear.train(layer.training)


def _say(model: nn.Module, left: list[Left]) -> None:
    """Warn of what stays dense though nobody asked for it; of all that does, where little is in 4 bits."""
    packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, Linear4bit))
    share = packed / (packed + sum(one.size for one in left))
    rows = [one for one in left if not one.quiet or (one.size and share < SMALL)]
    if rows:
        only = f": only {100 * share:.2g} % of the linear weights are in 4 bits" if share < SMALL else ""
        reasons = "\n".join(f"  {one.name}: {one.reason}" for one in rows)
        warnings.warn(
            f"fastpeft.quantize left {len(rows)} dense layers as they are{only}\n{reasons}", UserWarning, stacklevel=4
        )


def _check(model, quant_type, blocksize, skip) -> tuple[str, ...]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastpeft.quantize: model must be a torch.nn.Module, got {type(model).__name__}")
    if any(hasattr(p, "full_tensor") for p in model.parameters()):
        raise RuntimeError("fastpeft.quantize: FSDP2 has already sharded this model; quantize before fully_shard")
    if getattr(model.__dict__.get("_fastpeft"), "attached", None):
        raise ValueError("fastpeft.quantize: adapters are attached to this model; quantize before fastpeft.attach")
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"fastpeft.quantize: quant_type must be 'nf4' or 'fp4', got {quant_type!r}")
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise ValueError(f"fastpeft.quantize: blocksize must be a power of two from 32 to 4096, got {blocksize!r}")
    names = None if isinstance(skip, str) or not isinstance(skip, Iterable) else tuple(skip)
    if names is None or not all(isinstance(name, str) for name in names):
        raise TypeError(f"fastpeft.quantize: skip must be a sequence of module names, got {skip!r}")
    return names


def _find(
    model: nn.Module, skip: tuple[str, ...], adapters: set[int]
) -> tuple[list[tuple[str, list[Place]]], list[Left]]:
    """The layers to replace, each with all its places, and what stays dense, with its reason."""
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                owners.setdefault(id(p), set()).add(id(module))
    wide = _kept_wide(model)
    kept = {one for its in transformers.pretrained(model) for one in transformers.kept_dense(its, adapters)}
    found: dict[int, tuple[str, list[Place]]] = {}
    why: dict[int, Left] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in adapters or isinstance(module, Linear4bit):
            continue
        if not isinstance(module, nn.Linear) and not transformers.is_conv1d(module):
            why.update(
                (id(p), Left(f"{name}.{key}".lstrip("."), _EXPERTS, p.numel(), True)) for key, p in _experts(module)
            )
            continue
        parent_name, _, attribute = name.rpartition(".")
        parent = model.get_submodule(parent_name) if name else None
        found.setdefault(id(module), (name, []))[1].append((parent, attribute))
        asked = next((pattern for pattern in skip if matches(pattern, name)), None)
        weight: Any = module._parameters.get("weight")
        reason = why_dense(module, parent)
        if len(owners.get(id(weight), ())) > 1:
            reason = "its weight is shared with another module (tied to an embedding?)"
        if any(matches(pattern, name) or name.endswith(pattern) for pattern in wide):
            reason = "transformers keeps it in float32 (_keep_in_fp32_modules)"
        size = 0 if weight is None else weight.numel()
        if id(module) in kept:
            why[id(module)] = Left(name, "an output embedding or the head of a task", 0, True)
        elif asked is not None:
            why[id(module)] = Left(name, f"skip has {asked!r}", size, True)
        elif reason is not None:
            why.setdefault(id(module), Left(name, reason, size, False))
    return [places for key, places in found.items() if key not in why], list(why.values())


def matches(pattern: str, name: str) -> bool:
    """Whether one or more whole components of a dotted name, side by side, match."""
    return any(fnmatchcase(part, pattern) for part in parts(name))


def parts(name: str, ends_only: bool = False) -> Iterator[str]:
    """One or more whole components of a dotted name, side by side; or the last ones."""
    all_of = name.split(".")
    for end in (len(all_of),) if ends_only else range(1, len(all_of) + 1):
        yield from (".".join(all_of[start:end]) for start in range(end))


_EXPERTS = "a parameter of three dimensions, no linear layer (the experts of a mixture?)"


def _experts(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, p in module._parameters.items():
        convolves = isinstance(module, nn.modules.conv._ConvNd)
        if p is not None and p.dim() == 3 and len(p) > 1 and not convolves:
            yield name, p


def why_dense(module: Any, parent: nn.Module | None) -> str | None:
    """Why a dense layer must stay so."""
    if hasattr(module, "parametrizations"):
        return "it has parametrisations"
    if type(module) is not nn.Linear and not transformers.is_conv1d(module):
        return f"it is a {type(module).__name__}, not exactly an nn.Linear"
    if hooked(module):
        return "it has hooks, or a forward of its own"
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "nn.TransformerEncoderLayer reads its weight without calling it"
    weight = module.weight
    if type(weight) is not nn.Parameter or type(weight.data) is not torch.Tensor:
        return f"its weight is a {type(weight.data).__name__}"
    return None


def hooked(module: nn.Module) -> bool:
    """Whether somebody would notice that `module()` was not called."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__


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


def _nothing(model: nn.Module, skip: tuple[str, ...], left: list[Left]) -> str:
    done = sum(isinstance(module, Linear4bit) for module in model.modules())
    rows = "".join(f"\n  {one.name or 'the model'}: left, {one.reason}" for one in left)
    return (
        f"fastpeft.quantize: nothing to quantize in this {type(model).__name__}. Looked for modules of exactly "
        f"torch.nn.Linear (or transformers' Conv1D) without {', '.join(map(repr, skip)) or 'anything'} in their dotted "
        f"name; {done} layers are in 4 bits already{rows}"
    )
