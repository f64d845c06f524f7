"""Weight4bit: a frozen weight in 4 bits (NF4, FP4) with its block scales, bit-compatible with bitsandbytes.

stored      the codes, two a byte, in bitsandbytes' order; or, for the CPU kernels, in tiles: the same bytes, with the dwords
            (8 codes along k) of 16 rows side by side, [N/16, K/8, 16], and the rows past the last 16 as they were.
scales      one a block: float32, or (double quantisation) 8-bit codes with a float32 for each 256 of them and one offset;
            in tiles too, [N/16, K/blocksize, 16], where the blocks end with the rows.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch

from .reference import linear4bit as reference

QUANT_TYPES = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
_DTYPE_LIST = list(DTYPES.values())
TILE_ROWS, TILE_K = 16, 8
_MAX_JSON = 1 << 16
_OWN_PAGES = 1 << 18 if hasattr(mmap, "MAP_ANONYMOUS") else 1 << 63  # bytes; Windows has none


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Weight4bit:
    """A frozen [N, K] weight in 4 bits (QLoRA: Dettmers et al. 2023, section 3). Never changed in place.

    Made by `fp.ops.quantize_4bit` or `from_state_dict`. shape: (N, K). dtype: of the weight that was quantised, and what
    `dequantize()` gives by default; an op computes in x's. quant_type: "nf4" or "fp4". blocksize: weights that share a scale.
    The other fields are how it is stored.
    """

    data: torch.Tensor  # uint8 [(N·K + 1) // 2]
    scales: torch.Tensor  # [blocks]: float32, or uint8 codes
    nested_absmax: torch.Tensor | None  # float32 [blocks / 256]
    offset: torch.Tensor | None  # float32 []
    shape: tuple[int, int]
    dtype: torch.dtype
    quant_type: str
    blocksize: int
    tiled: bool = False

    # ---- as bitsandbytes has it ----

    @property
    def packed(self) -> torch.Tensor:
        """uint8 [(N·K + 1) // 2, 1]: bitsandbytes' bytes and order."""
        return self.untile().data.view(-1, 1)

    @property
    def codes(self) -> torch.Tensor | None:
        """uint8 [blocks]: the scales' 8-bit codes; None where they are not quantised."""
        return self.untile().scales if self.nested else None

    @property
    def absmax(self) -> torch.Tensor:
        """float32: the scale of each block; of each 256 codes where the scales are quantised."""
        return self.untile().scales if self.nested_absmax is None else self.nested_absmax

    @property
    def codebook(self) -> torch.Tensor | None:
        """float32 [256], what `codes` stand for; None where the scales are not quantised."""
        return reference.dynamic_map(self.device) if self.nested else None

    @property
    def quant_map(self) -> torch.Tensor:
        """float32 [16], what the weight's own codes stand for."""
        return reference.codebook(self.quant_type, self.device)

    @property
    def nested(self) -> bool:
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes resident: codes and scales."""
        return sum(t.numel() * t.element_size() for t in self.tensors() if t is not None)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        return self.data, self.scales, self.nested_absmax, self.offset

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[N, K]: codebook[code] · scale in float32, rounded once to `dtype` (None: the weight's own)."""
        return _decode(self, dtype or self.dtype)

    def to(self, target: torch.device | str | torch.dtype) -> Weight4bit:
        """On another device (on the CPU in tiles), or for x of another dtype: the stored bytes stay as they are."""
        if isinstance(target, torch.dtype):
            if target not in _DTYPE_LIST:
                raise ValueError(f"Weight4bit.to: dtype must be one of {', '.join(DTYPES)}, got {target}")
            return self if target == self.dtype else replace(self, dtype=target)
        device = torch.device(target)
        if device == self.device:
            return self
        native = self.untile()
        moved = [None if t is None else t.to(device) for t in native.tensors()]
        return replace(native, data=moved[0], scales=moved[1], nested_absmax=moved[2], offset=moved[3]).tile()

    # ---- the two layouts ----

    def tile(self) -> Weight4bit:
        """In tiles for the CPU kernels, where it is on the CPU and they take its shape; else itself."""
        if not self.tileable:
            return self
        return replace(self, data=_tile(self.data, self.shape[0], 4), scales=self._with_scales(_tile), tiled=True)

    @property
    def tileable(self) -> bool:
        """Whether `tile` makes tiles of it."""
        n, k = self.shape
        return not self.tiled and self.device.type == "cpu" and k % TILE_K == 0 and k > 0 and n >= TILE_ROWS

    def untile(self) -> Weight4bit:
        """In bitsandbytes' order."""
        if not self.tiled:
            return self
        return replace(self, data=_untile(self.data, self.shape[0], 4), scales=self._with_scales(_untile), tiled=False)

    def _with_scales(self, move) -> torch.Tensor:
        n, k = self.shape
        return self.scales if k % self.blocksize else move(self.scales, n, 1)

    # ---- checkpoints ----

    def state_dict(self, prefix: str = "weight") -> dict[str, torch.Tensor]:
        """bitsandbytes' keys: `weight`, `weight.absmax`, `weight.quant_map`, `weight.quant_state.bitsandbytes__nf4`, …"""
        native = self.untile()
        about: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        state = {prefix: native.data.view(-1, 1), f"{prefix}.absmax": native.scales}
        state[f"{prefix}.quant_map"] = self._constant(reference.codebook(self.quant_type))
        if self.nested_absmax is not None and self.offset is not None:
            about |= {"nested_blocksize": reference.NESTED_BLOCK, "nested_dtype": "float32"}
            about["nested_offset"] = self.offset.item()
            state[f"{prefix}.nested_absmax"] = self.nested_absmax
            state[f"{prefix}.nested_quant_map"] = self._constant(reference.dynamic_map())
        text = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
        return state | {f"{prefix}.quant_state.bitsandbytes__{self.quant_type}": text.to(self.device)}

    def _constant(self, values: torch.Tensor) -> torch.Tensor:
        """A copy: safetensors takes no memory twice. (+ 0 gives FP4's code 8 bitsandbytes' 0, not -0.)"""
        return values.to(self.device) + 0.0

    @classmethod
    def from_state_dict(cls, state: Mapping[str, torch.Tensor], prefix: str = "weight") -> Weight4bit:
        """From the keys that `state_dict`, bitsandbytes and transformers write; the tensors are kept, not copied.

        Raises:
            ValueError: a key is missing, a length does not fit the shape, or the quantisation is none that is known. The
            sizes that the checkpoint claims are checked against its tensors before anything is computed.
        """
        return _Checkpoint(state, prefix).read()


def _tile(t: torch.Tensor, n: int, unit: int) -> torch.Tensor:
    """[N, columns, unit] -> [N/16, columns, 16, unit], then the rows past the last 16; flat both."""
    out, rows = _memory(t), n // TILE_ROWS
    whole = t.numel() // n * rows * TILE_ROWS
    out[:whole].view(rows, -1, TILE_ROWS, unit).copy_(t[:whole].view(rows, TILE_ROWS, -1, unit).transpose(1, 2))
    out[whole:] = t[whole:]
    return out


def _untile(t: torch.Tensor, n: int, unit: int) -> torch.Tensor:
    out, rows = _memory(t), n // TILE_ROWS
    whole = t.numel() // n * rows * TILE_ROWS
    out[:whole].view(rows, TILE_ROWS, -1, unit).copy_(t[:whole].view(rows, -1, TILE_ROWS, unit).transpose(1, 2))
    out[whole:] = t[whole:]
    return out


def _memory(like: torch.Tensor) -> torch.Tensor:
    """New memory of its size; large pieces straight from the system, for malloc keeps the holes when a model's layers are laid
    out anew one after the other (1.27x the 4-bit base stayed resident after a `state_dict`, 0.06x so)."""
    size = like.numel() * like.itemsize
    if size < _OWN_PAGES or type(like) is not torch.Tensor or not like.is_cpu or torch.compiler.is_compiling():
        return torch.empty_like(like)
    return torch.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=like.dtype)


# ---- as flat tensors and ints, for the registered op and autograd ----

_FORM = 6  # ints a weight: N, K, blocksize, nf4 or fp4, dtype, tiled; zeros for a dense one


def split(
    weights: Sequence[torch.Tensor | Weight4bit],
) -> tuple[list[torch.Tensor], list[torch.Tensor | None], list[int]]:
    """-> a tensor a weight, three more a weight (scales, nested absmax, offset) and the forms; both empty if all are dense"""
    for w in weights:
        if isinstance(w, Weight4bit):
            break
    else:
        return list(weights), [], []  # type: ignore[arg-type]
    tensors, quants, forms = [], [], []
    for w in weights:
        if isinstance(w, Weight4bit):
            data, *rest = w.tensors()
            kind = QUANT_TYPES.index(w.quant_type), _DTYPE_LIST.index(w.dtype)
            forms += [*w.shape, w.blocksize, *kind, int(w.tiled)]
        else:
            data, rest = w, [None, None, None]
            forms += [0] * _FORM
        tensors.append(data)
        quants += rest
    return tensors, quants, forms


def join(
    tensors: Sequence[torch.Tensor], quants: Sequence[torch.Tensor | None], forms: Sequence[int]
) -> Sequence[torch.Tensor | Weight4bit]:
    """The weights that `split` took apart."""
    if not forms:
        return tensors
    weights: list[torch.Tensor | Weight4bit] = []
    for i, data in enumerate(tensors):
        n, k, blocksize, quant_type, dtype, tiled = forms[i * _FORM : (i + 1) * _FORM]
        scales, nested, offset = quants[3 * i : 3 * i + 3]
        if scales is None:
            weights.append(data)
        else:
            about = (n, k), _DTYPE_LIST[dtype], QUANT_TYPES[quant_type], blocksize, bool(tiled)
            weights.append(Weight4bit(data, scales, nested, offset, *about))
    return tuple(weights)


_decode: Callable[[Weight4bit, torch.dtype], torch.Tensor] = reference.dense


def set_decoder(decode: Callable[[Weight4bit, torch.dtype], torch.Tensor]) -> None:
    """How `dequantize` makes a dense weight: fastpeft.backends says which of its kernels, when it is imported."""
    global _decode
    _decode = decode


class _Checkpoint:
    """Reads one weight's keys, which nobody vouches for."""

    def __init__(self, state: Mapping[str, torch.Tensor], prefix: str) -> None:
        self.state, self.prefix = state, prefix

    def read(self) -> Weight4bit:
        about, quant_type = self.about()
        (n, k), blocksize = about["shape"], about["blocksize"]
        blocks = -(-n * k // blocksize)
        data = self.tensor("", None, None)
        if not data.is_contiguous():
            self.wrong("", "contiguous", f"strides {list(data.stride())}")
        data = data.view(-1).view(torch.uint8)
        if data.numel() != (n * k + 1) // 2:
            self.wrong("", f"{(n * k + 1) // 2} bytes for shape [{n}, {k}]", f"{data.numel()} bytes")
        self.map(".quant_map", reference.codebook(quant_type), f"the {quant_type} code book")
        nested = f"{self.prefix}.nested_absmax" in self.state
        scales = self.tensor(".absmax", torch.uint8 if nested else torch.float32, blocks)
        absmax = offset = None
        if nested:
            for key, expected in (("nested_blocksize", reference.NESTED_BLOCK), ("nested_dtype", "float32")):
                if about.get(key) != expected:
                    self.wrong(".quant_state", f"one with {key} {expected!r}", repr(about.get(key)))
            absmax = self.tensor(".nested_absmax", torch.float32, -(-blocks // reference.NESTED_BLOCK))
            self.map(".nested_quant_map", reference.dynamic_map(), "bitsandbytes' dynamic map")
            value = about.get("nested_offset")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                self.wrong(".quant_state", "one with a finite nested_offset", repr(value))
            offset = torch.tensor(float(value), dtype=torch.float32, device=data.device)
        for key, t in ((".nested_absmax", absmax), (".absmax", None if nested else scales)):
            if t is not None and not torch.isfinite(t).all():
                self.wrong(key, "finite", "NaN or Inf")
        if len({t.device for t in (data, scales, absmax) if t is not None}) > 1:
            self.wrong(".absmax", f"on the weight's device ({data.device})", str(scales.device))
        return Weight4bit(data, scales, absmax, offset, (n, k), DTYPES[about["dtype"]], quant_type, blocksize)

    def about(self) -> tuple[dict[str, Any], str]:
        """The JSON part, checked, and the type that its key names."""
        start = f"{self.prefix}.quant_state.bitsandbytes__"
        found = [key for key in self.state if key.startswith(start)]
        if len(found) != 1 or found[0].removeprefix(start) not in QUANT_TYPES:
            known = " or ".join(start + t for t in QUANT_TYPES)
            raise ValueError(f"Weight4bit.from_state_dict: needs exactly one key {known}, got {found or 'none'}")
        quant_type, key = found[0].removeprefix(start), found[0].removeprefix(self.prefix)
        text = self.tensor(key, torch.uint8, None)
        if text.numel() > _MAX_JSON:
            self.wrong(key, f"at most {_MAX_JSON} bytes of JSON", f"{text.numel()} bytes")
        try:
            about = json.loads(bytes(text.view(-1).tolist()).decode())
        except (ValueError, RecursionError) as error:
            self.wrong(key, "JSON", f"something else ({error})")
        if not isinstance(about, dict):
            self.wrong(key, "a JSON object", type(about).__name__)
        shape = about.get("shape")
        natural = (
            isinstance(shape, list) and len(shape) == 2 and all(type(s) is int and 0 <= s < 1 << 31 for s in shape)
        )
        for name, right, expected in (
            ("quant_type", about.get("quant_type") == quant_type, repr(quant_type)),
            (
                "blocksize",
                type(about.get("blocksize")) is int and about["blocksize"] in BLOCKSIZES,
                f"one of {BLOCKSIZES}",
            ),
            ("dtype", isinstance(about.get("dtype"), str) and about["dtype"] in DTYPES, f"one of {', '.join(DTYPES)}"),
            ("shape", natural, "two sizes [N, K]"),
        ):
            if not right:
                self.wrong(key, f"one with {name} {expected}", repr(about.get(name)))
        return about, quant_type

    def tensor(self, key: str, dtype: torch.dtype | None, size: int | None) -> torch.Tensor:
        name = self.prefix + key
        if name not in self.state:
            raise ValueError(f"Weight4bit.from_state_dict: key {name} is missing")
        t = self.state[name]
        if not isinstance(t, torch.Tensor):
            self.wrong(key, "a torch.Tensor", type(t).__name__)
        if (dtype is not None and t.dtype != dtype) or (size is not None and t.numel() != size):
            expected = f"{dtype}" + ("" if size is None else f" [{size}]")
            self.wrong(key, expected, f"{t.dtype} {list(t.shape)}")
        return t.detach() if size is None else t.detach().reshape(-1)

    def map(self, key: str, expected: torch.Tensor, name: str) -> None:
        if not torch.equal(self.tensor(key, torch.float32, expected.numel()).cpu(), expected):
            self.wrong(key, name, "other values")

    def wrong(self, key: str, expected: str, got: str) -> NoReturn:
        raise ValueError(f"Weight4bit.from_state_dict: {self.prefix}{key} must be {expected}, got {got}")
