"""4-bit weights: the formats bit for bit against bitsandbytes, linear4bit and lora_linear over them against float64."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import pickle
from functools import partial

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _close import assert_close
from _guarded import Memory
from conftest import cpu_levels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_lora_linear import EPS, GRADS, composition, in_double, problem, run
from torch.utils.checkpoint import checkpoint

import fastpeft as fp
from fastpeft import native
from fastpeft.ops import linear4bit, lora_linear, lora_linear_group, quantize_4bit
from fastpeft.reference import linear4bit as reference
from fastpeft.weight4bit import BLOCKSIZES, split

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(64, 64), (100, 65), (7, 37), (1, 1), (33, 4304), (128, 576), (3, 5), (16, 8), (1, 31), (48, 24)]
KINDS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def values(n, k, dtype=torch.float32, zeros=True):
    """A weight with blocks of zeros, exact ties between codes, and the extremes that a block's scale makes ±1."""
    w = torch.randn(n, k)
    if zeros and n > 2:
        w[1] = 0
    flat = w.view(-1)
    book = reference.codebook("nf4").sort().values
    ties = torch.cat([torch.ones(1), (book[1:] + book[:-1]) / 2])[: flat.numel()]
    flat[: ties.numel()] = ties
    return w.to(dtype)


def theirs(w, quant_type="nf4", blocksize=64, double_quant=False):
    return bnb.quantize_4bit(w, blocksize=blocksize, quant_type=quant_type, compress_statistics=double_quant)


# ---- the formats ---------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_code_books(quant_type):
    assert torch.equal(reference.codebook(quant_type), bnb.get_4bit_type(quant_type, device="cpu"))
    assert torch.equal(reference.dynamic_map(), bnb.create_dynamic_map().float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("quant_type", "double_quant"), KINDS)
def test_bytes_and_scales_are_those_of_bitsandbytes(quant_type, double_quant, shape, dtype):
    w = values(*shape, dtype)
    for blocksize in (32, 64, 256, 4096):
        packed, state = theirs(w, quant_type, blocksize, double_quant)
        ours = quantize_4bit(w, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant)
        assert torch.equal(ours.packed, packed)
        if double_quant:
            assert torch.equal(ours.codes, state.absmax)
            assert torch.equal(ours.absmax, state.state2.absmax)
            assert torch.equal(ours.offset, state.offset)
            assert torch.equal(ours.codebook, state.state2.code)
        else:
            assert torch.equal(ours.absmax, state.absmax)
            assert ours.codes is None and ours.offset is None and ours.codebook is None


def by_hand(weight: fp.Weight4bit) -> np.ndarray:
    """float32 [N, K], element by element from the stored bytes: written from the format, not from the reference."""
    n, k = weight.shape
    book = np.array(reference.NF4 if weight.quant_type == "nf4" else reference.FP4, np.float32)
    packed, absmax = weight.packed.view(-1).numpy(), weight.absmax.numpy()
    if weight.codes is not None:
        table, codes = weight.codebook.numpy(), weight.codes.numpy()
        absmax = np.array([table[c] * absmax[i // 256] for i, c in enumerate(codes)], np.float32)
        absmax = (absmax + np.float32(weight.offset.item())).astype(np.float32)
    out = np.empty(n * k, np.float32)
    for i in range(n * k):
        code = packed[i // 2] >> (4 if i % 2 == 0 else 0) & 15
        out[i] = book[code] * absmax[i // weight.blocksize]
    return out.reshape(n, k)


def bitsandbytes_is_right(n, k, blocksize):
    """Its AVX-512 kernel takes the scale from row · (K // blocksize)."""
    return k % blocksize == 0 or k % 16 != 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("quant_type", "double_quant"), KINDS)
def test_dequantized_bits(backend, quant_type, double_quant, dtype):
    """Equal to the format's definition; and to bitsandbytes where that is."""
    for shape in [(5, 24), (33, 48), (7, 37), (16, 80), (20, 4304 // 16), (130, 128)]:
        for blocksize in (32, 64, 4096):
            w = values(*shape, dtype)
            weight = quantize_4bit(w, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant).to(
                w.device
            )
            expected = torch.from_numpy(by_hand(weight.to("cpu"))).to(dtype)
            assert torch.equal(weight.dequantize().cpu(), expected)
            assert torch.equal(weight.dequantize(torch.float32).cpu().to(dtype), expected)


@pytest.mark.parametrize(("quant_type", "double_quant"), KINDS)
def test_dequantized_bits_are_those_of_bitsandbytes(quant_type, double_quant):
    """Random shapes; where K is not a whole number of blocks bitsandbytes itself is wrong, and its formula counts."""
    shapes = torch.Generator().manual_seed(1)
    compared = 0
    for _ in range(40):
        n, k = (int(torch.randint(1, 200, (), generator=shapes)) for _ in range(2))
        k = k if torch.rand((), generator=shapes) < 0.5 else -(-k // 64) * 64
        blocksize = BLOCKSIZES[int(torch.randint(0, 4, (), generator=shapes))]
        w = values(n, k, torch.bfloat16)
        packed, state = theirs(w, quant_type, blocksize, double_quant)
        ours = quantize_4bit(w, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant)
        if bitsandbytes_is_right(n, k, blocksize) and k % 2 == 0:
            assert torch.equal(ours.dequantize(), bnb.dequantize_4bit(packed, state)), (n, k, blocksize)
            compared += 1
        else:
            assert torch.equal(ours.dequantize(), torch.from_numpy(by_hand(ours)).bfloat16())
    assert compared >= 15


def test_where_bitsandbytes_is_wrong():
    """SigLIP's K = 4304, blocks of 64: its own error is twice that of the format."""
    w = torch.randn(32, 4304)
    packed, state = theirs(w)
    ours = quantize_4bit(w)
    assert torch.equal(ours.packed, packed)
    rms = lambda t: (t - w).square().mean().sqrt().item()  # noqa: E731
    assert rms(ours.dequantize()) < 0.1
    assert torch.equal(ours.dequantize(), torch.from_numpy(by_hand(ours)))


# ---- the two layouts -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
def test_tiles_are_the_same_bytes(shape, double_quant):
    w = torch.randn(shape)
    native = quantize_4bit(w, double_quant=double_quant).untile()
    tiled = native.tile()
    assert tiled.tiled == (shape[0] >= 16 and shape[1] % 8 == 0) and tiled.nbytes == native.nbytes
    for one, other in zip(tiled.untile().tensors(), native.tensors(), strict=True):
        assert one is other or torch.equal(one, other)
    assert torch.equal(tiled.data.sort().values, native.data.sort().values)
    packed, state = theirs(w, double_quant=double_quant)
    parts = [packed, state.absmax] + ([state.state2.absmax, state.offset] if double_quant else [])
    assert native.nbytes <= 1.05 * sum(t.numel() * t.element_size() for t in parts)


def test_copies():
    weight = quantize_4bit(torch.randn(40, 64), double_quant=True)
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), weight.to("cpu")):
        assert torch.equal(other.dequantize(), weight.dequantize()) and other.tiled == weight.tiled
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False).packed, weight.packed)
    with pytest.raises(AttributeError):
        weight.blocksize = 32
    narrow = weight.to(torch.bfloat16)
    assert narrow.dtype == torch.bfloat16 and narrow.data is weight.data
    assert torch.equal(narrow.dequantize(), weight.dequantize().bfloat16())


@pytest.mark.parametrize("double_quant", [False, True])
def test_under_another_default_device(double_quant):
    """What is kept between calls is made on the CPU, and results are where the weight is."""
    w = torch.randn(40, 64)
    expected = quantize_4bit(w, double_quant=double_quant)
    kept = (reference.codebook, reference.dynamic_map, reference._table)
    for function in kept:
        function.cache_clear()
    try:
        with torch.device("meta"):
            weight = quantize_4bit(w, double_quant=double_quant)
            dense = weight.dequantize()
            again = fp.Weight4bit.from_state_dict(weight.state_dict())
    finally:
        for function in kept:
            function.cache_clear()
    assert torch.equal(weight.packed, expected.packed) and torch.equal(dense, expected.dequantize())
    assert torch.equal(again.dequantize(), dense)


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 64), (33, 40), (7, 37)], ids=str)
@pytest.mark.parametrize(("quant_type", "double_quant"), KINDS)
def test_checkpoints_both_ways(quant_type, double_quant, shape):
    w = values(*shape, torch.bfloat16)
    packed, state = theirs(w, quant_type, 64, double_quant)
    their_state = {"weight": packed, **{f"weight.{key}": t for key, t in state.as_dict(packed=True).items()}}
    ours = quantize_4bit(w, quant_type=quant_type, double_quant=double_quant)
    our_state = ours.state_dict()
    assert list(our_state) == list(their_state)
    for key, t in our_state.items():
        assert t.dtype == their_state[key].dtype and torch.equal(t, their_state[key]), key
    loaded = fp.Weight4bit.from_state_dict(their_state)
    assert torch.equal(loaded.dequantize(), ours.dequantize()) and loaded.dtype == torch.bfloat16
    stats = {key.removeprefix("weight."): t for key, t in our_state.items() if key != "weight"}
    theirs_again = bnb.QuantState.from_dict(stats, device=torch.device("cpu"))
    if shape[1] % 2 == 0 and bitsandbytes_is_right(*shape, 64):
        assert torch.equal(bnb.dequantize_4bit(our_state["weight"], theirs_again), ours.dequantize())


def test_checkpoint_in_another_storage_dtype():
    """As FSDP1 needs it: the same bytes under another dtype."""
    w = torch.randn(64, 64)
    state = quantize_4bit(w).state_dict("q_proj.weight")
    state["q_proj.weight"] = state["q_proj.weight"].view(-1).view(torch.bfloat16)[:, None]
    loaded = fp.Weight4bit.from_state_dict(state, "q_proj.weight")
    assert torch.equal(loaded.packed, quantize_4bit(w).packed)


def about(state, **changes):
    """The state with other words in its JSON part."""
    key = next(key for key in state if "quant_state" in key)
    fields = json.loads(bytes(state[key].tolist()))
    fields = {name: value for name, value in (fields | changes).items() if value is not ...}
    return state | {key: torch.frombuffer(bytearray(json.dumps(fields).encode()), dtype=torch.uint8)}


def without(state, key):
    return {name: t for name, t in state.items() if name != key}


JSON_KEY = "weight.quant_state.bitsandbytes__nf4"
BAD_CHECKPOINTS = {
    "no weight": (lambda s: without(s, "weight"), "key weight is missing"),
    "no absmax": (lambda s: without(s, "weight.absmax"), "key weight.absmax is missing"),
    "no code book": (lambda s: without(s, "weight.quant_map"), "key weight.quant_map is missing"),
    "no nested map": (lambda s: without(s, "weight.nested_quant_map"), "key weight.nested_quant_map is missing"),
    "no state": (lambda s: without(s, JSON_KEY), "exactly one key .*nf4 or .*fp4.*, got none"),
    "unknown state": (
        lambda s: without(s, JSON_KEY) | {"weight.quant_state.bitsandbytes__int4": s[JSON_KEY]},
        "exactly one key .*int4",
    ),
    "type of another key": (
        lambda s: without(s, JSON_KEY) | {JSON_KEY.replace("nf4", "fp4"): s[JSON_KEY]},
        "quant_type 'fp4', got 'nf4'",
    ),
    "two states": (lambda s: s | {JSON_KEY.replace("nf4", "fp4"): s[JSON_KEY]}, "exactly one key"),
    "not JSON": (lambda s: s | {JSON_KEY: torch.tensor([255, 1], dtype=torch.uint8)}, "must be JSON"),
    "deep JSON": (lambda s: s | {JSON_KEY: torch.full((40000,), ord("["), dtype=torch.uint8)}, "must be JSON"),
    "long JSON": (lambda s: s | {JSON_KEY: torch.full((1 << 20,), 32, dtype=torch.uint8)}, "at most 65536 bytes"),
    "a JSON list": (lambda s: s | {JSON_KEY: torch.tensor(list(b"[]"), dtype=torch.uint8)}, "a JSON object"),
    "truncated": (lambda s: s | {"weight": s["weight"][:-1]}, r"1280 bytes for shape \[40, 64\], got 1279"),
    "a shape that lies": (partial(about, shape=[40, 128]), "2560 bytes for shape"),
    "a huge shape": (partial(about, shape=[2**30, 2**30]), "bytes for shape"),
    "a negative shape": (partial(about, shape=[-40, -64]), "two sizes"),
    "a shape of floats": (partial(about, shape=[40.0, 64.0]), "two sizes"),
    "three sizes": (partial(about, shape=[2, 20, 64]), "two sizes"),
    "no shape": (partial(about, shape=...), "two sizes"),
    "blocksize 48": (partial(about, blocksize=48), "blocksize one of"),
    "blocksize true": (partial(about, blocksize=True), "blocksize one of"),
    "dtype int8": (partial(about, dtype="int8"), "dtype one of"),
    "nested blocks of 128": (partial(about, nested_blocksize=128), "nested_blocksize 256"),
    "an infinite offset": (partial(about, nested_offset=float("inf")), "finite nested_offset"),
    "no offset": (partial(about, nested_offset=...), "finite nested_offset"),
    "absmax too short": (lambda s: s | {"weight.absmax": s["weight.absmax"][1:]}, r"torch.uint8 \[40\]"),
    "absmax of floats": (lambda s: s | {"weight.absmax": s["weight.absmax"].float()}, r"torch.uint8 \[40\]"),
    "NaN": (lambda s: s | {"weight.nested_absmax": torch.full((1,), float("nan"))}, "must be finite"),
    "another code book": (lambda s: s | {"weight.quant_map": torch.zeros(16)}, "the nf4 code book"),
    "another map": (lambda s: s | {"weight.nested_quant_map": torch.zeros(256)}, "dynamic map"),
    "no tensor": (lambda s: s | {"weight.absmax": [1]}, "must be a torch.Tensor, got list"),
}


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_bad_checkpoints(name):
    change, message = BAD_CHECKPOINTS[name]
    state = quantize_4bit(torch.randn(40, 64), double_quant=True).state_dict()
    with pytest.raises(ValueError, match=f"^Weight4bit.from_state_dict: .*{message}"):
        fp.Weight4bit.from_state_dict(change(dict(state)))


# ---- linear4bit and lora_linear over 4-bit weights -----------------------------------------------


@contextlib.contextmanager
def dense_tools():
    """Tools of the comparison itself run wherever they like."""
    with fp.backend("torch"):
        yield


def exact_weight(weight: fp.Weight4bit) -> torch.Tensor:
    with dense_tools():
        return weight.dequantize(torch.float32).double()


def check_all(m, k, n, r, dtype, scale=0.75, p=0.0, seed=None, lead=None, adapter_dtype=torch.float32, **kind):
    """Forward and every gradient of lora_linear over a 4-bit weight, by the error rule."""
    inputs = problem(m, k, n, r, dtype, adapter_dtype=adapter_dtype, lead=lead)
    weight = quantize_4bit(inputs["weight"], **kind)
    dense = exact_weight(weight)
    dy = torch.randn(*inputs["x"].shape[:-1], n).to(dtype)
    s = None if seed is None else torch.tensor(seed)
    ours = run(lora_linear, inputs | {"weight": weight}, dy, scale=scale, dropout_p=p, seed=seed)
    low = run(composition, inputs | {"weight": dense.to(dtype)}, dy, scale=scale, p=p, seed=s)
    doubles = in_double(inputs) | {"weight": dense}
    exact = run(composition, doubles, dy.double(), scale=scale, p=p, seed=s)
    positive = {name: t.detach().abs().requires_grad_(t.requires_grad) for name, t in doubles.items()}
    terms = run(composition, positive, dy.double().abs(), scale=abs(scale), p=p, seed=s)
    for name, mine, lower, true, sizes in zip(("y", *GRADS), ours, low, exact, terms, strict=True):
        assert_close(mine, lower, true, name, eps=EPS[dtype], terms=sizes.detach())


@pytest.mark.verifies("linear4bit", "forward", "backward")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(64, 64), (100, 72), (7, 37), (33, 80), (48, 576)])
def test_linear4bit_against_float64(backend, n, k, dtype):
    for m in (1, 2, 3, 4, 5, 17, 33, 200):
        for quant_type, double_quant in KINDS[m % 4 :: 4]:
            w = torch.randn(n, k).to(dtype)
            weight = quantize_4bit(w, quant_type=quant_type, double_quant=double_quant)
            dense = exact_weight(weight)
            x, bias = torch.randn(m, k).to(dtype).requires_grad_(), torch.randn(n).to(dtype).requires_grad_()
            dy = torch.randn(m, n).to(dtype)
            got = (y := linear4bit(x, weight, bias), *torch.autograd.grad(y, [x, bias], dy))

            def composed(cast, x=x, bias=bias, dense=dense, dy=dy):
                x, bias = cast(x).detach().requires_grad_(), cast(bias).detach().requires_grad_()
                y = F.linear(x, cast(dense), bias)
                return y, *torch.autograd.grad(y, [x, bias], cast(dy))

            low, exact = composed(lambda t, dtype=dtype: t.to(dtype)), composed(lambda t: t.double())
            terms = composed(lambda t: t.double().abs())
            for name, mine, lower, true, sizes in zip(("y", "dx", "dbias"), got, low, exact, terms, strict=True):
                assert_close(mine, lower, true, f"{name} M={m}", eps=EPS[dtype], terms=sizes.detach())
            with torch.no_grad():
                assert_close(linear4bit(x, weight, bias), low[0], exact[0], f"y M={m}", EPS[dtype], terms[0].detach())


@pytest.mark.skipif("avx512bf16" not in cpu_levels(), reason="this machine has no AVX512-BF16")
@pytest.mark.parametrize("m", [1, 2, 3, 5, 9, 16, 17, 40])
def test_dot_product_of_pairs(m):
    """The kernel that AMD's machines take, by their plan. With x that has a mean: there the rounding of the book counts."""
    with fp.plan("Z"):
        dot_product_of_pairs(m)


def dot_product_of_pairs(m):
    for n, k in [(64, 64), (53, 72), (48, 576)]:
        check_all(m, k, n, 5, torch.bfloat16, double_quant=bool(m % 2))
    for quant_type in ("nf4", "fp4"):
        weight = quantize_4bit(torch.randn(32, 4096), quant_type=quant_type)
        x, dense = torch.rand(m, 4096).bfloat16(), exact_weight(weight)
        y, low, exact = linear4bit(x, weight).float(), x.float() @ dense.bfloat16().float().t(), x.double() @ dense.t()
        # sums in fp32 both, so that errors of the book are not hidden by those of y: only y's rounding is added
        assert_close(y, low, exact, eps=2**-8)


@pytest.mark.verifies("lora_linear over Weight4bit", "forward", "backward")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 64, 48, 16), (3, 576, 192, 16), (7, 37, 53, 3), (50, 72, 40, 6), (130, 40, 24, 100)], ids=str
)
def test_lora_linear_against_float64(backend, shape, dtype):
    check_all(*shape, dtype, double_quant=shape[0] % 2 == 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_against_float64(backend, dtype):
    check_all(33, 72, 50, 8, dtype, p=0.3, seed=2**40 + 12345)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(1, 70),
    k=st.integers(1, 140),
    n=st.integers(1, 140),
    r=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    blocksize=st.sampled_from(BLOCKSIZES),
)
def test_any_shape(backend, m, k, n, r, dtype, kind, blocksize):
    torch.manual_seed(m * k + n)
    check_all(m, k, n, r, dtype, quant_type=kind[0], double_quant=kind[1], blocksize=blocksize)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(1, 300),
    k=st.integers(1, 700),
    n=st.integers(1, 300),
    r=st.integers(1, 100),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    blocksize=st.sampled_from(BLOCKSIZES),
    aligned=st.booleans(),
)
def test_any_shape_at_length(backend, m, k, n, r, dtype, kind, blocksize, aligned):
    torch.manual_seed(m * k + n)
    k = -(-k // 64) * 64 if aligned else k
    check_all(m, k, n, r, dtype, quant_type=kind[0], double_quant=kind[1], blocksize=blocksize)


@pytest.mark.parametrize("lead", [(3, 5), (1, 1), (), (0,), (2, 0)], ids=str)
def test_leading_shapes(backend, lead):
    check_all(None, 40, 20, 4, torch.float32, lead=lead)


@pytest.mark.verifies("lora_linear_group over Weight4bit", "forward", "backward")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [3, 40, 200])
def test_group_of_dense_and_4bit(backend, m, dtype):
    """Each projection as it is alone, dense and 4-bit ones mixed; the gradient of x is their sum."""
    k, ns, ranks = 72, (40, 24, 33), (4, None, 3)
    torch.manual_seed(m)
    x = torch.randn(m, k).to(dtype).requires_grad_()
    dense = [(torch.randn(n, k) / k**0.5).to(dtype) for n in ns]
    weights = [quantize_4bit(dense[0]), dense[1], quantize_4bit(dense[2], double_quant=True)]
    a = [None if r is None else torch.randn(r, k) / k**0.5 for r in ranks]
    b = [None if r is None else torch.randn(n, r) for n, r in zip(ns, ranks, strict=True)]
    dys = [torch.randn(m, n).to(dtype) for n in ns]

    def alone(weights, x, a, b, dys):
        ys = [
            F.linear(x, w) + (0 if a_i is None else 0.5 * (x @ a_i.T) @ b_i.T)
            for w, a_i, b_i in zip(weights, a, b, strict=True)
        ]
        return [*ys, *torch.autograd.grad(ys, [x], dys)]

    leaves = [t.requires_grad_() for t in (*a, *b) if t is not None]
    ys = lora_linear_group(x, weights, a, b, scales=[0.5] * 3)
    got = [*ys, *torch.autograd.grad(ys, [x], dys, retain_graph=True)]
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(ys, leaves, dys))
    real = [exact_weight(w) if isinstance(w, fp.Weight4bit) else w.double() for w in weights]

    def cast(ts, to):
        return [None if t is None else to(t.detach()) for t in ts]

    low = alone(
        cast(real, lambda t: t.to(dtype)), x, cast(a, lambda t: t.to(dtype)), cast(b, lambda t: t.to(dtype)), dys
    )
    up, size = (lambda t: t.double()), (lambda t: t.double().abs())
    exact = alone(real, up(x.detach()).requires_grad_(), cast(a, up), cast(b, up), cast(dys, up))
    terms = alone(cast(real, size), size(x.detach()).requires_grad_(), cast(a, size), cast(b, size), cast(dys, size))
    for mine, lower, true, sizes in zip(got, low, exact, terms, strict=True):
        assert_close(mine, lower, true, eps=EPS[dtype], terms=sizes.detach())


# ---- how they behave -----------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 4, 40, 200])
def test_bitwise_equal_twice_and_layouts_agree(backend, m):
    x = torch.randn(m, 64, dtype=torch.bfloat16)
    weight = quantize_4bit(torch.randn(50, 64, dtype=torch.bfloat16), double_quant=True)
    y = linear4bit(x, weight)
    assert torch.equal(y, linear4bit(x, weight))
    dense = exact_weight(weight)
    low, exact, terms = F.linear(x, dense.bfloat16()), F.linear(x.double(), dense), x.double().abs() @ dense.abs().t()
    for layout in (weight, weight.untile()):
        assert_close(linear4bit(x, layout), low, exact, terms=terms)


@pytest.mark.parametrize("m", [1, 3, 40])
def test_nan_and_inf_propagate(backend, m):
    weight = quantize_4bit(torch.randn(40, 64))
    x = torch.randn(m, 64)
    x[0, 5] = float("nan")
    y = linear4bit(x, weight)
    assert y[0].isnan().all() and torch.isfinite(y[1:]).all()
    x[0, 5] = float("inf")
    assert not torch.isfinite(linear4bit(x, weight)[0]).any()


@pytest.mark.parametrize("isa", native.cpu().isas() if native.cpu() else [])
@pytest.mark.parametrize("double_quant", [False, True])
def test_reads_nothing_outside(isa, double_quant):
    """Every tensor ends where memory ends."""
    module, before = native.cpu(), native.cpu().isa()
    module.set_isa(isa)
    memory = Memory()
    try:
        for n, k in [(64, 64), (37, 72), (16, 8), (21, 37)]:
            for m in (1, 2, 5, 33):
                made = quantize_4bit(torch.randn(n, k), double_quant=double_quant)
                guarded = [None if t is None else memory.copy(t.view(1, -1), t.dtype).view(-1) for t in made.tensors()]
                weight = fp.Weight4bit(
                    *guarded[:3],
                    None if guarded[3] is None else guarded[3].view(()),
                    made.shape,
                    made.dtype,
                    made.quant_type,
                    made.blocksize,
                    made.tiled,
                )
                x = memory.copy(torch.randn(m, k), torch.float32)
                assert torch.isfinite(linear4bit(x, weight)).all()
                out = memory.empty(n, k, torch.float32)
                module.linear4bit_dequantize(weight, out, 0, n, 0, k)
                assert torch.equal(out, made.dequantize())
    finally:
        module.set_isa(before)
        memory.close()


@pytest.mark.verifies("linear4bit", "compile")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile_fullgraph(backend, dtype):
    weight = quantize_4bit(torch.randn(40, 64, dtype=dtype), double_quant=True)
    x = torch.randn(6, 64, dtype=dtype, requires_grad=True)
    call = lambda x: torch.relu(linear4bit(x, weight))  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, expected = compiled(x), call(x)
    assert torch.equal(got, expected)
    for one, other in zip(torch.autograd.grad(got.sum(), x), torch.autograd.grad(expected.sum(), x), strict=True):
        assert torch.equal(one, other)


def test_opcheck():
    ops = torch.ops.fastpeft
    (data,), quants, form = split([quantize_4bit(torch.randn(24, 40), double_quant=True)])
    weight, x, dy = (data, *quants, form), torch.randn(6, 40), torch.randn(6, 24)
    torch.library.opcheck(ops.linear4bit_dequantize.default, (*weight, torch.bfloat16))
    torch.library.opcheck(ops.linear4bit_project.default, (x, *weight, torch.randn(24), ""))
    torch.library.opcheck(ops.linear4bit_combine.default, (dy, *weight, ""))


@pytest.mark.verifies("linear4bit", "checkpoint")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(backend, reentrant, dtype):
    weight = quantize_4bit(torch.randn(40, 64, dtype=dtype))
    x = torch.randn(6, 64, dtype=dtype, requires_grad=True)
    y, again = linear4bit(x, weight), checkpoint(linear4bit, x, weight, use_reentrant=reentrant)
    (grad,), (grad_again,) = (torch.autograd.grad(t.sum(), x) if not reentrant else (_grad(t, x),) for t in (y, again))
    assert torch.equal(y, again) and torch.equal(grad, grad_again)


def _grad(y, x):
    x.grad = None
    y.sum().backward()
    return x.grad


def test_autocast():
    weight, x = quantize_4bit(torch.randn(40, 64)), torch.randn(6, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear4bit(x, weight)
    assert y.dtype == torch.bfloat16 and torch.equal(y, linear4bit(x.bfloat16(), weight))


@pytest.mark.parametrize("of", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_computes_in_the_dtype_of_x(backend, dtype, of):
    """Whatever was quantised: the stored bytes are the same."""
    made = quantize_4bit(torch.randn(48, 64))
    weight = dataclasses.replace(made, dtype=of)
    for m in (1, 40):
        x = torch.randn(m, 64).to(dtype)
        y = linear4bit(x, weight)
        assert y.dtype == dtype and torch.equal(y, linear4bit(x, made))
        x.requires_grad_()
        assert torch.equal(linear4bit(x, weight), y)


def test_backward_keeps_no_full_weight():
    weight = quantize_4bit(torch.randn(256, 256))
    x = torch.randn(64, 256, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        linear4bit(x, weight)
    assert sum(kept) <= weight.nbytes + 64


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("w", "options", "error", "message"),
    [
        ([[1.0]], {}, TypeError, "w must be a torch.Tensor, got list"),
        (torch.ones(4), {}, ValueError, r"w must be \[N, K\], got \[4\]"),
        (torch.ones(4, 4, dtype=torch.int8), {}, ValueError, "float32, bfloat16 or float16, got torch.int8"),
        (torch.ones(4, 4, dtype=torch.complex64), {}, ValueError, "float32, bfloat16 or float16, got torch.complex64"),
        (torch.ones(4, 4, dtype=torch.float64), {}, ValueError, "float32, bfloat16 or float16, got torch.float64"),
        (torch.full((4, 4), float("nan")), {}, ValueError, "w must be finite, got NaN or Inf"),
        (torch.full((4, 4), float("inf")), {}, ValueError, "w must be finite, got NaN or Inf"),
        (torch.ones(4, 4), {"quant_type": "int4"}, ValueError, "'nf4' or 'fp4', got 'int4'"),
        (torch.ones(4, 4), {"blocksize": 48}, ValueError, "a power of two from 32 to 4096, got 48"),
        (torch.ones(4, 4), {"blocksize": 16}, ValueError, "a power of two from 32 to 4096, got 16"),
        (torch.ones(4, 4), {"blocksize": 64.0}, ValueError, "a power of two from 32 to 4096, got 64.0"),
    ],
    ids=str,
)
def test_bad_weights(w, options, error, message):
    with pytest.raises(error, match=f"^quantize_4bit: .*{message}"):
        quantize_4bit(w, **options)


def test_bad_calls():
    weight = quantize_4bit(torch.randn(24, 40))
    x = torch.randn(3, 40)
    with pytest.raises(
        TypeError, match=r"linear4bit: weight must be an fp.Weight4bit \(see quantize_4bit\), got Tensor"
    ):
        linear4bit(x, torch.randn(24, 40))
    with pytest.raises(ValueError, match=r"linear4bit: weight must be \[N, K\] = \[N, 39\]"):
        linear4bit(x[:, 1:], weight)
    with pytest.raises(ValueError, match=r"linear4bit: bias must be \[N\] = \[24\]"):
        linear4bit(x, weight, torch.randn(23))
    with pytest.raises(ValueError, match="on x's device"):
        linear4bit(x.to("meta"), weight)
