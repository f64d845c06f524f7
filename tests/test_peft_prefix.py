"""fp.apply on PEFT's prefix tuning: its outputs and gradients, and what PEFT's own path cannot do."""

from __future__ import annotations

import copy
import pickle

import _prefix
import pytest
import torch
from _prefix import CAUSAL, assert_same, base_model, batch, seen, stir
from peft import PrefixTuningConfig, get_peft_model
from transformers import T5Config, T5ForConditionalGeneration

import fastpeft as fp
from fastpeft.methods.prefix import prefix_rows
from fastpeft.nn import PrefixAttention

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::FutureWarning")]
RUNS = [(kind, "CAUSAL_LM") for kind in CAUSAL] + [("bert", "FEATURE_EXTRACTION"), ("roberta", "FEATURE_EXTRACTION")]
stock_runs = pytest.mark.parametrize("kind, task", RUNS)  # on transformers 5.24
both_prompts = pytest.mark.parametrize("projection", [False, True], ids=["embedding", "mlp"])


def tuned(kind, task, projection=False, length=4, **model):
    base = base_model(kind, **model)
    base = base.base_model if task == "FEATURE_EXTRACTION" else base
    config = PrefixTuningConfig(
        task_type=task, num_virtual_tokens=length, prefix_projection=projection, encoder_hidden_size=9
    )
    wrapped = get_peft_model(base, config).eval()
    stir(list(wrapped.prompt_encoder.parameters()))
    return wrapped


def run(model, dtype=torch.float32, **inputs):
    """(outputs, the prompt's gradients)"""
    model = copy.deepcopy(model).to(dtype)
    y, mask = model(**inputs)[0], inputs.get("attention_mask")
    grads = torch.autograd.grad(_prefix.loss(y, mask), list(model.prompt_encoder.parameters()))
    return seen(y, mask).detach(), torch.cat([g.flatten() for g in grads])


def applied(model):
    model = copy.deepcopy(model)
    report = fp.apply(model)
    (row,) = report.layers
    assert row.path == "fast" and "prefix tuning: 1 model" in str(report)
    return model


@both_prompts
@stock_runs
def test_outputs_and_gradients_are_pefts(kind, task, projection):
    stock = tuned(kind, task, projection)
    fast = applied(stock)
    assert list(fast.state_dict()) == list(stock.state_dict())
    for padding in (None, "right", "left"):
        inputs = batch(kind, padding=padding)
        results = [run(fast, torch.float64, **inputs), *(run(stock, dtype, **inputs) for dtype in _BOTH)]
        for what, found in zip(("outputs", "gradients"), zip(*results)):
            assert_same(*found, f"{what}, padding {padding}")
    fp.revert(fast)
    assert type(fast) is type(stock) and torch.equal(fast(**inputs)[0], stock(**inputs)[0])


_BOTH = torch.float64, torch.float32


@both_prompts
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_classifiers_run_which_pefts_cannot(kind, projection):
    """The definition is the oracle. The classifier is PEFT's copy."""
    stock = tuned(kind, "SEQ_CLS", projection)
    fast, inputs = applied(stock), batch(kind, padding="right")
    with pytest.raises(ValueError, match="does not support past key values"):
        stock(**inputs)
    base, prompt = base_model(kind), stock.get_prompt_embedding_to_save("default")
    pairs = prompt.view(4, 2, 2, 4, 8).permute(1, 2, 3, 0, 4)
    prefixes = [PrefixAttention(4, 4, 8, 4) for _ in pairs]
    for prefix, pair in zip(prefixes, pairs):
        prefix.set_keys_values(*pair)
    exact, single = (_prefix.oracle(base, prefixes, 4, dtype, **inputs)[0] for dtype in _BOTH)
    double = copy.deepcopy(fast).double()
    if projection:  # the prompt above was rounded to float32
        with torch.no_grad():
            rounded = prompt.double() - double.get_prompt_embedding_to_save("default").double()
        assert rounded.norm() <= 2**-20 * prompt.norm()
        assert (double(**inputs).logits - exact).norm() <= 4 * (single - exact).norm()
    else:
        assert_same(double(**inputs).logits, exact, single)
    loss = fast(**inputs, labels=torch.tensor([0, 1, 0])).loss
    assert torch.autograd.grad(loss, [p for p in fast.parameters() if p.requires_grad])


@pytest.mark.parametrize("kind", CAUSAL)
def test_generate_with_every_cache(kind):
    model = applied(tuned(kind, "CAUSAL_LM"))
    calls = {"use_cache": False}, {}, {"cache_implementation": "static"}
    for inputs in (batch(kind), batch(kind, padding="left")):
        found = [
            model.generate(**inputs, **call, max_new_tokens=6, do_sample=False, eos_token_id=None) for call in calls
        ]
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
        with model.disable_adapter():
            plain = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
        base = base_model(kind).generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert torch.equal(plain, base) and not torch.equal(plain, found[0])


@both_prompts
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, projection):
    model = applied(tuned("llama", "CAUSAL_LM", projection))
    model.train()
    inputs, trained = batch("llama"), list(model.prompt_encoder.parameters())

    def gradients():
        for p in trained:
            p.grad = None
        _prefix.loss(model(**inputs).logits, None).backward()
        return [p.grad for p in trained]

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert all(map(torch.equal, gradients(), expected))


@pytest.mark.parametrize("kind, task", [("llama", "CAUSAL_LM"), ("bert", "SEQ_CLS")])
def test_adapters_are_switched_added_disabled_and_mixed(kind, task):
    model, inputs = applied(tuned(kind, task)), batch(kind)
    first = model(**inputs).logits
    model.add_adapter("b", PrefixTuningConfig(task_type=task, num_virtual_tokens=3))
    assert torch.equal(model(**inputs).logits, first)
    model.set_adapter("b")
    second = model(**inputs).logits
    with model.disable_adapter():
        plain = model(**inputs).logits
    if kind == "llama":
        assert torch.equal(plain, base_model(kind)(**inputs).logits)
    assert torch.equal(model(**inputs).logits, second)
    double = copy.deepcopy(model).double()
    with prefix_rows(double, [0, -1, 1], ["default", "b"]):
        mixed = double(**inputs).logits
    if kind == "llama":  # the classifier is the active adapter's
        for row, (name, single) in enumerate((("default", first), (None, plain), ("b", second))):
            double.set_adapter(name or "b")
            with double.disable_adapter() if name is None else torch.enable_grad():
                assert_same(mixed[row], double(**inputs).logits[row], single[row], f"row {row}")
    model.set_adapter("default")
    model.delete_adapter("b")
    assert torch.equal(model(**inputs).logits, first)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_and_pickles(copied):
    model, inputs = applied(tuned("llama", "CAUSAL_LM")), batch("llama")
    other = copied(model)
    assert torch.equal(other(**inputs).logits, model(**inputs).logits)
    other.prompt_encoder["default"].embedding.weight.data.zero_()
    assert not torch.equal(other(**inputs).logits, model(**inputs).logits)
    fp.revert(other)
    fp.revert(other)
    assert other.base_model.config._attn_implementation == "sdpa" != model.base_model.config._attn_implementation


def test_files_are_pefts_before_and_after(tmp_path):
    stock = tuned("llama", "CAUSAL_LM")
    stock.save_pretrained(tmp_path / "stock")
    applied(stock).save_pretrained(tmp_path / "fast")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "stock" / file).read_bytes() == (tmp_path / "fast" / file).read_bytes()


def test_applying_again_changes_nothing():
    model, inputs = applied(tuned("bert", "FEATURE_EXTRACTION")), batch("bert")
    before = model(**inputs)[0]
    report = fp.apply(model)
    assert [row.path for row in report.layers] == ["fast"] and torch.equal(model(**inputs)[0], before)


def test_disabling_before_apply_leaves_no_old_forward():
    model, inputs = tuned("llama", "CAUSAL_LM"), batch("llama")
    with model.disable_adapter():
        plain = model(**inputs).logits
    fast = applied(model)
    assert "forward" not in fast.__dict__
    with fast.disable_adapter():
        assert torch.equal(fast(**inputs).logits, plain)


def test_compiles_whole():
    torch._dynamo.reset()
    model = applied(tuned("llama", "CAUSAL_LM"))
    double, inputs = copy.deepcopy(model).double(), batch("llama", padding="left")
    compiled, mask = torch.compile(double, fullgraph=True, backend="eager"), inputs["attention_mask"]
    assert_same(*(seen(m(**inputs).logits, mask) for m in (compiled, double, model)))


def test_what_stays_pefts_says_why():
    t5 = T5Config(vocab_size=61, d_model=16, d_kv=8, num_heads=2, num_layers=1, d_ff=16)
    model = get_peft_model(
        T5ForConditionalGeneration(t5), PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4)
    )
    (row,) = fp.apply(model).layers
    assert row.path == "peft" and "no fast path for a PeftModelForSeq2SeqLM" in row.reason
    model = tuned("llama", "CAUSAL_LM")
    model.peft_config["default"].num_layers = 1
    kind = type(model)
    (row,) = fp.apply(model).layers
    assert row.path == "peft" and "has a prompt for 1 layers" in row.reason and type(model) is kind
    assert model.base_model.config._attn_implementation == "sdpa"
