"""An adapter's folder: adapter_config.json and adapter_model.safetensors, read as hostile input and written as a whole.

A safetensors file is eight bytes (the header's length, little-endian), the header, and the data (huggingface/safetensors,
"Format"). The header is a JSON object: {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}.
Everything in it is checked before a byte of the data is read or allocated. What the files mean is not known here.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import re
import secrets
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"
PICKLED = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.pkl")

MOST_CONFIG = 1 << 20  # bytes
MOST_HEADER = 16 << 20  # bytes
MOST_SIGNS = (
    1 << 21
)  # quotes, commas and opening brackets of a header: a matrix has 18; Python takes up to 100 bytes for one
MOST_DEPTH = 32
MOST_NAME = 512  # characters
MOST_DIMS = 8
MOST_DIGITS = 32  # characters of a number: a double has up to 24
SHOWN = 5  # names in an error
CHUNK = 4 << 20  # bytes that are read at once, and hashed while they are in the cache

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BY_BITS = {64: "F64 I64 U64 C64", 32: "F32 I32 U32", 16: "F16 BF16 I16 U16", 6: "F6_E2M3 F6_E3M2", 4: "F4"}
_BY_BITS[8] = "BOOL I8 U8 F8_E4M3 F8_E4M3FNUZ F8_E5M2 F8_E5M2FNUZ F8_E8M0"
BITS = {name: bits for bits, names in _BY_BITS.items() for name in names.split()}  # all dtypes of safetensors 0.8


class AdapterFileError(ValueError):
    """A sentence: the file, what was expected, what came, and what to do."""


class Entry(NamedTuple):
    """A tensor as the header has it; `begin` and `end` count bytes from the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class AdapterFile:
    """An adapter's checked files, the data still on disk. A context manager; leaving it closes the file."""

    def __init__(self, path: Path, config: dict[str, Any], file: io.FileIO, header: Header):
        self.path, self.config, self.tensors = path, config, header.tensors
        self._file, self._header = file, header
        self.base = header.metadata.get("fastpeft_base")

    def __enter__(self) -> AdapterFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def read(
        self,
        expected: Mapping[str, tuple[int, ...]],
        *,
        base: str | None = None,
        allow_nonfinite: bool = False,
        allow_edited: bool = False,
    ) -> dict[str, torch.Tensor]:
        """The tensors, on the CPU, in the file's dtypes and the order of `expected`.

        Args:
            expected: the shape of every tensor that the file must hold, by name; it may hold no others.
            base: the fingerprint of the model that the adapter is for; checked where the file has one too.
            allow_nonfinite: take NaN and infinity.
            allow_edited: take a file that is not what its sha256 says.

        Raises:
            AdapterFileError: names, shapes, dtypes, the base, the sha256 or a value is not as it must be, the file became
                shorter, or memory does not suffice. Nothing is allocated before names, shapes and dtypes are right.
        """
        self._match({name: tuple(shape) for name, shape in expected.items()})
        if base is not None and self.base is not None and base != self.base:
            raise AdapterFileError(
                f"{self.path} was trained on another base model: its fingerprint is {_shown(self.base[:12])}, this "
                f"model's is {_shown(base[:12])}. Load the model that it was trained on, or pass check_base=False"
            )
        digest = hashlib.sha256(_described(self.tensors, self.base))
        with _about(self.path):
            tensors = {name: self._tensor(name, digest.update) for name in _in_order(self.tensors)}
        stored = self._header.metadata.get("fastpeft_sha256")
        if stored not in (None, digest.hexdigest()) and not allow_edited:
            raise AdapterFileError(
                f"{self.path} is not what was saved (its sha256 differs): it was damaged or edited since. "
                "Take another copy, or pass allow_edited=True if the change was meant"
            )
        bad = [] if allow_nonfinite else [name for name in expected if not _finite(tensors[name])]
        if bad:
            raise AdapterFileError(
                f"{self.path} holds NaN or infinity in {_listed(bad)}: training diverged, or the file was damaged. "
                "allow_nonfinite=True loads it nevertheless"
            )
        return {name: tensors[name] for name in expected}

    def _match(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Holds names, shapes and dtypes to what is expected."""
        held = {name: entry for name, entry in self.tensors.items() if name in expected}
        found = {
            "it lacks": [name for name in expected if name not in held],
            "it alone has": [_shown(name) for name in self.tensors if name not in held],
            "of another shape:": [
                f"{name} is {list(entry.shape)} and must be {list(expected[name])}"
                for name, entry in held.items()
                if entry.shape != expected[name]
            ],
            f"not of {', '.join(DTYPES)}:": [
                f"{name} is {entry.dtype}" for name, entry in held.items() if entry.dtype not in DTYPES
            ],
        }
        if any(found.values()):
            raise AdapterFileError(
                f"{self.path} does not fit this model and {CONFIG}: "
                + "; ".join(f"{words} {_listed(names)}" for words, names in found.items() if names)
                + f". Load it into the model that it was saved from, with the {CONFIG} that was saved beside it"
            )

    def _tensor(self, name: str, hashed: Callable[[memoryview], None]) -> torch.Tensor:
        """Reads one tensor, and hands its bytes to `hashed`."""
        dtype, shape, begin, end = self.tensors[name]
        try:
            tensor = torch.empty(shape, dtype=DTYPES[dtype], device="cpu")
        except (RuntimeError, MemoryError):
            raise ValueError(f"there is no memory for {name}, {(end - begin) / 2**30:.2f} GiB") from None
        view, done = _bytes(tensor), 0
        self._file.seek(self._header.data + begin)
        while done < len(view):
            count = self._file.readinto(view[done : done + CHUNK])
            if not count:
                raise ValueError("it became shorter while it was read. Take another copy")
            hashed(view[done : done + count])
            done += count
        return tensor


def open_adapter(folder: str | os.PathLike[str]) -> AdapterFile:
    """Checks an adapter's two files; of the tensors only what the header says of them, their data is not touched.

    Each file is opened once, and what is checked is what is read, whatever takes its name later.

    Raises:
        AdapterFileError: a file is missing, cannot be read, is no regular file or lies outside the folder, the config is
            no JSON object or too large, or the header and the data do not agree in every byte.
    """
    home = Path(folder)
    with _about(home):
        if not home.is_dir():
            raise ValueError(
                f"there is no such folder, with {CONFIG} and {MODEL}; an adapter of the Hub is downloaded first"
            )
    with _about(home / CONFIG), _opened(home, CONFIG) as file:
        raw = _exactly(file, min(_size(file), MOST_CONFIG + 1))
        if len(raw) > MOST_CONFIG:
            raise ValueError(f"it is larger than {MOST_CONFIG} bytes, and so no adapter's config")
        config = _object(raw)
    with _about(home / MODEL), contextlib.ExitStack() as undo:
        file = undo.enter_context(_opened(home, MODEL))
        header = _header(file)
        undo.pop_all()
    return AdapterFile(home / MODEL, config, file, header)


def write_adapter(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    *,
    base: str | None,
) -> None:
    """Writes both files into the folder, which is made if need be. PEFT and safetensors read them too.

    Each file is there as a whole or not at all: it is written under another name, synced and renamed, the config last.
    One tensor at a time is copied to the CPU.

    Args:
        config: what adapter_config.json shall hold.
        tensors: of float64, float32, float16 or bfloat16, on any device, in any layout of memory.
        base: the fingerprint of the model that the adapter is for.

    Raises:
        AdapterFileError: a tensor has no data or another dtype, a name, a shape or the config would be refused by
            `open_adapter`, or a file cannot be written. The folder's files are as they were.
    """
    home = Path(folder)
    with _about(home / CONFIG, "it cannot be written: "):
        try:
            text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False).encode()
        except (TypeError, RecursionError) as error:
            raise ValueError(str(error)) from None
        if len(text) > MOST_CONFIG:
            raise ValueError(f"it would be larger than {MOST_CONFIG} bytes")
        _object(text)
    with _about(home / MODEL, "it cannot be written: "):
        entries = _laid_out(tensors)
        start = _encoded(entries, base, "0" * 64)  # as long as the header will be
        _parsed(start, len(start) + max((entry.end for entry in entries.values()), default=0))

    def fill(file: io.FileIO) -> None:
        digest = hashlib.sha256(_described(entries, base))
        _write(file, start)
        for name in entries:
            view = _bytes(tensors[name].detach().to("cpu").resolve_neg().contiguous())
            digest.update(view)
            _write(file, view)
        file.seek(0)
        _write(file, _encoded(entries, base, digest.hexdigest()))

    with _about(home, "the adapter cannot be written: "), contextlib.ExitStack() as undo:
        home.mkdir(parents=True, exist_ok=True)
        new = {MODEL: _temporary(home, MODEL, fill, undo)}
        new[CONFIG] = _temporary(home, CONFIG, lambda file: _write(file, text), undo)
        for name, temporary in new.items():
            os.replace(temporary, home / name)
        _sync(home)


def fingerprint(parameters: Iterable[tuple[str, Sequence[int], torch.Tensor | None]]) -> str:
    """Names a base model: 64 hexadecimal digits, the sha256 over its parameters in the order of their names.

    Args:
        parameters: name, shape, and the values of those that are never quantised, else None. Of the values up to 256 evenly
            spaced elements count, the first and the last among them, rounded to bfloat16: a model is the same one in
            float32 and bfloat16.
    """
    lines = []
    for name, shape, values in parameters:
        sample = None
        if values is not None:
            count = min(values.numel(), 256)
            picked = [i * (values.numel() - 1) // max(count - 1, 1) for i in range(count)]
            flat = values.detach().reshape(-1)[torch.tensor(picked, dtype=torch.int64, device=values.device)]
            sample = _bytes(flat.to(torch.bfloat16).cpu()).hex()
        lines.append(json.dumps([name, [int(size) for size in shape], sample]))
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


# ---- files -----------------------------------------------------------------------------------------------------------


def _opened(home: Path, name: str) -> io.FileIO:
    """Opens a regular file of the folder, never waiting for one; a link may lead elsewhere in it."""
    inside, real = Path(os.path.realpath(home)), Path(os.path.realpath(home / name))
    # The Hub's cache links snapshots/REVISION/FILE to a file of blobs, beside snapshots.
    allowed = [inside, *(parent.parent / "blobs" for parent in inside.parents if parent.name == "snapshots")]
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise ValueError("it is a link that leaves its folder. Put the file itself there")
    try:
        fd = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise ValueError(_missing(home, name)) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ValueError("it is no regular file")
    return io.FileIO(fd, "rb")


def _missing(home: Path, name: str) -> str:
    pickled = next((other for other in PICKLED if name == MODEL and (home / other).exists()), None)
    if pickled is None:
        return "there is no such file: the folder is no adapter's, or was not saved to its end"
    return (
        f"there is only {pickled}, a pickle, which can run code and is not read. To convert it, run in the folder: "
        'python -c "import safetensors.torch as s, torch; s.save_file({name: x.clone().contiguous() for name, x in '
        f"torch.load('{pickled}', map_location='cpu', weights_only=True).items()}}, '{MODEL}')\""
    )


def _size(file: io.FileIO) -> int:
    return os.fstat(file.fileno()).st_size


def _exactly(file: io.FileIO, size: int) -> bytes:
    """So many bytes, fewer where the file ends."""
    parts = []
    while size and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _write(file: io.FileIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]


def _temporary(home: Path, name: str, fill: Callable[[io.FileIO], None], undo: contextlib.ExitStack) -> Path:
    """A synced file beside the one that it shall become; `undo` removes it where it is still there."""
    path = home / f".{name}.{secrets.token_hex(8)}"
    with open(path, "xb", buffering=0) as file:
        undo.callback(path.unlink, missing_ok=True)
        fill(file)
        os.fsync(file.fileno())
    return path


def _sync(home: Path) -> None:
    """Makes the renames durable, where the file system can."""
    with contextlib.suppress(OSError):
        fd = os.open(home, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextlib.contextmanager
def _about(path: Path, verb: str = "") -> Iterator[None]:
    """Makes what goes wrong with a file a sentence that names it."""
    try:
        yield
    except ValueError as error:
        raise AdapterFileError(f"{path}: {verb}{error}") from None
    except OSError as error:
        raise AdapterFileError(f"{path}: {verb}{error.strerror or error}") from error


# ---- JSON ------------------------------------------------------------------------------------------------------------

# Strings, an unfinished one to the end of the text: possessive, so that the scan is linear in any text.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def _object(raw: bytes, most: int = MOST_DEPTH) -> dict[str, Any]:
    """A JSON object in UTF-8: no key twice, no NaN or infinity, no endless number, no half of a surrogate pair."""
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
        raise ValueError(f"it has {_shown(twice)} twice")
    return out


def _number(digits: str) -> int | float:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"it has a number of over {MOST_DIGITS} characters")
    value = float(digits) if set(digits) & set(".eE") else int(digits)
    return value if math.isfinite(value) else _constant(digits)  # 1e999


def _constant(word: str) -> float:
    raise ValueError(f"it has the number {word}, and numbers are finite")


_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_number, parse_float=_number, parse_constant=_constant)


# ---- the header ------------------------------------------------------------------------------------------------------


class Header(NamedTuple):
    tensors: dict[str, Entry]
    metadata: dict[str, str]
    data: int  # where in the file the data starts


def _header(file: io.FileIO) -> Header:
    size = _size(file)
    start = _exactly(file, min(size, 8))
    length = int.from_bytes(start, "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"it ends before its header does, after {size} bytes. Take another copy")
    if length > MOST_HEADER:
        raise ValueError(f"its header is {length} bytes, over the limit of {MOST_HEADER}: it is no adapter")
    return _parsed(start + _exactly(file, length), size)


def _parsed(start: bytes, size: int) -> Header:
    """Checks the header of a file of `size` bytes; `start` is the file up to its data."""
    raw = start[8:]
    if not raw.startswith(b"{"):
        raise ValueError("its header does not start with '{', so it is no safetensors file")
    if len(raw) > MOST_HEADER or sum(raw.count(sign) for sign in (b'"', b",", b"{", b"[")) > MOST_SIGNS:
        raise ValueError("its header is too large for an adapter's")
    entries = _object(raw, most=3)
    metadata = entries.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise ValueError("its __metadata__ is no object of strings")
    tensors = {name: _entry(name, entry) for name, entry in entries.items()}
    at = 0
    for name in _in_order(tensors):
        if tensors[name].begin != at:
            raise ValueError(f"the data of {_shown(name)} start at {tensors[name].begin}, where {at} is expected")
        at = tensors[name].end
    if at != size - len(start):
        raise ValueError(f"its tensors take {at} bytes, and {size - len(start)} are there. Take another copy")
    return Header(tensors, metadata, len(start))


def _entry(name: str, entry: Any) -> Entry:
    if not (0 < len(name) <= MOST_NAME and name.isprintable()):
        raise ValueError(f"a tensor's name is 1 to {MOST_NAME} printable characters, and not {_shown(name)}")
    if not (isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}):
        raise ValueError(f"{_shown(name)} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(dtype, str) and dtype in BITS):
        raise ValueError(f"the dtype of {_shown(name)} is none of {', '.join(BITS)}")
    if not _naturals(shape, 0, MOST_DIMS):
        raise ValueError(f"the shape of {_shown(name)} must be up to {MOST_DIMS} whole numbers from 0")
    if not _naturals(offsets, 2, 2):
        raise ValueError(f"the data_offsets of {_shown(name)} must be two whole numbers from 0")
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * BITS[dtype]:
        raise ValueError(f"{_shown(name)}, {dtype} of shape {shape}, cannot take {end - begin} bytes")
    return Entry(dtype, tuple(shape), begin, end)


def _naturals(value: Any, least: int, most: int) -> bool:
    """Whether it is a list of so many whole numbers from 0; True is none."""
    return (
        isinstance(value, list)
        and least <= len(value) <= most
        and all(type(number) is int and number >= 0 for number in value)
    )


def _in_order(tensors: Mapping[str, Entry]) -> list[str]:
    """Names in the order of the data; a tensor without elements comes before the one that starts where it does."""
    return sorted(tensors, key=lambda name: (tensors[name].begin, tensors[name].end, name))


def _laid_out(tensors: Mapping[str, torch.Tensor]) -> dict[str, Entry]:
    """Where each tensor will lie: larger elements first, by name, as safetensors does; so every one is aligned."""
    for name, tensor in tensors.items():
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):  # a DTensor holds a part, others bytes of their own
            raise ValueError(
                f"{_shown(name)} is a {type(tensor).__name__} and must be a plain tensor (full_tensor() of it)"
            )
        if tensor.is_meta or tensor.layout != torch.strided or tensor.dtype not in NAMES:
            kind = f"{tensor.dtype}, {tensor.layout} and on {tensor.device.type}"
            raise ValueError(
                f"{_shown(name)} is {kind}, and must be dense, with data, and of {', '.join(NAMES.values())}"
            )
    entries, end = {}, 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = Entry(NAMES[tensor.dtype], tuple(tensor.shape), begin, end)
    return entries


def _encoded(entries: Mapping[str, Entry], base: str | None, sha256: str) -> bytes:
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


def _described(entries: Mapping[str, Entry], base: str | None) -> bytes:
    """What fastpeft_sha256 covers besides the data: the base, and names, dtypes and shapes in the data's order."""
    return json.dumps([base, [(name, *entries[name][:2]) for name in _in_order(entries)]]).encode()


# ---- tensors and sentences -------------------------------------------------------------------------------------------


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, in place."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _finite(tensor: torch.Tensor) -> bool:
    return all(bool(part.isfinite().all()) for part in tensor.reshape(-1).split(CHUNK))


def _shown(name: str) -> str:
    """A name out of a file, safe to print."""
    return ascii(name if len(name) <= 100 else name[:100] + "…")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
