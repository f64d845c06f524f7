"""The `cpu` backend of lora_linear: PyTorch's GEMM for the base where it is best, native passes for the rank-R parts.

Forward: s = drop(x) Aᵀ of all projections in one read of x; y = x Wᵀ + bias; y += s (scale·B)ᵀ + lora_bias in place.
Backward: one read of dy gives ds and dB (and dbias); dx = dy W; one pass over x and dx gives dA and adds ds A.
For few rows the forward is a single native region, base included (`lora_linear_small`); most such calls of inference
reach it from `lora_linear_lean.py` and do not pass here.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

from .. import _machine, _native
from .._native import CODES
from ..reference.lora_linear import contiguous_rows, leading_shape
from ..reference.philox import keep_threshold
from ..weight4bit import Weight4bit
from . import linear4bit_cpu

MAX_RANK = 512
_PLANS = json.loads(Path(__file__).with_name("lora_linear.plans.json").read_text())["cpu"]
# Up to this many rows the native kernel reads the weight faster than PyTorch's GEMM does, or decodes it faster than into slabs.
SMALL_M, SMALL_M_4BIT = (
    {isa: {getattr(torch, dtype): m for dtype, m in by.items()} for isa, by in _PLANS[key].items()}
    for key in ("small_m", "small_m_4bit")
)


def can(meta) -> str | None:
    x = meta[0]
    if _native.cpu() is None:
        return _native.why_not_cpu()
    if x.device.type != "cpu":
        return f"tensors are on {x.device}"
    return unfit(meta)


def unfit(meta) -> str | None:
    """Why no native kernel, of this backend or a GPU's, takes these dtypes and ranks; None if it does."""
    x, a, b, _ = meta
    if x.dtype not in CODES:
        return f"x is {x.dtype}, not among float32, bfloat16, float16"
    for a_i, b_i in zip(a, b):
        if a_i is None:
            continue
        if a_i.dtype not in CODES or b_i.dtype not in CODES:
            return f"a is {a_i.dtype} and b {b_i.dtype}: it takes float32, bfloat16 and float16"
        if a_i.shape[0] > MAX_RANK:
            return f"a and b have rank {a_i.shape[0]}: it takes up to {MAX_RANK}"
    return None


def forward(x, weights, biases, a, b, scales, lora_biases, dropout_p, seed):
    native, threads = _native.cpu(), torch.get_num_threads()
    x2, code = contiguous_rows(x), CODES[x.dtype]
    m, k = x2.shape
    a, b = [_rows(t) for t in a], [_rows(t) for t in b]
    ranks = [0 if t is None else t.shape[0] for t in a]
    s = x2.new_empty(m, sum(ranks))
    total = s.shape[1]
    most = min(small_m(native, x.dtype, weight) for weight in weights)
    small = 0 < m <= most and dropout_p == 0.0 and k > 0
    if not small:
        _down(native, code, x2, s, a, ranks, dropout_p, seed, threads)
    bases = None if small else project(x2, weights, biases)
    ys, column = [], 0
    for i, weight in enumerate(weights):
        bias, lora_bias, n, r = _wide(biases[i]), _wide(lora_biases[i]), weight.shape[0], ranks[i]
        s_i = _at(s, column)
        a_args = (_ptr(a[i]), _code(a[i]), k)
        b_args = (_ptr(b[i]), _code(b[i]), r, _ptr(scales[i]), _stride(scales[i]))
        if small and isinstance(weight, Weight4bit) and n > 0:
            y = x2.new_empty(m, n)
            status = native.linear4bit_small(
                code, x2.data_ptr(), m, k, *linear4bit_cpu.arguments(weight), _ptr(bias), _code(bias), y.data_ptr(), n,
                s_i, total, r, *a_args, *b_args, _ptr(lora_bias), _code(lora_bias),
                linear4bit_cpu.dot(), threads,
            )  # fmt: skip
            check_status(status, "linear4bit_small", m, k, n, r)
        elif small and n > 0 and weight.stride(1) == 1:
            y = x2.new_empty(m, n)
            status = native.lora_linear_small(
                code, x2.data_ptr(), m, k, k, weight.data_ptr(), weight.stride(0), n, _ptr(bias), _code(bias),
                y.data_ptr(), n, s_i, total, r, *a_args, *b_args, _ptr(lora_bias), _code(lora_bias), threads,
            )  # fmt: skip
            check_status(status, "lora_linear_small", m, k, n, r)
        else:
            if small:
                _down(native, code, x2, s[:, column : column + r], [a[i]], [r], 0.0, None, threads)
            y = bases[i] if bases else project(x2, [weight], [biases[i]])[0]
            if r or lora_bias is not None:
                status = native.lora_linear_up(
                    code, y.data_ptr(), m, n, n, s_i, total, r, *b_args, _ptr(lora_bias), _code(lora_bias), threads
                )
                check_status(status, "lora_linear_up", m, k, n, r)
        ys.append(leading_shape(y, x))
        column += r
    return ys, s


def backward(dys, x, s, weights, a, b, scales, dropout_p, seed, needs_x, needs_a, needs_b, needs_bias):
    native, threads = _native.cpu(), torch.get_num_threads()
    code, k = CODES[s.dtype], weights[0].shape[1]
    m, total = s.shape
    rows = next(dy.shape[:-1] for dy in dys if dy is not None)
    x2 = contiguous_rows(x) if any(needs_a) else None
    a, b = [_rows(t) for t in a], [_rows(t) for t in b]
    t = torch.empty_like(s)
    live, das, dbs, dbiases, projections, column = [], [], [], [], [], 0
    for i, weight in enumerate(weights):
        n, r = weight.shape[0], 0 if a[i] is None else a[i].shape[0]
        da = db = dbias = None
        if dys[i] is not None:
            dy = contiguous_rows(dys[i])
            live.append((dy, weight))
            da = torch.empty_like(a[i]) if needs_a[i] else None
            db = torch.empty_like(b[i]) if needs_b[i] else None
            dbias = s.new_empty(n, dtype=torch.float32) if needs_bias[i] else None
            wants_t = r and (needs_x or needs_a[i])
            if wants_t or db is not None or dbias is not None:
                status = native.lora_linear_grad_up(
                    code, dy.data_ptr(), m, n, n, _at(s, column), total, r, _ptr(b[i]), _code(b[i]), r,
                    _ptr(scales[i]), _stride(scales[i]), _at(t, column) if wants_t else 0, total,
                    _ptr(db), _ptr(dbias), 0, threads,
                )  # fmt: skip
                check_status(status, "lora_linear_grad_up", m, k, n, r)
            if wants_t:
                projections.append((a[i].data_ptr(), _code(a[i]), r, k, column, i, _ptr(da)))
        das.append(da)
        dbs.append(db)
        dbiases.append(dbias)
        column += r
    dx = combine(*zip(*live)) if needs_x else None
    if projections:
        status = native.lora_linear_grad_down(
            code, _ptr(x2), m, k, k, _ptr(dx), k, t.data_ptr(), total, projections,
            keep_threshold(dropout_p), dropout_p, _key(seed), threads,
        )  # fmt: skip
        check_status(status, "lora_linear_grad_down", m, k, 0, total)
    return None if dx is None else dx.view(*rows, k), das, dbs, dbiases


def _down(native, code, x2, s, a, ranks, dropout_p, seed, threads):
    projections, column = [], 0
    for i, r in enumerate(ranks):
        if r:
            projections.append((a[i].data_ptr(), _code(a[i]), r, x2.shape[1], column, i))
        column += r
    if projections:
        status = native.lora_linear_down(
            code, x2.data_ptr(), *x2.shape, x2.shape[1], s.data_ptr(), s.stride(0), projections,
            keep_threshold(dropout_p), dropout_p, _key(seed), threads,
        )  # fmt: skip
        check_status(status, "lora_linear_down", *x2.shape, 0, s.shape[1])


def project(x, weights, biases):
    """[x W_iᵀ + bias_i] of x [M, K], W_i [N_i, K], bias_i [N_i] or None, by PyTorch's GEMM.

    Where its bf16 GEMM is slower than its fp32 one, slabs of the operands are widened to fp32: exact products, one rounding.
    A 4-bit weight is decoded slab by slab, into fp32 there, else into x's dtype.
    """
    dtypes = [_slab_dtype(x, w) for w in weights]
    if not any(dtypes):
        return [
            torch.mm(x, w.t()) if bias is None else torch.addmm(bias.to(x.dtype), x, w.t())
            for w, bias in zip(weights, biases)
        ]
    ys = [x.new_empty(x.shape[0], w.shape[0]) for w in weights]
    for m in _slabs(x.shape[0], _PLANS["widen"]["rows"]):
        rows = {dtype: x[m].to(dtype or x.dtype) for dtype in set(dtypes)}
        for y, w, bias, dtype in zip(ys, weights, biases, dtypes):
            wide = rows[dtype]
            for n in _slabs(w.shape[0], _slab_size(w, w.shape[1])):
                part = _slab(w, n, slice(0, w.shape[1]), wide.dtype).t()
                y[m, n] = wide @ part if bias is None else torch.addmm(bias[n].to(wide.dtype), wide, part)
    return ys


def combine(dys, weights):
    """Σ dy_i W_i [M, K] of dy_i [M, N_i], W_i [N_i, K]; as `project`."""
    dy, w = dys[0], weights[0]
    if (
        len(weights) == 1
        and isinstance(w, Weight4bit)
        and w.tiled
        and dy.shape[0] <= small_m(_native.cpu(), dy.dtype, w)
    ):
        return linear4bit_cpu.grad_small(dy, w)
    dtypes = [_slab_dtype(dy, w) for w in weights]
    if not any(dtypes):
        dx = torch.mm(dy, w)
        for dy, w in zip(dys[1:], weights[1:]):
            dx.addmm_(dy, w)
        return dx
    dtype = torch.float32 if torch.float32 in dtypes else dy.dtype
    dx = dy.new_empty(dy.shape[0], w.shape[1])
    for m in _slabs(dy.shape[0], _PLANS["widen"]["rows"]):
        wide = [dy[m].to(dtype) for dy in dys]
        for k in _slabs(w.shape[1], _slab_size(w, w.shape[0])):
            total = wide[0] @ _slab(w, slice(0, w.shape[0]), k, dtype)
            for dy, other in zip(wide[1:], weights[1:]):
                total.addmm_(dy, _slab(other, slice(0, other.shape[0]), k, dtype))
            dx[m, k] = total
    return dx


def _slab_dtype(x, w) -> torch.dtype | None:
    """In which dtype slabs of w are multiplied by rows of x's dtype; None: w is multiplied whole."""
    if isinstance(w, Weight4bit):
        narrow = x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and _slow_bf16())
        return torch.float32 if narrow else x.dtype
    widens = x.dtype == torch.bfloat16 and x.shape[0] >= _PLANS["widen"]["min_m"] and _slow_bf16()
    return torch.float32 if widens else None


def _slab_size(w, length: int) -> int:
    """How many rows or columns of that length make a slab."""
    if isinstance(w, Weight4bit):
        return max(64, linear4bit_cpu.ROOM // length // 64 * 64)
    return _PLANS["widen"]["columns"]


def _slab(w, n: slice, k: slice, dtype):
    """w[n, k] in `dtype`"""
    if isinstance(w, torch.Tensor):
        return w[n, k].to(dtype)
    return linear4bit_cpu.dequantize(w, linear4bit_cpu.room(n.stop - n.start, k.stop - k.start, dtype), n, k)


def small_m(native, dtype, weight) -> int:
    if isinstance(weight, Weight4bit):
        most = SMALL_M_4BIT[native.isa()][dtype]
        if (
            dtype == torch.bfloat16 and not _slow_bf16()
        ):  # predicted, not measured: PyTorch's GEMM is 2 to 4 times faster there
            most = min(most, _PLANS["small_m_4bit_fast_bf16"]["dot" if linear4bit_cpu.dot() else "amx"])
        return most if weight.tiled else min(most, _PLANS["decode"]["native_small_m"])
    return SMALL_M[native.isa()][dtype]


def _slabs(n: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


@functools.cache
def _slow_bf16() -> bool:
    """x86 without a bf16 matrix unit or full-rate bf16 dot product: PyTorch's fp32 GEMM is faster (benches/LOG.md)."""
    cpu = _machine.cpu()
    full_rate = cpu["amx"] or ("AVX512-BF16" in cpu["isa"] and "AMD" in cpu["model"])
    return cpu["architecture"] == "x86_64" and not full_rate


def _rows(t):
    return None if t is None else t.contiguous()


def _wide(t):
    """A bias as the kernels take it: contiguous, one of the three dtypes."""
    return t if t is None or (t.dtype in CODES and t.is_contiguous()) else t.float().contiguous()


def _ptr(t) -> int:
    return 0 if t is None else t.data_ptr()


def _at(s, column: int) -> int:
    return s.data_ptr() + column * s.element_size()


def _code(t) -> int:
    return 0 if t is None else CODES[t.dtype]


def _stride(scale) -> int:
    return 0 if scale is None or scale.dim() == 0 else scale.stride(0)


def _key(seed) -> int:
    return 0 if seed is None else int(seed)


def check_status(status: int, kernel: str, m: int, k: int, n: int, r: int) -> None:
    if status:
        raise MemoryError(f"{kernel}: no memory for its workspace at M={m}, K={k}, N={n}, R={r} (status {status})")
