"""Argument errors in full sentences: the op, the argument, what was expected, what came."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from ..weight4bit import Weight4bit


def bad_value(op: str, argument: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{op}: {argument} must be {expected}, got {got}")


def bad_type(op: str, argument: str, expected: str, got: object) -> NoReturn:
    raise TypeError(f"{op}: {argument} must be {expected}, got {type(got).__name__}")


def vector(op: str, argument: str, value: torch.Tensor | None, size: int, name: str, x: torch.Tensor) -> None:
    """An optional floating-point vector [size] on x's device."""
    if value is None:
        return
    if not isinstance(value, torch.Tensor):
        bad_type(op, argument, "a torch.Tensor or None", value)
    if value.dim() != 1 or value.shape[0] != size:
        bad_value(op, argument, f"[{name}] = [{size}]", list(value.shape))
    floating(op, argument, value)
    same_device(op, argument, value, x)


def floating(op: str, argument: str, value: torch.Tensor) -> None:
    if not value.dtype.is_floating_point:
        bad_value(op, argument, "a floating-point tensor", value.dtype)


def same_device(op: str, argument: str, value: Any, x: torch.Tensor) -> None:
    if value.device != x.device:
        bad_value(op, argument, f"on x's device ({x.device})", value.device)


# ---- lora_linear ------------------------------------------------------------------------------------------------------


def call(op: str, x: Any, lists: Any, dropout_p: float) -> None:
    """The arguments of lora_linear: x and its lists (weights, biases, a, b, scales, lora_biases)."""
    if not isinstance(x, torch.Tensor):
        bad_type(op, "x", "a torch.Tensor", x)
    if x.dim() == 0:
        bad_value(op, "x", "[..., K], at least one dimension", "a 0-dim tensor")
    if not x.dtype.is_floating_point:
        bad_value(op, "x", "a floating-point tensor", x.dtype)
    if not 0.0 <= dropout_p <= 1.0:
        bad_value(op, "dropout_p", "a probability in [0, 1]", dropout_p)
    for weight, bias, a, b, scale, lora_bias in zip(*lists):
        base(op, x, weight)
        n = weight.shape[0]
        vector(op, "bias", bias, n, "N", x)
        vector(op, "lora_bias", lora_bias, n, "N", x)
        adapter(op, x, n, a, b, scale)


def base(op: str, x: torch.Tensor, weight: torch.Tensor | Weight4bit) -> None:
    k = x.shape[-1]
    if not isinstance(weight, (torch.Tensor, Weight4bit)):
        bad_type(op, "weight", "a torch.Tensor or an fp.Weight4bit", weight)
    if len(weight.shape) != 2 or weight.shape[1] != k:
        bad_value(op, "weight", f"[N, K] = [N, {k}] (K is x's last dimension)", list(weight.shape))
    if weight.dtype != x.dtype and isinstance(weight, torch.Tensor):
        bad_value(op, "weight", f"of x's dtype ({x.dtype}); cast one of them or use torch.autocast", weight.dtype)
    same_device(op, "weight", weight, x)
    if isinstance(weight, torch.Tensor) and weight.requires_grad and torch.is_grad_enabled():
        frozen = "frozen (weight.requires_grad_(False)): it gets no gradient here"
        bad_value(op, "weight", frozen, "one that requires grad")


def adapter(op: str, x: torch.Tensor, n: int, a: Any, b: Any, scale: Any) -> None:
    if a is None and b is None:
        return
    for name, value in (("a", a), ("b", b)):
        if not isinstance(value, torch.Tensor):
            bad_type(op, name, "a torch.Tensor (or None for both a and b)", value)
    k = x.shape[-1]
    if a.dim() != 2 or a.shape[0] == 0 or a.shape[1] != k:
        r = a.shape[0] if a.dim() == 2 and a.shape[0] else "R ≥ 1"
        bad_value(op, "a", f"[R, K] = [{r}, {k}]", list(a.shape))
    r = a.shape[0]
    if b.dim() != 2 or b.shape[0] != n or b.shape[1] != r:
        bad_value(op, "b", f"[N, R] = [{n}, {r}]", list(b.shape))
    for name, value in (("a", a), ("b", b)):
        floating(op, name, value)
        same_device(op, name, value, x)
    if isinstance(scale, torch.Tensor):
        if scale.dim() > 1 or (scale.dim() == 1 and scale.shape[0] != r):
            bad_value(op, "scale", f"a number or a tensor [] or [R] = [{r}]", list(scale.shape))
        floating(op, "scale", scale)
        same_device(op, "scale", scale, x)
    elif isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat, torch.SymInt)):
        bad_type(op, "scale", "a number or a torch.Tensor", scale)


def seed_tensor(op: str, seed: Any, device: torch.device) -> torch.Tensor:
    """int64 [] on `device`; None draws one from PyTorch's generator."""
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, torch.Tensor):
        if seed.dim() != 0 or seed.dtype != torch.int64 or seed.device != device:
            got = f"{seed.dtype} {list(seed.shape)} on {seed.device}"
            bad_value(op, "seed", f"an int or an int64 tensor [] on {device}", got)
        return seed
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        bad_type(op, "seed", "an int or an int64 tensor []", seed)
    return torch.full((), seed, dtype=torch.int64, device=device)  # type: ignore[arg-type]  # a SymInt while compiling
