"""lora_linear: a frozen linear layer with a LoRA term, and lora_linear_group: several of them that read one x.

    y = out_scale · ((x·in_scale) Wᵀ + scale·(drop(x) Aᵀ) Bᵀ + lora_bias) + bias

Top-down: the public functions; the way to the passes; `forward` and `backward` over those of any backend
(`backends/<device>/lora_linear.py`, `reference/lora_linear.py`, or registered: `_registered.py`); one autograd.Function.
Everything is a group of projections that read one x; a single layer is a group of one. Lists have an entry a projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._C._autograd import _profiler_enabled
from torch.compiler import is_compiling

from .. import native
from ..backends import base, gemm
from ..backends.choice import allows, choose, forced
from ..backends.cpu import lora_linear as cpu
from ..reference import lora_linear as reference
from ..weight4bit import Weight4bit, join, split
from . import _arguments, _check
from ._op import once_differentiable, plain_call, transformed
from ._registered import BACKENDS, Compiled, Named, Seen

Weights = Sequence[torch.Tensor | Weight4bit]
Optionals = Sequence[torch.Tensor | None]

_module = native.cpu()
plain = _module.lora_linear_plain if _module else lambda *call: None  # a plain inference call of few rows, or None
_begin = _module.lora_linear_begin if _module else lambda *call: (-1, None)  # looks at all arguments at once, see there


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor | Weight4bit,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    *,
    scale: float | torch.Tensor = 1.0,
    bias: torch.Tensor | None = None,
    lora_bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    in_scale: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """A frozen linear layer plus a low-rank update (LoRA: Hu et al. 2021, equation 3), forward and backward fused.

    Args:
        x: [..., K], float32, bfloat16 or float16 (float64 runs on the torch backend); any strides.
        weight: [N, K], frozen, x's dtype (under autocast any), any strides; or an fp.Weight4bit (QLoRA), which is
            computed with in x's dtype.
        a, b: [R, K] and [N, R], any floating dtype: fp32 masters under bf16 compute are rounded inside the kernel and
            get fp32 gradients. Both None: the base alone.
        scale: a number, or a tensor [] or [R] (several adapters stacked along R are one call).
        bias, lora_bias: [N]; `lora_bias` enters unscaled (for PEFT pass scaling·bias).
        dropout_p: probability in [0, 1] that an element of x is dropped before `a`; the others are scaled by 1/(1-p).
        seed: int, or int64 tensor [], that fixes the mask (Philox4x32-10); None draws one from PyTorch's generator.
        in_scale, out_scale: [K], [N]: (IA)³ and DoRA. They, a `scale` that requires grad, and torch.func's transforms run
            the torch definition.

    Returns:
        y [..., N], contiguous, x's dtype, which may be changed in place. Gradients flow to x, a, b, bias and lora_bias
        (and the scales).

    Raises:
        TypeError, ValueError: an argument of the wrong type, rank, shape, dtype or device; where gradients are on, a weight
            that requires grad.
        RuntimeError: a forced backend cannot run this call (the message says why).
    """
    if dropout_p == 0.0 and in_scale is None and out_scale is None and not is_compiling() and allows("cpu"):
        y = plain(x, weight, a, b, scale, bias, lora_bias)
        if y is not None:
            return y
    lists = (weight,), (bias,), (a,), (b,), (scale,), (lora_bias,)
    return run("lora_linear", x, lists, dropout_p, seed, in_scale, out_scale)[0]


def lora_linear_group(
    x: torch.Tensor,
    weights: Weights,
    a: Optionals,
    b: Optionals,
    *,
    scales: Sequence[float | torch.Tensor],
    biases: Optionals | None = None,
    lora_biases: Optionals | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Several `lora_linear` of one x (q/k/v, gate/up): x is read once for all A's and saved once for backward.

    Args:
        x: [..., K]. weights: each [N_i, K]. a, b: each [R_i, K], [N_i, R_i], or None where a projection has no adapter.
        scales: one a projection (see `lora_linear`). biases, lora_biases: each [N_i] or None.
        dropout_p, seed: as in `lora_linear`; projection i has its own mask.

    Returns:
        a list of y_i [..., N_i].

    Raises:
        as `lora_linear`; ValueError where the sequences differ in length or are empty.
    """
    n = len(weights)
    none = (None,) * n
    lists = weights, biases or none, a, b, scales, lora_biases or none
    for name, given in zip(("a", "biases", "a", "b", "scales", "lora_biases"), lists):
        if len(given) != n or n == 0:
            expected = f"as long as weights, at least one (weights has {n})"
            _check.bad_value("lora_linear_group", name, expected, len(given))
    return list(run("lora_linear_group", x, tuple(map(tuple, lists)), dropout_p, seed))


# ---- from the public call to forward ---------------------------------------------------------------------------------


def run(op: str, x, lists, p, seed, in_scale=None, out_scale=None) -> Sequence[torch.Tensor]:
    """-> [y_i]. lists: weights, biases, a, b, scales, lora_biases, tuples."""
    passes: Any
    flags, found = -1, None  # found: ys and s, where the CPU had them in the call that looked at the arguments
    on_cpu = allows("cpu")
    if 0.0 <= p < 1.0 and in_scale is None and out_scale is None and not is_compiling():
        flags, found = _begin(on_cpu and p == 0.0, x, *lists)
    if flags >= 0 and on_cpu and x.is_cpu:
        plain, passes = True, cpu
    else:
        if flags < 0:
            x, lists = _arguments.autocast(x, lists)
            _check.call(op, x, lists, p)
            special = in_scale is not None or out_scale is not None or p == 1.0
            if special or _arguments.any_trained(lists[4]) or transformed():
                return _by_definition(op, x, lists, p, seed, in_scale, out_scale)
            x, lists = _arguments.as_passes_read(x, lists)
            flags = _flags(x, lists)
        lists = _arguments.with_tensor_scales(x, lists)
        plain = plain_call(x) and not x.is_meta
        passes = choose("lora_linear", BACKENDS, (x, *lists[2:4]), forced()) if plain else forced()
        if plain and _profiler_enabled():
            passes = Named(passes)
    seed = _check.seed_tensor(op, seed, x.device) if p else None
    if not flags & NEEDS_GRAD:
        return (found or forward(_passes(passes), x, *lists, p, seed))[0]
    call = passes, lists, p, seed, found, flags
    apply = _apply if plain else LoraLinear.apply
    return apply(call, x, *lists[1], *lists[2], *lists[3], *lists[5])


# flags of a call, as `lora_linear_begin` in csrc/python/lora_linear.cpp gives them
NEEDS_GRAD, TRAINS_A, PACKED = 1, 2, 4


def _flags(x, lists) -> int:
    weights, biases, a, b, _, lora_biases = lists
    wants = [any([t is not None and t.requires_grad for t in ts]) for ts in ((x,), biases, b, lora_biases, a)]
    if not torch.is_grad_enabled() or not any(wants):
        return PACKED
    return NEEDS_GRAD | PACKED | (TRAINS_A if wants[-1] else 0)


def _passes(of: Any) -> Any:
    """A plain call has a backend's passes already; else `of` is the name of the forced backend, or ""."""
    if isinstance(of, str):
        return Compiled(of) if is_compiling() else Seen(of)
    return of


def _by_definition(op: str, x, lists, p, seed, in_scale, out_scale) -> list[torch.Tensor]:
    """What only the definition under autograd does: (IA)³ scales, a trained `scale`, dropout of everything, torch.func."""
    if not allows("torch"):
        raise RuntimeError(
            f"{op}: backend {forced()!r} was forced, but a scale that requires grad, dropout_p = 1, in_scale and out_scale, "
            "and torch.func's transforms run only on the torch backend"
        )
    _check.vector(op, "in_scale", in_scale, x.shape[-1], "K", x)
    _check.vector(op, "out_scale", out_scale, lists[0][0].shape[0], "N", x)
    seed = _check.seed_tensor(op, seed, x.device) if p else None
    return [
        reference.lora_linear(
            x, base.dense(weight, x.dtype), a, b, scale=scale, bias=bias, lora_bias=lora_bias, dropout_p=p, seed=seed,
            in_scale=in_scale, out_scale=out_scale, projection=i,
        )
        for i, (weight, bias, a, b, scale, lora_bias) in enumerate(zip(*lists))
    ]  # fmt: skip


# ---- forward and backward over the passes of any backend -------------------------------------------------------------


def forward(passes, x, weights, biases, a, b, scales, lora_biases, p, seed):
    """-> [y_i [..., N_i]], s [M, ΣR]: the rank-R activations that backward reads."""
    found = passes.fused(x, weights, biases, a, b, scales, lora_biases, p, seed)
    if found is not None:
        return found
    rows = gemm.rows(x)
    s = passes.down(rows, a, p, seed)
    ys = passes.up(base.project(passes, rows, weights, biases), s, b, scales, lora_biases)
    return [gemm.shaped(y, x) for y in ys], s


def backward(passes, dys, x, s, weights, a, b, scales, p, seed, needs_x, needs_a, needs_b, needs_bias):
    """-> dx, [dA_i], [dB_i], [dbias_i], None where not needed. x may be None if no A needs a gradient; dy_i may be None.

    t = dy (scale·B);  dB = scale·dyᵀ s;  dbias = Σ_m dy;  dx = dy W + drop'(t A);  dA = tᵀ drop(x)
    """
    live = [dy is not None for dy in dys]
    shape = next(dy.shape[:-1] for dy in dys if dy is not None)
    dys = [None if dy is None else gemm.rows(dy) for dy in dys]
    wants_t = s.shape[1] > 0 and (needs_x or any(needs_a))
    t, dbs, dbiases = passes.grad_up(dys, s, b, scales, wants_t, needs_b, needs_bias)
    das, dx, whole = [None] * len(a), None, None  # whole: dx with its rank-R term, where the base GEMM takes that
    if needs_x:
        whole = passes.fused_dx(dys, weights, t, a, live, p, seed)
        if whole is None:
            dx = base.combine(passes, *zip(*((dy, w) for dy, w in zip(dys, weights) if dy is not None)))
    if wants_t:
        rows = gemm.rows(x) if any(needs_a) else None
        dx, das = passes.grad_down(dx, rows, t, a, live, needs_a, p, seed)
    dx = dx if whole is None else whole
    if dx is not None and len(shape) != 1:
        dx = dx.view(*shape, dx.shape[1])
    return dx, das, dbs, dbiases


# ---- autograd --------------------------------------------------------------------------------------------------------


class LoraLinear(torch.autograd.Function):
    """apply(call, x, *biases, *a, *b, *lora_biases) -> ys;  call: passes (see `_passes`), the lists of `forward`, p, seed, what
    forward gives where that is known already, flags. Autograd looks into no list: what may need a gradient stands outside."""

    @staticmethod
    def forward(ctx, call, x, *flat):
        passes, lists, p, seed, found, flags = call
        ys, s = found or forward(_passes(passes), x, *lists, p, seed)
        weights, _, a, b, scales, _ = lists
        tensors, quants, forms = split(weights) if flags & PACKED else (weights, (), ())
        ctx.set_materialize_grads(False)
        ctx.call = passes, forms, p, scales if passes is cpu else None
        saved_scales = [t if isinstance(t, torch.Tensor) else None for t in scales]
        kept = x if flags & TRAINS_A else None  # without an A to train x is not read again (LoRA-FA, BitFit)
        ctx.save_for_backward(kept, s, seed, *tensors, *a, *b, *saved_scales, *quants)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys):
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad  # checkpointing lets them be unpacked once only
        if not torch.is_grad_enabled():
            return _gradients(ctx.call, needs, saved, dys)
        with torch.no_grad():
            found = _gradients(ctx.call, needs, saved, dys)
        # create_graph=True
        return found if is_compiling() else once_differentiable("lora_linear", found, (*saved, *dys))


# For plain calls: past what `apply` does for functorch and for defaults of arguments (3.7 of the 9 µs of an empty Function).
_apply = super(torch.autograd.Function, LoraLinear).apply


def _gradients(call, needs, saved, dys):
    passes, forms, p, numbers = call
    x, s, seed, *flat = saved
    n = len(dys)
    weights, a, b, scales = flat[:n], flat[n : 2 * n], flat[2 * n : 3 * n], flat[3 * n : 4 * n]
    if numbers is not None:
        scales = [number if t is None else t for number, t in zip(numbers, scales)]
    wants_bias, wants_a, wants_b, wants_lora_bias = [needs[i : i + n] for i in range(2, 2 + 4 * n, n)]
    none = (None,) * n
    dx, das, dbs, dbiases = None, none, none, none
    if any([dy is not None for dy in dys]):
        if not isinstance(passes, str) and not all([dy is None or plain_call(dy) for dy in dys]):
            passes, scales = forced(), [None if t is None else _arguments.scale(t, s) for t in scales]
        wants_sum = [one or two for one, two in zip(wants_bias, wants_lora_bias)]
        weights = join(weights, flat[4 * n :], forms)
        dx, das, dbs, dbiases = backward(
            _passes(passes), dys, x, s, weights, a, b, scales, p, seed, needs[1], wants_a, wants_b, wants_sum
        )
    dbias = [g if want else None for g, want in zip(dbiases, wants_bias)]
    dlora_bias = [g if want else None for g, want in zip(dbiases, wants_lora_bias)]
    return None, dx, *dbias, *das, *dbs, *dlora_bias
