"""Builds csrc/cuda for the CPU, on tests/cuda/emulate.h, so that the CUDA kernels are run where there is no GPU."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "emulation"


@functools.cache
def module() -> ModuleType:
    """The module `_cuda`, with the interface of the real one; tensors stay on the CPU."""
    sources = [ROOT / "csrc" / "python" / "cuda.cpp", *sorted((ROOT / "csrc").glob("cuda/*.cu"))]
    headers = [
        *(ROOT / "csrc").rglob("*.h"),
        *(ROOT / "csrc" / "python").glob("*.cpp"),
        ROOT / "tests" / "cuda" / "emulate.h",
    ]
    out = BUILD / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not out.exists() or out.stat().st_mtime < max(p.stat().st_mtime for p in (*sources, *headers)):
        BUILD.mkdir(parents=True, exist_ok=True)
        flags = [
            "-O1",
            "-std=c++17",
            "-fPIC",
            "-fvisibility=hidden",
            "-DFASTPEFT_EMULATE",
            f"-I{ROOT / 'tests' / 'cuda'}",
        ]
        flags += [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
        running = []
        for source in sources:
            target = BUILD / f"{source.name}.o"
            running.append((target, subprocess.Popen(["g++", *flags, "-x", "c++", "-c", source, "-o", target])))
        for _, process in running:
            assert process.wait() == 0, "csrc/cuda does not compile on the emulation"
        subprocess.run(["g++", "-shared", *(target for target, _ in running), "-o", out], check=True)
    spec = importlib.util.spec_from_file_location("_cuda", out)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
