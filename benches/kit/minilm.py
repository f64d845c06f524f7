"""An encoder with its trained weights, all-MiniLM-L6-v2, and Rotten Tomatoes: short reviews, good or bad."""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .fetch import MINILM, REVIEWS, fetch

NAME = "all-MiniLM-L6-v2"
HELD_OUT = 1000  # fixed reviews
LONGEST = 128  # tokens of a review; the median has 28


@dataclass
class Reviews:
    """Token ids and labels, 0 or 1."""

    ids: list[list[int]]
    labels: list[int]

    def batch(self, which: list[int], device: str) -> tuple[Tensor, Tensor, Tensor]:
        """ids [B, T] and mask bool [B, T], padded to the longest, labels [B]"""
        longest = max(len(self.ids[i]) for i in which)
        mask = torch.tensor([[n < len(self.ids[i]) for n in range(longest)] for i in which], device=device)
        padded = [self.ids[i] + [0] * (longest - len(self.ids[i])) for i in which]
        labels = [self.labels[i] for i in which]
        return torch.tensor(padded, device=device), mask, torch.tensor(labels, device=device)

    def part(self, which: slice) -> Reviews:
        return Reviews(self.ids[which], self.labels[which])


def load(dtype: torch.dtype, device: str) -> Any:
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return AutoModel.from_pretrained(fetch(MINILM), dtype=dtype).to(device)


def reviews() -> tuple[Reviews, Reviews]:
    """(to train on, held out)"""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(fetch(MINILM))
    with fetch(REVIEWS).open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    random.Random(0).shuffle(rows)
    ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=LONGEST)["input_ids"]
    found = Reviews(ids, [int(row["label"]) for row in rows])
    return found.part(slice(HELD_OUT, None)), found.part(slice(HELD_OUT))
