"""Frozen 4-bit layers beside their peers: `linear4bit` by shape and M, and the QLoRA layer, forward and backward.

`cases()` and `qlora_cases()` say what is measured; `measure()` and `measure_qlora()` measure one case and return a line for
the results file. NF4 in blocks of 64, bf16. Weights always rotate past the last-level cache, each form in a ring of its own.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import fastpeft as fp

from . import _bitsandbytes as bnb
from . import _machine, _peers
from . import bench_lora_linear as lora
from ._bitsandbytes import DEQUANTISE, EVAL, INT4, PEFT_4BIT, TRAINING
from ._measure import AGAIN, FROZEN, UNDEFINED, Samples, paired, validity
from ._peers import OURS
from ._targets import FLOOR_ROOM, Target, target
from .bench_lora_linear import BOTH, SCALE, Limit, Tick

DOUBLE = "fastpeft, double quantisation"
APPLIED = "fastpeft.apply"  # PEFT's layers after fp.apply, where it has a fast path for them
BEST = "best of bitsandbytes"
RIVALS = (EVAL, DEQUANTISE)  # the best of these is `BEST`
BYTE_SHARE = 0.85  # at M=1, a limit against BEST asks for no more than this share of the byte floor
DTYPE = torch.bfloat16
ROWS = (1, 4, 16, 64, 128, 512)
SHAPES = ((2048, 2048), (4096, 4096), (4096, 11008))


@dataclass(frozen=True)
class Case:
    """One row: y [M, N] = x [M, K] through a frozen NF4 layer. double: fastpeft's and the peers' scales are quantised too."""

    k: int
    n: int
    m: int
    double: bool = False

    @property
    def name(self) -> str:
        return f"{'nf4+dq' if self.double else 'nf4'} {self.k}->{self.n} M={self.m} bf16 fwd"


def limits(case: Case, amx: bool) -> tuple[Limit, ...]:
    """What is asked of a case: times of fastpeft over a peer's."""
    if case.double or (case.k, case.n) not in ((2048, 2048), (4096, 4096)):
        return ()
    large = case.k == 4096
    single = Limit("time", OURS, 1.05)  # of DOUBLE
    if case.m == 1:
        return Limit("time", BEST, 1 / 1.6), Limit("time", TRAINING, 1 / 10), single
    if case.m == 16:
        return Limit("time", FROZEN, 0.6) if amx else Limit("time", BEST, 1 / 1.3), single
    if case.m in (128, 512):
        dense = 1.15 if not large else 1.10 if case.m == 128 else 1.08
        return Limit("time", FROZEN, dense), Limit("time", BEST, 1 / 1.08 if large else 1.0), single
    return ()


def target_cases() -> list[Case]:
    return [Case(k, k, m) for k in (2048, 4096) for m in (1, 16, 128, 512)]


def cases(full: bool = False) -> list[Case]:
    """Default: the rows that carry targets. Full: every shape and M, and all of them with double quantisation."""
    found = target_cases()
    if full:
        every = [Case(k, n, m, double) for double, (k, n), m in itertools.product((False, True), SHAPES, ROWS)]
        found = sorted({*found, *every}, key=lambda c: (c.k, c.n, c.double, c.m))  # one shape's weights at a time
    return found


def qlora_cases() -> list[lora.Case]:
    """The QLoRA layer's rows, forward and backward with gradients of x, A and B."""
    wanted = ((2048, 1 / 1.12), (4096, 1 / 1.25))
    return [lora.Case(k, k, 512, "bf16", BOTH, limits=(Limit("time", PEFT_4BIT, v),)) for k, v in wanted]


# ----------------------------------------------------------------------------------------------------------- weights


@dataclass
class Ring:
    """The same weight several times in memory, and a cursor that all functions over it share."""

    items: list[Any]
    next: Callable[[], Any] = field(init=False)

    def __post_init__(self) -> None:
        self.next = functools.partial(next, itertools.cycle(self.items))


class Rings:
    """One frozen weight [N, K] in every form that is measured, made when first asked for."""

    def __init__(self, k: int, n: int, sets: int | None = None):
        """sets: how many of each form; default, as many as it takes to rotate past the CPU's cache."""
        generator = torch.Generator().manual_seed(0)
        self.k, self.n, self.sets = k, n, sets
        self.weight = torch.randn(n, k, generator=generator).mul_(k**-0.5).to(DTYPE)
        self._made: dict[str, Ring] = {}
        self._layers: dict[bool, Any] = {}

    def _ring(self, name: str, first: Callable[[], Any], copied: Callable[[Any], Any], size: int) -> Ring:
        if name not in self._made:
            one = first()
            count = self.sets or lora.ring_length(size)
            self._made[name] = Ring([one, *(copied(one) for _ in range(count - 1))])
        return self._made[name]

    def dense(self) -> Ring:
        return self._ring("dense", lambda: self.weight, torch.clone, 2 * self.n * self.k)

    def ours(self, double: bool) -> Ring:
        def copied(w: fp.Weight4bit) -> fp.Weight4bit:
            return replace(w, data=w.data.clone(), scales=w.scales.clone())

        def first() -> fp.Weight4bit:
            return fp.ops.quantize_4bit(self.weight, blocksize=bnb.BLOCK, double_quant=double)

        return self._ring(f"ours {double}", first, copied, self.n * self.k // 2)

    def bitsandbytes(self, double: bool) -> Ring:
        return self._ring(f"bitsandbytes {double}", lambda: self._layer(double), copy.deepcopy, self.n * self.k // 2)

    def _layer(self, double: bool) -> Any:
        if double not in self._layers:
            self._layers[double] = bnb.layer(self.weight, double=double)
        return self._layers[double]

    def packed(self, double: bool) -> Ring:
        """bitsandbytes' layers in eval mode, packed."""
        size = self.n * self.k // 2
        return self._ring(f"packed {double}", lambda: bnb.packed(self._layer(double)), copy.deepcopy, size)

    def int4(self) -> Ring:
        return self._ring("int4", lambda: bnb.Int4(self.n, self.k), bnb.Int4.clone, self.n * self.k // 2)

    def stands_for(self, double: bool) -> Tensor:
        """fp32 [N, K] that bitsandbytes' bytes stand for; fastpeft's are held against it too."""
        return bnb.dequantise(self._layer(double), torch.float32)


_rings: dict[tuple[int, int], Rings] = {}


def rings(k: int, n: int) -> Rings:
    """Kept from row to row of one shape: making them takes seconds."""
    if (k, n) not in _rings:
        _rings.clear()
        _rings[k, n] = Rings(k, n)
    return _rings[k, n]


# ------------------------------------------------------------------------------------------------------------ linear4bit

Provider = tuple[Ring, Callable[[Any], Tensor]]


def providers(case: Case, of: Rings, x: Tensor) -> dict[str, Provider]:
    """name -> (its ring of weights, a call with one of them)."""
    linear, double = torch.nn.functional.linear, case.double
    found: dict[str, Provider] = {FROZEN: (of.dense(), lambda w: linear(x, w))}
    found[OURS] = (of.ours(double), lambda w: fp.ops.linear4bit(x, w))
    if not double:
        found[DOUBLE] = (of.ours(True), lambda w: fp.ops.linear4bit(x, w))
    theirs = of.bitsandbytes(double)
    if bnb.packs(theirs.items[0]):
        found[EVAL] = (of.packed(double), lambda layer: layer(x))
    found[TRAINING] = (theirs, lambda layer: layer(x))
    found[DEQUANTISE] = (theirs, lambda layer: bnb.dequantise_and_multiply(layer, x))
    if bnb.has_int4() and case.n % 16 == 0 and case.k % bnb.BLOCK == 0:
        found[INT4] = (of.int4(), lambda w: w(x))
    return found


def check(case: Case, of: Rings, x: Tensor, found: dict[str, Provider]) -> tuple[dict[str, list[float]], set[str]]:
    """Relative errors (Frobenius, at most 64 rows) against float64 over the weight that the bytes stand for.

    Wrong: above 2x the error of dequantising to bf16 and multiplying, plus a quarter eps.
    """
    rows = slice(None, None, max(1, case.m // 64))
    linear, x64 = torch.nn.functional.linear, x[rows].double()

    def error(y: Tensor, want: Tensor) -> float:
        return float((y[rows].double() - want).norm() / want.norm())

    exact = {double: of.stands_for(double) for double in (False, True)}
    wanted: dict[Any, Tensor] = {double: linear(x64, weight.double()) for double, weight in exact.items()}
    if INT4 in found:
        wanted[INT4] = linear(x64, found[INT4][0].items[0].dense().double())
    allowed = 2 * error(linear(x, exact[case.double].to(DTYPE)), wanted[case.double]) + torch.finfo(DTYPE).eps / 4
    errors = {}
    for name, (ring, call) in found.items():
        if name != FROZEN:
            want = wanted[name if name == INT4 else case.double or name == DOUBLE]
            errors[name] = [error(call(ring.items[0]), want)]
    return errors, {name for name, (e,) in errors.items() if not e <= allowed}


def floors(case: Case, weight: fp.Weight4bit) -> dict[str, float]:
    """Least seconds by bytes (codes and scales read once, x, y) and by FLOPs, at this machine's rates of this very run."""
    flops = 2 * case.m * case.k * case.n
    size = weight.nbytes + DTYPE.itemsize * case.m * (case.k + case.n)
    rate, bandwidth = _machine.matmul_rate(DTYPE), _machine.read_bandwidth()
    seconds = {"byte_seconds": size / bandwidth, "flop_seconds": flops / rate}
    return {
        **{"flops": flops, "bytes": size, "read_bandwidth": bandwidth, "matmul_rate": rate},
        **seconds,
        "seconds": max(seconds.values()),
    }


def runner(ring: Ring, call: Callable[[Any], Tensor]) -> Callable[[], object]:
    following = ring.next
    return lambda: call(following())


@torch.no_grad()
def measure(case: Case, seconds: float, *, of: Rings | None = None, tick: Tick = None) -> dict[str, Any]:
    """Check and time one case on the CPU, `seconds` of sampling; the line for the results file."""
    of = of or rings(case.k, case.n)
    x = torch.randn(case.m, case.k, generator=torch.Generator().manual_seed(1)).to(DTYPE)
    found = providers(case, of, x)
    error, wrong = check(case, of, x, found)
    functions = {name: runner(*pair) for name, pair in found.items()}
    functions[AGAIN] = functions[FROZEN]
    samples = paired(functions, seconds, sample=0.002, tick=tick)
    floor = floors(case, of.ours(case.double).items[0])
    row = {
        "kind": "linear4bit",
        "key": case.name,
        "case": asdict(case),
        "error": error,
        "wrong": sorted(wrong),
        "notes": {} if EVAL in found else {EVAL: "bitsandbytes has no kernel for this CPU or shape"},
        "floor": floor,
        "samples": samples.as_json(),
    }
    return {**row, **summary(case, samples, floor, wrong)}


def summary(
    case: Case, samples: Samples, floor: dict[str, float], wrong: set[str] | None = None, amx: bool | None = None
) -> dict[str, Any]:
    """Ratios and verdicts from samples: what the tables print. amx: None, this machine's."""
    wrong = wrong or set()
    amx = bool(_machine.cpu()["amx"]) if amx is None else amx
    right = [n for n in samples.seconds if n not in wrong and n != AGAIN]
    rivals = [n for n in RIVALS if n in right]
    best = samples.best(rivals) if rivals else None
    state = validity(samples, None)
    result: dict[str, Any] = {
        "time": {n: samples.ratio(OURS, n).as_json() for n in right if n != OURS and OURS in right},
        "over_dense": {n: samples.ratio(n, FROZEN).as_json() for n in right if n != FROZEN},
        "best_peer": best,
        "floor_share": floor["seconds"] / samples.median(OURS) if OURS in right else None,
        "aa": samples.ratio(AGAIN, FROZEN).as_json(),
        "validity": list(state),
    }
    targets = []
    for limit in limits(case, amx):
        top, peer = (DOUBLE, OURS) if limit.peer == OURS else (OURS, best if limit.peer == BEST else limit.peer)
        if peer is None or peer not in samples.seconds:
            continue
        targets.append(_target(case.name, samples, top, peer, limit, floor["seconds"], wrong, state, case.m == 1))
    return {**result, "targets": [t.as_json() for t in targets]}


def _target(
    name: str,
    samples: Samples,
    top: str,
    peer: str,
    limit: Limit,
    floor: float,
    wrong: set[str],
    state: tuple[str, str],
    by_bytes: bool = False,
) -> Target:
    """Time of `top` over that of `peer`. No limit binds below 1.3x the floor; by_bytes: the limit itself not below 85 %."""
    text, value = f"{name}: time over {peer}'s", limit.value
    if top != OURS:
        text = f"{name}: time with double quantisation over time without"
    if {top, peer} & wrong:
        return Target(text, value, UNDEFINED, None, "wrong result", "error against float64 too large")
    own = floor / samples.median(peer)  # the floor in the ratio's unit
    if limit.peer == BEST:
        text += " (the better of its two)"
        if by_bytes and own / BYTE_SHARE > value:
            text, value = f"{text}, or {BYTE_SHARE:.0%} of the byte floor", own / BYTE_SHARE
    return target(text, value, samples.ratio(top, peer), state, FLOOR_ROOM * own)


# ------------------------------------------------------------------------------------------------------ the QLoRA layer


def qlora_providers(
    case: lora.Case, of: Rings, x: Tensor
) -> dict[str, tuple[Ring, Callable[[Any], tuple[Tensor, list]]]]:
    """name -> (its ring, a call that gives y and the parameters that get gradients); double quantisation, as QLoRA has it."""
    generator = torch.Generator().manual_seed(2)

    def randn(rows: int, columns: int, std: float) -> Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(std)

    a, b = randn(case.r, case.k, case.k**-0.5), randn(case.n, case.r, case.r**-0.5)  # fp32, as PEFT keeps them
    ours, theirs = of.ours(True), of.bitsandbytes(True)

    def peft(layers: list[Any]) -> list[Any]:
        count = len(layers)
        return _peers.peft_layers(layers, [a] * count, [b] * count, scale=SCALE, dropout=0.0, low=False)

    def layer(one: Any) -> tuple[Tensor, list]:
        return one(x), _peers.adapters(one)

    def op(one: tuple[fp.Weight4bit, Tensor, Tensor]) -> tuple[Tensor, list]:
        weight, a_i, b_i = one
        return fp.ops.lora_linear(x, weight, a_i, b_i, scale=SCALE), [a_i, b_i]

    adapted = [(w, a.clone().requires_grad_(), b.clone().requires_grad_()) for w in ours.items]
    found: dict[str, Any] = {
        FROZEN: (of.dense(), lambda w: (torch.nn.functional.linear(x, w), [])),
        OURS: (Ring(adapted), op),
        PEFT_4BIT: (Ring(peft(theirs.items)), layer),
    }
    if _has_path(peft(copy.deepcopy(theirs.items[:1]))):
        applied = peft(copy.deepcopy(theirs.items))
        fp.apply(torch.nn.ModuleList(applied))
        found[APPLIED] = (Ring(applied), layer)
    return found


def _has_path(layers: list[Any]) -> bool:
    """Whether fp.apply takes PEFT's layers over bitsandbytes' to fastpeft's kernels."""
    model = torch.nn.ModuleList(layers)
    return all(row.path == "fast" for row in fp.apply(model).layers)


def measure_qlora(case: lora.Case, seconds: float, *, of: Rings | None = None, tick: Tick = None) -> dict[str, Any]:
    """One LoRA layer over a frozen 4-bit weight, forward and the gradients of x, A and B, beside the dense frozen layer."""
    of = of or rings(case.k, case.n)
    layers = lora.Layers.make(case, "cpu", sets=1)
    x, dy = layers.x, layers.dy
    found = qlora_providers(case, of, x)
    errors, wrong = check_qlora(case, of, layers, found)

    def both(ring: Ring, call: Callable[[Any], tuple[Tensor, list]]) -> Callable[[], object]:
        following = ring.next

        def run() -> object:
            y, parameters = call(following())
            return torch.autograd.grad(y, [x, *parameters], dy)

        return run

    functions = {name: both(*pair) for name, pair in found.items()}
    functions[AGAIN] = functions[FROZEN]
    samples = paired(functions, seconds, tick=tick)
    flops = 4 * case.m * case.k * case.n + 6 * case.m * case.r * (case.k + case.n)
    size = 2 * of.ours(True).items[0].nbytes + 2 * DTYPE.itemsize * case.m * (case.k + case.n)
    floor = max(flops / _machine.matmul_rate(DTYPE), size / _machine.read_bandwidth())
    state = validity(samples, None)
    right = [n for n in samples.seconds if n not in wrong and n != AGAIN]
    name = f"qlora {case.name}"
    return {
        "kind": "qlora layer",
        "key": name,
        "case": asdict(case),
        "error": errors,
        "wrong": sorted(wrong),
        "floor": {"flops": flops, "bytes": size, "seconds": floor},
        "samples": samples.as_json(),
        "time": {n: samples.ratio(OURS, n).as_json() for n in right if n != OURS and OURS in right},
        "over_dense": {n: samples.ratio(n, FROZEN).as_json() for n in right if n != FROZEN},
        "aa": samples.ratio(AGAIN, FROZEN).as_json(),
        "validity": list(state),
        "targets": [
            _target(name, samples, OURS, limit.peer, limit, floor, wrong, state).as_json() for limit in case.limits
        ],
    }


def check_qlora(
    case: lora.Case, of: Rings, layers: lora.Layers, found: dict[str, Any]
) -> tuple[dict[str, list[float]], set[str]]:
    """Errors of y, dx, dA, dB against float64; wrong: above 2x those of PyTorch over the dequantised bf16 weight."""
    weight = of.stands_for(True)
    _, a, b = of_ours = found[OURS][0].items[0]
    exact = lora.Layers(layers.x, layers.dy, [weight], [a], [b])
    low = weight.to(DTYPE)

    def errors(call: Callable[[Any], tuple[Tensor, list]], item: Any) -> list[float]:
        return lora.errors(case, exact, lambda _: call(item)[0], lambda _: call(item)[1])

    peer = errors(lambda _: (_peers.composition(layers.x, low, a, b, SCALE), [a, b]), of_ours)
    allowed = [2 * e + torch.finfo(DTYPE).eps / 4 for e in peer]
    measured = {name: errors(call, ring.items[0]) for name, (ring, call) in found.items() if name != FROZEN}
    return measured, {n for n, e in measured.items() if not all(v <= w for v, w in zip(e, allowed, strict=True))}


# ------------------------------------------------------------------------------------------------- pytest-benchmark

if lora.pytest is not None:
    pytest = lora.pytest

    def _seconds() -> float:
        return float(os.environ.get("FASTPEFT_BENCH_SECONDS", "4"))

    @functools.cache
    def _measured(case: Case) -> dict[str, Any]:
        return measure(case, _seconds())

    @functools.cache
    def _measured_qlora(case: lora.Case) -> dict[str, Any]:
        return measure_qlora(case, _seconds())

    @pytest.mark.parametrize("function", [FROZEN, EVAL, TRAINING, DEQUANTISE, INT4, OURS, DOUBLE])
    @pytest.mark.parametrize("case", cases(), ids=lambda case: case.name.replace(" ", "-"))
    @pytest.mark.benchmark(timer=lora.CLOCK, min_rounds=1)
    def test_linear4bit(benchmark: Any, case: Case, function: str) -> None:
        """FASTPEFT_BENCH_SECONDS (4) a case; extra_info holds ratios with their intervals."""
        lora.record(benchmark, _measured(case), function)

    @pytest.mark.parametrize("function", [FROZEN, PEFT_4BIT, OURS])
    @pytest.mark.parametrize("case", qlora_cases(), ids=lambda case: case.name.replace(" ", "-"))
    @pytest.mark.benchmark(timer=lora.CLOCK, min_rounds=1)
    def test_qlora_layer(benchmark: Any, case: lora.Case, function: str) -> None:
        lora.record(benchmark, _measured_qlora(case), function)
