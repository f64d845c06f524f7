"""save_adapter, load_adapter: any method's adapter with its task heads, through the one reader and writer."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ..adapter_files import fingerprint, open_adapter, write_adapter
from ..interop import transformers
from ..nn import Linear4bit
from . import METHODS, of_file
from .attach import activate, check, detach, install, pick, plain, record_of
from .peft_format import common
from .sites import original, walk


class Saved(NamedTuple):
    """What `save_adapter` wrote."""

    folder: str
    format: str  # "peft" or "fastpeft"
    reason: str

    def __str__(self) -> str:
        return f"{self.folder} is in {'PEFT' if self.format == 'peft' else 'fastpeft'}'s format: {self.reason}"


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], name: str | None) -> Saved:
    """See `fastpeft.save_adapter`."""
    model = plain(model)
    record, name = pick(model, name, "save_adapter")
    adapter, heads = record.attached[name]
    method = METHODS[adapter.config.method]
    config, tensors, why = method.to_file(adapter)
    for place, head in heads.items():
        tensors |= {f"{method.HEADS}{place}.{key}": t for key, t in head.adapters[name].state_dict().items()}
    tensors = {key: _whole(t) for key, t in tensors.items()}
    config = common(model) | {"modules_to_save": list(heads) or None} | config
    write_adapter(folder, config, tensors, base=fingerprint(_parameters(model, heads)))
    reason = f"PeftModel.from_pretrained(base, {os.fspath(folder)!r}) reads it" if why is None else why
    return Saved(os.fspath(folder), "peft" if why is None else "fastpeft", reason)


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str,
    *,
    check_base: bool,
    allow_nonfinite: bool,
    allow_edited: bool,
) -> None:
    """See `fastpeft.load_adapter`."""
    model = plain(model)
    check(model, name)
    with open_adapter(folder) as file:
        method = of_file(file.config)
        config = method.from_file(model, file)
        places = dict(walk(model))
        heads = {
            f"{method.HEADS}{place}.{key}": tuple(t.shape)
            for place in config.modules_to_save
            for key, t in original(places[place]).state_dict().items()
        }
        base = fingerprint(_parameters(model, config.modules_to_save)) if check_base and file.base is not None else None
        tensors = file.read(
            method.expected(model, config, file.config) | heads,
            base=base,
            allow_nonfinite=allow_nonfinite,
            allow_edited=allow_edited,
        )
    record = record_of(model)
    before = record.active if record else None
    attached = install(model, config, name, config.modules_to_save)
    try:
        method.load(attached.adapter, {key: t for key, t in tensors.items() if key not in heads})
        for place, head in attached.heads.items():
            start = f"{method.HEADS}{place}."
            state = {key.removeprefix(start): t for key, t in tensors.items() if key in heads and key.startswith(start)}
            head.adapters[name].load_state_dict(state)
    except BaseException:  # of memory, say
        detach(model, name)
        if before is not None:
            activate(model, before)
        raise


def _whole(t: Any) -> torch.Tensor:
    """Gathered where FSDP2 holds it in shards: every rank must call."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def _parameters(model: nn.Module, heads: Collection[str]) -> Iterator[tuple[str, tuple[int, ...], torch.Tensor | None]]:
    """The base's parameters for its fingerprint: name, dense shape, and values unless it is a linear layer's weight."""
    record = record_of(model)
    adapters = [one.adapter for one in record.attached.values()] if record else []
    added = {id(part) for adapter in adapters for module in adapter.modules() for part in module.modules()}
    inside = tuple(f"{head}." for head in heads)
    for name, there in walk(model):
        module: Any = original(there)
        if id(there) in added or (inside and f"{name}.".startswith(inside)):
            continue
        for key, p in module._parameters.items():
            if p is None:
                continue
            full = f"{name}.{key}" if name else key
            if p.is_meta:
                raise ValueError(f"fastpeft: {full} must be loaded, it is on the meta device")
            if key != "weight" or not (isinstance(module, nn.Linear) or transformers.is_conv1d(module)):
                yield full, tuple(p.shape), _whole(p)
            elif isinstance(module, Linear4bit):
                yield full, (module.out_features, module.in_features), None
            else:
                yield full, tuple(p.shape if isinstance(module, nn.Linear) else p.shape[::-1]), None
