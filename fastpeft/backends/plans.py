"""Which way is fastest: the measured crossovers of `plans.json` for this kind of machine, or another's.

Kinds of CPU: Z (AMD with AVX512-BF16, at full rate), E (Intel with AVX512-BF16, below the rate of its FMAs, no AMX), A (AMX);
else the instruction set (avx512, avx2, scalar); other: not x86-64. A plan depends on the device, dtypes and shapes, never on
dropout, gradients or whether there is an adapter: the bits of a layer's base are the same with and without.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .. import machine, native

TABLE = json.loads(Path(__file__).with_suffix(".json").read_text())
KINDS = tuple(TABLE["cpu"]["kinds"])
DTYPES = ("float32", "bfloat16", "float16")  # as csrc/tensor.h numbers them


def kind() -> str:
    """The kind of CPU that this machine is."""
    cpu = machine.cpu()
    if cpu["architecture"] != "x86_64":
        return "other"
    if cpu["amx"]:
        return "A"
    if "AVX512-BF16" in cpu["isa"]:
        return "Z" if "AMD" in cpu["model"] else "E"
    return "avx512" if "AVX512" in cpu["isa"] else "avx2" if "AVX2" in cpu["isa"] else "scalar"


def _checked(name: str, source: str) -> str:
    if name not in KINDS:
        raise ValueError(f"{source} must be one of {', '.join(KINDS)}, got {name!r}")
    return name


class _Plan:
    """What is in use: the kind's entries over the common ones, and on top what `override` puts there."""

    def __init__(self) -> None:
        named = os.environ.get("FASTPEFT_PLAN", "").strip()
        self.use(_checked(named, "FASTPEFT_PLAN") if named else kind(), {})

    def use(self, name: str, over: dict[str, dict[str, Any]]) -> None:
        self.kind, self.over = name, over
        cpu = TABLE["cpu"]
        self.cpu: dict[str, Any] = cpu | cpu["kinds"][name] | over.get("cpu", {})
        self.gpu: dict[str, Any] = TABLE["gpu"] | over.get("gpu", {})
        self.widens: bool = self.cpu["widens"]
        self.slab: dict[str, int] = self.cpu["slab"]
        self.most_rows = 0  # beyond it no CPU kernel of few rows is asked
        module = native.cpu()
        if module is None:
            return
        most = self.cpu.get("most_bfloat16_4bit")
        rows = []
        for isa, table in self.cpu["rows"].items():
            few, few_4bit = ({**table[key], **self.cpu.get(key, {})} for key in ("few_rows", "few_rows_4bit"))
            if most is not None and "few_rows_4bit" not in over.get("cpu", {}):
                few_4bit["bfloat16"] = min(few_4bit["bfloat16"], most)
            rows.append((isa, [few[dtype] for dtype in DTYPES], [few_4bit[dtype] for dtype in DTYPES]))
        self.most_rows = max(m for _, *both in rows for of in both for m in of)
        module.set_plan(rows, self.cpu["few_rows_untiled"], self.cpu["few_rows_transposed"], self.cpu["dot"])


current = _Plan()


@contextlib.contextmanager
def plan(kind: str | None) -> Iterator[None]:
    """Run the plans of another kind of CPU inside the `with` block, as far as the instruction set allows (None: no change).

    Process-wide, like the environment variable FASTPEFT_PLAN. Raises ValueError for a kind that there is no plan of.
    """
    before = current.kind, current.over
    current.use(current.kind if kind is None else _checked(kind, "plan(kind)"), current.over)
    try:
        yield
    finally:
        current.use(*before)


@contextlib.contextmanager
def override(section: str, **entries: Any) -> Iterator[None]:
    """Replace entries of the plan in use ("cpu" or "gpu"), for tests and for timing a way that the plan does not take.

    override("cpu", few_rows={"bfloat16": 0}) sends all bf16 rows to PyTorch's GEMM, on every instruction set.
    """
    before = current.kind, current.over
    current.use(current.kind, current.over | {section: current.over.get(section, {}) | entries})
    try:
        yield
    finally:
        current.use(*before)


def fused_from(device: torch.device, dtype: torch.dtype) -> int | None:
    """From how many rows on a GPU takes the rank-R term into the base GEMM; None: never."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return current.gpu["fused_from_m"].get(name, {}).get(str(dtype).removeprefix("torch."))
