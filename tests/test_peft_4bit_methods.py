"""PEFT's methods over a 4-bit layer of ours, applied or not, are what they are over bitsandbytes' with the same bytes."""

from __future__ import annotations

import copy
import subprocess
import sys

import bitsandbytes as bnb
import peft
import pytest
import torch
import torch.nn.functional as F
from _close import assert_close
from _peft import assert_same_output, output
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fastpeft
from fastpeft.nn import Linear4bit

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
TARGETS = ["0", "1"]


def lora(**settings):
    return peft.LoraConfig(target_modules=TARGETS, r=4, **({"init_lora_weights": False} | settings))


METHODS = {
    "lora": lora(),
    "gaussian": lora(init_lora_weights="gaussian"),
    "olora": lora(init_lora_weights="olora"),  # quantises what its start leaves of the base
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "alora": lora(alora_invocation_tokens=[1]),
    "lora_bias": lora(lora_bias=True),
    "ia3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=["1"], init_ia3_weights=False),
    "adalora": peft.AdaLoraConfig(target_modules=TARGETS, init_r=4, total_step=9, tinit=1, tfinal=2),
    "vera": peft.VeraConfig(target_modules=TARGETS, r=4, init_weights=False),
    "randlora": peft.RandLoraConfig(target_modules=TARGETS, r=4, init_weights=False),
    "road": peft.RoadConfig(target_modules=TARGETS, init_weights=False),
    "oft": peft.OFTConfig(target_modules=TARGETS, oft_block_size=8, init_weights=False),
    "boft": peft.BOFTConfig(target_modules=TARGETS, boft_block_size=8, init_weights=False),
    "hira": peft.HiraConfig(target_modules=TARGETS, r=4),
    "pvera": peft.PveraConfig(target_modules=TARGETS, r=4),
}
CANNOT_MERGE = {"alora", "ia3", "adalora"}
WRONG_MERGE = {
    "randlora",
    "pvera",
}  # PEFT takes `bnb_quantized` along, and bitsandbytes' layer is left with a dense weight


class Exact(bnb.nn.Linear4bit):
    """The base product in float64, rounded once: all else of a method's forward stays PEFT's in float32."""

    def forward(self, x):
        weight = bnb.functional.dequantize_4bit(self.weight.data, self.weight.quant_state)
        return F.linear(x.double(), weight.double(), self.bias.double()).to(x.dtype)


def models(name, apply):
    """The method over bitsandbytes' layers, over the same with exact products, and over ours."""
    made = []
    for kind in ("bitsandbytes", "exact", "ours"):
        torch.manual_seed(0)
        model = nn.Sequential()
        for _ in TARGETS:
            layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
            layer.__class__ = Exact if kind == "exact" else bnb.nn.Linear4bit
            model.append(Linear4bit.from_bitsandbytes(layer) if kind == "ours" else layer)
        model.is_loaded_in_4bit = True  # asks PEFT for its 4-bit layers
        model = peft.get_peft_model(model, copy.deepcopy(METHODS[name]))
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn(p.shape) * 0.05)
        if kind == "ours" and apply:
            fastpeft.apply(model)
        made.append(model.train())  # not eval: bitsandbytes would repack its bytes there
    return made


def tuned(model):
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def bases(model):
    return [layer.get_base_layer() for layer in tuned(model)]


def same_bytes(ours, plain):
    for one, two in zip(bases(ours), bases(plain), strict=True):
        one, two = one.state_dict(), two.state_dict()
        assert list(one) == list(two)
        assert all(torch.equal(one[key], two[key]) for key in one if key != "bias")


def outputs(plain, exact, ours, **kwargs):
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(9))
    results = []
    for model in (ours, plain, exact):
        torch.manual_seed(1)  # PVeRA draws
        results.append(model(x, **kwargs).detach())
    assert_close(*results)


@pytest.mark.parametrize("apply", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_as_over_bitsandbytes(name, apply):
    plain, exact, ours = every = models(name, apply)
    kinds = [type(layer) for layer in tuned(plain)]
    applied = apply and kinds[0] is peft.tuners.lora.bnb.Linear4bit
    assert applied or kinds == [type(layer) for layer in tuned(ours)]
    same_bytes(ours, plain)
    for _ in range(2):
        outputs(*every, **({"alora_offsets": [1, 1, 1]} if name == "alora" else {}))
    if name in CANNOT_MERGE:
        for model in every:
            with pytest.raises(NotImplementedError):
                model.merge_adapter()
        return
    before = [base.weight4bit for base in bases(ours)]
    for model in every:
        model.merge_adapter()
    if name in WRONG_MERGE:
        assert all(base.weight.shape == (64, 64) for base in bases(plain))
        assert all(base.weight4bit.nested and base.weight.bnb_quantized for base in bases(ours))
        for base, old, layer in zip(bases(ours), before, tuned(ours), strict=True):
            torch.manual_seed(1)
            merged = old.dequantize() + layer.get_delta_weight("default").detach()
            assert torch.equal(base.weight4bit.packed, fastpeft.ops.quantize_4bit(merged, double_quant=True).packed)
        return
    if applied and name == "lora_bias":  # `apply` scales it, as the forward does
        return
    same_bytes(ours, plain)
    outputs(*every)
    for model in every:
        model.unmerge_adapter()
    if applied:  # rounds once, and gives the original back
        assert all(
            torch.equal(base.weight4bit.packed, old.packed) for base, old in zip(bases(ours), before, strict=True)
        )
        return
    same_bytes(ours, plain)
    outputs(*every)


@pytest.mark.parametrize("apply", [False, True])
def test_merge_and_unload_and_several_adapters(apply):
    every = models("lora", apply)
    for model in every:
        torch.manual_seed(4)
        model.add_adapter("second", lora(lora_alpha=3))
        model.base_model.set_adapter(["default", "second"])
    outputs(*every)
    with every[0].disable_adapter(), every[1].disable_adapter(), every[2].disable_adapter():
        outputs(*every)
    for model in every:
        model.set_adapter("second")
    bare = [model.merge_and_unload() for model in every]
    assert all(isinstance(layer, Linear4bit) for layer in bare[2])
    for one, two in zip(bare[2], bare[0], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    outputs(*bare)


def test_a_base_of_ours_stays_ours():
    """`apply` gives back the layer that it found, by `revert` and by `unload`."""
    _, _, ours = models("lora", apply=False)
    assert all(row.path == "peft" for row in fastpeft.interop.report.Report(ours).layers)
    before, states = bases(ours), [copy.deepcopy(base.state_dict()) for base in bases(ours)]
    report = fastpeft.apply(ours)
    assert all(row.path == "fast" for row in report.layers) and bases(ours) == before
    bare = copy.deepcopy(ours).unload()
    assert all(isinstance(layer, Linear4bit) for layer in bare)
    fastpeft.revert(ours)
    assert bases(ours) == before and type(tuned(ours)[0]) is peft.tuners.lora.bnb.Linear4bit
    for base, state in zip(before, states, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(base.state_dict().values(), state.values(), strict=True))


# ---- shared bases ------------------------------------------------------------------------------------------------------


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=61, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def in_bitsandbytes(model):
    for parent in list(model.modules()):
        for name, old in list(parent.named_children()):
            if type(old) is nn.Linear and name != "lm_head":
                new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, quant_type="nf4")
                new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
                setattr(parent, name, new.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def base_weights(model):
    return {p for name, p in model.named_parameters() if name.endswith("base_layer.weight")}


@pytest.mark.parametrize("source", ["bitsandbytes", "quantize", "dense"])
def test_replicated_layers_share_their_base(source):
    model = llama()
    if source == "quantize":
        fastpeft.quantize(model)
    elif source == "bitsandbytes":
        in_bitsandbytes(model)
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, layer_replication=[[0, 2], [0, 2], [1, 2]],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(model, config).train()
    ids = torch.arange(3, 12).view(1, 9)
    plain, before = copy.deepcopy(model), len(base_weights(model))
    assert before == 14
    for _ in range(2):
        fastpeft.apply(model)
        assert len(base_weights(model)) == before
        assert_same_output(output(model, ids), plain, ids, forward=output)
        held = {p.untyped_storage().data_ptr() for p in base_weights(model)}
        assert len(held) == before and len(base_weights(copy.deepcopy(model))) == before
        fastpeft.revert(model)
        assert len(base_weights(model)) == before


def test_one_base_module_in_two_layers():
    model = nn.Sequential(*[bnb.nn.Linear4bit(64, 64, quant_type="nf4").to("cpu") for _ in TARGETS])
    model.is_loaded_in_4bit = True
    model = peft.get_peft_model(model, lora())
    one, two = tuned(model)
    two.base_layer = one.base_layer
    fastpeft.apply(model)
    assert isinstance(one.base_layer, Linear4bit) and two.base_layer is one.base_layer
    fastpeft.revert(model)
    assert type(one.base_layer) is bnb.nn.Linear4bit and two.base_layer is one.base_layer


# ---- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_state_dict_takes_a_tenth_of_the_base_at_most():
    """At any moment, with the dict alive: in a process of its own, whose memory nobody else has used."""
    code = """
import ctypes, torch, bitsandbytes as bnb, peft, fastpeft
from torch import nn

def field(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name + ":"))

torch.set_num_threads(1)
for source in ("bitsandbytes", "quantize"):
    model = nn.Sequential()
    for _ in range(24):
        layer = nn.Linear(1536, 1024, bias=False)
        if source == "quantize":
            layer = fastpeft.quantize(layer)
        else:
            bits = bnb.nn.Linear4bit(1536, 1024, bias=False, quant_type="nf4")
            bits.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            layer = bits.to("cpu")
        model.append(layer)
    model.is_loaded_in_4bit = True
    model = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=[str(i) for i in range(24)]))
    fastpeft.apply(model)
    for layer in model.base_model.model:
        layer(torch.zeros(1, 1536))
        assert layer.base_layer.weight4bit.tiled
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")  # the peak is what is resident now
    now = field("VmRSS")
    state = model.state_dict()
    print(field("VmHWM") - now, 24 * 1536 * 1024 // 2)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        extra, base = map(int, line.split())
        assert extra <= base // 10, f"{extra} bytes more, of a base of {base}"
    assert len(done.stdout.splitlines()) == 2
