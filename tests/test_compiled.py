"""GPU kernels as compiled for sm_80 and sm_90a: the committed table keeps its bounds, and so does what is compiled now."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benches import aot

ROOT = Path(__file__).resolve().parent.parent
STEMS = ("lora_linear", "linear4bit", "prefix_attention")  # with Triton kernels


def test_the_table_keeps_the_bounds_and_misses_no_kernel():
    rows = aot.read_table()
    assert not aot.broken(rows)
    for target in ("sm_80", "sm_90a"):
        names = {row.kernel for row in rows if row.target == target}
        sources = [ROOT / "kernels" / "fastpeft_kernels" / f"{stem}.py" for stem in STEMS]
        triton = [text for source in sources for text in source.read_text().split("def ")[1:]]
        cuda = "".join(path.read_text() for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
        wanted = {text.split("(")[0] for text in triton if text.split("(")[0].endswith("_kernel")}
        wanted |= {f"CUDA {name}" for name in re.findall(r"\b(\w+_kernel)\(", cuda)}
        assert wanted and wanted <= names, f"{target}: run `python -m benches.aot --write`; missing {wanted - names}"


def test_products_with_few_rows_leave_registers_for_two_blocks():
    """256 threads: 128 registers for up to 4 rows (two blocks cover each other's start); no spills where x takes more."""
    rows = [row for row in aot.read_table() if row.kernel == "CUDA small_kernel"]
    assert len(rows) == 8
    for row in rows:
        assert row.spills == 0 and row.registers <= (128 if row.config.endswith("1, 1, 4") else 255), row


def test_bounds_bind():
    gemm = next(r for r in aot.read_table() if "DESCRIPTORS=True" in r.config and "bfloat16" in r.config)
    assert not aot.broken([gemm])
    assert "spilled" in aot.broken([replace(gemm, spills=8)])[0]
    assert "shared memory" in aot.broken([replace(gemm, shared=300_000)])[0]
    assert "0 wgmma" in aot.broken([replace(gemm, counts=(0, 4, 6, 0))])[0]
    anywhere = replace(gemm, kernel="prefix_attention_kernel", config="", target="sm_80", shared=110_000)
    assert "101376 are there" in aot.broken([anywhere])[0]


def test_a_weight_is_decoded_while_another_program_multiplies():
    rows = [r for r in aot.read_table() if r.kernel == "linear4bit_gemm_kernel" and r.target == "sm_90a"]
    big = [r for r in rows if "BLOCK_M=128 BLOCK_C=128" in r.config]
    assert {nested for r in big for nested in (True, False) if f"NESTED={nested}" in r.config} == {True, False}
    assert all(r.counts[0] for r in rows if "DESCRIPTORS=True" in r.config and "float32" not in r.config)
    assert "one program an SM" in aot.broken([replace(big[0], registers=136)])[0]
    assert "one program an SM" in aot.broken([replace(big[0], shared=120_000)])[0]


@pytest.mark.slow
def test_what_is_compiled_now_keeps_the_bounds():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    ran = subprocess.run(
        [sys.executable, "-m", "benches.aot", "--check"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
