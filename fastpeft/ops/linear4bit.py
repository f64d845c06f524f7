"""linear4bit: a frozen linear layer whose weight is stored in 4 bits, y = x Wᵀ + bias; quantize_4bit makes the weight.

A 4-bit base is one more kind of weight of `lora_linear`: the call goes its way (`ops/lora_linear.py`), without an adapter. The
kernels: `backends/<device>/linear4bit.py`, or `reference/linear4bit.py`.
"""

from __future__ import annotations

import torch
from torch.compiler import is_compiling

from ..backends.choice import allows
from ..reference import linear4bit as reference
from ..weight4bit import BLOCKSIZES, QUANT_TYPES, Weight4bit
from . import _check
from .lora_linear import plain, run


def quantize_4bit(
    w: torch.Tensor, *, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = False
) -> Weight4bit:
    """A weight in 4 bits, the same bytes and scales as bitsandbytes makes on w's device (Dettmers et al. 2023, section 3).

    Args:
        w: [N, K], float32, bfloat16 or float16, finite.
        quant_type: "nf4" (quantiles of a normal distribution) or "fp4" (1 sign, 2 exponent, 1 mantissa bit).
        blocksize: consecutive weights that share a scale: a power of two from 32 to 4096.
        double_quant: store the scales themselves in 8 bits (4.127 instead of 4.5 bits a weight at blocksize 64).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or dtype; NaN or Inf in w.
    """
    op = "quantize_4bit"
    if not isinstance(w, torch.Tensor):
        _check.bad_type(op, "w", "a torch.Tensor", w)
    if w.dim() != 2:
        _check.bad_value(op, "w", "[N, K]", list(w.shape))
    if w.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        _check.bad_value(op, "w", "float32, bfloat16 or float16", w.dtype)
    if quant_type not in QUANT_TYPES:
        _check.bad_value(op, "quant_type", "'nf4' or 'fp4'", repr(quant_type))
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        _check.bad_value(op, "blocksize", "a power of two from 32 to 4096", repr(blocksize))
    if not torch.isfinite(w).all():
        _check.bad_value(op, "w", "finite", "NaN or Inf in it")
    data, scales = reference.quantize(w, quant_type, blocksize)
    nested = offset = None
    if double_quant and scales.numel():
        scales, nested, offset = reference.quantize_absmax(scales)
    n, k = w.shape
    return Weight4bit(data, scales, nested, offset, (n, k), w.dtype, quant_type, blocksize).tile()


def linear4bit(x: torch.Tensor, weight: Weight4bit, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A frozen linear layer over a 4-bit weight: y = x Wᵀ + bias, forward and the gradients of x and bias.

    Args:
        x: [..., K], float32, bfloat16 or float16 (float64 runs on the torch backend), whatever was quantised; any strides.
        weight: [N, K]. bias: [N], any floating dtype, or None.

    Returns:
        y [..., N], x's dtype, which may be changed in place.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.
        RuntimeError: a forced backend cannot run this call (the message says why).
    """
    if not isinstance(weight, Weight4bit):
        _check.bad_type("linear4bit", "weight", "an fp.Weight4bit (see quantize_4bit)", weight)
    if not is_compiling() and allows("cpu"):
        y = plain(x, weight, None, None, 1.0, bias, None)
        if y is not None:
            return y
    none = (None,)
    return run("linear4bit", x, ((weight,), (bias,), none, none, none, none), 0.0, None)[0]
