"""When a PEFT LoRA layer may take the fast path: a question of its state and of x's metadata, asked at every call.

The fast path calls past `base_layer()`, `lora_A()`, `lora_B()` and `lora_dropout()`. That is legal only while nobody
would notice: no hooks, no parametrisations, no sharded or offloaded weights, no forward but PyTorch's own in them.
Nothing is cached, so nothing is ever stale. Whether the adapters are on never decides: a layer computes its base in one
way with them and without, so that a policy and its reference (DPO, GRPO) are the same function before the first step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as every_module
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.module_tracker import ModuleTracker
from transformers.pytorch_utils import Conv1D

from ..nn import Linear4bit
from ..weight4bit import Weight4bit

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
UNMERGE_FIRST = "its adapters are merged and disabled: the next call unmerges them, as PEFT's does"
_STRIDED = torch.strided
_LINEAR_FORWARD = nn.Linear.forward


# a [R, K], b [N, R], bias [N] or None, scaling: a number or a 0-dim tensor. (A plain tuple: 0.3 µs a call.)
Adapter = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, float | torch.Tensor]


class Terms(NamedTuple):
    """What a layer computes now: the parameters themselves, so that two of them can be compared by identity."""

    weight: torch.Tensor | Weight4bit  # [N, K], or [K, N] where transposed (transformers' Conv1D)
    transposed: bool
    bias: torch.Tensor | None
    dropout_p: float
    adapters: tuple[Adapter, ...]
    base: Linear4bit | None = None  # where the weight is in 4 bits
    off: str | None = None  # why the base runs alone, whatever the adapters are

    def dtype(self, x: torch.Tensor) -> torch.dtype:
        """What x is computed in."""
        if self.base is not None:
            return self.base.dtype_for(x)
        kind = x.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def terms(layer: PeftLinear) -> Terms | str:
    """What the layer computes now, or the reason why it must run PEFT's own code."""
    if "forward" in layer.__dict__:
        return "it has a forward of its own (accelerate's hooks do that)"
    modules = layer._modules
    base: Any = modules["base_layer"]
    kind = type(base)
    packed = kind is not nn.Linear and kind is not Conv1D
    if packed and kind.forward is not Linear4bit.forward:  # the class or its subclass that is bitsandbytes' too
        return f"its base layer is a {kind.__name__}"
    if noticed(base):
        return "its base layer has hooks, or a forward of its own"
    parameters = base._parameters
    weight: Any = base.plain_weight() if packed else parameters.get("weight")
    bias = parameters.get("bias")
    if type(weight) is not (Weight4bit if packed else nn.Parameter) or not (bias is None or type(bias) is nn.Parameter):
        return "its base weight is not a plain parameter (sharded, quantised or replicated)"
    if packed:
        if weight.data.is_meta:
            return "its base weight is on the meta device"
    elif weight.requires_grad:
        return "its base weight requires grad"
    elif weight.dtype not in DTYPES or weight.is_meta:
        return f"its base weight is {weight.dtype} on {weight.device}"
    if nn.Linear.forward is not _LINEAR_FORWARD or (_has_any_global_hook() and _noticed_everywhere()):
        return "there are hooks on every nn.Module, or another nn.Linear.forward"
    active, off = layer._active_adapter, None
    names = (active,) if type(active) is str else active
    if layer._disable_adapters or layer.merged_adapters:
        if layer._disable_adapters and layer.merged_adapters:
            return UNMERGE_FIRST
        off = "its adapters are disabled" if layer._disable_adapters else "its adapters are merged"
        names = dict.fromkeys((*names, *layer.merged_adapters))
    downs, ups, dropouts = modules["lora_A"]._modules, modules["lora_B"]._modules, modules["lora_dropout"]._modules
    adapters, dropout_p = [], 0.0
    for name in names:
        if name not in downs:
            continue
        if name in layer.lora_variant:
            return f"adapter {name!r} is a variant ({type(layer.lora_variant[name]).__name__})"
        dropout = dropouts[name]
        adapter = _adapter(downs[name], ups[name], dropout, layer.scaling[name])
        if isinstance(adapter, str):
            return f"adapter {name!r} {adapter}"
        adapters.append(adapter)
        if type(dropout) is nn.Dropout and dropout.training:
            dropout_p = max(dropout_p, dropout.p)
    if dropout_p and len(adapters) > 1:
        return "several adapters with dropout are active in training"
    if off is not None or not adapters:
        dropout_p, off = 0.0, off or "no adapter of it is active"
    return Terms(weight, kind is Conv1D, bias, dropout_p, tuple(adapters), base if packed else None, off)


def _adapter(down: nn.Module, up: nn.Module, dropout: nn.Module, scaling: object) -> Adapter | str:
    if type(down) is not nn.Linear or type(up) is not nn.Linear:
        return f"is made of {type(down).__name__} and {type(up).__name__}"
    if type(dropout) is not nn.Identity and (type(dropout) is not nn.Dropout or dropout.inplace or dropout.p >= 1.0):
        return f"has {dropout} as its dropout"
    if noticed(down) or noticed(up) or noticed(dropout):
        return "has hooks, or a forward of its own"
    a, b, bias = down._parameters.get("weight"), up._parameters.get("weight"), up._parameters.get("bias")
    plain = type(a) is nn.Parameter and type(b) is nn.Parameter and (bias is None or type(bias) is nn.Parameter)
    if not plain or down._parameters.get("bias") is not None:
        return "is not made of plain parameters (sharded or replicated)"
    if a.dtype not in DTYPES or b.dtype is not a.dtype:
        return f"is {a.dtype} and {b.dtype}"
    if type(scaling) is not float and not isinstance(scaling, (float, int)) and not _constant(scaling):
        return f"has a {type(scaling).__name__} as its scaling"
    return a, b, bias, scaling


def refusal(layer: PeftLinear, x: torch.Tensor, found: Terms) -> str | None:
    """Why this x must take PEFT's own code, or None."""
    if type(x) is not torch.Tensor and type(x) is not nn.Parameter:
        return f"x is a {type(x).__name__}"
    dtype = x.dtype
    if dtype not in DTYPES or x.is_meta:
        return f"x is {dtype} on {x.device}"
    if x.layout is not _STRIDED or x.is_nested:
        return f"x is a {'nested' if x.is_nested else x.layout} tensor"
    if found.base is None and dtype is not found.weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return f"x is {dtype}, its base weight {found.weight.dtype}"
    if not layer.cast_input_dtype_enabled and any(a.dtype is not dtype for a, *_ in found.adapters):
        return "casting of its input was disabled"
    if not torch.compiler.is_compiling() and (
        torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    ):
        return "torch.jit tracing, a functorch transform or forward-mode differentiation is active"
    return None


def noticed(module: nn.Module) -> bool:
    """Whether somebody would notice that `module()` was not called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _noticed_everywhere() -> bool:
    """Hooks on every nn.Module, but for those by which PyTorch's own counters (of FLOPs, say) know where they are."""
    of_all = (
        every_module._global_forward_hooks,
        every_module._global_forward_pre_hooks,
        every_module._global_backward_hooks,
        every_module._global_backward_pre_hooks,
    )
    hooks = [hook for hooks in of_all for hook in hooks.values()]
    return not all(isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)


def _constant(scaling: object) -> bool:
    """A 0-dim scaling tensor, as PEFT's hot-swapping makes them."""
    return type(scaling) is torch.Tensor and scaling.dim() == 0 and not scaling.requires_grad
