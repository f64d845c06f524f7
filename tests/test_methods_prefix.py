"""Prefixes in models of transformers: against eager attention over longer keys, and what a model does besides."""

from __future__ import annotations

import copy
import json
import pickle

import _prefix
import pytest
import torch
from _prefix import CAUSAL, KINDS, LIMIT, TEXT, assert_same, base_model, batch, positions, seen, stir
from torch import nn
from transformers import BartConfig, BartModel, DynamicCache, Gemma2Config, Gemma2Model, OPTConfig, OPTModel, set_seed

import fastpeft as fp
from fastpeft.interop.attention import NAME
from fastpeft.methods.prefix import prefix_rows

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS = {
    "joint": fp.PrefixConfig(5),
    "one a layer": fp.PrefixConfig((0, 3)),
    "apt": fp.PrefixConfig(5, gates="token+layer"),
    "token gates": fp.PrefixConfig(4, gates="token"),
    "layer gates": fp.PrefixConfig(4, gates="layer"),
    "llama_adapter": fp.PrefixConfig(5, style="llama_adapter"),
    "llama_adapter, gates": fp.PrefixConfig(3, style="llama_adapter", gates="token+layer"),
    "mlp": fp.PrefixConfig(3, mlp=6),
    "log-bias, later start": fp.PrefixConfig(3, log_bias=True, position_start=6),
}


def attached(kind, config, name="default", seed=1, **model):
    """A model with a prefix whose parameters all matter, and the base."""
    base = base_model(kind, **model)
    prefixed = copy.deepcopy(base)
    fp.attach(prefixed, config, name)
    stir(list(adapter(prefixed, name).parameters().values()), seed)
    return prefixed, base


def adapter(model, name="default"):
    return model.__dict__["_fastpeft"].attached[name].adapter


def start_of(model, name="default"):
    return adapter(model, name).selection.starts[name]


# ---- the same as keys that begin with the prefix ---------------------------------------------------------------------


def ours(model, dtype, **inputs):
    """(logits, gradients of the prefix' parameters, one vector), as `_prefix.oracle` has them."""
    model, mask = copy.deepcopy(model).to(dtype), inputs.get("attention_mask")
    logits = model(**in_dtype(inputs, dtype)).logits
    grads = torch.autograd.grad(_prefix.loss(logits, mask), list(adapter(model).parameters().values()))
    return seen(logits, mask).detach(), torch.cat([g.flatten() for g in grads])


def in_dtype(inputs, dtype):
    return {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}


def cases(kind, configs):
    """(what it is, ours in float64 and float32, the oracle's) for each config and padding."""
    for name in configs:
        model, base = attached(kind, CONFIGS[name])
        for prefix in adapter(model).given():
            if prefix.log_bias is not None:
                prefix.log_bias.copy_(torch.tensor([0.5, -torch.inf, 1.0]))
        for padding in (None,) if kind == "vit" else (None, "left", "right"):
            inputs = batch(kind, padding=padding)
            found = [ours(model, dtype, **inputs) for dtype in (torch.float64, torch.float32)]
            call = base, adapter(model).prefixes, start_of(model)
            found += [_prefix.oracle(*call, dtype, **inputs) for dtype in (torch.float64, torch.float32)]
            yield f"{name}, padding {padding}", found


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_eager_attention(kind, config):
    for name, (got, _, exact, single) in cases(kind, [config]):
        for part, what in enumerate(("logits", "gradients")):
            assert_same(got[part], exact[part], single[part], f"{what} of {name}")


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_as_exact_as_eager_attention(kind):
    """Over all cases, as a share of each value: alone, one is a draw of few roundings that the model amplifies."""
    errors = torch.zeros(2, 2)
    for _, (_, got, exact, single) in cases(kind, CONFIGS):
        for part in (0, 1):
            errors[part] += torch.stack(
                [(x[part] - exact[part]).norm() / exact[part].norm() for x in (got, single)]
            ).float()
    assert (errors[:, 0] <= 2 * errors[:, 1]).all(), errors


@pytest.mark.parametrize("kind", CAUSAL)
def test_an_ungated_prefix_is_a_cache_that_is_full_already(kind):
    model, base = attached(kind, fp.PrefixConfig(5))
    ids = batch(kind)["input_ids"]

    def cached(dtype):
        reference, cache = copy.deepcopy(base).to(dtype), DynamicCache(config=base.config)
        for i, prefix in enumerate(adapter(model).given()):
            cache.update(*(x[None].repeat(len(ids), 1, 1, 1).to(dtype) for x in prefix.keys_values()), i)
        return reference(ids, past_key_values=cache, use_cache=True).logits

    assert_same(copy.deepcopy(model).double()(ids).logits, cached(torch.float64), cached(torch.float32))


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_prefix_from_token_ids_is_that_text(kind):
    """Logits behind the text are those of text and tokens in one sequence; in training mode too it is read without dropout."""
    base = base_model(kind, dropout=0.5)
    text, ids = batch(kind, rows=1, tokens=5, seed=3)["input_ids"], batch(kind, rows=1)["input_ids"]
    model = copy.deepcopy(base).train()
    fp.attach(model, fp.PrefixConfig(5, init=text[0]))
    assert all(module.training for module in model.modules())

    def whole(dtype):
        return copy.deepcopy(base).to(dtype)(torch.cat([text, ids], 1)).logits[:, 5:]

    double = copy.deepcopy(base).double().train()
    fp.attach(double, fp.PrefixConfig(5, init=text[0]))
    assert_same(double.eval()(ids).logits, whole(torch.float64), model.eval()(ids).logits)


def test_token_ids_are_read_by_the_base_alone():
    """Whatever is active. A layer of fewer tokens takes the first ones."""
    found = []
    for dtype in (torch.float64, torch.float64, torch.float32):
        model = base_model("llama").to(dtype)
        if not found:
            fp.attach(model, fp.PrefixConfig(3), "prefix")
            fp.attach(model, fp.LoraConfig(), "lora")
            for name in ("prefix", "lora"):
                stir(list(adapter(model, name).parameters().values()))
            fp.activate(model, "prefix")
        fp.attach(model, fp.PrefixConfig((5, 2), init=list(range(10, 15))))
        assert [prefix.length for prefix in adapter(model).given()] == [5, 2]
        found.append(torch.cat([p.flatten() for p in adapter(model).parameters().values()]))
    assert_same(*found)


# ---- positions and mixed batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TEXT)
def test_positions_that_are_given_are_moved_too(kind):
    model, _ = attached(kind, fp.PrefixConfig(5))
    inputs = batch(kind, padding="right")
    own = positions(model, inputs["input_ids"], 0)
    assert torch.equal(model(**inputs, position_ids=own).logits, model(**inputs).logits)
    moved = torch.where(own == own[-1, -1], own, own + 2) if kind == "roberta" else own + 2
    assert not torch.equal(model(**inputs, position_ids=moved).logits, model(**inputs).logits) or kind in (
        "llama",
        "qwen2",
    )


@pytest.mark.parametrize("config", ["joint", "apt", "llama_adapter, gates"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_gives_each_row_its_own_prefix(kind, config):
    """Prefixes of unequal lengths, one without gates beside gated ones; −1 is the base."""
    config = CONFIGS[config]
    model, base = attached(kind, config, "a")
    second = fp.PrefixConfig((2, 0), style=config.style)
    fp.attach(model, second, "b")
    stir(list(adapter(model, "b").parameters().values()), seed=2)
    inputs = batch(kind, rows=4, padding=None if kind == "vit" else "right")
    mask, found = inputs.get("attention_mask"), {}
    for dtype in (torch.float64, torch.float32):
        cast, call = copy.deepcopy(model).to(dtype), in_dtype(inputs, dtype)
        for name in ("a", "b", None):
            fp.activate(cast, name)
            found[dtype, name] = cast(**call).logits
        with prefix_rows(cast, [1, -1, 0, 1]):
            found[dtype, "mixed"] = cast(**call).logits
        assert torch.equal(cast(**call).logits, found[dtype, None])  # what was active before is so again
    for row, name in enumerate(["b", None, "a", "b"]):
        rows = [found[key][row] for key in ((torch.float64, "mixed"), (torch.float64, name), (torch.float32, name))]
        rows = rows if mask is None or rows[0].dim() == 1 else [x[mask[row].bool()] for x in rows]
        assert_same(*rows, f"row {row} with {name}")


def test_prefix_rows_refuses_what_it_cannot_do():
    model, base = attached("llama", fp.PrefixConfig(3), "a")
    fp.attach(model, fp.PrefixConfig(3, style="llama_adapter"), "b")
    ids = batch("llama", rows=2)["input_ids"]
    before = model(ids).logits
    for index, names, message in [
        ([0, 1], ["a"], r"index must be \[B\] ints from −1 to 0, got \[0, 1\]"),
        ([0.5], ["a"], r"index must be \[B\] ints"),
        ([0, 1], None, "names must be prefixes of one style"),
        ([0], ["c"], r"names must be attached prefixes \(a, b\), got \['c'\]"),
    ]:
        with pytest.raises(ValueError, match=message), prefix_rows(model, index, names):
            pass
    with pytest.raises(ValueError, match="of 3 rows, the batch has 2"), prefix_rows(model, [0, 0, 0], ["a"]):
        model(ids)
    with pytest.raises(ValueError, match="no prefix attached"), prefix_rows(base, [0]):
        pass
    assert torch.equal(model(ids).logits, before)


def test_too_many_tokens_for_the_positions_that_are_left():
    for kind in ("gpt2", "bert", "roberta"):
        model, _ = attached(kind, fp.PrefixConfig(5))
        model(**batch(kind, tokens=LIMIT - 5))
        with pytest.raises(
            ValueError, match=f"has {LIMIT} positions, of which the prefix takes 5: at most 35 tokens, got 36"
        ):
            model(**batch(kind, tokens=LIMIT - 4))
    with pytest.raises(ValueError, match="at most 35 tokens, got 7 at positions up to 36"):
        ids = batch("gpt2")["input_ids"]
        attached("gpt2", fp.PrefixConfig(5))[0](ids, position_ids=torch.arange(30, 37)[None])


# ---- causality, caches, masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["joint", "apt", "llama_adapter, gates"])
@pytest.mark.parametrize("kind", CAUSAL)
def test_nothing_leaks_from_the_future(kind, config):
    """Logits up to t have no gradient to later tokens' embeddings, through gates neither; the gates do depend on tokens."""
    model, _ = attached(kind, CONFIGS[config])
    ids = batch(kind)["input_ids"]
    for t in range(ids.shape[1]):
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        (grad,) = torch.autograd.grad(model(inputs_embeds=embeds).logits[:, : t + 1].square().sum(), embeds)
        assert not grad[:, t + 1 :].any()
        assert grad[:, : t + 1].any(-1).all()


@pytest.mark.parametrize("config", ["joint", "apt", "llama_adapter, gates"])
@pytest.mark.parametrize("kind", CAUSAL)
def test_generate_is_the_same_with_every_cache(kind, config):
    model, _ = attached(kind, CONFIGS[config])
    calls = {"no cache": {"use_cache": False}, "dynamic": {}, "static": {"cache_implementation": "static"}}
    for inputs in (batch(kind), batch(kind, padding="left")):
        found = {
            name: model.generate(**inputs, **call, max_new_tokens=6, do_sample=False, eos_token_id=None)
            for name, call in calls.items()
        }
        assert torch.equal(found["dynamic"], found["no cache"]) and torch.equal(found["static"], found["no cache"])
    with prefix_rows(model, [0, -1, 0]):
        mixed = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(mixed[[0, 2]], found["dynamic"][[0, 2]]) and not torch.equal(mixed[1], found["dynamic"][1])
    fp.detach(model)
    plain = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(mixed[1], plain[1])


@pytest.mark.parametrize("kind", CAUSAL)
def test_the_cache_holds_tokens_only_and_takes_them_in_pieces(kind):
    single, _ = attached(kind, CONFIGS["apt"])
    model = copy.deepcopy(single).double()
    inputs = batch(kind, tokens=9, padding="left")
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    cache, pieces = DynamicCache(config=model.config), []
    for begin, end in ((0, 4), (4, 8), (8, 9)):
        pieces.append(
            model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True).logits
        )
        assert cache.get_seq_length() == end
    whole = [seen(m(**inputs).logits, mask) for m in (model, single)]
    assert_same(seen(torch.cat(pieces, 1), mask), *whole)


@pytest.mark.parametrize("kind", CAUSAL)
def test_masks_that_padding_cannot_say(kind):
    """A mask [B, 1, T, S] of the user's, and packed sequences."""
    single, _ = attached(kind, CONFIGS["joint"])
    model = copy.deepcopy(single).double()
    inputs = batch(kind, padding="left")
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    full = mask.bool()[:, None, None] & torch.ones(7, 7, dtype=torch.bool).tril()
    by_padding = [seen(m(**inputs).logits, mask) for m in (model, single)]
    assert_same(seen(model(ids, attention_mask=full).logits, mask), *by_padding)
    ids = batch(kind, rows=1, tokens=8)["input_ids"]
    packed = model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]), use_cache=False).logits
    apart = [torch.cat([m(part).logits for part in (ids[:, :3], ids[:, 3:])], 1) for m in (model, single)]
    assert_same(packed, *apart)


def test_sliding_windows():
    base = base_model("qwen2")
    base.config.sliding_window, base.config.layer_types = 3, ["full_attention", "sliding_attention"]
    for layer, kind in zip(base.model.layers, base.config.layer_types):
        layer.attention_type = layer.self_attn.layer_type = kind
        layer.self_attn.sliding_window = 3 if kind == "sliding_attention" else None
    base.model.has_sliding_layers = True
    model = copy.deepcopy(base)
    fp.attach(model, CONFIGS["joint"])
    stir(list(adapter(model).parameters().values()))
    inputs = batch("qwen2", padding="left")
    call = base, adapter(model).prefixes, 5
    exact, single = (_prefix.oracle(*call, dtype, **inputs)[0] for dtype in (torch.float64, torch.float32))
    assert_same(ours(model, torch.float64, **inputs)[0], exact, single)
    fp.activate(model, None)
    assert not torch.equal(model(**inputs).logits, base_model("qwen2")(**inputs).logits)  # the window does something


def test_attention_dropout_is_for_training():
    for kind in ("gpt2", "bert"):
        model, _ = attached(kind, CONFIGS["joint"], dropout=0.5)
        inputs = batch(kind)
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)
        model.train()
        found = []
        for seed in (0, 0, 1):
            set_seed(seed)
            found.append(model(**inputs).logits)
        assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


# ---- training and tools ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"gates": "token+layer"}, {"style": "llama_adapter"}, {"mlp": 8}], ids=str)
def test_trains_from_its_defaults(kind, options):
    """30 steps fit one batch better by a tenth at least; what is trained is the prefix, and a task head."""
    model = base_model(kind)
    fp.attach(model, fp.PrefixConfig(8, **options))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(NAME in name or "classifier" in name for name in trained)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer, inputs, losses = torch.optim.Adam(trained.values(), lr=0.03), batch(kind), []
    labels = inputs["input_ids"] if kind in CAUSAL else torch.tensor([0, 1, 0])
    for _ in range(30):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses
    same = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert same == set(before) - set(trained)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "vit"])
def test_gradient_checkpointing(kind, reentrant):
    """With attention dropout, whose masks come again."""
    model, _ = attached(kind, CONFIGS["apt"], dropout=0.3)
    inputs, trained = batch(kind), list(adapter(model).parameters().values())
    model.train()

    def gradients():
        for p in trained:
            p.grad = None
        set_seed(0)
        _prefix.loss(model(**inputs).logits, None).backward()
        return [p.grad for p in trained]

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert all(map(torch.equal, gradients(), expected))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_whole(kind):
    """Forward and backward; padding and a mixed batch too."""
    torch._dynamo.reset()
    single, _ = attached(kind, CONFIGS["apt"])
    model = copy.deepcopy(single).double()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for padding in (None,) if kind == "vit" else (None, "left"):
        inputs, found = batch(kind, padding=padding), []
        for run, of, dtype in ((compiled, model, torch.float64), (model, model, torch.float64), (single, single, None)):
            call = inputs if dtype is None else in_dtype(inputs, dtype)
            logits, trained = run(**call).logits, list(adapter(of).parameters().values())
            grads = torch.autograd.grad(_prefix.loss(logits, inputs.get("attention_mask")), trained)
            found.append((seen(logits, inputs.get("attention_mask")), torch.cat([g.flatten() for g in grads])))
        for what, results in zip(("logits", "gradients"), zip(*found)):
            assert_same(*results, what)
    with prefix_rows(model, [0, -1, 0]), prefix_rows(single, [0, -1, 0]), torch.no_grad():
        call = in_dtype(inputs, torch.float64)
        results = compiled(**call).logits, model(**call).logits, single(**inputs).logits
    assert_same(*(seen(logits, inputs.get("attention_mask")) for logits in results), "rows")


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_copies_and_pickles(kind, copied):
    model, _ = attached(kind, CONFIGS["apt"])
    inputs = batch(kind)
    before = model(**inputs).logits
    other = copied(model)
    assert torch.equal(other(**inputs).logits, before)
    fp.detach(other)
    assert NAME not in {name.rpartition(".")[2] for name, _ in other.named_modules()}
    assert other.config._attn_implementation == "sdpa"
    assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_detach_leaves_the_base_as_it_was(kind, implementation):
    model = base_model(kind)
    model.set_attn_implementation(implementation)
    inputs = batch(kind)
    before, state, shape = model(**inputs).logits, copy.deepcopy(model.state_dict()), _shape(model)
    for names in (["a"], ["a", "b"]):
        for name in names:
            fp.attach(model, CONFIGS["apt"], name)
        assert not torch.equal(model(**inputs).logits, before)
        fp.activate(model, None)
        assert torch.equal(model(**inputs).logits, before)  # the base's own attention
        for name in names:
            fp.detach(model, name)
        assert _shape(model) == shape
        assert torch.equal(model(**inputs).logits, before)
        assert all(torch.equal(x, state[key]) for key, x in model.state_dict().items())


def _shape(model) -> list:
    """Modules, hooks, flags, attention."""
    modules = [(name, type(m), len(m._forward_pre_hooks), len(m._forward_hooks), m.training, sorted(m.__dict__))
               for name, m in model.named_modules()]  # fmt: skip
    return [
        modules,
        [(name, p.requires_grad) for name, p in model.named_parameters()],
        model.config._attn_implementation,
    ]


def test_lora_beside_a_prefix():
    """Two methods on one model: each alone is as without the other."""
    both, base = attached("llama", CONFIGS["apt"], "prefix")
    ids = batch("llama")["input_ids"]
    prefixed = both(ids).logits
    lora = copy.deepcopy(base)
    for model in (both, lora):
        fp.attach(model, fp.LoraConfig(r=2), "lora")
        stir(list(adapter(model, "lora").parameters().values()))
    assert torch.equal(both(ids).logits, lora(ids).logits)
    fp.activate(both, "prefix")
    assert torch.equal(both(ids).logits, prefixed)
    fp.detach(both, "prefix")
    fp.activate(both, "lora")
    assert torch.equal(both(ids).logits, lora(ids).logits)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", ["llama", "bert", "vit"])
def test_files_bring_a_prefix_back(kind, config, tmp_path):
    """Task heads too. An MLP comes back as what it made."""
    model, base = attached(kind, CONFIGS[config])
    for prefix in adapter(model).given():
        if prefix.log_bias is not None:
            prefix.log_bias.copy_(torch.tensor([0.5, -3.0, 1.0]))
    if kind != "llama":
        stir(list(model.classifier.adapters["default"].parameters()))
    inputs = batch(kind)
    saved = fp.save_adapter(model, tmp_path)
    reasons = {
        "one a layer": "one length and shape",
        "apt": "no gates",
        "token gates": "no gates",
        "layer gates": "no gates",
        "llama_adapter": "no llama_adapter-style",
        "llama_adapter, gates": "no gates",
        "log-bias, later start": "no log-bias",
    }
    peft = config in ("joint", "mlp") and kind != "vit"
    assert saved.format == ("peft" if peft else "fastpeft")
    assert peft or reasons.get(config, "positions start behind the prefix") in str(saved)
    other = copy.deepcopy(base)
    fp.load_adapter(other, tmp_path)
    assert torch.equal(other(**inputs).logits, model(**inputs).logits)
    assert not any("mlp" in name for name in adapter(other).parameters())
    again = fp.save_adapter(other, tmp_path / "again")
    assert again.format == saved.format
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


@pytest.mark.parametrize("kind", CAUSAL)
def test_peft_reads_our_files_and_we_read_pefts(kind, tmp_path):
    from peft import PeftModel, PrefixTuningConfig, TaskType, get_peft_model

    model, base = attached(kind, fp.PrefixConfig(5))
    inputs = batch(kind)
    double, found = copy.deepcopy(model).double(), []
    fp.save_adapter(model, tmp_path)
    for dtype in (torch.float64, torch.float32):
        peft = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).to(dtype)
        found.append(peft(**inputs).logits)
    assert_same(double(**inputs).logits, *found)

    trained = get_peft_model(
        copy.deepcopy(base), PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
    )
    trained.save_pretrained(tmp_path / "theirs")
    other = copy.deepcopy(base).double()
    fp.load_adapter(other, tmp_path / "theirs")
    single = trained(**inputs).logits
    trained = trained.double()
    assert_same(other(**inputs).logits, trained(**inputs).logits, single)


def test_pefts_classifiers_are_read(tmp_path):
    """It cannot run one itself; its head comes too."""
    from peft import PeftModel, PrefixTuningConfig, TaskType, get_peft_model

    base = base_model("bert")
    trained = get_peft_model(copy.deepcopy(base), PrefixTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=4))
    state = {name: p for name, p in trained.named_parameters() if p.requires_grad}
    stir(list(state.values()))
    trained.save_pretrained(tmp_path / "theirs")
    fp.load_adapter(base, tmp_path / "theirs")
    fp.save_adapter(base, tmp_path / "ours")
    again = dict(PeftModel.from_pretrained(base_model("bert"), tmp_path / "ours").named_parameters())
    assert len(state) == 3 and all(torch.equal(p, again[name]) for name, p in state.items())


@pytest.mark.parametrize(
    "config, change, message",
    [
        ("joint", {"num_virtual_tokens": 6}, "prompt_embeddings"),
        ("joint", {"num_virtual_tokens": None}, "length must be an int"),
        ("joint", {"num_virtual_tokens": LIMIT}, "length must be below the 40 positions"),
        ("joint", {"num_layers": 4}, "'num_layers' must be 2 for this model, got 4"),
        ("joint", {"token_dim": 8}, "'token_dim' must be 16 for this model, got 8"),
        (
            "joint",
            {"num_transformer_submodules": 2},
            "'num_transformer_submodules' is 2, which fastpeft does not compute",
        ),
        ("apt", {"fastpeft": {"method": "prefix", "version": 1, "length": 5, "depth": 2}}, "a prefix has no 'depth'"),
        ("apt", {"fastpeft": {"method": "prefix", "version": 1, "length": [5]}}, "length must be one int a layer"),
        ("apt", {"fastpeft": {"method": "prefix", "version": 1, "length": 5}}, "token_gate"),
        ("apt", {"fastpeft": {"method": "prefix", "version": 1, "length": [[5], 5]}}, "length must be an int"),
        ("apt", {"alora_invocation_tokens": [1]}, "does not compute"),
    ],
)
def test_files_that_do_not_fit_are_refused(config, change, message, tmp_path):
    model, base = attached("llama", CONFIGS[config])
    fp.save_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    shape = _shape(base)
    with pytest.raises(ValueError, match=message):
        fp.load_adapter(base, tmp_path)
    assert _shape(base) == shape


# ---- refusals: nothing half-attached ---------------------------------------------------------------------------------


def refused(model, config, message):
    shape = _shape(model) if hasattr(model, "config") else None
    with pytest.raises(ValueError, match=message):
        fp.attach(model, config)
    assert "_fastpeft" not in model.__dict__
    assert shape is None or _shape(model) == shape


def test_models_that_take_no_prefix_are_refused():
    small = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 40,
    }
    small |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = fp.PrefixConfig(4)
    refused(nn.Sequential(nn.Linear(4, 4)), config, "has no model of transformers")
    stacks = {f"{which}_{key}": n for which in ("encoder", "decoder") for key, n in
              {"layers": 1, "attention_heads": 2, "ffn_dim": 16}.items()}  # fmt: skip
    bart = BartModel(BartConfig(vocab_size=61, d_model=16, max_position_embeddings=40, **stacks))
    refused(bart, config, "has an encoder and a decoder")
    gemma = Gemma2Config(**small, head_dim=8, num_key_value_heads=2)
    refused(Gemma2Model(gemma), config, "Gemma2Attention passes softcap")
    opt = OPTConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16,
                    max_position_embeddings=40, word_embed_proj_dim=16)  # fmt: skip
    refused(OPTModel(opt), config, "cannot be moved behind a prefix")
    refused(nn.Sequential(base_model("llama"), base_model("bert")), config, "several stacks of attention layers")


def test_attention_outside_the_interface_is_refused():
    class Own(nn.Module):
        """An attention layer that never asks transformers for its attention."""

        def __init__(self, layer):
            super().__init__()
            self.layer, self.config = layer, layer.config

        def forward(self, hidden_states, **kwargs):
            return hidden_states, None

    model = base_model("llama")
    layer = model.model.layers[1]
    layer.self_attn.__class__ = type("Other", (type(layer.self_attn),), {"forward": Own.forward})
    refused(model, fp.PrefixConfig(4), "self_attn calls transformers' attention interface 0 times, not once")


@pytest.mark.parametrize("kind", ["gpt2", "roberta", "llama"])
def test_a_prefix_that_takes_all_positions_is_refused(kind):
    refused(base_model(kind), fp.PrefixConfig(LIMIT), f"length must be below the {LIMIT} positions")
    fp.attach(base_model(kind), fp.PrefixConfig(LIMIT - 1))


def test_configs_that_do_not_fit_are_refused():
    refused(base_model("llama"), fp.PrefixConfig((3, 3, 3)), "length must be one int a layer, 2 of them, got 3")
    refused(base_model("llama"), fp.PrefixConfig(2, init=[5, 61]), "init must be token ids below 61")
    refused(base_model("vit"), fp.PrefixConfig(2, init=[5, 6]), "init must be 'random' or 'zeros' for ViTModel")
    model = base_model("llama")
    twin = type(model)(model.config)
    fp.attach(model, fp.PrefixConfig(3))
    with pytest.raises(ValueError, match="shares its configuration object"):
        fp.attach(twin, fp.PrefixConfig(3))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"length": 0}, "length must be an int of at least 1"),
        ({"length": (0, 0)}, "length must be an int of at least 1"),
        ({"length": 2.0}, "length must be an int of at least 1"),
        ({"gates": "head"}, "gates must be one of None, 'token', 'layer', 'token\\+layer', got head"),
        ({"style": None}, "style must be one of 'joint', 'llama_adapter', got None"),
        ({"mlp": 0}, "mlp must be None or the width"),
        ({"init": "ones"}, "init must be 'random', 'zeros' or token ids"),
        ({"length": 3, "init": [1, 2]}, r"init must be token ids \[P\] = \[3\]"),
        ({"length": 2, "init": [1, 2], "mlp": 4}, "init must be 'random' or 'zeros' with an MLP"),
        ({"style": "llama_adapter", "init": "zeros"}, "init must be 'random' or token ids with style 'llama_adapter'"),
        ({"position_start": -1}, "position_start must be None or an int"),
        ({"log_bias": 1}, "log_bias must be True or False"),
    ],
)
def test_configs_check_themselves(wrong, message):
    with pytest.raises(ValueError, match=f"PrefixConfig: {message}"):
        fp.PrefixConfig(**wrong)


def test_another_attention_while_a_prefix_is_active_is_an_error():
    model, _ = attached("bert", CONFIGS["joint"])
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="set to 'eager' while a prefix is active"):
        model(**batch("bert"))
    fp.activate(model, None)
    assert model.config._attn_implementation == "eager"
    fp.activate(model, "default")
    model(**batch("bert"))
    fp.detach(model)
    assert model.config._attn_implementation == "eager"
