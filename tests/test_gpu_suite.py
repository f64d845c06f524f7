"""The GPU suite's 4-bit rows on a CPU (tiny shapes, wall time), its verdicts and our plans on synthetic timings."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from benches import gpu_suite, linear4bit
from benches.kit import case as kit
from benches.kit import gate, measure
from benches.kit.case import BOTH, BYTES, DECODE, FORWARD, GRAD, OURS, TIME, Limit
from benches.kit.cuda import COLD, WARM
from benches.kit.rounds import AGAIN, FROZEN, Samples
from benches.linear4bit import COPY, DEQUANTISE, LORA, PEFT_4BIT, TRAINING, Case
from benches.suites import gpu
from benches.suites.gpu import DECODED, FUSED, SMALL

TINY = [Case(64, 48, m, what, double=True) for m, what in ((3, FORWARD), (3, GRAD), (3, BOTH), (0, DECODE))]


@pytest.fixture
def without_bitsandbytes(monkeypatch):
    monkeypatch.setattr(linear4bit, "bitsandbytes", lambda device: None)
    linear4bit.weights_of.cache_clear()
    yield
    linear4bit.weights_of.cache_clear()


@pytest.fixture(autouse=True)
def _short_rings(monkeypatch):
    monkeypatch.setattr(linear4bit, "ring_length", lambda size: 2)
    monkeypatch.setattr(measure.machine, "rates", lambda dtype, device: (1e11, 1e10))


def collect(cases):
    return gpu_suite.collect("cpu", 600.0, [(linear4bit, case) for case in cases], most=0.0)


def test_collection_without_bitsandbytes(one_thread, without_bitsandbytes):
    found = json.loads(json.dumps(collect(TINY)))
    assert not found["failed"]
    assert [row["key"] for row in found["rows"]] == [case.name for case in TINY]
    assert [row["reference"] for row in found["rows"]] == [FROZEN, FROZEN, FROZEN, COPY]
    for row in found["rows"]:
        assert not row["wrong"], row["error"]
        assert row["floor_share"] > 0 and row["byte_share"] > 0 and not row["targets"]
    assert found["crossover"] is None
    text = gpu_suite.report(found)
    assert all(case.name in text for case in TINY) and "fused_to_m" not in text
    assert gate.compare(found, copy.deepcopy(found)).exit_code == 0


def test_collection_beside_bitsandbytes(one_thread):
    pytest.importorskip("bitsandbytes")
    linear4bit.weights_of.cache_clear()
    peers = [{TRAINING, DEQUANTISE}, {TRAINING}, {PEFT_4BIT, LORA}, {DEQUANTISE}]
    for case, names in zip(TINY, peers, strict=True):
        (row,) = measure.measure(linear4bit, case, 0.0)
        assert not row["wrong"] and names <= set(row["time"]), row["notes"]
    linear4bit.weights_of.cache_clear()


def test_a_row_that_fails_is_named_and_the_others_go_on(monkeypatch, one_thread, without_bitsandbytes):
    monkeypatch.setattr(linear4bit, "_grad", lambda case, of, made: 1 / 0)
    found = collect(TINY[:2])
    assert list(found["failed"]) == [TINY[1].name] and len(found["rows"]) == 1


def test_functions_that_cannot_be_prepared_are_left_out_with_a_note(without_bitsandbytes):
    work = linear4bit.work(TINY[0], "cpu")
    work.functions["fails"] = kit.Function(lambda w: 1 / 0, work.functions[OURS].ring)
    notes = {}
    assert set(measure.attempt(work, lambda run: run(), notes)) == {FROZEN, OURS}
    assert "ZeroDivisionError" in notes["fails"]
    work.functions[OURS] = work.functions["fails"]
    with pytest.raises(ZeroDivisionError):
        measure.attempt(work, lambda run: run(), notes)


def test_a_plan_holds_while_its_function_is_checked_and_timed(without_bitsandbytes, one_thread, monkeypatch):
    """Plans are contexts around samples: inside, the plan's own code runs."""
    from contextlib import contextmanager

    inside = []

    @contextmanager
    def plan():
        inside.append(True)
        yield
        inside.pop()

    seen = []
    work = linear4bit.work(TINY[0], "cpu")
    ours = work.functions[OURS]
    call = lambda w: (seen.append(bool(inside)), ours.call(w))[1]  # noqa: E731
    work.functions["plan fused"] = kit.Function(call, ours.ring, truth=ours.truth, within=plan)
    work.plans = ("plan fused",)
    monkeypatch.setattr(linear4bit, "work", lambda case, device: work)
    (row,) = measure.measure(linear4bit, TINY[0], 0.0)
    assert seen and all(seen) and not row["wrong"]
    assert "plan fused" not in row["time"] and "plan fused" in row["samples"]["seconds"]  # no peer


# -------------------------------------------------------------------------------------------------- synthetic timings

FLOOR = {"byte_seconds": 3e-6, "seconds": 3e-6, "extra_seconds": 0.0}


def row(m, what=FORWARD, *, k=4096, mode=COLD, limits=(), floor=FLOOR, **seconds):
    """A row of a GPU: `small`, `fused`, `decoded`, `matmul`, `dense` are seconds of a call; fastpeft takes 4 µs."""
    names = {"small": SMALL, "fused": FUSED, "decoded": DECODED, "matmul": TRAINING, "dense": FROZEN}
    times = {FROZEN: 10e-6, OURS: 4e-6, **{names[name]: value for name, value in seconds.items()}, AGAIN: 0.0}
    times[AGAIN] = times[FROZEN]
    samples = Samples({name: [value] * 40 for name, value in times.items()}, rounds=40)
    case = Case(k, 4096, m, what, double=True)
    found = {"kind": "row", "key": f"{case.name}, {mode}", "mode": mode, "wrong": [], "floor": floor, "case": {"m": m}}
    found |= {"rivals": list(linear4bit.RIVALS), "plans": [SMALL, FUSED, DECODED], "samples": samples.as_json()}
    return found | measure.summary(found, samples, limits)


def test_targets_are_judged_in_their_modes():
    third, bytes_ = (Limit(TIME, kit.BEST, 1 / 3, mode=WARM),), (Limit(BYTES, "", 1 / 0.7, mode=COLD),)
    (met,) = row(16, mode=WARM, limits=third, matmul=13e-6)["targets"]
    assert met["verdict"] == "met" and TRAINING in met["text"] and met["measured"][0] == pytest.approx(4 / 13, abs=1e-4)
    assert not row(16, mode=COLD, limits=third, matmul=20e-6)["targets"]
    assert not row(16, mode=WARM, limits=third)["targets"]  # no bitsandbytes
    low = {"byte_seconds": 1e-6, "seconds": 1e-6}
    (missed,) = row(16, mode=WARM, limits=third, floor=low, matmul=10e-6)["targets"]
    assert missed["verdict"] == "not met"
    (share,) = row(1, limits=bytes_)["targets"]  # 3 µs of bytes in 4 µs: 75 %
    assert share["verdict"] == "met" and "bandwidth" in share["text"]
    (share,) = row(1, limits=bytes_, floor=low)["targets"]
    assert share["verdict"] == "not met" and not row(1, mode=WARM, limits=bytes_)["targets"]


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
    found = gpu.crossover(crossing(lambda k, what: to))
    assert found["fused_to_m"] == to and found["worst"][1] == 0 and found["rows"] == [16, 64, 512, 2048]
    json.dumps(found)


def test_the_plan_loses_least_where_rows_disagree():
    found = gpu.crossover(crossing(lambda k, what: 512 if k == 4096 or what == GRAD else 64))
    assert found["fused_to_m"] == 512
    key, loss = found["worst"]
    assert "14336->4096 M=512 bf16 fwd" in key and loss == pytest.approx(2 / 11, abs=1e-4)
    text = gpu.crossover_lines(found)
    assert "recommended 512" in text[-1] and f"now {found['now']}" in text[-1] and "fused 10.0" in text[0]


def test_rows_that_do_not_decide():
    """Those that `small` takes, noisy ones, other modes, and rows without both plans."""
    some = [row(16, small=5e-6, fused=9e-6, decoded=3e-6), row(64, fused=10e-6, decoded=11e-6)]
    others = [row(512, GRAD, mode=WARM, fused=1e-6, decoded=2e-6), row(2048, fused=10e-6), row(2048, GRAD)]
    noisy = row(8192, fused=1e-6, decoded=2e-6) | {"validity": ["noisy", "A/A 1.1"]}
    found = gpu.crossover([*some, *others, noisy])
    assert found["fused_to_m"] == 64 and found["rows"] == [64] and len(found["table"]) == 3
    assert gpu.crossover([noisy])["fused_to_m"] is None
    assert "quiet enough" in gpu.crossover_lines(gpu.crossover([noisy]))[-1]
    assert gpu.crossover(others[1:]) is None and gpu.crossover_lines(None) == []


def test_the_order_of_rows():
    """Rows with targets first, then the ops in turn; no row twice."""
    cases = gpu.cases()
    names = [case.name for _, case in cases]
    assert len(names) == len(set(names)) and names[0] == "4096->4096 M=8192 bf16 r=16 fwd+bwd"
    first = sum(len(op.gpu_cases()[0]) for op in gpu.OPS)
    assert all(case.limits for _, case in cases[:first])
    assert [op for op, _ in cases[first : first + 2 * len(gpu.OPS)]] == [*gpu.OPS, *gpu.OPS]
    four_bit = [case for op, case in cases if op is linear4bit]
    grid = {(c.k, c.n, c.m) for c in four_bit if c.what == FORWARD}
    assert grid == {(*shape, m) for shape in linear4bit.GPU_SHAPES for m in (1, 4, 16, 32, 64, 512, 2048, 8192)}
    grads = {(c.k, c.n, c.m) for c in four_bit if c.what == GRAD}
    assert grads == {(*shape, m) for shape in linear4bit.GPU_SHAPES for m in (16, 64, 512, 8192)}


@pytest.mark.gpu
def test_every_mode_of_every_4bit_row_on_a_gpu():
    """Our plans too, where this fastpeft has them."""
    for case in (
        Case(512, 384, m, what, double=True) for m, what in ((16, FORWARD), (64, GRAD), (64, BOTH), (0, DECODE))
    ):
        rows = measure.measure(linear4bit, case, 0.3, "cuda")
        assert [row["mode"] for row in rows] == list(measure.modes("cuda"))
        assert not any(row["wrong"] for row in rows), rows[0]["error"]
    assert torch.cuda.is_available()
