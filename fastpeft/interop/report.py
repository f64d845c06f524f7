"""What `apply` did: one row a layer, read from the model whenever it is looked at."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from peft import PeftModel, PeftType
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .. import ops
from ..nn import Linear4bit, LoraLinear
from .legal import Terms
from .siblings import Group, Seat

_NOT_APPLIED = "PEFT's own class: call fastpeft.apply(model), again after adding adapters to further layers"

_PROMPT = " prompt"  # ends the arithmetic of prefix tuning


class LayerReport(NamedTuple):
    """One layer. `path` is "fast", "torch" (our op by PyTorch's own functions) or "peft"; `reason` says why it is not fast, or
    with whom it shares x."""

    name: str
    path: str
    reason: str
    arithmetic: str


class Report:
    """The adapter layers of one model and the path each takes. Live: it shows the model as it is when you look.

    It does not keep the model alive.
    """

    def __init__(self, model: nn.Module, left: Mapping[str, str] = MappingProxyType({})) -> None:
        self._model, self._left = weakref.ref(model), left

    @property
    def layers(self) -> list[LayerReport]:
        """A row for each adapter layer, in the order of `named_modules`."""
        model = self._model()
        if model is None:
            return []
        rows = [(name, module) for name, module in model.named_modules() if known(module)]
        return [_row(name, module) if not has_prompt(module) else self._prompt(name, module) for name, module in rows]

    def _prompt(self, name: str, module: PeftModel) -> LayerReport:
        arithmetic = _dtypes(module.prompt_encoder.parameters()) + _PROMPT
        if not hasattr(module, "peft_class"):
            return LayerReport(name or "the model", "peft", self._left.get(name, _NOT_APPLIED), arithmetic)
        return LayerReport(name or "the model", "fast", "its attention layers read the prompt", arithmetic)

    @property
    def groups(self) -> int:
        """How many groups of siblings share one pass over x."""
        model = self._model()
        seats = [] if model is None else [_seat(module) for module in model.modules()]
        return sum(map(_grouped, {seat.group for seat in seats if seat is not None and seat.group is not None}))

    def __str__(self) -> str:
        if self._model() is None:
            return "the model of this report is gone"
        rows, groups = self.layers, self.groups
        lora = [row for row in rows if not row.arithmetic.endswith(_PROMPT)]
        count = Counter(row.path for row in lora)
        width = max((len(row.name) for row in rows), default=0)
        torch_backend = f"{count['torch']} on the torch backend, " if count["torch"] else ""
        lines = [
            f"{len(lora)} LoRA layers: {count['fast']} fast ({groups} group{'' if groups == 1 else 's'}), {torch_backend}"
            f"{count['peft']} left on PEFT's code"
        ]
        if len(lora) < len(rows):
            lines = (lines if lora else []) + [f"prefix tuning: {len(rows) - len(lora)} model"]
        lines += [f"{row.name:<{width}}  {row.path}  {'; '.join(filter(None, row[2:]))}" for row in rows]
        return "\n".join(lines)

    __repr__ = __str__


def known(module: nn.Module) -> bool:
    """Whether a report has a row for this module."""
    return isinstance(module, (BaseTunerLayer, LoraLinear)) or has_prompt(module)


def has_prompt(module: nn.Module) -> bool:
    """Whether it is a PEFT model with prefix tuning."""
    return isinstance(module, PeftModel) and module.peft_type == PeftType.PREFIX_TUNING


def _row(name: str, module: nn.Module) -> LayerReport:
    if isinstance(module, LoraLinear):
        base = module.base if isinstance(module.base, Linear4bit) else None
        adapter = module.lora_a, module.lora_b, None, module.scale
        found = Terms(module.base.weight, False, module.base.bias, 0.0, (adapter,), base)
        return _ours(name, found, "fastpeft.nn.LoraLinear")
    why = _why_peft(module)
    if why is not None:
        return LayerReport(name, "peft", why, _peft_arithmetic(module))
    found = module.fast_terms(None)
    if isinstance(found, str):
        return LayerReport(
            name, "fast", _company(_seat(module)), "in its last call; its parameters are sharded between calls"
        )
    off = found.off and found.off + _merge_error(module)
    return _ours(name, found, "; ".join(filter(None, (off, _company(_seat(module))))))


def _ours(name: str, found: Terms, reason: str) -> LayerReport:
    a, b = [a for a, *_ in found.adapters], [b for _, b, *_ in found.adapters]
    slow = ops.why_torch(found.weight, a, b, None if found.base is None else found.base.compute_dtype)
    arithmetic = _arithmetic(found.weight, a, found.base)
    return LayerReport(name, "fast" if slow is None else "torch", slow or reason, arithmetic)


def _why_peft(module: nn.Module) -> str | None:
    seat = _seat(module)
    if seat is not None:
        found = module.fast_terms(None)
        if not isinstance(found, str):
            return seat.last if seat.refused else None
        return seat.last if seat.called and _sharded(module) else found + _merge_error(module)
    four_bit = sys.modules.get("fastpeft.interop.peft_4bit")
    if four_bit is not None and type(module) is four_bit.PeftLinear4bit:
        return four_bit.why_left(module) or _NOT_APPLIED
    if type(module) is PeftLinear:
        return _NOT_APPLIED
    kind = f"{type(module).__module__.split('.')[-2:][0]}.{type(module).__name__}"  # peft.tuners.lora.layer: lora.Embedding
    return f"no fast path for {kind}{'' if isinstance(module, LoraLayer) else ', which is not a LoRA layer'}"


def _merge_error(module: nn.Module) -> str:
    error = getattr(module.base_layer, "merge_error", None)
    if error is None or not module.merged_adapters:
        return ""
    return f", and its 4-bit base quantised again (relative RMS error {error:.2g})"


def _company(seat: Seat) -> str:
    group = seat.group
    if group is None:
        return ""
    others = ", ".join(name for i, name in enumerate(group.names) if i != seat.index)
    if group.why_alone is not None:
        return f"alone: {group.why_alone}"
    return f"one pass over x with {others}" if _grouped(group) else f"alone while {others} cannot join"


def _grouped(group: Group) -> bool:
    if group.why_alone is not None:
        return False
    if any(map(_sharded, group.members)):
        return group.ran
    every = [member.fast_terms(None) for member in group.members]
    if any(isinstance(found, str) for found in every) or len({found.dropout_p for found in every}) > 1:
        return False
    return len({found.base.compute_dtype for found in every if found.base is not None}) <= 1


def _sharded(module: nn.Module) -> bool:
    """Whether FSDP2 holds it as DTensors, as it does between calls."""
    return any(hasattr(p, "full_tensor") for p in module.parameters())


def _seat(module: nn.Module) -> Seat | None:
    return module.__dict__.get("_fastpeft")


def _peft_arithmetic(module: nn.Module) -> str:
    names = _dtypes(p for name, p in module.named_parameters() if name.startswith("lora_"))
    return f"LoRA part in {names}" if names else ""


def _arithmetic(weight: Any, adapters: Sequence[torch.Tensor], base: Linear4bit | None) -> str:
    if base is not None:
        form, compute = base.form, "x's dtype" if base.compute_dtype is None else str(base.compute_dtype)
        about = f"{form.quant_type}, blocks of {form.blocksize}{', 8-bit scales' if form.nested else ''}"
        compute = compute.removeprefix("torch.")
        return f"4-bit base ({about}), products in {compute}, float32 sums, {_dtypes(adapters)} adapters"
    compute, masters = _dtypes([weight]), _dtypes(adapters)
    rounded = "" if masters == compute else f", {masters} adapters rounded in the kernel"
    if compute == "float16":
        rounded = f", {masters} adapters, float32 between them"
    return f"{compute} products, float32 sums{rounded}"


def _dtypes(tensors: Iterable[torch.Tensor]) -> str:
    return "/".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))
