"""The GPU suite's 4-bit rows on a CPU (tiny shapes, wall time), its verdicts and its plan on synthetic timings."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import HAS_GPU, HAS_TRITON

from benches import _cuda, _gpu_4bit, _gpu_report, _measure, gate, gpu_suite
from benches._gpu_4bit import BEST, BYTES, DECODE, DECODED, FUSED, GRAD, LORA, MATMUL, SMALL, THEIR_DENSE, Case
from benches._measure import AGAIN, FROZEN, Samples
from benches._peers import OURS
from benches.bench_lora_linear import BOTH, FORWARD, Limit
from fastpeft import native
from fastpeft.backends.cuda import lora_linear as cuda

TINY = [Case(64, 48, 3, FORWARD), Case(64, 48, 3, GRAD), Case(64, 48, 3, BOTH), Case(64, 48, 0, DECODE)]


@pytest.fixture(autouse=True)
def _every_round_counts(monkeypatch):
    monkeypatch.setattr(_measure, "DELAY_LIMIT", math.inf)  # on a busy machine too


@pytest.fixture
def without_bitsandbytes(monkeypatch):
    monkeypatch.setattr(_gpu_4bit, "bitsandbytes", lambda device: None)
    _gpu_4bit.weights_of.cache_clear()
    yield
    _gpu_4bit.weights_of.cache_clear()


def test_collection_without_bitsandbytes(tmp_path, monkeypatch, one_thread, without_bitsandbytes):
    monkeypatch.setattr(gpu_suite, "others", lambda device, seconds: [])
    monkeypatch.setattr(gpu_suite, "MOST", 0.05)
    found = json.loads(json.dumps(gpu_suite.collect("cpu", 600.0, TINY)))
    assert not found["failed"]
    assert [row["key"] for row in found["rows"]] == [f"{case.name}, wall" for case in TINY]
    assert [set(row["time"]) for row in found["rows"]] == [{FROZEN}, {FROZEN}, {FROZEN, LORA}, {_gpu_4bit.COPY}]
    for row in found["rows"]:
        assert not row["wrong"], row["error"]
        assert not row["plans"] and row["roofline"] > 0 and row["copy_share"] > 0 and not row["targets"]
    assert found["plan_4bit"] is None
    text = _gpu_report.text(found)
    assert all(case.name in text for case in TINY) and "fused_to_m" not in text
    assert [path.name for path in _gpu_report.plots(found, tmp_path)] == ["gpu-speed.png"]
    assert gate.compare(found, copy.deepcopy(found)).exit_code == 0


def test_collection_beside_bitsandbytes(one_thread):
    pytest.importorskip("bitsandbytes")
    _gpu_4bit.weights_of.cache_clear()
    peers = [{MATMUL, THEIR_DENSE}, {MATMUL}, {_gpu_4bit.PEFT_4BIT}, {MATMUL}]
    for case, names in zip(TINY, peers, strict=True):
        (row,) = gpu_suite.measure(case, 0.0, "cpu")
        assert not row["wrong"] and names <= set(row["time"]) and row["best_peer"] in row["time"]


def test_a_row_that_fails_is_named_and_the_others_go_on(monkeypatch, one_thread, without_bitsandbytes):
    monkeypatch.setattr(gpu_suite, "others", lambda device, seconds: [])
    monkeypatch.setattr(gpu_suite, "MOST", 0.0)
    monkeypatch.setattr(_gpu_4bit, "our_grad", lambda dy, weight: 1 / 0)
    found = gpu_suite.collect("cpu", 600.0, TINY[:2])
    assert list(found["failed"]) == [TINY[1].name] and len(found["rows"]) == 1


def test_wrong_functions_and_those_that_cannot_be_prepared(without_bitsandbytes):
    case, of = TINY[0], torch.randn(3, 64).to(torch.bfloat16)
    weights = _gpu_4bit.weights_of(64, 48, "cpu")
    found = _gpu_4bit.providers(case, weights, of)
    found[FUSED] = lambda: found[OURS]() * 1.02
    with torch.no_grad():
        assert _gpu_4bit.check(case, weights, of, found)[1] == {FUSED}

    def prepare(function):
        if function is found[FUSED]:
            raise RuntimeError("not while a graph is captured")
        return function

    ready, notes = _gpu_4bit.prepared(found, prepare, must=(FROZEN, OURS))
    assert set(ready) == {FROZEN, OURS} and "captured" in notes[FUSED]
    with pytest.raises(RuntimeError):
        _gpu_4bit.prepared(found, prepare, must=(FUSED,))


@pytest.mark.skipif(HAS_GPU or not HAS_TRITON, reason="runs in Triton's interpreter, where there is no GPU")
@pytest.mark.parametrize("case", [Case(64, 48, 3, FORWARD), Case(64, 48, 3, GRAD)], ids=lambda case: case.what)
@pytest.mark.parametrize("passes", ["cuda", "triton"])
def test_every_plan_computes_the_same(case, passes, monkeypatch, without_bitsandbytes):
    emulation = pytest.importorskip("_cuda_emulation")
    w = _gpu_4bit.weights_of(case.k, case.n, "cpu")
    w = replace(w, ours=w.ours.untile())
    of = torch.randn(case.m, case.n if case.what == GRAD else case.k).to(torch.bfloat16)
    kernels = native.triton("lora_linear")
    if passes == "cuda":
        module, kernels = emulation.module(), cuda
        monkeypatch.setattr(native, "cuda", lambda: module)
        assert module.linear4bit_small_is_fast(of, [w.ours]) or case.what == GRAD
    found = _gpu_4bit.forced(case.what, w.ours, of, kernels, passes == "cuda", native.triton("linear4bit"))
    assert set(found) == {FUSED, DECODED} | ({SMALL} if passes == "cuda" and case.what == FORWARD else set())
    with torch.no_grad():
        error, wrong = _gpu_4bit.check(case, w, of, found | {OURS: found[DECODED]})
    assert not wrong and set(found) < set(error), error


# ------------------------------------------------------------------------------------------------- synthetic timings


def samples(**seconds):
    names = {"frozen": FROZEN, "ours": OURS, "matmul": MATMUL, "dense": THEIR_DENSE, "small": SMALL, "fused": FUSED}
    times = {names.get(n, DECODED): [s] * 40 for n, s in seconds.items()}
    return Samples({**times, AGAIN: times[FROZEN]}, rounds=40)


FLOOR = {"byte_seconds": 3e-6, "seconds": 3e-6}


def row(m, what=FORWARD, mode=_cuda.COLD, k=4096, limits=(), floor=FLOOR, **seconds):
    case = Case(k, 4096, m, what, limits)
    found = _gpu_4bit.summary(case, mode, samples(frozen=14e-6, ours=4e-6, **seconds), floor)
    about = {"kind": _gpu_4bit.KIND, "key": f"{case.name}, {mode}", "case": {"k": k, "n": 4096, "m": m, "what": what}}
    return {**about, "mode": mode, "wrong": [], "peak_bytes": {}, "notes": {}, **found}


def test_targets_are_judged_in_their_modes():
    third, bytes_ = (Limit("time", BEST, 1 / 3),), (Limit("time", BYTES, 1 / 0.7),)
    (met,) = row(16, mode=_cuda.WARM, limits=third, matmul=20e-6, dense=13e-6)["targets"]
    assert met["verdict"] == "met" and "GEMM" in met["text"] and met["measured"][0] == pytest.approx(4 / 13, abs=1e-4)
    assert not row(16, mode=_cuda.COLD, limits=third, matmul=20e-6)["targets"]
    assert not row(16, mode=_cuda.WARM, limits=third)["targets"]  # no bitsandbytes
    low = {"byte_seconds": 1e-6, "seconds": 1e-6}
    (missed,) = row(16, mode=_cuda.WARM, limits=third, floor=low, matmul=10e-6)["targets"]
    assert missed["verdict"] == "not met"
    (share,) = row(1, limits=bytes_)["targets"]  # 3 µs of bytes in 4 µs: 75 %
    assert share["verdict"] == "met" and "70%" in share["text"]
    (share,) = row(1, limits=bytes_, floor=low)["targets"]
    assert share["verdict"] == "not met" and not row(1, mode=_cuda.WARM, limits=bytes_)["targets"]


def crossing(of):
    """Rows whose fused plan wins up to the row count that `of` gives a shape and direction."""
    return [
        row(m, what, k=k, fused=10e-6 if m <= of(k, what) else 13e-6, decoded=11e-6)
        for m in (16, 64, 512, 2048)
        for what in (FORWARD, GRAD)
        for k in (4096, 14336)
    ]


@pytest.mark.parametrize("to", [0, 64, 512, 2048])
def test_the_plan_is_where_fused_stops_to_win(to):
    found = _gpu_4bit.plan(crossing(lambda k, what: to))
    assert found["fused_to_m"] == to and found["worst"][1] == 0 and found["rows"] == [16, 64, 512, 2048]
    json.dumps(found)


def test_the_plan_loses_least_where_rows_disagree():
    found = _gpu_4bit.plan(crossing(lambda k, what: 512 if k == 4096 or what == GRAD else 64))
    assert found["fused_to_m"] == 512
    key, loss = found["worst"]
    assert "14336->4096 M=512 bf16 fwd" in key and loss == pytest.approx(2 / 11, abs=1e-4)
    text = _gpu_report.four_bit({"rows": [], "plan_4bit": found})
    assert "recommended 512" in text[-1] and f"now {found['now']}" in text[-1] and "fused 10.0" in text[0]


def test_rows_that_do_not_decide():
    """Those that `small` takes, noisy ones, other modes, and rows without both plans."""
    some = [row(16, small=5e-6, fused=9e-6, decoded=3e-6), row(64, fused=10e-6, decoded=11e-6)]
    others = [row(512, GRAD, mode=_cuda.WARM, fused=1e-6, decoded=2e-6), row(2048, fused=10e-6), row(2048, GRAD)]
    noisy = row(8192, fused=1e-6, decoded=2e-6) | {"validity": ["too noisy", "12 rounds"]}
    found = _gpu_4bit.plan([*some, *others, noisy, {"kind": "gpu"}])
    assert found["fused_to_m"] == 64 and found["rows"] == [64] and len(found["table"]) == 3
    assert _gpu_4bit.plan([noisy])["fused_to_m"] is None
    assert "quiet enough" in _gpu_report.four_bit({"rows": [], "plan_4bit": _gpu_4bit.plan([noisy])})[-1]
    assert _gpu_4bit.plan(others[1:]) is None


def test_reported_plotted_and_gated(tmp_path):
    rows = [row(16, matmul=20e-6, fused=9e-6, decoded=12e-6), row(16, mode=_cuda.WARM, matmul=20e-6)]
    rows[1]["peak_bytes"] = {OURS: 1 << 20, MATMUL: 1 << 25}
    result = {"schema": gate.SCHEMA, "gpu": "H100", "commit": "c", "versions": {}, "left_out": ["x"], "rows": rows}
    result["plan_4bit"] = _gpu_4bit.plan(rows)
    result["empty_kernel"] = _gpu_4bit.empty_kernel("cpu", gpu_suite.modes("cpu"))
    text = _gpu_report.text(result)
    assert (
        "nothing to do, as these rows are timed: wall: " in text
        and "copy bandwidth 75%" in text
        and "bitsandbytes 0.200" in text
        and "recommended 16" in text
    )
    assert [path.name for path in _gpu_report.plots(result, tmp_path)] == ["gpu-speed.png", "gpu-memory.png"]
    slower = copy.deepcopy(result)
    slower["rows"][0]["time"][MATMUL] = [0.3, 0.29, 0.31]
    assert (
        "slower: nf4+dq 4096->4096 M=16 bf16 fwd, device, cold L2 | over bitsandbytes"
        in gate.compare(slower, result).lines[0]
    )


def test_the_order_of_rows():
    """The LoRA headline, the 4-bit rows with targets, then both kinds in turn; no row twice."""
    cases = gpu_suite.cases()
    names = [case.name for case in cases]
    assert len(names) == len(set(names)) and cases[0] == gpu_suite.HEADLINE
    headline = _gpu_4bit.headline_cases()
    assert cases[1 : 1 + len(headline)] == headline and all(case.limits for case in headline)
    rest = cases[1 + len(headline) :]
    assert isinstance(rest[1], Case) and not isinstance(rest[0], Case)
    grid = {(c.k, c.n, c.m) for c in cases if isinstance(c, Case) and c.what == FORWARD}
    assert grid == {(*shape, m) for shape in _gpu_4bit.SHAPES for m in (1, 4, 16, 32, 64, 512, 2048, 8192)}
    grads = {(c.k, c.n, c.m) for c in cases if isinstance(c, Case) and c.what == GRAD}
    assert grads == {(*shape, m) for shape in _gpu_4bit.SHAPES for m in (16, 64, 512, 8192)}
