"""What all ops share: registering (the only use of `torch.library`), and the situation of a call.

A call is in one of three situations. Plain: nobody looks, passes are called past PyTorch's dispatcher, fused and in place.
Seen: a dispatch mode, a tensor subclass or the like sees registered, functional passes around `aten.mm`. Compiled: the
same around whole registered ops, which look up their plan when they run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._C import _is_torch_function_mode_enabled, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling
from torch.utils.flop_counter import register_flop_formula

_library = torch.library.Library("fastpeft", "DEF")


def define(schema: str, implementation: Callable, fake: Callable, flops: Callable | None = None) -> Callable:
    """Register `fastpeft::<name>` for every device and return its bound overload.

    The op has no autograd formula: an `autograd.Function` stands outside (5 µs a call cheaper than `custom_op`).
    flops: from the arguments' shapes (and out_shape) the number of FLOPs, for `FlopCounterMode`.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastpeft::{name}", fake, lib=_library)
    packet = getattr(torch.ops.fastpeft, name)
    if flops is not None:
        register_flop_formula(packet)(flops)
    return packet.default


def plain_call(x: torch.Tensor) -> bool:
    """Whether nothing would see the op between here and its implementation: then the dispatcher can be skipped.

    No compiler, no tensor subclass, no torch function or dispatch mode, no functorch transform.
    """
    return (
        type(x) is torch.Tensor
        and not is_compiling()
        and not _len_torch_dispatch_stack()
        and not _is_torch_function_mode_enabled()
        and peek_interpreter_stack() is None
    )


def transformed() -> bool:
    """Whether a functorch transform (torch.func.grad, vmap) is active, outside of the compiler."""
    return not is_compiling() and peek_interpreter_stack() is not None


def once_differentiable(op: str, grads, sources) -> tuple:
    """The gradients of an op that has no second derivative, which say so when they are differentiated."""
    sources = [t for t in sources if t is not None and t.requires_grad]
    return tuple([None if g is None else _NoSecondDerivative.apply(op, g, *sources) for g in grads])


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, grad, *sources):
        ctx.op = op
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(
            f"{ctx.op} has no second derivative; for one (a gradient penalty, say) compute the layer with plain PyTorch: "
            f"fastpeft.reference.{ctx.op}"
        )


class Watch:
    """Tells later whether `t` was changed in place meanwhile, without keeping its memory alive.

    A view shares the version counter of its base, also after it let go of the base's storage. (autograd's own check of saved
    tensors raises an error instead, and is off wherever saved tensors go through hooks, as under checkpointing.)
    """

    def __init__(self, t: torch.Tensor) -> None:
        with torch.no_grad():
            self.view = t.view_as(t).set_(t.new_empty(0))
        self.version = self.view._version

    def changed(self) -> bool:
        return self.view._version != self.version
