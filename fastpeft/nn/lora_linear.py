"""LoraLinear: a frozen `nn.Linear` with a trained low-rank update, on `fastpeft.ops.lora_linear`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .. import ops
from .linear4bit import Linear4bit, no_autocast


def adapted(
    x: torch.Tensor,
    base: Any,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """`base(x)` with a low-rank update: base is an nn.Linear, a Linear4bit or transformers' Conv1D, a [r, K], b [N, r].

    The base alone runs in the same way, so that its bits are those at b = 0.
    """
    if isinstance(base, Linear4bit):
        dtype, out = base.dtype_for(x), x.dtype
        with no_autocast(x, dtype):
            return ops.lora_linear(
                x.to(dtype), base.weight4bit, a, b, scale=scale, bias=base.bias, dropout_p=dropout_p
            ).to(out)
    weight = base.weight if isinstance(base, nn.Linear) else base.weight.t()  # Conv1D's is [K, N]
    return ops.lora_linear(x, weight, a, b, scale=scale, bias=base.bias, dropout_p=dropout_p)


class LoraLinear(nn.Module):
    """y = x Wᵀ + bias + alpha/r · (drop(x) Aᵀ) Bᵀ   (Hu et al. 2021, equation 3; B starts at zero, A as in PEFT)

    Args:
        base: the linear layer to adapt, dense or an `nn.Linear4bit`. It is kept as `self.base`, and its weight is frozen.
        r: rank, at least 1. alpha: the update is scaled by alpha/r.
        dropout: probability of dropping an element of x before A, in training.
        adapter_dtype: of A and B; float32 masters by default, whatever the base's dtype (the kernel rounds them).

    Shapes: x [..., in_features] -> y [..., out_features], x's dtype; lora_a [r, in_features], lora_b [out_features, r].

    Raises:
        TypeError: base is not an nn.Linear. ValueError: r or dropout out of range.
    """

    def __init__(
        self,
        base: nn.Linear,
        r: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        *,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise TypeError(f"LoraLinear: base must be a torch.nn.Linear, got {type(base).__name__}")
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise ValueError(f"LoraLinear: r must be an int of at least 1, got {r!r}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"LoraLinear: dropout must be in [0, 1), got {dropout!r}")
        self.base = base
        self.base.weight.requires_grad_(False)
        self.r, self.alpha, self.dropout = r, alpha, dropout
        like = {"device": base.weight.device, "dtype": adapter_dtype}
        self.lora_a = nn.Parameter(torch.empty(r, base.in_features, **like))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, r, **like))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.enabled = True
        self.merged = False
        self._original: Any = None  # the base's tensor, or Weight4bit

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged or not self.enabled:
            return adapted(x, self.base)
        p = self.dropout if self.training else 0.0
        return adapted(x, self.base, self.lora_a, self.lora_b, scale=self.scale, dropout_p=p)

    def enable(self) -> None:
        """Apply the update again after `disable`."""
        self.enabled = True

    def disable(self) -> None:
        """Run the base alone; the parameters stay. Raises RuntimeError while merged."""
        if self.merged:
            raise RuntimeError("LoraLinear.disable: merged; unmerge() first")
        self.enabled = False

    @torch.no_grad()
    def merge(self, *, keep_original: bool = True) -> None:
        """Add the update to `base.weight`.

        The original weight is kept so that `unmerge` restores its bits; `keep_original=False` saves that memory, and
        `unmerge` then subtracts the update (rounded once more).

        A 4-bit base is quantised again (`base.merge_error` is the relative RMS error), and always keeps its original.

        Raises RuntimeError when already merged, ValueError (nothing changes) when the merged weight would not be finite.
        """
        if self.merged:
            raise RuntimeError("LoraLinear.merge: already merged; unmerge() first")
        if isinstance(self.base, Linear4bit):
            original = self.base.weight4bit
            self.base.requantize_(original.dequantize(torch.float32) + self._update())
            self._original, self.merged = original, True
            return
        weight = self.base.weight
        merged = (weight.float() + self._update()).to(weight.dtype)
        if not torch.isfinite(merged).all():
            raise ValueError("LoraLinear.merge: the merged weight has NaN or Inf; nothing was changed")
        self._original = weight.detach().clone() if keep_original else None
        weight.copy_(merged)
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the update out of `base.weight`. Raises RuntimeError when not merged."""
        if not self.merged:
            raise RuntimeError("LoraLinear.unmerge: not merged; merge() first")
        if isinstance(self.base, Linear4bit):
            self.base.set_weight(self._original)
            self.base.merge_error = None
            self._original, self.merged = None, False
            return
        weight = self.base.weight
        weight.copy_(self._original if self._original is not None else weight.float() - self._update())
        self._original, self.merged = None, False

    def _update(self) -> torch.Tensor:
        """scale · B A, float32 [N, K]"""
        return self.scale * (self.lora_b.float() @ self.lora_a.float())

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha}, dropout={self.dropout}, enabled={self.enabled}, merged={self.merged}"
