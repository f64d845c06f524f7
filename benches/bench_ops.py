"""The suites' kernel rows as pytest-benchmark rows: `pytest benches -k "lora_linear and 2048" --benchmark-json out.json`.

Each (case, function) is a row. Its samples are taken interleaved with its peers' first, FASTPEFT_BENCH_SECONDS (4) a case, then
handed to pytest-benchmark by a virtual clock; ratios with their intervals stand in `extra_info`.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Any

import pytest
import torch

from . import linear4bit, lora_linear, prefix_attention
from .kit.case import OURS, AnyCase
from .kit.measure import measure
from .kit.results import samples_of
from .kit.rounds import FROZEN

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAIRS = [(op, case) for op in (lora_linear, linear4bit, prefix_attention) for case in op.target_cases()]
PEERS = {lora_linear: ("PEFT", "PEFT same dtype", "PEFT compiled", "composition")}
PEERS[linear4bit] = (*linear4bit.RIVALS, linear4bit.INT4, linear4bit.DOUBLE, linear4bit.PEFT_4BIT)
PEERS[prefix_attention] = prefix_attention.RIVALS


class VirtualClock:
    """pytest-benchmark's timer: moves only when told to, by times that were measured before."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = VirtualClock()


@functools.cache
def measured(op: ModuleType, case: AnyCase) -> dict[str, Any]:
    return measure(op, case, float(os.environ.get("FASTPEFT_BENCH_SECONDS", "4")), DEVICE)[0]


@pytest.mark.parametrize(
    ("op", "case", "function"),
    [(op, case, function) for op, case in PAIRS for function in (FROZEN, OURS, *PEERS[op])],
    ids=lambda value: getattr(value, "KIND", getattr(value, "name", value)).replace(" ", "-"),
)
@pytest.mark.benchmark(timer=CLOCK, min_rounds=1)
def test_row(benchmark: Any, op: ModuleType, case: AnyCase, function: str) -> None:
    row = measured(op, case)
    samples = samples_of(row)
    if samples is None or function not in samples.seconds:
        pytest.skip(row["notes"].get(function, "not measured at this case"))
    assert function not in row["wrong"], f"{function}: errors {row['error'][function]} against float64"
    times = iter(samples.times(function))

    def step() -> None:
        CLOCK.now += next(times)

    benchmark.group = row["key"]
    benchmark.extra_info.update(validity=row["validity"], aa=row["aa"], rounds=samples.about())
    benchmark.extra_info["over"] = row["over"].get(function)
    if function == OURS:
        benchmark.extra_info.update(time=row["time"], targets=row["targets"])
    benchmark.pedantic(step, rounds=samples.kept, iterations=1)
