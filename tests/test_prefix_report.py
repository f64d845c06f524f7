"""What a prefix's gates say over data, and a prefix without the tokens of the smallest ones."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _prefix import base_model, batch, seen, stir

import fastpeft as fp
from fastpeft.adapter_files import open_adapter
from fastpeft.methods.prefix import prefix_rows
from fastpeft.methods.prefix_report import PrefixReport
from fastpeft.nn import PrefixAttention

pytestmark = pytest.mark.usefixtures("one_thread")

APT = fp.PrefixConfig((3, 5), gates="token+layer")
CONFIGS = {
    "apt": APT,
    "token gates": fp.PrefixConfig(4, gates="token"),
    "layer gates": fp.PrefixConfig((5, 2), gates="layer"),
    "none in a layer": fp.PrefixConfig((0, 6), gates="token+layer"),
    "llama_adapter": fp.PrefixConfig(4, gates="token+layer", style="llama_adapter"),
    "mlp": fp.PrefixConfig(4, gates="token+layer", mlp=6),
    "log-bias": fp.PrefixConfig(4, gates="token+layer", log_bias=True),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
each_kind = pytest.mark.parametrize("kind", ["bert", "llama"])


def attached(kind, config, name="default", dtype=torch.float64):
    """A model with a prefix whose parameters all matter."""
    model = base_model(kind).to(dtype)
    fp.attach(model, config, name)
    stir(list(adapter(model, name).parameters().values()))
    for i, prefix in enumerate(adapter(model, name).given()):
        if hasattr(prefix, "layer_gate"):
            prefix.layer_gate.data.fill_((0.7, -0.4)[i])
        if prefix.log_bias is not None:
            prefix.log_bias.copy_(torch.tensor([0.5, 0.0, -0.5, 1.0]))
    return model


def adapter(model, name="default"):
    return model.__dict__["_fastpeft"].attached[name].adapter


def batches(kind, labels=False):
    """Three of three rows, padded differently."""
    data = [batch(kind, padding=side, seed=i) for i, side in enumerate((None, "left", "right"))]
    if labels:
        generator = torch.Generator().manual_seed(7)
        data = [one | {"labels": torch.randint(2, (3,), generator=generator)} for one in data]
    return data


@torch.no_grad()
def outputs(model, data):
    model.eval()
    return torch.cat([seen(model(**one).logits, one.get("attention_mask")).flatten() for one in data])


def calls(model, data, name="default"):
    """For each call of a prefix in these runs: the prefix, and what it was called with."""
    found = []
    hooks = [
        prefix.register_forward_pre_hook(lambda *call: found.append(call), with_kwargs=True)
        for prefix in adapter(model, name).given()
    ]
    outputs(model, data)
    for hook in hooks:
        hook.remove()
    return found


# ---- the report ------------------------------------------------------------------------------------------------------


@each_config
@each_kind
def test_weights_are_means_over_rows_and_attended_tokens(kind, config):
    model, data = attached(kind, config), batches(kind)
    prefixes = adapter(model).prefixes
    sums = torch.zeros(len(prefixes), max(p.length for p in prefixes if p), dtype=torch.float64)
    of_batches = iter(calls(model, data))
    for one in data:
        attended = one.get("attention_mask", torch.ones_like(one["input_ids"])).bool()
        for i, prefix in enumerate(prefixes):
            sums[i, prefix.length if prefix else 0 :] = torch.nan
            if prefix is None:
                continue
            _, (*_, hidden), _ = next(of_batches)
            for row, tokens in enumerate(attended):
                gate = torch.ones(prefix.length, dtype=torch.float64)
                if prefix.gates != "layer":
                    h = hidden[row][tokens]
                    own = h if kind == "llama" else h.mean(0, keepdim=True)
                    gate = torch.sigmoid(own @ prefix.token_gate.T).mean(0)
                if prefix.gates != "token":
                    gate = gate * prefix.layer_gate
                sums[i, : prefix.length] += gate.detach()
    report = fp.prefix_report(model, (one for one in data))
    assert report.rows == 9 and report.gates == config.gates
    torch.testing.assert_close(report.weights, sums / 9, rtol=0, atol=1e-14, equal_nan=True)


def test_it_changes_nothing():
    model = attached("bert", APT, "first")
    fp.attach(model, fp.PrefixConfig(2), "second")
    model.train()
    model.bert.encoder.layer[0].eval()
    before = outputs_of_state(model)
    for active in ("second", None):
        fp.activate(model, active)
        before = outputs_of_state(model)
        report = fp.prefix_report(model, batches("bert", labels=True), "first")
        assert not report.weights.requires_grad
        with pytest.raises(TypeError, match="batches of keywords, dicts, got list"):
            fp.prefix_report(model, [batch("bert"), []], "first")
        assert outputs_of_state(model) == before
    assert all(p.grad is None for p in model.parameters())


def outputs_of_state(model):
    """All that a report could leave behind."""
    record = model.__dict__["_fastpeft"]
    modes = [(module.training, len(module._forward_pre_hooks)) for module in model.modules()]
    return record.active, record.trained, modes, [p.requires_grad for p in model.parameters()]


def test_another_adapters_activity_does_not_count():
    model = attached("bert", APT, "first")
    alone = fp.prefix_report(model, batches("bert")).weights
    fp.attach(model, fp.PrefixConfig(2), "second")
    assert torch.equal(fp.prefix_report(model, batches("bert"), "first").weights.nan_to_num(), alone.nan_to_num())


def test_right_and_wrong_predictions():
    model, data = attached("bert", APT), batches("bert", labels=True)
    report = fp.prefix_report(model, data)
    with torch.no_grad():
        right = torch.cat([model(**one).logits.argmax(1) == one["labels"] for one in data])
    assert (report.right_rows, report.wrong_rows) == (int(right.sum()), int((~right).sum())) and 0 < right.sum() < 9
    rows = [{key: value[i : i + 1] for key, value in one.items() if key != "labels"} for one in data for i in range(3)]
    for found, chosen in ((report.right, right), (report.wrong, ~right)):
        alone = fp.prefix_report(model, [row for row, is_in in zip(rows, chosen) if is_in])
        torch.testing.assert_close(found, alone.weights, rtol=0, atol=1e-14, equal_nan=True)
    text = str(report)
    assert f"9 rows, {report.right_rows} right and {report.wrong_rows} wrong" in text
    assert len(text.splitlines()) == 2 + 2 and "right   wrong" in text


def test_labels_of_tokens_are_no_classification_of_rows():
    data = [one | {"labels": one["input_ids"]} for one in batches("llama")]
    report = fp.prefix_report(attached("llama", APT), data)
    assert report.right is report.wrong is None and "right" not in str(report)


def report_of(*rows):
    width = max(map(len, rows))
    weights = torch.tensor([[*row, *[torch.nan] * (width - len(row))] for row in rows], dtype=torch.float64)
    return PrefixReport("default", "token", weights, 1, None, None, 0, 0)


def test_kept_are_the_largest_of_all_layers():
    report = report_of([0.1, 0.5, 0.2], [-0.6], [], [0.2, 0.2])
    assert report.kept(2) == [[1], [0], [], []]
    assert report.kept(4) == [[1, 2], [0], [], [0]]  # of equal ones the first
    assert report.lengths(6) == (3, 1, 0, 2)
    for budget in (0, 7, 2.0, True):
        with pytest.raises(ValueError, match=f"budget must be an int from 1 to 6, .* got {budget}"):
            report.lengths(budget)


def test_rank_correlation_is_spearmans():
    assert report_of([1.0, 2.0, 3.0]).rank_correlation(report_of([0.1, 0.2, 9.0])) == pytest.approx(1, abs=1e-15)
    assert report_of([1.0], [2.0, 3.0]).rank_correlation(report_of([9.0], [5.0, 0.0])) == pytest.approx(-1, abs=1e-15)
    # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4
    tied = report_of([0.0, 7.0, 7.0, 8.0]).rank_correlation(report_of([0.1, 0.3, 0.2, 0.4]))
    assert tied == pytest.approx(4.5 / (4.5 * 5) ** 0.5, abs=1e-15)
    swapped = report_of([1.0, 2.0], [], [4.0, 3.0]), report_of([2.0, 1.0], [], [3.0, 4.0])
    assert swapped[0].rank_correlation(swapped[1]) == pytest.approx(0.6, abs=1e-15)
    assert swapped[0].rank_correlation(swapped[1], by="layer") == pytest.approx(1, abs=1e-15)
    with pytest.raises(ValueError, match=r"lengths of both must be the same, got \[2, 0, 2\] and \[3\]"):
        swapped[0].rank_correlation(report_of([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="by must be 'token' or 'layer', got 'head'"):
        swapped[0].rank_correlation(swapped[1], by="head")


def test_heat_maps(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    report = fp.prefix_report(attached("bert", APT), batches("bert", labels=True))
    for file, begins in (("map.png", b"\x89PNG"), ("map.svg", b"<?xml")):
        report.plot(tmp_path / file)
        assert (tmp_path / file).read_bytes().startswith(begins)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"needs matplotlib, .*fastpeft\[bench\]"):
        report.plot(tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


# ---- pruning ---------------------------------------------------------------------------------------------------------


@each_config
@each_kind
def test_the_output_changes_within_the_bound(kind, config):
    """That of `methods/prefix_prune.py`, for every layer, query and head, in float64."""
    model, data = attached(kind, config), batches(kind)
    all_calls = calls(model, data)
    before = {id(prefix): copy.deepcopy(prefix) for prefix in adapter(model).given()}
    order = [id(prefix) for prefix in adapter(model).given()]
    report = fp.prune_prefix(model, 4, data)
    kept = [tokens for tokens, old in zip(report.kept(4), report.weights) if not old.isnan().all()]
    after = dict(zip(order, zip(adapter(model).given(), kept)))
    assert sum(prefix.tokens for prefix in adapter(model).given()) == 4
    changed = 0.0
    for prefix, call, masks in all_calls:
        old, (new, tokens) = before[id(prefix)], after[id(prefix)]
        with torch.no_grad():
            o, o_new, bound = *(one(*call, **masks) for one in (old, new)), _bound(old, new, tokens, call, masks)
        change = (o - o_new).norm(dim=-1)
        assert (change <= bound + 1e-13 * o.norm(dim=-1).max()).all()  # some 100 roundings of float64
        changed = max(changed, change.max().item())
    assert changed > 1e-4


def _bound(old, new, kept, call, masks):
    """[B, H, T]: Σ_D w_j (g_j ‖pv_j‖ + (e^{g_j a_j} − 1) ‖o'‖); in a softmax of its own o' is its output, all times c."""
    q, k, v, hidden = call
    scale, groups = masks["scale"], old.heads // old.kv_heads
    pk, pv = (x.repeat_interleave(groups, 0) for x in old.keys_values())
    gates = {key: masks[key] for key in ("is_causal", "key_padding_mask", "attn_mask")}
    gate = old.gate(hidden, **gates)
    gate = gate.expand(*gate.shape[:3], old.length)
    raw = scale * q @ pk.transpose(1, 2)
    bias = 0.0 if old.log_bias is None else old.log_bias
    of_prefix = (gate * raw + bias).logsumexp(-1)
    if old.style == "joint":
        k = k.repeat_interleave(groups, 1)
        scores = scale * q @ k.transpose(2, 3)
        if masks["attn_mask"] is not None:
            extra = masks["attn_mask"]
            scores = scores.masked_fill(~extra, -torch.inf) if extra.dtype == torch.bool else scores + extra
        elif masks["is_causal"]:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
        if masks["key_padding_mask"] is not None:
            scores = scores.masked_fill(~masks["key_padding_mask"][:, None, None], -torch.inf)
        total, factor, o = torch.logaddexp(of_prefix, scores.logsumexp(-1)), 1.0, new(*call, **masks)
    else:
        total, factor = of_prefix, old.gate_out.tanh().abs()[:, None]
        ungated = copy.deepcopy(new)
        ungated.gate_out.zero_()
        o = (new(*call, **masks) - ungated(*call, **masks)) / new.gate_out.tanh()[:, None, None]
    gone = [j for j in range(old.length) if j not in kept]
    weights, g = (gate * raw + bias - total[..., None]).exp()[..., gone], gate.abs()[..., gone]
    each = g * pv.norm(dim=-1)[:, None, gone] + torch.expm1(g * raw.abs()[..., gone]) * o.norm(dim=-1, keepdim=True)
    return factor * (weights * each).sum(-1)


@pytest.mark.parametrize("style", ["joint", "llama_adapter"])
@each_kind
def test_gates_of_zero_cost_rounding_and_only_with_the_token_left_behind(kind, style, monkeypatch):
    """Layer 0 loses some tokens, layer 1 all."""
    model, data = attached(kind, fp.PrefixConfig((5, 3), gates="token+layer", style=style)), batches(kind)
    first, second = adapter(model).prefixes
    second.layer_gate.data.zero_()
    whole_gate = PrefixAttention.gate

    def gate(self, *call):
        made = whole_gate(self, *call)
        return made * torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0], dtype=made.dtype) if self is first else made

    monkeypatch.setattr(PrefixAttention, "gate", gate)
    exact = outputs(model, data)
    assert fp.prune_prefix(model, 2, data).kept(2) == [[0, 3], []]
    assert [(p.tokens, p.length, p.dropped) for p in adapter(model).prefixes] == [(2, 3, 3), (0, 1, 3)]
    assert (outputs(model, data) - exact).abs().max() <= 1e-12 * exact.abs().max()
    for prefix in adapter(model).prefixes:
        prefix.log_bias[-1] = -torch.inf
    assert (outputs(model, data) - exact).abs().max() > 1e-2 * exact.abs().max()


SCRIPT = """
import sys, torch, fastpeft as fp
from _prefix import base_model
for folder, kind, inputs, logits in torch.load(sys.argv[1]):
    model = base_model(kind)
    fp.load_adapter(model, folder)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits), folder
"""


def test_a_pruned_prefix_is_the_same_in_a_fresh_process(tmp_path):
    cases = []
    for kind in ("bert", "llama"):
        for style in ("joint", "llama_adapter"):
            config = fp.PrefixConfig((3, 5), gates="token+layer", style=style)
            model, data, folder = (
                attached(kind, config, dtype=torch.float32),
                batches(kind),
                tmp_path / f"{kind}-{style}",
            )
            assert adapter(model).selection.starts["default"] == 5
            fp.prune_prefix(model, 4, data)
            assert adapter(model).selection.starts["default"] == adapter(model).config.position_start == 5
            assert fp.save_adapter(model, folder).format == "fastpeft"
            with open_adapter(folder) as file:
                own = file.config["fastpeft"]
            assert own["position_start"] == 5 and sum(own["dropped"]) == 4 and own["log_bias"]
            assert sum(own["length"]) == 4 + sum(n > 0 for n in own["dropped"])
            with torch.no_grad():
                cases.append((str(folder), kind, data[1], model.eval()(**data[1]).logits))
    torch.save(cases, tmp_path / "cases.pt")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "cases.pt")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@each_kind
def test_it_trains_on_and_what_stands_for_the_dropped_does_not(kind):
    model, data = attached(kind, APT, dtype=torch.float32), batches(kind)
    fp.prune_prefix(model, 4, data)
    trained = adapter(model).parameters()
    assert all(p.requires_grad for p in trained.values())
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1)
    before, first = outputs(model, data), {name: p.detach().clone() for name, p in trained.items()}
    model.train()
    for _ in range(2):
        model(**data[2]).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name: (p.detach() - first[name]).abs() for name, p in trained.items()}
    assert all(change.any() for change in moved.values()) and not torch.equal(outputs(model, data), before)
    short = [prefix for prefix in adapter(model).given() if prefix.dropped]
    assert short
    for prefix in short:
        keys, values = prefix.keys_values()
        assert not keys[:, -1].any() and not values[:, -1].any()
        assert prefix.log_bias[-1] == torch.tensor(float(prefix.dropped)).log()


def test_pruned_again_it_is_as_if_pruned_once():
    data = batches("bert")
    twice, once = attached("bert", APT), attached("bert", APT)
    fp.prune_prefix(twice, 5, data)
    assert sum(fp.prefix_report(twice, data).lengths(5)) == 5  # those that stand for others are not among them
    kept = fp.prune_prefix(twice, 2, data).lengths(2)
    assert fp.prune_prefix(once, 2, data).lengths(2) == kept
    for a, b in zip(adapter(twice).prefixes, adapter(once).prefixes):
        assert a.dropped == b.dropped
        torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=1e-15)
    with pytest.raises(ValueError, match="budget must be an int from 1 to 2"):
        fp.prune_prefix(twice, 3, data)


def test_the_whole_budget_changes_no_bit():
    model, data = attached("llama", APT, dtype=torch.float32), batches("llama")
    before = outputs(model, data)
    fp.prune_prefix(model, 8, data)
    assert [prefix.length for prefix in adapter(model).prefixes] == [3, 5]
    assert torch.equal(outputs(model, data), before)


def test_a_prefix_of_the_proposed_lengths_needs_no_such_token():
    model, data = attached("bert", APT), batches("bert")
    lengths = fp.prefix_report(model, data).lengths(4)
    fp.detach(model)
    fp.attach(model, fp.PrefixConfig(length=lengths, gates="token+layer"))
    assert tuple(0 if p is None else p.length for p in adapter(model).prefixes) == lengths
    assert all(prefix.log_bias is None for prefix in adapter(model).given())
    assert fp.prefix_report(model, data).lengths(4) == lengths


def test_pruned_prefixes_in_a_mixed_batch():
    model, (inputs, *_) = attached("llama", APT, "a"), batches("llama")
    fp.prune_prefix(model, 4, [inputs], "a")
    fp.attach(model, fp.PrefixConfig(2, gates="layer"), "b")
    with torch.no_grad():
        alone = {}
        for name in ("a", "b", None):
            fp.activate(model, name)
            alone[name] = model(**inputs).logits
        with prefix_rows(model, [1, -1, 0], ["a", "b"]):
            mixed = model(**inputs).logits
    for row, name in enumerate(("b", None, "a")):
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=0, atol=1e-13 * mixed.abs().max().item())


def test_copies_of_a_pruned_model():
    model, data = attached("bert", APT), batches("bert")
    fp.prune_prefix(model, 4, data)
    other = copy.deepcopy(model)
    before = outputs(model, data)
    assert torch.equal(outputs(other, data), before)
    fp.prune_prefix(other, 1, data)
    assert torch.equal(outputs(model, data), before)
    fp.detach(model)
    assert torch.equal(outputs(model, data), outputs(base_model("bert").double(), data))


# ---- transfer --------------------------------------------------------------------------------------------------------


@each_kind
def test_gates_begin_as_another_adapters(kind, tmp_path):
    model = attached(kind, APT, "old")
    fp.save_adapter(model, tmp_path)
    later = base_model(kind).double()
    fp.load_adapter(later, tmp_path, "old")
    fp.attach(later, fp.PrefixConfig((3, 5), gates="token+layer", gates_from="old"), "new")
    fp.detach(later, "old")
    for old, new in zip(adapter(model, "old").prefixes, adapter(later, "new").prefixes):
        assert torch.equal(new.token_gate, old.token_gate) and torch.equal(new.layer_gate, old.layer_gate)
        assert not torch.equal(new.prefix_k, old.prefix_k)
        assert new.token_gate.requires_grad and new.token_gate.data_ptr() != old.token_gate.data_ptr()


def test_gates_of_a_pruned_prefix_begin_one_of_its_lengths():
    model, data = attached("bert", APT, "old"), batches("bert")
    lengths = fp.prune_prefix(model, 4, data).lengths(4)
    fp.attach(model, fp.PrefixConfig(lengths, gates="token+layer", gates_from="old"), "new")
    for old, new in zip(adapter(model, "old").prefixes, adapter(model, "new").prefixes):
        assert new is None or torch.equal(new.token_gate, old.token_gate[: new.length])


def test_gates_that_do_not_fit():
    model = attached("bert", APT, "old")
    names = set(model.state_dict())
    for config, wanted in (
        (fp.PrefixConfig((3, 5), gates="token+layer", gates_from="older"), r"an attached prefix \(old\), got 'older'"),
        (
            fp.PrefixConfig((3, 4), gates="token+layer", gates_from="old"),
            "with token.layer gates and 4 tokens in layer 1",
        ),
        (
            fp.PrefixConfig((3, 5), gates="layer", gates_from="old"),
            "with layer gates and 3 tokens in layer 0, got 'old', .*layer gates and 3",
        ),
    ):
        with pytest.raises(ValueError, match=f"gates_from must be .*{wanted}"):
            fp.attach(model, config, "new")
        assert set(model.state_dict()) == names
    with pytest.raises(ValueError, match="gates_from must be None without gates"):
        fp.PrefixConfig(3, gates_from="old")
    with pytest.raises(ValueError, match=r"there is none\)"):
        fp.attach(base_model("bert"), fp.PrefixConfig((3, 5), gates="token+layer", gates_from="old"))


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    """docs/prefix.md, one block after the other, as a reader does."""
    pytest.importorskip("matplotlib")
    page = (Path(__file__).parent.parent / "docs" / "prefix.md").read_text("utf-8")
    base_model("bert", layers=4).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    data = batches("bert", labels=True)
    names = {"train": data, "held_out": data, "batch": data[0]}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.S | re.M):
        exec(block.replace("path/or/name", "model"), names)
    assert (tmp_path / "apt.png").stat().st_size and names["report"].rows == 9
    lengths = [prefix.length if prefix else 0 for prefix in adapter(names["model"]).prefixes]
    assert tuple(lengths) == names["report"].lengths(48)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_what_is_no_gated_prefix():
    model, data = base_model("bert"), batches("bert")
    with pytest.raises(ValueError, match="no adapter is attached"):
        fp.prefix_report(model, data)
    fp.attach(model, fp.PrefixConfig(3), "plain")
    fp.attach(model, fp.LoraConfig(r=2), "lora")
    for call in (lambda name: fp.prefix_report(model, data, name), lambda name: fp.prune_prefix(model, 2, data, name)):
        with pytest.raises(
            ValueError, match=r"'plain' must be a prefix with gates.*gates='token\+layer'\); it has none"
        ):
            call("plain")
        with pytest.raises(ValueError, match="'lora' must be a prefix, got an adapter of LoraConfig"):
            call("lora")
        with pytest.raises(ValueError, match="name must be given, one of 'plain', 'lora'"):
            call(None)


def test_data_and_budgets_that_do_not_do():
    model, data = attached("llama", APT), batches("llama")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="data must have a row at least, got none"):
        fp.prefix_report(model, [])
    with pytest.raises(ValueError, match="prune_prefix: budget must be an int from 1 to 8, .* got 9"):
        fp.prune_prefix(model, 9, iter(()))
    cache = model(**data[0], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="whole rows, which continue no cache, got 7 queries and 14 keys"):
        fp.prune_prefix(model, 2, [data[0] | {"past_key_values": cache}])
    next(model.parameters()).full_tensor = None  # as those of FSDP2 have
    with pytest.raises(RuntimeError, match="FSDP2 has sharded this model"):
        fp.prune_prefix(model, 2, data)
    del next(model.parameters()).full_tensor
    with prefix_rows(model, [0, 0, -1]), pytest.raises(ValueError, match="prefix_rows gives every row its own"):
        fp.prefix_report(model, data)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_dropped_says_what_fits():
    for wrong, wanted in (
        ({"dropped": (1, 0)}, "dropped must be \\(\\) without log_bias"),
        ({"dropped": (1, 0), "log_bias": True, "mlp": 4}, "or with an MLP"),
        ({"dropped": (-1,), "log_bias": True}, "ints of at least 0"),
    ):
        with pytest.raises(ValueError, match=wanted):
            fp.PrefixConfig(3, **wrong)
    for config in (
        fp.PrefixConfig(3, dropped=(1,), log_bias=True),
        fp.PrefixConfig((0, 3), dropped=(2, 1), log_bias=True),
    ):
        with pytest.raises(ValueError, match="one int a layer, 2 of them, 0 where length is 0"):
            fp.attach(base_model("bert"), config)
    with pytest.raises(ValueError, match="dropped needs log_bias=True and mlp=None"):
        PrefixAttention(2, 2, 4, 3, dropped=1)
