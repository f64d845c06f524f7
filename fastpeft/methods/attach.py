"""attach, detach, activate: adapters of any method on a plain model, by name, one of them active or none.

The protocol. A method is a module of this folder, listed in `METHODS` of `__init__.py`, with

    Config                                        a frozen dataclass that checks itself, with the class attribute `method`
                                                  (the key of METHODS) and the field `modules_to_save`
    HEADS                                         what PEFT's files put before the names of a task head
    attach(model, config, name) -> Adapter        raises before it changes anything; inactive, its parameters require grad
    to_file(adapter) -> (config, tensors, why)    the adapter_config.json, the tensors by their names in the file, and why
                                                  the file is not PEFT's, or None where PEFT reads it. Task heads are not its
                                                  matter, nor what `peft_format.common` says of the base
    from_file(model, file) -> Config              refuses what it does not compute; raises AdapterFileError. `modules_to_save`
                                                  are the task heads in the file (`peft_format.heads`)
    expected(model, config, file_config)          {name in the file: shape}, without task heads
    load(adapter, tensors)                        copies what was read into its parameters

`Adapter` (`sites.py`) is what a method puts on a model. This file does what is the same for all of them, in this order:
a task head gets a copy for the adapter (`TaskHead`), the method attaches, the base is frozen, the record is written, the
adapter is activated. `detach` goes the other way; with the last adapter go the record and all that was changed.

The record is a plain object in the model's `__dict__`, no module: it is copied and pickled with the model, and nothing is
registered twice. A method finds the base through `sites.walk`, which sees through what other adapters put there.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

from ..quantization import parts
from . import METHODS
from .sites import Adapter, Site, TaskHead, leave, original, replace, walk

HEADS = ("classifier", "score", "qa_outputs")  # as PEFT finds a task head: a child of the model whose name ends so


class Attached(NamedTuple):
    """One adapter, with its task heads by their names in the base."""

    adapter: Adapter
    heads: dict[str, TaskHead]

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that is trained."""
        name = self.adapter.name
        heads = {
            f"{place}.{key}": p
            for place, head in self.heads.items()
            for key, p in head.adapters[name].named_parameters()
        }
        return self.adapter.parameters() | heads


class Record:
    """What is attached to a model, and what to give back with the last adapter."""

    def __init__(self, flags: list[tuple[nn.Module, str, bool]]) -> None:
        self.attached: dict[str, Attached] = {}
        self.active: str | None = None  # runs
        self.trained: str | None = None  # requires grad: the one that was active last
        self.flags = flags  # (module, name of a parameter of its own, requires_grad)


# ---- the public functions --------------------------------------------------------------------------------------------


def attach(model: nn.Module, config: Any, name: str) -> None:
    """See `fastpeft.attach`."""
    install(model, config, name, None)


def detach(model: nn.Module, name: str | None) -> None:
    """See `fastpeft.detach`."""
    model = plain(model)
    record, name = pick(model, name, "detach")
    if record.active == name:
        _switch(record, None)
    if record.trained == name:
        record.trained = None
    gone = record.attached.pop(name)
    gone.adapter.remove()
    leave(model, gone.heads, name)
    if record.attached:
        return
    for module, key, flag in record.flags:
        p = module._parameters.get(key)
        if p is not None and p.requires_grad != flag:
            p.requires_grad_(flag)
    del model.__dict__["_fastpeft"]


def activate(model: nn.Module, name: str | None) -> None:
    """See `fastpeft.activate`."""
    model = plain(model)
    record = record_of(model)
    if record is None:
        raise ValueError(f"fastpeft.activate: no adapter is attached to this {type(model).__name__}")
    if name is not None:
        pick(model, name, "activate")
    if record.active != name:
        _switch(record, name)


def install(model: nn.Module, config: Any, name: str, heads: Collection[str] | None) -> Attached:
    """attach, with the names of the modules that the adapter trains whole; None: as the config and the model say."""
    model = plain(model)
    check(model, name)
    method = _method(config)
    if heads is None:
        heads = _find_heads(model, config.modules_to_save)
    flags = [
        (module, key, p.requires_grad)
        for _, module in walk(model)
        for key, p in module._parameters.items()
        if p is not None
    ]
    sites = _enter(model, heads, name)
    record = record_of(model)
    before = record.active if record else None
    try:
        if record:
            _switch(record, None)  # a method may run the base: a prefix begins as real text
        adapter = method.attach(model, config, name)
    except BaseException:
        leave(model, sites, name)
        if before is not None:
            _switch(record, before)
        raise
    if record is None:
        record = model.__dict__["_fastpeft"] = Record(flags)
        for module, key, flag in flags:
            if flag:
                module._parameters[key].requires_grad_(False)
    attached = record.attached[name] = Attached(adapter, sites)
    _switch(record, name)
    return attached


def pick(model: nn.Module, name: str | None, op: str) -> tuple[Record, str]:
    """The record and the name of an attached adapter; None: of the only one. Raises ValueError."""
    record = record_of(plain(model))
    if record is None:
        raise ValueError(f"fastpeft.{op}: no adapter is attached to this {type(model).__name__}")
    known = ", ".join(map(repr, record.attached))
    if name is None:
        if len(record.attached) > 1:
            raise ValueError(f"fastpeft.{op}: name must be given, one of {known}")
        return record, next(iter(record.attached))
    if name not in record.attached:
        raise ValueError(f"fastpeft.{op}: name must be one of {known}, got {name!r}")
    return record, name


# ---- parts -----------------------------------------------------------------------------------------------------------


def plain(model: Any) -> nn.Module:
    """The model that `torch.compile` made a callable of."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastpeft: model must be a torch.nn.Module, got {type(model).__name__}")
    return model._modules.get("_orig_mod") or model


def record_of(model: nn.Module) -> Record | None:
    record = model.__dict__.get("_fastpeft")  # `fp.apply` keeps something else there, on PEFT's layers
    return record if isinstance(record, Record) else None


def _switch(record: Record, name: str | None) -> None:
    if record.active is not None:
        before = record.attached[record.active]
        before.adapter.activate(False)
        for head in before.heads.values():
            head.active = None
    record.active = None
    if name is None:
        return  # requires_grad stays: the base is asked in between (a reference model), and backward comes after
    now = record.attached[name]
    now.adapter.activate(True)
    for head in now.heads.values():
        head.active = name
    record.active = name
    if record.trained != name:
        for other in record.attached.values():
            for p in other.parameters().values():
                p.requires_grad_(other is now)
        record.trained = name


def check(model: nn.Module, name: str) -> None:
    """Whether an adapter of this name can come to this model. Raises TypeError, ValueError, RuntimeError."""
    if not isinstance(name, str):
        raise TypeError(f"fastpeft.attach: name must be a str, got {type(name).__name__}")
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"fastpeft.attach: name must have no dot and not be an attribute of nn.ModuleDict, got {name!r}"
        )
    record = record_of(model)
    if record is not None and name in record.attached:
        raise ValueError(f"fastpeft.attach: an adapter {name!r} is attached already; detach it, or take another name")
    tuners, peft = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.peft_model")
    if tuners and peft and any(isinstance(m, (tuners.BaseTunerLayer, peft.PeftModel)) for m in model.modules()):
        raise ValueError(
            f"fastpeft.attach: this {type(model).__name__} is wrapped by PEFT. fastpeft.apply(model) puts its adapters on "
            "fastpeft's kernels; attach is for a model without them (PeftModel.unload() gives it back)"
        )
    if any(hasattr(p, "full_tensor") for p in model.parameters()):
        raise RuntimeError("fastpeft.attach: FSDP2 has already sharded this model; attach before fully_shard")


def _method(config: Any) -> Any:
    method = METHODS.get(getattr(config, "method", None))
    if method is None or not isinstance(config, method.Config):
        kinds = " or ".join(f"fp.{method.Config.__name__}" for method in METHODS.values())
        raise TypeError(f"fastpeft.attach: config must be an {kinds}, got {type(config).__name__}")
    return method


def _find_heads(model: nn.Module, modules_to_save: Collection[str]) -> list[str]:
    heads = [key for key, child in model._modules.items() if child is not None and key.endswith(HEADS)]
    modules = {name: original(module) for name, module in walk(model) if name}
    for pattern in modules_to_save:
        found = [pattern] if pattern in modules else []
        found = found or [n for n in modules if any(fnmatchcase(end, pattern) for end in parts(n, ends_only=True))]
        if not found:
            raise ValueError(
                f"fastpeft.attach: modules_to_save has {pattern!r}, which is no module of this {type(model).__name__}. "
                f"It has: {', '.join(dict.fromkeys(name.rpartition('.')[2] for name in modules))}"
            )
        heads += found
    return [name for name in dict.fromkeys(heads) if any(True for _ in modules[name].parameters())]


def _enter(model: nn.Module, names: Collection[str], adapter: str) -> dict[str, TaskHead]:
    """Copies of these modules for the adapter. Raises ValueError before it changes anything."""
    at = dict(walk(model))
    for name in names:
        inside = [other for other in at if other.startswith(f"{name}.")]
        around = [other for other in at if name.startswith(f"{other}.") and other]
        clash = [other for other in (*inside, *around) if other in names or isinstance(at[other], Site)]
        if isinstance(at[name], Site) and not isinstance(at[name], TaskHead):
            clash.append(name)
        if clash:
            raise ValueError(
                f"fastpeft.attach: {name!r} cannot be trained whole: {clash[0]!r} has an adapter or is trained whole itself"
            )
        for key, t in original(at[name]).state_dict().items():
            if not t.is_floating_point():
                raise ValueError(
                    f"fastpeft.attach: {name!r} cannot be trained whole: its {key} is {t.dtype}, not floating"
                )
    sites = {name: site if isinstance(site, TaskHead) else TaskHead(site) for name, site in at.items() if name in names}
    for site in sites.values():
        site.add(adapter)
    replace(model, {at[name]: site for name, site in sites.items() if at[name] is not site})
    return sites
