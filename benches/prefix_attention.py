"""prefix_attention: attention with a gated prefix in front of keys and values, beside what a user would otherwise run.

    s^x = q kᵀ/√D + mask;   s^p = G ⊙ (q pkᵀ)/√D;   o = Σ e^{s^p − L} G·pv + Σ e^{s^x − L} v,   L = logsumexp(s^p, s^x)

PEFT's recipe has no gates; it is timed beside us without them, and with gates that are one value for all queries multiplied
into the prefix before it is joined, which computes the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import fastpeft as fp

from .kit import attention
from .kit.attention import CONCATENATION, FLEX, GATED_RECIPE, RECIPE
from .kit.case import BOTH, DTYPES, FORWARD, OURS, TIME, Cost, Function, Limit, Ring, Work, ring_length
from .kit.cuda import WARM
from .kit.peers import COMPOSITION
from .kit.rounds import FROZEN

KIND = "prefix_attention"
DECODER, ENCODER, DROPOUT, DECODE = (
    "decoder",
    "encoder",
    "dropout",
    "decode",
)  # causal; with padding; one query, a cache
TOKEN, QUERY = "token", "query"  # gates [B, 1, 1, P]; [B, 1, T, P], as a causal model's
CUDNN = "frozen, cuDNN"
UNGATED = "ungated"  # the truth of those who leave the gates out
RIVALS = (RECIPE, GATED_RECIPE, CONCATENATION, COMPOSITION, FLEX)
NEVER_SLOWER = Limit(TIME, RECIPE, 1.0, rule="prefix_attention: time over PEFT's recipe, forward+backward")


@dataclass(frozen=True)
class Case:
    """o [B, H, T, D] over S keys of Hk heads and a prefix of P."""

    t: int
    p: int = 32
    dtype: str = "bf16"
    direction: str = BOTH
    gates: str | None = TOKEN
    what: str = DECODER
    shape: tuple[int, int, int, int] = (2, 16, 4, 64)  # B, H, Hk, D
    s: int | None = None  # None: T
    compiled: bool = False  # measure FlexAttention under torch.compile as well, which has no backward on CPUs
    limits: tuple[Limit, ...] = ()

    @property
    def keys(self) -> int:
        return self.t if self.s is None else self.s

    @property
    def name(self) -> str:
        b, h, kv, d = self.shape
        heads = f"B{b} H{h}{f' Hk{kv}' if kv != h else ''} D{d}"
        tokens = f"T={self.t}{f' S={self.s}' if self.s is not None else ''}"
        gates = f"{self.gates} gates" if self.gates else "no gates"
        return f"{self.what} {heads} {tokens} P={self.p} {gates} {self.dtype} {self.direction}"

    @property
    def table(self) -> str:
        return f"{KIND}: {self.what}"


# --------------------------------------------------------------------------------------------------------------- cases


def target_cases() -> list[Case]:
    """The rows that carry targets: over attention without a prefix, and over PEFT's recipe."""
    found = []
    for dtype in ("bf16", "fp32"):
        for t, room, gain in ((1024, 1.04, 1.3), (2048, 1.02, 1.5)):
            over = Limit(TIME, FROZEN, room + 2 * 32 / t)
            found.append(Case(t, dtype=dtype, direction=FORWARD, compiled=dtype == "bf16", limits=(over,)))
            found.append(Case(t, dtype=dtype, limits=(Limit(TIME, RECIPE, 1 / gain), NEVER_SLOWER)))
        found += [Case(t, dtype=dtype, limits=(NEVER_SLOWER,)) for t in (512, 128, 64)]
    return found


def sweep_cases() -> list[Case]:
    """Short forward passes, a longer prefix, a gate a query, none, an encoder without and with dropout, a token and a cache."""
    found, encoder = [], (16, 12, 12, 32)
    for dtype in ("bf16", "fp32"):
        both = partial(Case, dtype=dtype, limits=(NEVER_SLOWER,))
        found += [both(1024, 128), both(1024, gates=QUERY), both(1024, gates=None)]
        found += [both(128, 16, what=what, shape=encoder) for what in (ENCODER, DROPOUT)]
        forward = partial(Case, dtype=dtype, direction=FORWARD)
        found += [forward(t) for t in (512, 128, 64)]
        found += [forward(1024, 128), forward(1024, gates=QUERY), forward(128, 16, what=ENCODER, shape=encoder)]
        found += [forward(1, s=1024, what=DECODE)]
    return found


def gpu_cases() -> tuple[list[Case], list[Case]]:
    """(rows with targets of an H100, the rest)"""
    case, over = partial(Case, 2048, shape=(2, 32, 8, 128)), partial(Limit, TIME, mode=WARM)
    floor = tuple(over(peer, 1.02 + 2 * 32 / 2048) for peer in (FROZEN, CUDNN))
    first = [case(gates=None, direction=FORWARD, compiled=True, limits=floor)]
    first.append(case(gates=None, compiled=True, limits=(over(RECIPE, 1 / 1.8),)))
    rest = [case(gates=gates, direction=direction) for gates in (TOKEN, QUERY) for direction in (BOTH, FORWARD)]
    rest.append(Case(1, s=4096, what=DECODE, direction=FORWARD, shape=(16, 32, 8, 128)))
    return first, rest


# ------------------------------------------------------------------------------------------------------ inputs, functions


@dataclass
class Cache:
    """Keys and values; where tokens are decoded, also behind the prefix, as PEFT keeps them."""

    k: Tensor  # [B, Hk, S, D]
    v: Tensor
    joined: tuple[Tensor, Tensor] | None = None


@dataclass
class Inputs:
    q: Tensor  # [B, H, T, D], memory as a model's: [B, T, H, D]
    do: Tensor
    caches: list[Cache]
    pk: Tensor  # float32 [1, Hk, P, D]
    pv: Tensor
    gate: Tensor | None  # float32 [B, 1, 1 or T, P]
    padding: Tensor | None  # bool [B, S]

    @staticmethod
    def make(case: Case, device: str) -> Inputs:
        (b, h, kv, d), s, dtype = case.shape, case.keys, DTYPES[case.dtype]
        generator, trained = torch.Generator(device).manual_seed(0), case.direction == BOTH
        randn = partial(torch.randn, generator=generator, device=device)

        def heads(count: int, length: int) -> Tensor:
            return randn(b, length, count, d).to(dtype).transpose(1, 2).requires_grad_(trained)

        q, do = heads(h, case.t), heads(h, case.t).detach()
        pk, pv = (randn(1, kv, case.p, d).requires_grad_(trained) for _ in range(2))
        queries = case.t if case.gates == QUERY else 1
        gate = randn(b, 1, queries, case.p).sigmoid_().requires_grad_(trained) if case.gates else None
        rotated = device == "cpu" and case.what == DECODE  # past the last-level cache, as the layers of a model
        caches = [Cache(heads(kv, s), heads(kv, s))]
        for _ in range(ring_length(4 * b * kv * s * d * dtype.itemsize) - 1 if rotated else 0):
            caches.append(Cache(caches[0].k.clone(), caches[0].v.clone()))
        for cache in caches if case.what == DECODE else ():
            cache.joined = attention.joined(pk, cache.k), attention.joined(pv, cache.v)
        padding = None
        if case.what in (ENCODER, DROPOUT):
            lengths = torch.linspace(s // 2, s, b, device=device).round()
            padding = torch.arange(s, device=device) < lengths[:, None]
        return Inputs(q, do, caches, pk, pv, gate, padding)


def cost(case: Case) -> Cost:
    """Two products of a query and a key forward, five backward; what the prefix adds stands apart."""
    (b, h, kv, d), t, s, both = case.shape, case.t, case.keys, case.direction == BOTH
    pairs = t * s - t * (t - 1) // 2 if case.what == DECODER else t * s
    flops = (14 if both else 4) * b * h * d
    moved = DTYPES[case.dtype].itemsize * b * d * ((6 if both else 2) * (h * t + kv * s))
    return Cost(flops * (pairs + t * case.p), moved, flops * t * case.p, 0)


def exact(case: Case, of: Inputs, truth: str) -> list[tuple[slice | None, Tensor]]:
    """float64, one row and key head at a time: o, then the gradients of q, k, v, the prefix and gates."""
    cache, gated = of.caches[0], of.gate is not None and truth != UNGATED
    given = [of.q, cache.k, cache.v, of.pk, of.pv, *([of.gate] if gated else [])]
    q, k, v, pk, pv, *gates = (x.detach().double() for x in given)
    o, grads = torch.empty_like(q), [torch.zeros_like(x) for x in (q, k, v, pk, pv, *gates)]
    mask = attention.visible(case.t, case.keys, case.p, case.what == DECODER, of.padding, str(q.device))
    groups = q.shape[1] // k.shape[1]
    for row in range(q.shape[0]):
        for head in range(k.shape[1]):
            own = slice(head * groups, (head + 1) * groups)
            at = [(row, own), *[(row, head)] * 2, *[(0, head)] * 2, *[(row, 0)] * len(gates)]
            parts = [x[i].clone().requires_grad_() for x, i in zip((q, k, v, pk, pv, *gates), at, strict=True)]
            y = _attention(*parts, mask=None if mask is None else mask[row % len(mask), 0])
            o[row, own] = y.detach()
            if case.direction == BOTH:
                for grad, i, found in zip(
                    grads, at, torch.autograd.grad(y, parts, of.do[row, own].double()), strict=True
                ):
                    grad[i] += found
    return [(None, x) for x in (o, *(grads if case.direction == BOTH else []))]


def _attention(
    q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, gate: Tensor | None = None, *, mask: Tensor | None
) -> Tensor:
    """q [.., T, D]; k, v [.., S, D]; pk, pv [.., P, D]; gate [.., 1 or T, P]; mask bool [.., 1 or T, P + S]"""
    gate = q.new_ones(()) if gate is None else gate
    s = torch.cat([gate * (q @ pk.mT), q @ k.mT], -1) * q.shape[-1] ** -0.5
    w = (s if mask is None else s.masked_fill(~mask, -torch.inf)).softmax(-1)
    of_prefix, of_tokens = w.split([pk.shape[-2], k.shape[-2]], -1)
    return (of_prefix * gate) @ pv + of_tokens @ v


def work(case: Case, device: str) -> Work:
    """A case's functions; attention without a prefix first."""
    of, both = Inputs.make(case, device), case.direction == BOTH
    made = Work({}, DTYPES[case.dtype], [of.do] if both else None, cost=cost(case), rivals=RIVALS)
    q, pk, pv, gate, ring = of.q, of.pk, of.pv, of.gate, Ring(of.caches)
    causal, p = case.what == DECODER, 0.1 if case.what == DROPOUT else 0.0
    prefix = [pk, pv] if gate is None else [pk, pv, gate]

    def function(
        call: Callable[[Tensor, Tensor], Any], trained: list[Tensor], truth: str = "", **more: Any
    ) -> Function:
        wrt = lambda cache: [q, cache.k, cache.v, *trained]  # noqa: E731
        return Function(lambda cache: call(cache.k, cache.v), ring, wrt, truth, **more)

    padding = None if of.padding is None else of.padding[:, None, None]
    plain = partial(
        sdpa, q, attn_mask=padding, dropout_p=p, is_causal=causal, enable_gqa=case.shape[1] != case.shape[2]
    )
    op = partial(
        fp.ops.prefix_attention, q, prefix_k=pk, prefix_v=pv, gate_k=gate, gate_v=gate, is_causal=causal,
        key_padding_mask=of.padding, dropout_p=p,
    )  # fmt: skip
    seen = attention.visible(case.t, case.keys, case.p, causal, of.padding, device)
    folded = gate if case.gates == TOKEN else None  # into the prefix
    ungated = UNGATED if gate is not None else ""
    others = [pk, pv] if folded is None else prefix, ungated if folded is None else ""
    found = made.functions
    found[FROZEN] = function(lambda k, v: plain(k, v), [])
    if device != "cpu" and not p:
        cudnn = partial(torch.nn.attention.sdpa_kernel, torch.nn.attention.SDPBackend.CUDNN_ATTENTION)
        found[CUDNN] = function(lambda k, v: plain(k, v), [], within=cudnn)
    if case.what == DECODE:
        whole = lambda cache: sdpa(q, *cache.joined, enable_gqa=True)  # noqa: E731
        found[RECIPE] = Function(whole, ring, truth=ungated)
    else:
        dense = None if seen is None else seen.expand(-1, -1, case.t, -1).contiguous()
        found[RECIPE] = function(lambda k, v: attention.recipe(q, k, v, pk, pv, dense, None, p), [pk, pv], ungated)
    if case.what not in (DECODE, DROPOUT):
        if folded is not None:
            found[GATED_RECIPE] = function(lambda k, v: attention.recipe(q, k, v, pk, pv, dense, folded), prefix)
        found[CONCATENATION] = function(lambda k, v: attention.concatenation(q, k, v, pk, pv, seen, folded), *others)
        if case.compiled:
            flex = attention.flex(case.t, case.keys, case.p, causal, of.padding, device)
            found[FLEX] = function(lambda k, v: flex(q, k, v, pk, pv, folded), *others)
    if device == "cpu" and not p:
        added = None if padding is None else torch.zeros(padding.shape, dtype=q.dtype).masked_fill(~padding, -torch.inf)
        composed = lambda k, v: attention.Composition.apply(q, k, v, pk, pv, gate, causal, added)  # noqa: E731
        found[COMPOSITION] = function(composed, prefix)
    found[OURS] = function(lambda k, v: op(k, v), prefix)
    made.unchecked = (FROZEN, CUDNN)

    def eager(k: Tensor, v: Tensor) -> Tensor:
        low = (attention.repeated(x.to(q.dtype), case.shape[1] // case.shape[2]) for x in (k, v, pk, pv))
        return _attention(q, *low, None if gate is None else gate.to(q.dtype), mask=seen)

    if not p:  # dropout is random; its masks are what tests check
        made.plain = found[COMPOSITION] if device == "cpu" else function(eager, prefix)
        made.exact = lambda truth: exact(case, of, truth)
    return made
