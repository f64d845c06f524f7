"""What a user would otherwise run: PEFT's own layers, and the best composition of torch calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch._inductor import config as inductor

PEFT = "PEFT"  # its default: adapters in fp32, the LoRA part computed in fp32
PEFT_LOW = "PEFT same dtype"  # autocast_adapter_dtype=False: adapters in the compute dtype
COMPILED = "PEFT compiled"  # torch.compile of PEFT's default layer
COMPOSITION = "composition"
PEERS = (PEFT, PEFT_LOW, COMPOSITION)  # the three that fastpeft must never be slower than


class Composition(torch.autograd.Function):
    """lora_linear in as few torch calls as it takes; adapters are cast to x's dtype in every call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        a_low, b_low = a.to(x.dtype), b.to(x.dtype)
        x2 = x.reshape(-1, x.shape[-1])  # [M, K]
        y = nn.functional.linear(x2, weight, bias)  # [M, N]
        s = x2 @ a_low.t()  # [M, R]
        y.addmm_(s, b_low.t(), alpha=scale)
        ctx.save_for_backward(x2, weight, s, a_low, b_low)
        ctx.scale, ctx.shape, ctx.dtypes = scale, x.shape, (a.dtype, b.dtype)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, s, a, b = ctx.saved_tensors
        dy = grads[0].reshape(-1, weight.shape[0])  # [M, N]
        ds = (dy @ b).mul_(ctx.scale)  # [M, R]
        db = (dy.t() @ s).mul_(ctx.scale)  # [N, R]
        da = ds.t() @ x  # [R, K]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight).addmm_(ds, a).view(ctx.shape)
        return dx, None, None, da.to(ctx.dtypes[0]), db.to(ctx.dtypes[1]), None


def composition(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + scale·(x Aᵀ) Bᵀ + bias by addmm; without gradients the autograd.Function is left out."""
    if torch.is_grad_enabled():
        return Composition.apply(x, weight, bias, a, b, scale)
    x2 = x.reshape(-1, x.shape[-1])
    y = nn.functional.linear(x2, weight, bias)
    y.addmm_(x2 @ a.to(x.dtype).t(), b.to(x.dtype).t(), alpha=scale)
    return y.view(*x.shape[:-1], weight.shape[0])


class CompositionLinear(PeftLinear):
    """PEFT's layer with its forward replaced by the composition: one active adapter, dropout 0, unmerged."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        (name,) = self.active_adapters
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        base = self.base_layer
        return composition(x, base.weight, a, b, self.scaling[name], base.bias)


def use_composition(model: nn.Module) -> None:
    """Make every LoRA linear of a PEFT model run the composition."""
    for module in model.modules():
        if type(module) is PeftLinear:
            module.__class__ = CompositionLinear


class _Layers(nn.Module):
    def __init__(self, weights: Sequence[Tensor | nn.Module]):
        super().__init__()
        self.is_loaded_in_4bit = isinstance(weights[0], nn.Module)  # PEFT asks for it
        self.layers = nn.ModuleList(w if isinstance(w, nn.Module) else _linear(w) for w in weights)


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False)  # as large a one would be initialised first, for nothing
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def peft_layers(
    weights: Sequence[Tensor | nn.Module], a: list[Tensor], b: list[Tensor], *, scale: float, dropout: float, low: bool
) -> list[Any]:
    """PEFT's LoRA layers over `weights` (or over 4-bit layers of bitsandbytes) with adapters a, b, by its public API.

    low: adapters in the weights' dtype (`autocast_adapter_dtype=False`), else PEFT's default, fp32.
    """
    rank = a[0].shape[0]
    config = LoraConfig(r=rank, lora_alpha=scale * rank, lora_dropout=dropout, target_modules=r"layers\.\d+")
    model = get_peft_model(_Layers(weights), config, autocast_adapter_dtype=not low)
    layers = list(model.base_model.model.layers)
    with torch.no_grad():
        for layer, a_i, b_i in zip(layers, a, b, strict=True):
            layer.lora_A["default"].weight.copy_(a_i)
            layer.lora_B["default"].weight.copy_(b_i)
            layer.train()
    return layers


def adapters(layer: Any) -> list[Tensor]:
    return [layer.lora_A["default"].weight, layer.lora_B["default"].weight]


def call_layer(layer: PeftLinear, x: Tensor) -> Tensor:
    return layer(x)


def compiled() -> Any:
    """`call_layer` under torch.compile: layers are its inputs, so that one graph serves a ring of them."""
    inductor.compile_threads = 1  # compile here: under load torch's compile workers stalled
    torch._dynamo.reset()
    return torch.compile(call_layer, dynamic=False)
