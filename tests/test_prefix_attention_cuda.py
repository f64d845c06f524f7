"""The CUDA C++ passes of prefix_attention where there is no GPU: compiled for the CPU on tests/cuda/emulate.h, and run.

With `cuda@cuda` the numeric tests run on a GPU, on the module that was built for it. In emulation the tokens are PyTorch's on
the CPU; what they are on a GPU is called here with stand-ins for PyTorch's kernels, and has to run on a GPU yet.
"""

from __future__ import annotations

import math

import _cuda_emulation
import pytest
import torch
from _close import assert_close
from _guarded import Memory
from test_prefix_attention import DTYPES, EPS, MODES, VARIANTS, check, in_double, problem, run, variant

import fastpeft as fp
from fastpeft import native
from fastpeft.backends.cuda import prefix_attention as cuda
from fastpeft.ops import prefix_attention
from fastpeft.reference import prefix_attention as reference

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = [  # B, H, Hk, T, S, D, P
    (1, 1, 1, 1, 1, 16, 1),
    (1, 4, 2, 1, 9, 64, 34),
    (2, 2, 1, 7, 5, 40, 3),
    (1, 2, 2, 66, 66, 24, 33),
    (1, 1, 1, 17, 17, 128, 65),
    (1, 2, 1, 34, 4, 256, 5),
]


@pytest.fixture(params=["cuda", pytest.param("cuda@cuda", marks=pytest.mark.gpu)])
def backend(request, monkeypatch):
    if request.param == "cuda@cuda":
        with torch.device("cuda"), fp.backend("cuda"):
            yield request.param
        return
    module = _cuda_emulation.module()
    monkeypatch.setattr(native, "cuda", lambda: module)
    monkeypatch.setattr(cuda, "can", lambda meta: None)
    with fp.backend("cuda"):
        yield request.param


@pytest.mark.verifies("prefix_attention", "forward", "backward")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(backend, dtype, shape, mode):
    """Without gates and with; D = 256 is for 16 bits."""
    if shape[5] * dtype.itemsize > cuda.MAX_ROW:
        assert cuda.MAX_ROW // dtype.itemsize == 128
        return
    check(*problem(shape, dtype, mode, is_causal=True))
    check(*problem(shape, dtype, mode, gates="none"))


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("mode", MODES)
def test_heads_of_no_round_size(backend, mode):
    check(*problem((2, 2, 1, 19, 5, 17, 4), torch.bfloat16, mode))
    check(*problem((1, 2, 1, 3, 5, 1, 4), torch.float32, mode, masters=torch.float16))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(backend, name, mode):
    check(*variant(name, torch.bfloat16, mode))


@pytest.mark.parametrize("gates", [(1, 1, 70, 35), (2, 1, 1, 35), (1, 2, 70, 1), (1, 2, 1, 1), (35,)], ids=str)
def test_gates_of_several_tiles(backend, gates):
    check(*problem((2, 2, 1, 70, 3, 16, 35), torch.float32, gates=gates))


@pytest.mark.verifies("prefix_attention", "forward", "backward")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["causal", "ragged", "flat with gates"])
def test_dropout_against_float64(backend, name, dtype, mode):
    check(*variant(name, dtype, mode, dropout_p=0.3, seed=2**40 + 12345))


@pytest.mark.parametrize("masters", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_of_prefixes(backend, dtype, masters):
    check(*variant("causal", dtype, "separate", masters=masters))


@pytest.mark.parametrize("mode", MODES)
def test_the_same_bits_twice(backend, mode):
    tensors, options = variant("flat with gates", torch.bfloat16, mode, dropout_p=0.2, seed=4)
    do = torch.randn(tensors["q"].shape).bfloat16()
    once, again = (run(prefix_attention, tensors, options, do) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("kind", ["padded", "ragged", "flat"])
def test_an_index_out_of_range(backend, kind):
    """Its row is NaN, and gives nothing to what rows share."""
    tensors, options = problem((3, 2, 1, 5, 5, 16, 4), torch.float32, index=[7, 1, -2], kind=kind, gates=(1, 1, 1, 4))
    do = torch.randn(tensors["q"].shape)
    got = run(prefix_attention, tensors, options, do)
    assert got["o"][[0, 2]].isnan().all() and not got["o"][1].isnan().any()
    one = {name: x[1:2] if name in ("q", "k", "v") else x for name, x in tensors.items()}
    options["prefix_index"] = options["prefix_index"][1:2]
    alone = run(prefix_attention, one, options, do[1:2])
    for name in ("prefix_k", "prefix_v", "gate_k", "gate_v", "log_bias"):
        assert torch.equal(got[name], alone[name]), name


def test_a_flat_prefix_longer_than_its_gates_makes_its_rows_nan(backend):
    tensors, options = problem((3, 2, 1, 5, 5, 16, 4), torch.float32, index=[0, 1, 2], kind="flat", gates=(1, 1, 1, 3))
    got = run(prefix_attention, tensors, options, torch.randn(tensors["q"].shape))
    assert got["o"][0].isnan().all() and not got["o"][1:].isnan().any()
    assert not any(got[name].isnan().any() for name in ("prefix_k", "prefix_v", "gate_k", "gate_v", "log_bias"))


def test_fp16_keeps_its_range(backend):
    """ds of more than fp16 holds: dpk is float32, and dq small enough by way of a small pk."""
    q, k, v, do = (torch.randn(1, 1, 9, 16).half() for _ in range(4))
    do *= 2e3
    prefix = torch.randn(1, 1, 5, 16) * 1e-4, torch.randn(1, 1, 5, 16) * 50
    assert (do.float() @ prefix[1][0, 0].t()).abs().max() > torch.finfo(torch.half).max
    tensors = dict(zip(("q", "k", "v", "prefix_k", "prefix_v"), (x.requires_grad_() for x in (q, k, v, *prefix))))
    exact = run(on_torch, in_double(tensors), {}, do.double())
    wide = run(on_torch, tensors, {}, do)
    for name, got in run(prefix_attention, tensors, {}, do).items():
        assert_close(got, wide[name], exact[name], name, eps=EPS[torch.half])


def on_torch(**arguments):
    with fp.backend("torch"):
        return prefix_attention(**arguments)


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def guarded():
    """Memory whose last element is followed by a page that may not be touched; the module's results and workspaces too."""
    memory, dtypes = Memory(), (torch.float32, torch.bfloat16, torch.float16)
    module = _cuda_emulation.module()

    def like(t, gap=0):
        rows = memory.copy(t.detach().flatten(0, -2), t.dtype, gap)
        return rows.as_strided(t.shape, [*(s // t.shape[-1] * rows.stride(0) for s in t.stride()[:-1]), 1])

    def allocate(shape, code):
        return (
            like(torch.empty(shape, dtype=dtypes[code])) if math.prod(shape) else torch.empty(shape, dtype=dtypes[code])
        )

    module.set_allocator(allocate)
    yield like
    module.set_allocator(None)
    memory.close()


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("d, gap", [(16, 0), (16, 3), (13, 8)])
@pytest.mark.parametrize("kind", ["padded", "ragged", "flat"])
@pytest.mark.parametrize("mode", MODES)
def test_reads_and_writes_stay_inside(backend, guarded, mode, kind, d, gap):
    """Every operand ends at a page that may not be touched; lengths, offsets and an index that lie are no reason to."""
    b, h, t, p, separate = 4, 2, 5, 7, mode == "separate"
    total = 11 if kind == "flat" else p
    many = (1, total) if kind == "flat" else (2, 1, total)
    q, o, do, dq = (guarded(torch.randn(b, h, t, d).bfloat16(), gap) for _ in range(4))
    prefix = [guarded(torch.randn(*many, d), gap) for _ in range(2)]
    prefix += [guarded(torch.rand(b, 1, t, p)), guarded(torch.rand(1, h, 1, p))]
    prefix += [guarded(torch.randn(1 if kind == "flat" else 2, h, total)), guarded(torch.randn(2, h))]
    lse = guarded(torch.randn(b, h, t))
    prefix += [torch.tensor([1, 2, -1, 0], dtype=torch.int32)]
    prefix += [torch.tensor([99, -3], dtype=torch.int32) if kind == "ragged" else None]
    prefix += [torch.tensor([-5, 4, 99]) if kind == "flat" else None]
    before = o.clone()
    out, lse_out = cuda.forward(q, *prefix, o, lse, separate, 0.3, torch.tensor(7), 0.5)
    assert out[1].isnan().all() and not out[[0, 2, 3]].isnan().any()
    assert torch.equal(out[2], before[2]) and (out is o) == (lse_out is lse) == (not separate)
    needs = (True, True, True, True, True, separate)
    found = cuda.backward(
        do, q, *prefix, None if separate else out, lse_out, dq, separate, 0.3, torch.tensor(7), 0.5, needs
    )
    for got, of in zip(found, prefix):
        assert got is None or (got.shape == of.shape and not got.isnan().any())
    if gap:
        for x in (o, dq):
            assert x.as_strided((b * h * t - 1, gap), (d + gap, 1), x.storage_offset() + d).isnan().all()


def test_what_does_not_fit_is_refused(backend):
    """Before anything is read or written: what the kernels would take at its word."""
    q, pk, o, lse = torch.randn(2, 4, 3, 16), torch.randn(1, 2, 5, 16), torch.zeros(2, 4, 3, 16), torch.zeros(2, 4, 3)
    gate, index = torch.ones(2, 1, 3, 5), torch.zeros(2, dtype=torch.int32)
    good = dict(
        q=q, prefix_k=pk, prefix_v=pk, gate_k=None, gate_v=None, log_bias=None, gate_out=None, index=None, lengths=None,
        offsets=None, o=o, lse=lse, separate=False, p=0.0, seed=None, scale=1.0,
    )  # fmt: skip
    refused = [
        ({"q": q.double()}, r"prefix_attention_forward: q must be \[B, H, T, D\], float32, bfloat16 or float16"),
        ({"q": torch.randn(2, 4, 3, 129)}, "D from 1 to 128"),
        ({"q": q.transpose(2, 3).contiguous().transpose(2, 3)}, r"q must be \[2, 4, 3, 16\], contiguous rows"),
        ({"prefix_k": pk[0]}, r"prefix_k must be \[A, Hk, P, D\], got \[2, 5, 16\]"),
        ({"prefix_k": torch.randn(1, 3, 5, 16)}, "prefix_k must be of Hk heads that divide H = 4"),
        ({"prefix_v": pk[:, :, :4]}, r"prefix_v must be \[1, 2, 5, 16\], .* got \[1, 2, 4, 16\]"),
        ({"prefix_v": pk.double()}, "prefix_v must be"),
        ({"gate_k": gate[..., :4]}, r"gate_k must be \[2, 4, 3, 5\] or 1 for each, .* got \[2, 1, 3, 4\]"),
        ({"gate_v": gate[:, 0]}, "gate_v must be"),
        ({"log_bias": torch.ones(1, 2, 5)}, r"log_bias must be \[1, 4, 5\] or 1 for the first"),
        ({"gate_out": torch.ones(2, 4), "separate": True}, r"gate_out must be \[1, 4\]"),
        ({"index": index.long()}, r"index must be \[2\], contiguous, int32"),
        ({"lengths": index}, r"lengths must be \[1\], contiguous, int32, got \[2\]"),
        ({"offsets": index, "prefix_k": pk[0], "prefix_v": pk[0]}, r"offsets must be \[A \+ 1\], contiguous, int64"),
        ({"o": o.bfloat16()}, "o must be .* of q's dtype"),
        ({"lse": lse.double()}, r"lse must be \[2, 4, 3\], float32"),
        ({"p": 0.5}, r"seed must be \[\], int64, got None"),
    ]  # fmt: skip
    for changes, message in refused:
        with pytest.raises(ValueError, match=message):
            cuda.forward(**{**good, **changes})
    assert not o.any()
    if backend == "cuda@cuda":
        with pytest.raises(ValueError, match="prefix_k must be on the other tensors' device"):
            cuda.forward(**{**good, "prefix_k": pk.cpu()})
        with pytest.raises(ValueError, match="q must be on a CUDA device"):
            cuda.forward(**{**good, "q": q.cpu()})


# ---- tokens as a GPU would have them ---------------------------------------------------------------------------------


def flash(q, k, v, p, causal, scale):
    """As PyTorch's: grouped heads, causal to the last key, lse +∞ for a query that sees nothing"""
    o, lse = reference.tokens(q, k, v, causal, None, 0.0, None, scale)
    return o, lse.masked_fill(lse == -math.inf, math.inf), None, None, q.shape[2], k.shape[2], None, None, None


def flash_backward(do, q, k, v, o, lse, cum_q, cum_k, max_q, max_k, p, causal, seed, offset, scale):
    assert not (lse == -math.inf).any() and (max_q, max_k) == (q.shape[2], k.shape[2])
    return reference.grad_tokens(do, q, k, v, o, lse, causal, None, 0.0, None, scale, (True,) * 3)


def efficient(q, k, v, bias, wants_lse, p, causal, scale):
    """As PyTorch's: as many heads of k as of q, an aligned bias of all heads, lse padded; NaN for who sees nothing"""
    assert k.shape[1] == v.shape[1] == q.shape[1] and wants_lse and not causal
    if bias is not None:
        assert bias.shape == (*q.shape[:3], k.shape[2]) and bias.dtype == q.dtype and bias.stride(2) % 16 == 0
    o, lse = reference.tokens(q, k, v, False, bias, 0.0, None, scale)
    o = o.masked_fill((lse == -math.inf)[..., None], math.nan)
    return o, torch.nn.functional.pad(lse, (0, -q.shape[2] % 32), value=math.inf), None, None


def efficient_backward(do, q, k, v, bias, o, lse, seed, offset, p, needs, causal, scale):
    assert lse.shape[2] % 32 == 0 and not (lse == -math.inf).any() and len(needs) == 4
    lse = lse[..., : q.shape[2]]
    return *reference.grad_tokens(do, q, k, v, o, lse, False, bias, 0.0, None, scale, needs[:3]), None


@pytest.mark.parametrize("t, s", [(5, 9), (9, 9), (9, 5)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("mask", [None, "causal", "keys", "keys, causal", "boolean", "added"])
def test_tokens_by_what_a_gpu_has(monkeypatch, mask, dtype, mode, t, s):
    """PyTorch's kernels, as they are said to be, give what the contract asks for."""
    for name in ("flash", "flash_backward", "efficient", "efficient_backward"):
        monkeypatch.setattr(cuda, f"_{name}", globals()[name])
    monkeypatch.setattr(cuda, "_taken", lambda q, k, p: True)
    q, k, v = torch.randn(2, 4, t, 16).to(dtype), torch.randn(2, 2, s, 16).to(dtype), torch.randn(2, 2, s, 16).to(dtype)
    causal, masks = "causal" in (mask or ""), None
    if mask in ("keys", "keys, causal"):
        masks = torch.rand(2, s) > 0.4
        masks[1] = False
    elif mask in ("boolean", "added"):
        masks = torch.rand(2, 1, t, s) > 0.4
        masks[:, :, 1] = False
        masks = masks if mask == "boolean" else torch.randn(2, 1, t, s).masked_fill(~masks, -math.inf)
    call = causal, masks, 0.0, None, 0.25
    do = torch.randn_like(q)

    def results(of, q, k, v):
        o, lse = of.tokens(q, k, v, *call)
        merged = torch.logaddexp(lse, torch.zeros_like(lse)) if mode == "joint" else lse  # as after a prefix
        grads = of.grad_tokens(do.to(q.dtype), q, k, v, o, merged, *call, (True, True, True))
        return dict(zip(("o", "lse", "dq", "dk", "dv"), (o, lse, *grads)))

    found, low = results(cuda, q, k, v), results(reference, q, k, v)
    exact = results(reference, *(x.double() for x in (q, k, v)))
    o, lse = found["o"], found["lse"]
    blind = exact["lse"] == -math.inf
    assert torch.equal(lse == -math.inf, blind) and not o[blind].any()
    for name, true in exact.items():
        got, other = found[name], low[name]
        assert got.dtype == other.dtype
        if name == "lse":
            got, other, true = (x.masked_fill(blind, 0.0) for x in (got, other, true))
        assert_close(got, other, true, name, eps=EPS[dtype])
    assert cuda.grad_tokens(do, q, k, v, o, lse, *call, (False, True, False))[::2] == (None, None)


def test_pytorch_has_what_tokens_call(monkeypatch):
    """Arguments fit the schemas, and shapes are what is expected: on tensors without memory."""
    monkeypatch.setattr(cuda, "_taken", lambda q, k, p: True)
    for dtype, mask in ((torch.bfloat16, None), (torch.float32, None), (torch.bfloat16, (2, 9))):
        q, k, v = (torch.empty(2, h, n, 16, dtype=dtype, device="meta") for h, n in ((4, 5), (2, 9), (2, 9)))
        mask = None if mask is None else torch.empty(mask, dtype=torch.bool, device="meta")
        for causal in (False, True):
            o, lse = cuda.tokens(q, k, v, causal, mask, 0.0, None, 0.25)
            assert o.shape == q.shape and o.transpose(1, 2).is_contiguous()
            assert lse.shape == (2, 4, 5) and lse.dtype == torch.float32
            found = cuda.grad_tokens(o, q, k, v, o, lse, causal, mask, 0.0, None, 0.25, (True, True, True))
            assert [d.shape for d in found] == [q.shape, k.shape, v.shape]
