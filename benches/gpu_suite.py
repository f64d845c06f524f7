"""The GPU suite in one command: build, test, measure, write one JSON with plots, and judge it against a baseline.

    python -m benches.gpu_suite                                # results in gpu-results/
    python -m benches.gpu_suite --gate benches/baselines/h100.json

Stays under 9 minutes; its rows: `benches/suites/gpu.py`. The exit code is 1 if a test or a row failed, a result was wrong or
the gate found a ratio slower than the recorded one (its rules: `benches/kit/gate.py`), 2 if it could not run.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .kit import cuda, machine, tables
from .kit.case import OURS, AnyCase
from .kit.gate import SCHEMA, gate
from .kit.measure import measure, modes
from .kit.results import without_nan
from .kit.rounds import Estimate
from .suites import gpu

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 540.0  # seconds, of everything
LEAST, MOST = 3.0, 6.0  # seconds of sampling a row: too few rounds are no verdict, so that rows are left out instead


def build() -> str | None:
    """Compile what changed; an error's text, or None."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return None if run.returncode == 0 else run.stderr[-2000:]


def tests() -> dict[str, Any]:
    """Run the GPU tests: their counts and the tail of what they said."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-x", "--maxfail=20"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|errors?|skipped)", run.stdout)}
    return {"exit_code": run.returncode, "counts": counts, "tail": run.stdout[-3000:]}


def empty_kernel(device: str) -> dict[str, float]:
    """mode -> seconds of a call of one kernel with nothing to do: the part of a few microseconds that is launch and timer."""
    one, found = torch.zeros(1, device=device), {}
    for mode, (prepare, timer) in modes(device).items():
        function = prepare(lambda: one.add_(1))
        found[mode] = sorted(timer(function, 20) / 20 for _ in range(9))[4]
    return found


def collect(
    device: str, budget: float, wanted: Sequence[tuple[ModuleType, AnyCase]] | None = None, most: float = MOST
) -> dict[str, Any]:
    """Measure until the budget is spent; the result without tests and verdict."""
    start = time.perf_counter()
    about = machine.describe(device)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name() if device != "cpu" else "no GPU",
        **{key: about[key] for key in ("commit", "dirty", "machine", "versions")},
        "state": [cuda.state()] if device != "cpu" else [],
        "empty_kernel": empty_kernel(device),
        "rows": [],
        "left_out": [],
        "failed": {},  # row -> the exception
    }
    if device != "cpu":
        result["copy_bandwidth"], result["matrix_rate"] = cuda.copy_bandwidth(), cuda.matrix_rate(torch.bfloat16)
    wanted = gpu.cases() if wanted is None else wanted
    for i, (op, case) in enumerate(wanted):
        left = start + budget - time.perf_counter()
        if left <= 0:
            result["left_out"] += [c.name for _, c in wanted[i:]]
            break
        print(f"[{time.perf_counter() - start:4.0f} s] {case.name}", file=sys.stderr, flush=True)
        try:
            seconds = min(most, max(LEAST, left / (len(wanted) - i)))
            result["rows"] += measure(op, case, seconds, device)
        except Exception as failure:  # the other rows are worth having
            result["failed"][case.name] = f"{type(failure).__name__}: {str(failure)[:500]}"
    result["crossover"] = gpu.crossover(result["rows"])
    if device != "cpu":
        result["state"].append(cuda.state())
    return without_nan(result)


def report(result: dict[str, Any]) -> str:
    """What was compared, our plans, the targets."""
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v)
    lines = [f"{result['gpu']}; commit {result['commit']}; {versions}"]
    if result.get("tests"):
        counts = ", ".join(f"{n} {what}" for what, n in result["tests"]["counts"].items())
        lines.append(f"GPU tests: {counts} (exit code {result['tests']['exit_code']})")
    times = ", ".join(f"{mode}: {1e6 * seconds:.1f} µs" for mode, seconds in result["empty_kernel"].items())
    lines.append(f"a kernel with nothing to do, as these rows are timed: {times}")
    if "copy_bandwidth" in result:
        rates = result["copy_bandwidth"] / 1e12, result["matrix_rate"] / 1e12
        lines.append(f"copy {rates[0]:.2f} TB/s, bf16 matmul {rates[1]:.0f} TFLOP/s")
    for row in result["rows"]:
        over = ", ".join(f"{peer} {Estimate.from_json(v)}" for peer, v in row["time"].items()) or "-"
        shares = [f"{text} {row[key]:.0%}" for key, text in SHARES.items() if row[key] is not None]
        lines.append("; ".join([f"{row['key']}: time over {over}", *shares, row["validity"][0]]))
    lines += gpu.crossover_lines(result["crossover"])
    for one in tables.target_lines(result["rows"]):
        lines.append(f"{one.verdict:>12}  {one.text}: {one.measured} (at most {one.limit:.3f}) {one.note}")
    if result["left_out"]:
        lines.append(f"left out for want of time: {', '.join(result['left_out'])}")
    return "\n".join(lines)


SHARES = {"floor_share": "roofline", "byte_share": "copy bandwidth"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--gate", type=Path, metavar="FILE", help="baseline of this kind of GPU; recorded if it is missing")
    add("--out", type=Path, default=Path("gpu-results"), help="folder for the JSON and its plots")
    add("--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"default: {BUDGET:.0f}")
    add("--no-build", action="store_true", help="measure what is installed")
    add("--no-tests", action="store_true")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    if not torch.cuda.is_available():
        print("benches.gpu_suite: torch finds no CUDA GPU here", file=sys.stderr)
        return 2
    error = None if options.no_build else build()
    if error:
        print(f"benches.gpu_suite: the build failed:\n{error}", file=sys.stderr)
        return 2
    tested = None if options.no_tests else tests()
    result = collect("cuda", options.budget - (time.perf_counter() - start) - 10)
    result["tests"] = tested
    return finish(result, options.out, options.gate)


def finish(result: dict[str, Any], out: Path, baseline: Path | None) -> int:
    """Write, print and plot a result; the exit code."""
    from .kit import plots

    out.mkdir(parents=True, exist_ok=True)
    file, tested = out / "gpu.json", result["tests"]
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(report(result))
    drawn = (plots.speeds(result["rows"], out / "gpu-speed.png"), plots.peaks(result["rows"], out / "gpu-memory.png"))
    for path in (file, *filter(None, drawn)):
        print(path)
    wrong = sorted({row["key"] for row in result["rows"] if OURS in row["wrong"]})
    code = 1 if wrong or result["failed"] or (tested and tested["exit_code"]) else 0
    for name, why in result["failed"].items():
        print(f"row failed: {name}: {why}", file=sys.stderr)
    for key in wrong:
        print(f"wrong result: {key}", file=sys.stderr)
    if tested and tested["exit_code"]:
        print(f"GPU tests failed:\n{tested['tail']}", file=sys.stderr)
    if baseline:
        verdict = gate(result, baseline)
        print(f"gate: {verdict.state}", *verdict.lines, sep="\n  ")
        code = max(code, verdict.exit_code)
    return code


if __name__ == "__main__":
    sys.exit(main())
