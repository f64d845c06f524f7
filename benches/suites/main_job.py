"""The main job: fine-tuning SmolLM2-135M on movie reviews with LoRA or QLoRA, under PEFT and under fastpeft, side by side.

    train()   the same seed and the same batches, interleaved step by step: losses and throughput
    full()    full fine-tuning of the same model beside it: time a step, bytes to store per task
    step()    one training step without optimizer over the frozen model
    decode()  one token with a cache, adapters in place: what generating costs

Every function returns a line for the results file. For QLoRA the base is `bnb.in_4bit(base)`; nothing else differs.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import fastpeft as fp

from ..kit import peers
from ..kit.case import OURS, OVERHEAD, TIME, Cost, Limit
from ..kit.measure import Tick, floors, summary
from ..kit.peers import COMPOSITION, PEFT, PEFT_LOW
from ..kit.rounds import AGAIN, FROZEN, Estimate, Rounds, Samples, paired, timer_for
from ..kit.verdict import target

FULL = "full fine-tuning"
RANK, ALPHA = 16, 32
LEARNING_RATE = 5e-4
FULL_LEARNING_RATE = 2e-5
WAYS = (PEFT, PEFT_LOW, OURS)


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
        peers.use_composition(model)
    if way == OURS:
        fp.apply(model)
    return model


@dataclass(frozen=True)
class Method:
    """What is trained, and how: `train` runs any."""

    build: Callable[[str, nn.Module], nn.Module]
    ways: tuple[str, ...]  # PEFT first
    other: str  # of PEFT: how far its losses are from PEFT's own is what rounding does
    rate: float
    report: Callable[[nn.Module], str]


def report(model: nn.Module) -> str:
    return str(fp.apply(model)).splitlines()[0]


LORA = Method(build, WAYS, PEFT_LOW, LEARNING_RATE, report)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def stored_bytes(tensors: list[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def trainer(model: nn.Module, batches: list[Tensor], rate: float) -> tuple[Callable[[], None], list[float]]:
    """(one optimizer step on the next batch, the losses so far)."""
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


def loss_gaps(losses: dict[str, list[float]], other: str = PEFT_LOW) -> dict[str, float]:
    """The largest |Δloss| to PEFT's default over the run: fastpeft's, and PEFT's own other configuration's."""

    def gap(way: str) -> float:
        return max(abs(a - b) for a, b in zip(losses[way], losses[PEFT], strict=True))

    return {OURS: gap(OURS), other: gap(other)}


def train(
    base: nn.Module,
    batches: list[Tensor],
    seconds: float,
    *,
    steps: int,
    device: str,
    method: Method = LORA,
    tick: Tick = None,
) -> dict[str, Any]:
    """Fine-tune under each way, one step of each in turn, for `seconds` or `steps` steps (at least 3)."""
    models = {way: method.build(way, base) for way in method.ways}
    made = {way: trainer(model, batches, method.rate) for way, model in models.items()}
    functions = {way: step for way, (step, _) in made.items()}
    losses = {way: list_ for way, (_, list_) in made.items()}
    rounds = Rounds(method.ways, timer_for(device))
    start = time.perf_counter()
    end = start + seconds
    while len(losses[PEFT]) < 3 or (len(losses[PEFT]) < steps and time.perf_counter() < end):
        rounds.run(functions, count=len(losses[PEFT]) > 0)  # the first step allocates and warms up: loss yes, time no
        if tick is not None:
            tick()
    samples, took = rounds.samples, time.perf_counter() - start
    gaps = loss_gaps(losses, method.other)
    shown = len(losses[PEFT])
    text = f"largest |Δloss| to PEFT's default in {shown} steps, fastpeft's over that between PEFT's two configurations"
    ratio = gaps[OURS] / gaps[method.other] if gaps[method.other] else float("nan")
    return {
        "kind": "training",
        "key": f"training B={batches[0].shape[0]} S={batches[0].shape[1]}",
        "steps": shown,
        "losses": {way: [round(v, 6) for v in values] for way, values in losses.items()},
        "gaps": gaps,
        "samples": samples.as_json(),
        "seconds_a_step": took / shown / len(method.ways),
        "tokens_per_step": batches[0].numel(),
        "stored_bytes": {way: stored_bytes(trainable(model)) for way, model in models.items()},
        "report": method.report(models[OURS]),
        "targets": [target(text, 2.0, Estimate.exact(ratio)).as_json()],
    }


def full(base: nn.Module, batches: list[Tensor], seconds: float, *, device: str, tick: Tick = None) -> dict[str, Any]:
    """A few steps of full fine-tuning (AdamW, all in the model's dtype) between steps of LoRA under fastpeft."""
    ways = (OURS, FULL)
    models = {way: build(way, base) for way in ways}
    rates = {OURS: LEARNING_RATE, FULL: FULL_LEARNING_RATE}
    functions = {way: trainer(models[way], batches, rates[way])[0] for way in ways}
    rounds = Rounds(ways, timer_for(device))
    rounds.run(functions, count=False)
    samples = rounds.until(functions, seconds, least=2, most=30, tick=tick)
    return {
        "kind": "full",
        "key": f"full fine-tuning B={batches[0].shape[0]} S={batches[0].shape[1]}",
        "samples": samples.as_json(),
        "time": samples.ratio(FULL, OURS).as_json(),
        "stored_bytes": {way: stored_bytes(trainable(model)) for way, model in models.items()},
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


def model_row(
    kind: str, key: str, samples: Samples, cost: Cost, dtype: torch.dtype, device: str, limits: tuple
) -> dict:
    """A row of a whole model, as `measure` makes one of an op."""
    row = {"kind": kind, "key": key, "mode": "", "wrong": [], "floor": floors(cost, dtype, device)}
    row |= {"rivals": [PEFT, PEFT_LOW], "plans": [], "samples": samples.as_json()}
    return {**row, **summary(row, samples, limits)}


def step_samples(
    models: Mapping[str, nn.Module], ids: Tensor, seconds: float, device: str, tick: Tick = None
) -> Samples:
    """A step of each model in turn, the frozen one's twice."""
    functions = {way: (lambda model=model: gradients(model, ids)) for way, model in models.items()}
    functions[AGAIN] = functions[FROZEN]
    for model in models.values():
        gradients(model, ids[:1, :8])  # a whole step to warm up would cost a round
    return Rounds(list(functions), timer_for(device)).until(functions, seconds, least=2, most=45, tick=tick)


def step(
    base: nn.Module,
    ids: Tensor,
    seconds: float,
    *,
    label: str,
    device: str,
    dense: nn.Module | None = None,
    tick: Tick = None,
) -> dict[str, Any]:
    """One step without optimizer over the frozen model, for each way and the composition.

    dense: where base is in 4 bits, the model that it was made from. That is the frozen one then, and there is no composition.
    """
    ways = (PEFT, PEFT_LOW, COMPOSITION, OURS) if dense is None else (PEFT, PEFT_LOW, OURS)
    models = {FROZEN: build(FROZEN, base if dense is None else dense), **{way: build(way, base) for way in ways}}
    samples = step_samples(models, ids, seconds, device, tick)
    adapters = lora_flops(models[OURS], ids.numel())
    if dense is None:
        limits = (Limit(OVERHEAD, PEFT, 0.2), Limit(OVERHEAD, COMPOSITION, 0.7))
        cost = Cost(flops=linear_flops(base, ids.numel()) + adapters, extra_flops=adapters)
    else:
        limits, cost = (Limit(TIME, PEFT, 1 / 1.15),), Cost(flops=linear_flops(dense, ids.numel()) + adapters)
    name = f"{label} training step B={ids.shape[0]} S={ids.shape[1]}, all linear, r={RANK}"
    return model_row("step", name, samples, cost, next(base.parameters()).dtype, device, limits)


@torch.no_grad()
def decode(
    base: nn.Module,
    ids: Tensor,
    seconds: float,
    *,
    label: str,
    device: str,
    dense: nn.Module | None = None,
    tick: Tick = None,
) -> dict[str, Any]:
    """The next token after `ids` [1, S], with their keys and values cached, adapters unmerged."""
    models = {FROZEN: build(FROZEN, base if dense is None else dense), **{way: build(way, base) for way in WAYS}}

    def token(model: nn.Module) -> Callable[[], object]:
        model.eval()
        cache = model(input_ids=ids, use_cache=True).past_key_values

        def run() -> object:
            logits = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits
            cache.crop(-1)
            return logits

        return run

    functions = {way: token(model) for way, model in models.items()}
    functions[AGAIN] = functions[FROZEN]
    samples = paired(functions, seconds, timer=timer_for(device), tick=tick)
    name = f"{label} decoding a token after {ids.shape[1]}, all linear, r={RANK}"
    return model_row("decode", name, samples, Cost(), next(base.parameters()).dtype, device, ())
