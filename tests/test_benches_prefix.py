"""The prefix suite on tiny cases and models: no time is asserted, nothing is fetched."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("bitsandbytes")

from _bench_rows import tiny_llama
from _close import assert_close

import fastpeft as fp
from benches import cli
from benches import prefix_attention as op
from benches.kit import answers, measure, rounds, tables
from benches.kit.attention import CONCATENATION, FLEX, GATED_RECIPE, RECIPE
from benches.kit.case import BOTH, FORWARD, OURS, TIME, Limit
from benches.kit.minilm import Reviews
from benches.kit.rounds import FROZEN
from benches.suites import encoder_job, main_job, memory, prefix, prefix_job

SHAPE = (3, 4, 2, 16)


@pytest.fixture(autouse=True)
def _quick(monkeypatch, one_thread):
    monkeypatch.setattr(measure.machine, "rates", lambda dtype, device: (1e11, 1e10))
    monkeypatch.setattr(op, "ring_length", lambda size: 2)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("direction", [FORWARD, BOTH])
@pytest.mark.parametrize("gates", [None, op.TOKEN, op.QUERY])
@pytest.mark.parametrize("what", [op.DECODER, op.ENCODER])
def test_rows_are_checked_against_float64(what, gates, direction, dtype):
    (row,) = measure.measure(op, op.Case(21, 5, dtype, direction, gates, what, SHAPE), 0.0)
    expected = {RECIPE, CONCATENATION, "composition", OURS} | ({GATED_RECIPE} if gates == op.TOKEN else set())
    assert not row["wrong"] and set(row["error"]) == expected == set(row["over"]), row["error"]
    assert len(row["error"][OURS]) == (1 if direction == FORWARD else 6 if gates is None else 7)
    json.dumps(row)


def test_tokens_are_decoded_from_caches_in_turn():
    case = op.Case(1, 5, direction=FORWARD, what=op.DECODE, shape=SHAPE, s=30)
    (row,) = measure.measure(op, case, 0.0)
    assert not row["wrong"] and set(row["error"]) == {RECIPE, "composition", OURS}
    first, second = op.Inputs.make(case, "cpu").caches
    assert first.k.data_ptr() != second.k.data_ptr() and first.k.equal(second.k)


def test_dropout_is_timed_and_not_checked():
    (row,) = measure.measure(op, op.Case(21, 5, what=op.DROPOUT, shape=SHAPE), 0.0)
    assert set(row["time"]) == {FROZEN, RECIPE} and not row["error"]


def test_flex_attention_computes_the_same():
    """It is compiled: one row, forward alone."""
    (row,) = measure.measure(op, op.Case(21, 5, "fp32", FORWARD, shape=SHAPE, compiled=True), 0.0)
    assert not row["wrong"] and (FLEX in row["error"] or FLEX in row["notes"])


def test_a_wrong_result_is_found_where_gradients_are_missing_too(monkeypatch):
    right = op.attention.recipe
    monkeypatch.setattr(op.attention, "recipe", lambda q, *rest: right(q * 1.1, *rest))
    limits = (Limit(TIME, RECIPE, 1.0),)
    (row,) = measure.measure(op, op.Case(21, 5, "fp32", shape=SHAPE, limits=limits), 0.0)
    assert set(row["wrong"]) == {RECIPE, GATED_RECIPE} and row["targets"][0]["verdict"] == "wrong result"


def test_cases_have_no_doubles_and_targets_are_what_was_asked():
    cases = op.target_cases() + op.sweep_cases()
    assert len({case.name for case in cases}) == len(cases)
    assert all(case.limits for case in op.target_cases())
    limits = {(c.t, c.direction): [limit.value for limit in c.limits] for c in op.target_cases() if c.t >= 1024}
    assert limits[1024, FORWARD] == [1.04 + 64 / 1024] and limits[2048, FORWARD] == [1.02 + 64 / 2048]
    assert limits[1024, BOTH] == [1 / 1.3, 1.0] and limits[2048, BOTH] == [1 / 1.5, 1.0]
    assert all(case.limits for case in op.gpu_cases()[0])


def test_the_floor_counts_the_visible_pairs_alone():
    case = op.Case(4, 3, direction=FORWARD, shape=(1, 1, 1, 1))
    assert op.cost(case).flops == 4 * (10 + 12) and op.cost(case).extra_flops == 4 * 12
    assert op.cost(replace(case, direction=BOTH)).flops == 14 * (10 + 12)
    assert op.cost(replace(case, t=1, s=9, what=op.DECODE)).flops == 4 * (9 + 3)


def test_a_layer_keeps_no_copy_of_the_prefix_for_backward():
    row = prefix.saved_by_a_layer("cpu", t=8)
    assert [t["verdict"] for t in row["targets"]] == ["met"]
    assert all(kept[OURS] < kept["PEFT"] for kept in row["bytes"].values())


# --------------------------------------------------------------------------------------------------------- whole models


def begins_as_pefts(build, base, call) -> None:
    """Both prefixes are one function, by the error rule."""
    exact = call(build("PEFT", copy.deepcopy(base).double()))
    ours, theirs = (call(build(way, base)) for way in (OURS, "PEFT"))
    assert_close(ours, theirs, exact)


@torch.no_grad()
def test_a_prefix_of_a_language_model_begins_as_pefts(tiny_model):
    from benches.kit import smollm2

    base, ids = smollm2.load(tiny_model[0], torch.float32, "cpu"), torch.randint(0, 64, (2, 16))
    method = prefix_job.method(list(range(prefix_job.LENGTH)))
    begins_as_pefts(method.build, base, lambda model: model(input_ids=ids, use_cache=False).logits)
    made = {way: method.build(way, base) for way in (FROZEN, *method.ways)}
    trained = {way: sum(p.numel() for p in main_job.trainable(model)) for way, model in made.items()}
    assert trained[OURS] == trained["PEFT"] == trained[method.other] < trained[prefix_job.APT] and not trained[FROZEN]
    assert made[method.other].config._attn_implementation == "eager" != made["PEFT"].config._attn_implementation
    assert not any(isinstance(module, fp.nn.PrefixAttention) for module in base.modules())


def test_a_prefix_keeps_less_for_backward_than_pefts(tiny_model):
    from benches.kit import smollm2

    base = smollm2.load(tiny_model[0], torch.bfloat16, "cpu")
    row = prefix_job.saved(base, torch.randint(0, 64, (2, 16)), label="tiny")
    (kept,) = row["bytes"].values()
    assert 0 <= kept[OURS] < kept["PEFT"] and row["targets"][0]["limit"] == 0.3


def test_an_encoder_is_fine_tuned_in_every_way_with_the_same_head():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = BertModel(BertConfig(vocab_size=64, max_position_embeddings=64, **sizes))
    data = Reviews([[i % 60 + 1] * (i % 9 + 2) for i in range(80)], [i % 2 for i in range(80)])
    train, held_out = data.part(slice(40, None)), data.part(slice(40))
    row = encoder_job.fine_tune(base, train, held_out, 0.0, steps=50, label="tiny", device="cpu")
    assert row["steps"] == 3 and set(row["accuracy"]) == set(encoder_job.WAYS)
    assert all(0 <= a <= 1 for a in (*row["accuracy"].values(), *row["train_accuracy"].values()))
    assert row["stored_bytes"][OURS] == row["stored_bytes"]["PEFT"] > row["stored_bytes"][encoder_job.HEAD]
    assert row["saved_bytes"][OURS] < row["saved_bytes"]["PEFT"]
    ids, mask, _ = train.batch(list(range(9)), "cpu")
    assert mask.sum() == sum(len(train.ids[i]) for i in range(9)) and torch.equal(ids == 0, ~mask)
    build = partial(encoder_job.build, start=list(range(encoder_job.LENGTH)))
    with torch.no_grad():
        begins_as_pefts(build, base.eval(), lambda model: model.eval()(ids, mask))
    stamped = {**json.loads(json.dumps(row)), "suite": "prefix"}
    (answer,) = answers.answers([stamped])
    assert answer.question == answers.ACCURACY and "held-out" in answer.sentence
    (table,) = tables.all_tables([stamped])
    assert table.header == ["what", *encoder_job.WAYS] and "held-out" in table.text()


def test_a_memory_worker_builds_the_model_of_its_job(tiny_model):
    found = memory.memory_worker(OURS, tiny_model[0], "float32", "cpu", "[[1, 2, 3, 4, 5, 6, 7, 8]]", "prefix_job")
    assert found["trainable_bytes"] == 2 * 2 * prefix_job.LENGTH * 32 * 4  # layers, keys and values, P, Hk·D, fp32


def test_the_quick_prefix_suite_on_a_tiny_model(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rounds, "MOST", 3)
    monkeypatch.setattr(rounds, "DELAY_LIMIT", math.inf)
    monkeypatch.setattr(op, "target_cases", lambda: [op.Case(21, 5, shape=SHAPE)])
    folder, text = tiny_model
    where = ["--model", folder, "--text", text, "--out", str(tmp_path / "out")]
    where += ["--parts", "training,step,others,kernels"]
    assert cli.main(["--suite", "prefix", "--json", "--quick", "--time-budget", "60", *where]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["kind"] for row in rows] == ["training", "step", "saved bytes", "row", "saved bytes"]
    training, step = rows[:2]
    assert set(training["losses"]) == {"PEFT", prefix_job.PEFT_EAGER, OURS, prefix_job.APT}
    assert {"PEFT", OURS, prefix_job.APT} == set(step["over"]) and step["targets"][0]["limit"] == 1.05
    page = (tmp_path / "out" / "report.html").read_text()
    assert "How much faster is a training step?" in page and "Do the losses agree?" in page
