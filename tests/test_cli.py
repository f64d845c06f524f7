"""`fastpeft doctor` and `fastpeft bench`, as far as they go without measuring anything."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest

import fastpeft
from fastpeft import machine, native, cli


def test_doctor_names_what_this_machine_has(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in (fastpeft.__version__, "torch", "AMX", "nvcc", "gpu", "cpu kernels", "lora_linear", "extra [bench]"):
        assert word in out


def test_doctor_json_is_one_object_with_the_same_facts(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fastpeft"] == fastpeft.__version__
    assert found["backends"]["lora_linear"]["torch"] is None
    assert set(found["extras_missing"]) == {"bench", "test", "dev"}
    assert isinstance(found["cpu"]["amx"], bool)
    module = native.cpu()
    if module:
        assert found["cpu_module_isa"] in found["cpu_module_isas"] == list(module.isas())
        assert found["backends"]["lora_linear"]["cpu"] is None
        assert found["build_id"] == module.build_id


def test_doctor_fails_for_a_module_that_is_there_and_does_not_load(monkeypatch, capsys):
    monkeypatch.setattr(native, "cpu", lambda: None)
    monkeypatch.setattr(native, "why_not_cpu", lambda: "the compiled module does not load here (no libgomp)")
    monkeypatch.setattr(native, "is_built", lambda name: True)
    assert cli.main(["doctor"]) == 1
    assert "BROKEN: the compiled module does not load here (no libgomp)" in capsys.readouterr().out


def test_doctor_shows_the_environment(monkeypatch, capsys):
    monkeypatch.setenv("FASTPEFT_CPU_ISA", "avx2")
    cli.main(["doctor"])
    assert "FASTPEFT_CPU_ISA=avx2" in capsys.readouterr().out


def test_bench_hands_its_arguments_to_the_suite(monkeypatch):
    seen = []
    suite = SimpleNamespace(main=lambda argv: seen.append(argv) or 3)
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: seen.append(name) or suite)
    monkeypatch.setattr(cli.machine, "missing", lambda extra: [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert cli.main(["bench", "--suite", "lora", "--json"]) == 3
    assert seen == ["benches.cli", ["--suite", "lora", "--json"]] or seen[0] == "fastpeft._benches.cli"


def test_bench_without_its_extra_says_which_pip_command(monkeypatch, capsys):
    monkeypatch.setattr(cli.machine, "missing", lambda extra: ["peft<0.22,>=0.21", "gguf>=0.19"])
    assert cli.main(["bench"]) == 2
    error = capsys.readouterr().err
    assert "not installed: peft, gguf" in error
    assert "pip install 'peft<0.22,>=0.21' 'gguf>=0.19'" in error


def test_missing_reads_the_extras_of_the_installed_package(monkeypatch):
    requires = ["torch", 'nowhere-a>=1; extra == "bench"', 'torch; extra == "bench"']
    requires += ['fastpeft[bench]; extra == "test"', 'nowhere_b; extra == "test"']
    monkeypatch.setattr(metadata, "requires", lambda package: requires)
    assert machine.missing("bench") == ["nowhere-a>=1"]
    assert machine.missing("test") == ["nowhere-a>=1", "nowhere_b"]


def test_version_and_unknown_command(capsys):
    with pytest.raises(SystemExit) as version:
        cli.main(["--version"])
    assert version.value.code == 0 and capsys.readouterr().out == f"fastpeft {fastpeft.__version__}\n"
    with pytest.raises(SystemExit) as unknown:
        cli.main(["benhc"])
    assert unknown.value.code == 2
