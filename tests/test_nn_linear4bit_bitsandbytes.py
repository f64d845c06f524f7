"""A Linear4bit is bitsandbytes' layer to who asks, its weight a Params4bit, and it takes what others assign to that."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import bitsandbytes as bnb
import peft
import pytest
import torch
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight
from torch import nn

import fastpeft as fp
from fastpeft.nn import Linear4bit

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::FutureWarning")]
KINDS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)]


def made(n=48, k=128, quant_type="nf4", double_quant=True, dtype=torch.float32, **settings):
    return Linear4bit.from_linear(nn.Linear(k, n, dtype=dtype), quant_type, double_quant=double_quant, **settings)


def theirs(n=48, k=128, quant_type="nf4", double_quant=True, **settings):
    settings = {"quant_type": quant_type, "compress_statistics": double_quant, "compute_dtype": None} | settings
    return bnb.nn.Linear4bit(k, n, **settings).to("cpu")


def same_bytes(one, two):
    assert list(one) == list(two)
    for key in one:
        assert one[key].dtype == two[key].dtype and one[key].shape == two[key].shape, key
        assert torch.equal(*(t[key].reshape(-1).view(torch.uint8) for t in (one, two))), key


def test_is_bitsandbytes():
    layer = made()
    assert (
        isinstance(layer, Linear4bit) and isinstance(layer, bnb.nn.Linear4bit) and type(layer).__name__ == "Linear4bit"
    )
    assert isinstance(layer.weight, bnb.nn.Params4bit) and type(layer.weight).__name__ == "Params4bit"
    for attribute in ("compute_type_is_set", "quant_storage", "support_avx512bf16_for_cpu"):
        assert hasattr(layer, attribute)
    assert layer.weight.__dict__ == {
        "blocksize": 64, "compress_statistics": True, "quant_type": "nf4", "quant_storage": torch.uint8,
        "bnb_quantized": True, "module": None,
    }  # fmt: skip


@pytest.mark.parametrize("quant_type, double_quant", KINDS)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_the_state_is_bitsandbytes(quant_type, double_quant, storage):
    """Through the layer and through `named_parameters`, whatever ran before, under every name that a checkpoint has."""
    bits = theirs(48, 128, quant_type, double_quant, quant_storage=storage)
    layer = Linear4bit.from_bitsandbytes(bits)
    expected = bnb.functional.dequantize_4bit(bits.weight.data, bits.weight.quant_state)
    for _ in range(2):
        layer(torch.randn(2, 128))
        weight = dict(layer.named_parameters())["weight"]
        assert layer.weight4bit.tiled and weight.dtype == storage and weight.shape == bits.weight.shape
        state = weight.quant_state
        assert state == bits.weight.quant_state and layer.quant_state == state and state.nested == double_quant
        assert torch.equal(weight.data.view(torch.uint8), bits.weight.data.view(torch.uint8))
        layer(torch.randn(2, 128))
        assert torch.equal(bnb.functional.dequantize_4bit(weight.data, weight.quant_state), expected)
    for key, value in layer.state_dict().items():
        path = key.split(".")[1:]
        if key.startswith("weight."):
            found = weight
            for name in path:
                found = getattr(found, name)
            assert torch.equal(found, value), key


def test_readers():
    layer = made()
    bits = layer.to_bitsandbytes()
    expected = bnb.functional.dequantize_4bit(bits.weight.data, bits.weight.quant_state)
    layer(torch.randn(2, 128))
    assert torch.equal(layer.dequantize(), expected)
    assert torch.equal(dequantize_module_weight(layer), expected)
    assert torch.equal(dequantize_bnb_weight(layer.weight), expected)
    model = peft.get_peft_model(nn.Sequential(layer), peft.LoraConfig(r=2, target_modules=["0"]))
    trained = 2 * (48 + 128)
    assert model.get_nb_trainable_parameters() == (trained, 48 * 128 + 48 + trained)
    moved = layer.weight.to("cpu")
    assert type(moved) is bnb.nn.Params4bit and torch.equal(dequantize_bnb_weight(moved), expected)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_bitsandbytes_too(how):
    model = nn.Sequential(made(), made(128, 48))
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert all(type(a) is type(b) and type(a.weight) is type(b.weight) for a, b in zip(model, twin, strict=True))
    same_bytes(twin.state_dict(), model.state_dict())


def test_pickles_with_and_without_bitsandbytes(tmp_path):
    layer, x = made(), torch.randn(2, 128)
    torch.save((layer, x, layer(x), layer.state_dict()), tmp_path / "with")
    code = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "import torch, fastpeft as fp\n"
        f"layer, x, y, state = torch.load({str(tmp_path / 'with')!r}, weights_only=False)\n"
        "assert type(layer) is fp.nn.Linear4bit and torch.equal(layer(x), y)\n"
        "assert torch.equal(layer.weight, state['weight']) and type(layer.weight).__name__ == 'Params4bit'\n"
        "layer(x); weight = dict(layer.named_parameters())['weight']\n"
        "assert layer.weight4bit.tiled and torch.equal(weight.detach(), state['weight'])\n"
        "layer.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)\n"
        "assert torch.equal(layer(x), y) and layer.load_state_dict(state) == ([], [])\n"
        f"torch.save(layer, {str(tmp_path / 'without')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    again = torch.load(tmp_path / "without", weights_only=False)
    assert isinstance(again, bnb.nn.Linear4bit) and isinstance(again.weight, bnb.nn.Params4bit)
    assert torch.equal(again(x), layer(x))


def test_importing_imports_no_bitsandbytes():
    code = "import sys, fastpeft; assert 'bitsandbytes' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=240).returncode == 0


# ---- assigning a weight ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type, double_quant", KINDS)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_a_quantised_weight(quant_type, double_quant, storage):
    layer, bits, x = made(), theirs(48, 128, quant_type, double_quant, quant_storage=storage), torch.randn(2, 128)
    kept, before = layer.weight4bit, layer.weight4bit.packed
    layer.weight = bits.weight
    assert isinstance(layer.weight, bnb.nn.Params4bit) and layer.weight.quant_type == quant_type
    assert layer.quant_storage == storage and layer.weight4bit.tiled and torch.equal(kept.packed, before)
    bits.bias = layer.bias
    same_bytes(layer.state_dict(), bits.state_dict())
    assert torch.equal(layer(x), Linear4bit.from_bitsandbytes(bits)(x))


def test_what_pefts_merge_assigns():
    """`Params4bit(dense, **weight.__dict__)`, twice (its `__dict__` is changed on the way), over ours and bitsandbytes'."""
    layer = made()
    bits = layer.to_bitsandbytes()
    for seed in range(2):
        for one in (layer, bits):
            weight, about = one.weight, one.weight.__dict__
            dense = dequantize_bnb_weight(weight, state=weight.quant_state)
            dense = dense + torch.randn(dense.shape, generator=torch.Generator().manual_seed(seed)) * 0.01
            about["bnb_quantized"], about["requires_grad"] = False, False
            one.weight = bnb.nn.Params4bit(dense.to("cpu"), **about).to(weight.device)
        same_bytes(layer.state_dict(), bits.state_dict())
        assert "requires_grad" not in layer.weight.__dict__ and layer.weight.bnb_quantized


def test_a_dense_params4bit_is_quantised_as_it_says():
    layer, dense = made(), torch.randn(48, 128)
    for weight in (
        bnb.nn.Params4bit(dense, requires_grad=False, **layer.weight.__dict__),  # says that it is quantised already
        type(layer.weight)(dense, quant_type="nf4", compress_statistics=True),
    ):
        layer.weight = weight
        expected = fp.ops.quantize_4bit(dense, double_quant=True)
        assert torch.equal(layer.weight4bit.packed, expected.packed) and torch.equal(
            layer.weight4bit.codes, expected.codes
        )
    layer.weight = bnb.nn.Params4bit(dense, quant_type="fp4", compress_statistics=False, blocksize=128)
    found = layer.weight4bit
    assert (found.quant_type, found.nested, found.blocksize) == ("fp4", False, 128)


def test_a_weight_of_another_layer_is_shared():
    layer, other, x = made(), made(), torch.randn(2, 128)
    layer.weight = other.weight
    assert layer.weight is other.weight and layer.weight4bit is other.weight4bit
    layer.bias = other.bias
    assert torch.equal(layer(x), other(x))
    other.set_weight(made().weight4bit)
    assert torch.equal(layer(x), other(x)) and layer.weight4bit is other.weight4bit
    layer.state_dict()
    assert layer.weight4bit is other.weight4bit and layer.weight4bit.tiled
    twin = copy.deepcopy(nn.ModuleList([layer, other]))
    assert twin[0].weight is twin[1].weight and twin[0].weight4bit is twin[1].weight4bit
    for pair in (pickle.loads(pickle.dumps(twin)), twin.half(), twin.to("cpu")):
        assert pair[0].weight is pair[1].weight and torch.equal(pair[0].weight4bit.packed, layer.weight4bit.packed)


WRONG = {
    "dense": (
        lambda: nn.Parameter(torch.randn(48, 128)),
        r"must be 3072 bytes .*got a Parameter torch.float32 \[48, 128\]",
    ),
    "another size": (lambda: nn.Parameter(torch.zeros(9, 1, dtype=torch.uint8), False), r"torch.uint8 \[9, 1\]"),
    "another layer's": (lambda: made(128, 48).weight, r"\[N, K\] = \[48, 128\], got \[128, 48\]"),
    "another's": (lambda: theirs(128, 48).weight, r"\[N, K\] = \[48, 128\], got \[128, 48\]"),
    "dense of another shape": (
        lambda: bnb.nn.Params4bit(torch.randn(48, 64)),
        r"got a Params4bit torch.float32 \[48, 64\]",
    ),
    "double": (lambda: bnb.nn.Params4bit(torch.randn(48, 128).double()), "float64"),
    "NaN": (lambda: bnb.nn.Params4bit(torch.full((48, 128), float("nan"))), "NaN"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_weight_is_refused(name):
    layer = made()
    before, weight = copy.deepcopy(layer.state_dict()), layer.weight
    make, message = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=message):
        layer.weight = make()
    assert layer.weight is weight
    same_bytes(layer.state_dict(), before)


def test_a_state_of_another_shape_is_refused():
    layer, other = made(), theirs(128, 48)
    with pytest.raises(ValueError, match=r"quant_state must be of \[48, 128\], got \[128, 48\]"):
        layer.weight.quant_state = other.weight.quant_state
    bits = theirs()
    layer.weight.data = bits.weight.data
    layer.weight.quant_state = bits.weight.quant_state
    bits.bias = layer.bias
    same_bytes(layer.state_dict(), bits.state_dict())
