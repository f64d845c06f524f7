"""LoRA on plain models: its numbers against PEFT's, and its files, in both directions."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

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
from _peft import assert_same_results
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

import fastpeft as fp
from fastpeft.adapter_files import AdapterFileError

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::FutureWarning")]
every_model = pytest.mark.parametrize("kind", KINDS)


def trained(kind: str, four_bit: bool = False, **config: Any) -> nn.Module:
    model = base_model(kind, four_bit)
    fp.attach(model, fp.LoraConfig(**({"r": 4, "alpha": 6} | config)))
    move_away(model)
    return model.eval()


def results(model: nn.Module, kind: str) -> dict[str, torch.Tensor]:
    """Outputs and gradients over several batches, by names without wrappers."""
    rows: dict[str, list[torch.Tensor]] = {}
    double = next(model.parameters()).dtype == torch.float64
    for seed in range(4):
        x = batch(kind, seed=seed)
        x = in_double(x) if double else x
        model.zero_grad()
        loss(model, x).backward()
        rows.setdefault("output", []).append(output(model, x).detach())
        for name, p in model.named_parameters():
            if p.grad is not None:
                rows.setdefault(_plain(name), []).append(p.grad.clone())
    return {name: torch.stack(each) for name, each in rows.items()}


def _plain(name: str) -> str:
    name = name.removeprefix("base_model.model.")
    for ours, theirs in (
        (".adapters.default.lora_a", ".lora_A.default.weight"),
        (".adapters.default.lora_b", ".lora_B.default.weight"),
    ):
        name = name.replace(ours, theirs)
    return name.replace(".adapters.default", "").replace(".modules_to_save.default", "")


def in_peft(base: nn.Module, folder: Path, trainable: bool = False) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of keys that are missing or too many
        warnings.simplefilter("ignore", FutureWarning)
        return peft.PeftModel.from_pretrained(base, folder, is_trainable=trainable).eval()


# ---- numbers ---------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("rslora", [False, True])
def test_outputs_and_gradients_are_those_of_peft(kind, rslora, tmp_path):
    model = trained(kind, rslora=rslora)
    fp.save_adapter(model, tmp_path)
    theirs = in_peft(base_model(kind), tmp_path, trainable=True)
    assert_same_results(results(model, kind), results(theirs, kind), results(exact(model), kind))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "sequential"])
def test_over_four_bits(kind):
    model = trained(kind, four_bit=True)
    true = exact(model)
    assert_same_results(results(model, kind), results(copy.deepcopy(true).float(), kind), results(true, kind))


def test_the_same_bits_as_the_standalone_module():
    base = nn.Linear(64, 48)
    torch.manual_seed(1)
    module = fp.nn.LoraLinear(copy.deepcopy(base), r=4, alpha=6, dropout=0.5)
    torch.manual_seed(1)
    model = nn.Sequential(base)
    fp.attach(model, fp.LoraConfig(r=4, alpha=6, dropout=0.5))
    assert torch.equal(adapter(model)["0.lora_a"], module.lora_a)
    with torch.no_grad():
        for b in (adapter(model)["0.lora_b"], module.lora_b):
            b.copy_(torch.arange(b.numel()).view_as(b) / 1000)
    for x in (torch.randn(3, 64), torch.randn(2, 5, 64)):
        ys = []
        for layer in (model, module):
            torch.manual_seed(2)
            ys.append(layer(x))
        assert torch.equal(*ys)


# ---- files -----------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("four_bit", [False, True], ids=["dense", "4-bit"])
def test_saved_and_loaded(kind, four_bit, tmp_path):
    model, x = trained(kind, four_bit), batch(kind)
    saved = fp.save_adapter(model, tmp_path)
    assert saved.format == "peft" and "PeftModel.from_pretrained(base" in str(saved) and str(tmp_path) in str(saved)
    other = base_model(kind, four_bit).eval()
    was = state(other)
    fp.load_adapter(other, tmp_path, "mine")
    assert torch.equal(output(other, x), output(model, x))
    loss(other, x).backward()
    assert all(p.grad is not None for p in adapter(other, "mine").values())
    fp.detach(other)
    assert_same_state(other, was)


@every_model
def test_peft_reads_our_files(kind, tmp_path):
    model, x = trained(kind), batch(kind)
    fp.save_adapter(model, tmp_path)
    theirs = in_peft(base_model(kind), tmp_path)
    if kind in ("llama", "gpt2", "bert"):
        assert type(theirs) is not peft.PeftModel  # task_type: with generate and the like
    if any(isinstance(module, peft.tuners.lora.layer.LoraLayer) for module in theirs.modules()):
        fp.apply(theirs)  # the same arithmetic
    assert_same_results({"y": output(theirs, x)}, {"y": output(model, x)}, {"y": output(exact(model), in_double(x))})
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    heads = {name.removeprefix("base_model.model.").partition(".")[0] for name in tensors if "lora_" not in name}
    assert sorted(heads) == HEADS.get(kind, [])


@every_model
def test_we_read_files_of_peft(kind, tmp_path):
    targets = r"0|2\.1" if kind == "sequential" else "all-linear"  # PEFT would take "0" for "2.0" too
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, modules_to_save=HEADS.get(kind), init_lora_weights=False
    )
    theirs = peft.get_peft_model(base_model(kind), config).eval()
    _move_heads(theirs)
    theirs.save_pretrained(tmp_path)
    model, x = base_model(kind).eval(), batch(kind)
    fp.load_adapter(model, tmp_path)
    assert_same_results({"y": output(model, x)}, {"y": output(theirs, x)}, {"y": output(exact(model), in_double(x))})
    fp.save_adapter(model, tmp_path / "again")
    ours, other = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert ours.keys() == other.keys() and all(torch.equal(ours[name], other[name]) for name in ours)


@torch.no_grad()
def _move_heads(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if "modules_to_save" in name:
            p += 0.1 * torch.randn_like(p)


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_a_head_of_two_layers(task_type, tmp_path):
    """DistilBERT's, which PEFT finds by the end of their names."""
    config = DistilBertConfig(vocab_size=61, dim=64, hidden_dim=72, n_layers=1, n_heads=4, num_labels=3, dropout=0.0)
    torch.manual_seed(0)
    base = DistilBertForSequenceClassification(config).eval()
    heads = None if task_type else ["pre_classifier", "classifier"]
    lora = peft.LoraConfig(
        r=4, target_modules=["q_lin"], task_type=task_type, modules_to_save=heads, init_lora_weights=False
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), lora).eval()
    _move_heads(theirs)
    theirs.save_pretrained(tmp_path)
    x = batch("bert")
    fp.load_adapter(base, tmp_path)
    assert set(base.__dict__["_fastpeft"].attached["default"].heads) == {"pre_classifier", "classifier"}
    assert_same_results({"y": output(base, x)}, {"y": output(theirs, x)}, {"y": output(exact(base), x)})


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_a_file_of_peft_without_the_head(kind, tmp_path):
    targets = ["query", "q_proj"]
    theirs = peft.get_peft_model(base_model(kind), peft.LoraConfig(target_modules=targets, init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    model, x = base_model(kind).eval(), batch(kind)
    fp.load_adapter(model, tmp_path)
    assert type(model.classifier) is nn.Linear and not model.classifier.weight.requires_grad
    assert_same_results(
        {"y": output(model, x)}, {"y": output(theirs.eval(), x)}, {"y": output(exact(model), in_double(x))}
    )
    fp.save_adapter(model, tmp_path / "again")
    other = base_model(kind).eval()
    fp.load_adapter(other, tmp_path / "again")
    assert torch.equal(output(other, x), output(model, x))


def test_untied_embeddings_of_peft(tmp_path):
    settings = {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
        "init_lora_weights": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(base_model("llama"), peft.LoraConfig(**settings)).eval()
    _move_heads(theirs)
    theirs.save_pretrained(tmp_path)
    model, x = base_model("llama").eval(), batch("llama")
    fp.load_adapter(model, tmp_path)
    assert_same_results({"y": output(model, x)}, {"y": output(theirs, x)}, {"y": output(exact(model), x)})


@pytest.mark.parametrize(
    "select",
    [
        {"target_modules": r".*layers\.1.*\.(q|down)_proj"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*"},
    ],
)
def test_layers_that_peft_selected(select, tmp_path):
    theirs = peft.get_peft_model(base_model("llama"), peft.LoraConfig(r=3, init_lora_weights=False, **select)).eval()
    theirs.save_pretrained(tmp_path)
    model, x = base_model("llama").eval(), batch("llama")
    fp.load_adapter(model, tmp_path)
    assert_same_results({"y": output(model, x)}, {"y": output(theirs, x)}, {"y": output(exact(model), x)})


def test_a_regular_expression_of_a_file_never_runs(tmp_path):
    fp.save_adapter(trained("llama"), tmp_path)
    _edit(tmp_path, target_modules="(.*)*(.*)*(.*)*x")
    model = base_model("llama").eval()
    fp.load_adapter(model, tmp_path)
    assert torch.equal(output(model, batch("llama")), output(trained("llama"), batch("llama")))


def test_names_that_end_as_others_do(tmp_path):
    """PEFT takes "0" for "1.0" too."""

    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64)))

    model, x = base(), batch("sequential")
    fp.attach(model, fp.LoraConfig(r=4, targets=["0"]))
    assert list(adapter(model)) == ["0.lora_a", "0.lora_b"]  # a whole name is that layer alone
    move_away(model)
    fp.save_adapter(model, tmp_path)
    theirs, other = in_peft(base(), tmp_path), base()
    fp.load_adapter(other, tmp_path)
    assert torch.equal(output(other, x), output(model, x))
    assert_same_results({"y": output(theirs, x)}, {"y": output(model, x)}, {"y": output(exact(model), in_double(x))})


def test_one_base_in_other_dtypes_and_in_four_bits(tmp_path):
    for kind in KINDS:
        fp.save_adapter(trained(kind), tmp_path / kind)
        for model in (base_model(kind, dtype=torch.bfloat16), base_model(kind, True)):
            fp.load_adapter(model, tmp_path / kind)
            assert {p.dtype for name, p in adapter(model).items() if "lora_" in name} == {torch.float32}


def test_beside_another_adapter(tmp_path):
    model, x = trained("bert"), batch("bert")
    fp.save_adapter(model, tmp_path)
    expected = output(model, x)
    fp.load_adapter(model, tmp_path, "second")  # the fingerprint sees through the first one
    assert torch.equal(output(model, x), expected)
    fp.save_adapter(model, tmp_path / "again", "second")
    fp.detach(model, "default")
    fp.detach(model, "second")
    fp.load_adapter(model, tmp_path / "again")
    assert torch.equal(output(model, x), expected)


def test_the_page_runs(tmp_path, monkeypatch):
    page = Path(__file__).parent.parent / "docs" / "attach.md"
    monkeypatch.chdir(tmp_path)
    exec(page.read_text("utf-8").split("```python\n")[1].split("```")[0], {})


def test_in_a_fresh_process(tmp_path):
    model, x = trained("bert"), batch("bert")
    fp.save_adapter(model, tmp_path)
    torch.save({"x": x, "y": output(model, x).detach()}, tmp_path / "expected.pt")
    code = """
import sys, torch
sys.path.insert(0, sys.argv[2])
import fastpeft as fp
from _attach import base_model, output
torch.set_num_threads(1)
model = base_model("bert").eval()
fp.load_adapter(model, sys.argv[1])
expected = torch.load(sys.argv[1] + "/expected.pt")
assert torch.equal(output(model, expected["x"]), expected["y"])
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)], check=True, timeout=120)


def test_without_transformers_and_peft(tmp_path):
    code = """
import sys
for name in ("transformers", "peft", "safetensors", "bitsandbytes", "accelerate"):
    sys.modules[name] = None
import torch, fastpeft as fp
def model():
    torch.manual_seed(0)
    return fp.quantize(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)), skip=["2"])
first, second, x = model(), model(), torch.randn(3, 64)
fp.attach(first, fp.LoraConfig(r=4))
first(x).sum().backward()
torch.optim.SGD([p for p in first.parameters() if p.requires_grad], lr=0.1).step()
fp.save_adapter(first, sys.argv[1])
fp.load_adapter(second, sys.argv[1])
assert torch.equal(first(x), second(x))
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], check=True, timeout=120)


# ---- files that are refused, and leave the model as it was -----------------------------------------------------------


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _refused(model: nn.Module, folder: Path, words: str, **how: Any) -> None:
    was = state(model)
    with pytest.raises(AdapterFileError, match=words):
        fp.load_adapter(model, folder, **how)
    assert_same_state(model, was)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "'use_dora' is True, which fastpeft does not compute"),
        ({"bias": "all"}, "'bias' is 'all'"),
        ({"lora_bias": True}, "'lora_bias' is True"),
        ({"alora_invocation_tokens": [1]}, "'alora_invocation_tokens'"),
        ({"target_parameters": ["experts"]}, "'target_parameters'"),
        ({"rank_pattern": {"q_proj": 2}}, "'rank_pattern'"),
        ({"alpha_pattern": {"q_proj": 2}}, "'alpha_pattern'"),
        ({"layer_replication": [[0, 1]]}, "'layer_replication'"),
        ({"trainable_token_indices": [1]}, "'trainable_token_indices'"),
        ({"an_option_of_tomorrow": 1}, "'an_option_of_tomorrow'"),
        ({"init_lora_weights": "pissa"}, "'init_lora_weights' is 'pissa', which changed the base"),
        ({"init_lora_weights": {}}, "'init_lora_weights' is {}"),
        ({"peft_type": "LOHA"}, "\"peft_type\" must be one of LORA.*got 'LOHA'"),
        ({"peft_type": ["LORA"]}, "\"peft_type\" must be"),
        ({"fastpeft": {"method": "lora", "version": 2}}, '"version" 1'),
        ({"r": 0}, "r must be an int"),
        ({"r": 2}, "of another shape"),
        ({"r": "4"}, "r must be an int"),
        ({"lora_alpha": None}, "alpha must be a finite number"),
        ({"lora_dropout": 2}, "dropout must be"),
        ({"use_rslora": "yes"}, "rslora must be a bool"),
        ({"target_modules": ["query"]}, "it alone has"),
        ({"target_modules": ["nothing"]}, "names no linear layer of this BertForSequenceClassification. It has: .*query"),
        ({"target_modules": [1]}, "'target_modules' must be a list of module names"),
        ({"target_modules": None}, "names no linear layer"),
        ({"target_modules": {"a": 1}}, "'target_modules' must be a list"),
        ({"modules_to_save": None}, "it alone has .*classifier"),
        ({"modules_to_save": "classifier"}, "'modules_to_save' must be a list"),
        ({"modules_to_save": ["classifier", "word_embeddings"]}, "it lacks .*word_embeddings"),
    ],
)  # fmt: skip
def test_configs(changes, words, tmp_path):
    fp.save_adapter(trained("bert"), tmp_path)
    _edit(tmp_path, **changes)
    _refused(base_model("bert"), tmp_path, words)


def test_another_base(tmp_path):
    fp.save_adapter(trained("bert"), tmp_path)
    other = base_model("bert")
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight.mul_(1.5)
    _refused(other, tmp_path, "was trained on another base model.*check_base=False")
    fp.load_adapter(other, tmp_path, check_base=False)
    _refused(base_model("llama"), tmp_path, "names no linear layer of this LlamaForCausalLM")
    torch.manual_seed(0)
    larger = GPT2ForSequenceClassification(GPT2Config(vocab_size=61, n_embd=48, n_layer=2, n_head=4, num_labels=3))
    fp.save_adapter(trained("gpt2"), tmp_path / "gpt2")
    _refused(larger, tmp_path / "gpt2", "of another shape: .* and must be")


def test_another_head_is_the_same_base(tmp_path):
    """It is what is replaced: transformers draws a new one with every `from_pretrained`."""
    fp.save_adapter(trained("bert"), tmp_path)
    other = base_model("bert").eval()
    nn.init.ones_(other.classifier.weight)
    fp.load_adapter(other, tmp_path)
    assert torch.equal(output(other, batch("bert")), output(trained("bert"), batch("bert")))


def test_tensors(tmp_path):
    fp.save_adapter(trained("bert"), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    good, name = load_file(path), "base_model.model.bert.pooler.dense.lora_A.weight"
    for change, words in (
        ({name: None}, "it lacks .*pooler"),
        ({"evil": torch.zeros(1)}, "it alone has 'evil'"),
        ({name: good[name][:, 1:].contiguous()}, "of another shape"),
        ({name: torch.full_like(good[name], torch.nan)}, "NaN or infinity"),
    ):
        save_file({key: t for key, t in (good | change).items() if t is not None}, path)
        _refused(base_model("bert"), tmp_path, words)
    model = base_model("bert")
    fp.load_adapter(model, tmp_path, allow_nonfinite=True)
    fp.save_adapter(trained("bert"), tmp_path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    _refused(base_model("bert"), tmp_path, "is not what was saved")
    fp.load_adapter(base_model("bert"), tmp_path, allow_edited=True)
    path.unlink()
    _refused(base_model("bert"), tmp_path, "adapter_model.safetensors")


def test_a_load_that_fails_in_the_end(tmp_path, monkeypatch):
    model, x = trained("bert"), batch("bert")
    fp.save_adapter(model, tmp_path)
    was, before = state(model), output(model, x)
    monkeypatch.setattr(fp.methods.lora, "load", _no_memory)
    with pytest.raises(MemoryError):
        fp.load_adapter(model, tmp_path, "second")
    assert_same_state(model, was)
    assert torch.equal(output(model, x), before)


def _no_memory(*args: object) -> None:
    raise MemoryError


def test_models_that_cannot_take_it(tmp_path):
    fp.save_adapter(trained("llama"), tmp_path)
    with pytest.raises(ValueError, match="wrapped by PEFT"):
        fp.load_adapter(in_peft(base_model("llama"), tmp_path), tmp_path)
    with pytest.raises(ValueError, match="an adapter 'default' is attached already"):
        fp.load_adapter(trained("llama"), tmp_path)
    with pytest.raises(ValueError, match="embed_tokens.weight must be loaded, it is on the meta device"):
        fp.load_adapter(base_model("llama").to("meta"), tmp_path)
    with pytest.raises(ValueError, match="save_adapter: name must be one of 'default', got 'other'"):
        fp.save_adapter(trained("llama"), tmp_path, "other")
    with pytest.raises(ValueError, match="save_adapter: no adapter is attached"):
        fp.save_adapter(base_model("llama"), tmp_path)


def test_a_file_of_peft_names_its_base_alone(tmp_path):
    """No fingerprint is stored, and names and shapes decide."""
    theirs = peft.get_peft_model(base_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path)
    other = base_model("llama")
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(2.0)
    fp.load_adapter(other, tmp_path)
