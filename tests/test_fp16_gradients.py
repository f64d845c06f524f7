"""fp16 and float32 adapters: the rank-R path keeps its range; dA and dB are as exact as PEFT's, which computes it in float32.

dy of 1e-6 to 1e-5 is what a loss gives without a scaler, B of 1e-4 what the first step of Adam does: scale·B, t and s·dy are
far below fp16's smallest number. Large activations go the other way: s beyond 65504, and y finite for B is small.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from _close import assert_close

import fastpeft as fp
from fastpeft.ops import lora_linear, lora_linear_group, quantize_4bit
from fastpeft.reference import lora_linear as reference

HALF = 2**-10  # fp16's unit, and TF32's
SIZES = {  # of x, A, B, dy
    "small": (1.0, 0.1, 1e-4, 5e-6),
    "large": (2e3, 40.0, 1e-6, 1e-2),
}


def problem(m, size, packed, k=72, sizes=((40, 6), (24, 17))):
    """-> x, weights, as, bs, dys of a group"""
    of_x, of_a, of_b, of_dy = SIZES[size]
    x = (torch.randn(m, k) * of_x).half().requires_grad_()
    dense = [(torch.randn(n, k) / k**0.5).half() for n, _ in sizes]
    weights = [quantize_4bit(w.cpu()).to(x.device) for w in dense] if packed else dense
    a = [(torch.randn(r, k) * of_a).requires_grad_() for _, r in sizes]
    b = [(torch.randn(n, r) * of_b).requires_grad_() for n, r in sizes]
    dys = [(torch.randn(m, n) * of_dy).half() for n, _ in sizes]
    return x, weights, a, b, dys


def stock(x, w, a, b, scale, p, seed, projection):
    """PEFT's default: the base in fp16, the LoRA part in float32 (float64 for float64)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    lora = F.linear(F.linear(reference.drop(x.to(wide), p, seed, projection), a.to(wide)), b.to(wide)) * scale
    return (F.linear(x, w) + lora).to(x.dtype)


def results(of, x, a, b, dys):
    leaves = [t.detach().requires_grad_() for t in (x, *a, *b)]
    n = len(a)
    ys = of(leaves[0], leaves[1 : n + 1], leaves[n + 1 :])
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, leaves, dys)]


def check(m, size, packed, p, eps, group=True, way=None):
    """eps: of the products with s and t"""
    x, weights, a, b, dys = problem(m, size, packed)
    count, scale, seed = (2 if group else 1), 0.5, torch.tensor(11)
    weights, a, b, dys = weights[:count], a[:count], b[:count], dys[:count]
    if size == "large":
        assert (x.detach().double() @ a[0].detach().double().t()).abs().max() > 2 * torch.finfo(torch.float16).max

    def ours(x, a, b):
        if way is not None:
            return [way(x, weights[0], a[0], b[0], scale, p, seed)]
        if not group:
            return [lora_linear(x, weights[0], a[0], b[0], scale=scale, dropout_p=p, seed=seed)]
        return lora_linear_group(x, weights, a, b, scales=[scale] * count, dropout_p=p, seed=seed)

    def composed(dtype, base, absolute=False):
        of = lambda t: t.detach().to(dtype).abs() if absolute else t.detach().to(dtype)  # noqa: E731
        ws = [of(w.dequantize(base) if packed else w) for w in weights]
        return results(
            lambda x, a, b: [stock(x, w, a[i], b[i], scale, p, seed, i) for i, w in enumerate(ws)],
            of(x), *([of(t) if dtype == torch.float64 else t for t in ts] for ts in (a, b)), [of(dy) for dy in dys],
        )  # fmt: skip

    got, low = results(ours, x, a, b, dys), composed(torch.float16, torch.float16)
    exact, terms = (composed(torch.float64, torch.float32, absolute) for absolute in (False, True))
    names = [*(["y"] * count), "dx", *(["dA"] * count), *(["dB"] * count)]
    for name, one, other, true, size_of in zip(names, got, low, exact, terms, strict=True):
        assert one.dtype == other.dtype
        of_half = one.dtype == torch.float16
        assert_close(one, other, true, name, eps=HALF if of_half else eps, terms=size_of)
        if not of_half:  # as a whole too: most elements are far below the largest
            off = (one - true).norm()
            assert off <= 2 * (other - true).norm() + 2 * eps * true.norm(), f"{name}: {off / true.norm():.2g}"


def eps_of(backend):
    """float32's where products are float32's, TF32's on tensor cores"""
    return HALF if "triton" in backend or backend.startswith("cuda") else 2**-23


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "4-bit"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("m", [3, 70])
def test_the_rank_r_path_keeps_its_range(backend, m, p, packed, size):
    check(m, size, packed, p, eps_of(backend))
    check(m, size, packed, p, eps_of(backend), group=False)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_definition_does_too(p, size):
    """A trained scale, in_scale and torch.func run it."""
    one = torch.ones(72)

    def scaled(x, w, a, b, scale, p, seed):
        return lora_linear(x, w, a, b, scale=scale, dropout_p=p, seed=seed, in_scale=one)

    check(20, size, False, p, 2**-23, group=False, way=scaled)


@pytest.mark.parametrize("size", SIZES)
def test_compiled_and_exported_it_does_too(size):
    def compiled(x, w, a, b, scale, p, seed):
        torch._dynamo.reset()
        of = torch.compile(lambda x, a, b: lora_linear(x, w, a, b, scale=scale), fullgraph=True, backend="aot_eager")
        return of(x, a, b)

    check(20, size, False, 0.0, 2**-23, group=False, way=compiled)


@pytest.mark.parametrize("adapter_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_adapters(backend, adapter_dtype):
    """scale·B does not vanish on its way either: B of 1e-6 is what fp16 holds, times a scale of 1/64 it does not."""
    x, (w, _), _, _, (dy, _) = problem(20, "small", False)
    a = (torch.randn(6, 72) * 0.1).to(adapter_dtype).requires_grad_()
    b = (torch.randn(40, 6) * 1e-6).to(adapter_dtype).requires_grad_()
    dy = dy * 2**14
    y = lora_linear(x, w, a, b, scale=1 / 64)
    (da,) = torch.autograd.grad(y, a, dy)
    t = dy.double() @ b.detach().double() / 64
    exact = t.t() @ x.detach().double()
    terms = (dy.double().abs() @ b.detach().double().abs() / 64).t() @ x.detach().double().abs()
    assert_close(
        da, exact.to(adapter_dtype), exact, eps=max(eps_of(backend), torch.finfo(adapter_dtype).eps), terms=terms
    )


@pytest.mark.parametrize("m", [3, 70])
def test_what_is_saved_is_the_same_in_every_backend(backend, m):
    """s in float32 where x is fp16, else in x's dtype."""
    for dtype, wide in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        x, (w, _), (a, _), (b, _), _ = problem(m, "small", False)
        x, kept = x.detach().to(dtype), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            lora_linear(x, w.to(dtype), a, b)
        assert [t.dtype for t in kept if t.shape == (m, a.shape[0])] == [wide]


def test_a_model_in_fp16_trains_without_a_scaler():
    """float32 adapters, no autocast, one of eight accumulation steps: as exact as PEFT's, and A moves as it does there."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128, max_position_embeddings=64,
    )  # fmt: skip
    lora = peft.LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    plain = peft.get_peft_model(transformers.LlamaForCausalLM(config).half(), lora)
    ids = torch.randint(128, (8, 64))
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-4)
    fast = copy.deepcopy(plain)
    assert {layer.path for layer in fp.apply(fast).layers} == {"fast"}

    def gradients(model):
        (model(input_ids=ids, labels=ids).loss / 8).backward()
        return {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}

    exact, stock, ours = (gradients(model) for model in (copy.deepcopy(plain).double(), plain, fast))
    for kind in ("lora_A", "lora_B"):

        def flat(of, kind=kind):
            return torch.cat([g.flatten() for n, g in of.items() if kind in n])

        true = flat(exact)
        off, other = ((flat(of) - true).norm() / true.norm() for of in (ours, stock))
        assert off <= 2 * other + 4 * HALF, f"{kind}: {off:.3g}, PEFT {other:.3g}"
        assert (flat(ours) == 0).sum() <= 2 * (flat(stock) == 0).sum()
