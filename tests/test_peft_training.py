"""Training loops that people use, on the fast path: they must end where PEFT's own code ends."""

from __future__ import annotations

import copy
from functools import partial

import peft
import pytest
import torch
import torch.nn.functional as F
from _close import assert_close
from _peft import (
    assert_same_output,
    assert_same_results,
    base_model,
    counted_peft_calls,
    double,
    layers,
    output,
    pair,
    peft_model,
    run,
    runs,
    tokens,
)

import fastpeft

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


# ---- torch.compile and checkpointing ------------------------------------------------------------------------------------


def test_compile_without_graph_breaks():
    fast, report, plain = pair("gpt2")
    with counted_peft_calls() as calls:
        got = runs(
            torch.compile(fast.base_model.model.transformer.h[0].attn, backend="aot_eager", fullgraph=True), attention
        )
    assert not calls
    peer = runs(plain.base_model.model.transformer.h[0].attn, attention)
    exact = runs(double(plain.base_model.model.transformer.h[0].attn), attention)
    assert_same_results(_bare(got), peer, exact)


def attention(module, ids):
    like = next(p for p in module.parameters())
    x = torch.randn(2, 9, 40, generator=torch.Generator().manual_seed(int(ids[0, 0]))).to(like.dtype)
    return module(x)[0]


def _bare(results):
    return {name.removeprefix("_orig_mod."): value for name, value in results.items()}


@pytest.mark.parametrize("kind", ["llama", pytest.param("bert", marks=pytest.mark.slow)])
def test_compiled_model(kind):
    fast, report, plain = pair(kind)
    compiled = torch.compile(fast, backend="aot_eager")
    got = run(compiled, tokens())
    assert_same_results(_bare(got), run(plain, tokens()), run(double(plain), tokens()))
    assert {row.path for row in report.layers} == {"fast"}


def test_a_compiled_layer_follows_adapter_switches_and_scales():
    fast, _, plain = pair()
    for model in (fast, plain):
        torch.manual_seed(7)
        model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
        model.set_adapter("default")
    layer, peer = layers(fast)["q_proj"], layers(plain)["q_proj"]
    compiled, x = torch.compile(layer, backend="aot_eager", fullgraph=True), torch.randn(3, 40)
    changes = [
        lambda it: None,
        lambda it: it.set_adapter("second"),
        lambda it: it.set_adapter(["default", "second"]),
        lambda it: it.set_scale("second", 3.0),
        lambda it: it.enable_adapters(False),
        lambda it: it.enable_adapters(True),
        lambda it: it.merge(),
        lambda it: it.unmerge(),
    ]
    for change in changes:
        change(layer), change(peer)
        assert_same_output(compiled(x), peer, x)


@pytest.mark.slow
def test_inductor():
    fast, _, plain = pair("gpt2")
    fast, plain = (model.base_model.model.transformer.h[0].attn for model in (fast, plain))
    got = runs(torch.compile(fast, fullgraph=True), attention)
    assert_same_results(_bare(got), runs(plain, attention), runs(double(plain), attention))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_gradient_checkpointing(kind, use_reentrant):
    fast, report, plain = pair(kind)
    for model in (fast, plain):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    exact = double(plain)
    with counted_peft_calls() as calls:
        got = runs(fast)
    assert not calls and {row.path for row in report.layers} == {"fast"}
    groups = report.groups
    assert_same_results(got, runs(plain), runs(exact))
    assert report.groups == groups and groups == {"llama": 4, "gpt2": 0, "bert": 2}[kind]


def test_generate():
    fast, report, plain = pair()
    fast.eval(), plain.eval()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ids = tokens()
    assert torch.equal(fast.generate(input_ids=ids, **settings), plain.generate(input_ids=ids, **settings))
    beams = {**settings, "num_beams": 3}
    assert torch.equal(fast.generate(input_ids=ids, **beams), plain.generate(input_ids=ids, **beams))
    assert report.groups == 4


def test_left_padding_and_packed_sequences():
    fast, _, plain = pair()
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)  # two sequences in a row

    def padded(model, ids):
        return output(model, ids, attention_mask=mask)[mask == 1]

    for forward in (padded, partial(output, position_ids=positions)):
        assert_same_output(forward(fast, ids), plain, ids, forward=forward)


# ---- Trainer and SFTTrainer -----------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __init__(self, n: int, seed: int):
        self.ids = torch.randint(3, 61, (n, 8), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def trainer(model, folder, **settings):
    from transformers import Trainer, TrainingArguments

    defaults = {
        "per_device_train_batch_size": 4, "max_steps": 8, "learning_rate": 3e-3, "lr_scheduler_type": "linear",
        "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "load_best_model_at_end": True, "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 3,
        "metric_for_best_model": "eval_loss", "adam_epsilon": EPSILON,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(folder), **(defaults | settings))
    return Trainer(model=model, args=arguments, train_dataset=Rows(32, 0), eval_dataset=Rows(8, 1))


def losses(done) -> torch.Tensor:
    """Train and evaluation losses by step."""
    history = done.state.log_history
    found = {(row["step"], key): row[key] for row in history for key in ("loss", "eval_loss") if key in row}
    return torch.tensor([found[key] for key in sorted(found)], dtype=torch.float64)


def exact_model(model):
    """Trains in float64: transformers' loss casts to float32."""

    def loss(logits, labels, vocab_size, num_items_in_batch=None, **rest):
        rows, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return F.cross_entropy(rows, targets, reduction="sum") / (num_items_in_batch or targets.numel())

    exact = double(model)
    exact.get_base_model().loss_function = loss
    return exact


# Adam's step m/(√v + ε) makes any size out of the rounding of a gradient near zero. With ε above the gradients (0.01 here)
# a rounding of δ moves a parameter by less than δ lr/ε, below its own rounding.
EPSILON = 0.1


class Interrupted(Exception):
    pass


def interrupting():
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise Interrupted

    return Stop()


@pytest.mark.parametrize(
    "settings", [{}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "bf16": True}]
)
def test_trainer_interrupted_resumed_and_best_model(tmp_path, settings):
    plain = peft_model()
    finished = []
    for name in ("plain", "fast"):
        model = copy.deepcopy(plain)
        if name == "fast":
            report = fastpeft.apply(model)
        first = trainer(model, tmp_path / name, **settings)
        first.add_callback(interrupting())
        with pytest.raises(Interrupted):
            first.train()
        again = copy.deepcopy(plain)  # a new process would build it so
        if name == "fast":
            report = fastpeft.apply(again)
        second = trainer(again, tmp_path / name, **settings)
        second.train(resume_from_checkpoint=True)
        assert second.state.global_step == 8 and second.state.best_model_checkpoint
        finished.append((second, again))
    assert {row.path for row in report.layers} == {"fast"} and report.groups == 4
    (plain_run, plain_model), (fast_run, fast_model) = finished
    exact_run = trainer(exact_model(plain), tmp_path / "exact", **{**settings, "bf16": False})
    exact_run.train()
    eps = torch.finfo(torch.bfloat16 if settings else torch.float32).eps
    assert_close(losses(fast_run), losses(plain_run), losses(exact_run), "losses", eps)
    best, peers = (run.state.best_model_checkpoint for run in (fast_run, plain_run))
    if not settings:
        truly = exact_run.state.best_model_checkpoint
        assert best.rsplit("-", 1)[-1] == peers.rsplit("-", 1)[-1] == truly.rsplit("-", 1)[-1]
        states = [model.state_dict() for model in (fast_model, plain_model, exact_run.model)]
        assert_same_results(*states)
    saved = peft.utils.load_peft_weights(best)
    now = peft.get_peft_model_state_dict(fast_model)
    assert saved.keys() == now.keys() and all(torch.equal(saved[name], now[name]) for name in saved)


def test_sft_trainer(tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = {"input_ids": Rows(16, 0).ids.tolist()}
    seen = []
    for which in ("fast", "plain", "exact"):
        model = peft_model() if which != "exact" else exact_model(peft_model())
        if which == "fast":
            report = fastpeft.apply(model)
        arguments = SFTConfig(
            output_dir=str(tmp_path / which), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2,
            logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, packing=False, bf16=False, max_length=16,
            save_strategy="no", seed=3, adam_epsilon=EPSILON,
        )  # fmt: skip
        done = SFTTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_dict(rows), processing_class=_tokenizer()
        )
        done.train()
        seen.append(losses(done))
        if which == "fast":
            assert {row.path for row in report.layers} == {"fast"} and report.groups == 4
    assert_close(*seen, "losses", torch.finfo(torch.float32).eps)


def test_sft_trainer_that_wraps_the_model_itself(tmp_path):
    """TRL calls get_peft_model: apply goes onto `trainer.model`, before train()."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
        bf16=False, max_length=16, save_strategy="no",
    )  # fmt: skip
    done = SFTTrainer(
        model=base_model("llama"), args=arguments, train_dataset=Dataset.from_dict({"input_ids": Rows(8, 0).ids.tolist()}),
        processing_class=_tokenizer(),
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    report = fastpeft.apply(done.model)
    with counted_peft_calls() as calls:
        done.train()
    assert not calls and {row.path for row in report.layers} == {"fast"}


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(61)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3"
    )
