"""Time of a training step outside its native passes and GEMMs, with caches that other work has emptied.

How it is taken: before every step a buffer of twice the last-level cache is written and a GEMM runs. The step then runs under
Python's own C profiler (`cProfile`, builtins on). The time inside calls of native kernels and of GEMMs is subtracted from the
whole step's, in that same step, so that the GEMMs' noise cancels. The profiler's own work is measured beside it, as what it
adds to the same step on small inputs with emptied caches, and subtracted too. What is left is Python, autograd and allocation.
A GEMM written with the operator `@` is no call, and would not be seen.
"""

from __future__ import annotations

import cProfile
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .machine import last_level_cache
from .measure import Tick
from .rounds import AGAIN, MOST, Samples, median_interval, validity
from .verdict import target

STEP = "outside native passes and GEMMs"
# as the profiler names them: "<built-in method torch.mm>"; an OpOverload's call has no name
INSIDE = re.compile(r"fastpeft|\b(?:linear|mm|addmm|addmm_|bmm|baddbmm|matmul)\b|method  of PyCapsule")


def flush() -> Callable[[], object]:
    """A call that empties the caches of data and of code, as the rest of a model does between two layers."""
    buffer = torch.zeros(2 * last_level_cache() // 4)
    x = torch.randn(1024, 1024)
    return lambda: (buffer.add_(1.0), x @ x)


def profiled(step: Callable[[], object]) -> list[Any]:
    """The profiler's entries for one step."""
    profile = cProfile.Profile(subcalls=False, builtins=True)
    profile.enable()
    step()
    profile.disable()
    return profile.getstats()


def outside(entries: list[Any]) -> float:
    """Seconds that are not spent in native passes or GEMMs."""
    return sum(e.inlinetime for e in entries if not (isinstance(e.code, str) and INSIDE.search(e.code)))


def profiler_cost(small: Callable[[], object], empty: Callable[[], object], rounds: int = 15) -> float:
    """Seconds that the profiler adds to a step whose own work is small."""
    added = []
    for _ in range(rounds):
        empty()
        start = time.perf_counter()
        small()
        plain = time.perf_counter() - start
        empty()
        start = time.perf_counter()
        profiled(small)
        added.append(time.perf_counter() - start - plain)
    return float(np.median(added))


def measure_outside(
    step: Callable[[], object], small: Callable[[], object], seconds: float, name: str, limit: float, tick: Tick = None
) -> dict[str, Any]:
    """A row: milliseconds outside, with their interval; every other step is the A/A row. small: `step` on small inputs."""
    empty = flush()
    for _ in range(3):
        step(), small()
    cost = profiler_cost(small, empty)
    times: dict[str, list[float]] = {STEP: [], AGAIN: []}
    end = time.perf_counter() + seconds
    while len(times[AGAIN]) < 6 or (time.perf_counter() < end and len(times[AGAIN]) < MOST):
        for values in times.values():
            empty()
            values.append(outside(profiled(step)) - cost)
        if tick is not None:
            tick()
    samples = Samples({key: [] for key in times}, times, len(times[AGAIN]), delay_known=False)
    state, own = validity(samples, STEP), median_interval(1e3 * samples.times(STEP))
    return {
        "kind": "outside",
        "key": f"{name}: ms {STEP}",
        "milliseconds": own.as_json(),
        "profiler_milliseconds": 1e3 * cost,  # already subtracted
        "samples": samples.as_json(),
        "aa": samples.ratio(AGAIN, STEP).as_json(),
        "validity": list(state),
        "targets": [target(f"{name}: ms {STEP}, caches emptied", limit, own, state).as_json()],
    }
