"""Attention over tokens and a gated prefix: one definition of prefix tuning and its kin, in plain PyTorch.

    s^x = scale·q kᵀ + mask;   s^p = scale·Gk ⊙ (q pkᵀ) + β
    joint:     o = Σ e^{s^p − L} Gv·pv + Σ e^{s^x − L} v,   L = logsumexp(s^p, s^x)
    separate:  o = softmax(s^x) v + c·softmax(s^p) (Gv ⊙ pv)

Joint without gates is prefix tuning (Li & Liang 2021, equation 7), Gk = Gv APT (Zhang et al. 2023, section 3), separate with
c = tanh g LLaMA-Adapter (Zhang et al. 2023, equation 8). `prefix_attention` is the definition, differentiable by autograd.
The passes below are the same in closed form, the `torch` backend.

Shapes: q, o [B, H, T, D]; k, v [B, Hk, S, D]; prefix_k, prefix_v [A, Hk, P, D], or flat [Hk, ΣP, D] with offsets int64
[A + 1]; gates 4-dim, each dimension that of [B, H, T, P] or 1; log_bias (β) [A or 1, H, P], flat [1, H, ΣP]; gate_out (c)
[A or 1, H]; index int32 [B], −1 = no prefix, any other outside 0..A−1 makes that row NaN; lengths int32 [A]. mask: None, bool
[B, S], or [B or 1, H or 1, T, S], bool (True = attend) or added. causal: the last query sees the last key.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .lora_linear import drop

PREFIX, TOKENS = 0, 1  # the projections of the two dropout masks


def prefix_attention(
    q, k, v, prefix_k, prefix_v, gate_k, gate_v, log_bias, gate_out, index, lengths, offsets, *,
    causal, mask, separate, dropout_p, seed, scale,
):  # fmt: skip
    """-> o, q's dtype, computed in float32 (float64 for float64)"""
    prefix = by_row(q, prefix_k, prefix_v, gate_k, gate_v, log_bias, gate_out, index, lengths, offsets)
    s_p = _prefix_scores(products(q, prefix.keys), prefix, scale)
    s_x = _token_scores(q, k, causal, mask, scale)
    if separate:
        w_p, w_x = _softmax(s_p), _softmax(s_x)
    else:
        w_p, w_x = _softmax(torch.cat([s_p, s_x], -1)).split([s_p.shape[-1], s_x.shape[-1]], -1)
    of_prefix = weighted(_times(drop(w_p, dropout_p, seed, PREFIX), prefix.gate_v), prefix.values)
    if separate:
        of_prefix = _times(of_prefix, prefix.gate_out)
    o = (weighted(drop(w_x, dropout_p, seed, TOKENS), v) + of_prefix).to(q.dtype)
    return o if prefix.bad is None else o.masked_fill(prefix.bad, math.nan)


def _softmax(s):
    """Zeros, with zero gradients, for a query that sees nothing."""
    dead = (s == -math.inf).all(-1, keepdim=True)
    return s.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)


# ---- the passes ------------------------------------------------------------------------------------------------------


def can(meta) -> None:
    return None


def fused(*arguments) -> None:
    """Tokens and prefix go one after the other here."""
    return None


grad_fused = fused


def tokens(q, k, v, causal, mask, p, seed, scale):
    """-> o_x of the tokens alone, [B, T, H, D] in memory, and lse [B, H, T]: −∞ (and o_x = 0) where none is seen"""
    s = _token_scores(q, k, causal, mask, scale)
    lse = s.logsumexp(-1)
    return by_query(q).copy_(weighted(drop(_weights(s, lse), p, seed, TOKENS), v)), lse


def grad_tokens(do, q, k, v, o, lse, causal, mask, p, seed, scale, needs):
    """-> dq, dk, dv of the tokens, None where not needed. o, lse: in joint mode of tokens and prefix together"""
    w = _weights(_token_scores(q, k, causal, mask, scale), lse)
    ds = scale * w * (drop(products(do, v), p, seed, TOKENS) - _delta(do, o))
    dq = weighted(ds, k).to(q.dtype) if needs[0] else None
    dk = _grouped(ds, q, k).to(k.dtype) if needs[1] else None
    return dq, dk, _grouped(drop(w, p, seed, TOKENS), do, v).to(v.dtype) if needs[2] else None


def forward(
    q, prefix_k, prefix_v, gate_k, gate_v, log_bias, gate_out, index, lengths, offsets, o, lse, separate, p, seed, scale
):  # fmt: skip
    """-> o, lse. Joint: the prefix merged into both, in place; separate: a new o, and the prefix' own lse"""
    prefix = by_row(q, prefix_k, prefix_v, gate_k, gate_v, log_bias, gate_out, index, lengths, offsets)
    s = _prefix_scores(products(q, prefix.keys), prefix, scale)
    lse_p = s.logsumexp(-1)
    merged = lse_p if separate else torch.logaddexp(lse, lse_p)
    of_prefix = weighted(_times(drop(_weights(s, merged), p, seed, PREFIX), prefix.gate_v), prefix.values)
    if separate:
        o = like_tokens(o).copy_(o + _times(of_prefix, prefix.gate_out))
    else:
        o.copy_(o * _weights(lse[..., None], merged) + of_prefix)
    if prefix.bad is not None:
        o.masked_fill_(prefix.bad, math.nan)
    return o, lse_p if separate else lse.copy_(merged)


def backward(
    do, q, prefix_k, prefix_v, gate_k, gate_v, log_bias, gate_out, index, lengths, offsets, o, lse, dq, separate, p, seed,
    scale, needs,
):  # fmt: skip
    """-> d_prefix_k, d_prefix_v, d_gate_k, d_gate_v, d_log_bias, d_gate_out, None where not needed; dq is added to in place

    w = e^{s − lse};  dw = drop(do·pv)·Gv·c;  ds = w (dw − Δ),  Δ = Σ_d do·o (joint) or Σ_j w·dw (separate)
    dGk = scale·ds·(q·pk);  dGv = drop(w)·c (do·pv);  dβ = Σ ds;  dc = Σ w·dw / c
    """
    prefix = by_row(q, prefix_k, prefix_v, gate_k, gate_v, log_bias, gate_out, index, lengths, offsets)
    raw = products(q, prefix.keys)
    w = _weights(_prefix_scores(raw, prefix, scale), lse)
    c = prefix.gate_out if separate else None
    kept, dov = drop(w, p, seed, PREFIX), products(do, prefix.values)
    dw_by_c = _times(drop(dov, p, seed, PREFIX), prefix.gate_v)
    dw = _times(dw_by_c, c)
    ds = w * (dw - ((w * dw).sum(-1, keepdim=True) if separate else _delta(do, o)))
    if prefix.valid is not None:
        ds = ds.masked_fill(~prefix.valid, 0.0)  # a bad row's o is NaN
    by_key = scale * _times(ds, prefix.gate_k)
    if dq is not None:
        dq += weighted(by_key, prefix.keys)

    adapters = prefix_k.shape[0] if offsets is None else offsets.shape[0] - 1

    def home(d, count):
        """[b, h, P, D] of rows -> of their adapters, `count` of them, or flat"""
        d = _by_adapter(d, index, count)
        return d if offsets is None else _flat(d, offsets, prefix_k.shape[-2])

    d_k = d_v = d_bias = d_c = None
    if needs[0]:
        d_k = home(_grouped(by_key, q, prefix.keys), adapters).view_as(prefix_k).to(prefix_k.dtype)
    if needs[1]:
        d_v = _grouped(_times(_times(kept, prefix.gate_v), c), do, prefix.values)
        d_v = home(d_v, adapters).view_as(prefix_v).to(prefix_v.dtype)
    d_gate_k = (scale * ds * raw).sum_to_size(gate_k.shape) if needs[2] else None
    d_gate_v = (kept * _times(dov, c)).sum_to_size(gate_v.shape) if needs[3] else None
    if needs[4]:
        d_bias = home(ds.sum(2)[..., None], log_bias.shape[0] if offsets is None else adapters).squeeze(-1)
    if needs[5]:
        d_c = _by_adapter((w * dw_by_c).sum((2, 3)), index, gate_out.shape[0])
    return d_k, d_v, d_gate_k, d_gate_v, d_bias, d_c


def by_query(q):
    """An empty [B, H, T, D] that is [B, T, H, D] in memory, and no view: the caller may change it in place"""
    return torch.empty_permuted(q.shape, (0, 2, 1, 3), dtype=q.dtype, device=q.device)


def like_tokens(o):
    """An empty output for mode "separate", in memory as the tokens' is; in every backend"""
    return by_query(o) if o.stride(1) < o.stride(2) else torch.empty_like(o, memory_format=torch.contiguous_format)


# ---- scores and weights ----------------------------------------------------------------------------------------------


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def products(q, keys):
    """q [B, H, T, D] · keys [B or 1, Hk, N, D] -> [B, H, T, N]; a group of H / Hk heads shares keys"""
    wide = wide_dtype(q.dtype)
    grouped = q.to(wide).unflatten(1, (keys.shape[1], -1))
    return (grouped @ keys.to(wide)[:, :, None].transpose(-1, -2)).flatten(1, 2)


def weighted(w, values):
    """w [B, H, T, N] · values [B or 1, Hk, N, D] -> [B, H, T, D]"""
    return (w.unflatten(1, (values.shape[1], -1)) @ values.to(w.dtype)[:, :, None]).flatten(1, 2)


def _grouped(w, rows, like):
    """Σ over a group's heads of wᵀ [B, H, N, T] · rows [B, H, T, D] -> [B, Hk, N, D]"""
    return (w.transpose(-1, -2) @ rows.to(w.dtype)).unflatten(1, (like.shape[1], -1)).sum(2)


def _token_scores(q, k, causal, mask, scale):
    s = scale * products(q, k)
    if mask is not None:
        mask = mask[:, None, None] if mask.dim() == 2 else mask
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask
    if causal:
        n_q, n_k = s.shape[-2:]
        s = s.masked_fill(torch.ones(n_q, n_k, dtype=torch.bool, device=s.device).triu(n_k - n_q + 1), -math.inf)
    return s


def _prefix_scores(raw, prefix, scale):
    s = scale * _times(raw, prefix.gate_k)
    s = s if prefix.log_bias is None else s + prefix.log_bias
    return s if prefix.valid is None else s.masked_fill(~prefix.valid, -math.inf)


def _weights(s, lse):
    """e^{s − lse}, 0 where a query sees nothing"""
    return (s - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()


def _delta(do, o):
    return (do.to(wide_dtype(do.dtype)) * o).sum(-1, keepdim=True)


def _times(x, gate):
    return x if gate is None else x * gate


# ---- prefixes, a row's own -------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """The prefix of each row of the batch; b is B, or 1 where all share one. Zeros beyond a prefix' length."""

    keys: torch.Tensor  # [b, Hk, P, D]
    values: torch.Tensor
    gate_k: torch.Tensor | None  # each dimension that of [B, H, T, P] or 1
    gate_v: torch.Tensor | None
    log_bias: torch.Tensor | None  # [b, H, 1, P]
    gate_out: torch.Tensor | None  # [b, H, 1, 1]
    valid: torch.Tensor | None  # bool [b, 1, 1, P]
    bad: torch.Tensor | None  # bool [b, 1, 1, 1]: the index is out of range, or the gates are too few


def by_row(q, prefix_k, prefix_v, gate_k, gate_v, log_bias, gate_out, index, lengths, offsets) -> Rows:
    wide, bad, valid = wide_dtype(q.dtype), None, None
    if offsets is not None:
        longest, lengths = _longest(offsets, prefix_k.shape[-2], gate_k, gate_v)
        bad = lengths > longest  # [A]: longer than its gates
        lengths = lengths.masked_fill(bad, 0)
        prefix_k, prefix_v = (_padded(t[None], offsets, longest) for t in (prefix_k, prefix_v))
        log_bias = None if log_bias is None else _padded(log_bias[..., None], offsets, longest).squeeze(-1)
    if lengths is not None:
        valid = torch.arange(prefix_k.shape[2], device=q.device) < lengths[:, None]  # [A, P]
    if index is not None:
        last = prefix_k.shape[0] - 1
        pick = index.clamp(0, last)
        outside = (index < -1) | (index > last)
        bad = outside if bad is None else outside | bad[pick] & (index == pick)
        prefix_k, prefix_v, valid = prefix_k[pick], prefix_v[pick], None if valid is None else valid[pick]
        log_bias, gate_out = (t if t is None or t.shape[0] == 1 else t[pick] for t in (log_bias, gate_out))
        there = (index == pick)[:, None].expand(-1, prefix_k.shape[2])
        valid = there if valid is None else valid & there
    bad = None if bad is None else bad[:, None, None, None]
    if valid is not None:
        valid = valid[:, None, None]
        absent = ~valid.transpose(-1, -2)  # [b, 1, P, 1]
        prefix_k, prefix_v = prefix_k.masked_fill(absent, 0.0), prefix_v.masked_fill(absent, 0.0)
        gate_k, gate_v = (None if t is None else t.masked_fill(~valid, 0.0) for t in (gate_k, gate_v))
    log_bias = None if log_bias is None else log_bias[:, :, None]
    gate_out = None if gate_out is None else gate_out[:, :, None, None]
    gates = [None if t is None else t.to(wide) for t in (gate_k, gate_v, log_bias, gate_out)]
    return Rows(prefix_k.to(wide), prefix_v.to(wide), *gates, valid, bad)  # type: ignore[call-arg]


def _by_adapter(d, index, adapters):
    """[B, ...] -> [A, ...]: the sum over each adapter's rows, in a fixed order"""
    if index is None or adapters == 1:
        return d.sum(0, keepdim=True)
    rows = torch.arange(adapters, device=d.device)[:, None] == index
    return (rows.to(d.dtype) @ d.flatten(1)).unflatten(1, d.shape[1:])


def _longest(offsets, total, gate_k, gate_v):
    """The longest of flat prefixes, by their gates where those count positions; and int64 [A], the length of each."""
    ends = offsets.clamp(0, total)
    lengths = ends.diff().clamp(min=0)
    sizes = [t.shape[-1] for t in (gate_k, gate_v) if t is not None and t.shape[-1] != 1]
    return sizes[0] if sizes else int(lengths.max()), lengths


def _padded(flat, offsets, longest):
    """[1, h, ΣP, D] -> [A, h, P, D]"""
    columns = offsets[:-1, None] + torch.arange(longest, device=flat.device)
    return flat[0, :, columns.clamp(0, max(flat.shape[2] - 1, 0))].transpose(0, 1)


def _flat(padded, offsets, total):
    """[A, h, P, D] -> [1, h, ΣP, D], zeros where no prefix lies"""
    column = torch.arange(total, device=padded.device)
    adapter = torch.searchsorted(offsets[1:], column, right=True).clamp(max=padded.shape[0] - 1)
    position = column - offsets[adapter]
    absent = (position < 0) | (position >= padded.shape[2]) | (column >= offsets[adapter + 1])
    if padded.shape[2] == 0:
        return padded.new_zeros(1, padded.shape[1], total, padded.shape[3])
    found = padded[adapter, :, position.clamp(0, padded.shape[2] - 1)]  # [ΣP, h, D]
    return found.masked_fill(absent[:, None, None], 0.0).transpose(0, 1)[None]
