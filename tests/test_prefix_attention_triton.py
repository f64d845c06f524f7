"""The Triton kernels of prefix_attention through the backend's passes: all results and gradients against float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from _close import assert_close, sizes_of_weights, through
from _guarded import Memory
from conftest import HAS_GPU, HAS_TRITON

from fastpeft import native
from fastpeft.backends.triton import prefix_attention as passes
from fastpeft.reference import lora_linear as lora_reference
from fastpeft.reference import prefix_attention as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}
NAMES = ("q", "k", "v", "prefix_k", "prefix_v", "gate_k", "gate_v", "log_bias", "gate_out")
SEED = 1234567890123


@dataclass(frozen=True)
class Case:
    b: int = 2
    h: int = 2
    hk: int = 1
    t: int = 19
    s: int = 23
    p: int = 5
    d: int = 16
    a: int = 1
    causal: bool = False
    separate: bool = False
    mask: str = ""  # "keys", "bool", "added", "least"
    gate_k: str = ""  # which of b, h, t, p it has; "1": none of them
    gate_v: str = ""
    bias: bool = False
    out: bool = False
    index: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    flat: tuple[int, ...] | None = None  # the prefixes' lengths
    dropout: float = 0.0


CASES = [
    Case(h=4),
    Case(b=1, h=2, hk=2, t=150, s=140, p=70, causal=True),  # several blocks of everything
    Case(b=1, t=40, s=17, d=24, causal=True, gate_v="bh"),  # queries that see the prefix alone
    Case(t=37, s=21, p=0, causal=True),  # queries that see nothing
    Case(t=1, s=65, p=3, d=40, causal=True, gate_k="1", gate_v="1"),
    Case(b=1, h=4, t=7, s=70, p=18, causal=True, gate_k="bhtp", gate_v="bhtp", bias=True),
    Case(b=3, t=36, gate_k="bt", gate_v="hp", bias=True),
    Case(b=1, t=36, p=40, gate_k="tp", gate_v="t", mask="added"),
    Case(b=1, separate=True, t=36, p=40, gate_k="bp", gate_v="bhtp", bias=True, out=True, causal=True),
    Case(separate=True, mask="keys", out=True, p=0),
    Case(mask="keys", d=100),
    Case(mask="bool", separate=True, gate_v="p"),
    Case(mask="least"),
    Case(mask="keys", causal=True, b=4, a=3, index=(2, -1, 0, 2), bias=True, gate_k="b"),
    Case(separate=True, b=4, a=3, t=5, index=(1, 1, -1, 2), lengths=(2, 0, 5), bias=True, out=True, gate_v="btp"),
    Case(lengths=(3,), gate_k="hp"),
    Case(b=4, a=4, t=5, s=7, index=(3, 0, 0, -1), flat=(3, 0, 18, 19), bias=True, gate_k="bhtp", gate_v="b"),
    Case(b=3, a=3, t=5, s=7, index=(1, 2, 1), flat=(3, 7, 0), separate=True, out=True),
    Case(dropout=0.3, causal=True, p=18, gate_v="b"),
    Case(
        dropout=0.6, separate=True, out=True, t=5, mask="keys", b=3, a=3, index=(0, 2, 2), flat=(3, 6, 7), gate_k="tp"
    ),
    Case(b=1, h=3, t=18, s=36, p=33, d=256, causal=True, gate_k="b"),
    Case(b=1, h=1, t=2, s=3, p=1, d=1, separate=True, out=True),
]


@pytest.fixture(params=[*(["cpu"] if HAS_TRITON and not HAS_GPU else []), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if native.triton("prefix_attention") is None:
        pytest.skip(native.why_not_triton("prefix_attention"))
    return request.param


def gate_of(case, letters):
    sizes = {"b": case.b, "h": case.h, "t": case.t, "p": max(case.flat) if case.flat else case.p}
    return torch.randn([n if letter in letters else 1 for letter, n in sizes.items()]) if letters else None


def problem(case, dtype, device):
    """The op's tensors, by name; values of the size that layers see. q, k and v lie in memory as [B, T, H, D]."""
    b, h, hk, a, d = case.b, case.h, case.hk, case.a, case.d
    q, k, v = (
        torch.randn(b, n, heads, d).transpose(1, 2).to(dtype) for n, heads in ((case.t, h), (case.s, hk), (case.s, hk))
    )
    offsets = torch.tensor([0, *case.flat]).cumsum(0) if case.flat else None
    total = sum(case.flat) if case.flat else case.p
    of_prefix = (hk, total, d) if case.flat else (a, hk, total, d)
    adapters = 1 if case.flat else a
    bias = torch.randn(adapters, h, total) if case.bias else None
    if case.bias and total > 2:
        bias[..., 1] = float("-inf")  # pruned
    tensors = dict(
        q=q, k=k, v=v, prefix_k=torch.randn(of_prefix), prefix_v=torch.randn(of_prefix), gate_k=gate_of(case, case.gate_k),
        gate_v=gate_of(case, case.gate_v), log_bias=bias, gate_out=torch.randn(a, h) if case.out else None,
        index=None if case.index is None else torch.tensor(case.index, dtype=torch.int32),
        lengths=None if case.lengths is None else torch.tensor(case.lengths, dtype=torch.int32), offsets=offsets,
    )  # fmt: skip
    return {name: None if t is None else t.to(device) for name, t in tensors.items()}


def mask_of(case, dtype, device):
    b, h, t, s = case.b, case.h, case.t, case.s
    if case.mask == "keys":
        mask = torch.rand(b, s) < 0.7
        mask[0] = False
    elif case.mask == "bool":
        mask = torch.rand(1, h, t, s) < 0.5
        mask[:, :, 3] = False
    elif case.mask == "added":
        mask = torch.randn(b, 1, t, s).to(dtype)
        mask[torch.rand(b, 1, t, s) < 0.3] = float("-inf")
    elif case.mask == "least":
        mask = torch.zeros(b, 1, 1, s).expand(b, h, t, s).to(dtype)
        mask = mask.masked_fill(torch.rand(b, 1, t, s) < 0.3, torch.finfo(dtype).min)
    else:
        return None
    return mask.to(device)


def composition(
    q, k, v, prefix_k, prefix_v, gate_k, gate_v, log_bias, gate_out, index, lengths, offsets, *, causal, mask, separate,
    dropout_p, seed, scale, terms=False,
):  # fmt: skip
    """What a user would write, in q's dtype: prefixes gathered a row, beside the tokens, scores written out

    terms: instead of each sum the sum of its terms' absolute values, in the gradients too.
    """
    if terms:
        v, prefix_v, gate_v, gate_out = (None if t is None else t.abs() for t in (v, prefix_v, gate_v, gate_out))
    rows = reference.by_row(q, prefix_k, prefix_v, gate_k, gate_v, log_bias, gate_out, index, lengths, offsets)
    pk, pv, gate_k, gate_v, bias, c = (1.0 if t is None else t.to(q.dtype) for t in rows[:6])
    pk, pv, k, v = (
        t.expand(q.shape[0], -1, -1, -1).repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (pk, pv, k, v)
    )
    s_p = scale * gate_k * (q @ pk.mT) + (0.0 if log_bias is None else bias)
    if rows.valid is not None:
        s_p = s_p.masked_fill(~rows.valid, float("-inf"))
    s_x = scale * (q @ k.mT)
    if mask is not None:
        mask = mask[:, None, None] if mask.dim() == 2 else mask
        s_x = s_x.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else s_x + mask
    if causal:
        unseen = torch.ones(s_x.shape[-2:], dtype=torch.bool, device=q.device).triu(k.shape[2] - q.shape[2] + 1)
        s_x = s_x.masked_fill(unseen, float("-inf"))

    of_p = of_x = s_p  # Σ|terms| of the scores
    if terms:
        of_p = scale * torch.as_tensor(gate_k).abs() * (q.abs() @ pk.abs().mT)
        of_p = of_p if log_bias is None else of_p + bias.abs().masked_fill(bias == float("-inf"), 0.0)
        of_x = scale * (q.abs() @ k.abs().mT)
        if mask is not None and mask.dtype != torch.bool:
            of_x = of_x + mask.abs().masked_fill(mask == float("-inf"), 0.0)

    def softmax(s, sizes):
        dead = (s == float("-inf")).all(-1, keepdim=True)
        w = s.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)
        return sizes_of_weights(w, through(s, sizes), sizes.detach()) if terms else w

    if separate:
        w_p, w_x = softmax(s_p, of_p), softmax(s_x, of_x)
    else:
        both = softmax(torch.cat([s_p, s_x], -1), torch.cat([of_p, of_x], -1))
        w_p, w_x = both.split([s_p.shape[-1], s_x.shape[-1]], -1)
    w_p, w_x = (lora_reference.drop(w, dropout_p, seed, i) for i, w in enumerate((w_p, w_x)))
    return w_x @ v + (c if separate else 1.0) * ((w_p * gate_v) @ pv)


def differentiated(function, tensors, do, how):
    leaves = {
        name: t.detach().requires_grad_() if t is not None and t.is_floating_point() else t
        for name, t in tensors.items()
    }
    o = function(*leaves.values(), **how)
    wanted = [name for name in NAMES if leaves[name] is not None]
    grads = torch.autograd.grad(o, [leaves[name] for name in wanted], do, allow_unused=True)
    grads = [torch.zeros_like(leaves[name]) if g is None else g for name, g in zip(wanted, grads)]
    return {"o": o.detach()} | dict(zip(wanted, grads))


def of_passes(tensors, do, how, needs=None):
    needs = [tensors[name] is not None for name in NAMES] if needs is None else needs
    arguments = (how["causal"], how["mask"], how["separate"], how["dropout_p"], how["seed"], how["scale"])
    o, o_x, lse, lse_p = passes.fused(*tensors.values(), *arguments)
    saved = (o_x if how["separate"] else o, lse, lse_p)
    grads = passes.grad_fused(do, *tensors.values(), *saved, *arguments, needs)
    assert [g is not None for g in grads] == list(needs)
    for name, g in zip(NAMES, grads):
        if g is not None:
            assert g.shape == tensors[name].shape
            assert g.dtype == (tensors[name].dtype if name in NAMES[:5] else torch.float32)
    return {"o": o} | {name: g for name, g in zip(NAMES, grads) if g is not None}


def how_of(case, mask, device):
    return dict(
        causal=case.causal, mask=mask, separate=case.separate, dropout_p=case.dropout,
        seed=torch.tensor(SEED, device=device) if case.dropout else None, scale=0.8 * case.d**-0.5,
    )  # fmt: skip


def setup(case, dtype, device):
    tensors = problem(case, dtype, device)
    do = torch.randn(case.b, case.h, case.t, case.d).to(device, dtype)
    return tensors, do, how_of(case, mask_of(case, dtype, device), device)


def in_double(tensors):
    return {name: t.double() if t is not None and t.is_floating_point() else t for name, t in tensors.items()}


def check(got, tensors, do, how):
    dtype = tensors["q"].dtype
    mask = how["mask"]
    if mask is not None and mask.is_floating_point():  # float32's least is no least of float64's
        mask = mask.double().masked_fill(mask == torch.finfo(mask.dtype).min, float("-inf"))
    exact = differentiated(reference.prefix_attention, in_double(tensors), do.double(), how | {"mask": mask})
    composed = differentiated(composition, tensors, do, how)
    sizes = differentiated(
        partial(composition, terms=True), in_double(tensors), do.double().abs(), how | {"mask": mask}
    )
    assert got.keys() == exact.keys()
    for name in got:
        assert_close(
            got[name], composed[name].to(got[name].dtype), exact[name], name, eps=EPS[dtype], terms=sizes[name].abs()
        )


def name(case):
    return ",".join(f"{k}={v}" for k, v in vars(case).items() if v != getattr(Case, k))


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # NumPy's, at log 0 of a query that sees nothing
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_against_float64(device, case, dtype):
    tensors, do, how = setup(case, dtype, device)
    check(of_passes(tensors, do, how), tensors, do, how)


@pytest.mark.parametrize("case", [CASES[5], CASES[8], CASES[18]], ids=name)
def test_tokens_and_prefix_apart(device, case):
    """The passes that dispatch modes and compilers see: tokens first, the prefix merged into their o and lse."""
    tensors, do, how = setup(case, torch.float32, device)
    q, k, v, *prefix = tensors.values()
    separate, rest = how["separate"], (how["dropout_p"], how["seed"], how["scale"])
    o_x, lse = passes.tokens(q, k, v, how["causal"], how["mask"], *rest)
    o, other = passes.forward(q, *prefix, o_x, lse, separate, *rest)
    assert separate or (o is o_x and other is lse)
    dq, dk, dv = passes.grad_tokens(do, q, k, v, o_x, lse, how["causal"], how["mask"], *rest, [True] * 3)
    needs = [tensors[one] is not None for one in NAMES[3:]]
    of_prefix = passes.backward(do, q, *prefix, None if separate else o, other, dq, separate, *rest, needs)
    got = {"o": o} | {one: g for one, g in zip(NAMES, (dq, dk, dv, *of_prefix)) if g is not None}
    check(got, tensors, do, how)


def test_only_what_is_needed(device):
    tensors, do, how = setup(CASES[8], torch.float32, device)
    every = of_passes(tensors, do, how)
    for i, one in enumerate(NAMES):
        alone = of_passes(tensors, do, how, [j == i for j in range(9)])
        assert torch.equal(alone[one], every[one])


def test_twice_the_same_bits(device):
    tensors, do, how = setup(replace(CASES[7], b=2, dropout=0.2), torch.bfloat16, device)
    first, second = of_passes(tensors, do, how), of_passes(tensors, do, how)
    assert all(torch.equal(first[one], second[one]) for one in first)


@pytest.mark.parametrize("bad", [3, -2])
@pytest.mark.parametrize("kind", [{}, {"flat": (3, 1, 5)}, {"lengths": (2, 5, 3)}], ids=["padded", "flat", "ragged"])
def test_an_index_out_of_range(device, kind, bad):
    """NaN in its own row alone; what rows share gets the gradients of the others."""
    case = Case(b=3, a=3, t=3, s=5, index=(1, -1, 2), out=True, separate=True, bias=True, gate_k="hp", **kind)
    tensors, do, how = setup(case, torch.float32, device)
    without = of_passes(tensors, do, how)
    got = of_passes(tensors | {"index": torch.tensor([1, bad, 2], dtype=torch.int32, device=device)}, do, how)
    assert got["o"][1].isnan().all() and torch.equal(got["o"][::2], without["o"][::2])
    for one in NAMES[3:]:
        assert one not in got or torch.equal(got[one], without[one]), one


def test_it_reads_nothing_behind_its_tensors():
    """Each tensor ends where a page begins that may not be touched."""
    if not HAS_TRITON or HAS_GPU:
        pytest.skip("the interpreter reads this process' memory; a GPU has its own")
    memory = Memory()
    try:
        case = Case(
            b=2, a=2, t=5, s=7, d=20, index=(1, 0), flat=(3, 2), bias=True, out=True, separate=True, gate_k="bhtp"
        )
        tensors, do, how = setup(case, torch.float32, "cpu")
        with torch.no_grad():
            guarded = {
                one: t if t is None else memory.copy(t.reshape(1, -1), t.dtype).view(t.shape)
                for one, t in tensors.items()
            }
        got, expected = of_passes(guarded, do, how), of_passes(tensors, do, how)
        assert all(torch.equal(got[one], expected[one]) for one in got)
    finally:
        memory.close()


def test_small_fp16_gradients_of_a_prefix_do_not_vanish(device):
    """c is small in the first steps of LLaMA-Adapter; weights times c would be zeros in fp16."""
    tensors, do, how = setup(Case(b=1, separate=True, out=True), torch.float16, device)
    tensors["gate_out"] = tensors["gate_out"] * 1e-7
    check(of_passes(tensors, do, how), tensors, do, how)


def test_what_it_does_not_take():
    tiny = torch.empty(1, 1, 1, 16)
    wide, double = torch.empty(1, 1, 1, 300), tiny.double()
    if not HAS_TRITON or HAS_GPU:
        pytest.skip("asked on the CPU, which only the interpreter takes")
    assert passes.can((tiny,) * 5 + (None,) * 7) is None
    assert "D = 300" in passes.can((wide,) * 5 + (None,) * 7)
    assert "q is torch.float64" in passes.can((double,) * 5 + (None,) * 7)
    assert "gate_v is torch.float64" in passes.can((tiny,) * 5 + (None, double) + (None,) * 5)
