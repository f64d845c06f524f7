"""fastpeft: fast kernels for parameter-efficient fine-tuning (PEFT) of PyTorch models.

    import fastpeft as fp
    report = fp.apply(peft_model)     # Hugging Face PEFT layers, in place, onto fused kernels
    print(report)                     # one line a layer: the path it takes, or why it was left alone
    fp.revert(peft_model)             # back to PEFT's own classes
    fp.quantize(model, "nf4")         # linear layers in 4 bits, with bitsandbytes' checkpoints both ways

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
    from collections.abc import Iterable

    import torch

    from .interop.report import Report

__version__ = "0.1.0"
__all__ = ["Weight4bit", "apply", "backend", "nn", "ops", "plan", "quantize", "revert"]

warn_if_missing()
warn_if_ignored()


def apply(model: torch.nn.Module) -> Report:
    """Put the LoRA layers of a Hugging Face PEFT model on fastpeft's kernels, in place.

    Parameters, their names, `state_dict` keys and optimizers stay valid. A layer that has no fast path runs PEFT's own
    code, and the report says why. Calling it again is harmless. Use it before `fully_shard` (FSDP2).

    QLoRA: a bitsandbytes base becomes a `fastpeft.nn.Linear4bit` with the same bytes, state_dict keys and values, and its
    frozen weight a new Parameter; `revert` and PEFT's `unload` give a bitsandbytes layer back. Merging into 4 bits rounds
    (`base_layer.merge_error`), and unmerging restores the original bits.

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
