"""The table of docs/support.md: generated from the tests that passed, never typed.

    pytest --record-support tests/support.jsonl    # tests/_support_plugin.py writes this machine's cells
    python tests/_support.py                       # rewrites the table in docs/support.md from them

A line of the file is one verified cell: op, backend, instruction set or "", dtype, feature, machine, commit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

FEATURES = {
    "forward": "forward",
    "backward": "backward",
    "compile": "torch.compile",
    "checkpoint": "checkpointing",
    "fsdp": "FSDP2",
    "graph": "CUDA graph",
}
BEGIN, END = "<!-- support:begin -->", "<!-- support:end -->"
DTYPES = ("float64", "float32", "bfloat16", "float16")


class Cell(NamedTuple):
    """What one or several tests verify together."""

    op: str
    backend: str
    isa: str
    dtype: str
    feature: str
    machine: str


def load(path: Path) -> dict[Cell, str]:
    """Cells of a results file, each with the commit at which it was verified."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    rows = map(json.loads, lines)
    return {Cell(*(row[field] for field in Cell._fields)): row["commit"] for row in rows}


def save(path: Path, passed: Iterable[Cell], failed: Iterable[Cell], commit: str) -> None:
    """Put the cells that passed at `commit` into the file, and take those that failed out of it."""
    cells = load(path) | dict.fromkeys(passed, commit)
    for cell in failed:
        cells.pop(cell, None)
    lines = (json.dumps({**cell._asdict(), "commit": of}) for cell, of in sorted(cells.items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def table(cells: dict[Cell, str]) -> str:
    """One row per op, backend, dtype and machine; its commits are those of its cells."""
    rows: dict[tuple[str, str, str, str], dict[Cell, str]] = {}
    for cell, commit in cells.items():
        rows.setdefault((cell.op, cell.backend, cell.dtype, cell.machine), {})[cell] = commit
    heads = ["op", "backend", "dtype", *FEATURES.values(), "verified on", "at commit"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for (op, backend, dtype, machine), found in sorted(rows.items(), key=lambda row: _order(row[0])):
        isas = sorted({cell.isa for cell in found if cell.isa})
        verified = {cell.feature for cell in found}
        marks = ["✓" if feature in verified else _absent(backend, feature) for feature in FEATURES]
        commits = ", ".join(sorted(set(found.values())))
        name = f"{backend} ({', '.join(isas)})" if isas else backend
        lines.append(f"| {' | '.join([f'`{op}`', name, dtype, *marks, machine, commits])} |")
    return "\n".join(lines)


def _order(row: tuple[str, str, str, str]) -> tuple[str, str, str, int]:
    op, backend, dtype, machine = row
    return op, machine, backend, DTYPES.index(dtype)


def _absent(backend: str, feature: str) -> str:
    return "n/a" if feature == "graph" and backend == "cpu" else ""


def rewrite(page: str, cells: dict[Cell, str]) -> str:
    """The page with the block between the two marks replaced by the table.

    Raises:
        ValueError: the marks are not there, each once.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"docs/support.md must hold {BEGIN} and {END} once each")
    before, _, rest = page.partition(BEGIN)
    block = f"{table(cells)}\n" if cells else ""
    return f"{before}{BEGIN}\n{block}{END}{rest.partition(END)[2]}"


def main(argv: list[str] | None = None) -> int:
    root = Path(__file__).parent.parent
    parser = argparse.ArgumentParser(prog="python tests/_support.py", description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, default=root / "docs" / "support.md")
    parser.add_argument("--results", type=Path, default=root / "tests" / "support.jsonl")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the table is out of date")
    args = parser.parse_args(argv)
    before = args.page.read_text("utf-8")
    after = rewrite(before, load(args.results))
    if args.check:
        return int(before != after)
    args.page.write_text(after, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
