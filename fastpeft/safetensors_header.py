"""The header of a safetensors file, and JSON, read as hostile input: in bounded time and memory, with a reason if not.

Such a file is eight bytes (the header's length, little-endian), the header and the data (huggingface/safetensors, "Format").
The header is a JSON object: {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}.
Errors are ValueErrors that give the reason; whoever opened the file knows its name.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

MOST_BYTES = 16 << 20  # of a header
# Its quotes, commas and opening brackets: 18 a matrix, so 116,508 matrices. Python makes up to 100 bytes of one.
MOST_SIGNS = 1 << 21
MOST_DEPTH = 32  # objects and lists in one another
MOST_DIGITS = 32  # of a whole number, and its sign
MOST_NAME = 512  # characters
MOST_DIMS = 8

_BY_BITS = {64: "F64 I64 U64 C64", 32: "F32 I32 U32", 16: "F16 BF16 I16 U16", 6: "F6_E2M3 F6_E3M2", 4: "F4"}
_BY_BITS[8] = "BOOL I8 U8 F8_E4M3 F8_E4M3FNUZ F8_E5M2 F8_E5M2FNUZ F8_E8M0"
BITS = {name: bits for bits, names in _BY_BITS.items() for name in names.split()}  # all dtypes of safetensors 0.8


class Entry(NamedTuple):
    """A tensor as the header has it; `begin` and `end` count bytes from the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    tensors: dict[str, Entry]
    metadata: dict[str, str]
    data: int  # where in the file the data starts


def parse(start: bytes, size: int) -> Header:
    """Checks the header of a file of `size` bytes; `start` is the file up to its data."""
    raw = start[8:]
    if not raw.startswith(b"{"):
        raise ValueError("its header does not start with '{', so it is no safetensors file")
    if len(raw) > MOST_BYTES or sum(raw.count(sign) for sign in (b'"', b",", b"{", b"[")) > MOST_SIGNS:
        raise ValueError("its header is too large for an adapter's")
    entries = json_object(raw, most=3)
    metadata = entries.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise ValueError("its __metadata__ is no object of strings")
    tensors = {name: _entry(name, entry) for name, entry in entries.items()}
    at = 0
    for name in in_order(tensors):
        if tensors[name].begin != at:
            raise ValueError(f"the data of {shown(name)} start at {tensors[name].begin}, where {at} is expected")
        at = tensors[name].end
    if at != size - len(start):
        raise ValueError(f"its tensors take {at} bytes, and {size - len(start)} are there. Take another copy")
    return Header(tensors, metadata, len(start))


def _entry(name: str, entry: Any) -> Entry:
    if not (0 < len(name) <= MOST_NAME and name.isprintable()):
        raise ValueError(f"a tensor's name is 1 to {MOST_NAME} printable characters, and not {shown(name)}")
    if not (isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}):
        raise ValueError(f"{shown(name)} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(dtype, str) and dtype in BITS):
        raise ValueError(f"the dtype of {shown(name)} is none of {', '.join(BITS)}")
    if not _naturals(shape, 0, MOST_DIMS):
        raise ValueError(f"the shape of {shown(name)} must be up to {MOST_DIMS} whole numbers from 0")
    if not _naturals(offsets, 2, 2):
        raise ValueError(f"the data_offsets of {shown(name)} must be two whole numbers from 0")
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * BITS[dtype]:
        raise ValueError(f"{shown(name)}, {dtype} of shape {shape}, cannot take {end - begin} bytes")
    return Entry(dtype, tuple(shape), begin, end)


def _naturals(value: Any, least: int, most: int) -> bool:
    """Whether it is a list of so many whole numbers from 0; True is none."""
    return (
        isinstance(value, list)
        and least <= len(value) <= most
        and all(type(number) is int and number >= 0 for number in value)
    )


def in_order(tensors: Mapping[str, Entry]) -> list[str]:
    """Names in the order of the data; a tensor without elements comes before the one that starts where it does."""
    return sorted(tensors, key=lambda name: (tensors[name].begin, tensors[name].end, name))


def encode(entries: Mapping[str, Entry], base: str | None, sha256: str) -> bytes:
    """The file up to its data, which starts at a multiple of 8 bytes."""
    metadata = {"format": "pt"} | ({} if base is None else {"fastpeft_base": base}) | {"fastpeft_sha256": sha256}
    header: dict[str, Any] = {"__metadata__": metadata}
    for name, (dtype, shape, begin, end) in entries.items():
        if name == "__metadata__":
            raise ValueError("a tensor cannot be named __metadata__")
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def shown(name: str) -> str:
    """A name out of a file, safe to print."""
    text = ascii(name[:100])
    return text if len(text) <= 102 >= len(name) else text[:100] + "..."


# ---- JSON ------------------------------------------------------------------------------------------------------------

# Strings, an unfinished one to the end of the text: possessive, so that the scan is linear in any text.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def json_object(raw: bytes, most: int = MOST_DEPTH) -> dict[str, Any]:
    """A JSON object in UTF-8: no key twice, no number that is infinite or endless, no half of a surrogate pair."""
    brackets = np.frombuffer(_STRING.sub(b"", raw).translate(None, delete=_NO_BRACKETS), dtype=np.int8)
    depth = np.cumsum((brackets & 2) - 1, dtype=np.int32)  # the bit is set in [ and {, and not in ] and }
    if depth.max(initial=0) > most:
        raise ValueError(f"its objects and lists are nested over {most} deep")
    try:
        text = raw.decode("utf-8")
        value = _JSON.decode(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError where "\ud800" stood alone
    except UnicodeError:
        raise ValueError("it is no UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"it has {shown(twice)} twice")
    return out


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:  # int() takes a time that is quadratic in them
        raise ValueError(f"it has a number of over {MOST_DIGITS} characters")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _constant(digits[:MOST_DIGITS])  # 1e999


def _constant(word: str) -> float:
    raise ValueError(f"it has the number {word}, and numbers are finite")


_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer, parse_float=_float, parse_constant=_constant)
