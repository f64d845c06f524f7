"""Lines of a results file: what each carries, reading them, and which machine they belong to."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .rounds import Samples

Row = dict[str, Any]


def without_nan(value: Any) -> Any:
    """`value` as JSON can hold it."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(paths: Iterable[Path]) -> list[Row]:
    """All lines of the files; a later line of the same suite, key and machine replaces an earlier one."""
    found: dict[tuple[str, str, str], Row] = {}
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}:{number}: not a JSON line: {error}") from error
                found[machine_of(row), row["suite"], row["key"]] = row
    return list(found.values())


def machine_of(row: Row) -> str:
    machine, versions = row["machine"], row["versions"]
    gpu = f", {machine['gpu']}" if "gpu" in machine else ""
    bnb = f", bitsandbytes {versions['bitsandbytes']}" if row["suite"] == "qlora" else ""
    where = f"{machine['cpu']} ({machine['family']}), {machine['cores']} cores, {machine['threads']} threads{gpu}"
    return f"{where}; torch {versions['torch']}, peft {versions['peft']}{bnb}"


def kind_of(row: Row) -> str:
    """What a reader is told of the kind of machine: its GPU, or the CPU's class."""
    from .machine import KINDS

    machine = row["machine"]
    return machine.get("gpu") or KINDS.get(machine["kind"], machine["kind"])


def grouped(rows: Iterable[Row], by: Any) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(by(row), []).append(row)
    return groups


def commit_of(rows: Iterable[Row]) -> str:
    return ", ".join(
        sorted({f"{(r['commit'] or 'no clone')[:12]}{' with changes' if r['dirty'] else ''}" for r in rows})
    )


def samples_of(row: Row) -> Samples | None:
    return Samples.from_json(row["samples"]) if "samples" in row else None


def of_kind(rows: Iterable[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]
