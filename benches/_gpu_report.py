"""What the GPU suite prints and plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from . import _gpu_4bit
from ._cuda import WARM
from ._measure import Estimate
from ._peers import OURS, PEFT

Result = dict[str, Any]


def text(result: Result) -> str:
    """Targets, then a line a row: overhead, time over the best peer, share of the roofline; 4-bit rows, and their plan."""
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v)
    lines = [f"{result['gpu']}; commit {result['commit']}; {versions}"]
    if result.get("tests"):
        counts = ", ".join(f"{n} {what}" for what, n in result["tests"]["counts"].items())
        lines.append(f"GPU tests: {counts} (exit code {result['tests']['exit_code']})")
    if "copy_bandwidth" in result:
        lines.append(
            f"copy {result['copy_bandwidth'] / 1e12:.2f} TB/s, bf16 matmul {result['matrix_rate'] / 1e12:.0f} TFLOP/s"
        )
    for row in result["rows"]:
        for one in row["targets"]:
            lines.append(
                f"{one['verdict']:>10}  {one['text']}: {Estimate.from_json(one['measured'])} (at most {one['limit']:.3f})"
            )
    for row in result["rows"]:
        if row["kind"] != "gpu":
            continue
        peer = row.get("best_peer", "")
        over = Estimate.from_json(row["time"][peer]) if peer in row["time"] else "-"
        own = Estimate.from_json(row["overhead"]["fastpeft"]) if "fastpeft" in row["overhead"] else "wrong"
        lines.append(
            f"{row['key']}: overhead {own}, time over {peer} {over}, roofline {row['roofline']:.0%} {row['validity'][0]}"
        )
    lines += four_bit(result)
    if result["left_out"]:
        lines.append(f"left out for want of time: {', '.join(result['left_out'])}")
    return "\n".join(lines)


def four_bit(result: dict[str, Any]) -> list[str]:
    """Lines of the report: a row each, the plans' table, the recommendation."""
    lines = []
    if "empty_kernel" in result:
        times = ", ".join(f"{mode}: {1e6 * seconds:.1f} µs" for mode, seconds in result["empty_kernel"].items())
        lines.append(f"a kernel with nothing to do, as these rows are timed: {times}")
    for row in result["rows"]:
        if row["kind"] == _gpu_4bit.KIND:
            over = ", ".join(f"{peer} {Estimate.from_json(v)}" for peer, v in row["time"].items())
            shares = f"copy bandwidth {row['copy_share']:.0%}, roofline {row['roofline']:.0%}"
            lines.append(f"{row['key']}: {shares}; time over {over} {row['validity'][0]}")
    found = result.get("plan_4bit")
    if found is None:
        return lines
    for row in found["table"]:
        times = ", ".join(f"{name.removeprefix('plan ')} {1e6 * s:.1f}" for name, s in row["seconds"].items())
        ratio = Estimate.from_json(row["fused_over_decoded"])
        lines.append(f"plans in µs, {row['key']}: {times}; fused over decode + GEMM {ratio} {row['validity']}")
    where = f"gpu_4bit.fused_to_m in fastpeft/ops/lora_linear.plans.json (now {found['now']})"
    if found["fused_to_m"] is None:
        return [*lines, f"{where}: no row was quiet enough to tell"]
    key, loss = found["worst"]
    measured = ", ".join(map(str, found["rows"]))
    lines.append(
        f"{where}: recommended {found['fused_to_m']}, of M = {measured}; it loses {loss:.1%} at most ({key}), "
        f"the present value {found['mean_loss_now']:.1%} on average"
    )
    return lines


def plots(result: Result, folder: Path) -> list[Path]:
    """Speed over the best peer and share of the roofline by row, and peak memory; the files."""
    kinds = ("gpu", _gpu_4bit.KIND)
    rows = [row for row in result["rows"] if row["kind"] in kinds and row.get("best_peer") in row["time"]]
    if not rows:
        return []
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 0.2 * len(rows) + 1.6), sharey=True)
    for i, row in enumerate(rows):
        median, low, high = row["time"][row["best_peer"]]
        if None in (median, low, high):
            continue
        speed = 1 / median
        colour = "#1f77b4" if row["validity"][0] == "ok" else "#bbbbbb"
        error = [[max(speed - 1 / high, 0)], [max(1 / low - speed, 0)]]
        left.errorbar(speed, i, xerr=error, fmt="o", markersize=3, capsize=2, color=colour)
        right.barh(i, row["roofline"], color=colour)
    left.set_yticks(range(len(rows)), [row["key"] for row in rows], fontsize=6)
    left.invert_yaxis()
    left.axvline(1, color="black", linewidth=0.8)
    left.set(xlabel="speed over the best peer (grey: too noisy or void)")
    right.set(xlabel="share of the roofline")
    figure.suptitle(result["gpu"])
    paths = [_save(figure, folder / "gpu-speed.png")]
    warm = [row for row in rows if row["mode"] == WARM and row["peak_bytes"]]
    if warm:
        figure, axis = plt.subplots(figsize=(9, 0.25 * len(warm) + 1.6))
        for i, row in enumerate(warm):
            peer = PEFT if row["kind"] == "gpu" else row["best_peer"]
            axis.barh(i, row["peak_bytes"][OURS] / max(row["peak_bytes"][peer], 1), color="#1f77b4")
        axis.set_yticks(range(len(warm)), [row["key"] for row in warm], fontsize=7)
        axis.invert_yaxis()
        axis.set(xlabel="peak memory of a call over PEFT's (4-bit rows: over the best peer's)")
        paths.append(_save(figure, folder / "gpu-memory.png"))
    return paths


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
