"""Linear4bit: a frozen `nn.Linear` whose weight is stored in 4 bits, on `fastpeft.ops.linear4bit`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .. import ops
from ..weight4bit import DTYPES, Weight4bit

_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")  # of a checkpoint, beside the weight's bytes


class Linear4bit(nn.Linear):
    """y = x Wᵀ + bias with a frozen W in 4 bits (QLoRA: Dettmers et al. 2023, section 3). It is an nn.Linear to PEFT.

    Args:
        weight: [N, K], from `fp.ops.quantize_4bit` or `fp.Weight4bit.from_state_dict`; its tensors are kept, not copied.
        bias: [N], any floating dtype, or None. A Parameter stays the same object; a plain tensor becomes a frozen one.
        compute_dtype: what x is cast to for the product, whatever autocast says; None: autocast's dtype, or x's.

    `weight` is a frozen uint8 Parameter: bitsandbytes' bytes, [(N·K + 1) // 2, 1], or the same bytes in tiles for the CPU
    kernels, [N·K / 2] (in one dimension, so that nobody can take one for the other). The scales are no parameters: `to`,
    `half` and the like never cast them. A forward changes nothing, in any mode. The `state_dict` has bitsandbytes' keys.

    Shapes: x [..., K] -> y [..., N], x's dtype. Before `fully_shard` (FSDP2) call `untile_()`: shards of tiles make no
    checkpoint.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or dtype.
    """

    def __init__(
        self, weight: Weight4bit, bias: torch.Tensor | None = None, *, compute_dtype: torch.dtype | None = None
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's would allocate the dense weight
        if not isinstance(weight, Weight4bit):
            raise TypeError(f"Linear4bit: weight must be an fp.Weight4bit, got {type(weight).__name__}")
        if compute_dtype is not None and compute_dtype not in DTYPES.values():
            raise ValueError(f"Linear4bit: compute_dtype must be None or one of {list(DTYPES)}, got {compute_dtype}")
        self.out_features, self.in_features = weight.shape
        self.compute_dtype = compute_dtype
        self.quant_storage = torch.uint8  # the dtype of `weight` in a state_dict (bitsandbytes views bytes as others)
        self._tile = weight.tiled or weight.device.type != "cpu"
        self.merge_error: float | None = None  # of `requantize_`, while an adapter is merged
        self._origin: dict[str, Any] | None = None  # what a bitsandbytes layer was besides its tensors
        self._cached: Weight4bit | None = None
        self.form: Weight4bit  # shape, format and scales, without the bytes
        self._hold(weight)
        self.register_parameter("bias", _bias(bias, weight.shape[0]))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        quant_type: str = "nf4",
        *,
        blocksize: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        tile: bool = True,
    ) -> Linear4bit:
        """Quantised from a dense layer, which keeps its weight; the bias Parameter is shared.

        tile=False keeps bitsandbytes' order of the bytes on the CPU too (FSDP2). Raises as `fp.ops.quantize_4bit`.
        """
        if not isinstance(linear, nn.Linear) or isinstance(linear, Linear4bit):
            raise TypeError(f"Linear4bit: linear must be a dense torch.nn.Linear, got {type(linear).__name__}")
        if linear.weight.is_meta:
            raise ValueError("Linear4bit: linear must have its weight loaded, got one on the meta device")
        weight = ops.quantize_4bit(
            linear.weight.detach(), quant_type=quant_type, blocksize=blocksize, double_quant=double_quant
        )
        layer = cls(weight, linear.bias, compute_dtype=compute_dtype)
        layer.train(linear.training)
        return layer if tile else layer.untile_()

    @classmethod
    def from_bitsandbytes(cls, layer: nn.Module, tile: bool = True) -> Linear4bit:
        """From a `bitsandbytes.nn.Linear4bit` that is quantised already; same bytes, same bias Parameter.

        An eval forward of bitsandbytes on a CPU reorders its codes (undone here, exactly) and rounds the scales to
        bfloat16 (nothing can undo that: a UserWarning says so). Raises ValueError where it is not quantised yet.
        """
        from .linear4bit_bitsandbytes import read

        return read(cls, layer, tile)

    def to_bitsandbytes(self) -> nn.Module:
        """As a `bitsandbytes.nn.Linear4bit` with the same bytes, scales and bias Parameter; needs bitsandbytes."""
        from .linear4bit_bitsandbytes import write

        return write(self)

    # ---- the weight -------------------------------------------------------------------------------------------------

    @property
    def weight4bit(self) -> Weight4bit:
        """The weight and its scales: the same object from call to call until one of them changes.

        Raises RuntimeError while FSDP2 holds the weight in shards.
        """
        weight, cached = self.weight, self._cached
        compiling = torch.compiler.is_compiling()  # then built anew: a cache would be a guard
        if not compiling and cached is not None and type(weight) is nn.Parameter:
            same = cached.data.data_ptr() == weight.data_ptr() and cached.data.device == weight.device
            if same:  # the cached view keeps the old memory alive, so equal addresses are equal memory
                return cached
        if _sharded(weight):
            raise RuntimeError("Linear4bit: FSDP2 holds the weight in shards; it is whole only within forward")
        form, data = self.form, weight.detach().reshape(-1)
        if _tiled(weight) != form.tiled:
            has = "in tiles" if form.tiled else "in bitsandbytes' order"
            raise RuntimeError(
                f"Linear4bit: weight was replaced by one in another order than the scales ({has}): "
                "load_state_dict, tile_ and untile_ change both"
            )
        if data.dtype != torch.uint8:
            data = data.to(torch.uint8)  # cast by someone; a float of 8 bits or more holds 0…255 exactly
        if form.scales.device != data.device:  # FSDP2 moves parameters alone
            form = self.form = _map(form, lambda t: t.to(data.device))
        found = Weight4bit(
            data, form.scales, form.nested_absmax, form.offset, form.shape, form.dtype, form.quant_type, form.blocksize,
            form.tiled,
        )  # fmt: skip
        if not compiling:
            self._cached = found
        return found

    def dequantize(self) -> torch.Tensor:
        """[N, K], of the dtype that was quantised. (PEFT's DoRA finds this method by `W_q`.)"""
        return self.weight4bit.dequantize()

    @property
    def W_q(self) -> torch.Tensor:
        """PEFT's mark of a layer that has `dequantize`: its DoRA would take `weight` for the dense one."""
        return self.weight

    def tile_(self) -> Linear4bit:
        """In tiles wherever that helps (on the CPU), from now on. `weight` stays the same Parameter."""
        self._tile = True
        self._hold(self.weight4bit.tile())
        return self

    def untile_(self) -> Linear4bit:
        """In bitsandbytes' order everywhere, from now on (for FSDP2). `weight` stays the same Parameter."""
        self._tile = False
        self._hold(self.weight4bit.untile())
        return self

    def set_weight(self, weight: Weight4bit) -> None:
        """Take another weight of the same shape, in its place and on its device; `weight` stays the same Parameter."""
        if weight.shape != (self.out_features, self.in_features):
            expected = [self.out_features, self.in_features]
            raise ValueError(f"Linear4bit: weight must be [N, K] = {expected}, got {list(weight.shape)}")
        self._hold(self._laid_out(weight.to(self.weight.device)))

    @torch.no_grad()
    def requantize_(self, dense: torch.Tensor) -> None:
        """Take a dense [N, K] in its place, quantised as this weight was; `merge_error` is the relative RMS error of that.

        Raises ValueError for NaN or Inf (nothing changes).
        """
        old = self.weight4bit
        if not torch.isfinite(dense).all():
            raise ValueError("Linear4bit: the merged weight has NaN or Inf; nothing was changed")
        new = ops.quantize_4bit(
            dense.float(), quant_type=old.quant_type, blocksize=old.blocksize, double_quant=old.nested
        )
        self.set_weight(new.to(old.dtype))
        off = self.weight4bit.dequantize(torch.float32) - dense
        self.merge_error = (off.norm() / dense.float().norm().clamp(min=1e-30)).item()

    def _laid_out(self, weight: Weight4bit) -> Weight4bit:
        return weight.tile() if self._tile and weight.device.type == "cpu" else weight.untile()

    def _hold(self, weight: Weight4bit) -> None:
        data = weight.data if weight.tiled else weight.data.view(-1, 1)
        if self._parameters.get("weight") is None:
            self.weight = nn.Parameter(data, requires_grad=False)
        else:
            self.weight.data = data
        self.form = replace(weight, data=data.new_empty(0))  # without the bytes: fully_shard must be able to free them
        self._cached = None

    # ---- the call ---------------------------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K], floating -> [..., N], x's dtype. Raises TypeError for another x."""
        dtype = self.dtype_for(x)
        with no_autocast(x, dtype):
            return ops.linear4bit(x.to(dtype), self.weight4bit, self.bias).to(x.dtype)

    def dtype_for(self, x: torch.Tensor) -> torch.dtype:
        """What this x is computed in."""
        if not x.is_floating_point():
            raise TypeError(f"Linear4bit: x must be floating, got {x.dtype} (a model that casts x to weight.dtype?)")
        dtype = self.compute_dtype
        if dtype is None:
            kind = x.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
            if dtype not in DTYPES.values():
                raise TypeError(f"Linear4bit: x must be one of {list(DTYPES)} (or set compute_dtype), got {x.dtype}")
        return dtype

    def extra_repr(self) -> str:
        form = self.form
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"quant_type={form.quant_type}, blocksize={form.blocksize}, double_quant={form.nested}, "
            f"compute_dtype={self.compute_dtype}"
        )

    # ---- moved, copied, saved, loaded -------------------------------------------------------------------------------

    def _apply(self, fn, recurse: bool = True):
        def move(t: torch.Tensor) -> torch.Tensor:  # a cast is for floating parameters: bytes stay bytes
            moved = fn(t)
            return moved if t.dtype != torch.uint8 or moved.dtype == torch.uint8 else t.to(moved.device)

        super()._apply(move, recurse)
        self.form = _map(self.form, lambda t: move(t.reshape(-1).view(torch.uint8)).view(t.dtype).view(t.shape))
        self._cached = None
        if not _sharded(self.weight) and self._tile:
            self._hold(self._laid_out(self.weight4bit))
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cached": None}

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        weight, key = self.weight, prefix + "weight"
        if _sharded(weight):
            if _tiled(weight):
                raise RuntimeError(
                    f"Linear4bit: {key} was sharded by FSDP2 in tiles, which no checkpoint knows: "
                    "call untile_() on the layer (or fp.quantize(..., tile=False)) before fully_shard"
                )
            state = self.form.state_dict(key) | {key: weight if keep_vars else weight.detach()}
        else:
            state = self.weight4bit.state_dict(key)
            if self.quant_storage != torch.uint8:
                state[key] = state[key].view(-1).view(self.quant_storage).view(-1, 1)
            elif keep_vars and not _tiled(weight):
                state[key] = weight
        destination[key] = state.pop(key)
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()
        destination.update(state)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Everything is read and checked before anything is taken."""
        arguments = local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, *arguments)
        key, bias_key = prefix + "weight", prefix + "bias"
        weight = bias = None
        parts = {k: v for k, v in state_dict.items() if k == key or k.startswith(key + ".")}
        try:
            if parts:
                weight = self._read(parts, key, local_metadata.get("assign_to_params_buffers", False))
            elif strict:
                missing_keys += [key, *(k for k in self.form.state_dict(key) if k != key)]
            if self.bias is not None and bias_key in state_dict:
                bias = state_dict[bias_key]
                if not isinstance(bias, torch.Tensor) or bias.shape != self.bias.shape:
                    got = list(bias.shape) if isinstance(bias, torch.Tensor) else type(bias).__name__
                    raise ValueError(f"bias must be {list(self.bias.shape)}, got {got}")
            elif self.bias is not None and strict:
                missing_keys.append(bias_key)
        except (ValueError, TypeError) as error:
            error_msgs.append(f'While loading "{key}" of a Linear4bit: {error}')
            return
        if strict:
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and not self._expects(k, prefix)]
        self._take(weight, bias, local_metadata.get("assign_to_params_buffers", False))

    def _expects(self, key: str, prefix: str) -> bool:
        if key == prefix + "bias":
            return self.bias is not None
        part = key.removeprefix(prefix + "weight")
        return part in ("", *(f".{name}" for name in _PARTS)) or part.startswith(".quant_state.bitsandbytes__")

    def _read(self, parts: Mapping[str, torch.Tensor], key: str, assign: bool) -> Weight4bit:
        shape, dense = (self.out_features, self.in_features), parts.get(key)
        if len(parts) == 1 and isinstance(dense, torch.Tensor) and dense.is_floating_point():
            raise ValueError(
                f"{key} is a dense weight ({dense.dtype} {list(dense.shape)}) without quantisation state; "
                "load it into an nn.Linear and quantise that (fastpeft.quantize)"
            )
        if _sharded(self.weight) or any(map(_sharded, parts.values())):
            raise ValueError("a weight in shards cannot be loaded; load the checkpoint before fully_shard")
        if self.weight.is_meta and not assign:
            raise ValueError("the layer is on the meta device; load with assign=True")
        weight = Weight4bit.from_state_dict(parts, key)
        if weight.shape != shape:
            raise ValueError(f"weight must be [N, K] = {list(shape)}, the checkpoint has {list(weight.shape)}")
        return weight

    @torch.no_grad()
    def _take(self, weight: Weight4bit | None, bias: torch.Tensor | None, assign: bool) -> None:
        if weight is not None and assign:
            self._parameters["weight"] = None
            self._hold(self._laid_out(weight))
        elif weight is not None:
            weight = self._laid_out(_map(weight.to(self.weight.device), torch.clone))
            if _tiled(self.weight) == weight.tiled:
                self.weight.copy_(weight.data.view(self.weight.shape))
                weight = replace(weight, data=self.weight.detach().view(-1))
            self._hold(weight)
        if bias is not None and assign:
            self.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, self.bias.requires_grad)
        elif bias is not None:
            self.bias.copy_(bias)


_AS_IT_IS = contextlib.nullcontext()


def no_autocast(x: torch.Tensor, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Autocast off where it would compute in another dtype than this one."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) == dtype:
        return _AS_IT_IS
    return torch.autocast(kind, enabled=False)


def _bias(bias: torch.Tensor | None, n: int) -> nn.Parameter | None:
    if bias is None:
        return None
    if not isinstance(bias, torch.Tensor):
        raise TypeError(f"Linear4bit: bias must be a torch.Tensor or None, got {type(bias).__name__}")
    if bias.shape != (n,) or not bias.is_floating_point():
        raise ValueError(f"Linear4bit: bias must be floating [N] = [{n}], got {bias.dtype} {list(bias.shape)}")
    return bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)


def _tiled(weight: torch.Tensor) -> bool:
    return weight.dim() == 1


def _sharded(t: Any) -> bool:
    """A DTensor"""
    return hasattr(t, "full_tensor")


def _map(form: Weight4bit, move) -> Weight4bit:
    """Its scales moved (and its bytes, where it holds any)."""
    tensors = [None if t is None else move(t) for t in form.tensors()]
    return replace(form, data=tensors[0], scales=tensors[1], nested_absmax=tensors[2], offset=tensors[3])
