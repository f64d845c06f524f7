"""Linear4bit: a frozen `nn.Linear` whose weight is stored in 4 bits, on `fastpeft.ops.linear4bit`."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .. import ops
from ..weight4bit import DTYPES, Weight4bit
from .linear4bit_weight import Held, Looked, each, move, order, parameter, put, tile

_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")  # of a checkpoint, beside the weight's bytes


class Linear4bit(nn.Linear):
    """y = x Wᵀ + bias with a frozen W in 4 bits (QLoRA: Dettmers et al. 2023, section 3). It is an nn.Linear to PEFT.

    Args:
        weight: [N, K], from `fp.ops.quantize_4bit` or `fp.Weight4bit.from_state_dict`; its tensors are kept, not copied.
        bias: [N], any floating dtype, or None. A Parameter stays the same object; a plain tensor becomes a frozen one.
        compute_dtype: what x is cast to for the product, whatever autocast says; None: autocast's dtype, or x's.

        quant_storage: dtype of `weight`, which sees its bytes as that (bitsandbytes' trick for FSDP).

    Where bitsandbytes is installed, this is a `bitsandbytes.nn.Linear4bit` too. `weight` is a frozen Parameter of
    bitsandbytes' bytes, [(N·K + 1) // 2 / itemsize, 1], of class `Params4bit`; while only kernels use it, on the CPU, the same
    memory holds them in tiles (`linear4bit_weight`). `layer.weight = ...` takes one of bitsandbytes', quantised or not,
    or other bytes for the same scales. The scales are no parameters: `to`, `half` and the like never cast them. A forward
    changes nothing, in any mode. The `state_dict` has bitsandbytes' keys.

    Shapes: x [..., K] -> y [..., N], x's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or dtype.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Linear4bit:
        return super().__new__(_known() if cls is Linear4bit else cls)

    def __init__(
        self,
        weight: Weight4bit,
        bias: torch.Tensor | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's would allocate the dense weight
        if not isinstance(weight, Weight4bit):
            raise TypeError(f"Linear4bit: weight must be an fp.Weight4bit, got {type(weight).__name__}")
        if compute_dtype is not None and compute_dtype not in DTYPES.values():
            raise ValueError(f"Linear4bit: compute_dtype must be None or one of {list(DTYPES)}, got {compute_dtype}")
        self.out_features, self.in_features = weight.shape
        self.compute_dtype = compute_dtype
        self.merge_error: float | None = None  # of `requantize_`, while an adapter is merged
        self._origin: dict[str, Any] | None = None  # what a bitsandbytes layer was besides its tensors
        self._lent: Callable[[], Weight4bit | None] = _nothing
        self._held = Held(weight, weight.tiled or weight.device.type != "cpu", quant_storage)
        self.weight = parameter(self._held)
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

        tile=False keeps bitsandbytes' order of the bytes on the CPU too. Raises as `fp.ops.quantize_4bit`.
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
        """The weight and its scales: the same object from call to call until one of them changes or somebody looks.

        Raises RuntimeError while FSDP2 holds the weight in shards, or somebody else a part of it.
        """
        weight, held = self._parameters["weight"], self._held
        if isinstance(weight, Looked):
            if torch.compiler.is_compiling():
                return held.whole
            if weight._held is held and held.settled:
                return held.whole
            self._held = held = weight._held
            tile(weight)
            if held.whole is None:
                raise RuntimeError(f"Linear4bit: weight holds {list(weight.shape)}, a part of its bytes")
            return held.whole
        if _sharded(weight):
            raise RuntimeError("Linear4bit: FSDP2 holds the weight in shards; it is whole only within forward")
        if torch.compiler.is_compiling():
            return held.of(weight)
        return self._lent_by(weight)

    def _lent_by(self, weight: Any) -> Weight4bit:
        """For a tensor that was put in the place of `weight` past `register_parameter` (FSDP2 within forward, accelerate)."""
        if getattr(weight, "quant_state", None) is not None:
            self.weight = weight
            return self.weight4bit
        found = self._lent()
        if found is not None and (found.device, found.data.data_ptr()) == (weight.device, weight.data_ptr()):
            return found
        found = self._held.of(weight)
        self._held.release(found)
        self._lent = weakref.ref(found)  # weak: whoever lends it wants its memory back
        return found

    def plain_weight(self) -> Weight4bit | None:
        """`weight4bit` for a kernel that passes this module by; None where somebody shards, replicates or trains `weight`."""
        weight = self._parameters["weight"]
        if not isinstance(weight, Looked) and type(weight) is not nn.Parameter:
            return None
        if self._held.storage.is_floating_point and weight.requires_grad:
            return None
        return self.weight4bit

    @property
    def form(self) -> Weight4bit:
        """Shape, format and scales, without the bytes."""
        return self._held.form

    @property
    def quant_storage(self) -> torch.dtype:
        return self._held.storage

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As `nn.Module`'s, and so `layer.weight = param`: see the class. Raises ValueError for a weight that does not fit."""
        if name == "weight" and param is not None and not _sharded(param):
            param = self._adopted(param)
            self._held = param._held
        super().register_parameter(name, param)

    def _adopted(self, param: Any) -> Any:
        """A Parameter like `weight`, of what was assigned to it."""
        held, about = self._held, getattr(param, "__dict__", {})
        shape = n, k = self.out_features, self.in_features
        if isinstance(param, Looked):
            if param._held.form.shape != shape:
                raise ValueError(f"Linear4bit: weight must be [N, K] = [{n}, {k}], got {list(param._held.form.shape)}")
            return param
        data, size = param.detach(), (n * k + 1) // 2
        if data.shape == shape and data.is_floating_point() and "bnb_quantized" in about:  # a dense Params4bit
            kind = {"quant_type": param.quant_type, "blocksize": param.blocksize}
            new = ops.quantize_4bit(data, **kind, double_quant=param.compress_statistics)
            return parameter(Held(new, held.want, param.quant_storage))
        if data.numel() * data.itemsize != size:
            raise ValueError(
                f"Linear4bit: weight must be {size} bytes (of [N, K] = [{n}, {k}] in 4 bits), or a dense Params4bit of that "
                f"shape, got a {type(param).__name__} {data.dtype} {list(data.shape)} (`requantize_` takes a dense tensor)"
            )
        if about.get("quant_state") is None:
            new = replace(each(held.in_order(), lambda t: t.to(data.device)), data=data.reshape(-1).view(torch.uint8))
        else:
            from .linear4bit_bitsandbytes import weight_of

            new = weight_of(data, param.quant_state)
            if new.shape != shape:
                raise ValueError(f"Linear4bit: weight must be [N, K] = [{n}, {k}], got {list(new.shape)}")
        return parameter(Held(new, held.want, data.dtype), param.requires_grad)

    def dequantize(self) -> torch.Tensor:
        """[N, K], of the dtype that was quantised. (PEFT's DoRA finds this method by `W_q`.)"""
        return self.weight4bit.dequantize()

    @property
    def W_q(self) -> torch.Tensor:
        """PEFT's mark of a layer that has `dequantize`, which does not look at `weight`."""
        return self.weight

    def tile_(self) -> Linear4bit:
        """In tiles wherever that helps (on the CPU), from now on. `weight` stays the same Parameter."""
        return self._want(True)

    def untile_(self) -> Linear4bit:
        """In bitsandbytes' order always, from now on. `weight` stays the same Parameter."""
        return self._want(False)

    def _want(self, want: bool) -> Linear4bit:
        whole, held = self.weight4bit, self._held
        held.want = want
        self._put(whole.tile() if want else whole.untile())
        return self

    def set_weight(self, weight: Weight4bit) -> None:
        """Take another weight of the same shape, in its place and on its device; `weight` stays the same Parameter."""
        if weight.shape != (self.out_features, self.in_features):
            expected = [self.out_features, self.in_features]
            raise ValueError(f"Linear4bit: weight must be [N, K] = {expected}, got {list(weight.shape)}")
        self._put(weight.to(self.weight.device))

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

    def _put(self, whole: Weight4bit) -> None:
        weight, held = self._parameters["weight"], self._held
        if whole.tiled and not held.want:
            whole = whole.untile()
        if isinstance(weight, Looked):
            put(weight, whole)
        else:
            self.weight = parameter(Held(whole, held.want, held.storage))

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
        def moved(t: torch.Tensor) -> torch.Tensor:  # a cast is for floating parameters: bytes stay bytes
            new = fn(t)
            return new if t.dtype != torch.uint8 or new.dtype == torch.uint8 else t.to(new.device)

        weight, held = self._parameters["weight"], self._held
        if not isinstance(weight, Looked) or held.whole is None:  # sharded, or another's
            super()._apply(moved, recurse)
            held.form = each(held.form, lambda t: moved(t.reshape(-1).view(torch.uint8)).view(t.dtype).view(t.shape))
            return self
        self._parameters["weight"] = None
        try:
            super()._apply(moved, recurse)
        finally:
            self._parameters["weight"] = weight
        self.weight = move(weight, moved)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lent": _nothing}

    def __reduce_ex__(self, protocol):
        if type(self) is _known():  # where it is read, bitsandbytes may be installed or not
            return _blank, (), self.__getstate__()
        return super().__reduce_ex__(protocol)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        weight, key = self._parameters["weight"], prefix + "weight"
        if isinstance(weight, Looked):
            order(weight)
        destination[key] = weight if keep_vars else weight.detach()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()
        destination.update((k, v) for k, v in self._held.in_order().state_dict(key).items() if k != key)

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
        held = self._held
        if weight is not None and assign:
            self.weight = parameter(Held(weight, held.want, held.storage))
        elif weight is not None:
            self._put(each(weight.to(self.weight.device), torch.clone))
        if bias is not None and assign:
            self.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, self.bias.requires_grad)
        elif bias is not None:
            self.bias.copy_(bias)


def _nothing() -> None:
    """A dead reference."""


@functools.cache
def _known() -> type[Linear4bit]:
    """The class of a new layer: one that is bitsandbytes' too, under the name by which others ask, where that is installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return Linear4bit
    try:
        from .linear4bit_bitsandbytes import Known
    except ImportError:  # one that does not work here
        return Linear4bit
    return type("Linear4bit", (Linear4bit, Known), {"__module__": __name__, "__doc__": Linear4bit.__doc__})


def _blank() -> Linear4bit:
    return Linear4bit.__new__(Linear4bit)


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


def _sharded(t: Any) -> bool:
    """A DTensor"""
    return hasattr(t, "full_tensor")
