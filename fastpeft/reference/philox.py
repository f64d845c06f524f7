"""Philox4x32-10, the counter-based generator of every dropout mask (Salmon et al., SC'11, "Parallel random numbers").

A mask is a function of (seed, element, projection): nothing is stored, and recomputation gives the same mask.
"""

from __future__ import annotations

import math

import torch

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF


def words(seed: torch.Tensor, shape: tuple[int, ...], projection: int = 0) -> torch.Tensor:
    """A word for each element of a matrix [..., K], int64 in [0, 2^32).

    Key: seed (low, high). Counter: (column // 4, row low, projection, row high); the element's word is the one numbered
    column % 4 of the block's four.
    """
    rows, columns = math.prod(shape[:-1]), shape[-1]
    row = torch.arange(rows, dtype=torch.int64, device=seed.device)[:, None]
    c0 = torch.arange((columns + 3) // 4, dtype=torch.int64, device=seed.device).expand(rows, -1)
    c1, c2, c3 = row & _MASK32, torch.full_like(c0, projection), row >> 32
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1  # mod 2^64; the shifts below read both halves as unsigned
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK32) ^ c1 ^ k0,
            p1 & _MASK32,
            ((p0 >> 32) & _MASK32) ^ c3 ^ k1,
            p0 & _MASK32,
        )
        k0, k1 = (k0 + _W0) & _MASK32, (k1 + _W1) & _MASK32
    return torch.stack((c0, c1, c2, c3), -1).flatten(1)[:, :columns].reshape(shape)


def keep_threshold(p: float) -> int:
    """An element is kept if its word is at least this: p·2^32, rounded up."""
    return math.ceil(p * 2**32)


def dropout_mask(seed: torch.Tensor, shape: tuple[int, ...], p: float, projection: int = 0) -> torch.Tensor:
    """Bool [shape], True = keep."""
    return words(seed, shape, projection) >= keep_threshold(p)
