"""prefix_attention: attention over tokens and a gated, learned prefix that is never copied into the batch or the keys.

    s^x = scale·q kᵀ + mask;   s^p = scale·Gk ⊙ (q pkᵀ) + β
    joint:     o = Σ e^{s^p − L} Gv·pv + Σ e^{s^x − L} v,   L = logsumexp(s^p, s^x)
    separate:  o = softmax(s^x) v + c·softmax(s^p) (Gv ⊙ pv)

Top-down: the public function; the way to the passes; `forward` and `backward` over those of any backend
(`backends/<device>/prefix_attention.py`, or registered: `_prefix_attention_registered.py`); one autograd.Function.
Attention over tokens gives (o, lse), into which the prefix is merged. Backward hands the merged ones to both parts: the
gradient of a softmax needs of the other part only Δ = do·o and the common lse (Dao et al. 2022, section 3.1).
"""

from __future__ import annotations

import torch
from torch._C._autograd import _profiler_enabled
from torch.compiler import is_compiling

from ..backends.choice import allows, forced
from ..reference import prefix_attention as reference
from . import _check
from . import _prefix_attention_check as check
from ._op import Watch, once_differentiable, plain_call, transformed
from ._prefix_attention_registered import Registered, passes_for
from ._registered import Named


def prefix_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    *,
    mode: str = "joint",
    gate_k: torch.Tensor | None = None,
    gate_v: torch.Tensor | None = None,
    log_bias: torch.Tensor | None = None,
    gate_out: torch.Tensor | None = None,
    is_causal: bool = False,
    key_padding_mask: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    prefix_index: torch.Tensor | None = None,
    prefix_lengths: torch.Tensor | None = None,
    prefix_offsets: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention with learned prefixes, forward and backward: prefix tuning, APT's and UniPELT's gates, LLaMA-Adapter.

    Args:
        q: [B, H, T, D], float32, bfloat16 or float16 (float64, and D > 256, run on the torch backend); any strides.
        k, v: [B, Hk, S, D] of q's dtype; H / Hk heads share one (GQA).
        prefix_k, prefix_v: [A, Hk, P, D], any floating dtype (fp32 masters get fp32 gradients); one prefix for all (A = 1),
            or A of them of which `prefix_index` picks a row's own. Or flat, [Hk, ΣP, D] with `prefix_offsets`.
        mode: "joint", one softmax over prefix and tokens (Li & Liang 2021), or "separate", two, and their outputs added
            (LLaMA-Adapter: Zhang et al. 2023).
        gate_k, gate_v: factors of the prefix' scores and values, broadcastable to [B, H, T, P] (APT: Zhang et al. 2023).
        log_bias: added to the prefix' scores, [H, P] or [A, H, P] (flat: [H, ΣP]); −∞ prunes a position.
        gate_out: factor of the prefix' output in mode "separate", [H] or [A, H].
        is_causal: a query sees the keys up to its own, counted from the last: T < S is decoding with a cache. Every query
            sees the whole prefix.
        key_padding_mask: bool [B, S], True = attend.
        attn_mask: bool (True = attend) or added to the scores, broadcastable to [B, H, T, S], causal already where that is
            wanted. One that requires grad runs the torch definition, as torch.func's transforms and dropout_p = 1 do.
        prefix_index: int32 [B], −1 = no prefix. One out of range makes its row NaN.
        prefix_lengths: int32 [A], of prefixes shorter than P. prefix_offsets: int64 [A + 1], where flat ones begin and end.
        dropout_p: probability in [0, 1] that a softmax weight is dropped; the others are scaled by 1/(1-p).
        seed: int, or int64 tensor [], that fixes the mask (Philox4x32-10); None draws one from PyTorch's generator.
        scale: of the scores; None is 1/√D.

    Returns:
        o [B, H, T, D] of q's dtype, which may be changed in place. A query that sees neither a token nor a prefix gets zeros
        and gives zero gradients. Gradients flow to q, k, v, the prefixes, gates and log_bias.

    Raises:
        TypeError, ValueError: an argument of the wrong type, rank, shape, dtype or device, or two that exclude each other.
        RuntimeError: a forced backend cannot run this call (the message says why).
    """
    q, k, v = _autocast(q, k, v)
    check.heads(q, k, v)
    check.prefixes(q, k, prefix_k, prefix_v, prefix_index, prefix_lengths, prefix_offsets)
    gated = check.gates(q, prefix_k, prefix_offsets, gate_k, gate_v, log_bias, gate_out, mode)
    mask = check.masks(q, k, is_causal, key_padding_mask, attn_mask)
    scale = check.number(q, scale, dropout_p)
    seed = _check.seed_tensor(check.OP, seed, q.device) if dropout_p else None
    prefix = (prefix_k, prefix_v, *gated, prefix_index, prefix_lengths, prefix_offsets)
    separate = mode == "separate"
    trained_mask = mask is not None and mask.requires_grad and torch.is_grad_enabled()
    if trained_mask or dropout_p == 1.0 or transformed():
        return _by_definition(q, k, v, prefix, is_causal, mask, separate, dropout_p, seed, scale)
    q, k, v = map(check.dense_rows, (q, k, v))
    prefix = (
        *map(check.dense_rows, prefix[:2]),
        *map(check.plain_memory, prefix[2:6]),
        *map(check.dense_rows, prefix[6:]),
    )
    mask = check.plain_memory(mask)
    numbers = is_causal, separate, dropout_p, scale
    plain = plain_call(q) and not q.is_meta
    passes = passes_for((q, k, v, *prefix), forced()) if plain else forced()
    if plain and _profiler_enabled():
        passes = Named(passes, check.OP)
    trained = torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in (q, k, v, *prefix[:6])])
    if not trained:
        return forward(_passes(passes), q, k, v, prefix, mask, seed, *numbers)[0]
    return PrefixAttention.apply((passes, *numbers), q, k, v, *prefix, mask, seed)


# ---- from the public call to forward ---------------------------------------------------------------------------------


def _autocast(*heads):
    """Under autocast q, k and v take its dtype, as in `torch.nn.functional.scaled_dot_product_attention`."""
    first = heads[0]
    if not isinstance(first, torch.Tensor) or first.is_meta or not torch.is_autocast_enabled(first.device.type):
        return heads
    dtype = torch.get_autocast_dtype(first.device.type)
    return [
        t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in heads
    ]


def _by_definition(q, k, v, prefix, causal, mask, separate, p, seed, scale):
    if not allows("torch"):
        raise RuntimeError(
            f"prefix_attention: backend {forced()!r} was forced, but an attn_mask that requires grad, dropout_p = 1, and "
            "torch.func's transforms run only on the torch backend"
        )
    return reference.prefix_attention(
        q, k, v, *prefix, causal=causal, mask=mask, separate=separate, dropout_p=p, seed=seed, scale=scale
    )


def _passes(of):
    """A plain call has a backend's passes already; else `of` is the name of the forced backend, or ""."""
    return Registered(of) if isinstance(of, str) else of


# ---- forward and backward over the passes of any backend -------------------------------------------------------------


def forward(passes, q, k, v, prefix, mask, seed, causal, separate, p, scale):
    """-> o; in mode "separate" o_x, the tokens' part, else None; lse (joint: of both parts); lse_p (separate) or None"""
    found = passes.fused(q, k, v, *prefix, causal, mask, separate, p, seed, scale)
    if found is not None:
        return found
    o_x, lse = passes.tokens(q, k, v, causal, mask, p, seed, scale)
    o, other = passes.forward(q, *prefix, o_x, lse, separate, p, seed, scale)
    return (o, o_x, lse, other) if separate else (o, None, other, None)


def backward(passes, do, q, k, v, prefix, mask, seed, o, lse, lse_p, causal, separate, p, scale, needs):
    """-> the gradients of q, k, v and the first six of the prefix, None where not needed. o: o_x in mode "separate" """
    found = passes.grad_fused(do, q, k, v, *prefix, o, lse, lse_p, causal, mask, separate, p, seed, scale, needs)
    if found is not None:
        return found
    dq = dk = dv = None
    if any(needs[:3]):
        dq, dk, dv = passes.grad_tokens(do, q, k, v, o, lse, causal, mask, p, seed, scale, needs[:3])
    rest = (None,) * 6
    if needs[0] or any(needs[3:]):
        of_prefix = (None, lse_p) if separate else (o, lse)
        rest = passes.backward(do, q, *prefix, *of_prefix, dq, separate, p, seed, scale, needs[3:])
    return dq, dk, dv, *rest


# ---- autograd --------------------------------------------------------------------------------------------------------


class PrefixAttention(torch.autograd.Function):
    """apply(call, q, k, v, *prefix (nine), mask, seed) -> o;  call: passes (see `_passes`) and the numbers of `forward`"""

    @staticmethod
    def forward(ctx, call, *tensors):
        passes, causal, separate, p, scale = call
        q, k, v, *prefix, mask, seed = tensors
        o, o_x, lse, lse_p = forward(_passes(passes), q, k, v, prefix, mask, seed, causal, separate, p, scale)
        ctx.set_materialize_grads(False)
        ctx.call = call
        kept, o, ctx.watch = _apart(o_x, o, plain=not isinstance(passes, str))
        ctx.save_for_backward(*tensors, kept, lse, lse_p)
        return o

    @staticmethod
    def backward(ctx, do):
        if do is None:
            return (None,) * 15
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[1:10]  # checkpointing lets them be unpacked once only
        with torch.no_grad():
            found = _gradients(ctx.call, needs, saved, do, ctx.watch)
        if torch.is_grad_enabled() and not is_compiling():  # create_graph=True
            found = once_differentiable(check.OP, found, (*saved, do))
        return None, *found, *(None,) * 5


def _apart(o_x, o, plain):
    """-> what backward will read: o_x, else o; o as the caller may change it in place; a watch on it where both share memory"""
    if not plain:  # a policy of checkpointing, or a compiler, may keep what an op returned
        return (o, o.clone(), None) if o_x is None else (o_x, o if is_compiling() else o.clone(), None)
    if o._is_view():  # autograd would allow no change of one
        o = o.data
    return (o.data, o, Watch(o)) if o_x is None else (o_x, o, None)


def _gradients(call, needs, saved, do, watch):
    passes, *numbers = call
    q, k, v, *prefix, mask, seed, o, lse, lse_p = saved
    if not isinstance(passes, str) and not plain_call(do):
        passes = forced()
    if watch is not None and watch.changed():
        o, _, lse, lse_p = forward(_passes(passes), q, k, v, prefix, mask, seed, *numbers)
    found = backward(_passes(passes), check.dense_rows(do), q, k, v, prefix, mask, seed, o, lse, lse_p, *numbers, needs)
    return tuple(None if d is None else d.to(t.dtype) for d, t in zip(found, (q, k, v, *prefix)))
