"""Argument errors in full sentences: the op, the argument, what was expected, what came."""

from __future__ import annotations

from typing import Any, NoReturn

import torch


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
