"""The passes of prefix_attention in Triton: one kernel forward, tokens and prefix; launched by
`fastpeft_kernels/prefix_attention_launch.py`.
"""

from __future__ import annotations

import os

from ... import native


def can(meta) -> str | None:
    q, _, _, prefix_k, prefix_v, gate_k, gate_v, log_bias, gate_out = meta[:9]
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"tensors are on {q.device}"
    if native.triton("prefix_attention") is None:
        return native.why_not_triton("prefix_attention")
    for name, t in zip(("q", "prefix_k", "prefix_v", "gate_k", "gate_v", "log_bias", "gate_out"), (q, *meta[3:9])):
        if t is not None and t.dtype not in native.CODES:
            return f"{name} is {t.dtype}, not among float32, bfloat16, float16"
    if q.shape[-1] > native.triton("prefix_attention").LARGEST_D:
        return f"q, k and v have D = {q.shape[-1]}: it takes up to {native.triton('prefix_attention').LARGEST_D}"
    return None


def fused(
    q, k, v, prefix_k, prefix_v, gate_k, gate_v, log_bias, gate_out, index, lengths, offsets, causal, mask, separate, p, seed,
    scale,
):  # fmt: skip
    """-> o, o_x (separate) or None, lse of both parts (joint) or of the tokens, lse_p (separate) or None"""
    prefix = (prefix_k, prefix_v, gate_k, gate_v, log_bias, gate_out, index, lengths, offsets)
    return native.triton("prefix_attention").forward(q, k, v, prefix, causal, mask, separate, p, seed, scale)


def grad_fused(
    do, q, k, v, prefix_k, prefix_v, gate_k, gate_v, log_bias, gate_out, index, lengths, offsets, o, lse, lse_p, causal, mask,
    separate, p, seed, scale, needs,
):  # fmt: skip
    """-> the gradients of q, k, v, prefix_k, prefix_v, gate_k, gate_v, log_bias, gate_out; o: o_x where separate; needs: nine"""
    prefix = (prefix_k, prefix_v, gate_k, gate_v, log_bias, gate_out, index, lengths, offsets)
    return native.triton("prefix_attention").backward(
        do, q, k, v, prefix, o, lse, lse_p, causal, mask, separate, p, seed, scale, needs
    )
