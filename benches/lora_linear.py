"""lora_linear: y = x Wᵀ + scale·(x Aᵀ) Bᵀ over a frozen dense layer, beside what a user would otherwise run."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import fastpeft as fp

from .kit import peers, plans
from .kit.case import (
    BEST,
    BOTH,
    DTYPES,
    FORWARD,
    OURS,
    OVERHEAD,
    OWN_OVERHEAD,
    TIME,
    WITH_GRADIENTS,
    Cost,
    Function,
    Limit,
    Ring,
    Work,
    ring_length,
    sample_rows,
)  # fmt: skip
from .kit.cuda import WARM
from .kit.peers import COMPILED, COMPOSITION, PEERS, PEFT, PEFT_LOW
from .kit.rounds import FROZEN

KIND = "lora_linear"
SCALE = 2.0
SMALL_M = 32  # up to here the weights rotate past the last-level cache, as a whole model's would
LAYER, GROUP, DROPOUT, HOST = "layer", "group q/k/v", "dropout", "host cost"
NO_DROPOUT, THREE_CALLS, OWN_BASE = "dropout 0", "three calls", "frozen, fastpeft's base GEMM"
APPLIED, PLAIN = "fastpeft.apply", "F.linear"
NEVER_SLOWER = Limit(TIME, BEST, 1 / 0.97, rule="lora_linear: time over the best peer's")
QKV = (576, 192, 192)  # SmolLM2-135M


@dataclass(frozen=True)
class Case:
    """y [M, N] = x [M, K] through a frozen layer and its adapter of rank R; n: one, or those of a group over one x."""

    k: int
    n: int | tuple[int, ...]
    m: int
    dtype: str = "bf16"
    direction: str = BOTH
    r: int = 16
    what: str = LAYER
    isa: str | None = None  # caps the native kernels' instruction set
    compiled: bool = False  # measure torch.compile'd PEFT as well
    limits: tuple[Limit, ...] = (NEVER_SLOWER,)

    @property
    def name(self) -> str:
        what, isa = "" if self.what == LAYER else f"{self.what} ", f" isa={self.isa}" if self.isa else ""
        n = ",".join(map(str, self.ns))
        return f"{what}{self.k}->{n} M={self.m} {self.dtype} r={self.r} {self.direction}{isa}"

    @property
    def table(self) -> str:
        return f"{KIND}: {self.what}"

    @property
    def ns(self) -> tuple[int, ...]:
        return self.n if isinstance(self.n, tuple) else (self.n,)


# --------------------------------------------------------------------------------------------------------------- cases


def target_cases() -> list[Case]:
    """The rows that carry targets of their own."""

    def case(k: int, n: int, m: int, dtype: str, direction: str, *overheads: tuple[str, float]) -> Case:
        limits = tuple(Limit(OVERHEAD, peer, value) for peer, value in overheads)
        return Case(k, n, m, dtype, direction, limits=(*limits, NEVER_SLOWER), compiled=dtype == "bf16")

    return [
        case(2048, 2048, 512, "bf16", BOTH, (PEFT, 0.25), (COMPOSITION, 0.65)),
        case(576, 1536, 2048, "bf16", BOTH, (PEFT, 0.16), (COMPOSITION, 0.65)),
        case(576, 1536, 512, "bf16", BOTH, (PEFT, 0.2)),
        case(2048, 2048, 512, "fp32", BOTH, (BEST, 0.6)),
        case(2048, 2048, 1, "bf16", FORWARD, (PEFT, 0.4)),
        case(576, 1536, 1, "bf16", FORWARD, (PEFT, 0.4)),
    ]


def capped_cases() -> list[Case]:
    """An office PC's instruction set: never slower than PEFT. (PyTorch's own kernels are not capped.)"""
    never = (Limit(TIME, PEFT, 1.0, rule="lora_linear with AVX2: time over PEFT's"),)
    shapes = ((2048, 2048, 512, BOTH), (576, 1536, 512, BOTH), (576, 1536, 2048, BOTH), (2048, 2048, 1, FORWARD))
    return [
        Case(k, n, m, dtype, direction, isa="avx2", limits=never)
        for dtype in ("bf16", "fp32")
        for k, n, m, direction in (*shapes, (576, 1536, 1, FORWARD))
    ]


def sweep_cases() -> list[Case]:
    """By shape and M, without the target rows: SmolLM2-135M's four shapes, 2048² and 4096²."""
    shapes = ((576, 576), (576, 192), (576, 1536), (1536, 576), (2048, 2048), (4096, 4096))
    found = []
    for dtype, (k, n), m in itertools.product(("bf16", "fp32"), shapes, (1, 4, 16, 64, 512, 2048)):
        if k == 4096 and (m > 512 or dtype == "fp32"):
            continue  # minutes a row on two cores
        if dtype == "fp32" and (k, n) not in ((576, 1536), (2048, 2048)):
            continue
        found += [Case(k, n, m, dtype, FORWARD)] if m <= 512 else []
        found += [Case(k, n, m, dtype, BOTH)] if m >= 16 else []
    known = {case.name for case in target_cases()}
    return [case for case in found if case.name not in known]


def other_cases() -> list[Case]:
    """A group, dropout 0.1 over 0, and the host's cost of a call."""
    group = (Limit(OVERHEAD, THREE_CALLS, 0.7),)
    dropout = (Limit(TIME, NO_DROPOUT, 1.05),)
    host = {  # of F.linear; of PEFT's layer
        (FORWARD, "bf16"): (1.0, 0.22), (FORWARD, "fp32"): (1.3, 0.26),
        (WITH_GRADIENTS, "bf16"): (2.8, 0.45), (WITH_GRADIENTS, "fp32"): (3.6, 0.5),
    }  # fmt: skip
    found = [Case(576, QKV, 1024, what=GROUP, limits=group)]
    found += [Case(k, n, 512, what=DROPOUT, limits=dropout) for k, n in ((2048, 2048), (576, 1536))]
    for (direction, dtype), (op, layer) in host.items():
        limits = (Limit(TIME, PLAIN, op), Limit(TIME, PEFT, layer, ours=APPLIED))
        found.append(Case(16, 16, 4, dtype, direction, r=4, what=HOST, limits=limits))
    return found


def gpu_cases() -> tuple[list[Case], list[Case]]:
    """(rows with targets of an H100, the rest; first what matters most)"""
    warm = partial(Limit, mode=WARM)
    headline = Case(4096, 4096, 8192, limits=(warm(OWN_OVERHEAD, "", 0.10), NEVER_SLOWER))
    group = Case(4096, (4096, 1024, 1024), 8192, what=GROUP, limits=(warm(OWN_OVERHEAD, "", 0.06),))
    first = [headline, group, Case(4096, 4096, 8192, what=DROPOUT, limits=(warm(TIME, NO_DROPOUT, 1.03),))]
    first += [case for case in other_cases() if case.what == HOST]
    shapes = ((4096, 4096), (2048, 2048), (576, 1536), (4096, 14336), (14336, 4096))
    rest = [Case(k, n, m) for m in (2048, 512, 16384, 64) for k, n in shapes]
    rest += [Case(k, n, m, "bf16", FORWARD) for m in (1, 16, 512) for k, n in shapes[:4]]
    rest += [replace(headline, r=r, limits=(NEVER_SLOWER,)) for r in (8, 64, 256)]
    return first, rest + [Case(4096, 4096, 2048, dtype) for dtype in ("fp16", "fp32")]


# ------------------------------------------------------------------------------------------------------ inputs, functions


@dataclass
class Layers:
    """One x, and for each N a ring of frozen weights with adapters (fp32)."""

    x: Tensor  # [M, K]
    dy: list[Tensor]  # [M, N]
    weights: list[list[Tensor]]  # [N, K], by ring index, then by projection
    a: list[list[Tensor]]  # [R, K]
    b: list[list[Tensor]]  # [N, R]

    @staticmethod
    def make(case: Case, device: str) -> Layers:
        generator = torch.Generator(device).manual_seed(0)
        dtype, gradients = DTYPES[case.dtype], case.direction != FORWARD
        rotated = device == "cpu" and case.m <= SMALL_M and case.what == LAYER
        sets = ring_length(sum(case.ns) * case.k * dtype.itemsize) if rotated else 1

        def randn(rows: int, columns: int, of: torch.dtype, std: float = 1.0) -> Tensor:
            return torch.randn(rows, columns, generator=generator, device=device).mul_(std).to(of)

        x = randn(case.m, case.k, dtype).requires_grad_(gradients)
        dy = [randn(case.m, n, dtype) for n in case.ns]
        first = [randn(n, case.k, dtype, case.k**-0.5) for n in case.ns]
        a = [[randn(case.r, case.k, torch.float32, case.k**-0.5) for _ in case.ns] for _ in range(sets)]
        b = [[randn(n, case.r, torch.float32, case.r**-0.5) for n in case.ns] for _ in range(sets)]
        for adapter in (*sum(a, []), *sum(b, [])):
            adapter.requires_grad_()
        # other memory is enough, values do not matter
        return Layers(x, dy, [first, *([w.clone() for w in first] for _ in range(sets - 1))], a, b)


def cost(case: Case, device: str) -> Cost:
    """What the adapter adds stands apart: within the CPU's cache only its arithmetic."""
    m, k, n, r, item = case.m, case.k, sum(case.ns), case.r, DTYPES[case.dtype].itemsize
    both, lora = case.direction == BOTH, sum(k + n for n in case.ns)
    extra_flops = (6 if both else 2) * m * r * lora
    extra_bytes = 4 * r * lora * (2 if both else 1)  # fp32 A, B read; dA, dB written
    if device == "cuda":  # s needs a read of x beside the GEMM's own, dB one of dy, dA another of x
        extra_bytes += item * m * (2 * k + n if both else k)
    flops = (4 if both else 2) * m * k * n + extra_flops
    size = item * (n * k + m * (k + n) * (2 if both else 1)) + extra_bytes
    past_cache = case.m <= SMALL_M or device == "cuda"
    return Cost(flops, size, extra_flops, extra_bytes if past_cache else 0)


def exact(case: Case, of: Layers, weights: list[Tensor] | None = None) -> list[tuple[slice | None, Tensor]]:
    """float64: y of each projection, then dx, dA, dB of each; y and dx on some rows."""
    rows = sample_rows(case.m)
    x, a, b = of.x.detach().double(), *([t.detach().double() for t in ts[0]] for ts in (of.a, of.b))
    w, dys = [t.double() for t in weights or of.weights[0]], [t.double() for t in of.dy]
    s = [x @ a_i.t() for a_i in a]
    y = [(rows, x[rows] @ w_i.t() + SCALE * s_i[rows] @ b_i.t()) for w_i, s_i, b_i in zip(w, s, b)]
    if case.direction != BOTH:
        return y
    ds = [SCALE * dy @ b_i for dy, b_i in zip(dys, b)]
    dx = sum(dy[rows] @ w_i + ds_i[rows] @ a_i for dy, w_i, ds_i, a_i in zip(dys, w, ds, a))
    da, db = [ds_i.t() @ x for ds_i in ds], [SCALE * dy.t() @ s_i for dy, s_i in zip(dys, s)]
    return [*y, (rows, dx), *((None, t) for t in (*da, *db))]


def work(case: Case, device: str) -> Work:
    """A case's functions; the reference (frozen, or what the row's target is over) first."""
    of, both = Layers.make(case, device), case.direction == BOTH
    made = Work({}, DTYPES[case.dtype], of.dy if both else None, case.direction == WITH_GRADIENTS)
    made.within = partial(plans.instruction_set, case.isa)
    ring = Ring(list(range(len(of.weights))))

    def function(call: Callable[[int], Any], parameters: Callable[[int], list] | None = None, **more: Any) -> Function:
        return Function(call, ring, lambda i: [of.x, *(parameters(i) if parameters else [])], **more)

    own = lambda i: [*of.a[i], *of.b[i]]  # noqa: E731
    made.plain = function(lambda i: [peers.composition(of.x, *t, SCALE) for t in _each(of, i)], own)
    made.exact = lambda truth: exact(case, of)
    if case.what != HOST:
        made.cost = cost(case, device)
    fill = {LAYER: _layer, GROUP: _group, DROPOUT: _dropout, HOST: _host}[case.what]
    fill(case, of, made, function, own)
    return made


def _each(of: Layers, i: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    return list(zip(of.weights[i], of.a[i], of.b[i]))


def _op(of: Layers, p: float = 0.0) -> Callable[[int], Tensor]:
    return lambda i: fp.ops.lora_linear(of.x, of.weights[i][0], of.a[i][0], of.b[i][0], scale=SCALE, dropout_p=p)


def _peft(of: Layers, low: bool = False) -> list[Any]:
    first = [[one[0] for one in ts] for ts in (of.weights, of.a, of.b)]
    return peers.peft_layers(*first, scale=SCALE, dropout=0.0, low=low)


def _layer(case: Case, of: Layers, made: Work, function: Callable[..., Function], own: Callable) -> None:
    x, found, default = of.x, made.functions, _peft(of)
    found[FROZEN] = function(lambda i: linear(x, of.weights[i][0]))
    found[PEFT] = function(lambda i: default[i](x), lambda i: peers.adapters(default[i]))
    if case.dtype != "fp32":  # in fp32 the two are one
        low = _peft(of, low=True)
        found[PEFT_LOW] = function(lambda i: low[i](x), lambda i: peers.adapters(low[i]))
    if case.compiled:
        graph = peers.compiled()
        found[COMPILED] = function(lambda i: graph(default[i], x), lambda i: peers.adapters(default[i]))
    found[COMPOSITION] = function(lambda i: peers.composition(x, *_each(of, i)[0], SCALE), own)
    found[OURS] = function(_op(of), own)
    if case.m <= 64 and case.direction == FORWARD and x.device.type == "cpu":
        for name, plan in plans.cpu_plans(case.m, case.dtype).items():
            found[name] = function(_op(of), own, within=plan)
            made.plans += (name,)
    made.rivals = PEERS


def _group(case: Case, of: Layers, made: Work, function: Callable[..., Function], own: Callable) -> None:
    """Where fastpeft's base GEMM is faster than PyTorch's, overheads over the frozen layers are negative and have no ratio:
    on the CPU the reference is the frozen layers by fastpeft's own GEMM."""
    x, w, count, found = of.x, of.weights[0], len(case.ns), made.functions
    scales, none = [SCALE] * count, [None] * count
    if x.device.type == "cpu":
        found[OWN_BASE] = function(lambda i: fp.ops.lora_linear_group(x, w, none, none, scales=scales))
    found[FROZEN] = function(lambda i: [linear(x, w_i) for w_i in w])
    one = lambda w_i, a_i, b_i: fp.ops.lora_linear(x, w_i, a_i, b_i, scale=SCALE)  # noqa: E731
    found[THREE_CALLS] = function(lambda i: [one(*t) for t in _each(of, i)], own)
    found[COMPOSITION] = made.plain
    found[OURS] = function(lambda i: fp.ops.lora_linear_group(x, w, of.a[i], of.b[i], scales=scales), own)
    made.unchecked = (FROZEN, OWN_BASE)


def _dropout(case: Case, of: Layers, made: Work, function: Callable[..., Function], own: Callable) -> None:
    made.functions = {NO_DROPOUT: function(_op(of), own), OURS: function(_op(of, 0.1), own)}
    made.unchecked = (OURS,)  # random; its masks are what tests check
    made.cost = Cost()


def _host(case: Case, of: Layers, made: Work, function: Callable[..., Function], own: Callable) -> None:
    """Inputs so small that nothing but the call counts."""
    x, w = of.x, of.weights[0][0]
    (layer,), (applied,) = _peft(of), _peft(of)
    fp.apply(torch.nn.ModuleList([applied]))
    made.functions = {
        PLAIN: function(lambda i: linear(x, w)),
        PEFT: function(lambda i: layer(x)),
        APPLIED: function(lambda i: applied(x)),
        OURS: function(_op(of), own),
    }
    made.unchecked, made.host = (PLAIN,), True
