"""When a target counts as met: the rule, apart from any measuring."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from ._measure import OK, Estimate

FLOOR_ROOM = 1.3  # a target does not bind below this many times the op's byte/FLOP floor
MET, NOT_MET = "met", "not met"


@dataclass(frozen=True)
class Target:
    """One line of the targets table; `limit` and `floor_limit` are in the unit of `measured`."""

    text: str
    limit: float
    measured: Estimate
    floor_limit: float | None  # FLOOR_ROOM x floor; None where the op has no floor to speak of (counts, host cost)
    verdict: str
    note: str = ""

    def as_json(self) -> dict[str, object]:
        floor = self.floor_limit
        return {
            **asdict(self),
            "limit": round(self.limit, 6),
            "floor_limit": None if floor is None or math.isnan(floor) else round(floor, 6),
            "measured": self.measured.as_json(),
        }

    @staticmethod
    def from_json(data: dict) -> Target:
        return Target(**{**data, "measured": Estimate.from_json(data["measured"])})


def target(
    text: str, limit: float, measured: Estimate, validity: tuple[str, str], floor_limit: float | None = None
) -> Target:
    """Judge `measured` <= limit by the far end of its interval; an invalid table gives its own word instead."""
    state, reason = validity
    if floor_limit is not None and math.isnan(floor_limit):
        floor_limit = None
    bound = limit if floor_limit is None else max(limit, floor_limit)
    if math.isnan(measured.median):
        verdict, note = ("void" if state == OK else state), reason + "; the peer shows no overhead to compare with"
    elif state != OK:
        verdict, note = state, reason
    elif measured.high <= bound:
        verdict, note = MET, reason if measured.high <= limit else reason + "; by the floor"
    else:
        verdict, note = NOT_MET, reason + ("" if measured.low > bound else "; the bound lies within the interval")
    return Target(text, limit, measured, floor_limit, verdict, note)
