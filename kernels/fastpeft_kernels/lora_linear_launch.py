"""Launches the Triton kernels of lora_linear: block sizes, grids, workspaces.

`down`, `up`, `grad_up` and `grad_down` are the passes of `fastpeft.reference.lora_linear`; `project` and `combine` the base
with its rank-R term. Lists have an entry a projection. x, dy, s, t and dx may have any row stride, a and b none.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from . import lora_linear as kernels
from ._launch import capability, dropout, multiprocessors, on_device, precision, ranks_dtype


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


def _owned(adapters, axis) -> list[Span]:
    """One a projection, their ranks side by side; axis: that of an adapter's ranks"""
    ranks = [0 if t is None else t.shape[axis] for t in adapters]
    return [Span(first, r, i) for i, (first, r) in enumerate(zip(itertools.accumulate(ranks, initial=0), ranks))]


def _of_a(a, live=None):
    """The spans of the live projections that have an A, and these."""
    spans = [span for span in _owned(a, 0) if span.rank and (live is None or live[span.number])]
    return spans, tuple(a[span.number] for span in spans)


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
def down(x, a, p, seed):
    """-> s [M, ΣR] = drop(x) A_iᵀ; x [M, K], A_i [R_i, K]"""
    (m, k), (spans, a) = x.shape, _of_a(a)
    total = sum(span.rank for span in spans)
    s = x.new_empty(m, total, dtype=ranks_dtype(x.dtype))
    if m == 0 or total == 0:
        return s
    if len({t.dtype for t in a}) > 1:  # the kernel picks a pointer for each rank
        a = tuple(t.to(s.dtype) for t in a)
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
        x, a, out, M=m, K=k, stride_xm=x.stride(0), stride_om=out.stride(-2),
        stride_part=out.stride(0) if parts > 1 else 0, PARTS=parts, PRECISION=precision(x.dtype),
        BLOCK_M=block_m, BLOCK_K=block_k, BLOCK_R=block_r, num_warps=4, num_stages=3, **_spans(spans), **dropout(p, seed),
    )  # fmt: skip
    if parts > 1:
        _sum(out, s)
    return s


@on_device
def up(ys, s, b, scales, lora_biases):
    """ys, to each of which s_i (scale_i·B_i)ᵀ + lora_bias_i was added in place; B_i [N_i, R_i] or None"""
    for y, b_i, span, scale, bias in zip(ys, b, _owned(b, 1), scales, lora_biases):
        _add(y, *_only(s, b_i, span), scale, bias, 0.0, None)
    return ys


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


def _gemm(left, w, transposed, out, accumulate, s, ups, spans, up_strides, scale, bias, lora_bias, p, seed):
    """out [M, C] (+)= left [M, J] · Wᵀ or W [J, C] + the rank-R terms"""
    w = w.t() if transposed else w
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


@on_device
def project_by(gemm, x, ws, biases, s, b, scales, lora_biases):
    """-> [y_i [M, N_i] = x W_iᵀ + s_i (scale_i·B_i)ᵀ + bias_i + lora_bias_i], a GEMM each; s None: no rank-R terms"""
    ys = [x.new_empty(x.shape[0], w.shape[0]) for w in ws]
    s = x if s is None else s  # not read
    for y, w, bias, b_i, span, scale, lora_bias in zip(ys, ws, biases, b, _owned(b, 1), scales, lora_biases):
        gemm(x, w, True, y, False, *_only(s, b_i, span), scale, bias, lora_bias, 0.0, None)
    return ys


@on_device
def combine_by(gemm, dys, ws, t=None, a=(), live=(), p=0.0, seed=None):
    """-> dx [M, K] = Σ_i dy_i W_i + drop_i(t_i A_i), over live projections; the rank-R terms go with the last GEMM"""
    of, (spans, ups) = [(dy, w) for dy, w in zip(dys, ws) if dy is not None], _of_a(a, live)
    dx = of[0][0].new_empty(of[0][0].shape[0], ws[0].shape[1])
    for i, (dy, w) in enumerate(of):
        last = spans and i == len(of) - 1
        rest = (t, ups, spans) if last else (dy, (), [])
        gemm(dy, w, False, dx, i > 0, *rest, (dx.shape[1], 1), None, None, None, *((p, seed) if last else (0.0, None)))
    return dx


project, combine = functools.partial(project_by, _gemm), functools.partial(combine_by, _gemm)


def _only(s, b, span):
    """One projection without dropout: its own columns of s, so that a kernel is compiled once whichever they are."""
    return (s, (), [], (1, 0)) if b is None else (s[:, span.first :], (b,), [Span(0, span.rank, 0)], (1, span.rank))


def _rank_block(spans, dtype) -> int:
    return _block(max((s.rank for s in spans), default=1), 16 if dtype == torch.float32 else 64)


def _describable(t) -> bool:
    """Whether TMA can read it: rows that start at multiples of 16 bytes."""
    size = t.element_size()
    return t.data_ptr() % 16 == 0 and t.stride(0) * size % 16 == 0 and t.stride(1) == 1 and min(t.shape) > 0


@on_device
def grad_up(dys, s, b, scales, wants_t, needs_b, needs_bias):
    """-> t = dy (scale·B), or None; [dB_i = scale·dy_iᵀ s_i]; [dbias_i = Σ_m dy_i]; None where not needed or without dy_i"""
    whole = all(dy is not None for dy in dys)
    t = None if not wants_t else torch.empty_like(s) if whole else torch.zeros_like(s)
    dbs, dbiases = [None] * len(dys), [None] * len(dys)
    for i, (dy, b_i, span) in enumerate(zip(dys, b, _owned(b, 1))):
        if dy is None:
            continue
        first, rank, _ = span
        dbs[i] = torch.empty_like(b_i) if needs_b[i] and b_i is not None else None
        dbiases[i] = s.new_empty(dy.shape[1], dtype=torch.float32) if needs_bias[i] else None
        ds = t[:, first : first + rank] if wants_t and rank else None
        if any(out is not None for out in (ds, dbs[i], dbiases[i])):
            _grad_up(dy, s[:, first : first + rank], b_i, scales[i], ds, dbs[i], dbiases[i])
    return t, dbs, dbiases


def _grad_up(dy, s, b, scale, ds, db, dbias):
    """ds [M, R] = dy (scale·B), db [N, R] = scale·dyᵀ s, dbias [N] = Σ_m dy; each may be None (not wanted)"""
    (m, n), r = dy.shape, 0 if b is None else b.shape[1]
    block_r = _block(r, 32 if dy.dtype == torch.float32 else 128)
    widest = 128 if dy.dtype == torch.float16 else 256  # dy widened to fp32 beside its copy: 256 spill
    block_n = 32 if dy.dtype == torch.float32 else min(8192 // block_r, _block(n, widest))
    tiles = triton.cdiv(n, block_n)
    slabs, slab_rows = _slabs(m, tiles, 64, dy.device)

    def parts(count, *shape):
        return torch.empty((count, *shape), dtype=torch.float32, device=dy.device)

    ds_parts = None if ds is None else parts(tiles, m, r)
    db_parts = None if db is None else parts(slabs, n, r)
    dbias_parts = None if dbias is None else parts(slabs, 1, n)
    if slabs and tiles:
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
def grad_down(dx, x, t, a, live, needs_a, p, seed):
    """-> dx [M, K] (or None), to which Σ_i drop_i(t_i A_i) was added in place; [dA_i = t_iᵀ drop_i(x)]"""
    spans, ups = _of_a(a, live)
    if dx is not None and spans:
        _add(dx, t, ups, spans, (dx.shape[1], 1), None, None, p, seed)
    wanted = [t is not None and here and needs for t, here, needs in zip(a, live, needs_a)]
    das = [torch.empty_like(a_i) if wants else None for a_i, wants in zip(a, wanted)]
    spans = [span for span in spans if needs_a[span.number]]
    if not spans:
        return dx, das
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
    for span in spans:
        _sum(parts[:, span.first : span.first + span.rank], das[span.number])
    return dx, das
