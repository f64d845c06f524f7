"""Modules: thin layers that hold parameters and call one op."""

from .linear4bit import Linear4bit
from .lora_linear import LoraLinear
from .prefix_attention import PrefixAttention

__all__ = ["Linear4bit", "LoraLinear", "PrefixAttention"]
