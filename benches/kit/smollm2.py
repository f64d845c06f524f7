"""The main job's model and text: SmolLM2-135M with its trained weights, and movie reviews; or the user's own."""

from __future__ import annotations

import csv
import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .fetch import MODEL, REVIEWS, FetchError, cache_dir, fetch

NAME = "SmolLM2-135M-Instruct"


def prepare(model: str | None) -> tuple[str, str]:
    """(folder or hub name, label) to load the model from; the default is fetched and dequantised to bf16 once."""
    if model is not None:
        return model, Path(model).name
    gguf = fetch(MODEL)
    folder = cache_dir() / "smollm2-135m-bf16"
    if not folder.is_dir():
        _dequantise(gguf, folder)
    return str(folder), NAME


def _dequantise(gguf: Path, folder: Path) -> None:
    """Q4_1 GGUF -> a bf16 safetensors folder, which loads in a second."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    dequantise = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16, quantization_config=dequantise)
    part = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    try:
        model.config.__dict__.pop("quantization_config", None)  # what is saved is a plain bf16 model
        model.save_pretrained(part)
        AutoTokenizer.from_pretrained(**where).save_pretrained(part)
        os.replace(part, folder)
    except OSError:
        if not folder.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def load(where: str, dtype: torch.dtype, device: str) -> nn.Module:
    """The causal language model, weights in memory (not mapped lazily), in training mode without dropout.

    Raises:
        FetchError: nothing loads from `where`.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what is deprecated is no news to who runs a benchmark
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(where, dtype=dtype)
    except (OSError, ValueError) as error:
        raise FetchError(f"no causal language model loads from {where!r}: {error}") from error
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # read now, so that memory measured later is not the file being read
    return model.to(device).train()


def batches(where: str, text: str | None, count: int, rows: int, length: int, device: str) -> tuple[list[Tensor], str]:
    """`count` batches [rows, length] of token ids, reviews packed end to end in seeded order, and the text's label.

    Raises:
        FetchError: the text is missing or too short.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(where)
    if text is None:
        with fetch(REVIEWS).open(newline="", encoding="utf-8") as file:
            documents = [row["text"].replace("<br />", "\n").strip() for row in csv.DictReader(file)]
        label = "movie reviews (Rotten Tomatoes and IMDB)"
    else:
        try:
            content = Path(text).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise FetchError(f"--text {text}: {error.strerror or error}") from error
        documents, label = [part.strip() for part in content.split("\n\n") if part.strip()], Path(text).name
    random.Random(0).shuffle(documents)
    need, ids = count * rows * length, []
    for document in documents:
        ids += [*tokenizer.encode(document), tokenizer.eos_token_id]
        if len(ids) >= need:
            break
    if len(ids) < rows * length:
        raise FetchError(f"{label} has {len(ids)} tokens, one batch needs {rows * length}")
    whole = len(ids) // (rows * length)
    packed = torch.tensor(ids[: min(whole, count) * rows * length], device=device).view(-1, rows, length)
    return [packed[i % len(packed)] for i in range(count)], label  # a short text comes round again
