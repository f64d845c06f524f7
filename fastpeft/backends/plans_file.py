"""This machine's own plans: the JSON file that `fastpeft tune` writes. It is checked before it is used, and ignored as a whole.

{"format": 1, "machine": {"cpu", "kind", "cores", "isa", "threads"}, "fastpeft": version, "torch": version,
 "measured": ISO time, "cpu": {entries over those of the machine's kind in plans.json}}
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

FORMAT = 1
MOST_BYTES = 1_000_000
DTYPES = ("float32", "bfloat16", "float16")  # as csrc/tensor.h numbers them

# What an entry may be: true or false, or a number from one limit to the other, a whole one where the limits are.
_ROWS = (0, 4096)
LIMITS: dict[str, Any] = {
    "few_rows": dict.fromkeys(DTYPES, _ROWS),
    "few_rows_4bit": dict.fromkeys(DTYPES, _ROWS),
    "few_rows_untiled": _ROWS,
    "few_rows_transposed": _ROWS,
    "slab": {
        "elements_4bit": (1 << 12, 1 << 26),
        "min_rows": (1, 1 << 20),
        "rows": (64, 1 << 20),
        "columns": (64, 1 << 20),
    },
    "widens": bool,
    "dot": bool,
    "own_attention": bool,
    "parallel_work": (0.0, 1e12),
}


class Unusable(Exception):
    """Why a file is ignored."""


def path() -> Path | None:
    """FASTPEFT_PLANS_FILE, else fastpeft/plans.json in the user's config folder; None where the variable is empty."""
    named = os.environ.get("FASTPEFT_PLANS_FILE")
    if named is not None:
        return Path(named).expanduser() if named.strip() else None
    config = os.environ.get("XDG_CONFIG_HOME", "")
    return Path(config if os.path.isabs(config) else os.path.expanduser("~/.config"), "fastpeft", "plans.json")


def read(file: Path, here: dict[str, Any]) -> dict[str, Any] | None:
    """The contents of a file that was measured on the machine `here`; None where there is no such file.

    Raises:
        Unusable: it cannot be read, is not such a file, or belongs to another machine.
    """
    try:
        if not file.exists():
            return None
        if not file.is_file():
            raise Unusable("it is not a file")
        with file.open("rb") as opened:
            text = opened.read(MOST_BYTES + 1)
    except OSError as error:
        raise Unusable(f"it cannot be read ({error.strerror})") from error
    if len(text) > MOST_BYTES:
        raise Unusable("it is larger than 1 MB")
    try:
        contents = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"it is not JSON ({error})") from error
    _check(contents, here)
    return contents


def write(file: Path, contents: dict[str, Any]) -> None:
    """In one step: whoever reads the file finds the old or the new one. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with open(handle, "w", encoding="utf-8") as opened:
            opened.write(json.dumps(contents, indent=2) + "\n")
        os.replace(name, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _check(contents: Any, here: dict[str, Any]) -> None:
    known = {"format": int, "machine": dict, "fastpeft": str, "torch": str, "measured": str, "cpu": dict}
    _keys("it", contents, known)
    if contents.get("format") != FORMAT:
        raise Unusable(f"format must be {FORMAT}, got {_short(contents.get('format'))}")
    for key, expected in known.items():
        if type(contents.get(key)) is not expected:
            raise Unusable(f"{key} must be a JSON {_JSON[expected]}, got {_short(contents.get(key))}")
    try:
        datetime.fromisoformat(contents["measured"])
    except ValueError as error:
        raise Unusable(f"measured must be a date and time in ISO 8601, got {_short(contents['measured'])}") from error
    of = contents["machine"]
    _keys("machine", of, here)
    for key in here:
        if key != "threads" and of.get(key) != here[key]:
            raise Unusable(f"it was measured on another machine: {key} {_short(of.get(key))}, here {_short(here[key])}")
    if type(of.get("threads")) is not int:
        raise Unusable(f"machine.threads must be a JSON {_JSON[int]}, got {_short(of.get('threads'))}")
    _entries("cpu", contents["cpu"], LIMITS)


def _entries(name: str, entries: Any, limits: dict[str, Any]) -> None:
    _keys(name, entries, limits)
    for key, value in entries.items():
        limit, where = limits[key], f"{name}.{key}"
        if isinstance(limit, dict):
            _entries(where, value, limit)
        elif limit is bool:
            if type(value) is not bool:
                raise Unusable(f"{where} must be true or false, got {_short(value)}")
        else:
            low, high = limit
            if type(value) not in {int, type(low)} or not low <= value <= high:
                what = "whole number" if type(low) is int else "number"
                raise Unusable(f"{where} must be a {what} from {low} to {high}, got {_short(value)}")


def _keys(name: str, found: Any, known: Any) -> None:
    if not isinstance(found, dict):
        raise Unusable(f"{name} must be a JSON object, got {_short(found)}")
    for key in found:
        if key not in known:
            raise Unusable(f"{name} has no entry {_short(key)}, only {', '.join(known)}")


_JSON = {int: "number", str: "string", dict: "object"}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
