"""Plans: the table by kind of machine, this machine's own file over it, and what is said where that file is no good."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch

import fastpeft as fp
from fastpeft import cli, native
from fastpeft.backends import plans, plans_file

each_kind = pytest.mark.parametrize("kind", plans.KINDS)
needs_kernels = pytest.mark.skipif(native.cpu() is None, reason="no compiled kernels: no plan is in use")


def contents(**cpu) -> dict:
    """A file of this machine's."""
    versions = {"fastpeft": fp.__version__, "torch": torch.__version__}
    about = {"format": plans_file.FORMAT, "machine": plans.here(), **versions, "measured": "2026-11-25T10:12:13+01:00"}
    return about | {"cpu": cpu}


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Where the environment says that the file is."""
    path = tmp_path / "plans.json"
    monkeypatch.setenv("FASTPEFT_PLANS_FILE", str(path))
    monkeypatch.delenv("FASTPEFT_PLAN", raising=False)
    return path


@pytest.fixture
def loaded(monkeypatch):
    """As importing fastpeft loads it, in the place of the plan in use; that one is put back."""
    before = plans.current

    def load():
        monkeypatch.setattr(plans, "current", plans._Plan())
        return plans.current

    yield load
    before.use(before.named, before.over)


def takes(rows: int, dtype=torch.float32, storage="dense") -> bool:
    """Whether the kernels of few rows take so many, by the module's own plan."""
    x, w = torch.zeros(rows, 16, dtype=dtype), torch.zeros(32, 16, dtype=dtype)
    w = fp.ops.quantize_4bit(w) if storage == "4 bits" else w
    none = (None,)
    return native.cpu().lora_linear_few(x, (w,), none, none, none, none, none) is not None


# ---- by kind of machine ----------------------------------------------------------------------------------------------


@each_kind
def test_every_kind_has_every_entry_and_says_where_it_was_measured(kind):
    plan = plans.built_in(kind)
    assert plan.pop("isa") in plans.ISAS and "measured" in plan.pop("measured")
    assert plan.keys() == plans_file.LIMITS.keys()
    plans_file._entries("cpu", plan, plans_file.LIMITS)
    assert set(plan["few_rows"]) == set(plan["few_rows_4bit"]) == set(plans.DTYPES)


@each_kind
@pytest.mark.parametrize("isa", plans.ISAS)
def test_rows_of_each_instruction_set(kind, isa):
    """The kind's own on its own; lower, those of the plain kind, and no more than on its own; higher, the plain kind's."""
    plan = plans.built_in(kind)
    found, own = plans.rows(plan, isa), plan["isa"]
    if isa == own:
        assert found == {key: plan[key] for key in ("few_rows", "few_rows_4bit")}
    plain = plans.built_in("avx512" if isa == "avx512bf16" else isa)
    for key, of in found.items():
        for dtype in plans.DTYPES:
            if plans.ISAS.index(isa) < plans.ISAS.index(own):
                assert of[dtype] == min(plan[key][dtype], plain[key][dtype])
            elif isa != own:
                assert of[dtype] == plain[key][dtype]


@needs_kernels
def test_plan_and_override_reach_the_kernels():
    most = plans.rows(plans.current.cpu, native.cpu().isa())["few_rows"]["float32"]
    assert takes(most) and not takes(most + 1)
    with plans.override("cpu", few_rows={"float32": 3}), plans.override("cpu", few_rows={"bfloat16": 5}):
        assert takes(3) and not takes(4) and takes(5, torch.bfloat16) and not takes(6, torch.bfloat16)
    assert takes(most)
    with fp.plan("A"):
        assert plans.current.kind == "A" and not plans.current.widens
        with fp.plan(None):
            assert plans.current.kind == "A"
    assert plans.current.kind == plans.kind()
    with pytest.raises(ValueError, match="plan.kind. must be one of Z, E, A, .* got 'B'"), fp.plan("B"):
        pass


# ---- this machine's own ----------------------------------------------------------------------------------------------


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTPEFT_PLANS_FILE", "~/plans")
    assert plans_file.path() == plans_file.Path.home() / "plans"
    monkeypatch.setenv("FASTPEFT_PLANS_FILE", "")
    assert plans_file.path() is None
    monkeypatch.delenv("FASTPEFT_PLANS_FILE")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert plans_file.path() == tmp_path / "fastpeft" / "plans.json"
    for none in ("", "relative"):  # as the XDG specification has it
        monkeypatch.setenv("XDG_CONFIG_HOME", none)
        assert plans_file.path() == plans_file.Path.home() / ".config" / "fastpeft" / "plans.json"


@needs_kernels
def test_its_entries_lie_over_those_of_the_kind(file, loaded):
    built_in = plans.built_in(plans.kind())
    rows = plans.rows(built_in, native.cpu().isa())
    own = {"few_rows": {"float32": 3}, "few_rows_4bit": {"float16": 5}, "slab": {"rows": 512}}
    file.write_text(json.dumps(contents(**own, widens=not built_in["widens"], parallel_work=1e5)))
    plan = loaded()
    assert takes(3) and not takes(4) and takes(5, torch.float16, "4 bits") and not takes(6, torch.float16, "4 bits")
    assert takes(rows["few_rows"]["bfloat16"], torch.bfloat16)
    assert plan.slab == built_in["slab"] | {"rows": 512} and plan.widens != built_in["widens"]
    assert plan.cpu["parallel_work"] == 1e5 and plan.about()["own"]["cpu"]["few_rows"] == {"float32": 3}
    with fp.plan(plans.kind()):  # the built-in one
        assert plan.widens == built_in["widens"] and takes(rows["few_rows"]["float32"]) and plan.about()["own"] is None
    with plans.override("cpu", few_rows={"float32": 4}):
        assert takes(4) and not takes(5) and plan.slab["rows"] == 512
    assert takes(3) and not takes(4)


@needs_kernels
@pytest.mark.parametrize("isa", plans.ISAS)
def test_its_rows_are_for_the_instruction_set_they_were_measured_on(isa, file, loaded, monkeypatch):
    if isa not in native.cpu().isas():
        pytest.skip(f"this machine has no {isa}")
    before = native.cpu().isa()
    native.cpu().set_isa(isa)
    try:
        file.write_text(json.dumps(contents(few_rows={"float32": 2}, few_rows_4bit={"float32": 400})))
        loaded()
        assert takes(2) and not takes(3) and takes(400, storage="4 bits")
        native.cpu().set_isa("scalar")
        if isa != "scalar":
            assert takes(1) and not takes(2) and not takes(5, storage="4 bits")
    finally:
        native.cpu().set_isa(before)


@needs_kernels
def test_it_is_not_used_beside_fastpeft_plan_nor_where_the_variable_is_empty(file, loaded, monkeypatch, capsys):
    file.write_text(json.dumps(contents(few_rows={"float32": 3})))
    monkeypatch.setenv("FASTPEFT_PLAN", plans.kind())
    assert loaded().contents is None
    cli.main(["doctor"])
    assert f"of kind {plans.kind()}, built in" in (said := capsys.readouterr().out) and "by FASTPEFT_PLAN" in said
    monkeypatch.delenv("FASTPEFT_PLAN")
    assert loaded().contents is not None
    monkeypatch.setenv("FASTPEFT_PLANS_FILE", "")
    assert loaded().contents is None and plans.current.about()["file"] is None


def test_none_is_no_error(file, loaded, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loaded().contents is None
        plans.warn_if_ignored()
    cli.main(["doctor"])
    assert f"of kind {plans.kind()}, built in (" in capsys.readouterr().out


@needs_kernels
def test_doctor_says_since_when(file, loaded, capsys):
    old = {"torch": "2.11.0", "fastpeft": "0.0.9", "machine": plans.here() | {"threads": 96}}
    file.write_text(json.dumps(contents() | old))
    loaded()
    cli.main(["doctor"])
    said = " ".join(capsys.readouterr().out.split())
    assert (
        f"of kind {plans.kind()} with this machine's own, measured 2026-11-25 10:12 with torch 2.11.0 ({file})" in said
    )
    assert f"torch was 2.11.0, is {torch.__version__}; fastpeft was 0.0.9, is {fp.__version__}; threads was 96" in said
    cli.main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)["plan"]
    assert found["file"] == str(file) and found["own"]["torch"] == "2.11.0" and found["ignored"] is None


# ---- broken and foreign files ----------------------------------------------------------------------------------------

BROKEN = {
    "": "it is not JSON",
    "{": "it is not JSON",
    "[" * 100_000: "it is not JSON",
    "\xff\xfe\x00": "it is not JSON",
    "[1]": "it must be a JSON object, got [1]",
    " " * 1_000_001: "it is larger than 1 MB",
}
WRONG = {
    "format 2": ({"format": 2}, "format must be 1, got 2"),
    "format true": ({"format": True}, "format must be a JSON number, got true"),
    "more": ({"gpu": {}}, 'it has no entry "gpu", only format, machine'),
    "no cpu": ({"cpu": None}, "cpu must be a JSON object, got null"),
    "cpu a list": ({"cpu": [1]}, "cpu must be a JSON object, got [1]"),
    "version": ({"torch": 2.13}, "torch must be a JSON string, got 2.13"),
    "time": ({"measured": "yesterday"}, 'measured must be a date and time in ISO 8601, got "yesterday"'),
    "machine": ({"machine": "mine"}, 'machine must be a JSON object, got "mine"'),
}
WRONG_ENTRIES = {
    "unknown": ({"few_row": 3}, 'cpu has no entry "few_row", only few_rows, few_rows_4bit'),
    "dtype": ({"few_rows": {"float64": 3}}, 'cpu.few_rows has no entry "float64", only float32, bfloat16, float16'),
    "flat": ({"few_rows": 3}, "cpu.few_rows must be a JSON object, got 3"),
    "negative": ({"few_rows": {"float32": -1}}, "cpu.few_rows.float32 must be a whole number from 0 to 4096, got -1"),
    "absurd": ({"few_rows_untiled": 10**40}, "cpu.few_rows_untiled must be a whole number from 0 to 4096, got 1000"),
    "fraction": (
        {"few_rows_transposed": 2.5},
        "cpu.few_rows_transposed must be a whole number from 0 to 4096, got 2.5",
    ),
    "true": ({"few_rows_transposed": True}, "cpu.few_rows_transposed must be a whole number from 0 to 4096, got true"),
    "string": ({"widens": "yes"}, 'cpu.widens must be true or false, got "yes"'),
    "no step": ({"slab": {"rows": 0}}, "cpu.slab.rows must be a whole number from 64 to 1048576, got 0"),
    "memory": (
        {"slab": {"elements_4bit": 2**40}},
        "cpu.slab.elements_4bit must be a whole number from 4096 to 67108864",
    ),
    "NaN": ({"parallel_work": float("nan")}, "cpu.parallel_work must be a number from 0.0 to 1000000000000.0, got NaN"),
    "long": ({"widens": "y" * 1000}, "y…"),
}
FOREIGN = {"cpu": "Another CPU", "kind": "other", "cores": 1000, "isa": "avx1024"}


def refused(file) -> str:
    with pytest.raises(plans_file.Unusable) as error:
        plans_file.read(file, plans.here())
    assert len(str(error.value)) < 300
    return str(error.value)


@pytest.mark.parametrize("text", BROKEN, ids=["empty", "cut", "deep", "binary", "list", "large"])
def test_what_is_no_such_file(text, file):
    file.write_text(text, "latin-1")
    assert BROKEN[text] in refused(file)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_contents(name, file):
    change, said = WRONG[name]
    file.write_text(json.dumps(contents() | change))
    assert said in refused(file)


@pytest.mark.parametrize("name", WRONG_ENTRIES)
def test_wrong_entries(name, file):
    entries, said = WRONG_ENTRIES[name]
    file.write_text(json.dumps(contents(**entries)))
    assert said in refused(file)


@pytest.mark.parametrize("key", FOREIGN)
def test_another_machines(key, file):
    file.write_text(json.dumps(contents() | {"machine": plans.here() | {key: FOREIGN[key]}}))
    expected = f"it was measured on another machine: {key} {json.dumps(FOREIGN[key])}, here "
    assert expected + json.dumps(plans.here()[key]) in refused(file)


def test_what_cannot_be_read(file, monkeypatch):
    file.mkdir()
    assert refused(file) == "it is not a file"
    file.rmdir()
    file.write_text("{}")

    def deny(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(plans_file.Path, "open", deny)
    assert refused(file) == "it cannot be read (Permission denied)"


@needs_kernels
def test_import_warns_once_and_doctor_says_the_same(file):
    file.write_text(json.dumps(contents(widens=3)))
    code = "import fastpeft.cli as c, fastpeft.backends.plans as p; p._Plan(); c.main(['doctor'])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert ran.returncode == 0, ran.stderr
    said = f"the plans in {file} are ignored: cpu.widens must be true or false, got 3. `fastpeft tune` measures this machine"
    assert ran.stderr.count(said) == 1 and "RuntimeWarning" in ran.stderr
    assert ran.stdout.count(said) == 1


def test_writing_is_one_step(file, monkeypatch):
    plans_file.write(file, {"format": 1})
    assert json.loads(file.read_text()) == {"format": 1}

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(plans_file.os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        plans_file.write(file, {"format": 2})
    assert json.loads(file.read_text()) == {"format": 1} and list(file.parent.iterdir()) == [file]
