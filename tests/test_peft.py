"""`apply` on Hugging Face PEFT models: every feature of PEFT's LoRA layer gives PEFT's results, and the report is true."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from types import MethodType

import peft
import pytest
import torch
import torch.nn.functional as F
from _peft import (
    GROUPS,
    adapters_in,
    assert_like_peft,
    assert_same_output,
    assert_same_results,
    counted_peft_calls,
    double,
    layers,
    output,
    pair,
    path_on,
    peft_model,
    run,
    runs,
    tokens,
)
from conftest import BUT_INTERPRETED
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

import fastpeft
from fastpeft.interop.peft import FastLoraLinear

pytestmark = pytest.mark.usefixtures("one_thread")
BF16_EPS = torch.finfo(torch.bfloat16).eps


def paths(report) -> set[str]:
    return {row.path for row in report.layers}


def reasons(report) -> str:
    return "\n".join(row.reason for row in report.layers if row.path == "peft")


# ---- results -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BUT_INTERPRETED, indirect=True)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_float32_models(kind, backend):
    fast, report, plain = pair(kind)
    with counted_peft_calls() as calls:
        got = runs(fast)
    assert not calls and paths(report) == {path_on(backend)} and report.groups == GROUPS[kind]
    assert_same_results(got, runs(plain), runs(double(plain)))


@pytest.mark.parametrize("backend", BUT_INTERPRETED, indirect=True)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_bfloat16_models_with_float32_adapters(kind, backend):
    fast, report, plain = pair(kind, dtype=torch.bfloat16)
    got = runs(fast)
    assert paths(report) == {path_on(backend)}
    assert all(grad.dtype == torch.float32 for name, grad in got.items() if "lora_" in name)
    assert_same_results(got, runs(adapters_in(plain, torch.bfloat16)), runs(double(plain)), BF16_EPS)
    assert "float32 adapters rounded in the kernel" in report.layers[0].arithmetic


@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 5, 40), (0, 40), (2, 0, 40)])
def test_any_leading_shape(shape):
    fast, _, plain = pair()
    x = torch.randn(shape)
    assert_same_output(layers(fast)["o_proj"](x), layers(plain)["o_proj"], x)


def test_non_contiguous_input_and_gradient():
    fast, _, plain = pair()
    x = torch.randn(40, 6).t()
    exact = double(plain)
    for model in (fast, plain, exact):
        y = layers(model)["o_proj"](x.double() if model is exact else x)
        y.t().expand(2, 40, 6).sum().backward()
    assert_same_results(*map(grads, (fast, plain, exact)))


def grads(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_output_may_be_changed_in_place():
    """nn.ReLU(inplace=True) after a layer, `q *= scale`."""
    fast, _, plain = pair()
    exact, x = double(plain), torch.randn(3, 40)
    for name in ("o_proj", "q_proj", "k_proj", "v_proj"):
        for model in (fast, plain, exact):
            y = layers(model)[name](x.double() if model is exact else x)
            y.mul_(2.0)
            F.relu(y, inplace=True).sum().backward()
    assert_same_results(*map(grads, (fast, plain, exact)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    fast, report, plain = pair()

    def forward(model, ids):
        with torch.autocast("cpu", dtype):
            return output(model, ids)

    with counted_peft_calls() as calls:
        got = runs(fast, forward)
    assert not calls and paths(report) == {"fast"}
    assert_same_results(got, runs(plain, forward), runs(double(plain)), torch.finfo(dtype).eps)


def test_dropout_falls_on_the_lora_part_in_training_only():
    fast, report, plain = pair(lora_dropout=0.5)
    assert paths(report) == {"fast"}
    fast.eval(), plain.eval()
    assert_same_output(output(fast, tokens()), plain, tokens(), forward=output)
    layer, x = layers(fast.train())["o_proj"], torch.randn(2000, 40)
    base = layer.base_layer(x)
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    assert torch.equal(first, layer(x)) and not torch.equal(first, layer(x))
    layer.eval()
    kept = layer(x) - base  # the mean over masks is the undropped term
    slope = ((first - base) * kept).sum() / kept.square().sum()
    assert 0.8 < slope < 1.2
    layer.train()
    layer.lora_dropout.eval()  # the dropout module's own mode counts
    assert torch.equal(layer(x) - base, kept)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_dropout_masks_survive_checkpointing(use_reentrant):
    fast, _, _ = pair(lora_dropout=0.5)
    fast.enable_input_require_grads()
    torch.manual_seed(5)
    expected = run(fast, tokens())
    fast.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(5)
    got = run(fast, tokens())
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


def test_lora_bias_and_base_bias_train():
    fast, report, plain = pair("bert", lora_bias=True, bias="all")
    assert paths(report) == {"fast"}
    assert any(name.endswith("lora_B.default.bias") for name in run(fast, tokens()))
    assert_like_peft(fast, plain)


def test_rslora_and_patterns():
    fast, report, plain = pair(use_rslora=True, rank_pattern={"q_proj": 7}, alpha_pattern={"k_proj": 3})
    assert paths(report) == {"fast"} and report.groups == 4
    assert_like_peft(fast, plain)


# ---- PEFT's features -----------------------------------------------------------------------------


def test_several_active_adapters_are_one_call():
    fast, report, plain = pair()
    for model in (fast, plain):
        torch.manual_seed(7)
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"])
    with counted_peft_calls() as calls:
        run(fast, tokens())
    assert not calls and paths(report) == {"fast"}
    assert_like_peft(fast, plain)


def test_several_adapters_with_dropout_run_pefts_code():
    fast, report, plain = pair(lora_dropout=0.3)
    for model in (fast, plain):
        torch.manual_seed(7)
        model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "second"])
    q_proj = [row for row in report.layers if row.name.endswith("q_proj")]
    assert all(row.path == "peft" and "several adapters with dropout" in row.reason for row in q_proj)
    k_proj = [row for row in report.layers if row.name.endswith("k_proj")]
    assert all(row.path == "fast" and "cannot join" in row.reason for row in k_proj)
    x = torch.randn(3, 40)
    torch.manual_seed(3)
    y = layers(fast)["q_proj"](x)
    torch.manual_seed(3)
    assert torch.equal(y, layers(plain)["q_proj"](x))


def test_set_add_and_delete_adapter():
    fast, report, plain = pair()
    for model in (fast, plain):
        torch.manual_seed(7)
        model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
        model.set_adapter("second")
    assert_like_peft(fast, plain)
    by_name = {row.name.rsplit(".", 1)[-1]: row for row in report.layers}
    assert by_name["q_proj"].path == "fast" and "no adapter of it is active" in by_name["k_proj"].reason
    for model in (fast, plain):
        model.delete_adapter("default")
    assert_like_peft(fast, plain)
    assert type(layers(fast)["q_proj"]) is FastLoraLinear


def test_adapters_added_to_further_layers_are_reported_and_taken_by_the_next_apply():
    plain = peft_model(target_modules=["q_proj"])
    fast = copy.deepcopy(plain)
    report = fastpeft.apply(fast)
    for model in (fast, plain):
        torch.manual_seed(7)
        model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["q_proj", "k_proj"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "second"])
    assert "call fastpeft.apply(model)" in reasons(report) and report.groups == 0
    assert_like_peft(fast, plain)
    again = fastpeft.apply(fast)
    assert paths(again) == paths(report) == {"fast"} and report.groups == 2
    assert_like_peft(fast, plain)


def test_disable_adapter_merge_and_unmerge():
    fast, report, plain = pair()
    with fast.disable_adapter(), plain.disable_adapter():
        assert_same_output(output(fast, tokens()), plain, tokens(), forward=output)
        assert {row.reason.split(";")[0] for row in report.layers} == {"its adapters are disabled"}
        assert paths(report) == {"fast"}
    fast.merge_adapter(), plain.merge_adapter()
    assert_same_output(output(fast, tokens()), plain, tokens(), forward=output)
    assert {row.reason.split(";")[0] for row in report.layers} == {"its adapters are merged"}
    fast.unmerge_adapter(), plain.unmerge_adapter()
    assert_like_peft(fast, plain)
    fast.merge_adapter(), plain.merge_adapter()
    with fast.disable_adapter(), plain.disable_adapter():  # PEFT unmerges here
        assert_same_output(output(fast, tokens()), plain, tokens(), forward=output)
    assert_like_peft(fast, plain)


@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
def test_unload(how):
    fast, report, plain = pair()
    fast, plain = getattr(fast, how)(), getattr(plain, how)()
    assert torch.equal(output(fast, tokens()), output(plain, tokens()))
    assert not any(isinstance(module, PeftLinear) for module in fast.modules())
    assert fast.state_dict().keys() == plain.state_dict().keys()


def test_mixed_batches_by_adapter_names():
    fast, report, plain = pair()
    for model in (fast, plain):
        torch.manual_seed(7)
        model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        model.eval()
    names = ["default", "second", "__base__"]
    ids = tokens(3)
    y, expected = output(fast, ids, adapter_names=names), output(plain, ids, adapter_names=names)
    assert torch.equal(y, expected)
    assert paths(report) == {"fast"} and report.groups == 4
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        output(fast, ids, adapter_names=names[:2])


def test_scale_changes():
    fast, _, plain = pair()
    for model in (fast, plain):
        layers(model)["q_proj"].set_scale("default", 3.0)
        layers(model)["k_proj"].scale_layer(0.5)
    assert_like_peft(fast, plain)
    for model in (fast, plain):
        layers(model)["q_proj"].unscale_layer()
    assert_like_peft(fast, plain)
    with peft.helpers.rescale_adapter_scale(fast, 0.25), peft.helpers.rescale_adapter_scale(plain, 0.25):
        assert_like_peft(fast, plain)


def test_hot_swap_and_its_scaling_tensors(tmp_path):
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    torch.manual_seed(9)
    other = peft_model(lora_alpha=3, r=3)
    other.save_pretrained(tmp_path)
    fast, report, plain = pair()
    for model in (fast, plain):
        prepare_model_for_compiled_hotswap(model, target_rank=6)
        hotswap_adapter(model, tmp_path, adapter_name="default")
    assert paths(report) == {"fast"}
    assert isinstance(layers(fast)["q_proj"].scaling["default"], torch.Tensor)
    for peer in (plain, other):
        assert_same_output(output(fast, tokens()), peer, tokens(), forward=output)
    assert_same_results(runs(fast), runs(plain), runs(double(plain)))


def test_saved_adapters_are_pefts(tmp_path):
    fast, _, plain = pair()
    fast.save_pretrained(tmp_path / "fast"), plain.save_pretrained(tmp_path / "plain")
    name = "adapter_model.safetensors"
    assert (tmp_path / "fast" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    base = peft_model().unload()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "fast", is_trainable=True)
    fastpeft.apply(loaded)
    assert_like_peft(loaded.train(), plain)
    fast.load_adapter(tmp_path / "plain", "again")
    fast.set_adapter("again")
    assert_same_output(output(fast, tokens()), plain, tokens(), forward=output)


def test_modules_to_save_and_tied_weights():
    fast, report, plain = pair(modules_to_save=["lm_head"])
    assert paths(report) == {"fast"}
    assert_like_peft(fast, plain)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=40, intermediate_size=72, num_hidden_layers=1, num_attention_heads=4, vocab_size=61,
                         tie_word_embeddings=True)  # fmt: skip
    torch.manual_seed(0)
    plain = peft.get_peft_model(
        LlamaForCausalLM(config), peft.LoraConfig(r=3, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    )
    fast = copy.deepcopy(plain)
    assert paths(fastpeft.apply(fast)) == {"fast"}
    assert fast.base_model.model.lm_head.base_layer.weight is fast.get_input_embeddings().weight
    assert_like_peft(fast, plain)


def test_input_dtype_casting_can_be_disabled():
    fast, report, plain = pair(dtype=torch.bfloat16)
    x = torch.randn(2, 40, dtype=torch.bfloat16)
    for model in (fast, plain):
        layer = layers(model)["o_proj"]
        with peft.helpers.disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
            layer(x)  # PEFT's own error
    assert paths(report) == {"fast", "peft"} and "casting of its input" in reasons(report)
    layers(fast)["o_proj"](x)
    assert paths(report) == {"fast"}


# ---- what stays on PEFT's code -------------------------------------------------------------------


def test_variants_stay_and_say_so():
    fast, report, plain = pair(use_dora=True)
    assert paths(report) == {"peft"} and "DoraLinearVariant" in reasons(report)
    got, expected = run(fast, tokens()), run(plain, tokens())
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_other_layer_types_stay_and_say_so():
    fast, report, plain = pair(target_modules=["q_proj", "embed_tokens"])
    assert "no fast path for lora.Embedding" in reasons(report)
    assert_like_peft(fast, plain)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
            self.attention = nn.MultiheadAttention(4, 2)

        def forward(self, x):
            h = self.conv(x).mean((2, 3))
            return self.fc(self.attention(h, h, h)[0])

    torch.manual_seed(0)
    plain = peft.get_peft_model(
        Net(), peft.LoraConfig(r=2, target_modules=["conv", "fc", "attention"], init_lora_weights=False)
    )
    fast = copy.deepcopy(plain)
    report = fastpeft.apply(fast)
    rows = {row.name.removeprefix("base_model.model."): row for row in report.layers}
    assert rows["fc"].path == "fast" and rows["conv"].path == rows["attention"].path == "peft"
    x = torch.randn(20, 3, 8, 8)
    assert_same_output(fast(x), plain, x)


def test_a_base_of_another_class_stays():
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    plain = peft.get_peft_model(
        nn.Sequential(Odd(8, 8), nn.Linear(8, 8)),
        peft.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False),
    )
    fast = copy.deepcopy(plain)
    report = fastpeft.apply(fast)
    assert [row.path for row in report.layers] == ["peft", "fast"] and "its base layer is a Odd" in reasons(report)
    x = torch.randn(20, 8)
    assert_same_output(fast(x), plain, x)


def test_target_parameters_stay():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8, 8))
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(torch.einsum("bk,enk->bn", x, self.weight))

    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["fc"], target_parameters=["experts.weight"], init_lora_weights=False)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = Experts()

        def forward(self, x):
            return self.experts(x)

    plain = peft.get_peft_model(Net(), config)
    fast = copy.deepcopy(plain)
    report = fastpeft.apply(fast)
    assert "no fast path for lora.ParamWrapper" in reasons(report) and paths(report) == {"fast", "peft"}
    x = torch.randn(20, 8)
    assert_same_output(fast(x), plain, x)


def test_other_tuners_are_reported_and_left():
    config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(peft_model().unload(), config)
    report = fastpeft.apply(model)
    assert paths(report) == {"peft"} and "ia3.Linear, which is not a LoRA layer" in reasons(report)


def test_fastpefts_own_layers_are_reported():
    model = nn.Sequential(fastpeft.nn.LoraLinear(nn.Linear(8, 8), r=2))
    report = fastpeft.apply(model)
    assert [row.path for row in report.layers] == ["fast"] and "fastpeft.nn.LoraLinear" in str(report)
    fastpeft.revert(model)


@pytest.mark.parametrize("where", ["base_layer", "lora_A", "lora_B", "lora_dropout"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_inside_a_layer_are_seen(where, kind):
    fast, report, plain = pair(lora_dropout=0.1)
    layer = layers(fast.eval())["o_proj"]
    part = getattr(layer, where)
    part = part if where == "base_layer" else part["default"]
    seen = []
    handle = getattr(part, f"register_{kind}_hook")(lambda *args: seen.append(args) and None)
    layer(torch.randn(2, 40, requires_grad=True)).sum().backward()
    assert seen and "hooks" in reasons(report)
    handle.remove()
    assert paths(report) == {"fast"}


def test_hooks_of_the_layer_itself_keep_working_on_the_fast_path():
    fast, report, plain = pair()
    for model in (fast, plain):
        layers(model)["q_proj"].register_forward_hook(lambda module, args, y: y * 2)
        layers(model)["k_proj"].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert paths(report) == {"fast"}
    assert_like_peft(fast, plain)


def test_global_hooks_see_every_module():
    fast, report, plain = pair()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(type(module)))
    try:
        layers(fast)["o_proj"](torch.randn(2, 40))
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 3


def test_parametrisation_own_forward_and_trained_base():
    fast, report, plain = pair()
    for model in (fast, plain):
        found = layers(model)
        nn.utils.parametrizations.weight_norm(found["o_proj"].lora_A["default"])
        found["down_proj"].base_layer.weight.requires_grad_(True)
        gate = found["gate_proj"].base_layer
        gate.forward = MethodType(lambda gate, x: F.linear(x, gate.weight) * 3, gate)  # a copy's is of the copy
    assert paths(report) == {"fast", "peft"}
    assert_same_output(output(fast, tokens()), plain, tokens(), forward=output)
    exact, inputs = double(plain), {k: torch.randn(20, k) for k in (40, 72)}
    for model in (fast, plain, exact):
        for layer in layers(model).values():
            x = inputs[layer.in_features]
            layer(x.double() if model is exact else x).square().sum().backward()
    assert_same_results(*map(grads, (fast, plain, exact)))
    text = reasons(report)
    assert "ParametrizedLinear" in text and "forward of its own" in text and "base weight requires grad" in text


def test_double_precision_and_other_inputs_run_pefts_code():
    fast, report, plain = pair()
    fast.double(), plain.double()
    assert "float64" in reasons(report) and paths(report) == {"peft"}
    assert torch.equal(output(fast, tokens()), output(plain, tokens()))
    fast.float(), plain.float()
    layer, peer = layers(fast)["o_proj"], layers(plain)["o_proj"]
    for bad in (torch.randn(2, 40, dtype=torch.bfloat16), torch.randint(3, (2, 40)), torch.randn(2, 39)):
        with pytest.raises((RuntimeError, ValueError)):
            layer(bad)
        with pytest.raises(RuntimeError):
            peer(bad)
    assert layer(torch.empty(2, 40, device="meta").new_empty(0, 40, device="cpu")).shape == (0, 40)


def test_functorch_forward_mode_and_tracing_run_pefts_code():
    fast, _, plain = pair()
    layer, peer = layers(fast)["o_proj"], layers(plain)["o_proj"]
    x, v = torch.randn(3, 40), torch.randn(3, 40)
    assert torch.equal(torch.func.jvp(layer, (x,), (v,))[1], torch.func.jvp(peer, (x,), (v,))[1])
    assert torch.equal(torch.func.vmap(layer)(x), torch.func.vmap(peer)(x))
    names = dict(layer.named_parameters())
    value = torch.func.grad(lambda ps: torch.func.functional_call(layer, ps, x).square().sum())(names)
    expected = torch.func.grad(lambda ps: torch.func.functional_call(peer, ps, x).square().sum())(
        dict(peer.named_parameters())
    )
    assert all(torch.equal(value[name], expected[name]) for name in expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        torch.autograd.forward_ad.unpack_dual(layer(dual))
    assert_same_output(torch.jit.trace(layer, x)(v), peer, v)


def test_meta_models():
    with torch.device("meta"):
        model = peft_model()
    report = fastpeft.apply(model)
    assert paths(report) == {"peft"} and "on meta" in reasons(report)
    assert output(model, tokens().to("meta")).shape == (2, 9, 61)


def test_accelerate_offload_hooks(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    fast, report, plain = pair()
    fast.eval(), plain.eval()
    expected = output(plain, tokens())
    accelerate.cpu_offload(fast, execution_device=torch.device("cpu"))
    assert paths(report) == {"peft"} and "forward of its own" in reasons(report)
    assert torch.equal(output(fast, tokens()), expected)
    accelerate.hooks.remove_hook_from_submodules(fast)
    fastpeft.revert(fast)
    assert {type(layer) for layer in layers(fast).values()} == {PeftLinear}
    assert torch.equal(output(fast, tokens()), expected)

    late = copy.deepcopy(plain)
    accelerate.cpu_offload(late, execution_device=torch.device("cpu"))
    report = fastpeft.apply(late)
    assert paths(report) == {"peft"}
    assert torch.equal(output(late, tokens()), expected)


# ---- apply, revert, report -----------------------------------------------------------------------


def test_apply_changes_nothing_but_the_class():
    plain = peft_model()
    parameters = dict(plain.named_parameters())
    keys, classes, text = list(plain.state_dict()), [type(m) for m in plain.modules()], repr(plain)
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=0.1)
    handles = [module.__dict__.copy() for module in plain.modules()]
    fastpeft.apply(plain)
    assert list(plain.state_dict()) == keys and repr(plain) == text
    assert all(parameters[name] is p for name, p in plain.named_parameters())
    before = output(plain, tokens()).detach()
    output(plain, tokens()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(output(plain, tokens()), before)
    fastpeft.revert(plain)
    assert [type(m) for m in plain.modules()] == classes
    assert [set(m.__dict__) for m in plain.modules()] == [set(own) for own in handles]


def test_revert_gives_pefts_bits_and_apply_is_idempotent():
    fast, report, plain = pair()
    first = str(report)
    assert str(fastpeft.apply(fast)) == first
    assert_like_peft(fast, plain)
    fastpeft.revert(fast)
    assert paths(report) == {"peft"}
    got, expected = run(fast, tokens()), run(plain, tokens())
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    fastpeft.revert(fast)  # again: nothing to do
    fastpeft.apply(fast)
    assert str(report) == first


def test_report_reads_well_and_keeps_nothing_alive():
    fast, report, _ = pair()
    lines = str(report).splitlines()
    assert lines[0] == "14 LoRA layers: 14 fast (4 groups), 0 left on PEFT's code" and len(lines) == 15
    assert "layers.0.self_attn.q_proj" in lines[1] and "one pass over x with k_proj, v_proj" in lines[1]
    assert "float32 products, float32 sums" in lines[1] and repr(report) == str(report)
    del fast
    assert report.layers == [] and "gone" in str(report)


def test_nothing_to_apply():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"Looked for peft.tuners.lora.layer.Linear"):
        fastpeft.apply(model)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        fastpeft.apply("model")
    with pytest.raises(TypeError, match="fastpeft.revert: model must be"):
        fastpeft.revert(None)


def test_a_failure_half_way_leaves_the_model_untouched(monkeypatch):
    model = peft_model()
    before = [(type(m), set(m.__dict__)) for m in model.modules()]
    seats, original = [], fastpeft.interop.peft.Seat

    def failing(*args):
        seats.append(None)
        if len(seats) == 9:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(fastpeft.interop.peft, "Seat", failing)
    with pytest.raises(KeyboardInterrupt):
        fastpeft.apply(model)
    assert [(type(m), set(m.__dict__)) for m in model.modules()] == before


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how):
    fast, _, plain = pair()
    layers(fast)["q_proj"](torch.randn(2, 40))  # leaves outputs parked
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
    assert_like_peft(twin, plain)
    for layer in layers(twin).values():
        if layer._fastpeft.group is not None:
            assert layer in layer._fastpeft.group.members and layer not in layers(fast).values()
    assert_like_peft(fast, plain)


def test_copies_of_one_layer_stay_alone():
    fast, _, plain = pair()
    layer = layers(fast)["q_proj"]
    x = torch.randn(2, 40)
    for twin in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same_output(twin(x), layers(plain)["q_proj"], x)
    assert layer._fastpeft.group.members[0] is layer
    assert len(pickle.dumps(layer)) < 1.2 * len(pickle.dumps(layers(plain)["q_proj"]))
    assert_like_peft(fast, plain)
