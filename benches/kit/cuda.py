"""Timing on a CUDA GPU: device time by graph replay with warm and with cold L2, wall time, peak memory, best rates."""

from __future__ import annotations

import functools
import subprocess
import time
from collections.abc import Callable

import torch

from .rounds import Timer, time_cuda

WARM, COLD, WALL = "device, warm L2", "device, cold L2", "wall"
_QUERY = "driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"


def captured(function: Callable[[], object]) -> Callable[[], object]:
    """The function as a CUDA graph: device work without the host's."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):  # backward of what the warm-up built runs there too
        kept = function()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


@functools.cache
def _flusher() -> torch.Tensor:
    return torch.empty(
        max(4 * torch.cuda.get_device_properties().L2_cache_size, 256 << 20), dtype=torch.int8, device="cuda"
    )


def time_cold(function: Callable[[], object], calls: int) -> float:
    """Device seconds of `calls` calls, each after L2 was overwritten."""
    events = []
    for _ in range(calls):
        _flusher().zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in events) / 1e3


def time_wall(function: Callable[[], object], calls: int) -> float:
    """Seconds of `calls` calls, each waited for: what a user's clock shows, the host's work included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
        torch.cuda.synchronize()
    return time.perf_counter() - start


TIMERS: dict[str, Timer] = {WARM: time_cuda, COLD: time_cold, WALL: time_wall}


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes allocated during a call, less those allocated before it."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def _best(function: Callable[[], object], rounds: int = 30) -> float:
    for _ in range(3):
        function()
    return min(time_cuda(function, 1) for _ in range(rounds))


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a device-to-device copy of 1 GiB (the best of many)."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / _best(lambda: target.copy_(source))


@functools.cache
def matrix_rate(dtype: torch.dtype) -> float:
    """FLOP a second of PyTorch's 8192³ matmul (the best of many)."""
    n = 8192 if dtype != torch.float32 else 4096
    x, w = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
    return 2 * n**3 / _best(lambda: torch.mm(x, w))


def state() -> dict[str, str]:
    """Driver, clocks, power and temperature now, by nvidia-smi; empty where it is missing."""
    try:
        run = subprocess.run(
            ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader", f"--id={torch.cuda.current_device()}"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_QUERY.split(","), (v.strip() for v in run.stdout.strip().split(",")), strict=True))
