"""An adapter's two files: what is written is read, by others too, and what is not as it should be is refused in a sentence."""

from __future__ import annotations

import copy
import errno
import json
import os
import random
import shlex
import subprocess
import sys
import tracemalloc
from pathlib import Path

import peft
import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from fastpeft import adapter_files
from fastpeft.adapter_files import CONFIG, MODEL, AdapterFileError, fingerprint, open_adapter, write_adapter
from fastpeft.safetensors_header import MOST_BYTES, MOST_SIGNS

BASE = "5e" * 32
CONTENTS = {"peft_type": "LORA", "r": 4, "lora_alpha": 8.5, "target_modules": ["q", "v"], "revision": None}


def some_tensors() -> dict[str, torch.Tensor]:
    """Every dtype that is read; a scalar, and none at all, among them."""
    torch.manual_seed(0)
    return {
        "m.q.lora_A.weight": torch.randn(4, 6),
        "m.q.lora_B.weight": torch.randn(6, 4).bfloat16(),
        "m.v.lora_A.weight": torch.randn(4, 6),
        "half": torch.randn(3).half(),
        "double": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.empty(0, 7),
        "größe x": torch.randn(2, 1, 3),
    }


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def assert_same(result: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(result) == list(expected)
    for name, tensor in expected.items():
        assert result[name].dtype == tensor.dtype and result[name].device.type == "cpu"
        assert torch.equal(result[name], tensor.detach().cpu()), name


def raw_file(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with this header: JSON text, or what becomes such."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def put(folder: Path, model: bytes | None = None, config: bytes | None = None) -> Path:
    for name, contents in ((MODEL, model), (CONFIG, config)):
        if contents is not None:
            (folder / name).unlink(missing_ok=True)  # writing over it takes ext4 4 ms, for it syncs
            (folder / name).write_bytes(contents)
    return folder


def refused(folder: Path, words: str, **expected: tuple[int, ...]) -> None:
    """Refused when opened or read, in one line of text that can be printed."""
    with pytest.raises(AdapterFileError) as raised, open_adapter(folder) as file:
        file.read(expected)
    text = str(raised.value)
    assert words in text and str(folder) in text
    assert "\n" not in text and len(text.encode()) < 2000


@pytest.fixture
def folder(tmp_path) -> Path:
    """An adapter's folder, as written."""
    write_adapter(tmp_path / "adapter", CONTENTS, some_tensors(), base=BASE)
    return tmp_path / "adapter"


# ---- written, read ---------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(folder):
    tensors = some_tensors()
    with open_adapter(str(folder)) as file:
        assert file.config == CONTENTS and file.base == BASE
        assert {name: entry.shape for name, entry in file.tensors.items()} == shapes(tensors)
        assert file.tensors["half"].dtype == "F16"
        assert_same(file.read(shapes(tensors), base=BASE), tensors)
        assert_same(file.read(shapes(tensors)), tensors)  # and again
    with pytest.raises(AdapterFileError, match="closed file"):
        file.read(shapes(tensors))
    assert sorted(os.listdir(folder)) == [CONFIG, MODEL]


def test_the_same_tensors_are_the_same_file(folder, tmp_path):
    tensors = dict(reversed(some_tensors().items()))
    write_adapter(tmp_path / "again", dict(reversed(CONTENTS.items())), tensors, base=BASE)
    for name in (CONFIG, MODEL):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_safetensors_reads_what_is_written(folder):
    tensors = some_tensors()
    loaded = safetensors.torch.load_file(folder / MODEL)
    assert_same({name: loaded[name] for name in tensors}, tensors)
    with safetensors.safe_open(folder / MODEL, "pt") as file:
        assert file.metadata()["format"] == "pt" and file.metadata()["fastpeft_base"] == BASE
    start = int.from_bytes((folder / MODEL).read_bytes()[:8], "little")
    assert start % 8 == 0  # the data is aligned where it is mapped into memory


def test_reads_what_safetensors_writes(folder):
    tensors = some_tensors() | {"steps": torch.arange(3)}
    safetensors.torch.save_file(tensors, folder / MODEL, metadata={"format": "pt"})
    del tensors["steps"]
    with open_adapter(folder) as file:
        assert file.base is None and file.tensors["steps"].dtype == "I64"  # may stand there
        with pytest.raises(AdapterFileError, match="not of F64, F32, F16, BF16: steps is I64"):
            file.read(shapes(tensors) | {"steps": (3,)}, base=BASE)
    safetensors.torch.save_file(tensors, folder / MODEL)
    with open_adapter(folder) as file:
        assert_same(file.read(shapes(tensors), base=BASE), tensors)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_tensors_in_any_layout(device, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(6, 8, device=device)
    z = torch.randn(4, 5, dtype=torch.complex64, device=device)
    tensors = {
        "transposed": x.T,
        "expanded": x[:, :1].expand(6, 9),
        "slice": x[2:4, 3:7],
        "negated view": z.conj().imag,
        "negated, contiguous": torch._neg_view(x),
        "parameter": nn.Parameter(x.clone()),
        "tied": x,
        "tied too": x,
        "of a graph": nn.Parameter(x.clone()) * 2,
    }
    assert tensors["negated view"].is_neg() and tensors["negated, contiguous"].is_neg()
    write_adapter(tmp_path, {}, tensors, base=None)
    with open_adapter(tmp_path) as file:
        assert file.base is None and file.config == {}
        with torch.device("meta"):  # the caller's default device does not matter
            result = file.read(shapes(tensors), base=BASE)
    assert_same(result, tensors)
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in result.values())


def test_an_adapter_without_tensors(tmp_path):
    write_adapter(tmp_path, CONTENTS, {}, base=BASE)
    with open_adapter(tmp_path) as file:
        assert file.read({}) == {}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.v = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.v(torch.tanh(self.q(x)))


@pytest.mark.filterwarnings("ignore:.*adapter keys:UserWarning")
def test_peft_loads_what_is_written_and_the_other_way_round(tmp_path):
    torch.manual_seed(0)
    net, x = Net(), torch.randn(3, 6)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q", "v"], init_lora_weights=False)
    trained = peft.get_peft_model(copy.deepcopy(net), config)
    state = peft.get_peft_model_state_dict(trained)
    trained.save_pretrained(tmp_path / "peft")
    with open_adapter(tmp_path / "peft") as file:
        assert_same(file.read(shapes(state)), state)
        write_adapter(tmp_path / "ours", file.config, state, base=BASE)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "ours")
    assert torch.equal(loaded(x), trained(x)) and not torch.equal(loaded(x), net(x))


# ---- not written -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, tensor, words",
    [
        ("steps", torch.arange(3), "'steps' is torch.int64"),
        ("z", torch.zeros(2, dtype=torch.complex64).conj(), "'z' is torch.complex64"),
        ("fp8", torch.zeros(2).to(torch.float8_e4m3fn), "'fp8' is torch.float8_e4m3fn"),
        ("m", torch.empty(3, device="meta"), "on meta, and must be dense, with data, and of F64, F32, F16, BF16"),
        ("s", torch.eye(3).to_sparse(), "torch.sparse_coo"),
        ("l", nn.UninitializedParameter(), "is a UninitializedParameter and must be a plain tensor"),
        ("n", [1.0, 2.0], "is a list and must be a plain tensor"),
        ("__metadata__", torch.ones(1), "a tensor cannot be named __metadata__"),
        ("", torch.ones(1), "1 to 512 printable characters, and not ''"),
        ("a\nb", torch.ones(1), "printable characters, and not 'a\\nb'"),
        ("a" * 513, torch.ones(1), "1 to 512 printable characters"),
        ("\ud800", torch.ones(1), "it is no UTF-8"),
        ("many", torch.ones([1] * 9), "must be up to 8 whole numbers"),
    ],
)
def test_tensors_that_are_not_written(name, tensor, words, folder):
    before = {file: (folder / file).read_bytes() for file in os.listdir(folder)}
    with pytest.raises(AdapterFileError) as raised:
        write_adapter(folder, CONTENTS, {"fine": torch.ones(2), name: tensor}, base=BASE)
    assert words in str(raised.value) and str(raised.value).startswith(f"{folder / MODEL}: it cannot be written: ")
    assert {file: (folder / file).read_bytes() for file in os.listdir(folder)} == before


def deep(levels: int) -> dict:
    config: dict = {}
    for _ in range(levels):
        config = {"a": config}
    return config


@pytest.mark.parametrize(
    "config, words",
    [
        ({"r": float("nan")}, "not JSON compliant"),
        ({"r": {1, 2}}, "set is not JSON serializable"),
        ({"r": torch.ones(1)}, "Tensor is not JSON serializable"),
        ({"r": 10**40}, "a number of over 32 characters"),
        ({1: "a", "1": "b"}, "'<' not supported"),
        ({"a": "\ud800"}, "no UTF-8"),
        ({"a": "x" * (1 << 20)}, "larger than 1048576 bytes"),
        (deep(32), "nested over 32 deep"),
        (deep(100_000), "recursion"),
        ([1], "no JSON object"),
    ],
    ids=["NaN", "set", "tensor", "number", "keys", "surrogate", "large", "deep", "deeper", "list"],
)
def test_configs_that_are_not_written(config, words, folder):
    before = {file: (folder / file).read_bytes() for file in os.listdir(folder)}
    with pytest.raises(AdapterFileError, match=words):
        write_adapter(folder, config, {}, base=None)
    assert {file: (folder / file).read_bytes() for file in os.listdir(folder)} == before


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("sync", [0, 1], ids=["the model", "the config"])
def test_a_write_that_fails_leaves_the_old_files(failure, sync, folder, monkeypatch):
    calls = iter(range(9))

    def fsync(fd):
        if next(calls) == sync:
            raise failure

    monkeypatch.setattr(os, "fsync", fsync)
    before = {file: (folder / file).read_bytes() for file in os.listdir(folder)}
    with pytest.raises((AdapterFileError, KeyboardInterrupt), match="cannot be written: No space left|^$"):
        write_adapter(folder, {}, {"a": torch.ones(5)}, base=None)
    assert {file: (folder / file).read_bytes() for file in os.listdir(folder)} == before


def test_the_config_is_there_last_and_modes_are_the_users(tmp_path, monkeypatch):
    moved = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (moved.append(Path(new).name), replace(old, new)))
    before = os.umask(0o027)
    try:
        write_adapter(tmp_path / "new" / "folder", {}, {"a": torch.ones(5)}, base=None)
    finally:
        os.umask(before)
    assert moved == [MODEL, CONFIG]
    assert {os.stat(tmp_path / "new" / "folder" / name).st_mode & 0o777 for name in moved} == {0o640}


def test_a_file_in_the_folders_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterFileError, match="file: the adapter cannot be written: File exists"):
        write_adapter(tmp_path / "file", {}, {}, base=None)
    refused(tmp_path / "file", "there is no such folder")
    refused(tmp_path / "absent", "there is no such folder")
    refused(tmp_path / "nul\0", "there is no such folder")


# ---- files that are none ---------------------------------------------------------------------------------------------


def test_missing_files(folder):
    (folder / MODEL).rename(folder / "model.safetensors")
    refused(folder, f"{MODEL}: there is no such file")
    (folder / CONFIG).unlink()
    refused(folder, f"{CONFIG}: there is no such file")


@pytest.mark.parametrize("name", adapter_files.PICKLED)
def test_a_pickle_is_refused_with_the_command_that_converts_it(name, folder):
    (folder / MODEL).unlink()
    x = torch.randn(3, 4)
    torch.save({"a": x.T, "b": x}, folder / name)
    refused(folder, f"there is only {name}, a pickle")
    if name == "adapter_model.bin":
        with pytest.raises(AdapterFileError) as raised:
            open_adapter(folder)
        _, command = str(raised.value).split("run in the folder: python ")
        subprocess.run([sys.executable, *shlex.split(command)], cwd=folder, check=True)
        with open_adapter(folder) as file:
            assert_same(file.read({"a": (4, 3), "b": (3, 4)}), {"a": x.T, "b": x})


@pytest.mark.parametrize("name", [CONFIG, MODEL])
@pytest.mark.parametrize("kind", ["directory", "FIFO", "link out", "link to a device", "dangling", "loop"])
def test_no_regular_file(kind, name, folder, tmp_path):
    path = folder / name
    path.rename(tmp_path / "outside")
    make = {
        "directory": path.mkdir,
        "FIFO": lambda: os.mkfifo(path),  # nobody writes to it, and nobody waits
        "link out": lambda: path.symlink_to("../outside"),
        "link to a device": lambda: path.symlink_to("/dev/zero"),
        "dangling": lambda: path.symlink_to("nothing"),
        "loop": lambda: path.symlink_to(name),
    }
    words = {
        "directory": "it is no regular file",
        "FIFO": "it is no regular file",
        "dangling": "there is no such file",
        "loop": "Too many levels of symbolic links",
    }
    make[kind]()
    refused(folder, f"{name}: {words.get(kind, 'it is a link that leaves its folder')}")


@pytest.mark.parametrize("number, words", [(errno.EACCES, "Permission denied"), (errno.ENXIO, "No such device")])
def test_a_file_that_cannot_be_opened(number, words, folder, monkeypatch):
    def fails(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", fails)
    refused(folder, words)


def test_links_that_are_taken(folder, tmp_path):
    """Inside the folder, and as the Hub's cache has them."""
    (folder / "real").mkdir()
    for name in (CONFIG, MODEL):
        (folder / name).rename(folder / "real" / name)
        (folder / name).symlink_to(f"real/{name}")
    open_adapter(folder).close()
    (tmp_path / "link").symlink_to(folder)
    open_adapter(tmp_path / "link").close()

    cache = tmp_path / "models--some--adapter"
    snapshot = cache / "snapshots" / "abc" / "nested"
    snapshot.mkdir(parents=True)
    (folder / "real").rename(cache / "blobs")
    for name in (CONFIG, MODEL):
        (snapshot / name).symlink_to(f"../../../blobs/{name}")
    open_adapter(snapshot).close()
    (snapshot / MODEL).unlink()
    (snapshot / MODEL).symlink_to("/etc/hostname")
    refused(snapshot, "it is a link that leaves its folder")


def test_what_is_checked_is_what_is_read(folder):
    """Files that are replaced or cut between the two."""
    tensors = some_tensors()
    with open_adapter(folder) as file:
        write_adapter(folder, {}, {"other": torch.ones(2)}, base=None)
        assert_same(file.read(shapes(tensors), base=BASE), tensors)
    write_adapter(folder, CONTENTS, tensors, base=BASE)
    with open_adapter(folder) as file:
        os.truncate(folder / MODEL, (folder / MODEL).stat().st_size - 1)
        with pytest.raises(AdapterFileError, match="became shorter while it was read"):
            file.read(shapes(tensors))


# ---- contents that are not as they should be -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, words",
    [
        (b"", "it is no JSON"),
        (b"[]", "it is no JSON object"),
        (b"null", "it is no JSON object"),
        (b'{"r": 1', "it is no JSON"),
        (b'{"r": 1} {}', "it is no JSON"),
        (b'{"r": "\\', "it is no JSON"),
        (b'{"r": "\n"}', "it is no JSON"),
        (b'\xef\xbb\xbf{"r": 1}', "it is no JSON"),
        (b'{"r": "\xff"}', "it is no UTF-8"),
        (b'{"r": "\xed\xa0\x80"}', "it is no UTF-8"),
        (b'{"r": "\\ud800"}', "it is no UTF-8"),
        ('{"r": 1}'.encode("utf-16"), "it is no UTF-8"),
        (b'{"r": NaN}', "the number NaN"),
        (b'{"r": [-Infinity]}', "the number -Infinity"),
        (b'{"r": 1e999}', "the number 1e999"),
        (b'{"r": -1%s}' % (b"0" * 4300), "a number of over 32 characters"),
        (b'{"r": %s.0}' % (b"1" * 4300), "the number 11111111111111111111111111111111, and"),
        (b'{"r": 1, "a": {"b": 1, "\\u0062": 2}}', "it has 'b' twice"),
        (b'{"r": ' + b"[" * 32 + b"]" * 32 + b"}", "nested over 32 deep"),
        (b"[" * (1 << 20), "nested over 32 deep"),
        (b'{"a":' * 100_000, "nested over 32 deep"),
        (b'{"a": "' + b'\\"' * 500_000, "it is no JSON"),
        (b'{"a": "%s"}' % (b"x" * (1 << 20)), "larger than 1048576 bytes"),
    ],
    ids=lambda value: ascii(value[:30]),
)
def test_configs_that_are_refused(config, words, folder):
    refused(put(folder, config=config), f"{folder / CONFIG}: {words}" if words.startswith("it is") else words)


def test_configs_that_are_taken(folder):
    config = b' {"a": "[[[{{\\"\\\\", "b": ' + b"[" * 31 + b"]" * 31 + b', "c": "\\ud83d\\ude00", "d": -1.5e-300} \n'
    with open_adapter(put(folder, config=config)) as file:
        assert file.config["a"] == '[[[{{"\\' and file.config["c"] == "😀" and file.config["d"] == -1.5e-300


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8), **more: object) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets} | more


def text_of(shape: str = "[2]", offsets: str = "[0,8]", dtype: str = '"F32"') -> bytes:
    return f'{{"a":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}'.encode()


A = json.dumps(entry()).encode()
HUGE = "1" + "0" * 4000


@pytest.mark.parametrize(
    "model, words",
    [
        (b"", "it ends before its header does, after 0 bytes"),
        (b"\1\0\0", "it ends before its header does, after 3 bytes"),
        (bytes(8), "does not start with '{'"),
        ((2**63).to_bytes(8, "little") + b"{}", "it ends before its header does"),
        ((2**64 - 1).to_bytes(8, "little") + b"{}", "it ends before its header does"),
        ((3).to_bytes(8, "little") + b"{}", "it ends before its header does"),
        ((1).to_bytes(8, "little") + b"{}", "it is no JSON"),
        (raw_file(b" {}"), "does not start with '{'"),
        (raw_file(b"[]"), "does not start with '{'"),
        (raw_file(b"{}}"), "it is no JSON"),
        (raw_file(b"{\xff}"), "it is no UTF-8"),
        (raw_file(b'{"a":%s,"\\u0061":%s}' % (A, A), bytes(8)), "it has 'a' twice"),
        (raw_file(b'{"a":%s}' % A.replace(b'"dtype"', b'"shape": [2], "dtype"'), bytes(8)), "it has 'shape' twice"),
        (raw_file({"a": entry(shape=[[2]])}, bytes(8)), "nested over 3 deep"),
        (raw_file({"__metadata__": []}), "__metadata__ is no object of strings"),
        (raw_file({"__metadata__": {"a": 1}}), "__metadata__ is no object of strings"),
        (raw_file({"__metadata__": entry()}, bytes(8)), "__metadata__ is no object of strings"),
        (raw_file({"__metadata__": None}), "__metadata__ is no object of strings"),
        (raw_file({"a": 1}), "must have dtype, shape and data_offsets"),
        (raw_file({"a": entry(more=1)}, bytes(8)), "and nothing else"),
        (raw_file({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "must have dtype, shape and data_offsets"),
        (raw_file({"a": entry("F33")}, bytes(8)), "the dtype of 'a' is none of F64"),
        (raw_file({"a": entry(["F32"])}, bytes(8)), "the dtype of 'a' is none of"),
        (raw_file({"a": entry(None)}, bytes(8)), "the dtype of 'a' is none of"),
        (raw_file({"": entry()}, bytes(8)), "a tensor's name is 1 to 512"),
        (raw_file({"a" * 513: entry()}, bytes(8)), "a tensor's name is 1 to 512"),
        (raw_file({"a\x1b[31m": entry()}, bytes(8)), "printable characters, and not 'a\\x1b[31m'"),
        (raw_file({"a\u202eb": entry()}, bytes(8)), "printable characters, and not 'a\\u202eb'"),
        (raw_file(b'{"\\ud800":%s}' % A, bytes(8)), "it is no UTF-8"),
        (raw_file(text_of("2"), bytes(8)), "the shape of 'a' must be up to 8 whole numbers"),
        (raw_file(text_of('"22"'), bytes(8)), "the shape of 'a' must be"),
        (raw_file(text_of("null"), bytes(8)), "the shape of 'a' must be"),
        (raw_file(text_of("[-2]"), bytes(8)), "the shape of 'a' must be"),
        (raw_file(text_of("[-2,-1]"), bytes(8)), "the shape of 'a' must be"),
        (raw_file(text_of("[2.0]"), bytes(8)), "the shape of 'a' must be"),
        (raw_file(text_of("[2,true]"), bytes(8)), "the shape of 'a' must be"),
        (raw_file(text_of("[1e1]"), bytes(8)), "the shape of 'a' must be"),
        (raw_file(text_of("[2,1,1,1,1,1,1,1,1]"), bytes(8)), "the shape of 'a' must be"),
        (raw_file(text_of(f"[{HUGE}]"), bytes(8)), "a number of over 32 characters"),
        (raw_file(text_of("[4294967296,4294967296]"), bytes(8)), "cannot take 8 bytes"),
        (raw_file(text_of("[4611686018427387906]"), bytes(8)), "cannot take 8 bytes"),  # 8 bytes, modulo 2**64
        (raw_file(text_of("[9223372036854775810]", dtype='"U8"'), bytes(8)), "cannot take 8 bytes"),
        (raw_file(text_of("[3]"), bytes(8)), "'a', F32 of shape [3], cannot take 8 bytes"),
        (raw_file(text_of("[3]", "[0,2]", '"F4"'), bytes(2)), "'a', F4 of shape [3], cannot take 2 bytes"),
        (raw_file(text_of(offsets="[0,8.0]"), bytes(8)), "the data_offsets of 'a' must be two whole numbers"),
        (raw_file(text_of(offsets="[false,8]"), bytes(8)), "the data_offsets of 'a' must be"),
        (raw_file(text_of(offsets="[-8,0]"), bytes(8)), "the data_offsets of 'a' must be"),
        (raw_file(text_of(offsets="[0,8,8]"), bytes(8)), "the data_offsets of 'a' must be"),
        (raw_file(text_of(offsets="[8,0]"), bytes(8)), "cannot take -8 bytes"),
        (raw_file(text_of(offsets=f"[0,{HUGE}]"), bytes(8)), "a number of over 32 characters"),
        (raw_file(text_of(offsets="[4,12]"), bytes(12)), "the data of 'a' start at 4, where 0 is expected"),
        (raw_file({"a": entry(), "b": entry()}, bytes(8)), "the data of 'b' start at 0, where 8 is expected"),
        (raw_file({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "start at 4, where 8 is expected"),
        (raw_file({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "start at 12, where 8 is expected"),
        (raw_file({"a": entry(), "b": entry(shape=[0], offsets=[4, 4])}, bytes(8)), "start at 4, where 8 is expected"),
        (raw_file({"a": entry()}, bytes(7)), "its tensors take 8 bytes, and 7 are there"),
        (raw_file({"a": entry()}, bytes(9)), "its tensors take 8 bytes, and 9 are there"),
        (raw_file({}, bytes(1)), "its tensors take 0 bytes, and 1 are there"),
        (raw_file({f"a{i}": entry(shape=[0], offsets=[0, 0]) for i in range(300)}), "it lacks a; it alone has 'a0', "),
        (raw_file({"Ω" * 400 + str(i): entry(shape=[0], offsets=[0, 0]) for i in range(9)}), "and 4 more"),
    ],
    ids=lambda value: ascii(value[:60]),
)
def test_models_that_are_refused(model, words, folder):
    refused(put(folder, model), words, a=(2,))


def test_headers_that_are_taken(folder):
    """In any order, with spaces, without metadata; tensors without elements between the others."""
    header = {"b": entry(offsets=[8, 16]), "none": entry(shape=[10**18, 0, 10**18], offsets=[8, 8]), "a": entry()}
    data = torch.arange(4.0)
    raw = raw_file(json.dumps(header, indent=4).encode() + b"  \n", data.numpy().tobytes())
    with open_adapter(put(folder, raw)) as file:
        assert file.tensors["none"].shape == (10**18, 0, 10**18)
    del header["none"]
    with open_adapter(put(folder, raw_file(header, data.numpy().tobytes()))) as file:
        assert_same(file.read({"b": (2,), "a": (2,)}), {"b": data[2:], "a": data[:2]})


BOMBS = {
    "brackets": lambda: b"{" + b"[" * (MOST_BYTES - 1),
    "closed": lambda: b"{" + b"}" * (MOST_BYTES - 1),
    "escaped quotes": lambda: b'{"' + b'\\"' * (MOST_BYTES // 2 - 1),
    "open strings": lambda: b'{"' + b'\\"' * (MOST_SIGNS - 9),
    "empty strings": lambda: b"{" + b'"' * (MOST_SIGNS - 9),
    "backslashes": lambda: b'{"' + b"\\" * (MOST_BYTES - 2),
    "digits": lambda: b'{"a":' + b"1" * (MOST_BYTES - 5),
    "fraction": lambda: b'{"a":1.' + b"1" * (MOST_BYTES - 7),
    "numbers": lambda: b'{"a":[' + b"10.5," * (MOST_SIGNS - 9) + b"1]}",
    "short strings": lambda: b'{"a":[' + b'"ab",' * (MOST_SIGNS // 3 - 9) + b"1]}",
    "objects": lambda: b'{"a":[' + b"{}," * (MOST_SIGNS // 2 - 9) + b"1]}",
    "wide characters": lambda: b'{"a":"' + "😀".encode() * (MOST_BYTES // 4 - 3) + b'"}',
    "spaces": lambda: b"{" + b" " * (MOST_BYTES - 2) + b"}",
    "one more byte": lambda: b"{" + b" " * (MOST_BYTES - 1) + b"}",
    "one more sign": lambda: b'{"a":[' + b"1," * (MOST_SIGNS - 2) + b"1]}",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_large_header_takes_bounded_time_and_memory(bomb, folder):
    put(folder, raw_file(BOMBS[bomb]()))
    tracemalloc.start()
    try:
        refused(folder, MODEL, a=(2,))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Per byte: the file, its text (up to four bytes a character, twice), its brackets and their depth in 4 bytes.
    assert peak < 16 * MOST_BYTES + 100 * MOST_SIGNS


def test_what_does_not_fit_is_listed_before_anything_is_allocated(folder, monkeypatch):
    def empty(*sizes, **options):
        raise AssertionError("allocated")

    expected = shapes(some_tensors())
    monkeypatch.setattr(torch, "empty", empty)
    with open_adapter(folder) as file:
        with pytest.raises(AdapterFileError) as raised:
            file.read(expected | {"half": (4,), "double": (1,), "absent": (2, 2)} | {f"x{i}": (1,) for i in range(7)})
        text = str(raised.value)
        assert "it lacks absent, x0, x1, x2, x3 and 3 more; " in text
        assert "of another shape: " in text and "half is [3] and must be [4]" in text
        assert "double is [] and must be [1]" in text and "it alone has" not in text
        fewer = {name: shape for name, shape in expected.items() if name not in ("größe x", "none")}
        with pytest.raises(AdapterFileError, match=r"it alone has 'gr\\xf6\\xdfe x', 'none'. Load it into"):
            file.read(fewer)
        with pytest.raises(AdapterFileError, match="its fingerprint is '5e5e5e5e5e5e', this model's is '6f6f6f6f6f6f'"):
            file.read(expected, base="6f" * 32)


def test_memory_that_is_not_there(folder, monkeypatch):
    def empty(*sizes, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    expected = shapes(some_tensors())
    monkeypatch.setattr(torch, "empty", empty)
    with open_adapter(folder) as file, pytest.raises(AdapterFileError, match="no memory for double, 0.00 GiB"):
        file.read(expected)


def test_edited_data(folder):
    """A value that changed, names that changed places, another base: all but what allow_edited=True takes."""
    tensors, raw = some_tensors(), (folder / MODEL).read_bytes()
    a, b = b"m.q.lora_A.weight", b"m.v.lora_A.weight"
    swapped = b.join(part.replace(b, a) for part in raw.split(a))
    for edited in (raw[:-1] + bytes([raw[-1] ^ 1]), swapped, raw.replace(BASE.encode(), BASE[::-1].encode())):
        assert len(edited) == len(raw) and edited != raw
        with open_adapter(put(folder, edited)) as file:
            with pytest.raises(AdapterFileError, match="it was damaged or edited since"):
                file.read(shapes(tensors))
            loaded = file.read(shapes(tensors), allow_edited=True)
            assert shapes(loaded) == shapes(tensors)
    with open_adapter(put(folder, swapped)) as file:
        loaded = file.read(shapes(tensors), allow_edited=True)
        assert torch.equal(loaded[a.decode()], tensors[b.decode()])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", adapter_files.NAMES)
def test_values_that_are_not_finite(value, dtype, tmp_path):
    x = torch.zeros(3, 5, dtype=dtype)
    x[2, 4] = value
    write_adapter(tmp_path, {}, {"fine": torch.ones(2), "x": x}, base=None)
    with open_adapter(tmp_path) as file:
        with pytest.raises(AdapterFileError, match="holds NaN or infinity in x: training diverged"):
            file.read({"fine": (2,), "x": (3, 5)})
        loaded = file.read({"fine": (2,), "x": (3, 5)}, allow_nonfinite=True)
        assert torch.equal(loaded["x"].view(torch.uint8), x.view(torch.uint8))


@pytest.mark.parametrize("dtype", adapter_files.NAMES)
def test_one_value_in_any_place(dtype):
    """Of a vectorised loop and its tail."""
    for size in (1, 7, 64, 131, 70_000):
        x = torch.randn(size).to(dtype)
        assert adapter_files._finite(x) and adapter_files._finite(x[:0])
        for at in {*range(min(size, 131)), size // 2, size - 1}:
            for value in (float("nan"), float("inf"), -float("inf")):
                kept, x[at] = x[at].item(), value
                assert not adapter_files._finite(x)
                x[at] = kept


# ---- 10,000 damaged files --------------------------------------------------------------------------------------------

HOSTILE = [
    -1,
    0,
    1,
    2**31,
    2**63,
    2**64 - 1,
    10**40,
    True,
    None,
    1.5,
    "",
    "F32",
    "I64",
    "F4",
    "BF16",
    [],
    [0],
    [4, 6],
    {},
]
HOSTILE += [[0, 8], [2**62, 4], [-4, -6], [24], "__metadata__", "\x00", "🙂", [[[[]]]], {"dtype": "F32"}]


def damaged(raw: bytes, other: bytes, draw: random.Random) -> bytes:
    """One or a few changes of one kind."""

    def flip(raw: bytes) -> bytes:
        at = draw.randrange(draw.choice((8, len(raw) // 2, len(raw))))
        return raw[:at] + bytes([raw[at] ^ 1 << draw.randrange(8)]) + raw[at + 1 :]

    def cut(raw: bytes) -> bytes:
        return raw[: draw.randrange(len(raw))]

    def insert(raw: bytes) -> bytes:
        at, count = draw.randrange(len(raw) + 1), draw.choice((1, 2, 8, 300))
        return raw[:at] + draw.choice((bytes(count), draw.randbytes(count), raw[at : at + count])) + raw[at:]

    def delete(raw: bytes) -> bytes:
        at = draw.randrange(len(raw))
        return raw[:at] + raw[at + draw.choice((1, 2, 8, 300)) :]

    def fields(raw: bytes) -> bytes:
        length = int.from_bytes(raw[:8], "little")
        header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
        names = [name for name in header if name != "__metadata__"]
        for _ in range(draw.choice((1, 1, 2, 5))):
            one, two = draw.sample(names, 2)
            field = draw.choice(list(header[one]))
            match draw.randrange(7):
                case 0:
                    header[one], header[two] = header[two], header[one]
                case 1:
                    header[one][field], header[two][field] = header[two][field], header[one][field]
                case 2:
                    header[one][field] = copy.deepcopy(draw.choice(HOSTILE))
                case 3 if isinstance(header[one][field], list) and header[one][field]:
                    header[one][field][0] = copy.deepcopy(draw.choice(HOSTILE))
                case 4:
                    header[draw.choice(("__metadata__", "new", "", "a" * 600))] = copy.deepcopy(draw.choice(HOSTILE))
                case 5:
                    header["__metadata__"] = {
                        draw.choice(("fastpeft_base", "fastpeft_sha256")): copy.deepcopy(draw.choice(HOSTILE))
                    }
                case _:
                    header = dict(draw.sample(list(header.items()), len(header)))
        return raw_file(header, data)

    def splice(raw: bytes) -> bytes:
        length, others = int.from_bytes(raw[:8], "little"), int.from_bytes(other[:8], "little")
        return draw.choice(
            (other[: 8 + others] + raw[8 + length :], raw[: 8 + length] + other[8 + others :], raw + other, raw[8:])
        )

    def header_length(raw: bytes) -> bytes:
        length = int.from_bytes(raw[:8], "little")
        return draw.choice((length - 1, length + 1, length + 8, 0, 2**24, 2**63)).to_bytes(8, "little") + raw[8:]

    change = draw.choice((flip, flip, cut, insert, delete, fields, fields, fields, splice, header_length))
    again = change in (flip, insert, delete)
    for _ in range(draw.choice((1, 1, 3)) if again else 1):
        raw = change(raw) or b"\0"
    return raw


def _same_bytes(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.dtype == y.dtype and torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))


def test_damaged_files_load_whole_or_raise(folder, tmp_path, monkeypatch):
    """Never another exception, never more allocated than the file is long, never another value under a true sha256."""
    tensors = some_tensors()
    expected = shapes(tensors)
    model, config = (folder / MODEL).read_bytes(), (folder / CONFIG).read_bytes()
    others = [("m.q.lora_A.weight", torch.ones(4, 6)), ("half", torch.ones(2).half()), ("other", torch.ones(3))]
    write_adapter(tmp_path / "other", CONTENTS, dict(others), base=BASE)
    other = (tmp_path / "other" / MODEL).read_bytes()

    allocated, empty = [], torch.empty

    def counted(*sizes, **options):
        tensor = empty(*sizes, **options)
        allocated.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(torch, "empty", counted)
    draw = random.Random(0)
    loaded = refusals = 0
    for number in range(10_000):
        raw, text, lenient = model, config, bool(number % 2)
        if number % 10:
            raw = damaged(model, other, draw)
            put(folder, raw)
        else:
            at = draw.randrange(len(config))
            text = draw.choice((config[:at], config[:at] + draw.randbytes(1) + config[at + 1 :], config[at:], raw))
            put(folder, model, text)
        allocated.clear()
        try:
            with open_adapter(folder) as file:
                result = file.read(expected, allow_nonfinite=lenient, allow_edited=lenient)
        except AdapterFileError as error:
            refusals += 1
            assert str(folder) in str(error) and len(str(error).encode()) < 2000
        else:
            loaded += 1
            assert shapes(result) == expected and list(result) == list(expected) and isinstance(file.config, dict)
            theirs = safetensors.torch.load(raw)  # whatever is taken here is a file to others, with the same values
            assert theirs.keys() == result.keys()
            assert all(_same_bytes(tensor, theirs[name]) for name, tensor in result.items())
            if not lenient and b'"fastpeft_sha256"' in raw:
                assert_same(result, tensors)
        assert sum(allocated) <= len(raw)
        if text is not config:
            put(folder, config=config)
    assert sorted(os.listdir(folder)) == [CONFIG, MODEL]
    assert loaded > 500 and refusals > 5000  # the damage is neither always fatal nor none


# ---- the fingerprint of a base ---------------------------------------------------------------------------------------


def test_fingerprint():
    torch.manual_seed(0)
    weight, norm, table = torch.randn(8, 6), torch.randn(8), torch.randn(500, 3)
    named = [("l.weight", weight.shape, None), ("norm", norm.shape, norm), ("table", table.shape, table)]
    one = fingerprint(named)
    assert len(one) == 64 and set(one) <= set("0123456789abcdef")
    assert fingerprint(reversed(named)) == one
    for dtype in (torch.bfloat16, torch.float64):
        assert fingerprint((name, shape, None if x is None else x.to(dtype)) for name, shape, x in named) == one
    strided = table.T.contiguous().T
    assert fingerprint([*named[:2], ("table", (500, 3), nn.Parameter(strided))]) == one

    first, last = table.clone(), table.clone()
    first[0, 0] += 1
    last[-1, -1] += 1
    others = [
        named[:2],
        [*named[1:], ("l.weight", (6, 8), None)],
        [*named[1:], ("k.weight", (8, 6), None)],
        [*named[1:], ("l.weight", (8, 6), weight)],
        [*named[:2], ("table", (500, 3), first)],
        [*named[:2], ("table", (500, 3), last)],
        [],
    ]
    assert len({one, *(fingerprint(other) for other in others)}) == 8
    fingerprint([("none", (0, 3), torch.empty(0, 3)), ("one", (), torch.tensor(1.0))])
