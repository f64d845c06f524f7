"""What stands in a model while adapters are attached: an adapter, and the modules in the places of the base's own."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..nn.prefix_attention import Prefixes


class Adapter(ABC):
    """One adapter of one method on one model. A plain object, no module: deepcopy and pickle keep it with its model.

    It knows its modules, never Parameters: `model.to` may put new ones in their place.
    """

    def __init__(self, model: nn.Module, config: Any, name: str) -> None:
        self.model, self.config, self.name = model, config, name

    @abstractmethod
    def modules(self) -> list[nn.Module]:
        """What it added to the model (not what the method shares between adapters)."""

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by names that say where it is."""

    @abstractmethod
    def activate(self, on: bool) -> None:
        """Take part in the model's forward, or not. The adapter that was active is switched off before this one is on."""

    @abstractmethod
    def remove(self) -> None:
        """Take all of it out of the model, after `activate(False)`."""


class Site(nn.Module):
    """Stands where a module of the base stood, which is its child `base`; `active` names the one of `adapters` that runs.

    It answers for what it has not (`weight`, `in_features`, ...) as the module that runs does.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.adapters = base, nn.ModuleDict()
        self.active: str | None = None
        self.training = self.adapters.training = base.training

    def running(self) -> nn.Module:
        """Whose attributes these are."""
        return self.base

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or name in ("base", "adapters", "active"):  # copied or unpickled: not there yet
                raise
            return getattr(self.running(), name)


class TaskHead(Site):
    """The head of a task: every adapter trains a copy of its own, and the base keeps the original."""

    def add(self, name: str) -> None:
        """A copy of the original for this adapter, to be trained."""
        self.adapters[name] = copy.deepcopy(self.base).requires_grad_(True)

    def running(self) -> nn.Module:
        return self.base if self.active is None else self.adapters[self.active]

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # whatever the head takes
        return self.running()(*args, **kwargs)


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) as `named_modules` of the base alone: a Site has the place and the children of its base; no prefixes."""
    return _walk(model, "", set())


def _walk(module: nn.Module, name: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if id(module) not in seen:
        seen.add(id(module))
        yield name, module
        for key, child in original(module)._modules.items():
            if child is not None and not isinstance(child, Prefixes):
                yield from _walk(child, f"{name}.{key}" if name else key, seen)


def original(module: nn.Module) -> nn.Module:
    """The base's own module at a place."""
    return module.base if isinstance(module, Site) else module


def replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put `new[module]` wherever `module` stands."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child in new:
                parent._modules[key] = new[child]


def leave(model: nn.Module, sites: Mapping[str, Site], name: str) -> None:
    """Take adapter `name` out of its sites; the base comes back where it was the last."""
    for site in sites.values():
        del site.adapters[name]
    replace(model, {site: site.base for site in sites.values() if not site.adapters})
