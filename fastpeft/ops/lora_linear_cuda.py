"""The CUDA C++ passes of lora_linear, as `lora_linear_gpu.py` calls them: tensors turned into pointers, grids, workspaces.

The same functions as in `fastpeft_kernels/lora_linear_launch.py`, without the fused GEMM. Adapters are packed first: in the
dtype of x, scaled, each projection's ranks padded to a multiple of 16.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from .. import native
from ..native import CODES
from .lora_linear_cpu import _ptr, _stride

BLOCK_M, BLOCK_K, BLOCK_C = 64, 64, 128  # as in csrc/cuda/lora_linear.cu


class Span(NamedTuple):
    first: int  # column of s and t
    rank: int
    number: int  # of the projection, for its dropout mask


def down(x, a, spans, s, p, seed):
    """s[:, span i] = drop(x) A_iᵀ; x [M, K], A_i [R_i, K]"""
    m, k = x.shape
    for some, of in _chunks(a, spans):
        packed, layout, ranks = _pack([(t, t.stride(0), t.stride(1), None) for t in some], of, k, x)
        tiles = _ceil(m, BLOCK_M) * _ceil(ranks, 64)
        parts = max(1, min(2 * _multiprocessors(x.device) // max(tiles, 1), _ceil(k, 4 * BLOCK_K), 16))
        out = s if parts == 1 else s.new_empty((parts, m, s.shape[1]), dtype=torch.float32)
        args = (_matrix(x), m, k, _matrix(packed), out.data_ptr(), out.stride(-2), parts, ranks, layout, _drop(p, seed))
        _call("lora_linear_down", x, *args)
        if parts > 1:
            for span in of:
                columns = slice(span.first, span.first + span.rank)
                _sum_columns(out, s, columns)


def up(out, s, b, span, scale, bias):
    """out [M, N] += s (scale·B)ᵀ + bias; B [N, R] or None"""
    _add(out, s, [] if b is None else [_transposed(b, scale)], [] if b is None else [span], bias, 0.0, None)


def add_down(out, t, a, spans, p, seed):
    """out [M, K] += Σ_i drop_i(t_i A_i); A_i [R_i, K]"""
    for some, of in _chunks(a, spans):
        _add(out, t, [(one, one.stride(0), one.stride(1), None) for one in some], of, None, p, seed)


def _add(out, s, ups, spans, bias, p, seed):
    m, c = out.shape
    packed, layout, ranks = _pack(ups, spans, c, out)
    bias_args = (_ptr(bias), 0 if bias is None else CODES[bias.dtype])
    args = (_matrix(out), m, c, _matrix(s), _matrix(packed), *bias_args, ranks, layout, _drop(p, seed))
    _call("lora_linear_up", out, *args)


def grad_up(dy, s, b, scale, ds, db, dbias):
    """ds [M, R] = dy (scale·B), db [N, R] = scale·dyᵀ s, dbias [N] = Σ_m dy; each may be None (not wanted)"""
    (m, n), r = dy.shape, 0 if b is None else b.shape[1]
    spans = [Span(0, r, 0)] if r else []
    layout, ranks = _layout(spans)
    packed = None if ds is None else _pack([_transposed(b, scale)], spans, n, dy)[0]
    tiles = _ceil(n, BLOCK_C)
    slabs, slab_rows = _slabs(m, tiles * max(1, _ceil(ranks, 64)), dy.device)
    part = lambda wanted, *shape: None if wanted is None else dy.new_empty(shape, dtype=torch.float32)  # noqa: E731
    g, ds_parts, sums = part(db, slabs, n, r), part(ds, tiles, m, r), part(dbias, slabs, n)
    _call(
        "lora_linear_columns", dy, _matrix(dy), m, n, _matrix(s), _matrix(packed), _ptr(g), _ptr(ds_parts), _ptr(sums), False,
        slab_rows, slabs, max(ranks, 1), r, layout, _drop(0.0, None),
    )  # fmt: skip
    if ds is not None:
        _sum(ds_parts, ds)
    if db is not None:
        _sum(g, db, scale)
    if dbias is not None:
        _sum(sums[:, None], dbias[None])


def grad_down(x, t, das, spans, p, seed):
    """das[i] [R_i, K] = t_iᵀ drop_i(x); t [M, ΣR]"""
    (m, k), total = x.shape, t.shape[1]
    for some, of in _chunks(das, spans):
        layout, ranks = _layout(of)
        slabs, slab_rows = _slabs(m, _ceil(k, BLOCK_C) * _ceil(ranks, 64), x.device)
        parts = x.new_empty((slabs, total, k), dtype=torch.float32)
        operands = (_matrix(x), m, k, _matrix(t), _matrix(None), parts.data_ptr(), 0, 0, True)
        _call("lora_linear_columns", x, *operands, slab_rows, slabs, ranks, total, layout, _drop(p, seed))
        for da, span in zip(some, of):
            _sum(parts[:, span.first : span.first + span.rank], da)


def _chunks(tensors, spans):
    """At most as many projections at a time as a launch takes."""
    most = native.cuda().max_projections
    return [(tensors[i : i + most], spans[i : i + most]) for i in range(0, len(spans), most)]


def _transposed(b, scale):
    return b, b.stride(1), b.stride(0), scale


def _layout(spans) -> tuple[list[tuple[int, int, int, int]], int]:
    """For each projection (first packed rank, rank, column, number); and the packed ranks in all."""
    layout, packed = [], 0
    for span in spans:
        layout.append((packed, span.rank, span.first, span.number))
        packed += _ceil(span.rank, 16) * 16
    return layout, packed


def _pack(matrices, spans, columns, like):
    """Matrices (tensor, rank stride, column stride, scale) as rows of one in like's dtype -> it, layout, ranks.

    Keep it until the kernel that reads it is queued: freed earlier, its memory may be given to that kernel's output.
    """
    layout, ranks = _layout(spans)
    out = like.new_empty((ranks, max(8, _ceil(columns, 8) * 8)))
    for (t, stride_i, stride_j, scale), (first, rank, _, _) in zip(matrices, layout):
        rows = out[first : first + _ceil(rank, 16) * 16]
        _call(
            "lora_linear_pack", like, _matrix(rows), rows.shape[0], t.data_ptr(), CODES[t.dtype], stride_i, stride_j, rank,
            columns, _ptr(scale), _stride(scale),
        )  # fmt: skip
    return out, layout, ranks


def _sum(parts, out, scale=None):
    """out [ROWS, COLUMNS] = scale · the sum of parts [PARTS, ROWS, COLUMNS], whose matrices are contiguous"""
    count, rows, columns = parts.shape
    _call(
        "lora_linear_sum",
        out,
        parts.data_ptr(),
        count,
        parts.stride(0),
        rows,
        columns,
        _matrix(out),
        _ptr(scale),
        _stride(scale),
    )


def _sum_columns(parts, out, columns):
    """The same for some columns: out[:, columns] from parts[:, :, columns]"""
    if columns.start == 0 and columns.stop == parts.shape[2]:
        _sum(parts, out)
    else:
        _sum(parts[:, :, columns].contiguous(), out[:, columns])


def _call(name, x, *args):
    with torch.cuda.device_of(x):
        status = getattr(native.cuda(), name)(*args, _stream(x))
    if status:
        raise RuntimeError(f"{name}: CUDA error {status} at {[a for a in args if isinstance(a, int)]}")


def _stream(x) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def _slabs(m: int, tiles: int, device) -> tuple[int, int]:
    """How many slabs of how many rows, so that slabs x tiles programs fill the device twice over."""
    wanted = max(1, 2 * _multiprocessors(device) // max(tiles, 1))
    rows = max(1, _ceil(_ceil(m, wanted), BLOCK_M)) * BLOCK_M
    return _ceil(m, rows), rows


@functools.cache
def _multiprocessors(device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _drop(p: float, seed) -> tuple[int, int, float]:
    if p == 0.0:
        return 0, 0, 1.0
    return seed.data_ptr(), min(math.ceil(p * 2**32), 2**32 - 1), 1.0 / (1.0 - p) if p < 1.0 else 0.0


def _matrix(t) -> tuple[int, int, int]:
    return (0, 0, 0) if t is None else (t.data_ptr(), t.stride(0), CODES[t.dtype])


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
