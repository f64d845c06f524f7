"""When a target counts as met: the rule, apart from any measuring."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from .case import BEST, BYTES, OURS, OVERHEAD, OWN_OVERHEAD, TIME, Limit
from .rounds import OK, UNDEFINED, Estimate, Samples, median_interval

FLOOR_ROOM = 1.3  # a target does not bind below this many times the op's byte/FLOP floor
MET, NOT_SHOWN, NOT_MET, WRONG = "met", "not shown", "not met", "wrong result"  # from best to worst
ORDER = (MET, NOT_SHOWN, NOT_MET, WRONG)


@dataclass(frozen=True)
class Target:
    """One line of the targets table; `limit` and `floor_limit` are in the unit of `measured`."""

    text: str
    limit: float
    measured: Estimate
    floor_limit: float | None  # FLOOR_ROOM x floor; None where there is no floor to speak of (counts, host cost)
    verdict: str
    note: str = ""
    rule: str = ""  # one of many rows of a rule

    def as_json(self) -> dict[str, object]:
        floor = None if self.floor_limit is None else round(self.floor_limit, 6)
        return {
            **asdict(self),
            "limit": round(self.limit, 6),
            "floor_limit": floor,
            "measured": self.measured.as_json(),
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Target:
        return Target(**{**data, "measured": Estimate.from_json(data["measured"])})


def target(
    text: str,
    limit: float,
    measured: Estimate,
    validity: tuple[str, str] = (OK, "a count"),
    floor_limit: float | None = None,
    rule: str = "",
) -> Target:
    """Judge `measured` <= limit (or the floor's, if that is higher): its whole interval must lie on one side."""
    if floor_limit is not None and math.isnan(floor_limit):
        floor_limit = None
    state, note = validity
    bound = limit if floor_limit is None else max(limit, floor_limit)
    if state == WRONG:
        verdict, measured = WRONG, UNDEFINED
    elif math.isnan(measured.median):
        verdict, note = NOT_SHOWN, f"{note}; the peer shows no overhead to compare with"
    elif state != OK:
        verdict = NOT_SHOWN
    elif measured.high <= bound:
        verdict, note = MET, note if measured.high <= limit else f"{note}; by the floor"
    elif measured.low > bound:
        verdict = NOT_MET
    else:
        verdict, note = NOT_SHOWN, f"{note}; the bound lies within the interval"
    return Target(text, limit, measured, floor_limit, verdict, note, rule)


def worst(targets: Iterable[Target]) -> list[Target]:
    """Rows of one rule as one target, with the worst verdict among them and the worst row that has it; others as they are."""
    rules: dict[str, list[Target]] = {}
    for one in targets:
        rules.setdefault(one.rule or one.text, []).append(one)
    return [rows[0] if not rows[0].rule else _worst_of(rule, rows) for rule, rows in rules.items()]


def _worst_of(rule: str, rows: list[Target]) -> Target:
    verdict = max((row.verdict for row in rows), key=ORDER.index)
    having = [row for row in rows if row.verdict == verdict]
    top = max(having, key=lambda row: -math.inf if math.isnan(row.measured.high) else row.measured.high)
    counts = ", ".join(f"{n} {v}" for v in ORDER if (n := sum(row.verdict == v for row in rows)))
    where = "" if verdict == MET else f": {top.text.split(': ')[0]} ({top.note})"
    return replace(top, text=f"{rule}, worst of {len(rows)} rows", note=counts + where)


def judge(
    limit: Limit, name: str, samples: Samples, reference: str, floor: dict[str, float], best: str | None, state: tuple
) -> Target | None:
    """The verdict on one limit of a row; None where its peer was not measured."""
    peer = best if limit.peer == BEST else limit.peer
    ours = limit.ours
    if ours not in samples.seconds or (limit.what in (TIME, OVERHEAD) and peer not in samples.seconds):
        return None
    of = f"{peer}, {BEST}" if limit.peer == BEST else peer
    text = f"{name}: {limit.what} over {of}'s" if ours == OURS else f"{name}: {ours}'s {limit.what} over {of}'s"
    room, frozen = floor.get("extra_seconds", 0.0) * FLOOR_ROOM, samples.median(reference)
    if limit.what == TIME:
        least = (
            frozen + room if room else floor.get("seconds", 0.0) * FLOOR_ROOM
        )  # the reference's own GEMM is left out
        bound = least / samples.median(peer) if least else None
        return target(text, limit.value, samples.ratio(ours, peer), state, bound, limit.rule)
    if limit.what == OVERHEAD:
        overhead = samples.overhead(peer, reference).median
        bound = room / frozen / overhead if overhead > 0 else None
        return target(text, limit.value, samples.overhead_ratio(ours, peer, reference), state, bound, limit.rule)
    if limit.what == OWN_OVERHEAD:
        text = f"{name}: overhead over the frozen layer"
        return target(text, limit.value, samples.overhead(ours, reference), state, room / frozen, limit.rule)
    assert limit.what == BYTES, limit.what  # a share of bandwidth is its own floor
    text = f"{name}: time over its bytes' at the machine's bandwidth"
    share = median_interval(samples.times(ours) / floor["byte_seconds"])
    return target(text, limit.value, share, state, None, limit.rule)
