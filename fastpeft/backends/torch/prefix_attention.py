"""The torch backend's passes of prefix_attention: the reference's, with tokens by PyTorch's attention where that takes them."""

from __future__ import annotations

from ...reference.prefix_attention import backward as backward
from ...reference.prefix_attention import can as can
from ...reference.prefix_attention import forward as forward
from ...reference.prefix_attention import fused as fused
from ...reference.prefix_attention import grad_fused as grad_fused
from ..attention import grad_tokens as grad_tokens
from ..attention import tokens as tokens
