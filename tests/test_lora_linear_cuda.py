"""The CUDA C++ passes of lora_linear where there is no GPU: compiled for the CPU on tests/cuda/emulate.h, and run.

With `cuda@cuda` the numeric tests run on a GPU, on the module that was built for it.
"""

from __future__ import annotations

import _cuda_emulation
import pytest
import torch
from _guarded import Memory
from test_fp16_gradients import HALF, SIZES
from test_fp16_gradients import check as check_range
from test_linear4bit import check_all as check_4bit
from test_lora_linear import check_all, problem

import fastpeft as fp
from fastpeft import native
from fastpeft.backends import plans
from fastpeft.backends.cuda import lora_linear as cuda
from fastpeft.ops import lora_linear_group
from fastpeft.reference import lora_linear as reference

HALVES = [torch.bfloat16, torch.float16]
SHAPES = [  # M, K, N, R
    (1, 1, 1, 1),
    (1, 64, 48, 16),
    (7, 37, 53, 3),
    (65, 129, 31, 17),
    (50, 72, 40, 6),
    (70, 136, 264, 8),
    (130, 40, 24, 100),
    (5, 24, 16, 512),
]


@pytest.fixture(params=["cuda", pytest.param("cuda@cuda", marks=pytest.mark.gpu)])
def backend(request, monkeypatch):
    if request.param == "cuda@cuda":
        with torch.device("cuda"), fp.backend("cuda"):
            yield request.param
        return
    module = _cuda_emulation.module()
    monkeypatch.setattr(native, "cuda", lambda: module)
    monkeypatch.setattr(cuda, "can", lambda meta: None)
    with fp.backend("cuda"), plans.override("gpu", fused_to_m_4bit=0):  # nothing of Triton's
        yield request.param


@pytest.mark.verifies("lora_linear", "forward", "backward")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(backend, dtype, shape):
    check_all(problem(*shape, dtype))


@pytest.mark.parametrize("adapter_dtype", HALVES, ids=str)
def test_adapters_in_other_dtypes(backend, adapter_dtype):
    check_all(problem(37, 70, 45, 12, torch.bfloat16, adapter_dtype=adapter_dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64, 48, 16), (7, 37, 53, 3), (70, 136, 61, 40)], ids=str)
def test_dropout_against_float64(backend, dtype, shape):
    check_all(problem(*shape, dtype), p=0.3, seed=2**40 + 12345)


@pytest.mark.verifies("lora_linear_group", "forward", "backward", dtype="bfloat16")
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("ranks", [(16, 8, 40), (3, 0, 20), (8,) * 10], ids=str)
def test_group(backend, p, ranks):
    """Ranks that fill chunks and that do not, a projection without an adapter, more projections than one launch takes."""
    m, k, dtype = 70, 136, torch.bfloat16
    x = torch.randn(m, k).to(dtype).requires_grad_()
    weights = [(torch.randn(24 + 8 * i, k) / k**0.5).to(dtype) for i in range(len(ranks))]
    a = [(torch.randn(r, k) / k**0.5).requires_grad_() if r else None for r in ranks]
    b = [(torch.randn(w.shape[0], r) / r**0.5).requires_grad_() if r else None for w, r in zip(weights, ranks)]
    dys = [torch.randn(m, w.shape[0]).to(dtype) for w in weights]

    def results(name):
        with fp.backend(name):
            ys = lora_linear_group(x, weights, a, b, scales=[0.5] * len(ranks), dropout_p=p, seed=9)
            live = [t for t in (*a, *b) if t is not None]
            return [*(y.detach() for y in ys), *torch.autograd.grad(ys, [x, *live], dys)]

    for got, expected in zip(results("cuda"), results("torch")):
        assert (got - expected).double().norm() <= 2**-6 * expected.double().norm()


@pytest.fixture
def guarded():
    """Memory whose last element is followed by a page that may not be touched; the module's results and workspaces too."""
    memory, dtypes = Memory(), (torch.float32, torch.bfloat16, torch.float16)
    shapes = []

    def allocate(shape, code):
        shapes.append(tuple(shape))
        rows = 1
        for size in shape[:-1]:
            rows *= size
        return memory.empty(rows, shape[-1], dtypes[code]).view(shape)

    module = _cuda_emulation.module()
    module.set_allocator(allocate)
    memory.shapes = shapes
    yield memory
    module.set_allocator(None)
    memory.close()


def close(got, expected, bound):
    return (got.double() - expected.double()).norm() <= bound * expected.double().norm()


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("k", [64, 61])
def test_reads_and_writes_stay_inside(backend, guarded, k):
    """Every operand ends at a page that may not be touched; gaps between rows are NaN and stay what they were."""
    dtype, one, (m, n, ranks) = torch.bfloat16, torch.ones(()), (67, 21, (12, 5))
    x = guarded.copy(torch.randn(m, k), dtype, gap=8)
    a = [guarded.copy(torch.randn(r, k), torch.float32) for r in ranks]
    s = cuda.down(x, a, 0.0, None)
    exact = x.double() @ torch.cat(a).to(dtype).double().t()
    assert close(s, exact, 2**-8)
    s = guarded.copy(s, dtype, gap=4)
    for dx in (None, guarded.copy(torch.randn(m, k), dtype, gap=8)):
        rounded = s.double() @ torch.cat(a).to(dtype).double()
        expected = None if dx is None else dx.double() + rounded
        got, das = cuda.grad_down(dx, x, s, a, (True, True), (True, True), 0.0, None)
        assert got is dx and (dx is None or close(dx, expected, 2**-7))
        assert close(torch.cat(das), s.double().t() @ x.double(), 2**-12)
        assert dx is None or dx.as_strided((m - 1, 8), (k + 8, 1), dx.storage_offset() + k).isnan().all()
    b = [guarded.copy(torch.randn(n, r), torch.float32) for r in ranks]
    ys = [guarded.copy(torch.randn(m, n), dtype, gap=3) for _ in ranks]
    expected = reference.up(
        [y.double() for y in ys], s.double(), [b_i.double() for b_i in b], [one, one], (None, ys[1][0].double())
    )
    bias = guarded.copy(ys[1][:1], dtype)[0]
    cuda.up(ys, s, b, [one, one], (None, bias))
    for y, exact in zip(ys, expected):
        assert close(y, exact, 2**-6)
        assert y.as_strided((m - 1, 3), (n + 3, 1), y.storage_offset() + n).isnan().all()
    arguments = s, b, [one, one], True, (True, True), (True, True)
    found, expected = cuda.grad_up(ys, *arguments), reference.grad_up(ys, *arguments)
    assert close(found[0], expected[0], 2**-5)
    for got, exact in zip([*found[1], *found[2]], [*expected[1], *expected[2]], strict=True):
        assert close(got, exact, 2**-5)
    assert (m, sum(ranks)) in guarded.shapes and (32, max(8, -(-k // 8) * 8)) in guarded.shapes  # s; a packed


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_a_projection_without_a_gradient_is_left_out(backend, guarded):
    """Its t is 0, and no garbage there reaches another's gradients."""
    dtype, one, (m, k, n) = torch.bfloat16, torch.ones(()), (35, 40, 24)
    x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    a, b = [torch.randn(r, k) for r in (4, 6, 3)], [torch.randn(n, r) for r in (4, 6, 3)]
    s, live, yes = cuda.down(x, a, 0.0, None), (True, False, True), (True,) * 3
    t, dbs, dbiases = cuda.grad_up([dy, None, dy], s, b, [one] * 3, True, yes, yes)
    assert not t[:, 4:10].any() and dbs[1] is dbiases[1] is None
    t[:, 4:10] = float("nan")
    dx, das = cuda.grad_down(torch.zeros_like(x), x, t, a, live, yes, 0.0, None)
    assert das[1] is None and close(das[2], t[:, 10:].double().t() @ x.double(), 2**-8)
    assert close(dx, t[:, :4].double() @ a[0].to(dtype).double() + t[:, 10:].double() @ a[2].to(dtype).double(), 2**-7)


def test_what_does_not_fit_is_refused(backend):
    """Before anything is read or written: sizes, dtypes, devices and lengths that the kernels would take at their word."""
    x, half = torch.randn(5, 16), torch.bfloat16
    a, b, one, yes = torch.randn(4, 16), torch.randn(8, 4), torch.ones(()), (True,)
    s, y = torch.randn(5, 4).to(half), torch.zeros(5, 8).to(half)
    refused = [
        (lambda: cuda.down(x, (a,), 0.0, None), r"lora_linear_down: x must be .*bfloat16 or float16, got \[5, 16\]"),
        (lambda: cuda.down(x.to(half), (a[:, 1:],), 0.0, None), r"a must be \[R, K\] = \[R, 16\], got \[4, 15\]"),
        (lambda: cuda.down(x.to(half), (a.t().contiguous().t(),), 0.0, None), "a must be .*contiguous rows"),
        (lambda: cuda.down(x.to(half), (a.double(),), 0.0, None), "a must be float32, bfloat16 or float16"),
        (lambda: cuda.down(x.to(half), (a,), 0.5, None), r"seed must be \[\], int64, got None"),
        (lambda: cuda.up((y.half(),), s.half(), (b,), (one,), (None,)), r"s must be \[5, 4\], .*right dtype"),
        (lambda: cuda.up((y,), s[:, :3], (b,), (one,), (None,)), r"s must be \[5, 4\].* got \[5, 3\]"),
        (lambda: cuda.up((y[:4],), s, (b,), (one,), (None,)), "y must be"),
        (lambda: cuda.up((y[:, :7],), s, (b,), (one,), (None,)), r"b must be \[N, R\] = \[7, R\]"),
        (lambda: cuda.up((y,), s, (b,), (one.double(),), (None,)), "scale must be"),
        (lambda: cuda.up((y, y), s, (b,), (one,), (None,)), "entry a projection"),
        (lambda: cuda.up((y,), s, (b,), (one,), (b[0],)), r"lora_bias must be \[8\]"),
        (lambda: cuda.grad_up((y[:4],), s, (b,), (one,), True, yes, yes), "dy must be"),
        (lambda: cuda.grad_down(None, None, s, (a,), yes, yes, 0.0, None), "x must be a tensor where dA is needed"),
        (lambda: cuda.grad_down(x, None, s, (a,), yes, (False,), 0.0, None), "dx must be"),
    ]  # fmt: skip
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()
    assert not y.any()
    if backend == "cuda@cuda":
        with pytest.raises(ValueError, match="on the other tensors' device"):
            cuda.down(x.to(half), (a.cpu(),), 0.0, None)
        with pytest.raises(ValueError, match="on a CUDA device"):
            cuda.down(x.to(half).cpu(), (a.cpu(),), 0.0, None)


def test_not_a_number_reaches_the_result_and_nothing_else(backend):
    inputs = problem(5, 40, 24, 8, torch.bfloat16)
    with torch.no_grad():
        inputs["x"][2, 3] = float("nan")
    y = fp.ops.lora_linear(**inputs)
    assert y[2].isnan().all() and not y[[0, 1, 3, 4]].isnan().any()


@pytest.mark.verifies("lora_linear over Weight4bit", "forward", "backward")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("m", [1, 7, 16, 40])
def test_lora_linear_over_4bit(backend, m, dtype):
    """The whole op on this backend: the kernel of few rows, or a decoded weight, with the rank-R passes around it."""
    check_4bit(m, 128, 72, 6, dtype, double_quant=m % 2 == 1)
    check_4bit(m, 37, 21, 3, dtype, p=0.2, seed=5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "4-bit"])
@pytest.mark.parametrize("m", [3, 70])
def test_fp16_keeps_its_range(backend, m, packed, size):
    check_range(m, size, packed, 0.0, HALF)
    check_range(m, size, packed, 0.3, HALF, group=False)


@pytest.mark.parametrize("m", [7, 40])
def test_the_base_has_the_same_bits_with_an_adapter(backend, m):
    """One of zeros: in the kernel of few rows over 4-bit weights, and around a GEMM."""
    x, w, zeros = torch.randn(m, 128).bfloat16(), torch.randn(72, 128), (torch.randn(4, 128), torch.zeros(72, 4))
    for weight in (w.bfloat16(), fp.ops.quantize_4bit(w).to(x.device)):
        for p in (0.0, 0.5):
            y = fp.ops.lora_linear(x, weight, *zeros, dropout_p=p, seed=1)
            assert torch.equal(y, fp.ops.lora_linear(x, weight, None, None))
