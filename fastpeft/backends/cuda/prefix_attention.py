"""The passes of prefix_attention in CUDA C++ (`csrc/cuda/prefix_attention.cu` by `csrc/python/prefix_attention_cuda.cpp`):
the prefix, merged into what PyTorch's own attention has made of the tokens.

`tokens` and `grad_tokens` have never run on a GPU: on the CPU, where the tests run the rest in emulation, they are
`backends/attention.py`'s. PyTorch's flash attention takes 16 bits, grouped heads and a causal mask aligned to the last key;
what it does not take goes by its memory-efficient one, with every head's own keys and the mask as an added bias. Both say
lse in natural logarithms, and neither knows −∞ for a query that sees nothing: with +∞ their backward gives it no weight.
"""

from __future__ import annotations

import math

import torch

from ... import native
from ...reference import prefix_attention as reference
from .. import attention
from ..meta import capability

_flash = torch.ops.aten._scaled_dot_product_flash_attention.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
_efficient = torch.ops.aten._scaled_dot_product_efficient_attention.default
_efficient_backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default

MAX_ROW = 512  # bytes: PREFIX_MAX_ROW of csrc/prefix_attention_cuda.h
NAMES = ("q", "k", "v", "prefix_k", "prefix_v", "gate_k", "gate_v", "log_bias", "gate_out")


def can(meta) -> str | None:
    q = meta[0]
    if not q.is_cuda:
        return f"tensors are on {q.device}"
    if native.cuda() is None:
        return native.why_not_cuda()
    for name, t in zip(NAMES, meta):
        if t is not None and t.dtype not in native.CODES:
            return f"{name} is {t.dtype}, not among float32, bfloat16, float16"
    head = q.shape[-1]
    if head % 8 or head * q.element_size() > MAX_ROW:
        return f"heads have D = {head}: it takes multiples of 8 up to {MAX_ROW // q.element_size()}"
    if capability(q.device) < (8, 0):
        return "it takes GPUs from compute capability 8.0 on"
    return None


def fused(*arguments) -> None:
    """Tokens and prefix go one after the other here."""
    return None


grad_fused = fused


# ---- the prefix ------------------------------------------------------------------------------------------------------


def forward(
    q, prefix_k, prefix_v, gate_k, gate_v, log_bias, gate_out, index, lengths, offsets, o, lse, separate, p, seed, scale
):  # fmt: skip
    out, lse_out = (reference.like_tokens(o), torch.empty_like(lse)) if separate else (o, lse)
    gates = map(_wide, (gate_k, gate_v, log_bias, gate_out))
    native.cuda().prefix_attention_forward(
        q, prefix_k, prefix_v, *gates, index, lengths, offsets, o, lse, out, lse_out,
        separate, p, seed, scale,
    )  # fmt: skip
    return out, lse_out


def backward(
    do, q, prefix_k, prefix_v, gate_k, gate_v, log_bias, gate_out, index, lengths, offsets, o, lse, dq, separate, p, seed,
    scale, needs,
):  # fmt: skip
    gates = map(_wide, (gate_k, gate_v, log_bias, gate_out))
    return native.cuda().prefix_attention_backward(
        do, q, prefix_k, prefix_v, *gates, index, lengths, offsets, o, lse, dq,
        separate, p, seed, scale, needs,
    )  # fmt: skip


def _wide(gate):
    """The kernels read gates as float32: they are small, and read at each score."""
    return None if gate is None else gate.float()


# ---- tokens ----------------------------------------------------------------------------------------------------------


def _taken(q, k, p) -> bool:
    """By PyTorch's kernels: they draw other dropout masks than ours, and ask for a token."""
    return q.is_cuda and p == 0.0 and q.numel() > 0 and k.numel() > 0


def _by_flash(q, mask) -> bool:
    return mask is None and q.dtype != torch.float32


def tokens(q, k, v, causal, mask, p, seed, scale):
    if not _taken(q, k, p):
        return attention.tokens(q, k, v, causal, mask, p, seed, scale)
    if _by_flash(q, mask):
        o, lse, *_ = _flash(q, k, v, 0.0, causal, scale=scale)
        blind = lse == math.inf if causal and q.shape[2] > k.shape[2] else None
    else:
        bias = _bias(q, k, causal, mask)
        o, lse, *_ = _efficient(*_heads(q, k, v, bias), True, 0.0, False, scale=scale)
        lse = lse[..., : q.shape[2]].contiguous()  # it is padded to a multiple of 32
        blind = None if bias is None else bias.amax(-1) == -math.inf
    if blind is not None:
        o, lse = o.masked_fill_(blind[..., None], 0.0), lse.masked_fill_(blind, -math.inf)
    if not o.transpose(1, 2).is_contiguous():  # it lies as q does; everywhere else as [B, T, H, D]
        o = reference.by_query(q).copy_(o)
    return o, lse


def grad_tokens(do, q, k, v, o, lse, causal, mask, p, seed, scale, needs):
    if not _taken(q, k, p):
        return attention.grad_tokens(do, q, k, v, o, lse, causal, mask, p, seed, scale, needs)
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    if _by_flash(q, mask):
        of_dropout = (torch.empty(n, dtype=torch.uint64, device=q.device) for n in (2, ()))  # which there is not
        found = _flash_backward(
            do, q, k, v, o, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, *of_dropout, scale=scale
        )
        return tuple(d if need else None for d, need in zip(found, needs))
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf)
    word = torch.empty((), dtype=torch.int64, device=q.device)
    heads = _heads(q, k, v, _bias(q, k, causal, mask))
    dq, dk, dv, _ = _efficient_backward(do, *heads, o, lse, word, word, 0.0, [*needs, False], False, scale=scale)
    return dq if needs[0] else None, _grouped(dk, k) if needs[1] else None, _grouped(dv, v) if needs[2] else None


def _bias(q, k, causal, mask):
    """What is added to the scores, [B or 1, H or 1, T or 1, S] of q's dtype, or None; rows start at multiples of 16."""
    n_q, n_k = q.shape[2], k.shape[2]
    if mask is None and not causal:
        return None
    if mask is not None and mask.dim() == 2:
        mask = mask[:, None, None]
    b, h, rows = (1, 1, n_q) if mask is None else mask.shape[:3]
    bias = q.new_zeros(b, h, n_q if causal else rows, -(-n_k // 16) * 16)[..., :n_k]
    if mask is not None:
        bias = bias.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else bias.copy_(mask)
    if causal:
        later = torch.ones(n_q, n_k, dtype=torch.bool, device=q.device).triu(n_k - n_q + 1)
        bias.masked_fill_(later, -math.inf)
    return bias


def _heads(q, k, v, bias):
    """The same with as many heads of k and v as of q, and a bias for each score, most of it expanded."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return q, k, v, None if bias is None else bias.expand(*q.shape[:3], k.shape[2])


def _grouped(d, k):
    """[B, H, S, D] -> [B, Hk, S, D]"""
    return d if d.shape == k.shape else d.unflatten(1, (k.shape[1], -1)).sum(2)
