"""Launches the Triton kernels of linear4bit: block sizes, grids, workspaces.

A weight is a `fastpeft.Weight4bit`, on x's device; other arguments as in `lora_linear_launch.py`. It puts its code books
(`quant_map` [16], `codebook` [256] or None) on a device when it is first asked there: not while a graph is captured.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from . import linear4bit as kernels
from ._launch import INTERPRETED, capability, dropout, multiprocessors, on_device, precision
from .lora_linear_launch import _block, _describable, _rank_block, _spans, _stride, combine_by, project_by


def _scales(weight) -> dict[str, object]:
    """Kernel arguments: where scales and code books are."""
    return {
        "scales_ptr": weight.scales,
        "absmax_ptr": weight.nested_absmax,
        "offset_ptr": weight.offset,
        "book_ptr": weight.quant_map,
        "map_ptr": weight.codebook,
        "BLOCKSIZE": weight.blocksize,
        "NESTED": weight.nested_absmax is not None,
        "SHUFFLE": not INTERPRETED,
    }


def _codes(weight) -> tuple[torch.Tensor, bool]:
    """The codes as words of 8, if no word has codes of two rows, else as bytes."""
    data, (n, k) = weight.data, weight.shape
    if k % 8 or data.storage_offset() % 4 or data.data_ptr() % 4:
        return data, False
    return data[: n * k // 2].view(torch.int32), True


@on_device
def dequantize(weight, dtype):
    """-> [N, K] = codebook[code] · scale in float32, rounded once"""
    weight, out = weight.untile(), torch.empty(weight.shape, dtype=dtype, device=weight.device)
    size, block = out.numel(), 2048
    if size:
        kernels.linear4bit_dequantize_kernel[(triton.cdiv(size, block),)](
            out, weight.data, SIZE=size, BYTES=weight.data.numel(), UNIT=min(weight.blocksize, block), BLOCK=block,
            num_warps=4, **_scales(weight),
        )  # fmt: skip
    return out


class Tiles(NamedTuple):
    """How a GEMM is cut: `parts` programs share the sum of each tile."""

    m: int
    c: int
    j: int
    parts: int
    warps: int
    stages: int


def _tiles(m: int, c: int, j: int, dtype: torch.dtype, words: bool, p: float, device: torch.device) -> Tiles:
    """Not measured yet (benches/LOG.md). Up to 64 rows decoding is the work, and wgmma's 64 rows cost less than moving W into
    mma's registers. Past that 128 rows share a decoded weight, and two programs an SM decode while the other multiplies: 128
    columns leave 128 registers a thread, but not with a mask to draw (benches/COMPILED.md).
    """
    sms, wgmma = multiprocessors(device), capability(device)[0] in (9, 10)
    if dtype == torch.float32:
        tiles, an_sm = Tiles(16 if m <= 16 else 64, 64, 32, 1, 4 if m <= 16 else 8, 3), 2
    elif not words:
        tiles, an_sm = Tiles(_block(m, 64), 64, 32, 1, 4, 2), 3
    elif m <= 64:
        tiles, an_sm = Tiles(64 if wgmma else _block(m, 64), 64, 128, 1, 4, 3), 3
    else:
        full = p == 0.0 and triton.cdiv(m, 128) * triton.cdiv(c, 128) >= 2 * sms
        block_j, stages = (128, 2) if wgmma else (64, 3)
        tiles, an_sm = Tiles(128, 128 if full else 64, block_j, 1, 8, stages), 2
    count = triton.cdiv(m, tiles.m) * triton.cdiv(c, tiles.c)
    return tiles._replace(parts=max(1, min(an_sm * sms // count, triton.cdiv(j, 4 * tiles.j), 16)))


def _gemm(left, weight, w_is_cj, out, accumulate, s, ups, spans, up_strides, scale, bias, lora_bias, p, seed):
    """out [M, C] (+)= left [M, J] · w [J, C] + the rank-R terms; w = Wᵀ (w_is_cj) or W"""
    weight, (m, j), c = weight.untile(), left.shape, out.shape[1]
    if m == 0 or c == 0:
        return
    codes, words = _codes(weight)
    tiles = _tiles(m, c, j, left.dtype, words, p, left.device)
    part_j = triton.cdiv(triton.cdiv(j, tiles.parts), tiles.j) * tiles.j
    count = max(1, triton.cdiv(j, max(part_j, 1)))
    parts = None if count == 1 else torch.empty((count, m, c), dtype=torch.float32, device=left.device)
    descriptors = capability(left.device)[0] >= 9 and _describable(left)
    # what comes after the sum: in the GEMM's own epilogue, or in that of the sum over parts
    rest = {
        "s_ptr": s, "up_ptrs": ups, "scale_ptr": scale, "bias_ptr": bias, "lora_bias_ptr": lora_bias, "M": m, "C": c,
        "stride_om": out.stride(0), "stride_sm": s.stride(0), "stride_ur": up_strides[0], "stride_uc": up_strides[1],
        "stride_scale": _stride(scale), "ACCUMULATE": accumulate, "PRECISION": precision(left.dtype),
        "BLOCK_R": min(_rank_block(spans, out.dtype), 32), **_spans(spans), **dropout(p, seed),
    }  # fmt: skip
    alone = (
        rest if parts is None else rest | {"up_ptrs": (), "scale_ptr": None, "bias_ptr": None, "lora_bias_ptr": None}
    )
    if parts is not None:
        alone |= {"ACCUMULATE": False, **_spans([]), **dropout(0.0, None)}
    l_arg = TensorDescriptor.from_tensor(left, [tiles.m, tiles.j]) if descriptors else left
    kernels.linear4bit_gemm_kernel[(triton.cdiv(m, tiles.m) * triton.cdiv(c, tiles.c), count)](
        l_arg, out, parts, codes, J=j, part_j=part_j, stride_lm=left.stride(0),
        UNIT=math.gcd(weight.shape[1], weight.blocksize, tiles.j if w_is_cj else tiles.c) if words else 1, WORDS=words,
        DESCRIPTORS=descriptors, W_IS_CJ=w_is_cj, SPLIT=parts is not None, BLOCK_M=tiles.m, BLOCK_C=tiles.c,
        BLOCK_J=tiles.j, GROUP_M=8, num_warps=tiles.warps, num_stages=tiles.stages, **_scales(weight), **alone,
    )  # fmt: skip
    if parts is not None:
        block_m, block_c = min(tiles.m, 64), 64
        kernels.linear4bit_finish_kernel[(triton.cdiv(m, block_m), triton.cdiv(c, block_c))](
            out, parts, PARTS=count, BLOCK_M=block_m, BLOCK_C=block_c, num_warps=4, num_stages=2, **rest
        )


project, combine = functools.partial(project_by, _gemm), functools.partial(combine_by, _gemm)
