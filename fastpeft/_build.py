"""The build id: one hash over `csrc/`, which fastpeft, its kernel package and the compiled modules must share.

In a clone it is computed from the sources beside the package, so that a change there asks for a rebuild; an installed
package carries it as a stamp. `setup.py` runs this file by its path: it must import nothing but the standard library.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

STAMP = "_build_id.txt"
SOURCE_SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}


def source_id(csrc: Path) -> str:
    """16 hex digits over the names and bytes of every C++ and CUDA source below `csrc`."""
    digest = hashlib.sha256()
    for path in sorted(csrc.rglob("*")):
        if path.suffix in SOURCE_SUFFIXES:
            name, data = path.relative_to(csrc).as_posix(), path.read_bytes()
            digest.update(f"{name} {len(data)}\n".encode())
            digest.update(data)
    return digest.hexdigest()[:16]


def clone_root(package: Path) -> Path | None:
    """The clone that the package folder belongs to, or None where it is installed."""
    for root in (package.parent, package.parent.parent):
        if (root / "setup.py").is_file() and (root / "csrc").is_dir():
            return root
    return None


def package_id(package: Path) -> str | None:
    """The build id of a package folder: its stamp, else the hash of its clone's sources, else None."""
    stamp = package / STAMP
    if stamp.is_file():
        return stamp.read_text().strip()
    root = clone_root(package)
    return source_id(root / "csrc") if root else None
