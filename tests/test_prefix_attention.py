"""prefix_attention: every backend against float64, all gradients, ugly shapes; then how it behaves."""

from __future__ import annotations

import math
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from _close import assert_close
from conftest import BACKENDS, ON_GPU
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import fastpeft as fp
from fastpeft.ops import prefix_attention
from fastpeft.ops._prefix_attention_registered import BACKENDS as TABLE
from fastpeft.reference import philox
from fastpeft.reference import prefix_attention as reference

pytestmark = pytest.mark.usefixtures("one_thread")


def _runs(name: str) -> bool:
    tiny = torch.empty(1, 1, 1, 16, device="cpu")
    return name in TABLE and TABLE[name].can((tiny, tiny, tiny, tiny, tiny, *(None,) * 7)) is None


HERE = [name for name in BACKENDS if _runs(name.split("-")[0])] + ON_GPU
every_backend = pytest.mark.parametrize("backend", HERE, indirect=True)

MODES = ["joint", "separate"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SHAPES = [  # B, H, Hk, T, S, D, P
    (1, 1, 1, 1, 1, 16, 1),
    (2, 4, 2, 7, 7, 32, 3),
    (1, 6, 2, 33, 33, 64, 16),
    (2, 2, 2, 5, 19, 40, 37),
    (3, 3, 1, 1, 50, 64, 8),
    (2, 2, 1, 19, 5, 17, 4),
    (1, 2, 2, 65, 65, 128, 33),
    (1, 2, 1, 4, 9, 256, 5),
]
TRAINED = ("q", "k", "v", "prefix_k", "prefix_v", "gate_k", "gate_v", "log_bias", "gate_out")


def problem(shape, dtype, mode="joint", *, index=None, kind="padded", gates="all", masters=torch.float32, **options):
    """Tensors and options of a call. kind: padded, ragged (NaN beyond each length) or flat prefixes; gates: all, none, or
    the shape of both, of [B, H, T, P]."""
    b, h, hk, t, s, d, p = shape
    adapters = 1 if index is None else 3
    lengths = [p, max(p - 2, 0), p // 2][:adapters]
    many = (hk, sum(lengths)) if kind == "flat" else (adapters, hk, p)
    tensors = {
        "q": torch.randn(b, t, h, d).to(dtype).transpose(1, 2),  # as models have it
        "k": torch.randn(b, hk, s, d).to(dtype),
        "v": torch.randn(b, hk, s, d).to(dtype),
        "prefix_k": torch.randn(*many, d).to(masters),
        "prefix_v": torch.randn(*many, d).to(masters),
    }
    if gates != "none":
        gate_k, gate_v = ((b, 1, t, p), (h, 1, p)) if gates == "all" else (gates, gates)
        tensors["gate_k"], tensors["gate_v"] = torch.rand(gate_k).to(masters), torch.randn(gate_v).to(masters)
        per_head = (h, many[1]) if kind == "flat" else (adapters, h, p)
        tensors["log_bias"] = torch.randn(per_head).to(masters)
        if mode == "separate":
            tensors["gate_out"] = torch.randn(adapters, h).to(masters)
    options["mode"] = mode
    if index is not None:
        options["prefix_index"] = torch.tensor(index, dtype=torch.int32)
    if kind == "flat":
        options["prefix_offsets"] = torch.tensor([0, *lengths]).cumsum(0)
    if kind == "ragged":
        options["prefix_lengths"] = torch.tensor(lengths, dtype=torch.int32)
        for name in ("prefix_k", "prefix_v", "log_bias"):
            for of, n in zip(tensors.get(name, ()), lengths):
                (of[:, n:] if of.dim() == 3 or name == "log_bias" else of).fill_(math.nan)
    return {name: x.requires_grad_() for name, x in tensors.items()}, options


def composition(
    q, k, v, prefix_k, prefix_v, gate_k=None, gate_v=None, log_bias=None, gate_out=None, *, mode="joint", is_causal=False,
    key_padding_mask=None, attn_mask=None, prefix_index=None, prefix_lengths=None, prefix_offsets=None, dropout_p=0.0,
    seed=0, scale=None, terms=False,
):  # fmt: skip
    """What a user would write in q's dtype, one row of the batch after the other.

    terms: instead of each sum the sum of its terms' absolute values, in the gradients too.
    """
    (b, h, t, d), s = q.shape, k.shape[2]
    if terms:
        v, prefix_v, gate_v, gate_out = (None if x is None else x.abs() for x in (v, prefix_v, gate_v, gate_out))
    group, scale = h // k.shape[1], d**-0.5 if scale is None else scale
    seen = torch.ones(b, h, t, s, dtype=torch.bool)
    if is_causal:
        seen = seen.tril(s - t)
    if key_padding_mask is not None:
        seen = seen & key_padding_mask[:, None, None]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        seen = seen & attn_mask
    added = torch.zeros(b, h, t, s, dtype=q.dtype).masked_fill(~seen, -math.inf)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        added = added + attn_mask.to(q.dtype)
    rows = []
    for i in range(b):
        a = 0 if prefix_index is None else int(prefix_index[i])
        if prefix_offsets is None:
            n = prefix_k.shape[2] if prefix_lengths is None else int(prefix_lengths[a])
            n = 0 if a < 0 else n
            pk, pv = prefix_k[a, :, :n], prefix_v[a, :, :n]
            bias = None if log_bias is None else log_bias.expand(prefix_k.shape[0], h, -1)[a, :, None, :n]
        else:
            of = slice(0, 0) if a < 0 else slice(int(prefix_offsets[a]), int(prefix_offsets[a + 1]))
            pk, pv = prefix_k[:, of], prefix_v[:, of]
            n = pk.shape[1]
            bias = None if log_bias is None else log_bias[:, None, of]
        k_i, v_i, pk, pv = (x.to(q.dtype).repeat_interleave(group, 0) for x in (k[i], v[i], pk, pv))
        gk, gv = (
            1.0 if g is None else g.to(q.dtype).expand(b, h, t, n if g.shape[-1] == 1 else -1)[i, ..., :n]
            for g in (gate_k, gate_v)
        )
        s_p = _scores(q[i], pk, gk, 0.0 if bias is None else bias.to(q.dtype), scale, terms)
        s_x = _scores(q[i], k_i, 1.0, added[i], scale, terms)
        parts = [s_p, s_x] if mode == "separate" else [torch.cat([s_p, s_x], -1)]
        w = torch.cat([_softmax(part, terms) for part in parts], -1)
        if dropout_p:
            mine = slice(i * h * t, (i + 1) * h * t)
            kept = [
                philox.dropout_mask(torch.as_tensor(seed), (b * h * t, size), dropout_p, which)[mine]
                for which, size in ((0, n), (1, s))
            ]
            w = w * torch.cat(kept, -1).view(h, t, n + s) / (1 - dropout_p)
        c = 1.0 if gate_out is None else gate_out.to(q.dtype).expand(-1, h)[max(a, 0) % gate_out.shape[0], :, None, None]
        rows.append(c * ((gv * w[..., :n]) @ pv) + w[..., n:] @ v_i)
    return torch.stack(rows) if rows else torch.zeros_like(q)


def _scores(q, keys, gate, bias, scale, terms):
    s = scale * gate * (q @ keys.transpose(1, 2)) + bias
    if not terms:
        return s
    gate, bias = (torch.as_tensor(x).abs() for x in (gate, bias))
    return _through(s, scale * gate * (q.abs() @ keys.abs().transpose(1, 2)) + bias.masked_fill(bias == math.inf, 0.0))


def _softmax(s, terms):
    dead = (s == -math.inf).all(-1, keepdim=True)
    w = s.masked_fill(dead, 0.0).softmax(-1) * ~dead
    if not terms:
        return w
    of, s = w.detach(), s.masked_fill(s == -math.inf, 0.0)
    return _through(w, of * (s + (of * s).sum(-1, keepdim=True)))  # ds = w (dw + Σ w dw)


def _through(value, gradient):
    """One's value with the other's gradient"""
    return value.detach() + gradient - gradient.detach()


def run(fn, tensors, options, do):
    o = fn(**tensors, **options)
    return dict(zip(("o", *tensors), (o, *torch.autograd.grad(o, list(tensors.values()), do))))


def in_double(tensors):
    return {name: t.detach().double().requires_grad_() for name, t in tensors.items()}


def check(tensors, options, do=None):
    dtype = tensors["q"].dtype
    do = torch.randn(tensors["q"].shape).to(dtype) if do is None else do
    ours = run(prefix_attention, tensors, options, do)
    low = run(composition, tensors, options, do)
    exact = run(composition, in_double(tensors), options, do.double())
    sizes = run(partial(composition, terms=True), in_double(tensors), options, do.double().abs())
    for name, true in exact.items():
        assert ours[name].dtype == tensors["q" if name == "o" else name].dtype
        assert_close(ours[name], low[name], true, name, eps=EPS[dtype], terms=sizes[name].detach().abs())


# ---- right, in every backend -----------------------------------------------------------------------------------------


@pytest.mark.verifies("prefix_attention", "forward", "backward")
@every_backend
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(backend, dtype, shape, mode):
    padding = torch.rand(shape[0], shape[4]) > 0.3
    check(*problem(shape, dtype, mode, is_causal=True, key_padding_mask=padding))
    check(*problem(shape, dtype, mode, gates="none"))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
