"""The passes of prefix_attention in Triton: one kernel for tokens and prefix, which takes either alone too.

Launched by `fastpeft_kernels/prefix_attention_launch.py`.
"""

from __future__ import annotations

import os

from ... import native


def can(meta) -> str | None:
    q, _, _, *of_prefix = meta[:9]
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"tensors are on {q.device}"
    kernels = native.triton("prefix_attention")
    if kernels is None:
        return native.why_not_triton("prefix_attention")
    if q.shape[-1] > kernels.LARGEST_D:
        return f"heads have D = {q.shape[-1]}: it takes up to {kernels.LARGEST_D}"
    names = ("q", "prefix_k", "prefix_v", "gate_k", "gate_v", "log_bias", "gate_out")
    for name, t in zip(names, (q, *of_prefix)):
        if t is not None and t.dtype not in native.CODES:
            return f"{name} is {t.dtype}, not among float32, bfloat16, float16"
    return None


def fused(q, k, v, *rest):
    """-> o, o_x (separate) or None, lse of both parts (joint) or of the tokens, lse_p (separate) or None"""
    return native.triton("prefix_attention").forward(q, k, v, rest[:9], *rest[9:])


def grad_fused(do, q, k, v, *rest):
    """-> the gradients of q, k, v, prefix_k, prefix_v, gate_k, gate_v, log_bias, gate_out"""
    return native.triton("prefix_attention").backward(do, q, k, v, rest[:9], *rest[9:])


def tokens(q, k, v, causal, mask, p, seed, scale):
    return native.triton("prefix_attention").tokens(q, k, v, causal, mask, p, seed, scale)


def grad_tokens(do, q, k, v, o, lse, causal, mask, p, seed, scale, needs):
    return native.triton("prefix_attention").grad_tokens(do, q, k, v, o, lse, causal, mask, p, seed, scale, needs)


def forward(q, *rest):
    return native.triton("prefix_attention").merge(q, rest[:9], *rest[9:])


def backward(do, q, *rest):
    return native.triton("prefix_attention").grad_merge(do, q, rest[:9], *rest[9:])
