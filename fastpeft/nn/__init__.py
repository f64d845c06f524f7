"""Modules: thin layers that hold parameters and call one op."""

from .lora_linear import LoraLinear

__all__ = ["LoraLinear"]
