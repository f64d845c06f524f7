"""Which plan runs: the one place of the benchmarks that names entries of fastpeft's plans."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import fastpeft as fp
from fastpeft import native
from fastpeft.backends import plans

MOST = 1 << 30
Plan = Callable[[], AbstractContextManager]


def kind() -> str:
    """Of this machine's CPU, as plans are keyed: "Z", "E", "A" or an instruction set."""
    return plans.kind()


def cpu_plans(m: int, dtype: str) -> dict[str, Plan]:
    """Our ways to run a dense layer of few rows: with the small kernel, and without it."""
    full = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype]
    return {
        "plan small": lambda: plans.override("cpu", few_rows={full: m}),
        "plan GEMM + passes": lambda: plans.override("cpu", few_rows={full: 0}),
    }


@contextlib.contextmanager
def _gpu_4bit(backend: str, fused_to_m: int) -> Iterator[None]:
    with fp.backend(backend), plans.override("gpu", fused_to_m_4bit=fused_to_m):
        yield


def gpu_4bit_plans(m: int, forward: bool) -> dict[str, Plan]:
    """Our ways to run a 4-bit layer on a GPU; the small CUDA kernel takes few rows of a forward pass."""
    found: dict[str, Plan] = {"plan small": lambda: _gpu_4bit("cuda", 0)} if forward and m <= 16 else {}
    found["plan fused"] = lambda: _gpu_4bit("triton", MOST)
    found["plan decode + GEMM"] = lambda: _gpu_4bit("triton", 0)
    return found


def fused_to_m() -> int:
    """The row count up to which the fused GEMM of 4-bit weights runs now."""
    return plans.current.gpu["fused_to_m_4bit"]


@contextlib.contextmanager
def instruction_set(name: str | None) -> Iterator[None]:
    """Cap the native CPU kernels' instruction set for a while."""
    if name is None:
        yield
        return
    module = native.cpu()
    if module is None:
        raise RuntimeError(f"no native CPU module to run at {name}: {native.why_not_cpu()}")
    before = module.isa()
    module.set_isa(name)
    try:
        yield
    finally:
        module.set_isa(before)
