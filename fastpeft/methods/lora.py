"""LoRA on the linear layers of a plain model (Hu et al. 2021), dense or in 4 bits, in PEFT's files."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..interop import transformers
from ..nn import Linear4bit, LoraLinear
from ..nn.lora_linear import adapted
from ..quantization import hooked, matches, why_dense
from .sites import Adapter, Site, TaskHead, leave, original, replace, walk


@dataclass(frozen=True)
class LoraConfig:
    """y = x Wᵀ + bias + scale · (drop(x) Aᵀ) Bᵀ on the linear layers of a model (see `fastpeft.LoraConfig`)."""

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: Iterable[str] | None = None
    modules_to_save: Iterable[str] = ()
    rslora: bool = False

    method: ClassVar[str] = "lora"

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"LoraConfig: r must be an int of at least 1, got {self.r!r}")
        for field, most in ("alpha", math.inf), ("dropout", 1):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < most:
                raise ValueError(f"LoraConfig: {field} must be a number{_RANGES[field]}, got {value!r}")
        if self.dropout < 0:
            raise ValueError(f"LoraConfig: dropout must be a number{_RANGES['dropout']}, got {self.dropout!r}")
        if not isinstance(self.rslora, bool):
            raise TypeError(f"LoraConfig: rslora must be a bool, got {self.rslora!r}")
        for field in ("targets", "modules_to_save"):
            names = getattr(self, field)
            if names is None and field == "targets":
                continue
            if isinstance(names, str) or not isinstance(names, Iterable):
                raise TypeError(f"LoraConfig: {field} must be a sequence of module names, got {names!r}")
            object.__setattr__(self, field, tuple(names))
            if not all(isinstance(name, str) for name in getattr(self, field)):
                raise TypeError(f"LoraConfig: {field} must be a sequence of module names, got {getattr(self, field)!r}")

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / √r (rank-stabilised LoRA: Kalajdzievski 2023, equation 6)."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


Config = LoraConfig
_RANGES = {"alpha": ", finite", "dropout": " in [0, 1)"}


class LoraWeights(nn.Module):
    """A [r, K] and B [N, r] of one adapter at one layer; B starts at zero, A as in PEFT."""

    def __init__(self, layer: nn.Module, config: LoraConfig) -> None:
        super().__init__()
        n, k = _shape(layer)
        dtype = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
        like = {"device": layer.weight.device, "dtype": dtype}
        self.lora_a = nn.Parameter(torch.empty(config.r, k, **like))
        self.lora_b = nn.Parameter(torch.zeros(n, config.r, **like))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.scale, self.dropout = config.scale, config.dropout

    def extra_repr(self) -> str:
        return f"r={len(self.lora_a)}, scale={self.scale:g}, dropout={self.dropout}"


class LoraSite(Site):
    """A linear layer with adapters (`base` and `adapters` by name: see `Site`)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N], x's dtype."""
        if self.active is None:
            return adapted(x, self.base)
        of: Any = self.adapters[self.active]
        p = of.dropout if self.training else 0.0
        return adapted(x, self.base, of.lora_a, of.lora_b, scale=of.scale, dropout_p=p)


class LoraAdapter(Adapter):
    """`sites`: by the names of their layers in the base."""

    def __init__(self, model: nn.Module, config: LoraConfig, name: str, sites: dict[str, LoraSite]) -> None:
        super().__init__(model, config, name)
        self.sites = sites

    def weights(self) -> dict[str, Any]:
        """LoraWeights by the names of the layers."""
        return {place: site.adapters[self.name] for place, site in self.sites.items()}

    def modules(self) -> list[nn.Module]:
        return list(self.weights().values())

    def parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{place}.{key}": p for place, weights in self.weights().items() for key, p in weights.named_parameters()
        }

    def activate(self, on: bool) -> None:
        for site in self.sites.values():
            site.active = self.name if on else None

    def remove(self) -> None:
        leave(self.model, self.sites, self.name)


def attach(model: nn.Module, config: LoraConfig, name: str) -> LoraAdapter:
    """Sites at the targets. Raises ValueError before it changes anything."""
    at = _targets(model, config)
    made = {place: LoraWeights(original(there), config) for place, there in at.items()}
    sites = {place: there if isinstance(there, LoraSite) else LoraSite(there) for place, there in at.items()}
    for place, site in sites.items():
        site.adapters[name] = made[place].train(site.training)
    replace(model, {at[place]: site for place, site in sites.items() if at[place] is not site})
    return LoraAdapter(model, config, name, sites)


# ---- which layers ----------------------------------------------------------------------------------------------------


def _targets(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """What stands at the layers that the config names, by their names. Raises ValueError."""
    parents: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for child in module._modules.values():
            parents.setdefault(id(child), []).append(module)
    heads = [f"{name}." for name, there in walk(model) if isinstance(there, TaskHead)]
    layers = {name: there for name, there in walk(model) if _is_linear(original(there))}
    inside = {name: head[:-1] for name in layers for head in heads if f"{name}.".startswith(head)}
    if config.targets is None:
        outputs = transformers.output_embeddings(model)
        chosen = [name for name, there in layers.items() if name not in inside and id(original(there)) not in outputs]
    else:
        chosen = [name for target in config.targets for name in _named(target, layers, model, inside)]
    why = {name: _why_not(layers[name], parents.get(id(layers[name]), [])) for name in dict.fromkeys(chosen)}
    refused = {name: reason for name, reason in why.items() if reason is not None}
    if refused and (config.targets is not None or len(refused) == len(why) or any(map(_is_foreign, layers.values()))):
        raise ValueError(f"fastpeft.attach: {len(refused)} layers cannot have LoRA{_rows(refused)}")
    if not why:
        raise ValueError(
            f"fastpeft.attach: this {type(model).__name__} has no linear layer for LoRA. Looked for torch.nn.Linear, "
            "fastpeft.nn.Linear4bit and transformers' Conv1D, outside output embeddings and the task head"
        )
    if refused:
        warnings.warn(
            f"fastpeft.attach left {len(refused)} layers without LoRA{_rows(refused)}", UserWarning, stacklevel=6
        )
    return {name: layers[name] for name, reason in why.items() if reason is None}


def _rows(reasons: Mapping[str, str]) -> str:
    return "".join(f"\n  {name or 'the model'}: {reason}" for name, reason in reasons.items())


def _named(target: str, layers: Mapping[str, nn.Module], model: nn.Module, inside: Mapping[str, str]) -> list[str]:
    """The layers that one of `targets` names: its whole name, or as `fp.quantize` matches `skip`."""
    found = [target] if target in layers else [name for name in layers if matches(target, name)]
    taken = [name for name in found if name in inside]
    if taken:
        raise ValueError(
            f"fastpeft.attach: targets has {target!r}, but {taken[0]!r} belongs to {inside[taken[0]]!r}, which is trained whole"
        )
    if found:
        return found
    known = sorted({name.rpartition(".")[2] for name in layers})
    near = difflib.get_close_matches(target, {part for name in layers for part in (name, *name.split("."))}, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(
        f"fastpeft.attach: targets has {target!r}, which is no linear layer of this {type(model).__name__}{hint}. "
        f"It has: {', '.join(known)}"
    )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or transformers.is_conv1d(module)


def _is_foreign(module: nn.Module) -> bool:
    """bitsandbytes' own"""
    return type(original(module)).__module__.startswith("bitsandbytes.")


def _why_not(there: nn.Module, parents: list[nn.Module]) -> str | None:
    """Why a linear layer cannot have LoRA."""
    module = original(there)
    if isinstance(there, LoraSite):
        return None
    if not parents:
        return "it is the model itself, which cannot be replaced in place: fp.nn.LoraLinear(layer) is for one layer"
    if len(parents) > 1:
        return "it stands at several places, and PEFT's files have one name for it"
    if isinstance(parents[0], LoraLinear):
        return "it is the base of a fastpeft.nn.LoraLinear"
    if _is_foreign(module):
        return (
            f"it is bitsandbytes' {type(module).__name__}; put fp.nn.Linear4bit.from_bitsandbytes(layer) in its place, or "
            "load the model dense and fp.quantize it"
        )
    if isinstance(module, Linear4bit):
        return "it has hooks, or a forward of its own" if hooked(module) else None
    return why_dense(module, parents[0])


def _shape(layer: Any) -> tuple[int, int]:
    """(N, K)"""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    k, n = layer.weight.shape
    return n, k
