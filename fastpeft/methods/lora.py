"""LoRA on the linear layers of a plain model (Hu et al. 2021), dense or in 4 bits, in PEFT's files."""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..adapter_files import AdapterFile, AdapterFileError
from ..interop import transformers
from ..nn import Linear4bit, LoraLinear
from ..nn.lora_linear import adapted
from ..quantization import hooked, matches, parts, why_dense
from . import peft_format
from .sites import Adapter, Site, TaskHead, leave, original, replace, walk


@dataclass(frozen=True)
class LoraConfig:
    """y = x Wᵀ + bias + scale · (drop(x) Aᵀ) Bᵀ on the linear layers of a model (Hu et al. 2021, equation 3).

    Args:
        r: rank, at least 1. alpha: scale is alpha/r, or alpha/√r where `rslora`.
        dropout: probability of dropping an element of x before A, in training.
        targets: None: every linear layer but output embeddings and the task head. Or names and patterns as `fp.quantize`
            takes them in `skip`; the whole name of a layer is that layer alone.
        modules_to_save: names or patterns, whole or of the last components, of modules that are trained whole, beside the
            task head.

    Raises:
        TypeError, ValueError: a field of another type, or out of range.
    """

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
        if not _is_number(self.alpha) or not abs(self.alpha) <= torch.finfo(torch.float32).max:
            raise ValueError(f"LoraConfig: alpha must be a finite number, got {self.alpha!r}")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"LoraConfig: dropout must be a number in [0, 1), got {self.dropout!r}")
        if not isinstance(self.rslora, bool):
            raise TypeError(f"LoraConfig: rslora must be a bool, got {self.rslora!r}")
        for field in ("targets", "modules_to_save"):
            names = getattr(self, field)
            if names is None and field == "targets":
                continue
            if isinstance(names, str) or not isinstance(names, Iterable):
                raise TypeError(f"LoraConfig: {field} must be a sequence of module names, got {names!r}")
            object.__setattr__(self, field, tuple(names))
            if field == "targets" and not self.targets:
                raise ValueError("LoraConfig: targets must be None or name a layer, got none")
            if not all(isinstance(name, str) for name in getattr(self, field)):
                raise TypeError(f"LoraConfig: {field} must be a sequence of module names, got {getattr(self, field)!r}")

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / √r (rank-stabilised LoRA: Kalajdzievski 2023)."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


Config = LoraConfig


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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
        modules = self._modules  # past __getattr__, which takes 1 µs a name
        if self.active is None:
            return adapted(x, modules["base"])
        of: Any = modules["adapters"]._modules[self.active]
        a, b = of._parameters["lora_a"], of._parameters["lora_b"]
        return adapted(x, modules["base"], a, b, scale=of.scale, dropout_p=of.dropout if self.training else 0.0)


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


# ---- files -----------------------------------------------------------------------------------------------------------

HEADS = "base_model.model."  # before every name, those of task heads too

# Of PEFT's other options no trained adapter's forward depends on these, in their default or any value.
_HONOURED = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "modules_to_save", "init_lora_weights")
_SELECT = ("exclude_modules", "layers_to_transform", "layers_pattern")  # what they select is what the file holds
_IDLE = ("fan_in_fan_out", "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "runtime_config")
_INIT = (None, True, False, "gaussian", "eva", "orthogonal")  # those that leave the base as it is


def to_file(adapter: LoraAdapter) -> tuple[dict[str, Any], dict[str, torch.Tensor], None]:
    """PEFT's files, which say all."""
    config = adapter.config
    tensors = {}
    for place, weights in adapter.weights().items():
        tensors[f"{HEADS}{place}.lora_A.weight"] = weights.lora_a
        tensors[f"{HEADS}{place}.lora_B.weight"] = weights.lora_b
    layers = [site.base for site in adapter.sites.values()]
    about = {
        "peft_type": "LORA",
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "bias": "none",
        "fan_in_fan_out": all(map(transformers.is_conv1d, layers)),
        "target_modules": _peft_targets(adapter.model, list(adapter.sites)),
    }
    return about, tensors, None


def _peft_targets(model: nn.Module, places: list[str]) -> list[str] | str:
    """Names that PEFT takes for these modules alone: it compares their ends, so it may take a regular expression."""
    others = [name for name, _ in walk(model) if name not in places]
    ends = {end for name in others for end in parts(name, ends_only=True)}
    return places if ends.isdisjoint(places) else "|".join(map(re.escape, places))


def from_file(model: nn.Module, file: AdapterFile) -> LoraConfig:
    """`targets` are whole names. Raises AdapterFileError."""
    config = file.config
    peft_format.refuse(config, (*_HONOURED, *_SELECT, *_IDLE), {"bias": "none"})
    init = config.get("init_lora_weights")
    if not isinstance(init, (str, bool, type(None))) or init not in _INIT:
        raise AdapterFileError(
            f"adapter_config.json: 'init_lora_weights' is {init!r:.200}, which changed the base model's weights. Convert the "
            "adapter with PEFT (save_pretrained's path_initial_model_for_weight_conversion)"
        )
    heads = peft_format.heads(model, config)
    try:
        return LoraConfig(
            config.get("r", 8),
            config.get("lora_alpha", 8),
            config.get("lora_dropout", 0.0),
            _file_targets(model, file, heads),
            heads,
            config.get("use_rslora") or False,
        )
    except (TypeError, ValueError) as error:
        raise AdapterFileError(f"adapter_config.json: {str(error):.300}") from None


def _file_targets(model: nn.Module, file: AdapterFile, heads: list[str]) -> list[str]:
    """The layers of the file, as PEFT finds them by the ends of their names.

    Where a pattern says which, they are those that the file has tensors for: a regular expression may take for ever.
    """
    targets = file.config.get("target_modules")
    if isinstance(targets, str) or any(file.config.get(key) for key in _SELECT):
        both = ".lora_A.weight", ".lora_B.weight"
        held = {key.removesuffix(end).removeprefix(HEADS) for key in file.tensors for end in both if key.endswith(end)}
        found = [name for name in _layers(model) if name in held]
    else:
        ends = set(peft_format.names(file.config, "target_modules"))
        saved = set(peft_format.names(file.config, "modules_to_save"))
        found = [name for name in _layers(model) if not ends.isdisjoint(parts(name, ends_only=True))]
        found = [name for name in found if saved.isdisjoint(parts(name))]
    found = [name for name in found if not f"{name}.".startswith(tuple(f"{head}." for head in heads))]
    if not found:
        raise AdapterFileError(
            f"adapter_config.json: 'target_modules' is {targets!r:.200}, which names no linear layer of this "
            f"{type(model).__name__}. It has: {', '.join(_ends(_layers(model)))}"
        )
    return found


def expected(model: nn.Module, config: LoraConfig, file_config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the file's tensors."""
    shapes: dict[str, tuple[int, ...]] = {}
    for place, there in _targets(model, config).items():
        n, k = _shape(original(there))
        shapes[f"{HEADS}{place}.lora_A.weight"] = config.r, k
        shapes[f"{HEADS}{place}.lora_B.weight"] = n, config.r
    return shapes


@torch.no_grad()
def load(adapter: LoraAdapter, tensors: Mapping[str, torch.Tensor]) -> None:
    """Into its parameters, whatever the file's dtype."""
    for place, weights in adapter.weights().items():
        weights.lora_a.copy_(tensors[f"{HEADS}{place}.lora_A.weight"])
        weights.lora_b.copy_(tensors[f"{HEADS}{place}.lora_B.weight"])


# ---- which layers ----------------------------------------------------------------------------------------------------


def _targets(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """What stands at the layers that the config names, by their names. Raises ValueError."""
    parents: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for child in module._modules.values():
            parents.setdefault(id(child), []).append(module)
    heads = [f"{name}." for name, there in walk(model) if isinstance(there, TaskHead)]
    layers = _layers(model)
    inside = {name: head[:-1] for name in layers for head in heads if f"{name}.".startswith(head)}
    if config.targets is None:
        outputs = transformers.output_embeddings(model)
        chosen = [name for name, there in layers.items() if name not in inside and id(original(there)) not in outputs]
    else:
        chosen = [name for target in config.targets for name in _named(target, layers, model, inside)]
    why = {name: _why_not(layers[name], parents.get(id(layers[name]), [])) for name in dict.fromkeys(chosen)}
    refused = {name: reason for name, reason in why.items() if reason is not None}
    if refused and (
        config.targets is not None or len(refused) == len(why) or any(_is_foreign(layers[name]) for name in refused)
    ):
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
    near = difflib.get_close_matches(target, {part for name in layers for part in (name, *name.split("."))}, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(
        f"fastpeft.attach: targets has {target!r}, which is no linear layer of this {type(model).__name__}{hint}. "
        f"It has: {', '.join(_ends(layers))}"
    )


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """What stands at the linear layers of the base, by their names."""
    at = dict(walk(model))
    return {name: there for name, there in at.items() if _is_linear(original(there))}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or transformers.is_conv1d(module)


def _ends(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


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
        convert = type(module).__name__ == "Linear4bit"
        return (
            f"it is bitsandbytes' {type(module).__name__}; "
            f"{'put fp.nn.Linear4bit.from_bitsandbytes(layer) in its place, or ' if convert else ''}"
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
