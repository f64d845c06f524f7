"""The error rule of every numeric test: at most twice the error of the same-dtype PyTorch composition.

Both errors are taken against float64. The floor is for results that the composition happens to hit exactly: a few eps of
the largest value (rounding), and fp32's eps of Σ|terms| (n fp32 additions in any order walk by about 0.35 eps Σ|terms|; it
matters where terms cancel). A tensor of a few elements says too little about the composition's error, which may vanish by
luck: there it is eps of Σ|terms|, the worst case of one rounding of every term.
"""

from __future__ import annotations

import torch


def error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute error."""
    return (result.double() - exact.double()).abs().max().item() if exact.numel() else 0.0


def assert_close(
    result: torch.Tensor,
    same_dtype: torch.Tensor,
    exact: torch.Tensor,
    name: str = "result",
    eps: float | None = None,
    terms: torch.Tensor | None = None,
    drawn: int | None = None,
) -> None:
    """`result` against float64 `exact`: error <= 2x that of `same_dtype` + 4 eps of the largest value + 2^-23 Σ|terms|.

    eps: unit of the dtype that the computation ran in (an fp32 gradient of bf16 compute has bf16's), default result's own.
    terms: Σ|terms| of each element: the same computation on absolute values.
    drawn: how many independent errors the elements share, where that is fewer than their number (dA of one row and rank 1
    is one rounded number times x).
    """
    assert result.shape == exact.shape, f"{name}: shape {list(result.shape)}, expected {list(exact.shape)}"
    if exact.numel() == 0:
        return
    assert torch.isfinite(result).all(), f"{name}: NaN or Inf"
    eps = torch.finfo(result.dtype).eps if eps is None else eps
    allowed = 2 * error(same_dtype, exact) + 4 * eps * exact.double().abs().max().item()
    if terms is not None:
        allowed += (
            2**-23 if min(result.numel(), drawn or result.numel()) >= 32 else max(eps, 2**-23)
        ) * terms.max().item()
    got = error(result, exact)
    assert got <= allowed, (
        f"{name}: error {got:.3e}, allowed {allowed:.3e} (composition {error(same_dtype, exact):.3e})"
    )


# ---- Σ|terms| of attention -------------------------------------------------------------------------------------------


def through(value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """One's value with the other's gradient."""
    return value.detach() + gradient - gradient.detach()


def sizes_of_weights(weights: torch.Tensor, scores: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Softmax weights whose value and gradient are sums of absolute values.

    scores: with the gradient of their terms' absolute values (`through`); sizes: Σ|terms| of each. A weight is off by its own
    rounding and by that of the scores, w (δs + Σ w δs); and ds = w (dw + Σ w dw).
    """
    of, scores = weights.detach(), scores.masked_fill(scores == -torch.inf, 0.0)
    off = of * (1.0 + sizes + (of * sizes).sum(-1, keepdim=True))
    return through(off, of * (scores + (of * scores).sum(-1, keepdim=True)))
