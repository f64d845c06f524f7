"""Dropout masks in Triton: the same words as `csrc/philox.h` and `fastpeft/reference/philox.py`, bit for bit."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep(seed, rows, first_column, projection, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mask [BLOCK_M, BLOCK_K] of rows [BLOCK_M] (int64) and the columns from first_column on, a multiple of 4."""
    zero = tl.zeros((BLOCK_M, BLOCK_K // 4), tl.uint32)
    blocks = tl.cast(tl.cast(first_column, tl.int32) // 4 + tl.arange(0, BLOCK_K // 4), tl.uint32)[None, :] + zero
    low = tl.cast(rows, tl.uint32)[:, None] + zero
    high = tl.cast(rows >> 32, tl.uint32)[:, None] + zero
    w0, w1, w2, w3 = tl.philox(seed, blocks, low, zero + projection, high)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK_M, BLOCK_K))
    return words >= tl.cast(threshold, tl.uint32)
