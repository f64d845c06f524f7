"""fp.attach, detach, activate: what they change on a model, what they leave alone, and what they give back."""

from __future__ import annotations

import copy
import pickle
import warnings

import bitsandbytes as bnb
import peft
import pytest
import torch
from _attach import (
    HEADS,
    KINDS,
    adapter,
    assert_same_state,
    base_model,
    batch,
    exact,
    in_double,
    loss,
    move_away,
    output,
    state,
)
from _close import assert_close
from _peft import assert_same_results
from torch import nn

import fastpeft as fp
from fastpeft.methods.sites import Site

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::FutureWarning")]
every_model = pytest.mark.parametrize("kind", KINDS)
both_bases = pytest.mark.parametrize("four_bit", [False, True], ids=["dense", "4-bit"])


def attached(kind: str = "llama", four_bit: bool = False, **config) -> nn.Module:
    """With an adapter that does something."""
    model = base_model(kind, four_bit)
    fp.attach(model, fp.LoraConfig(r=4, **config))
    move_away(model)
    return model


# ---- what attach makes of a model ------------------------------------------------------------------------------------


@every_model
@both_bases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_an_adapter_that_is_zero_leaves_the_bits_of_the_base(kind, four_bit, dtype):
    model, x = base_model(kind, four_bit, dtype).eval(), batch(kind, dtype=dtype)
    before, oracle = output(model, x), output(exact(model), in_double(x))
    fp.attach(model, fp.LoraConfig())
    zero = output(model, x)
    assert_close(zero, before, oracle)  # the layers' own code sums in another order
    fp.activate(model, None)
    assert torch.equal(output(model, x), zero)
    fp.activate(model, "default")
    move_away(model)
    assert not torch.equal(output(model, x), zero)
    fp.activate(model, None)
    assert torch.equal(output(model, x), zero)


@every_model
@both_bases
def test_gradients_reach_the_adapter_and_the_task_head_alone(kind, four_bit):
    model = attached(kind, four_bit)
    loss(model, batch(kind)).backward()
    trained = {id(p) for p in adapter(model).values()}
    reached = {id(p) for p in model.parameters() if p.grad is not None}
    assert reached == trained == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(p.grad.abs().max() > 0 for p in adapter(model).values())
    heads = {name.rpartition(".")[0] for name in adapter(model) if not name.endswith(("lora_a", "lora_b"))}
    assert sorted(heads) == HEADS.get(kind, [])


@every_model
def test_every_linear_layer_but_output_embeddings_and_the_task_head_has_lora(kind):
    model = base_model(kind)
    kinds = (nn.Linear,) if kind != "gpt2" else (type(model.transformer.h[0].attn.c_attn),)
    layers = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    fp.attach(model, fp.LoraConfig(r=4))
    found = {name.rpartition(".")[0] for name in adapter(model) if name.endswith("lora_a")}
    assert found == layers - {"lm_head", "classifier"}


def test_a_site_answers_as_its_layer():
    model = attached("llama")
    site, layer = model.model.layers[0].mlp.up_proj, base_model("llama").model.layers[0].mlp.up_proj
    assert isinstance(site, Site) and torch.equal(site.weight, layer.weight) and site.bias is None
    assert (site.in_features, site.out_features) == (
        layer.in_features,
        layer.out_features,
    ) and not site.weight.requires_grad
    with pytest.raises(AttributeError):
        _ = site.nothing_of_this_name
    assert not hasattr(site, "compute_dtype")
    head = attached("bert").classifier
    assert head.out_features == 3 and head.weight is head.adapters["default"].weight


def test_the_head_of_a_task_is_a_copy_for_every_adapter():
    model, x = base_model("bert").eval(), batch("bert")
    head, before = model.classifier, output(model, x)
    fp.attach(model, fp.LoraConfig(r=4, targets=["query"]), "one")
    fp.attach(model, fp.LoraConfig(r=4, targets=["query"]), "two")
    with torch.no_grad():
        adapter(model, "two")["classifier.bias"].add_(1.0)
    assert torch.allclose(output(model, x), before + 1.0)
    fp.activate(model, "one")
    assert torch.equal(output(model, x), before)
    fp.activate(model, None)
    assert torch.equal(output(model, x), before)
    fp.detach(model, "one")
    fp.detach(model, "two")
    assert model.classifier is head


def test_modules_to_save_are_trained_whole():
    model, x = base_model("llama").eval(), batch("llama")
    before, was = output(model, x), state(model)
    fp.attach(model, fp.LoraConfig(r=4, targets=["q_proj"], modules_to_save=["lm_head", "model.norm"]))
    assert torch.equal(output(model, x), before)
    assert {"lm_head.weight", "model.norm.weight"} < set(adapter(model))
    loss(model, x).backward()
    torch.optim.SGD(adapter(model).values(), lr=1.0).step()
    assert not torch.equal(output(model, x), before)
    assert torch.equal(model.lm_head.base.weight, model.model.embed_tokens.weight)
    fp.detach(model)
    assert_same_state(model, was)


def test_dropout_is_for_training():
    model, x = attached("sequential", dropout=0.5), batch("sequential")
    assert not torch.equal(output(model, x), output(model, x))
    assert torch.equal(output(model.eval(), x), output(model, x))


# ---- several adapters ------------------------------------------------------------------------------------------------


@every_model
@both_bases
def test_of_several_adapters_one_or_none_is_active(kind, four_bit):
    x = batch(kind)
    model = base_model(kind, four_bit)
    alone = {}
    configs = {"one": fp.LoraConfig(r=4), "two": fp.LoraConfig(r=2, alpha=8)}
    for seed, (name, config) in enumerate(configs.items()):
        single = base_model(kind, four_bit)
        torch.manual_seed(seed)
        fp.attach(single, config, name)
        move_away(single, name, seed)
        alone[name] = output(single, x).detach()
        fp.activate(single, None)
        alone[None] = output(single, x).detach()
        torch.manual_seed(seed)
        fp.attach(model, config, name)
        move_away(model, name, seed)
        assert torch.equal(output(model, x), alone[name])  # active as soon as it is attached
    assert not torch.equal(alone["one"], alone["two"])
    for name in ("one", None, "two", "one", None):
        fp.activate(model, name)
        assert torch.equal(output(model, x), alone[name])


SOME = {"llama": ["q_proj"], "gpt2": ["c_attn"], "bert": ["query"], "vit": ["q_proj"], "sequential": ["0"]}


def test_the_active_adapter_is_the_one_that_is_trained():
    model = base_model("bert")
    fp.attach(model, fp.LoraConfig(r=4), "one")
    fp.attach(model, fp.LoraConfig(r=2), "two")

    def trained() -> set[int]:
        return {id(p) for p in model.parameters() if p.requires_grad}

    one, two = ({id(p) for p in adapter(model, name).values()} for name in ("one", "two"))
    assert trained() == two
    fp.activate(model, "one")
    assert trained() == one
    fp.activate(model, None)  # a reference model is asked between forward and backward
    assert trained() == one
    adapter(model, "one")["classifier.bias"].requires_grad_(False)
    fp.activate(model, "one")
    assert len(trained()) == len(one) - 1


def test_backward_may_come_after_the_base_was_asked():
    model, x = attached(), batch("llama")
    value = loss(model, x)
    value.backward(retain_graph=True)
    first = {name: p.grad.clone() for name, p in adapter(model).items()}
    model.zero_grad()
    fp.activate(model, None)
    with torch.no_grad():
        output(model, x)
    value.backward()
    assert all(torch.equal(p.grad, first[name]) for name, p in adapter(model).items())


def test_an_optimizer_keeps_its_state():
    x = batch("bert")

    def steps(interrupted: bool) -> list[torch.Tensor]:
        model = base_model("bert")
        torch.manual_seed(0)
        fp.attach(model, fp.LoraConfig(r=4), "one")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        if interrupted:
            fp.attach(model, fp.LoraConfig(r=2), "two")
        for _ in range(3):
            if interrupted:
                fp.activate(model, None)
                output(model, x)
                fp.activate(model, "two")
                fp.activate(model, "one")
            optimizer.zero_grad()
            loss(model, x).backward()
            optimizer.step()
        assert all(p in optimizer.state for p in adapter(model, "one").values())
        return [p.detach() for p in adapter(model, "one").values()]

    assert all(map(torch.equal, steps(False), steps(True)))


# ---- detach ----------------------------------------------------------------------------------------------------------


@every_model
@both_bases
def test_detach_gives_the_base_back(kind, four_bit):
    model, x = base_model(kind, four_bit), batch(kind)
    some = next(p for p in model.parameters() if p.is_floating_point())
    some.requires_grad_(False)  # of a flag that was off
    next(model.children()).eval()
    before, was = output(model, x), state(model)
    fp.attach(model, fp.LoraConfig(r=4), "one")
    fp.attach(model, fp.LoraConfig(r=2, targets=SOME[kind]), "two")
    loss(model, x).backward()
    for name in ("one", "two"):
        move_away(model, name)
    fp.detach(model, "one")  # the first that came goes first
    assert not torch.equal(output(model, x), before)
    fp.detach(model)
    assert_same_state(model, was)
    assert torch.equal(output(model, x), before) and "_fastpeft" not in model.__dict__


def test_the_mode_is_what_it_was_set_to_meanwhile():
    model = attached("bert").eval()
    fp.detach(model)
    assert not any(module.training for module in model.modules())


def test_detaching_the_active_adapter_leaves_the_base_active():
    model, x = base_model("bert"), batch("bert")
    for name in ("one", "two"):
        fp.attach(model, fp.LoraConfig(r=4), name)
        move_away(model, name)
    fp.activate(model, None)
    base = output(model, x)
    fp.activate(model, "two")
    assert not torch.equal(output(model, x), base)
    fp.detach(model, "two")
    assert torch.equal(output(model, x), base)
    fp.activate(model, "one")
    assert not torch.equal(output(model, x), base)


def test_attach_again_after_detach():
    model, x = attached(), batch("llama")
    fp.detach(model)
    fp.attach(model, fp.LoraConfig(r=4))
    move_away(model)
    assert torch.isfinite(output(model, x)).all()


# ---- copied, moved, compiled, checkpointed ---------------------------------------------------------------------------


@every_model
@both_bases
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_another_model_with_the_same_adapters(kind, four_bit, how):
    model, x = base_model(kind, four_bit), batch(kind)
    was = state(model)
    before = output(model, x)
    for name in ("one", "two"):
        fp.attach(model, fp.LoraConfig(r=4), name)
        move_away(model, name)
    copied = _copied(model, how)
    expected = output(model, x)
    assert torch.equal(output(copied, x), expected)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in copied.parameters()}
    assert {id(p) for p in adapter(copied, "two").values()} <= {id(p) for p in copied.parameters()}
    loss(copied, x).backward()
    assert all(p.grad is None for p in model.parameters())
    fp.activate(copied, "one")
    assert torch.equal(output(model, x), expected) and not torch.equal(output(copied, x), expected)
    fp.detach(copied, "one")
    fp.detach(copied)
    assert torch.equal(output(copied, x), before) and list(copied.state_dict()) == was["keys"]
    assert {name: p.requires_grad for name, p in copied.named_parameters(remove_duplicate=False)} == {
        name: flag for name, (_, flag, _) in was["parameters"].items()
    }
    fp.detach(model, "one")
    fp.detach(model)
    assert_same_state(model, was)


def _copied(model: nn.Module, how: str) -> nn.Module:
    return copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))


def test_a_state_dict_takes_adapters_to_another_model():
    model, x = attached("bert"), batch("bert")
    other = base_model("bert")
    fp.attach(other, fp.LoraConfig(r=4))
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(other, x), output(model, x))


@pytest.mark.parametrize(("kind", "four_bit"), [(kind, False) for kind in KINDS] + [("sequential", True)])
def test_to_another_dtype_and_back(kind, four_bit):  # transformers casts no model in 4 bits
    model = attached(kind, four_bit).to(torch.bfloat16)
    assert {p.dtype for p in adapter(model).values()} == {torch.bfloat16}
    y = output(model, batch(kind, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and torch.isfinite(y).all()
    loss(model.to(torch.float32), batch(kind)).backward()
    assert all(p.grad is not None for p in adapter(model).values())
    fp.detach(model)
    assert not any(isinstance(module, Site) for module in model.modules())


def test_on_the_meta_device():
    model = attached("bert").to("meta")
    assert output(model, batch("bert").to("meta")).is_meta
    fp.detach(model)


def test_train_and_eval_reach_everything():
    model = attached("bert")
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in model.eval().modules())
    fp.attach(model, fp.LoraConfig(r=2, targets=["query"]), "other")
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(("kind", "four_bit"), [(kind, False) for kind in KINDS] + [("llama", True)])
def test_compiled_whole(kind, four_bit):
    model, x = attached(kind, four_bit), batch(kind, rows=12)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    _assert_as_exact(compiled, model, x)
    loss(compiled, x).backward()
    assert all(p.grad is not None for p in adapter(model).values())


@both_bases
def test_a_compiled_model_follows_switches(four_bit):
    model, x = base_model("sequential", four_bit), batch("sequential", rows=12)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for name in ("one", "two"):
        fp.attach(compiled, fp.LoraConfig(r=4), name)
        move_away(model, name, seed=len(name))
        _assert_as_exact(compiled, model, x)
    for name in ("one", None, "two"):
        fp.activate(compiled, name)
        _assert_as_exact(compiled, model, x)
    fp.detach(compiled, "one")
    fp.detach(compiled)
    _assert_as_exact(compiled, model, x)


def _assert_as_exact(compiled: nn.Module, model: nn.Module, x: torch.Tensor) -> None:
    """No further from float64 than the model that is not compiled."""
    got, plain, true = output(compiled, x), output(model, x), output(exact(model), in_double(x))
    assert_same_results({"output": got}, {"output": plain}, {"output": true})


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "vit"])
@both_bases
def test_gradient_checkpointing(kind, four_bit):
    model, x = attached(kind, four_bit).train(), batch(kind)
    loss(model, x).backward()
    expected = {name: p.grad.clone() for name, p in adapter(model).items()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    loss(model, x).backward()
    assert all(torch.equal(p.grad, expected[name]) for name, p in adapter(model).items())


def test_autocast():
    model, x = attached(), batch("llama")
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(model, x)
    value.backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in adapter(model).values())


# ---- what is refused, and leaves the model as it was -----------------------------------------------------------------


def _refused(
    model: nn.Module, words: str, error: type[Exception] = ValueError, name: str = "default", **config
) -> None:
    was = state(model)
    with pytest.raises(error, match=words):
        fp.attach(model, fp.LoraConfig(**config), name)
    assert_same_state(model, was)


def test_a_target_that_is_not_there():
    _refused(
        base_model("llama"), r"'q_porj'.*did you mean 'q_proj'\?.*down_proj, gate_proj, k_proj", targets=["q_porj"]
    )
    _refused(base_model("bert"), "'embeddings', which is no linear layer", targets=["query", "embeddings"])
    _refused(base_model("sequential"), "'fc'.*It has: 0, 1", targets=["fc"])
    _refused(nn.Sequential(nn.ReLU()), "no linear layer for LoRA")


def test_a_target_in_the_task_head():
    _refused(base_model("bert"), "'classifier' belongs to 'classifier', which is trained whole", targets=["classifier"])


def test_modules_to_save_that_cannot_be():
    _refused(base_model("llama"), "'lm_haed', which is no module", modules_to_save=["lm_haed"])
    _refused(base_model("llama"), "cannot be trained whole", modules_to_save=["model.layers.0", "layers.0.mlp"])
    _refused(base_model("llama", True), "q_proj.*not floating", modules_to_save=["q_proj"])
    model = attached("llama", targets=["q_proj"])
    _refused(model, "'model.layers.0'.*has an adapter", name="other", modules_to_save=["model.layers.0"])
    _refused(model, "q_proj'.*has an adapter", name="other", modules_to_save=["layers.0.self_attn.q_proj"])


def test_a_layer_that_stands_at_two_places():
    layer = nn.Linear(8, 8)
    _refused(nn.Sequential(layer, layer), "1 layers cannot have LoRA\n  0: it stands at several places")


def test_a_block_that_stands_at_two_places_is_one():
    block = nn.Sequential(nn.Linear(8, 8))
    model, x = nn.Sequential(block, block), torch.randn(3, 8)
    was = state(model)
    fp.attach(model, fp.LoraConfig(r=4))
    assert model[0][0] is model[1][0] and len(adapter(model)) == 2
    loss(model, x).backward()
    fp.detach(model)
    assert_same_state(model, was)


def test_the_model_itself_is_no_place():
    _refused(nn.Linear(8, 8), "it is the model itself.*fp.nn.LoraLinear")


def test_layers_whose_weight_is_read_without_a_call():
    model = nn.Sequential(nn.Linear(16, 16), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
    with pytest.warns(UserWarning, match="left 3 layers without LoRA\n.*out_proj: it is a NonDynamically") as caught:
        fp.attach(model, fp.LoraConfig(r=4))
    assert caught[0].filename == __file__
    assert list(adapter(model)) == ["0.lora_a", "0.lora_b"]
    fp.detach(model)
    _refused(model, "linear1: nn.TransformerEncoderLayer reads its weight", targets=["linear1"])


def test_layers_that_somebody_watches():
    model = base_model("sequential")
    model[0].register_forward_hook(lambda *call: None)
    _refused(model, "0: it has hooks", targets=["0"])


def test_a_lora_linear_is_left_alone():
    model = nn.Sequential(fp.nn.LoraLinear(nn.Linear(8, 8)))
    _refused(model, "0.base: it is the base of a fastpeft.nn.LoraLinear")


def test_bitsandbytes_layers():
    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4").to("cpu")
    model = nn.Sequential(layer, nn.Linear(64, 64))
    _refused(model, "0: it is bitsandbytes' Linear4bit; put fp.nn.Linear4bit.from_bitsandbytes")
    model[0] = fp.nn.Linear4bit.from_bitsandbytes(layer)
    fp.attach(model, fp.LoraConfig(r=4))
    assert torch.isfinite(output(model, torch.randn(2, 64))).all()


def test_a_model_that_peft_wrapped():
    model = peft.get_peft_model(base_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    for wrapped in (model, model.get_base_model()):
        with pytest.raises(ValueError, match=r"wrapped by PEFT. fastpeft.apply\(model\)"):
            fp.attach(wrapped, fp.LoraConfig())


def test_quantize_comes_first():
    model = attached()
    with pytest.raises(ValueError, match="quantize before fastpeft.attach"):
        fp.quantize(model)


def test_names():
    model = attached()
    _refused(model, "an adapter 'default' is attached already")
    _refused(model, "no dot", name="a.b")
    _refused(model, "no dot", name="")
    _refused(model, "attribute of nn.ModuleDict", name="keys")
    _refused(model, "attribute of nn.ModuleDict", name="training")
    fp.attach(model, fp.LoraConfig(r=2), "other")
    for call in (fp.detach, fp.activate):
        with pytest.raises(ValueError, match="name must be one of 'default', 'other', got 'third'"):
            call(model, "third")
    with pytest.raises(ValueError, match="name must be given, one of 'default', 'other'"):
        fp.detach(model)
    with pytest.raises(TypeError, match="name must be a str, got int"):
        fp.attach(model, fp.LoraConfig(), 3)
    for call in (fp.detach, lambda model: fp.activate(model, None), lambda model: fp.activate(model, "default")):
        with pytest.raises(ValueError, match="no adapter is attached to this LlamaForCausalLM"):
            call(base_model("llama"))


def test_arguments_of_other_types():
    model = base_model("llama")
    with pytest.raises(TypeError, match="config must be an fp.LoraConfig.*got LoraConfig|got dict"):
        fp.attach(model, {"r": 4})
    with pytest.raises(TypeError, match="config must be an fp.LoraConfig"):
        fp.attach(model, peft.LoraConfig())
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        fp.attach("model", fp.LoraConfig())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0), ("r", True), ("r", 2.0), ("alpha", float("nan")), ("alpha", 10**60), ("alpha", "1"), ("dropout", 1.0),
        ("dropout", -0.1), ("targets", "q_proj"), ("targets", ()), ("targets", [1]), ("modules_to_save", None), ("rslora", 1),
    ],
)  # fmt: skip
def test_a_config_checks_itself(field, value):
    with pytest.raises((TypeError, ValueError), match=f"LoraConfig: {field} must be .*, got "):
        fp.LoraConfig(**{field: value})


def test_a_method_that_fails_leaves_no_head(monkeypatch):
    model = base_model("bert")
    was = state(model)
    monkeypatch.setattr(nn.init, "kaiming_uniform_", _no_memory)
    with pytest.raises(MemoryError):
        fp.attach(model, fp.LoraConfig())
    assert_same_state(model, was)


def _no_memory(*args: object, **kwargs: object) -> None:
    raise MemoryError


def test_no_warnings_where_nothing_is_left_out():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attached("llama")
