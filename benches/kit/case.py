"""What `benches/<stem>.py` hands to the kit: cases as data, and for a case its functions, its definition and its cost.

Such a module has `KIND` (its stem), a frozen dataclass `Case` with the attributes of `AnyCase`, and `work(case, device)`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .machine import last_level_cache
from .rounds import FROZEN

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORWARD, BOTH, GRAD, DECODE = "fwd", "fwd+bwd", "dX", "decode"
WITH_GRADIENTS = "fwd with gradients"  # the forward of a training step alone
OURS = "fastpeft"
BEST = "the best peer"  # of a row's rivals, by median
TIME, OVERHEAD, OWN_OVERHEAD, BYTES = "time", "overhead", "own overhead", "bytes"


@dataclass(frozen=True)
class Limit:
    """A target: `what` of `ours` over that of `peer` is at most `value`.

    what: TIME; OVERHEAD (time over the reference, less 1); OWN_OVERHEAD (over the reference; no peer); BYTES (time over that
    of the row's bytes at the machine's bandwidth; no peer). mode: the timing mode that it is asked in; "": any.
    rule: name of a rule that holds for many rows, whose verdict is the worst of theirs.
    """

    what: str
    peer: str
    value: float
    ours: str = OURS
    mode: str = ""
    rule: str = ""


class AnyCase(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def table(self) -> str: ...  # the table that its row stands in
    @property
    def limits(self) -> tuple[Limit, ...]: ...


@dataclass
class Ring:
    """The same thing several times in memory, and a cursor that all functions over it share.

    A sample of one function ends where the next one's begins, so none finds weights that the last one left in cache.
    """

    items: list[Any]
    following: Callable[[], Any] = field(init=False)

    def __post_init__(self) -> None:
        self.following = itertools.cycle(self.items).__next__


def ring_length(size: int) -> int:
    """How many weights of `size` bytes it takes to rotate past the last-level cache, as a whole model's would."""
    past_cache = min(3 * last_level_cache() // 2, 768 << 20)
    return min(max(2, -(-past_cache // size)), 1024)  # tiny layers would never make it past the cache


@dataclass
class Function:
    """One way to compute the row: `call` with the ring's next item."""

    call: Callable[[Any], Any]  # -> y, or a list of them
    ring: Ring
    wrt: Callable[[Any], list[Tensor]] = lambda item: []  # what gets gradients, x first
    truth: str = ""  # which definition it is held against
    within: Callable[[], AbstractContextManager] = nullcontext  # a plan, say


@dataclass(frozen=True)
class Cost:
    """Least work of a row; the `extra` part is what stands on top of its reference (0: the reference is no part of it)."""

    flops: float = 0.0
    bytes: float = 0.0
    extra_flops: float = 0.0
    extra_bytes: float = 0.0


@dataclass
class Work:
    """A case made ready on a device."""

    functions: dict[str, Function]
    dtype: torch.dtype
    dy: list[Tensor] | None = None  # upstream gradients: forward and backward are timed; None: forward alone
    grad: bool = False  # gradients are on (always with dy)
    # name of a truth -> float64 outputs as `outputs` orders them, each with the rows that it holds (None: all)
    exact: Callable[[str], list[tuple[slice | None, Tensor]]] | None = None
    plain: Function | None = None  # PyTorch's composition in the same dtype: others may have twice its error
    unchecked: tuple[str, ...] = (FROZEN,)  # they compute something else
    cost: Cost = Cost()
    rivals: tuple[str, ...] = ()  # whom BEST picks from
    plans: tuple[str, ...] = ()  # our own ways, each forced: no peers
    host: bool = False  # the host's time counts, on a GPU too: calls are queued, not waited for
    within: Callable[[], AbstractContextManager] = nullcontext  # around everything

    @property
    def reference(self) -> str:
        """The first function, which the A/A row repeats."""
        return next(iter(self.functions))

    def runner(self, name: str) -> Callable[[], Any]:
        """One timed call on the next item of the function's ring."""
        function, dy = self.functions[name], self.dy
        call, following, wrt = function.call, function.ring.following, function.wrt
        if dy is None:
            return lambda: call(following())

        def both() -> object:
            item = following()
            return torch.autograd.grad(call(item), wrt(item), dy)

        return both

    def outputs(self, function: Function) -> list[Tensor]:
        """y, then the gradients, over the ring's first item."""
        item = function.ring.items[0]
        with function.within(), torch.set_grad_enabled(self.grad or self.dy is not None):
            y = function.call(item)
            ys = list(y) if isinstance(y, list | tuple) else [y]
            if self.dy is None:
                return [one.detach() for one in ys]
            return [*(one.detach() for one in ys), *torch.autograd.grad(ys, function.wrt(item), self.dy)]


def sample_rows(count: int, most: int = 256) -> slice:
    """At most `most` rows of `count`, evenly."""
    return slice(None, None, -(-max(count, 1) // most))
