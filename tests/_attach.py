"""Small plain models to attach adapters to, and what is left of them afterwards."""

from __future__ import annotations

import copy
from typing import Any

import torch
from _peft import double
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import fastpeft as fp

KINDS = ["llama", "gpt2", "bert", "vit", "sequential"]
HEADS = {"bert": ["classifier"], "vit": ["classifier"]}


def base_model(kind: str, four_bit: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    """No dropout. The Llama is built as SmolLM2 is: grouped-query attention, output embeddings tied to the input's."""
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 72,
    }
    text = small | {"vocab_size": 61, "max_position_embeddings": 64, "pad_token_id": 0}
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    model: nn.Module
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**text, **ends, num_key_value_heads=2, tie_word_embeddings=True))
    elif kind == "gpt2":
        sizes = {"vocab_size": 61, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
        model = GPT2LMHeadModel(GPT2Config(**sizes, **ends, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    elif kind == "bert":
        model = BertForSequenceClassification(BertConfig(**text, **drop, num_labels=3))
    elif kind == "vit":
        model = ViTForImageClassification(ViTConfig(**small, **drop, image_size=16, patch_size=8, num_labels=3))
    else:
        model = nn.Sequential(
            nn.Linear(64, 72), nn.GELU(), nn.Sequential(nn.LayerNorm(72), nn.Linear(72, 5, bias=False))
        )
    return fp.quantize(model.to(dtype)) if four_bit else model.to(dtype)


def batch(kind: str, rows: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Two rows: pictures, vectors or tokens."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "vit":
        return torch.randn(rows, 3, 16, 16, generator=generator).to(dtype)
    if kind == "sequential":
        return torch.randn(rows, 9, 64, generator=generator).to(dtype)
    return torch.randint(3, 61, (rows, 9), generator=generator)


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y.logits


def exact(model: nn.Module) -> nn.Module:
    """The same in float64, dense."""
    model = copy.deepcopy(model)
    for parent in model.modules():
        for name, layer in parent._modules.items():
            if isinstance(layer, fp.nn.Linear4bit):
                plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
                plain.weight = nn.Parameter(layer.dequantize().float(), requires_grad=False)
                plain.bias = layer.bias
                parent._modules[name] = plain
    if not hasattr(model, "dtype"):
        return model.double()
    for name in ("is_loaded_in_4bit", "quantization_method", "is_quantized"):  # transformers would refuse to cast
        model.__dict__.pop(name, None)
    return double(model)


def in_double(x: torch.Tensor) -> torch.Tensor:
    return x.double() if x.is_floating_point() else x


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Weighs every output differently."""
    y = output(model, x)
    return (y * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)).sum()


def adapter(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """What an adapter trains, with its task heads."""
    return model.__dict__["_fastpeft"].attached[name].parameters()


@torch.no_grad()
def move_away(model: nn.Module, name: str = "default", seed: int = 1) -> None:
    """As after training: nothing of the adapter is zero any more."""
    generator = torch.Generator().manual_seed(seed)
    for p in adapter(model, name).values():
        p += 0.1 * torch.randn(p.shape, generator=generator).to(p)


def state(model: nn.Module) -> dict[str, Any]:
    """All that detach must give back: the very objects, their flags and modes, and copies of the values."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return {
        "modules": {name: (id(module), type(module), module.training) for name, module in modules.items()},
        "attributes": {name: set(module.__dict__) for name, module in modules.items()},
        "hooks": {
            name: [len(hooks) for key, hooks in module.__dict__.items() if key.endswith("_hooks")]
            for name, module in modules.items()
        },
        "parameters": {
            name: (id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters(remove_duplicate=False)
        },
        "keys": list(model.state_dict()),
        "values": [t.clone() for t in model.state_dict().values()],
    }


def assert_same_state(model: nn.Module, before: dict[str, Any]) -> None:
    now = state(model)
    for part in now.keys() - {"values"}:
        assert now[part] == before[part], part
    assert all(map(torch.equal, now["values"], before["values"]))
