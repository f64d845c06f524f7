"""An adapter's folder: adapter_config.json and adapter_model.safetensors, read as hostile input and written as a whole.

Everything that the config and the header say is checked before a byte of the data is read or allocated. What it means for a
model is not known here.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastpeft.safetensors_header import MOST_BYTES, Entry, Header, encode, in_order, json_object, parse, shown

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"
PICKLED = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.pkl")

MOST_CONFIG = 1 << 20  # bytes
SHOWN = 5  # names in an error
CHUNK = 4 << 20  # bytes that are read at once, and hashed while they are in the cache

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class AdapterFileError(ValueError):
    """A sentence: the file, what was expected, what came, and what to do."""


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
                f"{self.path} was trained on another base model: its fingerprint is {shown(self.base[:12])}, this "
                f"model's is {shown(base[:12])}. Load the model that it was trained on, or pass check_base=False"
            )
        digest = hashlib.sha256(_described(self.tensors, self.base))
        with _about(self.path):
            tensors = {name: self._tensor(name, digest.update) for name in in_order(self.tensors)}
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
            "it alone has": [shown(name) for name in self.tensors if name not in held],
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
        config = json_object(raw)
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
        json_object(text)
    with _about(home / MODEL, "it cannot be written: "):
        entries = _laid_out(tensors)
        start = encode(entries, base, "0" * 64)  # as long as the header will be
        parse(start, len(start) + max((entry.end for entry in entries.values()), default=0))

    def fill(file: io.FileIO) -> None:
        digest = hashlib.sha256(_described(entries, base))
        _write(file, start)
        for name in entries:
            view = _bytes(tensors[name].detach().to("cpu").resolve_neg().contiguous())
            digest.update(view)
            _write(file, view)
        file.seek(0)
        _write(file, encode(entries, base, digest.hexdigest()))

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


def _header(file: io.FileIO) -> Header:
    size = _size(file)
    start = _exactly(file, min(size, 8))
    length = int.from_bytes(start, "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"it ends before its header does, after {size} bytes. Take another copy")
    if length > MOST_BYTES:
        raise ValueError(f"its header is {length} bytes, over the limit of {MOST_BYTES}: it is no adapter")
    return parse(start + _exactly(file, length), size)


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


def _laid_out(tensors: Mapping[str, torch.Tensor]) -> dict[str, Entry]:
    """Where each tensor will lie: larger elements first, by name, as safetensors does; so every one is aligned."""
    for name, tensor in tensors.items():
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):  # a DTensor holds a part, others bytes of their own
            raise ValueError(
                f"{shown(name)} is a {type(tensor).__name__} and must be a plain tensor (full_tensor() of it)"
            )
        if tensor.is_meta or tensor.layout != torch.strided or tensor.dtype not in NAMES:
            kind = f"{tensor.dtype}, {tensor.layout} and on {tensor.device.type}"
            raise ValueError(
                f"{shown(name)} is {kind}, and must be dense, with data, and of {', '.join(NAMES.values())}"
            )
    entries, end = {}, 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = Entry(NAMES[tensor.dtype], tuple(tensor.shape), begin, end)
    return entries


def _described(entries: Mapping[str, Entry], base: str | None) -> bytes:
    """What fastpeft_sha256 covers besides the data: the base, and names, dtypes and shapes in the data's order."""
    return json.dumps([base, [(name, *entries[name][:2]) for name in in_order(entries)]]).encode()


# ---- tensors and sentences -------------------------------------------------------------------------------------------


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, in place."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _finite(tensor: torch.Tensor) -> bool:
    """By the least and the largest value, which NaN becomes where there is one: a twentieth of isfinite()'s time."""
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
