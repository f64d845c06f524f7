"""The Triton kernels of linear4bit through their launchers: the weight to the bit, the GEMMs against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from _close import assert_close
from conftest import HAS_GPU, HAS_TRITON

from fastpeft import native
from fastpeft.ops import quantize_4bit
from fastpeft.reference import linear4bit as reference
from fastpeft.reference import lora_linear as lora_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SHAPES = [  # M, N, K, R
    (1, 1, 1, 1),
    (3, 5, 7, 2),  # odd: a byte may hold codes of two rows
    (2, 24, 36, 4),  # words of 8 codes would cross rows
    (16, 64, 128, 16),
    (17, 33, 272, 16),  # K % blocksize = 16, as in SigLIP's 4304
    (40, 48, 88, 5),
    (60, 20, 1032, 8),  # the sum in parts
    (130, 40, 520, 33),
    (200, 131, 65, 3),
]


@pytest.fixture(params=[*(["cpu"] if HAS_TRITON and not HAS_GPU else []), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture
def kernels():
    launchers = native.triton("linear4bit")
    if launchers is None:
        pytest.skip(native.why_not_triton("linear4bit"))
    return launchers


def packed(n, k, device, quant_type="nf4", blocksize=64, nested=False, w=None):
    """A weight in bitsandbytes' order, and what it stands for in float32, by the reference."""
    w = torch.randn(n, k) / max(k, 1) ** 0.5 if w is None else w
    weight = quantize_4bit(w, quant_type=quant_type, blocksize=blocksize, double_quant=nested).untile()
    return weight.to(device), weight.dequantize(torch.float32).to(device)


def layer(m, n, k, r, dtype, device):
    """x, dy, s, a, b, bias, lora_bias; values of the size that layers see"""
    x, dy = (torch.randn(m, size).to(device, dtype) for size in (k, n))
    s = torch.randn(m, r).to(device, lora_reference.ranks_dtype(dtype))
    a, b = (torch.randn(r, k) / k**0.5).to(device), (torch.randn(n, r) / r**0.5).to(device)
    return x, dy, s, a, b, torch.randn(n).to(device, dtype), torch.randn(n).to(device)


def composed(x, w, s, b, bias, lora_bias, scale):
    return F.linear(x, w, bias.to(x.dtype)) + scale * F.linear(s.to(x.dtype), b.to(x.dtype)) + lora_bias.to(x.dtype)


def project(kernels, x, weight, bias=None, lora_bias=None, s=None, b=None, scale=None):
    """One projection; `s` may have columns of one before it."""
    before = 0 if b is None else s.shape[1] - b.shape[1]
    if not before:
        return kernels.project(x, [weight], [bias], s, [b], [scale], [lora_bias])[0]
    first, *_ = packed(1, x.shape[1], x.device)
    bs = [torch.ones(1, before, device=x.device), b]
    return kernels.project(x, [first, weight], [None, bias], s, bs, [None, scale], [None, lora_bias])[1]


def check_project(kernels, weight, w, inputs, scale=0.75):
    x, _, s, _, b, bias, lora_bias = inputs
    rows = [x, w.to(x.dtype), s, b, bias, lora_bias]
    y = project(kernels, x, weight, bias, lora_bias, s, b, torch.tensor(scale).to(x.device))
    exact = composed(*(t.double() for t in rows), scale)
    terms = composed(*(t.double().abs() for t in rows), abs(scale))
    assert y.dtype == x.dtype
    assert_close(y, composed(*rows, scale), exact, "y", eps=EPS[x.dtype], terms=terms)
    return y


def check_combine(kernels, weights, ws, dys, t, a, live=None, p=0.0, seed=None):
    """Of a group; a: one a projection, live: which have a dy."""
    live = [True] * len(ws) if live is None else live
    dtype = dys[0].dtype
    dys = [dy if here else None for dy, here in zip(dys, live)]

    def product(change):
        dx, column = 0, 0
        for i, (dy, w, a_i) in enumerate(zip(dys, ws, a)):
            columns = slice(column, column + (0 if a_i is None else a_i.shape[0]))
            column = columns.stop
            if dy is None:
                continue
            dx = dx + change(dy) @ change(w.to(dtype))
            if a_i is not None:
                term = change(t[:, columns]) @ change(a_i)
                dx = dx + (lora_reference.drop(term, p, seed, i) if p else term)
        return dx

    dx = kernels.combine(dys, weights, t, a, live, p, seed)
    exact, terms = product(torch.Tensor.double), product(lambda v: v.double().abs())
    assert dx.dtype == dtype
    assert_close(dx, product(lambda v: v.to(dtype)), exact, "dx", eps=EPS[dtype], terms=terms)
    return dx


# ---- the weight, to the bit ----------------------------------------------------------------------


def test_code_books(kernels):
    for quant_type in ("nf4", "fp4"):
        arguments = kernels._scales(quantize_4bit(torch.randn(4, 64), quant_type=quant_type, double_quant=True))
        assert torch.equal(arguments["map_ptr"].cpu(), reference.dynamic_map())
        assert torch.equal(arguments["book_ptr"].cpu(), reference.codebook(quant_type))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_dequantize_is_bitwise(kernels, device, quant_type, blocksize, nested):
    for n, k in ((1, 1), (7, 37), (33, 272), (16, 520), (160, 131)):
        weight, _ = packed(n, k, device, quant_type, blocksize, nested)
        for dtype in DTYPES:
            assert torch.equal(kernels.dequantize(weight, dtype), weight.dequantize(dtype)), (n, k, dtype)


@pytest.mark.parametrize("nested", [False, True])
def test_more_than_256_scales(kernels, device, nested):
    weight, _ = packed(70, 257, device, blocksize=32, nested=nested)
    assert torch.equal(kernels.dequantize(weight, torch.float32), weight.dequantize(torch.float32))


def test_blocks_of_zeros_and_empty_weights(kernels, device):
    w = torch.randn(4, 64)
    w[1], w[3] = 0.0, 0.0
    for quant_type in ("nf4", "fp4"):
        weight, exact = packed(4, 64, device, quant_type, w=w)
        on_cuda = replace(weight, data=weight.data.clone())
        on_cuda.data.view(4, 32)[1] = 0  # bitsandbytes' code for them on CUDA: -1 of a scale of 0
        on_cuda.scales[[1, 3]] = 0.0
        out = kernels.dequantize(on_cuda, torch.float32)
        assert not out[1].any() and torch.equal(out[::2], exact[::2])
    for n, k in ((0, 8), (8, 0)):
        weight, _ = packed(n, k, device)
        assert kernels.dequantize(weight, torch.float32).shape == (n, k)


# ---- the GEMMs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(kernels, device, dtype, shape):
    m, n, k, r = shape
    weight, w = packed(n, k, device, nested=m % 2 == 0)
    inputs = layer(m, n, k, r, dtype, device)
    check_project(kernels, weight, w, inputs)
    _, dy, t, a, *_ = inputs
    check_combine(kernels, [weight], [w], [dy], t, [a])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_formats(kernels, device, quant_type, blocksize, nested):
    for n, k in ((40, 136), (21, 45)):
        weight, w = packed(n, k, device, quant_type, blocksize, nested)
        inputs = layer(19, n, k, 4, torch.bfloat16, device)
        check_project(kernels, weight, w, inputs)
        check_combine(kernels, [weight], [w], [inputs[1]], inputs[2], [inputs[3]])


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("m", [9, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_group(kernels, device, dtype, m, p):
    """Each GEMM onto what the one before left; the rank-R terms of all with the last, of one whose output is unused none."""
    n, k, ranks, live = 72, 200, (4, 17, 0, 9, 3), [True, True, True, False, True]
    weights, ws = zip(*(packed(n, k, device, nested=True) for _ in ranks))
    dys = [torch.randn(m, n).to(device, dtype) for _ in ranks]
    t = torch.randn(m, sum(ranks)).to(device, dtype)
    a = [(torch.randn(rank, k) / k**0.5).to(device) if rank else None for rank in ranks]
    seed = torch.tensor(2**40 + 5).to(device) if p else None
    check_combine(kernels, weights, ws, dys, t, a, live, p, seed)
    check_combine(kernels, weights[:2], ws[:2], dys[:2], t[:, :0], [None, None])


@pytest.mark.parametrize("m", [5, 140])
def test_without_an_adapter_and_with_a_span(kernels, device, m):
    n, k = 24, 72
    weight, w = packed(n, k, device)
    x, _, s, _, b, bias, _ = layer(m, n, k, 6, torch.bfloat16, device)
    y = project(kernels, x, weight, bias)
    low = w.to(x.dtype)
    assert_close(y, F.linear(x, low, bias), F.linear(x.double(), low.double(), bias.double()), "base alone")
    wide, scale = torch.cat([s * float("nan"), s], 1), torch.linspace(-1, 1, 12, device=device)[::2]
    y = project(kernels, x, weight, None, None, wide, b, scale)
    same = F.linear(x, low) + F.linear(s, (b * scale).to(x.dtype))
    assert_close(y, same, F.linear(x.double(), low.double()) + F.linear(s.double(), (b * scale).double()), "span")


@pytest.mark.parametrize("m", [3, 140])
def test_slices(kernels, device, m):
    """x and dy are columns of something wider that holds NaN; the bytes start where no word may."""
    n, k = 40, 72
    weight, w = packed(n, k, device)
    shifted = replace(weight, data=torch.cat([weight.data[:1], weight.data])[1:])
    x, dy, s, a, b, bias, lora_bias = layer(m, n, k, 4, torch.bfloat16, device)
    nan = torch.full((m, 8), float("nan"), dtype=x.dtype, device=device)
    sliced = torch.cat([x, nan], 1)[:, :k]
    expected = check_project(kernels, weight, w, (x, dy, s, a, b, bias, lora_bias))
    for packed_as in (weight, shifted):
        assert torch.equal(check_project(kernels, packed_as, w, (sliced, dy, s, a, b, bias, lora_bias)), expected)
        check_combine(kernels, [packed_as], [w], [torch.cat([dy, nan], 1)[:, :n]], s, [a])


@pytest.mark.parametrize("m", [4, 70])
def test_nan_stays_in_its_row(kernels, device, m):
    weight, _ = packed(24, 70, device)
    x, dy, s, a, b, *_ = layer(m, 24, 70, 4, torch.float32, device)
    x[1, 7] = dy[1, 3] = float("nan")
    for out in (project(kernels, x, weight, s=s, b=b), kernels.combine([dy], [weight], s, [a], [True])):
        assert out[1].isnan().all() and torch.isfinite(out[torch.arange(m) != 1]).all()


@pytest.mark.parametrize("m", [6, 150])
def test_bitwise_repeatable(kernels, device, m):
    weight, _ = packed(48, 1100, device, nested=True)
    x, _, s, _, b, bias, _ = layer(m, 48, 1100, 8, torch.bfloat16, device)
    ys = [project(kernels, x, weight, bias, s=s, b=b) for _ in range(2)]
    assert torch.equal(*ys)


def test_no_rows_and_no_columns(kernels, device):
    for m, n, k in ((0, 24, 72), (3, 0, 72), (3, 24, 0)):
        weight, _ = packed(n, k, device)
        x, dy, s = (torch.randn(m, size, device=device) for size in (k, n, 4))
        a, b = torch.randn(4, k, device=device), torch.randn(n, 4, device=device)
        y, dx = project(kernels, x, weight, s=s, b=b), kernels.combine([dy], [weight], s, [a], [True])
        assert y.shape == (m, n) and dx.shape == (m, k)
        torch.testing.assert_close(y, s @ b.t() if k == 0 else torch.zeros_like(y))
        torch.testing.assert_close(dx, s @ a if n == 0 else torch.zeros_like(dx))
