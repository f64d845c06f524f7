"""The GPU suite in one command: build, test, measure, write one JSON with plots, and judge it against a baseline.

    python -m benches.gpu_suite                                # results in gpu-results/
    python -m benches.gpu_suite --gate benches/baselines/h100.json

Stays under 9 minutes; 4-bit rows: `benches/_gpu_4bit.py`. The exit code is 1 if a test or a row failed, a result was wrong or
the gate found a ratio slower than the recorded one (its rules: `benches/gate.py`), 2 if it could not run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from . import _cuda, _gpu_4bit, _machine
from . import bench_lora_linear as bench
from ._measure import AGAIN, FROZEN, time_cpu
from .bench_lora_linear import BOTH, FORWARD, Case, Limit
from .gate import SCHEMA, gate

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 540.0  # seconds, of everything
LEAST, MOST = 3.0, 6.0  # seconds of sampling a row: too few rounds are no verdict, so that rows are left out instead
AnyCase = Case | _gpu_4bit.Case
HEADLINE = Case(4096, 4096, 8192, "bf16", BOTH, limits=(Limit("own overhead", FROZEN, 0.10),))


def cases() -> list[AnyCase]:
    """The headline rows first, then LoRA and 4-bit rows in turn: what is left out when time runs short stands last."""
    shapes = ((4096, 4096), (2048, 2048), (576, 1536), (4096, 14336), (14336, 4096))
    dense = [Case(k, n, m, "bf16", BOTH) for m in (2048, 512, 16384, 64) for k, n in shapes]
    dense += [Case(k, n, m, "bf16", FORWARD) for m in (1, 16, 512) for k, n in shapes[:4]]
    dense += [replace(HEADLINE, r=r, limits=()) for r in (8, 64, 256)]
    dense += [Case(4096, 4096, 2048, dtype, BOTH) for dtype in ("fp16", "fp32")]
    pairs = itertools.zip_longest(dense, _gpu_4bit.other_cases())
    return [HEADLINE, *_gpu_4bit.headline_cases(), *(case for pair in pairs for case in pair if case is not None)]


def modes(device: str) -> dict[str, Any]:
    """name -> (what to do with a function before it is timed, timer)"""
    if device == "cpu":
        return {_cuda.WALL: (lambda f: f, time_cpu)}
    return {
        mode: (_cuda.captured if mode != _cuda.WALL else lambda f: f, timer) for mode, timer in _cuda.TIMERS.items()
    }


def measure(case: AnyCase, seconds: float, device: str) -> list[dict[str, Any]]:
    """Rows of one case, one a timing mode; errors against float64 first."""
    if isinstance(case, _gpu_4bit.Case):
        return _gpu_4bit.measure(case, seconds, device, modes(device))
    layers = bench.Layers.make(case, device, sets=1)
    found = bench.providers(case, layers, bench.PEERS)
    error, wrong = bench.check(case, layers, found)
    floor = bench.floors(case, device)
    rows = []
    with torch.no_grad() if case.direction == FORWARD else torch.enable_grad():
        plain = {name: bench.runner(*pair, layers, case.direction) for name, pair in found.items()}
        peak = {name: _cuda.peak_bytes(f) for name, f in plain.items()} if device != "cpu" else {}
        for mode, (prepare, timer) in modes(device).items():
            functions = {name: prepare(f) for name, f in plain.items()}
            functions[AGAIN] = functions[FROZEN]
            samples = bench.paired(functions, seconds / 3, timer=timer, sample=0.002, warm=1)
            asked = case if mode == _cuda.WARM else replace(case, limits=())
            names = [name for name in functions if name not in (FROZEN, AGAIN)]
            rows.append(
                {
                    "kind": "gpu",
                    "key": f"{case.name}, {mode}",
                    "mode": mode,
                    "error": error,
                    "wrong": sorted(wrong),
                    "peak_bytes": peak,
                    "roofline": floor["seconds"] / samples.median(bench.OURS),
                    "samples": samples.as_json(),
                    **bench.summary(asked, samples, floor, names, wrong),
                }
            )
    return rows


def others(device: str, seconds: float) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    prepare, timer = modes(device)[_cuda.WARM if device != "cpu" else _cuda.WALL]
    how = {"device": device, "prepare": prepare, "timer": timer}
    return [
        ("group", lambda: bench.measure_group(seconds, m=8192, k=4096, of_n=(4096, 1024, 1024), limit=0.06, **how)),
        ("dropout", lambda: bench.measure_dropout(4096, 4096, 8192, seconds, limit=1.03, **how)),
        ("host cost", lambda: bench.measure_host_cost(seconds, device=device)),
    ]


def build() -> str | None:
    """Compile what changed; an error's text, or None."""
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, capture_output=True, text=True
    )
    return None if run.returncode == 0 else run.stderr[-2000:]


def tests() -> dict[str, Any]:
    """Run the GPU tests: their counts and the tail of what they said."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-x", "--maxfail=20"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|errors?|skipped)", run.stdout)}
    return {"exit_code": run.returncode, "counts": counts, "tail": run.stdout[-3000:]}


def collect(device: str, budget: float, wanted: Sequence[AnyCase] | None = None) -> dict[str, Any]:
    """Measure until the budget is spent; the result without tests and verdict."""
    start = time.perf_counter()
    about = _machine.describe(device)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name() if device != "cpu" else "no GPU",
        **{key: about[key] for key in ("commit", "dirty", "machine", "versions")},
        "state": [_cuda.state()] if device != "cpu" else [],
        "rows": [],
        "left_out": [],
        "failed": {},  # row -> the exception
    }
    if device != "cpu":
        result["copy_bandwidth"], result["matrix_rate"] = _cuda.copy_bandwidth(), _cuda.matrix_rate(torch.bfloat16)
        result["empty_kernel"] = _gpu_4bit.empty_kernel(device, modes(device))
    wanted = cases() if wanted is None else wanted
    for i, case in enumerate(wanted):
        left = start + budget - time.perf_counter()
        if left <= 0:
            result["left_out"] += [c.name for c in wanted[i:]]
            break
        print(f"[{time.perf_counter() - start:4.0f} s] {case.name}", file=sys.stderr, flush=True)
        try:
            result["rows"] += measure(case, min(MOST, max(LEAST, left / (len(wanted) - i))), device)
        except Exception as failure:  # the other rows are worth having
            result["failed"][case.name] = f"{type(failure).__name__}: {str(failure)[:500]}"
        if i == 0:
            for name, run in others(device, 6.0 if device != "cpu" else 0.2):
                print(f"[{time.perf_counter() - start:4.0f} s] {name}", file=sys.stderr, flush=True)
                result["rows"].append(run())
    result["plan_4bit"] = _gpu_4bit.plan(result["rows"])
    if device != "cpu":
        result["state"].append(_cuda.state())
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gate", type=Path, metavar="FILE", help="baseline of this kind of GPU; recorded if it is missing"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for the JSON and its plots")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"default: {BUDGET:.0f}")
    parser.add_argument("--no-build", action="store_true", help="measure what is installed")
    parser.add_argument("--no-tests", action="store_true")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    if not torch.cuda.is_available():
        print("benches.gpu_suite: torch finds no CUDA GPU here", file=sys.stderr)
        return 2
    if not options.no_build:
        error = build()
        if error:
            print(f"benches.gpu_suite: the build failed:\n{error}", file=sys.stderr)
            return 2
    tested = None if options.no_tests else tests()
    result = collect("cuda", options.budget - (time.perf_counter() - start) - 10)
    result["tests"] = tested
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "gpu.json"
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    from . import _gpu_report

    print(_gpu_report.text(result))
    for path in (file, *_gpu_report.plots(result, options.out)):
        print(path)
    wrong = sorted({row["key"] for row in result["rows"] if bench.OURS in row.get("wrong", ())})
    code = 1 if wrong or result["failed"] or (tested and tested["exit_code"]) else 0
    for name, why in result["failed"].items():
        print(f"row failed: {name}: {why}", file=sys.stderr)
    for key in wrong:
        print(f"wrong result: {key}", file=sys.stderr)
    if tested and tested["exit_code"]:
        print(f"GPU tests failed:\n{tested['tail']}", file=sys.stderr)
    if options.gate:
        verdict = gate(result, options.gate)
        print(f"gate: {verdict.state}", *verdict.lines, sep="\n  ")
        code = max(code, verdict.exit_code)
    return code


if __name__ == "__main__":
    sys.exit(main())
