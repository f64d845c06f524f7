"""fastpeft: fast kernels for parameter-efficient fine-tuning (PEFT) of PyTorch models.

    import fastpeft as fp
    report = fp.apply(peft_model)     # Hugging Face PEFT layers, in place, onto fused kernels
    print(report)                     # one line a layer: the path it takes, or why it was left alone
    fp.revert(peft_model)             # back to PEFT's own classes

Functions are in `fastpeft.ops`, modules in `fastpeft.nn`; `fastpeft doctor` prints what this machine can run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import nn, ops
from ._native import warn_if_missing
from .ops._backend import backend
from .weight4bit import Weight4bit

if TYPE_CHECKING:
    import torch

    from .interop.report import Report

__version__ = "0.1.0"
__all__ = ["Weight4bit", "apply", "backend", "nn", "ops", "revert"]

warn_if_missing()


def apply(model: torch.nn.Module) -> Report:
    """Put the LoRA layers of a Hugging Face PEFT model on fastpeft's kernels, in place.

    Parameters, their names, `state_dict` keys and optimizers stay valid. A layer that has no fast path runs PEFT's own
    code, and the report says why. Calling it again is harmless. Use it before `fully_shard` (FSDP2).

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
