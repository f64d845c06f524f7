"""Records which cells of the support table (docs/support.md) the tests of this run have verified.

    @pytest.mark.verifies("lora_linear", "forward", "backward", backend="cpu", dtype="float32")

A test marked so stands for those cells: op × feature × backend × dtype. `backend` and `dtype` default to the test's
parameters of the same name (a backend may be "cpu-avx2", backend and instruction set, or "triton@cuda", a backend on a
GPU; a dtype may be torch's own); each may be a list. A cell is verified if every test that stands for it passed and at
least one ran.

`pytest --record-support tests/support.jsonl` writes the cells of this machine at this commit.
"""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _support
import pytest
import torch

from fastpeft import machine

# A change elsewhere (docs, results) leaves a commit's verification valid.
SOURCES = ("csrc", "fastpeft", "kernels", "tests", "setup.py")
# Without a GPU: the kernels are compiled for it, and run by other means.
NO_GPU = {
    "triton": "no GPU yet: compiled, run in Triton's interpreter",
    "cuda": "no GPU yet: compiled, run in emulation",
}
_OUTCOMES = pytest.StashKey[dict[_support.Cell, set[str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-support", metavar="FILE", help="write the support table's cells that this run verifies")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_OUTCOMES] = {}
    if config.getoption("--record-support") and hasattr(config, "workerinput"):
        raise pytest.UsageError("--record-support needs all tests in one process: leave -n out")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A mark that names no cell is an error at once, not when somebody records."""
    for item in items:
        for _ in cells(item):
            pass


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.when == "call" or report.outcome != "passed":
        outcome = "failed" if hasattr(report, "wasxfail") else report.outcome
        for cell in cells(item):
            item.config.stash[_OUTCOMES].setdefault(cell, set()).add(outcome)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--record-support")
    if path:
        outcomes = session.config.stash[_OUTCOMES]
        failed = [cell for cell, seen in outcomes.items() if "failed" in seen]
        passed = [cell for cell, seen in outcomes.items() if "passed" in seen and cell not in failed]
        _support.save(Path(path), passed, failed, commit(session.config.rootpath))


def cells(item: pytest.Item) -> Iterator[_support.Cell]:
    """The cells that a test stands for."""
    given = getattr(item, "callspec", None)
    params = given.params if given else {}
    for mark in item.iter_markers("verifies"):
        op, *features = mark.args
        values = {key: mark.kwargs.get(key, params.get(key)) for key in ("backend", "dtype")}
        for key, value in values.items():
            if value is None:
                raise pytest.UsageError(f"{item.nodeid}: verifies(...) needs {key}=: the test has no such parameter")
        if not features or not set(features) <= set(_support.FEATURES):
            known = ", ".join(_support.FEATURES)
            raise pytest.UsageError(f"{item.nodeid}: verifies(op, *features) knows {known}; got {features}")
        for feature, backend, dtype in itertools.product(features, *map(_as_list, values.values())):
            name, _, device = backend.partition("@")
            name, _, isa = name.partition("-")
            if torch.cuda.is_available() and (device or item.get_closest_marker("gpu")):
                where = torch.cuda.get_device_name()
            else:
                where = NO_GPU.get(name) or machine.cpu_class()
            yield _support.Cell(op, name, isa, str(dtype).removeprefix("torch."), feature, where)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def commit(root: Path) -> str:
    """The commit that is checked out, with a + where its sources were changed since."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", *SOURCES)
    return (git("rev-parse", "--short=10", "HEAD") or "none") + ("+" if changed else "")
