"""`fastpeft tune`: what it decides from times, the file that it writes, and how it ends early. No time is judged."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from math import log

import pytest
import torch

import fastpeft as fp
from fastpeft import cli, native, tune
from fastpeft.backends import plans, plans_file

pytestmark = pytest.mark.skipif(native.cpu() is None, reason="no compiled kernels: nothing to measure")


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "config" / "plans.json"
    monkeypatch.setenv("FASTPEFT_PLANS_FILE", str(path))
    monkeypatch.delenv("FASTPEFT_PLAN", raising=False)
    return path


@pytest.fixture
def tiny(monkeypatch, one_thread):
    monkeypatch.setattr(tune, "SHAPES", ((64, 64), (48, 32)))
    monkeypatch.setattr(tune, "RING", 1 << 15)
    monkeypatch.setattr(tune, "SAMPLE", 1e-4)
    monkeypatch.setattr(tune.machine, "run_delay", lambda: None)  # as if nothing else ran


# ---- what is decided -------------------------------------------------------------------------------------------------


def test_an_interval_rests_on_the_order_of_the_rounds():
    assert tune.Ratio.of([0.0] * 8) is None
    nine = tune.Ratio.of([log(r) for r in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 99.0)])
    assert str(nine) == "0.90 [0.50, 99.00]" and not nine.wins and not nine.loses
    assert tune.Ratio.of([log(0.9)] * 9).wins and tune.Ratio.of([log(0.99)] * 9).loses
    rng = random.Random(0)
    many = tune.Ratio.of([rng.gauss(log(0.8), 0.1) for _ in range(400)])
    assert 0.77 < many.low < many.median < many.high < 0.83


@pytest.mark.parametrize("truth, wins", [((0.8, 0.9), True), ((0.8, 1.2), False), ((0.8, 0.99), False)])
def test_a_way_wins_where_no_layer_loses(monkeypatch, tiny, truth, wins):
    calls = [lambda: None for _ in truth]
    slow = plans.current.cpu["few_rows_untiled"] + 1

    def seconds(call, times):
        return 1.0 if plans.current.cpu["few_rows_untiled"] == slow else truth[calls.index(call)]

    monkeypatch.setattr(tune, "_seconds", seconds)
    ways = [{"few_rows_untiled": slow + 1}, {"few_rows_untiled": slow}]
    ratio = tune.compare(calls, ways, time.perf_counter() + 60, tune.Bar(60))
    assert ratio.wins == wins and ratio.median == pytest.approx(max(truth))


def test_a_round_in_which_threads_waited_does_not_count(monkeypatch):
    waited = itertools.count(0.0, 100.0)
    monkeypatch.setattr(tune.machine, "run_delay", lambda: next(waited))
    ways = [{"few_rows_untiled": 1}, {"few_rows_untiled": 2}]
    assert tune.compare([lambda: None], ways, time.perf_counter() + 0.2, tune.Bar(1)) is None


def climbed(monkeypatch, truth, name, of=None, noise=None):
    """Where the entry ends up if `truth(size)` is the time of its higher value over that of its lower one."""
    entry = next(entry for entry in tune.entries() if (entry.name, entry.of) == (name, of))

    def compare(calls, ways, end, bar):
        new, old = (way[name] if of is None else way[name][of] for way in ways)
        ratio = truth(entry.size(old, new)) ** (1 if new > old else -1)
        return tune.Ratio(ratio, *(noise or (ratio * 0.99, ratio * 1.01)))

    monkeypatch.setattr(tune, "compare", compare)
    return tune.climb(entry, time.perf_counter() + 60, 1, tune.Bar(60))


@pytest.mark.parametrize("until", [0, 1, 8, 48, 512])
def test_rows_end_where_the_gemm_takes_over(monkeypatch, tiny, until):
    result = climbed(monkeypatch, lambda rows: 0.8 if rows <= until else 1.3, "few_rows", "bfloat16")
    assert result.value == until
    assert result.changed() == ({} if until == result.built_in else {"few_rows": {"bfloat16": until}})


def test_a_measured_switch_and_a_size(monkeypatch, tiny):
    with plans.plan("avx2"):
        assert climbed(monkeypatch, lambda rows: 1.5, "widens").value is False
        assert climbed(monkeypatch, lambda rows: 0.7, "widens").value is True
        # in few rows the unwidened GEMM is the faster one: the higher bound wins there
        assert climbed(monkeypatch, lambda rows: 0.7 if rows < 192 else 1.4, "slab", "min_rows").value == 192
        assert climbed(monkeypatch, lambda rows: 0.7 if rows < 48 else 1.4, "slab", "min_rows").value == 48


def test_what_is_not_clear_changes_nothing(monkeypatch, tiny):
    with plans.plan("E"):  # whose rows end between two steps of the ladder
        result = climbed(monkeypatch, lambda rows: 0.9, "few_rows", "float32", noise=(0.7, 0.985))
    assert result.value == result.built_in and result.changed() == {} and len(result.tried) == 2


def test_every_entry_takes_two_ways(monkeypatch, tiny):
    """Calls run under both neighbours of each entry, in the GEMM's plan and the kernels' alike."""
    seen = set()
    with plans.plan(plans.kind()), fp.backend("cpu"), torch.no_grad():
        for entry in tune.entries():
            seen.add(entry.name)
            low, high = entry.ladder[0], entry.ladder[-1]
            for value in (low, high):
                with plans.override("cpu", **entry.within), plans.override("cpu", **entry.at(value)):
                    for call in entry.calls(min(64, entry.size(low, high))):
                        assert torch.isfinite(call()).all()
            plans_file._entries("cpu", plans.merged(entry.at(low), {}), plans_file.LIMITS)
    assert seen >= {"few_rows", "few_rows_4bit", "few_rows_transposed", "slab", "widens", "own_attention"}


# ---- the command -----------------------------------------------------------------------------------------------------


def test_it_writes_a_file_that_loads(file, tiny, capsys):
    before = plans.current.cpu
    assert cli.main(["tune", "--seconds", "4"]) == 0
    out, err = capsys.readouterr()
    found = plans_file.read(file, plans.here())
    assert found["cpu"].keys() <= plans_file.LIMITS.keys() and found["machine"]["threads"] == 1
    assert "few_rows_4bit bfloat16" in out and "built in" in out and f"Written to {file}." in out
    assert "few_rows_4bit bfloat16" in err and "\r" not in err  # no terminal
    assert plans.current.cpu == before and list(file.parent.iterdir()) == [file]


def test_another_file_and_how_to_take_it(file, tiny, tmp_path, capsys):
    other = tmp_path / "other.json"
    assert cli.main(["tune", "--seconds", "2", "--out", str(other)]) == 0
    assert f"fastpeft reads it where FASTPEFT_PLANS_FILE={other}" in capsys.readouterr().out
    assert other.exists() and not file.exists()


def test_interrupted_in_a_measurement_it_leaves_the_old_file(file, tiny, monkeypatch, capsys):
    file.parent.mkdir()
    file.write_text("old")
    before = plans.current.named, plans.current.over
    calls = iter(range(20))

    def seconds(call, times):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return 1e-3

    monkeypatch.setattr(tune, "_seconds", seconds)
    assert cli.main(["tune", "--seconds", "60"]) == 130
    assert file.read_text() == "old" and list(file.parent.iterdir()) == [file]
    assert (plans.current.named, plans.current.over) == before and torch.is_grad_enabled()
    assert capsys.readouterr().err.splitlines()[-1] == f"fastpeft tune: interrupted, nothing was written to {file}"


def test_ctrl_c(file):
    file.parent.mkdir()
    file.write_text("old")
    # a job in the background ignores the signal, and hands that on
    listen = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    start = listen + "from fastpeft.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", start, "tune", "--seconds", "120"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as ran:
        lines = []
        while "120 s" not in (lines or [""])[-1]:  # its first own line; the old file is refused before it
            lines.append(ran.stderr.readline())
            assert lines[-1], lines
        time.sleep(0.5)
        ran.send_signal(signal.SIGINT)
        _, err = ran.communicate(timeout=60)
    assert ran.returncode == 130 and "interrupted" in err and "Traceback" not in err
    assert file.read_text() == "old" and list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("seconds", ["0", "-3", "nan", "inf", "soon"])
def test_seconds_must_be_a_length_of_time(seconds, file, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["tune", "--seconds", seconds])
    assert error.value.code == 2 and "--seconds" in capsys.readouterr().err


def test_too_few_seconds_write_nothing(file, tiny, capsys):
    assert cli.main(["tune", "--seconds", "1e-6"]) == 2
    assert "1e-06 s were too few to measure anything" in capsys.readouterr().err and not file.exists()


def test_what_cannot_be_written_is_said_first(file, monkeypatch, capsys):
    monkeypatch.setattr(tune, "measure", lambda *_: pytest.fail("it measured"))
    file.parent.write_text("a file where a folder should be")
    assert cli.main(["tune"]) == 2
    assert f"fastpeft tune: {file} cannot be written: " in capsys.readouterr().err
    assert cli.main(["tune", "--out", str(file.parent.parent)]) == 2
    assert "it is a folder" in capsys.readouterr().err
    monkeypatch.setenv("FASTPEFT_PLANS_FILE", "")
    assert cli.main(["tune"]) == 2
    assert "FASTPEFT_PLANS_FILE is empty" in capsys.readouterr().err


def test_without_kernels(file, monkeypatch, capsys):
    monkeypatch.setattr(native, "cpu", lambda: None)
    monkeypatch.setattr(native, "why_not_cpu", lambda: "a pure-Python install.")
    assert cli.main(["tune"]) == 2
    assert capsys.readouterr().err == "fastpeft tune: there are no CPU kernels to measure: a pure-Python install.\n"


def test_it_says_that_the_machine_was_busy(file, tiny, monkeypatch, capsys):
    waited = iter([0.0, 1e6])
    monkeypatch.setattr(tune.machine, "run_delay", lambda: next(waited))
    measured = tune.Result(next(tune.entries()), 1, 1, [(2, 1, 2, tune.Ratio(1, 1, 1))])
    monkeypatch.setattr(tune, "measure", lambda *_: [measured])
    assert cli.main(["tune"]) == 0
    assert "The machine was busy" in capsys.readouterr().out
    assert json.loads(file.read_text())["cpu"] == {}
