"""Prefix tuning: SmolLM2-135M and an encoder under PEFT and fastpeft, prefix_attention by shape, bytes saved for backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .. import prefix_attention as op
from ..kit import minilm, smollm2
from ..kit.case import OURS
from ..kit.peers import PEFT
from ..kit.rounds import FROZEN, Estimate
from ..kit.runner import Run, Task
from ..kit.saved import saved_bytes
from ..kit.verdict import target
from . import encoder_job, main_job, memory
from . import prefix_job as job
from .jobs import kernels, of_dtype


def tasks(run: Run) -> list[Task]:
    cases = op.target_cases() + (op.sweep_cases() if run.long else [])
    cases = of_dtype(cases, run.options.dtype if run.long else run.dtype_name)
    if run.quick:
        cases = [case for case in cases if case.t <= 128]
    if not run.long:
        cases = [replace(case, compiled=False) for case in cases]
    made = [*language_model(run), *encoder(run), *kernels(run, op, cases, load=lambda case: op.cost(case).flops / 3e10)]
    return [*made, Task("others", "saved bytes of a layer", 1, lambda s: [saved_by_a_layer(run.device)])]


def language_model(run: Run) -> list[Task]:
    """Training, a step, bytes saved for backward and peak memory of SmolLM2-135M, or of the user's own model."""
    if not {"training", "step", "memory", "others"} & set(run.parts):
        return []
    run.say("loading the model and the text (fetched once into the cache)")
    options, quick, long = run.options, run.quick, run.long
    where, label = smollm2.prepare(options.model)
    base = smollm2.load(where, run.dtype, run.device)
    steps, length = 4 if quick else 100 if long else 30, 64 if quick else 128
    batches, text = smollm2.batches(where, options.text, steps, 1 if quick else 2, length, run.device)
    (ids,), _ = smollm2.batches(where, options.text, 1, *((1, 64) if quick else (2, 512)), run.device)
    (many,), _ = smollm2.batches(where, options.text, 1, *((2, 64) if quick else (8, 512)), run.device)
    about, common = {"model": label, "text": text}, {"device": run.device, "tick": run.tick}
    took = [5.0]  # seconds of one way's training step, known once training has run

    def row(measured: Callable[[float], dict[str, Any]]) -> Callable[[float], list[dict[str, Any]]]:
        return lambda seconds: [{**measured(seconds), **about}]

    def train(seconds: float) -> dict[str, Any]:
        begin = many.flatten()[: job.LENGTH].tolist()
        found = main_job.train(base, batches, seconds, steps=steps, method=job.method(begin), **common)
        took[0] = found.pop("seconds_a_step")
        return found

    peak = {"dtype": run.dtype, "ways": (FROZEN, *job.WAYS), "job": "prefix_job", **common}
    return [
        Task("training", "fine-tuning side by side", 20 if quick else 600 if long else 90, row(train)),
        Task("step", "training step", 20 if quick else 1200 if long else 60,
             row(lambda s: job.step(base, ids, s, label=label, **common)), lambda: (10 if quick else 44) * took[0]),
        Task("memory", "peak memory", 25 if quick else 240 if long else 60,
             row(lambda s: memory.memory(where, many, **peak)), lambda: 20 if quick else 30 + 64 * took[0]),
        Task("others", "saved bytes of a model", 5, row(lambda s: job.saved(base, ids, label=label))),
    ]  # fmt: skip


def encoder(run: Run) -> list[Task]:
    """Accuracy, time a step and bytes saved for backward of MiniLM on Rotten Tomatoes, in fp32 and with its dropout."""
    if "accuracy" not in run.parts:
        return []
    base = minilm.load(torch.float32, run.device)
    train, held_out = minilm.reviews()
    steps = 4 if run.quick else 470 if run.long else 100  # 235: every review once
    about = {"label": minilm.NAME, "device": run.device, "tick": run.tick}

    def measured(seconds: float) -> list[dict[str, Any]]:
        some = held_out.part(slice(100 if run.quick else None))
        return [encoder_job.fine_tune(base, train, some, seconds, steps=steps, **about)]

    seconds = 15 if run.quick else 2400 if run.long else 120
    return [Task("accuracy", "an encoder on Rotten Tomatoes", seconds, measured)]


def saved_by_a_layer(device: str, t: int = 256) -> dict[str, Any]:
    """Bytes kept for backward, beside PEFT's recipe; and what a longer prefix adds, over a copy of it a row."""
    case, rows = op.Case(t, shape=(8, 16, 4, 64)), {}
    kept: dict[int, int] = {}
    for p in (32, 128):
        work = op.work(replace(case, p=p), device)
        found = {}
        for name, function in ((PEFT, work.functions[op.RECIPE]), (OURS, work.functions[OURS])):
            (cache,) = function.ring.items
            with torch.enable_grad():
                found[name] = saved_bytes(lambda: function.call(cache), function.wrt(cache)[3:])  # noqa: B023
        x = work.functions[OURS].wrt(cache)[0].untyped_storage().nbytes()
        rows[f"bytes saved for backward, {replace(case, p=p).name}"] = {**found, "x": x}
        kept[p] = found[OURS]
    (b, _, kv, d), item = case.shape, 2
    share = (kept[128] - kept[32]) / (2 * item * b * (128 - 32) * kv * d)
    text = f"{case.name}: bytes that a prefix of 128 keeps for backward beyond one of 32, over a copy of it a row"
    judged = target(text, 0.01, Estimate.exact(share))
    return {"kind": "saved bytes", "key": "saved bytes of a layer", "bytes": rows, "targets": [judged.as_json()]}
