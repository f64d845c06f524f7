"""Functions: the ops themselves. One file an op; each picks a backend by device, dtype and shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ._prefix_attention_registered import BACKENDS as OF_PREFIX_ATTENTION
from ._registered import BACKENDS
from ._registered import why_torch as why_torch  # for reports
from .linear4bit import linear4bit, quantize_4bit
from .lora_linear import lora_linear, lora_linear_group
from .prefix_attention import prefix_attention

__all__ = ["backends", "linear4bit", "lora_linear", "lora_linear_group", "prefix_attention", "quantize_4bit"]


def backends() -> dict[str, dict[str, str | None]]:
    """For each op and backend: None where a bfloat16 call could run, on the GPU if there is one, else the reason why not."""
    import torch

    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        x, a, b = torch.empty(1, 16, dtype=torch.bfloat16), torch.empty(1, 16), torch.empty(16, 1)
        q, prefix = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16), torch.empty(1, 1, 1, 64)
    metas: dict[str, tuple[Mapping[str, Any], Any]] = {
        "lora_linear": (BACKENDS, (x, [a], [b])),
        "prefix_attention": (OF_PREFIX_ATTENTION, (q, q, q, prefix, prefix, *(None,) * 7)),
    }
    return {op: {name: of.can(meta) for name, of in table.items()} for op, (table, meta) in metas.items()}
