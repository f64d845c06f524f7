"""Which implementation of an op runs: a table per op, a test from metadata, and a forced choice for the process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

NAMES = ("cuda", "triton", "cpu", "torch")


@dataclass(frozen=True)
class Backend:
    """One implementation of an op. `can(meta)` answers None or why it cannot run there, and never looks at values."""

    can: Callable[[Any], str | None]
    forward: Callable
    backward: Callable


def _checked(name: str | None, source: str) -> str:
    if name and name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}, got {name!r}")
    return name or ""


_forced = os.environ.get("FASTPEFT_BACKEND", "").strip().lower()


def forced() -> str:
    """The backend forced for this process, or "" (each op picks its own)."""
    return _checked(_forced, "FASTPEFT_BACKEND")


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Force every op onto one backend ("cuda", "triton", "cpu", "torch"; None: free choice) inside the `with` block.

    The setting is process-wide, like the environment variable FASTPEFT_BACKEND. An op that cannot run there raises
    RuntimeError with the reason.
    """
    global _forced
    before, _forced = _forced, _checked(name, "backend(name)")
    try:
        yield
    finally:
        _forced = before


def choose(op: str, table: Mapping[str, Backend], meta: Any, name: str) -> Backend:
    """The first backend of `table` that can run `meta`, or the forced one, or RuntimeError saying why it cannot."""
    if name:
        if name not in table:
            raise RuntimeError(f"{op}: backend {name!r} was forced, but this op has only {', '.join(table)}")
        reason = table[name].can(meta)
        if reason:
            raise RuntimeError(f"{op}: backend {name!r} was forced, but cannot run: {reason}")
        return table[name]
    for candidate in table.values():
        if candidate.can(meta) is None:
            return candidate
    raise RuntimeError(f"{op}: no backend can run this call")
