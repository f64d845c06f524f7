"""The GPU suite's rows, and what they say about our own 4-bit plans."""

from __future__ import annotations

import itertools
import math
from types import ModuleType
from typing import Any

from .. import linear4bit, lora_linear, prefix_attention
from ..kit import plans
from ..kit.case import AnyCase
from ..kit.cuda import COLD
from ..kit.results import Row, samples_of
from ..kit.rounds import OK, Estimate

OPS: tuple[ModuleType, ...] = (lora_linear, linear4bit, prefix_attention)
SMALL, FUSED, DECODED = "plan small", "plan fused", "plan decode + GEMM"


def cases() -> list[tuple[ModuleType, AnyCase]]:
    """Rows with targets first, then the ops' other rows in turn: what is left out when time runs short stands last."""
    found = [(op, op.gpu_cases()) for op in OPS]
    first = [(op, case) for op, (headline, _) in found for case in headline]
    turns = itertools.zip_longest(*([(op, case) for case in rest] for op, (_, rest) in found))
    return first + [pair for turn in turns for pair in turn if pair is not None]


def crossover(rows: list[Row], mode: str = COLD) -> dict[str, Any] | None:
    """What the timings of our plans say about `fused_to_m`; None if there are none.

    The row count whose choices lose least (geometric mean over shapes, forward and dX, of the chosen plan's time over the
    better one's). From rows with a cold L2, as a weight is met in a model; where `small` goes first, and where it is noisy, a
    row does not decide.
    """
    table = []
    for row in rows:
        samples = samples_of(row) if row["mode"] == mode else None
        if samples is None or not {FUSED, DECODED} <= set(samples.seconds) - set(row["wrong"]):
            continue
        seconds = {name: samples.median(name) for name in row["plans"] if name in samples.seconds}
        over = samples.ratio(FUSED, DECODED).as_json()
        table.append({"key": row["key"], "m": row["case"]["m"], "seconds": seconds, "fused_over_decoded": over})
        table[-1]["validity"] = row["validity"][0]
    if not table:
        return None
    deciding = [row for row in table if row["validity"] == OK and SMALL not in row["seconds"]]
    result = {"mode": mode, "now": plans.fused_to_m(), "table": table, "rows": sorted({row["m"] for row in deciding})}
    if not deciding:
        return result | {"fused_to_m": None}

    def losses(to: int) -> dict[str, float]:
        """row -> time of the plan that `to` chooses over the better one's, less 1"""
        times = {row["key"]: (row["seconds"], FUSED if row["m"] <= to else DECODED) for row in deciding}
        return {key: s[chosen] / min(s[FUSED], s[DECODED]) - 1 for key, (s, chosen) in times.items()}

    best = min((0, *result["rows"]), key=lambda to: sum(map(math.log1p, losses(to).values())))
    return result | {"fused_to_m": best, "worst": list(max(losses(best).items(), key=lambda pair: pair[1]))}


def crossover_lines(found: dict[str, Any] | None) -> list[str]:
    """The plans' table, and the recommendation."""
    if found is None:
        return []
    lines = []
    for row in found["table"]:
        times = ", ".join(f"{name.removeprefix('plan ')} {1e6 * s:.1f}" for name, s in row["seconds"].items())
        ratio = Estimate.from_json(row["fused_over_decoded"])
        lines.append(f"plans in µs, {row['key']}: {times}; fused over decode + GEMM {ratio} {row['validity']}")
    where = f"fused_to_m of 4-bit weights on this GPU (now {found['now']})"
    if found["fused_to_m"] is None:
        return [*lines, f"{where}: no row was quiet enough to tell"]
    key, loss = found["worst"]
    measured = ", ".join(map(str, found["rows"]))
    said = f"recommended {found['fused_to_m']}, of M = {measured}; it loses {loss:.1%} at most ({key})"
    return [*lines, f"{where}: {said}"]
