"""Which way is fastest: the crossovers of `plans.json` for this kind of machine or another's, or this machine's own.

Kinds of CPU: Z (AMD with AVX512-BF16, at full rate), E (Intel with AVX512-BF16, below the rate of its FMAs, no AMX), A (AMX);
else the instruction set (avx512, avx2, scalar); other: not x86-64. A plan depends on the device, dtypes and shapes, never on
dropout, gradients or whether there is an adapter: the bits of a layer's base are the same with and without.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .. import machine, native
from . import plans_file
from .plans_file import DTYPES as DTYPES

TABLE = json.loads(Path(__file__).with_suffix(".json").read_text())
KINDS = tuple(TABLE["cpu"]["kinds"])
ISAS = ("scalar", "avx2", "avx512", "avx512bf16")  # worst to best, as csrc/cpu/dispatch.cpp has them


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


def here() -> dict[str, Any]:
    """The machine and what of it this process uses, as plans are measured for it."""
    cpu, module = machine.cpu(), native.cpu()
    isa = module.isa() if module else None
    return {"cpu": cpu["model"], "kind": kind(), "cores": cpu["cores"], "isa": isa, "threads": torch.get_num_threads()}


def merged(plan: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """A plan with the entries of another over it; an entry by dtype (or of slabs) keeps what the other does not name."""
    return plan | {key: plan.get(key, {}) | value if isinstance(value, dict) else value for key, value in over.items()}


def built_in(name: str) -> dict[str, Any]:
    """The plan of a kind of CPU: its own entries over the common ones."""
    common = {key: value for key, value in TABLE["cpu"].items() if key != "kinds"}
    return merged(common, TABLE["cpu"]["kinds"][name])


def rows(plan: dict[str, Any], isa: str) -> dict[str, dict[str, int]]:
    """A plan's few_rows and few_rows_4bit on an instruction set; those of the kind of that name where it is not the plan's.

    Below the plan's own there are no more than on it: the kernels are slower, and PyTorch's GEMM is what it was.
    """
    found = plan if isa == plan["isa"] else TABLE["cpu"]["kinds"].get(isa, TABLE["cpu"]["kinds"]["avx512"])
    of = {key: found[key] for key in ("few_rows", "few_rows_4bit")}
    if ISAS.index(isa) >= ISAS.index(plan["isa"]):
        return of
    return {key: {dtype: min(most, plan[key][dtype]) for dtype, most in table.items()} for key, table in of.items()}


class _Plan:
    """What is in use: this machine's own plan, or that of the kind which is named, and on top what `override` puts there."""

    def __init__(self) -> None:
        self.file = plans_file.path()
        self.contents: dict[str, Any] | None = None  # of the file
        self.ignored: str | None = None  # why the file is
        named = os.environ.get("FASTPEFT_PLAN", "").strip()
        if self.file and not named and native.cpu():
            try:
                self.contents = plans_file.read(self.file, here())
            except plans_file.Unusable as error:
                self.ignored = (
                    f"the plans in {self.file} are ignored: {error}. "
                    "`fastpeft tune` measures this machine and writes that file anew."
                )
        self.use(_checked(named, "FASTPEFT_PLAN") if named else None, {})

    def use(self, named: str | None, over: dict[str, dict[str, Any]]) -> None:
        self.named, self.over = named, over
        self.kind = named or kind()
        plan = built_in(self.kind)
        if self.contents and not named:
            isa = self.contents["machine"]["isa"]
            plan = merged(plan | rows(plan, isa) | {"isa": isa}, self.contents["cpu"])
        ours = over.get("cpu", {})
        self.cpu = merged(plan, ours)
        self.gpu = merged(TABLE["gpu"], over.get("gpu", {}))
        self.widens: bool = self.cpu["widens"]
        self.slab: dict[str, int] = self.cpu["slab"]
        self.most_rows = 0  # beyond it no CPU kernel of few rows is asked
        module = native.cpu()
        if module is None:
            return
        table = []
        for isa in ISAS:
            found = merged(rows(plan, isa), ours)
            table.append((isa, *([found[key][dtype] for dtype in DTYPES] for key in ("few_rows", "few_rows_4bit"))))
        self.most_rows = max(m for _, *both in table for of in both for m in of)
        rest = ("few_rows_untiled", "few_rows_transposed", "dot", "parallel_work")
        module.set_plan(table, *(self.cpu[key] for key in rest))

    def about(self) -> dict[str, Any]:
        """For `fastpeft doctor`: which plan is in use and where it is from, and why a file is ignored."""
        own = None
        if self.contents and not self.named:
            own = {key: self.contents[key] for key in ("measured", "torch", "fastpeft", "cpu")}
            own["threads"] = self.contents["machine"]["threads"]
        return {
            "kind": self.kind,
            "named": self.named is not None,
            "built_in": TABLE["cpu"]["kinds"][self.kind]["measured"],
            "file": str(self.file) if self.file else None,
            "own": own,
            "ignored": self.ignored,
        }


current = _Plan()


def warn_if_ignored() -> None:
    """One RuntimeWarning where this machine's own plans are there and cannot be used."""
    if current.ignored:
        warnings.warn(current.ignored, RuntimeWarning, stacklevel=3)


@contextlib.contextmanager
def plan(kind: str | None) -> Iterator[None]:
    """Run the built-in plans of a kind of CPU inside the `with` block, as far as the instruction set allows (None: no change).

    Process-wide, like the environment variable FASTPEFT_PLAN. Raises ValueError for a kind that there is no plan of.
    """
    before = current.named, current.over
    current.use(current.named if kind is None else _checked(kind, "plan(kind)"), current.over)
    try:
        yield
    finally:
        current.use(*before)


@contextlib.contextmanager
def override(section: str, **entries: Any) -> Iterator[None]:
    """Replace entries of the plan in use ("cpu" or "gpu"), for tests and for timing a way that the plan does not take.

    override("cpu", few_rows={"bfloat16": 0}) sends all bf16 rows to PyTorch's GEMM, on every instruction set.
    """
    before = current.named, current.over
    current.use(current.named, current.over | {section: merged(current.over.get(section, {}), entries)})
    try:
        yield
    finally:
        current.use(*before)


def fused_from(device: torch.device, dtype: torch.dtype) -> int | None:
    """From how many rows on a GPU takes the rank-R term into the base GEMM; None: never."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return current.gpu["fused_from_m"].get(name, {}).get(str(dtype).removeprefix("torch."))
