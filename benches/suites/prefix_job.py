"""Prefix tuning of a language model: 32 tokens a layer, under PEFT and under fastpeft, over the frozen model.

All prefixes begin as the same keys and values; PEFT's gets them by a file of ours. "fastpeft APT" has token and layer gates.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft import PrefixTuningConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

import fastpeft as fp

from ..kit.case import OURS, TIME, Cost, Limit
from ..kit.measure import Tick
from ..kit.peers import PEFT
from ..kit.rounds import AGAIN, FROZEN, Estimate
from ..kit.saved import saved_bytes
from ..kit.verdict import target
from .main_job import Method, linear_flops, model_row, step_samples

LENGTH = 32
LEARNING_RATE = 1e-2  # as in PEFT's examples of prefix tuning
PEFT_EAGER = "PEFT eager attention"
APT = "fastpeft APT"
WAYS = (PEFT, OURS, APT)


def build(
    way: str,
    base: nn.Module,
    start: Sequence[int] | str = "random",
    task: str = "CAUSAL_LM",
    length: int = LENGTH,
) -> nn.Module:
    """A model over base's weights, which all ways share, with a prefix in every attention layer.

    start: "random", or token ids [length], whose keys and values all prefixes begin as. (PEFT's own start, N(0, 1), is far
    from any keys: SmolLM2's loss begins at 11 there, at 3.6 with
    "random", N(0, 0.02).)
    """

    def frozen() -> Any:
        return copy.deepcopy(base, {id(p): p for p in base.parameters()}).requires_grad_(False)

    model = frozen()
    if way in (FROZEN, AGAIN):
        return model
    torch.manual_seed(0)
    fp.attach(model, fp.PrefixConfig(length, gates="token+layer" if way == APT else None, init=start))
    if way in (OURS, APT):
        return model
    with tempfile.TemporaryDirectory() as folder:
        fp.save_adapter(model, folder)  # a file that PEFT reads
        tensors = load_file(f"{folder}/adapter_model.safetensors")
    model = frozen()
    if way == PEFT_EAGER:
        model.set_attn_implementation("eager")
    model = get_peft_model(model, PrefixTuningConfig(task_type=task, num_virtual_tokens=length))
    set_peft_model_state_dict(model, tensors)
    return model


def report(model: nn.Module) -> str:
    count = sum(isinstance(module, fp.nn.PrefixAttention) for module in model.modules())
    return f"{count} attention layers with a prefix of {LENGTH}."


def method(start: Sequence[int]) -> Method:
    ways = (PEFT, PEFT_EAGER, OURS, APT)
    return Method(partial(build, start=start), ways, PEFT_EAGER, LEARNING_RATE, report)


def prefix_flops(model: Any, tokens: int) -> int:
    """What the prefix adds to a forward and backward pass: two products of a query and a key forward, five backward."""
    config = model.config
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    return 14 * tokens * LENGTH * width * config.num_hidden_layers


def step(base: nn.Module, ids: Tensor, seconds: float, *, label: str, device: str, tick: Tick = None) -> dict[str, Any]:
    """One step without optimizer, over that of the model without a prefix with gradients to its embedding output."""
    models = {way: build(way, base) for way in (FROZEN, *WAYS)}
    samples = step_samples(models, ids, seconds, device, tick)
    extra = prefix_flops(base, ids.numel())
    cost = Cost(flops=linear_flops(base, ids.numel()) + extra, extra_flops=extra)
    name = f"{label} training step B={ids.shape[0]} S={ids.shape[1]}, prefix P={LENGTH}"
    limits = (Limit(TIME, FROZEN, 1.05),)
    return model_row("step", name, samples, cost, next(base.parameters()).dtype, device, limits)


def saved(base: nn.Module, ids: Tensor, *, label: str) -> dict[str, Any]:
    """Bytes that a prefix keeps for backward: those of a forward pass beyond the model's without one."""

    def forward(way: str) -> tuple[int, int]:
        model: Any = build(way, base)
        with torch.no_grad():
            embedded = model.get_input_embeddings()(ids)
        embedded.requires_grad_()
        call = lambda: model(inputs_embeds=embedded, labels=ids, use_cache=False).loss  # noqa: E731
        return saved_bytes(call, [*model.parameters(), *base.parameters()]), embedded.untyped_storage().nbytes()

    kept = {way: forward(way) for way in (FROZEN, *WAYS)}
    extra = {way: kept[way][0] - kept[FROZEN][0] for way in WAYS}
    name = f"bytes saved for backward by a prefix P={LENGTH} of {label}, B={ids.shape[0]} S={ids.shape[1]}"
    judged = target(f"{name}: fastpeft over PEFT", 0.3, Estimate.exact(extra[OURS] / extra[PEFT]))
    return {
        "kind": "saved bytes",
        "key": name,
        "bytes": {name: {**extra, "x": kept[FROZEN][1]}},
        "targets": [judged.as_json()],
    }
