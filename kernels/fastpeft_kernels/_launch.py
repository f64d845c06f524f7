"""What launchers of Triton kernels share: the machine, and arguments that several kernels take."""

from __future__ import annotations

import functools
import math

import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret  # no GPU: kernels run in Triton's interpreter, on CPU tensors


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return 4 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    return (9, 0) if INTERPRETED else torch.cuda.get_device_capability(device)


def dropout(p: float, seed: torch.Tensor | None) -> dict[str, object]:
    """Kernel arguments: kept where word >= threshold, and then times 1/(1-p); p = 1 keeps nothing."""
    return {
        "seed_ptr": seed if p else None,
        "keep_threshold": min(math.ceil(p * 2**32), 2**32 - 1),
        "keep_value": 1.0 / (1.0 - p) if p < 1.0 else 0.0,
        "DROPOUT": p > 0.0,
    }


def precision(dtype: torch.dtype) -> str:
    """tl.dot's input precision for x of `dtype`: float32 as PyTorch's own matmul has it; fp16's rank-R products in TF32."""
    tf32 = dtype == torch.float16 or (dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32)
    return "tf32" if tf32 else "ieee"


def ranks_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of s and t for x of `dtype`, as `fastpeft.reference.lora_linear` has it."""
    return torch.float32 if dtype == torch.float16 else dtype


def on_device(launch):
    """Kernels go to the device of the arguments, whichever is current."""

    @functools.wraps(launch)
    def wrapper(*args):
        flat = (t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)))
        device = next(t.device for t in flat if hasattr(t, "device"))
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return launch(*args)
        with torch.cuda.device(device):
            return launch(*args)

    return wrapper
