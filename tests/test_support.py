"""The support table: what the plugin records, what the table says, and that docs/support.md is up to date."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import _support
import _support_plugin
import pytest

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parent.parent

TESTS = """
import pytest, torch

@pytest.mark.parametrize("backend", ["torch", "cpu-avx2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.verifies("op", "forward", "backward")
def test_both(backend, dtype):
    pass

@pytest.mark.verifies("op", "compile", backend="cpu", dtype=["float32", "bfloat16"])
def test_compile():
    pass

@pytest.mark.verifies("op", "forward", backend="cpu-avx2", dtype="bfloat16")
def test_fails():
    assert False

@pytest.mark.verifies("op", "fsdp", backend="cpu", dtype="float32")
def test_skipped():
    pytest.skip("no")
"""


def record(pytester, source):
    pytester.makepyfile(source)
    pytester.runpytest_inprocess("-p", "_support_plugin", "--record-support", "results/support.jsonl", "-q")
    return _support.load(pytester.path / "results" / "support.jsonl")


def test_only_cells_whose_every_test_passed_are_recorded(pytester):
    cells = record(pytester, TESTS)
    found = {(cell.backend, cell.isa, cell.dtype, cell.feature) for cell in cells}
    assert found == {
        *(("torch", "", dtype, feature) for dtype in ("float32", "bfloat16") for feature in ("forward", "backward")),
        ("cpu", "avx2", "float32", "forward"),
        *(("cpu", "avx2", dtype, "backward") for dtype in ("float32", "bfloat16")),
        *(("cpu", "", dtype, "compile") for dtype in ("float32", "bfloat16")),
    }
    assert set(cells.values()) == {"none"}, "outside a git repository there is no commit to name"


def test_recording_again_replaces_this_machines_cells_and_keeps_the_others(pytester):
    path = pytester.path / "results" / "support.jsonl"
    path.parent.mkdir()
    other = _support.Cell("op", "cuda", "", "float16", "graph", "some GPU")
    first = record(pytester, TESTS)
    lost = next(iter(first))
    path.write_text(path.read_text() + json.dumps({**other._asdict(), "commit": "abc"}) + "\n")
    _support.save(path, [], [lost], "def")
    after = _support.load(path)
    assert after[other] == "abc" and lost not in after and len(after) == len(first)


@pytest.mark.parametrize(
    "mark",
    [
        pytest.mark.verifies("op", backend="cpu", dtype="float32"),
        pytest.mark.verifies("op", "fowrard", backend="cpu", dtype="float32"),
        pytest.mark.verifies("op", "forward", backend="cpu"),
    ],
)
def test_a_mark_that_names_no_cell_is_an_error(mark):
    item = SimpleNamespace(nodeid="test_x.py::test_one", iter_markers=lambda name: [mark.mark])
    with pytest.raises(pytest.UsageError, match="test_x.py::test_one: verifies"):
        list(_support_plugin.cells(item))


def test_table_has_a_row_per_backend_dtype_and_machine():
    def cell(backend, isa, dtype, feature, machine):
        return _support.Cell("lora_linear", backend, isa, dtype, feature, machine)

    cells = {
        cell("cpu", "avx2", "bfloat16", "forward", "a PC"): "aaa",
        cell("cpu", "scalar", "bfloat16", "forward", "a PC"): "bbb",
        cell("triton", "", "float16", "graph", "a GPU"): "ccc",
    }
    assert _support.rewrite(f"x\n{_support.BEGIN}\nold\n{_support.END}\ny\n", cells) == "\n".join(
        [
            "x",
            _support.BEGIN,
            "| op | backend | dtype | forward | backward | torch.compile | checkpointing | FSDP2 | CUDA graph "
            "| verified on | at commit |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
            "| `lora_linear` | triton | float16 |  |  |  |  |  | ✓ | a GPU | ccc |",
            "| `lora_linear` | cpu (avx2, scalar) | bfloat16 | ✓ |  |  |  |  | n/a | a PC | aaa, bbb |",
            _support.END,
            "y\n",
        ]
    )


def test_a_page_without_the_marks_is_refused():
    with pytest.raises(ValueError, match="support:begin"):
        _support.rewrite("# no marks", {})


def test_the_table_is_up_to_date():
    assert _support.main(["--check"]) == 0, "run: python tests/_support.py"
