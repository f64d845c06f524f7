"""lora_linear as PyTorch sees it: the table of backends, the registered ops, and autograd around them.

Everything is a group of projections that read one x; a single layer is a group of one. Lists hold an entry per projection.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from ..reference import lora_linear as reference
from ..weight4bit import join, split
from . import lora_linear_cpu, lora_linear_gpu
from ._backend import Backend, choose, forced
from ._library import define, plain_call


def apply(x, tensors, dropout_p, seed, plain):
    """-> [y_i [..., N_i]]. tensors: weights, biases, a, b, scales, lora_biases; plain: see `_library.plain_call`.

    A 4-bit weight goes as its bytes among the weights, its scales in `quants` and the rest as ints in `forms`.
    """
    weights, quants, forms = split(tensors[0])
    tensors = weights, *tensors[1:]
    if torch.is_grad_enabled() and (
        x.requires_grad or any(t is not None and t.requires_grad for ts in tensors for t in ts)
    ):
        flat = [t for ts in (*tensors, quants) for t in ts]
        if plain:
            return _PlainLoraLinear.apply(forms, dropout_p, forced(), x, seed, *flat)
        return _LoraLinear.apply(forms, dropout_p, forced(), x, seed, *flat)[:-1]
    forward = _forward if plain else _forward_op
    return forward(x, *tensors, quants, forms, dropout_p, seed, forced())[0]


def _gpu(can, passes):
    return Backend(can, partial(lora_linear_gpu.forward, passes), partial(lora_linear_gpu.backward, passes))


BACKENDS = {
    "cpu": Backend(can=lora_linear_cpu.can, forward=lora_linear_cpu.forward, backward=lora_linear_cpu.backward),
    "cuda": _gpu(lora_linear_gpu.can_cuda, lora_linear_gpu.cuda_passes),
    "triton": _gpu(lora_linear_gpu.can_triton, lora_linear_gpu.triton_passes),
    "torch": Backend(can=lambda meta: None, forward=reference.forward, backward=reference.backward),
}


def _forward(x, weights, biases, a, b, scales, lora_biases, quants, forms, dropout_p, seed, backend):
    weights = join(weights, quants, forms)
    return choose("lora_linear", BACKENDS, (x, a, b, weights), backend).forward(
        x, weights, biases, a, b, scales, lora_biases, dropout_p, seed
    )


def _forward_fake(x, weights, biases, a, b, scales, lora_biases, quants, forms, dropout_p, seed, backend):
    ys = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in join(weights, quants, forms)]
    return ys, x.new_empty(math.prod(x.shape[:-1]), sum(t.shape[0] for t in a if t is not None))


_forward_op = define(
    "lora_linear(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor?[] a, Tensor?[] b, Tensor?[] scales, "
    "Tensor?[] lora_biases, Tensor?[] quants, int[] forms, float dropout_p, Tensor? seed, str backend) "
    "-> (Tensor[] ys, Tensor s)",
    _forward,
    _forward_fake,
)


def _backward(dys, x, s, weights, a, b, scales, quants, forms, dropout_p, seed, needs, backend):
    """Gradients of those of (x, a…, b…, bias…) whose flag in `needs` is set, in that order. x may be None if no a is."""
    n, weights = len(weights), join(weights, quants, forms)
    needs_a, needs_b, needs_bias = needs[1 : 1 + n], needs[1 + n : 1 + 2 * n], needs[1 + 2 * n :]
    dx, das, dbs, dbiases = choose("lora_linear", BACKENDS, (s, a, b, weights), backend).backward(
        dys, x, s, weights, a, b, scales, dropout_p, seed, needs[0], needs_a, needs_b, needs_bias
    )
    return [grad for grad, needed in zip((dx, *das, *dbs, *dbiases), needs) if needed]


def _backward_fake(dys, x, s, weights, a, b, scales, quants, forms, dropout_p, seed, needs, backend):
    weights = join(weights, quants, forms)
    wide = torch.promote_types(s.dtype, torch.float32)
    rows = next(dy.shape[:-1] for dy in dys if dy is not None)
    shapes = [s.new_empty(*rows, weights[0].shape[1])]
    shapes += [None if t is None else t.new_empty(t.shape) for t in (*a, *b)]
    shapes += [s.new_empty(weight.shape[0], dtype=wide) for weight in weights]
    return [t for t, needed in zip(shapes, needs) if needed]


_backward_op = define(
    "lora_linear_backward(Tensor?[] dys, Tensor? x, Tensor s, Tensor[] weights, Tensor?[] a, Tensor?[] b, Tensor?[] scales, "
    "Tensor?[] quants, int[] forms, float dropout_p, Tensor? seed, bool[] needs, str backend) -> Tensor[]",
    _backward,
    _backward_fake,
)


FIRST = 5  # of the Functions' arguments, how many stand before the flat list; x is two before


class _LoraLinear(torch.autograd.Function):
    """apply(forms, dropout_p, backend, x, seed, *weights, *biases, *a, *b, *scales, *lora_biases, *quants) -> (*ys, s)"""

    @staticmethod
    def forward(forms, dropout_p, backend, x, seed, *flat):
        forward = _forward if plain_call(x) else _forward_op
        ys, s = forward(x, *_by_kind(flat, forms), forms, dropout_p, seed, backend)
        return (*ys, s)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[-1])
        save(ctx, output[-1], *inputs)

    @staticmethod
    def backward(ctx, *grads):
        return gradients(ctx, ctx.saved_tensors, grads)


class _PlainLoraLinear(torch.autograd.Function):
    """The same for plain calls, -> ys. Without a setup_context: where there is one, `apply` binds its arguments by
    inspect.signature in every call, and s must be an output (60 of 93 µs, with the rest written out)."""

    @staticmethod
    def forward(ctx, forms, dropout_p, backend, x, seed, *flat):
        ys, s = _forward(x, *_by_kind(flat, forms), forms, dropout_p, seed, backend)
        save(ctx, s, forms, dropout_p, backend, x, seed, *flat)
        return tuple(ys)

    backward = _LoraLinear.backward


def _by_kind(flat, forms):
    """[*weights, *biases, ..., *lora_biases, *quants] -> [weights, biases, ..., lora_biases, quants]"""
    n = count(flat, forms)
    return [list(flat[i : i + n]) for i in range(0, 6 * n, n)] + [list(flat[6 * n :])]


def count(flat, forms):
    """How many projections: of the six kinds each has one, of quants three where there are forms."""
    return len(flat) // (9 if forms else 6)


def save(ctx, s, forms, dropout_p, backend, x, seed, *flat):
    n = count(flat, forms)
    ctx.set_materialize_grads(False)
    ctx.forms, ctx.dropout_p, ctx.backend, ctx.n = forms, dropout_p, backend, n
    trains_a = any(ctx.needs_input_grad[FIRST + 2 * n : FIRST + 3 * n])  # else x is not read again (LoRA-FA, BitFit)
    ctx.save_for_backward(x if trains_a else None, s, seed, *flat[:n], *flat[2 * n : 5 * n], *flat[6 * n :])


def gradients(ctx, saved, grads):
    """What backward returns. saved: the saved tensors (checkpointing lets them be unpacked once only)."""
    if not torch.is_grad_enabled():
        return _gradients(ctx, saved, grads)
    with torch.no_grad():
        out = _gradients(ctx, saved, grads)
    if not torch.compiler.is_compiling():  # create_graph=True
        sources = [t for t in (*saved, *grads) if t is not None and t.requires_grad]
        out = tuple(None if g is None else _NoSecondDerivative.apply(g, *sources) for g in out)
    return out


def _gradients(ctx, saved, grads):
    n, dys = ctx.n, list(grads[: ctx.n])
    x, s, seed, *flat = saved
    weights, a, b, scales = (flat[i : i + n] for i in range(0, 4 * n, n))
    wants_x = ctx.needs_input_grad[FIRST - 2]
    _, wants_bias, wants_a, wants_b, _, wants_lora_bias, _ = _by_kind(ctx.needs_input_grad[FIRST:], ctx.forms)
    live = [dy is not None for dy in dys]
    needs = [wants_x and any(live)]
    needs += [want and here for want, here in zip(wants_a + wants_b, live + live)]
    needs += [(one or two) and here for one, two, here in zip(wants_bias, wants_lora_bias, live)]
    found = iter(())
    if any(needs):
        backward = _backward if plain_call(s) else _backward_op
        quants = flat[4 * n :]
        found = iter(
            backward(dys, x, s, weights, a, b, scales, quants, ctx.forms, ctx.dropout_p, seed, needs, ctx.backend)
        )
    dx, *rest = [next(found) if needed else None for needed in needs]
    none, dbiases = [None] * n, rest[2 * n :]
    dbias = [g if want else None for g, want in zip(dbiases, wants_bias)]
    dlora_bias = [g if want else None for g, want in zip(dbiases, wants_lora_bias)]
    return (None, None, None, dx, None, *none, *dbias, *rest[: 2 * n], *none, *dlora_bias, *[None] * len(flat[4 * n :]))


class _NoSecondDerivative(torch.autograd.Function):
    """apply(grad, *sources) -> grad, which says so when it is differentiated."""

    @staticmethod
    def forward(grad, *sources):
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(
            "lora_linear has no second derivative; for one (a gradient penalty, say) compute the layer with plain PyTorch: "
            "fastpeft.reference.lora_linear"
        )
