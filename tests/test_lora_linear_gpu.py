"""What only a CUDA GPU can show of lora_linear: graphs, streams, devices, no synchronisation, sizes past 2^31.

The numeric tests run there too, by the parameters `torch@cuda` and `triton@cuda` of the fixture `backend` (those of the
CUDA C++ passes: `cuda@cuda` in test_lora_linear_cuda.py).
"""

from __future__ import annotations

import pytest
import torch

import fastpeft as fp
from fastpeft.backends import plans
from fastpeft.ops import lora_linear, lora_linear_group

pytestmark = pytest.mark.gpu
FUSED_FROM = {"torch's GEMM": {}, "fused": {"float32": 1, "bfloat16": 1, "float16": 1}}


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    with fp.backend(request.param):
        yield request.param


@pytest.fixture(params=FUSED_FROM)
def plan(request, backend):
    if backend == "cuda" and request.param == "fused":
        pytest.skip("the CUDA C++ passes stand around PyTorch's GEMM alone")
    with plans.override("gpu", fused_from_m={torch.cuda.get_device_name(): FUSED_FROM[request.param]}):
        yield


def layer(m=300, k=512, ns=(384, 128), r=16, dtype=torch.bfloat16, device="cuda"):
    """x, weights, a, b, dys of a group"""
    randn = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
    x = randn(m, k).to(dtype).requires_grad_()
    weights = [(randn(n, k) / k**0.5).to(dtype) for n in ns]
    a = [(randn(r, k) / k**0.5).requires_grad_() for _ in ns]
    b = [(randn(n, r) / r**0.5).requires_grad_() for n in ns]
    return x, weights, a, b, [randn(m, n).to(dtype) for n in ns]


def step(x, weights, a, b, dys, p=0.1, seed=3):
    ys = lora_linear_group(x, weights, a, b, scales=[0.5] * len(a), dropout_p=p, seed=seed)
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, [x, *a, *b], dys)]


def assert_same(got, expected):
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_bitwise_equal_twice(plan):
    inputs = layer()
    assert_same(step(*inputs), step(*inputs))


@pytest.mark.verifies("lora_linear_group", "graph", dtype="bfloat16")
def test_graph_replay(plan):
    inputs = layer()
    side = torch.cuda.Stream()
    seed = torch.tensor(3, device="cuda")
    with torch.cuda.stream(side):
        for _ in range(2):
            step(*inputs, seed=seed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*inputs, seed=seed)
    for value in (5, 6):
        with torch.no_grad():
            inputs[0].copy_(torch.randn_like(inputs[0]))
        seed.fill_(value)
        for t in captured:
            t.fill_(float("nan"))
        graph.replay()
        assert_same(captured, step(*inputs, seed=value))


def test_side_stream(plan):
    inputs = layer()
    expected = step(*inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = step(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    assert_same(got, expected)


def test_other_device(plan):
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    inputs = layer(device="cuda:1")
    for t in step(*inputs):
        assert t.device.index == 1 and torch.isfinite(t).all()


def test_no_synchronisation(plan):
    inputs = layer()
    step(*inputs, seed=None)  # Triton compiles and loads
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*inputs, seed=None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.verifies("lora_linear", "compile", dtype="bfloat16")
def test_compile(plan):
    x, (weight, _), (a, _), (b, _), (dy, _) = layer()

    def call(x):
        return torch.relu(lora_linear(x, weight, a, b, scale=0.5))

    compiled = torch.compile(call, fullgraph=True)
    got, expected = compiled(x), call(x)
    torch.testing.assert_close(got, expected)
    for one, other in zip(torch.autograd.grad(got, [x, a, b], dy), torch.autograd.grad(expected, [x, a, b], dy)):
        torch.testing.assert_close(one, other)


def test_past_int32(plan):
    """M·N and M·K above 2^31 elements: the last rows are those of a call on them alone."""
    m, k = 2**19 + 7, 4096
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GB of GPU memory")
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(k, k, device="cuda", dtype=torch.bfloat16) / k**0.5
    a, b = torch.randn(16, k, device="cuda") / k**0.5, torch.randn(k, 16, device="cuda") / 4
    with torch.no_grad():
        y = lora_linear(x, weight, a, b)
        tail = lora_linear(x[-64:].clone(), weight, a, b)
    assert (y[-64:] - tail).abs().max() <= 2**-6 * tail.abs().max()


def test_memory_is_what_the_result_needs(plan):
    """Beyond its results a step keeps partial sums alone: under a quarter of them at this size."""
    inputs = layer(m=4096, k=2048, ns=(2048, 2048))
    results = sum(t.numel() * t.element_size() for t in step(*inputs))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = step(*inputs)
    assert torch.cuda.max_memory_allocated() - before < 1.25 * results
    del kept
