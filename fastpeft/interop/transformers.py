"""transformers' models: which layers stay dense in one that goes into 4 bits, and the marks that its own loader leaves on one.

transformers is imported only by `mark`: a model of its can exist only where it is loaded.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..weight4bit import DTYPES


def pretrained(model: nn.Module) -> list[Any]:
    """The outermost models of transformers in this one."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if is_pretrained(module) and not any(f"{name}.".startswith(f"{outer}.") or not outer for outer in found):
            found[name] = module
    return list(found.values())


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is [K, N]."""
    loaded = sys.modules.get("transformers.pytorch_utils")
    return loaded is not None and type(module) is loaded.Conv1D


def kept_dense(model: Any, adapters: set[int]) -> set[int]:
    """The ids of modules that stay dense: output embeddings, what is tied, the last module, and the head of a task.

    transformers' quantiser keeps the first three (`get_keys_to_not_convert`) but misses a last module that has a bias, and
    most of a head of several layers: PEFT then cannot train them.
    """
    modules = dict(model.named_modules())
    keys = [key for tie in (getattr(model, "all_tied_weights_keys", None) or {}).items() for key in tie]
    kept = [modules.get(key.rpartition(".")[0]) for key in keys]
    kept += _last(model, modules, adapters)
    for module in modules.values():
        if is_pretrained(module):
            output = module.get_output_embeddings()
            kept += output.modules() if isinstance(output, nn.Module) else _head(module)
    return {id(module) for module in kept}


def output_embeddings(model: nn.Module) -> set[int]:
    """The ids of what turns hidden states into logits over a vocabulary."""
    return {id(module.get_output_embeddings()) for module in model.modules() if is_pretrained(module)}


def _last(model: Any, modules: dict[str, nn.Module], adapters: set[int]) -> Iterator[nn.Module]:
    """The owner of the last parameter, unless it is the end of a block and has a bias (transformers quantises that)."""
    owned = [(modules[place], name) for place, _, name in (key.rpartition(".") for key, _ in model.named_parameters())]
    for module, name in [pair for pair in owned if id(pair[0]) not in adapters][-1:]:
        if name == "weight" or id(module) not in _parts(_blocks(model)):
            yield module


def _head(model: Any) -> Iterator[nn.Module]:
    """What stands beside the base model, but for blocks and whole models (the decoder of a masked autoencoder)."""
    base = model.base_model
    if base is not model and isinstance(base, nn.Module):
        models = [m for m in model.modules() if is_pretrained(m) and m is not model]
        body = _parts([base, *models, *_blocks(model)])
        yield from (module for module in model.modules() if id(module) not in body)


def _blocks(model: nn.Module) -> list[nn.Module]:
    layers = sys.modules.get("transformers.modeling_layers")
    return [m for m in model.modules() if layers is not None and isinstance(m, layers.GradientCheckpointingLayer)]


def _parts(modules: list[nn.Module]) -> set[int]:
    return {id(part) for module in modules for part in module.modules()}


def mark(model: Any, quant_type: str, double_quant: bool, adapters: set[int]) -> None:
    """Leave on the model what transformers' loader leaves on one in 4 bits: its configuration, quantiser and flags.

    The flags only where the layers are bitsandbytes' (it is installed): who finds them imports it.
    """
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    if getattr(model, "hf_quantizer", None) is not None and not getattr(model, "is_loaded_in_4bit", False):
        return  # its other layers are in another format, which loads the whole
    bnb = sys.modules.get("bitsandbytes")
    packed, dense = _linear_names(model, adapters)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=model.dtype if model.dtype in DTYPES.values() else torch.float32,
        llm_int8_skip_modules=[_pattern(name, packed) for name in dense] or None,
    )
    model.config.quantization_config = config
    if bnb is None or not any(isinstance(module, bnb.nn.Linear4bit) for module in model.modules()):
        return
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    model.hf_quantizer.modules_to_not_convert = config.llm_int8_skip_modules or []
    model.is_quantized, model.quantization_method = True, config.quant_method
    model.hf_quantizer.postprocess_model(model)


def _linear_names(model: Any, adapters: set[int]) -> tuple[list[str], list[str]]:
    """The linear layers in 4 bits, and the dense ones that a loader could take, by their names without PEFT."""
    packed, dense = [], []
    for name, module in model.named_modules():
        original = "original_module" in name.split(".")  # of PEFT's `modules_to_save`
        if original or id(module) not in adapters:
            name = re.sub(r"\.(base_layer|original_module)(?=\.|$)", "", name)
            if type(module) is nn.Linear or is_conv1d(module):
                dense.append(name)
            elif isinstance(module, nn.Linear):
                packed.append(name)
    return packed, dense


def _pattern(name: str, others: list[str]) -> str:
    """What transformers takes for this layer alone: its name, or, as it also compares ends, a regular expression."""
    begins = re.compile(rf"(?:{name})(?=\.|$)")
    clash = any(other.endswith(name) or begins.match(other) for other in others)
    return re.escape(name) + "$" if clash else name


def is_pretrained(module: nn.Module) -> bool:
    loaded = sys.modules.get("transformers.modeling_utils")
    return loaded is not None and isinstance(module, loaded.PreTrainedModel)
