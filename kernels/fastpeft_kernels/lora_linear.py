"""lora_linear in Triton: the kernels, each with its formula. `lora_linear_launch.py` launches them.

    down       s = drop(x) Aᵀ            of all projections, x read once
    gemm       y = x Wᵀ + s (scale·B)ᵀ + bias, or dx = dy W + drop'(t A): the rank-R term inside the base GEMM's accumulator
    up         the same rank-R term added to a result of another GEMM, in place
    grad_up    ds = dy (scale·B), dB = scale·dyᵀ s, dbias = Σ dy: one read of dy
    grad_down  dA = tᵀ drop(x)           of all projections, x read once; t holds their ds side by side

Shapes: x [M, K], W [N, K], A [R, K], B [N, R], s and t [M, ΣR], dy [M, N]. A projection owns the columns
FIRST[i] .. FIRST[i] + RANKS[i] - 1 of s and t. Sums are fp32; s, t and results are rounded once. Sums over programs go
through partial results in fp32 and `sum_kernel`, so that they are the same in every run.

With fp16 x, s and t are fp32, and products with them, with A and scale·B are of TF32: fp16's range does not hold these,
TF32 has fp32's, and fp16's mantissa (10 bits; x and dy are exact in it). A power of two for each tile, which would keep
fp16's rate, needs the tile's maximum first, and what is 2^-24 below it is lost.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._philox import keep


@triton.jit
def widened(v):
    """x or dy as a product with a rank-R operand takes it"""
    if v.dtype == tl.float16:
        v = v.to(tl.float32)
    return v


@triton.jit
def rounded(v, DTYPE: tl.constexpr):
    """A rank-R operand where x is of DTYPE. TF32 is rounded here, to the nearest: a product cuts its low bits off."""
    if DTYPE == tl.float16:  # noqa: SIM300  (a constexpr is asked, not the dtype)
        v = v.to(tl.float32)
        bits = (v.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        v = tl.where(v == v, bits.to(tl.float32, bitcast=True), v)
    else:
        v = v.to(DTYPE)
    return v


@triton.jit
def lora_linear_down_kernel(
    x_ptr, a_ptrs, out_ptr, seed_ptr, keep_threshold, keep_value, M, K, stride_xm, stride_om, stride_part,
    FIRST: tl.constexpr, RANKS: tl.constexpr, INDEX: tl.constexpr, PARTS: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[part, m, r] = Σ_k drop(x)[m, k] A[r, k], over every PARTS-th block of K"""
    part = tl.program_id(1)
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    a_rows = a_ptrs[0] + (ranks - FIRST[0]).to(tl.int64) * K
    owned = (ranks >= FIRST[0]) & (ranks < FIRST[0] + RANKS[0])
    for i in tl.static_range(1, len(RANKS)):
        mine = (ranks >= FIRST[i]) & (ranks < FIRST[i] + RANKS[i])
        a_rows = tl.where(mine, a_ptrs[i] + (ranks - FIRST[i]).to(tl.int64) * K, a_rows)
        owned = owned | mine
    seed = tl.load(seed_ptr) if DROPOUT else 0
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(part * BLOCK_K, K, PARTS * BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        # [BLOCK_M, BLOCK_K]
        x = tl.load(
            x_ptr + rows[:, None] * stride_xm + ks[None, :], mask=(rows < M)[:, None] & (ks < K)[None, :], other=0.0
        )
        # [BLOCK_R, BLOCK_K]
        a = tl.load(a_rows[:, None] + ks[None, :], mask=owned[:, None] & (ks < K)[None, :], other=0.0)
        a, x = rounded(a, x_ptr.dtype.element_ty), widened(x)
        if DROPOUT:
            for i in tl.static_range(len(RANKS)):
                mine = (ranks >= FIRST[i]) & (ranks < FIRST[i] + RANKS[i])
                x_i = tl.where(keep(seed, rows, k, INDEX[i], keep_threshold, BLOCK_M, BLOCK_K), x, 0.0)
                acc = tl.dot(
                    x_i.to(x.dtype), tl.where(mine[:, None], a, 0.0).to(x.dtype).T, acc, input_precision=PRECISION
                )
        else:
            acc = tl.dot(x, a.T, acc, input_precision=PRECISION)
    if DROPOUT:
        acc *= keep_value
    out = out_ptr + part * stride_part + rows[:, None] * stride_om + ranks[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(rows < M)[:, None] & owned[None, :])


@triton.jit
def add_rank_term(
    acc, rows, columns, s_ptr, up_ptrs, scale_ptr, seed_ptr, keep_threshold, keep_value, M, C, stride_sm, stride_ur,
    stride_uc, stride_scale, FIRST: tl.constexpr, RANKS: tl.constexpr, INDEX: tl.constexpr, DROPOUT: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc[m, c] + Σ_i drop_i(Σ_r s[m, FIRST[i] + r] · scale[r]·up_i[r, c]), fp32; scale·up is `rounded`, as s is; DTYPE: x's"""
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_C: tl.constexpr = acc.shape[1]
    for i in tl.static_range(len(RANKS)):
        term = tl.zeros((BLOCK_M, BLOCK_C), tl.float32) if DROPOUT else acc
        for r in range(0, RANKS[i], BLOCK_R):
            ranks = r + tl.arange(0, BLOCK_R)
            inside = ranks < RANKS[i]
            # [BLOCK_M, BLOCK_R]
            s = tl.load(
                s_ptr + rows[:, None] * stride_sm + (FIRST[i] + ranks)[None, :],
                mask=(rows < M)[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            # [BLOCK_R, BLOCK_C]
            up = tl.load(
                up_ptrs[i] + ranks.to(tl.int64)[:, None] * stride_ur + columns.to(tl.int64)[None, :] * stride_uc,
                mask=inside[:, None] & (columns < C)[None, :], other=0.0,
            )  # fmt: skip
            if scale_ptr is not None:
                scale = tl.load(scale_ptr + ranks * stride_scale, mask=inside, other=0.0)
                up = up.to(tl.float32) * scale.to(tl.float32)[:, None]
            term = tl.dot(rounded(s, DTYPE), rounded(up, DTYPE), term, input_precision=PRECISION)
        if DROPOUT:
            first = tl.min(columns, 0)
            kept = keep(tl.load(seed_ptr), rows, first, INDEX[i], keep_threshold, BLOCK_M, BLOCK_C)
            acc += tl.where(kept, term * keep_value, 0.0)
        else:
            acc = term
    return acc


@triton.jit
def lora_linear_up_kernel(
    out_ptr, s_ptr, up_ptrs, scale_ptr, bias_ptr, seed_ptr, keep_threshold, keep_value, M, C, stride_om, stride_sm,
    stride_ur, stride_uc, stride_scale, FIRST: tl.constexpr, RANKS: tl.constexpr, INDEX: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[m, c] += Σ_i drop_i(s_i · scale·up_i)[m, c] + bias[c]"""
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (rows < M)[:, None] & (columns < C)[None, :]
    # [BLOCK_M, BLOCK_C]
    out = out_ptr + rows[:, None] * stride_om + columns[None, :]
    acc = tl.load(out, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    acc = add_rank_term(
        acc, rows, columns, s_ptr, up_ptrs, scale_ptr, seed_ptr, keep_threshold, keep_value, M, C, stride_sm, stride_ur,
        stride_uc, stride_scale, FIRST, RANKS, INDEX, DROPOUT, out_ptr.dtype.element_ty, PRECISION, BLOCK_R,
    )  # fmt: skip
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def lora_linear_gemm_kernel(
    l_ptr, w_ptr, out_ptr, s_ptr, up_ptrs, scale_ptr, bias_ptr, lora_bias_ptr, seed_ptr, keep_threshold, keep_value, M, C,
    J, stride_lm, stride_wj, stride_wc, stride_om, stride_sm, stride_ur, stride_uc, stride_scale,
    FIRST: tl.constexpr, RANKS: tl.constexpr, INDEX: tl.constexpr, DROPOUT: tl.constexpr, ACCUMULATE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, W_IS_CJ: tl.constexpr, PRECISION: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out[m, c] (+)= Σ_j l[m, j] w[j, c] + Σ_i drop_i(s_i · scale·up_i)[m, c] + bias[c] + lora_bias[c]

    Forward: l = x, w = Wᵀ, up = Bᵀ. Backward: l = dy, w = W, up_i = A_i. With DESCRIPTORS (TMA), l_ptr and w_ptr are tensor
    descriptors of [M, J] and of [C, J] if W_IS_CJ, else [J, C].
    """
    tiles_m, tiles_c = tl.cdiv(M, BLOCK_M), tl.cdiv(C, BLOCK_C)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_c, PROGRAMS, flatten=DESCRIPTORS):
        # GROUP_M rows of tiles at a time, so that programs that run together share operands in L2
        group = tile // (GROUP_M * tiles_c)
        in_group = min(tiles_m - group * GROUP_M, GROUP_M)
        m = (group * GROUP_M + tile % (GROUP_M * tiles_c) % in_group) * BLOCK_M
        c = tile % (GROUP_M * tiles_c) // in_group * BLOCK_C
        rows = tl.cast(m, tl.int64) + tl.arange(0, BLOCK_M)
        columns = c + tl.arange(0, BLOCK_C)
        inside = (rows < M)[:, None] & (columns < C)[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for j in range(0, J, BLOCK_J):
            if DESCRIPTORS:
                left = l_ptr.load([m, j])
                w = w_ptr.load([c, j]).T if W_IS_CJ else w_ptr.load([j, c])
            else:
                js = j + tl.arange(0, BLOCK_J)
                # [BLOCK_M, BLOCK_J]
                left = tl.load(
                    l_ptr + rows[:, None] * stride_lm + js[None, :],
                    mask=(rows < M)[:, None] & (js < J)[None, :],
                    other=0.0,
                )
                # [BLOCK_J, BLOCK_C]
                w = tl.load(
                    w_ptr + js.to(tl.int64)[:, None] * stride_wj + columns.to(tl.int64)[None, :] * stride_wc,
                    mask=(js < J)[:, None] & (columns < C)[None, :], other=0.0,
                )  # fmt: skip
            acc = tl.dot(left, w, acc, input_precision=PRECISION)
        if len(RANKS) > 0:
            acc = add_rank_term(
                acc, rows, columns, s_ptr, up_ptrs, scale_ptr, seed_ptr, keep_threshold, keep_value, M, C, stride_sm,
                stride_ur, stride_uc, stride_scale, FIRST, RANKS, INDEX, DROPOUT, out_ptr.dtype.element_ty, PRECISION, BLOCK_R,
            )  # fmt: skip
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
        if lora_bias_ptr is not None:
            acc += tl.load(lora_bias_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
        out = out_ptr + rows[:, None] * stride_om + columns[None, :]
        if ACCUMULATE:
            acc += tl.load(out, mask=inside, other=0.0).to(tl.float32)
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def lora_linear_grad_up_kernel(
    dy_ptr, s_ptr, b_ptr, scale_ptr, ds_ptr, db_ptr, dbias_ptr, M, N, R, stride_dm, stride_sm, stride_scale, slab_rows,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """ds[column tile, m, r] = Σ_n dy[m, n] scale·B[n, r];  dB[slab, n, r] = Σ_m dy[m, n] s[m, r];  dbias[slab, n] = Σ_m dy

    A program takes a slab of rows and a tile of columns. What is None is not wanted.
    """
    slab, tile = tl.program_id(0), tl.program_id(1)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    of_b = columns.to(tl.int64)[:, None] * R + ranks[None, :]  # [BLOCK_N, BLOCK_R]
    in_b = (columns < N)[:, None] & (ranks < R)[None, :]
    dtype = dy_ptr.dtype.element_ty
    if ds_ptr is not None:
        scale = tl.load(scale_ptr + ranks * stride_scale, mask=ranks < R, other=0.0)
        b = tl.load(b_ptr + of_b, mask=in_b, other=0.0)
        b = rounded(b.to(tl.float32) * scale.to(tl.float32)[None, :], dtype)
    db = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    for m in range(slab * slab_rows, min(M, (slab + 1) * slab_rows), BLOCK_M):
        rows = tl.cast(m, tl.int64) + tl.arange(0, BLOCK_M)
        # [BLOCK_M, BLOCK_N]
        dy = tl.load(
            dy_ptr + rows[:, None] * stride_dm + columns[None, :],
            mask=(rows < M)[:, None] & (columns < N)[None, :],
            other=0.0,
        )
        in_s = (rows < M)[:, None] & (ranks < R)[None, :]
        if ds_ptr is not None:
            ds = tl.dot(widened(dy), b, input_precision=PRECISION)
            tl.store(ds_ptr + (tile.to(tl.int64) * M + rows)[:, None] * R + ranks[None, :], ds, mask=in_s)
        if db_ptr is not None:
            s = tl.load(s_ptr + rows[:, None] * stride_sm + ranks[None, :], mask=in_s, other=0.0)
            db = tl.dot(widened(dy).T, rounded(s, dtype), db, input_precision=PRECISION)
        if dbias_ptr is not None:
            dbias += tl.sum(dy.to(tl.float32), 0)
    if db_ptr is not None:
        tl.store(db_ptr + slab.to(tl.int64) * N * R + of_b, db, mask=in_b)
    if dbias_ptr is not None:  # noqa: SIM102  (asked by the compiler)
        if tl.program_id(2) == 0:
            tl.store(dbias_ptr + slab.to(tl.int64) * N + columns, dbias, mask=columns < N)


@triton.jit
def lora_linear_grad_down_kernel(
    x_ptr, t_ptr, da_ptr, seed_ptr, keep_threshold, keep_value, M, K, TOTAL, stride_xm, stride_tm, slab_rows,
    FIRST: tl.constexpr, RANKS: tl.constexpr, INDEX: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dA[slab, r, k] = Σ_m t[m, r] drop(x)[m, k]"""
    slab, k = tl.program_id(0), tl.program_id(1) * BLOCK_K
    ks = k + tl.arange(0, BLOCK_K)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for m in range(slab * slab_rows, min(M, (slab + 1) * slab_rows), BLOCK_M):
        rows = tl.cast(m, tl.int64) + tl.arange(0, BLOCK_M)
        # [BLOCK_M, BLOCK_K]
        x = tl.load(
            x_ptr + rows[:, None] * stride_xm + ks[None, :], mask=(rows < M)[:, None] & (ks < K)[None, :], other=0.0
        )
        # [BLOCK_M, BLOCK_R]
        t = tl.load(
            t_ptr + rows[:, None] * stride_tm + ranks[None, :],
            mask=(rows < M)[:, None] & (ranks < TOTAL)[None, :],
            other=0.0,
        )
        t, x = rounded(t, x_ptr.dtype.element_ty), widened(x)
        if DROPOUT:
            for i in tl.static_range(len(RANKS)):
                mine = (ranks >= FIRST[i]) & (ranks < FIRST[i] + RANKS[i])
                x_i = tl.where(keep(seed, rows, k, INDEX[i], keep_threshold, BLOCK_M, BLOCK_K), x, 0.0).to(x.dtype)
                acc = tl.dot(tl.where(mine[None, :], t, 0.0).to(x.dtype).T, x_i, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(t.T, x, acc, input_precision=PRECISION)
    if DROPOUT:
        acc *= keep_value
    da = da_ptr + (slab.to(tl.int64) * TOTAL + ranks)[:, None] * K + ks[None, :]
    tl.store(da, acc, mask=(ranks < TOTAL)[:, None] & (ks < K)[None, :])


@triton.jit
def sum_kernel(
    parts_ptr, out_ptr, scale_ptr, ROWS, COLUMNS, PARTS, stride_part, stride_om, stride_scale,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[m, c] = scale[c] · Σ_part parts[part, m, c]; the parts in order"""
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    parts = parts_ptr + rows[:, None] * COLUMNS + columns[None, :]  # [BLOCK_M, BLOCK_C]
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for part in range(PARTS):
        total += tl.load(parts + tl.cast(part, tl.int64) * stride_part, mask=inside, other=0.0)
    if scale_ptr is not None:
        total *= tl.load(scale_ptr + columns * stride_scale, mask=columns < COLUMNS, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + rows[:, None] * stride_om + columns[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)
