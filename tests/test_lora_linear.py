"""lora_linear and lora_linear_group: every backend against float64, all gradients, ugly shapes; then how they behave."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from _close import assert_close
from conftest import BUT_INTERPRETED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastpeft as fp
from fastpeft.ops import lora_linear, lora_linear_group
from fastpeft.reference import lora_linear as reference
from fastpeft.reference import philox

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # M, K, N, R
    (1, 1, 1, 1),
    (1, 64, 48, 16),
    (2, 576, 192, 16),
    (7, 37, 53, 3),
    (13, 129, 31, 17),
    (50, 72, 40, 6),
    (31, 65, 130, 8),
    (33, 257, 67, 33),
    (64, 96, 80, 64),
    (97, 101, 103, 5),
    (130, 40, 24, 256),
    (5, 24, 16, 512),
]
EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def problem(m, k, n, r, dtype, adapter_dtype=torch.float32, lead=None):
    """Inputs of one call; values of the size that layers see, so that every term matters."""
    x = torch.randn(*((m,) if lead is None else lead), k).to(dtype)
    return {
        "x": x.requires_grad_(),
        "weight": (torch.randn(n, k) / k**0.5).to(dtype),
        "a": (torch.randn(r, k) / k**0.5).to(adapter_dtype).requires_grad_(),
        "b": (torch.randn(n, r) / r**0.5).to(adapter_dtype).requires_grad_(),
        "bias": torch.randn(n).to(dtype).requires_grad_(),
        "lora_bias": torch.randn(n).to(adapter_dtype).requires_grad_(),
    }


GRADS = ("x", "a", "b", "bias", "lora_bias")


def composition(x, weight, a, b, bias, lora_bias, scale, p, seed):
    """What a user would write in the compute dtype: PEFT's order of operations with adapters in that dtype."""
    s = F.linear(reference.drop(x, p, seed), a.to(x.dtype))
    return F.linear(x, weight, bias.to(x.dtype)) + scale * F.linear(s, b.to(x.dtype)) + lora_bias.to(x.dtype)


def run(fn, inputs, dy, **kwargs):
    y = fn(**inputs, **kwargs)
    return (y, *torch.autograd.grad(y, [inputs[name] for name in GRADS], dy))


def in_double(inputs):
    return {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in inputs.items()}


def check_all(inputs, scale=0.75, p=0.0, seed=None, dy=None):
    dtype = inputs["x"].dtype
    lead, n = inputs["x"].shape[:-1], inputs["weight"].shape[0]
    dy = torch.randn(*lead, n).to(dtype) if dy is None else dy
    s = None if seed is None else torch.tensor(seed)
    ours = run(lora_linear, inputs, dy, scale=scale, dropout_p=p, seed=seed)
    low = run(composition, inputs, dy, scale=scale, p=p, seed=s)
    exact = run(composition, in_double(inputs), dy.double(), scale=scale, p=p, seed=s)
    positive = {name: t.detach().abs().requires_grad_(t.requires_grad) for name, t in in_double(inputs).items()}
    terms = run(composition, positive, dy.double().abs(), scale=abs(scale), p=p, seed=s)
    for name, mine, theirs, true, sizes in zip(("y", *GRADS), ours, low, exact, terms):
        drawn = inputs["a"].shape[0] * (inputs["x"].numel() // inputs["x"].shape[-1]) if name in ("a", "b") else None
        assert_close(mine, theirs, true, name, eps=EPS[dtype], terms=sizes.detach(), drawn=drawn)
        source = inputs["x"] if name == "y" else inputs[name]
        assert mine.dtype == source.dtype


# ---- right, in every backend ---------------------------------------------------------------------


@pytest.mark.verifies("lora_linear", "forward", "backward")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(backend, dtype, shape):
    check_all(problem(*shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adapters_in_compute_dtype(backend, dtype):
    check_all(problem(37, 70, 45, 12, dtype, adapter_dtype=dtype))


@pytest.mark.parametrize("wide", ["a", "b", "bias", "lora_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [3, 37])
def test_one_float64_parameter(wide, dtype, m):
    """Any floating dtype is taken, each tensor's on its own: the cpu backend leaves float64 adapters to torch."""
    inputs = problem(m, 70, 45, 12, dtype)
    inputs[wide] = inputs[wide].detach().double().requires_grad_()
    check_all(inputs)
    with torch.no_grad():
        y, expected = lora_linear(**inputs), reference.lora_linear(**inputs)
        exact = reference.lora_linear(**in_double(inputs))
    assert_close(y, expected, exact)
    said = {"a": "a is", "b": "and b"}
    with fp.backend("cpu"):
        if wide in said:
            with pytest.raises(RuntimeError, match=f"cannot run: .*{said[wide]} torch.float64"):
                lora_linear(**inputs)
        else:
            check_all(inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64, 48, 16), (7, 37, 53, 3), (50, 130, 61, 16)], ids=str)
def test_dropout_against_float64(backend, dtype, shape):
    check_all(problem(*shape, dtype), p=0.3, seed=2**40 + 12345)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(1, 70),
    k=st.integers(1, 140),
    n=st.integers(1, 140),
    r=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    p=st.sampled_from([0.0, 0.5]),
)
def test_any_shape(backend, m, k, n, r, dtype, p):
    torch.manual_seed(m * k + n)
    check_all(problem(m, k, n, r, dtype), p=p, seed=3 if p else None)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BUT_INTERPRETED, indirect=True)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(1, 300),
    k=st.integers(1, 700),
    n=st.integers(1, 700),
    r=st.integers(1, 256),
    dtype=st.sampled_from(DTYPES),
    p=st.sampled_from([0.0, 0.1, 0.9]),
)
def test_any_shape_at_length(backend, m, k, n, r, dtype, p):
    torch.manual_seed(m * k + n)
    check_all(problem(m, k, n, r, dtype), p=p, seed=3 if p else None)


@pytest.mark.parametrize("lead", [(3, 5), (2, 3, 4), (1, 1), ()], ids=str)
def test_leading_shapes(backend, lead):
    check_all(problem(None, 36, 20, 4, torch.float32, lead=lead))


@pytest.mark.parametrize("lead", [(0,), (2, 0)], ids=str)
def test_no_rows(backend, lead):
    inputs = problem(0, 36, 20, 4, torch.bfloat16, lead=lead)
    y, dx, da, db, dbias, dlora_bias = run(lora_linear, inputs, torch.zeros(*lead, 20, dtype=torch.bfloat16))
    assert y.shape == (*lead, 20) and dx.shape == inputs["x"].shape
    assert not da.any() and not db.any() and not dbias.any() and not dlora_bias.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["sliced columns", "every second row", "transposed", "expanded", "offset"])
def test_strided_x(backend, dtype, layout):
    """Odd K: PyTorch 2.13 with AMX reads one element past such rows, so the neighbours hold NaN."""
    inputs = problem(22, 37, 29, 4, dtype)
    x = inputs["x"].detach()
    nan = float("nan")
    if layout == "sliced columns":
        base = torch.full((22, 50), nan, dtype=dtype)
        view = base[:, :37]
    elif layout == "every second row":
        view = torch.full((44, 37), nan, dtype=dtype)[::2]
    elif layout == "transposed":
        view = torch.empty(37, 22, dtype=dtype).t()
    elif layout == "offset":
        view = torch.full((22 * 37 + 2,), nan, dtype=dtype)[1:-1].view(22, 37)
    else:
        view = x[:1].expand(22, 37)
    if layout != "expanded":
        view.copy_(x)
    inputs["x"] = view.requires_grad_()
    check_all(inputs)


@pytest.mark.parametrize("m", [1, 22, 60])
@pytest.mark.parametrize("layout", ["transposed", "sliced rows", "sliced columns"])
def test_strided_weight(backend, m, layout):
    inputs = problem(m, 37, 29, 4, torch.bfloat16)
    w = inputs["weight"]
    if layout == "transposed":  # GPT-2's Conv1D
        inputs["weight"] = w.t().contiguous().t()
    elif layout == "sliced rows":
        inputs["weight"] = torch.stack([w, w * float("nan")], 1)[:, 0]
    else:
        inputs["weight"] = torch.cat([w, w * float("nan")], 1)[:, :37]
    check_all(inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["expanded", "stride 0", "sliced", "transposed"])
def test_strided_upstream_gradient(backend, dtype, layout):
    inputs = problem(24, 36, 29, 4, dtype)
    dy = {
        "expanded": torch.randn(1, 29).to(dtype).expand(24, 29),
        "stride 0": torch.ones((), dtype=dtype).expand(24, 29),
        "sliced": torch.cat([torch.randn(24, 29), torch.full((24, 3), float("nan"))], 1).to(dtype)[:, :29],
        "transposed": torch.randn(29, 24).to(dtype).t(),
    }[layout]
    check_all(inputs, dy=dy)


@pytest.mark.parametrize(
    "scale", [2, 0.0, torch.tensor(0.5), torch.tensor(3), torch.linspace(-1, 1, 6)[::2], torch.rand(3).double()]
)
def test_scales(backend, scale):
    if isinstance(scale, torch.Tensor) and not scale.dtype.is_floating_point:
        with pytest.raises(ValueError, match="lora_linear: scale must be a floating-point tensor"):
            lora_linear(**problem(9, 20, 14, 3, torch.float32), scale=scale)
        return
    inputs = problem(9, 20, 14, 3, torch.float32)
    dy = torch.randn(9, 14)
    ours = run(lora_linear, inputs, dy, scale=scale)

    def scaled(x, weight, a, b, bias, lora_bias):
        return composition(x, weight, a, b * scale, bias, lora_bias, 1.0, 0.0, None)

    low, exact = run(scaled, inputs, dy), run(scaled, in_double(inputs), dy.double())
    for name, mine, theirs, true in zip(("y", *GRADS), ours, low, exact):
        assert_close(mine, theirs, true, name)


def test_stacked_adapters_are_their_sum(backend):
    """A scale [R]: several active adapters in one call."""
    x, w = torch.randn(40, 32), torch.randn(24, 32)
    (a1, a2), (b1, b2) = (torch.randn(4, 32), torch.randn(7, 32)), (torch.randn(24, 4), torch.randn(24, 7))
    scale = torch.cat([torch.full((4,), 0.5), torch.full((7,), -2.0)])
    y = lora_linear(x, w, torch.cat([a1, a2]), torch.cat([b1, b2], 1), scale=scale)
    low = F.linear(x, w) + 0.5 * (x @ a1.t() @ b1.t()) - 2.0 * (x @ a2.t() @ b2.t())
    x, w, a1, a2, b1, b2 = (t.double() for t in (x, w, a1, a2, b1, b2))
    assert_close(y, low, F.linear(x, w) + 0.5 * (x @ a1.t() @ b1.t()) - 2.0 * (x @ a2.t() @ b2.t()))


@pytest.mark.parametrize(
    "wanted", [("x",), ("a",), ("b",), ("bias",), ("lora_bias",), ("x", "b"), ("a", "bias"), ()], ids=str
)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_only_the_wanted_gradients(backend, wanted, p):
    inputs = problem(40, 33, 21, 4, torch.bfloat16)
    full = run(lora_linear, inputs, torch.ones(40, 21, dtype=torch.bfloat16), dropout_p=p, seed=1)
    for name in GRADS:
        inputs[name] = inputs[name].detach().requires_grad_(name in wanted)
    y = lora_linear(**inputs, dropout_p=p, seed=1)
    assert y.requires_grad == bool(wanted)
    if wanted:
        grads = torch.autograd.grad(y, [inputs[name] for name in wanted], torch.ones_like(y))
        for name, grad in zip(wanted, grads):
            assert torch.equal(grad, full[1 + GRADS.index(name)]), name


@pytest.mark.parametrize("lead", [(), (6,), (2, 3)], ids=str)
def test_output_may_be_changed_in_place(backend, lead):
    inputs = problem(None, 20, 14, 3, torch.float32, lead=lead)
    dy = torch.randn(*lead, 14)
    expected = torch.autograd.grad(lora_linear(**inputs) * 2, inputs["a"], dy)
    assert torch.equal(torch.autograd.grad(lora_linear(**inputs).mul_(2), inputs["a"], dy)[0], expected[0])


def test_base_alone(backend):
    """No adapter: a frozen layer whose bias trains (BitFit)."""
    for m in (1, 40):
        x = torch.randn(m, 20, dtype=torch.bfloat16, requires_grad=True)
        w, bias = torch.randn(9, 20, dtype=torch.bfloat16), torch.randn(9, dtype=torch.bfloat16, requires_grad=True)
        y = lora_linear(x, w, None, None, bias=bias)
        low = F.linear(x, w, bias)
        exact = F.linear(x.double(), w.double(), bias.double())
        dy = torch.randn(m, 9).bfloat16()
        ours, theirs = (torch.autograd.grad(t, (x, bias), dy) for t in (y, low))
        true = torch.autograd.grad(exact, (x, bias), dy.double())
        assert_close(y, low, exact, "y")
        for mine, other, t in zip(ours, theirs, true):
            assert_close(mine, other, t)


@pytest.mark.parametrize("m", [1, 3, 40])
def test_nan_and_inf_propagate(backend, m):
    inputs = problem(m, 33, 21, 5, torch.float32)
    for bad in (float("nan"), float("inf")):
        x = inputs["x"].detach().clone()
        x[0, 7] = bad
        y = lora_linear(x, inputs["weight"], inputs["a"], inputs["b"]).detach()
        assert not torch.isfinite(y[0]).any()
        assert torch.isfinite(y[1:]).all(), "a bad row reached another"
        b = inputs["b"].detach().clone()
        b[4, 2] = bad
        y = lora_linear(inputs["x"], inputs["weight"], inputs["a"], b).detach()
        assert not torch.isfinite(y[:, 4]).any()
        assert torch.isfinite(y[:, [c for c in range(21) if c != 4]]).all(), "a bad column reached another"


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_bitwise_repeatable(backend, p):
    inputs = problem(150, 203, 111, 16, torch.bfloat16)
    dy = torch.randn(150, 111).bfloat16()
    first, second = (run(lora_linear, inputs, dy, dropout_p=p, seed=4) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second))


def test_fp64_gradients_by_finite_differences():
    inputs = problem(4, 6, 5, 2, torch.float64, adapter_dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda *args: lora_linear(*args[:4], bias=args[4], lora_bias=args[5], scale=0.7), tuple(inputs.values())
    )
    torch.autograd.gradcheck(
        lambda *args: lora_linear(*args[:4], bias=args[4], dropout_p=0.4, seed=9), tuple(inputs.values())
    )


# ---- the group -----------------------------------------------------------------------------------


def group_problem(dtype, m=44, k=36):
    x = torch.randn(2, m // 2, k).to(dtype).requires_grad_()
    sizes = [(24, 4), (9, 7), (15, None)]
    weights = [(torch.randn(n, k) / 6).to(dtype) for n, _ in sizes]
    a = [None if r is None else (torch.randn(r, k) / 6).requires_grad_() for _, r in sizes]
    b = [None if r is None else torch.randn(n, r).requires_grad_() for n, r in sizes]
    biases = [None, torch.randn(9).to(dtype).requires_grad_(), None]
    return x, weights, a, b, biases


@pytest.mark.verifies("lora_linear_group", "forward", "backward")
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [2, 88])
def test_group_against_float64(backend, dtype, p, m):
    x, weights, a, b, biases = group_problem(dtype, m)
    scales = [0.5, torch.tensor(2.0), 1.0]
    seed = torch.tensor(77)
    leaves = [t for t in (x, *a, *b, *biases) if t is not None]
    dys = [torch.randn(2, m // 2, w.shape[0]).to(dtype) for w in weights]

    def separate(x, weights, a, b, biases):
        rows = x.reshape(-1, x.shape[-1])
        return [
            reference.lora_linear(rows, w, a[i], b[i], scale=scales[i], bias=biases[i], dropout_p=p, seed=seed, projection=i)
            .view(*x.shape[:-1], -1)
            for i, w in enumerate(weights)
        ]  # fmt: skip

    ours = lora_linear_group(x, weights, a, b, scales=scales, biases=biases, dropout_p=p, seed=seed)
    low = separate(x, weights, a, b, biases)
    double = {id(t): t.detach().double().requires_grad_(t.requires_grad) for t in (*leaves, *weights)}
    up = lambda ts: [None if t is None else double[id(t)] for t in ts]  # noqa: E731
    exact = separate(double[id(x)], up(weights), up(a), up(b), up(biases))
    for mine, theirs, true in zip(ours, low, exact):
        assert_close(mine, theirs, true, "y")
    mine = torch.autograd.grad(ours, leaves, dys)
    theirs = torch.autograd.grad(low, leaves, dys)
    true = torch.autograd.grad(exact, up(leaves), [dy.double() for dy in dys])
    for one, two, three in zip(mine, theirs, true):
        assert_close(one, two, three, "gradient", eps=EPS[dtype])


def test_group_whose_adapters_differ_in_dtype(backend):
    x, weights, a, b, biases = group_problem(torch.bfloat16)
    mixed = [None if t is None else t.detach().to(DTYPES[i]) for i, t in enumerate(a)]
    same = [None if t is None else t.detach().to(DTYPES[i]).to(torch.bfloat16) for i, t in enumerate(a)]
    with torch.no_grad():
        ours, theirs = (lora_linear_group(x, weights, of, b, scales=[1.0] * 3, biases=biases) for of in (mixed, same))
    for one, other in zip(ours, theirs):
        assert torch.equal(one, other)


def test_group_with_an_unused_output(backend):
    x, weights, a, b, biases = group_problem(torch.bfloat16)
    y = lora_linear_group(x, weights, a, b, scales=[1.0] * 3, biases=biases)
    y[1].sum().backward()
    assert a[0].grad is None and b[0].grad is None and a[1].grad is not None
    alone = [t.detach().requires_grad_() for t in (x, a[1], b[1])]
    lora_linear(alone[0], weights[1], alone[1], alone[2], bias=biases[1]).sum().backward()
    for one, two in zip((x, a[1], b[1]), alone):
        assert torch.equal(one.grad, two.grad)


@pytest.mark.parametrize("m", [3, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_the_plain_inference_call_is_the_general_one(monkeypatch, dtype, m):
    inputs = {name: t.detach() for name, t in problem(m, 70, 45, 6, dtype, lead=(m // 3, 3)).items()}
    short = lora_linear(**inputs, scale=0.75)
    used = []
    monkeypatch.setattr(sys.modules["fastpeft.ops.lora_linear"], "plain", lambda *args: used.append(args))
    assert torch.equal(short, lora_linear(**inputs, scale=0.75)) and used


class Looking(TorchDispatchMode):
    """A mode that changes nothing; `names`: the ops that it saw."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 40, 100])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("case", ["all", "a frozen", "x frozen", "one output unused"])
def test_seen_by_a_dispatch_mode(dtype, m, p, case):
    """Functional passes and aten.mm or addmm, whatever M; the same results as a plain call, by the error rule."""
    generator = torch.Generator().manual_seed(m)

    def random(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator).to(dtype)

    x, weights, biases = random(2, m, 36), [random(20, 36), random(44, 36)], [random(20), None]
    a = [random(3, 36, dtype=torch.float32), random(8, 36)]
    b = [random(20, 3), random(44, 8, dtype=torch.float32)]
    dys = [random(2, m, 20), random(2, m, 44)]

    def results(to=None):
        cast = lambda t: t if t is None or to is None else t.to(to)  # noqa: E731
        inputs = [cast(t).clone().requires_grad_() for t in (x, *a, *b)]
        for t in {"a frozen": inputs[1:2], "x frozen": inputs[:1]}.get(case, []):
            t.requires_grad_(False)
        of = [[cast(t) for t in ts] for ts in (weights, biases, dys)]
        ys = lora_linear_group(
            inputs[0], of[0], inputs[1:3], inputs[3:], scales=[0.5, 2], biases=of[1], dropout_p=p, seed=5
        )
        live = [1] if case == "one output unused" else [0, 1]
        torch.autograd.backward([ys[i] for i in live], [of[2][i] for i in live])
        return [y.detach() for y in ys] + [t.grad for t in inputs]

    plain, exact = results(), results(torch.float64)
    with Looking() as mode:
        seen = results()
    for got, one, true in zip(seen, plain, exact, strict=True):
        assert (got is None) == (one is None) == (true is None)
        if got is not None:
            assert_close(got, one, true, eps=EPS[dtype])
    assert {"fastpeft::lora_linear_down", "fastpeft::lora_linear_up", "aten::mm", "aten::addmm"} <= set(mode.names)
    assert not {"fastpeft::lora_linear_up_", "aten::addmm_", "aten::mm.out", "aten::addmm.out"} & set(mode.names)


# ---- dropout -------------------------------------------------------------------------------------


def test_philox_known_answers():
    """Random123's kat_vectors for philox4x32-10: counter 0, key 0."""
    block = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox.words(torch.tensor(0), (4,)).tolist() == block
    words = philox.words(torch.tensor(0), (2, 3, 5))
    assert words[0, 0, :4].tolist() == block
    assert words.min() >= 0 and words.max() < 2**32 and words.unique().numel() == 30


def test_dropout_mask_is_the_same_in_every_backend(backend):
    """With B = 1, R = K and A = identity the LoRA term shows the mask itself."""
    k, p = 151, 0.35
    x, eye, w = torch.ones(50, k), torch.eye(k), torch.zeros(k, k)
    y = lora_linear(x, w, eye, eye, dropout_p=p, seed=-5)
    keep = philox.dropout_mask(torch.tensor(-5), (50, k), p)
    assert torch.equal(y != 0, keep)
    assert torch.equal(y[keep], torch.full_like(y[keep], 1 / (1 - p)))


def test_dropout_draws_from_torchs_generator(backend):
    inputs = problem(20, 30, 10, 4, torch.float32)
    call = lambda: lora_linear(**inputs, dropout_p=0.5).detach()  # noqa: E731
    torch.manual_seed(3)
    first, second = call(), call()
    torch.manual_seed(3)
    assert torch.equal(call(), first) and not torch.equal(first, second)


def test_dropout_of_everything():
    inputs = problem(20, 30, 10, 4, torch.float32)
    everything = lora_linear(**inputs, dropout_p=1.0)
    low, exact = (F.linear(at["x"], at["weight"], at["bias"]) + at["lora_bias"] for at in (inputs, in_double(inputs)))
    assert_close(everything, low, exact)


@pytest.mark.verifies("lora_linear", "checkpoint")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_recomputes_the_same_mask(backend, dtype, reentrant):
    inputs = problem(30, 40, 20, 4, dtype)
    dy = torch.randn(30, 20).to(dtype)
    leaves = [inputs[name] for name in GRADS]

    def layer(x, a, b, bias, lora_bias):
        return lora_linear(x, inputs["weight"], a, b, bias=bias, lora_bias=lora_bias, dropout_p=0.5).sin()

    torch.manual_seed(8)
    plain = torch.autograd.grad(layer(*leaves), leaves, dy)
    torch.manual_seed(8)
    checkpoint(layer, *leaves, use_reentrant=reentrant).backward(dy)
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, plain))


# ---- in_scale, out_scale -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ia3_scales(dtype):
    inputs = problem(12, 20, 14, 3, dtype)
    scales = {
        "in_scale": torch.rand(20).requires_grad_(),
        "out_scale": torch.rand(14).requires_grad_(),
        "scale": torch.rand(3).requires_grad_(),
    }
    leaves = [*(inputs[name] for name in GRADS), *scales.values()]

    def formula(x, weight, a, b, bias, lora_bias, in_scale, out_scale, scale):
        d = x.dtype
        lora = F.linear(F.linear(x, a.to(d)), (b * scale).to(d))
        return out_scale.to(d) * (F.linear(x * in_scale.to(d), weight) + lora + lora_bias.to(d)) + bias

    dy = torch.randn(12, 14).to(dtype)
    up = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in {**inputs, **scales}.items()}
    ours = lora_linear(**inputs, **scales)
    low, exact = formula(**inputs, **scales), formula(**up)
    assert_close(ours, low, exact)
    names = [*GRADS, *scales]
    true = torch.autograd.grad(exact, [up[name] for name in names], dy.double())
    low = torch.autograd.grad(low, leaves, dy)
    for one, two, three in zip(torch.autograd.grad(ours, leaves, dy), low, true):
        assert_close(one, two, three, eps=EPS[dtype])


# ---- inside PyTorch ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_opcheck(dtype):
    ops = torch.ops.fastpeft
    x, weights, a, b, _ = group_problem(dtype)
    rows, a, b = x.detach().view(-1, 36), [detached(t) for t in a], [detached(t) for t in b]
    scales, seed = [torch.tensor(0.5), torch.rand(7), None], torch.tensor(3)
    ys, lora_biases = [rows @ w.t() for w in weights], [None, None, torch.randn(15)]
    s = ops.lora_linear_down(rows, a, 0.25, seed, "")
    dys = [torch.randn_like(y) for y in ys]
    dys[1] = None
    t = torch.randn_like(s)
    for op, args in (
        (ops.lora_linear_down, (rows, a, 0.25, seed, "")),
        (ops.lora_linear_up, (ys, s, b, scales, lora_biases, "")),
        (ops.lora_linear_up_, (ys, s, b, scales, lora_biases, "")),
        (ops.lora_linear_grad_up, (dys, s, b, scales, True, [True, True, False], [True, False, True], "")),
        (ops.lora_linear_grad_up, (dys, s, b, scales, False, [False] * 3, [True] * 3, "")),
        (ops.lora_linear_grad_down, (rows, rows, t, a, [True, False, True], [True] * 3, 0.25, seed, "")),
        (ops.lora_linear_grad_down, (None, rows, t, a, [True] * 3, [False, True, False], 0.0, None, "")),
    ):
        torch.library.opcheck(op.default, args)


def detached(t):
    return None if t is None else t.detach()


def test_flops_are_counted():
    """What a composition of mm counts: the base twice in a step with a frozen weight, each rank-R product three times."""
    m, k, n, r = 33, 64, 48, 8
    inputs = problem(m, k, n, r, torch.float32)
    with FlopCounterMode(display=False) as counter:
        lora_linear(**inputs).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * m * k * n + 3 * 2 * m * r * (k + n)


@pytest.mark.verifies("lora_linear", "compile")
@pytest.mark.parametrize("engine", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile_fullgraph(backend, engine, dtype):
    inputs = problem(30, 40, 20, 4, dtype)
    leaves = [inputs[name] for name in GRADS]
    doubles = in_double(inputs)
    positive = {name: t.detach().abs().requires_grad_(t.requires_grad) for name, t in doubles.items()}

    def layer(x, a, b, bias, lora_bias, scale):
        return (
            lora_linear(x, inputs["weight"], a, b, scale=scale, bias=bias, lora_bias=lora_bias, dropout_p=0.5, seed=5)
            * 2
        )

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=engine)
    for scale in (0.5, 0.7):
        dy = (eager := layer(*leaves, scale)).detach()
        low = (dy, *torch.autograd.grad(eager, leaves, dy))
        got = ((y := compiled(*leaves, scale)), *torch.autograd.grad(y, leaves, dy))
        formula = partial(composition, scale=scale, p=0.5, seed=torch.tensor(5))
        exact = run(lambda formula=formula, **at: formula(**at) * 2, doubles, dy.double())
        terms = run(lambda formula=formula, **at: formula(**at) * 2, positive, dy.double().abs())
        for name, mine, lower, true, sizes in zip(("y", *GRADS), got, low, exact, terms, strict=True):
            assert mine.dtype == lower.dtype
            assert_close(mine, lower, true, name, eps=EPS[dtype], terms=sizes.detach())


def test_changing_the_scale_recompiles_at_most_once():
    inputs = problem(30, 40, 20, 4, torch.float32)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda scale: lora_linear(**inputs, scale=scale), fullgraph=True, backend=counter)
    for scale in (0.5, 0.6, 0.7, 0.8, 0.9):
        compiled(scale)
    assert counter.frame_count <= 2


def test_export():
    layer = fp.nn.LoraLinear(torch.nn.Linear(12, 8), r=4).eval()
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(5, 12)
    twice = torch.cat([x, x])
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: torch.export.Dim("rows", min=2)}})
    assert_close(program.module()(twice), layer(twice), exact_layer(layer, twice))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend, dtype):
    inputs = problem(20, 30, 10, 4, torch.float32)
    with torch.autocast("cpu", dtype):
        y = lora_linear(**inputs)
        low = composition(**inputs, scale=1.0, p=0.0, seed=None)
    assert y.dtype == dtype
    exact = composition(**in_double(inputs), scale=1.0, p=0.0, seed=None)
    assert_close(y, low, exact)
    dy = torch.randn(20, 10).to(dtype)
    leaves = [inputs[name] for name in GRADS]
    mine, theirs = torch.autograd.grad(y, leaves, dy), torch.autograd.grad(low, leaves, dy)
    rounded = in_double({name: t.to(dtype) if name in ("x", "weight") else t for name, t in inputs.items()})
    true = run(composition, rounded, dy.double(), scale=1.0, p=0.0, seed=None)[1:]
    for one, two, three in zip(mine, theirs, true):
        assert one.dtype == torch.float32
        assert_close(one, two, three, eps=EPS[dtype])


def test_autocast_of_a_group_with_a_trained_scale():
    x, weights, a, b, biases = group_problem(torch.float32)
    scales = [torch.tensor(0.5, requires_grad=True), 1.0, 1.0]
    with torch.autocast("cpu", torch.bfloat16):
        ys = lora_linear_group(x.bfloat16(), weights, a, b, scales=scales, biases=biases)
        single = lora_linear(x, weights[0], a[0], b[0], scale=scales[0])
    assert all(y.dtype == torch.bfloat16 for y in ys) and torch.equal(ys[0], single)


def test_inference_mode(backend):
    inputs = problem(20, 30, 10, 4, torch.bfloat16)
    expected = lora_linear(**inputs).detach()
    with torch.inference_mode():
        assert torch.equal(lora_linear(**inputs), expected)
        made_here = lora_linear(torch.randn(1, 30).bfloat16(), inputs["weight"], inputs["a"], inputs["b"], scale=0.123)
    assert made_here.is_inference()
    again = lora_linear(**inputs, scale=0.123)  # a constant first used in inference mode is no inference tensor
    again.sum().backward()


def test_functional_gradient():
    inputs = problem(6, 9, 7, 3, torch.float32)
    fixed = {name: t.detach() for name, t in inputs.items()}

    def loss(a):
        return lora_linear(**{**fixed, "a": a}).square().sum()

    expected = torch.autograd.grad(lora_linear(**inputs).square().sum(), inputs["a"])[0]
    doubles = in_double(inputs)
    y = composition(**doubles, scale=1.0, p=0.0, seed=None)
    (exact,) = torch.autograd.grad(y.square().sum(), doubles["a"])
    positive = {name: t.detach().abs().requires_grad_(t.requires_grad) for name, t in doubles.items()}
    y = composition(**positive, scale=1.0, p=0.0, seed=None)
    (terms,) = torch.autograd.grad(y.square().sum(), positive["a"])
    assert_close(torch.func.grad(loss)(fixed["a"]), expected, exact, terms=terms)


def test_second_derivative_is_refused():
    inputs = problem(6, 9, 7, 3, torch.float32)
    first = torch.autograd.grad(lora_linear(**inputs).sum(), inputs["a"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="lora_linear has no second derivative"):
        first.sum().backward()


def test_threads(backend):
    from concurrent.futures import ThreadPoolExecutor

    if backend == "triton":
        pytest.skip("Triton's interpreter keeps its state in globals; on a GPU this test runs")
    inputs = problem(64, 70, 50, 8, torch.bfloat16)
    dy = torch.randn(64, 50).bfloat16()
    expected = run(lora_linear, inputs, dy)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: run(lora_linear, inputs, dy), range(16)):
            assert all(torch.equal(one, two) for one, two in zip(result, expected))


# ---- bad input -----------------------------------------------------------------------------------


def good(**changes):
    k = {"x": torch.randn(3, 8), "weight": torch.randn(5, 8), "a": torch.randn(2, 8), "b": torch.randn(5, 2)}
    return {**k, **changes}


META = {"device": "meta"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must be .* got a 0-dim tensor"),
        ({"x": torch.ones(3, 8, dtype=torch.int64)}, ValueError, "x must be a floating-point tensor, got torch.int64"),
        ({"x": torch.randn(3, 7)}, ValueError, r"weight must be \[N, K\] = \[N, 7\] .* got \[5, 8\]"),
        ({"weight": torch.randn(5)}, ValueError, r"weight must be \[N, K\]"),
        ({"weight": torch.randn(5, 8).double()}, ValueError, "weight must be of x's dtype .* got torch.float64"),
        ({"weight": torch.randn(5, 8, requires_grad=True)}, ValueError, "weight must be frozen"),
        ({"weight": torch.empty(5, 8, **META)}, ValueError, r"weight must be on x's device \(cpu\), got meta"),
        ({"weight": None}, TypeError, "weight must be a torch.Tensor or an fp.Weight4bit, got NoneType"),
        ({"a": torch.randn(2, 7)}, ValueError, r"a must be \[R, K\] = \[2, 8\], got \[2, 7\]"),
        ({"a": torch.randn(0, 8)}, ValueError, r"a must be \[R, K\] = \[R ≥ 1, 8\], got \[0, 8\]"),
        ({"a": None}, TypeError, "a must be a torch.Tensor"),
        ({"a": torch.ones(2, 8, dtype=torch.int8)}, ValueError, "a must be a floating-point tensor"),
        ({"a": torch.empty(2, 8, **META)}, ValueError, "a must be on x's device"),
        ({"b": torch.randn(5, 3)}, ValueError, r"b must be \[N, R\] = \[5, 2\], got \[5, 3\]"),
        ({"b": torch.randn(2, 5)}, ValueError, r"b must be \[N, R\] = \[5, 2\], got \[2, 5\]"),
        ({"bias": torch.randn(8)}, ValueError, r"bias must be \[N\] = \[5\], got \[8\]"),
        ({"bias": 1.0}, TypeError, "bias must be a torch.Tensor or None, got float"),
        ({"lora_bias": torch.randn(5, 1)}, ValueError, r"lora_bias must be \[N\] = \[5\], got \[5, 1\]"),
        ({"scale": "2"}, TypeError, "scale must be a number or a torch.Tensor, got str"),
        ({"scale": torch.ones(3)}, ValueError, r"scale must be a number or a tensor \[\] or \[R\] = \[2\], got \[3\]"),
        ({"dropout_p": 1.5}, ValueError, r"dropout_p must be a probability in \[0, 1\], got 1.5"),
        ({"dropout_p": 0.5, "seed": 1.5}, TypeError, "seed must be an int"),
        ({"dropout_p": 0.5, "seed": torch.tensor([1])}, ValueError, "seed must be an int or an int64 tensor"),
        ({"in_scale": torch.randn(5)}, ValueError, r"in_scale must be \[K\] = \[8\], got \[5\]"),
        ({"out_scale": torch.randn(8)}, ValueError, r"out_scale must be \[N\] = \[5\], got \[8\]"),
    ],
)  # fmt: skip
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=f"^lora_linear: {message}"):
        lora_linear(**good(**changes))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("number", [1, 1.0, 0])
def test_a_bool_is_no_scale(number, grad):
    """Not even after the number that it equals: constants are kept."""
    with torch.set_grad_enabled(grad):
        lora_linear(**good(), scale=number)
        with pytest.raises(TypeError, match="^lora_linear: scale must be a number or a torch.Tensor, got bool"):
            lora_linear(**good(), scale=bool(number))


def test_bad_groups():
    args = good()
    one = [args["x"], [args["weight"]], [args["a"]], [args["b"]]]
    with pytest.raises(ValueError, match="lora_linear_group: scales must be as long as weights"):
        lora_linear_group(*one, scales=[])
    with pytest.raises(ValueError, match="lora_linear_group: a must be as long as weights"):
        lora_linear_group(args["x"], [], [], [], scales=[])
    with pytest.raises(ValueError, match="lora_linear_group: weight must be"):
        lora_linear_group(torch.randn(3, 9), *one[1:], scales=[1.0])
    for p in (0.5, 1.0):
        with pytest.raises(TypeError, match="^lora_linear_group: seed must be an int or .* got float"):
            lora_linear_group(*one, scales=[1.0], dropout_p=p, seed=1.5)
        with pytest.raises(ValueError, match="^lora_linear_group: seed must be an int or an int64 tensor"):
            lora_linear_group(*one, scales=[1.0], dropout_p=p, seed=torch.tensor([1]))


def test_forced_backends():
    with pytest.raises(ValueError, match="must be one of cuda, triton, cpu, torch, got 'gpu'"), fp.backend("gpu"):
        pass
    with fp.backend("cuda"), pytest.raises(RuntimeError, match="'cuda' was forced, but cannot run: tensors are on cpu"):
        lora_linear(**good())
    double = {name: t.double() for name, t in good().items()}
    with fp.backend("cpu"), pytest.raises(RuntimeError, match="backend 'cpu' was forced, but cannot run: "):
        lora_linear(**double)
    with fp.backend("cpu"), pytest.raises(RuntimeError, match="in_scale"):
        lora_linear(**good(in_scale=torch.ones(8)))
    args = good()
    one = [args["x"], [args["weight"]], [args["a"]], [args["b"]]]
    trained = torch.ones((), requires_grad=True)
    for scale, p, why in ((trained, 0.0, "a scale that requires grad"), (1.0, 1.0, "dropout_p = 1")):
        with fp.backend("cpu"), pytest.raises(RuntimeError, match=f"^lora_linear: backend 'cpu' was forced, .*{why}"):
            lora_linear(**args, scale=scale, dropout_p=p)
        with fp.backend("cpu"), pytest.raises(RuntimeError, match=f"^lora_linear_group: backend 'cpu' .*{why}"):
            lora_linear_group(*one, scales=[scale], dropout_p=p)
        with fp.backend("torch"):
            (y,) = lora_linear_group(*one, scales=[scale], dropout_p=p)
            assert torch.equal(y, lora_linear(**args, scale=scale, dropout_p=p))
    assert fp.backends.choice.forced() == ""


# ---- fp.nn.LoraLinear ----------------------------------------------------------------------------


def module(dtype=torch.bfloat16, **kwargs):
    layer = fp.nn.LoraLinear(torch.nn.Linear(24, 16, dtype=dtype), r=4, **kwargs)
    torch.nn.init.normal_(layer.lora_b)
    return layer


@torch.no_grad()
def exact_layer(layer, x):
    """What an unmerged LoraLinear computes, in float64."""
    base, a, b = layer.base, layer.lora_a.double(), layer.lora_b.double()
    return F.linear(x.double(), base.weight.double() + layer.scale * (b @ a), base.bias.double())


def test_module_starts_as_its_base_and_trains():
    layer = fp.nn.LoraLinear(torch.nn.Linear(24, 16), r=4)
    x = torch.randn(5, 24)
    assert_close(layer(x), layer.base(x), exact_layer(layer, x))
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    before, losses = layer.base.weight.clone(), []
    for _ in range(20):
        loss = layer(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and torch.equal(layer.base.weight, before)
    assert layer.lora_a.grad.dtype == torch.float32


def test_module_merge_unmerge_disable():
    layer = module()
    x, weight = torch.randn(5, 24).bfloat16(), layer.base.weight.clone()
    y, exact = layer(x), exact_layer(layer, x)
    update = layer.scale * (layer.lora_b @ layer.lora_a).detach()
    layer.merge()
    assert_close(layer(x), F.linear(x, (weight.float() + update).bfloat16(), layer.base.bias), exact)
    with pytest.raises(RuntimeError, match="already merged"):
        layer.merge()
    with pytest.raises(RuntimeError, match=r"merged; unmerge\(\) first"):
        layer.disable()
    layer.unmerge()
    assert torch.equal(layer.base.weight, weight) and torch.equal(layer(x), y)
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()
    layer.disable()
    assert torch.equal(layer(x), layer.base(x))
    layer.enable()
    assert torch.equal(layer(x), y)
    layer.merge(keep_original=False)
    merged = layer.base.weight.double()
    layer.unmerge()
    left = layer.base.weight.double()
    # two sums, each rounded to float32 and then to bfloat16: by half an ulp, at most 2^-8 of the bfloat16 result
    rounding = (2**-8 + 2**-23) * (merged.abs() + left.abs())
    assert ((left - weight.double()).abs() <= rounding).all()
    with torch.no_grad():
        layer.lora_b[0, 0] = float("inf")
    before = layer.base.weight.clone()
    with pytest.raises(ValueError, match="NaN or Inf; nothing was changed"):
        layer.merge()
    assert torch.equal(layer.base.weight, before) and not layer.merged


def test_module_copies():
    layer = module()
    x = torch.randn(5, 24).bfloat16()
    y = layer(x)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = module()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert torch.equal(twin(x), y)
    assert set(layer.state_dict()) == {"base.weight", "base.bias", "lora_a", "lora_b"}
    assert "r=4, alpha=32, dropout=0.0" in repr(layer)


def test_module_dropout_only_in_training():
    layer = module(dropout=0.5)
    x = torch.randn(5, 24).bfloat16()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_module_bad_input():
    with pytest.raises(TypeError, match="base must be a torch.nn.Linear, got Conv1d"):
        fp.nn.LoraLinear(torch.nn.Conv1d(1, 1, 1))
    for r in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="r must be an int of at least 1"):
            fp.nn.LoraLinear(torch.nn.Linear(2, 2), r=r)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1"):
        fp.nn.LoraLinear(torch.nn.Linear(2, 2), dropout=1)
