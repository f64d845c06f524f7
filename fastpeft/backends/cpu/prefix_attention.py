"""The CPU's passes of prefix_attention (`csrc/cpu/prefix_attention.cpp` by `csrc/python/prefix_attention.cpp`).

To our kernel tokens are one more segment of keys; it takes them where the plan says so, and always with dropout, which
PyTorch's rejects. The prefix is merged into their o and lse in place; backward hands the merged ones to both.
"""

from __future__ import annotations

from ... import native
from ...native import CODES
from .. import attention, plans

MAX_HEAD = 256
_cpu = native.cpu()
_built = _cpu is not None and hasattr(_cpu, "prefix_attention_forward")
if _built:  # else `can` says why not, and nothing here is called
    forward, backward = _cpu.prefix_attention_forward, _cpu.prefix_attention_backward


def can(meta) -> str | None:
    q, _, _, prefix_k, prefix_v, *rest = meta
    if not _built:
        return native.why_not_cpu() or "this build of the compiled module has no prefix_attention"
    if q.device.type != "cpu":
        return f"tensors are on {q.device}"
    if q.shape[-1] > MAX_HEAD:
        return f"heads have D = {q.shape[-1]}: it takes up to {MAX_HEAD}"
    names = ("q", "prefix_k", "prefix_v", "gate_k", "gate_v", "log_bias", "gate_out")
    for name, t in zip(names, (q, prefix_k, prefix_v, *rest)):
        if t is not None and t.dtype not in CODES:
            return f"{name} is {t.dtype}, not among float32, bfloat16, float16"
    return None


def fused(*arguments) -> None:
    """Tokens and prefix go one after the other here."""
    return None


grad_fused = fused


def tokens(q, k, v, causal, mask, p, seed, scale):
    of = _cpu.prefix_attention_tokens if _ours(p) else attention.tokens
    return of(q, k, v, causal, mask, p, seed, scale)


def grad_tokens(do, q, k, v, o, lse, causal, mask, p, seed, scale, needs):
    of = _cpu.prefix_attention_grad_tokens if _ours(p) else attention.grad_tokens
    return of(do, q, k, v, o, lse, causal, mask, p, seed, scale, needs)


def _ours(p: float) -> bool:
    return p > 0.0 or plans.current.cpu["own_attention"]
