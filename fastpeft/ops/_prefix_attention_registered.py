"""The passes of prefix_attention as PyTorch sees them: registered ops, functional, with their fakes and FLOPs.

`Registered` has the signatures of a backend's passes; each op picks its backend when it runs. A policy of selective
checkpointing that is to keep attention names `fastpeft::prefix_attention_tokens`.
"""

from __future__ import annotations

import math

import torch

from ..backends.choice import choose
from ..backends.cpu import prefix_attention as cpu
from ..backends.cuda import prefix_attention as cuda
from ..backends.torch import prefix_attention as by_torch
from ..backends.triton import prefix_attention as triton
from ..reference.prefix_attention import by_query, like_tokens, wide_dtype
from ._op import define

# Of the two GPU backends, neither measured yet, the one that has tokens and prefix, and dropout, in one kernel comes first.
BACKENDS = {"cpu": cpu, "triton": triton, "cuda": cuda, "torch": by_torch}


def passes_for(meta, backend):
    """meta: q, k, v and the nine of the prefix"""
    return choose("prefix_attention", BACKENDS, meta, backend)


def _of_tokens(q, k, v):
    return q, k, v, q, q, *(None,) * 7


def _of_prefix(q, prefix):
    return q, q, q, *prefix


_TOKENS = "bool causal, Tensor? mask, float p, Tensor? seed, float scale"
_PREFIX = (
    "Tensor prefix_k, Tensor prefix_v, Tensor? gate_k, Tensor? gate_v, Tensor? log_bias, Tensor? gate_out, Tensor? index, "
    "Tensor? lengths, Tensor? offsets"
)


# ---- tokens ----------------------------------------------------------------------------------------------------------


def _tokens(q, k, v, causal, mask, p, seed, scale, backend):
    return passes_for(_of_tokens(q, k, v), backend).tokens(q, k, v, causal, mask, p, seed, scale)


def _tokens_fake(q, *rest):
    return by_query(q), q.new_empty(q.shape[:3], dtype=wide_dtype(q.dtype))


def _token_flops(q, k, *rest, **others):
    return 2 * 2 * math.prod(q) * k[2]


def _grad_token_flops(do, q, k, *rest, **others):
    return 5 * 2 * math.prod(q) * k[2]


tokens = define(
    f"prefix_attention_tokens(Tensor q, Tensor k, Tensor v, {_TOKENS}, str backend) -> (Tensor, Tensor)",
    _tokens,
    _tokens_fake,
    _token_flops,
)


def _grad_tokens(do, q, k, v, o, lse, causal, mask, p, seed, scale, needs, backend):
    passes = passes_for(_of_tokens(q, k, v), backend)
    found = passes.grad_tokens(do, q, k, v, o, lse, causal, mask, p, seed, scale, needs)
    return [d.contiguous() for d in found if d is not None]


def _grad_tokens_fake(do, q, k, v, o, lse, causal, mask, p, seed, scale, needs, backend):
    return [t.new_empty(t.shape) for t, need in zip((q, k, v), needs) if need]


grad_tokens = define(
    "prefix_attention_grad_tokens(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
    f"{_TOKENS}, bool[] needs, str backend) -> Tensor[]",
    _grad_tokens,
    _grad_tokens_fake,
    _grad_token_flops,
)

# ---- the prefix ------------------------------------------------------------------------------------------------------


def _prefix_flops(q, prefix_k, products, offsets):
    """Of flat prefixes the mean length"""
    length = prefix_k[-2] if offsets is None else prefix_k[-2] // max(offsets[0] - 1, 1)
    return products * 2 * math.prod(q) * length


def _forward(q, *rest):
    *prefix, o, lse, separate, p, seed, scale, backend = rest
    passes = passes_for(_of_prefix(q, prefix), backend)
    if not separate:  # a pass merges in place
        o, lse = o.clone(), lse.clone()
    return passes.forward(q, *prefix, o, lse, separate, p, seed, scale)


def _forward_fake(q, *rest):
    *_, o, lse, separate, p, seed, scale, backend = rest
    return like_tokens(o) if separate else torch.empty_like(o), torch.empty_like(lse)


forward = define(
    f"prefix_attention_forward(Tensor q, {_PREFIX}, Tensor o, Tensor lse, bool separate, float p, Tensor? seed, float scale, "
    "str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    lambda q, prefix_k, *rest, out_shape, **others: _prefix_flops(q, prefix_k, 2, rest[7]),
)


def _backward(do, q, *rest):
    """dq, if there is one, and those gradients that are needed."""
    *prefix, o, lse, dq, separate, p, seed, scale, needs, backend = rest
    passes = passes_for(_of_prefix(q, prefix), backend)
    dq = None if dq is None else dq.clone()
    found = passes.backward(do, q, *prefix, o, lse, dq, separate, p, seed, scale, needs)
    return [d for d in (dq, *(None if d is None else d.contiguous() for d in found)) if d is not None]


def _backward_fake(do, q, *rest):
    *prefix, o, lse, dq, separate, p, seed, scale, needs, backend = rest
    wide = wide_dtype(q.dtype)
    dtypes = prefix[0].dtype, prefix[1].dtype, wide, wide, wide, wide
    found = [t.new_empty(t.shape, dtype=dtype) for t, dtype, need in zip(prefix, dtypes, needs) if need]
    return found if dq is None else [torch.empty_like(dq), *found]


backward = define(
    f"prefix_attention_backward(Tensor do, Tensor q, {_PREFIX}, Tensor? o, Tensor lse, Tensor? dq, bool separate, float p, "
    "Tensor? seed, float scale, bool[] needs, str backend) -> Tensor[]",
    _backward,
    _backward_fake,
    lambda do, q, prefix_k, *rest, out_shape, **others: _prefix_flops(q, prefix_k, 5, rest[7]),
)


# ---- as passes -------------------------------------------------------------------------------------------------------


class Registered:
    """What a dispatch mode or a compiler sees."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def fused(self, *arguments) -> None:
        return None

    grad_fused = fused

    def tokens(self, q, k, v, causal, mask, p, seed, scale):
        return tokens(q, k, v, causal, mask, p, seed, scale, self.backend)

    def grad_tokens(self, do, q, k, v, o, lse, causal, mask, p, seed, scale, needs):
        found = iter(grad_tokens(do, q, k, v, o, lse, causal, mask, p, seed, scale, needs, self.backend))
        return tuple(next(found) if need else None for need in needs)

    def forward(self, q, *rest):
        return forward(q, *rest, self.backend)

    def backward(self, do, q, *rest):
        *_, dq, separate, p, seed, scale, needs = rest
        found = iter(backward(do, q, *rest, self.backend))
        if dq is not None:  # in the backward pass no policy keeps it
            dq.copy_(next(found))
        return tuple(next(found) if need else None for need in needs)
