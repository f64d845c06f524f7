"""lora_linear: a frozen linear layer with a LoRA term, and lora_linear_group: several of them that read one x.

    y = out_scale · ((x·in_scale) Wᵀ + scale·(drop(x) Aᵀ) Bᵀ + lora_bias) + bias

Here: the public functions and the way to the registered op in `lora_linear_op.py` (schema, fake, autograd, the table of
backends), past the checks in `lora_linear_check.py`. Then: `lora_linear_cpu.py` and `csrc/cpu/lora_linear.cpp`, or
`reference/lora_linear.py`. The usual calls take short ways with the same results: inference
(`lora_linear_lean.py`) and training (`lora_linear_train.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..reference import lora_linear as reference
from ..weight4bit import Weight4bit
from . import _check
from ._backend import forced
from ._library import plain_call
from .linear4bit_lean import lean as lean_4bit
from .lora_linear_check import Call, Optionals, Weights, check, seed_tensor
from .lora_linear_lean import constant, lean
from .lora_linear_op import apply
from .lora_linear_train import train


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
        weight: [N, K], frozen, x's dtype (under autocast any), any strides; or an fp.Weight4bit (QLoRA).
        a, b: [R, K] and [N, R], any floating dtype: fp32 masters under bf16 compute are rounded inside the kernel and
            get fp32 gradients. Both None: the base alone.
        scale: a number, or a tensor [] or [R] (several adapters stacked along R are one call).
        bias, lora_bias: [N]; `lora_bias` enters unscaled (for PEFT pass scaling·bias).
        dropout_p: probability in [0, 1] that an element of x is dropped before `a`; the others are scaled by 1/(1-p).
        seed: int, or int64 tensor [], that fixes the mask (Philox4x32-10); None draws one from PyTorch's generator.
        in_scale, out_scale: [K], [N]: (IA)³ and DoRA. They, and a `scale` that requires grad, run the torch definition.

    Returns:
        y [..., N], contiguous, x's dtype. Gradients flow to x, a, b, bias and lora_bias (and the scales).

    Raises:
        TypeError, ValueError: an argument of the wrong type, rank, shape, dtype or device; a weight that requires grad.
        RuntimeError: a forced backend cannot run this call (the message says why).
    """
    special = in_scale is not None or out_scale is not None or dropout_p == 1.0
    special = special or (type(scale) is not float and _wants_grad(scale))  # (a call is 0.2 µs)
    if not special:
        if torch.is_grad_enabled():
            ys = train("lora_linear", x, (weight,), (bias,), (a,), (b,), (scale,), (lora_bias,), dropout_p, seed)
            if ys is not None:
                return ys[0]
        elif dropout_p == 0.0:
            if isinstance(weight, Weight4bit):
                y = lean_4bit(x, weight, a, b, scale, bias, lora_bias)
            else:
                y = lean(x, weight, a, b, scale, bias, lora_bias)
            if y is not None:
                return y
    call = Call(x, (weight,), (bias,), (a,), (b,), (scale,), (lora_bias,), dropout_p, seed)
    if special:
        return _by_definition("lora_linear", call, in_scale, out_scale)[0]
    return run("lora_linear", call)[0]


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
    call = Call(x, weights, biases or none, a, b, scales, lora_biases or none, dropout_p, seed)
    for name, given in zip(
        ("a", "b", "scales", "biases", "lora_biases"), (a, b, scales, call.biases, call.lora_biases)
    ):
        if len(given) != n or n == 0:
            _check.bad_value(
                "lora_linear_group", name, f"as long as weights, at least one (weights has {n})", len(given)
            )
    if dropout_p == 1.0 or any(map(_wants_grad, scales)):
        return _by_definition("lora_linear_group", call)
    ys = train("lora_linear_group", x, weights, call.biases, a, b, scales, call.lora_biases, dropout_p, seed)
    if ys is not None:
        return list(ys)
    return run("lora_linear_group", call)


# ---- from the public call to the registered op ---------------------------------------------------


def run(op: str, call: Call) -> list[torch.Tensor]:
    call = _autocast(call)
    check(op, call)
    x, adapters = call.x, zip(call.a, call.scales)
    plain = plain_call(x)
    scales = [None if a is None else _scale(scale, x, plain) for a, scale in adapters]
    seed = seed_tensor(op, call.seed, call.x.device) if call.dropout_p else None
    return apply(x, (call.weights, call.biases, call.a, call.b, scales, call.lora_biases), call.dropout_p, seed, plain)


def _autocast(call: Call) -> Call:
    """Under autocast everything computes in its dtype, as `torch.nn.functional.linear` does."""
    x = call.x
    if not isinstance(x, torch.Tensor) or x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return call
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(t: Any) -> Any:
        if isinstance(t, Weight4bit):
            return t.to(dtype)
        narrow = isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype != torch.float64
        return t.to(dtype) if narrow else t

    return call._replace(x=cast(x), weights=[cast(w) for w in call.weights])


def _wants_grad(scale: Any) -> bool:
    return isinstance(scale, torch.Tensor) and scale.requires_grad


def _scale(scale: Any, x: torch.Tensor, plain: bool) -> torch.Tensor:
    """[] or [R], float32 (float64 with x), on x's device: as a tensor it can change without recompiling."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if isinstance(scale, torch.Tensor):
        return scale.to(wide).contiguous()
    if plain and x.is_cpu and wide is torch.float32:
        return constant(scale)
    return torch.full((), scale, dtype=wide, device=x.device)


def _by_definition(op: str, call: Call, in_scale: Any = None, out_scale: Any = None) -> list[torch.Tensor]:
    """What only the definition under autograd does: (IA)³ scales, a trained `scale`, dropout of everything."""
    if forced() not in ("", "torch"):
        raise RuntimeError(
            f"{op}: backend {forced()!r} was forced, but a scale that requires grad, "
            "dropout_p = 1, in_scale and out_scale run only on the torch backend"
        )
    call = _autocast(call)
    check(op, call)
    _check.vector(op, "in_scale", in_scale, call.x.shape[-1], "K", call.x)
    _check.vector(op, "out_scale", out_scale, call.weights[0].shape[0], "N", call.x)
    seed = seed_tensor(op, call.seed, call.x.device) if call.dropout_p else None
    return [
        reference.lora_linear(
            call.x, weight, call.a[i], call.b[i], scale=call.scales[i], bias=call.biases[i], lora_bias=call.lora_biases[i],
            dropout_p=call.dropout_p, seed=seed, in_scale=in_scale, out_scale=out_scale, projection=i,
        )
        for i, weight in enumerate(call.weights)
    ]  # fmt: skip
