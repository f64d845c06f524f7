"""The GPU suite's 4-bit rows: NF4 in blocks of 64 with double quantisation, bf16.

    fwd      `fp.ops.linear4bit`, no gradient, beside bitsandbytes' two ways, the dense bf16 layer and each of our own plans
    dX       dy W alone, as autograd computes it, beside the same; without autograd's own host work on either side
    fwd+bwd  the QLoRA layer r=16, gradients of x, A and B, beside the same layer over a bf16 base and PEFT over bitsandbytes
    decode   the weight in bf16 again, beside a copy that moves as many bytes

Every function is checked against float64 over the weight that its bytes stand for before it is timed. `plan()` reads from
the rows where the Triton GEMM that decodes should hand over to decoding first (`gpu_4bit.fused_to_m` of
lora_linear.plans.json). Runs without bitsandbytes; our plans run on GPUs only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import fastpeft as fp
from fastpeft import _native, weight4bit
from fastpeft.ops import linear4bit_cuda, linear4bit_gpu, lora_linear_gpu, lora_linear_op
from fastpeft.reference import linear4bit as reference

from . import _cuda, _machine, _peers
from . import bench_lora_linear as lora
from ._measure import AGAIN, FROZEN, OK, Samples, median_interval, paired, validity
from ._peers import OURS
from ._targets import FLOOR_ROOM, Target, target
from .bench_lora_linear import BOTH, FORWARD, SCALE, Limit

KIND = "gpu 4-bit"
GRAD, DECODE = "dX", "decode"
MATMUL, THEIR_DENSE = "bitsandbytes", "bitsandbytes dequantise + GEMM"
BEST = "best of bitsandbytes"  # of the two
LORA, PEFT_4BIT = "fastpeft, bf16 base", "PEFT + bitsandbytes"
COPY = "copy"  # of as many bytes, read and written
SMALL, FUSED, DECODED = "plan small", "plan fused", "plan decode + GEMM"
PLANS = (SMALL, FUSED, DECODED)
BYTES = "bytes"  # a limit of the time over that of the row's bytes at copy bandwidth, of the row with a cold L2
COPY_SHARE = 0.70
DTYPE, R = torch.bfloat16, 16
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))
SAMPLE = {_cuda.COLD: 0.0001}  # seconds a sample takes at least; a call with a cold L2 takes 0.1 ms more than it says

Functions = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Case:
    """One row. what: FORWARD, GRAD, BOTH (the QLoRA layer) or DECODE (m is 0)."""

    k: int
    n: int
    m: int
    what: str
    limits: tuple[Limit, ...] = ()

    @property
    def name(self) -> str:
        rows = "" if self.what == DECODE else f" M={self.m} bf16{f' r={R}' if self.what == BOTH else ''}"
        return f"nf4+dq {self.k}->{self.n}{rows} {self.what}"


def headline_cases() -> list[Case]:
    """The rows that carry targets (of an H100)."""
    square, third = SHAPES[0], (Limit("time", BEST, 1 / 3),)
    found = [Case(*square, 8192, BOTH, (Limit("time", LORA, 1.05),))]
    found += [Case(k, n, 1, FORWARD, (Limit("time", BYTES, 1 / COPY_SHARE),)) for k, n in SHAPES]
    found += [Case(*square, m, FORWARD, third) for m in (16, 32, 64)]
    found.append(Case(*square, 512, FORWARD, (Limit("time", BEST, 1 / 1.3),)))
    found += [Case(k, n, m, GRAD, (Limit("time", BEST, 1 / 2),)) for k, n in SHAPES for m in (16, 64)]
    return found


def other_cases() -> list[Case]:
    """The rest of the grid; first what the crossover needs."""
    grid = [Case(k, n, m, what) for m in (512, 2048, 8192) for what in (FORWARD, GRAD) for k, n in SHAPES]
    grid = [c for c in grid if c.what == FORWARD or c.m != 2048]
    found = [*grid, Case(*SHAPES[0], 512, BOTH), *(Case(k, n, 0, DECODE) for k, n in SHAPES)]
    found += [Case(k, n, m, FORWARD) for m in (64, 16, 4, 32) for k, n in SHAPES]
    known = {replace(c, limits=()) for c in headline_cases()}
    return [c for c in found if c not in known]


# ------------------------------------------------------------------------------------------------ what is measured


@functools.cache
def bitsandbytes(device: str) -> ModuleType | None:
    """`_bitsandbytes`, if bitsandbytes imports and multiplies on this device."""
    try:
        from . import _bitsandbytes

        layer = _bitsandbytes.layer(torch.randn(64, 64, device=device).to(DTYPE), double=True)
        y = layer(torch.ones(1, 64, dtype=DTYPE, device=device))
        return _bitsandbytes if bool(torch.isfinite(y).all()) else None
    except Exception:  # not installed, or a build without this device: it says so in many ways
        return None


@dataclass
class Weights:
    """One weight [N, K] in every form."""

    dense: Tensor  # bf16, before it was quantised
    ours: fp.Weight4bit
    theirs: Any  # bitsandbytes' layer in training mode, or None

    def exact(self, name: str) -> Tensor:
        """float32: what the bytes of `name` stand for, by the definition in PyTorch."""
        if name in (MATMUL, THEIR_DENSE):
            return _theirs(self).dequantise(self.theirs, torch.float32)
        return reference.dense(self.ours, torch.float32)


def _theirs(weights: Weights) -> Any:
    return bitsandbytes(weights.dense.device.type)


@functools.lru_cache(maxsize=len(SHAPES))
def weights_of(k: int, n: int, device: str) -> Weights:
    generator = torch.Generator(device).manual_seed(0)
    dense = torch.randn(n, k, generator=generator, device=device).mul_(k**-0.5).to(DTYPE)
    peer = bitsandbytes(device)
    ours = fp.ops.quantize_4bit(dense, double_quant=True)
    return Weights(dense, ours, peer and peer.layer(dense, double=True))


def providers(case: Case, w: Weights, of: Tensor) -> Functions:
    """name -> a call; the first is what the A/A row repeats. of: x, dy (GRAD), or a buffer to copy (DECODE)."""
    found: Functions
    if case.what == DECODE:
        target_ = torch.empty_like(of)
        found = {COPY: lambda: target_.copy_(of), OURS: lambda: w.ours.dequantize(DTYPE)}
    elif case.what == GRAD:
        found = {FROZEN: lambda: of @ w.dense, OURS: lambda: our_grad(of, w.ours)}
    else:
        found = {FROZEN: lambda: linear(of, w.dense), OURS: lambda: fp.ops.linear4bit(of, w.ours)}
    if w.theirs is not None:
        found |= _their_providers(case, w, of)
    return found if case.what == DECODE else found | plans(case, w.ours, of)


def _their_providers(case: Case, w: Weights, of: Tensor) -> Functions:
    from bitsandbytes import functional, matmul_4bit

    data, state = w.theirs.weight.data, w.theirs.weight.quant_state
    decoded = lambda: functional.dequantize_4bit(data, state)  # noqa: E731
    if case.what == DECODE:
        return {MATMUL: decoded}
    if case.what == GRAD:
        return {MATMUL: lambda: torch.matmul(of, decoded().to(of.dtype))}  # what its backward does, whatever M
    return {MATMUL: lambda: matmul_4bit(of, data, quant_state=state), THEIR_DENSE: lambda: linear(of, decoded())}


def our_grad(dy: Tensor, weight: fp.Weight4bit) -> Tensor:
    """dy W by the call that autograd makes for a linear4bit."""
    tensors, quants, forms = weight4bit.split([weight])
    s, none = dy.new_empty(dy.shape[0], 0), [None]
    needs = [True, False, False, False]
    return lora_linear_op._backward([dy], None, s, tensors, none, none, none, quants, forms, 0.0, None, needs, "")[0]


def plans(case: Case, weight: fp.Weight4bit, of: Tensor) -> Functions:
    """Our own ways, each forced: what `linear4bit_gpu` chooses from."""
    if not of.is_cuda:
        return {}
    meta = (of, [None], [None], [weight])
    cuda = lora_linear_gpu.can_cuda(meta) is None
    passes = lora_linear_gpu.cuda_passes() if cuda else lora_linear_gpu.triton_passes()
    small = cuda and 0 < case.m <= linear4bit_cuda.SMALL_M and linear4bit_cuda.is_fast(of, weight)
    return forced(case.what, weight, of, passes, small, _native.triton("linear4bit"))


def forced(what: str, weight: fp.Weight4bit, of: Tensor, passes: Any, small: bool, triton: Any) -> Functions:
    """passes: the kernels of lora_linear; triton: those of 4-bit weights. What is missing is left out."""
    found: Functions = {}
    span = None if passes is None else passes.Span(0, 0, 0)
    s = of.new_empty(of.shape[0], 0)
    if small and what == FORWARD:
        found[SMALL] = lambda: linear4bit_cuda.small(of, weight, None, None, s, None, span, None)
    if triton is not None and what == FORWARD:
        found[FUSED] = lambda: triton.project(of, weight, None, None, s, None, triton.Span(0, 0, 0), None)
    if triton is not None and what == GRAD:

        def combine() -> Tensor:
            dx = of.new_empty(of.shape[0], weight.shape[1])
            triton.combine(of, weight, dx, False, of, (), [], 0.0, None)
            return dx

        found[FUSED] = combine
    if passes is not None:
        decoded = lambda: linear4bit_gpu.dense(passes, weight, of.dtype)  # noqa: E731
        found[DECODED] = (lambda: linear(of, decoded())) if what == FORWARD else (lambda: of @ decoded())
    return found


def check(case: Case, w: Weights, of: Tensor, found: Functions) -> tuple[dict[str, list[float]], set[str]]:
    """Relative errors (Frobenius, at most 64 rows) against float64 over the weight that the bytes stand for.

    Wrong: above 2x the error of rounding that weight to bf16 and multiplying, plus a quarter eps.
    """
    rows = slice(None) if case.what == DECODE else slice(None, None, max(1, case.m // 64))

    def result(weight: Tensor) -> Tensor:
        if case.what == DECODE:
            return weight
        x = of[rows].to(weight.dtype)
        return x @ weight if case.what == GRAD else linear(x, weight)

    def error(got: Tensor, want: Tensor) -> float:
        return float((got.double() - want).norm() / want.norm())

    exact = w.exact(OURS)
    want = result(exact.double())
    allowed = 2 * error(result(exact.to(DTYPE)), want) + torch.finfo(DTYPE).eps / 4
    measured = {n: [error(f()[rows], want)] for n, f in found.items() if n == OURS or n in PLANS}
    peers = [n for n in found if n in (MATMUL, THEIR_DENSE)]
    want = result(w.exact(peers[0]).double()) if peers else want
    measured |= {n: [error(found[n]()[rows], want)] for n in peers}
    return measured, {n for n, (e,) in measured.items() if not e <= allowed}


def layer_providers(case: Case, w: Weights, device: str) -> tuple[Functions, dict[str, list[float]], set[str]]:
    """The QLoRA layer and its peers, forward and backward; their errors, and the wrong ones."""
    like = lora.Case(case.k, case.n, case.m, "bf16", BOTH, r=R)
    layers = lora.Layers.make(like, device, sets=1)
    x, dy, a, b = layers.x, layers.dy, layers.a[0], layers.b[0]
    calls: dict[str, Callable[[int], Tensor]] = {
        FROZEN: lambda _: linear(x, w.dense),
        OURS: lambda _: fp.ops.lora_linear(x, w.ours, a, b, scale=SCALE),
        LORA: lambda _: fp.ops.lora_linear(x, w.dense, a, b, scale=SCALE),
    }
    parameters: dict[str, list[Tensor]] = {FROZEN: [], OURS: [a, b], LORA: [a, b]}
    if w.theirs is not None:
        (peer,) = _peers.peft_layers([w.theirs], [a], [b], scale=SCALE, dropout=0.0, low=False)
        calls[PEFT_4BIT], parameters[PEFT_4BIT] = lambda _: peer(x), _peers.adapters(peer)

    def errors(weight: Tensor, call: Callable[[int], Tensor], grads: list[Tensor]) -> list[float]:
        return lora.errors(like, replace(layers, weights=[weight]), call, lambda _: grads)

    exact = {OURS: w.exact(OURS), LORA: w.dense}
    if PEFT_4BIT in calls:
        exact[PEFT_4BIT] = w.exact(MATMUL)
    low = exact[OURS].to(DTYPE)
    peer_errors = errors(exact[OURS], lambda _: _peers.composition(x, low, a, b, SCALE), [a, b])
    allowed = [2 * e + torch.finfo(DTYPE).eps / 4 for e in peer_errors]
    measured = {n: errors(weight, calls[n], parameters[n]) for n, weight in exact.items()}
    wrong = {n for n, e in measured.items() if not all(v <= limit for v, limit in zip(e, allowed, strict=True))}

    def both(name: str) -> Callable[[], Any]:
        call, inputs = calls[name], [x, *parameters[name]]
        return lambda: torch.autograd.grad(call(0), inputs, dy)

    return {name: both(name) for name in calls}, measured, wrong


def floors(case: Case, size: int, device: str) -> dict[str, float]:
    """Least seconds by bytes (the weight's `size` read once a pass, x and y or their gradients) and by FLOPs."""
    k, n, m, item = case.k, case.n, case.m, DTYPE.itemsize
    flops, moved = 2 * m * k * n, size + item * m * (k + n)
    if case.what == DECODE:
        moved += item * k * n
    if case.what == BOTH:
        flops, moved = 2 * flops + 6 * m * R * (k + n), 2 * moved
    if device == "cuda":
        rate, bandwidth = _cuda.matrix_rate(DTYPE), _cuda.copy_bandwidth()
    else:
        rate, bandwidth = _machine.matmul_rate(DTYPE, device), _machine.read_bandwidth(device)
    by_bytes = moved / bandwidth
    return {"flops": flops, "bytes": moved, "byte_seconds": by_bytes, "seconds": max(by_bytes, flops / rate)}


# ------------------------------------------------------------------------------------------------------- measuring


def measure(case: Case, seconds: float, device: str, modes: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of one case, one a timing mode (as `gpu_suite.modes` has them)."""
    w = weights_of(case.k, case.n, device)
    floor = floors(case, w.ours.nbytes, device)
    if case.what == BOTH:
        with torch.enable_grad():
            found, error, wrong = layer_providers(case, w, device)
            return _timed(case, found, error, wrong, floor, seconds, device, modes)
    generator = torch.Generator(device).manual_seed(1)
    shape = (case.m, case.n if case.what == GRAD else case.k)
    if case.what == DECODE:
        shape = (int(floor["bytes"]) // (2 * DTYPE.itemsize), 1)
    of = torch.randn(shape, generator=generator, device=device).to(DTYPE)
    with torch.no_grad():
        found = providers(case, w, of)
        error, wrong = check(case, w, of, found)
        return _timed(case, found, error, wrong, floor, seconds, device, modes)


def _timed(
    case: Case,
    found: Functions,
    error: dict[str, list[float]],
    wrong: set[str],
    floor: dict[str, float],
    seconds: float,
    device: str,
    modes: dict[str, Any],
) -> list[dict[str, Any]]:
    peak = {name: _cuda.peak_bytes(f) for name, f in found.items()} if device != "cpu" else {}
    first, rows = next(iter(found)), []
    for mode, (prepare, timer) in modes.items():
        functions, notes = prepared(found, prepare, must=(first, OURS))
        functions[AGAIN] = functions[first]
        sample = SAMPLE.get(mode, 0.001)
        samples = paired(functions, seconds / len(modes), timer=timer, sample=sample, warm=1)
        row = {
            "kind": KIND,
            "key": f"{case.name}, {mode}",
            "case": asdict(case),
            "mode": mode,
            "error": error,
            "wrong": sorted(wrong),
            "notes": notes,
            "peak_bytes": peak,
            "floor": floor,
            "samples": samples.as_json(),
        }
        rows.append(row | summary(case, mode, samples, floor, wrong))
    return rows


def empty_kernel(device: str, modes: dict[str, Any]) -> dict[str, float]:
    """mode -> seconds of a call of one kernel with nothing to do: the part of a few microseconds that is launch and timer."""
    one, found = torch.zeros(1, device=device), {}
    for mode, (prepare, timer) in modes.items():
        function = prepare(lambda: one.add_(1))
        found[mode] = sorted(timer(function, 20) / 20 for _ in range(9))[4]
    return found


def prepared(found: Functions, prepare: Callable, must: tuple[str, ...]) -> tuple[Functions, dict[str, str]]:
    """The functions made ready for timing; a peer that cannot be (captured in a graph, say) is left out with a note."""
    ready, notes = {}, {}
    for name, function in found.items():
        try:
            ready[name] = prepare(function)
        except Exception as failure:
            if name in must:
                raise
            notes[name] = f"left out: {type(failure).__name__}: {str(failure)[:200]}"
    return ready, notes


def summary(
    case: Case, mode: str, samples: Samples, floor: dict[str, float], wrong: set[str] | None = None
) -> dict[str, Any]:
    """Ratios and verdicts from samples. Our plans are no peers: their seconds stand apart."""
    wrong = wrong or set()
    first = next(iter(samples.seconds))
    right = [n for n in samples.seconds if n not in wrong and n != AGAIN]
    peers = [n for n in right if n not in (OURS, *PLANS)]
    theirs = [n for n in peers if n in (MATMUL, THEIR_DENSE)]
    state, ours = validity(samples, None, first), samples.median(OURS)
    result: dict[str, Any] = {
        "time": {n: samples.ratio(OURS, n).as_json() for n in peers},
        "best_peer": samples.best(theirs or [n for n in peers if n in (LORA, PEFT_4BIT)] or [first]),
        "roofline": floor["seconds"] / ours,
        "copy_share": floor["byte_seconds"] / ours,
        "aa": samples.ratio(AGAIN, first).as_json(),
        "validity": list(state),
        "plans": {n: samples.median(n) for n in right if n in PLANS},
        "targets": [],
    }
    if FUSED in result["plans"] and DECODED in result["plans"]:
        result["fused_over_decoded"] = samples.ratio(FUSED, DECODED).as_json()
    for limit in case.limits:
        peer = samples.best(theirs) if limit.peer == BEST and theirs else limit.peer
        asked = mode == (_cuda.COLD if limit.peer == BYTES else _cuda.WARM)
        if asked and (peer in peers or peer == BYTES):
            verdict = _target(case, samples, limit, peer, floor, OURS in wrong, state)
            result["targets"].append(verdict.as_json())
    return result


def _target(
    case: Case,
    samples: Samples,
    limit: Limit,
    peer: str,
    floor: dict[str, float],
    wrong: bool,
    state: tuple[str, str],
) -> Target:
    """No limit binds below 1.3x the floor."""
    if wrong:
        state = ("wrong result", "error against float64 too large")
    if peer == BYTES:
        share = median_interval(samples.times(OURS) / floor["byte_seconds"])
        text = f"{case.name}, cold L2: time over its bytes' at copy bandwidth ({COPY_SHARE:.0%} of it)"
        return target(text, limit.value, share, state, FLOOR_ROOM)
    text = f"{case.name}: time over {peer}'s" + (" (its better way)" if limit.peer == BEST else "")
    return target(
        text, limit.value, samples.ratio(OURS, peer), state, FLOOR_ROOM * floor["seconds"] / samples.median(peer)
    )


# --------------------------------------------------------------------------------------------------- which plan when


def plan(rows: list[dict[str, Any]], mode: str = _cuda.COLD) -> dict[str, Any] | None:
    """What the timings of our plans say about `fused_to_m`; None if there are none.

    The row count whose choices lose least (geometric mean over shapes, forward and dX, of the chosen plan's time over the
    better one's). From rows with a cold L2, as a weight is met in a model; up to 16 rows forward `small` goes first, and
    such rows do not decide. Neither do noisy ones.
    """
    found = [r for r in rows if r["kind"] == KIND and r["mode"] == mode and {FUSED, DECODED} <= r["plans"].keys()]
    if not found:
        return None
    table = [
        {
            **{"key": r["key"], **{name: r["case"][name] for name in ("k", "n", "m", "what")}},
            **{"seconds": r["plans"], "fused_over_decoded": r["fused_over_decoded"], "validity": r["validity"][0]},
        }
        for r in found
    ]
    deciding = [r for r in table if r["validity"] == OK and SMALL not in r["seconds"]]
    result = {"mode": mode, "now": linear4bit_gpu._FUSED_TO, "table": table, "rows": sorted({r["m"] for r in deciding})}
    if not deciding:
        return result | {"fused_to_m": None}

    def losses(to: int) -> dict[str, float]:
        """row -> time of the plan that `to` chooses over the better one's, less 1"""
        times = {r["key"]: (r["seconds"][FUSED], r["seconds"][DECODED], r["m"] <= to) for r in deciding}
        return {
            key: (fused if chosen else decoded) / min(fused, decoded) - 1
            for key, (fused, decoded, chosen) in times.items()
        }

    best = min((0, *result["rows"]), key=lambda to: sum(math.log1p(loss) for loss in losses(to).values()))
    worst, now = max(losses(best).items(), key=lambda pair: pair[1]), losses(result["now"])
    mean = math.expm1(sum(map(math.log1p, now.values())) / len(now))
    return result | {"fused_to_m": best, "worst": list(worst), "mean_loss_now": mean}
