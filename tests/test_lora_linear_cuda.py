"""The CUDA C++ passes of lora_linear where there is no GPU: compiled for the CPU on tests/cuda/emulate.h, and run.

With `cuda@cuda` the numeric tests run on a GPU, on the module that was built for it.
"""

from __future__ import annotations

from functools import partial

import _cuda_emulation
import pytest
import torch
from _guarded import Memory
from test_linear4bit import check_all as check_4bit
from test_lora_linear import check_all, problem

import fastpeft as fp
from fastpeft import native
from fastpeft.ops import BACKENDS, lora_linear_cuda, lora_linear_gpu, lora_linear_group
from fastpeft.ops._backend import Backend

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
    forward, backward = (
        partial(f, lambda: lora_linear_cuda) for f in (lora_linear_gpu.forward, lora_linear_gpu.backward)
    )
    monkeypatch.setitem(BACKENDS, "cuda", Backend(lambda meta: None, forward, backward))
    with fp.backend("cuda"):
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


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("k", [64, 61])
def test_reads_and_writes_stay_inside(backend, k):
    """Every operand ends at a page that may not be touched; gaps between rows are NaN and stay what they were."""
    memory, dtype = Memory(), torch.bfloat16
    m, r = 67, 12
    x = memory.copy(torch.randn(m, k), dtype, gap=8)
    a = memory.copy(torch.randn(r, k), torch.float32)
    s = memory.empty(m, r, dtype, gap=4)
    span = lora_linear_cuda.Span(0, r, 0)
    lora_linear_cuda.down(x, [a], [span], s, 0.0, None)
    exact = x.double() @ a.to(dtype).double().t()
    assert (s.double() - exact).norm() <= 2**-8 * exact.norm()
    assert s.as_strided((m - 1, 4), (r + 4, 1), s.storage_offset() + r).isnan().all()
    out = memory.copy(torch.randn(m, k), dtype, gap=8)
    exact = out.double() + exact.to(dtype).double() @ a.to(dtype).double()
    lora_linear_cuda.add_down(out, s, [a], [span], 0.0, None)
    assert (out.double() - exact).norm() <= 2**-7 * exact.norm()
    da = memory.empty(r, k, torch.float32)
    lora_linear_cuda.grad_down(x, s, [da], [span], 0.0, None)
    exact = s.double().t() @ x.double()
    assert (da.double() - exact).norm() <= 2**-12 * exact.norm()
    ds, db, dbias = memory.empty(m, r, dtype), memory.empty(k, r, torch.float32), memory.empty(1, k, torch.float32)
    lora_linear_cuda.grad_up(x, s, memory.copy(torch.randn(k, r), torch.float32), torch.ones(()), ds, db, dbias[0])
    for t in (ds, db, dbias):
        assert t.isfinite().all()
    memory.close()


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
