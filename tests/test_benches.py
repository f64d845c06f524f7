"""The benchmark suite's own rules, on synthetic clocks and small fakes: no time is asserted, nothing is fetched."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("bitsandbytes")

from _bench_rows import PEERS, TIMES, lora_row, noise, tiny_llama

import fastpeft as fp
from benches import cli, linear4bit, lora_linear
from benches.kit import bnb, host, measure, rounds, verdict
from benches.kit.case import BEST, BOTH, FORWARD, OURS, OVERHEAD, TIME, Limit, ring_length
from benches.kit.rounds import AGAIN, FROZEN, Estimate, Rounds, Samples, validity
from benches.kit.saved import saved_bytes
from benches.kit.verdict import Target, target, worst
from benches.suites import main_job, memory


@pytest.fixture
def known_rates(monkeypatch):
    monkeypatch.setattr(measure.machine, "rates", lambda dtype, device: (1e11, 1e10))


# ---------------------------------------------------------------------------------------------------------- sampling


class FakeMachine:
    """A clock that functions advance, and a run delay that a test sets."""

    def __init__(self) -> None:
        self.now, self.waited, self.order = 0.0, 0.0, []

    def function(self, name: str, seconds: float):
        def run() -> None:
            self.order.append(name)
            self.now += seconds

        return run

    def timer(self, function, calls: int) -> float:
        start = self.now
        for _ in range(calls):
            function()
        return self.now - start

    def rounds(self, *names: str) -> Rounds:
        return Rounds(names, self.timer, clock=lambda: self.now, delay=lambda: self.waited)


def test_a_round_is_disturbed_when_the_process_waited_for_over_0_4_percent_of_it():
    machine = FakeMachine()
    taken = machine.rounds("a", "b")
    functions = {"a": machine.function("a", 1.0), "b": machine.function("b", 2.0)}

    def with_wait(seconds: float):
        def run() -> None:
            functions["b"]()
            machine.waited += seconds

        return {"a": functions["a"], "b": run}

    assert taken.run(with_wait(0.0119))  # of 3 s: 0.397 %
    assert not taken.run(with_wait(0.0121))
    assert taken.samples.seconds == {"a": [1.0], "b": [2.0]} == taken.samples.disturbed
    assert taken.samples.undisturbed == 1 and taken.samples.rounds == 2


@pytest.mark.parametrize(("quiet", "kept", "about"), [(29, 39, "all 39"), (30, 30, "30 of 40"), (0, 10, "all 10")])
def test_disturbed_rounds_are_dropped_only_while_30_others_remain(quiet, kept, about):
    samples = Samples({"a": [1.0] * quiet}, {"a": [2.0] * 10}, rounds=quiet + 10)
    assert samples.kept == kept and samples.about() == about
    assert Samples.from_json(json.loads(json.dumps(samples.as_json()))).kept == kept


def test_order_alternates_and_every_function_has_the_same_calls():
    machine = FakeMachine()
    names = ("a", "b", "c", "d")
    taken = machine.rounds(*names)
    functions = {name: machine.function(name, 0.5) for name in names}
    for _ in range(6):
        machine.order.clear()
        taken.run(functions, calls=3)
        first, machine.order = machine.order[::3], []
        taken.run(functions, calls=3)
        assert machine.order[::3] == first[::-1] and sorted(first) == list(names)
    assert taken.samples.seconds["a"] == [0.5] * 12  # a call, not a sample


def test_without_schedstat_all_rounds_are_kept_and_the_samples_say_so():
    machine = FakeMachine()
    taken = Rounds(["a"], machine.timer, clock=lambda: machine.now, delay=lambda: None)
    assert taken.run({"a": machine.function("a", 1.0)})
    assert not taken.samples.delay_known


def test_paired_runs_at_least_three_rounds_and_batches_quick_functions():
    calls = {"a": 0, "b": 0}

    def count(name: str):
        def run() -> None:
            calls[name] += 1

        return run

    timer = lambda f, n: [f() for _ in range(n)] and n * 1e-3  # noqa: E731
    samples = rounds.paired({n: count(n) for n in calls}, 0.0, timer=timer, sample=0.01)
    assert samples.rounds == 3
    assert calls["a"] == calls["b"] == 3 + 1 + (1 + 3) * 10  # warm, calibration, rounds of ten calls of 1 ms


def test_ratios_and_overheads_of_exact_times():
    samples = Samples({FROZEN: [1.0, 2.0, 4.0], OURS: [1.1, 2.2, 4.4], "PEFT": [1.4, 2.8, 5.6]}, rounds=3)
    assert samples.ratio(OURS, "PEFT").median == pytest.approx(1.1 / 1.4)
    assert samples.overhead(OURS).median == pytest.approx(0.1)
    share = samples.overhead_ratio(OURS, "PEFT")
    assert (share.median, share.low, share.high) == pytest.approx((0.25, 0.25, 0.25))


def test_a_peer_without_overhead_gives_no_overhead_ratio():
    samples = Samples({FROZEN: [1.0] * 40, OURS: [1.1] * 40, "PEFT": list(noise(40))}, rounds=40)
    assert math.isnan(samples.overhead_ratio(OURS, "PEFT").median)


def test_the_interval_covers_the_true_median_about_95_times_in_100():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        estimate = rounds.median_interval(rng.lognormal(0.0, 0.1, 50))
        hits += estimate.low <= 1.0 <= estimate.high
    assert 0.88 <= hits / 200 <= 1.0


@pytest.mark.parametrize(
    ("again", "state"),
    [
        (noise(seed=1), "ok"),
        (1.015 * noise(seed=1), "ok"),
        (1.021 * noise(seed=1), "noisy"),
        (0.979 * noise(seed=1), "noisy"),
        (noise(scale=0.3, seed=1), "noisy"),  # the median is near 1, its interval is not
        (noise(count=5, seed=1), "noisy"),  # too few for an interval
    ],
)
def test_figures_count_when_the_aa_interval_lies_within_2_percent(again, state):
    samples = Samples({FROZEN: list(noise(len(again))), AGAIN: list(again)}, rounds=len(again))
    assert validity(samples, FROZEN)[0] == state


# ----------------------------------------------------------------------------------------------------------- verdicts

OK = ("ok", "A/A 1.000")


@pytest.mark.parametrize(
    ("measured", "floor", "state", "expected"),
    [
        (Estimate(0.2, 0.19, 0.24), None, OK, "met"),
        (Estimate(0.24, 0.22, 0.26), None, OK, "not shown"),  # the limit lies within the interval
        (Estimate(0.3, 0.29, 0.31), None, OK, "not met"),
        (Estimate(0.3, 0.29, 0.31), 0.32, OK, "met"),  # no target binds below 1.3x the floor
        (Estimate(0.3, 0.29, 0.31), 0.1, OK, "not met"),  # a floor below the limit changes nothing
        (Estimate(0.3, 0.29, 0.31), math.nan, OK, "not met"),
        (Estimate(0.1, 0.09, 0.11), None, ("noisy", "A/A 1.03"), "not shown"),  # never a pass
        (rounds.UNDEFINED, None, OK, "not shown"),
        (Estimate(0.1, 0.09, 0.11), None, (verdict.WRONG, "error"), "wrong result"),
    ],
)
def test_verdicts(measured, floor, state, expected):
    found = target("overhead", 0.25, measured, state, floor)
    assert found.verdict == expected
    assert Target.from_json(json.loads(json.dumps(found.as_json()))).verdict == expected


def test_the_floor_is_named_where_it_decides():
    assert "floor" in target("x", 0.25, Estimate(0.3, 0.29, 0.31), OK, 0.32).note
    assert "interval" in target("x", 0.25, Estimate(0.24, 0.22, 0.26), OK).note


def test_a_verdict_over_several_rows_is_the_worst_of_them():
    met = target("a: time", 1.03, Estimate(0.9, 0.89, 0.91), OK, rule="never slower")
    noisy = target("b: time", 1.03, Estimate(1.044, 1.0, 1.1), ("noisy", "A/A 1.03"), rule="never slower")
    missed = target("c: time", 1.03, Estimate(1.2, 1.19, 1.21), OK, rule="never slower")
    alone = target("d: overhead", 0.25, Estimate(0.2, 0.19, 0.21), OK)
    (rule, other) = worst([met, noisy, alone])
    assert rule.verdict == "not shown" and "worst of 2 rows" in rule.text and rule.measured == noisy.measured
    assert "1 met, 1 not shown: b (A/A 1.03)" in rule.note and other == alone
    assert worst([met, noisy, missed])[0].verdict == "not met"
    assert worst([met, met])[0].verdict == "met"


def test_summary_of_a_case_from_synthetic_samples():
    case = lora_linear.target_cases()[0]
    got = lora_row(case, TIMES)
    assert got["best_peer"] == "composition" and got["validity"][0] == "ok"
    assert [t["verdict"] for t in got["targets"]] == ["met", "met", "met"]  # 0.125 of PEFT, 0.5, never slower
    assert all(t["floor_limit"] is not None for t in got["targets"])  # both are printed
    wrong = lora_row(case, TIMES, wrong=[OURS])
    assert OURS not in wrong["over"] and not wrong["time"]  # no speed-up for a wrong result
    assert {t["verdict"] for t in wrong["targets"]} == {"wrong result"}
    noisy = lora_row(case, TIMES, again=1.03)
    assert {t["verdict"] for t in noisy["targets"]} == {"not shown"}
    # 0.105 of overhead beside the composition's 0.1: the time is below 1.3x what the frozen layer and the adapter must take
    limits = (Limit(OVERHEAD, "composition", 0.65), Limit(TIME, BEST, 0.9))
    got = lora_row(replace(case, limits=limits), TIMES | {OURS: 1.01})
    assert [t["verdict"] for t in got["targets"]] == ["met", "met"] and "by the floor" in got["targets"][1]["note"]


# -------------------------------------------------------------------------------------------------------- small cases


def test_a_small_case_from_end_to_end(known_rates, one_thread):
    limits = (Limit(OVERHEAD, "PEFT", 0.25),)
    case = lora_linear.Case(48, 80, 40, r=4, limits=limits)
    (row,) = measure.measure(lora_linear, case, 0.0)
    assert not row["wrong"] and set(row["over"]) == {*PEERS, OURS} and set(row["error"]) == {*PEERS, OURS}
    assert {t["verdict"] for t in row["targets"]} == {"not shown"}  # three rounds
    json.dumps(row)


@pytest.mark.parametrize("case", [case for case in lora_linear.other_cases() if case.what != lora_linear.DROPOUT])
def test_groups_and_host_cost_are_checked_and_judged(case, known_rates, one_thread):
    if case.what == lora_linear.GROUP:
        case = replace(case, k=48, n=(32, 16, 16), m=40)
    (row,) = measure.measure(lora_linear, case, 0.0)
    assert not row["wrong"] and len(row["targets"]) == len(case.limits)
    (composed,) = (n for n in row["time"] if n in (lora_linear.THREE_CALLS, lora_linear.APPLIED))
    assert composed in row["error"]


def test_a_wrong_function_is_found_and_a_peer_left_out(known_rates, one_thread, monkeypatch):
    case = lora_linear.Case(48, 80, 40, r=4)
    right = lora_linear._op
    monkeypatch.setattr(lora_linear, "_op", lambda of, p=0.0: lambda i: right(of, p)(i) * 1.02)
    (row,) = measure.measure(lora_linear, case, 0.0, without=["PEFT"])
    assert row["wrong"] == [OURS] and "PEFT" not in row["over"] and not row["time"]


def test_cases_have_no_doubles_and_the_default_rows_all_carry_targets():
    for op in (lora_linear, linear4bit):
        cases = op.target_cases() + op.sweep_cases()
        assert len({case.name for case in cases}) == len(cases)
        assert all(case.limits for case in op.target_cases())
    assert len(linear4bit.target_cases() + linear4bit.sweep_cases()) == 36 + 2


def test_weights_rotate_past_the_cache_where_a_models_would():
    case = lora_linear.Case(2048, 2048, 1, direction=FORWARD, r=4)
    assert len(lora_linear.Layers.make(case, "cpu").weights) == ring_length(2 * 2048 * 2048) >= 2
    assert len(lora_linear.Layers.make(replace(case, m=40, k=64, n=64), "cpu").weights) == 1


def test_saved_bytes_count_a_storage_once_and_leave_parameters_out():
    x, w = torch.randn(8, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    assert saved_bytes(lambda: (x @ w, x.view(4, 8) ** 2), [w]) == 8 * 4 * 4


def test_time_outside_passes_leaves_gemms_and_native_calls_out(one_thread):
    """GEMMs take nearly all of a step on these inputs, so what is left is less than half of it."""
    x = torch.randn(700, 700)
    entries = host.profiled(lambda: [torch.mm(x, x) for _ in range(5)])
    assert host.outside(entries) < 0.5 * sum(entry.inlinetime for entry in entries)
    row = host.measure_outside(lambda: torch.mm(x, x), lambda: torch.mm(x[:2], x), 0.0, "mm", 1e6)
    assert row["kind"] == "outside" and row["milliseconds"][0] is not None and row["samples"]["rounds"] == 6
    for name in (
        "<built-in method fastpeft_kernels._cpu.lora_linear_down>",
        "<method 'addmm_' of 'torch._C.TensorBase' objects>",
    ):
        assert host.INSIDE.search(name)
    assert not host.INSIDE.search("<method 'view' of 'torch._C.TensorBase' objects>")


# ------------------------------------------------------------------------------------------------------ 4-bit weights


@pytest.fixture(scope="module")
def small_weights():
    return linear4bit.Weights(128, 96, "cpu", sets=2)


@pytest.fixture
def small(small_weights, monkeypatch, known_rates):
    monkeypatch.setattr(linear4bit, "weights_of", lambda k, n, device: small_weights)
    return small_weights


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("m", [1, 70])
def test_a_4bit_row_from_end_to_end(small, m, double, one_thread):
    (row,) = measure.measure(linear4bit, linear4bit.Case(128, 96, m, double=double), 0.0)
    assert not row["wrong"], row["error"]
    expected = {OURS, linear4bit.TRAINING, linear4bit.DEQUANTISE} | (set() if double else {linear4bit.DOUBLE})
    assert expected <= set(row["error"]) and FROZEN in row["time"]
    assert not row["targets"] and row["floor"]["bytes"] > 128 * 96 // 2
    json.dumps(row)


def test_each_form_of_a_weight_rotates_in_a_ring_of_its_own(small):
    ring = small.ours(False)
    first, second = ring.items
    assert first.packed.data_ptr() != second.packed.data_ptr() and first.packed.equal(second.packed)
    seen = [ring.following() for _ in range(4)]
    assert seen[0] is seen[2] and seen[1] is seen[3] and seen[0] is not seen[1]
    eval_, training = small.packed(False), small.theirs(False)
    assert not hasattr(training.items[0].weight.quant_state, "packing_format_for_cpu")  # packing left it as it was
    assert eval_.items[0].weight.data_ptr() != training.items[0].weight.data_ptr()


def test_a_qlora_layer_from_end_to_end(small, one_thread):
    limits = (Limit(TIME, linear4bit.PEFT_4BIT, 0.8),)
    (row,) = measure.measure(linear4bit, linear4bit.Case(128, 96, 40, BOTH, double=True, limits=limits), 0.0)
    assert not row["wrong"], row["error"]
    assert {OURS, linear4bit.PEFT_4BIT} <= set(row["over"]) and all(len(e) == 4 for e in row["error"].values())
    assert {t["verdict"] for t in row["targets"]} == {"not shown"}


@pytest.mark.parametrize(
    ("m", "ours", "amx", "verdicts"),
    [
        (1, 0.60, False, ["met", "met", "met"]),  # 1/1.6 of the best, 1/10 of the training path, double quantisation
        (1, 0.70, False, ["not met", "met", "met"]),
        (16, 0.75, False, ["met", "met"]),
        (16, 0.75, True, ["not met", "met"]),  # with AMX 0.6 of the dense layer's 1.0
        (128, 0.90, False, ["met", "met", "met"]),
        (128, 0.95, False, ["met", "not met", "met"]),
        (512, 1.09, False, ["not met", "not met", "met"]),
    ],
)
def test_targets_of_4bit_rows(m, ours, amx, verdicts, monkeypatch):
    monkeypatch.setattr(linear4bit.machine, "cpu", lambda: {"amx": amx})
    times = {FROZEN: 1.0, OURS: ours, linear4bit.DOUBLE: 1.02 * ours, linear4bit.EVAL: 1.0}
    times |= {linear4bit.DEQUANTISE: 1.2, linear4bit.TRAINING: 12 * ours, AGAIN: 1.0}
    samples = Samples({n: list(t * noise(40, seed=i)) for i, (n, t) in enumerate(times.items())}, rounds=41)
    row = {"key": "x", "mode": "wall", "wrong": [], "rivals": list(linear4bit.RIVALS), "plans": []}
    row |= {"floor": {"seconds": 0.1, "byte_seconds": 0.1, "extra_seconds": 0.0}}
    got = measure.summary(row, samples, linear4bit.limits(4096, m))
    assert [t["verdict"] for t in got["targets"]] == verdicts
    assert got["best_peer"] == linear4bit.EVAL and all(t["floor_limit"] is not None for t in got["targets"])


def test_bits_a_weight_as_in_the_paper_and_as_stored():
    assert memory.bits(False) == 4.5 and memory.bits(True) == pytest.approx(4.127, abs=5e-4)
    for double in (False, True):
        stored = fp.ops.quantize_4bit(torch.randn(256, 256), double_quant=double).nbytes
        assert stored == pytest.approx(256 * 256 * memory.bits(double) / 8, abs=4)


def test_bitsandbytes_says_nothing_about_a_kernels_package(caplog):
    """Its warning, where the CPU has AVX512-BF16; the kit is imported before anything that imports bitsandbytes."""
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    log.warning("Failed to load %s. Please make sure you already `pip install kernels`", "gemm_4bit_forward")
    log.warning("something else")
    assert caplog.messages == ["something else"]


# --------------------------------------------------------------------------------------------------------- whole models


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


def test_the_quick_qlora_suite_on_a_tiny_model(tiny_model, tmp_path, capsys, one_thread, monkeypatch, known_rates):
    monkeypatch.setattr(rounds, "MOST", 3)
    monkeypatch.setattr(rounds, "DELAY_LIMIT", math.inf)
    monkeypatch.setattr(linear4bit, "ring_length", lambda size: 2)
    folder, text = tiny_model
    where = [
        "--model",
        folder,
        "--text",
        text,
        "--out",
        str(tmp_path / "out"),
        "--parts",
        "training,step,decode,others,kernels",
    ]
    assert (
        cli.main(["--suite", "qlora", "--json", "--quick", "--time-budget", "60", "--shapes", "64x32@3", *where]) == 0
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["kind"] for row in rows] == ["sizes", "training", "step", "decode", "row", "row"]
    assert all(row["suite"] == "qlora" and row["versions"]["bitsandbytes"] for row in rows)
    sizes, training = rows[:2]
    dense, stored = next(size for name, size in sizes["stored"].items() if "linear" in name)
    assert stored < 0.3 * dense  # a quarter and the scales
    assert sizes["computed"]["65B"] == [130_000_000_000, 36_562_500_000, pytest.approx(33.53e9, rel=1e-3)]
    losses = training["losses"]
    assert losses["PEFT"][0] == pytest.approx(losses[OURS][0], rel=0.02) and "NF4" in training["model"]
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == {"losses", "step", "decoding", "speed"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.index("How much faster is a training step?") < page.index("Bytes of the weights")


def test_a_step_and_a_token_beside_the_dense_frozen_model(tiny_model, one_thread, known_rates):
    from benches.kit import smollm2

    dense = smollm2.load(tiny_model[0], torch.bfloat16, "cpu")
    base = bnb.in_4bit(dense)
    assert base.get_output_embeddings().weight is dense.get_output_embeddings().weight  # shared, and not quantised
    ids = torch.randint(0, 64, (2, 16))
    row = main_job.step(base, ids, 0.0, label="tiny", device="cpu", dense=dense)
    assert set(row["over"]) == {"PEFT", "PEFT same dtype", OURS} and row["reference"] == FROZEN
    (one,) = row["targets"]
    assert one["limit"] == pytest.approx(1 / 1.15) and one["floor_limit"] > 0
    row = main_job.decode(dense, ids[:1], 0.0, label="tiny", device="cpu")
    assert set(row["over"]) == {"PEFT", "PEFT same dtype", OURS}
    json.dumps(row)


def test_a_memory_worker_measures_the_4bit_model_wherever_it_runs(tiny_model, monkeypatch, tmp_path):
    """It does not import from the folder that it runs in: the README's command stands in a clone."""
    for package in ("fastpeft", "benches"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('the wrong package')")
    monkeypatch.chdir(tmp_path)
    ids = torch.zeros(1, 8, dtype=torch.int64)
    row = memory.memory(tiny_model[0], ids, dtype=torch.bfloat16, device="cpu", ways=("PEFT",), in_4bit=True)
    assert row["memory"]["PEFT"]["trainable_bytes"] > 0 and "peak_bytes" in row["memory"]["PEFT"] and not row["targets"]


def test_a_memory_worker_that_hangs_is_stopped_and_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setattr(memory, "WORKER_SECONDS", 0.001)  # no Python starts as fast
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"memory of PEFT was not done after 0.001 s and was stopped: .*--parts"):
        memory.memory("no model", ids, dtype=torch.float32, device="cpu", ways=("PEFT",))
