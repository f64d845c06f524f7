"""Builds the compiled modules of fastpeft with ninja, because their flags differ by file.

    csrc/python/cpu.cpp    + csrc/cpu/*.cpp  -> fastpeft_kernels._cpu    where there is a C++ compiler
    csrc/python/cuda.cpp   + csrc/cuda/*.cu  -> fastpeft_kernels._cuda   where nvcc is there too

CPU kernels (csrc/cpu) are compiled once for each instruction set, every other file for the baseline of the
architecture: what a machine cannot run stays in object files that it never enters. No torch is needed.
FASTPEFT_PURE_PYTHON=1 leaves all compiled modules out; CXX and MAX_JOBS mean what they usually do.
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
BUILD = runpy.run_path(str(ROOT / "fastpeft" / "_build.py"))
BUILD_ID = BUILD["source_id"](ROOT / "csrc")

# No contraction: 4-bit scales are a product and a sum rounded apart; the kernels write out the FMAs that they want.
CXX_FLAGS = "-O3 -std=c++17 -ffp-contract=off -fPIC -fopenmp -fvisibility=hidden -Wall -Wextra"
ISA_FLAGS = {
    "scalar": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c",
    "avx512bf16": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mfma -mf16c",
}
ISAS = [*ISA_FLAGS] if platform.machine().lower() in ("x86_64", "amd64") else ["scalar"]
# Machine code for A100 and H100, PTX for what comes between and after them.
NVCC_FLAGS = (
    "-O3 -std=c++17 --threads 2 -Xcompiler -fPIC,-fvisibility=hidden -gencode arch=compute_80,code=sm_80 "
    "-gencode arch=compute_80,code=compute_80 -gencode arch=compute_90a,code=sm_90a"
)


def say(message: str) -> None:
    print(f"fastpeft: {message}", file=sys.stderr, flush=True)


def find_compiler() -> str | None:
    """The C++ compiler to use, or None (after saying so) where this has to be a pure-Python install."""
    if os.environ.get("FASTPEFT_PURE_PYTHON", "0") not in ("", "0"):
        say("FASTPEFT_PURE_PYTHON is set: installing without compiled kernels, everything runs on the torch backend")
        return None
    if sys.platform != "linux":
        say(f"no compiled kernels for {sys.platform} yet: installing without, everything runs on the torch backend")
        return None
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
    if compiler is None:
        say("WARNING: no C++ compiler found (g++, c++, clang++ or $CXX): installing WITHOUT compiled kernels.")
        say("WARNING: all works on the torch backend, but slower. Install a compiler, then run this pip command again.")
    return compiler


def find_cuda() -> tuple[str, Path] | None:
    """nvcc and the root of its toolkit; nvcc itself is asked for it, since the nvcc on PATH may be a wrapper script."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    dry_run = subprocess.run([nvcc, "-dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.*)$", dry_run.stderr, re.MULTILINE)
    if top is None:
        raise CompileError(f"{nvcc} -dryrun names no TOP: {dry_run.stderr.strip() or dry_run.stdout.strip()}")
    return nvcc, Path(top[1].strip()).resolve()


def sources(module: str) -> list[str]:
    """A module's files, relative to ROOT; none where nothing binds it to Python."""
    csrc = ROOT / "csrc"
    python = csrc / "python" / f"{module.removeprefix('_')}.cpp"  # it includes the faces of the ops
    kernels = csrc.glob("cuda/*.cu" if module == "_cuda" else "cpu/*.cpp")
    return sorted(path.relative_to(ROOT).as_posix() for path in [python, *kernels]) if python.exists() else []


def objects(source: str) -> dict[str, str]:
    """The object files made of one source, each with its compiler flags."""
    if source.endswith(".cu"):
        return {f"{source}.o": NVCC_FLAGS}
    if source.startswith("csrc/python/"):
        includes = (pybind11_headers(), sysconfig.get_path("include"))
        defines = shlex.join([f"-isystem{path}" for path in includes] + [f'-DFASTPEFT_BUILD_ID="{BUILD_ID}"'])
        return {f"{source}.o": f"{CXX_FLAGS} -O2 {defines}"}  # no loops: a second less of compiling
    if source == "csrc/cpu/dispatch.cpp":  # chooses the instruction set
        return {f"{source}.o": CXX_FLAGS}
    # no exceptions: else every object exports the same weak reference to C++'s handler
    flags = f"{CXX_FLAGS} -fno-exceptions"
    return {f"{source}.{isa}.o": f"{flags} -DFASTPEFT_ISA={isa} {ISA_FLAGS[isa]}" for isa in ISAS}


def longest_first(modules: dict[str, list[str]]) -> list[str]:
    """All sources in the order to compile: what is short comes last, so that no core is left alone for long.

    A file with pybind11 takes 10 s whatever its size; the others take 0.3 to 1 s a KB.
    """
    files = {file for files in modules.values() for file in files}
    return sorted(files, key=lambda file: (not file.startswith("csrc/python/"), -(ROOT / file).stat().st_size, file))


def pybind11_headers() -> str:
    """A copy of pybind11's headers in build/: an isolated build has them at a new path, and newer, every time."""
    import pybind11

    copy = Path("build", "native", f"pybind11-{pybind11.__version__}")
    if not (ROOT / copy).is_dir():
        shutil.copytree(pybind11.get_include(), ROOT / f"{copy}.part", dirs_exist_ok=True)
        (ROOT / f"{copy}.part").rename(ROOT / copy)
    return str(copy)


def ninja_file(modules: dict[str, list[str]], out: Path, compiler: str, cuda: tuple[str, Path] | None) -> str:
    """build.ninja: for each module its objects, then the link."""

    def path(text: object) -> str:
        return re.sub(r"([$ :])", r"$\1", str(text))

    def command(text: str) -> str:
        return text.replace("$", "$$")

    def compile_rule(rule: str, program: str) -> str:
        run = f"{command(program)} -MMD -MF $out.d $flags -c $in -o $out"
        return f"rule {rule}\n  command = {run}\n  depfile = $out.d\n  deps = gcc"

    includes, libraries, lines = "", "-fopenmp -pthread", [f"builddir = {path(out)}"]
    if cuda:
        nvcc, toolkit = cuda
        includes = shlex.quote(f"-isystem{toolkit}/include")
        cudart = f"{shlex.quote(f'-L{toolkit}/lib64')} -lcudart_static -ldl -lrt"
        lines.append(compile_rule("nvcc", shlex.quote(nvcc)))
    lines.append(compile_rule("cxx", f"{compiler} {includes}".rstrip()))
    lines.append(f"rule link\n  command = {command(compiler)} -shared -s $in -o $out {libraries} $libraries")
    for file in longest_first(modules):
        rule = "nvcc" if file.endswith(".cu") else "cxx"
        for name, flags in objects(file).items():
            lines.append(f"build {path(out / name)}: {rule} {path(file)}\n  flags = {command(flags)}")
    for module, files in modules.items():
        inputs = [path(out / name) for file in files for name in objects(file)]
        lines.append(f"build {path(out / f'{module}.so')}: link {' '.join(inputs)}")
        if module == "_cuda":
            lines.append(f"  libraries = {command(cudart)}")
    return "\n".join(lines) + "\n"


class NinjaBuildExt(build_ext):
    """Runs ninja in build/native (kept between runs: only what changed is compiled), then puts the modules in place."""

    def build_extensions(self) -> None:
        import fcntl

        import ninja

        compiler = find_compiler()
        assert compiler is not None, "extensions without a compiler"
        modules = {ext.name.rpartition(".")[2]: ext.sources for ext in self.extensions}
        out = Path("build", "native", f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}")
        script = ROOT / out / "build.ninja"
        script.parent.mkdir(parents=True, exist_ok=True)
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        with open(ROOT / out / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second install from this folder waits for the first
            script.write_text(ninja_file(modules, out, compiler, find_cuda() if "_cuda" in modules else None))
            ran = subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-f", script, "-j", jobs], cwd=ROOT)
        if ran.returncode:
            raise CompileError(
                f"compiling {' and '.join(modules)} with {compiler} failed (its message stands above). Report it; "
                "meanwhile FASTPEFT_PURE_PYTHON=1 in the environment installs fastpeft without compiled kernels."
            )
        for module, ext in zip(modules, self.extensions, strict=True):
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / out / f"{module}.so", target)


class CleanBuild(build):
    """Starts from an empty build/lib: files that were deleted or renamed since the last build stay out of the wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class StampedBuildPy(build_py):
    """Writes the build id into what gets installed; a clone computes it from csrc/ instead."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for package in ("fastpeft", "fastpeft_kernels"):
                Path(self.build_lib, package, BUILD["STAMP"]).write_text(BUILD_ID + "\n")


def extensions() -> list[Extension]:
    if find_compiler() is None:
        return []
    modules = ["_cpu", "_cuda"] if find_cuda() else ["_cpu"]
    return [Extension(f"fastpeft_kernels.{module}", files) for module in modules if (files := sources(module))]


setup(
    packages=[
        *find_packages(include=["fastpeft", "fastpeft.*"]),
        "fastpeft_kernels",
        *(f"fastpeft._benches{part}" for part in ("", ".kit", ".suites")),
    ],
    package_dir={"fastpeft_kernels": "kernels/fastpeft_kernels", "fastpeft._benches": "benches"},
    package_data={"fastpeft": ["py.typed", "backends/*.json"], "fastpeft._benches": ["*.json", "*.html"]},
    include_package_data=False,
    ext_modules=extensions(),
    cmdclass={"build": CleanBuild, "build_ext": NinjaBuildExt, "build_py": StampedBuildPy},
)
