"""linear4bit in Triton: a weight in 4 bits, decoded where it is used. `linear4bit_launch.py` launches the kernels.

    dequantize  w = codebook[code] · scale
    gemm        y = x Wᵀ + s (scale·B)ᵀ + bias, or dx = dy W + drop'(t A): W decoded in the loop, the rank-R term in the
                same accumulator; over a part of the sum, where tiles alone do not fill the GPU
    finish      the sum of those parts, and what else goes into the result

A scale is a float32, or (nested) map[code] · absmax[block / 256] + offset. W is decoded in float32 and rounded once to x's
dtype: it is exactly the dequantised weight. Shapes: x [M, K], W [N, K]; codes two a byte, the first in its high half.

Decoding must not starve the tensor cores. A warp keeps the code book one entry a lane, and looks codes up by shuffling:
shift, shuffle, multiply, half a conversion a weight, where a tree of selects takes 15 and byte permutes take 6 of float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .lora_linear import add_rank_term


@triton.jit
def lane_table(book_ptr, SHUFFLE: tl.constexpr):
    """The code book for `look_up`: lane i has entry i mod 16, in what Triton takes for a scalar; or its address."""
    if SHUFFLE:
        table = tl.inline_asm_elementwise(
            """{
            .reg .b32 lane; .reg .b64 entry;
            mov.u32 lane, %laneid; and.b32 lane, lane, 15; mad.wide.u32 entry, lane, 4, $1; ld.global.nc.f32 $0, [entry];
            }""",
            "=f,l", [book_ptr.to(tl.int64, bitcast=True)], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        table = book_ptr
    return table


@triton.jit
def look_up(table, codes, SHUFFLE: tl.constexpr):
    """codebook[codes mod 16]; codes uint32. A shuffle uses the low four bits alone, within a half of the warp."""
    if SHUFFLE:
        values = tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 0x101f, 0xffffffff;", "=f,f,r", [table, codes],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        values = tl.load(table + (codes & 15))
    return values


@triton.jit
def scale_of(
    blocks, inside, codes, scales_ptr, absmax_ptr, offset_ptr, map_ptr, NESTED: tl.constexpr, SHUFFLE: tl.constexpr
):
    """float32 scales of blocks (int64), 0 where not inside. Nested: their codes may be at hand; the product is rounded, then
    the sum, as PyTorch does."""
    if NESTED:
        if codes is None:
            codes = tl.load(scales_ptr + blocks, mask=inside, other=0)
        value = tl.load(map_ptr + codes.to(tl.int32))
        absmax = tl.load(absmax_ptr + blocks // 256, mask=inside, other=0.0)
        if SHUFFLE:  # an FMA would round once; mul.rn is never made one
            product = tl.inline_asm_elementwise(
                "mul.rn.f32 $0, $1, $2;", "=f,f,f", [value, absmax], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
            product = value * absmax
        scale = tl.where(inside, product + tl.load(offset_ptr), 0.0)
    else:
        scale = tl.load(scales_ptr + blocks, mask=inside, other=0.0)
    return scale


@triton.jit
def blocks_of(n, k, N, K, BLOCKSIZE: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS // UNIT] of a tile of W: the block (int64) of each UNIT weights of a row, and whether it is inside."""
    rows = tl.cast(n, tl.int64) + tl.arange(0, ROWS)
    units = k + tl.arange(0, COLUMNS // UNIT) * UNIT
    return (rows[:, None] * K + units[None, :]) // BLOCKSIZE, (rows < N)[:, None] & (units < K)[None, :]


@triton.jit
def scale_codes_of(
    n, k, scales_ptr, N, K, BLOCKSIZE: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """uint8 [ROWS, COLUMNS // UNIT]: the codes of a tile's nested scales"""
    blocks, inside = blocks_of(n, k, N, K, BLOCKSIZE, UNIT, ROWS, COLUMNS)
    return tl.load(scales_ptr + blocks, mask=inside, other=0)


@triton.jit
def linear4bit_dequantize_kernel(
    out_ptr, data_ptr, scales_ptr, absmax_ptr, offset_ptr, book_ptr, map_ptr, SIZE, BYTES,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, UNIT: tl.constexpr, SHUFFLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[i] = codebook[code[i]] · scale[i / BLOCKSIZE], of the flattened weight; UNIT divides BLOCKSIZE and BLOCK"""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    table = lane_table(book_ptr, SHUFFLE)
    pairs = first // 2 + tl.arange(0, BLOCK // 2)
    # [BLOCK // 2]
    data = tl.load(data_ptr + pairs, mask=pairs < BYTES, other=0).to(tl.uint32)
    values = look_up(table, tl.reshape(tl.join(data >> 4, data), (BLOCK,)), SHUFFLE)
    units = first + tl.arange(0, BLOCK // UNIT) * UNIT
    # [BLOCK // UNIT]
    scale = scale_of(
        units // BLOCKSIZE, units < SIZE, None, scales_ptr, absmax_ptr, offset_ptr, map_ptr, NESTED, SHUFFLE
    )
    w = tl.reshape(tl.reshape(values, (BLOCK // UNIT, UNIT)) * scale[:, None], (BLOCK,))
    flat = first + tl.arange(0, BLOCK)
    tl.store(out_ptr + flat, w.to(out_ptr.dtype.element_ty), mask=flat < SIZE)


@triton.jit
def decode_tile(
    n, k, scale_codes, codes_ptr, table, scales_ptr, absmax_ptr, offset_ptr, map_ptr, N, K, BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr, UNIT: tl.constexpr, WORDS: tl.constexpr, SHUFFLE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """w[ROWS, COLUMNS] from row n, column k on, float32; ±0 outside.

    WORDS: codes_ptr is of int32, 8 codes each, none across rows; UNIT consecutive weights share a scale whatever the row.
    Else of bytes, and each weight finds its own byte, half and scale.
    """
    rows = tl.cast(n, tl.int64) + tl.arange(0, ROWS)
    if WORDS:
        words = k // 8 + tl.arange(0, COLUMNS // 8)
        # [ROWS, COLUMNS // 8]
        codes = tl.load(
            codes_ptr + rows[:, None] * (K // 8) + words[None, :],
            mask=(rows < N)[:, None] & (words < K // 8)[None, :], other=0,
        ).to(tl.uint32, bitcast=True)  # fmt: skip
        # bytes ascend, the high half of each is first: shifts 4 0 12 8 20 16 28 24
        codes = tl.join(codes, codes >> 16)
        codes = tl.join(codes, codes >> 8)
        codes = tl.reshape(tl.join(codes >> 4, codes), (ROWS, COLUMNS))
        # [ROWS, COLUMNS // UNIT]
        blocks, inside = blocks_of(n, k, N, K, BLOCKSIZE, UNIT, ROWS, COLUMNS)
        scale = scale_of(blocks, inside, scale_codes, scales_ptr, absmax_ptr, offset_ptr, map_ptr, NESTED, SHUFFLE)
        values = tl.reshape(look_up(table, codes, SHUFFLE), (ROWS, COLUMNS // UNIT, UNIT))
        w = tl.reshape(values * scale[:, :, None], (ROWS, COLUMNS))
    else:
        columns = k + tl.arange(0, COLUMNS)
        inside = (rows < N)[:, None] & (columns < K)[None, :]
        flat = rows[:, None] * K + columns[None, :]  # [ROWS, COLUMNS]
        byte = tl.load(codes_ptr + flat // 2, mask=inside, other=0).to(tl.uint32)
        codes = byte >> (4 - 4 * (flat % 2)).to(tl.uint32)
        blocks = flat // BLOCKSIZE
        scale = scale_of(blocks, inside, None, scales_ptr, absmax_ptr, offset_ptr, map_ptr, NESTED, SHUFFLE)
        w = look_up(table, codes, SHUFFLE) * scale
    return w


@triton.jit
def add_rest(
    acc, rows, columns, out_ptr, s_ptr, up_ptrs, scale_ptr, bias_ptr, lora_bias_ptr, seed_ptr, keep_threshold, keep_value,
    M, C, stride_om, stride_sm, stride_ur, stride_uc, stride_scale, FIRST: tl.constexpr, RANKS: tl.constexpr,
    INDEX: tl.constexpr, DROPOUT: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[m, c] (+)= acc[m, c] + Σ_i drop_i(s_i · scale·up_i)[m, c] + bias[c] + lora_bias[c]"""
    if len(RANKS) > 0:
        acc = add_rank_term(
            acc, rows, columns, s_ptr, up_ptrs, scale_ptr, seed_ptr, keep_threshold, keep_value, M, C, stride_sm, stride_ur,
            stride_uc, stride_scale, FIRST, RANKS, INDEX, DROPOUT, out_ptr.dtype.element_ty, PRECISION, BLOCK_R,
        )  # fmt: skip
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    if lora_bias_ptr is not None:
        acc += tl.load(lora_bias_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    inside = (rows < M)[:, None] & (columns < C)[None, :]
    out = out_ptr + rows[:, None] * stride_om + columns[None, :]
    if ACCUMULATE:
        acc += tl.load(out, mask=inside, other=0.0).to(tl.float32)
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def linear4bit_gemm_kernel(
    l_ptr, out_ptr, parts_ptr, codes_ptr, scales_ptr, absmax_ptr, offset_ptr, book_ptr, map_ptr, s_ptr, up_ptrs, scale_ptr,
    bias_ptr, lora_bias_ptr, seed_ptr, keep_threshold, keep_value, M, C, J, part_j, stride_lm, stride_om, stride_sm,
    stride_ur, stride_uc, stride_scale, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, UNIT: tl.constexpr,
    WORDS: tl.constexpr, SHUFFLE: tl.constexpr, FIRST: tl.constexpr, RANKS: tl.constexpr, INDEX: tl.constexpr,
    DROPOUT: tl.constexpr, ACCUMULATE: tl.constexpr, DESCRIPTORS: tl.constexpr, W_IS_CJ: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out[m, c] (+)= Σ_j l[m, j] w[j, c] + Σ_i drop_i(s_i · scale·up_i)[m, c] + bias[c] + lora_bias[c]

    Forward (W_IS_CJ): l = x, w = Wᵀ, up = Bᵀ. Backward: l = dy, w = W, up_i = A_i. With SPLIT: parts[part, m, c] = the sum
    over part_j of the j alone, for `finish`. With DESCRIPTORS (TMA), l_ptr is a tensor descriptor of [M, J].
    """
    # GROUP_M rows of tiles at a time, so that programs that run together share operands in L2
    tile, part = tl.program_id(0), tl.program_id(1)
    tiles_m, tiles_c = tl.cdiv(M, BLOCK_M), tl.cdiv(C, BLOCK_C)
    group = tile // (GROUP_M * tiles_c)
    in_group = min(tiles_m - group * GROUP_M, GROUP_M)
    m = (group * GROUP_M + tile % (GROUP_M * tiles_c) % in_group) * BLOCK_M
    c = tile % (GROUP_M * tiles_c) // in_group * BLOCK_C
    rows = tl.cast(m, tl.int64) + tl.arange(0, BLOCK_M)
    table = lane_table(book_ptr, SHUFFLE)
    N, K = C if W_IS_CJ else J, J if W_IS_CJ else C
    ROWS: tl.constexpr = BLOCK_C if W_IS_CJ else BLOCK_J
    COLUMNS: tl.constexpr = BLOCK_J if W_IS_CJ else BLOCK_C
    first, end = part * part_j, min(J, (part + 1) * part_j)
    # the codes of nested scales are read a tile ahead: they are addresses, and each tile would wait for its own
    ahead = None
    if NESTED and WORDS:
        ahead = scale_codes_of(
            c if W_IS_CJ else first, first if W_IS_CJ else c, scales_ptr, N, K, BLOCKSIZE, UNIT, ROWS, COLUMNS
        )
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for j in range(first, end, BLOCK_J):
        if DESCRIPTORS:
            left = l_ptr.load([m, j])
        else:
            js = j + tl.arange(0, BLOCK_J)
            # [BLOCK_M, BLOCK_J]
            left = tl.load(
                l_ptr + rows[:, None] * stride_lm + js[None, :], mask=(rows < M)[:, None] & (js < J)[None, :], other=0.0
            )
        now = ahead
        if NESTED and WORDS:
            then = j + BLOCK_J
            ahead = scale_codes_of(
                c if W_IS_CJ else then, then if W_IS_CJ else c, scales_ptr, N, K, BLOCKSIZE, UNIT, ROWS, COLUMNS
            )
        w = decode_tile(
            c if W_IS_CJ else j, j if W_IS_CJ else c, now, codes_ptr, table, scales_ptr, absmax_ptr, offset_ptr, map_ptr, N, K,
            BLOCKSIZE, NESTED, UNIT, WORDS, SHUFFLE, ROWS, COLUMNS,
        ).to(left.dtype)  # fmt: skip
        acc = tl.dot(left, w.T if W_IS_CJ else w, acc, input_precision=PRECISION)
    columns = c + tl.arange(0, BLOCK_C)
    if SPLIT:
        parts = parts_ptr + (part.to(tl.int64) * M + rows)[:, None] * C + columns[None, :]
        tl.store(parts, acc, mask=(rows < M)[:, None] & (columns < C)[None, :])
    else:
        add_rest(
            acc, rows, columns, out_ptr, s_ptr, up_ptrs, scale_ptr, bias_ptr, lora_bias_ptr, seed_ptr, keep_threshold,
            keep_value, M, C, stride_om, stride_sm, stride_ur, stride_uc, stride_scale, FIRST, RANKS, INDEX, DROPOUT,
            ACCUMULATE, PRECISION, BLOCK_R,
        )  # fmt: skip


@triton.jit
def linear4bit_finish_kernel(
    out_ptr, parts_ptr, s_ptr, up_ptrs, scale_ptr, bias_ptr, lora_bias_ptr, seed_ptr, keep_threshold, keep_value, M, C,
    stride_om, stride_sm, stride_ur, stride_uc, stride_scale, PARTS: tl.constexpr, FIRST: tl.constexpr,
    RANKS: tl.constexpr, INDEX: tl.constexpr, DROPOUT: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[m, c] (+)= Σ_part parts[part, m, c] + Σ_i drop_i(s_i · scale·up_i)[m, c] + bias[c] + lora_bias[c]; parts in order"""
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (rows < M)[:, None] & (columns < C)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for part in tl.static_range(PARTS):
        # [BLOCK_M, BLOCK_C]
        acc += tl.load(
            parts_ptr + (tl.cast(part, tl.int64) * M + rows)[:, None] * C + columns[None, :], mask=inside, other=0.0
        )
    add_rest(
        acc, rows, columns, out_ptr, s_ptr, up_ptrs, scale_ptr, bias_ptr, lora_bias_ptr, seed_ptr, keep_threshold,
        keep_value, M, C, stride_om, stride_sm, stride_ur, stride_uc, stride_scale, FIRST, RANKS, INDEX, DROPOUT,
        ACCUMULATE, PRECISION, BLOCK_R,
    )  # fmt: skip
