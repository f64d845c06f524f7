"""The native CPU kernels themselves: every function x dtype x instruction set against float64, on guarded memory.

Every buffer ends where a page begins that may not be touched, gaps between rows are poisoned with NaN, and outputs' gaps
must come back as they were. Tolerances are derived, not picked: an fp32 sum of n products done in runs of 128 is off by at
most (128 + n/4) * 2^-24 * Σ|products|, and each rounding to the dtype adds half a unit in the last place.
"""

from __future__ import annotations

import shutil
import subprocess
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from _guarded import Memory

from fastpeft import native

native = _native.cpu()
if native is None:
    pytest.skip(f"no native CPU module: {_native.why_not_cpu()}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")
ISAS = list(native.isas())
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# M, K, N, R; the last four are large enough for several threads, in rows and in columns
SHAPES = [
    (1, 1, 1, 1),
    (0, 5, 3, 2),
    (5, 0, 4, 3),
    (4, 3, 0, 2),
    (1, 37, 19, 8),
    (3, 17, 31, 1),
    (33, 129, 127, 5),
    (7, 67, 41, 512),
    (32, 128, 128, 16),
    (100, 301, 203, 17),
    (97, 144, 272, 64),
    (20, 1029, 515, 16),
]

# ---- memory ----


@pytest.fixture
def memory():
    memory = Memory()
    yield memory
    memory.close()


@pytest.fixture(params=ISAS)
def isa(request):
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


def gaps(t: torch.Tensor) -> torch.Tensor:
    """The elements between the rows, as a copy."""
    rows, columns = t.shape
    ld = t.stride(0)
    if rows < 2 or ld == columns:
        return torch.empty(0)
    return t.as_strided((rows - 1, ld - columns), (ld, 1), t.storage_offset() + columns).clone()


def ptr(t: torch.Tensor | None) -> int:
    return 0 if t is None or t.numel() == 0 else t.data_ptr()


# ---- reference ----


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def check(got: torch.Tensor, exact: torch.Tensor, size: torch.Tensor, depth: int, dtype: torch.dtype, what: str):
    """got = exact within the rounding of `dtype` and of an fp32 sum of `depth` terms whose absolute values sum to `size`."""
    assert got.shape == exact.shape
    if got.numel() == 0:
        return
    got = got.double()
    special = ~torch.isfinite(exact)
    assert torch.equal(got[special].nan_to_num(7), exact[special].nan_to_num(7)), f"{what}: NaN or Inf differs"
    tiny = {torch.float16: 2.0**-24}.get(dtype, 1e-37)  # subnormals
    allowed = (128 + depth / 4) * 2.0**-24 * size + torch.finfo(dtype).eps * 0.51 * exact.abs() + tiny
    bad = ((got - exact).abs() > allowed) & ~special
    worst = ((got - exact).abs() / allowed)[~special].max() if (~special).any() else 0
    assert not bad.any(), f"{what}: {bad.sum()} of {bad.numel()} beyond the bound, worst {worst:.2f} x"


def philox(counter, key):
    """Philox4x32-10 over columns of numpy uint64, all four words."""
    c, (k0, k1) = [np.asarray(w, dtype=np.uint64) for w in counter], [np.uint64(k) for k in key]
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(p1 >> shift) ^ c[1] ^ k0, p1 & low, (p0 >> shift) ^ c[3] ^ k1, p0 & low]
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return c


def mask_words(seed: int, rows: range, columns: int, projection: int) -> np.ndarray:
    """[len(rows), columns]"""
    row = np.array(rows, dtype=np.uint64)[:, None]
    block = np.arange(-(-columns // 4), dtype=np.uint64) + np.zeros_like(row)
    zero, low, shift = np.zeros_like(block), np.uint64(0xFFFFFFFF), np.uint64(32)
    counter = [block, (row & low) + zero, zero + np.uint64(projection), (row >> shift) + zero]
    words = philox(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    return np.stack(words, -1).reshape(len(rows), block.shape[1] * 4)[:, :columns]


def dropped(x: torch.Tensor, p: float, seed: int, projection: int) -> torch.Tensor:
    """mask / (1 - p) [M, K], float64."""
    if p == 0:
        return torch.ones_like(x)
    words = torch.from_numpy(mask_words(seed, range(len(x)), x.shape[1], projection).astype(np.int64))
    return (words >= threshold(p)).double() * float(np.float32(1 / (1 - p)))


def threshold(p: float) -> int:
    return int(np.ceil(p * 2**32))


# ---- philox ----


def test_philox_known_answers():
    ones = 0xFFFFFFFF
    assert [int(w) for w in philox([0, 0, 0, 0], (0, 0))] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [int(w) for w in philox([ones] * 4, (ones, ones))] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert [int(w) for w in philox(pi, (0xA4093822, 0x299F31D0))] == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("row", [0, 1, 2**32 - 1, 3 * 2**32, 2**62 + 12345])
@pytest.mark.parametrize(("seed", "projection"), [(0, 0), (0x0123456789ABCDEF, 1), (-1, 2**32 - 1)])
def test_philox_words(isa, memory, row, seed, projection):
    for count in (1, 3, 15, 16, 17, 32, 101):
        out = memory.empty(1, count, torch.float32).view(torch.int32)
        native.philox_words(seed, row, count, projection, out.data_ptr())
        expected = mask_words(seed, range(row, row + 1), count, projection).astype(np.uint32)
        assert np.array_equal(out.numpy().view(np.uint32), expected), f"{isa}, row {row}, {count} words"


# ---- the passes ----


class Case:
    """Operands of one shape on guarded memory (made when first used), and what the passes must give, in float64."""

    def __init__(self, memory, shape, dtype, adapter_dtype, p=0.0, projections=1, scale_stride=1):
        self.memory, self.dtype, self.adapter_dtype, self.p = memory, dtype, adapter_dtype, p
        self.M, self.K, self.N, self.R = shape
        self.seed, self.threads, self.scale_stride = 0x1234567890ABCDEF, 2, scale_stride
        self.columns = [1 + self.R * i for i in range(projections)]  # of s and t; column 0 belongs to no one

    def random(self, rows: int, columns: int, dtype=None, gap: int = 3) -> torch.Tensor:
        return self.memory.copy(normal(rows, columns), dtype or self.dtype, gap)

    x = cached_property(lambda self: self.random(self.M, self.K))
    dx = cached_property(lambda self: self.random(self.M, self.K))
    y = cached_property(lambda self: self.random(self.M, self.N))
    dy = cached_property(lambda self: self.random(self.M, self.N))
    w = cached_property(lambda self: self.random(self.N, self.K))
    s = cached_property(lambda self: self.random(self.M, 1 + self.R * len(self.columns)))
    t = cached_property(lambda self: self.random(self.M, 1 + self.R * len(self.columns)))
    a = cached_property(lambda self: [self.random(self.R, self.K, self.adapter_dtype) for _ in self.columns])
    b = cached_property(lambda self: self.random(self.N, self.R, self.adapter_dtype))
    bias = cached_property(lambda self: self.random(1, self.N, torch.float32, 0))
    scale = cached_property(lambda self: self.random(1, self.R if self.scale_stride else 1, torch.float32, 0))

    def adapters(self) -> list[torch.Tensor]:
        return [a.to(self.dtype).double() for a in self.a]

    def scaled_b(self) -> torch.Tensor:
        return (self.scale * self.b.float()).to(self.dtype).double()

    def masks(self) -> list[torch.Tensor]:
        return [dropped(self.x.double(), self.p, self.seed, i) for i in range(len(self.a))]

    def down(self) -> int:
        rows = [
            (ptr(a), CODE[a.dtype], self.R, a.stride(0), column, i)
            for i, (a, column) in enumerate(zip(self.a, self.columns, strict=True))
        ]
        return native.lora_linear_down(
            CODE[self.dtype], ptr(self.x), self.M, self.K, self.x.stride(0), ptr(self.s), self.s.stride(0),
            rows, threshold(self.p), self.p, self.seed, self.threads,
        )  # fmt: skip

    def b_args(self):
        return ptr(self.b), CODE[self.b.dtype], self.b.stride(0), ptr(self.scale), self.scale_stride

    def s_args(self):
        return (self.s.data_ptr() + self.s.element_size() if self.s.numel() else 0), self.s.stride(0), self.R

    def up(self, bias=True) -> int:
        return native.lora_linear_up(
            CODE[self.dtype], ptr(self.y), self.M, self.N, self.y.stride(0), *self.s_args(), *self.b_args(),
            ptr(self.bias) if bias else 0, 0, self.threads,
        )  # fmt: skip

    def grad_up(self, db, dbias, t=True) -> int:
        t_ptr = self.t.data_ptr() + self.t.element_size() if t and self.t.numel() else 0
        return native.lora_linear_grad_up(
            CODE[self.dtype], ptr(self.dy), self.M, self.N, self.dy.stride(0), *self.s_args(), *self.b_args(),
            t_ptr, self.t.stride(0), ptr(db), ptr(dbias), 0, self.threads,
        )  # fmt: skip

    def grad_down(self, das, dx=True) -> int:
        rows = [
            (ptr(a), CODE[a.dtype], self.R, a.stride(0), column, i, ptr(da))
            for i, (a, column, da) in enumerate(zip(self.a, self.columns, das, strict=True))
        ]
        return native.lora_linear_grad_down(
            CODE[self.dtype], ptr(self.x), self.M, self.K, self.x.stride(0), ptr(self.dx) if dx else 0,
            self.dx.stride(0), ptr(self.t), self.t.stride(0), rows, threshold(self.p), self.p, self.seed, self.threads,
        )  # fmt: skip

    def small(self, y, s, bias=True) -> int:
        a, b = self.a[0], self.b
        return native.lora_linear_small(
            CODE[self.dtype], ptr(self.x), self.M, self.K, self.x.stride(0), ptr(self.w), self.w.stride(0), self.N,
            ptr(self.bias) if bias else 0, 0, ptr(y), y.stride(0), ptr(s), 0 if s is None else s.stride(0), self.R,
            ptr(a), CODE[a.dtype], a.stride(0), ptr(b), CODE[b.dtype], b.stride(0), ptr(self.scale), self.scale_stride,
            ptr(self.bias) if bias else 0, 0, self.threads,
        )  # fmt: skip


def each_case(memory, dtype, shapes=SHAPES, **options):
    """Every shape, with adapters in fp32 and in the compute dtype."""
    for shape in shapes:
        for adapter_dtype in {torch.float32, dtype}:
            yield Case(memory, shape, dtype, adapter_dtype, **options), f"{list(shape)} {dtype} {adapter_dtype}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("p", "projections"), [(0.0, 1), (0.0, 3), (0.1, 2), (0.5, 1)])
def test_down(isa, memory, dtype, p, projections):
    for case, what in each_case(memory, dtype, p=p, projections=projections):
        before, untouched = gaps(case.s), case.s[:, :1].clone()
        assert case.down() == 0
        for a, mask, column in zip(case.adapters(), case.masks(), case.columns, strict=True):
            x = case.x.double() * mask
            check(case.s[:, column : column + case.R], x @ a.T, x.abs() @ a.abs().T, case.K, dtype, what)
        assert torch.equal(gaps(case.s).nan_to_num(7), before.nan_to_num(7)), f"{what}: wrote between rows"
        assert torch.equal(case.s[:, :1], untouched), f"{what}: wrote a foreign column"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_stride", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_up(isa, memory, dtype, scale_stride, bias):
    for case, what in each_case(memory, dtype, scale_stride=scale_stride):
        before, y, s, b = gaps(case.y), case.y.double(), case.s[:, 1:].double(), case.scaled_b()
        added = case.bias.double() if bias else torch.zeros(1, case.N, dtype=torch.float64)
        assert case.up(bias) == 0
        size = y.abs() + s.abs() @ b.abs().T + added.abs()
        check(case.y, y + s @ b.T + added, size, case.R, dtype, what)
        assert torch.equal(gaps(case.y).nan_to_num(7), before.nan_to_num(7)), f"{what}: wrote between rows"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wanted", ["t db dbias", "t", "db", "dbias", "t db"])
def test_grad_up(isa, memory, dtype, wanted):
    for case, what in each_case(memory, dtype):
        dy, s, b = case.dy.double(), case.s[:, 1:].double(), case.scaled_b()
        db = memory.empty(case.N, case.R, case.adapter_dtype) if "db " in wanted + " " else None
        dbias = memory.empty(1, case.N, torch.float32) if "dbias" in wanted else None
        before, untouched = gaps(case.t), case.t.clone()
        assert case.grad_up(db, dbias, "t" in wanted.split()) == 0
        if "t" in wanted.split():
            check(case.t[:, 1:], dy @ b, dy.abs() @ b.abs(), case.N, dtype, f"t {what}")
            assert torch.equal(case.t[:, :1], untouched[:, :1]), f"{what}: wrote a foreign column"
        else:
            assert torch.equal(case.t, untouched), f"{what}: wrote t"
        if db is not None:
            scale = case.scale.double()
            check(
                db, scale * (dy.T @ s), scale.abs() * (dy.abs().T @ s.abs()), case.M, case.adapter_dtype, f"db {what}"
            )
        if dbias is not None:
            check(dbias[0], dy.sum(0), dy.abs().sum(0), case.M, torch.float32, f"dbias {what}")
        assert torch.equal(gaps(case.t).nan_to_num(7), before.nan_to_num(7)), f"{what}: wrote between rows"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("p", "projections"), [(0.0, 1), (0.0, 3), (0.1, 2), (0.5, 1)])
@pytest.mark.parametrize("wanted", ["da dx", "da", "dx"])
def test_grad_down(isa, memory, dtype, p, projections, wanted):
    for case, what in each_case(memory, dtype, p=p, projections=projections):
        das = [memory.empty(case.R, case.K, case.adapter_dtype) if "da" in wanted else None for _ in case.a]
        dx, before = case.dx.double(), gaps(case.dx)
        size = dx.abs()
        assert case.grad_down(das, "dx" in wanted) == 0
        for a, da, mask, column in zip(case.adapters(), das, case.masks(), case.columns, strict=True):
            t, x = case.t[:, column : column + case.R].double(), case.x.double() * mask
            if da is not None:
                check(da, t.T @ x, t.abs().T @ x.abs(), case.M, case.adapter_dtype, f"da {what}")
            if "dx" in wanted:
                dx, size = dx + mask * (t @ a), size + mask * (t.abs() @ a.abs())
        check(case.dx, dx, size, case.R, dtype, f"dx {what}")
        assert torch.equal(gaps(case.dx).nan_to_num(7), before.nan_to_num(7)), f"{what}: wrote between rows"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_small(isa, memory, dtype, bias):
    shapes = [(m, k, n, r) for m, k, n, r in SHAPES if m <= 32]
    shapes += [(m, 133, 71, 6) for m in (2, 4, 8, 9, 13, 16, 17, 32, 33, 70)] + [(1, 600, 500, 0), (11, 40, 9, 0)]
    for case, what in each_case(memory, dtype, shapes, scale_stride=1):
        y = memory.empty(case.M, case.N, dtype, 3)
        s = memory.empty(case.M, case.R, dtype, 2)
        before = gaps(y), gaps(s)
        assert case.small(y, s, bias) == 0
        x, w, a, b = case.x.double(), case.w.double(), case.adapters()[0], case.scaled_b()
        check(s, x @ a.T, x.abs() @ a.abs().T, case.K, dtype, f"s {what}")
        added = 2 * case.bias.double() if bias else torch.zeros(1, case.N, dtype=torch.float64)
        exact = x @ w.T + s.double() @ b.T + added
        size = x.abs() @ w.abs().T + s.double().abs() @ b.abs().T + added.abs()
        check(y, exact, size, case.K + case.R, dtype, what)
        assert torch.equal(gaps(y).nan_to_num(7), before[0].nan_to_num(7)), f"{what}: wrote between rows of y"
        assert torch.equal(gaps(s).nan_to_num(7), before[1].nan_to_num(7)), f"{what}: wrote between rows of s"
        again = memory.empty(case.M, case.N, dtype)
        assert case.small(again, None, bias) == 0, "without room for s"
        assert torch.equal(again, y)


# ---- NaN and Inf ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_special_values_propagate_as_in_a_matmul(isa, memory, dtype, value):
    """A NaN or Inf in an operand reaches what it multiplies, and nothing else: no padded lane spreads it."""
    for shape in [(35, 130, 67, 5), (3, 37, 19, 2)]:
        for operand in ("x", "dy", "t", "s", "dx", "y", "w", "a", "b"):
            case = Case(memory, shape, dtype, torch.float32)
            target = case.a[0] if operand == "a" else getattr(case, operand)
            target[-1, -1] = value
            x, dy, y, dx = (v.double().clone() for v in (case.x, case.dy, case.y, case.dx))
            s, t = case.s[:, 1:].double().clone(), case.t[:, 1:].double().clone()
            a, b, bias, scale = case.adapters()[0], case.scaled_b(), case.bias.double(), case.scale.double()
            huge = torch.finfo(torch.float32).max  # what is finite is checked elsewhere
            das, db = [memory.empty(case.R, case.K, torch.float32)], memory.empty(case.N, case.R, torch.float32)

            def same(got, exact, what, operand=operand, huge=huge):
                check(got, exact, torch.full_like(exact, huge), 1, dtype, f"{operand} = {value}: {what}")

            assert case.up() == 0
            same(case.y, y + s @ b.T + bias, "y")
            assert case.grad_down(das) == 0
            same(case.dx, dx + t @ a, "dx")
            same(das[0], t.T @ x, "da")
            assert case.grad_up(db, None) == 0
            same(case.t[:, 1:], dy @ b, "t")
            same(db, scale * (dy.T @ s), "db")
            assert case.down() == 0
            same(case.s[:, 1:], x @ a.T, "s")
            if case.M <= 32:
                assert case.small(case.y, case.s[:, 1:], False) == 0
                same(case.y, x @ case.w.double().T + (x @ a.T) @ b.T, "small")


# ---- repeatability ----


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_repeat_bit_for_bit(isa, memory, dtype, threads):
    for shape in [(200, 301, 403, 17), (20, 1029, 515, 16)]:
        results = []
        for _ in range(3):
            torch.manual_seed(1)
            case = Case(memory, shape, dtype, torch.float32, p=0.1, projections=2)
            case.threads = threads
            das = [memory.empty(case.R, case.K, torch.float32) for _ in case.a]
            db, dbias = memory.empty(case.N, case.R, torch.float32), memory.empty(1, case.N, torch.float32)
            assert [case.down(), case.up(), case.grad_up(db, dbias), case.grad_down(das)] == [0] * 4
            outputs = [case.s, case.y, case.t, db, dbias, case.dx, *das]
            if case.M <= 32:
                small = memory.empty(case.M, case.N, dtype)
                assert case.small(small, None) == 0
                outputs.append(small)
            results.append(outputs)
        for again in results[1:]:
            assert all(torch.equal(one, other) for one, other in zip(results[0], again, strict=True))


# ---- instruction sets ----


def test_set_isa_names_the_choices():
    assert native.isa() in ISAS and ISAS[0] == "scalar"
    with pytest.raises(ValueError, match="scalar.*got 'mmx'"):
        native.set_isa("mmx")


def objects() -> dict[str, Path]:
    """The object file of each level that the last build here left behind, by level."""
    found = {}
    for path in (Path(__file__).parent.parent / "build").rglob("lora_linear.cpp.*.o"):
        level = path.stem.rpartition(".")[2]
        if level not in found or path.stat().st_mtime > found[level].stat().st_mtime:
            found[level] = path
    return found


@pytest.mark.skipif(not objects(), reason="the build left no object files here (a wheel, or built elsewhere)")
@pytest.mark.skipif(shutil.which("objdump") is None or shutil.which("nm") is None, reason="no binutils")
def test_no_instruction_set_leaks_into_another_object():
    for level, path in objects().items():
        code = subprocess.run(["objdump", "-d", path], capture_output=True, text=True, check=True).stdout
        registers = {name for name in ("zmm", "ymm") if f"%{name}" in code}
        allowed = {"scalar": set(), "avx2": {"ymm"}}.get(level, {"zmm", "ymm"})
        assert registers <= allowed, f"{level} uses {registers}"
        names = subprocess.run(["nm", "-g", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        exported = {line.split()[-1] for line in names.splitlines() if line}
        assert exported == {f"lora_linear_{level}"}, f"{level} exports more than its table: the linker could merge it"
