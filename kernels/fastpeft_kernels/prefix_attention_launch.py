"""Launches the Triton kernels of prefix_attention: block sizes, grids, workspaces.

`forward` and `backward` are all of the op, tokens and prefix; `tokens`, `grad_tokens`, `merge` and `grad_merge` the parts, as
the passes of `fastpeft.reference.prefix_attention`. `prefix` is the tuple (prefix_k, prefix_v, gate_k, gate_v, log_bias,
gate_out, index, lengths, offsets). Leading dimensions may have any strides.
"""

from __future__ import annotations

import math

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

# By bytes of q's elements and largest D: BLOCK_T, BLOCK_N, BLOCK_P, warps, stages, on small and on large machines. Chosen by
# spills (benches/COMPILED.md); not measured on a GPU.
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
    (4, 128): ((32, 32, 16, 8, 2), (16, 32, 16, 8, 2)),
    (4, 256): ((16, 16, 16, 4, 2), (16, 16, 16, 4, 2)),
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
    (2, 256): ((16, 0, 16, 8, 2), (16, 0, 16, 8, 2)),
    (4, 64): ((32, 0, 16, 4, 2), (32, 0, 16, 4, 2)),
    (4, 128): ((32, 0, 16, 8, 2), (16, 0, 16, 8, 2)),
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
    if block_t <= 32 and q.element_size() == 2 and d <= 128 and table in (ATTEND, QUERY):
        warps = 4  # few queries: what more warps share is too small
    blocks = {"BLOCK_T": block_t, "BLOCK_N": block_n, "BLOCK_P": block_p and _padded(prefix_length, block_p)}
    fixed = {"D": d, "BLOCK_D": _padded(d, LARGEST_D), "PRECISION": precision(q.dtype)}
    fixed["UNIT"] = 1.0 if q.dtype == torch.float32 else math.log2(math.e)
    return fixed | {k: v for k, v in blocks.items() if v} | {"num_warps": warps, "num_stages": stages}


def _rows(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _broadcast(t, *dims) -> tuple[int, ...]:
    """Strides of these dimensions, 0 where there is one element"""
    return (0,) * len(dims) if t is None else tuple(0 if t.shape[d] == 1 else t.stride(d) for d in dims)


def _strides(**tensors) -> dict[str, tuple[int, ...]]:
    return {f"{name}_strides": (0, 0, 0) if t is None else t.stride()[:3] for name, t in tensors.items()}


def _empty(like) -> torch.Tensor:
    """[B, H, T, D] that is [B, T, H, D] in memory, and no view"""
    return torch.empty_permuted(like.shape, (0, 2, 1, 3), dtype=like.dtype, device=like.device)


def _no_prefix(k) -> tuple:
    return (k[:1, :, :0], k[:1, :, :0], *(None,) * 7)


def _of_prefix(prefix) -> dict[str, object]:
    """Kernel arguments; P is the longest prefix that may be"""
    k, v, gate_k, gate_v, log_bias, gate_out, _, _, offsets = prefix
    k, v = _rows(k), _rows(v)
    if offsets is None:
        adapters, p = k.shape[0], k.shape[2]
        strides = [t.stride()[:3] for t in (k, v)]
    else:
        adapters = offsets.shape[0] - 1
        p = min([k.shape[1]] + [g.shape[3] for g in (gate_k, gate_v) if g is not None and g.shape[3] > 1])
        strides = [(0, *t.stride()[:2]) for t in (k, v)]
    strides += [_broadcast(gate, 0, 1, 2, 3) for gate in (gate_k, gate_v)]
    strides += [_broadcast(log_bias, 0, 1, 2), _broadcast(gate_out, 0, 1)]
    sizes = {"A": adapters, "P": p, "TOTAL": k.shape[-2]}
    return {"prefix": (k, v, *prefix[2:]), "prefix_strides": tuple(strides)} | sizes


def _of_tokens(k, v, causal, mask) -> dict[str, object]:
    """Kernel arguments; k and v None: none of the tokens"""
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    keys = mask is not None and mask.dim() == 2
    mask_strides = (mask.stride(0), 0, 0, mask.stride(1)) if keys else _broadcast(mask, 0, 1, 2, 3)
    return {
        "k_ptr": k, "v_ptr": v, "S": 0 if k is None else k.shape[2], "CAUSAL": causal, "mask_ptr": mask,
        "mask_strides": mask_strides, "KEY_MASK": keys, **_strides(k=k, v=v),
    }  # fmt: skip


def _of_all(q, kv_heads, scale, p, seed) -> dict[str, object]:
    heads = {"H": q.shape[1], "GROUP": q.shape[1] // kv_heads, "T": q.shape[2]}
    return {"q_ptr": q, "scale": scale, **heads, **_strides(q=q), **dropout(p, seed)}


def _grid(q, blocks) -> tuple[int]:
    return (q.shape[0] * q.shape[1] * triton.cdiv(q.shape[2], blocks["BLOCK_T"]),)


def _attend(q, k, v, prefix, o, o_x, lse, lse_p, causal, mask, p, seed, scale):
    if lse.numel() == 0:
        return
    q, k, v = _rows(q), k if k is None else _rows(k), v if v is None else _rows(v)
    of_prefix = _of_prefix(prefix)
    blocks = _blocks(ATTEND, q, of_prefix["P"], p)
    kernels.prefix_attention_kernel[_grid(q, blocks)](
        o_ptr=o, o_x_ptr=o_x, lse_ptr=lse, lse_p_ptr=lse_p, SEPARATE=lse_p is not None, **_strides(o=o, o_x=o_x),
        **_of_all(q, prefix[0].shape[-3], scale, p, seed), **of_prefix, **_of_tokens(k, v, causal, mask), **blocks,
    )  # fmt: skip


@on_device
def forward(q, k, v, prefix, causal, mask, separate, p, seed, scale):
    """-> o [B, H, T, D], o_x or None, lse [B, H, T] float32 (of both parts, or of the tokens), lse_p or None"""
    o, lse = _empty(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    o_x, lse_p = (_empty(q), torch.empty_like(lse)) if separate else (None, None)
    _attend(q, k, v, prefix, o, o_x, lse, lse_p, causal, mask, p, seed, scale)
    return o, o_x, lse, lse_p


def tokens(q, k, v, causal, mask, p, seed, scale):
    """-> o, lse of the tokens alone"""
    o, _, lse, _ = forward(q, k, v, _no_prefix(k), causal, mask, False, p, seed, scale)
    return o, lse


@on_device
def merge(q, prefix, o, lse, separate, p, seed, scale):
    """-> o, lse: joint, the prefix merged into both in place; separate, a new o, and the prefix's own lse"""
    if not separate:
        _attend(q, None, None, prefix, o, None, lse, None, False, None, p, seed, scale)
        return o, lse
    # in memory as o is, where that is [B, T, H, D] or [B, H, T, D]
    new = _empty(o) if o.stride(1) < o.stride(2) else torch.empty_like(o, memory_format=torch.contiguous_format)
    lse_p = torch.empty_like(lse)
    _attend(q, None, None, prefix, new, _rows(o), lse, lse_p, False, None, p, seed, scale)
    return new, lse_p


@on_device
def backward(do, q, k, v, prefix, o, lse, lse_p, causal, mask, separate, p, seed, scale, needs):
    """-> the gradients of q, k, v and of prefix's first six, None where not needed

    o, lse: of both parts, or separate: of the tokens, and lse_p of the prefix. A gate's, log_bias's and gate_out's are float32.
    """
    if lse.numel() == 0:
        return _zeros((q, k, v, *prefix[:6]), needs)
    do, q, k, v = map(_rows, (do, q, k, v))
    of_tokens = _of_tokens(k, v, causal, mask)
    of_all = _of_all(q, k.shape[1], scale, p, seed) | {"do_ptr": do} | _strides(do=do)
    dq, dk, dv = (_empty(t) if needed else None for t, needed in zip((q, k, v), needs))
    rest = _grad_prefix(q, prefix, o, lse, lse_p, dq, separate, p, of_all, of_tokens, needs, any(needs[:2]))
    delta, *grads = rest
    if (needs[1] or needs[2]) and k.shape[2]:
        blocks = _blocks(TOKEN, q, 0, p)
        kernels.prefix_attention_grad_token_kernel[
            (k.shape[0] * k.shape[1] * triton.cdiv(k.shape[2], blocks["BLOCK_N"]),)
        ](lse_ptr=lse, delta_ptr=delta, dk_ptr=dk, dv_ptr=dv, **_strides(dk=dk, dv=dv), **of_all, **of_tokens, **blocks)
    return dq, dk, dv, *grads


def grad_tokens(do, q, k, v, o, lse, causal, mask, p, seed, scale, needs):
    """-> dq, dk, dv of the tokens; o and lse may be those of both parts"""
    needs = (*needs, *(False,) * 6)
    return backward(do, q, k, v, _no_prefix(k), o, lse, None, causal, mask, False, p, seed, scale, needs)[:3]


@on_device
def grad_merge(do, q, prefix, o, lse, dq, separate, p, seed, scale, needs):
    """-> the gradients of prefix's first six; dq, unless None, is added to in place. separate: lse is the prefix's, o unread"""
    if lse.numel() == 0:
        return _zeros(prefix[:6], needs)
    do, q = _rows(do), _rows(q)
    of_all = _of_all(q, prefix[0].shape[-3], scale, p, seed) | {"do_ptr": do} | _strides(do=do)
    of_tokens, needs = _of_tokens(None, None, False, None), (dq is not None, False, False, *needs)
    return _grad_prefix(q, prefix, o, lse, lse, dq, separate, p, of_all, of_tokens, needs, False)[1:]


def _grad_prefix(q, prefix, o, lse, lse_p, dq, separate, p, of_all, of_tokens, needs, of_both):
    """-> Δ of lse's softmax, and the gradients of prefix's first six; dq is written, or without tokens added to

    of_both: Δ is needed where the prefix has its own
    """
    of_prefix = _of_prefix(prefix)
    delta = torch.empty_like(lse) if of_both or not separate else None
    delta_p = torch.empty_like(lse) if separate else None
    blocks = _blocks(PREFIX, q, of_prefix["P"], p)
    kernels.prefix_attention_delta_kernel[_grid(q, blocks)](
        o_ptr=o, lse_p_ptr=lse_p, delta_ptr=delta, delta_p_ptr=delta_p, **_strides(o=o), **of_all, **of_prefix, **blocks
    )
    if not separate:
        lse_p, delta_p = lse, delta

    dgk, dgv = None, None
    if needs[0] or needs[5] or needs[6]:
        blocks = _blocks(QUERY, q, of_prefix["P"], p)
        tiles, shorter = triton.cdiv(q.shape[2], blocks["BLOCK_T"]), any(t is not None for t in prefix[6:])
        dgk, of_gk = _gate_parts(prefix[2] if needs[5] else None, q, tiles, shorter)
        dgv, of_gv = _gate_parts(prefix[3] if needs[6] else None, q, tiles, shorter)
        kernels.prefix_attention_grad_query_kernel[_grid(q, blocks)](
            lse_ptr=lse, lse_p_ptr=lse_p, delta_ptr=delta, delta_p_ptr=delta_p, dq_ptr=dq, dgk_ptr=dgk, dgv_ptr=dgv,
            dgk_columns=of_gk[2], dgv_columns=of_gv[2], GK_ROWS=of_gk[0], GK_COLUMNS=of_gk[1], GV_ROWS=of_gv[0],
            GV_COLUMNS=of_gv[1], **_strides(dq=dq), **of_all, **of_prefix, **of_tokens, **blocks,
        )  # fmt: skip
    dpk, dpv, dbias = _grad_keys(q, prefix, lse_p, delta_p, p, of_all, of_prefix, needs)
    dout = _grad_gate_out(prefix, delta_p) if needs[8] else None
    return delta, dpk, dpv, _to_shape(dgk, prefix[2]), _to_shape(dgv, prefix[3]), dbias, dout


def _zeros(tensors, needs):
    """The gradients where q is empty: the last four tensors' are float32"""
    wide = [torch.float32 if i >= len(tensors) - 4 else None for i in range(len(tensors))]
    return tuple(torch.zeros_like(t, dtype=dtype) if need else None for t, dtype, need in zip(tensors, wide, needs))


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


def _grad_keys(q, prefix, lse, delta, p, of_all, of_prefix, needs):
    """-> dpk, dpv, dβ, by parts of the batch and of the queries, so that parts x adapters x tiles fill the device twice over"""
    needs_k, needs_v, needs_bias = needs[3], needs[4], needs[7]
    if not (needs_k or needs_v or needs_bias):
        return None, None, None
    pk, pv, log_bias = prefix[0], prefix[1], prefix[4]
    flat = prefix[8] is not None
    sizes = (1, *pk.shape) if flat else pk.shape
    blocks = _blocks(PREFIX, q, sizes[2], p)
    tiles = sizes[1] * triton.cdiv(sizes[2], blocks["BLOCK_P"])
    most = q.shape[0] * triton.cdiv(q.shape[2], blocks["BLOCK_T"])
    wanted = 2 * multiprocessors(q.device) // max(tiles, 1)
    parts = max(1, min(wanted, most, LARGEST_PARTS // max(pk.numel(), 1)))

    def parted(needed, dtype, *shape):
        return q.new_empty((parts, *shape), dtype=torch.float32 if parts > 1 else dtype) if needed else None

    dpk, dpv = parted(needs_k, pk.dtype, *sizes), parted(needs_v, pv.dtype, *sizes)
    dbias = parted(needs_bias, torch.float32, sizes[0], q.shape[1], sizes[2])
    if tiles:
        kernels.prefix_attention_grad_prefix_kernel[(tiles * sizes[0] * parts,)](
            lse_ptr=lse, delta_ptr=delta, dpk_ptr=dpk, dpv_ptr=dpv, dbias_ptr=dbias, B=q.shape[0], PARTS=parts,
            ALL_ROWS=prefix[6] is None and not flat, **of_all, **of_prefix, **blocks,
        )  # fmt: skip
    dpk, dpv = (d if d is None else d.sum(0).to(t.dtype).view(t.shape) for d, t in ((dpk, pk), (dpv, pv)))
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
