"""What machine, which versions and which commit a result belongs to, and how fast the machine is at its best."""

from __future__ import annotations

import functools
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastpeft import _native
from fastpeft.machine import cpu, cpu_flags, cpuinfo, version

SCHEMA = 1  # of a line in a results file
_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")
_PACKAGES = ("torch", "peft", "transformers", "numpy", "triton", "bitsandbytes", "kernels", "fastpeft")


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


def _git(*arguments: str) -> str | None:
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return None
    try:
        run = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


@functools.cache
def describe(device: str = "cpu") -> dict[str, object]:
    """Machine, versions and commit, as every line of a results file carries them."""
    native = _native.cpu()
    machine: dict[str, object] = {
        "cpu": cpu()["model"],
        "family": "/".join(cpuinfo().get(k, "?") for k in ("cpu family", "model", "stepping")),
        "isa": [flag for flag in _FLAGS if flag in cpu_flags()],
        "amx": cpu()["amx"],
        "native_isa": None if native is None else str(native.isa()),
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


def machine_key() -> str:
    """Tells one machine from another in file names and when results are resumed."""
    machine = describe()["machine"]
    assert isinstance(machine, dict)
    return f"{machine['cpu']} {machine['family']} {machine['cores']}x {machine['threads']}t"


def _best_seconds(function: Callable[[], object], seconds: float, device: str) -> float:
    sync = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    function()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        sync()
        start = time.perf_counter()
        function()
        sync()
        best = min(best, time.perf_counter() - start)
    return best


@functools.cache
def read_bandwidth(device: str = "cpu") -> float:
    """Bytes a second at which all threads read memory past the last-level cache (the best of many)."""
    count = min(max(2 * last_level_cache(), 256 << 20), 1 << 30) // 4
    data = torch.ones(count, dtype=torch.float32, device=device)
    return count * 4 / _best_seconds(data.sum, 0.7, device)


@functools.cache
def matmul_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """FLOP a second of a 1024 x 2048 x 2048 matmul in `dtype` (the best of many).

    On a CPU no lower than fp32's: some compute bf16 slower than that, and widening it is allowed.
    """
    m, n, k = (8192, 4096, 4096) if device.startswith("cuda") else (1024, 2048, 2048)
    x = torch.randn(m, k, dtype=dtype, device=device)
    w = torch.randn(n, k, dtype=dtype, device=device)
    rate = 2 * m * n * k / _best_seconds(lambda: torch.nn.functional.linear(x, w), 0.7, device)
    widened = dtype in (torch.bfloat16, torch.float16) and not device.startswith("cuda")
    return max(rate, matmul_rate(torch.float32, device)) if widened else rate
