"""What a user would otherwise run for attention with a prefix: PEFT's recipe, concatenation, two parts merged, FlexAttention.

Shapes: q [B, H, T, D]; k, v [B, Hk, S, D] in q's dtype; pk, pv [1, Hk, P, D] and gate [B, 1, 1 or T, P] in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor
from torch.nn.functional import scaled_dot_product_attention as sdpa

RECIPE = "PEFT's recipe"  # without gates, which it does not have
GATED_RECIPE = (
    "PEFT's recipe, gated"  # gates of one value for all queries, multiplied into the prefix before it is joined
)
CONCATENATION = "concatenation + SDPA"
FLEX = "FlexAttention"

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def visible(t: int, s: int, p: int, causal: bool, padding: Tensor | None, device: str) -> Tensor | None:
    """bool [B or 1, 1, T or 1, P + S]: what the queries see of prefix and tokens; None: all."""
    if padding is not None:  # [B, S]
        return torch.cat([padding.new_ones(len(padding), p), padding], 1)[:, None, None]
    if not causal or t == 1:
        return None
    square = torch.ones(t, s, dtype=torch.bool, device=device).tril(s - t)
    return torch.cat([square.new_ones(t, p), square], 1)[None, None]


def joined(prefix: Tensor, x: Tensor, gate: Tensor | None = None) -> Tensor:
    """[B, Hk, P + S, D]: the prefix, a copy a row, before x; gate [B, 1, 1, P]."""
    rows = prefix.expand(x.shape[0], -1, -1, -1) if gate is None else prefix * gate.transpose(-1, -2)
    return torch.cat([rows.to(x.dtype), x], 2)


def repeated(x: Tensor, groups: int) -> Tensor:
    """[B, Hk·groups, S, D], as transformers repeats keys and values where there is a mask."""
    b, heads, s, d = x.shape
    return x if groups == 1 else x[:, :, None].expand(b, heads, groups, s, d).reshape(b, heads * groups, s, d)


def recipe(
    q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, mask: Tensor, gate: Tensor | None = None, p: float = 0.0
) -> Tensor:
    """What a layer of transformers computes from PEFT's cache. mask: dense, made once for all layers; p: dropout's."""
    groups = q.shape[1] // k.shape[1]
    keys, values = (repeated(joined(prefix, x, gate), groups) for prefix, x in ((pk, k), (pv, v)))
    return sdpa(q, keys, values, attn_mask=mask, dropout_p=p)


def concatenation(
    q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, mask: Tensor | None, gate: Tensor | None = None
) -> Tensor:
    """The same without repeating keys and values."""
    return sdpa(q, joined(pk, k, gate), joined(pv, v, gate), attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def flex(t: int, s: int, p: int, causal: bool, padding: Tensor | None, device: str) -> Callable[..., Tensor]:
    """`concatenation` by FlexAttention under torch.compile; its gate on values rules out a score_mod alone."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        if padding is not None:
            return (column < p) | padding[b, (column - p).clamp(min=0)]
        return (column < p) | (column - p <= row + s - t) if causal else column >= 0

    rows = None if padding is None else len(padding)
    mask = create_block_mask(seen, rows, None, t, p + s, device=device)
    inductor.compile_threads = 1  # compile here: under load torch's compile workers stalled
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, gate: Tensor | None) -> Tensor:
        keys, values = joined(pk, k, gate), joined(pv, v, gate)
        return compiled(q, keys, values, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

    return run


class Composition(torch.autograd.Function):
    """Tokens by PyTorch's flash attention for CPUs, the prefix by two GEMMs, merged by their log-sum-exp.

    Backward hands the merged output and log-sum-exp to the stock kernel. mask: added, [B, 1, 1, S], or None.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, gate: Tensor | None, causal: bool, mask: Any
    ) -> Tensor:
        o, lse = _flash(q, k, v, 0.0, causal, attn_mask=mask)
        keys, values = pk.to(q.dtype), pv.to(q.dtype)
        s = _scores(q, keys, gate)
        both = torch.logaddexp(lse, s.logsumexp(-1))
        w = _times((s - both[..., None]).exp_(), gate).to(q.dtype)
        o = o.mul_((lse - both).exp_()[..., None]) + (_rows(w, keys) @ values).view(q.shape)
        ctx.save_for_backward(q, k, v, keys, values, gate, o, both)
        ctx.causal, ctx.mask, ctx.dtype = causal, mask, pk.dtype
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, k, v, keys, values, gate, o, lse = ctx.saved_tensors
        do, scale = grads[0], q.shape[-1] ** -0.5
        dq, dk, dv = _flash_backward(do, q, k, v, o, lse, 0.0, ctx.causal, attn_mask=ctx.mask)
        q_rows, do_rows = _rows(q, keys), _rows(do, keys)
        raw = (q_rows @ keys.transpose(-1, -2)).view(*q.shape[:3], -1).float().mul_(scale)
        dw = (do_rows @ values.transpose(-1, -2)).view(raw.shape).float()
        w = (_times(raw, gate) - lse[..., None]).exp_()
        ds = w * (_times(dw, gate) - (do * o.float()).sum(-1, keepdim=True))
        by_key, weights = (_rows(t.to(q.dtype), keys) for t in (_times(ds, gate), _times(w, gate)))
        dq = dq + (by_key @ keys).view(q.shape).mul_(scale)
        d_keys = (by_key.transpose(-1, -2) @ q_rows).sum(0, keepdim=True, dtype=torch.float32).mul_(scale)
        d_values = (weights.transpose(-1, -2) @ do_rows).sum(0, keepdim=True, dtype=torch.float32)
        d_gate = None if gate is None else (ds.mul_(raw) + w.mul_(dw)).sum_to_size(gate.shape)
        return dq, dk, dv, d_keys.to(ctx.dtype), d_values.to(ctx.dtype), d_gate, None, None


def _rows(x: Tensor, keys: Tensor) -> Tensor:
    """[B, H, T, N] -> [B, Hk, H / Hk·T, N]"""
    return x.reshape(x.shape[0], keys.shape[1], -1, x.shape[-1])


def _scores(q: Tensor, keys: Tensor, gate: Tensor | None) -> Tensor:
    """float32 [B, H, T, P]"""
    raw = (_rows(q, keys) @ keys.transpose(-1, -2)).view(*q.shape[:3], -1)
    return _times(raw.float().mul_(1 / math.sqrt(q.shape[-1])), gate)


def _times(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else x * gate
