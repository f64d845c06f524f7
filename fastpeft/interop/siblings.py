"""Siblings that read one x (q/k/v, gate/up): the first to run computes all of them in one pass over x.

The others' outputs are parked, with a strong reference to x, until each is called. A sibling takes its output only if
it gets the same tensor object at the same version, in the same grad, inference and autocast mode, on the same stream,
inside the same checkpoint, with its adapters as they were. Otherwise the group is dissolved for good, and the report
says why. (Writes through `.data` change no version: they are seen here as little as autograd sees them.) Who was the
first to run stays the leader: what a pass does must not depend on the one before it, because checkpointing replays it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .legal import Terms

NAMES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
_PATIENCE = 3  # passes in a row that left an output parked
_FEW_ROWS = 64  # up to here inference gains nothing from one pass over x, and single calls have less to check


def find(model: nn.Module, kinds: Collection[type[nn.Module]]) -> list[list[tuple[str, nn.Module]]]:
    """Layers of exactly one of `kinds` in one parent, with names that are known to read one x, and the same in_features."""
    found = []
    for parent in model.modules():
        for names in NAMES:
            layers = [(name, parent._modules.get(name)) for name in names]
            layers = [(name, layer) for name, layer in layers if type(layer) in kinds]
            distinct = len({id(layer) for _, layer in layers}) == len(layers)
            if len(layers) > 1 and distinct and len({layer.in_features for _, layer in layers}) == 1:
                found.append(layers)
    return found


class Seat:
    """A layer's place in its group, if it has one, and how its last call went."""

    def __init__(self, group: Group | None = None, index: int = 0) -> None:
        self.group, self.index = group, index
        self.called = False  # whether there was one,
        self.last: str | None = None  # why it took PEFT's code, if it did,
        self.refused = False  # and whether x was the reason, not the layer's state


class _Waiting(NamedTuple):
    y: torch.Tensor
    terms: Terms
    fingerprint: list[Any]


class _Parked(NamedTuple):
    x: torch.Tensor
    context: tuple[Any, ...]
    waiting: dict[int, _Waiting]  # by the sibling's index; emptied as they are claimed


class Group:
    """Deepcopy and pickle keep who belongs together, never parked tensors; members join again as they are rebuilt."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.dissolved: str | None = None
        self._forget()

    def _forget(self) -> None:
        self._members: list[weakref.ref | None] = [None] * len(self.names)
        self._local = threading.local()  # a backward thread replays forwards while another runs on
        self._leader: int | None = None
        self.ran = False  # whether the leader's last call computed all
        self._misses = 0
        # Checkpointing replays a forward, and the replay must group as the forward did: see _dissolve.
        self._replayable, self._in_flight = False, 0
        self._pending: tuple[str, list[int]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"names": self.names, "dissolved": self.dissolved}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def join(self, index: int, layer: nn.Module) -> None:
        """Take the place, unless its owner lives: a shallow copy of a layer shares the seat, but stays outside."""
        if self.members[index] is None:
            self._members[index] = weakref.ref(layer)

    def leave(self, index: int) -> None:
        self._members[index] = None
        self._local = threading.local()

    @property
    def members(self) -> list[Any]:
        """The layers, None for those that are gone."""
        return [ref and ref() for ref in self._members]

    @property
    def why_alone(self) -> str | None:
        """Why its members run alone, as far as the group knows; None while it stands."""
        if self.dissolved is not None:
            return self.dissolved
        if self._pending is not None:
            return self._pending[0]
        return "a sibling is gone" if None in self.members else None

    # ---- one call -------------------------------------------------------------------------------------------------

    def call(
        self,
        index: int,
        layer: Any,
        x: torch.Tensor,
        terms: Terms,
        compute: Callable[[torch.Tensor, Sequence[Terms]], list[torch.Tensor]],
    ) -> torch.Tensor | None:
        """This layer's y, or None: it runs alone."""
        if self.dissolved is not None or x.is_inference() or x.dim() == 0:
            return None  # an inference tensor has no version to compare
        if terms.dropout_p == 0.0 and not torch.is_grad_enabled() and x.numel() <= _FEW_ROWS * x.shape[-1]:
            return None
        members = self.members
        if members[index] is not layer or None in members:
            return None
        if self._leader is None:
            self._leader = index
        if index == self._leader:
            return self._lead(index, x, terms, members, compute)
        parked = getattr(self._local, "parked", None)
        if parked is not None and index in parked.waiting:
            return self._claim(parked, index, x, terms)
        return None

    def _claim(self, parked: _Parked, index: int, x: torch.Tensor, terms: Terms) -> torch.Tensor | None:
        y, _, expected = parked.waiting.pop(index)
        if not parked.waiting:
            self._local.parked, self._misses = None, 0
        name = self.names[index]
        if parked.x is not x:
            reason = f"{name} got another x than its siblings"
        elif parked.context != _context(x):
            reason = f"x, or the grad, autocast, stream or checkpoint mode, changed before {name} ran"
        elif expected != _fingerprint(terms):
            reason = f"the adapters or parameters of {name} changed after its siblings ran"
        elif _freed(y):
            reason = f"backward ran before {name}"
        else:
            return y
        self._local.parked = None
        self._dissolve(reason)
        return None

    def _lead(self, index, x, terms, members, compute) -> torch.Tensor | None:
        left = getattr(self._local, "parked", None)
        if left is not None:
            self._local.parked = None
            self._misses += 1
            if self._misses >= _PATIENCE:
                self._dissolve(f"{', '.join(self.names[i] for i in left.waiting)} did not follow with the same x")
        self.ran = False
        if not self._stands(terms):
            return None
        every = [terms if i == index else member.fast_terms(x) for i, member in enumerate(members)]
        if any(isinstance(other, str) or other.dropout_p != terms.dropout_p for other in every):
            return None  # a sibling is on PEFT's code, or drops out with another probability
        if any(other.base is not None for other in every) and len({other.dtype(x) for other in every}) > 1:
            return None  # 4-bit bases with a compute_dtype of their own
        try:
            context, marks = _context(x), [_fingerprint(other) for other in every]
        except RuntimeError:
            return None  # parameters that were made under inference_mode have no version
        ys = compute(x, every)
        waiting = {i: _Waiting(ys[i], every[i], marks[i]) for i in range(len(every)) if i != index}
        self._local.parked, self.ran = _Parked(x, context, waiting), True
        return ys[index]

    # ---- the end of a group ---------------------------------------------------------------------------------------

    def _stands(self, terms: Terms) -> bool:
        """Count the passes that checkpointing may replay, and carry out a dissolution once none is in flight."""
        if torch._C._current_graph_task_id() != -1:  # in backward: this is a replay
            self._in_flight -= 1
        elif _may_be_replayed(terms):
            if self._pending is not None and (self._in_flight <= 0 or self._pending[1] != self._versions()):
                self.dissolved = self._pending[0]
                return False
            self._replayable = True
            self._in_flight += 1
        elif self._pending is not None:
            return False
        return self.dissolved is None

    def _dissolve(self, reason: str) -> None:
        """At once, or, where a replay may still come, when none is in flight any more or an optimizer has stepped.

        A replay that takes another path than its forward saves other tensors (CheckpointError) and draws other masks.
        """
        if not self._replayable:
            self.dissolved = reason
        elif self._pending is None:
            self._pending = (reason, self._versions())

    def _versions(self) -> list[int]:
        return [p._version for member in self.members if member is not None for p in member.parameters()]


def _may_be_replayed(terms: Terms) -> bool:
    """Non-reentrant checkpointing hooks saved tensors; the reentrant kind runs without grad first, where only masks tell."""
    if torch.is_grad_enabled():
        return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    return terms.dropout_p > 0.0


def _context(x: torch.Tensor) -> tuple[Any, ...]:
    device = x.device.type
    return (
        x._version,
        x.requires_grad,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        device == "cuda" and torch.cuda.current_stream(x.device),
        torch._C._autograd._top_saved_tensors_default_hooks(False),
    )


def _fingerprint(terms: Terms) -> list[Any]:
    """Of the parameters and settings: equal means unchanged, as long as the older terms are alive."""
    marks: list[Any] = [terms.transposed, terms.dropout_p]
    if terms.base is None:
        tensors = [terms.weight, terms.bias]
    else:
        tensors = [terms.weight.data, terms.weight.scales, terms.bias]
        marks.append(terms.base.compute_dtype)
    for a, b, bias, scaling in terms.adapters:
        tensors += (a, b, bias)
        if type(scaling) is torch.Tensor:
            tensors.append(scaling)
        else:
            marks.append(scaling)
    for t in tensors:
        marks += (None,) if t is None else (id(t), t._version, t.requires_grad)
    return marks


def _freed(y: torch.Tensor) -> bool:
    """Whether backward has already run through the node that made y. Unpacks no saved tensor, so it calls no hook."""
    if y.grad_fn is None:
        return False
    try:
        _ = y.grad_fn._raw_saved_tensors
    except RuntimeError:
        return True
    return False
