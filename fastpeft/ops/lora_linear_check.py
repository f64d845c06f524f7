"""One call of lora_linear or lora_linear_group, and the checks of its arguments: shapes, dtypes, devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..weight4bit import Weight4bit
from . import _check

Weights = Sequence[torch.Tensor | Weight4bit]
Optionals = Sequence[torch.Tensor | None]


class Call(NamedTuple):
    """One call's arguments, a sequence entry per projection."""

    x: torch.Tensor
    weights: Weights
    biases: Optionals
    a: Optionals
    b: Optionals
    scales: Sequence[Any]
    lora_biases: Optionals
    dropout_p: float
    seed: Any


def check(op: str, call: Call) -> None:
    x = call.x
    if not isinstance(x, torch.Tensor):
        _check.bad_type(op, "x", "a torch.Tensor", x)
    if x.dim() == 0:
        _check.bad_value(op, "x", "[..., K], at least one dimension", "a 0-dim tensor")
    if not x.dtype.is_floating_point:
        _check.bad_value(op, "x", "a floating-point tensor", x.dtype)
    if not 0.0 <= call.dropout_p <= 1.0:
        _check.bad_value(op, "dropout_p", "a probability in [0, 1]", call.dropout_p)
    for i, weight in enumerate(call.weights):
        _check_base(op, x, weight)
        n = weight.shape[0]
        _check.vector(op, "bias", call.biases[i], n, "N", x)
        _check.vector(op, "lora_bias", call.lora_biases[i], n, "N", x)
        _check_adapter(op, x, n, call.a[i], call.b[i], call.scales[i])


def _check_base(op: str, x: torch.Tensor, weight: torch.Tensor | Weight4bit) -> None:
    k = x.shape[-1]
    if not isinstance(weight, (torch.Tensor, Weight4bit)):
        _check.bad_type(op, "weight", "a torch.Tensor or an fp.Weight4bit", weight)
    if len(weight.shape) != 2 or weight.shape[1] != k:
        _check.bad_value(op, "weight", f"[N, K] = [N, {k}] (K is x's last dimension)", list(weight.shape))
    if weight.dtype != x.dtype:
        _check.bad_value(
            op, "weight", f"of x's dtype ({x.dtype}); cast one of them or use torch.autocast", weight.dtype
        )
    _check.same_device(op, "weight", weight, x)
    if isinstance(weight, torch.Tensor) and weight.requires_grad:
        _check.bad_value(
            op, "weight", "frozen (weight.requires_grad_(False)): it gets no gradient here", "one that requires grad"
        )


def _check_adapter(op: str, x: torch.Tensor, n: int, a: Any, b: Any, scale: Any) -> None:
    if a is None and b is None:
        return
    for name, value in (("a", a), ("b", b)):
        if not isinstance(value, torch.Tensor):
            _check.bad_type(op, name, "a torch.Tensor (or None for both a and b)", value)
    k = x.shape[-1]
    if a.dim() != 2 or a.shape[0] == 0 or a.shape[1] != k:
        r = a.shape[0] if a.dim() == 2 and a.shape[0] else "R ≥ 1"
        _check.bad_value(op, "a", f"[R, K] = [{r}, {k}]", list(a.shape))
    r = a.shape[0]
    if b.dim() != 2 or b.shape[0] != n or b.shape[1] != r:
        _check.bad_value(op, "b", f"[N, R] = [{n}, {r}]", list(b.shape))
    for name, value in (("a", a), ("b", b)):
        _check.floating(op, name, value)
        _check.same_device(op, name, value, x)
    if isinstance(scale, torch.Tensor):
        if scale.dim() > 1 or (scale.dim() == 1 and scale.shape[0] != r):
            _check.bad_value(op, "scale", f"a number or a tensor [] or [R] = [{r}]", list(scale.shape))
        _check.floating(op, "scale", scale)
        _check.same_device(op, "scale", scale, x)
    elif isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat, torch.SymInt)):
        _check.bad_type(op, "scale", "a number or a torch.Tensor", scale)


def seed_tensor(op: str, seed: Any, device: torch.device) -> torch.Tensor:
    """int64 [] on `device`; None draws one from PyTorch's generator."""
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, torch.Tensor):
        if seed.dim() != 0 or seed.dtype != torch.int64 or seed.device != device:
            got = f"{seed.dtype} {list(seed.shape)} on {seed.device}"
            _check.bad_value(op, "seed", f"an int or an int64 tensor [] on {device}", got)
        return seed
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        _check.bad_type(op, "seed", "an int or an int64 tensor []", seed)
    return torch.full((), seed, dtype=torch.int64, device=device)  # type: ignore[arg-type]  # a SymInt while compiling
