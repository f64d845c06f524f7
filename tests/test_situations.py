"""The op in the situations that a call can be in: plain, seen by somebody, transformed; with and without gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from _close import assert_close
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fastpeft as fp
from fastpeft.ops import linear4bit, lora_linear, lora_linear_group, quantize_4bit

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BASES = ["dense", "transposed", "4 bits"]


def layer(dtype, lead=(3, 4), k=40, ns=(24, 33), r=6, base="dense"):
    """x, weights, a, b of a group"""
    x = torch.randn(*lead, k).to(dtype)
    weights = [(torch.randn(n, k) / k**0.5).to(dtype) for n in ns]
    if base == "transposed":  # GPT-2's Conv1D stores it so
        weights = [w.t().contiguous().t() for w in weights]
    elif base == "4 bits":
        weights = [quantize_4bit(w) for w in weights]
    return x, weights, [torch.randn(r, k) / k**0.5 for _ in ns], [torch.randn(n, r) for n in ns]


# ---- the base's bits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("m", [1, 3, 20, 100, 200])
def test_the_base_is_the_same_with_and_without_an_adapter(backend, base, dtype, m):
    """At B = 0, with and without dropout and gradients, alone and in a group: policy and reference are one function."""
    x, weights, a, b = layer(dtype, (m,), base=base)
    zeros = [torch.zeros_like(b_i) for b_i in b]
    with torch.no_grad():
        alone = [lora_linear(x, w, None, None) for w in weights]
        if base == "4 bits":
            assert all(torch.equal(linear4bit(x, w), y) for w, y in zip(weights, alone))
    for p in (0.0, 0.3):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                trained = [b_i.clone().requires_grad_(grad) for b_i in zeros]
                single = [lora_linear(x, w, a_i, b_i, dropout_p=p) for w, a_i, b_i in zip(weights, a, trained)]
                group = lora_linear_group(x, weights, a, trained, scales=[1.0, 2.0], dropout_p=p)
            for y, one, other in zip(alone, single, group):
                assert torch.equal(y, one.detach()) and torch.equal(y, other.detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("m", [1, 3, 20, 100])
def test_gradients_do_not_change_the_output(backend, base, dtype, m):
    x, (w, _), (a, _), (b, _) = layer(dtype, (m,), base=base)
    with torch.no_grad():
        y = lora_linear(x, w, a, b, scale=0.5)
    assert torch.equal(lora_linear(x, w, a.requires_grad_(), b, scale=0.5).detach(), y)


# ---- what the caller may do ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (2, 2, 3), (60, 2)], ids=str)
@pytest.mark.parametrize("checkpointed", [None, True, False], ids=["", "reentrant", "not reentrant"])
def test_outputs_may_be_changed_in_place(backend, base, lead, checkpointed):
    x, weights, a, b = layer(torch.float32, lead, base=base)

    def results(change):
        inputs = [t.clone().requires_grad_() for t in (x, *a, *b)]

        def run(x, *adapters):
            ys = lora_linear_group(x, weights, adapters[:2], adapters[2:], scales=[1.0, 1.0])
            ys.append(lora_linear(x, weights[0], adapters[0], adapters[2]))
            return sum(change(y).sum() for y in ys)

        y = run(*inputs) if checkpointed is None else checkpoint(run, *inputs, use_reentrant=checkpointed)
        y.backward()
        return [t.grad for t in inputs]

    for changed, expected in zip(results(lambda y: y.mul_(2).clamp_(-1, 1)), results(lambda y: (y * 2).clamp(-1, 1))):
        assert torch.equal(changed, expected)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("m", [1, 100])
def test_a_weight_that_requires_grad_is_an_error_only_with_gradients(backend, guard, m):
    x, (w, _), (a, _), (b, _) = layer(torch.float32, (m,))
    expected = lora_linear(x, w, a, b)
    w.requires_grad_()
    with pytest.raises(ValueError, match=r"lora_linear: weight must be frozen \(weight.requires_grad_\(False\)\)"):
        lora_linear(x, w, a, b)
    with guard():
        assert torch.equal(lora_linear(x, w, a, b), expected)
        assert torch.equal(lora_linear_group(x, [w], [a], [b], scales=[1.0])[0], expected)


# ---- tensors whose memory is not their value -------------------------------------------------------------------------


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("m", [2, 70])
def test_lazily_negated_tensors(backend, which, m):
    """`torch._neg_view`, as the imaginary part of a conjugate has it; and a zero tensor, which has no memory."""
    x, (w, _), (a, _), (b, _) = layer(torch.float32, (m,))
    arguments = [x, w, a, b, torch.randn(24)]
    expected = list(arguments)
    expected[which] = -arguments[which]
    arguments[which] = torch._neg_view(arguments[which])
    zero = list(expected)
    zero[which] = torch.zeros_like(zero[which])
    lazy = list(expected)
    lazy[which] = torch._efficientzerotensor(zero[which].shape)

    def results(x, w, a, b, bias, dy):
        x, a, b = (t.detach().requires_grad_() for t in (x, a, b))
        y = lora_linear(x, w, a, b, bias=bias)
        return y, *torch.autograd.grad(y, [x, a, b], dy)

    dy = torch.randn(m, 24)
    for one, other in ((arguments, expected), (lazy, zero)):
        for got, right in zip(results(*one, dy), results(*other, dy)):
            assert torch.equal(got, right)
        with torch.no_grad():
            assert torch.equal(lora_linear(*one[:4], bias=one[4]), lora_linear(*other[:4], bias=other[4]))
    for got, right in zip(results(*expected, torch._neg_view(dy)), results(*expected, -dy)):
        assert torch.equal(got, right)


def test_tensors_on_no_device_or_another():
    x, (w, _), (a, _), (b, _) = layer(torch.float32, (4,))
    on_meta = lora_linear(*(t.to("meta") for t in (x, w, a, b)))
    assert on_meta.is_meta and on_meta.shape == (4, 24)
    with pytest.raises(ValueError, match=r"a must be on x's device \(cpu\), got meta"):
        lora_linear(x, w, a.to("meta"), b)
    with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
        fake = lora_linear(*map(mode.from_tensor, (x, w, a, b)))
    assert fake.shape == (4, 24)


# ---- who looks -------------------------------------------------------------------------------------------------------


def test_function_transforms_run_the_definition():
    x, (w, _), (a, _), (b, _) = layer(torch.float32, (5,))
    many = torch.stack([a, 2 * a, -a])
    got = torch.func.vmap(lambda a: lora_linear(x, w, a, b))(many)
    assert_close(got, torch.stack([lora_linear(x, w, a_i, b) for a_i in many]), _exact(x, w, many, b))
    jacobian = torch.func.jacrev(lambda b: lora_linear(x, w, a, b).sum(0))(b)
    assert jacobian.shape == (24, *b.shape)
    with fp.backend("cpu"), pytest.raises(RuntimeError, match="'cpu' was forced, but .* torch.func's transforms"):
        torch.func.grad(lambda a: lora_linear(x, w, a, b).sum())(a)


def _exact(x, w, many, b):
    x, w, many, b = (t.double() for t in (x, w, many, b))
    return torch.stack([x @ w.t() + x @ a.t() @ b.t() for a in many])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("m", [3, 100])
def test_selective_checkpointing_saves_the_base(backend, base, m):
    """A policy that saves aten.mm saves the base's product; outputs and gradients are those without checkpointing."""
    x, weights, a, b = layer(torch.float32, (m,), base=base)
    saved = []

    def policy(context, op, *args, **kwargs):
        is_mm = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        if is_mm:
            saved.append(context.is_recompute)
        return CheckpointPolicy.MUST_SAVE if is_mm else CheckpointPolicy.PREFER_RECOMPUTE

    def run(x, *adapters):
        ys = lora_linear_group(x, weights, adapters[:2], adapters[2:], scales=[1.0, 0.5])
        return torch.cat([y.mul_(2) for y in ys], 1)

    dy = torch.randn(m, 57)

    def results(call):
        inputs = [t.clone().requires_grad_() for t in (x, *a, *b)]
        y = call(run, *inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, dy)]

    contexts = partial(create_selective_checkpoint_contexts, policy)
    got = results(partial(checkpoint, use_reentrant=False, context_fn=contexts))
    dense = [w.dequantize(torch.float32) if base == "4 bits" else w for w in weights]

    def composed(cast):
        leaves = [cast(t).requires_grad_() for t in (x, *a, *b)]
        ys = [
            leaves[0] @ cast(w).t() + scale * (leaves[0] @ a_i.t() @ b_i.t())
            for w, a_i, b_i, scale in zip(dense, leaves[1:3], leaves[3:], (1.0, 0.5))
        ]
        y = torch.cat([2 * y_i for y_i in ys], 1)
        return [y.detach(), *torch.autograd.grad(y, leaves, cast(dy))]

    low, exact, terms = (composed(cast) for cast in (torch.clone, torch.Tensor.double, lambda t: t.double().abs()))
    plain = results(lambda run, *inputs: run(*inputs))
    for found in (got, plain):
        for one, same_dtype, true, sizes in zip(found, low, exact, terms, strict=True):
            assert_close(one, same_dtype, true, terms=sizes)
    assert saved.count(False) == 2
