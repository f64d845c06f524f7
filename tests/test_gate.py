"""The GPU suite's collection, report and gate, on synthetic results and on a CPU."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

from benches import _gpu_report, _measure, gate, gpu_suite
from benches.bench_lora_linear import BOTH, Case


def result(gpu="H100", **times):
    """times: key=(median, low, high) of fastpeft over PEFT"""
    rows = [
        {"key": key, "kind": "gpu", "wrong": [], "validity": ["ok", ""], "time": {"PEFT": list(t)}}
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
    noisy["rows"][0]["validity"] = ["too noisy", "12 rounds"]
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


def test_collection_and_report(tmp_path, monkeypatch, one_thread):
    """What the suite collects, here by wall time on a CPU, is JSON, and has a report, plots and a gate."""
    monkeypatch.setattr(gpu_suite, "others", lambda device, seconds: [])
    monkeypatch.setattr(gpu_suite, "MOST", 0.1)  # seconds a row; the budget is no part of this test
    monkeypatch.setattr(_measure, "DELAY_LIMIT", math.inf)  # a busy machine's rounds count too
    case = Case(64, 48, 16, "bf16", BOTH)
    found = json.loads(json.dumps(gpu_suite.collect("cpu", 600.0, [case])))
    (row,) = found["rows"]
    assert row["key"] == f"{case.name}, wall" and not row["wrong"] and row["roofline"] > 0
    assert set(row["time"]) >= {"PEFT", "composition"} and not found["failed"] and not found["left_out"]
    text = _gpu_report.text(found)
    assert case.name in text and "overhead" in text
    assert [path.name for path in _gpu_report.plots(found, tmp_path)] == ["gpu-speed.png"]
    assert gate.compare(found, copy.deepcopy(found)).exit_code == 0
    assert gpu_suite.collect("cpu", 0.0, [case])["left_out"] == [case.name]


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert gpu_suite.main([]) == 2 and "no CUDA GPU" in capsys.readouterr().err
