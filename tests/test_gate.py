"""The GPU suite's collection, report and gate, on synthetic results and on a CPU."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from benches import gpu_suite, lora_linear
from benches.kit import gate, measure, plots


def result(gpu="H100", **times):
    """times: key=(median, low, high) of fastpeft over PEFT"""
    rows = [
        {"key": key, "kind": "row", "wrong": [], "validity": ["ok", ""], "time": {"PEFT": list(t)}}
        for key, t in times.items()
    ]
    return {"schema": gate.SCHEMA, "gpu": gpu, "rows": rows}


BEFORE = result(a=(0.80, 0.79, 0.81), b=(0.90, 0.88, 0.92))


def test_the_same_passes():
    verdict = gate.compare(copy.deepcopy(BEFORE), BEFORE)
    assert (verdict.state, verdict.exit_code) == (gate.PASSED, 0) and "2 of 2 ratios hold" in verdict.lines[-1]


@pytest.mark.parametrize(
    ("now", "state"),
    [
        ((0.85, 0.82, 0.88), gate.FAILED),  # the whole interval is slower
        ((0.82, 0.805, 0.84), gate.PASSED),  # the intervals meet
        ((0.70, 0.69, 0.71), gate.PASSED),
    ],
)
def test_a_slower_interval_fails(now, state):
    verdict = gate.compare(result(a=now, b=(0.90, 0.88, 0.92)), BEFORE)
    assert verdict.state == state and (state == gate.PASSED or "slower: a | over PEFT" in verdict.lines[0])


def test_missing_and_wrong_rows_fail_and_new_ones_are_named():
    verdict = gate.compare(result(a=(0.80, 0.79, 0.81), c=(1.0, 1.0, 1.0)), BEFORE)
    assert verdict.state == gate.FAILED
    assert "slower: b | over PEFT: missing" in verdict.lines and "new: c | over PEFT" in verdict.lines
    wrong = copy.deepcopy(BEFORE)
    wrong["rows"][0]["wrong"] = ["fastpeft"]
    assert gate.compare(wrong, BEFORE).lines[0] == "slower: a | over PEFT: wrong"


def test_noise_is_no_verdict():
    noisy = result(a=(1.5, 1.4, 1.6), b=(0.90, 0.88, 0.92))
    noisy["rows"][0]["validity"] = ["noisy", "A/A 1.03"]
    verdict = gate.compare(noisy, BEFORE)
    assert verdict.state == gate.PASSED and verdict.lines[0].startswith("not compared: a")


def test_another_gpu_and_another_file_are_refused(tmp_path):
    assert gate.compare(result("A100", a=(1, 1, 1)), BEFORE).exit_code == 2
    path = tmp_path / "x.json"
    path.write_text("{")
    assert gate.gate(BEFORE, path).state == gate.REFUSED
    path.write_text("{}")
    assert "not a result of this suite" in gate.gate(BEFORE, path).lines[0]


def test_the_first_run_is_recorded_and_then_binds(tmp_path):
    path = tmp_path / "baselines" / "h100.json"
    verdict = gate.gate(BEFORE, path)
    assert (verdict.state, verdict.exit_code) == (gate.RECORDED, 0) and "commit it" in verdict.lines[0]
    assert json.loads(path.read_text()) == BEFORE
    assert gate.gate(BEFORE, path).state == gate.PASSED
    assert gate.gate(result(a=(0.99, 0.98, 1.0), b=(0.90, 0.88, 0.92)), path).exit_code == 1


def test_a_wrong_row_fails_the_run_and_no_ratio_of_it_is_written(monkeypatch, one_thread, tmp_path, capsys):
    right = lora_linear._op
    monkeypatch.setattr(lora_linear, "_op", lambda of, p=0.0: lambda i: right(of, p)(i) * 1.02)
    found = gpu_suite.collect("cpu", 600.0, [(lora_linear, lora_linear.Case(64, 48, 40, r=4))], most=0.0)
    (row,) = found["rows"]
    assert row["wrong"] == ["fastpeft"] and not row["time"] and "fastpeft" not in row["over"]
    assert {target["verdict"] for target in row["targets"]} == {"wrong result"}
    assert gpu_suite.finish({**found, "tests": None}, tmp_path, None) == 1
    assert "wrong result: 64->48" in capsys.readouterr().err


def test_collection_and_report(tmp_path, one_thread):
    """What the suite collects, here by wall time on a CPU, is JSON, and has a report, plots and a gate."""
    case = lora_linear.Case(64, 48, 40, r=4)
    found = json.loads(json.dumps(gpu_suite.collect("cpu", 600.0, [(lora_linear, case)] * 2, most=0.1)))
    row, _ = found["rows"]
    assert (
        row["key"] == case.name and row["mode"] in measure.modes("cpu") and not row["wrong"] and row["floor_share"] > 0
    )
    assert set(row["time"]) >= {"PEFT", "composition"} and not found["failed"] and not found["left_out"]
    text = gpu_suite.report(found)
    assert case.name in text and "roofline" in text and "nothing to do, as these rows are timed: wall: " in text
    assert plots.speeds(found["rows"], tmp_path / "speed.png").is_file()
    assert gate.compare(found, copy.deepcopy(found)).exit_code == 0
    assert gpu_suite.collect("cpu", 0.0, [(lora_linear, case)])["left_out"] == [case.name]


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert gpu_suite.main([]) == 2 and "no CUDA GPU" in capsys.readouterr().err
