"""fastpeft: fast kernels for parameter-efficient fine-tuning (PEFT) of PyTorch models.

    import fastpeft as fp
    report = fp.apply(peft_model)     # Hugging Face PEFT layers, in place, onto fused kernels
    print(report)                     # one line a layer: the path it takes, or why it was left alone
    fp.revert(peft_model)             # back to PEFT's own classes
    fp.quantize(model, "nf4")         # every nn.Linear in 4 bits, with bitsandbytes' checkpoints both ways

Functions are in `fastpeft.ops`, modules in `fastpeft.nn`; `fastpeft doctor` prints what this machine can run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import nn, ops
from .native import warn_if_missing
from .backends.choice import backend
from .backends.plans import plan
from .weight4bit import Weight4bit

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from .interop.report import Report

__version__ = "0.1.0"
__all__ = ["Weight4bit", "apply", "backend", "nn", "ops", "plan", "quantize", "revert"]

warn_if_missing()


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
    """Replace every dense `nn.Linear` by a frozen `fastpeft.nn.Linear4bit`, in place, one at a time (QLoRA's base model).

    Args:
        model: any module. PEFT's adapters and `modules_to_save` in it stay dense. Weights float32, bfloat16 or float16, finite.
        quant_type, blocksize, double_quant: as for `fastpeft.ops.quantize_4bit`.
        skip: names of modules; a layer with one of them in its dotted name stays dense.
        tile: lay the bytes out for the CPU kernels; False before FSDP2's `fully_shard`.

    Returns:
        the model; the new layer where the model is itself an nn.Linear.

    Subclasses of nn.Linear, weights shared with another module (a head tied to its embedding) and layers with hooks or
    parametrisations stay dense: a UserWarning lists them.

    Raises:
        TypeError, ValueError: a wrong argument; no layer to quantise; a weight with NaN or Inf, of another dtype or on the
        meta device. The model is left untouched.
        RuntimeError: the model was already sharded by FSDP2.
    """
    from .quantization import quantize as quantize_model

    return quantize_model(model, quant_type, blocksize=blocksize, double_quant=double_quant, skip=skip, tile=tile)
