"""Paired timing on a noisy machine, and the statistics that go with it.

One *round* times every function once, in one process, in alternating order. Rounds in which this process's threads waited
for a CPU for more than 0.4 % of the time are dropped while 30 others remain; where fewer would, all are kept. From these:

    ratio           median over rounds of t_a / t_b
    overhead        median over rounds of t_a / t_reference - 1
    overhead ratio  median overhead of a / median overhead of b

each with a 95 % bootstrap interval over rounds. The reference is run once more under another name (the A/A row): what that
shows is noise, and where its interval leaves 0.98-1.02 nothing is claimed from the rounds.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastpeft.machine import run_delay

DELAY_LIMIT = 0.004  # share of a round spent waiting for a CPU above which it is dropped
ROUNDS_NEEDED = 30  # undisturbed rounds; where there are fewer, disturbed ones count too
LEAST_ROUNDS = 6  # below, the bootstrap of a median spans less than 95 %
AA_LOW, AA_HIGH = 0.98, 1.02
MOST = 200  # undisturbed rounds: more make no narrower an interval worth the time
RESAMPLES = 2000
FROZEN, AGAIN = "frozen", "frozen again"  # the usual reference, and the A/A row's name for any reference

OK, NOISY = "ok", "noisy"

Timer = Callable[[Callable[[], object], int], float]


@dataclass(frozen=True)
class Estimate:
    """A median with its 95 % interval; NaN where it is not defined."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.median):
            return "-"
        if math.isnan(self.low) or self.low == self.high:
            return f"{self.median:.3f}"
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def as_json(self) -> list[float | None]:
        return [None if math.isnan(v) else round(v, 6) for v in (self.median, self.low, self.high)]

    @staticmethod
    def from_json(values: Sequence[float | None]) -> Estimate:
        median, low, high = (math.nan if v is None else v for v in values)
        return Estimate(median, low, high)

    @staticmethod
    def exact(value: float) -> Estimate:
        """A count (bytes), which has no spread."""
        return Estimate(value, value, value)


UNDEFINED = Estimate(math.nan, math.nan, math.nan)


def time_cpu(function: Callable[[], object], calls: int) -> float:
    """Wall seconds of `calls` calls."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return time.perf_counter() - start


def time_cuda(function: Callable[[], object], calls: int) -> float:
    """Device seconds of `calls` calls between two events on the current stream."""
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def timer_for(device: str) -> Timer:
    return time_cuda if device.startswith("cuda") else time_cpu


@dataclass
class Samples:
    """Seconds per call of every function, round by round: undisturbed rounds, and apart from them disturbed ones."""

    seconds: dict[str, list[float]]
    disturbed: dict[str, list[float]] = field(default_factory=dict)
    rounds: int = 0  # all that were run; more than are here where a file left disturbed ones out
    delay_known: bool = True

    @property
    def undisturbed(self) -> int:
        return min((len(v) for v in self.seconds.values()), default=0)

    @property
    def kept(self) -> int:
        """Rounds that the figures rest on."""
        return len(self.times(next(iter(self.seconds)))) if self.seconds else 0

    def times(self, name: str) -> np.ndarray:
        enough = self.undisturbed >= ROUNDS_NEEDED
        return np.asarray(self.seconds[name] + ([] if enough else self.disturbed.get(name, [])), dtype=np.float64)

    def median(self, name: str) -> float:
        times = self.times(name)
        return float(np.median(times)) if len(times) else math.nan

    def about(self) -> str:
        """Which rounds the figures rest on, for the tables."""
        if self.undisturbed >= ROUNDS_NEEDED:
            return f"{self.undisturbed} of {self.rounds}"
        return (
            f"all {self.kept}" if self.kept == self.rounds else f"{self.kept} of {self.rounds}, the rest not recorded"
        )

    def ratio(self, a: str, b: str) -> Estimate:
        """Time of a over time of b."""
        return median_interval(self.times(a) / self.times(b))

    def overhead(self, a: str, reference: str = FROZEN) -> Estimate:
        """Time of a over the reference, less 1."""
        return median_interval(self.times(a) / self.times(reference) - 1)

    def overhead_ratio(self, a: str, b: str, reference: str = FROZEN) -> Estimate:
        """Overhead of a over overhead of b; undefined where b's is not clearly above zero."""
        base = self.times(reference)
        return median_ratio_interval(self.times(a) / base - 1, self.times(b) / base - 1)

    def best(self, names: Iterable[str]) -> str:
        return min(names, key=self.median)

    def as_json(self) -> dict[str, object]:
        def short(times: dict[str, list[float]]) -> dict[str, list[float]]:
            return {k: [float(f"{t:.5g}") for t in v] for k, v in times.items()}

        disturbed = {} if self.undisturbed >= ROUNDS_NEEDED else short(self.disturbed)
        about = {"rounds": self.rounds, "delay_known": self.delay_known}
        return {"seconds": short(self.seconds), "disturbed": disturbed, **about}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Samples:
        return Samples(data["seconds"], data["disturbed"], data["rounds"], data["delay_known"])


def _resample(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, count, (RESAMPLES, count))  # seeded: the same file gives the same table


def median_interval(values: np.ndarray) -> Estimate:
    """Median with the percentile interval of its bootstrap."""
    if len(values) == 0:
        return UNDEFINED
    medians = np.median(values[_resample(len(values))], axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return Estimate(float(np.median(values)), float(low), float(high))


def median_ratio_interval(top: np.ndarray, bottom: np.ndarray) -> Estimate:
    """median(top) / median(bottom), rounds resampled together."""
    if len(top) == 0:
        return UNDEFINED
    pick = _resample(len(top))
    bottoms = np.median(bottom[pick], axis=1)
    if np.percentile(bottoms, 2.5) <= 0:
        return UNDEFINED  # a peer without overhead: nothing to be a share of
    ratios = np.median(top[pick], axis=1) / bottoms
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Estimate(float(np.median(top) / np.median(bottom)), float(low), float(high))


def validity(samples: Samples, reference: str, again: str = AGAIN) -> tuple[str, str]:
    """(OK | NOISY, the reason): may anything be claimed from these samples?"""
    if samples.kept < LEAST_ROUNDS:
        return NOISY, f"{samples.kept} rounds, {LEAST_ROUNDS} needed"
    aa = samples.ratio(again, reference)
    within = aa.low >= AA_LOW and aa.high <= AA_HIGH
    return (OK, f"A/A {aa}") if within else (NOISY, f"A/A {aa}, not within {AA_LOW}-{AA_HIGH}")


@dataclass
class Rounds:
    """Runs rounds over named functions and collects their times."""

    names: Sequence[str]
    timer: Timer = time_cpu
    clock: Callable[[], float] = time.perf_counter
    delay: Callable[[], float | None] = run_delay
    within: Mapping[str, Callable[[], AbstractContextManager]] = field(default_factory=dict)  # entered around a sample
    samples: Samples = field(init=False)
    _order: list[str] = field(init=False)
    _rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.samples = Samples({name: [] for name in self.names})
        self._order, self._rng = list(self.names), random.Random(0)

    def run(self, functions: Mapping[str, Callable[[], object]], calls: int = 1, count: bool = True) -> bool:
        """One round; True if it was undisturbed. Orders come in pairs: a shuffle, then its reverse."""
        if self.samples.rounds % 2:
            self._order.reverse()
        else:
            self._rng.shuffle(self._order)
        before, start = self.delay(), self.clock()
        took = {}
        for name in self._order:
            with self.within.get(name, nullcontext)():
                took[name] = self.timer(functions[name], calls) / calls
        length, after = self.clock() - start, self.delay()
        if not count:
            return False
        self.samples.rounds += 1
        if before is None or after is None:
            self.samples.delay_known = False
        kept = before is None or after is None or after - before <= DELAY_LIMIT * length
        into = self.samples.seconds if kept else self.samples.disturbed
        for name, seconds in took.items():
            into.setdefault(name, []).append(seconds)
        return kept

    def until(
        self,
        functions: Mapping[str, Callable[[], object]],
        seconds: float,
        *,
        calls: int = 1,
        least: int = 3,
        most: int | None = None,
        tick: Callable[[], object] | None = None,
    ) -> Samples:
        """Rounds for `seconds`: at least `least` of them, at most `most` (MOST) undisturbed ones."""
        end = time.perf_counter() + seconds
        while self.samples.rounds < least or (time.perf_counter() < end and self.samples.undisturbed < (most or MOST)):
            self.run(functions, calls)
            if tick is not None:
                tick()
        return self.samples


def paired(
    functions: Mapping[str, Callable[[], object]],
    seconds: float,
    *,
    timer: Timer = time_cpu,
    within: Mapping[str, Callable[[], AbstractContextManager]] | None = None,
    warm: int = 3,
    sample: float = 0.004,
    tick: Callable[[], object] | None = None,
) -> Samples:
    """Rounds over `functions` for `seconds` (at least 3 rounds, at most MOST undisturbed ones).

    sample: the least seconds one sample takes; quick functions are called several times for it, all the same number.
    """
    rounds = Rounds(list(functions), timer, within=within or {})
    quickest = math.inf
    for name, function in functions.items():
        with rounds.within.get(name, nullcontext)():
            for _ in range(warm):
                function()
            quickest = min(quickest, timer(function, 1))
    calls = max(1, math.ceil(sample / max(quickest, 1e-7)))
    rounds.run(functions, calls, count=False)  # the first round still warms up
    return rounds.until(functions, seconds, calls=calls, tick=tick)
