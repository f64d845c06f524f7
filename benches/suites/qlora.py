"""QLoRA: the main job over NF4 with double quantisation, linear4bit by shape, the QLoRA layer. bf16 on the CPU."""

from __future__ import annotations

from .. import linear4bit as op
from ..kit.runner import Run, Task
from .jobs import kernels, main_job


def tasks(run: Run) -> list[Task]:
    if run.options.shapes:
        cases = [op.Case(*shape, double=double) for double in (False, True) for shape in run.options.shapes]
    else:
        cases = op.target_cases() + (op.sweep_cases() if run.long else [])
        cases.sort(key=lambda case: (case.k, case.n))  # one shape's weights at a time
    if run.quick and not run.options.shapes:
        cases = cases[:2]
    return [*main_job(run, in_4bit=True), *kernels(run, op, cases)]
