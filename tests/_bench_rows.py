"""Rows of results as the benchmarks write them, from synthetic times, and a model for whole runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benches.kit import measure
from benches.kit.case import OURS
from benches.kit.rounds import AGAIN, FROZEN, Samples

PEERS = ("PEFT", "PEFT same dtype", "composition")
TIMES = {FROZEN: 1.0, "PEFT": 1.4, "PEFT same dtype": 1.2, "composition": 1.1, OURS: 1.05}


def noise(count: int = 60, scale: float = 0.001, seed: int = 0) -> np.ndarray:
    return 1 + scale * np.random.default_rng(seed).standard_normal(count)


def lora_row(case, times: dict[str, float], wrong=(), again=1.0) -> dict:
    """A row of lora_linear from synthetic times; the adapter's floor is 0.01 of the frozen layer."""
    samples = Samples({n: list(t * noise(60, seed=i)) for i, (n, t) in enumerate(times.items())}, rounds=61)
    samples.seconds[AGAIN] = list(again * noise(60, seed=99))
    row = {"kind": "row", "op": "lora_linear", "table": case.table, "key": case.name, "mode": "wall", "notes": {}}
    row |= {"case": measure._case(case), "wrong": list(wrong), "rivals": list(PEERS), "plans": [], "peak_bytes": {}}
    row |= {"floor": {"seconds": 0.9, "byte_seconds": 0.5, "extra_seconds": 0.01}, "samples": samples.as_json()}
    return row | measure.summary(row, samples, case.limits)


def tiny_llama(folder: Path) -> tuple[str, str]:
    """(folder with a two-layer Llama and a tokenizer of single words, text)"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<unk>", "</s>", *(f"w{i}" for i in range(62))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=64, num_key_value_heads=1, max_position_embeddings=256, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    text = folder / "text.txt"
    text.write_text("\n\n".join(" ".join(f"w{(7 * i + j * j) % 62}" for j in range(40)) for i in range(60)))
    return str(folder), str(text)
