"""prefix_attention in Triton: the kernels, each with its formula. `prefix_attention_launch.py` launches them.

    s^x = scale·q·kᵀ + mask,  s^p = scale·Gk⊙(q·pkᵀ) + β;  joint: one softmax over both, separate: two, the prefix's times c

    (no name)    o, lse                       of a block of queries: its tokens, then its prefix
    delta        Δ = Σ_d do·o                 and separate: δ = do·o_p of the prefix, without c
    grad_query   dq, dGk, dGv                 of a block of queries
    grad_token   dk, dv                       of a block of tokens, over the group's heads and all queries
    grad_prefix  dpk, dpv, dβ                 of a block of prefix positions, over a share of the batch and of the queries

Shapes: q, o, do [B, H, T, D]; k, v [B, Hk, S, D]; pk, pv [A, Hk, P, D], or flat [Hk, ΣP, D]; gates [B, H, T, P] by strides of
0 where they broadcast; β [A or 1, H, P] or [1, H, ΣP]; c [A or 1, H]; lse, Δ [B, H, T], fp32. `prefix` is the tuple of pk, pv,
Gk, Gv, β, c, index, lengths and offsets, `prefix_strides` that of the first six's. t, n and j number queries, tokens and a
row's own prefix positions; helpers take them as [BLOCK, 1] and [1, BLOCK] either way round. Exponents
are in UNIT, log2(e) for base 2, which saves a product a weight; 1 for fp32, whose lse would lose 3 eps to base 2 and back.
Weights and dS are rounded to q's dtype before a product, sums are fp32. Sums over programs go through partial results, added
up in order, so that they are the same in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._philox import keep, keep_at
from .lora_linear import rounded, widened

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(ptr, rows, stride, limit, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D]; zeros from row `limit` (None: all are there) and column D on"""
    ds = tl.arange(0, BLOCK_D)
    tile = ptr + rows.to(tl.int64)[:, None] * stride + ds[None, :]
    if limit is not None:
        inside = (rows < limit)[:, None]
        if D < BLOCK_D:
            inside = inside & (ds < D)[None, :]
        return tl.load(tile, mask=inside, other=0.0)
    elif D < BLOCK_D:
        return tl.load(tile, mask=(ds < D)[None, :], other=0.0)
    else:
        return tl.load(tile)


@triton.jit
def store_rows(ptr, value, rows, stride, limit, D: tl.constexpr, BLOCK_D: tl.constexpr):
    ds = tl.arange(0, BLOCK_D)
    inside = (rows < limit)[:, None] & (ds < D)[None, :]
    tl.store(ptr + rows.to(tl.int64)[:, None] * stride + ds[None, :], value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def token_scores(
    s, t, n, mask_ptr, mask_strides, b, h, T, S, CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    """s with the mask added, -inf where query t does not see token n. The last query sees the last token."""
    seen = n < S
    if CAUSAL:
        seen = seen & (n <= t + (S - T))
    if mask_ptr is not None:
        tile = mask_ptr + b * mask_strides[0] + h * mask_strides[1] + n.to(tl.int64) * mask_strides[3]
        if KEY_MASK:
            mask = tl.load(tile, mask=n < S, other=0)
        else:
            mask = tl.load(tile + t.to(tl.int64) * mask_strides[2], mask=(n < S) & (t < T), other=0)
        if mask.dtype == tl.uint8:
            seen = seen & (mask != 0)
        else:
            mask = mask.to(tl.float32)
            s += mask * UNIT
            seen = seen & (
                mask > -3.3e38
            )  # the least bfloat16 and float32 are meant as -inf: a row of them sees nothing
    return tl.where(seen, s, float("-inf"))


@triton.jit
def own_prefix(prefix, b, A, P, TOTAL):
    """-> which adapter row b has, where its prefix starts among the flat ones (else 0), how long it is; is its index bad"""
    index_ptr, lengths_ptr, offsets_ptr = prefix[6], prefix[7], prefix[8]
    a = tl.load(index_ptr + b).to(tl.int64) if index_ptr is not None else b * 0
    valid = (a >= 0) & (a < A)
    bad = (a < -1) | (a >= A)
    a = tl.where(valid, a, 0)
    start = b * 0
    length = P
    if offsets_ptr is not None:
        start = tl.load(offsets_ptr + a, mask=valid, other=0)
        end = tl.load(offsets_ptr + a + 1, mask=valid, other=0)
        length = tl.minimum(end, TOTAL) - start
        length = tl.minimum(tl.where(start >= 0, length, 0), P).to(tl.int32)
    if lengths_ptr is not None:
        length = tl.minimum(length, tl.load(lengths_ptr + a, mask=valid, other=0))
    return a, start, tl.where(valid, length, 0), bad


@triton.jit
def prefix_rows(ptr, strides, a, kv_head, start):
    return ptr + a * strides[0] + kv_head * strides[1] + start * strides[2]


@triton.jit
def gate(ptr, strides, b, h, t, j, inside):
    """A tile of Gk or Gv; 1 where there is none"""
    if ptr is None:
        return 1.0
    else:
        at = b * strides[0] + h * strides[1] + t.to(tl.int64) * strides[2] + j.to(tl.int64) * strides[3]
        return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def prefix_scores(s, gate_k, log_bias_ptr, strides, a, start, h, j, inside, UNIT: tl.constexpr):
    """s^p of s = scale·q·pkᵀ, both in UNIT; -inf outside"""
    s = s * gate_k
    if log_bias_ptr is not None:
        at = a * strides[0] + h * strides[1] + (start + j) * strides[2]
        s += tl.load(log_bias_ptr + at, mask=inside, other=0.0).to(tl.float32) * UNIT
    return tl.where(inside, s, float("-inf"))


@triton.jit
def gate_out(prefix, strides, a, h):
    """c, 1 where there is none"""
    if prefix[5] is None:
        return 1.0
    else:
        return tl.load(prefix[5] + a * strides[5][0] + h * strides[5][1]).to(tl.float32)


@triton.jit
def power(x, UNIT: tl.constexpr):
    return tl.exp(x) if UNIT == 1.0 else tl.exp2(x)


@triton.jit
def logarithm(top, total, UNIT: tl.constexpr):
    """lse; -inf where nothing is seen"""
    return top + tl.log(total) if UNIT == 1.0 else (top + tl.log2(total)) * LN2


@triton.jit
def online(s, top, total, acc, UNIT: tl.constexpr):
    """Weights of scores s [T, N] against the largest so far, and the largest, sum and products so far brought up to it"""
    new = tl.maximum(top, tl.max(s, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    p, by = power(s - base[:, None], UNIT), power(top - base, UNIT)
    return p, new, total * by + tl.sum(p, 1), acc * by[:, None]


@triton.jit
def divided(acc, total):
    """By the sum of the weights; zeros for a query that sees nothing"""
    return acc * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]


@triton.jit
def token_range(tile, mask_ptr, T, S, CAUSAL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of a block of queries: how many tokens the last one sees, and how many, in whole blocks, all do"""
    last, all_see = S, S
    if CAUSAL:
        last = tl.minimum(S, S - T + (tile + 1) * BLOCK_T)
        all_see = tl.minimum(S, tl.maximum(0, S - T + tile * BLOCK_T + 1))
    return last, 0 if mask_ptr is not None else all_see // BLOCK_N * BLOCK_N


@triton.jit
def attend_tokens(
    q, acc, top, total, k_ptr, v_ptr, k_stride, v_stride, mask_ptr, mask_strides, seed, row, t, first, last, b, h, T, S,
    scale2, keep_threshold, keep_value, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr,
    KEY_MASK: tl.constexpr, ALL_SEEN: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """acc, top and total after tokens first..last - 1, a multiple of BLOCK_N where ALL_SEEN"""
    for n0 in range(first, last, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        limit = None if ALL_SEEN else S
        k = load_rows(k_ptr, n, k_stride, limit, D, BLOCK_D)
        s = tl.dot(q, k.T, input_precision=PRECISION) * scale2
        if not ALL_SEEN:
            s = token_scores(s, t[:, None], n[None, :], mask_ptr, mask_strides, b, h, T, S, CAUSAL, KEY_MASK, UNIT)
        p, top, total, acc = online(s, top, total, acc, UNIT)
        if DROPOUT:
            p = tl.where(keep(seed, row + t, n0, 1, keep_threshold, BLOCK_T, BLOCK_N), p * keep_value, 0.0)
        v = load_rows(v_ptr, n, v_stride, limit, D, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, top, total


@triton.jit
def prefix_attention_kernel(
    q_ptr, k_ptr, v_ptr, prefix, mask_ptr, o_ptr, o_x_ptr, lse_ptr, lse_p_ptr, seed_ptr, keep_threshold, keep_value, scale,
    H, GROUP, T, S, A, P, TOTAL, q_strides, k_strides, v_strides, prefix_strides, mask_strides, o_strides, o_x_strides,
    CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr, SEPARATE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """joint: o = Σ e^{s^p−lse} Gv·pv + Σ e^{s^x−lse} v; separate: o_x, lse of the tokens, lse_p, and o = o_x + c·o_p

    Without k: joint starts from o and lse, separate from o_x. A row whose index is out of range is NaN.
    """
    tiles = tl.cdiv(T, BLOCK_T)
    tile, bh = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    if CAUSAL:
        tile = tiles - 1 - tile  # the longest first
    b, h = bh // H, bh % H
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    scale2 = scale * UNIT
    # [BLOCK_T, BLOCK_D]
    q = load_rows(q_ptr + b * q_strides[0] + h * q_strides[1], t, q_strides[2], T, D, BLOCK_D)
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    o_ptr += b * o_strides[0] + h * o_strides[1]
    if SEPARATE:
        o_x_ptr += b * o_x_strides[0] + h * o_x_strides[1]

    if k_ptr is not None:
        k_ptr += b * k_strides[0] + h // GROUP * k_strides[1]
        v_ptr += b * v_strides[0] + h // GROUP * v_strides[1]
        last, all_see = token_range(tile, mask_ptr, T, S, CAUSAL, BLOCK_T, BLOCK_N)
        if mask_ptr is None:
            acc, top, total = attend_tokens(
                q, acc, top, total, k_ptr, v_ptr, k_strides[2], v_strides[2], None, mask_strides, seed, bh * T, t, 0, all_see,
                b, h, T, S, scale2, keep_threshold, keep_value, DROPOUT, PRECISION, CAUSAL, KEY_MASK, True, UNIT, D, BLOCK_D,
                BLOCK_T, BLOCK_N,
            )  # fmt: skip
        acc, top, total = attend_tokens(
            q, acc, top, total, k_ptr, v_ptr, k_strides[2], v_strides[2], mask_ptr, mask_strides, seed, bh * T, t, all_see,
            last, b, h, T, S, scale2, keep_threshold, keep_value, DROPOUT, PRECISION, CAUSAL, KEY_MASK, False, UNIT, D, BLOCK_D,
            BLOCK_T, BLOCK_N,
        )  # fmt: skip
        if SEPARATE:
            store_rows(o_x_ptr, divided(acc, total), t, o_x_strides[2], T, D, BLOCK_D)
            tl.store(lse_ptr + bh * T + t, logarithm(top, total, UNIT), mask=t < T)
            acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
            top = tl.full((BLOCK_T,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_T,), tl.float32)
    elif not SEPARATE:
        acc = load_rows(o_ptr, t, o_strides[2], T, D, BLOCK_D).to(tl.float32)
        top = tl.load(lse_ptr + bh * T + t, mask=t < T, other=0.0) * UNIT
        total = tl.where(top == float("-inf"), 0.0, 1.0)

    a, start, length, bad = own_prefix(prefix, b, A, P, TOTAL)
    pk_strides, pv_strides = prefix_strides[0], prefix_strides[1]
    pk_ptr = prefix_rows(prefix[0], pk_strides, a, h // GROUP, start)
    pv_ptr = prefix_rows(prefix[1], pv_strides, a, h // GROUP, start)
    for j0 in range(0, length, BLOCK_P):
        j = j0 + tl.arange(0, BLOCK_P)
        inside = (t < T)[:, None] & (j < length)[None, :]
        pk = load_rows(pk_ptr, j, pk_strides[2], length, D, BLOCK_D).to(q.dtype)
        s = tl.dot(q, pk.T, input_precision=PRECISION) * scale2
        gate_k = gate(prefix[2], prefix_strides[2], b, h, t[:, None], j[None, :], inside)
        s = prefix_scores(s, gate_k, prefix[4], prefix_strides[4], a, start, h, j[None, :], (j < length)[None, :], UNIT)
        p, top, total, acc = online(s, top, total, acc, UNIT)
        p = p * gate(prefix[3], prefix_strides[3], b, h, t[:, None], j[None, :], inside)
        if DROPOUT:
            p = tl.where(keep(seed, bh * T + t, j0, 0, keep_threshold, BLOCK_T, BLOCK_P), p * keep_value, 0.0)
        pv = load_rows(pv_ptr, j, pv_strides[2], length, D, BLOCK_D).to(q.dtype)
        acc = tl.dot(p.to(q.dtype), pv, acc, input_precision=PRECISION)
    acc = divided(acc, total)
    if SEPARATE:
        tl.debug_barrier()  # other threads of this program may have stored what one reads back; held, it spills at D = 128
        o_x = load_rows(o_x_ptr, t, o_x_strides[2], T, D, BLOCK_D)
        acc = o_x.to(tl.float32) + gate_out(prefix, prefix_strides, a, h) * acc
        lse_ptr = lse_p_ptr
    store_rows(o_ptr, tl.where(bad, float("nan"), acc), t, o_strides[2], T, D, BLOCK_D)
    tl.store(lse_ptr + bh * T + t, logarithm(top, total, UNIT), mask=t < T)


@triton.jit
def load_lse(lse_ptr, t, T, UNIT: tl.constexpr):
    """lse in UNIT; +inf where a query sees nothing or is past the last: its weights e^(s - lse) are zeros"""
    lse = tl.load(lse_ptr + t, mask=t < T, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * UNIT)


@triton.jit
def prefix_attention_delta_kernel(
    q_ptr, prefix, o_ptr, do_ptr, lse_p_ptr, delta_ptr, delta_p_ptr, seed_ptr, keep_threshold, keep_value, scale,
    H, GROUP, T, A, P, TOTAL, q_strides, prefix_strides, o_strides, do_strides,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Δ = Σ_d do·o, of the tokens or of both; δ = Σ_j p_j Gv_j do·pv_j of a separate prefix. What is None is not wanted."""
    tiles = tl.cdiv(T, BLOCK_T)
    tile, bh = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    # [BLOCK_T, BLOCK_D]
    do = load_rows(do_ptr + b * do_strides[0] + h * do_strides[1], t, do_strides[2], T, D, BLOCK_D)
    if delta_ptr is not None:
        o = load_rows(o_ptr + b * o_strides[0] + h * o_strides[1], t, o_strides[2], T, D, BLOCK_D)
        tl.store(delta_ptr + bh * T + t, tl.sum(do.to(tl.float32) * o.to(tl.float32), 1), mask=t < T)
    if delta_p_ptr is not None:
        seed = tl.load(seed_ptr) if DROPOUT else 0
        q = load_rows(q_ptr + b * q_strides[0] + h * q_strides[1], t, q_strides[2], T, D, BLOCK_D)
        lse = load_lse(lse_p_ptr + bh * T, t, T, UNIT)
        a, start, length, _ = own_prefix(prefix, b, A, P, TOTAL)
        pk_strides, pv_strides = prefix_strides[0], prefix_strides[1]
        pk_ptr = prefix_rows(prefix[0], pk_strides, a, h // GROUP, start)
        pv_ptr = prefix_rows(prefix[1], pv_strides, a, h // GROUP, start)
        delta = tl.zeros((BLOCK_T,), tl.float32)
        for j0 in range(0, length, BLOCK_P):
            j = j0 + tl.arange(0, BLOCK_P)
            inside = (t < T)[:, None] & (j < length)[None, :]
            pk = load_rows(pk_ptr, j, pk_strides[2], length, D, BLOCK_D).to(q.dtype)
            s = tl.dot(q, pk.T, input_precision=PRECISION) * (scale * UNIT)
            gate_k = gate(prefix[2], prefix_strides[2], b, h, t[:, None], j[None, :], inside)
            s = prefix_scores(
                s, gate_k, prefix[4], prefix_strides[4], a, start, h, j[None, :], (j < length)[None, :], UNIT
            )
            p = power(s - lse[:, None], UNIT) * gate(prefix[3], prefix_strides[3], b, h, t[:, None], j[None, :], inside)
            if DROPOUT:
                kept = keep(seed, bh * T + t, j0, 0, keep_threshold, BLOCK_T, BLOCK_P)
                p = tl.where(kept, p * keep_value, 0.0)
            pv = load_rows(pv_ptr, j, pv_strides[2], length, D, BLOCK_D).to(q.dtype)
            delta += tl.sum(p * tl.dot(do, pv.T, input_precision=PRECISION), 1)
        tl.store(delta_p_ptr + bh * T + t, delta, mask=t < T)


@triton.jit
def add_gate_grad(
    ptr, total, value, t, j, length, columns, bh, tile, tiles, T, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """A tile of a gate's gradient, summed over what the gate broadcasts over within a program: stored, or added to total"""
    if COLUMNS:
        if ROWS:
            inside = (t < T)[:, None] & (j < length)[None, :]
            tl.store(ptr + (bh * T + t)[:, None] * columns + j[None, :], value, mask=inside)
        else:
            tl.store(ptr + (bh * tiles + tile) * columns + j, tl.sum(value, 0), mask=j < length)
    else:
        total += tl.sum(value, 1)
    return total


@triton.jit
def store_gate_grad(ptr, total, t, bh, tile, tiles, T, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    if not COLUMNS:
        if ROWS:
            tl.store(ptr + bh * T + t, total, mask=t < T)
        else:
            tl.store(ptr + bh * tiles + tile, tl.sum(total, 0))


@triton.jit
def grad_query_tokens(
    dq, q, do, lse, delta, k_ptr, v_ptr, k_stride, v_stride, mask_ptr, mask_strides, seed, row, t, first, last, b, h, T, S,
    scale2, keep_threshold, keep_value, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr,
    KEY_MASK: tl.constexpr, ALL_SEEN: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq/scale after tokens first..last - 1, a multiple of BLOCK_N where ALL_SEEN"""
    for n0 in range(first, last, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        limit = None if ALL_SEEN else S
        k = load_rows(k_ptr, n, k_stride, limit, D, BLOCK_D)
        s = tl.dot(q, k.T, input_precision=PRECISION) * scale2
        if not ALL_SEEN:
            s = token_scores(s, t[:, None], n[None, :], mask_ptr, mask_strides, b, h, T, S, CAUSAL, KEY_MASK, UNIT)
        v = load_rows(v_ptr, n, v_stride, limit, D, BLOCK_D)
        dp = tl.dot(do, v.T, input_precision=PRECISION)
        if DROPOUT:
            kept = keep(seed, row + t, n0, 1, keep_threshold, BLOCK_T, BLOCK_N)
            dp = tl.where(kept, dp * keep_value, 0.0)
        ds = power(s - lse[:, None], UNIT) * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def prefix_attention_grad_query_kernel(
    q_ptr, k_ptr, v_ptr, prefix, mask_ptr, do_ptr, lse_ptr, lse_p_ptr, delta_ptr, delta_p_ptr, dq_ptr, dgk_ptr, dgv_ptr,
    seed_ptr, keep_threshold, keep_value, scale, H, GROUP, T, S, A, P, TOTAL, dgk_columns, dgv_columns,
    q_strides, k_strides, v_strides, prefix_strides, mask_strides, do_strides, dq_strides,
    GK_ROWS: tl.constexpr, GK_COLUMNS: tl.constexpr, GV_ROWS: tl.constexpr, GV_COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dq = scale·(Σ ds^x k + Σ ds^p Gk·pk);  dGk = scale·ds^p q·pkᵀ, dGv = c p^p do·pvᵀ, [B, H, T or tiles of T, P or 1]

    ds^x = p^x (do·vᵀ − Δ), ds^p = c p^p (Gv do·pvᵀ − δ). What is None is not wanted; without k, dq is added to.
    """
    tiles = tl.cdiv(T, BLOCK_T)
    tile, bh = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    if CAUSAL:
        tile = tiles - 1 - tile  # the longest first
    b, h = bh // H, bh % H
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    scale2 = scale * UNIT
    # [BLOCK_T, BLOCK_D]
    q = load_rows(q_ptr + b * q_strides[0] + h * q_strides[1], t, q_strides[2], T, D, BLOCK_D)
    do = load_rows(do_ptr + b * do_strides[0] + h * do_strides[1], t, do_strides[2], T, D, BLOCK_D)
    dq = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    if dq_ptr is not None and k_ptr is not None:
        lse = load_lse(lse_ptr + bh * T, t, T, UNIT)
        delta = tl.load(delta_ptr + bh * T + t, mask=t < T, other=0.0)
        k_ptr += b * k_strides[0] + h // GROUP * k_strides[1]
        v_ptr += b * v_strides[0] + h // GROUP * v_strides[1]
        last, all_see = token_range(tile, mask_ptr, T, S, CAUSAL, BLOCK_T, BLOCK_N)
        if mask_ptr is None:
            dq = grad_query_tokens(
                dq, q, do, lse, delta, k_ptr, v_ptr, k_strides[2], v_strides[2], None, mask_strides, seed, bh * T, t, 0,
                all_see, b, h, T, S, scale2, keep_threshold, keep_value, DROPOUT, PRECISION, CAUSAL, KEY_MASK, True,
                UNIT, D, BLOCK_D, BLOCK_T, BLOCK_N,
            )  # fmt: skip
        dq = grad_query_tokens(
            dq, q, do, lse, delta, k_ptr, v_ptr, k_strides[2], v_strides[2], mask_ptr, mask_strides, seed, bh * T, t,
            all_see, last, b, h, T, S, scale2, keep_threshold, keep_value, DROPOUT, PRECISION, CAUSAL, KEY_MASK, False,
            UNIT, D, BLOCK_D, BLOCK_T, BLOCK_N,
        )  # fmt: skip

    lse = load_lse(lse_p_ptr + bh * T, t, T, UNIT)
    delta = tl.load(delta_p_ptr + bh * T + t, mask=t < T, other=0.0)
    a, start, length, _ = own_prefix(prefix, b, A, P, TOTAL)
    c = gate_out(prefix, prefix_strides, a, h)
    pk_strides, pv_strides = prefix_strides[0], prefix_strides[1]
    pk_ptr = prefix_rows(prefix[0], pk_strides, a, h // GROUP, start)
    pv_ptr = prefix_rows(prefix[1], pv_strides, a, h // GROUP, start)
    dgk, dgv = tl.zeros((BLOCK_T,), tl.float32), tl.zeros((BLOCK_T,), tl.float32)
    for j0 in range(0, length, BLOCK_P):
        j = j0 + tl.arange(0, BLOCK_P)
        inside = (t < T)[:, None] & (j < length)[None, :]
        pk = load_rows(pk_ptr, j, pk_strides[2], length, D, BLOCK_D).to(q.dtype)
        raw = tl.dot(q, pk.T, input_precision=PRECISION)
        gate_k = gate(prefix[2], prefix_strides[2], b, h, t[:, None], j[None, :], inside)
        s = prefix_scores(
            raw * scale2, gate_k, prefix[4], prefix_strides[4], a, start, h, j[None, :], (j < length)[None, :], UNIT
        )
        p = power(s - lse[:, None], UNIT) * c
        pv = load_rows(pv_ptr, j, pv_strides[2], length, D, BLOCK_D).to(q.dtype)
        dp = tl.dot(do, pv.T, input_precision=PRECISION)
        if DROPOUT:
            kept = keep(seed, bh * T + t, j0, 0, keep_threshold, BLOCK_T, BLOCK_P)
            dp = tl.where(kept, dp * keep_value, 0.0)
        gate_v = gate(prefix[3], prefix_strides[3], b, h, t[:, None], j[None, :], inside)
        ds = p * (gate_v * dp - delta[:, None])
        if dgk_ptr is not None:
            of_k = ds * raw * scale
            dgk = add_gate_grad(dgk_ptr, dgk, of_k, t, j, length, dgk_columns, bh, tile, tiles, T, GK_ROWS, GK_COLUMNS)
        if dgv_ptr is not None:
            dgv = add_gate_grad(
                dgv_ptr, dgv, p * dp, t, j, length, dgv_columns, bh, tile, tiles, T, GV_ROWS, GV_COLUMNS
            )
        if dq_ptr is not None:
            dq = tl.dot((ds * gate_k).to(q.dtype), pk, dq, input_precision=PRECISION)
    if dgk_ptr is not None:
        store_gate_grad(dgk_ptr, dgk, t, bh, tile, tiles, T, GK_ROWS, GK_COLUMNS)
    if dgv_ptr is not None:
        store_gate_grad(dgv_ptr, dgv, t, bh, tile, tiles, T, GV_ROWS, GV_COLUMNS)
    if dq_ptr is not None:
        dq_ptr += b * dq_strides[0] + h * dq_strides[1]
        dq *= scale
        if k_ptr is None:
            dq += load_rows(dq_ptr, t, dq_strides[2], T, D, BLOCK_D).to(tl.float32)
        store_rows(dq_ptr, dq, t, dq_strides[2], T, D, BLOCK_D)


@triton.jit
def prefix_attention_grad_token_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, seed_ptr, keep_threshold, keep_value, scale,
    H, GROUP, T, S, q_strides, k_strides, v_strides, mask_strides, do_strides, dk_strides, dv_strides,
    CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk = scale·Σ_{h,t} ds^x q, dv = Σ_{h,t} p^x do; ds^x = p^x (do·vᵀ − Δ). What is None is not wanted."""
    tiles = tl.cdiv(S, BLOCK_N)
    tile, bh = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    heads = H // GROUP
    b, kv_head = bh // heads, bh % heads
    n0 = tile * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    # [BLOCK_N, BLOCK_D]
    k = load_rows(k_ptr + b * k_strides[0] + kv_head * k_strides[1], n, k_strides[2], S, D, BLOCK_D)
    if dk_ptr is not None:
        v = load_rows(v_ptr + b * v_strides[0] + kv_head * v_strides[1], n, v_strides[2], S, D, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    first = tl.maximum(0, n0 - (S - T)) // BLOCK_T * BLOCK_T if CAUSAL else 0
    for g in range(0, GROUP):
        h = kv_head * GROUP + g
        of_head = (b * H + h) * T
        for t0 in range(first, T, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            # [BLOCK_T, BLOCK_D]
            q = load_rows(q_ptr + b * q_strides[0] + h * q_strides[1], t, q_strides[2], T, D, BLOCK_D)
            do = load_rows(do_ptr + b * do_strides[0] + h * do_strides[1], t, do_strides[2], T, D, BLOCK_D)
            # [BLOCK_N, BLOCK_T]
            s = tl.dot(k, q.T, input_precision=PRECISION) * (scale * UNIT)
            s = token_scores(s, t[None, :], n[:, None], mask_ptr, mask_strides, b, h, T, S, CAUSAL, KEY_MASK, UNIT)
            p = power(s - load_lse(lse_ptr + of_head, t, T, UNIT)[None, :], UNIT)
            if DROPOUT:
                kept = keep(seed, of_head + t, n0, 1, keep_threshold, BLOCK_T, BLOCK_N).T
            if dv_ptr is not None:
                dropped = tl.where(kept, p * keep_value, 0.0) if DROPOUT else p
                dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=PRECISION)
            if dk_ptr is not None:
                dp = tl.dot(v, do.T, input_precision=PRECISION)
                if DROPOUT:
                    dp = tl.where(kept, dp * keep_value, 0.0)
                delta = tl.load(delta_ptr + of_head + t, mask=t < T, other=0.0)
                ds = p * (dp - delta[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    if dk_ptr is not None:
        store_rows(dk_ptr + b * dk_strides[0] + kv_head * dk_strides[1], dk * scale, n, dk_strides[2], S, D, BLOCK_D)
    if dv_ptr is not None:
        store_rows(dv_ptr + b * dv_strides[0] + kv_head * dv_strides[1], dv, n, dv_strides[2], S, D, BLOCK_D)


@triton.jit
def prefix_attention_grad_prefix_kernel(
    q_ptr, prefix, do_ptr, lse_ptr, delta_ptr, dpk_ptr, dpv_ptr, dbias_ptr, seed_ptr, keep_threshold, keep_value, scale,
    B, H, GROUP, T, A, P, TOTAL, PARTS, q_strides, prefix_strides, do_strides,
    ALL_ROWS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dpk = scale·Σ_{b,h,t} ds^p Gk q, dpv = Σ_{b,h,t} c p^p Gv do, dβ = Σ_{b,t} ds^p;  ds^p = c p^p (Gv do·pvᵀ − δ)

    [parts, A, Hk or H, P(, D)] or flat [parts, 1, Hk or H, ΣP(, D)]: a program has a block of positions of one adapter, or of
    all flat ones, and sums over a part of all blocks of queries, those of rows that have these positions (ALL_ROWS: all do).
    """
    flat: tl.constexpr = prefix[8] is not None
    columns = TOTAL if flat else P
    tiles, heads, adapters = tl.cdiv(columns, BLOCK_P), H // GROUP, 1 if flat else A
    program = tl.program_id(0)
    tile, program = program % tiles, program // tiles
    kv_head, program = (program % heads).to(tl.int64), program // heads
    adapter, part = (program % adapters).to(tl.int64), (program // adapters).to(tl.int64)
    first = tile * BLOCK_P
    column = first + tl.arange(0, BLOCK_P)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    dtype = q_ptr.dtype.element_ty
    pk_strides, pv_strides = prefix_strides[0], prefix_strides[1]
    # [BLOCK_P, BLOCK_D]
    pk_ptr = prefix_rows(prefix[0], pk_strides, adapter, kv_head, 0)
    pv_ptr = prefix_rows(prefix[1], pv_strides, adapter, kv_head, 0)
    pk = load_rows(pk_ptr, column, pk_strides[2], columns, D, BLOCK_D).to(dtype)
    pv = load_rows(pv_ptr, column, pv_strides[2], columns, D, BLOCK_D).to(dtype)
    dpk = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    dpv = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    blocks = tl.cdiv(T, BLOCK_T)
    for g in range(0, GROUP):
        h = kv_head * GROUP + g
        dbias = tl.zeros((BLOCK_P,), tl.float32)
        for block in range(part, B * blocks, PARTS):
            b = (block // blocks).to(tl.int64)
            a, start, length, _ = own_prefix(prefix, b, A, P, TOTAL)
            if ALL_ROWS:
                mine = True
            elif flat:
                mine = (start < first + BLOCK_P) & (start + length > first)
            else:
                mine = (a == adapter) & (length > first)
            if mine:
                t = block % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
                j = column - start
                own = ((j >= 0) & (j < length))[:, None]
                inside = own & (t < T)[None, :]
                of_head = (b * H + h) * T
                # [BLOCK_T, BLOCK_D]
                q = load_rows(q_ptr + b * q_strides[0] + h * q_strides[1], t, q_strides[2], T, D, BLOCK_D)
                do = load_rows(do_ptr + b * do_strides[0] + h * do_strides[1], t, do_strides[2], T, D, BLOCK_D)
                # [BLOCK_P, BLOCK_T]
                s = tl.dot(pk, q.T, input_precision=PRECISION) * (scale * UNIT)
                gate_k = gate(prefix[2], prefix_strides[2], b, h, t[None, :], j[:, None], inside)
                s = prefix_scores(s, gate_k, prefix[4], prefix_strides[4], a, start, h, j[:, None], own, UNIT)
                p = power(s - load_lse(lse_ptr + of_head, t, T, UNIT)[None, :], UNIT) * gate_out(
                    prefix, prefix_strides, a, h
                )
                gate_v = gate(prefix[3], prefix_strides[3], b, h, t[None, :], j[:, None], inside)
                if DROPOUT:
                    kept = keep_at(seed, (of_head + t)[None, :], tl.maximum(j, 0)[:, None], 0, keep_threshold)
                    gate_v = tl.where(kept, gate_v * keep_value, 0.0)
                if dpv_ptr is not None:
                    dpv = tl.dot(rounded(p * gate_v, dtype), widened(do), dpv, input_precision=PRECISION)
                if dpk_ptr is not None or dbias_ptr is not None:
                    delta = tl.load(delta_ptr + of_head + t, mask=t < T, other=0.0)
                    ds = p * (gate_v * tl.dot(pv, do.T, input_precision=PRECISION) - delta[None, :])
                    ds = tl.where(own, ds, 0.0)  # what lies beyond a prefix's length may be NaN
                    dbias += tl.sum(ds, 1)
                    if dpk_ptr is not None:
                        dpk = tl.dot(rounded(ds * gate_k, dtype), widened(q), dpk, input_precision=PRECISION)
        if dbias_ptr is not None:
            at = ((part * adapters + adapter) * H + h) * columns + column
            tl.store(dbias_ptr + at, dbias, mask=column < columns)
    out = ((part * adapters + adapter) * heads + kv_head) * columns * D
    if dpk_ptr is not None:
        store_rows(dpk_ptr + out, dpk * scale, column, D, columns, D, BLOCK_D)
    if dpv_ptr is not None:
        store_rows(dpv_ptr + out, dpv, column, D, columns, D, BLOCK_D)
