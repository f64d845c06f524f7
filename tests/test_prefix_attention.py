"""prefix_attention: every backend against float64, all gradients, ugly shapes; then how it behaves."""

from __future__ import annotations

import math
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from _close import assert_close, sizes_of_weights, through
from conftest import BACKENDS, ON_GPU
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import fastpeft as fp
from fastpeft.ops import prefix_attention
from fastpeft.ops._prefix_attention_registered import BACKENDS as TABLE
from fastpeft.reference import philox

pytestmark = pytest.mark.usefixtures("one_thread")


def _runs(name: str) -> bool:
    tiny = torch.empty(1, 1, 1, 16, device="cpu")
    return name in TABLE and TABLE[name].can((tiny, tiny, tiny, tiny, tiny, *(None,) * 7)) is None


HERE = [name for name in BACKENDS if name != "triton" and _runs(name.split("-")[0])] + ON_GPU
every_backend = pytest.mark.parametrize("backend", HERE, indirect=True)
BEST = {name.partition("-")[0]: name for name in HERE[: -len(ON_GPU)] if name.count("-") < 2}  # instruction set
INTERPRETED = ["triton"] if "triton" in BACKENDS and _runs("triton") else []  # has a file of its own: a second a call
one_of_each = pytest.mark.parametrize("backend", [*BEST.values(), *INTERPRETED, *ON_GPU], indirect=True)

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
            1.0 if g is None else g.to(q.dtype).expand(b, h, t, -1 if g.dim() and g.shape[-1] > 1 else n)[i, ..., :n]
            for g in (gate_k, gate_v)
        )
        s_p = _scores(q[i], pk, gk, 0.0 if bias is None else bias.to(q.dtype), scale, terms)
        s_x = _scores(q[i], k_i, 1.0, added[i], scale, terms)
        parts = [s_p, s_x] if mode == "separate" else [[torch.cat(both, -1) for both in zip(s_p, s_x)]]
        w = torch.cat([_softmax(*part, terms) for part in parts], -1)
        if dropout_p:
            mine = slice(i * h * t, (i + 1) * h * t)
            kept = [
                philox.dropout_mask(torch.as_tensor(seed), (b * h * t, size), dropout_p, which)[mine]
                for which, size in ((0, n), (1, s))
            ]
            w = w * torch.cat(kept, -1).view(h, t, n + s) / (1 - dropout_p)
        c = (
            1.0
            if gate_out is None
            else gate_out.to(q.dtype).expand(-1, h)[max(a, 0) % gate_out.shape[0], :, None, None]
        )
        rows.append(c * ((gv * w[..., :n]) @ pv) + w[..., n:] @ v_i)
    if not rows:
        return q + 0.0 * sum(
            x.sum() for x in (k, v, prefix_k, prefix_v, gate_k, gate_v, log_bias, gate_out) if x is not None
        )
    return torch.stack(rows)


def _scores(q, keys, gate, bias, scale, terms):
    """-> scores, and with `terms` the sum of each one's terms' absolute values, else the scores again"""
    s = scale * gate * (q @ keys.transpose(1, 2)) + bias
    if not terms:
        return s, s
    gate, bias = (torch.as_tensor(x).abs() for x in (gate, bias))
    size = scale * gate * (q.abs() @ keys.abs().transpose(1, 2)) + bias.masked_fill(bias == math.inf, 0.0)
    return through(s, size), size.detach()


def _softmax(s, size, terms):
    dead = (s == -math.inf).all(-1, keepdim=True)
    w = s.masked_fill(dead, 0.0).softmax(-1) * ~dead
    if not terms:
        return w
    return sizes_of_weights(w, s, size)


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


VARIANTS = {
    "no gates": {"gates": "none"},
    "one gate a row": {"gates": (3, 1, 1, 1)},
    "one gate a query": {"gates": (3, 1, 11, 1)},
    "one gate a head and query": {"gates": (4, 11, 1)},
    "full gates": {"gates": (3, 4, 11, 6)},
    "a number as gate": {"gates": ()},
    "causal": {"is_causal": True},
    "additive mask": {"attn_mask": "additive"},
    "boolean mask": {"attn_mask": "boolean"},
    "mask of heads": {"attn_mask": "heads"},
    "mask of keys": {"attn_mask": "keys"},
    "rows of three prefixes": {"index": [2, -1, 0]},
    "one prefix, not for all": {"index": [0, -1, 0], "adapters": 1},
    "ragged": {"kind": "ragged", "index": [1, 2, 1]},
    "flat": {"kind": "flat", "index": [2, -1, 1], "gates": "none"},
    "flat with gates": {"kind": "flat", "index": [0, 1, 2]},
    "one flat": {"kind": "flat"},
    "scale": {"scale": 0.7, "is_causal": True},
}


def variant(name, dtype, mode, shape=(3, 4, 2, 11, 13, 32, 6), **more):
    asked = {**VARIANTS[name], **more}
    b, h, _, t, s, _, _ = shape
    adapters = asked.pop("adapters", None)
    if "attn_mask" in asked:
        heads = h if asked["attn_mask"] == "heads" else 1
        seen = torch.rand(b, heads, t, s) > 0.4
        seen[:, :, 2] = False  # a query that sees no token
        if asked["attn_mask"] == "keys":
            seen = seen[:, :, 3:4]
        asked["attn_mask"] = seen
        if VARIANTS[name]["attn_mask"] == "additive":
            asked["attn_mask"] = torch.randn(t, s, dtype=torch.float64).masked_fill(~seen[0, 0], -math.inf)
    tensors, options = problem(shape, dtype, mode, **asked)
    if adapters:
        for one in ("prefix_k", "prefix_v", "log_bias", "gate_out"):
            if one in tensors:
                tensors[one] = tensors[one].detach()[:adapters].requires_grad_()
    return tensors, options


@every_backend
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(backend, name, dtype, mode):
    check(*variant(name, dtype, mode))


@pytest.mark.verifies("prefix_attention", "forward", "backward")
@every_backend
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["causal", "boolean mask", "ragged", "flat with gates"])
def test_dropout_against_float64(backend, name, dtype, mode):
    check(*variant(name, dtype, mode, dropout_p=0.3, seed=2**40 + 12345))


@one_of_each
@pytest.mark.parametrize("masters", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_of_prefixes(backend, masters):
    """float64 ones run on the torch backend."""
    if masters == torch.float64 and not backend.startswith("torch"):
        with pytest.raises(RuntimeError, match="cannot run: prefix_k is torch.float64"):
            prefix_attention(*[torch.randn(1, 1, 1, 16)] * 3, *[torch.randn(1, 1, 1, 16).double()] * 2)
        return
    check(*variant("causal", torch.bfloat16, "separate", masters=masters))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    b=st.integers(1, 3),
    hk=st.integers(1, 2),
    group=st.integers(1, 3),
    t=st.integers(1, 40),
    s=st.integers(1, 40),
    d=st.integers(16, 70),
    p=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    mode=st.sampled_from(MODES),
    dropout=st.sampled_from([0.0, 0.5]),
    kind=st.sampled_from(["padded", "ragged", "flat"]),
    causal=st.booleans(),
)
@every_backend
def test_any_shape(backend, b, hk, group, t, s, d, p, dtype, mode, dropout, kind, causal):
    torch.manual_seed(t * s + p)
    index = torch.randint(-1, 3, (b,)).tolist()
    more = {"dropout_p": dropout, "seed": 3, "is_causal": causal}
    check(*problem((b, hk * group, hk, t, s, d, p), dtype, mode, index=index, kind=kind, **more))


def test_any_size_of_heads():
    """Below 16 and beyond 256, which kernels leave to the torch backend."""
    for d in (1, 3, 300):
        check(*problem((2, 4, 2, 7, 9, d, 5), torch.float32, is_causal=True))


@every_backend
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("empty", ["B", "H", "T", "S", "P", "S and P", "P of flat ones"])
def test_sizes_of_zero(backend, empty, mode, p):
    sizes = {"B": 2, "H": 4, "Hk": 2, "T": 3, "S": 5, "D": 16, "P": 4}
    for name in empty.removesuffix(" of flat ones").split(" and "):
        sizes[name] = 0
    kind = "flat" if "flat" in empty else "padded"
    options = {"is_causal": True, "dropout_p": p, "seed": 1, "kind": kind}
    check(*problem(tuple(sizes.values()), torch.float32, mode, **options))


# ---- memory of any order ---------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["sliced", "every second row", "transposed", "expanded", "of one projection"])
def test_strides(backend, layout, mode):
    tensors, options = problem((2, 4, 2, 7, 9, 24, 5), torch.bfloat16, mode, is_causal=True)
    nan = math.nan

    def lay(x):
        x = x.detach()
        if layout == "sliced":
            return torch.cat([x, torch.full_like(x, nan)], -1)[..., : x.shape[-1]]
        if layout == "every second row":
            return torch.stack([x, torch.full_like(x, nan)], 2).flatten(1, 2)[:, ::2] if x.dim() > 1 else x
        if layout == "transposed":
            return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 1 else x
        return x[:1].expand(x.shape) if layout == "expanded" else x

    tensors = {name: lay(x).requires_grad_() for name, x in tensors.items()}
    if layout == "of one projection":
        qkv = torch.randn(2, 7, 4 * 3, 24).bfloat16().transpose(1, 2)
        q, k, v = (x.requires_grad_() for x in qkv.split(4, 1))
        tensors |= {"q": q, "k": k, "v": v, "prefix_k": torch.randn(1, 4, 5, 24), "prefix_v": torch.randn(1, 4, 5, 24)}
        tensors = {name: x.requires_grad_() for name, x in tensors.items()}
    check(tensors, options)


@one_of_each
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["expanded", "stride 0", "sliced", "transposed", "in another order"])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_strided_upstream_gradient(backend, layout, mode, p):
    b, h, t, d = shape = (2, 4, 7, 24)
    do = {
        "expanded": torch.randn(1, h, 1, d).expand(shape),
        "stride 0": torch.ones(()).expand(shape),
        "sliced": torch.cat([torch.randn(shape), torch.full(shape, math.nan)], -1)[..., :d],
        "transposed": torch.randn(b, h, d, t).transpose(2, 3),
        "in another order": torch.randn(t, b, d, h).permute(1, 3, 0, 2),
    }[layout]
    check(*problem((b, h, 2, t, 9, d, 5), torch.float32, mode, is_causal=True, dropout_p=p, seed=2), do=do)


@pytest.mark.parametrize("backend", [*BEST.values(), *ON_GPU], indirect=True)
@pytest.mark.parametrize("dims", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3)], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_the_output_lies_in_memory_as_its_fake_says(backend, mode, p, dims):
    q = torch.randn([(2, 4, 7, 24)[i] for i in dims]).permute(*[dims.index(i) for i in range(4)])
    k, v, pk, pv = (torch.randn(n, 2, 5, 24) for n in (2, 2, 1, 1))
    call = partial(prefix_attention, mode=mode, dropout_p=p, seed=1)
    o = call(q, k, v, pk, pv)
    assert o.transpose(1, 2).is_contiguous()
    with torch._subclasses.fake_tensor.FakeTensorMode() as fake:
        assert call(*map(fake.from_tensor, (q, k, v, pk, pv))).stride() == o.stride()


# ---- what a query sees -----------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("t", [5, 9, 12])
def test_no_query_sees_a_later_token(backend, mode, t):
    tensors, options = problem((2, 4, 2, t, 9, 32, 3), torch.float32, mode, is_causal=True)
    before = prefix_attention(**tensors, **options).detach()
    with torch.no_grad():
        for name in ("k", "v"):
            tensors[name][:, :, 6:] = torch.randn(2, 2, 3, 32)
    after = prefix_attention(**tensors, **options).detach()
    last = t - 9 + 6  # the first query that sees key 6
    assert torch.equal(before[:, :, :last], after[:, :, :last])
    assert (before[:, :, last:] != after[:, :, last:]).any(-1).all()


@one_of_each
@pytest.mark.parametrize("mode", MODES)
def test_decoding_with_a_cache_is_the_last_rows(backend, mode):
    tensors, options = problem((2, 4, 2, 12, 12, 32, 3), torch.float32, mode, gates="none", is_causal=True)
    tensors = {name: x.detach() for name, x in tensors.items()}
    whole, low = prefix_attention(**tensors, **options), composition(**tensors, **options)
    exact = composition(**in_double(tensors), **options)
    for n in (1, 5):
        part = prefix_attention(**{**tensors, "q": tensors["q"][:, :, -n:]}, **options)
        for got in (part, whole[:, :, -n:]):
            assert_close(got, low[:, :, -n:], exact[:, :, -n:])


@every_backend
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_query_that_sees_nothing_gives_zeros(backend, p):
    """Rows without a prefix: row 0 has no token, of row 1 the first queries have none."""
    tensors, options = problem((2, 4, 2, 7, 7, 32, 3), torch.float32, index=[-1, -1], is_causal=True)
    seen = torch.ones(2, 7, dtype=torch.bool)
    seen[0], seen[1, :2] = False, False
    o = prefix_attention(**tensors, **options, key_padding_mask=seen, dropout_p=p, seed=1)
    assert not o[0].any() and not o[1, :, :2].any() and o[1, :, 2:].any(-1).any(-1).all()
    grads = dict(zip(tensors, torch.autograd.grad(o.sum(), list(tensors.values()))))
    assert all(torch.isfinite(g).all() for g in grads.values())
    assert not grads["q"][0].any() and not grads["q"][1, :, :2].any()
    assert not any(grads[name][0].any() or grads[name][1, :, :2].any() for name in ("k", "v"))
    assert not any(grads[name].any() for name in TRAINED[3:] if name in grads)


@every_backend
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["padded", "ragged", "flat"])
def test_a_row_without_a_prefix_is_plain_attention(backend, mode, kind):
    """The same bits as with a prefix of length 0."""
    tensors, options = problem(
        (3, 4, 2, 7, 9, 32, 5), torch.bfloat16, mode, index=[-1, 1, -1], kind=kind, is_causal=True
    )
    o = prefix_attention(**tensors, **options)
    q, k, v = (tensors[name] for name in "qkv")
    nothing = torch.empty(1, 2, 0, 32)
    plain = prefix_attention(q, k, v, nothing, nothing, mode=mode, is_causal=True)
    assert torch.equal(o[0], plain[0]) and torch.equal(o[2], plain[2]) and not torch.equal(o[1], plain[1])


@every_backend
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["padded", "ragged", "flat"])
@pytest.mark.parametrize("bad", [3, -2, 2**31 - 1])
def test_an_index_out_of_range_makes_its_row_nan(backend, mode, kind, bad):
    """The others, and the gradients of what rows share, are those without it."""
    tensors, options = problem((3, 4, 2, 7, 9, 32, 5), torch.float32, mode, index=[2, bad, 0], kind=kind)
    good = {**options, "prefix_index": torch.tensor([2, -1, 0], dtype=torch.int32)}
    do = torch.randn(3, 4, 7, 32)
    ours = run(prefix_attention, tensors, options, do)
    assert ours["o"][1].isnan().all()
    expected = run(prefix_attention, tensors, good, do)
    for name in ("o", "q", "k", "v"):
        assert torch.equal(ours[name][[0, 2]], expected[name][[0, 2]]), name
    for name in set(expected) - {"o", "q", "k", "v"}:
        assert torch.equal(ours[name], expected[name]), name


@every_backend
@pytest.mark.parametrize("mode", MODES)
def test_a_log_bias_of_minus_infinity_prunes(backend, mode):
    tensors, options = problem((2, 4, 2, 5, 5, 32, 6), torch.float32, mode, gates=(4, 1, 6))
    with torch.no_grad():
        tensors["log_bias"][:, :, 2:] = -math.inf
    short = {
        name: (x.detach()[..., :2, :] if name in ("prefix_k", "prefix_v") else x.detach()[..., :2])
        if name in ("prefix_k", "prefix_v", "gate_k", "gate_v", "log_bias")
        else x.detach()
        for name, x in tensors.items()
    }
    ours = prefix_attention(**tensors, **options)
    low, exact = composition(**short, **options), composition(**in_double(short), **options)
    assert_close(ours, low, exact)
    grads = torch.autograd.grad(ours.sum(), list(tensors.values()))
    assert all(torch.isfinite(g).all() for g in grads)
    assert not grads[3][:, :, 2:].any() and not grads[4][:, :, 2:].any()


# ---- gradients -------------------------------------------------------------------------------------------------------


@one_of_each
@pytest.mark.parametrize(
    "wanted", [("q",), ("k",), ("v", "gate_k"), ("prefix_k", "prefix_v"), ("gate_v", "log_bias"), ("gate_out", "q"), ()],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_only_the_wanted_gradients(backend, wanted, mode, p):
    tensors, options = problem((2, 4, 2, 9, 9, 32, 5), torch.float32, mode, is_causal=True, dropout_p=p, seed=1)
    do = torch.randn(2, 4, 9, 32)
    full = run(prefix_attention, tensors, options, do)
    for name in tensors:
        tensors[name] = tensors[name].detach().requires_grad_(name in wanted)
    o = prefix_attention(**tensors, **options)
    wanted = [name for name in wanted if name in tensors]
    assert torch.equal(o.detach(), full["o"]) and o.requires_grad == bool(wanted)
    if wanted:
        for name, grad in zip(wanted, torch.autograd.grad(o, [tensors[name] for name in wanted], do)):
            assert torch.equal(grad, full[name]), name


@every_backend
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_bitwise_repeatable(backend, mode, p):
    shape = (3, 4, 2, 70, 70, 32, 20)
    tensors, options = problem(shape, torch.bfloat16, mode, index=[0, 2, 0], is_causal=True, dropout_p=p, seed=5)
    do = torch.randn(3, 4, 70, 32).bfloat16()
    first, second = (run(prefix_attention, tensors, options, do) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_fp64_gradients_by_finite_differences(mode, p):
    tensors, options = problem((2, 2, 1, 3, 4, 3, 2), torch.float64, mode, masters=torch.float64, index=[1, 0])
    names = list(tensors)

    def call(*values):
        return prefix_attention(**dict(zip(names, values)), **options, is_causal=True, dropout_p=p, seed=9)

    torch.autograd.gradcheck(call, tuple(tensors.values()))


def test_nothing_is_kept_but_inputs_output_and_lse():
    """No prefix a row of the batch, no keys and prefix in one, no mask that the call makes."""
    tensors, options = problem((3, 4, 2, 7, 9, 32, 64), torch.float32, index=[0, 1, 0], is_causal=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        o = prefix_attention(**tensors, **options)
    inputs = {x.untyped_storage().data_ptr() for x in (*tensors.values(), options["prefix_index"], o)}
    others = [x for x in kept if x.untyped_storage().data_ptr() not in inputs]
    assert [x.shape for x in others] == [(3, 4, 7)]  # lse


# ---- dropout ---------------------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("mode", MODES)
def test_dropout_masks_are_the_same_in_every_backend(backend, mode):
    """Values that are unit vectors show each weight."""
    b, h, t, s, n, p, seed = 2, 3, 37, 19, 13, 0.35, -5
    q, k, pk = torch.randn(b, h, t, 32), torch.randn(b, h, s, 32), torch.randn(1, h, n, 32)
    eye = torch.eye(32)
    v, pv = eye[n:].expand(b, h, -1, -1), eye[:n].expand(1, h, -1, -1)
    call = partial(prefix_attention, q, k, v, pk, pv, mode=mode)
    o = call(dropout_p=p, seed=seed)
    rows = b * h * t
    kept = [philox.dropout_mask(torch.tensor(seed), (rows, size), p, which) for which, size in ((0, n), (1, s))]
    kept = torch.cat(kept, 1).view(b, h, t, n + s)
    assert torch.equal(o != 0, kept)
    exact = composition(*(x.double() for x in (q, k, v, pk, pv)), mode=mode, dropout_p=p, seed=seed)
    assert_close(o, composition(q, k, v, pk, pv, mode=mode, dropout_p=p, seed=seed), exact)


@one_of_each
def test_dropout_draws_from_torchs_generator(backend):
    tensors, _ = problem((2, 4, 2, 7, 7, 32, 3), torch.float32)
    call = lambda: prefix_attention(**tensors, dropout_p=0.5).detach()  # noqa: E731
    torch.manual_seed(3)
    first, second = call(), call()
    torch.manual_seed(3)
    assert torch.equal(call(), first) and not torch.equal(first, second)


def test_dropout_of_everything():
    tensors, options = problem((2, 4, 2, 7, 7, 32, 3), torch.float32)
    o = prefix_attention(**tensors, **options, dropout_p=1.0)
    assert not o.any()
    assert all(not g.any() for g in torch.autograd.grad(o.sum(), list(tensors.values())))


# ---- what the caller may do ------------------------------------------------------------------------------------------


def as_function(tensors, options, change=lambda o: o):
    """A function of the tensors alone, and those."""
    names = list(tensors)
    return lambda *values: change(prefix_attention(**dict(zip(names, values)), **options)), list(tensors.values())


def stepped(call, leaves, do):
    """The output and all gradients, by backward() (reentrant checkpointing takes no other)."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    o = call(*leaves)
    o.backward(do)
    return [o.detach(), *(x.grad for x in leaves)]


def keep(*names):
    """A policy of selective checkpointing that saves what these ops return."""

    def policy(context, op, *args, **kwargs):
        saves = any(name in str(op) for name in names)
        return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, policy)


CHECKPOINTS = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "nothing saved": {"use_reentrant": False, "context_fn": keep()},
    "tokens saved": {"use_reentrant": False, "context_fn": keep("attention_tokens")},
    "prefix saved": {"use_reentrant": False, "context_fn": keep("prefix_attention")},
}


@pytest.mark.verifies("prefix_attention", "checkpoint", dtype="float32")
@one_of_each
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("how", ["", *CHECKPOINTS])
def test_checkpoints_and_outputs_changed_in_place(backend, how, mode, p):
    tensors, options = problem((2, 4, 2, 7, 9, 32, 3), torch.float32, mode, is_causal=True, dropout_p=p)
    do = torch.randn(2, 4, 7, 32)
    call, leaves = as_function(tensors, options, lambda o: (o * 2).clamp(-1, 1).sin())
    torch.manual_seed(8)
    # to a policy other passes are shown than those that a plain call runs: they need not round alike
    seen = how and "context_fn" in CHECKPOINTS[how]
    expected = stepped(partial(checkpoint, call, **CHECKPOINTS[how]) if seen else call, leaves, do)

    def change(o):
        o.transpose(1, 2).mul_(2)  # by a view of it
        return o.clamp_(-1, 1).sin()

    changed, leaves = as_function(tensors, options, change)
    torch.manual_seed(8)
    got = stepped(partial(checkpoint, changed, **CHECKPOINTS[how]) if how else changed, leaves, do)
    assert all(torch.equal(one, other) for one, other in zip(got, expected))


@one_of_each
def test_saved_tensors_may_go_elsewhere(backend):
    tensors, options = problem((2, 4, 2, 7, 9, 32, 3), torch.float32, is_causal=True)
    call, leaves = as_function(tensors, options)
    do = torch.randn(2, 4, 7, 32)
    expected = stepped(call, leaves, do)
    with torch.autograd.graph.save_on_cpu():
        assert all(torch.equal(one, other) for one, other in zip(stepped(call, leaves, do), expected))


@one_of_each
@pytest.mark.parametrize("which", TRAINED)
def test_lazily_negated_tensors(backend, which):
    """`torch._neg_view`, as the imaginary part of a conjugate has it; and a zero tensor, which has no memory."""
    tensors, options = problem((2, 4, 2, 7, 9, 32, 3), torch.float32, "separate")
    tensors = {name: x.detach() for name, x in tensors.items()}
    do = torch.randn(2, 4, 7, 32)
    pairs = [
        (torch._neg_view(tensors[which]), -tensors[which]),
        (torch._efficientzerotensor(tensors[which].shape), torch.zeros_like(tensors[which])),
    ]
    for lazy, value in pairs:
        ours, expected = (
            run(
                prefix_attention,
                {n: x.detach().requires_grad_() for n, x in {**tensors, which: of}.items()},
                options,
                do,
            )
            for of in (lazy, value)
        )
        assert all(torch.equal(ours[name], expected[name]) for name in ours)
    tensors = {name: x.requires_grad_() for name, x in tensors.items()}
    ours, expected = (run(prefix_attention, tensors, options, of) for of in (torch._neg_view(do), -do))
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


@every_backend
def test_nan_and_inf_propagate(backend):
    tensors, options = problem((2, 4, 2, 7, 9, 32, 3), torch.float32, is_causal=True)
    tensors = {name: x.detach() for name, x in tensors.items()}
    for bad in (math.nan, math.inf):
        for name, at, reached in (
            ("q", (0, 1, 4, 3), (0, 1, 4)),
            ("v", (1, 0, 2, 3), (1, slice(2), slice(None), 3)),
            ("prefix_v", (0, 1, 2, 5), (slice(None), slice(2, 4), slice(None), 5)),
        ):
            changed = {**tensors, name: tensors[name].clone()}
            changed[name][at] = bad
            o = prefix_attention(**changed, **options)
            assert not torch.isfinite(o[reached]).any()
            o[reached] = 0.0
            assert torch.isfinite(o).all(), f"a bad number of {name} reached another"


# ---- inside PyTorch --------------------------------------------------------------------------------------------------


@one_of_each
@pytest.mark.parametrize(
    ("mode", "kind", "dtype"),
    [("joint", "padded", torch.bfloat16), pytest.param("separate", "flat", torch.float16, marks=pytest.mark.slow)],
)
def test_opcheck(backend, dtype, mode, kind):
    ops, separate = torch.ops.fastpeft, mode == "separate"
    tensors, options = problem((2, 4, 2, 5, 6, 32, 3), dtype, mode, index=[1, -1], kind=kind)
    q, k, v, pk, pv, gk, gv, bias, *c = (x.detach() for x in tensors.values())
    bias = bias[None] if kind == "flat" else bias
    of = (pk, pv, gk, gv[None], bias, *(c or [None]), options["prefix_index"], None, options.get("prefix_offsets"))
    seed, mask = torch.tensor(3), torch.rand(2, 6) > 0.2
    o, lse = ops.prefix_attention_tokens(q, k, v, False, mask, 0.25, seed, 0.2, "")
    do = torch.randn_like(o)
    merged = ops.prefix_attention_forward(q, *of, o, lse, separate, 0.25, seed, 0.2, "")
    dq = torch.randn_like(q)
    known = (None, merged[1]) if separate else merged
    for op, args in (
        (ops.prefix_attention_tokens, (q, k, v, False, mask, 0.25, seed, 0.2, "")),
        (ops.prefix_attention_tokens, (q, k, v, True, None, 0.25, seed, 0.2, "")),
        (ops.prefix_attention_grad_tokens, (do, q, k, v, o, lse, False, mask, 0.25, seed, 0.2, [True] * 3, "")),
        (
            ops.prefix_attention_grad_tokens,
            (do, q, k, v, o, lse, True, None, 0.25, seed, 0.2, [False, True, False], ""),
        ),
        (ops.prefix_attention_forward, (q, *of, o, lse, separate, 0.25, seed, 0.2, "")),
        (ops.prefix_attention_forward, (q, *of, o, lse, separate, 0.0, None, 0.2, "")),
        (
            ops.prefix_attention_backward,
            (do, q, *of, *known, dq, separate, 0.25, seed, 0.2, [True] * 5 + [separate], ""),
        ),
        (ops.prefix_attention_backward, (do, q, *of, *known, None, separate, 0.0, None, 0.2, [True] + [False] * 5, "")),
    ):
        torch.library.opcheck(op.default, args)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_flops_are_counted(p):
    """Two products forward, five backward, of queries with tokens and prefix."""
    b, h, t, s, d, n = 2, 4, 7, 9, 32, 5
    tensors, options = problem((b, h, 2, t, s, d, n), torch.float32)
    with FlopCounterMode(display=False) as counter:
        prefix_attention(**tensors, **options, dropout_p=p).sum().backward()
    assert counter.get_total_flops() == (2 + 5) * 2 * b * h * t * d * (s + n)


@pytest.mark.verifies("prefix_attention", "compile")
@one_of_each
@pytest.mark.parametrize(
    ("engine", "mode", "dtype", "p"),
    [
        ("eager", "joint", torch.float32, 0.5),
        ("aot_eager", "joint", torch.bfloat16, 0.0),
        ("aot_eager", "separate", torch.float32, 0.5),
        *[
            pytest.param("inductor", mode, dtype, p, marks=pytest.mark.slow)
            for mode in MODES
            for dtype in DTYPES[:2]
            for p in (0.0, 0.5)
        ],
    ],
)
def test_compile_fullgraph(backend, engine, dtype, mode, p):
    """Also with an output that is changed in place."""
    index = torch.tensor([1, -1], dtype=torch.int32)
    tensors, options = problem((2, 4, 2, 7, 9, 32, 3), dtype, mode, index=[1, -1], is_causal=True, dropout_p=p, seed=5)
    options["prefix_index"] = index
    do = torch.randn(2, 4, 7, 32).to(dtype)
    call, leaves = as_function(tensors, options, lambda o: o.mul_(2).sin())
    torch._dynamo.reset()
    expected, got = stepped(call, leaves, do), stepped(torch.compile(call, fullgraph=True, backend=engine), leaves, do)
    doubles = list(in_double(tensors).values())
    exact = stepped(lambda *of: (2 * composition(**dict(zip(tensors, of)), **options)).sin(), doubles, do.double())
    for name, one, other, true in zip(("o", *tensors), got, expected, exact):
        assert one.dtype == other.dtype
        assert_close(one, other, true, name, eps=EPS[dtype])


def test_prefixes_of_another_length_recompile_once():
    q, k, v, pk, pv = (torch.randn(n, 2, 6, 32) for n in (2, 2, 2, 1, 1))
    torch._dynamo.reset()
    counter = CompileCounter()
    call = torch.compile(prefix_attention, fullgraph=True, backend=counter)
    for n in (2, 3, 4, 5):
        call(q, k, v, pk[:, :, :n], pv[:, :, :n])
    assert counter.frame_count <= 2


class Layer(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.prefix = torch.nn.Parameter(torch.randn(2, 1, 2, 5, 32))
        self.options = options

    def forward(self, q, k, v):
        return prefix_attention(q, k, v, *self.prefix, **self.options)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_export(p):
    layer = Layer(is_causal=True, dropout_p=p, seed=3)
    q, k, v = (torch.randn(2, h, 6, 32) for h in (4, 2, 2))
    many = [torch.cat([x, x, x], 2) for x in (q, k, v)]
    length = torch.export.Dim("length", min=2)
    program = torch.export.export(layer, (q, k, v), dynamic_shapes={name: {2: length} for name in "qkv"})
    options = {"is_causal": True, "dropout_p": p, "seed": 3}
    low, exact = (composition(*many, *layer.prefix, **options) for many in (many, [x.double() for x in many]))
    assert_close(program.module()(*many), low, exact)


@one_of_each
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_autocast(backend, dtype):
    tensors, options = problem((2, 4, 2, 7, 9, 32, 3), torch.float32, is_causal=True)
    do = torch.randn(2, 4, 7, 32).to(dtype)
    device = tensors["q"].device.type
    with torch.autocast(device, dtype):
        o = prefix_attention(**tensors, **options)
    assert o.dtype == dtype
    grads = torch.autograd.grad(o, list(tensors.values()), do)
    rounded = {name: x.detach().to(dtype) if name in "qkv" else x.detach() for name, x in tensors.items()}
    rounded = {name: x.requires_grad_() for name, x in rounded.items()}
    low = run(composition, rounded, options, do)
    exact = run(composition, in_double(rounded), options, do.double())
    for name, got in zip(("o", *tensors), (o, *grads)):
        assert name == "o" or got.dtype == torch.float32
        assert_close(got, low[name], exact[name], name, eps=EPS[dtype])


@one_of_each
def test_inference_mode(backend):
    tensors, options = problem((2, 4, 2, 7, 9, 32, 3), torch.bfloat16, "separate")
    expected = prefix_attention(**tensors, **options)
    with torch.no_grad():
        assert torch.equal(prefix_attention(**tensors, **options), expected)
    with torch.inference_mode():
        o = prefix_attention(**tensors, **options)
    assert o.is_inference() and torch.equal(o, expected)


def test_function_transforms_run_the_definition():
    tensors, options = problem((2, 4, 2, 7, 9, 32, 3), torch.float32, "separate", index=[1, 0], dropout_p=0.3, seed=4)
    fixed = {name: x.detach() for name, x in tensors.items()}

    def loss(prefix_k):
        return prefix_attention(**{**fixed, "prefix_k": prefix_k}, **options).square().sum()

    def exact_loss(prefix_k):
        return composition(**{**in_double(fixed), "prefix_k": prefix_k}, **options).square().sum()

    pk = tensors["prefix_k"]
    expected = torch.autograd.grad(loss(pk), pk)[0]
    double = pk.detach().double().requires_grad_()
    exact = torch.autograd.grad(exact_loss(double), double)[0]
    assert_close(torch.func.grad(loss)(fixed["prefix_k"]), expected, exact)
    many = torch.stack([fixed["prefix_k"], -fixed["prefix_k"]])
    call = lambda prefix_k: prefix_attention(**{**fixed, "prefix_k": prefix_k}, **options)  # noqa: E731
    low = torch.stack([composition(**{**fixed, "prefix_k": one}, **options) for one in many])
    exact = torch.stack([composition(**{**in_double(fixed), "prefix_k": one.double()}, **options) for one in many])
    assert_close(torch.func.vmap(call)(many), low, exact)
    with fp.backend("cpu"), pytest.raises(RuntimeError, match="'cpu' was forced, but .* torch.func's transforms"):
        torch.func.grad(loss)(fixed["prefix_k"])


def test_a_trained_mask_runs_the_definition():
    tensors, options = problem((2, 4, 2, 7, 9, 32, 3), torch.float32)
    mask = torch.randn(4, 7, 9, requires_grad=True)
    do = torch.randn(2, 4, 7, 32)
    (grad,) = torch.autograd.grad(prefix_attention(**tensors, **options, attn_mask=mask), mask, do)
    (low,) = torch.autograd.grad(composition(**tensors, **options, attn_mask=mask), mask, do)
    double = mask.detach().double().requires_grad_()
    exact = composition(**in_double(tensors), **options, attn_mask=double)
    assert_close(grad, low, torch.autograd.grad(exact, double, do.double())[0])


def test_second_derivative_is_refused():
    tensors, options = problem((2, 4, 2, 7, 9, 32, 3), torch.float32)
    first = torch.autograd.grad(prefix_attention(**tensors, **options).sum(), tensors["q"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="prefix_attention has no second derivative"):
        first.sum().backward()


def test_tensors_on_no_device_or_another():
    tensors, options = problem((2, 4, 2, 7, 9, 32, 3), torch.float32, "separate")
    on_meta = prefix_attention(**{name: x.to("meta") for name, x in tensors.items()}, **options)
    assert on_meta.is_meta and on_meta.shape == (2, 4, 7, 32) and on_meta.requires_grad
    with pytest.raises(ValueError, match=r"prefix_k must be on q's device \(cpu\), got meta"):
        prefix_attention(**{**tensors, "prefix_k": tensors["prefix_k"].to("meta")}, **options)


@every_backend
def test_threads(backend):
    if backend == "triton":
        pytest.skip("Triton's interpreter keeps its state in globals; on a GPU this test runs")
    tensors, options = problem((2, 4, 2, 33, 33, 32, 5), torch.bfloat16, is_causal=True)
    do = torch.randn(2, 4, 33, 32).bfloat16()
    expected = run(prefix_attention, tensors, options, do)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: run(prefix_attention, tensors, options, do), range(16)):
            assert all(torch.equal(result[name], expected[name]) for name in expected)


@one_of_each
def test_a_profiler_sees_the_passes(backend):
    tensors, options = problem((2, 4, 2, 7, 9, 32, 5), torch.float32)
    with torch.profiler.profile() as profile:
        prefix_attention(**tensors, **options).sum().backward()
    names = {event.name for event in profile.events()}
    assert any(name.startswith("fastpeft::prefix_attention_") for name in names)


# ---- bad input -------------------------------------------------------------------------------------------------------


def good(**changes):
    q, k, prefix = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(1, 2, 6, 8)
    return {"q": q, "k": k, "v": k, "prefix_k": prefix, "prefix_v": prefix, **changes}


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def flat(*offsets, dtype=torch.int64):
    prefix = torch.randn(2, 6, 8)
    return {"prefix_k": prefix, "prefix_v": prefix, "prefix_offsets": torch.tensor(offsets, dtype=dtype)}


ONES, SEEN = torch.ones(3, 5), torch.ones(2, 5, dtype=torch.bool)
THREE = dict.fromkeys(("prefix_k", "prefix_v"), torch.randn(3, 2, 6, 8))
ON_META = torch.empty(2, 2, 5, 8, device="meta")


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, "q must be a torch.Tensor, got list", {"q": [1.0]}),
        (ValueError, "q must be [B, H, T, D], D ≥ 1, got [4, 3, 8]", {"q": torch.randn(4, 3, 8)}),
        (ValueError, "q must be [B, H, T, D], D ≥ 1, got [2, 4, 3, 0]", {"q": torch.randn(2, 4, 3, 0)}),
        (ValueError, "q must be a floating-point tensor, got torch.int8", {"q": torch.ones(2, 4, 3, 8).char()}),
        (
            ValueError,
            "k must be [B, Hk, S, D] = [2, Hk, S, 8], Hk a divisor of H = 4, got",
            {"k": torch.randn(2, 3, 5, 8)},
        ),
        (ValueError, "k must be [B, Hk, S, D] = [2, Hk, S, 8]", {"k": torch.randn(1, 2, 5, 8)}),
        (ValueError, "k must be on q's device (cpu), got meta", {"k": ON_META, "v": ON_META}),
        (ValueError, "v must be of k's shape, [2, 2, 5, 8], got [2, 2, 4, 8]", {"v": torch.randn(2, 2, 4, 8)}),
        (ValueError, "v must be of q's dtype (torch.float32); cast one", {"v": torch.randn(2, 2, 5, 8).half()}),
        (TypeError, "prefix_k must be a torch.Tensor, got NoneType", {"prefix_k": None}),
        (ValueError, "prefix_k must be [A, Hk, P, D] = [A ≥ 1, 2, P, 8], got", {"prefix_k": torch.randn(1, 4, 6, 8)}),
        (ValueError, "prefix_k must be [A, Hk, P, D] = [A ≥ 1, 2, P, 8], got", {"prefix_k": torch.randn(2, 6, 8)}),
        (ValueError, "prefix_v must be of prefix_k's shape, [1, 2, 6, 8], got", {"prefix_v": torch.randn(1, 2, 5, 8)}),
        (ValueError, "prefix_index must be given where there are several prefixes (A = 3), got None", THREE),
        (ValueError, "prefix_index must be int32 [B] = [2], got torch.int32 [1]", {**THREE, "prefix_index": int32(0)}),
        (ValueError, "prefix_index must be int32 [B] = [2], got torch.float32 [2]", {"prefix_index": torch.zeros(2)}),
        (TypeError, "prefix_index must be a torch.Tensor or None, got list", {"prefix_index": [0, 0]}),
        (ValueError, "prefix_lengths must be int32 [A] = [1], got torch.int32 [2]", {"prefix_lengths": int32(1, 2)}),
        (ValueError, "prefix_lengths must be None with prefix_offsets", {**flat(0, 6), "prefix_lengths": int32(6)}),
        (ValueError, "prefix_offsets must be [A + 1], A ≥ 1, got [1]", flat(0)),
        (ValueError, "prefix_offsets must be int64 [A + 1], got torch.int32 [2]", flat(0, 6, dtype=torch.int32)),
        (
            ValueError,
            "prefix_k must be [Hk, ΣP, D] = [2, ΣP, 8], got [1, 2, 6, 8]",
            {"prefix_offsets": torch.tensor([0, 6])},
        ),
        (ValueError, "mode must be 'joint' or 'separate', got 'both'", {"mode": "both"}),
        (ValueError, "gate_out must be None in mode 'joint', got a value", {"gate_out": torch.ones(4)}),
        (ValueError, "gate_k must be broadcastable to [B, H, T, P] = [2, 4, 3, 6], got [3, 5]", {"gate_k": ONES}),
        (
            ValueError,
            "gate_v must be of gate_k's P, 6, got [5]",
            {**flat(0, 6), "gate_k": torch.ones(6), "gate_v": ONES[0]},
        ),
        (TypeError, "gate_v must be a torch.Tensor or None, got float", {"gate_v": 1.0}),
        (ValueError, "gate_v must be a floating-point tensor, got torch.int64", {"gate_v": torch.ones(6).long()}),
        (
            ValueError,
            "log_bias must be [H, P] or [A, H, P] (H = 4, P = 6, A = 1), got [6]",
            {"log_bias": torch.ones(6)},
        ),
        (
            ValueError,
            "log_bias must be [H, ΣP] (H = 4, P = 6, A = 1), got [6]",
            {**flat(0, 6), "log_bias": torch.ones(6)},
        ),
        (
            ValueError,
            "gate_out must be [H] or [A, H] (H = 4, A = 1), got [2]",
            {"mode": "separate", "gate_out": torch.ones(2)},
        ),
        (ValueError, "key_padding_mask must be bool [B, S] = [2, 5], True = attend, got", {"key_padding_mask": ONES}),
        (ValueError, "attn_mask must be broadcastable to [B, H, T, S] = [2, 4, 3, 5], got [2, 5]", {"attn_mask": SEEN}),
        (ValueError, "attn_mask must be bool (True = attend) or floating (added), got", {"attn_mask": ONES.char()}),
        (ValueError, "attn_mask must be None with is_causal", {"attn_mask": ONES, "is_causal": True}),
        (ValueError, "attn_mask must be None with key_padding_mask", {"attn_mask": ONES, "key_padding_mask": SEEN}),
        (TypeError, "scale must be a number or None (1/√D), got str", {"scale": "2"}),
        (ValueError, "dropout_p must be a probability in [0, 1], got 1.5", {"dropout_p": 1.5}),
        (TypeError, "seed must be an int", {"dropout_p": 0.5, "seed": 1.5}),
    ],
)
def test_bad_input(error, message, changes):
    with pytest.raises(error, match=f"^{re.escape(f'prefix_attention: {message}')}"):
        prefix_attention(**good(**changes))


def test_forced_backends():
    with fp.backend("cuda"), pytest.raises(RuntimeError, match="^prefix_attention: backend 'cuda' was forced, but"):
        prefix_attention(**good())
    doubles = {name: x.double() for name, x in good().items()}
    with fp.backend("cpu"), pytest.raises(RuntimeError, match="backend 'cpu' was forced, but cannot run: "):
        prefix_attention(**doubles)
    assert "prefix_attention" in fp.ops.backends()
