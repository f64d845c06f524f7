"""What machine, which versions and which commit a result belongs to, and how fast the machine is at its best."""

from __future__ import annotations

import functools
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastpeft import native
from fastpeft.backends import plans
from fastpeft.machine import cpu, cpu_flags, cpuinfo, version

from . import cuda

SCHEMA = 2  # of a line in a results file
_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")
_PACKAGES = ("torch", "peft", "transformers", "numpy", "triton", "bitsandbytes", "kernels", "fastpeft")


KINDS = {
    "Z": "AMD, AVX512-BF16",
    "E": "Intel, AVX512-BF16, no AMX",
    "A": "Intel, AMX",
    "avx512": "AVX-512, no BF16",
    "avx2": "AVX2",
}  # what a reader is told of `plans.kind()`


def last_level_cache() -> int:
    """Bytes of the largest cache, 32 MiB where the system does not tell."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = path.read_text().strip()
            sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
        except (OSError, ValueError, KeyError):
            pass
    return max(sizes, default=32 << 20)


def cores() -> int:
    """Cores that this process may use."""
    return cpu()["cores"]


def has_bf16() -> bool:
    """Whether the CPU has instructions that compute in bf16."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(cpu_flags()))


def _git(*arguments: str) -> str | None:
    here = Path(__file__).resolve().parent
    if not (here.parents[1] / ".git").exists():
        return None
    try:
        run = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


@functools.cache
def describe(device: str = "cpu") -> dict[str, object]:
    """Machine, versions and commit, as every line of a results file carries them."""
    module = native.cpu()
    machine: dict[str, object] = {
        "kind": plans.kind(),
        "own_plans": (plans.current.about()["own"] or {}).get("cpu"),  # measured on the machine itself; None: built in
        "cpu": cpu()["model"],
        "family": "/".join(cpuinfo().get(k, "?") for k in ("cpu family", "model", "stepping")),
        "isa": [flag for flag in _FLAGS if flag in cpu_flags()],
        "amx": cpu()["amx"],
        "native_isa": None if module is None else str(module.isa()),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "last_level_cache": last_level_cache(),
        "system": f"{platform.system()} {platform.machine()}",
        "schedstat": Path("/proc/self/schedstat").exists(),
    }
    if device.startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name()
        machine["gpu_capability"] = list(torch.cuda.get_device_capability())
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "schema": SCHEMA,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "machine": machine,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in _PACKAGES}},
    }


def _best_seconds(function: Callable[[], object], seconds: float = 0.7) -> float:
    function()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


@functools.cache
def read_bandwidth() -> float:
    """Bytes a second at which all threads read memory past the last-level cache (the best of many)."""
    data = torch.ones(min(max(2 * last_level_cache(), 256 << 20), 1 << 30) // 4)
    return data.nbytes / _best_seconds(data.sum)


@functools.cache
def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP a second of a 1024 x 2048 x 2048 matmul in `dtype` on the CPU (the best of many).

    No lower than fp32's: some CPUs compute bf16 slower than that, and widening it is allowed.
    """
    m, n, k = 1024, 2048, 2048
    x, w = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
    rate = 2 * m * n * k / _best_seconds(lambda: torch.nn.functional.linear(x, w))
    return max(rate, matmul_rate(torch.float32)) if dtype in (torch.bfloat16, torch.float16) else rate


def rates(dtype: torch.dtype, device: str) -> tuple[float, float]:
    """(FLOP, bytes) a second at best: by these rates floors are made."""
    if device.startswith("cuda"):
        return cuda.matrix_rate(dtype), cuda.copy_bandwidth()
    return matmul_rate(dtype), read_bandwidth()
