"""The arguments of prefix_attention: errors in full sentences, and the forms in which the passes take them."""

from __future__ import annotations

from typing import Any

import torch
from torch.compiler import is_compiling

from . import _check

OP = "prefix_attention"
MODES = ("joint", "separate")


def heads(q: Any, k: Any, v: Any) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, torch.Tensor):
            _check.bad_type(OP, name, "a torch.Tensor", t)
    if q.dim() != 4 or q.shape[3] == 0:
        _check.bad_value(OP, "q", "[B, H, T, D], D ≥ 1", list(q.shape))
    _check.floating(OP, "q", q)
    b, h, _, d = q.shape
    if k.dim() != 4 or k.shape[0] != b or k.shape[3] != d or k.shape[1] == 0 or h % k.shape[1]:
        _check.bad_value(OP, "k", f"[B, Hk, S, D] = [{b}, Hk, S, {d}], Hk a divisor of H = {h}", list(k.shape))
    if v.shape != k.shape:
        _check.bad_value(OP, "v", f"of k's shape, {list(k.shape)}", list(v.shape))
    for name, t in (("k", k), ("v", v)):
        if t.dtype != q.dtype:
            _check.bad_value(OP, name, f"of q's dtype ({q.dtype}); cast one of them or use torch.autocast", t.dtype)
        _same_device(name, t, q)


def prefixes(q: Any, k: Any, prefix_k: Any, prefix_v: Any, index: Any, lengths: Any, offsets: Any) -> None:
    hk, d = k.shape[1], q.shape[3]
    for name, t in (("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        if not isinstance(t, torch.Tensor):
            _check.bad_type(OP, name, "a torch.Tensor", t)
        _check.floating(OP, name, t)
        _same_device(name, t, q)
    if offsets is not None:
        _integers("prefix_offsets", offsets, torch.int64, "A + 1", None, q)
        if offsets.shape[0] < 2:
            _check.bad_value(OP, "prefix_offsets", "[A + 1], A ≥ 1", list(offsets.shape))
        if lengths is not None:
            _check.bad_value(OP, "prefix_lengths", "None with prefix_offsets, which have the lengths", "a tensor")
        expected, fits = f"[Hk, ΣP, D] = [{hk}, ΣP, {d}]", prefix_k.dim() == 3
        adapters = offsets.shape[0] - 1
    else:
        expected, fits = f"[A, Hk, P, D] = [A ≥ 1, {hk}, P, {d}]", prefix_k.dim() == 4 and prefix_k.shape[0] > 0
        adapters = prefix_k.shape[0] if fits else 0
    if not fits or prefix_k.shape[-3] != hk or prefix_k.shape[-1] != d:
        _check.bad_value(OP, "prefix_k", expected, list(prefix_k.shape))
    if prefix_v.shape != prefix_k.shape:
        _check.bad_value(OP, "prefix_v", f"of prefix_k's shape, {list(prefix_k.shape)}", list(prefix_v.shape))
    _integers("prefix_index", index, torch.int32, "B", q.shape[0], q)
    _integers("prefix_lengths", lengths, torch.int32, "A", adapters, q)
    if index is None and adapters != 1:
        _check.bad_value(OP, "prefix_index", f"given where there are several prefixes (A = {adapters})", None)


def gates(
    q: Any, prefix_k: Any, offsets: Any, gate_k: Any, gate_v: Any, log_bias: Any, gate_out: Any, mode: Any
) -> tuple:
    """-> gate_k, gate_v 4-dim, log_bias [A or 1, H, P], gate_out [A or 1, H]"""
    if mode not in MODES:
        _check.bad_value(OP, "mode", "'joint' or 'separate'", repr(mode))
    if gate_out is not None and mode != "separate":
        _check.bad_value(OP, "gate_out", "None in mode 'joint'", "a value")
    b, h, t, _ = q.shape
    p = prefix_k.shape[-2]
    adapters = prefix_k.shape[0] if offsets is None else offsets.shape[0] - 1
    found = []
    for name, gate in (("gate_k", gate_k), ("gate_v", gate_v)):
        if gate is not None:
            _real(name, gate, q)
            full = (1,) * (4 - gate.dim()) + tuple(gate.shape)
            last = full[-1] <= p or full[-1] == 1 if offsets is not None else full[-1] in (1, p)
            if len(full) != 4 or not last or not all(n in (1, size) for n, size in zip(full[:3], (b, h, t))):
                longest = f"{p}" if offsets is None else f"the longest of {adapters} prefixes"
                _check.bad_value(
                    OP, name, f"broadcastable to [B, H, T, P] = [{b}, {h}, {t}, {longest}]", list(gate.shape)
                )
            gate = gate.reshape(full)
        found.append(gate)
    if found[0] is not None and found[1] is not None and offsets is not None:
        sizes = {gate.shape[-1] for gate in found} - {1}
        if len(sizes) > 1:
            _check.bad_value(OP, "gate_v", f"of gate_k's P, {found[0].shape[-1]}", list(gate_v.shape))
    of_adapters = "[H, ΣP]" if offsets is not None else "[H, P] or [A, H, P]"
    log_bias = _per_adapter("log_bias", log_bias, (h, p), 1 if offsets is not None else adapters, of_adapters, q)
    return *found, log_bias, _per_adapter("gate_out", gate_out, (h,), adapters, "[H] or [A, H]", q)


def _per_adapter(name: str, value: Any, shape: tuple, adapters: int, expected: str, q: Any) -> Any:
    if value is None:
        return None
    _real(name, value, q)
    full = tuple(value.shape)
    if full == shape:
        return value[None]
    if full[1:] != shape or full[0] not in (1, adapters):
        sizes = f"H = {shape[0]}" + (f", P = {shape[1]}" if len(shape) == 2 else "") + f", A = {adapters}"
        _check.bad_value(OP, name, f"{expected} ({sizes})", list(full))
    return value


def masks(q: Any, k: Any, is_causal: bool, key_padding_mask: Any, attn_mask: Any) -> Any:
    """-> bool [B, S], or [B or 1, H or 1, T, S], or None"""
    b, h, t, _ = q.shape
    s = k.shape[2]
    if key_padding_mask is not None:
        if not isinstance(key_padding_mask, torch.Tensor):
            _check.bad_type(OP, "key_padding_mask", "a torch.Tensor or None", key_padding_mask)
        if key_padding_mask.dtype != torch.bool or tuple(key_padding_mask.shape) != (b, s):
            got = f"{key_padding_mask.dtype} {list(key_padding_mask.shape)}"
            _check.bad_value(OP, "key_padding_mask", f"bool [B, S] = [{b}, {s}], True = attend", got)
        _same_device("key_padding_mask", key_padding_mask, q)
        if attn_mask is not None:
            _check.bad_value(OP, "attn_mask", "None with key_padding_mask (combine them)", "a tensor")
        return key_padding_mask
    if attn_mask is None:
        return None
    if not isinstance(attn_mask, torch.Tensor):
        _check.bad_type(OP, "attn_mask", "a torch.Tensor or None", attn_mask)
    if is_causal:
        _check.bad_value(OP, "attn_mask", "None with is_causal (let the mask be causal)", "a tensor")
    if attn_mask.dtype != torch.bool and not attn_mask.dtype.is_floating_point:
        _check.bad_value(OP, "attn_mask", "bool (True = attend) or floating (added)", attn_mask.dtype)
    _same_device("attn_mask", attn_mask, q)
    full = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    if len(full) != 4 or not all(n in (1, size) for n, size in zip(full, (b, h, t, s))):
        _check.bad_value(
            OP, "attn_mask", f"broadcastable to [B, H, T, S] = [{b}, {h}, {t}, {s}]", list(attn_mask.shape)
        )
    attn_mask = attn_mask.float() if attn_mask.dtype == torch.float64 != q.dtype else attn_mask
    return attn_mask.reshape(full).expand(-1, -1, t, s)


def number(q: Any, scale: Any, dropout_p: Any) -> Any:
    """-> scale"""
    if not 0.0 <= dropout_p <= 1.0:
        _check.bad_value(OP, "dropout_p", "a probability in [0, 1]", dropout_p)
    if scale is None:
        return q.shape[-1] ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat, torch.SymInt)):
        _check.bad_type(OP, "scale", "a number or None (1/√D)", scale)
    return scale


def plain_memory(t: Any) -> Any:
    """Nothing lazily negated or zero"""
    if t is None:
        return None
    t = t.resolve_neg()
    if not is_compiling() and t._is_zerotensor():
        t = t.clone()
    return t


def dense_rows(t: Any) -> Any:
    """The same, and vectors along the last dimension without gaps"""
    t = plain_memory(t)
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def _real(name: str, value: Any, q: Any) -> None:
    if not isinstance(value, torch.Tensor):
        _check.bad_type(OP, name, "a torch.Tensor or None", value)
    _check.floating(OP, name, value)
    _same_device(name, value, q)


def _integers(name: str, value: Any, dtype: torch.dtype, size: str, length: int | None, q: Any) -> None:
    if value is None:
        return
    if not isinstance(value, torch.Tensor):
        _check.bad_type(OP, name, "a torch.Tensor or None", value)
    if value.dtype != dtype or value.dim() != 1 or (length is not None and value.shape[0] != length):
        shape = f"[{size}]" if length is None else f"[{size}] = [{length}]"
        _check.bad_value(OP, name, f"{str(dtype).removeprefix('torch.')} {shape}", f"{value.dtype} {list(value.shape)}")
    _same_device(name, value, q)


def _same_device(name: str, value: Any, q: Any) -> None:
    if value.device != q.device:
        _check.bad_value(OP, name, f"on q's device ({q.device})", value.device)
