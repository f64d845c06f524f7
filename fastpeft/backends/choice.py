"""Which backend runs an op: the first of its table that can, or the one that is forced for the process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

NAMES = ("cuda", "triton", "cpu", "torch")

def _checked(name: str | None, source: str) -> str:
    if name and name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}, got {name!r}")
    return name or ""


_forced = os.environ.get("FASTPEFT_BACKEND", "").strip().lower()


def forced() -> str:
    """The backend forced for this process, or "" (each op picks its own)."""
    return _checked(_forced, "FASTPEFT_BACKEND")


def allows(name: str) -> bool:
    """Whether the free choice may be, or the forced one is, this backend."""
    return _forced in ("", name)


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


def choose(op: str, table: Mapping[str, Any], meta: Any, name: str) -> Any:
    """The passes of the first backend of `table` whose `can(meta)` is None, or of the forced one `name`.

    `can` answers None or why not, and never looks at values. Raises RuntimeError with that reason.
    """
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
