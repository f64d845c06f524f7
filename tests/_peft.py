"""Tiny PEFT models for the interop tests, and the comparison with PEFT's own code."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator

import peft
import torch
from _close import assert_close
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import fastpeft
from fastpeft.nn import Linear4bit

ALL = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bert": ["query", "key", "value", "dense"],
}
GROUPS = {"llama": 4, "gpt2": 0, "bert": 2}  # two layers each


def base_model(kind: str) -> nn.Module:
    """Two layers, sizes that are not powers of two, grouped-query attention in the Llama."""
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(
            hidden_size=40, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=61, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return LlamaForCausalLM(config)
    if kind == "gpt2":
        config = GPT2Config(n_embd=40, n_layer=2, n_head=4, vocab_size=61, n_positions=64, bos_token_id=1, eos_token_id=2,
                            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
        return GPT2LMHeadModel(config)
    config = BertConfig(
        hidden_size=40, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4, vocab_size=61,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False)


def peft_model(kind: str = "llama", *, dtype: torch.dtype = torch.float32, **settings) -> peft.PeftModel:
    """With adapters that do something (B is not zero)."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ALL[kind], "init_lora_weights": False} | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base_model(kind).to(dtype), peft.LoraConfig(**settings))
    return model.train()


def tokens(rows: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def output(model: nn.Module, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    result = model(input_ids=ids, **kwargs)
    return result.logits if "logits" in result else result.last_hidden_state


def run(model: nn.Module, ids: torch.Tensor, forward: Callable = output) -> dict[str, torch.Tensor]:
    """The output and every parameter's gradient, of a loss that weighs each output differently."""
    model.zero_grad(set_to_none=True)
    y = forward(model, ids)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    (y * weights).sum().backward()
    results = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach(), **results}


def runs(model: nn.Module, forward: Callable = output) -> dict[str, torch.Tensor]:
    """`run` on several batches, stacked: the error of one batch's gradients is a few random numbers."""
    each = [run(model, tokens(seed=seed), forward) for seed in range(6)]
    return {name: torch.stack([results[name] for results in each]) for name in each[0]}


def double(model: nn.Module) -> nn.Module:
    """The float64 oracle. LlamaRMSNorm computes in float32 whatever its input: nn.RMSNorm takes its place."""
    exact = copy.deepcopy(model).double()
    for parent in list(exact.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, LlamaRMSNorm):
                true = nn.RMSNorm(norm.weight.shape, norm.variance_epsilon)
                true.weight = norm.weight
                setattr(parent, name, true)
    return exact


def dense(model: nn.Module) -> nn.Module:
    """A copy with dense float32 layers of the same values where the bases are in 4 bits, for `double`."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        base = getattr(layer, "base_layer", None)
        if type(base).__name__ != "Linear4bit":  # ours or bitsandbytes'
            continue
        packed = base if isinstance(base, Linear4bit) else Linear4bit.from_bitsandbytes(base)
        plain = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
        plain.weight = nn.Parameter(packed.weight4bit.dequantize(torch.float32), requires_grad=False)
        if base.bias is not None:
            plain.bias = base.bias
        layer.base_layer = plain
    return model


def adapters_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """PEFT's second configuration: the adapters in the compute dtype."""
    model = copy.deepcopy(model)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(dtype)
    return model


def assert_same_results(
    got: dict[str, torch.Tensor],
    peer: dict[str, torch.Tensor],
    exact: dict[str, torch.Tensor],
    eps: float = torch.finfo(torch.float32).eps,
) -> None:
    """Output and gradients: root mean square error at most twice PEFT's, plus 4 eps (the rule of `_close`, for models)."""
    assert got.keys() == exact.keys() == peer.keys()
    for name, true in exact.items():
        assert got[name].dtype == peer[name].dtype or "lora_" in name
        error, theirs = _rms(got[name] - true), _rms(peer[name] - true)
        allowed = 2 * theirs + 4 * eps * _rms(true)
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e} (PEFT {theirs:.3e})"


def _rms(t: torch.Tensor) -> float:
    return t.double().square().mean().sqrt().item()


def assert_like_peft(fast: nn.Module, plain: nn.Module) -> None:
    """`fast` (applied) gives what `plain` (PEFT's code, same weights) gives, forward and backward."""
    assert_same_results(runs(fast), runs(plain), runs(double(plain)))


def call(module: nn.Module, *args: torch.Tensor) -> torch.Tensor:
    return module(*args)


def assert_same_output(got: torch.Tensor, plain: nn.Module, *inputs: torch.Tensor, forward: Callable = call) -> None:
    """`got` is what `plain` (PEFT's code: a layer, or with `forward=output` a model) computes, by the rule of `_close`."""
    with torch.no_grad():
        peer = forward(plain, *inputs)
        exact = forward(double(dense(plain)), *(t.double() if t.is_floating_point() else t for t in inputs))
    assert got.dtype == peer.dtype
    assert_close(got.detach(), peer, exact)


@contextlib.contextmanager
def counted_peft_calls() -> Iterator[list[nn.Module]]:
    """The layers for which PEFT's own forward ran."""
    calls, original = [], PeftLinear.forward

    def forward(self, *args, **kwargs):
        calls.append(self)
        return original(self, *args, **kwargs)

    PeftLinear.forward = forward
    try:
        yield calls
    finally:
        PeftLinear.forward = original


def pair(kind: str = "llama", **settings) -> tuple[peft.PeftModel, fastpeft.interop.report.Report, peft.PeftModel]:
    """A model on the fast path, its report, and the same one on PEFT's code."""
    plain = peft_model(kind, **settings)
    fast = copy.deepcopy(plain)
    return fast, fastpeft.apply(fast), plain


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """LoRA layers by the last part of their name, of the first block."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.layer.LoraLayer):
            found.setdefault(name.rsplit(".", 1)[-1], module)
    return found


def path_on(backend: str) -> str:
    """What a report calls a layer that runs our op there."""
    return "torch" if backend.startswith("torch") else "fast"
