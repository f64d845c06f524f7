"""Prefixes: prefix tuning, P-tuning v2, Adaptive Prefix Tuning (APT) and LLaMA-Adapter, in models of transformers.

`PrefixConfig` says what a prefix is and `nn.PrefixAttention` computes with it; `interop/attention.py` is how it gets into a
model. Files are PEFT's `prompt_embeddings` [P, 2·L·Hk·D] where that says all, else they have a tensor a layer and parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ..adapter_files import AdapterFileError
from ..nn.prefix_attention import GATES, INITS, STYLES, PrefixAttention, Prefixes
from . import peft_format
from .sites import Adapter

if TYPE_CHECKING:
    from ..adapter_files import AdapterFile
    from ..interop.attention import Host, Layer, Selection


@dataclass(frozen=True)
class PrefixConfig:
    """A prefix of trained keys and values in the attention layers (Li and Liang 2021), with APT's or LLaMA-Adapter's gates.

    Args:
        length: tokens in every layer, or a sequence with the number of each layer, 0 allowed.
        gates: None, "token", "layer" or "token+layer" (APT); on a causal model each query has its own token gates, from its
            own hidden state, so that they never see the future. See `fp.nn.PrefixAttention`.
        style: "joint" (one softmax), or "llama_adapter" (one of its own, scaled by tanh(g) a head, g = 0).
        mlp: width of an MLP a layer that makes keys and values while training; files hold its result, without the MLP.
        init: "random", N(0, 0.02); "zeros"; or token ids [P], P the longest length: the keys and values that the frozen
            model computes for real text at positions 0 to P − 1 (a layer of fewer tokens takes its first ones).
        position_start: where the positions of tokens start; None: behind the longest length. A prefix that was shortened
            after training keeps the old value. Models of images do not move their positions.
        log_bias: keep a bias a prefix token, added to its scores.
        modules_to_save: further modules that are trained and saved with it.

    Raises:
        ValueError: a value out of range.
    """

    length: int | Sequence[int] = 32
    gates: str | None = None
    style: str = "joint"
    mlp: int | None = None
    init: Any = "random"
    position_start: int | None = None
    log_bias: bool = False
    modules_to_save: Sequence[str] = ()

    method: ClassVar[str] = "prefix"

    def __post_init__(self) -> None:
        if isinstance(self.init, torch.Tensor):
            object.__setattr__(self, "init", self.init.tolist())
        for name in ("length", "init", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        lengths = self.length if isinstance(self.length, tuple) else (self.length,)
        if not lengths or not all(_is_count(n) for n in lengths) or not any(lengths):
            _bad(
                "length",
                "an int of at least 1, or a sequence of them, one a layer, 0 allowed but not for all",
                self.length,
            )
        for name, value, known in (("gates", self.gates, GATES), ("style", self.style, STYLES)):
            if not (value is None or isinstance(value, str)) or value not in known:
                _bad(name, f"one of {', '.join(map(repr, known))}", value)
        if self.mlp is not None and (not _is_count(self.mlp) or self.mlp == 0):
            _bad("mlp", "None or the width of the MLP, an int of at least 1", self.mlp)
        if self.position_start is not None and not _is_count(self.position_start):
            _bad("position_start", "None or an int of at least 0", self.position_start)
        if not isinstance(self.log_bias, bool):
            _bad("log_bias", "True or False", self.log_bias)
        if isinstance(self.init, tuple):
            if len(self.init) != max(lengths) or not all(_is_count(token) for token in self.init):
                _bad(
                    "init",
                    f"token ids [P] = [{max(lengths)}], P the longest length",
                    f"{len(self.init)} of {self.init[:8]}…",
                )
            if self.mlp is not None:
                _bad("init", "'random' or 'zeros' with an MLP, which makes the keys and values", "token ids")
        elif self.init not in INITS:
            _bad("init", "'random', 'zeros' or token ids [P]", self.init)
        elif self.style == "llama_adapter" and self.init == "zeros":
            _bad(
                "init",
                "'random' or token ids with style 'llama_adapter', where zeros behind g = 0 never train",
                "'zeros'",
            )

    def lengths(self, layers: int) -> tuple[int, ...]:
        """The length of each of so many layers. ValueError: another number of them is given."""
        if isinstance(self.length, tuple):
            if len(self.length) != layers:
                _bad("length", f"one int a layer, {layers} of them", f"{len(self.length)}")
            return self.length
        return (self.length,) * layers  # type: ignore[return-value]


Config = PrefixConfig


class PrefixAdapter(Adapter):
    """`prefixes`: an entry a layer, None where it has no tokens."""

    def __init__(
        self,
        model: nn.Module,
        config: PrefixConfig,
        name: str,
        selection: Selection,
        prefixes: list[PrefixAttention | None],
    ) -> None:
        super().__init__(model, config, name)
        self.selection, self.prefixes = selection, prefixes

    def given(self) -> list[PrefixAttention]:
        return [prefix for prefix in self.prefixes if prefix is not None]

    def modules(self) -> list[nn.Module]:
        return list(self.given())

    def parameters(self) -> dict[str, nn.Parameter]:
        named = [(i, prefix) for i, prefix in enumerate(self.prefixes) if prefix is not None]
        return {f"layers.{i}.{key}": value for i, prefix in named for key, value in prefix.named_parameters()}

    def activate(self, on: bool) -> None:
        self.selection.activate(self.name if on else None)

    def remove(self) -> None:
        del self.selection.starts[self.name]
        for module in _layers(self.model):
            module._modules.pop(self.name, None)
        if not self.selection.starts:
            _interop().remove(self.model, self.selection)


def attach(model: nn.Module, config: PrefixConfig, name: str) -> PrefixAdapter:
    """Put a prefix into every attention layer of a transformers model; it starts inactive, and the model is frozen by others.

    Raises:
        ValueError: the model is not one of transformers, has no attention layers that run through its attention interface,
            or several stacks of them, or attention that the op does not compute; no place for the prefix within the model's
            positions; another number of layers, or tokens, than the config gives. The model is as it was.
    """
    attention = _interop()
    host = attention.find(model)
    lengths = config.lengths(len(host.layers))
    start = _start(host, config, lengths)
    text = attention.keys_values(host, _token_ids(host, config)) if isinstance(config.init, tuple) else None
    prefixes = [_prefix(layer, length, config) if length else None for layer, length in zip(host.layers, lengths)]
    for i, (prefix, length) in enumerate(zip(prefixes, lengths)):
        if prefix is not None and text is not None:
            prefix.set_keys_values(*(x[:, :length] for x in text[i]))
    selection = attention.prepare(host)
    selection.starts[name] = start
    for layer, prefix in zip(host.layers, prefixes):
        if prefix is not None:
            layer.module._modules[attention.NAME][name] = prefix.train(layer.module.training)
    return PrefixAdapter(model, config, name, selection, prefixes)


@contextmanager
def prefix_rows(
    model: nn.Module, index: torch.Tensor | Sequence[int], names: Sequence[str] | None = None
) -> Iterator[None]:
    """In this context row b of every batch runs with the prefix names[index[b]], or, at −1, with none.

    Args:
        model: has prefixes of one style attached. index: int [B]. names: of attached prefixes; None: all, as attached.

    The positions of a row start where its own prefix ends; at −1 the row computes what the base does, to rounding. The
    prefix that is active before is so again behind it.

    Raises:
        ValueError: no prefix is attached, an unknown name, an index out of range, or styles that differ.
    """
    selection = _interop().selection_of(model)
    if selection is None:
        raise ValueError("prefix_rows: the model has no prefix attached")
    names = tuple(selection.starts) if names is None else tuple(names)
    unknown = [name for name in names if name not in selection.starts]
    if unknown or not names:
        _bad("names", f"attached prefixes ({', '.join(selection.starts)})", unknown or names, "prefix_rows")
    layers = _layers(model)
    styles: set[Any] = {module[name].style for module in layers for name in names if name in module}
    if len(styles) > 1:
        _bad("names", "prefixes of one style", sorted(styles), "prefix_rows")
    index = torch.as_tensor(index)
    if index.dim() != 1 or index.dtype.is_floating_point or not ((index >= -1) & (index < len(names))).all():
        _bad("index", f"[B] ints from −1 to {len(names) - 1}", index.tolist(), "prefix_rows")
    device = next(model.parameters()).device
    before = selection.active
    try:
        selection.mix(names, index.to(device, torch.int32))
        for module in layers:
            module.mix(device)
        yield
    finally:
        selection.activate(before)
        for module in layers:
            module.offsets = None


# ---- files --------------------------------------------------------------------------------------------------------------

HEADS = "base_model."  # before the names of task heads: PEFT has the model itself there
_SHAPE = ("num_virtual_tokens", "num_layers", "token_dim", "num_attention_heads")
_HONOURED = (*_SHAPE, "prefix_projection", "encoder_hidden_size", "init_weights", "modules_to_save")


def to_file(adapter: PrefixAdapter) -> tuple[dict[str, Any], dict[str, torch.Tensor], str | None]:
    """(adapter_config.json, tensors, why the file is not PEFT's or None): PEFT's form where that can say all."""
    first, config = adapter.given()[0], adapter.config
    reason = _not_peft(adapter)
    if reason is None:
        pairs = [torch.stack(_whole_keys_values(prefix)) for prefix in adapter.given()]  # [2, Hk, P, D] a layer
        flat = torch.stack(pairs).permute(3, 0, 1, 2, 4).reshape(first.length, -1)
        described = {
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": first.length,
            "token_dim": first.kv_heads * first.head_dim,
            "num_attention_heads": first.kv_heads,
            "num_layers": len(adapter.prefixes),
            "num_transformer_submodules": 1,
            "prefix_projection": False,
            "encoder_hidden_size": first.kv_heads * first.head_dim,
            "init_weights": None,
            "inference_mode": True,
        }
        return described, {"prompt_embeddings": flat.detach()}, None
    own = {
        "method": config.method,
        "version": 1,
        "length": [0 if prefix is None else prefix.length for prefix in adapter.prefixes],
        "gates": config.gates,
        "style": config.style,
        "position_start": adapter.selection.starts[adapter.name],
        "log_bias": config.log_bias,
    }
    tensors: dict[str, torch.Tensor] = {}
    for i, prefix in enumerate(adapter.prefixes):
        if prefix is not None:
            named = dict(zip(("prefix_k", "prefix_v"), _whole_keys_values(prefix)))
            named |= {key: getattr(prefix, key) for key in _names(config)[2:]}
            tensors |= {f"layers.{i}.{key}": value.detach() for key, value in named.items()}
    return {"fastpeft": own}, tensors, reason


class _KeysValues(nn.Module):
    def __init__(self, prefix: PrefixAttention) -> None:
        super().__init__()
        self.prefix = prefix

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.prefix.keys_values()


def _whole_keys_values(prefix: PrefixAttention) -> tuple[torch.Tensor, torch.Tensor]:
    """Of parameters gathered where FSDP2 holds them in shards: every rank must call."""
    state: dict[str, Any] = dict(_KeysValues(prefix).named_parameters())
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in state.items()}
    return torch.func.functional_call(_KeysValues(prefix), whole, ())


def _not_peft(adapter: PrefixAdapter) -> str | None:
    """What PEFT's form cannot say; None: it says all."""
    config, lengths = adapter.config, [0 if prefix is None else prefix.length for prefix in adapter.prefixes]
    shapes = {(prefix.kv_heads, prefix.head_dim) for prefix in adapter.given()}
    if config.gates is not None:
        return "PEFT's prefix has no gates"
    if config.style != "joint":
        return f"PEFT has no {config.style}-style prefix"
    if config.log_bias:
        return "PEFT's prefix has no log-bias"
    if len(set(lengths)) > 1 or len(shapes) > 1:
        return "PEFT's prefix has one length and shape for all layers"
    if adapter.selection.starts[adapter.name] != lengths[0]:
        return "PEFT's positions start behind the prefix"
    return None


def from_file(model: nn.Module, file: AdapterFile) -> PrefixConfig:
    """The config of a file of either form. AdapterFileError: it asks for what is not computed here."""
    config, own = file.config, file.config.get("fastpeft")
    if own is None:
        peft_format.refuse(config, _HONOURED, {"num_transformer_submodules": 1})  # 2: an encoder with a decoder
        fields = {"length": config.get("num_virtual_tokens")}
    else:
        peft_format.refuse(config, ("fastpeft", "modules_to_save"), {})
        fields = {key: value for key, value in own.items() if key not in ("method", "version")}
    unknown = set(fields) - {"length", "gates", "style", "position_start", "log_bias"}
    if unknown:
        raise AdapterFileError(f"adapter_config.json: a prefix has no {', '.join(sorted(unknown))!r:.200}")
    try:
        return PrefixConfig(**fields, modules_to_save=peft_format.heads(model, config))
    except (TypeError, ValueError) as error:
        raise AdapterFileError(f"adapter_config.json: {error}") from None


def expected(model: nn.Module, config: PrefixConfig, file_config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors of a file."""
    host = _interop().find(model)
    lengths = config.lengths(len(host.layers))
    _start(host, config, lengths)
    if "fastpeft" not in file_config:
        width = host.layers[0].kv_heads * host.layers[0].head_dim
        for key, value in {"num_layers": len(host.layers), "token_dim": width}.items():
            if file_config.get(key) not in (None, value):
                got = file_config[key]
                raise AdapterFileError(f"adapter_config.json: {key!r} must be {value} for this model, got {got!r:.200}")
        return {"prompt_embeddings": (lengths[0], 2 * len(host.layers) * width)}
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (layer, length) in enumerate(zip(host.layers, lengths)):
        if length:
            keys = (layer.kv_heads, length, layer.head_dim)
            known = {"prefix_k": keys, "prefix_v": keys, "token_gate": (length, layer.hidden_size), "layer_gate": (1,)}
            known |= {"gate_out": (layer.heads,), "log_bias": (length,)}
            shapes |= {f"layers.{i}.{key}": known[key] for key in _names(config)}
    return shapes


def load(adapter: PrefixAdapter, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy a file's tensors, read as `expected` says, into an adapter attached by `from_file`'s config."""
    flat = tensors.get("prompt_embeddings")
    if flat is not None:
        first, layers = adapter.given()[0], len(adapter.prefixes)
        pairs = flat.view(first.length, layers, 2, first.kv_heads, first.head_dim).permute(1, 2, 3, 0, 4)
        for prefix, (keys, values) in zip(adapter.given(), pairs):
            prefix.set_keys_values(keys, values)
        return
    for i, prefix in enumerate(adapter.prefixes):
        if prefix is not None:
            prefix.load_state_dict({key: tensors[f"layers.{i}.{key}"] for key in _names(adapter.config)})


def _names(config: PrefixConfig) -> list[str]:
    """The tensors of a layer in a file of ours."""
    have = {
        "prefix_k": True,
        "prefix_v": True,
        "token_gate": config.gates in ("token", "token+layer"),
        "layer_gate": config.gates in ("layer", "token+layer"),
        "gate_out": config.style == "llama_adapter",
        "log_bias": config.log_bias,
    }
    return [name for name, has in have.items() if has]


# ---- parts --------------------------------------------------------------------------------------------------------------


def _layers(model: nn.Module) -> list[Prefixes]:
    return [module for module in model.modules() if isinstance(module, Prefixes)]


def _prefix(layer: Layer, length: int, config: PrefixConfig) -> PrefixAttention:
    like = next(layer.module.parameters())
    return PrefixAttention(
        layer.heads,
        layer.kv_heads,
        layer.head_dim,
        length,
        hidden_size=layer.hidden_size,
        gates=config.gates,
        style=config.style,
        mlp=config.mlp,
        init=config.init if isinstance(config.init, str) else "random",
        log_bias=config.log_bias,
        dtype=torch.float64 if like.dtype == torch.float64 else torch.float32,
        device=like.device,
    )


def _start(host: Host, config: PrefixConfig, lengths: tuple[int, ...]) -> int:
    """The position of the first token."""
    if not host.entries:
        return 0
    start = max(lengths) if config.position_start is None else config.position_start
    if host.limit is not None and start >= host.limit:
        _bad(
            "length",
            f"below the {host.limit} positions of {type(host.model).__name__}, so that tokens have some",
            start,
        )
    return start


def _token_ids(host: Host, config: PrefixConfig) -> torch.Tensor:
    """int64 [P], checked against the vocabulary."""
    if host.model.main_input_name != "input_ids":
        _bad("init", f"'random' or 'zeros' for {type(host.model).__name__}, which reads no text", "token ids")
    ids, known = torch.tensor(config.init), host.model.get_input_embeddings().num_embeddings
    if int(ids.max()) >= known:
        _bad("init", f"token ids below {known}, the size of the vocabulary", int(ids.max()))
    return ids


def _interop() -> Any:
    """`interop.attention`, which imports transformers. ValueError where it is not installed."""
    try:
        from ..interop import attention
    except ModuleNotFoundError as error:
        raise ValueError(f"PrefixConfig: prefixes need transformers, which cannot be imported ({error})") from error
    return attention


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _bad(argument: str, wanted: str, got: object, where: str = "PrefixConfig") -> None:
    raise ValueError(f"{where}: {argument} must be {wanted}, got {got}")
