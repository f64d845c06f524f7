"""The native CPU kernels themselves: every function x dtype x instruction set against float64, on guarded memory.

Every buffer, results included, ends where a page begins that may not be touched and is poisoned with NaN, and gaps between
rows of what is changed in place must come back as they were.
Tolerances are derived, not picked: an fp32 sum of n products done in runs of 128 is off by at most
(128 + n/4) * 2^-24 * Σ|products|, and each rounding to the dtype adds half a unit in the last place.
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
from conftest import num_threads
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpeft import native as loader
from fastpeft.backends import plans
from fastpeft.reference.lora_linear import ranks_dtype

native = loader.cpu()
if native is None:
    pytest.skip(f"no native CPU module: {loader.why_not_cpu()}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")
ISAS = list(native.isas())
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
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


@pytest.fixture(params=ISAS + ["avx512bf16, dot products"] * ("avx512bf16" in ISAS))
def isa(request):
    """Each instruction set, and the one with a dot product of bf16 pairs with and without it."""
    before, (isa, *dot) = native.isa(), request.param.split(", ")
    native.set_isa(isa)
    with plans.override("cpu", dot=bool(dot)):
        yield request.param
    native.set_isa(before)


def gaps(t: torch.Tensor) -> torch.Tensor:
    """The elements between the rows, as a copy."""
    rows, columns = t.shape
    ld = t.stride(0)
    if rows < 2 or ld == columns:
        return torch.empty(0)
    return t.as_strided((rows - 1, ld - columns), (ld, 1), t.storage_offset() + columns).clone()


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
        native.philox_words(seed, row, projection, out)
        expected = mask_words(seed, range(row, row + 1), count, projection).astype(np.uint32)
        assert np.array_equal(out.numpy().view(np.uint32), expected), f"{isa}, row {row}, {count} words"


# ---- the passes ----


ANY_ROWS = {"few_rows": dict.fromkeys(plans.DTYPES, 1000), "few_rows_transposed": 1000}


class Case:
    """Operands of one shape on guarded memory (made when first used), and what the passes must give, in float64."""

    def __init__(
        self, memory, shape, dtype, adapter_dtype, p=0.0, projections=1, scale_per_rank=True, transposed=False
    ):
        self.memory, self.dtype, self.adapter_dtype, self.p = memory, dtype, adapter_dtype, p
        self.wide = ranks_dtype(dtype)  # of s and t
        self.M, self.K, self.N, self.R = shape
        self.seed, self.threads, self.scale_per_rank = torch.tensor(0x1234567890ABCDEF), 2, scale_per_rank
        self.count, self.transposed = projections, transposed

    def random(self, rows: int, columns: int, dtype=None, gap: int = 3) -> torch.Tensor:
        return self.memory.copy(normal(rows, columns), dtype or self.dtype, gap)

    x = cached_property(lambda self: self.random(self.M, self.K))
    dx = cached_property(lambda self: self.random(self.M, self.K))
    y = cached_property(lambda self: self.random(self.M, self.N))
    dy = cached_property(lambda self: self.random(self.M, self.N))
    w = cached_property(
        lambda self: self.random(self.K, self.N).t() if self.transposed else self.random(self.N, self.K)
    )
    s = cached_property(lambda self: self.random(self.M, self.R * self.count, self.wide))
    t = cached_property(lambda self: self.random(self.M, self.R * self.count, self.wide))
    a = cached_property(lambda self: [self.random(self.R, self.K, self.adapter_dtype) for _ in range(self.count)])
    b = cached_property(lambda self: self.random(self.N, self.R, self.adapter_dtype))
    bias = cached_property(lambda self: self.random(1, self.N, torch.float32, 0)[0])

    @cached_property
    def scale(self) -> torch.Tensor:
        made = self.random(1, self.R if self.scale_per_rank else 1, torch.float32, 0)[0]
        return made if self.scale_per_rank else made.view(())

    def adapters(self) -> list[torch.Tensor]:
        return [a.to(self.wide).double() for a in self.a]

    def scaled_b(self) -> torch.Tensor:
        return (self.scale * self.b.float()).to(self.wide).double()

    def masks(self) -> list[torch.Tensor]:
        return [dropped(self.x.double(), self.p, self.seed.item(), i) for i in range(self.count)]

    def columns(self, i: int) -> slice:
        """Of s and t: those of projection i."""
        return slice(self.R * i, self.R * (i + 1))

    def down(self) -> torch.Tensor:
        with num_threads(self.threads):
            return native.lora_linear_down(self.x, self.a, self.p, self.seed)

    def up(self, bias=True) -> None:
        with num_threads(self.threads):
            native.lora_linear_up([self.y], self.s, [self.b], [self.scale], [self.bias if bias else None])

    def grad_up(self, wants_t=True, needs_b=True, needs_bias=True):
        """-> t, db, dbias"""
        with num_threads(self.threads):
            t, (db,), (dbias,) = native.lora_linear_grad_up(
                [self.dy], self.s, [self.b], [self.scale], wants_t, [needs_b], [needs_bias]
            )
        return t, db, dbias

    def grad_down(self, da=True, dx=True) -> list:
        n, (x, out) = self.count, (self.x if da else None, self.dx if dx else None)
        with num_threads(self.threads):
            got, das = native.lora_linear_grad_down(out, x, self.t, self.a, [True] * n, [da] * n, self.p, self.seed)
        assert got is out
        return das

    def small(self, bias=True):
        """-> y, s, by the kernels of few rows, however many they are"""
        of = self.bias if bias else None
        adapter = [(self.a[0],), (self.b,), (self.scale,)] if self.R else [(None,), (None,), (None,)]
        with num_threads(self.threads), plans.override("cpu", **ANY_ROWS):
            (y,), s = native.lora_linear_few(self.x.contiguous(), (self.w,), (of,), *adapter, (of,))
        return y, s

    def plain(self, bias=True):
        """-> y, in a call without gradients"""
        of = self.bias if bias else None
        adapter = (self.a[0], self.b, self.scale) if self.R else (None, None, 1.0)
        with num_threads(self.threads), plans.override("cpu", **ANY_ROWS), torch.no_grad():
            return native.lora_linear_plain(self.x.contiguous(), self.w, *adapter, of, of)


def each_case(memory, dtype, shapes=SHAPES, **options):
    """Every shape, with adapters in fp32 and in the compute dtype."""
    for shape in shapes:
        for adapter_dtype in {torch.float32, dtype}:
            yield Case(memory, shape, dtype, adapter_dtype, **options), f"{list(shape)} {dtype} {adapter_dtype}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("p", "projections"), [(0.0, 1), (0.0, 3), (0.1, 2), (0.5, 1)])
def test_down(isa, memory, dtype, p, projections):
    for case, what in each_case(memory, dtype, p=p, projections=projections):
        s = case.down()
        assert s.shape == (case.M, case.R * projections) and s.dtype == case.wide
        for i, (a, mask) in enumerate(zip(case.adapters(), case.masks(), strict=True)):
            x = case.x.double() * mask
            check(s[:, case.columns(i)], x @ a.T, x.abs() @ a.abs().T, case.K, case.wide, what)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_per_rank", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_up(isa, memory, dtype, scale_per_rank, bias):
    for case, what in each_case(memory, dtype, scale_per_rank=scale_per_rank):
        before, y, s, b = gaps(case.y), case.y.double(), case.s.double(), case.scaled_b()
        added = case.bias.double() if bias else torch.zeros(1, case.N, dtype=torch.float64)
        case.up(bias)
        size = y.abs() + s.abs() @ b.abs().T + added.abs()
        check(case.y, y + s @ b.T + added, size, case.R, dtype, what)
        assert torch.equal(gaps(case.y).nan_to_num(7), before.nan_to_num(7)), f"{what}: wrote between rows"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wanted", ["t db dbias", "t", "db", "dbias", "t db"])
def test_grad_up(isa, memory, dtype, wanted):
    wants = [name in wanted.split() for name in ("t", "db", "dbias")]
    for case, what in each_case(memory, dtype):
        dy, s, b, scale = case.dy.double(), case.s.double(), case.scaled_b(), case.scale.double()
        got = case.grad_up(*wants)
        assert [one is not None for one in got] == wants
        t, db, dbias = got
        if t is not None:
            check(t, dy @ b, dy.abs() @ b.abs(), case.N, case.wide, f"t {what}")
        if db is not None:
            size = scale.abs() * (dy.abs().T @ s.abs())
            check(db, scale * (dy.T @ s), size, case.M, case.adapter_dtype, f"db {what}")
        if dbias is not None:
            check(dbias, dy.sum(0), dy.abs().sum(0), case.M, torch.float32, f"dbias {what}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("p", "projections"), [(0.0, 1), (0.0, 3), (0.1, 2), (0.5, 1)])
@pytest.mark.parametrize("wanted", ["da dx", "da", "dx"])
def test_grad_down(isa, memory, dtype, p, projections, wanted):
    for case, what in each_case(memory, dtype, p=p, projections=projections):
        dx, before = case.dx.double(), gaps(case.dx)
        size = dx.abs()
        das = case.grad_down("da" in wanted, "dx" in wanted)
        for i, (a, da, mask) in enumerate(zip(case.adapters(), das, case.masks(), strict=True)):
            t, x = case.t[:, case.columns(i)].double(), case.x.double() * mask
            assert (da is not None) == ("da" in wanted)
            if da is not None:
                check(da, t.T @ x, t.abs().T @ x.abs(), case.M, case.adapter_dtype, f"da {what}")
            if "dx" in wanted:
                dx, size = dx + mask * (t @ a), size + mask * (t.abs() @ a.abs())
        check(case.dx, dx, size, case.R, dtype, f"dx {what}")
        assert torch.equal(gaps(case.dx).nan_to_num(7), before.nan_to_num(7)), f"{what}: wrote between rows"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bias", "transposed"), [(True, False), (False, False), (True, True)])
def test_small(isa, memory, dtype, bias, transposed):
    shapes = [(m, k, n, r) for m, k, n, r in SHAPES if m <= 32 and m * k * n]
    shapes += [(m, 133, 71, 6) for m in (2, 4, 8, 9, 13, 16, 17, 32, 33, 70)] + [(1, 600, 500, 0), (11, 40, 9, 0)]
    shapes += [(3, 67, 1030, 5), (2, 40, 1200, 0)] if transposed else []
    for case, what in each_case(memory, dtype, shapes, transposed=transposed):
        y, s = case.small(bias)
        x, w, a, b = case.x.double(), case.w.double(), case.adapters()[0], case.scaled_b()
        check(s, x @ a.T, x.abs() @ a.abs().T, case.K, case.wide, f"s {what}")
        added = 2 * case.bias.double() if bias else torch.zeros(1, case.N, dtype=torch.float64)
        exact = x @ w.T + s.double() @ b.T + added
        size = x.abs() @ w.abs().T + s.double().abs() @ b.abs().T + added.abs()
        check(y, exact, size, case.K + case.R, dtype, what)
        assert torch.equal(case.plain(bias), y), "without room for s"


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_rank(dtype):
    """Leading dimensions are rows; y has them too."""
    case = Case(Memory(), (24, 40, 28, 5), dtype, torch.float32)
    y, plain, s = case.small()[0], case.plain(), case.down()
    x = case.x.contiguous().view(2, 3, 4, 40)
    case.__dict__["x"] = x
    assert torch.equal(case.small()[0], y.view(2, 3, 4, 28)) and torch.equal(case.plain(), plain.view(2, 3, 4, 28))
    assert torch.equal(case.down(), s)


# ---- what is not taken ----


def test_tensors_whose_memory_is_not_their_value_are_refused():
    """Or that are on no CPU: a sentence, never a crash. `plain` leaves them to the general way."""
    x, a = torch.randn(4, 16), torch.randn(2, 16)
    fake = FakeTensorMode().from_tensor(x)
    strange = {
        "lazily negated": torch._neg_view(x),
        "no memory": torch._efficientzerotensor((4, 16)),
        "does not lend": x.to("meta"),
        "not lend": x.to_sparse(),
        "no exact torch.Tensor": fake,
        "no exact": [1.0],
    }
    for said, bad in strange.items():
        with pytest.raises(TypeError, match=said):
            native.lora_linear_down(bad, [a], 0.0, None)
        with pytest.raises(TypeError, match=said):
            native.lora_linear_down(x, [bad], 0.0, None)
        with torch.no_grad():
            assert native.lora_linear_plain(bad, torch.randn(16, 16), a, torch.randn(16, 2), 1.0, None, None) is None
        assert native.lora_linear_begin(True, bad, (x,), (None,), (a,), (a,), (1.0,), (None,)) == (-1, None)


def test_what_would_touch_foreign_memory_is_refused():
    x, a, b, one = torch.randn(4, 16), torch.randn(2, 16), torch.randn(8, 2), torch.ones(())
    s, y = torch.randn(4, 2), torch.randn(4, 8)
    wrong = [
        (native.lora_linear_down, (x, [a[:, :15]], 0.0, None), "a must be"),
        (native.lora_linear_down, (x, [a.t()], 0.0, None), "a must be"),
        (native.lora_linear_down, (x.t(), [torch.randn(2, 4)], 0.0, None), "x must be"),
        (native.lora_linear_down, (x.double(), [a], 0.0, None), "x must be"),
        (native.lora_linear_down, (x[0, 0], [a], 0.0, None), "x must be"),
        (native.lora_linear_down, (x, [a], 0.5, None), "seed must be"),
        (native.lora_linear_down, (x, [a], 1.5, one.long()), "p must be"),
        (native.lora_linear_down, (x, [torch.randn(513, 16)], 0.0, None), "R up to 512"),
        (native.lora_linear_up, ([y], s[:3], [b], [one], [None]), "y must be"),
        (native.lora_linear_up, ([y], s[:, :1], [b], [one], [None]), "s must be"),
        (native.lora_linear_up, ([y], s, [b], [None], [None]), "scale must be"),
        (native.lora_linear_up, ([y], s, [b], [torch.ones(3)], [None]), "scale must be"),
        (native.lora_linear_up, ([y], s, [b], [one], [torch.ones(7)]), "lora_bias must be"),
        (native.lora_linear_up, ([y, y], s, [b], [one], [None]), "an entry a projection"),
        (native.lora_linear_up, ([y.bfloat16()], s, [b], [one], [None]), "s must be"),
        (native.lora_linear_up, ([y.half()], s.half(), [b], [one], [None]), "s must be"),
        (native.lora_linear_grad_up, ([y.half()], s.half(), [b], [one], True, [True], [True]), "s must be"),
        (native.lora_linear_grad_down, (None, x.half(), s.half(), [a], [True], [True], 0.0, None), "t must be"),
        (native.lora_linear_grad_up, ([y[:, :7]], s, [b], [one], True, [True], [True]), "b must be"),
        (native.lora_linear_grad_up, ([y[:3]], s, [b], [one], True, [True], [True]), "dy must be"),
        (native.lora_linear_grad_down, (x[:3], x, s, [a], [True], [True], 0.0, None), "dx must be"),
        (native.lora_linear_grad_down, (x, x[:, :15], s, [a], [True], [True], 0.0, None), "x must be"),
        (native.lora_linear_grad_down, (x, None, s, [a], [True], [True], 0.0, None), "x must be"),
        (native.lora_linear_grad_down, (x, x, s[:, :1], [a], [True], [True], 0.0, None), "t must be"),
    ]
    for function, arguments, said in wrong:
        with pytest.raises(ValueError, match=said):
            function(*arguments)


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
            s, t = case.s.double().clone(), case.t.double().clone()
            a, b, bias, scale = case.adapters()[0], case.scaled_b(), case.bias.double(), case.scale.double()
            huge = torch.finfo(torch.float32).max  # what is finite is checked elsewhere

            def same(got, exact, what, operand=operand, huge=huge):
                check(got, exact, torch.full_like(exact, huge), 1, dtype, f"{operand} = {value}: {what}")

            case.up()
            same(case.y, y + s @ b.T + bias, "y")
            (da,) = case.grad_down()
            same(case.dx, dx + t @ a, "dx")
            same(da, t.T @ x, "da")
            got_t, db, _ = case.grad_up()
            same(got_t, dy @ b, "t")
            same(db, scale * (dy.T @ s), "db")
            same(case.down(), x @ a.T, "s")
            if case.M <= 32:
                same(case.small(False)[0], x @ case.w.double().T + (x @ a.T) @ b.T, "small")


# ---- repeatability ----


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_repeat_bit_for_bit(isa, memory, dtype, threads):
    for shape in [(200, 301, 403, 17), (20, 1029, 515, 16)]:
        results = []
        for _ in range(3):
            torch.manual_seed(1)
            case, one = (Case(memory, shape, dtype, torch.float32, p=0.1, projections=n) for n in (2, 1))
            case.threads = one.threads = threads
            one.up()
            outputs = [case.down(), one.y, *one.grad_up(), *case.grad_down(), case.dx]
            if case.M <= 32:
                outputs += one.small()
            results.append(outputs)
        for again in results[1:]:
            assert all(torch.equal(one, other) for one, other in zip(results[0], again, strict=True))


# ---- instruction sets ----


def test_set_isa_names_the_choices():
    assert native.isa() in ISAS and ISAS[0] == "scalar"
    with pytest.raises(ValueError, match="scalar.*got 'mmx'"):
        native.set_isa("mmx")


OPS = ("lora_linear", "linear4bit", "prefix_attention")


def objects(op: str = OPS[0]) -> dict[str, Path]:
    """The object file of each level that the last build here left behind, by level."""
    found = {}
    for path in (Path(__file__).parent.parent / "build").rglob(f"{op}.cpp.*.o"):
        level = path.stem.rpartition(".")[2]
        if level not in found or path.stat().st_mtime > found[level].stat().st_mtime:
            found[level] = path
    return found


@pytest.mark.skipif(not objects(), reason="the build left no object files here (a wheel, or built elsewhere)")
@pytest.mark.skipif(shutil.which("objdump") is None or shutil.which("nm") is None, reason="no binutils")
@pytest.mark.parametrize("op", OPS)
def test_no_instruction_set_leaks_into_another_object(op):
    for level, path in objects(op).items():
        code = subprocess.run(["objdump", "-d", path], capture_output=True, text=True, check=True).stdout
        registers = {name for name in ("zmm", "ymm") if f"%{name}" in code}
        allowed = {"scalar": set(), "avx2": {"ymm"}}.get(level, {"zmm", "ymm"})
        assert registers <= allowed, f"{level} uses {registers}"
        names = subprocess.run(["nm", "-g", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        exported = {line.split()[-1] for line in names.splitlines() if line}
        assert exported == {f"{op}_{level}"}, f"{level} exports more than its table: the linker could merge it"
