"""Paired timing on a noisy machine, and the statistics that go with it.

One *round* times every function once, in one process, in alternating order. A round is dropped when this process's
threads waited for a CPU for more than 0.4 % of it. From the rounds that are kept:

    ratio           median over rounds of t_a / t_b
    overhead        median over rounds of t_a / t_frozen - 1
    overhead ratio  median overhead of a / median overhead of b

each with a 95 % bootstrap interval over rounds. The first function is run once more under another name (the A/A row):
what it shows is noise, and a table whose A/A row is off, or too wide for what is claimed, is void.
"""

from __future__ import annotations

import glob
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

DELAY_LIMIT = 0.004  # share of a round spent waiting for a CPU above which it is dropped
ROUNDS_NEEDED = 30  # fewer kept rounds than this are never a verdict
AA_LOW, AA_HIGH = 0.98, 1.02
RESAMPLES = 2000
AGAIN = "frozen again"  # the A/A row
FROZEN = "frozen"

OK, VOID, TOO_NOISY = "ok", "void", "too noisy"

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


def run_delay() -> float | None:
    """Seconds that this process's threads have waited for a CPU so far; None where the system does not tell."""
    total, found = 0, False
    for path in glob.glob("/proc/self/task/*/schedstat"):
        try:
            with open(path) as file:
                total += int(file.read().split()[1])  # time on CPU, *run delay*, time slices; ns
            found = True
        except (OSError, IndexError, ValueError):
            pass  # a thread that has just ended
    return total / 1e9 if found else None


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
    """Seconds per call of every function in the rounds that were kept."""

    seconds: dict[str, list[float]]
    rounds: int = 0  # all rounds, dropped ones too
    delay_known: bool = True
    dropped: dict[str, list[float]] = field(default_factory=dict)  # the other rounds': no verdict rests on them

    @property
    def kept(self) -> int:
        return min((len(v) for v in self.seconds.values()), default=0)

    def all_rounds(self) -> Samples:
        """Dropped rounds too: what to show where nothing else is left, beside the words "too noisy"."""
        seconds = {name: times + self.dropped.get(name, []) for name, times in self.seconds.items()}
        return Samples(seconds, self.rounds, self.delay_known)

    def times(self, name: str) -> np.ndarray:
        return np.asarray(self.seconds[name], dtype=np.float64)

    def median(self, name: str) -> float:
        return float(np.median(self.times(name))) if self.kept else math.nan

    def ratio(self, a: str, b: str) -> Estimate:
        """Time of a over time of b."""
        return median_interval(self.times(a) / self.times(b))

    def overhead(self, a: str, frozen: str = FROZEN) -> Estimate:
        """Time of a over the frozen layer alone, less 1."""
        return median_interval(self.times(a) / self.times(frozen) - 1)

    def overhead_ratio(self, a: str, b: str, frozen: str = FROZEN) -> Estimate:
        """Overhead of a over overhead of b; undefined where b's is not clearly above zero."""
        base = self.times(frozen)
        return median_ratio_interval(self.times(a) / base - 1, self.times(b) / base - 1)

    def best(self, names: Iterable[str]) -> str:
        return min(names, key=self.median)

    def as_json(self) -> dict[str, object]:
        seconds, dropped = (
            {k: [float(f"{t:.5g}") for t in v] for k, v in times.items()} for times in (self.seconds, self.dropped)
        )
        about = {"rounds": self.rounds, "kept": self.kept, "delay_known": self.delay_known}
        return {"seconds": seconds, **about, **({"dropped": dropped} if self.dropped and not self.kept else {})}

    @staticmethod
    def from_json(data: Mapping[str, object]) -> Samples:
        return Samples(
            {k: list(v) for k, v in data["seconds"].items()},  # type: ignore[attr-defined]
            int(data["rounds"]),  # type: ignore[call-overload]
            bool(data["delay_known"]),
            {k: list(v) for k, v in data.get("dropped", {}).items()},  # type: ignore[attr-defined]
        )


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


def validity(samples: Samples, claimed: float | None, first: str = FROZEN, again: str = AGAIN) -> tuple[str, str]:
    """(ok | void | too noisy, the reason): may anything be claimed from these samples?

    claimed: the smallest overhead claimed; the A/A interval may be a fifth of it wide. None: only ratios of times.
    """
    if samples.kept < ROUNDS_NEEDED:
        return TOO_NOISY, f"{samples.kept} of {samples.rounds} rounds kept, {ROUNDS_NEEDED} needed"
    aa = samples.ratio(again, first)
    if not AA_LOW <= aa.median <= AA_HIGH:
        return VOID, f"A/A {aa}, outside {AA_LOW}-{AA_HIGH}"
    if claimed is not None and not math.isnan(claimed) and aa.high - aa.low > abs(claimed) / 5:
        return VOID, f"A/A interval {aa.high - aa.low:.4f} wide, over a fifth of the claimed overhead {claimed:.4f}"
    return OK, f"A/A {aa}"


@dataclass
class Rounds:
    """Runs rounds over named functions and collects what is kept."""

    names: Sequence[str]
    timer: Timer = time_cpu
    clock: Callable[[], float] = time.perf_counter
    delay: Callable[[], float | None] = run_delay
    samples: Samples = field(init=False)
    _order: list[str] = field(init=False)
    _rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.samples = Samples({name: [] for name in self.names})
        self._order, self._rng = list(self.names), random.Random(0)

    def run(self, functions: Mapping[str, Callable[[], object]], calls: int = 1, count: bool = True) -> bool:
        """One round; True if it was kept. Orders come in pairs: a shuffle, then its reverse."""
        if self.samples.rounds % 2:
            self._order.reverse()
        else:
            self._rng.shuffle(self._order)
        before, start = self.delay(), self.clock()
        took = {name: self.timer(functions[name], calls) / calls for name in self._order}
        length, after = self.clock() - start, self.delay()
        if not count:
            return False
        self.samples.rounds += 1
        if before is None or after is None:
            self.samples.delay_known = False
        kept = before is None or after is None or after - before <= DELAY_LIMIT * length
        into = self.samples.seconds if kept else self.samples.dropped
        for name, seconds in took.items():
            into.setdefault(name, []).append(seconds)
        return kept


def paired(
    functions: Mapping[str, Callable[[], object]],
    seconds: float,
    *,
    most: int = 200,
    warm: int = 3,
    sample: float = 0.004,
    device: str = "cpu",
    timer: Timer | None = None,
    tick: Callable[[], object] | None = None,
) -> Samples:
    """Rounds over `functions` for `seconds` (at least 3 rounds, at most `most` kept ones).

    timer: how a sample is taken; default, wall time on the CPU and device time on a GPU.
    sample: the least seconds one sample takes; quick functions are called several times for it, all the same number.
    """
    timer = timer or timer_for(device)
    for function in functions.values():
        for _ in range(warm):
            function()
    quickest = min(timer(function, 1) for function in functions.values())
    calls = max(1, math.ceil(sample / max(quickest, 1e-7)))
    rounds = Rounds(list(functions), timer)
    end = time.perf_counter() + seconds
    rounds.run(functions, calls, count=False)  # the first round still warms up
    while rounds.samples.rounds < 3 or (time.perf_counter() < end and rounds.samples.kept < most):
        rounds.run(functions, calls)
        if tick is not None:
            tick()
    return rounds.samples
