"""The native CPU kernels of prefix_attention: every pass x dtype x instruction set against float64, on guarded memory.

Every buffer, results included, ends where a page begins that may not be touched, and is poisoned with NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from _close import assert_close, sizes_of_weights, through
from _guarded import Memory
from conftest import num_threads

from fastpeft import native as loader
from fastpeft.backends import plans
from fastpeft.reference.philox import dropout_mask

native = loader.cpu()
if native is None:
    pytest.skip(f"no native CPU module: {loader.why_not_cpu()}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")
ISAS = list(native.isas())
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = torch.tensor(0x1234567890ABCDEF)
GRADIENTS = ("d_prefix_k", "d_prefix_v", "d_gate_k", "d_gate_v", "d_log_bias", "d_gate_out")


@pytest.fixture(params=ISAS + ["avx512bf16, dot products"] * ("avx512bf16" in ISAS))
def isa(request):
    """Each instruction set, and the one with a dot product of bf16 pairs with and without it."""
    before, (isa, *dot) = native.isa(), request.param.split(", ")
    native.set_isa(isa)
    with plans.override("cpu", dot=bool(dot), parallel_work=0.0):
        yield request.param
    native.set_isa(before)


# ---- a case: its tensors, and what the passes must give ----


@dataclass
class Case:
    """One prefix over rows that have seen tokens already, or not where lse is -Inf."""

    shape: tuple[int, ...]  # B, H, Hk, T, P, D
    gate_k: str = ""  # its dimensions that are whole, of "bhtp"; "": no gate, "1": all of size 1
    gate_v: str = ""
    bias: str = ""  # "", "shared" or "each"
    separate: bool = False
    gate_out: str = ""
    index: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    flat: bool = False
    p: float = 0.0
    masters: bool = True  # the prefix and its gates in fp32
    by_t: bool = True  # q and o lie in memory as [B, T, H, D]
    threads: int = 2

    def make(self, memory: Memory, dtype: torch.dtype) -> Tensors:
        return Tensors(self, memory, dtype)


PLAIN = [
    Case((1, 1, 1, 2, 1, 1)),
    Case((2, 4, 2, 7, 3, 8), "bp", "bp", "shared"),
    Case((2, 4, 1, 70, 37, 16), "btp", "btp", by_t=False),
    Case((2, 2, 2, 5, 200, 64), "bhtp", "bhtp", masters=False),
    Case((2, 6, 2, 130, 65, 33), "htp", "tp", "shared"),
    Case((1, 4, 2, 1, 130, 128), "p", "h"),
    Case((2, 4, 4, 65, 32, 64), "bp", "bp"),
    Case((2, 4, 4, 65, 32, 64), "1", "bt", "shared"),
    Case((1, 2, 1, 3, 5, 256), "bhp", ""),
    Case((2, 4, 2, 9, 0, 8)),
    Case((5, 8, 2, 1, 33, 32), "bp", "bhp"),
    Case((9, 2, 1, 9, 12, 40), "", "1", masters=False),
    Case((1, 3, 1, 2, 70, 33), "p", "htp", "shared"),
]
ROUTED = [
    Case((5, 4, 2, 6, 20, 16), "bp", "bp", "each", index=(2, -1, 0, 2, 2), lengths=(7, 0, 20)),
    Case((3, 2, 1, 70, 9, 64), "tp", "", "shared", index=(1, 1, -1), lengths=(9, 4)),
    Case((4, 4, 2, 3, 70, 8), "btp", "bp", "shared", index=(1, 0, 2, -1), lengths=(66, 1, 70), flat=True),
    Case((5, 4, 2, 1, 20, 16), "bp", "bp", "each", index=(2, -1, 0, 2, 2), lengths=(7, 0, 20), masters=False),
    Case((2, 3, 3, 65, 64, 20), "", "", "", index=(0, 1), lengths=(64, 30), flat=True),
]
SEPARATE = [
    Case((3, 4, 2, 1, 70, 24), "p", "", "each", True, "each", index=(1, -1, 0), lengths=(70, 66)),
    Case((2, 4, 2, 7, 3, 8), "bp", "bp", "shared", True, "shared"),
    Case((3, 4, 2, 66, 130, 64), "btp", "bhp", "", True, ""),
    Case((3, 4, 2, 66, 10, 64), "", "", "", True, "shared"),
    Case((4, 6, 2, 3, 9, 24), "", "p", "each", True, "each", index=(2, 1, 2, -1), lengths=(9, 1, 5), by_t=False),
]
DROPPED = [
    Case((2, 4, 2, 7, 30, 8), "bp", "bp", "shared", p=0.3),
    Case((2, 4, 1, 70, 101, 64), "", "btp", p=0.5),
    Case((4, 4, 2, 35, 9, 24), "", "p", "each", True, "each", index=(2, 1, 2, -1), lengths=(9, 1, 5), p=0.2),
]
CASES = PLAIN + ROUTED + SEPARATE + DROPPED


class Tensors:
    def __init__(self, case: Case, memory: Memory, dtype: torch.dtype):
        self.case, self.memory, self.dtype = case, memory, dtype
        B, H, Hk, T, P, D = case.shape
        self.A = len(case.lengths) if case.lengths else 1
        master = torch.float32 if case.masters else dtype
        self.q, self.do = self.heads(), self.heads()
        self.o_x = self.heads()
        self.lse_x = self.lse()
        self.lse_x[:, :, ::3] = -torch.inf  # rows that have seen nothing
        self.o_x[:, :, ::3] = 0
        self.offsets = None
        if case.flat:
            self.offsets = self.integers([0, *np.cumsum(case.lengths)], torch.int64)
            shape = (Hk, sum(case.lengths), D)
        else:
            shape = (self.A, Hk, P, D)
        self.prefix_k, self.prefix_v = (self.copy(torch.randn(shape), master) for _ in range(2))
        whole = dict(zip("bhtp", (B, H, T, P)))
        self.gate_k, self.gate_v = (
            self.copy(torch.rand([n if d in dims else 1 for d, n in whole.items()]) + 0.5, master) if dims else None
            for dims in (case.gate_k, case.gate_v)
        )
        of = {"": 0, "shared": 1, "each": self.A}
        self.log_bias = self.gate_out = None
        if case.bias:
            self.log_bias = self.copy(torch.randn(1 if case.flat else of[case.bias], H, shape[-2]), torch.float32)
            self.log_bias[..., 1::4] = -torch.inf
        if case.gate_out:
            self.gate_out = self.copy(torch.randn(of[case.gate_out], H), torch.float32)
        self.index = None if case.index is None else self.integers(case.index, torch.int32)
        self.lengths = None if case.lengths is None or case.flat else self.integers(case.lengths, torch.int32)

    def copy(self, values, dtype):
        made = self.memory.empty(int(np.prod(values.shape[:-1])), values.shape[-1], dtype).view(values.shape)
        return made.copy_(values)

    def integers(self, values, dtype):
        made = self.memory.empty(1, len(values) * (dtype.itemsize // 4), torch.float32).view(dtype)[0]
        return made.copy_(torch.tensor(list(values)))

    def lse(self):
        B, H, _, T, *_ = self.case.shape
        if self.case.by_t:
            return self.copy(torch.randn(B, T, H), torch.float32).transpose(1, 2)
        return self.copy(torch.randn(B, H, T), torch.float32)

    def heads(self):
        B, H, _, T, _, D = self.case.shape
        if self.case.by_t:
            return self.copy(torch.randn(B, T, H, D), self.dtype).transpose(1, 2)
        return self.copy(torch.randn(B, H, T, D), self.dtype)

    def prefix(self):
        return (
            self.prefix_k, self.prefix_v, self.gate_k, self.gate_v, self.log_bias, self.gate_out, self.index,
            self.lengths, self.offsets,
        )  # fmt: skip

    def differentiable(self):
        return (self.q, self.prefix_k, self.prefix_v, self.gate_k, self.gate_v, self.log_bias, self.gate_out)

    # ---- the passes ----

    def forward(self):
        o, lse = self.heads().copy_(self.o_x), self.lse().copy_(self.lse_x)
        with num_threads(self.case.threads):
            got, got_lse = native.prefix_attention_forward(
                self.q, *self.prefix(), o, lse, self.case.separate, self.case.p, SEED, self.scale()
            )
        if self.case.separate:
            assert torch.equal(o, self.o_x) and torch.equal(lse, self.lse_x), "separate: what tokens gave is kept"
            assert got.stride() == o.stride()
        else:
            assert got is o and got_lse is lse, "joint: in place"
        return got, got_lse

    def backward(self, o, lse, dq=True, needs=(True,) * 6):
        """-> the gradient of q, and the six"""
        before = self.heads() if dq else None
        out = self.heads().copy_(before) if dq else None
        with num_threads(self.case.threads):
            got = native.prefix_attention_backward(
                self.do, self.q, *self.prefix(), None if self.case.separate else o.to(self.dtype), lse, out,
                self.case.separate, self.case.p, SEED, self.scale(), needs,
            )  # fmt: skip
        return None if out is None else (out, before), got

    def scale(self) -> float:
        return self.case.shape[-1] ** -0.5

    # ---- the definition, in any dtype ----

    def define(self, dtype, terms=False):
        """-> o, lse, gradients of `differentiable`, None where there is none; of what was seen: o_x and lse_x

        terms: instead of each sum the sum of its terms' absolute values, in the gradients too.
        """
        size_of = torch.abs if terms else torch.clone
        case, (B, H, Hk, T, P, _) = self.case, self.case.shape
        leaves = [t if t is None else t.detach().to(dtype).requires_grad_() for t in self.differentiable()]
        q, pk, pv, gk, gv, bias, c = leaves
        offsets = self.offsets.tolist() if case.flat else None
        keep = torch.ones(B, H, T, P, dtype=dtype)
        if case.p:
            keep = dropout_mask(SEED, (B, H, T, P), case.p).to(dtype) / (1 - case.p)
        expanded = [None if g is None else g.expand(B, H, T, P) for g in (gk, gv)]
        rows, lses = [], []
        for b in range(B):
            a = 0 if case.index is None else case.index[b]
            n = 0 if a < 0 else case.lengths[a] if case.lengths else P
            o_x, lse_x = size_of(self.o_x[b].to(dtype)), self.lse_x[b].to(dtype)
            if n == 0:
                rows.append(o_x)
                lses.append(torch.full_like(lse_x, -torch.inf) if case.separate else lse_x)
                continue
            span = slice(offsets[a], offsets[a] + n) if case.flat else slice(0, n)
            k, v = (t[:, span] if case.flat else t[a][:, span] for t in (pk, pv))  # [Hk, n, D]
            k, v = k.repeat_interleave(H // Hk, 0), size_of(v).repeat_interleave(H // Hk, 0)
            factor = 1 if gk is None else expanded[0][b, :, :, :n]
            added = 0 if bias is None else bias[a if len(bias) > 1 else 0][:, None, span]
            s = self.scale() * (q[b] @ k.mT) * factor + added  # [H, T, n]
            if terms:
                sizes = self.scale() * (q[b].abs() @ k.abs().mT) * factor
                sizes = sizes if bias is None else sizes + added.abs().masked_fill(added == -torch.inf, 0)
                s = through(s, sizes)
            w = keep[b, :, :, :n]
            if gv is not None:
                w = w * size_of(expanded[1][b, :, :, :n])
            lse = s.logsumexp(-1)
            merged = lse if case.separate else torch.logaddexp(lse, lse_x)
            seen = (s - merged[..., None]).exp().masked_fill(torch.isneginf(merged)[..., None], 0)
            kept = (lse_x - merged).exp().nan_to_num(0)[..., None]
            if terms:
                of = seen.detach()
                kept = through(kept, kept.detach() * (of * s.masked_fill(s == -torch.inf, 0)).sum(-1, keepdim=True))
                seen = sizes_of_weights(seen, s, sizes.detach())
            o_p = (seen * w) @ v
            if case.separate:
                gate = 1 if c is None else size_of(c[a if len(c) > 1 else 0][:, None, None])
                rows.append(o_x + gate * o_p)
            else:
                rows.append(kept * o_x + o_p)
            lses.append(merged)
        o, lse = torch.stack(rows), torch.stack(lses)
        wanted = [t for t in leaves if t is not None]
        grads = iter(
            torch.autograd.grad(o, wanted, size_of(self.do.to(dtype)), allow_unused=True) if o.requires_grad else wanted
        )
        found = []
        for t in leaves:
            g = None if t is None else next(grads)
            found.append(torch.zeros_like(t) if t is not None and (g is None or not o.requires_grad) else g)
        return o.detach(), lse.detach(), found


def same_lse(got, exact, name):
    assert torch.equal(torch.isneginf(got), torch.isneginf(exact)), f"{name}: -Inf differs"
    return got.masked_fill(torch.isneginf(exact), 0), exact.masked_fill(torch.isneginf(exact), 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_prefix(isa, memory, dtype, case):
    t = case.make(memory, dtype)
    eps = torch.finfo(dtype).eps
    (exact, exact_lse, exact_grads), (same, same_lses, same_grads) = t.define(torch.float64), t.define(dtype)
    sizes, _, size_grads = t.define(torch.float64, terms=True)
    o, lse = t.forward()
    assert o.dtype == dtype and lse.dtype == torch.float32
    assert_close(o, same, exact, "o", eps, sizes)
    got, want = same_lse(lse, exact_lse, "lse")
    assert_close(got, same_lse(same_lses, exact_lse, "composition")[0], want, "lse", eps)

    (dq, before), got = t.backward(exact, exact_lse.float())
    assert_close(dq, before + same_grads[0], before.double() + exact_grads[0], "dq", eps, size_grads[0].abs())
    for name, grad, compare, exact_grad, size, of in zip(
        GRADIENTS, got, same_grads[1:], exact_grads[1:], size_grads[1:], t.differentiable()[1:]
    ):
        assert (grad is None) == (of is None), name
        if grad is not None:
            assert grad.dtype == (of.dtype if "prefix" in name else torch.float32), name
            assert_close(grad, compare, exact_grad, name, eps, size.abs())


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_needed_is_not_computed(isa, memory, dtype):
    for case in (CASES[1], SEPARATE[0], ROUTED[2]):
        t = case.make(memory, dtype)
        o, lse, _ = t.define(torch.float64)
        lse = lse.float()
        (dq, _), every = t.backward(o, lse)
        _, none = t.backward(o, lse, needs=(False,) * 6)
        assert none == (None,) * 6
        for i, grad in enumerate(every):
            _, got = t.backward(o, lse, dq=False, needs=[j == i for j in range(6)])
            assert [g is not None for g in got] == [j == i and grad is not None for j in range(6)]
            assert grad is None or torch.equal(got[i], grad)


# ---- tokens ----


@dataclass
class TokenCase:
    shape: tuple[int, ...]  # B, H, Hk, T, S, D
    causal: bool = False
    mask: str = ""  # "padding", or a bool mask's whole dimensions; "+..." of an additive one
    p: float = 0.0
    threads: int = 2


TOKENS = [
    TokenCase((1, 1, 1, 2, 2, 1)),
    TokenCase((2, 4, 2, 7, 7, 8), True, "", 0.2),
    TokenCase((2, 4, 1, 70, 133, 16), True, "padding", 0.1),
    TokenCase((2, 4, 1, 70, 40, 64), True, "", 0.0),
    TokenCase((1, 2, 2, 130, 130, 64), True, "", 0.1, 3),
    TokenCase((3, 4, 4, 5, 200, 33), False, "padding", 0.5),
    TokenCase((2, 4, 2, 1, 65, 128), True, "padding", 0.1),
    TokenCase((2, 2, 1, 66, 65, 24), False, "bts"),
    TokenCase((2, 2, 1, 66, 65, 24), False, "hts", 0.3),
    TokenCase((2, 6, 3, 9, 80, 20), False, "+bhts", 0.3),
    TokenCase((2, 6, 3, 9, 80, 20), False, "+bs"),
    TokenCase((2, 2, 1, 3, 0, 8), False, ""),
]


class Tokens:
    def __init__(self, case: TokenCase, memory: Memory, dtype: torch.dtype):
        self.case, self.dtype = case, dtype
        B, H, Hk, T, S, D = case.shape

        def copy(values):
            made = memory.empty(int(np.prod(values.shape[:-1])), values.shape[-1], dtype).view(values.shape)
            return made.copy_(values)

        self.q, self.do = (copy(torch.randn(B, T, H, D)).transpose(1, 2) for _ in range(2))
        self.k, self.v = (copy(torch.randn(B, S, Hk, D)).transpose(1, 2) for _ in range(2))
        self.mask = None
        if case.mask == "padding":
            self.mask = torch.arange(S) >= torch.arange(B)[:, None] * S // 2  # left padding
        elif case.mask:
            shape = [n if d in case.mask else 1 for d, n in zip("bhts", (B, H, T, S))]
            seen = torch.rand(shape) < 0.6
            seen[0, 0, 0] = False
            self.mask = copy(torch.randn(shape).masked_fill(~seen, -torch.inf)) if "+" in case.mask else seen

    def arguments(self):
        return self.case.causal, self.mask, self.case.p, SEED, self.case.shape[-1] ** -0.5

    def define(self, dtype, terms=False):
        """-> o, lse, dq, dk, dv; terms: as in `Tensors.define`"""
        B, H, Hk, T, S, D = self.case.shape
        q, k, v = (t.detach().to(dtype).requires_grad_() for t in (self.q, self.k, self.v))
        all_k, all_v = (t.repeat_interleave(H // Hk, 1) for t in (k, v))
        s = D**-0.5 * (q @ all_k.mT)
        if self.case.mask == "padding":
            s = s.masked_fill(~self.mask[:, None, None], -torch.inf)
        elif self.mask is not None:
            s = s + self.mask.to(dtype) if "+" in self.case.mask else s.masked_fill(~self.mask, -torch.inf)
        if self.case.causal:
            s = s.masked_fill(torch.arange(S) > torch.arange(T)[:, None] + S - T, -torch.inf)
        lse = s.detach().logsumexp(-1)
        weights = s.masked_fill(torch.isneginf(lse)[..., None], -1e4).softmax(-1)
        weights = weights.masked_fill(torch.isneginf(lse)[..., None], 0)
        if terms:
            sizes = D**-0.5 * (q.abs() @ all_k.abs().mT)
            if self.mask is not None and "+" in self.case.mask:
                sizes = sizes + self.mask.to(dtype).abs().masked_fill(self.mask == -torch.inf, 0)
            weights = sizes_of_weights(weights, through(s, sizes), sizes.detach())
        if self.case.p:
            weights = weights * dropout_mask(SEED, (B, H, T, S), self.case.p, 1).to(dtype) / (1 - self.case.p)
        do = self.do.to(dtype)
        o = weights @ (all_v.abs() if terms else all_v)
        return o.detach(), lse, *torch.autograd.grad(o, (q, k, v), do.abs() if terms else do)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", TOKENS, ids=range(len(TOKENS)))
def test_tokens(isa, memory, dtype, case):
    t, eps = Tokens(case, memory, dtype), torch.finfo(dtype).eps
    (exact, exact_lse, *exact_grads), (same, same_lses, *same_grads) = t.define(torch.float64), t.define(dtype)
    sizes, _, *size_grads = t.define(torch.float64, terms=True)
    with num_threads(case.threads):
        o, lse = native.prefix_attention_tokens(t.q, t.k, t.v, *t.arguments())
        got = native.prefix_attention_grad_tokens(
            t.do, t.q, t.k, t.v, exact.to(dtype), exact_lse.float(), *t.arguments(), (True,) * 3
        )
        for i in range(3):
            one = native.prefix_attention_grad_tokens(
                t.do, t.q, t.k, t.v, exact.to(dtype), exact_lse.float(), *t.arguments(), [i == j for j in range(3)]
            )
            assert [g is not None for g in one] == [i == j for j in range(3)] and torch.equal(one[i], got[i])
    assert o.dtype == dtype and lse.dtype == torch.float32 and o.transpose(1, 2).is_contiguous()
    assert_close(o, same, exact, "o", eps, sizes)
    found, want = same_lse(lse, exact_lse, "lse")
    assert_close(found, same_lse(same_lses, exact_lse, "composition")[0], want, "lse", eps)
    for name, grad, compare, exact_grad, size in zip(("dq", "dk", "dv"), got, same_grads, exact_grads, size_grads):
        assert grad.dtype == dtype
        assert_close(grad, compare, exact_grad, name, eps, size.abs())


# ---- rows without a prefix, or with one that is not there ----


@pytest.mark.parametrize("separate", [False, True])
def test_an_index_out_of_range_reads_nothing_foreign(isa, memory, separate):
    """Its row is NaN, the others are as without it, and it has no part in what is shared."""
    shape, gate = (4, 4, 2, 5, 9, 16), "shared" if separate else ""
    case = Case(shape, "bp", "1", "shared", separate, gate, index=(1, 0, 1, 0), lengths=(9, 3))
    t = case.make(memory, torch.float32)
    o, lse = t.forward()
    exact_o, exact_lse, _ = t.define(torch.float64)
    for foreign in (2, -2, 2**31 - 1, -(2**31)):
        case.index = (1, 0, -1, 0)
        t.index = t.integers(case.index, torch.int32)
        (dq, before), grads = t.backward(exact_o, exact_lse.float())
        t.index = t.integers((1, 0, foreign, 0), torch.int32)
        got, got_lse = t.forward()
        assert got[2].isnan().all() and got_lse[2].isnan().all()
        others = [0, 1, 3]
        assert torch.equal(got[others], o[others]) and torch.equal(got_lse[others], lse[others])
        (dq_2, before_2), grads_2 = t.backward(exact_o, exact_lse.float())
        for one, other in zip(grads, grads_2):
            assert one is other is None or torch.equal(one, other)
        rounded = 2**-23 * (
            dq.abs() + before.abs() + dq_2.abs() + before_2.abs()
        )  # sums and differences, to the nearest
        assert ((dq - before) - (dq_2 - before_2)).abs().le(rounded).all()


# ---- special values, repeatability ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_stays_in_its_rows(isa, memory, dtype):
    """A NaN reaches what attends to it and nothing else: no padded lane spreads it."""
    case = Case((2, 4, 2, 37, 19, 24), "btp", "btp", "each", index=(0, 1), lengths=(19, 6))
    for operand in ("q", "gate_k", "prefix_k", "prefix_v"):
        t = case.make(memory, dtype)
        getattr(t, operand)[0, 1 if "prefix" in operand else -1, 3 if "gate" not in operand else 0, 2] = torch.nan
        exact, exact_lse, exact_grads = t.define(torch.float64)
        o, lse = t.forward()
        assert torch.equal(o.isnan(), exact.isnan()) and torch.equal(lse.isnan(), exact_lse.isnan()), operand
        (dq, before), got = t.backward(exact, exact_lse.float())
        for one, other in zip((dq, *got), exact_grads):
            assert one is None or torch.equal(one.isnan(), other.isnan()), operand


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_repeat_bit_for_bit(isa, memory, dtype, threads):
    case = Case((3, 6, 3, 130, 65, 32), "bp", "tp", "shared", p=0.1, threads=threads)
    tokens = Tokens(TokenCase((2, 4, 1, 130, 130, 32), True, "", 0.1), memory, dtype)
    t = case.make(memory, dtype)
    exact, exact_lse, _ = t.define(torch.float64)
    results = []
    for _ in range(3):
        torch.manual_seed(1)
        (dq, _), grads = t.backward(exact, exact_lse.float())
        with num_threads(threads):
            o, lse = native.prefix_attention_tokens(tokens.q, tokens.k, tokens.v, *tokens.arguments())
            of_tokens = native.prefix_attention_grad_tokens(
                tokens.do, tokens.q, tokens.k, tokens.v, o, lse, *tokens.arguments(), (True,) * 3
            )
        results.append([*t.forward(), dq, *(g for g in grads if g is not None), o, lse, *of_tokens])
    for again in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], again, strict=True))


def test_one_number_of_threads_gives_what_another_gives(isa, memory):
    """Forward and dq bit for bit: a row's sums do not depend on who computes them."""
    case = Case((2, 4, 2, 150, 70, 32), "btp", "btp", "shared")
    t = case.make(memory, torch.bfloat16)
    exact, exact_lse, _ = t.define(torch.float64)
    results = []
    for case.threads in (1, 2, 5):
        torch.manual_seed(1)
        (dq, _), _ = t.backward(exact, exact_lse.float())
        results.append([*t.forward(), dq])
    for again in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], again, strict=True))


# ---- what is not taken ----


def test_what_would_touch_foreign_memory_is_refused():
    B, H, Hk, T, P, D = 2, 4, 2, 3, 5, 8
    good = {
        "q": torch.randn(B, H, T, D), "prefix_k": torch.randn(1, Hk, P, D), "prefix_v": torch.randn(1, Hk, P, D),
        "gate_k": None, "gate_v": None, "log_bias": None, "gate_out": None, "index": None, "lengths": None,
        "offsets": None, "o": torch.randn(B, H, T, D), "lse": torch.randn(B, H, T), "separate": False, "p": 0.0,
        "seed": None, "scale": 1.0,
    }  # fmt: skip
    flat = {"prefix_k": torch.randn(Hk, P, D), "prefix_v": torch.randn(Hk, P, D), "index": torch.zeros(B).int()}
    wrong = [
        ({"q": torch.randn(B, H, T, D).double()}, "q must be"),
        ({"q": torch.randn(B, H, T, 257)}, "q must be .*D up to 256"),
        ({"q": torch.randn(B, H, D, T).mT}, "q must be"),
        ({"q": torch.randn(H, T, D)}, "q must be"),
        (
            {"prefix_k": torch.randn(1, 3, P, D), "prefix_v": torch.randn(1, 3, P, D)},
            "prefix_k must be .*divides H = 4",
        ),
        ({"prefix_k": torch.randn(1, Hk, P, D + 1)}, "prefix_k must be"),
        ({"prefix_v": torch.randn(1, Hk, P + 1, D)}, "prefix_v must be of prefix_k's shape"),
        ({"prefix_k": torch.randn(3, Hk, P, D), "prefix_v": torch.randn(3, Hk, P, D)}, "index must be"),
        ({"index": torch.zeros(B).long()}, "index must be .*int32"),
        ({"index": torch.zeros(B + 1).int()}, "index must be"),
        ({"lengths": torch.zeros(2).int()}, "lengths must be"),
        ({"offsets": torch.zeros(2).long()}, "offsets must be None"),
        (flat, "offsets must be"),
        (flat | {"offsets": torch.tensor([0, P + 1])}, "offsets must be ascending"),
        (flat | {"offsets": torch.tensor([-1, P])}, "offsets must be ascending"),
        (flat | {"offsets": torch.tensor([0, 3, 2])}, "offsets must be ascending"),
        (flat | {"offsets": torch.tensor([0, P]), "gate_k": torch.ones(B, 1, 1, P - 1)}, "gate_k must be"),
        ({"gate_k": torch.ones(B, 1, 1, P + 1)}, "gate_k must be"),
        ({"gate_v": torch.ones(B, 1, P)}, "gate_v must be"),
        ({"log_bias": torch.ones(2, H, P)}, "log_bias must be"),
        ({"log_bias": torch.ones(1, 1, P)}, "log_bias must be"),
        ({"gate_out": torch.ones(H)}, "gate_out must be"),
        ({"o": torch.randn(B, H, T, D).bfloat16()}, "o must be"),
        ({"o": torch.randn(B, H, T + 1, D)}, "o must be"),
        ({"lse": torch.randn(B, H, T).double()}, "lse must be"),
        ({"lse": torch.randn(B, T, H)}, "lse must be"),
        ({"p": 0.5}, "seed must be"),
        ({"p": 1.0, "seed": SEED}, "p must be"),
    ]
    native.prefix_attention_forward(*good.values())
    for change, said in wrong:
        with pytest.raises(ValueError, match=f"prefix_attention_forward: {said}"):
            native.prefix_attention_forward(*(good | change).values())

    q, k, o, lse = (good[name] for name in ("q", "prefix_k", "o", "lse"))
    prefix = [good[name] for name in list(good)[1:10]]
    for grad_o, o_, dq, said in [(o[:1], o, None, "do must"), (o, None, None, "o must"), (o, o, o[:, :1], "dq must")]:
        with pytest.raises(ValueError, match=f"prefix_attention_backward: {said}"):
            native.prefix_attention_backward(grad_o, q, *prefix, o_, lse, dq, False, 0.0, None, 1.0, (True,) * 6)
    k = k.repeat(B, 1, 1, 1)
    for key, v, mask, said in [
        (k[:1], k, None, "k must"),
        (k, k[:, :, 1:], None, "v must"),
        (k.bfloat16(), k.bfloat16(), None, "k must"),
        (k, k, torch.ones(B, P), "mask must"),
        (k, k, torch.ones(B, H, T, P + 1), "mask must"),
        (k, k, torch.ones(B, H, T, P).long(), "mask must"),
    ]:
        with pytest.raises(ValueError, match=f"prefix_attention_tokens: {said}"):
            native.prefix_attention_tokens(q, key, v, False, mask, 0.0, None, 1.0)


@pytest.mark.parametrize("shape", [(0, 4, 2, 3, 5, 8), (2, 0, 2, 3, 5, 8), (2, 4, 2, 0, 5, 8)])
def test_empty_tensors(isa, memory, shape):
    case = Case(shape, "bp", "1", "shared")
    t = case.make(memory, torch.bfloat16)
    o, lse = t.forward()
    _, grads = t.backward(o, lse)
    assert all(g is None or not g.any() for g in grads)
    for like, g in zip(t.differentiable()[1:], grads):
        assert like is None or g.shape == like.shape
