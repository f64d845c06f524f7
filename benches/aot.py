"""Compiles every Triton kernel ahead of time, as the launchers would start it on an A100 and an H100; needs no GPU.

    python -m benches.aot            # prints the table
    python -m benches.aot --write    # and rewrites benches/COMPILED.md

Kernels are found by running each op's backend on a few shapes with Triton's launch replaced by compilation: what is
compiled is what would run, specialised on the same alignments. Registers, spills and shared memory come from ptxas.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.10 turns it off unless told

TARGETS = {80: (108, 166912), 90: (132, 232448)}  # compute capability: multiprocessors, shared memory a program may use
OF_SMALL = 101376  # shared memory of a program on sm_86, sm_89, sm_120
CUDA = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
TABLE = Path(__file__).with_name("COMPILED.md")
SIZES = ("M", "C", "K", "J", "N", "R", "B", "H", "T", "S", "A", "P", "GROUP", "TOTAL", "PROGRAMS", "SIZE", "BYTES")
SASS = {"wgmma": "HGMMA", "mma": "HMMA", "TMA loads": "UTMALDG", "local": r"\b(?:LDL|STL)\b"}


@dataclass(frozen=True)
class Compiled:
    """One kernel in one configuration on one target."""

    kernel: str
    config: str
    target: str
    warps: int
    registers: int
    spills: int  # bytes stored
    shared: int  # bytes
    counts: tuple[int | str, ...]  # of SASS

    def row(self) -> str:
        cells = (
            self.kernel,
            self.config,
            self.target,
            self.warps,
            self.registers,
            self.spills,
            self.shared,
            *self.counts,
        )
        return f"| {' | '.join(map(str, cells))} |"


HEAD = ("kernel", "configuration", "target", "warps", "registers", "spilled bytes", "shared bytes", *SASS)


class _NoGpu:
    """What compiling asks of Triton's driver."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return self.target.arch  # Triton caches kernels by device: targets must differ

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


@contextlib.contextmanager
def compiling(capability: int, *launchers: Any) -> Iterator[list[tuple[str, str, Any]]]:
    """Inside, every launch of a Triton kernel compiles it instead, and is listed as (kernel, configuration, binary)."""
    import triton
    from triton.runtime.jit import JITFunction

    found: list[tuple[str, str, Any]] = []
    run, asked = JITFunction.run, ("capability", "multiprocessors")
    saved = [(module, name, getattr(module, name)) for module in launchers for name in asked if hasattr(module, name)]
    machine = {"capability": divmod(capability, 10), "multiprocessors": TARGETS[capability][0]}

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        binary = run(self, *args, grid=grid, warmup=True, **kwargs)
        shown = {k: v for k, v in kwargs.items() if k.isupper() and k not in SIZES}
        if isinstance(kwargs.get("mask_ptr"), torch.Tensor):
            shown["mask"] = str(kwargs["mask_ptr"].dtype).removeprefix("torch.")
        if "prefix" in kwargs:  # which of its tensors are there
            shown["prefix"] = "".join("0" if t is None else "1" for t in kwargs["prefix"])
        shown |= {"num_stages": kwargs.get("num_stages", "")}
        tensors = [a for a in (*args, kwargs.get("q_ptr"), *kwargs.values()) if isinstance(a, torch.Tensor)]
        dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else "bfloat16"
        config = f"{dtype} " + " ".join(f"{k}={v}" for k, v in shown.items())
        found.append((self.fn.__name__, config.replace("|", "/"), binary))

    triton.runtime.driver.set_active(_NoGpu(capability))
    JITFunction.run = compile_only
    for module, name, _ in saved:
        setattr(module, name, lambda device, answer=machine[name]: answer)
    try:
        yield found
    finally:
        JITFunction.run = run
        for module, name, function in saved:
            setattr(module, name, function)


def report(kernel: str, config: str, binary: Any, capability: int) -> Compiled:
    """Registers, spills and instruction counts of one compiled kernel."""
    import triton

    compiler = sys.modules["triton.backends.nvidia.compiler"]
    tools = triton.knobs.nvidia
    ptxas = compiler.get_ptxas(capability) if hasattr(compiler, "get_ptxas") else tools.ptxas
    arch = f"sm_{capability}{'a' if capability >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(binary.asm["ptx"])
        said = subprocess.run(
            [ptxas.path, "-v", f"--gpu-name={arch}", ptx, "-o", os.devnull], capture_output=True, text=True, check=True
        ).stderr
        cubin.write_bytes(binary.asm["cubin"])
        sass = subprocess.run([tools.nvdisasm.path, "-c", cubin], capture_output=True, text=True, check=True).stdout

    def number(pattern: str) -> int:
        match = re.search(pattern, said)
        return int(match[1]) if match else 0

    counts = tuple(len(re.findall(pattern, sass)) for pattern in SASS.values())
    return Compiled(
        kernel, config, arch, binary.metadata.num_warps, number(r"Used (\d+) registers"),
        number(r"(\d+) bytes spill stores"), binary.metadata.shared, counts,
    )  # fmt: skip


def lora_linear() -> None:
    """Every path of the op: dtypes, dropout, a group, both plans, weights that TMA can and cannot read."""
    from fastpeft.backends import plans
    from fastpeft.backends.triton import lora_linear as triton
    from fastpeft.ops.lora_linear import backward, forward

    for fused_from in ({}, {"float32": 1, "bfloat16": 1, "float16": 1}):
        for dtype in (torch.bfloat16, torch.float32, torch.float16):
            for k, n, r, p in ((512, 1024, 16, 0.0), (512, 1024, 16, 0.1), (510, 1022, 16, 0.0), (512, 1024, 128, 0.0)):
                x, dy = torch.empty(1024, k, dtype=dtype), torch.empty(1024, n, dtype=dtype)
                weight, bias = torch.empty(n, k, dtype=dtype), torch.empty(n, dtype=dtype)
                a, b, scale, seed = torch.empty(r, k), torch.empty(n, r), torch.ones(()), torch.tensor(1)
                for count in (1, 3) if (k, r) == (512, 16) else (1,):
                    of = [[t] * count for t in (weight, bias, a, b, scale, None)]
                    yes = [True] * count
                    with plans.override("gpu", fused_from_m={"interpreter": fused_from}):
                        _, s = forward(triton, x, *of, p, seed)
                        backward(triton, [dy] * count, x, s, of[0], *of[2:5], p, seed, True, yes, yes, yes)


def linear4bit(launchers: Any) -> None:
    """The launchers alone, at the sizes they tell apart: few rows and many, nested scales or not; dropout, a K that is not a
    multiple of the blocksize, and one that no word of 8 codes fits."""
    for m in (16, 64, 512, 8192):
        for nested in (False, True):
            packed(launchers, m, 4096, 4096, torch.bfloat16, nested, 0.0)
    for m in (16, 512):
        packed(launchers, m, 4096, 4096, torch.float16, False, 0.0)
        packed(launchers, m, 4096, 4096, torch.float32, True, 0.0)
    for m in (16, 64, 512, 8192):
        packed(launchers, m, 4096, 4096, torch.bfloat16, True, 0.1)
    packed(launchers, 512, 4096, 4304, torch.bfloat16, True, 0.0)
    packed(launchers, 512, 4096, 4098, torch.bfloat16, True, 0.0)


def packed(launchers: Any, m: int, n: int, k: int, dtype: torch.dtype, nested: bool, p: float) -> None:
    """One layer with a rank of 16: the weight decoded apart, forward, backward into dx and onto it."""
    from fastpeft.reference.lora_linear import ranks_dtype
    from fastpeft.weight4bit import Weight4bit

    r, blocks = 16, -(-n * k // 64)
    scales = torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32)
    absmax, offset = (torch.empty(-(-blocks // 256)), torch.empty(())) if nested else (None, None)
    data = torch.empty(n * k // 2, dtype=torch.uint8)
    weight = Weight4bit(data, scales, absmax, offset, (n, k), dtype, "nf4", 64)
    x, dy, s = (
        torch.empty(m, k, dtype=dtype),
        torch.empty(m, n, dtype=dtype),
        torch.empty(m, r, dtype=ranks_dtype(dtype)),
    )
    a, b, bias, seed = torch.empty(r, k), torch.empty(n, r), torch.empty(n, dtype=dtype), torch.tensor(1) if p else None
    if p == 0.0:
        launchers.dequantize(weight, dtype)
        launchers.project(x, [weight], [bias], s, [b], [torch.ones(())], [None])
    for before in ([], [None]):
        count = len(before) + 1
        launchers.combine([dy] * count, [weight] * count, s, [a, *before], [True] * count, p, seed)


def prefix_attention() -> None:
    """The whole op: element sizes and the three widths of D, joint and separate, masks, dropout, an adapter a row, decoding."""
    for d in (64, 128, 256):
        attention(torch.bfloat16, d)
        attention(torch.bfloat16, d, causal=True, gates=True)
        attention(torch.float32, d, causal=True, gates=True)
    for d in (64, 128):
        attention(torch.bfloat16, d, separate=True, gates=True, masked="keys", indexed=True)
        attention(torch.bfloat16, d, masked="additive", p=0.1)
        attention(torch.float16, d, gates=True)
    attention(torch.bfloat16, 128, t=1)


def attention(
    dtype: torch.dtype, d: int, t: int = 1024, causal: bool = False, separate: bool = False, gates: bool = False,
    masked: str = "", indexed: bool = False, p: float = 0.0,
) -> None:  # fmt: skip
    """Forward and backward of 2 rows, 8 heads in groups of 4, 1024 tokens and 32 prefix positions."""
    from fastpeft.backends.triton.prefix_attention import fused, grad_fused

    a = 2 if indexed else 1
    q, k, v = (torch.empty(2, h, n, d, dtype=dtype) for h, n in ((8, t), (2, 1024), (2, 1024)))
    pk, pv = torch.empty(a, 2, 32, d), torch.empty(a, 2, 32, d)
    gate = torch.empty(2, 1, t, 32) if gates else None
    bias, out = (torch.empty(a, 8, 32) if gates else None), (torch.empty(1, 8) if separate else None)
    index = torch.zeros(2, dtype=torch.int32) if indexed else None
    masks = {"keys": torch.ones(2, 1024, dtype=torch.bool), "additive": torch.empty(2, 1, t, 1024, dtype=dtype)}
    prefix = (pk, pv, gate, gate, bias, out, index, None, None)
    how = (causal, masks.get(masked), separate, p, torch.tensor(1) if p else None, d**-0.5)
    o, o_x, lse, lse_p = fused(q, k, v, *prefix, *how)
    needs = [tensor is not None for tensor in (q, k, v, *prefix[:6])]
    grad_fused(o, q, k, v, *prefix, o_x if separate else o, lse, lse_p, *how, needs)


def cuda_kernels(capability: int) -> list[Compiled]:
    """The kernels of csrc/cuda, by nvcc; empty where there is none."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return []
    found, arch = [], f"sm_{capability}{'a' if capability >= 90 else ''}"
    code = f"-gencode=arch=compute_{arch[3:]},code={arch}"
    for source in sorted(CUDA.glob("*.cu")):
        threads = re.search(r"\bTHREADS = (\d+)", source.read_text())
        assert threads, f"{source.name} names no THREADS"
        command = [nvcc, "-std=c++17", "-O3", code, "-cubin", "-Xptxas", "-v", str(source), "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        said = subprocess.run(["c++filt", "-p"], input=said, capture_output=True, text=True, check=True).stdout
        entry = r"Compiling entry function '(.+?)' for.*?(\d+) bytes spill stores.*?Used (\d+) registers"
        for name, spills, registers in re.findall(entry, said, re.DOTALL):
            kernel, of = re.search(r"(\w+)(?:<(.+)>)?$", name).groups()
            found.append(
                Compiled(
                    f"CUDA {kernel}",
                    of or "",
                    arch,
                    int(threads[1]) // 32,
                    int(registers),
                    int(spills),
                    0,
                    ("-",) * len(SASS),
                )
            )
    return found


def broken(found: Iterable[Compiled]) -> list[str]:
    """What breaks a bound: shared memory of the target, a spill on sm_90a, a TMA GEMM without wgmma or TMA loads, a GEMM that
    decodes its weight with no second program an SM to multiply meanwhile."""
    said = []
    for c in found:
        limit = TARGETS[int(c.target[3:5])][1]
        if c.target == "sm_80" and c.kernel.startswith("prefix_attention"):
            limit = OF_SMALL  # its blocks there are those of every machine but the largest
        if c.shared > limit:
            said.append(f"{c.kernel} {c.config}, {c.target}: {c.shared} bytes of shared memory, {limit} are there")
        if c.spills and c.target == "sm_90a":
            said.append(f"{c.kernel} {c.config}, {c.target}: {c.spills} bytes spilled")
        wgmma, _, tma, _ = c.counts
        if "DESCRIPTORS=True" in c.config and not (tma and (wgmma or "float32" in c.config)):
            said.append(f"{c.kernel} {c.config}, {c.target}: {wgmma} wgmma, {tma} TMA loads")
        alone = c.registers * c.warps * 32 > 65536 // 2 or c.shared + 1024 > 233472 // 2
        if c.kernel == "linear4bit_gemm_kernel" and wgmma and alone:
            said.append(
                f"{c.kernel} {c.config}, {c.target}: {c.registers} registers, {c.shared} bytes: one program an SM"
            )
    return said


def read_table() -> list[Compiled]:
    """The rows of the committed table."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in TABLE.read_text().splitlines()
        if "sm_" in line
    ]
    return [
        Compiled(*r[:3], *map(int, r[3:7]), tuple(int(n) if n.isdigit() else n for n in r[7:]))  # type: ignore[arg-type]
        for r in rows
    ]


def compile_all(capabilities: Iterable[int] = TARGETS) -> list[Compiled]:
    from fastpeft import native

    launchers = [native.triton(stem) for stem in ("lora_linear", "linear4bit", "prefix_attention")]
    if launchers[0] is None:
        raise SystemExit(native.why_not_triton("lora_linear"))
    found = []
    for capability in capabilities:
        with compiling(capability, *launchers) as kernels:
            lora_linear()
            linear4bit(launchers[1])
            prefix_attention()
        unique = {(name, config): binary for name, config, binary in kernels}
        found += [report(name, config, binary, capability) for (name, config), binary in unique.items()]
        found += cuda_kernels(capability)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"rewrite {TABLE.name}")
    parser.add_argument(
        "--target", type=int, choices=TARGETS, action="append", help="compute capability (default: all)"
    )
    parser.add_argument("--check", action="store_true", help="exit code 1 if a kernel breaks a bound")
    options = parser.parse_args()
    import triton

    found = compile_all(options.target or TARGETS)
    rows = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}", *(c.row() for c in found)]
    about = f"Compiled by Triton {triton.__version__} and nvcc; generated by `python -m benches.aot --write`."
    text = "\n".join([about, "", *rows, ""])
    print(text)
    if options.write:
        TABLE.write_text(text)
    said = broken(found)
    print(*said, sep="\n", file=sys.stderr)
    return 1 if said and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
