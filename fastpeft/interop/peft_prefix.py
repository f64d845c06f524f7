"""PEFT's prefix tuning on fastpeft's attention: `apply` swaps the PeftModel's class, `revert` swaps it back.

The prompt stays where PEFT has it, in `prompt_encoder`: its parameters, its `state_dict` and its files. Instead of a cache
that begins with the prompt, the model's attention layers read their keys and values from it (`Prompt`), through
`attention.py`; so gradient checkpointing, static caches, classifiers and `methods.prefix.prefix_rows` work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import peft
import torch
from torch import nn
from torch.nn.functional import linear

from ..nn.prefix_attention import PrefixAttention
from . import attention

if TYPE_CHECKING:
    Base = peft.PeftModel
else:
    Base = object

WITH_LABELS = ("input_ids", "attention_mask", "inputs_embeds", "labels")
OUTPUTS = ("output_attentions", "output_hidden_states", "return_dict", "task_ids")


class Prompt(PrefixAttention):
    """The prefix of one layer, read from a PEFT prompt encoder. It owns nothing."""

    encoder: Any

    def __init__(self, encoder: Any, layer: attention.Layer, length: int, index: int) -> None:
        nn.Module.__init__(self)
        self.heads, self.kv_heads, self.head_dim, self.length = layer.heads, layer.kv_heads, layer.head_dim, length
        self.gates, self.style, self.log_bias = None, "joint", None
        self.index = index
        self.__dict__["encoder"] = encoder  # no child: its parameters have one name

    def keys_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[Hk, P, D] each, of the embedding [P, 2·L·Hk·D]; with an MLP only this layer's part of it is computed."""
        encoder, width = self.encoder, 2 * self.kv_heads * self.head_dim
        prompt = encoder.embedding.weight
        mine = slice(self.index * width, (self.index + 1) * width)
        if hasattr(encoder, "transform"):
            first, activation, last = encoder.transform
            prompt = linear(activation(first(prompt)), last.weight[mine], last.bias[mine])
        else:
            prompt = prompt[:, mine]
        keys, values = prompt.view(self.length, 2, self.kv_heads, self.head_dim).permute(1, 2, 0, 3).unbind()
        return keys, values


class FastPrefix(Base):
    """Runs the base model, whose attention has the prefix; over the PEFT class that stands behind it."""

    arguments: tuple[str, ...]
    drops_token_types = False  # as PEFT does

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's; positions that are given start behind the prefix too."""
        self._select()
        given = dict(zip(self.arguments, args, strict=False)) | kwargs
        given.pop("task_ids", None)
        if self.drops_token_types and not self._adapters_disabled:
            given.pop("token_type_ids", None)
        return self.base_model(**{key: value for key, value in given.items() if value is not None})

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self._select()
        return super().generate(*args, **kwargs)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """As PEFT's, which swaps methods and fails on a model that cannot generate."""
        before = self._adapters_disabled
        try:
            self._adapters_disabled = True
            self._select()
            yield
        finally:
            self._adapters_disabled = before
            self._select()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        _drop(self, adapter_name)

    def _select(self) -> None:
        """Run with the active adapter's prefix, unless rows have their own or adapters are disabled."""
        selection: Any = attention.selection_of(self)
        name = None if self._adapters_disabled else self.active_adapter or None  # [] when the last one was deleted
        if name is not None and name not in selection.starts:  # added since
            _add(self, name)
        if selection.rows is None and selection.active != name:
            selection.activate(name)


class FastPrefixCausalLM(FastPrefix, peft.PeftModelForCausalLM):
    peft_class, arguments, drops_token_types = peft.PeftModelForCausalLM, (*WITH_LABELS, *OUTPUTS), True

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, *args: Any, task_ids: Any = None, **kwargs: Any
    ) -> Any:
        return self.base_model_prepare_inputs_for_generation(*args, **kwargs)


class FastPrefixSequenceClassification(FastPrefix, peft.PeftModelForSequenceClassification):
    peft_class, arguments = peft.PeftModelForSequenceClassification, (*WITH_LABELS, *OUTPUTS)


class FastPrefixTokenClassification(FastPrefix, peft.PeftModelForTokenClassification):
    peft_class, arguments = peft.PeftModelForTokenClassification, (*WITH_LABELS, *OUTPUTS)


class FastPrefixQuestionAnswering(FastPrefix, peft.PeftModelForQuestionAnswering):
    peft_class = peft.PeftModelForQuestionAnswering
    arguments = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "start_positions",
                 "end_positions", *OUTPUTS)  # fmt: skip


class FastPrefixFeatureExtraction(FastPrefix, peft.PeftModelForFeatureExtraction):
    peft_class, arguments, drops_token_types = peft.PeftModelForFeatureExtraction, (*WITH_LABELS[:3], *OUTPUTS), True


CLASSES = {fast.peft_class: fast for fast in FastPrefix.__subclasses__()}


def apply(model: Any) -> None:
    """Swap the class of one PEFT model with prefix tuning, which is not fast yet. ValueError: why it stays as it is."""
    if type(model) not in CLASSES:
        raise ValueError(f"no fast path for a {type(model).__name__} with prefix tuning")
    host = attention.find(model.base_model)
    for name in model.peft_config:
        _check(model, name, host)
    attention.prepare(host)
    _own_methods(model)
    model.__class__ = CLASSES[type(model)]
    for name in model.peft_config:
        _add(model, name, host)
    model._select()


def revert(model: Any) -> None:
    """Give PEFT's own class back, and the base its attention."""
    attention.remove(model.base_model, attention.selection_of(model))
    model.__class__ = model.peft_class


def _check(model: Any, name: str, host: attention.Host) -> None:
    config, layers = model.peft_config[name], host.layers
    shape = {(layer.kv_heads, layer.head_dim) for layer in layers}
    heads, width = config.num_attention_heads, config.token_dim
    if config.num_transformer_submodules != 1 or config.num_layers != len(layers) or shape != {(heads, width // heads)}:
        raise ValueError(
            f"adapter {name!r} has a prompt for {config.num_layers} layers of {heads} heads and {width} numbers, the model has "
            f"{len(layers)} of (heads, head dimension) {sorted(shape)}"
        )
    if host.limit is not None and config.num_virtual_tokens >= host.limit:
        raise ValueError(f"adapter {name!r} takes all of the model's {host.limit} positions")


def _add(model: Any, name: str, host: attention.Host | None = None) -> None:
    """A Prompt in each layer."""
    host = attention.find(model.base_model) if host is None else host
    _check(model, name, host)
    length = model.peft_config[name].num_virtual_tokens
    for i, layer in enumerate(host.layers):
        prefixes: Any = layer.module._modules[attention.NAME]
        prefixes[name] = Prompt(model.prompt_encoder[name], layer, length, i)
    attention.selection_of(model).starts[name] = length if host.entries else 0


def _drop(model: Any, name: str) -> None:
    selection: Any = attention.selection_of(model)
    if selection.active == name:
        selection.activate(None)
    selection.starts.pop(name, None)
    for module in model.modules():
        if isinstance(module, attention.Prefixes):
            module._modules.pop(name, None)


def _own_methods(model: Any) -> None:
    """PEFT's `disable_adapter` leaves bound methods behind, which would hide the new class's."""
    for name in ("forward", "prepare_inputs_for_generation"):
        bound = model.__dict__.get(name)
        if getattr(bound, "__self__", None) is model:
            del model.__dict__[name]
