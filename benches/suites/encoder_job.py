"""Prefix tuning of an encoder for classification: the same linear head on the mean of the last hidden states in every way.

PEFT's way is its FEATURE_EXTRACTION model; all prefixes begin as the keys and values of the same text.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kit.case import OURS
from ..kit.measure import Tick
from ..kit.minilm import Reviews
from ..kit.peers import PEFT
from ..kit.rounds import FROZEN, Rounds, timer_for
from ..kit.saved import saved_bytes
from . import prefix_job
from .main_job import stored_bytes, trainable

LENGTH, ROWS = 16, 32
LEARNING_RATE = 1e-2
HEAD = "head alone"
WAYS = (PEFT, OURS, prefix_job.APT, HEAD)


class Classifier(nn.Module):
    """ids and mask [B, T] -> logits [B, 2]"""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        seen = mask[..., None].to(hidden.dtype)
        return self.head((hidden * seen).sum(1).float() / seen.sum(1).float())


def build(way: str, base: Any, start: list[int]) -> Classifier:
    encoder = prefix_job.build(FROZEN if way == HEAD else way, base, start, "FEATURE_EXTRACTION", LENGTH)
    torch.manual_seed(0)  # the same head in every way
    return Classifier(encoder, base.config.hidden_size).to(base.device)


def trainer(model: Classifier, data: Reviews) -> tuple[Callable[[], None], list[float]]:
    """(one optimizer step on the next batch, the losses so far)"""
    optimizer = torch.optim.AdamW(trainable(model), lr=LEARNING_RATE, weight_decay=0.0)
    order, losses, device = list(range(len(data.ids))), list[float](), str(model.head.weight.device)
    random.Random(0).shuffle(order)

    def step() -> None:
        which = [order[i % len(order)] for i in range(ROWS * len(losses), ROWS * (len(losses) + 1))]
        ids, mask, labels = data.batch(which, device)
        loss = nn.functional.cross_entropy(model(ids, mask), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))

    return step, losses


@torch.no_grad()
def accuracy(model: Classifier, data: Reviews) -> float:
    model.eval()
    right, device = 0, str(model.head.weight.device)
    order = sorted(range(len(data.ids)), key=lambda i: len(data.ids[i]))  # little padding
    for start in range(0, len(order), 100):
        ids, mask, labels = data.batch(order[start : start + 100], device)
        right += int((model(ids, mask).argmax(-1) == labels).sum())
    model.train()
    return right / len(order)


def fine_tune(
    base: Any,
    train: Reviews,
    held_out: Reviews,
    seconds: float,
    *,
    steps: int,
    label: str,
    device: str,
    tick: Tick = None,
) -> dict[str, Any]:
    """Each way in turn, a step of each, for `steps` steps or as many as `seconds` are enough for (at least 3)."""
    start = [token for review in train.ids for token in review][:LENGTH]
    models = {way: build(way, base, start).train() for way in WAYS}
    rounds = Rounds(WAYS, timer_for(device))
    ids, mask, _ = train.batch(list(range(ROWS)), device)
    kept = {way: saved_bytes(lambda m=model: m(ids, mask), list(model.parameters())) for way, model in models.items()}
    made = {way: trainer(model, train) for way, model in models.items()}
    functions, losses = {w: step for w, (step, _) in made.items()}, {w: list_ for w, (_, list_) in made.items()}
    end = time.perf_counter() + seconds
    while (shown := len(losses[PEFT])) < 3 or (shown < steps and time.perf_counter() < end):
        rounds.run(functions, count=shown > 0)  # the first step allocates and warms up: loss yes, time no
        if tick is not None:
            tick()
    sample = train.part(slice(len(held_out.ids)))
    return {
        "kind": "accuracy",
        "key": f"{label} on Rotten Tomatoes, prefix P={LENGTH}, B={ROWS}",
        "steps": shown,
        "losses": {way: [round(v, 6) for v in values] for way, values in losses.items()},
        "held_out": len(held_out.ids),
        "accuracy": {way: accuracy(model, held_out) for way, model in models.items()},
        "train_accuracy": {way: accuracy(model, sample) for way, model in models.items()},
        "samples": rounds.samples.as_json(),
        "saved_bytes": kept,
        "stored_bytes": {way: stored_bytes(trainable(model)) for way, model in models.items()},
    }
