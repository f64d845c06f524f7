"""Bytes that autograd keeps for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def saved_bytes(call: Callable[[], Any], excluded: list[Tensor]) -> int:
    """Every storage that `call` saves once, x too; parameters (`excluded`) not."""
    known = {t.untyped_storage().data_ptr() for t in excluded}
    kept: dict[int, Tensor] = {}  # holding the tensor keeps its address from being used again

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in known:
            kept.setdefault(address, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    total = sum(t.untyped_storage().nbytes() for t in kept.values())
    del result
    return total
