"""Small models of transformers, and what a prefix should make of one: eager attention over keys that begin with it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from _close import error
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.masking_utils import eager_mask

CAUSAL = ("llama", "qwen2", "gpt2")
TEXT = (*CAUSAL, "bert", "roberta")
KINDS = (*TEXT, "vit")
PAD = 1
LIMIT = 40  # positions
ATTENTION = {
    "LlamaAttention",
    "Qwen2Attention",
    "GPT2Attention",
    "BertSelfAttention",
    "RobertaSelfAttention",
    "ViTAttention",
}


def base_model(kind: str, dropout: float = 0.0, layers: int = 2) -> Any:
    """4 heads of 8, two of them for keys in Llama and Qwen2; weights large enough that attention is far from uniform."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 40}
    sizes |= {"initializer_range": 0.3}
    ends = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": PAD}
    text: dict[str, Any] = sizes | {"vocab_size": 61} | ends
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": dropout}
    if kind == "llama":
        config = LlamaConfig(**text, max_position_embeddings=LIMIT, num_key_value_heads=2, attention_dropout=dropout)
        return LlamaForCausalLM(config).eval()
    if kind == "qwen2":
        config = Qwen2Config(**text, max_position_embeddings=LIMIT, num_key_value_heads=2, attention_dropout=dropout)
        return Qwen2ForCausalLM(config).eval()
    if kind == "gpt2":
        own = {
            "n_embd": 32,
            "n_layer": layers,
            "n_head": 4,
            "n_positions": LIMIT,
            "vocab_size": 61,
            "initializer_range": 0.3,
        }
        return GPT2LMHeadModel(GPT2Config(**own, **ends, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=dropout)).eval()
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(**text, **drop, max_position_embeddings=LIMIT)).eval()
    if kind == "roberta":
        config = RobertaConfig(**text, **drop, max_position_embeddings=LIMIT + PAD + 1)
        return RobertaForSequenceClassification(config).eval()
    return ViTForImageClassification(ViTConfig(**sizes, **drop, image_size=12, patch_size=4)).eval()


def batch(
    kind: str, rows: int = 3, tokens: int = 7, padding: str | None = None, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Keyword arguments; with padding "left" or "right" the last row has three tokens fewer."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "vit":
        return {"pixel_values": torch.randn(rows, 3, 12, 12, generator=generator)}
    ids = torch.randint(4, 61, (rows, tokens), generator=generator)
    if padding is None:
        return {"input_ids": ids}
    seen = torch.ones_like(ids)
    seen[-1, slice(None, 3) if padding == "left" else slice(-3, None)] = 0
    return {"input_ids": ids.masked_fill(seen == 0, PAD), "attention_mask": seen}


def stir(parameters: Sequence[nn.Parameter], seed: int = 1) -> None:
    """Every parameter of a prefix at random, so that each matters."""
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.data.copy_(torch.randn(p.shape, generator=generator))


def oracle(base: Any, prefixes: Sequence[Any], start: int, dtype: torch.dtype, **inputs: torch.Tensor) -> tuple:
    """(logits, the gradients of all prefix parameters of `loss`, one vector) in this dtype.

    base: the model without a prefix, copied; prefixes: an `nn.PrefixAttention` or None a layer, copied.
    """
    model, prefixes = copy.deepcopy(base).to(dtype), [p and copy.deepcopy(p).to(dtype) for p in prefixes]
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    else:
        inputs["position_ids"] = positions(model, inputs["input_ids"], start)
    layers = [module for module in model.modules() if type(module).__name__ in ATTENTION]
    for layer, prefix in zip(layers, prefixes):
        layer.__dict__["case"] = prefix, inputs.get("attention_mask")
        layer.register_forward_pre_hook(_keep_input, with_kwargs=True)
    model.config._attn_implementation = "prefix_oracle"
    logits = model(**inputs).logits
    trained = [p for prefix in prefixes if prefix is not None for p in prefix.parameters()]
    grads = torch.autograd.grad(loss(logits, inputs.get("attention_mask")), trained)
    return seen(logits, inputs.get("attention_mask")).detach(), torch.cat([g.flatten() for g in grads])


def assert_same(result: torch.Tensor, exact: torch.Tensor, single: torch.Tensor, name: str = "result") -> None:
    """Two float64 results of one value. `single` is it in float32: its error shows how the model amplifies rounding.

    float64's rounding is 2^-29 of float32's; 2^-20 leaves room for another order of additions, and none for another value.
    """
    assert result.shape == exact.shape == single.shape and result.dtype == exact.dtype == torch.float64
    got, allowed = error(result, exact), 2**-20 * error(single, exact)
    assert got <= allowed, f"{name}: differ by {got:.3e}, allowed {allowed:.3e}"


def loss(logits: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Weighs every output differently."""
    y = seen(logits, mask)
    return (y * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).to(y.dtype).view_as(y)).sum()


def seen(logits: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The logits of tokens that are no padding."""
    return logits if mask is None or logits.dim() == 2 else logits[mask.bool()]


def positions(model: Any, ids: torch.Tensor, start: int) -> torch.Tensor:
    """The model's own positions, moved."""
    if model.config.model_type == "roberta":
        own = ids.ne(PAD).cumsum(1) + PAD
        return torch.where(ids == PAD, PAD, own + start)
    return torch.arange(ids.shape[1])[None].expand_as(ids) + start


def _keep_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
    module.__dict__["input"] = args[0] if args else kwargs["hidden_states"]


def attend(
    module: Any, q: Any, k: Any, v: Any, mask: Any, dropout: float = 0.0, scaling: Any = None, **others: Any
) -> Any:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = scaling * q @ k.transpose(2, 3)
    scores = scores if mask is None else scores + mask
    prefix, padding = module.__dict__["case"]
    if prefix is None:
        return (scores.softmax(-1) @ v).transpose(1, 2), None
    pk, pv = (x.repeat_interleave(groups, 0) for x in prefix.keys_values())
    gate = q.new_ones(1, 1, 1, 1)
    if hasattr(prefix, "token_gate"):
        h = module.__dict__["input"]
        if not getattr(module, "is_causal", False):
            weight = h.new_ones(h.shape[:2]) if padding is None else padding.to(h.dtype)
            h = (h * weight[..., None]).sum(1, keepdim=True) / weight.sum(1)[:, None, None]
        gate = torch.sigmoid(h @ prefix.token_gate.T)[:, None]
    if hasattr(prefix, "layer_gate"):
        gate = gate * prefix.layer_gate
    first = scaling * gate * (q @ pk.transpose(1, 2))
    if prefix.log_bias is not None:
        first = first + prefix.log_bias
    if prefix.style == "joint":
        weights = torch.cat([first, scores], -1).softmax(-1)
        out = (weights[..., : prefix.length] * gate) @ pv + weights[..., prefix.length :] @ v
    else:
        out = scores.softmax(-1) @ v + prefix.gate_out.tanh()[:, None, None] * ((first.softmax(-1) * gate) @ pv)
    return out.transpose(1, 2), None


AttentionInterface.register("prefix_oracle", attend)
AttentionMaskInterface.register("prefix_oracle", eager_mask)
