"""The build: ids that refuse a mix, the pure-Python install, what setup.py does without a working compiler."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fastpeft import _build, native

ROOT = Path(__file__).parent.parent


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FASTPEFT_")}
    kept["FASTPEFT_PLANS_FILE"] = ""
    return subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True)


# ---- build ids -------------------------------------------------------------------------------------------------------


def test_source_id_depends_on_names_and_bytes_of_sources_only(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "a.cpp").write_text("int a;")
    (tmp_path / "b.h").write_text("")
    first = _build.source_id(tmp_path)
    (tmp_path / "notes.txt").write_text("not a source")
    assert _build.source_id(tmp_path) == first
    (tmp_path / "cpu" / "a.cpp").write_text("int b;")
    changed = _build.source_id(tmp_path)
    (tmp_path / "b.h").rename(tmp_path / "c.h")
    assert len({first, changed, _build.source_id(tmp_path)}) == 3


def test_package_id_is_the_stamp_or_the_clones_sources_or_none(tmp_path):
    package = tmp_path / "kernels" / "fastpeft_kernels"
    package.mkdir(parents=True)
    assert _build.package_id(package) is None
    (tmp_path / "setup.py").touch()
    (tmp_path / "csrc").mkdir()
    assert _build.package_id(package) == _build.source_id(tmp_path / "csrc")
    (package / _build.STAMP).write_text("0123456789abcdef\n")
    assert _build.package_id(package) == "0123456789abcdef"


def test_module_of_other_sources_is_refused(monkeypatch):
    if native.cpu() is None:
        pytest.skip(native.why_not_cpu())
    monkeypatch.setattr(native._build, "package_id", lambda package: "edited-sources")
    with pytest.raises(ImportError, match=r"edited-sources.*_cpu in .* different sources; run `pip install"):
        native._load.__wrapped__("_cpu")


def test_kernel_package_of_another_install_is_refused(monkeypatch):
    monkeypatch.setattr(native._build, "package_id", lambda package: package.name)
    with pytest.raises(ImportError, match="id fastpeft, but the package fastpeft_kernels in .* has fastpeft_kernels"):
        native._package.__wrapped__()


def test_a_clone_beside_installed_kernels_of_other_sources_does_not_import(tmp_path):
    shutil.copytree(ROOT / "fastpeft", tmp_path / "fastpeft", ignore=shutil.ignore_patterns("__pycache__"))
    kernels = tmp_path / "fastpeft_kernels"
    kernels.mkdir()
    (kernels / "__init__.py").touch()
    (tmp_path / "fastpeft" / _build.STAMP).write_text("1111\n")
    (kernels / _build.STAMP).write_text("2222\n")
    ran = run(sys.executable, "-c", "import fastpeft", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert ran.returncode != 0
    assert "build id 1111" in ran.stderr and "has 2222" in ran.stderr and "pip install" in ran.stderr


# ---- importing -------------------------------------------------------------------------------------------------------


def test_import_pulls_in_neither_peft_nor_transformers():
    code = "import sys, fastpeft; print(*({'peft', 'transformers', 'accelerate', 'matplotlib'} & set(sys.modules)))"
    ran = run(sys.executable, "-c", code, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == ""


PURE = """
import torch, fastpeft as fp
from _close import assert_close
from fastpeft import native, cli
assert native.cpu() is None and "pip install" in native.why_not_cpu()
x, w = torch.randn(3, 8), torch.randn(5, 8)
a, b = torch.randn(2, 8, requires_grad=True), torch.randn(5, 2, requires_grad=True)
y = fp.ops.lora_linear(x, w, a, b, scale=2.0)
formula = lambda x, w, a, b: (x @ w.t() + 2 * (x @ a.t()) @ b.t()).detach()
exact, terms = (formula(*(to(t) for t in (x, w, a, b))) for to in (torch.Tensor.double, lambda t: t.double().abs()))
assert_close(y, formula(x, w, a, b), exact, terms=terms)
y.sum().backward()
try:
    with fp.backend("cpu"):
        fp.ops.lora_linear(x, w, a, b)
except RuntimeError as error:
    assert "no compiled fastpeft_kernels._cpu" in str(error), error
else:
    raise AssertionError("a forced backend that is not there must raise")
raise SystemExit(cli.main(["doctor"]))
"""


def test_without_compiled_modules_everything_runs_on_torch_and_doctor_says_so(tmp_path):
    skip = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "fastpeft", tmp_path / "fastpeft", ignore=skip)
    shutil.copytree(ROOT / "kernels" / "fastpeft_kernels", tmp_path / "fastpeft_kernels", ignore=skip)
    shutil.copy(ROOT / "tests" / "_close.py", tmp_path)
    ran = run(sys.executable, "-c", PURE, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert "RuntimeWarning: fastpeft runs on its torch backend alone: there is no compiled" in ran.stderr
    assert "cpu kernels" in ran.stdout and "missing: there is no compiled fastpeft_kernels._cpu" in ran.stdout


# ---- setup.py --------------------------------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path):
    """A copy of what setup.py reads, with one small binding in place of csrc/."""
    for name in ("fastpeft", "kernels", "benches"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so", "results")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "README.md").write_text("# fastpeft\n")
    (tmp_path / "csrc" / "python").mkdir(parents=True)
    (tmp_path / "csrc" / "python" / "cpu.cpp").write_text("#error this compiler fails\n")
    return tmp_path


needs_build_tools = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("setuptools", "pybind11", "ninja"))),
    reason="needs setuptools, pybind11, ninja",
)
linux = pytest.mark.skipif(platform.system() != "Linux", reason="compiled modules are built on Linux only")


@needs_build_tools
@linux
def test_failing_compiler_fails_the_install_and_names_the_way_out(clone):
    ran = run(sys.executable, "setup.py", "-q", "build_ext", cwd=clone)
    assert ran.returncode != 0
    assert "this compiler fails" in ran.stdout + ran.stderr
    assert "FASTPEFT_PURE_PYTHON=1" in ran.stderr


@needs_build_tools
@linux
def test_no_compiler_gives_a_pure_install_and_says_so(clone):
    ran = run(sys.executable, "setup.py", "-q", "build_ext", cwd=clone, PATH="/nonexistent", CXX="")
    assert ran.returncode == 0, ran.stderr
    assert "WARNING: no C++ compiler found" in ran.stderr


@needs_build_tools
def test_pure_wheel_holds_python_benches_and_stamps(clone):
    ran = run(sys.executable, "setup.py", "-q", "bdist_wheel", cwd=clone, FASTPEFT_PURE_PYTHON="1")
    assert ran.returncode == 0, ran.stderr
    assert "installing without compiled kernels" in ran.stderr
    (wheel,) = (clone / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        stamps = {archive.read(f"{package}/{_build.STAMP}") for package in ("fastpeft", "fastpeft_kernels")}
    assert stamps == {f"{_build.source_id(clone / 'csrc')}\n".encode()}
    expected = {"fastpeft/py.typed", "fastpeft/cli.py", "fastpeft/_benches/cli.py", "fastpeft_kernels/__init__.py"}
    expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastpeft").rglob("*.py")}
    assert expected <= names
    assert not any(name.startswith(("tests/", "benches/", "csrc/", "kernels/")) for name in names)


@linux
def test_instructions_stay_in_the_objects_of_their_set():
    """One AVX512 instruction in a file for every machine kills the process on an older one (SIGILL)."""
    objects = list((ROOT / "build" / "native").glob("*/csrc/**/*.cpp*.o"))
    objdump = shutil.which("objdump")
    if not objects or objdump is None or platform.machine() != "x86_64":
        pytest.skip("needs x86-64, objdump, and the objects of an editable install in build/native")
    for path in objects:
        isa = path.stem.rpartition(".")[2]  # lora_linear.cpp.avx2.o; a file for every machine has none: dispatch.cpp.o
        code = run(objdump, "-d", "--no-show-raw-insn", str(path), cwd=ROOT).stdout
        assert "Disassembly" in code, path
        if not isa.startswith("avx512"):
            assert "%zmm" not in code, f"{path.name} uses AVX512 registers"
            if isa != "avx2":
                assert "%ymm" not in code, f"{path.name} uses AVX registers"
