"""The main job: fine-tuning SmolLM2-135M on movie reviews with LoRA or QLoRA, under PEFT and under fastpeft, side by side.

    train()   the same seed and the same batches, interleaved step by step: losses and throughput
    full()    full fine-tuning of the same model beside it: time a step, bytes to store per task
    step()    one training step without optimizer over the frozen model: the overhead of each way
    memory()  peak memory of each way, each in a process of its own
    sizes()   bytes of the weights, dense and in 4 bits

Every function returns a line for the results file. For QLoRA the base is `_bitsandbytes.in_4bit(base)`; nothing else differs.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import fastpeft as fp

from . import _machine, _peers
from ._measure import AGAIN, FROZEN, OK, Estimate, Rounds, timer_for, validity
from ._peers import COMPOSITION, OURS, PEFT, PEFT_LOW
from ._targets import FLOOR_ROOM, target

FULL = "full fine-tuning"
RANK, ALPHA = 16, 32
LEARNING_RATE = 5e-4
FULL_LEARNING_RATE = 2e-5
WAYS = (PEFT, PEFT_LOW, OURS)
WORKER_SECONDS = 600  # of one memory worker, which needs well under a minute

Tick = Callable[[], object] | None


def build(way: str, base: nn.Module) -> nn.Module:
    """A model over base's weights, which all ways share (full fine-tuning copies them), LoRA on every linear layer."""
    if way == FULL:
        return copy.deepcopy(base).requires_grad_(True)
    model: nn.Module = copy.deepcopy(base, {id(p): p for p in base.parameters()}).requires_grad_(False)
    if way in (FROZEN, AGAIN):
        return model
    torch.manual_seed(0)  # the same adapters in every way; PEFT draws them in fp32, then casts
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config, autocast_adapter_dtype=way != PEFT_LOW)  # type: ignore[arg-type]
    if way == COMPOSITION:
        _peers.use_composition(model)
    if way == OURS:
        fp.apply(model)
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _size(tensors: list[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def trainer(way: str, model: nn.Module, batches: list[Tensor]) -> tuple[Callable[[], None], list[float]]:
    """(one optimizer step on the next batch, the losses so far)."""
    rate = FULL_LEARNING_RATE if way == FULL else LEARNING_RATE
    optimizer = torch.optim.AdamW(trainable(model), lr=rate, weight_decay=0.0)
    losses: list[float] = []

    def step() -> None:
        ids = batches[len(losses) % len(batches)]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))

    return step, losses


def loss_gaps(losses: dict[str, list[float]]) -> dict[str, float]:
    """The largest |Δloss| to PEFT's default over the run: fastpeft's, and PEFT's own other configuration's."""

    def gap(way: str) -> float:
        return max(abs(a - b) for a, b in zip(losses[way], losses[PEFT], strict=True))

    return {OURS: gap(OURS), PEFT_LOW: gap(PEFT_LOW)}


def train(
    base: nn.Module, batches: list[Tensor], seconds: float, *, steps: int, device: str, tick: Tick = None
) -> dict[str, Any]:
    """Fine-tune under each way, one step of each in turn, for `seconds` or `steps` steps (at least 3)."""
    models = {way: build(way, base) for way in WAYS}
    made = {way: trainer(way, model, batches) for way, model in models.items()}
    functions = {way: step for way, (step, _) in made.items()}
    losses = {way: list_ for way, (_, list_) in made.items()}
    rounds = Rounds(WAYS, timer_for(device))
    end = time.perf_counter() + seconds
    while len(losses[PEFT]) < 3 or (len(losses[PEFT]) < steps and time.perf_counter() < end):
        rounds.run(functions, count=len(losses[PEFT]) > 0)  # the first step allocates and warms up: loss yes, time no
        if tick is not None:
            tick()
    samples = rounds.samples
    gaps = loss_gaps(losses)
    tokens = batches[0].numel()
    shown = len(losses[PEFT])
    text = f"largest |Δloss| to PEFT's default in {shown} steps, fastpeft's over that between PEFT's two configurations"
    ratio = gaps[OURS] / gaps[PEFT_LOW] if gaps[PEFT_LOW] else float("nan")
    floats = {way: samples.median(way) for way in WAYS}
    return {
        "kind": "training",
        "key": f"training B={batches[0].shape[0]} S={batches[0].shape[1]}",
        "steps": shown,
        "losses": {way: [round(v, 6) for v in values] for way, values in losses.items()},
        "gaps": gaps,
        "samples": samples.as_json(),
        "tokens_per_step": tokens,
        "tokens_per_second": {way: tokens / value for way, value in floats.items()},
        "throughput": {way: samples.ratio(way, OURS).as_json() for way in (PEFT, PEFT_LOW)},
        "stored_bytes": {way: _size(trainable(model)) for way, model in models.items()},
        "report": str(_report_summary(models[OURS])),
        "targets": [target(text, 2.0, Estimate.exact(ratio), (OK, "a count")).as_json()],
    }


def _report_summary(model: nn.Module) -> str:
    return str(fp.apply(model)).splitlines()[0]


def full(base: nn.Module, batches: list[Tensor], seconds: float, *, device: str, tick: Tick = None) -> dict[str, Any]:
    """A few steps of full fine-tuning (AdamW, all in the model's dtype) between steps of LoRA under fastpeft."""
    ways = (OURS, FULL)
    models = {way: build(way, base) for way in ways}
    functions = {way: trainer(way, models[way], batches)[0] for way in ways}
    rounds = Rounds(ways, timer_for(device))
    rounds.run(functions, count=False)
    end = time.perf_counter() + seconds
    while rounds.samples.rounds < 2 or (time.perf_counter() < end and rounds.samples.kept < 30):
        rounds.run(functions)
        if tick is not None:
            tick()
    return {
        "kind": "full",
        "key": f"full fine-tuning B={batches[0].shape[0]} S={batches[0].shape[1]}",
        "samples": rounds.samples.as_json(),
        "time": rounds.samples.ratio(FULL, OURS).as_json(),
        "stored_bytes": {way: _size(trainable(model)) for way, model in models.items()},
    }


def gradients(model: nn.Module, ids: Tensor) -> None:
    """Forward and backward without optimizer, with gradients to the embedding output; gradients are thrown away."""
    embed = model.get_input_embeddings()  # type: ignore[operator]
    with torch.no_grad():
        embedded = embed(ids)
    embedded.requires_grad_()
    model(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()
    for parameter in trainable(model):
        parameter.grad = None


def lora_flops(model: nn.Module, tokens: int) -> int:
    """What the adapters add to a forward and backward pass."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    return sum(6 * tokens * RANK * (layer.in_features + layer.out_features) for layer in layers)


def linear_flops(model: nn.Module, tokens: int) -> int:
    """Forward and input gradients of a frozen dense model's linear layers."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return sum(4 * tokens * layer.in_features * layer.out_features for layer in layers)


def step(
    base: nn.Module,
    ids: Tensor,
    seconds: float,
    *,
    label: str,
    device: str,
    most: int = 45,
    dense: nn.Module | None = None,
    tick: Tick = None,
) -> dict[str, Any]:
    """Overhead over the frozen model of one step without optimizer, for each way and the composition.

    dense: where base is in 4 bits, the model that it was made from. That is the frozen one then, and there is no composition.
    """
    peers = (PEFT, PEFT_LOW, COMPOSITION) if dense is None else (PEFT, PEFT_LOW)
    models = {way: build(way, base) for way in (*peers, OURS)}
    models[FROZEN] = build(FROZEN, base if dense is None else dense)
    models[AGAIN] = models[FROZEN]
    functions = {way: (lambda model=model: gradients(model, ids)) for way, model in models.items()}
    for model in models.values():
        gradients(model, ids[:1, :8])  # a whole step to warm up would cost a round
    rounds = Rounds(list(functions), timer_for(device))
    end = time.perf_counter() + seconds
    while rounds.samples.rounds < 2 or (time.perf_counter() < end and rounds.samples.kept < most):
        rounds.run(functions)
        if tick is not None:
            tick()
    samples = rounds.samples
    shown = samples if samples.kept else samples.all_rounds()
    name = f"{label} training step B={ids.shape[0]} S={ids.shape[1]}, all linear, r={RANK}"
    dtype = next(base.parameters()).dtype
    rate = _machine.matmul_rate(dtype, device)
    adapters = lora_flops(models[OURS], ids.numel())
    floor = adapters / rate / shown.median(FROZEN)
    targets = []
    for peer, limit in ((PEFT, 0.2), (COMPOSITION, 0.7)) if dense is None else ():
        overhead = shown.overhead(peer).median
        state = validity(samples, limit * overhead)
        ratio = shown.overhead_ratio(OURS, peer)
        bound = FLOOR_ROOM * floor / overhead if overhead > 0 else None
        targets.append(target(f"{name}: overhead over {peer}'s", limit, ratio, state, bound).as_json())
    if dense is not None:
        least = (linear_flops(dense, ids.numel()) + adapters) / rate
        bound = FLOOR_ROOM * least / shown.median(PEFT)
        ratio, state = shown.ratio(OURS, PEFT), validity(samples, None)
        targets.append(target(f"{name}: time over PEFT's over bitsandbytes", 1 / 1.15, ratio, state, bound).as_json())
    return {
        "kind": "step",
        "key": name,
        "samples": samples.as_json(),
        "overhead": {way: shown.overhead(way).as_json() for way in (*peers, OURS)},
        "overhead_ratio": {way: shown.overhead_ratio(OURS, way).as_json() for way in peers},
        "time": {way: shown.ratio(OURS, way).as_json() for way in peers},
        "floor_overhead": floor,
        "aa": shown.ratio(AGAIN, FROZEN).as_json(),
        "validity": list(validity(samples, shown.overhead(PEFT).median if dense is None else None)),
        "targets": targets,
    }


# ------------------------------------------------------------------------------------------------------------ memory


def _resident(field: str) -> int | None:
    """VmRSS or VmHWM (its peak) of this process in bytes; None off Linux."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))
    except (OSError, StopIteration):
        return None


def _trim() -> None:
    """Give freed memory back to the system, so that a resident size is a live size."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def memory_worker(way: str, where: str, dtype: str, device: str, ids_json: str, in_4bit: str = "") -> dict[str, Any]:
    """Peak memory of a step net of the loaded model, in this process; with optimizer state for full fine-tuning.

    in_4bit: "4-bit" for QLoRA, where only the frozen model stays dense.
    """
    from ._smollm2 import load

    ids = torch.tensor(json.loads(ids_json), device=device)
    base = load(where, getattr(torch, dtype), device)
    if in_4bit and way != FROZEN:
        from . import _bitsandbytes

        base = _bitsandbytes.in_4bit(base)
    model = build(way, base)
    del base
    gc.collect()
    gradients(model, ids[:1, :8])  # code, thread stacks and the like
    optimizer = torch.optim.AdamW(trainable(model)) if way == FULL else None

    def once() -> None:
        if optimizer is None:
            gradients(model, ids)
            return
        for _ in range(2):  # the second one has the optimizer's state beside its activations
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before: int | None = torch.cuda.memory_allocated()
        once()
        after: int | None = torch.cuda.max_memory_allocated()
    else:
        _trim()
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # forget the peak so far
        except OSError:
            pass  # then loading must have peaked below the step, which it does
        before = _resident("VmRSS")
        once()
        after = _resident("VmHWM")
    net = None if before is None or after is None else after - before
    return {"net_bytes": net, "peak_bytes": after, "trainable_bytes": _size(trainable(model))}


def memory(
    where: str,
    ids: Tensor,
    *,
    dtype: torch.dtype,
    device: str,
    ways: tuple[str, ...],
    in_4bit: bool = False,
    tick: Tick = None,
) -> dict[str, Any]:
    """Peak memory net of the loaded model, and of the whole process, each way in a fresh process. in_4bit: QLoRA."""
    cpu = not device.startswith("cuda")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "MALLOC_MMAP_THRESHOLD_": "65536",  # tensors go back to the system when freed: resident = live
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "TQDM_DISABLE": "1",
    }
    if cpu:
        environment["OMP_NUM_THREADS"] = str(max(1, _machine.cores() // 2))  # two at a time: nothing is timed here

    def one(way: str) -> dict[str, Any]:
        arguments = [way, where, str(dtype).removeprefix("torch."), device, json.dumps(ids.tolist())]
        arguments += ["4-bit"] if in_4bit else []
        # -P: not the folder that one happens to stand in, such as a clone beside an installed fastpeft
        command = [sys.executable, "-P", "-m", __name__, *arguments]
        try:
            run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=WORKER_SECONDS)
        except subprocess.TimeoutExpired:
            raise RuntimeError(
                f"measuring the memory of {way} was not done after {WORKER_SECONDS} s and was stopped: run it "
                "again with --parts memory when nothing else runs and memory is free, or leave memory out of --parts"
            ) from None
        if tick is not None:
            tick()
        if run.returncode:
            raise RuntimeError(f"measuring the memory of {way} failed:\n{run.stderr[-2000:]}")
        return json.loads(run.stdout.splitlines()[-1])

    with ThreadPoolExecutor(2 if cpu else 1) as pool:
        found = dict(zip(ways, pool.map(one, ways), strict=True))
    name = f"peak memory of a step net of the model, B={ids.shape[0]} S={ids.shape[1]}"
    net = {way: data["net_bytes"] for way, data in found.items()}
    targets = []
    if net.get(OURS) and net.get(PEFT) and not in_4bit:
        ratio = Estimate.exact(net[OURS] / net[PEFT])
        frozen = net.get(FROZEN)  # its own activations and the loss: no adapter can need less
        note = "resident peak" if frozen is None else f"resident peak; the frozen model alone {frozen / net[PEFT]:.3f}"
        targets.append(target(f"{name}: fastpeft over PEFT", 0.65, ratio, (OK, note)).as_json())
    return {"kind": "memory", "key": name, "memory": found, "targets": targets}


# ------------------------------------------------------------------------------------------------------------- sizes

BILLIONS = (7, 13, 33, 65, 70)


def bits(double: bool, block: int = 64, nested_block: int = 256) -> float:
    """Bits a weight of NF4: the code and its share of a float32 scale, or of an 8-bit scale and that one's float32 scale."""
    return 4 + ((8 + 32 / nested_block) / block if double else 32 / block)


def sizes(dense: nn.Module, in_4bit: nn.Module, label: str) -> dict[str, Any]:
    """Bytes of the weights: of these models as they are stored, and computed for the usual large ones."""
    from . import _bitsandbytes

    def linears(model: nn.Module) -> nn.ModuleList:
        head = model.get_output_embeddings()  # type: ignore[operator]
        return nn.ModuleList(m for m in model.modules() if isinstance(m, nn.Linear) and m is not head)

    stored = {
        f"{label}, linear layers": [_bitsandbytes.resident(linears(model)) for model in (dense, in_4bit)],
        f"{label}, all of it": [_bitsandbytes.resident(model) for model in (dense, in_4bit)],
    }
    computed = {f"{n}B": [int(n * 1e9 * b / 8) for b in (16, bits(False), bits(True))] for n in BILLIONS}
    return {"kind": "sizes", "key": f"bytes of the weights, {label}", "stored": stored, "computed": computed}


if __name__ == "__main__":
    print(json.dumps(memory_worker(*sys.argv[1:7])))
