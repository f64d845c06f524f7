"""nn.Linear4bit and fp.quantize: what bitsandbytes' layer gets wrong on a CPU, checkpoints both ways, every mode and move."""

from __future__ import annotations

import copy
import io
import pickle
import sys

import _ranks
import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from _close import assert_close
from conftest import BUT_INTERPRETED
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastpeft as fp
from fastpeft.nn import Linear4bit

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::FutureWarning")]
SHAPES = [(48, 80), (64, 128), (33, 72), (5, 7), (100, 4304 // 16), (1, 1)]
KINDS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def made(n=48, k=80, quant_type="nf4", double_quant=True, bias=True, dtype=torch.float32, **settings):
    linear = nn.Linear(k, n, bias=bias, dtype=dtype)
    return Linear4bit.from_linear(linear, quant_type, double_quant=double_quant, **settings)


def theirs(n=48, k=80, quant_type="nf4", double_quant=True, bias=True, dtype=torch.float32, **settings):
    layer = bnb.nn.Linear4bit(
        k, n, bias=bias, quant_type=quant_type, compress_statistics=double_quant, compute_dtype=None, **settings
    )
    return layer.to(dtype).to("cpu")  # quantises; an integer weight would not be cast


def assert_right(layer, x, of=None):
    """y = x Wᵀ + bias of the dequantised weight (`of`: our layer that has it), and x's gradient, by the rule of `_close`."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    dy = torch.randn(y.shape).to(y.dtype)
    y.backward(dy)
    w = (of or layer).weight4bit.dequantize(torch.float32)
    bias = None if layer.bias is None else layer.bias.detach()
    same_x = x.detach().clone().requires_grad_()
    same = F.linear(same_x, w.to(x.dtype), None if bias is None else bias.to(x.dtype))
    same.backward(dy)
    exact_x = x.detach().double().requires_grad_()
    exact = F.linear(exact_x, w.double(), None if bias is None else bias.double())
    exact.backward(dy.double())
    assert y.dtype == x.dtype
    terms = x.detach().double().abs() @ w.double().abs().t()
    assert_close(y, same, exact, "y", terms=terms if terms.numel() else None)
    back = dy.double().abs() @ w.double().abs()
    assert_close(x.grad, same_x.grad, exact_x.grad, "x.grad", terms=back if back.numel() else None)


def dense(layer):
    """A float32 nn.Linear of the same values, for float64."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    linear.weight = nn.Parameter(layer.weight4bit.dequantize(torch.float32), requires_grad=False)
    linear.bias = layer.bias
    return copy.deepcopy(linear)


def same_state(one, two):
    assert list(one) == list(two)
    for key in one:
        assert one[key].dtype == two[key].dtype and one[key].shape == two[key].shape, key
        a, b = (
            t[key].view(torch.uint8) if key.endswith("weight") else t[key] for t in (one, two)
        )  # bytes can spell NaN
        assert torch.equal(a, b), key


# ---- the call ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BUT_INTERPRETED, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, k", SHAPES)
def test_numerics(n, k, dtype, backend):
    layer = made(n, k, dtype=dtype)
    assert_right(layer, torch.randn(3, k, dtype=dtype))
    assert_right(layer.eval(), torch.randn(2, 2, k, dtype=dtype))


@pytest.mark.parametrize("quant_type, double_quant", KINDS)
def test_kinds(quant_type, double_quant):
    layer = made(quant_type=quant_type, double_quant=double_quant, blocksize=128)
    assert_right(layer, torch.randn(3, 80))
    assert f"quant_type={quant_type}, blocksize=128, double_quant={double_quant}" in repr(layer)


def test_compute_dtype_and_autocast():
    layer, x = made(), torch.randn(3, 80)
    layer.compute_dtype = torch.bfloat16
    expected = fp.ops.linear4bit(x.bfloat16(), layer.weight4bit, layer.bias).float()
    assert torch.equal(layer(x), expected) and layer(x.half()).dtype == torch.float16
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(layer(x), expected)  # compute_dtype stands
        layer.compute_dtype = None
        half = fp.ops.linear4bit(x.half(), layer.weight4bit, layer.bias)
        assert torch.equal(layer(x), half.float())
    with pytest.raises(TypeError, match="x must be floating, got torch.uint8"):
        layer(torch.zeros(2, 80, dtype=torch.uint8))
    with pytest.raises(TypeError, match="or set compute_dtype"):
        layer(x.double())
    layer.compute_dtype = torch.float32
    assert layer(x.double()).dtype == torch.float64


def test_a_forward_changes_nothing():
    layer, x = made(64, 128), torch.randn(3, 128)
    before, parameter = copy.deepcopy(layer.state_dict()), layer.weight
    address = layer.weight4bit.data.data_ptr()
    for training in (False, True, False):
        layer.train(training)
        layer(x)
        with torch.no_grad():
            layer(x)
        with torch.inference_mode():
            layer(x)
        assert_right(layer, x)
    assert layer.weight is parameter and layer.weight4bit.data.data_ptr() == address
    same_state(layer.state_dict(), before)


def test_weight4bit_is_one_object_until_something_changes():
    layer = made()
    weight = layer.weight4bit
    layer(torch.randn(2, 80))
    layer(torch.randn(2, 80).bfloat16())
    assert layer.weight4bit is weight and weight.tiled
    untiled = made(tile=False)
    same = untiled.weight4bit
    untiled(torch.randn(2, 80))
    assert untiled.weight4bit is same and same.data.data_ptr() == untiled.weight.data_ptr()
    other = made().weight4bit
    layer.weight.data = other.packed.clone()
    assert layer.weight4bit is not weight and torch.equal(layer.weight4bit.data, other.data)
    layer.weight = nn.Parameter(weight.packed.clone(), requires_grad=False)
    assert torch.equal(layer.weight4bit.data, weight.data)


# ---- the order of the weight's bytes -------------------------------------------------------------------------------------

LOOKS = {
    "data": lambda p: p.data,
    "detach": lambda p: p.detach(),
    "view": lambda p: p.view(-1, 1),
    "clone": lambda p: p.clone(),
    "to": lambda p: p.to(torch.uint8).data,
    "numpy": lambda p: torch.from_numpy(p.numpy()),
    "a function": lambda p: torch.cat([p, p])[: len(p)],
    "deepcopy": lambda p: copy.deepcopy(p).data,
    "pickle": lambda p: pickle.loads(pickle.dumps(p)).data,
    "theirs": lambda p: copy.copy(p).data,
    "indices": lambda p: p[:],
    "chunks": lambda p: torch.cat([part.data for part in p.chunk(3)]),
    "storage": lambda p: torch.tensor(p.untyped_storage().tolist(), dtype=torch.uint8).view(-1, 1),
}


@pytest.mark.parametrize("how", LOOKS)
def test_a_look_finds_bitsandbytes_order(how):
    layer, x = made(), torch.randn(2, 80)
    expected, y = layer.weight4bit.packed, layer(x)
    ((_, weight),) = ((name, p) for name, p in layer.named_parameters() if name == "weight")
    assert layer.weight4bit.tiled and weight.shape == expected.shape and weight.dtype == torch.uint8
    assert (
        weight.numel() * weight.element_size() == expected.numel() and not weight.requires_grad and weight.grad is None
    )
    assert layer.weight4bit.tiled  # none of these was a look
    got = LOOKS[how](weight)
    assert torch.equal(got, expected)
    kept = got.clone()
    assert torch.equal(layer(x), y) and layer.weight4bit.tiled  # tiled again
    assert torch.equal(got, kept) and torch.equal(weight, kept)


def test_nothing_is_held_twice():
    layer = made(64, 128)
    size = 64 * 128 // 2
    for _ in range(2):
        layer(torch.randn(2, 128))
        tiles = layer.weight4bit.data.untyped_storage()
        with torch._C.DisableTorchFunctionSubclass():
            assert layer.weight.untyped_storage().data_ptr() == tiles.data_ptr() and tiles.nbytes() == size
        del tiles
        state = layer.state_dict()
        assert state["weight"].data_ptr() == layer.weight.data_ptr() == layer._held.whole.data.data_ptr()
        extra = sum(t.nbytes for k, t in state.items() if k not in ("weight", "bias", "weight.absmax"))
        assert extra < 2048 and state["weight.absmax"].data_ptr() == layer.form.scales.data_ptr()


def test_a_state_dict_keeps_its_values():
    layer, other = made(), made()
    state = layer.state_dict()
    before = copy.deepcopy(state)
    layer(torch.randn(2, 80))
    layer.set_weight(other.weight4bit)
    layer(torch.randn(2, 80))
    same_state({k: v for k, v in state.items() if k != "bias"}, {k: v for k, v in before.items() if k != "bias"})


def test_writing_through_a_look_is_seen():
    layer, other, x = made(bias=False), made(bias=False), torch.randn(2, 80)
    layer(x)
    form = copy.copy(layer.weight4bit.untile())
    layer.weight.copy_(other.weight)
    expected = fp.Weight4bit(
        other.weight4bit.packed.view(-1), form.scales, form.nested_absmax, form.offset, form.shape, form.dtype,
        form.quant_type, form.blocksize,
    )  # fmt: skip
    assert torch.equal(layer.weight4bit.packed, expected.packed)
    assert torch.equal(layer(x), fp.ops.linear4bit(x, expected.tile()))
    layer.weight.data = torch.empty(0, dtype=torch.uint8)  # as ZeRO-3 leaves it
    with pytest.raises(RuntimeError, match="a part of its bytes"):
        layer(x)
    layer.weight.data = expected.packed
    assert torch.equal(layer(x), fp.ops.linear4bit(x, expected.tile()))


def test_modes_see_no_change_of_order():
    """Neither a dispatch mode, nor inference mode, nor a functorch transform takes part when a forward tiles."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    layer, x = made(), torch.randn(2, 80, requires_grad=True)
    y = layer(x)
    layer.state_dict()
    with Seen() as seen:
        layer.weight4bit  # noqa: B018
        layer.state_dict()
    assert not [name for name in seen.names if "cat" in name or "copy" in name or "clone" in name]
    with torch.inference_mode():
        layer(x)
    assert torch.equal(layer(x), y)
    layer(x).sum().backward()  # the tiles are no inference tensors
    layer.state_dict()
    torch.func.grad(lambda x: (layer.weight4bit, x.sum())[1])(torch.ones(80))
    assert layer.weight4bit.tiled and torch.equal(layer(x), y)


def test_threads():
    """Looks and forwards at once: each finds the weight whole."""
    import concurrent.futures

    layer, x = made(64, 128), torch.randn(2, 128)
    y, packed = layer(x), layer.weight4bit.packed
    right = (
        y,
        copy.deepcopy(layer).untile_()(x),
    )  # after a look the bytes lie in the other order, whose kernels sum in another

    def call(i):
        if i % 2 == 0:
            return torch.equal(layer.weight.detach(), packed)
        found = layer(x)
        return any(torch.equal(found, one) for one in right)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(400)))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    layer, x = made(), torch.randn(3, 80, requires_grad=True)
    layer(x).square().sum().backward()
    expected = x.grad.clone()
    x.grad = None
    checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("tile", [True, False])
def test_compile(tile):
    layer, x = made(tile=tile, dtype=torch.bfloat16), torch.randn(3, 80, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    expected = x.grad.clone()
    x.grad = None
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert torch.equal(x.grad, expected)
    layer.load_state_dict(made(dtype=torch.bfloat16).state_dict())
    y = layer(x)  # first: it lays out tiles, whose kernels may round otherwise than those over the loaded order
    assert torch.equal(compiled(x), y)  # a graph holds no bytes


@pytest.mark.parametrize("before", ["a forward", "a look"])
def test_compile_finds_tiles(before):
    """A graph is traced with tiles, runs on them, and a look between two calls gives it one more graph, not one a look."""
    layer, x = made(64, 128), torch.randn(3, 128)
    y = layer(x)
    if before == "a look":
        layer.state_dict()
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(layer, fullgraph=True, backend=lambda graph, _: graphs.append(1) or graph.forward)
    for _ in range(2):
        assert torch.equal(compiled(x), y) and layer._held.form.tiled and len(graphs) == 1
    untiled = copy.deepcopy(layer).untile_()(x)
    for _ in range(3):
        layer.state_dict()
        assert torch.equal(compiled(x), untiled) and len(graphs) == 2
        layer(x)
        assert torch.equal(compiled(x), y) and layer._held.form.tiled and len(graphs) == 2


# ---- what bitsandbytes' layer gets wrong on a CPU ---------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [False, True])
def test_columns_that_a_block_does_not_divide(double_quant):
    """Defect 1: with K % 16 == 0 and K % blocksize != 0 (SigLIP's 4304) it multiplies by other blocks' scales."""
    linear = nn.Linear(4304, 16)
    linear.weight.data *= torch.linspace(0.01, 10, 4304 * 16).view(16, 4304)  # the scales differ
    layer = Linear4bit.from_linear(linear, double_quant=double_quant)
    error = (layer.dequantize() - linear.weight).norm() / linear.weight.norm()
    assert error < 0.12
    assert_right(layer.eval(), torch.randn(2, 4304))


@pytest.mark.parametrize("quant_type, double_quant", KINDS)
def test_eval_keeps_the_checkpoint(quant_type, double_quant):
    """Defect 2: its eval forward packs the weight in place, and a state_dict then has other scales of another shape."""
    layer = made(64, 128, quant_type, double_quant).eval()
    before = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        y = layer(torch.ones(2, 128))
    same_state(layer.state_dict(), before)
    again = made(64, 128, quant_type, double_quant)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.eval()(torch.ones(2, 128)), y)


@pytest.mark.parametrize("n, k", [(100, 128), (64, 80), (33, 65)])
def test_eval_of_any_shape(n, k):
    """Defect 3: its eval forward raises where N % 32 or K % 64 is not 0."""
    layer = made(n, k).eval()
    assert_right(layer, torch.randn(3, k))


def test_input_gradient_after_eval():
    """Defect 4: after an eval forward, train() gives no input gradient at all."""
    layer = made(64, 128).eval()
    layer(torch.randn(2, 128))
    assert_right(layer.train(), torch.randn(2, 128))
    assert_right(layer.eval(), torch.randn(2, 128))


def test_to_after_eval():
    """Defect 5: `.to()` of a packed layer takes its packed bytes for the original ones."""
    layer = made(64, 128).eval()
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(2, 128))
    layer.to("cpu").to(torch.float32).cpu()
    same_state(layer.state_dict(), before)


# ---- moves, casts and copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("tile", [False, True])
def test_casts_leave_the_bits(tile, double_quant):
    layer = made(double_quant=double_quant, tile=tile)
    before, parameter = copy.deepcopy(layer.weight4bit.state_dict()), layer.weight
    for cast in ("half", "bfloat16", "float", "double"):
        getattr(layer, cast)()
        same_state(layer.weight4bit.state_dict(), before)
    assert layer.bias.dtype == torch.float64
    layer.to(torch.float16).type(torch.float32)  # type() casts every parameter
    same_state(layer.weight4bit.state_dict(), before)
    assert layer.weight is parameter and layer.bias.dtype == torch.float32 and layer.weight4bit.tiled == tile


def test_meta():
    layer = made()
    state, x = layer.state_dict(), torch.randn(2, 80)
    y = layer(x)
    layer.to("meta")
    assert layer.weight.is_meta and layer.weight4bit.scales.is_meta and layer.weight.shape == (48 * 80 // 2, 1)
    with pytest.raises((ValueError, RuntimeError), match="got meta"):
        layer(x)
    with pytest.raises(RuntimeError, match="on the meta device; load with assign=True"):
        layer.load_state_dict(state)
    layer.load_state_dict(state, assign=True)
    assert torch.equal(layer(x), y) and layer.weight4bit.tiled
    empty = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    empty.load_state_dict(state)
    assert torch.equal(empty(x), y)
    with pytest.raises(ValueError, match="meta device"):
        Linear4bit.from_linear(nn.Linear(4, 4, device="meta"))


@pytest.mark.parametrize("tile", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how, tile):
    layer, x = made(tile=tile), torch.randn(2, 80)
    y = layer(x)
    if how == "deepcopy":
        twin = copy.deepcopy(layer)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert torch.equal(twin(x), y) and twin.weight.data_ptr() != layer.weight.data_ptr()
    twin.set_weight(made().weight4bit)
    assert torch.equal(layer(x), y) and not torch.equal(twin(x), y)
    assert len(pickle.dumps(layer)) < 4 * layer.weight4bit.nbytes  # nothing twice


def test_tile_and_untile():
    layer = made()
    tiled, parameter = layer.weight4bit.data, layer.weight
    native = layer.weight4bit.packed
    layer.untile_()
    assert torch.equal(layer.weight, native) and layer.weight is parameter and layer.weight.shape == (48 * 80 // 2, 1)
    layer.to("cpu")
    assert not layer.weight4bit.tiled
    assert torch.equal(layer.tile_().weight4bit.data, tiled) and layer.weight is parameter


@pytest.mark.parametrize("tile", [True, False])
def test_accelerate_offload(tile):
    accelerate = pytest.importorskip("accelerate")
    x = torch.randn(2, 80)
    model = nn.Sequential(made(80, 80, tile=tile), nn.ReLU(), made(48, 80, tile=tile)).eval()
    y, exact = model(x), x.double()
    with torch.no_grad():
        for layer in model:
            exact = layer(exact) if isinstance(layer, nn.ReLU) else dense(layer).double()(exact)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    for _ in range(2):
        assert_close(model(x), y, exact)
        assert model[0].weight.is_meta


# ---- checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type, double_quant", KINDS)
@pytest.mark.parametrize("tile", [True, False])
def test_bitsandbytes_checkpoints_both_ways(quant_type, double_quant, tile):
    bits = theirs(48, 128, quant_type, double_quant)  # K = 80 is one of those that it computes wrongly
    layer = made(48, 128, "fp4" if quant_type == "nf4" else "nf4", not double_quant, tile=tile)
    parameter = layer.weight
    assert layer.load_state_dict(bits.state_dict()) == ([], [])
    same_state(layer.state_dict(), bits.state_dict())
    assert layer.weight is parameter and layer.weight4bit.tiled == tile
    x = torch.randn(3, 128)
    assert_right(layer, x)

    stats = {k.removeprefix("weight."): v for k, v in layer.state_dict().items() if k.startswith("weight.")}
    back = bnb.nn.Linear4bit(128, 48, compute_dtype=torch.float32)
    back.weight = bnb.nn.Params4bit.from_prequantized(layer.state_dict()["weight"], stats, device="cpu")
    back.bias = layer.bias
    assert_right(back, x, of=layer)
    same_state(back.state_dict(), bits.state_dict())


def test_loading_keeps_nothing_of_the_checkpoint():
    layer, state = made(), made().state_dict()
    layer.load_state_dict(state)
    before, x = copy.deepcopy(layer.state_dict()), torch.randn(2, 80)
    layer.state_dict()["weight.quant_map"].zero_()
    for tensor in state.values():
        tensor.zero_()
    same_state(layer.state_dict(), before)
    assert_right(layer, x)


@pytest.mark.parametrize("assign", [False, True])
def test_strict_and_missing_keys(assign):
    model, state = nn.Sequential(made()), nn.Sequential(made()).state_dict()
    assert model.load_state_dict(state, assign=assign) == ([], [])
    without = {k: v for k, v in state.items() if k != "0.bias"} | {
        "0.weight.extra": torch.ones(1),
        "0.c": torch.ones(1),
    }
    found = model.load_state_dict(without, strict=False, assign=assign)
    assert found.missing_keys == ["0.bias"] and set(found.unexpected_keys) == {"0.weight.extra", "0.c"}
    with pytest.raises(RuntimeError, match=r'Missing key.*"0.bias"'):
        model.load_state_dict(without, assign=assign)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key.*"0.weight", "0.weight.absmax"'):
        model.load_state_dict({"0.bias": state["0.bias"]}, assign=assign)
    assert model.load_state_dict({}, strict=False, assign=assign).missing_keys
    same_state(model.state_dict(), before)


def change(state, key, value):
    return {k: value if k.endswith(key) else v for k, v in state.items()}


BAD = {
    "dense": (lambda s: {"weight": torch.randn(48, 80), "bias": s["bias"]}, "dense weight"),
    "truncated": (lambda s: change(s, "weight", s["weight"][:-1]), "bytes for shape"),
    "no scales": (lambda s: {k: v for k, v in s.items() if k != "weight.absmax"}, "weight.absmax is missing"),
    "no state": (lambda s: {k: v for k, v in s.items() if "quant_state" not in k}, "exactly one key"),
    "short scales": (lambda s: change(s, "weight.absmax", s["weight.absmax"][:-1]), "weight.absmax must be"),
    "NaN": (lambda s: change(s, "weight.nested_absmax", s["weight.nested_absmax"] * float("nan")), "must be finite"),
    "other shape": (lambda s: made(80, 48).state_dict() | {"bias": s["bias"]}, r"must be \[N, K\] = \[48, 80\]"),
    "no JSON": (lambda s: change(s, "__nf4", torch.zeros(4, dtype=torch.uint8)), "must be JSON"),
    "bias": (lambda s: change(s, "bias", torch.zeros(47)), r"bias must be \[48\], got \[47\]"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", BAD)
def test_bad_checkpoints_leave_the_layer(name, strict):
    layer = made()
    before = copy.deepcopy(layer.state_dict())
    spoil, message = BAD[name]
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(spoil(made().state_dict()), strict=strict)
    same_state(layer.state_dict(), before)


def test_keep_vars_and_hooks():
    layer = made(tile=False)
    assert layer.state_dict(keep_vars=True)["weight"] is layer.weight
    assert (
        layer.state_dict(keep_vars=True)["bias"] is layer.bias
        and made().state_dict(keep_vars=True)["weight"].dim() == 2
    )
    seen = []
    layer.register_load_state_dict_pre_hook(lambda module, state, prefix, *rest: seen.append(prefix))
    layer.load_state_dict(made().state_dict())
    assert seen == [""]


# ---- layers of bitsandbytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type, double_quant", KINDS)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_from_and_to_bitsandbytes(quant_type, double_quant, storage):
    bits = theirs(48, 128, quant_type, double_quant, quant_storage=storage)
    layer = Linear4bit.from_bitsandbytes(bits)
    assert layer.bias is bits.bias and layer.weight4bit.tiled
    same_state(layer.state_dict(), bits.state_dict())
    back = layer.to_bitsandbytes()
    same_state(back.state_dict(), bits.state_dict())
    assert type(back) is type(bits) and back.__dict__.keys() == bits.__dict__.keys()
    assert back.weight.__dict__.keys() == bits.weight.__dict__.keys()
    for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage", "bnb_quantized"):
        assert getattr(back.weight, name) == getattr(bits.weight, name), name
    for name in ("compute_dtype", "compute_type_is_set", "quant_storage", "in_features", "training"):
        assert getattr(back, name) == getattr(bits, name), name
    assert back.weight.quant_state == bits.weight.quant_state and back.quant_state is back.weight.quant_state
    x = torch.randn(3, 128)
    assert torch.equal(back(x), bits(x))
    assert_right(layer, x)
    assert_right(bits, x, of=layer)


def test_subclasses_and_layers_made_here():
    bits = bnb.nn.LinearNF4(80, 48, compute_dtype=torch.bfloat16).to("cpu")
    layer = Linear4bit.from_bitsandbytes(bits, tile=False)
    assert layer.compute_dtype == torch.bfloat16 and not layer.weight4bit.tiled
    assert type(layer.to_bitsandbytes()) is bnb.nn.LinearNF4
    layer = made(bias=False)
    back = layer.to_bitsandbytes()
    same_state(back.state_dict(), layer.state_dict())
    assert back.bias is None and type(back) is bnb.nn.Linear4bit


@pytest.mark.parametrize("quant_type, double_quant", KINDS)
def test_a_repacked_layer(quant_type, double_quant):
    """After bitsandbytes' eval forward (on CPUs with AVX512-BF16) its codes come back exactly, its scales rounded."""
    bits = theirs(64, 128, quant_type, double_quant)
    before = copy.deepcopy(bits.state_dict())
    weight, state = bnb.functional._convert_weight_packed_for_cpu(bits.weight.data, bits.weight.quant_state)
    bits.weight.data = weight
    assert state.packing_format_for_cpu
    exact = Linear4bit.from_bitsandbytes(theirs(64, 128, quant_type, double_quant))
    exact.load_state_dict(before)
    with pytest.warns(UserWarning, match="rounded the scales"):
        layer = Linear4bit.from_bitsandbytes(bits)
    assert torch.equal(layer.state_dict()["weight"], before["weight"]) and layer.state_dict().keys() == before.keys()
    off = (layer.dequantize() - exact.dequantize()).norm() / exact.dequantize().norm()
    assert 0 < off < (0.01 if double_quant else 0.004)


def test_layers_that_are_not_quantised_are_refused():
    with pytest.raises(ValueError, match="not quantised yet"):
        Linear4bit.from_bitsandbytes(bnb.nn.Linear4bit(8, 8))
    with pytest.raises(ValueError, match="got a Linear, not a bitsandbytes"):
        Linear4bit.from_bitsandbytes(nn.Linear(8, 8))


def test_wrong_arguments():
    with pytest.raises(TypeError, match="weight must be an fp.Weight4bit, got Tensor"):
        Linear4bit(torch.randn(4, 4))
    weight = fp.ops.quantize_4bit(torch.randn(4, 4))
    with pytest.raises(ValueError, match=r"bias must be floating \[N\] = \[4\]"):
        Linear4bit(weight, torch.zeros(5))
    with pytest.raises(ValueError, match="compute_dtype must be"):
        Linear4bit(weight, compute_dtype=torch.int8)
    with pytest.raises(TypeError, match="linear must be a dense torch.nn.Linear"):
        Linear4bit.from_linear(Linear4bit(weight))
    with pytest.raises(ValueError, match=r"weight must be \[N, K\] = \[4, 4\], got \[4, 8\]"):
        Linear4bit(weight).set_weight(fp.ops.quantize_4bit(torch.randn(4, 8)))


# ---- quantize --------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 80)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(80, 48), nn.ReLU(), nn.Linear(48, 80)) for _ in range(2)])
        self.lm_head = nn.Linear(80, 11)

    def forward(self, ids):
        h = self.embed(ids)
        for block in self.blocks:
            h = h + block(h)
        return self.lm_head(h)


def test_quantize():
    model = Net().eval()
    biases = [block[0].bias for block in model.blocks]
    kept = copy.deepcopy(model)
    ids = torch.arange(6).view(2, 3)
    assert fp.quantize(model, "nf4") is model
    assert sum(isinstance(module, Linear4bit) for module in model.modules()) == 4 and type(model.lm_head) is nn.Linear
    assert [block[0].bias for block in model.blocks] == biases and not biases[0].requires_grad
    assert not model.blocks[0][0].training and model.blocks[0][0].weight4bit.nested
    for block, dense in zip(model.blocks, kept.blocks):
        weight = fp.ops.quantize_4bit(dense[0].weight.detach(), double_quant=True)
        assert torch.equal(block[0].weight4bit.packed, weight.packed)
    off = (model(ids) - kept(ids)).norm() / kept(ids).norm()
    assert 0 < off < 0.2
    with pytest.raises(ValueError, match="4 layers are in 4 bits already"):
        fp.quantize(model)


def test_quantize_options_and_root():
    layer = fp.quantize(nn.Linear(80, 48), "fp4", blocksize=128, double_quant=False, tile=False)
    assert isinstance(layer, Linear4bit) and layer.weight4bit.quant_type == "fp4" and layer.weight4bit.blocksize == 128
    assert not layer.weight4bit.tiled and not layer.weight4bit.nested
    model = fp.quantize(Net(), skip=("blocks",))
    assert isinstance(model.lm_head, Linear4bit) and type(model.blocks[0][0]) is nn.Linear
    shared = nn.Linear(8, 8)
    model = fp.quantize(nn.Sequential(shared, nn.ReLU(), shared))
    assert model[0] is model[2] and isinstance(model[0], Linear4bit)


def test_quantize_leaves_what_it_must_not_touch():
    model = Net()
    model.lm_head.weight = model.embed.weight
    model.blocks[0][0].register_forward_hook(lambda *args: None)
    nn.utils.parametrizations.weight_norm(model.blocks[0][2])
    with pytest.warns(UserWarning) as caught:
        fp.quantize(model, skip=())
    text = str(caught[-1].message)
    assert "left 3 dense layers" in text and caught[-1].filename == __file__
    assert "blocks.0.0: it has hooks" in text and "blocks.0.2: it has parametrisations" in text
    assert "lm_head: its weight is shared with another module" in text
    assert [type(block[0]).__name__ for block in model.blocks] == ["Linear", "Linear4bit"]
    encoder = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 16)).eval()
    with pytest.warns(UserWarning, match="reads its weight without calling it"):
        fp.quantize(encoder)
    with torch.no_grad():
        encoder(torch.randn(2, 3, 16))


def test_quantize_checks_everything_first():
    model = Net()
    model.blocks[1][2].weight.data[3, 4] = float("inf")
    with pytest.raises(ValueError, match=r"blocks\.1\.2\.weight must be finite"):
        fp.quantize(model)
    assert not any(isinstance(module, Linear4bit) for module in model.modules())
    with pytest.raises(ValueError, match="got torch.float64; nothing was changed"):
        fp.quantize(Net().double())
    with pytest.raises(ValueError, match="meta device"):
        fp.quantize(Net().to("meta"))
    with pytest.raises(ValueError, match="Looked for modules of exactly torch.nn.Linear"):
        fp.quantize(nn.ReLU())
    with pytest.raises(TypeError, match="model must be"):
        fp.quantize("model")
    with pytest.raises(ValueError, match="quant_type must be 'nf4' or 'fp4', got 'int4'"):
        fp.quantize(Net(), "int4")
    with pytest.raises(ValueError, match="blocksize must be"):
        fp.quantize(Net(), blocksize=65)
    with pytest.raises(TypeError, match="skip must be a sequence of module names, got 'lm_head'"):
        fp.quantize(Net(), skip="lm_head")


def test_lora_linear_over_4_bits():
    """nn.LoraLinear takes a Linear4bit, quantize takes a LoraLinear's base; merging keeps the original."""
    layer = fp.nn.LoraLinear(nn.Linear(80, 48), r=4)
    nn.init.normal_(layer.lora_b)
    fp.quantize(layer)
    x = torch.randn(3, 80)
    base, y = layer.base(x), layer(x)
    update = layer.scale * (x @ layer.lora_a.t()) @ layer.lora_b.t()
    a, b = layer.lora_a.double(), layer.lora_b.double()
    exact = dense(layer.base).double()(x.double()) + layer.scale * x.double() @ a.t() @ b.t()
    assert_close(y, base + update, exact)
    bits = copy.deepcopy(layer.base.state_dict())
    layer.merge()
    assert 0 < layer.base.merge_error < 0.2 and not torch.equal(layer(x), base)
    assert (layer(x) - y).norm() / y.norm() < 0.3
    layer.unmerge()
    same_state(layer.base.state_dict(), bits)
    assert torch.equal(layer(x), y) and layer.base.merge_error is None
    layer.base.compute_dtype = torch.bfloat16
    assert layer(x).dtype == torch.float32 and not torch.equal(layer(x), y)


# ---- FSDP2 on two ranks -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return _ranks.run(__file__, tmp_path_factory.mktemp("ranks"))


def test_fsdp2(ranks):
    """Sharded training is unsharded training, bit for bit, also in FSDP2's bfloat16; shards are in bitsandbytes' order."""
    for found in ranks:
        assert found["sharded"], "no weight was sharded"
        for name, (got, expected) in found["training"].items():
            for one, two in zip(got, expected, strict=True):
                assert torch.equal(one, two), name
        for got, expected in found["states"]:
            assert torch.equal(got, expected)
        assert "quantize before fully_shard" in found["late"]


def _rank() -> dict:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    def model(tile):
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(80, 48), nn.ReLU(), nn.Linear(48, 81))
        fp.quantize(made, tile=tile)
        for i in (0, 2):
            made[i] = fp.nn.LoraLinear(made[i], r=4)
            nn.init.normal_(made[i].lora_b)
        return made

    def train(made, dtype):
        results = []
        for step in range(2):
            made.zero_grad()
            torch.manual_seed(step)
            y = made(torch.randn(3, 80).to(dtype))
            y.float().square().mean().backward()
            grads = [p.grad for p in made.parameters() if p.requires_grad]
            results += [y.detach(), *(g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads)]
        return [t.float() for t in results]

    def shard(made, dtype=None):
        for i in (0, 2):
            fully_shard(made[i], mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
        return fully_shard(made, mp_policy=MixedPrecisionPolicy(param_dtype=dtype))

    training, states, whole = {}, [], model(False)
    # As accelerate leaves a Params4bit of uint8 alone, beside what is sharded
    ignoring = model(True)
    fully_shard(ignoring, ignored_params={ignoring[i].base.weight for i in (0, 2)})
    training["ignored"] = train(ignoring, torch.float32), train(model(True), torch.float32)
    # bitsandbytes' way to shard: bytes seen as floats
    stored = model(True)
    for i in (0, 2):
        bits = stored[i].base.weight4bit.untile()
        stored[i].base = Linear4bit(bits, stored[i].base.bias, quant_storage=torch.bfloat16)
    training["stored as bfloat16"] = train(shard(stored), torch.float32), train(whole, torch.float32)
    for i in (0, 2):
        sharded, expected = stored.state_dict()[f"{i}.base.weight"].full_tensor(), whole[i].base.weight.detach()
        states.append((sharded.flatten().view(torch.uint8), expected.flatten()))
    for name, tile, dtype in (("native", False, None), ("tiled", True, None), ("bfloat16", False, torch.bfloat16)):
        plain = model(False)  # as shards are
        if dtype is not None:
            plain.to(dtype)
        sharded = shard(model(tile), dtype)
        training[name] = train(sharded, dtype or torch.float32), train(plain, dtype or torch.float32)
        if name in ("native", "tiled"):
            state, expected = sharded.state_dict(), whole.state_dict()
            states += [
                (t.full_tensor() if hasattr(t, "full_tensor") else t, expected[k])
                for k, t in state.items()
                if "weight" in k
            ]
    try:
        fp.quantize(shard(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))))
    except RuntimeError as error:
        late = str(error)
    return {
        "training": training, "states": states, "late": late,
        "sharded": hasattr(sharded[0].base.weight, "full_tensor"),
    }  # fmt: skip


if __name__ == "__main__":
    import torch.distributed

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    torch.save(_rank(), sys.argv[1])
    torch.distributed.destroy_process_group()
