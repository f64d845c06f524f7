"""Drop-in means drop-in: what users of fine-tuning libraries reported in public, on applied models beside PEFT's code."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import peft
import pytest
import torch
from _peft import (
    assert_like_peft,
    assert_same_output,
    assert_same_results,
    dense,
    double,
    layers,
    output,
    pair,
    runs,
    tokens,
)
from conftest import BUT_INTERPRETED
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DebertaConfig,
    DebertaModel,
    LongformerConfig,
    LongformerModel,
    OlmoConfig,
    OlmoForCausalLM,
)

import fastpeft

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = {"hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


# ---- outputs may be changed in place: models that clip or scale their projections --------------------------------------

MODELS = {
    "olmo": lambda: OlmoForCausalLM(OlmoConfig(**SMALL, clip_qkv=0.02, pad_token_id=0, eos_token_id=1)),
    "longformer": lambda: LongformerModel(
        LongformerConfig(**SMALL, **NO_DROPOUT, attention_window=4, max_position_embeddings=64, pad_token_id=0),
        add_pooling_layer=False,
    ),
    "deberta": lambda: DebertaModel(
        DebertaConfig(**SMALL, **NO_DROPOUT, relative_attention=True, pos_att_type=["c2p", "p2c"], pad_token_id=0)
    ),
}


@pytest.mark.parametrize("checkpointed", [None, True, False], ids=["", "reentrant", "not reentrant"])
@pytest.mark.parametrize("kind", MODELS)
def test_models_that_change_their_projections_in_place(kind, checkpointed):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    plain = peft.get_peft_model(MODELS[kind](), config).train()
    plain.enable_input_require_grads()
    if checkpointed is not None:
        plain.gradient_checkpointing_enable({"use_reentrant": checkpointed})
    fast = copy.deepcopy(plain)
    assert {row.path for row in fastpeft.apply(fast).layers} == {"fast"}
    whole = partial(runs, forward=lambda model, ids: output(model, ids[:, :8]))  # (Longformer's padding makes NaN)
    assert_same_results(*map(whole, (fast, plain, double(plain))))


# ---- adapters off is B = 0 -------------------------------------------------------------------------------------------


def switched_off(fast, how):
    """Runs `fast` with its adapters off, in the same mode"""
    if how == "disabled":
        return fast.disable_adapter()
    fast.merge_adapter()
    return _Merged(fast)


class _Merged:
    def __init__(self, model):
        self.model = model

    def __enter__(self):
        return self.model

    def __exit__(self, *exception):
        self.model.unmerge_adapter()


@pytest.mark.parametrize("backend", BUT_INTERPRETED, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_policy_and_reference_agree_bit_for_bit(kind, dtype, backend):
    """DPO and GRPO take the model with its adapters off as the reference; at B = 0 its log-probabilities are the policy's."""
    fast, report, _ = pair(kind, dtype=dtype, init_lora_weights=True)
    for rows, length in ((1, 1), (2, 9), (5, 40)):
        ids = tokens(rows, length)
        policy = output(fast, ids)
        assert policy.requires_grad
        for how in ("disabled", "merged"):
            with switched_off(fast, how):
                assert {row.path for row in report.layers} == {"torch" if backend.startswith("torch") else "fast"}
                assert all(how in row.reason or "forced" in row.reason for row in report.layers)
                assert torch.equal(output(fast, ids), policy.detach())
                with torch.no_grad():
                    assert torch.equal(output(fast, ids), policy.detach())
        with torch.no_grad():
            assert torch.equal(output(fast, ids), policy.detach())


@pytest.mark.parametrize("situation", ["plain", "seen", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_with_its_adapters_off_in_every_situation(dtype, situation):
    """With dropout in training too, of which the base sees nothing; gradients reach x."""
    fast, _, plain = pair(dtype=dtype, init_lora_weights=True, lora_dropout=0.3)
    layer = layers(fast)["o_proj"]

    def rows(m):
        return torch.randn(m, 40, generator=torch.Generator().manual_seed(m)).to(dtype)

    def results(m):
        x = rows(m).requires_grad_()
        if situation == "seen":
            with FlopCounterMode(display=False):
                y = layer(x)
        else:
            y = (torch.compile(layer, backend="eager") if situation == "compiled" else layer)(x)
        return y.detach(), *torch.autograd.grad(y.square().sum(), x)

    for m in (1, 20, 200):
        on = results(m)
        with fast.disable_adapter():
            off = results(m)
        assert torch.equal(on[0], off[0]) and on[1].dtype == off[1].dtype
        with plain.disable_adapter():
            assert_same_output(
                off[0],
                layers(plain)["o_proj"],
                torch.randn(m, 40, generator=torch.Generator().manual_seed(m)).to(dtype),
            )


def test_what_runs_pefts_code_with_its_adapters_on_runs_it_with_them_off():
    fast, report, plain = pair(use_dora=True)
    assert {row.path for row in report.layers} == {"peft"}
    with fast.disable_adapter(), plain.disable_adapter():
        assert {row.path for row in report.layers} == {"peft"}
        assert torch.equal(output(fast, tokens()), output(plain, tokens()))
    fast.merge_adapter(), plain.merge_adapter()
    assert {row.path for row in report.layers} == {"peft"}
    assert torch.equal(output(fast, tokens()), output(plain, tokens()))


def test_a_layer_without_the_active_adapter_runs_its_base():
    fast, report, plain = pair()
    for model in (fast, plain):
        torch.manual_seed(1)
        model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
        model.set_adapter("other")
    assert {row.path for row in report.layers} == {"fast"}
    assert "no adapter of it is active" in [row for row in report.layers if "v_proj" in row.name][0].reason
    assert_like_peft(fast, plain)


# ---- who looks into the op --------------------------------------------------------------------------------------------

SAVED = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def policy(context, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op in SAVED else CheckpointPolicy.PREFER_RECOMPUTE


class Block(nn.Module):
    """A group of three behind which q is scaled in place, and a single layer."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(40, 40) for _ in range(4))
        self.checkpointed = False

    def inner(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return x + self.o_proj(q.mul_(0.5) + k * v)

    def forward(self, x):
        if not self.checkpointed:
            return self.inner(x)
        contexts = partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(self.inner, x, use_reentrant=False, context_fn=contexts)


def block(four_bit=False, **settings):
    torch.manual_seed(0)
    model = Block()
    if four_bit:
        fastpeft.quantize(model)
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    plain = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False, **settings))
    fast = copy.deepcopy(plain)
    return fast, fastpeft.apply(fast), plain


def step(model, x):
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("four_bit", [False, True], ids=["dense", "4 bits"])
@pytest.mark.parametrize("m", [6, 100])
def test_selective_checkpointing_computes_no_matmul_twice(four_bit, m):
    fast, report, plain = block(four_bit)
    assert {row.path for row in report.layers} == {"fast"} and report.groups == 1
    x, counts = torch.randn(m, 40), []
    for checkpointed in (False, True):
        fast.base_model.model.checkpointed = checkpointed
        with FlopCounterMode(display=False) as counter:
            got = step(fast, x)
        flops = counter.get_flop_counts()["Global"]
        counts.append(sum(flops.get(op.overloadpacket, 0) for op in SAVED))
    assert counts[0] == counts[1] > 0
    for name, value in step(fast, x).items():
        assert torch.equal(value, got[name])
    assert_same_results(got, step(dense(plain), x), step(double(dense(plain)), x.double()))


@pytest.mark.parametrize("m", [6, 100])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_flop_counters_count_pefts_flops(m, dropout):
    fast, _, plain = block(lora_dropout=dropout)
    x, totals = torch.randn(2, m, 40), []
    for model in (fast, plain):
        with FlopCounterMode(display=False) as counter:
            step(model, x)
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1]


@pytest.mark.parametrize("m", [6, 100])
def test_the_profiler_names_the_passes(m):
    fast, _, _ = block()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(fast, torch.randn(m, 40))
    names = {event.name for event in profile.events()}
    assert {"fastpeft::lora_linear_grad_up", "fastpeft::lora_linear_grad_down"} <= names
    assert "fastpeft::lora_linear_fused" in names or {"fastpeft::lora_linear_down", "fastpeft::lora_linear_up"} <= names


# ---- tensors of other kinds, and what the report says ------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors_run_pefts_code(layout):
    fast, report, plain = block()
    parts = [torch.randn(n, 40) for n in (3, 7, 5)]
    layer, peer = (layers(model)["o_proj"] for model in (fast, plain))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype, says PyTorch
        x = torch.nested.nested_tensor(parts, layout=layout)
    for got, expected in zip(layer(x).unbind(), peer(x).unbind(), strict=True):
        assert torch.equal(got, expected)
    [row] = [row for row in report.layers if "o_proj" in row.name]
    assert row.path == "peft" and ("nested" in row.reason or "NestedTensor" in row.reason)
    layer(parts[0])
    assert [row for row in report.layers if "o_proj" in row.name][0].path == "fast"


def test_sparse_tensors_run_pefts_code():
    fast, report, plain = block()
    layer, peer = (layers(model)["o_proj"] for model in (fast, plain))
    sparse = torch.eye(40).to_sparse()
    with torch.no_grad():
        assert torch.equal(layer(sparse), peer(sparse))
    assert "sparse" in [row for row in report.layers if "o_proj" in row.name][0].reason


def test_the_report_names_the_torch_backend():
    fast, report, plain = block()
    for model in (fast, plain):
        torch.manual_seed(1)
        wide = peft.LoraConfig(r=520, target_modules=["o_proj"], init_lora_weights=False)
        model.add_adapter("wide", wide)
        model.set_adapter("wide")
    [row] = [row for row in report.layers if "o_proj" in row.name]
    assert row.path == "torch" and "rank 520: it takes up to 512" in row.reason
    assert "1 on the torch backend" in str(report)
    x = torch.randn(5, 40)
    assert_same_results(*(step(m, x.double() if m.dtype == torch.float64 else x) for m in _three(fast, plain)))
    with fastpeft.backend("torch"):
        assert {row.path for row in report.layers} == {"torch"}


def _three(fast, plain):
    exact = double(plain)
    for model in (fast, plain, exact):
        model.dtype = next(model.parameters()).dtype
    return fast, plain, exact


# ---- fastpeft's own layer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("four_bit", [False, True], ids=["dense", "4 bits"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loralinear_switched_off_is_b_zero(dtype, four_bit):
    base = nn.Linear(64, 48).to(dtype)
    layer = fastpeft.nn.LoraLinear(fastpeft.quantize(base) if four_bit else base, r=4)
    for m in (1, 20, 200):
        x = torch.randn(m, 64).to(dtype)
        on = layer(x)
        layer.disable()
        off = layer(x)
        layer.enable()
        assert torch.equal(on.detach(), off.detach())
