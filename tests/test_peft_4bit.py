"""`apply` on PEFT's QLoRA models: bitsandbytes' bases and fp.quantize'd ones give PEFT's results, and what PEFT can do."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import warnings
from collections.abc import Iterator
from functools import partial

import bitsandbytes as bnb
import peft
import pytest
import torch
from _close import assert_close
from _peft import (
    ALL,
    adapters_in,
    assert_same_output,
    assert_same_results,
    dense,
    double,
    layers,
    output,
    path_on,
    run,
    runs,
    tokens,
)
from conftest import BUT_INTERPRETED
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import fastpeft
import fastpeft.interop.peft
from fastpeft.interop.peft_4bit import FastLoraLinear4bit
from fastpeft.nn import Linear4bit

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::FutureWarning")]
BF16_EPS = torch.finfo(torch.bfloat16).eps
SOURCES = ["bitsandbytes", "quantize"]


def llama() -> LlamaForCausalLM:
    """Every K is a multiple of 64: others bitsandbytes computes wrongly on a CPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=61, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def bitsandbytes_layers(model: nn.Module, quant_type="nf4", double_quant=True, compute_dtype=None, **settings) -> None:
    """What transformers does with a BitsAndBytesConfig."""
    for parent in list(model.modules()):
        for name, old in list(parent.named_children()):
            if type(old) is nn.Linear and name != "lm_head":
                new = bnb.nn.Linear4bit(
                    old.in_features, old.out_features, bias=old.bias is not None, compute_dtype=compute_dtype,
                    quant_type=quant_type, compress_statistics=double_quant, **settings,
                )  # fmt: skip
                about = {
                    "quant_type": quant_type,
                    "compress_statistics": double_quant,
                    "quant_storage": new.quant_storage,
                }
                new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, module=new, **about)
                new.bias = old.bias
                setattr(parent, name, new.to("cpu"))
    model.is_loaded_in_4bit = True  # asks PEFT for its 4-bit layer


def qlora(
    source="bitsandbytes", dtype=torch.float32, quant_type="nf4", double_quant=True, compute_dtype=None, **settings
):
    model = llama().to(dtype)
    if source == "quantize":
        fastpeft.quantize(model, quant_type, double_quant=double_quant)
        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.compute_dtype = compute_dtype
    else:
        bitsandbytes_layers(model, quant_type, double_quant, compute_dtype)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ALL["llama"], "init_lora_weights": False} | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    assert type(layers(model)["q_proj"]) is PeftLinear4bit
    return model.train()


def pair(source="bitsandbytes", **settings):
    plain = qlora(source, **settings)
    fast = copy.deepcopy(plain)
    return fast, fastpeft.apply(fast), plain


def assert_like_peft(fast, plain, eps=2**-23, forward=output):
    assert_same_results(runs(fast, forward), runs(plain, forward), runs(double(dense(plain))), eps)


def same_state(one, two):
    """Key by key, byte by byte (bytes seen as floats may spell NaN)."""
    assert list(one) == list(two)
    for key in one:
        assert one[key].dtype == two[key].dtype and one[key].shape == two[key].shape, key
        assert torch.equal(*(t[key].reshape(-1).view(torch.uint8) for t in (one, two))), key


def paths(report) -> set[str]:
    return {row.path for row in report.layers}


@contextlib.contextmanager
def peft_calls() -> Iterator[list[nn.Module]]:
    """The layers for which PEFT's own forward ran."""
    calls, originals = [], {kind: kind.forward for kind in (PeftLinear, PeftLinear4bit)}

    def counting(original):
        return lambda self, *args, **kwargs: (calls.append(self), original(self, *args, **kwargs))[1]

    for kind, original in originals.items():
        kind.forward = counting(original)
    try:
        yield calls
    finally:
        for kind, original in originals.items():
            kind.forward = original


# ---- results -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BUT_INTERPRETED, indirect=True)
@pytest.mark.parametrize("source", SOURCES)
def test_float32_models(source, backend):
    fast, report, plain = pair(source)
    with peft_calls() as calls:
        got = runs(fast)
    assert not calls and paths(report) == {path_on(backend)} and report.groups == 4
    assert "4-bit base (nf4, blocks of 64, 8-bit scales), products in x's dtype" in report.layers[0].arithmetic
    assert_same_results(got, runs(plain), runs(double(dense(plain))))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("quant_type, double_quant", [("nf4", False), ("fp4", True), ("fp4", False)])
def test_kinds(source, quant_type, double_quant):
    fast, report, plain = pair(source, quant_type=quant_type, double_quant=double_quant)
    assert paths(report) == {"fast"}
    assert_like_peft(fast, plain)


@pytest.mark.parametrize("backend", BUT_INTERPRETED, indirect=True)
@pytest.mark.parametrize("source", SOURCES)
def test_bfloat16_models_with_float32_adapters(source, backend):
    fast, report, plain = pair(source, dtype=torch.bfloat16)
    got = runs(fast)
    assert paths(report) == {path_on(backend)} and "float32 adapters" in report.layers[0].arithmetic
    assert all(grad.dtype == torch.float32 for name, grad in got.items() if "lora_" in name)
    assert_same_results(got, runs(adapters_in(plain, torch.bfloat16)), runs(double(dense(plain))), BF16_EPS)


@pytest.mark.parametrize("source", SOURCES)
def test_compute_dtype(source):
    """Activations in float32, products in bfloat16, as QLoRA's recipe has it."""
    fast, report, plain = pair(source, compute_dtype=torch.bfloat16)
    got = run(fast, tokens())
    assert paths(report) == {"fast"} and report.groups == 4 and "products in bfloat16" in report.layers[0].arithmetic
    assert got["output"].dtype == torch.float32
    assert_like_peft(fast, plain, BF16_EPS)
    x = torch.randn(2, 64)
    y = layers(fast)["o_proj"](x)
    layer = layers(fast)["o_proj"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight = layer.base_layer.weight4bit
    assert torch.equal(y, fastpeft.ops.lora_linear(x.bfloat16(), weight, a, b, scale=2.0).float())


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("compute_dtype", [None, torch.float32])
def test_autocast(source, compute_dtype):
    fast, report, plain = pair(source, compute_dtype=compute_dtype)

    def forward(model, ids):
        with torch.autocast("cpu", torch.bfloat16):
            return output(model, ids)

    with peft_calls() as calls:
        got = runs(fast, forward)
    assert not calls and paths(report) == {"fast"}
    assert_same_results(got, runs(plain, forward), runs(double(dense(plain))), BF16_EPS)
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(2, 64)
        assert layers(fast)["o_proj"](x).dtype == layers(plain)["o_proj"](x).dtype == torch.float32


@pytest.mark.parametrize("source", SOURCES)
def test_eval_and_shapes_that_bitsandbytes_cannot(source):
    """K % 64 and N % 32 other than 0, training and eval in turn."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 50), nn.ReLU(), nn.Linear(50, 33))
    if source == "quantize":
        fastpeft.quantize(model)
    else:
        bitsandbytes_layers(model)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False), autocast_adapter_dtype=False
    )
    same = dense(model)
    exact = double(same)
    fastpeft.apply(model)
    for training in (True, False, True, False):
        x = torch.randn(3, 80, requires_grad=True)
        xs = x, x.detach().requires_grad_(), x.detach().double().requires_grad_()
        ys = [it(x) for it, x in zip((model.train(training), same, exact), xs, strict=True)]
        for y in ys:
            y.sum().backward()
        assert_close(*ys, "y")
        assert_close(*(x.grad for x in xs), "x.grad")


def test_dense_and_4_bit_siblings_share_a_pass():
    torch.manual_seed(0)
    model = llama()
    fastpeft.quantize(model, skip=("lm_head", "k_proj"))
    config = peft.LoraConfig(r=4, target_modules=ALL["llama"], init_lora_weights=False)
    plain = peft.get_peft_model(model, config)
    fast = copy.deepcopy(plain)
    report = fastpeft.apply(fast)
    with peft_calls() as calls:
        run(fast, tokens())
    assert not calls and report.groups == 4
    assert_like_peft(fast, plain)
    layers(fast)["q_proj"].base_layer.compute_dtype = torch.bfloat16  # k and v compute in float32: each alone now
    calls = []
    original = fastpeft.ops.lora_linear_group
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            fastpeft.ops, "lora_linear_group", lambda *args, **kw: calls.append(args) or original(*args, **kw)
        )
        run(fast, tokens())
    assert len(calls) == 3  # not the first block's q, k and v


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_with_dropout(source, use_reentrant):
    fast, _, _ = pair(source, lora_dropout=0.5)
    fast.enable_input_require_grads()
    torch.manual_seed(5)
    expected = run(fast, tokens())
    fast.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(5)
    got = run(fast, tokens())
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("source", SOURCES)
def test_compile(source):
    fast, _, plain = pair(source)
    layer, x = layers(fast)["o_proj"], torch.randn(3, 64)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    exact = double(dense(layers(plain)["o_proj"]))
    xs = [t.clone().requires_grad_() for t in (x, x, x.double())]
    ys = [it(x) for it, x in zip((compiled, layer, exact), xs, strict=True)]
    for y in ys:
        y.sum().backward()
    assert_close(*ys, "y")
    assert_close(*(x.grad for x in xs), "x.grad")


# ---- what transformers loads -------------------------------------------------------------------------------------


def test_transformers_quantised_model(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = LlamaForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config, device_map={"": "cpu"})
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    plain = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=ALL["llama"], init_lora_weights=False)
    ).train()
    state = copy.deepcopy(plain.state_dict())
    fast = copy.deepcopy(plain)
    report = fastpeft.apply(fast)
    assert paths(report) == {"fast"} and report.groups == 4, str(report)
    same_state(fast.state_dict(), state)
    assert_like_peft(fast, plain)
    fastpeft.revert(fast)
    same_state(fast.state_dict(), state)
    fast.unload().save_pretrained(tmp_path / "saved")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "saved", device_map={"": "cpu"})
    for key, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[key.replace("_proj.", "_proj.base_layer.")]), key


# ---- apply and revert --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_apply_and_revert_keep_every_bit(double_quant, storage):
    torch.manual_seed(0)
    model = llama()
    bitsandbytes_layers(model, "nf4", double_quant, torch.bfloat16, quant_storage=storage)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=ALL["llama"]))
    kinds, state = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    own = [set(m.__dict__) for m in model.modules()]
    bases = {name: layer.base_layer for name, layer in layers(model).items()}
    fastpeft.apply(model)
    same_state(model.state_dict(), state)
    base = layers(model)["q_proj"].base_layer
    assert (
        isinstance(base, Linear4bit) and base.weight4bit.tiled and type(layers(model)["q_proj"]) is FastLoraLinear4bit
    )
    assert not any(type(p) is bnb.nn.Params4bit for p in model.parameters())
    fastpeft.revert(model)
    assert [type(m) for m in model.modules()] == kinds and [set(m.__dict__) for m in model.modules()] == own
    same_state(model.state_dict(), state)
    for name, layer in layers(model).items():
        before, after = bases[name], layer.base_layer
        for attribute in (
            "compute_dtype",
            "compute_type_is_set",
            "quant_storage",
            "training",
            "support_avx512bf16_for_cpu",
        ):
            assert getattr(after, attribute) == getattr(before, attribute)
        for attribute in ("blocksize", "compress_statistics", "quant_type", "quant_storage", "bnb_quantized"):
            assert getattr(after.weight, attribute) == getattr(before.weight, attribute)
        assert after.weight.quant_state == before.weight.quant_state and after.weight.module is after
    report = fastpeft.apply(model)
    assert paths(report) == {"fast"} and str(fastpeft.apply(model)) == str(report)


def test_apply_frees_bitsandbytes_weights():
    import gc
    import weakref

    model = qlora()
    gone = [weakref.ref(layer.base_layer.weight) for layer in layers(model).values()]
    fastpeft.apply(model)
    gc.collect()
    assert not any(ref() is not None for ref in gone)


def test_a_failure_half_way_gives_everything_back(monkeypatch):
    model = qlora()
    kinds, state = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    seats, original = [], fastpeft.interop.peft.Seat

    def failing(*args):
        seats.append(None)
        if len(seats) == 9:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(fastpeft.interop.peft, "Seat", failing)
    with pytest.raises(KeyboardInterrupt):
        fastpeft.apply(model)
    assert [type(m) for m in model.modules()] == kinds
    same_state(model.state_dict(), state)


def test_bases_that_stay_with_peft():
    plain = qlora()
    found = layers(plain)
    found["q_proj"].base_layer.register_forward_hook(lambda *args: None)
    found["k_proj"].base_layer.forward = found["k_proj"].base_layer.forward
    fast = plain
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found["o_proj"].merge()
    report = fastpeft.apply(fast)
    rows = {row.name.rsplit(".", 1)[-1]: row for row in report.layers[:7]}
    for name, reason in (
        ("q_proj", "has hooks"),
        ("k_proj", "forward of its own"),
        ("o_proj", "merged by PEFT's code"),
    ):
        assert rows[name].path == "peft" and reason in rows[name].reason
        assert type(found[name]) is PeftLinear4bit and type(found[name].base_layer) is bnb.nn.Linear4bit
    assert rows["v_proj"].path == "fast"
    run(fast, tokens())


def test_hooks_on_the_new_base_are_seen():
    fast, report, _ = pair()
    seen = []
    handle = layers(fast)["o_proj"].base_layer.register_forward_hook(lambda *args: seen.append(1))
    layers(fast)["o_proj"](torch.randn(2, 64))
    assert seen and "hooks" in "".join(row.reason for row in report.layers if row.path == "peft")
    handle.remove()
    assert paths(report) == {"fast"}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(source, how):
    fast, _, plain = pair(source)
    if how == "deepcopy":
        twin = copy.deepcopy(fast)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(fast))
    else:
        buffer = io.BytesIO()
        torch.save(fast, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    report = fastpeft.apply(twin)
    assert paths(report) == {"fast"} and report.groups == 4
    got, expected = run(twin, tokens()), run(fast, tokens())
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    fastpeft.revert(twin)
    same_state(twin.state_dict(), plain.state_dict())
    assert fastpeft.interop.report.known(layers(fast)["q_proj"]) and paths(fastpeft.apply(fast)) == {"fast"}


# ---- PEFT's features ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
def test_several_adapters_disable_and_mixed_batches(source):
    fast, report, plain = pair(source)
    for model in (fast, plain):
        torch.manual_seed(7)
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"])
    with peft_calls() as calls:
        run(fast, tokens())
    assert not calls and paths(report) == {"fast"}
    assert_like_peft(fast, plain)
    with fast.disable_adapter(), plain.disable_adapter():
        assert_same_output(output(fast, tokens()), plain, tokens(), forward=output)
    for model in (fast, plain):
        model.set_adapter("default")
    fast.eval()
    for module in plain.modules():  # eval would have bitsandbytes repack its weights
        module.training = isinstance(module, bnb.nn.Linear4bit)
    names = ["default", "second", "__base__"]
    mixed = partial(output, adapter_names=names)
    assert_same_output(mixed(fast, tokens(3)), plain, tokens(3), forward=mixed)
    for model in (fast, plain):
        model.train()
        model.delete_adapter("default")
        model.set_adapter("second")
    assert_like_peft(fast, plain)


@pytest.mark.parametrize("source", SOURCES)
def test_saved_adapters_are_pefts(source, tmp_path):
    fast, _, plain = pair(source)
    fast.save_pretrained(tmp_path / "fast"), plain.save_pretrained(tmp_path / "plain")
    name = "adapter_model.safetensors"
    assert (tmp_path / "fast" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    loaded = peft.PeftModel.from_pretrained(qlora(source).unload(), tmp_path / "fast", is_trainable=True)
    fastpeft.apply(loaded)
    assert_like_peft(loaded.train(), plain)


def biased(source):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48))
    if source == "quantize":
        fastpeft.quantize(model)
    else:
        bitsandbytes_layers(model)
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["0"], lora_bias=True, init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    nn.init.normal_(model.base_model.model[0].lora_B["default"].bias)
    return model


@pytest.mark.parametrize("source", SOURCES)
def test_lora_bias_is_scaled(source):
    """PEFT's forward scales it; the merge of PEFT's bitsandbytes layer adds it unscaled."""
    plain = biased(source)
    fast = copy.deepcopy(plain)
    report, x = fastpeft.apply(fast), torch.randn(3, 64)
    assert paths(report) == {"fast"}
    y = fast(x)
    assert_same_output(y, plain, x)
    layer = fast.base_model.model[0]
    bias, merged = layer.base_layer.bias.detach().clone(), layer.lora_B["default"].bias * 3
    with pytest.warns(UserWarning, match="quantises it again"):
        fast.merge_adapter()
    assert torch.equal(layer.base_layer.bias, bias + merged)
    fast.unmerge_adapter()
    assert torch.equal(layer.base_layer.bias, bias) and torch.equal(fast(x), y)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_merge_and_unmerge(source, safe):
    fast, report, _ = pair(source)
    ids = tokens()
    before, y = copy.deepcopy(fast.state_dict()), output(fast, ids)
    layer = layers(fast)["q_proj"]
    exact = layer.base_layer.weight4bit.dequantize(torch.float32) + layer.get_delta_weight("default")
    with pytest.warns(UserWarning, match="quantises it again"):
        fast.merge_adapter(safe_merge=safe)
    again = fastpeft.ops.quantize_4bit(exact.detach(), double_quant=True)
    assert torch.equal(layer.base_layer.weight4bit.packed, again.packed)
    error = ((again.dequantize() - exact).norm() / exact.norm()).item()
    assert layer.base_layer.merge_error == error and 0 < error < 0.2
    assert paths(report) == {"fast"} and f"relative RMS error {error:.2g}" in report.layers[0].reason
    assert_same_output(output(fast, ids), dense(fast), ids, forward=output)
    assert not torch.equal(output(fast, ids), y)
    twin = copy.deepcopy(fast)
    for model in (fast, twin):
        model.unmerge_adapter()
        same_state(model.state_dict(), before)
        assert torch.equal(output(model, ids), y) and layers(model)["q_proj"].base_layer.merge_error is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast.merge_adapter()
    with fast.disable_adapter():  # PEFT unmerges here
        output(fast, ids)
    same_state(fast.state_dict(), before)


@pytest.mark.filterwarnings("ignore:merging into a 4-bit base")
@pytest.mark.parametrize("source", SOURCES)
def test_adapters_merged_one_after_the_other_are_rounded_once(source):
    fast, _, _ = pair(source)
    torch.manual_seed(7)
    fast.add_adapter("second", peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    layer = layers(fast)["q_proj"]
    before = layer.base_layer.weight4bit
    exact = before.dequantize(torch.float32) + layer.get_delta_weight("default") + layer.get_delta_weight("second")
    fast.merge_adapter(["default"])
    fast.merge_adapter(["second"])
    assert layer.merged_adapters == ["default", "second"]
    again = fastpeft.ops.quantize_4bit(exact.detach(), double_quant=True)
    assert torch.equal(layer.base_layer.weight4bit.packed, again.packed)
    fast.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight4bit.packed, before.packed)
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        fast.merge_adapter(["default"])
    assert layer.base_layer.weight4bit.packed.equal(before.packed) and not layer.merged_adapters


@pytest.mark.filterwarnings("ignore:merging into a 4-bit base")
@pytest.mark.parametrize("source", SOURCES)
def test_unload(source):
    fast, _, plain = pair(source)
    base = type(layers(fast)["q_proj"].base_layer) if source == "quantize" else bnb.nn.Linear4bit
    assert (source == "quantize") == issubclass(base, Linear4bit)
    bare = copy.deepcopy(fast).unload()
    assert type(bare.model.layers[0].self_attn.q_proj) is base
    same_state(bare.state_dict(), copy.deepcopy(plain).unload().state_dict())
    expected = copy.deepcopy(fast)
    expected.merge_adapter()
    merged = fast.merge_and_unload(safe_merge=True)
    assert type(merged.model.layers[0].self_attn.q_proj) is base
    assert not any(isinstance(module, (PeftLinear, PeftLinear4bit)) for module in merged.modules())
    assert_same_output(output(merged, tokens()), expected, tokens(), forward=output)


@pytest.mark.filterwarnings("ignore:merging into a 4-bit base")
def test_revert_while_merged():
    net = fastpeft.quantize(nn.Sequential(nn.Linear(64, 64)))  # of no library: PEFT takes its class for dense layers
    fast = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    fastpeft.apply(fast)
    fast.merge_adapter()
    with pytest.raises(RuntimeError, match=r"call unmerge_adapter\(\) first"):
        fastpeft.revert(fast)
    fast, _, _ = pair("bitsandbytes")
    fast.merge_adapter()
    merged = copy.deepcopy(fast)
    fastpeft.revert(fast)
    assert_same_output(output(fast, tokens()), merged, tokens(), forward=output)
    with pytest.warns(UserWarning, match="Unmerge lora module to 4-bit"):
        fast.unmerge_adapter()  # PEFT's own, rounded


@pytest.mark.filterwarnings("ignore:merging into a 4-bit base")
@pytest.mark.parametrize("source", SOURCES)
def test_dora_runs_pefts_code_over_our_base(source):
    fast, report, plain = pair(source, use_dora=True)
    assert paths(report) == {"peft"} and "DoraLinearVariant" in report.layers[0].reason
    with torch.no_grad():
        for model in (fast, plain):
            for name, p in model.named_parameters():
                if "magnitude" in name:
                    p *= 1.1
    assert_same_results(run(fast, tokens()), run(plain, tokens()), run(double(dense(plain)), tokens()))
    before, y = copy.deepcopy(fast.state_dict()), output(fast, tokens())
    fast.merge_adapter()
    assert not torch.equal(output(fast, tokens()), y)
    layer = layers(fast)["q_proj"]
    weight, error = layer.base_layer.weight4bit.dequantize(torch.float32), layer.base_layer.merge_error
    fast.unmerge_adapter()
    same_state(fast.state_dict(), before)
    # m · (W + scaling·B A) / |W + scaling·B A| by rows (DoRA: Liu et al. 2024, equation 5), but for its quantisation
    moved = layer.base_layer.weight4bit.dequantize(torch.float32) + layer.get_delta_weight("default")
    true = layer.lora_magnitude_vector["default"].weight[:, None] * moved / moved.norm(dim=1, keepdim=True)
    assert ((weight - true).norm() / true.norm()).item() == pytest.approx(
        error, rel=0, abs=16 * 2**-23
    )  # of float32 sums


def test_nothing_to_apply_names_the_4_bit_layer():
    with pytest.raises(ValueError, match=r"peft.tuners.lora.bnb.Linear4bit \(the fast paths\)"):
        fastpeft.apply(nn.Sequential(Linear4bit(fastpeft.ops.quantize_4bit(torch.randn(4, 4)))))


def test_quantize_after_peft_leaves_what_it_trains():
    settings = {"target_modules": ALL["llama"], "modules_to_save": ["lm_head"], "init_lora_weights": False}
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, **settings))
    fastpeft.quantize(model, skip=())
    assert type(model.base_model.model.lm_head.modules_to_save["default"]) is nn.Linear
    layer = layers(model)["q_proj"]
    assert isinstance(layer.base_layer, Linear4bit) and type(layer.lora_A["default"]) is nn.Linear
    plain = copy.deepcopy(model)
    assert paths(fastpeft.apply(model)) == {"fast"}
    assert_like_peft(model, plain)


def test_importing_and_applying_needs_no_bitsandbytes():
    """Nothing of ours imports it: a dense PEFT model where it is not installed."""
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "import torch, peft, fastpeft as fp\n"
        "model = fp.quantize(torch.nn.Sequential(torch.nn.Linear(64, 64)))\n"
        "model = peft.get_peft_model(model, peft.LoraConfig(target_modules=['0']))\n"
        "report = fp.apply(model); model(torch.randn(2, 64)); print(report); fp.revert(model)\n"
        "assert 'fastpeft.interop.peft_4bit' not in sys.modules and report.layers[0].path == 'peft'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "1 fast" in done.stdout, done.stderr
