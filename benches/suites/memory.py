"""Memory: the peak of a training step, each way in a fresh process, and the bytes of weights, dense and in 4 bits."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from ..kit import machine
from ..kit.case import OURS
from ..kit.measure import Tick
from ..kit.peers import PEFT
from ..kit.rounds import FROZEN, OK, Estimate
from ..kit.verdict import target
from .main_job import FULL, gradients, stored_bytes, trainable

WORKER_SECONDS = 600  # of one worker, which needs well under a minute
BILLIONS = (7, 13, 33, 65, 70)


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


def memory_worker(
    way: str, where: str, dtype: str, device: str, ids_json: str, job: str, in_4bit: str = ""
) -> dict[str, Any]:
    """Peak memory of a step net of the loaded model, in this process; with optimizer state for full fine-tuning.

    job: the module beside this one whose `build` makes the model of a way. in_4bit: "4-bit" for QLoRA, where only the
    frozen model stays dense.
    """
    from ..kit.smollm2 import load

    ids = torch.tensor(json.loads(ids_json), device=device)
    base = load(where, getattr(torch, dtype), device)
    if in_4bit and way != FROZEN:
        from ..kit import bnb

        base = bnb.in_4bit(base)
    model = importlib.import_module(f".{job}", __package__).build(way, base)
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
    return {"net_bytes": net, "peak_bytes": after, "trainable_bytes": stored_bytes(trainable(model))}


def memory(
    where: str,
    ids: Tensor,
    *,
    dtype: torch.dtype,
    device: str,
    ways: tuple[str, ...],
    job: str = "main_job",
    in_4bit: bool = False,
    limit: float | None = None,
    tick: Tick = None,
) -> dict[str, Any]:
    """Peak memory net of the loaded model, and of the whole process, each way in a fresh process.

    job: see `memory_worker`. in_4bit: QLoRA. limit: fastpeft's over PEFT's, or None.
    """
    cpu = not device.startswith("cuda")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "MALLOC_MMAP_THRESHOLD_": "65536",  # tensors go back to the system when freed: resident = live
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "TQDM_DISABLE": "1",
    }
    if cpu:
        environment["OMP_NUM_THREADS"] = str(max(1, machine.cores() // 2))  # two at a time: nothing is timed here

    def one(way: str) -> dict[str, Any]:
        arguments = [way, where, str(dtype).removeprefix("torch."), device, json.dumps(ids.tolist()), job]
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
    if limit is not None and net.get(OURS) and net.get(PEFT):
        ratio = Estimate.exact(net[OURS] / net[PEFT])
        frozen = net.get(FROZEN)  # its own activations and the loss: no adapter can need less
        note = "resident peak" if frozen is None else f"resident peak; the frozen model alone {frozen / net[PEFT]:.3f}"
        targets.append(target(f"{name}: fastpeft over PEFT", limit, ratio, (OK, note)).as_json())
    return {"kind": "memory", "key": name, "memory": found, "targets": targets}


def bits(double: bool, block: int = 64, nested_block: int = 256) -> float:
    """Bits a weight of NF4: the code and its share of a float32 scale, or of an 8-bit scale and that one's float32 scale."""
    return 4 + ((8 + 32 / nested_block) / block if double else 32 / block)


def sizes(dense: nn.Module, in_4bit: nn.Module, label: str) -> dict[str, Any]:
    """Bytes of the weights: of these models as they are stored, and computed for the usual large ones."""
    from ..kit import bnb

    def linears(model: nn.Module) -> nn.ModuleList:
        head = model.get_output_embeddings()  # type: ignore[operator]
        return nn.ModuleList(m for m in model.modules() if isinstance(m, nn.Linear) and m is not head)

    stored = {
        f"{label}, linear layers": [bnb.resident(linears(model)) for model in (dense, in_4bit)],
        f"{label}, all of it": [bnb.resident(model) for model in (dense, in_4bit)],
    }
    computed = {f"{n}B": [int(n * 1e9 * b / 8) for b in (16, bits(False), bits(True))] for n in BILLIONS}
    return {"kind": "sizes", "key": f"bytes of the weights, {label}", "stored": stored, "computed": computed}


if __name__ == "__main__":
    print(json.dumps(memory_worker(*sys.argv[1:8])))
