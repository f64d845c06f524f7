"""The training lane of lora_linear: the usual call with gradients goes from the public function straight to the kernels.

Stands between `lora_linear.py`, which asks here first, and the native passes. After a large GEMM the caches hold none of
Python's own data, so that each line of Python costs about ten times what it costs in a loop: the general path took
1.4 ms of a 36 ms step (2048², M=512, fp32; benches/LOG.md), this one 0.5. Hence one function each way with everything
written out. What is not usual takes the general path, by `lora_linear_op.py` to `lora_linear_cpu.py`, which does the same.
"""

from __future__ import annotations

import torch
from torch._C import _is_any_autocast_enabled

from .. import _native
from .._native import CODES
from ..reference.philox import keep_threshold
from ..weight4bit import Weight4bit, join, split
from . import _backend, linear4bit_cpu
from ._library import plain_call
from .lora_linear_check import seed_tensor
from .lora_linear_cpu import MAX_RANK, check_status, combine, project, small_m
from .lora_linear_lean import constant
from .lora_linear_op import FIRST, gradients, save
from .lora_linear_op import count as count_of


def train(op, x, weights, biases, a, b, scales, lora_biases, dropout_p, seed):
    """-> [y_i [..., N_i]], or None where the call is not a usual one: on the CPU, contiguous, one number as each scale."""
    if (
        not torch.is_grad_enabled()
        or not plain_call(x)
        or _is_any_autocast_enabled()
        or _backend._forced not in ("", "cpu")
        or _native.cpu() is None
    ):
        return None
    constants, dtype = [], x.dtype
    try:
        k = x.shape[-1]
        if not (x.is_cpu and x.is_contiguous() and dtype in CODES and x.numel()):
            return None
        for weight, bias, a_i, b_i, scale, lora_bias in zip(weights, biases, a, b, scales, lora_biases):
            (n, w_k), (r, a_k), (b_n, b_r) = weight.shape, a_i.shape, b_i.shape
            usual = (
                k == w_k == a_k
                and n == b_n
                and 0 < r == b_r <= MAX_RANK
                and n > 0
                and lora_bias is None
                and weight.dtype is dtype
                and a_i.dtype in CODES and b_i.dtype in CODES
                and a_i.is_cpu and b_i.is_cpu and a_i.is_contiguous() and b_i.is_contiguous()
                and (
                    weight.data.is_cpu
                    if type(weight) is Weight4bit
                    else weight.is_cpu and weight.is_contiguous() and not weight.requires_grad
                )
                and (
                    bias is None
                    or bias.shape == (n,) and bias.dtype is dtype and bias.is_contiguous() and bias.is_cpu
                    and not bias.requires_grad
                )
            )  # fmt: skip
            if not usual:
                return None
            constants.append(constant(scale))
        if not 0.0 <= dropout_p < 1.0:
            return None
    except (AttributeError, IndexError, TypeError, ValueError):
        return None
    seed = seed_tensor(op, seed, x.device) if dropout_p else None
    weights, quants, forms = split(weights)
    return _Train.apply(
        forms, dropout_p, _backend._forced, x, seed, *weights, *biases, *a, *b, *constants, *lora_biases, *quants
    )


class _Train(torch.autograd.Function):
    """apply(forms, dropout_p, backend, x, seed, *weights, ..., *lora_biases, *quants) -> ys, as LoraLinear."""

    @staticmethod
    def forward(ctx, forms, dropout_p, backend, x, seed, *flat):
        native, threads, dtype, k, count = (
            _native.cpu(),
            torch.get_num_threads(),
            x.dtype,
            x.shape[-1],
            count_of(flat, forms),
        )
        code, m = CODES[dtype], x.numel() // k
        weights, biases, a, b, scales = (flat[i : i + count] for i in range(0, 5 * count, count))
        bases = join(weights, flat[6 * count :], forms)
        small = not dropout_p and m <= min(small_m(native, dtype, weight) for weight in bases)
        mask = (keep_threshold(dropout_p), dropout_p, int(seed)) if dropout_p else (0, 0.0, 0)
        projections, total = [], 0
        for i, a_i in enumerate(a):
            r = a_i.shape[0]
            projections.append((a_i.data_ptr(), CODES[a_i.dtype], r, k, total, i))
            total += r
        s = torch.empty_strided((m, total), (total, 1), dtype=dtype)
        save(ctx, s, forms, dropout_p, backend, x, seed, *flat)
        x_ptr, x2 = x.data_ptr(), x if x.dim() == 2 else x.view(m, k)
        if not small:
            status = native.lora_linear_down(code, x_ptr, m, k, k, s.data_ptr(), total, projections, *mask, threads)
            check_status(status, "lora_linear_down", m, k, 0, total)
            products = project(x2, bases, biases)
        ys: list[torch.Tensor] = []
        for (a_ptr, a_code, r, _, column, _), weight, bias, b_i, scale in zip(projections, bases, biases, b, scales):
            n = weight.shape[0]
            s_ptr = s.data_ptr() + column * s.element_size()
            if small and forms and type(weight) is Weight4bit:
                y = torch.empty_strided((m, n), (n, 1), dtype=dtype)
                status = native.linear4bit_small(
                    code, x_ptr, m, k, *linear4bit_cpu.arguments(weight), 0 if bias is None else bias.data_ptr(), code,
                    y.data_ptr(), n, s_ptr, total, r, a_ptr, a_code, k, b_i.data_ptr(), CODES[b_i.dtype], r,
                    scale.data_ptr(), 0, 0, 0, linear4bit_cpu.dot(), threads,
                )  # fmt: skip
            elif small:
                y = torch.empty_strided((m, n), (n, 1), dtype=dtype)
                status = native.lora_linear_small(
                    code, x_ptr, m, k, k, weight.data_ptr(), k, n, 0 if bias is None else bias.data_ptr(), code,
                    y.data_ptr(), n, s_ptr, total, r, a_ptr, a_code, k, b_i.data_ptr(), CODES[b_i.dtype], r,
                    scale.data_ptr(), 0, 0, 0, threads,
                )  # fmt: skip
            else:
                y = products[len(ys)]
                status = native.lora_linear_up(
                    code, y.data_ptr(), m, n, n, s_ptr, total, r, b_i.data_ptr(), CODES[b_i.dtype], r,
                    scale.data_ptr(), 0, 0, 0, threads,
                )  # fmt: skip
            check_status(status, "lora_linear_up", m, k, n, r)
            ys.append(y if x2 is x else y.view(*x.shape[:-1], n))
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys):
        saved, count, wanted = ctx.saved_tensors, ctx.n, ctx.needs_input_grad
        trains_all = all(wanted[FIRST + 2 * count : FIRST + 4 * count])
        if not trains_all or any(dy is None for dy in dys) or torch.is_grad_enabled() or not plain_call(dys[0]):
            return gradients(ctx, saved, dys)
        x, s, seed, *flat = saved
        native, threads, (m, total), code = _native.cpu(), torch.get_num_threads(), s.shape, CODES[s.dtype]
        weights, a, b, scales = (flat[i : i + count] for i in range(0, 4 * count, count))
        bases = join(weights, flat[4 * count :], ctx.forms)
        k, size, p = x.shape[-1], s.element_size(), ctx.dropout_p
        mask = (keep_threshold(p), p, int(seed)) if p else (0, 0.0, 0)
        t = torch.empty_strided((m, total), (total, 1), dtype=s.dtype)
        live, das, dbs, projections, column = [], [], [], [], 0
        for i, (dy, a_i, b_i, scale) in enumerate(zip(dys, a, b, scales)):
            n, r = b_i.shape
            dy, da, db = dy.contiguous(), torch.empty_like(a_i), torch.empty_like(b_i)
            status = native.lora_linear_grad_up(
                code, dy.data_ptr(), m, n, n, s.data_ptr() + column * size, total, r, b_i.data_ptr(), CODES[b_i.dtype],
                r, scale.data_ptr(), 0, t.data_ptr() + column * size, total, db.data_ptr(), 0, 0, threads,
            )  # fmt: skip
            check_status(status, "lora_linear_grad_up", m, k, n, r)
            live.append(dy if dy.dim() == 2 else dy.view(m, n))
            projections.append((a_i.data_ptr(), CODES[a_i.dtype], r, k, column, i, da.data_ptr()))
            das.append(da)
            dbs.append(db)
            column += r
        dx = combine(live, bases) if wanted[FIRST - 2] else None
        status = native.lora_linear_grad_down(
            code, x.data_ptr(), m, k, k, 0 if dx is None else dx.data_ptr(), k, t.data_ptr(), total, projections,
            *mask, threads,
        )  # fmt: skip
        check_status(status, "lora_linear_grad_down", m, k, 0, total)
        none = (None,) * count
        if dx is not None and x.dim() != 2:
            dx = dx.view(x.shape)
        return (
            None,
            None,
            None,
            dx,
            None,
            *none,
            *none,
            *das,
            *dbs,
            *none,
            *none,
            *[None] * (3 * count if ctx.forms else 0),
        )
