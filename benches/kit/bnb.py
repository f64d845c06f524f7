"""What a user of 4-bit weights would otherwise run: bitsandbytes' layers, and PyTorch's int4 op."""

from __future__ import annotations

import copy
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

BLOCK = 64


def layer(weight: Tensor, *, double: bool, bias: Tensor | None = None) -> Linear4bit:
    """bitsandbytes' NF4 layer over `weight` [N, K], quantised by bitsandbytes, in training mode.

    compute_dtype is the weight's. double: the scales are quantised too (`compress_statistics`).
    """
    n, k = weight.shape
    made = Linear4bit(k, n, False, weight.dtype, compress_statistics=double, quant_type="nf4", device="meta")
    made.weight = Params4bit(
        weight.detach(), requires_grad=False, compress_statistics=double, quant_type="nf4", module=made
    )
    made.bias = bias if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return made.to(weight.device)  # quantises


def packs(layer: Linear4bit) -> bool:
    """Whether eval mode takes bitsandbytes' own kernel here."""
    n, k = layer.out_features, layer.in_features
    return bool(layer.support_avx512bf16_for_cpu) and n % 32 == 0 and k % BLOCK == 0


def packed(layer: Linear4bit) -> Linear4bit:
    """A copy in eval mode, packed for it: the first call does that, in place."""
    made = copy.deepcopy(layer).eval()
    with torch.no_grad():
        made(torch.zeros(1, made.in_features, dtype=made.compute_dtype))
    return made


def dequantise(layer: Linear4bit, dtype: torch.dtype) -> Tensor:
    """[N, K]: what the layer's weight stands for."""
    state = copy.copy(layer.weight.quant_state)
    state.dtype = dtype
    return functional.dequantize_4bit(layer.weight.data, state)


def dequantise_and_multiply(layer: Linear4bit, x: Tensor) -> Tensor:
    return nn.functional.linear(x, functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))


def resident(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, the scales of its 4-bit layers too, each storage once."""
    tensors: list[Any] = [*module.parameters(), *module.buffers()]
    for part in module.modules():
        state = getattr(getattr(part, "weight", None), "quant_state", None)
        if state is not None:
            tensors.append(state.absmax)
            tensors += [state.state2.absmax, state.offset] if state.nested else []
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def in_4bit(model: Any) -> Any:
    """A copy of the model whose linear layers, all but the output embedding, are NF4 with double quantisation.

    Everything else is shared with `model`. The copy says `is_loaded_in_4bit`, as what transformers loads does.
    """
    made = copy.deepcopy(model, {id(p): p for p in model.parameters()}).requires_grad_(False)
    head = made.get_output_embeddings()
    for part in list(made.modules()):
        for name, child in part.named_children():
            if type(child) is nn.Linear and child is not head:
                setattr(part, name, layer(child.weight, double=True, bias=child.bias).train(child.training))
    made.is_loaded_in_4bit = True
    return made


class Int4:
    """PyTorch's int4 op for the CPU over random codes of the same size: w = (code - 8)·scale in groups of 64."""

    def __init__(self, n: int, k: int):
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.int32)
        scale = (torch.rand(k // BLOCK, n, generator=generator) * 0.1 / k**0.5 + 0.1 / k**0.5).to(torch.bfloat16)
        self.scales = torch.stack([scale, torch.zeros_like(scale)], dim=-1)  # [K/64, N, 2]: scale and zero
        self.data = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)  # [N, K/2]
        self._codes = codes.to(torch.int8)

    def dense(self) -> Tensor:
        """fp32 [N, K]"""
        scale = self.scales[..., 0].float().t().repeat_interleave(BLOCK, dim=1)
        return (self._codes.float() - 8) * scale

    def clone(self) -> Int4:
        made = copy.copy(self)
        made.data, made.scales = self.data.clone(), self.scales.clone()
        return made

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.data, BLOCK, self.scales)


def has_int4() -> bool:
    return hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")
