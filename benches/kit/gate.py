"""Has anything become slower? Compares the ratios of a GPU suite's run with recorded ones.

A ratio is the time of fastpeft over that of a peer, with its 95 % interval, measured side by side in one process; times
themselves are never compared, since machines differ. A row fails when its whole interval lies above (slower than) the
recorded one. Rules:

  - one baseline file a kind of GPU; a baseline of another kind is refused (exit code 2)
  - no baseline yet: this run is recorded as one, it says so, and the exit code is 0
  - a recorded row that is missing now, or whose result is wrong now, fails; a new row is reported and passes
  - rows that were noisy, now or then, are listed and neither pass nor fail
  - a new baseline is a reviewed commit: delete the file, run again, commit what was recorded
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .rounds import OK, Estimate

RECORDED, PASSED, FAILED, REFUSED = "recorded", "passed", "failed", "refused"
CODES = {RECORDED: 0, PASSED: 0, FAILED: 1, REFUSED: 2}
SCHEMA = 2


@dataclass(frozen=True)
class Verdict:
    state: str  # RECORDED, PASSED, FAILED or REFUSED
    lines: tuple[str, ...]  # what to tell the user

    @property
    def exit_code(self) -> int:
        return CODES[self.state]


def ratios(result: dict[str, Any]) -> dict[str, tuple[str, Estimate]]:
    """ "row | peer" -> (state of the row, the ratio)."""
    found = {}
    for row in result["rows"]:
        state = "wrong" if "fastpeft" in row.get("wrong", ()) else row["validity"][0]
        for peer, values in row["time"].items():
            found[f"{row['key']} | over {peer}"] = (state, Estimate.from_json(values))
    return found


def compare(now: dict[str, Any], before: dict[str, Any]) -> Verdict:
    """Both as the suite writes them."""
    if before.get("schema") != SCHEMA or "gpu" not in before:
        return Verdict(
            REFUSED, (f"the baseline is not a result of this suite (schema {before.get('schema')!r}, not {SCHEMA})",)
        )
    if now["gpu"] != before["gpu"]:
        return Verdict(
            REFUSED, (f"the baseline is of a {before['gpu']}, this is a {now['gpu']}: keep one file a kind of GPU",)
        )
    current, recorded = ratios(now), ratios(before)
    slower, unsure = [], []
    for name, (old_state, old) in recorded.items():
        state, new = current.get(name, ("missing", old))
        if state in ("missing", "wrong"):
            slower.append(f"{name}: {state}")
        elif state != OK or old_state != OK or math.isnan(new.low) or math.isnan(old.high):
            unsure.append(f"{name}: {state} now, {old_state} then")
        elif new.low > old.high:
            slower.append(f"{name}: {new}, was {old}")
    lines = [f"slower: {line}" for line in slower] + [f"not compared: {line}" for line in unsure]
    lines += [f"new: {name}" for name in current if name not in recorded]
    lines.append(f"{len(recorded) - len(slower) - len(unsure)} of {len(recorded)} ratios hold")
    return Verdict(FAILED if slower else PASSED, tuple(lines))


def gate(now: dict[str, Any], path: Path) -> Verdict:
    """Compare with the baseline at `path`; where there is none, record this run there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
        return Verdict(RECORDED, (f"no baseline at {path} yet: this run was recorded there; review and commit it",))
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return Verdict(REFUSED, (f"the baseline {path} is not JSON: {error}",))
    return compare(now, before)
