"""The tasks that suites are made of, and how long each may take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from ..cli import PEER_NAMES
from ..kit import smollm2
from ..kit.measure import measure
from ..kit.peers import COMPOSITION, PEFT, PEFT_LOW
from ..kit.runner import Run, Task
from . import main_job as job
from . import memory


def main_job(run: Run, in_4bit: bool = False) -> list[Task]:
    """Training, a step, decoding and memory of SmolLM2-135M, or of the user's own model."""
    if not {"training", "step", "decode", "memory", "others"} & set(run.parts):
        return []
    run.say("loading the model and the text (fetched once into the cache)")
    options, quick, long, gpu = run.options, run.quick, run.long, run.device == "cuda"
    where, label = smollm2.prepare(options.model)
    name = smollm2.NAME if options.model is None else Path(where).name
    dense = smollm2.load(where, run.dtype, run.device)
    steps = 4 if quick else 100 if long else 40
    shape = (8, 512) if gpu else (1, 64) if quick else (2, 128)
    batches, text = smollm2.batches(where, options.text, steps, *shape, run.device)
    (ids,), _ = smollm2.batches(where, options.text, 1, *((1, 64) if quick else (4, 256)), run.device)
    base, ways = dense, ["frozen", PEFT, *([PEFT_LOW] if long else [])]
    if in_4bit:
        from ..kit import bnb

        base, label = bnb.in_4bit(dense), f"{label} in NF4 with double quantisation"
    else:
        ways += [COMPOSITION] if long else []
    ways += ["fastpeft"] if in_4bit or quick else ["fastpeft", job.FULL]
    about, common = {"model": label, "text": text}, {"device": run.device, "tick": run.tick}
    of_model = {**common, "label": label, "dense": dense if in_4bit else None}
    took = [5.0]  # seconds of one way's training step, known once training has run

    def row(measured: Callable[[float], dict[str, Any]]) -> Callable[[float], list[dict[str, Any]]]:
        return lambda seconds: [{**measured(seconds), **about}]

    def train(seconds: float) -> dict[str, Any]:
        found = job.train(base, batches, seconds, steps=steps, **common)
        took[0] = found.pop("seconds_a_step")
        return found

    peak = {"dtype": run.dtype, "ways": tuple(ways), "in_4bit": in_4bit, "limit": None if in_4bit else 0.65, **common}
    found = [
        Task("training", "fine-tuning side by side", 20 if quick else 600 if long else 90, row(train)),
        Task("step", "training step", 20 if quick else 2400 if long else 60,
             row(lambda s: job.step(base, ids, s, **of_model)), lambda: 6 * took[0] if quick else 48 * took[0]),
        Task("decode", "decoding", 8 if quick else 60 if long else 15,
             row(lambda s: job.decode(base, ids[:1, :64], s, **of_model))),
        Task("memory", "peak memory", 25 if quick else 240 if long else 60,
             row(lambda s: memory.memory(where, ids, **peak)), lambda: 10 if quick else 30 + 12 * took[0]),
    ]  # fmt: skip
    if in_4bit:
        found.insert(0, Task("others", "bytes of the weights", 1, row(lambda s: memory.sizes(dense, base, name))))
    elif not quick:
        full = row(lambda s: job.full(base, batches, s, **common))
        found.insert(1, Task("training", "full fine-tuning", 150 if long else 18, full, lambda: 7 * took[0]))
    return found


def layer_load(case: Any) -> float:
    """Of a linear layer; 1: some 0.7 s a round on two cores."""
    n = sum(case.n) if isinstance(case.n, tuple) else case.n
    return case.k * n * max(case.m, 1) / 2048**2 / 512


def kernels(
    run: Run,
    op: ModuleType,
    cases: Sequence[Any],
    part: str = "kernels",
    load: Callable[[Any], float] = layer_load,
) -> list[Task]:
    """A task for each case of an op."""
    asked = run.options.peer
    without = [name for option, name in PEER_NAMES.items() if asked and option not in asked]

    def task(case: Any) -> Task:
        work = min(load(case), 2.0)
        seconds = 3 if run.quick else (20 + 50 * work if run.long else 6 + 18 * work)
        return Task(part, case.name, seconds, lambda s: measure(op, case, s, run.device, run.tick, without))

    return [task(case) for case in cases]


def of_dtype(cases: Sequence[Any], dtype: str | None) -> list[Any]:
    """Those of one dtype; where there are none, all of them in it, without their targets."""
    if dtype is None:
        return list(cases)
    return [c for c in cases if c.dtype == dtype] or [replace(c, dtype=dtype, limits=()) for c in cases]
