"""Attention over tokens by PyTorch's own kernel for CPUs: the token part of prefix_attention where there is no dropout.

The kernel takes grouped heads, and an additive mask beside its causal one. Three things it does otherwise than we need: its
causal mask is aligned to the first key, so with T < S the keys before the last T are a call of their own, merged by lse; a
query that sees nothing has lse 0, here −∞; and it divides by T and S, so none may be 0.
"""

from __future__ import annotations

import math

import torch

from ..reference import prefix_attention as reference

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def takes(q: torch.Tensor, k: torch.Tensor, p: float) -> bool:
    return p == 0.0 and q.device.type == "cpu" and q.dtype in _DTYPES and q.numel() > 0 and k.numel() > 0


def tokens(q, k, v, causal, mask, p, seed, scale):
    """-> o_x [B, H, T, D], in memory [B, T, H, D] as every backend has it, and lse: see `reference.prefix_attention.tokens`"""
    if not takes(q, k, p):
        return reference.tokens(q, k, v, causal, mask, p, seed, scale)
    o = lse = None
    mask = _narrow(mask)
    rows, calls = _calls(q.shape[2], k.shape[2], causal)
    for keys, square in calls:
        added = _added(mask, keys, q.dtype)
        found, of_keys = _flash(q[:, :, rows], k[:, :, keys], v[:, :, keys], 0.0, square, attn_mask=added, scale=scale)
        if mask is not None:
            of_keys = of_keys.masked_fill(~_seen(mask, keys, square), -math.inf)
        o, lse = (found, of_keys) if o is None else _merged(o, lse, found, of_keys)
    if rows.start:  # T > S: the first queries see no key
        o, lse = _padded(o, rows.start, 0.0), _padded(lse[..., None], rows.start, -math.inf)[..., 0]
    return o if o.transpose(1, 2).is_contiguous() else reference.by_query(q).copy_(o), lse.contiguous()


def grad_tokens(do, q, k, v, o, lse, causal, mask, p, seed, scale, needs):
    """-> dq, dk, dv, None where not needed; o and lse may be merged with those of a prefix"""
    if not takes(q, k, p):
        return reference.grad_tokens(do, q, k, v, o, lse, causal, mask, p, seed, scale, needs)
    do = do if do.stride(-1) == 1 else do.contiguous()
    lse = lse.masked_fill(lse == -math.inf, 0.0)  # e^{−∞ − 0} = 0
    mask = _narrow(mask)
    rows, calls = _calls(q.shape[2], k.shape[2], causal)
    do, q, o, lse = (t[:, :, rows] for t in (do, q, o, lse))
    parts = [
        _flash_backward(
            do, q, k[:, :, keys], v[:, :, keys], o, lse, 0.0, square, attn_mask=_added(mask, keys, q.dtype), scale=scale
        )
        for keys, square in calls
    ]
    dqs, dks, dvs = zip(*parts)
    dq = (dqs[0] if len(parts) == 1 else dqs[0] + dqs[1]) if needs[0] else None
    if dq is not None and rows.start:
        dq = _padded(dq, rows.start, 0.0)
    dk, dv = (
        (found[0] if len(parts) == 1 else torch.cat(found, 2)) if need else None
        for found, need in zip((dks, dvs), needs[1:])
    )
    return dq, dk, dv


def _calls(n_q, n_k, causal):
    """The rows of q that see a key, and the kernel's calls: which keys, and whether the last ones' causal mask is square."""
    every = slice(0, None)
    if not causal or n_q == 1:
        return every, [(every, False)]
    if n_q >= n_k:
        return slice(n_q - n_k, None), [(every, True)]
    return every, [(slice(0, n_k - n_q), False), (slice(n_k - n_q, None), True)]


def _narrow(mask):
    """A mask that is the same for all queries as one row."""
    return mask[:, :, :1] if mask is not None and mask.dim() == 4 and mask.stride(2) == 0 else mask


def _added(mask, keys, dtype):
    """The mask of these keys as the kernel takes it: added, 4-dim, of q's dtype or float32 (others it reads wrongly)."""
    if mask is None:
        return None
    if mask.dim() == 2:
        mask = mask[:, None, None]
    mask = mask[..., keys]
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -math.inf)
    wide = reference.wide_dtype(dtype)
    return mask if mask.dtype in (dtype, wide) else mask.to(wide)


def _seen(mask, keys, square):
    """Which queries see one of these keys, bool [b, h, T or 1]. The lse would not tell: 0 is also a sum of 1."""
    if mask.dim() == 2:
        mask = mask[:, None, keys]
        return mask.cumsum(-1) > 0 if square else mask.any(-1, keepdim=True)
    mask = mask[..., keys]
    return mask.any(-1) if mask.dtype == torch.bool else mask.amax(-1) > -math.inf


def _merged(o, lse, other, other_lse):
    both = torch.logaddexp(lse, other_lse)
    finite = both.masked_fill(both == -math.inf, 0.0)
    o = o * (lse - finite).exp()[..., None] + other * (other_lse - finite).exp()[..., None]
    return o.to(other.dtype), both


def _padded(x, rows, value):
    """[B, H, T, D] -> [B, H, rows + T, D], the new ones first"""
    return torch.nn.functional.pad(x, (0, 0, rows, 0), value=value)
