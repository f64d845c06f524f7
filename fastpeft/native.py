"""Loads the compiled modules of `fastpeft_kernels`, and refuses one that was built from other sources."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # first: the compiled module must find torch's OpenMP runtime, not bring in a second one

from . import _build

_PACKAGE = Path(__file__).parent
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/tensor.h numbers them


@functools.cache
def cpu() -> Any:
    """The native CPU module, or None where there is none (`why_not_cpu` tells why: the torch backend takes over).

    Raises:
        ImportError: fastpeft and the module come from different sources; the message says what to do.
        ValueError: FASTPEFT_CPU_ISA names no instruction set that this build and machine have.
    """
    return _load("_cpu")[0]


def why_not_cpu() -> str | None:
    """None if the native CPU module is loaded, else a sentence that says why not."""
    return _load("_cpu")[1]


def cuda() -> Any:
    """The native CUDA module, or None where there is none (`why_not_cuda` tells why: the triton backend takes over)."""
    return _load("_cuda")[0]


def why_not_cuda() -> str | None:
    return _load("_cuda")[1]


def is_built(name: str) -> bool:
    """Whether a compiled module `fastpeft_kernels.<name>` lies in that package's folder, whether or not it loads."""
    kernels = importlib.util.find_spec("fastpeft_kernels")
    if kernels is None:
        return False
    # Only in that folder: the import hook of an editable install would find the clone's for an installed package.
    return PathFinder.find_spec(f"fastpeft_kernels.{name}", kernels.submodule_search_locations) is not None


def warn_if_missing() -> None:
    """One RuntimeWarning when the CPU kernels are missing: everything works, on PyTorch's own operations."""
    reason = why_not_cpu()
    if reason:
        warnings.warn(f"fastpeft runs on its torch backend alone: {reason}", RuntimeWarning, stacklevel=3)


def triton(stem: str) -> Any:
    """The launchers of an op's Triton kernels, or None (`why_not_triton` tells why). Imports triton when first asked."""
    return _load_triton(stem)[0]


def why_not_triton(stem: str) -> str | None:
    return _load_triton(stem)[1]


@functools.cache
def _load_triton(stem: str) -> tuple[ModuleType | None, str | None]:
    if importlib.util.find_spec("triton") is None:
        return None, "triton is not installed (it comes with PyTorch's CUDA builds)"
    reason = _package()[1]
    return (None, reason) if reason else (importlib.import_module(f"fastpeft_kernels.{stem}_launch"), None)


@functools.cache
def _package() -> tuple[Path, str | None]:
    """The folder of fastpeft_kernels, built from the same sources, or why there is none."""
    try:
        kernels = importlib.import_module("fastpeft_kernels")
    except ModuleNotFoundError as error:
        if error.name != "fastpeft_kernels":
            raise
        return Path(), f"the package fastpeft_kernels is not installed; {_how_to_install()}."
    folder = Path(kernels.__path__[0])
    _same_build("the package fastpeft_kernels", folder, _build.package_id(folder), _build.package_id(_PACKAGE))
    return folder, None


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    folder, reason = _package()
    if reason:
        return None, reason
    if not is_built(name):
        return None, (
            f"there is no compiled fastpeft_kernels.{name} for this Python in {folder} "
            f"(a pure-Python install: asked for, or no C++ compiler, or not Linux); {_how_to_install()}."
        )
    try:
        module = importlib.import_module(f"fastpeft_kernels.{name}")
    except ImportError as error:
        return None, f"the compiled fastpeft_kernels.{name} does not load here ({error}); {_how_to_install()}."
    _same_build(f"the compiled module fastpeft_kernels.{name}", folder, module.build_id, _build.package_id(_PACKAGE))
    return module, None


def _same_build(what: str, where: Path, build_id: str | None, expected: str | None) -> None:
    if build_id != expected:
        raise ImportError(
            f"fastpeft in {_PACKAGE} has build id {expected}, but {what} in {where} has {build_id}: "
            f"they come from different sources; {_how_to_install()}."
        )


def _how_to_install() -> str:
    root = _build.clone_root(_PACKAGE)
    if root:
        return f"run `pip install -e {root}` (it recompiles only what changed)"
    return "run `pip install --force-reinstall --no-deps fastpeft` with a C++ compiler at hand"
