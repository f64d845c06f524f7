"""fastpeft: fast kernels for parameter-efficient fine-tuning (PEFT) of PyTorch models.

    import fastpeft as fp
    report = fp.apply(peft_model)     # Hugging Face PEFT layers, in place, onto fused kernels
    print(report)                     # one line a layer: the path it takes, or why it was left alone
    fp.revert(peft_model)             # back to PEFT's own classes
    fp.quantize(model, "nf4")         # linear layers in 4 bits, with bitsandbytes' checkpoints both ways
    fp.attach(model, fp.LoraConfig()) # or fp.PrefixConfig: adapters on a plain model, without PEFT

Functions are in `fastpeft.ops`, modules in `fastpeft.nn`; `fastpeft doctor` prints what this machine can run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import nn, ops
from .backends.choice import backend
from .backends.plans import plan, warn_if_ignored
from .native import warn_if_missing
from .weight4bit import Weight4bit

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping
    from typing import Any

    import torch

    from .interop.report import Report
    from .methods.files import Saved
    from .methods.lora import LoraConfig
    from .methods.prefix import PrefixConfig
    from .methods.prefix_report import PrefixReport

__version__ = "0.1.0"
__all__ = [
    "LoraConfig",
    "PrefixConfig",
    "Weight4bit",
    "activate",
    "apply",
    "attach",
    "backend",
    "detach",
    "load_adapter",
    "nn",
    "ops",
    "plan",
    "prefix_report",
    "prune_prefix",
    "quantize",
    "revert",
    "save_adapter",
]

warn_if_missing()
warn_if_ignored()


def apply(model: torch.nn.Module) -> Report:
    """Put the LoRA layers of a Hugging Face PEFT model, or its prefix tuning, on fastpeft's kernels, in place.

    Parameters, their names, `state_dict` keys and optimizers stay valid. A layer that has no fast path runs PEFT's own
    code, and the report says why. Calling it again is harmless. Use it before `fully_shard` (FSDP2).

    QLoRA: a bitsandbytes base becomes a `fastpeft.nn.Linear4bit` with the same bytes, state_dict keys and values, and its
    frozen weight a new Parameter; `revert` and PEFT's `unload` give a bitsandbytes layer back. Merging into 4 bits rounds
    (`base_layer.merge_error`), and unmerging restores the original bits.

    Prefix tuning: the attention layers read the prompt where PEFT has it, so that gradient checkpointing, static caches and
    classifiers work.

    Raises:
        ValueError: the model holds no PEFT layer; it is left untouched.
        RuntimeError: the model was already sharded by FSDP2.
    """
    from .interop.peft import apply as apply_to_peft

    return apply_to_peft(model)


def revert(model: torch.nn.Module) -> None:
    """Undo `apply`: every layer gets PEFT's own class back. Raises RuntimeError after FSDP2 has swapped classes."""
    from .interop.peft import revert as revert_peft

    revert_peft(model)


def quantize(
    model: torch.nn.Module,
    quant_type: str = "nf4",
    *,
    blocksize: int = 64,
    double_quant: bool = True,
    skip: Iterable[str] = ("lm_head",),
    tile: bool = True,
) -> torch.nn.Module:
    """Put every linear layer into 4 bits, a frozen `fastpeft.nn.Linear4bit`, in place, one at a time (QLoRA's base model).

    Args:
        model: any module. Layers of exactly `nn.Linear`, and transformers' `Conv1D` (GPT-2). Weights float32, bfloat16 or
            float16, finite.
        quant_type, blocksize, double_quant: as for `fastpeft.ops.quantize_4bit`.
        skip: names or patterns (of `fnmatch`: `*`, `?`, `[…]`, and `*` takes dots too). A layer stays dense where one of
            them is one or more whole components, side by side, of its dotted name: "mlp", "mlp.up_proj", "layers.0" and
            "*.mlp.*" match "model.layers.0.mlp.up_proj", and "up" does not.
        tile: lay the bytes out for the CPU kernels; False before FSDP2's `fully_shard`.

    Returns:
        the model; the new layer where the model is itself a linear layer.

    A model of transformers also keeps dense what its own quantiser keeps (output embeddings, tied weights, the last module)
    and the whole head of its task, and is then what its loader makes with a `BitsAndBytesConfig`: `save_pretrained` writes
    that, and where bitsandbytes is installed `hf_quantizer`, `is_loaded_in_4bit` and the like are set. PEFT's adapters and
    `modules_to_save` stay dense in any model.

    Subclasses of nn.Linear, weights shared with another module and layers with hooks or parametrisations stay dense: a
    UserWarning lists them. Where less than half of the linear weights ends up in 4 bits, it says how much, and why.

    Raises:
        TypeError, ValueError: a wrong argument; no layer to quantise; a weight with NaN or Inf, of another dtype or on the
        meta device. The model is left untouched.
        RuntimeError: the model was already sharded by FSDP2.
    """
    from .quantization import quantize as quantize_model

    return quantize_model(model, quant_type, blocksize=blocksize, double_quant=double_quant, skip=skip, tile=tile)


def attach(model: torch.nn.Module, config: LoraConfig | PrefixConfig, name: str = "default") -> None:
    """Put an adapter on a plain model, in place, and train it alone: the base is frozen. It is active afterwards.

    The task head (a child of the model whose name ends with "classifier", "score" or "qa_outputs", as PEFT finds it) and
    what `config.modules_to_save` names are trained too, each adapter a copy of its own. A layer that has LoRA is a module
    with the layer as its `base`. Quantise before, compile and shard (FSDP2) after.

    Args:
        model: any module without PEFT's wrappers; transformers need not be there.
        config: `fp.LoraConfig`, or `fp.PrefixConfig` for a model of transformers.
        name: without dots; several adapters may be attached, one of them active.

    Raises:
        TypeError, ValueError, RuntimeError: a wrong argument, a target that the model has not or that cannot be adapted, a
        name that is taken, a model that PEFT wrapped or FSDP2 sharded. The model is left untouched.
    """
    from .methods.attach import attach as attach_to

    attach_to(model, config, name)


def detach(model: torch.nn.Module, name: str | None = None) -> None:
    """Take an adapter off; None: the only one. The base alone is active where it was active.

    With the last adapter the model is again what it was, bit for bit: its modules, parameters, `state_dict`, requires_grad
    flags and task head. Raises ValueError, with the names that are there, for another one.
    """
    from .methods.attach import detach as detach_from

    detach_from(model, name)


def activate(model: torch.nn.Module, name: str | None) -> None:
    """Run the model with one of its adapters, or None: as the base alone, with its own task head.

    Another adapter than the last one is also trained from now on, in its place; None changes no requires_grad flag.
    Parameters stay the same objects, and so what an optimizer knows of them.

    Raises:
        ValueError: no adapter of this name (the message lists them), or none at all.
    """
    from .methods.attach import activate as activate_in

    activate_in(model, name)


def save_adapter(model: torch.nn.Module, folder: str | os.PathLike[str], name: str | None = None) -> Saved:
    """Write an adapter (None: the only one) with its task head: adapter_config.json and adapter_model.safetensors.

    Returns:
        `format` "peft" where PEFT's `PeftModel.from_pretrained(base, folder)` reads it, else "fastpeft", and the `reason`;
        `str()` of it says so in a sentence. A fingerprint of the base is stored, for `load_adapter`.

    Raises:
        ValueError: no adapter of this name. AdapterFileError (a ValueError): it cannot be written; the folder is as it was.
    """
    from .methods.files import save_adapter as save

    return save(model, folder, name)


def load_adapter(
    model: torch.nn.Module,
    folder: str | os.PathLike[str],
    name: str = "default",
    *,
    check_base: bool = True,
    allow_nonfinite: bool = False,
    allow_edited: bool = False,
) -> None:
    """Attach an adapter from a folder of `save_adapter` or of PEFT's `save_pretrained`, and activate it.

    The files are taken for hostile: all of them is checked before the model is touched, and no code in them runs.

    Args:
        check_base: refuse a model that is not the one the adapter was saved from (where the file says which that is).
        allow_nonfinite: take NaN and infinity. allow_edited: take a file that was changed since `save_adapter` wrote it.

    Raises:
        TypeError, ValueError: as `attach`; AdapterFileError (a ValueError) for a file that is damaged, does not fit this
        model or asks for what fastpeft does not compute. The model is left untouched.
    """
    from .methods.files import load_adapter as load

    load(model, folder, name, check_base=check_base, allow_nonfinite=allow_nonfinite, allow_edited=allow_edited)


def prefix_report(model: torch.nn.Module, data: Iterable[Mapping[str, Any]], name: str | None = None) -> PrefixReport:
    """Average the gates of an attached prefix (APT's λ·α) over data: which layers and tokens it uses.

    Args:
        data: batches of keywords, `model(**batch)`, of whole rows; read once. Those with `labels` of a classification of
            rows (int [B], logits [B, classes]) also split the rows by right and wrong predictions.
        name: of the prefix; None: the only adapter.

    The prefix runs alone, without dropout and gradients; what was active, trained and in training mode is so again after.

    Returns:
        `str()` is a table, `.weights` [layers, P], `.plot(path)` a heat map, `.lengths(budget)` the lengths of a shorter
        prefix to be trained anew, `.rank_correlation(other)` how far two agree.

    Raises:
        ValueError: no such adapter, one without gates, or no data. TypeError: a batch that is no dict.
    """
    from .methods.prefix_report import prefix_report as report_on

    return report_on(model, data, name)


def prune_prefix(
    model: torch.nn.Module, budget: int, data: Iterable[Mapping[str, Any]], name: str | None = None
) -> PrefixReport:
    """Keep the `budget` tokens of an attached prefix, in all layers together, whose gates are largest on average over data.

    In place; an optimizer must be made anew. What a layer lost leaves one token of zero key and value behind, with a
    log-bias, that takes its share of the softmax: it is not trained and not counted. Positions start where they did. Both
    stand in the adapter's file. The output changes by no more than the dropped gates give (`methods/prefix_prune.py`). A
    prefix that is trained anew at `report.lengths(budget)` needs neither.

    Args:
        data, name: as for `prefix_report`.

    Returns:
        the report by which it chose.

    Raises:
        ValueError, TypeError: as `prefix_report`, or a budget out of range. RuntimeError: the model was sharded by FSDP2. The
        prefix is left untouched.
    """
    from .methods.prefix_prune import prune_prefix as prune

    return prune(model, budget, data, name)


def __getattr__(name: str) -> object:  # configs, on first use: what they belong to is not loaded with the package
    if name == "LoraConfig":
        from .methods.lora import LoraConfig

        return LoraConfig
    if name == "PrefixConfig":
        from .methods.prefix import PrefixConfig

        return PrefixConfig
    raise AttributeError(f"module 'fastpeft' has no attribute {name!r}")
