"""What this machine has: for `fastpeft doctor`, the support table and the benchmarks."""

from __future__ import annotations

import functools
import glob
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# The flags of /proc/cpuinfo that kernels are chosen by, and the names that people know them under.
_ISA = {
    "avx2": "AVX2",
    "avx512f": "AVX512",
    "avx512_bf16": "AVX512-BF16",
    "avx512_fp16": "AVX512-FP16",
    "amx_bf16": "AMX-BF16",
    "asimd": "NEON",
    "sve": "SVE",
}


@functools.cache
def cpuinfo() -> dict[str, str]:
    """The fields of /proc/cpuinfo, of its first CPU; {} where there is no such file."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    return fields


def cpu_flags() -> list[str]:
    """Instruction sets by the system's names, such as "avx512_bf16"."""
    fields = cpuinfo()
    return (fields.get("flags") or fields.get("Features") or "").split()


@functools.cache
def cpu() -> dict[str, Any]:
    """Model, cores that this process may use, instruction sets that matter here, and whether it has AMX."""
    fields, flags = cpuinfo(), cpu_flags()
    return {
        "model": fields.get("model name") or platform.processor() or "unknown",
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "isa": [name for flag, name in _ISA.items() if flag in flags],
        "amx": "amx_bf16" in flags,
    }


@functools.cache
def cpu_class() -> str:
    """Names the class of CPU that a result holds for, such as "Intel x86_64, AVX512-BF16, no AMX"."""
    info = cpu()
    maker = next((maker for maker in ("Intel", "AMD") if maker.lower() in info["model"].lower()), "")
    best = next((name for name in ("AVX512-BF16", "AVX512", "AVX2", "SVE", "NEON") if name in info["isa"]), "baseline")
    amx = "AMX" if info["amx"] else "no AMX"
    return f"{maker} {info['architecture']}, {best}, {amx}".strip()


def run_delay() -> float | None:
    """Seconds that this process's threads have waited for a CPU so far; None where the system does not tell."""
    total, found = 0, False
    for path in glob.glob("/proc/self/task/*/schedstat"):
        try:
            with open(path) as file:
                total += int(file.read().split()[1])  # time on CPU, *run delay*, time slices; ns
            found = True
        except (OSError, IndexError, ValueError):
            pass  # a thread that has just ended
    return total / 1e9 if found else None


def gpus() -> list[str]:
    """Name and compute capability of each CUDA GPU that torch can use."""
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{gpu.name} (sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB)" for gpu in found]


def nvcc_version() -> str | None:
    """Release of the nvcc on PATH, None without one."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release ([\d.]+)", printed)
    return release[1] if release else "unknown"


def version(package: str) -> str | None:
    """Installed version of a distribution, None if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def missing(extra: str) -> list[str]:
    """Requirements of fastpeft's extra that are not installed; what it asks of versions is left to pip.

    Raises:
        PackageNotFoundError: fastpeft itself is not installed (it runs from a clone on PYTHONPATH).
    """
    absent = []
    for requirement in metadata.requires("fastpeft") or []:
        what, _, marker = requirement.partition(";")
        if re.search(rf"extra\s*==\s*['\"]{extra}['\"]", marker):
            name = re.match(r"[\w.-]+", what)
            assert name is not None, requirement
            nested = re.match(r"fastpeft\[(\w+)\]", what)
            if nested:
                absent += missing(nested[1])
            elif version(name[0]) is None:
                absent.append(what.strip())
    return absent
