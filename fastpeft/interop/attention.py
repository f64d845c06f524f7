"""Prefixes in transformers' models: the attention function and the mask function that they run with, and the hooks.

transformers finds its attention by a name in the configuration. `NAME` is registered when this file is imported: only
attaching does so, and unpickling a model that has a prefix. No source is touched; what a model gets is

    its configuration       the attention's name, while a prefix is active
    each attention layer    a child `fastpeft_prefix` (`Prefixes`), which holds an `nn.PrefixAttention` an adapter, and a
                            pre-hook that adds the layer's input to the keywords that go on to the attention function
    where positions enter   (the embedding of positions, or rotary_emb) a pre-hook that adds P to them, whoever made them
    the model of the layers a pre-hook that checks the batch against `prefix_rows`
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.utils.import_utils import is_tracing

from ..nn.prefix_attention import Prefixes

NAME = "fastpeft_prefix"  # of the attention function, and of each attention layer's child
CAPTURE = "fastpeft_capture"  # of the attention function that keeps the keys and values of one run
HIDDEN = "fastpeft_hidden_states"  # the keyword by which a layer's input reaches the attention function
CAPTURED = "_fastpeft_captured"
NOT_COMPUTED = ("softcap", "position_bias", "s_aux")  # keywords of other attention functions
LEARNED = ("position_embeddings", "position_embedding", "embed_positions", "wpe")

# ---- what runs ----------------------------------------------------------------------------------------------------------


class Selection:
    """Which prefix a model runs with: one object that its layers and hooks share."""

    def __init__(self, config: Any) -> None:
        self.config, self.original = config, config._attn_implementation  # the attention without a prefix
        self.starts: dict[str, int] = {}  # by adapter: the position of the first token
        self.active: str | None = None
        self.rows: tuple[str, ...] | None = None  # in a mixed batch: what `index` counts
        self.index: torch.Tensor | None = None  # int32 [B], -1 = none
        self.row_starts: torch.Tensor | None = None  # int64 [B, 1]
        self.start = 0  # the largest in use

    def activate(self, name: str | None) -> None:
        self.active, self.rows, self.index, self.row_starts = name, None, None, None
        self.start = self.starts[name] if name is not None else 0
        self._switch()

    def mix(self, names: tuple[str, ...], index: torch.Tensor) -> None:
        starts = torch.tensor([*(self.starts[name] for name in names), 0], device=index.device)
        self.rows, self.index = names, index
        self.row_starts = starts[index.long()][:, None]  # [-1] is the 0 of rows that have none
        self.start = int(self.row_starts.max())
        self._switch()

    def on(self) -> bool:
        return self.active is not None or self.rows is not None

    def _switch(self) -> None:
        if self.on():
            if self.config._attn_implementation != NAME:
                self.original = self.config._attn_implementation
            self.config._attn_implementation = NAME
        elif self.config._attn_implementation == NAME:
            self.config._attn_implementation = self.original


_NONE = Prefixes(SimpleNamespace(active=None, rows=None))


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query [B, H, T, D], key and value [B, Hk, S, D] -> ([B, T, H, D], None).

    attention_mask: None; a padding mask, bool [B, S'] (keys from S' on are a static cache's empty slots); or [b, h, T, S].
    A layer without a prefix runs the same op with an empty one.
    """
    for name in NOT_COMPUTED:
        if others.get(name) is not None:
            raise ValueError(f"prefix attention: {type(module).__name__} passes {name}, which is not computed here")
    is_causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    padding = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
    if padding is not None and padding.shape[1] < key.shape[2]:
        key, value = key[:, :, : padding.shape[1]], value[:, :, : padding.shape[1]]
    prefixes = module._modules.get(NAME, _NONE)
    out = prefixes(
        query,
        key,
        value,
        others.get(HIDDEN),
        is_causal=is_causal,
        key_padding_mask=padding,
        attn_mask=attention_mask if padding is None else None,
        dropout_p=dropout,
        scale=scaling,
    )
    return out.transpose(1, 2), None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,  # int, or a tensor of a static cache
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> torch.Tensor | None:
    """transformers' mask function: None, a padding mask bool [B, S'] where that says all, or `sdpa_mask`'s [B, 1, T, S].

    A causal mask says all by its padding where the last query sees the last of S' keys: those of a dynamic cache, or the
    filled ones of a static cache. While compiling neither values nor a static cache's length are looked at.
    """
    causal = mask_function is causal_mask_function
    plain = (
        allow_is_causal_skip if causal else allow_is_bidirectional_skip and mask_function is bidirectional_mask_function
    )
    if plain and not (isinstance(q_offset, torch.Tensor) and is_tracing(q_offset)):
        filled = int(q_offset) + q_length - kv_offset if causal else kv_length
        if 0 < filled <= kv_length:
            return _padding(attention_mask, batch_size, filled, kv_length, kv_offset, device)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        # sdpa's is_causal is aligned at the top left, the op's at the bottom right: the same where T = S
        allow_is_causal_skip=allow_is_causal_skip and q_length in (1, kv_length),
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        use_vmap=use_vmap,
        device=device,
    )


def _padding(
    attention_mask: torch.Tensor | None, batch: int, filled: int, kv_length: int, kv_offset: int, device: Any
) -> torch.Tensor | None:
    if attention_mask is not None:
        seen = prepare_padding_mask(attention_mask, kv_length, kv_offset)[:, kv_offset : kv_offset + filled]
        if is_tracing(seen) or not seen.all():
            return seen.expand(batch, -1)
    return None if filled == kv_length else torch.ones(batch, filled, dtype=torch.bool, device=device)


def capture(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *call: Any, **others: Any
) -> Any:
    """`attention`, which leaves its number of heads, keys and values on the layer."""
    module.__dict__.setdefault(CAPTURED, []).append((query.shape[1], key, value))
    return attention(module, query, key, value, *call, **others)


AttentionInterface.register(NAME, attention)
AttentionInterface.register(CAPTURE, capture)
AttentionMaskInterface.register(NAME, mask)
AttentionMaskInterface.register(CAPTURE, mask)

# ---- hooks --------------------------------------------------------------------------------------------------------------


def hand_over(selection: Selection, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Pre-hook of an attention layer: its input goes on to the attention function, where a prefix in use has token gates."""
    if not selection.on():
        return None
    if module.config._attn_implementation != NAME:
        now = module.config._attn_implementation
        raise RuntimeError(
            f"the attention was set to {now!r} while a prefix is active, which would leave the prefix out; "
            "call fp.detach, or fp.activate(model, None), first"
        )
    used = module._modules[NAME].in_use()
    if not any(prefix is not None and prefix.gates in ("token", "token+layer") for prefix in used):
        return None
    return args, kwargs | {HIDDEN: kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]}


def shift(
    selection: Selection, name: str, at: int, limit: int | None, module: nn.Module, args: tuple, kwargs: dict
) -> tuple[tuple, dict] | None:
    """Pre-hook of where positions enter: they start at P, or in a mixed batch where each row's prefix ends."""
    if selection.start == 0:
        return None
    ids = kwargs[name] if name in kwargs else args[at]
    moved = ids + (selection.start if selection.row_starts is None else selection.row_starts)
    if limit is not None:
        most = limit - selection.start
        values = not is_tracing(ids) and ids.device.type == "cpu" and ids.numel() > 0  # elsewhere looking would wait
        if ids.shape[-1] > most or (values and int(moved.max()) >= module.num_embeddings):
            raise ValueError(
                f"prefix attention: the model has {limit} positions, of which the prefix takes "
                f"{selection.start}: at most {most} tokens, got {ids.shape[-1]} at positions up to {ids.max()}"
            )
        if module.padding_idx is not None:  # RoBERTa's: padding has one position of its own
            moved = torch.where(ids == module.padding_idx, ids, moved)
    return (args, kwargs | {name: moved}) if name in kwargs else ((*args[:at], moved, *args[at + 1 :]), kwargs)


def check_rows(selection: Selection, module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Pre-hook of the model: a mixed batch has as many rows as its index."""
    if selection.index is None:
        return
    given = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), kwargs.get("pixel_values"), *args]
    rows = next((x.shape[0] for x in given if isinstance(x, torch.Tensor)), 0)
    if rows != selection.index.shape[0]:
        raise ValueError(
            f"prefix_rows: index names the prefixes of {selection.index.shape[0]} rows, the batch has {rows}"
        )


# ---- where a model takes them -------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """An attention layer."""

    name: str
    module: nn.Module
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int


class Host(NamedTuple):
    """The model whose layers take prefixes."""

    model: Any
    layers: list[Layer]
    entries: list[tuple[nn.Module, str, int, int | None]]  # where positions enter: module, argument, its place, limit
    limit: int | None  # of positions, of learned ones after padding's


def find(model: nn.Module) -> Host:
    """The attention layers of a model and where its positions enter.

    The model runs once, on one token or on a blank image, so that what the layers compute is known and not guessed.

    Raises:
        ValueError: there is no such model, or it has attention that is not computed here.
    """
    owner, named = _stack(model)
    who, config = f"prefix attention: {type(owner).__name__}", named[0][1].config
    if not owner._can_set_attn_implementation():
        raise ValueError(f"{who} does not run through transformers' attention interface")
    if config._attn_implementation == NAME and NAME not in named[0][1]._modules:
        with_prefix = "shares its configuration object with a model that has a prefix"
        raise ValueError(f"{who} {with_prefix}; give it its own: copy.deepcopy(config)")
    for _, module in named:
        forward = inspect.signature(module.forward).parameters.values()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in forward):
            raise ValueError(f"{who}: {type(module).__name__} passes no keywords on to the attention function")
    entries = list(_entries(owner))
    if not entries and owner.main_input_name != "pixel_values":
        wanted = f"a rotary embedding that takes position_ids, or an nn.Embedding named one of {', '.join(LEARNED)}"
        raise ValueError(f"{who}: its tokens cannot be moved behind a prefix; looked for {wanted}")
    limits = [limit for *_, limit in entries if limit is not None]
    limit = min(limits) if limits else getattr(config, "max_position_embeddings", None) if entries else None
    return Host(owner, _layers(who, owner, named), entries, limit)


def _stack(model: nn.Module) -> tuple[Any, list[tuple[str, Any]]]:
    """The model of transformers with a stack of attention layers, and these by name, as `_can_record_outputs` names them."""
    owners = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    who = f"prefix attention: {type(model).__name__}"
    if not owners:
        raise ValueError(f"{who} has no model of transformers in it, whose attention layers a prefix is attached to")
    found: dict[str, list] = {}
    for name, module in model.named_modules():
        around = [outer for outer in owners if not outer or f"{name}.".startswith(f"{outer}.")]
        outer = max(around, key=len, default=None)  # the innermost
        if outer is not None and _is_attention(owners[outer], name, module):
            found.setdefault(outer, []).append((name, module))
    if any(owners[outer].config.is_encoder_decoder for outer in found):
        raise ValueError(f"{who} has an encoder and a decoder; only models of one stack of layers take a prefix")
    if len(found) > 1:
        stacks = ", ".join(f"{outer or 'itself'} ({type(owners[outer]).__name__})" for outer in found)
        raise ValueError(f"{who} has several stacks of attention layers; attach to one of them: {stacks}")
    if not found:
        raise ValueError(f"{who} has no attention layer that transformers names as one (_can_record_outputs)")
    ((inner, layers),) = found.items()
    around = min((outer for outer in owners if not outer or f"{inner}.".startswith(f"{outer}.")), key=len)
    whole, base = owners[around], owners[around].base_model  # an inner one may not take a batch (DINOv2's encoder)
    return base if any(module is layers[0][1] for module in base.modules()) else whole, layers


def _is_attention(owner: Any, name: str, module: nn.Module) -> bool:
    specs = (getattr(owner, "_can_record_outputs", None) or {}).get("attentions", [])
    for spec in specs if isinstance(specs, list) else [specs]:
        kind, part = getattr(spec, "target_class", spec), getattr(spec, "layer_name", None)
        if isinstance(kind, type) and isinstance(module, kind) and hasattr(module, "config"):
            return part is None or f".{part.strip('.')}." in f".{name}."
    return False


def _layers(who: str, owner: Any, named: list[tuple[str, Any]]) -> list[Layer]:
    """What each layer computes for one token."""
    config = named[0][1].config
    if owner.main_input_name == "input_ids":
        inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}
    elif owner.main_input_name == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        inputs = {"pixel_values": torch.zeros(1, config.num_channels, height, width)}
    else:
        raise ValueError(f"{who} reads {owner.main_input_name}; only models of text and of images take a prefix")
    try:
        calls = _run(owner, [module for _, module in named], inputs)
    except Exception as error:
        raise ValueError(f"{who} does not run with fastpeft's attention: {error}") from error
    layers = []
    for (name, module), call in zip(named, calls):
        if len(call) != 1:
            raise ValueError(f"{who}: {name} calls transformers' attention interface {len(call)} times, not once")
        heads, key, value = call[0]
        if key.shape != value.shape:
            got = f"{key.shape[-1]} and {value.shape[-1]}"
            raise ValueError(
                f"{who}: {name} has keys and values of different widths, {got}, which is not computed here"
            )
        layers.append(Layer(name, module, heads, key.shape[1], key.shape[3], config.hidden_size))
    return layers


@torch.no_grad()
def _run(model: Any, layers: list[nn.Module], inputs: dict[str, torch.Tensor]) -> list[list[tuple[int, Any, Any]]]:
    """For each layer the (heads, keys, values) of its calls in one run without dropout and without a prefix."""
    config, modules, selection = layers[0].config, list(model.modules()), selection_of(model)
    name, training = config._attn_implementation, [module.training for module in modules]
    active = selection.active if selection is not None else None
    reads = {"use_cache": False} if "input_ids" in inputs else {}
    try:
        if selection is not None:
            selection.activate(None)
        model.eval()
        config._attn_implementation = CAPTURE
        model(**{key: value.to(model.device) for key, value in inputs.items()}, **reads)
        return [layer.__dict__.get(CAPTURED, []) for layer in layers]
    finally:
        config._attn_implementation = name
        if selection is not None:
            selection.activate(active)
        for module, was in zip(modules, training):
            module.training = was
        for layer in layers:
            layer.__dict__.pop(CAPTURED, None)


def keys_values(host: Host, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys (after rotary) and values [Hk, P, D] that each layer of the frozen model computes for the tokens `ids` [P].

    One run at positions 0 to P − 1, without dropout, without a prefix.
    """
    calls = _run(host.model, [layer.module for layer in host.layers], {"input_ids": ids[None]})
    return [(key[0], value[0]) for ((_, key, value),) in calls]


def _entries(owner: nn.Module) -> Iterator[tuple[nn.Module, str, int, int | None]]:
    if owner.main_input_name == "pixel_values":  # an image's patches keep their places
        return
    for name, module in owner.named_modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            names = list(inspect.signature(module.forward).parameters)
            if "position_ids" in names:
                yield module, "position_ids", names.index("position_ids"), None
        elif type(module) is nn.Embedding and name.rpartition(".")[2] in LEARNED:
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            yield module, "input", 0, module.num_embeddings - first


# ---- putting them in and taking them out --------------------------------------------------------------------------------


def selection_of(model: nn.Module) -> Selection | None:
    """The selection of a model that has prefixes."""
    return next((module.selection for module in model.modules() if isinstance(module, Prefixes)), None)


def prepare(host: Host) -> Selection:
    """The host's selection; the first time its layers, hooks and children are made."""
    prefixes = host.layers[0].module._modules.get(NAME)
    if prefixes is not None:
        return prefixes.selection
    selection = Selection(host.layers[0].module.config)
    for layer in host.layers:
        layer.module.add_module(NAME, Prefixes(selection))
        layer.module.register_forward_pre_hook(partial(hand_over, selection), with_kwargs=True)
    for module, name, at, limit in host.entries:
        module.register_forward_pre_hook(partial(shift, selection, name, at, limit), with_kwargs=True)
    host.model.register_forward_pre_hook(partial(check_rows, selection), with_kwargs=True)
    return selection


def remove(model: nn.Module, selection: Selection) -> None:
    """Take out what `prepare` put in."""
    selection.activate(None)
    for module in list(model.modules()):
        if isinstance(module._modules.get(NAME), Prefixes):
            delattr(module, NAME)
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, partial) and hook.args and hook.args[0] is selection:
                del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
