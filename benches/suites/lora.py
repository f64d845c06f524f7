"""LoRA over dense layers: the main job, lora_linear by shape, groups, dropout, bytes saved for backward, host cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import fastpeft as fp

from .. import lora_linear as op
from ..kit import peers
from ..kit.case import BOTH, FORWARD, OURS
from ..kit.host import measure_outside
from ..kit.peers import PEFT
from ..kit.rounds import Estimate
from ..kit.runner import Run, Task
from ..kit.saved import saved_bytes
from ..kit.verdict import target
from .jobs import kernels, main_job, of_dtype


def tasks(run: Run) -> list[Task]:
    dtype = run.options.dtype
    if dtype is None and run.dtype_name == "fp32" and not run.long:  # a CPU without bf16: seconds a call
        dtype = run.dtype_name
    if run.options.shapes:
        cases = [op.Case(k, n, m, run.dtype_name, way) for k, n, m in run.options.shapes for way in (FORWARD, BOTH)]
    else:
        cases = of_dtype(op.target_cases(), dtype)
        cases += of_dtype(op.capped_cases() + op.sweep_cases(), dtype) if run.long else []
    if run.device == "cuda":
        cases = [case for case in cases if case.isa is None]
    if run.quick:
        cases = [replace(case, compiled=False) for case in cases[: None if run.options.shapes else 3]]
    others = op.other_cases() if not run.quick else [case for case in op.other_cases() if case.what == op.HOST]
    made = [*main_job(run), *kernels(run, op, cases), *kernels(run, op, of_dtype(others, dtype), "others")]
    made.append(Task("others", "saved bytes", 1, lambda s: [saved(run.device)]))
    if run.device == "cpu":
        made.append(Task("others", op_outside.__doc__ or "", 4 if run.quick else 15, lambda s: [op_outside(s, run)]))
    return made


def saved(device: str, m: int = 1024) -> dict[str, Any]:
    """Bytes kept for backward, fastpeft over PEFT's default: one layer without and with dropout, and a q/k/v group."""
    of = op.Layers.make(op.Case(576, op.QKV, m, what=op.GROUP), device)
    x, w, a, b, rows, targets = of.x, of.weights[0], of.a[0], of.b[0], {}, []

    def add(name: str, limit: float, dropout: float, count: int, ours: Any) -> None:
        layers = peers.peft_layers(w[:count], a[:count], b[:count], scale=op.SCALE, dropout=dropout, low=False)
        known: list[Tensor] = [*w, *a, *b, *(p for layer in layers for p in peers.adapters(layer))]
        found = {PEFT: saved_bytes(lambda: [layer(x) for layer in layers], known), OURS: saved_bytes(ours, known)}
        rows[f"bytes saved for backward, {name} M={m} bf16"] = {**found, "x": x.untyped_storage().nbytes()}
        share = Estimate.exact(found[OURS] / found[PEFT])
        targets.append(target(f"bytes saved for backward, {name}, over PEFT's", limit, share).as_json())

    for p, limit in ((0.0, 0.52), (0.1, 0.26)):
        one = (x, w[0], a[0], b[0])
        call = lambda p=p: fp.ops.lora_linear(*one, scale=op.SCALE, dropout_p=p)  # noqa: B023, E731
        add(f"576->576 dropout {p}", limit, p, 1, call)
    group = lambda: fp.ops.lora_linear_group(x, w, a, b, scales=[op.SCALE] * 3)  # noqa: E731
    add("group q/k/v", 0.20, 0.0, 3, group)
    return {"kind": "saved bytes", "key": "saved bytes", "bytes": rows, "targets": targets}


def op_outside(seconds: float, run: Run) -> dict[str, Any]:
    """time outside native passes and GEMMs"""

    def step(case: op.Case) -> Any:
        work = op.work(case, "cpu")
        return work.runner(OURS)

    case = op.Case(2048, 2048, 512, run.dtype_name)
    small = replace(case, k=64, n=64, m=64)
    with torch.enable_grad():
        return measure_outside(step(case), step(small), seconds, case.name, 0.35, run.tick)
