"""The weight of a Linear4bit as a Parameter: in bitsandbytes' order for whoever looks, in tiles while only kernels do.

To look is to call any PyTorch function on it that is not about its shape, dtype, device or gradient. That puts the bytes into
order, in new memory which takes the place of the tiles; the next forward tiles them again, in new memory too. So there is never
a second copy, and what was handed out keeps its values. Shape and dtype are the same in both orders.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._guards import TracingContext
from torch.utils._python_dispatch import _disable_current_modes

from ..weight4bit import Weight4bit

_LOCK = threading.RLock()  # two threads may run one layer: nobody tiles while another looks

# fmt: off
_ABOUT = (
    "shape", "ndim", "dtype", "itemsize", "nbytes", "layout", "device", "is_cpu", "is_cuda", "is_xpu", "is_mps", "is_meta",
    "is_sparse", "is_mkldnn", "is_quantized", "is_nested", "requires_grad", "is_leaf", "grad", "grad_fn", "_grad_fn",
    "output_nr", "retains_grad", "names", "_version", "_backward_hooks",
)
_METHODS = (
    "size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "is_contiguous", "storage_offset",
    "get_device", "is_floating_point", "is_complex", "is_signed", "is_inference", "is_conj", "is_neg", "_is_view",
    "requires_grad_", "__hash__", "__len__",
    "register_hook", "register_post_accumulate_grad_hook",
)
_SETTERS = ("requires_grad", "grad", "_backward_hooks")
# fmt: on
_BLIND = frozenset(  # what tells no value
    [getattr(torch.Tensor, name).__get__ for name in _ABOUT if hasattr(torch.Tensor, name)]
    + [getattr(torch.Tensor, name).__set__ for name in _SETTERS]
    + [getattr(torch.Tensor, name) for name in _METHODS]
    + [torch.is_floating_point, torch.is_complex, torch.numel]
)


class Held:
    """A weight as its Parameter and every layer that has this Parameter know it."""

    whole: Weight4bit | None  # None: the Parameter's memory is not the whole weight (somebody partitions it)
    form: Weight4bit  # the same without its bytes
    owner: weakref.ref  # the Parameter

    def __init__(self, whole: Weight4bit, want: bool, storage: torch.dtype) -> None:
        self.want = want  # tiles, where they help
        self.storage = storage  # dtype of the Parameter: bitsandbytes views bytes as others
        self.traced = False  # whether the compiler has seen it
        self.keep(whole)

    def keep(self, whole: Weight4bit) -> None:
        self.whole, self.form = whole, replace(whole, data=whole.data.new_empty(0))
        self.settled = not (self.want and whole.tileable)  # a forward takes it as it is

    def lose(self) -> None:
        self.whole, self.settled = None, False

    def seen(self) -> torch.Tensor:
        """The bytes in the Parameter's shape: [(N·K + 1) // 2 / itemsize, 1]"""
        assert self.whole is not None
        return self.whole.data.view(self.storage).view(-1, 1)

    def in_order(self) -> Weight4bit:
        """With its scales in bitsandbytes' order, whatever bytes."""
        return self.whole.untile() if self.form.tiled and self.whole is not None else self.form

    def of(self, weight: torch.Tensor) -> Weight4bit:
        """With the bytes of another tensor, in bitsandbytes' order, that somebody put in the place of this Parameter."""
        form, data = self.in_order(), as_bytes(weight, self.storage)
        if data.numel() != (form.shape[0] * form.shape[1] + 1) // 2:
            raise RuntimeError(
                f"Linear4bit: weight must hold the {(form.shape[0] * form.shape[1] + 1) // 2} bytes of {list(form.shape)}, "
                f"got {weight.dtype} {list(weight.shape)}"
            )
        if form.scales.device != data.device:  # FSDP2 moves parameters alone
            form = each(form, lambda t: t.to(data.device))
        return replace(form, data=data)

    def release(self, found: Weight4bit) -> None:
        """The bytes, where the Parameter is gone for good: FSDP2 has them in shards now. found: as a forward has them."""
        if self.owner() is None:
            self.keep(found)
            self.lose()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "owner"} | {"traced": False}


class Looked:
    """A Parameter that holds the bytes of one `Held`."""

    __slots__ = ()
    _held: Held
    requires_grad: bool

    @staticmethod
    def about(held: Held) -> dict[str, Any]:
        """Its `__dict__`."""
        return {}

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = {} if kwargs is None else kwargs
        compiler = func is torch.Tensor.untyped_storage and TracingContext.try_get() is not None
        if compiler:  # it asks who shares memory, and reads none
            _traced(args[0])
        if compiler or func in _BLIND:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        mine = [a for a in _flat((*args, *kwargs.values())) if isinstance(a, Looked)]
        with _LOCK:
            for weight in mine:
                order(weight)
            result = super().__torch_function__(func, types, args, kwargs)  # type: ignore[misc]
            for weight in mine:
                _follow(weight)
        return result

    def __deepcopy__(self, memo):
        new = memo[id(self)] = parameter(copy.deepcopy(self._held, memo), self.requires_grad)
        return new

    def __reduce_ex__(self, protocol):
        return parameter, (self._held, self.requires_grad)


class Params4bit(Looked, nn.Parameter):
    """Where bitsandbytes is missing. (PEFT counts two parameters a byte in what has this name.)"""

    __slots__ = ("_held",)


_kind: type = Params4bit


def set_kind(kind: type) -> None:
    """What class new Parameters are of: `linear4bit_bitsandbytes` says so, when it is imported."""
    global _kind
    _kind = kind


def parameter(held: Held, requires_grad: bool = False) -> Any:
    """A new Parameter of it."""
    made: Any = torch.Tensor._make_subclass(_kind, held.seen(), requires_grad)
    made._held, held.owner = held, weakref.ref(made)
    made.__dict__.update(made.about(held))
    return made


def order(weight: Any) -> None:
    """In bitsandbytes' order."""
    held = weight._held
    if held.form.tiled:
        with _quietly():
            if held.form.tiled and held.whole is not None:
                put(weight, held.whole.untile())


def tile(weight: Any) -> None:
    """In tiles, where they are wanted and help."""
    held = weight._held
    if not held.settled:
        with _quietly():
            if not held.settled and held.whole is not None:
                put(weight, held.whole.tile())


def _traced(weight: Any) -> None:
    """A graph is made of what it finds: tiles, in the first. After a look there is one more, for the other order."""
    if not weight._held.traced:
        weight._held.traced = True
        tile(weight)


def put(weight: Any, whole: Weight4bit) -> None:
    """Its bytes and scales from now on."""
    with _LOCK, torch._C.DisableTorchFunctionSubclass():
        weight._held.keep(whole)
        weight.data = weight._held.seen()


def move(weight: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """What `nn.Module._apply` does to a parameter, for bytes and scales; the Parameter itself, or a new one where that is on
    the meta device or comes from there."""
    held, device = weight._held, weight.device
    if fn(torch.empty(0, dtype=torch.uint8, device=device)).device != device:
        order(weight)
    whole = each(held.whole, lambda t: fn(t.reshape(-1).view(torch.uint8)).view(t.dtype).view(t.shape))
    if whole.data.is_meta != weight.is_meta:
        return parameter(Held(whole, held.want, held.storage))
    put(weight, whole)
    return weight


def as_bytes(weight: torch.Tensor, storage: torch.dtype) -> torch.Tensor:
    """A packed weight's bytes, flat. A float of 8 bits or more holds 0…255 exactly; bytes seen as floats survive no cast."""
    data = weight.detach().reshape(-1)
    if data.dtype == storage:
        return data.view(torch.uint8)
    if storage != torch.uint8:
        raise RuntimeError(f"Linear4bit: weight must be {storage}, which holds its bytes, but was cast to {data.dtype}")
    return data.to(torch.uint8)


def each(form: Weight4bit, fn: Callable[[torch.Tensor], torch.Tensor]) -> Weight4bit:
    """Its tensors through fn."""
    tensors = [None if t is None else fn(t) for t in form.tensors()]
    return replace(form, data=tensors[0], scales=tensors[1], nested_absmax=tensors[2], offset=tensors[3])


def _follow(weight: Any) -> None:
    """After a function that may have given it other memory (`weight.data = ...`)."""
    held = weight._held
    with torch._C.DisableTorchFunctionSubclass():
        data = weight.detach()
        whole = held.whole
        is_now = data.device, data.data_ptr(), data.numel() * data.itemsize, data.dtype
        if whole is not None and is_now == (whole.device, whole.data.data_ptr(), whole.data.numel(), held.storage):
            return
        try:
            held.keep(held.of(data))
        except RuntimeError:
            held.lose()  # `weight4bit` raises, until it is whole again


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(value)
        else:
            yield value


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """One thread at a time, seen by no mode and no transform: a change of order is nobody's computation."""
    with (
        _LOCK,
        temporarily_clear_interpreter_stack(),
        torch.inference_mode(False),
        torch.no_grad(),
        torch._C.DisableTorchFunction(),
        _disable_current_modes(),
    ):
        yield
