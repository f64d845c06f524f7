"""Check and time one case of an op: a line for the results file in every timing mode."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict
from types import ModuleType
from typing import Any

import torch

from . import cuda, machine
from .case import OURS, AnyCase, Cost, Limit, Work
from .rounds import AGAIN, Samples, Timer, paired, time_cpu, validity
from .verdict import WRONG, judge

Tick = Callable[[], object] | None
Prepare = Callable[[Callable[[], object]], Callable[[], object]]
Modes = dict[str, tuple[Prepare, Timer]]


def as_it_is(function: Callable[[], object]) -> Callable[[], object]:
    return function


def modes(device: str, host: bool = False) -> Modes:
    """name -> (what is done with a function before it is timed, timer)"""
    if device == "cpu" or host:
        return {cuda.WALL: (as_it_is, time_cpu)}
    return {m: (as_it_is if m == cuda.WALL else cuda.captured, timer) for m, timer in cuda.TIMERS.items()}


def check(work: Work) -> tuple[dict[str, list[float]], set[str]]:
    """Relative errors (Frobenius) against float64 of every function's outputs, and the names of the wrong functions.

    Wrong: above twice the error of PyTorch's composition in the same dtype, plus a quarter eps. A function may lack the
    composition's last gradients.
    """
    if work.exact is None or work.plain is None:
        return {}, set()
    truths: dict[str, Any] = {}

    def errors(function: Any) -> list[float]:
        if function.truth not in truths:
            truths[function.truth] = work.exact(function.truth)
        pairs = zip(work.outputs(function), truths[function.truth], strict=True)
        return [float((y[rows or slice(None)].double() - want).norm() / want.norm()) for y, (rows, want) in pairs]

    allowed = [2 * e + torch.finfo(work.dtype).eps / 4 for e in errors(work.plain)]
    measured = {name: errors(f) for name, f in work.functions.items() if name not in work.unchecked}
    right = {n for n, e in measured.items() if all(v <= most for v, most in zip(e, allowed[: len(e)], strict=True))}
    return measured, set(measured) - right


def floors(cost: Cost, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Least seconds by bytes and by FLOPs at this machine's best rates; none for a row without a cost."""
    if not cost.flops and not cost.bytes:
        return {}
    rate, bandwidth = machine.rates(dtype, device)
    return {
        **asdict(cost),
        "byte_seconds": cost.bytes / bandwidth,
        "seconds": max(cost.flops / rate, cost.bytes / bandwidth),
        "extra_seconds": max(cost.extra_flops / rate, cost.extra_bytes / bandwidth),
    }


def attempt(work: Work, act: Callable[[Callable[[], object]], Any], notes: dict[str, str]) -> dict[str, Any]:
    """name -> act(a timed call); a peer that cannot (compile, say, or be captured) is left out with a note."""
    found = {}
    for name, function in work.functions.items():
        try:
            with function.within():
                found[name] = act(work.runner(name))
        except Exception as failure:
            if name in (work.reference, OURS):
                raise
            notes[name] = f"left out: {type(failure).__name__}: {str(failure)[:200]}"
    return found


def measure(
    op: ModuleType,
    case: AnyCase,
    seconds: float,
    device: str = "cpu",
    tick: Tick = None,
    without: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Rows of one case, one a timing mode; `seconds` of sampling for all of them. without: peers to leave out."""
    work: Work = op.work(case, device)
    work.functions = {name: f for name, f in work.functions.items() if name not in without}
    gradients = torch.enable_grad() if work.grad or work.dy is not None else torch.no_grad()
    rows = []
    with work.within(), gradients:
        missing: dict[str, str] = {}
        runs = attempt(work, lambda run: run(), missing)
        work.functions = {name: work.functions[name] for name in runs}
        error, wrong = check(work)
        floor = floors(work.cost, work.dtype, device)
        ways = modes(device, work.host)
        for mode, (prepare, timer) in ways.items():
            notes = dict(missing)
            functions = attempt(work, prepare, notes)
            gpu = device != "cpu"
            peak = {n: cuda.peak_bytes(work.runner(n)) for n in functions} if gpu and not rows else {}
            functions[AGAIN] = functions[work.reference]
            # a captured graph has its plan; others are run within it
            within = {} if prepare is cuda.captured else {n: f.within for n, f in work.functions.items()}
            sample = 0.01 if work.host else 0.0001 if mode == cuda.COLD else 0.001 if gpu else 0.004
            share = seconds / len(ways)
            warm = 1 if gpu else 3
            samples = paired(functions, share, timer=timer, within=within, sample=sample, warm=warm, tick=tick)
            row = {"kind": "row", "op": op.KIND, "table": case.table, "case": _case(case), "mode": mode}
            row["key"] = case.name if len(ways) == 1 else f"{case.name}, {mode}"
            row |= {"error": error, "wrong": sorted(wrong), "notes": notes, "floor": floor, "peak_bytes": peak}
            row |= {"samples": samples.as_json(), "rivals": list(work.rivals), "plans": list(work.plans)}
            rows.append({**row, **summary(row, samples, case.limits)})
    return rows


def _case(case: Any) -> dict[str, Any]:
    return {key: value for key, value in asdict(case).items() if key != "limits"}


def summary(row: dict[str, Any], samples: Samples, limits: tuple[Limit, ...]) -> dict[str, Any]:
    """Ratios and verdicts from a row's samples: what tables print, gates compare. No figure of a wrong function."""
    wrong, reference = set(row["wrong"]), next(iter(samples.seconds))
    right = [n for n in samples.seconds if n not in wrong and n != AGAIN]
    peers = [n for n in right if n != OURS and n not in row["plans"]]
    rivals = [n for n in row["rivals"] if n in right]
    best = samples.best(rivals) if rivals else None
    state = validity(samples, reference)
    floor, targets = row["floor"], []
    for limit in limits:
        if limit.mode in ("", row["mode"]):
            bad = {limit.ours, limit.peer} & wrong
            judged = (WRONG, "error against float64 too large") if bad else state
            found = judge(limit, row["key"], samples, reference, floor, best, judged)
            targets += [] if found is None else [found.as_json()]
    return {
        "reference": reference,
        "over": {n: samples.ratio(n, reference).as_json() for n in right if n != reference},
        "time": {n: samples.ratio(OURS, n).as_json() for n in peers if OURS in right},
        "best_peer": best,
        "floor_share": floor["seconds"] / samples.median(OURS) if floor and OURS in right else None,
        "byte_share": floor["byte_seconds"] / samples.median(OURS) if floor and OURS in right else None,
        "floor_overhead": floor["extra_seconds"] / samples.median(reference) if floor.get("extra_seconds") else None,
        "aa": samples.ratio(AGAIN, reference).as_json(),
        "validity": list(state),
        "targets": targets,
    }
