"""What adapter_config.json of PEFT 0.21 has in common for all methods: what is honoured, and what must be refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from ..adapter_files import AdapterFileError
from ..interop import transformers
from .sites import walk

# Of these nothing depends that we compute.
NOTES = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
)
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def common(model: Any) -> dict[str, Any]:
    """What a file says of its base model. Under `task_type` PEFT makes a class of it that has `generate` and the like."""
    config: dict[str, Any] = {"base_model_name_or_path": None, "inference_mode": True, "task_type": None}
    if transformers.is_pretrained(model):
        kind = type(model).__name__
        config["base_model_name_or_path"] = model.name_or_path or None
        config["task_type"] = next((task for end, task in _TASKS.items() if kind.endswith(end)), None)
        if kind.endswith("ForConditionalGeneration") and model.config.is_encoder_decoder:
            config["task_type"] = "SEQ_2_SEQ_LM"
    return config


def refuse(config: Mapping[str, Any], honoured: Collection[str], neutral: Mapping[str, Any]) -> None:
    """Raise AdapterFileError for an option that asks for what we do not compute.

    An option that is not honoured must be off (null, false or empty), or, in `neutral`, have that value.
    """
    for key, value in config.items():
        if key in honoured or key in NOTES or value in (None, False, [], {}, "") or value == neutral.get(key):
            continue
        raise AdapterFileError(
            f"adapter_config.json: {key[:80]!r} is {value!r:.200}, which fastpeft does not compute. Load this adapter with "
            "PEFT (fastpeft.apply puts what it can on fast kernels)"
        )


def names(config: Mapping[str, Any], key: str) -> list[str]:
    """A list of strings, or nothing."""
    found = config.get(key)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise AdapterFileError(f"adapter_config.json: {key!r} must be a list of module names, got {found!r:.200}")
    return found


def heads(model: nn.Module, config: Mapping[str, Any]) -> list[str]:
    """The names of the modules that the file holds whole, as PEFT finds them: their names end so, whatever precedes it."""
    ends = tuple(names(config, "modules_to_save"))
    return [name for name, _ in walk(model) if name and name.endswith(ends)] if ends else []
