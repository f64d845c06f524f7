"""Methods of fine-tuning that attach to a plain model: one file a method, the same protocol for all (`attach.py`)."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from ..adapter_files import AdapterFileError
from . import lora, prefix

METHODS: dict[str, ModuleType] = {"lora": lora, "prefix": prefix}
_PEFT = {"LORA": "lora", "PREFIX_TUNING": "prefix"}  # PEFT's `peft_type`


def of_file(config: dict[str, Any]) -> ModuleType:
    """The method that an adapter_config.json asks for. Raises AdapterFileError."""
    ours = config.get("fastpeft")
    if ours is not None:
        name = ours.get("method") if isinstance(ours, dict) and ours.get("version") == 1 else None
        if isinstance(name, str) and name in METHODS:
            return METHODS[name]
        raise AdapterFileError(
            f'adapter_config.json: "fastpeft" must have "version" 1 and a "method" of {", ".join(METHODS)}, '
            f"got {ours!r:.200}; written by another fastpeft?"
        )
    kind = config.get("peft_type")
    if isinstance(kind, str) and kind in _PEFT:
        return METHODS[_PEFT[kind]]
    raise AdapterFileError(f'adapter_config.json: "peft_type" must be one of {", ".join(_PEFT)}, got {kind!r:.200}')
