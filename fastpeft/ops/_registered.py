"""The base of a layer and the passes of lora_linear as PyTorch sees them: registered ops, with their fakes and FLOPs.

`Seen` and `Compiled` are sets of passes with the signatures of a backend's; each op picks its backend when it runs.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..backends.choice import choose, forced
from ..backends.cpu import lora_linear as cpu
from ..backends.cuda import lora_linear as cuda
from ..backends.gemm import gemms
from ..backends.triton import lora_linear as triton
from ..reference import lora_linear as reference
from ..weight4bit import join, split
from ._op import define

BACKENDS = {"cpu": cpu, "cuda": cuda, "triton": triton, "torch": reference}


def passes_for(x, a, b, backend):
    return choose("lora_linear", BACKENDS, (x, a, b), backend)


def why_torch(weight, a, b, dtype: torch.dtype | None = None) -> str | None:
    """Why this layer runs by PyTorch's own functions (the `torch` backend), or None. a, b: of adapters that run as one."""
    x = torch.empty(1, 0, dtype=dtype or weight.dtype, device=weight.device)
    meta: Any = (x, (), ())
    if a:
        r = sum(a_i.shape[0] for a_i in a)
        meta = x, [a[0].new_empty(r, 0)], [b[0].new_empty(0, r)]
    if choose("lora_linear", BACKENDS, meta, forced()) is not reference:
        return None
    if forced():
        return "backend 'torch' is forced"
    why = [reason for backend in BACKENDS.values() if (reason := backend.can(meta)) and "tensors are on" not in reason]
    return why[0] if why else f"no kernels for {x.device}"


def _of_x(tensors, ranks):
    """One that has x's dtype, which says what a backend can; s and t may be wider, and do where there is no other."""
    return next((t for t in tensors if t is not None), ranks)


# ---- the passes of lora_linear: s = drop(x) Aᵀ; y += s (scale·B)ᵀ; t, dB, dbias; dx += t A, dA -----------------------


def _down(x, a, p, seed, backend):
    return passes_for(x, a, a, backend).down(x, a, p, seed)


def _down_fake(x, a, p, seed, backend):
    ranks = sum(t.shape[0] for t in a if t is not None)
    return x.new_empty(x.shape[0], ranks, dtype=reference.ranks_dtype(x.dtype))


down = define(
    "lora_linear_down(Tensor x, Tensor?[] a, float p, Tensor? seed, str backend) -> Tensor",
    _down,
    _down_fake,
    lambda x, a, *rest, out_shape: 2 * math.prod(x) * sum(t[0] for t in a if t is not None),
)


def _up_(ys, s, b, scales, lora_biases, backend):
    passes_for(_of_x(ys, s), b, b, backend).up(ys, s, b, scales, lora_biases)


def _up(ys, s, b, scales, lora_biases, backend):
    return passes_for(_of_x(ys, s), b, b, backend).up([y.clone() for y in ys], s, b, scales, lora_biases)


def _rank_flops(wide, b, times):
    """Of `times` products of [M, N_i] with [N_i, R_i]"""
    return sum(2 * times * math.prod(y) * b_i[1] for y, b_i in zip(wide, b) if y is not None and b_i is not None)


_UP = "Tensor s, Tensor?[] b, Tensor?[] scales, Tensor?[] lora_biases, str backend"
up = define(
    f"lora_linear_up(Tensor[] ys, {_UP}) -> Tensor[]",
    _up,
    lambda ys, *rest: [torch.empty_like(y) for y in ys],
    lambda ys, s, b, *rest, out_shape: _rank_flops(ys, b, 1),
)
up_ = define(
    f"lora_linear_up_(Tensor(a!)[] ys, {_UP}) -> ()",
    _up_,
    lambda *arguments: None,
    lambda ys, s, b, *rest, out_shape: _rank_flops(ys, b, 1),
)


def _grad_up(dys, s, b, scales, wants_t, needs_b, needs_bias, backend):
    """Those of t, dB…, dbias… that are wanted, in that order."""
    passes = passes_for(_of_x(dys, s), b, b, backend)
    t, dbs, dbiases = passes.grad_up(dys, s, b, scales, wants_t, needs_b, needs_bias)
    return [found for found in (t, *dbs, *dbiases) if found is not None]


def _grad_up_fake(dys, s, b, scales, wants_t, needs_b, needs_bias, backend):
    wide, found = torch.promote_types(s.dtype, torch.float32), [s.new_empty(s.shape)] if wants_t else []
    found += [b_i.new_empty(b_i.shape) for b_i, dy, needs in zip(b, dys, needs_b) if _there(needs, dy, b_i)]
    return found + [dy.new_empty(dy.shape[1], dtype=wide) for dy, needs in zip(dys, needs_bias) if _there(needs, dy)]


def _there(needs, *tensors):
    return needs and all(t is not None for t in tensors)


grad_up = define(
    "lora_linear_grad_up(Tensor?[] dys, Tensor s, Tensor?[] b, Tensor?[] scales, bool wants_t, bool[] needs_b, "
    "bool[] needs_bias, str backend) -> Tensor[]",
    _grad_up,
    _grad_up_fake,
    lambda dys, s, b, scales, wants_t, needs_b, *rest, out_shape: _rank_flops(dys, b, int(wants_t) + any(needs_b)),
)


def _grad_down(dx, x, t, a, live, needs_a, p, seed, backend):
    """A new dx, if there is one, and the dA… that are wanted."""
    dx = None if dx is None else dx.clone()
    dx, das = passes_for(_of_x((dx, x), t), a, a, backend).grad_down(dx, x, t, a, live, needs_a, p, seed)
    return [found for found in (dx, *das) if found is not None]


def _grad_down_fake(dx, x, t, a, live, needs_a, p, seed, backend):
    found = [] if dx is None else [torch.empty_like(dx)]
    return found + [
        a_i.new_empty(a_i.shape) for a_i, here, needs in zip(a, live, needs_a) if _there(here and needs, a_i)
    ]


def _grad_down_flops(dx, x, t, a, live, needs_a, *rest, out_shape):
    times = (dx is not None) + any(needs_a)
    return sum(2 * times * t[0] * math.prod(a_i) for a_i, here in zip(a, live) if a_i is not None and here)


grad_down = define(
    "lora_linear_grad_down(Tensor? dx, Tensor? x, Tensor t, Tensor?[] a, bool[] live, bool[] needs_a, float p, "
    "Tensor? seed, str backend) -> Tensor[]",
    _grad_down,
    _grad_down_fake,
    _grad_down_flops,
)


# ---- a 4-bit base: its tensors and ints go one by one ----------------------------------------------------------------

_WEIGHT = "Tensor data, Tensor scales, Tensor? nested_absmax, Tensor? offset, int[] form"


def _weight(data, scales, nested_absmax, offset, form):
    return join([data], [scales, nested_absmax, offset], form)[0]


def _flat(weight):
    (data,), quants, form = split([weight])
    return (data, *quants, form)


decode = define(
    f"linear4bit_dequantize({_WEIGHT}, ScalarType dtype) -> Tensor",
    lambda *weight_and_dtype: _weight(*weight_and_dtype[:5]).dequantize(weight_and_dtype[5]),
    lambda data, scales, nested_absmax, offset, form, dtype: data.new_empty(form[:2], dtype=dtype),
)


def _project(x, *rest):
    *weight, bias, backend = rest
    return passes_for(x, (), (), backend).project_4bit(x, [_weight(*weight)], [bias])[0]


def _combine(dy, *rest):
    *weight, backend = rest
    return passes_for(dy, (), (), backend).combine_4bit([dy], [_weight(*weight)])


def _gemm_flops(x, *rest, out_shape):
    return 2 * math.prod(x) * out_shape[1]


project = define(
    f"linear4bit_project(Tensor x, {_WEIGHT}, Tensor? bias, str backend) -> Tensor",
    _project,
    lambda x, data, scales, nested_absmax, offset, form, bias, backend: x.new_empty(x.shape[0], form[0]),
    _gemm_flops,
)
combine = define(
    f"linear4bit_combine(Tensor dy, {_WEIGHT}, str backend) -> Tensor",
    _combine,
    lambda dy, data, scales, nested_absmax, offset, form, backend: dy.new_empty(dy.shape[0], form[1]),
    _gemm_flops,
)


# ---- as passes -------------------------------------------------------------------------------------------------------


class Seen:
    """What a dispatch mode sees: functional passes, and `aten.mm` or `addmm` for the base (4 bits are decoded before it)."""

    fused = fused_dx = staticmethod(lambda *arguments: None)
    project_dense = staticmethod(gemms)

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def down(self, x, a, p, seed):
        return down(x, a, p, seed, self.backend)

    def up(self, ys, s, b, scales, lora_biases):
        return up(ys, s, b, scales, lora_biases, self.backend)

    def grad_up(self, dys, s, b, scales, wants_t, needs_b, needs_bias):
        found = iter(grad_up(dys, s, b, scales, wants_t, needs_b, needs_bias, self.backend))
        t = next(found) if wants_t else None
        dbs = [next(found) if _there(needs, dy, b_i) else None for dy, b_i, needs in zip(dys, b, needs_b)]
        return t, dbs, [next(found) if _there(needs, dy) else None for dy, needs in zip(dys, needs_bias)]

    def grad_down(self, dx, x, t, a, live, needs_a, p, seed):
        found = iter(grad_down(dx, x, t, a, live, needs_a, p, seed, self.backend))
        dx = None if dx is None else next(found)
        return dx, [next(found) if _there(here and needs, a_i) else None for a_i, here, needs in zip(a, live, needs_a)]

    def combine_dense(self, dys, ws):
        dx = torch.mm(dys[0], ws[0])
        for dy, w in zip(dys[1:], ws[1:]):
            dx = torch.addmm(dx, dy, w)
        return dx

    def project_4bit(self, x, ws, biases):
        return gemms(x, [decode(*_flat(w), x.dtype) for w in ws], biases)

    def combine_4bit(self, dys, ws):
        return self.combine_dense(dys, [decode(*_flat(w), dy.dtype) for dy, w in zip(dys, ws)])


class Compiled(Seen):
    """What a compiler sees: y is added to in place, and a 4-bit base is one op that picks its way when it runs."""

    def up(self, ys, s, b, scales, lora_biases):
        up_(ys, s, b, scales, lora_biases, self.backend)
        return ys

    def project_4bit(self, x, ws, biases):
        return [project(x, *_flat(w), bias, self.backend) for w, bias in zip(ws, biases)]

    def combine_4bit(self, dys, ws):
        parts = [combine(dy, *_flat(w), self.backend) for dy, w in zip(dys, ws)]
        return parts[0] if len(parts) == 1 else sum(parts[1:], parts[0])


class Named:
    """A backend's passes as a profiler shows them, by the names of the registered ones. (`fused` also where it has no way.)"""

    def __init__(self, passes, op: str = "lora_linear") -> None:
        self.passes, self.op = passes, op

    def __getattr__(self, name: str):
        found = getattr(self.passes, name)

        def named(*arguments):
            with torch.profiler.record_function(f"fastpeft::{self.op}_{name}"):
                return found(*arguments)

        return named
