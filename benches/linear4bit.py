"""linear4bit: frozen NF4 weights in blocks of 64, bf16, beside bitsandbytes, the dense layer and PyTorch's int4 op.

fwd      `fp.ops.linear4bit`, no gradient
dX       dy W alone, as autograd computes it
fwd+bwd  the QLoRA layer, gradients of x, A and B
decode   the weight in bf16 again, beside a copy that moves as many bytes
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import fastpeft as fp

from . import lora_linear as lora
from .kit import machine, peers, plans
from .kit.case import (
    BEST,
    BOTH,
    BYTES,
    DECODE,
    FORWARD,
    GRAD,
    OURS,
    TIME,
    Cost,
    Function,
    Limit,
    Ring,
    Work,
    ring_length,
    sample_rows,
)
from .kit.cuda import COLD, WARM
from .kit.rounds import FROZEN

KIND = "linear4bit"
EVAL = "bitsandbytes eval"  # its layer in eval mode: its own packing and kernel, where the CPU has AVX512-BF16
TRAINING = "bitsandbytes training"  # its layer in training mode: matmul_4bit
DEQUANTISE = "bitsandbytes dequantise + GEMM"  # dequantize_4bit, then the dense layer
INT4 = "torch int4"  # another format: affine int4 in groups of 64, packed ahead
PEFT_4BIT = "PEFT + bitsandbytes"
DOUBLE, LORA, APPLIED = "fastpeft, double quantisation", "fastpeft, bf16 base", "fastpeft.apply"
COPY = "copy"  # of as many bytes, read and written
RIVALS = (EVAL, TRAINING, DEQUANTISE)
DTYPE, R = torch.bfloat16, 16
ROWS = (1, 4, 16, 64, 128, 512)
SHAPES = ((2048, 2048), (4096, 4096), (4096, 11008))
GPU_SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))


@dataclass(frozen=True)
class Case:
    """One row over a weight [N, K]. double: fastpeft's and the peers' scales are quantised too."""

    k: int
    n: int
    m: int
    what: str = FORWARD
    double: bool = False
    limits: tuple[Limit, ...] = ()

    @property
    def name(self) -> str:
        rows = "" if self.what == DECODE else f" M={self.m} bf16{f' r={R}' if self.what == BOTH else ''}"
        return f"{'nf4+dq' if self.double else 'nf4'} {self.k}->{self.n}{rows} {self.what}"

    @property
    def table(self) -> str:
        return "QLoRA layer" if self.what == BOTH else KIND if self.what == FORWARD else f"{KIND}: {self.what}"


# --------------------------------------------------------------------------------------------------------------- cases


def limits(k: int, m: int) -> tuple[Limit, ...]:
    """What is asked of a square layer's forward pass on this CPU: times over a peer's."""
    large, single = k == 4096, Limit(TIME, OURS, 1.05, ours=DOUBLE)
    if m == 1:
        return Limit(TIME, BEST, 1 / 1.6), Limit(TIME, TRAINING, 1 / 10), single
    if m == 16:
        return Limit(TIME, FROZEN, 0.6) if machine.cpu()["amx"] else Limit(TIME, BEST, 1 / 1.3), single
    dense = 1.15 if not large else 1.10 if m == 128 else 1.08
    return Limit(TIME, FROZEN, dense), Limit(TIME, BEST, 1 / 1.08 if large else 1.0), single


def target_cases() -> list[Case]:
    """The rows that carry targets, one shape's weights at a time."""
    layer = {2048: 1 / 1.12, 4096: 1 / 1.25}
    return [
        case
        for k in (2048, 4096)
        for case in (
            *(Case(k, k, m, limits=limits(k, m)) for m in (1, 16, 128, 512)),
            Case(k, k, 512, BOTH, double=True, limits=(Limit(TIME, PEFT_4BIT, layer[k]),)),
        )
    ]


def sweep_cases() -> list[Case]:
    """Every shape and M, all of them with double quantisation too; without the target rows."""
    every = (Case(k, n, m, double=double) for (k, n), double, m in itertools.product(SHAPES, (False, True), ROWS))
    known = {case.name for case in target_cases()}
    return [case for case in every if case.name not in known]


def gpu_cases() -> tuple[list[Case], list[Case]]:
    """(rows with targets of an H100, the rest; first what the crossover between our plans needs)"""

    def case(shape: tuple[int, int], m: int, what: str = FORWARD, *asked: Limit) -> Case:
        return Case(*shape, m, what, double=True, limits=asked)

    square, third = GPU_SHAPES[0], Limit(TIME, BEST, 1 / 3, mode=WARM)
    first = [case(square, 8192, BOTH, Limit(TIME, LORA, 1.05, mode=WARM))]
    first += [case(shape, 1, FORWARD, Limit(BYTES, "", 1 / 0.7, mode=COLD)) for shape in GPU_SHAPES]
    first += [case(square, m, FORWARD, third) for m in (16, 32, 64)]
    first.append(case(square, 512, FORWARD, Limit(TIME, BEST, 1 / 1.3, mode=WARM)))
    first += [case(shape, m, GRAD, Limit(TIME, BEST, 1 / 2, mode=WARM)) for shape in GPU_SHAPES for m in (16, 64)]
    rest = [case(shape, m, what) for m in (512, 2048, 8192) for what in (FORWARD, GRAD) for shape in GPU_SHAPES]
    rest = [one for one in rest if one.what == FORWARD or one.m != 2048]
    rest += [case(square, 512, BOTH), *(case(shape, 0, DECODE) for shape in GPU_SHAPES)]
    rest += [case(shape, m) for m in (64, 16, 4, 32) for shape in GPU_SHAPES]
    known = {one.name for one in first}
    return first, [one for one in rest if one.name not in known]


# -------------------------------------------------------------------------------------------------------------- weights


@functools.cache
def bitsandbytes(device: str) -> ModuleType | None:
    """`kit.bnb`, if bitsandbytes imports and multiplies on this device."""
    try:
        from .kit import bnb

        layer = bnb.layer(torch.randn(64, 64, device=device).to(DTYPE), double=True)
        y = layer(torch.ones(1, 64, dtype=DTYPE, device=device))
        return bnb if bool(torch.isfinite(y).all()) else None
    except Exception:  # not installed, or a build without this device: it says so in many ways
        return None


@dataclass
class Weights:
    """One weight [N, K] in every form, each made when first asked for, in a ring of its own."""

    k: int
    n: int
    device: str
    sets: int | None = None  # of each form; None: as many as it takes to rotate past the CPU's cache
    made: dict[str, Ring] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator(self.device).manual_seed(0)
        weight = torch.randn(self.n, self.k, generator=generator, device=self.device)
        self.weight = weight.mul_(self.k**-0.5).to(DTYPE)

    def ring(self, name: str, first: Callable[[], Any], copied: Callable[[Any], Any], bits: int = 4) -> Ring:
        if name not in self.made:
            one = first()
            count = self.sets or (1 if self.device != "cpu" else ring_length(bits * self.n * self.k // 8))
            self.made[name] = Ring([one, *(copied(one) for _ in range(count - 1))])
        return self.made[name]

    def dense(self) -> Ring:
        return self.ring("dense", lambda: self.weight, torch.clone, bits=16)

    def ours(self, double: bool) -> Ring:
        return self.ring(
            f"ours {double}", lambda: fp.ops.quantize_4bit(self.weight, double_quant=double), copy.deepcopy
        )

    def theirs(self, double: bool) -> Ring:
        """bitsandbytes' layers in training mode."""
        bnb = bitsandbytes(self.device)
        return self.ring(f"theirs {double}", lambda: bnb.layer(self.weight, double=double), copy.deepcopy)

    def packed(self, double: bool) -> Ring:
        """bitsandbytes' layers in eval mode, packed."""
        bnb, layer = bitsandbytes(self.device), self.theirs(double).items[0]
        return self.ring(f"packed {double}", lambda: bnb.packed(layer), copy.deepcopy)

    def exact(self, truth: str) -> Tensor:
        """float32: what the bytes of a truth ("theirs True", ..) stand for."""
        form, _, double = truth.partition(" ")
        if form == "theirs":
            return bitsandbytes(self.device).dequantise(self.theirs(double == "True").items[0], torch.float32)
        if form == "int4":
            return self.made["int4"].items[0].dense()
        with fp.backend("torch"):  # the definition
            return self.ours(double == "True").items[0].dequantize(torch.float32)


@functools.lru_cache(maxsize=1)
def weights_of(k: int, n: int, device: str) -> Weights:
    """Kept from row to row of one shape: making them takes seconds."""
    return Weights(k, n, device)


# ------------------------------------------------------------------------------------------------------------ functions


def cost(case: Case, size: int) -> Cost:
    """The weight's `size` read once a pass, x and y or their gradients."""
    k, n, m, item = case.k, case.n, case.m, DTYPE.itemsize
    flops, moved = 2 * m * k * n, size + item * m * (k + n)
    if case.what == DECODE:
        moved += item * k * n
    if case.what == BOTH:
        flops, moved = 2 * flops + 6 * m * R * (k + n), 2 * moved
    return Cost(flops, moved)


def work(case: Case, device: str, of: Weights | None = None) -> Work:
    of = of or weights_of(case.k, case.n, device)
    made = Work({}, DTYPE, cost=cost(case, of.ours(case.double).items[0].nbytes), rivals=RIVALS)
    {FORWARD: _forward, GRAD: _grad, BOTH: _layer, DECODE: _decode}[case.what](case, of, made)
    return made


def _randn(*shape: int, device: str, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def _forward(case: Case, of: Weights, made: Work) -> None:
    x, double, found = _randn(case.m, case.k, device=of.device).to(DTYPE), case.double, made.functions
    rows, ours, theirs = sample_rows(case.m, 64), f"ours {double}", f"theirs {double}"
    op = lambda w: fp.ops.linear4bit(x, w)  # noqa: E731
    found[FROZEN] = Function(lambda w: linear(x, w), of.dense())
    found[OURS] = Function(op, of.ours(double), truth=ours)
    if not double:
        found[DOUBLE] = Function(op, of.ours(True), truth="ours True")
    bnb = bitsandbytes(of.device)
    if bnb is not None:
        ring = of.theirs(double)
        if of.device == "cpu" and bnb.packs(ring.items[0]):
            found[EVAL] = Function(lambda layer: layer(x), of.packed(double), truth=theirs)
        found[TRAINING] = Function(lambda layer: layer(x), ring, truth=theirs)
        found[DEQUANTISE] = Function(lambda layer: bnb.dequantise_and_multiply(layer, x), ring, truth=theirs)
        if of.device == "cpu" and bnb.has_int4() and case.n % 16 == 0 and case.k % bnb.BLOCK == 0:
            ring = of.ring("int4", lambda: bnb.Int4(case.n, case.k), bnb.Int4.clone)
            found[INT4] = Function(lambda w: w(x), ring, truth="int4")
    _plans(case, made, found[OURS], of.device)
    low = of.exact(ours).to(DTYPE)
    made.plain = Function(lambda w: linear(x, low), found[OURS].ring, truth=ours)
    made.exact = lambda truth: [(rows, x[rows].double() @ of.exact(truth).double().t())]


def _plans(case: Case, made: Work, ours: Function, device: str) -> None:
    if device != "cpu":
        for name, plan in plans.gpu_4bit_plans(case.m, case.what == FORWARD).items():
            made.functions[name] = replace(ours, within=plan)
            made.plans += (name,)


def _grad(case: Case, of: Weights, made: Work) -> None:
    """Backward of one forward, done on the stream that first calls it, so that a graph can capture it."""
    x, dy = (_randn(case.m, d, device=of.device).to(DTYPE) for d in (case.k, case.n))
    x.requires_grad_()
    ours, theirs, rows = f"ours {case.double}", f"theirs {case.double}", sample_rows(case.m, 64)

    def function(forward: Callable[[Any], Tensor], ring: Ring, truth: str = "") -> Function:
        done: dict[tuple[int, Any], Tensor] = {}

        def call(item: Any) -> Tensor:
            key = id(item), torch.cuda.current_stream() if of.device != "cpu" else None
            if key not in done:
                done[key] = forward(item)
            return torch.autograd.grad(done[key], x, dy, retain_graph=True)[0]

        return Function(call, ring, truth=truth)

    found, bnb = made.functions, bitsandbytes(of.device)
    found[FROZEN] = function(lambda w: linear(x, w), of.dense())
    found[OURS] = function(lambda w: fp.ops.linear4bit(x, w), of.ours(case.double), ours)
    if bnb is not None:
        found[TRAINING] = function(lambda layer: layer(x), of.theirs(case.double), theirs)
    _plans(case, made, found[OURS], of.device)
    low = of.exact(ours).to(DTYPE)
    made.plain, made.grad = Function(lambda w: dy @ low, found[OURS].ring, truth=ours), True
    made.exact = lambda truth: [(rows, dy[rows].double() @ of.exact(truth).double())]


def _decode(case: Case, of: Weights, made: Work) -> None:
    source = torch.ones(int(made.cost.bytes) // (2 * DTYPE.itemsize), dtype=DTYPE, device=of.device)
    copied, ours, bnb = torch.empty_like(source), f"ours {case.double}", bitsandbytes(of.device)
    made.functions[COPY] = Function(lambda _: copied.copy_(source), Ring([None]))
    made.functions[OURS] = Function(lambda w: w.dequantize(DTYPE), of.ours(case.double), truth=ours)
    if bnb is not None:
        decoded = lambda layer: bnb.dequantise(layer, DTYPE)  # noqa: E731
        made.functions[DEQUANTISE] = Function(decoded, of.theirs(case.double), truth=f"theirs {case.double}")
    made.plain = Function(lambda w: of.exact(ours).to(DTYPE), of.ours(case.double), truth=ours)
    made.exact, made.unchecked = lambda truth: [(None, of.exact(truth).double())], (COPY,)


def _layer(case: Case, of: Weights, made: Work) -> None:
    """The QLoRA layer; fp32 adapters, as PEFT keeps them."""
    like = lora.Case(case.k, case.n, case.m, "bf16", BOTH, r=R)
    one, double, found = lora.Layers.make(like, of.device), case.double, made.functions
    x, a, b = one.x, one.a[0][0], one.b[0][0]
    ours, theirs, bnb = f"ours {double}", f"theirs {double}", bitsandbytes(of.device)

    def op(w: Any) -> Tensor:
        return fp.ops.lora_linear(x, w, a, b, scale=lora.SCALE)

    def peft(layers: list[Any]) -> list[Any]:
        count = len(layers)
        return peers.peft_layers(layers, [a] * count, [b] * count, scale=lora.SCALE, dropout=0.0, low=False)

    def adapted(w: Any) -> list[Tensor]:
        return [x, a, b]

    def of_layer(layer: Any) -> list[Tensor]:
        return [x, *peers.adapters(layer)]

    found[FROZEN] = Function(lambda w: linear(x, w), of.dense(), lambda w: [x])
    found[OURS] = Function(op, of.ours(double), adapted, ours)
    found[LORA] = Function(op, of.dense(), adapted, "dense")
    if bnb is not None:
        ring = of.theirs(double)
        found[PEFT_4BIT] = Function(lambda layer: layer(x), Ring(peft(ring.items)), of_layer, theirs)
        applied = peft(copy.deepcopy(ring.items))
        if all(row.path == "fast" for row in fp.apply(torch.nn.ModuleList(applied)).layers):
            found[APPLIED] = Function(lambda layer: layer(x), Ring(applied), of_layer, theirs)
    low = of.exact(ours).to(DTYPE)
    composition = lambda w: peers.composition(x, low, a, b, lora.SCALE)  # noqa: E731
    made.plain, made.dy, made.rivals = Function(composition, of.ours(double), adapted, ours), one.dy, (PEFT_4BIT,)
    made.exact = lambda truth: lora.exact(like, one, [of.weight if truth == "dense" else of.exact(truth)])
