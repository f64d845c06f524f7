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


@triton.jit
def keep_at(seed, rows, columns, projection, threshold):
    """Mask of any rows (int64) and columns that broadcast: a block of four words an element, where `keep` has one for four."""
    zero = tl.cast(rows * 0 + columns * 0, tl.uint32)
    blocks, number = tl.cast(columns // 4, tl.uint32) + zero, columns % 4
    low, high = tl.cast(rows, tl.uint32) + zero, tl.cast(rows >> 32, tl.uint32) + zero
    w0, w1, w2, w3 = tl.philox(seed, blocks, low, zero + projection, high)
    words = tl.where(number == 0, w0, tl.where(number == 1, w1, tl.where(number == 2, w2, w3)))
    return words >= tl.cast(threshold, tl.uint32)
