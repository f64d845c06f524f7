"""lora_linear beside its peers: by shape, M, dtype and direction.

`cases()` says what is measured, `measure()` measures one case and returns a line for the results file. Under pytest
(`pytest benches --benchmark-json out.json`) each (case, function) is one pytest-benchmark row: samples are taken
interleaved first, then handed to pytest-benchmark by a virtual clock.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import fastpeft as fp
from fastpeft.ops import lora_linear_cpu

from . import _cuda, _machine, _peers
from ._measure import AGAIN, FROZEN, OK, UNDEFINED, Estimate, Samples, Timer, paired, validity
from ._peers import COMPILED, COMPOSITION, OURS, PEERS, PEFT, PEFT_LOW
from ._targets import FLOOR_ROOM, Target, target

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORWARD, BOTH = "fwd", "fwd+bwd"
SCALE = 2.0
SMALL_M = 32  # up to here the weights rotate past the last-level cache, as a whole model's would
NEVER_SLOWER = 1 / 0.97
Tick = Callable[[], object] | None
BEST = "best peer"
OWN_BASE = "frozen, fastpeft's base GEMM"


@dataclass(frozen=True)
class Limit:
    """A target: `what` ("overhead" or "time") of fastpeft over that of `peer` is at most `value`; or its "own overhead"."""

    what: str
    peer: str
    value: float


@dataclass(frozen=True)
class Case:
    """One row of the kernel table: y [M, N] = x [M, K] through a frozen layer and its adapter of rank R."""

    k: int
    n: int
    m: int
    dtype: str
    direction: str
    r: int = 16
    isa: str | None = None  # caps the native kernels' instruction set
    compiled: bool = False  # measure torch.compile'd PEFT as well
    limits: tuple[Limit, ...] = ()

    @property
    def rotated(self) -> bool:
        return self.m <= SMALL_M

    @property
    def name(self) -> str:
        isa = f" isa={self.isa}" if self.isa else ""
        return f"{self.k}->{self.n} M={self.m} {self.dtype} r={self.r} {self.direction}{isa}"


# ------------------------------------------------------------------------------------------------- what is measured


def target_cases() -> list[Case]:
    """The rows that carry targets of their own."""
    quarter = (Limit("overhead", PEFT, 0.25), Limit("overhead", COMPOSITION, 0.65))
    sixth = (Limit("overhead", PEFT, 0.16), Limit("overhead", COMPOSITION, 0.65))
    inference = (Limit("overhead", PEFT, 0.4),)
    return [
        Case(2048, 2048, 512, "bf16", BOTH, compiled=True, limits=quarter),
        Case(576, 1536, 2048, "bf16", BOTH, compiled=True, limits=sixth),
        Case(576, 1536, 512, "bf16", BOTH, compiled=True, limits=(Limit("overhead", PEFT, 0.2),)),
        Case(2048, 2048, 512, "fp32", BOTH, limits=(Limit("overhead", BEST, 0.6),)),
        Case(2048, 2048, 1, "bf16", FORWARD, compiled=True, limits=inference),
        Case(576, 1536, 1, "bf16", FORWARD, compiled=True, limits=inference),
    ]


def capped_cases() -> list[Case]:
    """An office PC's instruction set: never slower than PEFT."""
    never = (Limit("time", PEFT, 1.0),)
    shapes = ((2048, 2048, 512, BOTH), (576, 1536, 512, BOTH), (576, 1536, 2048, BOTH), (2048, 2048, 1, FORWARD))
    return [
        Case(k, n, m, dtype, direction, isa="avx2", limits=never)
        for dtype in ("bf16", "fp32")
        for k, n, m, direction in (*shapes, (576, 1536, 1, FORWARD))
    ]


def sweep_cases() -> list[Case]:
    """By shape and M: SmolLM2-135M's four shapes, 2048² and 4096²."""
    shapes = ((576, 576), (576, 192), (576, 1536), (1536, 576), (2048, 2048), (4096, 4096))
    found = []
    for dtype, (k, n), m in itertools.product(("bf16", "fp32"), shapes, (1, 4, 16, 64, 512, 2048)):
        if k == 4096 and (m > 512 or dtype == "fp32"):
            continue  # minutes a row on two cores
        if dtype == "fp32" and (k, n) not in ((576, 1536), (2048, 2048)):
            continue
        if m <= 512:
            found.append(Case(k, n, m, dtype, FORWARD))
        if m >= 16:
            found.append(Case(k, n, m, dtype, BOTH))
    return found


def cases(full: bool = False) -> list[Case]:
    """Default: the target rows. Full: the capped rows and the sweep too, without doubles."""
    found = target_cases()
    if full:
        known = {replace(c, compiled=False, limits=()) for c in found}
        found += capped_cases() + [c for c in sweep_cases() if c not in known]
    return found


# ---------------------------------------------------------------------------------------------------------- one case


@dataclass
class Layers:
    """A ring of frozen weights with adapters, the same for every function, and a cursor that all of them share.

    A sample of one function ends where the next one's begins, so none finds weights that the last one left in cache.
    """

    x: Tensor  # [M, K]
    dy: Tensor  # [M, N]
    weights: list[Tensor]  # [N, K]
    a: list[Tensor]  # fp32 [R, K]
    b: list[Tensor]  # fp32 [N, R]
    cursor: Iterator[int] = field(init=False)

    def __post_init__(self) -> None:
        self.cursor = itertools.cycle(range(len(self.weights)))

    @staticmethod
    def make(case: Case, device: str, sets: int | None = None) -> Layers:
        """sets: how many weights; default, as many as it takes to rotate past the CPU's cache for a small M, else one."""
        generator = torch.Generator(device).manual_seed(0)
        dtype = DTYPES[case.dtype]

        def randn(rows: int, columns: int, of: torch.dtype, std: float = 1.0) -> Tensor:
            return torch.randn(rows, columns, generator=generator, device=device).mul_(std).to(of)

        if sets is None and case.rotated:
            sets = ring_length(case.n * case.k * dtype.itemsize)
        sets = sets or 1
        x = randn(case.m, case.k, dtype)
        dy = randn(case.m, case.n, dtype)
        first = randn(case.n, case.k, dtype, case.k**-0.5)
        weights = [first] + [first.clone() for _ in range(sets - 1)]  # other memory is enough, values do not matter
        a = [randn(case.r, case.k, torch.float32, case.k**-0.5).requires_grad_() for _ in range(sets)]
        b = [randn(case.n, case.r, torch.float32, case.r**-0.5).requires_grad_() for _ in range(sets)]
        return Layers(x.requires_grad_(case.direction == BOTH), dy, weights, a, b)


def ring_length(size: int) -> int:
    """How many weights of `size` bytes it takes to rotate past the last-level cache."""
    past_cache = min(3 * _machine.last_level_cache() // 2, 768 << 20)
    return min(max(2, -(-past_cache // size)), 1024)  # tiny layers would never make it past the cache


Call = Callable[[int], Tensor]


def providers(case: Case, layers: Layers, peers: tuple[str, ...]) -> dict[str, tuple[Call, Callable[[int], list]]]:
    """name -> (call with the i-th weights, the parameters that get gradients)."""
    x, w, a, b = layers.x, layers.weights, layers.a, layers.b
    found: dict[str, tuple[Call, Callable[[int], list]]] = {
        FROZEN: (lambda i: torch.nn.functional.linear(x, w[i]), lambda i: [])
    }
    default: list[Any] = []
    if PEFT in peers or COMPILED in peers:
        default = _peers.peft_layers(w, a, b, scale=SCALE, dropout=0.0, low=False)
    if PEFT in peers:
        found[PEFT] = (lambda i: default[i](x), lambda i: _peers.adapters(default[i]))
    if PEFT_LOW in peers and case.dtype != "fp32":  # in fp32 the two are one
        low = _peers.peft_layers(w, a, b, scale=SCALE, dropout=0.0, low=True)
        found[PEFT_LOW] = (lambda i: low[i](x), lambda i: _peers.adapters(low[i]))
    if COMPILED in peers and case.compiled:
        graph = _peers.compiled()
        found[COMPILED] = (lambda i: graph(default[i], x), lambda i: _peers.adapters(default[i]))
    if COMPOSITION in peers:
        found[COMPOSITION] = (lambda i: _peers.composition(x, w[i], a[i], b[i], SCALE), lambda i: [a[i], b[i]])
    found[OURS] = (lambda i: fp.ops.lora_linear(x, w[i], a[i], b[i], scale=SCALE), lambda i: [a[i], b[i]])
    return found


def runner(call: Call, parameters: Callable[[int], list], layers: Layers, direction: str) -> Callable[[], object]:
    """One timed call on the next weights of the ring: forward, or forward and the gradients of x, A and B."""
    cursor, x, dy = layers.cursor, layers.x, layers.dy
    if direction == FORWARD:
        return lambda: call(next(cursor))

    def both() -> object:
        i = next(cursor)
        return torch.autograd.grad(call(i), [x, *parameters(i)], dy)

    return both


def outputs(call: Call, parameters: Callable[[int], list], layers: Layers, direction: str) -> list[Tensor]:
    if direction == FORWARD:
        with torch.no_grad():
            return [call(0)]
    y = call(0)
    return [y.detach(), *torch.autograd.grad(y, [layers.x, *parameters(0)], layers.dy)]


def errors(case: Case, layers: Layers, call: Call, parameters: Callable[[int], list]) -> list[float]:
    """Relative error (Frobenius) against float64 of y, dx, dA, dB; y and dx on at most 256 rows."""
    got = outputs(call, parameters, layers, case.direction)
    rows = torch.arange(case.m, device=layers.x.device)[:: max(1, case.m // 256)]
    x, dy, w, a, b = (t.detach().double() for t in (layers.x, layers.dy, layers.weights[0], layers.a[0], layers.b[0]))
    s = x @ a.t()
    want = [x[rows] @ w.t() + SCALE * s[rows] @ b.t()]
    got[0] = got[0][rows]
    if case.direction == BOTH:
        ds = SCALE * dy @ b
        want += [dy[rows] @ w + ds[rows] @ a, ds.t() @ x, SCALE * dy.t() @ s]
        got[1] = got[1][rows]
    return [float((g.double() - t).norm() / t.norm()) for g, t in zip(got, want, strict=True)]


def check(case: Case, layers: Layers, found: dict) -> tuple[dict[str, list[float]], set[str]]:
    """Errors of every function, and the names of the wrong ones: above 2x the composition's, plus a quarter eps."""
    x, w, a, b = layers.x, layers.weights, layers.a, layers.b
    peer = errors(case, layers, lambda i: _peers.composition(x, w[i], a[i], b[i], SCALE), lambda i: [a[i], b[i]])
    allowed = [2 * e + torch.finfo(DTYPES[case.dtype]).eps / 4 for e in peer]
    measured = {name: errors(case, layers, *pair) for name, pair in found.items() if name != FROZEN}
    wrong = {n for n, e in measured.items() if not all(v <= limit for v, limit in zip(e, allowed, strict=True))}
    return measured, wrong


def floors(case: Case, device: str) -> dict[str, float]:
    """Least seconds by bytes and by FLOPs, of the op and of what the adapter adds to the frozen layer."""
    m, k, n, r, item = case.m, case.k, case.n, case.r, DTYPES[case.dtype].itemsize
    both = case.direction == BOTH
    base_flops = (4 if both else 2) * m * k * n
    lora_flops = (6 if both else 2) * m * r * (k + n)
    adapter_bytes = 4 * r * (k + n) * (2 if both else 1)  # fp32 A, B read; dA, dB written
    base_bytes = item * (n * k + m * (k + n) * (2 if both else 1))
    if device == "cuda":
        # s needs a read of x beside the GEMM's own, dB one of dy, dA another of x
        adapter_bytes += item * m * (2 * k + n if both else k)
        rate, bandwidth = _cuda.matrix_rate(DTYPES[case.dtype]), _cuda.copy_bandwidth()
    else:
        rate, bandwidth = _machine.matmul_rate(DTYPES[case.dtype], device), _machine.read_bandwidth(device)
    past_cache = case.rotated or device == "cuda"
    return {
        "flops": base_flops + lora_flops,
        "bytes": base_bytes + adapter_bytes,
        "seconds": max((base_flops + lora_flops) / rate, (base_bytes + adapter_bytes) / bandwidth),
        "adapter_flops": lora_flops,
        "adapter_bytes": adapter_bytes,
        # past the cache the adapter's bytes come on top of the weight's; within it only arithmetic is left
        "adapter_seconds": max(lora_flops / rate, adapter_bytes / bandwidth if past_cache else 0.0),
    }


@contextlib.contextmanager
def instruction_set(name: str | None) -> Iterator[None]:
    """Cap the native CPU kernels' instruction set for a while."""
    if name is None:
        yield
        return
    from fastpeft import _native

    module = _native.cpu()
    if module is None:
        raise RuntimeError(f"no native CPU module to run at {name}: {_native.why_not_cpu()}")
    before = module.isa()
    module.set_isa(name)
    try:
        yield
    finally:
        module.set_isa(before)


def measure(
    case: Case,
    seconds: float,
    *,
    device: str = "cpu",
    peers: tuple[str, ...] = (*PEERS, COMPILED),
    tick: Tick = None,
) -> dict[str, Any]:
    """Check and time one case, `seconds` for all of it; the line for the results file."""
    start = time.perf_counter()
    with instruction_set(case.isa):
        layers = Layers.make(case, device)
        found = providers(case, layers, peers)
        mode = torch.no_grad if case.direction == FORWARD else torch.enable_grad
        notes = {}
        if COMPILED in found:
            try:
                with mode():
                    found[COMPILED][0](0)
            except Exception as failure:  # no C++ compiler, or a graph that inductor cannot lower: the row goes without
                notes[COMPILED] = f"did not compile: {type(failure).__name__}"
                del found[COMPILED]
        error, wrong = check(case, layers, found)
        functions = {name: runner(*pair, layers, case.direction) for name, pair in found.items()}
        functions[AGAIN] = functions[FROZEN]
        with mode():
            left = seconds - (time.perf_counter() - start)  # compiling takes its share
            samples = paired(functions, max(left, seconds / 3), device=device, tick=tick)
    floor = floors(case, device)
    row = {
        "kind": "lora_linear",
        "key": case.name,
        "case": asdict(case),
        "error": error,
        "wrong": sorted(wrong),
        "notes": notes,
        "floor": floor,
        "weights_bytes": sum(w.numel() * w.element_size() for w in layers.weights),
        "samples": samples.as_json(),
    }
    return {**row, **summary(case, samples, floor, [n for n in functions if n not in (FROZEN, AGAIN)], wrong)}


def summary(
    case: Case, samples: Samples, floor: dict[str, float], names: list[str], wrong: set[str] | None = None
) -> dict[str, Any]:
    """Ratios, overheads and verdicts from samples: what the tables print."""
    wrong = wrong or set()
    rivals = [n for n in names if n in PEERS and n not in wrong]
    frozen = samples.median(FROZEN)
    right = [n for n in names if n not in wrong]
    others = [n for n in right if n != OURS and OURS in right]
    result: dict[str, Any] = {
        "overhead": {n: samples.overhead(n).as_json() for n in right},
        "time": {n: samples.ratio(OURS, n).as_json() for n in others},
        "overhead_ratio": {n: samples.overhead_ratio(OURS, n).as_json() for n in others},
        "aa": samples.ratio(AGAIN, FROZEN).as_json(),
        "floor_overhead": floor["adapter_seconds"] / frozen,
        "targets": [],
    }
    if not rivals:
        result["validity"] = list(validity(samples, None))
        return result
    best = samples.best(rivals)
    result["best_peer"] = best
    smallest = min((float(samples.overhead(n).median) for n in rivals), default=0.0)
    result["validity"] = list(validity(samples, smallest))
    targets = []
    never_slower = () if case.isa else (Limit("time", BEST, NEVER_SLOWER),)  # PyTorch's own kernels are not capped
    for limit in (*case.limits, *never_slower):
        peer = best if limit.peer == BEST else limit.peer
        if peer not in rivals and limit.what != "own overhead":
            continue
        of = f"{peer}, the best peer" if limit.peer == BEST else peer
        targets.append(_target(case, samples, limit, peer, of, result["floor_overhead"], OURS in wrong))
    result["targets"] = [t.as_json() for t in targets]
    return result


def _target(case: Case, samples: Samples, limit: Limit, peer: str, of: str, floor: float, wrong: bool) -> Target:
    if limit.what == "own overhead":
        own, text = samples.overhead(OURS), f"{case.name}: overhead over the frozen layer"
        return target(text, limit.value, own, validity(samples, limit.value), FLOOR_ROOM * floor)
    text = f"{case.name}: {limit.what} over {of}'s"
    if wrong:
        return Target(text, limit.value, UNDEFINED, None, "wrong result", "error against float64 too large")
    if limit.what == "time":
        bound = FLOOR_ROOM * floor  # of the overhead: no call is asked to run below frozen x (1 + 1.3 floor)
        floor_limit = (1 + bound) * samples.median(FROZEN) / samples.median(peer)
        return target(text, limit.value, samples.ratio(OURS, peer), validity(samples, None), floor_limit)
    overhead = float(samples.overhead(peer).median)
    floor_limit = FLOOR_ROOM * floor / overhead if overhead > 0 else None
    ours = abs(float(samples.overhead(OURS).median))
    state = validity(samples, max(limit.value * overhead, ours))  # what is claimed: the limit's overhead, or ours
    return target(text, limit.value, samples.overhead_ratio(OURS, peer), state, floor_limit)


# --------------------------------------------------------------------------------- dropout, groups, memory, host cost


Prepare = Callable[[Callable[[], object]], Callable[[], object]]


def as_it_is(function: Callable[[], object]) -> Callable[[], object]:
    return function


def measure_dropout(
    k: int,
    n: int,
    m: int,
    seconds: float,
    *,
    limit: float = 1.05,
    device: str = "cpu",
    prepare: Prepare = as_it_is,
    timer: Timer | None = None,
    tick: Tick = None,
) -> dict[str, Any]:
    """Dropout 0.1 against 0, forward and backward, bf16. prepare: what is done with a function before it is timed."""
    case = Case(k, n, m, "bf16", BOTH)
    layers = Layers.make(case, device)
    x, w, a, b = layers.x, layers.weights[0], layers.a[0], layers.b[0]

    def at(p: float) -> Callable[[], object]:
        return prepare(
            lambda: torch.autograd.grad(fp.ops.lora_linear(x, w, a, b, scale=SCALE, dropout_p=p), [x, a, b], layers.dy)
        )

    functions = {"p=0": at(0.0), "p=0.1": at(0.1), "p=0 again": at(0.0)}
    samples = paired(functions, seconds, device=device, timer=timer, tick=tick)
    state = validity(samples, None, "p=0", "p=0 again")
    name = f"dropout {case.name}"
    ratio = samples.ratio("p=0.1", "p=0")
    return {
        "kind": "dropout",
        "key": name,
        "samples": samples.as_json(),
        "ratio": ratio.as_json(),
        "aa": samples.ratio("p=0 again", "p=0").as_json(),
        "validity": list(state),
        "targets": [target(f"{name}: time at 0.1 over time at 0", limit, ratio, state).as_json()],
    }


GROUP_N = (576, 192, 192)  # SmolLM2-135M's q, k, v


def _group(
    m: int, k: int, device: str, of_n: tuple[int, ...] = GROUP_N
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    whole = [Layers.make(Case(k, n, m, "bf16", BOTH), device) for n in of_n]
    x = whole[0].x
    first = lambda name: [getattr(one, name)[0] for one in whole]  # noqa: E731
    return x, first("weights"), first("a"), first("b"), [one.dy for one in whole]


class BaseAlone(torch.autograd.Function):
    """A frozen layer by the GEMM that fastpeft's CPU backend uses: on some machines not PyTorch's (bf16 in fp32 slabs)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return lora_linear_cpu.project(x, [weight], [None])[0]

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor, None]:
        return lora_linear_cpu.combine(dys, ctx.saved_tensors), None


def measure_group(
    seconds: float,
    *,
    m: int = 1024,
    k: int = 576,
    of_n: tuple[int, ...] = GROUP_N,
    limit: float | None = None,
    device: str = "cpu",
    prepare: Prepare = as_it_is,
    timer: Timer | None = None,
    tick: Tick = None,
) -> dict[str, Any]:
    """q, k, v as one group against three single calls, forward and backward, bf16.

    Where fastpeft's base GEMM is faster than PyTorch's both have a negative overhead over the frozen layer, and no
    ratio; so the target's overheads are over the frozen layer by fastpeft's own base GEMM (`BaseAlone`).
    limit: of the group's own overhead, instead of its ratio to that of three calls.
    """
    x, w, a, b, dy = _group(m, k, device, of_n)
    scales = [SCALE] * 3

    def grads(ys: list[Tensor], parameters: list[Tensor]) -> object:
        return torch.autograd.grad(ys, [x, *parameters], dy)

    def frozen() -> object:
        return grads([torch.nn.functional.linear(x, w_i) for w_i in w], [])

    def base() -> object:
        return grads([BaseAlone.apply(x, w_i) for w_i in w], [])

    def single() -> object:
        return grads([fp.ops.lora_linear(x, *t, scale=SCALE) for t in zip(w, a, b, strict=True)], [*a, *b])

    def group() -> object:
        return grads(fp.ops.lora_linear_group(x, w, a, b, scales=scales), [*a, *b])

    def torch_calls() -> object:
        return grads([_peers.composition(x, *t, SCALE) for t in zip(w, a, b, strict=True)], [*a, *b])

    for g, s, c in zip(group(), single(), torch_calls(), strict=True):  # type: ignore[call-overload]
        if not float((g - s).double().norm()) <= 4 * float((c - s).double().norm()) + 0.01 * float(s.double().norm()):
            raise RuntimeError("lora_linear_group and three lora_linear calls give different gradients")
    functions = {FROZEN: frozen, "three calls": single, "group": group, COMPOSITION: torch_calls}
    reference = FROZEN
    if device == "cpu":
        functions[OWN_BASE], reference = base, OWN_BASE
    functions = {n: prepare(f) for n, f in functions.items()}
    functions[AGAIN] = functions[reference]
    samples = paired(functions, seconds, device=device, timer=timer, tick=tick)
    name = f"group q/k/v {k}->{of_n} M={m} bf16 r=16 {BOTH}"
    lora_flops = sum(6 * m * 16 * (k + n) for n in of_n)
    floor = lora_flops / _machine.matmul_rate(torch.bfloat16, device) / samples.median(reference)
    if limit is None:
        claimed = 0.7 * float(samples.overhead("three calls", reference).median)
        state = validity(samples, claimed, reference)
        floor_limit = FLOOR_ROOM * floor * 0.7 / claimed if claimed > 0 else None
        ratio = samples.overhead_ratio("group", "three calls", reference)
        verdict = target(f"{name}: overhead over three calls'", 0.7, ratio, state, floor_limit)
    else:
        state = validity(samples, limit, reference)
        own = samples.overhead("group", reference)
        verdict = target(f"{name}: overhead over the frozen layers", limit, own, state, FLOOR_ROOM * floor)
    others = [n for n in functions if n not in (FROZEN, AGAIN)]
    return {
        "kind": "group",
        "key": name,
        "samples": samples.as_json(),
        "overhead": {n: samples.overhead(n).as_json() for n in others},
        "overhead_over_own_base": {n: samples.overhead(n, reference).as_json() for n in ("three calls", "group")},
        "floor_overhead": floor,
        "aa": samples.ratio(AGAIN, reference).as_json(),
        "validity": list(state),
        "time": {n: samples.ratio("group", n).as_json() for n in ("three calls", COMPOSITION)},
        "targets": [verdict.as_json()],
    }


def saved_bytes(call: Callable[[], Any], excluded: list[Tensor]) -> int:
    """Bytes that autograd keeps for backward: every storage once, x too, parameters not."""
    known = {t.untyped_storage().data_ptr() for t in excluded}
    kept: dict[int, Tensor] = {}  # holding the tensor keeps its address from being used again

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in known:
            kept.setdefault(address, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    total = sum(t.untyped_storage().nbytes() for t in kept.values())
    del result
    return total


def measure_saved_bytes(*, m: int = 1024, device: str = "cpu") -> dict[str, Any]:
    """Bytes kept for backward, fastpeft over PEFT's default: one layer without and with dropout, and a q/k/v group."""
    x, w, a, b, _ = _group(m, 576, device)
    rows, targets = {}, []
    certain = (OK, "a count")
    for p, limit in ((0.0, 0.52), (0.1, 0.26)):
        (layer,) = _peers.peft_layers(w[:1], a[:1], b[:1], scale=SCALE, dropout=p, low=False)
        peft = saved_bytes(functools.partial(layer, x), [w[0], *_peers.adapters(layer)])
        ours = saved_bytes(
            functools.partial(fp.ops.lora_linear, x, w[0], a[0], b[0], scale=SCALE, dropout_p=p), [w[0], a[0], b[0]]
        )
        name = f"bytes saved for backward 576->576 M={m} bf16 dropout {p}"
        rows[name] = {PEFT: peft, OURS: ours, "x": x.untyped_storage().nbytes()}
        targets.append(target(f"{name}, over PEFT's", limit, Estimate.exact(ours / peft), certain))
    layers = _peers.peft_layers(w, a, b, scale=SCALE, dropout=0.0, low=False)
    parameters = [p for layer in layers for p in _peers.adapters(layer)]
    peft = saved_bytes(lambda: [layer(x) for layer in layers], [*w, *parameters])
    ours = saved_bytes(lambda: fp.ops.lora_linear_group(x, w, a, b, scales=[SCALE] * 3), [*w, *a, *b])
    name = f"bytes saved for backward, group q/k/v M={m} bf16"
    rows[name] = {PEFT: peft, OURS: ours, "x": x.untyped_storage().nbytes()}
    targets.append(target(f"{name}, over PEFT's", 0.20, Estimate.exact(ours / peft), certain))
    return {"kind": "saved bytes", "key": "saved bytes", "bytes": rows, "targets": [t.as_json() for t in targets]}


def measure_host_cost(seconds: float, *, device: str = "cpu", tick: Tick = None) -> dict[str, Any]:
    """Host time of one call on inputs so small that nothing else counts; forward, no gradient, fp32."""
    case = Case(16, 16, 4, "fp32", FORWARD, r=4)
    layers = replace(Layers.make(case, device))
    x, w, a, b = layers.x, layers.weights[0], layers.a[0], layers.b[0]
    (layer,) = _peers.peft_layers([w], [a], [b], scale=SCALE, dropout=0.0, low=False)
    bias, w_t = torch.zeros(16, device=device), w.t()
    functions = {
        "addmm": lambda: torch.addmm(bias, x, w_t),
        PEFT: lambda: layer(x),
        OURS: lambda: fp.ops.lora_linear(x, w, a, b, scale=SCALE),
        "addmm again": lambda: torch.addmm(bias, x, w_t),
    }
    with torch.no_grad():
        # the host's time even on a GPU: calls are queued, not waited for
        samples = paired(functions, seconds, sample=0.01, tick=tick)
    state = validity(samples, None, "addmm", "addmm again")
    name = "host cost 16->16 M=4 fp32 r=4 fwd"
    over_peft, over_addmm = samples.ratio(OURS, PEFT), samples.ratio(OURS, "addmm")
    return {
        "kind": "host cost",
        "key": name,
        "samples": samples.as_json(),
        "time": {PEFT: over_peft.as_json(), "addmm": over_addmm.as_json()},
        "aa": samples.ratio("addmm again", "addmm").as_json(),
        "validity": list(state),
        "targets": [
            target(f"{name}: time over PEFT's layer", 0.5, over_peft, state).as_json(),
            target(f"{name}: time over a bare addmm", 2.5, over_addmm, state).as_json(),
        ],
    }


# ------------------------------------------------------------------------------------------------- pytest-benchmark

try:
    import pytest
except ImportError:  # the command line needs no pytest
    pytest = None  # type: ignore[assignment]


class VirtualClock:
    """pytest-benchmark's timer: moves only when told to, by times that were measured before."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = VirtualClock()


@functools.cache
def _measured(case: Case) -> dict[str, Any]:
    seconds = float(os.environ.get("FASTPEFT_BENCH_SECONDS", "4"))
    return measure(case, seconds, device="cuda" if torch.cuda.is_available() else "cpu")


def record(benchmark: Any, row: dict[str, Any], function: str) -> None:
    """Hand one function's samples to pytest-benchmark; ratios with their intervals go into its extra_info."""
    if function not in row["samples"]["seconds"]:
        pytest.skip(row["notes"].get(function, "not measured at this case"))
    assert function not in row["wrong"], f"{function}: errors {row['error'][function]} against float64"
    samples = Samples.from_json(row["samples"])
    if not samples.kept:
        pytest.skip(f"no undisturbed round in {samples.rounds}")
    times = iter(samples.seconds[function])

    def step() -> None:
        CLOCK.now += next(times)

    benchmark.group = row["key"]
    benchmark.extra_info.update(validity=row["validity"], aa=row["aa"], kept=samples.kept, rounds=samples.rounds)
    if function in row.get("overhead", {}):
        benchmark.extra_info["overhead"] = row["overhead"][function]
    if function == OURS:
        found = {name: row[name] for name in ("time", "overhead_ratio", "targets") if name in row}
        benchmark.extra_info.update(found)
    benchmark.pedantic(step, rounds=samples.kept, iterations=1)


if pytest is not None:

    @pytest.mark.parametrize("function", [FROZEN, *PEERS, COMPILED, OURS])
    @pytest.mark.parametrize("case", cases(), ids=lambda case: case.name.replace(" ", "-"))
    @pytest.mark.benchmark(timer=CLOCK, min_rounds=1)
    def test_lora_linear(benchmark: Any, case: Case, function: str) -> None:
        """FASTPEFT_BENCH_SECONDS (4) a case; extra_info holds ratios with their intervals."""
        record(benchmark, _measured(case), function)
