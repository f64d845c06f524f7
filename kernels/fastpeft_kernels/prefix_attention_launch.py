"""Launches the Triton kernels of prefix_attention: block sizes, grids, workspaces.

`forward` and `backward` are all of the op, tokens and prefix. `prefix` is the tuple (prefix_k, prefix_v, gate_k, gate_v, log_bias,
gate_out, index, lengths, offsets), as `fastpeft.reference.prefix_attention` takes it. Leading dimensions may have any strides.
"""

from __future__ import annotations

import torch
import triton

from . import prefix_attention as kernels
from ._launch import capability, dropout, multiprocessors, on_device, precision

LARGEST_D = 256
LARGEST_PARTS = 2**24  # elements of what a gradient's parts may take beyond the gradient itself: 64 MiB

LARGE = {
    (9, 0),
    (10, 0),
    (10, 3),
}  # compute capabilities with 227 KiB of shared memory a program; the blocks of others fit 99

# By bytes of q's elements and largest D: BLOCK_T, BLOCK_N, BLOCK_P, warps, stages, on small and on large machines. Chosen so that
# nothing spills (benches/COMPILED.md); not measured on a GPU.
ATTEND = {
    (2, 64): ((128, 64, 32, 8, 2), (128, 64, 32, 8, 3)),
    (2, 128): ((64, 64, 16, 4, 2), (128, 64, 32, 8, 3)),
    (2, 256): ((64, 32, 16, 8, 2), (64, 32, 16, 8, 2)),
    (4, 64): ((32, 32, 16, 4, 2), (32, 32, 16, 4, 2)),
    (4, 128): ((32, 32, 16, 8, 2), (32, 32, 16, 8, 2)),
    (4, 256): ((16, 16, 16, 8, 1), (16, 16, 16, 8, 1)),
}
QUERY = {
    (2, 64): ((64, 32, 32, 4, 2), (128, 64, 32, 8, 2)),
    (2, 128): ((64, 64, 32, 8, 2), (128, 64, 32, 8, 2)),
    (2, 256): ((32, 32, 16, 8, 2), (32, 32, 16, 8, 2)),
    (4, 64): ((32, 32, 16, 4, 2), (32, 32, 16, 4, 2)),
    (4, 128): ((32, 32, 16, 8, 2), (32, 32, 16, 8, 2)),
    (4, 256): ((16, 16, 16, 8, 2), (16, 16, 16, 8, 2)),
}
TOKEN = {
    (2, 64): ((32, 64, 0, 4, 2), (64, 128, 0, 8, 2)),
    (2, 128): ((32, 64, 0, 8, 2), (32, 128, 0, 8, 2)),
    (2, 256): ((32, 32, 0, 8, 2), (32, 32, 0, 8, 2)),
    (4, 64): ((16, 32, 0, 4, 2), (16, 32, 0, 4, 2)),
    (4, 128): ((16, 32, 0, 8, 2), (16, 32, 0, 8, 2)),
    (4, 256): ((16, 16, 0, 8, 2), (16, 16, 0, 8, 2)),
}
PREFIX = {
    (2, 64): ((64, 0, 32, 4, 2), (64, 0, 32, 4, 2)),
    (2, 128): ((64, 0, 32, 8, 2), (64, 0, 32, 8, 2)),
    (2, 256): ((32, 0, 16, 8, 2), (32, 0, 16, 8, 2)),
    (4, 64): ((32, 0, 16, 4, 2), (32, 0, 16, 4, 2)),
    (4, 128): ((32, 0, 16, 8, 2), (32, 0, 16, 8, 2)),
    (4, 256): ((16, 0, 16, 8, 1), (16, 0, 16, 8, 1)),
}


def _padded(n: int, most: int) -> int:
    return max(16, min(triton.next_power_of_2(n), most))


def _blocks(table, q, prefix_length: int, p: float) -> dict[str, int]:
    """A kernel's blocks, 0 in its table: it has no such, and what else D decides"""
    d = q.shape[-1]
    of = next(v for (size, most), v in table.items() if size == q.element_size() and d <= most)
    block_t, block_n, block_p, warps, stages = of[capability(q.device) in LARGE]
    if p > 0.0 and table is TOKEN:
        block_t = max(16, block_t // 2)  # the mask's words beside the weights: they spill
    block_t = _padded(q.shape[2], block_t)
    if block_t <= 32 and d <= 128 and block_n and block_p:
        warps = 4  # few queries: what more warps share is too small
    blocks = {"BLOCK_T": block_t, "BLOCK_N": block_n, "BLOCK_P": block_p and _padded(prefix_length, block_p)}
    fixed = {"D": d, "BLOCK_D": _padded(d, LARGEST_D), "PRECISION": precision(q.dtype)}
    return fixed | {k: v for k, v in blocks.items() if v} | {"num_warps": warps, "num_stages": stages}


def _rows(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _broadcast(t, *dims) -> tuple[int, ...]:
    """Strides of these dimensions, 0 where there is one element"""
    return (0,) * len(dims) if t is None else tuple(0 if t.shape[d] == 1 else t.stride(d) for d in dims)


def _prefix(prefix) -> tuple[tuple, tuple, dict[str, int]]:
    """The kernels' `prefix`, `prefix_strides`, and sizes A, P (the longest that may be) and TOTAL"""
    k, v, gate_k, gate_v, log_bias, gate_out, index, lengths, offsets = prefix
    k, v = _rows(k), _rows(v)
    if offsets is None:
        adapters, p = k.shape[0], k.shape[2]
        kv_strides = [t.stride()[:3] for t in (k, v)]
    else:
        adapters = offsets.shape[0] - 1
        p = min([k.shape[1]] + [g.shape[3] for g in (gate_k, gate_v) if g is not None and g.shape[3] > 1])
        kv_strides = [(0, *t.stride()[:2]) for t in (k, v)]
    strides = (
        *kv_strides, _broadcast(gate_k, 0, 1, 2, 3), _broadcast(gate_v, 0, 1, 2, 3), _broadcast(log_bias, 0, 1, 2),
        _broadcast(gate_out, 0, 1),
    )  # fmt: skip
    return (k, v, *prefix[2:]), strides, {"A": adapters, "P": p, "TOTAL": k.shape[-2]}


def _mask(mask) -> dict[str, object]:
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    keys = mask is not None and mask.dim() == 2
    strides = (mask.stride(0), 0, 0, mask.stride(1)) if keys else _broadcast(mask, 0, 1, 2, 3)
    return {"mask_ptr": mask, "mask_strides": strides, "KEY_MASK": keys}


def _heads(q, k) -> dict[str, int]:
    return {"H": q.shape[1], "GROUP": q.shape[1] // k.shape[1], "T": q.shape[2]}


def _empty(like) -> torch.Tensor:
    """[B, H, T, D] in the memory of [B, T, H, D]"""
    b, h, t, d = like.shape
    return like.new_empty(b, t, h, d).transpose(1, 2)


def _strides(**tensors) -> dict[str, tuple[int, ...]]:
    return {f"{name}_strides": (0, 0, 0) if t is None else t.stride()[:3] for name, t in tensors.items()}


@on_device
def forward(q, k, v, prefix, causal, mask, separate, p, seed, scale):
    """-> o [B, H, T, D], o_x or None, lse [B, H, T] float32 (of both parts, or of the tokens), lse_p or None"""
    q, k, v = _rows(q), _rows(k), _rows(v)
    o, lse = _empty(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    o_x, lse_p = (_empty(q), torch.empty_like(lse)) if separate else (None, None)
    if lse.numel() == 0:
        return o, o_x, lse, lse_p
    prefix, prefix_strides, sizes = _prefix(prefix)
    blocks = _blocks(ATTEND, q, sizes["P"], p)
    kernels.prefix_attention_kernel[(lse[..., 0].numel() * triton.cdiv(q.shape[2], blocks["BLOCK_T"]),)](
        q, k, v, prefix=prefix, o_ptr=o, o_x_ptr=o_x, lse_ptr=lse, lse_p_ptr=lse_p, scale=scale, S=k.shape[2],
        prefix_strides=prefix_strides, CAUSAL=causal, SEPARATE=separate, **_strides(q=q, k=k, v=v, o=o), **_mask(mask),
        **_heads(q, k), **sizes, **dropout(p, seed), **blocks,
    )  # fmt: skip
    return o, o_x, lse, lse_p


@on_device
def backward(do, q, k, v, prefix, o, lse, lse_p, causal, mask, separate, p, seed, scale, needs):
    """-> the gradients of q, k, v and of prefix's first six, None where not needed.

    o, lse: of both parts, or separate: of the tokens, and lse_p of the prefix. A gate's, log_bias's and gate_out's are float32.
    """
    do, q, k, v = _rows(do), _rows(q), _rows(k), _rows(v)
    needs_q, needs_k, needs_v, needs_pk, needs_pv, needs_gk, needs_gv, needs_bias, needs_out = needs
    if lse.numel() == 0:
        return _zeros(q, k, v, prefix, needs)
    tensors, prefix_strides, sizes = _prefix(prefix)
    common = dict(scale=scale, **_heads(q, k), **dropout(p, seed))
    of_prefix = dict(prefix=tensors, prefix_strides=prefix_strides, **sizes)
    of_tokens = dict(S=k.shape[2], CAUSAL=causal, **_strides(q=q, k=k, v=v, do=do), **_mask(mask))

    delta = torch.empty_like(lse) if needs_q or needs_k or not separate else None
    delta_p = torch.empty_like(lse) if separate and any((needs_q, *needs[3:])) else None
    blocks = _blocks(PREFIX, q, sizes["P"], p)
    rows = lse[..., 0].numel()
    kernels.prefix_attention_delta_kernel[(rows * triton.cdiv(q.shape[2], blocks["BLOCK_T"]),)](
        q, o_ptr=o, do_ptr=do, lse_p_ptr=lse_p, delta_ptr=delta, delta_p_ptr=delta_p, **_strides(q=q, o=o, do=do),
        **common, **of_prefix, **blocks,
    )  # fmt: skip
    if not separate:
        lse_p, delta_p = lse, delta

    dq = _empty(q) if needs_q else None
    dgk, dgv = None, None
    if needs_q or needs_gk or needs_gv:
        blocks = _blocks(QUERY, q, sizes["P"], p)
        tiles = triton.cdiv(q.shape[2], blocks["BLOCK_T"])
        shorter = any(t is not None for t in prefix[6:])
        dgk_parts, of_gk = _gate_parts(prefix[2] if needs_gk else None, q, tiles, shorter)
        dgv_parts, of_gv = _gate_parts(prefix[3] if needs_gv else None, q, tiles, shorter)
        kernels.prefix_attention_grad_query_kernel[(rows * tiles,)](
            q, k, v, do_ptr=do, lse_ptr=lse, lse_p_ptr=lse_p, delta_ptr=delta, delta_p_ptr=delta_p, dq_ptr=dq,
            dgk_ptr=dgk_parts, dgv_ptr=dgv_parts, dgk_columns=of_gk[2], dgv_columns=of_gv[2], GK_ROWS=of_gk[0],
            GK_COLUMNS=of_gk[1], GV_ROWS=of_gv[0], GV_COLUMNS=of_gv[1], **_strides(dq=dq),
            **common, **of_prefix, **of_tokens, **blocks,
        )  # fmt: skip
        dgk, dgv = (_to_shape(parts, gate) for parts, gate in ((dgk_parts, prefix[2]), (dgv_parts, prefix[3])))

    dk, dv = (_empty(t) if wanted else None for t, wanted in ((k, needs_k), (v, needs_v)))
    if (needs_k or needs_v) and k.shape[2]:
        blocks = _blocks(TOKEN, q, 0, p)
        kernels.prefix_attention_grad_token_kernel[(k[..., 0, 0].numel() * triton.cdiv(k.shape[2], blocks["BLOCK_N"]),)](
            q, k, v, do_ptr=do, lse_ptr=lse, delta_ptr=delta, dk_ptr=dk, dv_ptr=dv, **_strides(dk=dk, dv=dv),
            **common, **of_tokens, **blocks,
        )  # fmt: skip

    dpk, dpv, dbias = None, None, None
    if needs_pk or needs_pv or needs_bias:
        dpk, dpv, dbias = _grad_prefix(
            do, q, prefix, lse_p, delta_p, p, common, of_prefix, needs_pk, needs_pv, needs_bias
        )
    dout = _grad_gate_out(prefix, delta_p) if needs_out else None
    return dq, dk, dv, dpk, dpv, dgk, dgv, dbias, dout


def _zeros(q, k, v, prefix, needs):
    """Of an empty q"""
    wide = [t if t is None else t.float() for t in prefix[2:6]]
    return tuple(torch.zeros_like(t) if wanted else None for t, wanted in zip((q, k, v, *prefix[:2], *wide), needs))


def _gate_parts(gate, q, tiles: int, shorter: bool):
    """Where a gate's gradient goes, [B, H, T or tiles, P or 1]; whether it has rows, columns; how many columns"""
    if gate is None:
        return None, (False, False, 0)
    rows, columns = gate.shape[2] != 1, gate.shape[3] != 1
    new = q.new_zeros if shorter else q.new_empty  # positions that a shorter prefix does not have
    shape = (*q.shape[:2], q.shape[2] if rows else tiles, gate.shape[3])
    return new(shape, dtype=torch.float32), (rows, columns, gate.shape[3])


def _to_shape(parts, gate):
    if parts is None or parts.shape == gate.shape:
        return parts
    return parts.sum([d for d in range(3) if gate.shape[d] == 1], keepdim=True)


def _grad_prefix(do, q, prefix, lse, delta, p, common, of_prefix, needs_pk, needs_pv, needs_bias):
    """-> dpk, dpv, dβ, by parts of the batch and of the queries, so that parts x adapters x tiles fill the device twice over"""
    pk, pv, log_bias = prefix[0], prefix[1], prefix[4]
    flat = prefix[8] is not None
    sizes = (1, *pk.shape) if flat else pk.shape
    blocks = _blocks(PREFIX, q, sizes[2], p)
    tiles = triton.cdiv(sizes[2], blocks["BLOCK_P"]) * sizes[1]
    most = q.shape[0] * triton.cdiv(q.shape[2], blocks["BLOCK_T"])
    parts = min(2 * multiprocessors(q.device) // max(tiles, 1), most, LARGEST_PARTS // max(pk.numel(), 1))
    parts = max(1, parts)

    def partial(wanted, like, *shape):
        if not wanted:
            return None
        return q.new_empty((parts, *shape), dtype=torch.float32 if parts > 1 or like is None else like.dtype)

    dpk, dpv = (partial(wanted, t, *sizes) for wanted, t in ((needs_pk, pk), (needs_pv, pv)))
    dbias = partial(needs_bias, None, sizes[0], q.shape[1], sizes[2])
    if tiles:
        kernels.prefix_attention_grad_prefix_kernel[(tiles * sizes[0] * parts,)](
            q, do_ptr=do, lse_ptr=lse, delta_ptr=delta, dpk_ptr=dpk, dpv_ptr=dpv, dbias_ptr=dbias, B=q.shape[0],
            PARTS=parts, ALL_ROWS=prefix[6] is None and not flat, **_strides(q=q, do=do), **common, **of_prefix, **blocks,
        )  # fmt: skip

    def summed(of, like):
        return None if of is None else (of[0] if parts == 1 else of.sum(0)).to(like.dtype).view(like.shape)

    dpk, dpv = summed(dpk, pk), summed(dpv, pv)
    if dbias is not None:
        dbias = dbias.sum(0) if log_bias.shape[0] == sizes[0] else dbias.sum([0, 1])[None]
    return dpk, dpv, dbias


def _grad_gate_out(prefix, delta):
    """dc [A or 1, H] = Σ δ over queries and over the rows of an adapter"""
    gate_out, index = prefix[5], prefix[6]
    of_row = delta.sum(2)  # [B, H]; zeros where a row has no prefix
    if gate_out.shape[0] == 1 or index is None:
        return of_row.sum(0, keepdim=True)
    adapters = torch.arange(gate_out.shape[0], device=index.device)[:, None]
    return torch.where((index == adapters)[..., None], of_row, 0.0).sum(1)
