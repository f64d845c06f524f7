"""What every test shares: backends as parameters, and a line that says which GPU tests were left out."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os

import pytest
import torch
from _guarded import Memory

os.environ["FASTPEFT_PLANS_FILE"] = ""  # no plans that whoever runs the tests has measured; subprocesses inherit it

HAS_GPU = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON and not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, by PyTorch's FLOP counter and so by fastpeft
    import _triton_interpreter  # noqa: F401

import fastpeft  # noqa: E402
from fastpeft import native  # noqa: E402
from fastpeft.backends import plans  # noqa: E402

pytest_plugins = ["_support_plugin"]


def cpu_levels() -> list[str]:
    """Instruction sets of the native CPU module that this machine runs."""
    module = native.cpu()
    return list(module.isas()) if module else []


def cpu_backends() -> list[str]:
    """Each instruction set with this machine's plan, and the best with each other kind's plan that differs from it."""
    levels = cpu_levels()
    if not levels:
        return []

    def entries(kind: str) -> dict:
        plan = plans.built_in(kind)
        return plan | plans.rows(plan, levels[-1]) | {"measured": None, "isa": None}

    others = [kind for kind in ("Z", "E", "A") if entries(kind) != entries(plans.kind())]
    return [f"cpu-{level}" for level in levels] + [f"cpu-{levels[-1]}-{kind}" for kind in others]


BACKENDS = ["torch", *cpu_backends()]
if HAS_TRITON and not HAS_GPU:
    BACKENDS.append("triton")  # in its interpreter
ON_GPU = [pytest.param(f"{name}@cuda", marks=pytest.mark.gpu) for name in ("torch", "triton")]

BUT_INTERPRETED = [name for name in BACKENDS if name != "triton"] + ON_GPU  # the interpreter takes seconds a model


@pytest.fixture(params=BACKENDS + ON_GPU)
def backend(request):
    """Forces one backend, one instruction set of the native CPU code, one kind's plan; `@cuda`: tensors are on the GPU."""
    name, _, device = request.param.partition("@")
    name, level, kind = (*name.split("-"), "", "")[:3]
    if device:
        with torch.device(device), fastpeft.backend(name):
            yield request.param
        return
    module = native.cpu()
    before = module.isa() if module else None
    if level:
        module.set_isa(level)
    try:
        with fastpeft.backend(name), fastpeft.plan(kind or None):
            yield request.param
    finally:
        if level:
            module.set_isa(before)


@pytest.fixture
def memory():
    """Guarded memory, and results of the native CPU passes on it."""
    memory, module, dtypes = Memory(), native.cpu(), list(native.CODES)

    def allocate(shape, code):
        columns = shape[-1] if shape else 1
        return memory.empty(math.prod(shape[:-1]), columns, dtypes[code]).view(shape)

    module.set_allocator(allocate)
    yield memory
    module.set_allocator(None)
    memory.close()


@contextlib.contextmanager
def num_threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    """Tiny tensors: a second thread of PyTorch's only waits for the first, for seconds on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_configure(config):
    config.stash[_LEFT_OUT] = 0


def pytest_collection_modifyitems(config, items):
    """Counts the GPU tests here, before `-m` deselects them."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    config.stash[_LEFT_OUT] = len(on_gpu)
    for item in on_gpu if not HAS_GPU else ():
        item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))  # where -m selects it all the same


def pytest_terminal_summary(terminalreporter, config):
    left_out = config.stash[_LEFT_OUT]
    if left_out and not torch.cuda.is_available():
        terminalreporter.write_line(f"{left_out} GPU tests did not run: this machine has no CUDA GPU")


_LEFT_OUT = pytest.StashKey[int]()
