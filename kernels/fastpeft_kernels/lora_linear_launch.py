"""Launches the Triton kernels of lora_linear: block sizes, grids, workspaces.

All matrices have unit stride in their last dimension; x, dy, s, t and outputs may have any row stride, A and B none.
`spans` says which columns of s and t a projection owns and which number it has in the dropout mask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from . import lora_linear as kernels
from ._launch import capability, dropout, multiprocessors, on_device, precision


class Span(NamedTuple):
    first: int  # column of s and t
    rank: int
    number: int  # of the projection, for its dropout mask


def _spans(spans):
    return {
        "FIRST": tuple(s.first for s in spans),
        "RANKS": tuple(s.rank for s in spans),
        "INDEX": tuple(s.number for s in spans),
    }


def _block(n: int, most: int) -> int:
    return max(16, min(triton.next_power_of_2(n), most))


def _slabs(m: int, tiles: int, block_m: int, device) -> tuple[int, int]:
    """How many slabs of how many rows, so that slabs x tiles programs fill the device twice over."""
    wanted = max(1, 2 * multiprocessors(device) // max(tiles, 1))
    rows = max(1, triton.cdiv(triton.cdiv(m, wanted), block_m)) * block_m
    return triton.cdiv(m, rows), rows


def _sum(parts, out, scale=None):
    """out [ROWS, COLUMNS] = scale · the sum of parts [PARTS, ROWS, COLUMNS], whose matrices are contiguous"""
    count, rows, columns = parts.shape
    if rows == 0 or columns == 0:
        return
    block_c = _block(columns, 256)
    block_m = max(1, 1024 // block_c)
    kernels.sum_kernel[(triton.cdiv(rows, block_m), triton.cdiv(columns, block_c))](
        parts, out, scale, rows, columns, count, parts.stride(0), out.stride(0), _stride(scale),
        BLOCK_M=block_m, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip


def _stride(scale) -> int:
    return 0 if scale is None or scale.dim() == 0 else scale.stride(0)


@on_device
def down(x, a, spans, s, p, seed):
    """s[:, span i] = drop(x) A_iᵀ; x [M, K], A_i [R_i, K]"""
    m, k = x.shape
    total = s.shape[1]
    if m == 0 or total == 0:
        return
    block_r = _block(total, 32 if x.dtype == torch.float32 else 128)
    block_m, block_k = 64, 128
    if x.dtype == torch.float32:
        block_m, block_k = 32, 32
    elif block_r > 64 or p > 0.0:
        block_k = 64
    tiles = triton.cdiv(m, block_m) * triton.cdiv(total, block_r)
    parts = max(1, min(2 * multiprocessors(x.device) // tiles, triton.cdiv(k, 2 * block_k), 16))
    out = s if parts == 1 else torch.empty((parts, m, total), dtype=torch.float32, device=x.device)
    kernels.lora_linear_down_kernel[(triton.cdiv(m, block_m), parts, triton.cdiv(total, block_r))](
        x, tuple(a), out, M=m, K=k, stride_xm=x.stride(0), stride_om=out.stride(-2),
        stride_part=out.stride(0) if parts > 1 else 0, PARTS=parts, PRECISION=precision(x.dtype),
        BLOCK_M=block_m, BLOCK_K=block_k, BLOCK_R=block_r, num_warps=4, num_stages=3, **_spans(spans), **dropout(p, seed),
    )  # fmt: skip
    if parts > 1:
        _sum(out, s)


@on_device
def up(out, s, b, span, scale, bias):
    """out [M, N] += s (scale·B)ᵀ + bias; B [N, R] or None"""
    s, ups, spans = _only(s, b, span)
    _add(out, s, ups, spans, (1, 0 if b is None else span.rank), scale, bias, 0.0, None)


@on_device
def add_down(out, t, a, spans, p, seed):
    """out [M, K] += Σ_i drop_i(t_i A_i); A_i [R_i, K]"""
    _add(out, t, tuple(a), spans, (out.shape[1], 1), None, None, p, seed)


def _add(out, s, ups, spans, up_strides, scale, bias, p, seed):
    m, c = out.shape
    if m == 0 or c == 0 or not (ups or bias is not None):
        return
    block_m, block_c = (32, 64) if out.dtype == torch.float32 else (64, 64 if p > 0.0 else 128)
    kernels.lora_linear_up_kernel[(triton.cdiv(m, block_m), triton.cdiv(c, block_c))](
        out, s, ups, scale, bias, M=m, C=c, stride_om=out.stride(0), stride_sm=s.stride(0), stride_ur=up_strides[0],
        stride_uc=up_strides[1], stride_scale=_stride(scale), PRECISION=precision(out.dtype), BLOCK_M=block_m,
        BLOCK_C=block_c, BLOCK_R=_rank_block(spans, out.dtype), num_warps=4, num_stages=2,
        **_spans(spans), **dropout(p, seed),
    )  # fmt: skip


@on_device
def project(x, weight, bias, lora_bias, s, b, span, scale):
    """y [M, N] = x Wᵀ + s (scale·B)ᵀ + bias + lora_bias in one GEMM; b None: no rank-R term"""
    y = x.new_empty(x.shape[0], weight.shape[0])
    s, ups, spans = _only(s, b, span)
    _gemm(x, weight.t(), y, False, s, ups, spans, (1, 0 if b is None else span.rank), scale, bias, lora_bias, 0.0, None)
    return y


@on_device
def combine(dy, weight, dx, accumulate, t, a, spans, p, seed):
    """dx [M, K] (+)= dy W + Σ_i drop_i(t_i A_i)"""
    _gemm(dy, weight, dx, accumulate, t, tuple(a), spans, (dx.shape[1], 1), None, None, None, p, seed)


def _gemm(left, w, out, accumulate, s, ups, spans, up_strides, scale, bias, lora_bias, p, seed):
    """out [M, C] (+)= left [M, J] · w [J, C] + the rank-R terms"""
    (m, j), c = left.shape, w.shape[1]
    if m == 0 or c == 0:
        return
    w_is_cj = w.stride(1) != 1
    descriptors = capability(left.device)[0] >= 9 and _describable(left) and _describable(w.t() if w_is_cj else w)
    # what 8 warps hold beside the accumulator decides: benches/COMPILED.md, no spills
    block_m, block_c, block_j = 128, 64, 64
    if descriptors and p == 0.0:
        block_c = 128 if accumulate or capability(left.device)[0] != 9 else 256
    if left.dtype == torch.float32:
        block_m, block_c, block_j = 64, 64, 32
    l_arg, w_arg = left, w
    if descriptors:
        l_arg = TensorDescriptor.from_tensor(left, [block_m, block_j])
        w_arg = TensorDescriptor.from_tensor(*((w.t(), [block_c, block_j]) if w_is_cj else (w, [block_j, block_c])))
    programs = min(triton.cdiv(m, block_m) * triton.cdiv(c, block_c), multiprocessors(left.device))
    kernels.lora_linear_gemm_kernel[(programs,)](
        l_arg, w_arg, out, s, ups, scale, bias, lora_bias, M=m, C=c, J=j, stride_lm=left.stride(0),
        stride_wj=w.stride(0), stride_wc=w.stride(1), stride_om=out.stride(0), stride_sm=s.stride(0),
        stride_ur=up_strides[0], stride_uc=up_strides[1], stride_scale=_stride(scale), ACCUMULATE=accumulate,
        DESCRIPTORS=descriptors, W_IS_CJ=w_is_cj, PRECISION=precision(left.dtype), PROGRAMS=programs, BLOCK_M=block_m,
        BLOCK_C=block_c, BLOCK_J=block_j, BLOCK_R=min(_rank_block(spans, out.dtype), 32), GROUP_M=8,
        num_warps=8, num_stages=3, **_spans(spans), **dropout(p, seed),
    )  # fmt: skip


def _only(s, b, span):
    """One projection without dropout: its own columns of s, so that a kernel is compiled once whichever they are."""
    return (s, (), []) if b is None else (s[:, span.first :], (b,), [Span(0, span.rank, 0)])


def _rank_block(spans, dtype) -> int:
    return _block(max((s.rank for s in spans), default=1), 16 if dtype == torch.float32 else 64)


def _describable(t) -> bool:
    """Whether TMA can read it: rows that start at multiples of 16 bytes."""
    size = t.element_size()
    return t.data_ptr() % 16 == 0 and t.stride(0) * size % 16 == 0 and t.stride(1) == 1 and min(t.shape) > 0


@on_device
def grad_up(dy, s, b, scale, ds, db, dbias):
    """ds [M, R] = dy (scale·B), db [N, R] = scale·dyᵀ s, dbias [N] = Σ_m dy; each may be None (not wanted)"""
    (m, n), r = dy.shape, 0 if b is None else b.shape[1]
    if n == 0:
        return
    block_r = _block(r, 32 if dy.dtype == torch.float32 else 128)
    block_n = 32 if dy.dtype == torch.float32 else min(8192 // block_r, _block(n, 256))
    tiles = triton.cdiv(n, block_n)
    slabs, slab_rows = _slabs(m, tiles, 64, dy.device)

    def parts(count, *shape):
        return torch.empty((count, *shape), dtype=torch.float32, device=dy.device)

    ds_parts = None if ds is None else parts(tiles, m, r)
    db_parts = None if db is None else parts(slabs, n, r)
    dbias_parts = None if dbias is None else parts(slabs, 1, n)
    if slabs:
        kernels.lora_linear_grad_up_kernel[(slabs, tiles, triton.cdiv(max(r, 1), block_r))](
            dy, s, b, scale, ds_parts, db_parts, dbias_parts, m, n, r, dy.stride(0), s.stride(0), _stride(scale), slab_rows,
            PRECISION=precision(dy.dtype), BLOCK_M=64, BLOCK_N=block_n, BLOCK_R=block_r, num_warps=8, num_stages=2,
        )  # fmt: skip
    if ds is not None:
        _sum(ds_parts, ds)
    if db is not None:
        _sum(db_parts, db, scale)
    if dbias is not None:
        _sum(dbias_parts, dbias[None])


@on_device
def grad_down(x, t, das, spans, p, seed):
    """das[i] [R_i, K] = t_iᵀ drop_i(x); t [M, ΣR]"""
    (m, k), total = x.shape, t.shape[1]
    block_r = _block(total, 32 if x.dtype == torch.float32 else 128)
    block_k = 32 if x.dtype == torch.float32 else 64 if block_r > 64 or p > 0.0 else 128
    slabs, slab_rows = _slabs(m, triton.cdiv(k, block_k) * triton.cdiv(total, block_r), 64, x.device)
    parts = torch.empty((slabs, total, k), dtype=torch.float32, device=x.device)
    if slabs and k:
        kernels.lora_linear_grad_down_kernel[(slabs, triton.cdiv(k, block_k), triton.cdiv(total, block_r))](
            x, t, parts, M=m, K=k, TOTAL=total, stride_xm=x.stride(0), stride_tm=t.stride(0), slab_rows=slab_rows,
            PRECISION=precision(x.dtype), BLOCK_M=64, BLOCK_K=block_k, BLOCK_R=block_r, num_warps=4, num_stages=3,
            **_spans(spans), **dropout(p, seed),
        )  # fmt: skip
    for da, span in zip(das, spans):
        if da is not None:
            _sum(parts[:, span.first : span.first + span.rank], da)
