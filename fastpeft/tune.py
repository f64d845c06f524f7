"""`fastpeft tune`: measures this machine's crossovers and writes them to its own plans (`backends/plans_file.py`).

An entry of the plan is a value on a ladder: a number of rows, a size, a switch. Two neighbours are timed in turn where the plan
takes different ways with them. From the built-in value on, a neighbour that wins on every layer by more than the noise takes
its place, and the next one is tried; anything less changes nothing. What was found holds for the entries after it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from . import __version__, machine, native, ops
from .backends import plans, plans_file
from .backends.choice import backend
from .backends.cpu import linear4bit as cpu_4bit
from .backends.cpu import prefix_attention as cpu_attention

SECONDS = 170.0
MARGIN = 0.02  # a smaller gain is no reason to leave the built-in value
SIGMAS = 3.0  # of intervals
LEAST_ROUNDS, MOST_ROUNDS = 9, 400  # fewer give no such interval
SAMPLE = 0.02  # seconds of calls, of which the quickest counts
SHAPES = ((2048, 2048), (1536, 576))  # N, K
RING, MOST_COPIES = 64 << 20, 64  # bytes of a weight's copies: each call reads its own from memory, as a decoder does
RANK = 16
DISTURBED = 0.05  # share of its time that threads may wait for a CPU in a round that counts
ROWS = (0, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
MOST_ROWS = ROWS[-1]

Call = Callable[[], object]
Calls = Callable[[int], list[Call]]  # by size


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="fastpeft tune",
        description="Measure which way is fastest on this machine, and keep it in a file that fastpeft reads when it is "
        "imported. For a machine that does nothing else meanwhile. Ctrl-C leaves the old file.",
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="how long to measure (default: %(default)g)")
    parser.add_argument("--out", type=Path, help="the file (default: FASTPEFT_PLANS_FILE, else in the config folder)")
    options = parser.parse_args(argv)
    if not 0 < options.seconds < math.inf:
        parser.error(f"argument --seconds: expected a number above 0, got {options.seconds:g}")
    file = options.out or plans_file.path()
    if native.cpu() is None:
        return _fail(f"there are no CPU kernels to measure: {native.why_not_cpu()}")
    if file is None:
        return _fail("FASTPEFT_PLANS_FILE is empty, so no file would be read: set it, or name one by --out")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()  # rather than after minutes
        if file.is_dir():
            raise IsADirectoryError("it is a folder")
        return _run(file, options.seconds)
    except OSError as error:
        return _fail(f"{file} cannot be written: {error}")
    except KeyboardInterrupt:
        print(f"\nfastpeft tune: interrupted, nothing was written to {file}", file=sys.stderr)
        return 130


def _fail(why: str) -> int:
    print(f"fastpeft tune: {why}", file=sys.stderr)
    return 2


def _run(file: Path, seconds: float) -> int:
    here = plans.here()
    about = f"{here['cpu']}, kind {here['kind']}, {here['isa']}, {here['threads']} threads, torch {torch.__version__}"
    print(f"{about}: {seconds:g} s", file=sys.stderr)
    start, waited = time.perf_counter(), machine.run_delay()
    results = measure(seconds, Bar(seconds))
    print(as_table(results))
    if waited is not None:
        share = (machine.run_delay() - waited) / (time.perf_counter() - start) / here["threads"]
        if share > DISTURBED:
            print(
                f"The machine was busy, threads waited for a CPU {share:.0%} of the time: run it again when it is not."
            )
    if not any(result.tried for result in results):
        return _fail(f"{seconds:g} s were too few to measure anything; nothing was written to {file}")
    found: dict[str, Any] = {}
    for result in results:
        found = plans.merged(found, result.changed())
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    versions = {"fastpeft": __version__, "torch": torch.__version__, "measured": now}
    plans_file.write(file, {"format": plans_file.FORMAT, "machine": here} | versions | {"cpu": found})
    print(f"Written to {file}.")
    if file != plans_file.path():
        print(f"fastpeft reads it where FASTPEFT_PLANS_FILE={file}.")
    return 0


# ---- the machine's layers --------------------------------------------------------------------------------------------


class Layer:
    """A frozen weight with an adapter, in so many copies that each call finds its own in memory."""

    def __init__(self, storage: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.n, self.k = shape
        self.dtype = dtype
        self.weights = itertools.cycle(_copies(storage, shape, torch.float32 if storage == "4 bits" else dtype))
        self.a, self.b = torch.randn(RANK, self.k, dtype=dtype), torch.randn(self.n, RANK, dtype=dtype)

    def forward(self, m: int, adapter: bool = True) -> Call:
        x = torch.randn(m, self.k, dtype=self.dtype)
        a, b = (self.a, self.b) if adapter else (None, None)
        return lambda: ops.lora_linear(x, next(self.weights), a, b, scale=1.0)

    def gradient(self, m: int) -> Call:
        """Of x, over a weight in 4 bits."""
        dy = torch.randn(m, self.n, dtype=self.dtype)
        return lambda: cpu_4bit.combine_4bit([dy], [next(self.weights)])


@functools.lru_cache(maxsize=6)
def _copies(storage: str, shape: tuple[int, int], dtype: torch.dtype) -> list[Any]:
    w = torch.randn(shape, dtype=dtype)
    if storage == "4 bits":
        packed = ops.quantize_4bit(w, double_quant=True)
        return [replace(packed, data=packed.data.clone()) for _ in range(_count(packed.nbytes))]
    if storage == "transposed":
        w = w.t().contiguous().t()
    return [w.clone() for _ in range(_count(w.nbytes))]


def _count(size: int) -> int:
    return max(2, min(MOST_COPIES, RING // size))


# ---- the entries -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """What is measured of the plan: `name`, or its part `of` (a dtype, a size of slabs)."""

    name: str
    of: str | None
    ladder: Sequence[Any]
    size: Callable[[Any, Any], int]  # at which the plan takes different ways with two neighbours
    calls: Calls
    within: dict[str, Any] = field(default_factory=dict)  # entries of the plan that bring the calls there
    unit: str = "rows"

    def __str__(self) -> str:
        return self.name if self.of is None else f"{self.name} {self.of}"

    def at(self, value: Any) -> dict[str, Any]:
        return {self.name: value if self.of is None else {self.of: value}}


def entries() -> Iterator[Entry]:
    """In the order to measure; each looks at the plan in use when its turn comes."""
    (big, small), fp32, bf16 = SHAPES, torch.float32, torch.bfloat16
    few = {"few_rows": dict.fromkeys(plans.DTYPES, MOST_ROWS), "few_rows_4bit": dict.fromkeys(plans.DTYPES, MOST_ROWS)}
    gemms = {"few_rows": dict.fromkeys(plans.DTYPES, 0), "few_rows_4bit": dict.fromkeys(plans.DTYPES, 0)}

    if torch.get_num_threads() > 1:
        ladder = [25e3 * 2**i for i in range(8)]
        yield Entry("parallel_work", None, ladder, max, _work, few, "multiply-adds")
    calls = _layers([("dense", small, bf16), ("4 bits", small, bf16)])
    yield Entry("widens", None, [False, True], _many, calls, gemms)
    if plans.current.widens:
        yield Entry("slab", "min_rows", [m for m in ROWS if m >= 16], min, _layers([("dense", small, bf16)]), gemms)
    calls = _layers([("4 bits", (2 * big[0], big[1]), fp32)], gradients=True)  # more than any slab
    yield Entry("slab", "elements_4bit", [1 << i for i in range(19, 23)], _many, calls, gemms)
    if native.cpu().isa() == "avx512bf16":
        calls = _layers([(storage, shape, bf16) for storage in ("4 bits", "dense") for shape in SHAPES])
        yield Entry("dot", None, [False, True], lambda old, new: 16, calls, few)
    yield Entry("own_attention", None, [False, True], lambda old, new: 512, _attention)
    for dtype in (fp32, bf16, torch.float16):  # the least used last, when little time may be left
        name = str(dtype).removeprefix("torch.")
        yield Entry("few_rows", name, ROWS, max, _layers([("dense", shape, dtype) for shape in SHAPES]))
        calls = _layers([("4 bits", shape, dtype) for shape in SHAPES], gradients=True)
        yield Entry("few_rows_4bit", name, ROWS, max, calls)
        if dtype is bf16:
            calls = _layers([("transposed", small, each) for each in (fp32, bf16)])
            yield Entry("few_rows_transposed", None, ROWS, max, calls, few)


def _attention(tokens: int) -> list[Call]:
    """Causal attention forward, and its gradients."""
    numbers = True, None, 0.0, None, 0.125  # causal, mask, p, seed, scale

    def of(dtype: torch.dtype) -> list[Call]:
        q, k, v = (torch.randn(1, heads, tokens, 64, dtype=dtype) for heads in (8, 2, 2))
        o, lse = cpu_attention.tokens(q, k, v, *numbers)
        return [
            lambda: cpu_attention.tokens(q, k, v, *numbers)[0],
            lambda: cpu_attention.grad_tokens(o, q, k, v, o, lse, *numbers, (True,) * 3)[0],
        ]

    return of(torch.float32) + of(torch.bfloat16)


def _many(old: Any, new: Any) -> int:
    return 128


def _layers(of: list[tuple[str, tuple[int, int], torch.dtype]], gradients: bool = False) -> Calls:
    def calls(m: int) -> list[Call]:
        layers = [Layer(*each) for each in of]
        return [layer.forward(m) for layer in layers] + [layer.gradient(m) for layer in layers if gradients]

    return calls


def _work(work: int) -> list[Call]:
    """One row over weights of so many elements."""
    shape = (max(16, int(work) // 512 // 16 * 16), 512)
    return [Layer(storage, shape, torch.float32).forward(1, adapter=False) for storage in ("dense", "4 bits")]


# ---- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    """Time of one way over another's: the median of rounds, and an interval that rests on their order alone."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(logs: Sequence[float]) -> Ratio | None:
        """None: too few rounds for an interval."""
        n = len(logs)
        out = math.floor((n - SIGMAS * math.sqrt(n)) / 2)  # of the median's rank, on each side
        if n < LEAST_ROUNDS or out < 0:
            return None
        ordered = sorted(logs)
        median = (ordered[n // 2] + ordered[(n - 1) // 2]) / 2
        return Ratio(*(math.exp(log) for log in (median, ordered[out], ordered[n - 1 - out])))

    @property
    def wins(self) -> bool:
        return self.high < 1 - MARGIN

    @property
    def loses(self) -> bool:
        """Or gains too little."""
        return self.low > 1 - MARGIN

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass
class Result:
    """What an entry came to. tried: (value, its neighbour, size, time of the plan with the one over that with the other)."""

    entry: Entry
    built_in: Any
    value: Any
    tried: list[tuple[Any, Any, int, Ratio]]

    def changed(self) -> dict[str, Any]:
        """What the plan gets."""
        return self.entry.at(self.value) if self.value != self.built_in else {}

    def row(self) -> tuple[str, str, str, str]:
        name, built_in, value = str(self.entry), _show(self.built_in), _show(self.value)
        if not self.tried:
            return name, built_in, value, "not measured: too few undisturbed rounds in its time"
        moved = [each for each in self.tried if each[3].wins]
        new, old, size, ratio = moved[-1] if moved else min(self.tried, key=lambda each: each[3].median)
        return name, built_in, value, f"{_show(new)} over {_show(old)}: {ratio} at {size:,.0f} {self.entry.unit}"


def measure(seconds: float, bar: Bar) -> list[Result]:
    """Every entry, from the built-in plan of this machine's kind on, in so many seconds together."""
    end = time.perf_counter() + seconds
    results: list[Result] = []
    found: dict[str, Any] = {}
    with torch.no_grad(), backend("cpu"), plans.plan(plans.kind()):
        left, turn = len(list(entries())), entries()
        while True:
            with plans.override("cpu", **found):
                entry = next(turn, None)
                if entry is None:
                    return results
                results.append(climb(entry, end, max(1, left), bar))
            left -= 1
            bar.done(results[-1], len(results) / (len(results) + max(0, left)))
            found = plans.merged(found, results[-1].changed())


def climb(entry: Entry, end: float, left: int, bar: Bar) -> Result:
    """From the value in use up the ladder as long as that wins; else down. Takes its share of the time to `end`."""
    plan = plans.current.cpu | plans.rows(plans.current.cpu, native.cpu().isa())
    built_in = plan[entry.name] if entry.of is None else plan[entry.name][entry.of]
    ladder = sorted({*entry.ladder, built_in})
    result = Result(entry, built_in, built_in, [])
    own_end = 0.0
    for step in (1, -1):
        i = ladder.index(built_in) + step
        while 0 <= i < len(ladder) and time.perf_counter() < end:
            new, old = ladder[i], ladder[i - step]
            size = entry.size(old, new)
            bar.show(f"{entry}: {_show(new)} or {_show(old)}")
            calls = entry.calls(size)
            now = time.perf_counter()
            own_end = own_end or now + (end - now) / left
            with plans.override("cpu", **entry.within):
                ratio = compare(calls, [entry.at(new), entry.at(old)], now + (own_end - now) / 2, bar)
            if ratio is not None:
                result.tried.append((new, old, size, ratio))
            if ratio is None or not ratio.wins:
                break
            result.value = new
            i += step
        if result.value != built_in:
            break
    return result


def compare(calls: list[Call], ways: list[dict[str, Any]], end: float, bar: Bar) -> Ratio | None:
    """Time of a call by the first way over that by the second, of the call that gains least; None: too few rounds.

    A round takes both ways through each call, in random order, and does not count where threads waited for a CPU: then what
    is timed is their waiting for each other. It ends when it is clear whether the first way wins everywhere.
    """
    logs: list[list[float]] = [[] for _ in calls]
    repeats: list[int] = []
    for call in calls:  # warm, and how long it takes
        quickest = math.inf
        for way in ways:
            if time.perf_counter() > end:
                return None
            with plans.override("cpu", **way):
                call()
                quickest = min(quickest, _seconds(call, 1))
        repeats.append(max(1, min(16, round(SAMPLE / quickest))))
    ratio: Ratio | None = None
    while min(map(len, logs)) < MOST_ROUNDS:
        for call, times, log in zip(calls, repeats, logs):
            took = [0.0, 0.0]
            start, waited = time.perf_counter(), machine.run_delay() or 0.0
            for which in random.sample((0, 1), 2):
                if time.perf_counter() > end:
                    return ratio
                with plans.override("cpu", **ways[which]):
                    took[which] = _seconds(call, times)
            waited = (machine.run_delay() or 0.0) - waited
            if waited <= DISTURBED * (time.perf_counter() - start):
                log.append(math.log(took[0] / took[1]))
        bar.tick()
        ratios = [found for log in logs if (found := Ratio.of(log))]
        if len(ratios) == len(calls):
            ratio = max(ratios, key=lambda each: each.high)
            if ratio.wins or any(each.loses for each in ratios):
                break
    return ratio


def _seconds(call: Call, times: int) -> float:
    """Of the quickest of so many calls."""
    least = math.inf
    for _ in range(times):
        start = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - start)
    return least


# ---- what is shown ---------------------------------------------------------------------------------------------------


class Bar:
    """Progress on stderr: one line that is drawn again on a terminal, else a line an entry."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds, self.share, self.drawn = time.perf_counter(), seconds, 0.0, 0.0
        self.text, self.live = "", sys.stderr.isatty()

    def show(self, text: str) -> None:
        self.text, self.drawn = text, 0.0
        self.tick()

    def tick(self) -> None:
        now = time.perf_counter()
        if self.live and now > self.drawn + 0.2:
            share, self.drawn = max(self.share, min(1.0, (now - self.start) / self.seconds)), now
            sys.stderr.write(f"\r[{'#' * round(30 * share):<30}] {share:4.0%}  {self.text[:60]}\x1b[K")
            sys.stderr.flush()

    def done(self, result: Result, share: float) -> None:
        """An entry is measured; `share` of them are."""
        self.share = share
        line = f"{time.perf_counter() - self.start:4.0f} s  {result.entry}\n"
        sys.stderr.write("\r\x1b[K" if self.live else line)
        sys.stderr.flush()


def as_table(results: list[Result]) -> str:
    rows = [
        ("entry", "built in", "measured", "time over the neighbour's [99.7 % interval], of the layer that gains least")
    ]
    rows += [result.row() for result in results]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths)), row[3]]) for row in rows)


def _show(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else f"{value:,.0f}"
