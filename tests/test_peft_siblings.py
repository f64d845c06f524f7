"""q/k/v and gate/up read one x together: when they may, when they must not, and what is left behind."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
import weakref

import peft
import pytest
import torch
from _peft import assert_like_peft, assert_same_output, assert_same_results, double, layers, output, pair, run, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastpeft
import fastpeft.interop.peft

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def calls(monkeypatch):
    """Which ops ran: "group" or "single"."""
    seen = []
    ops = fastpeft.interop.peft.ops
    single, group = ops.lora_linear, ops.lora_linear_group
    monkeypatch.setattr(ops, "lora_linear", lambda *args, **kw: seen.append("single") or single(*args, **kw))
    monkeypatch.setattr(ops, "lora_linear_group", lambda *args, **kw: seen.append("group") or group(*args, **kw))
    return seen


def qkv(model) -> list[nn.Module]:
    return [layers(model)[name] for name in ("q_proj", "k_proj", "v_proj")]


def group_of(layer: nn.Module):
    return layer._fastpeft.group


def parked(layer: nn.Module):
    return getattr(group_of(layer)._local, "parked", None)


@pytest.fixture
def trio():
    """q, k, v of the fast model, and of PEFT's."""
    fast, report, plain = pair()
    return fast, report, qkv(fast), qkv(plain)


def test_one_pass_for_each_group(calls):
    fast, _, plain = pair()
    output(fast, tokens())
    assert calls.count("group") == 4 and calls.count("single") == 4  # o and down of two blocks
    assert_like_peft(fast, plain)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_the_first_to_run_leads_and_all_is_dropped_when_claimed(trio, calls, order):
    _, report, fast, plain = trio
    for _ in range(4):
        x = torch.randn(3, 40)
        for i in order:
            assert_same_output(fast[i](x), plain[i], x)
        assert parked(fast[0]) is None
    assert calls == ["group"] * 4 and report.groups == 4


def test_the_leader_holds_x_and_claimed_outputs_go(trio):
    _, _, (q, k, v), _ = trio
    x = torch.randn(3, 40)
    q(x)
    seen = weakref.ref(x)
    del x
    gc.collect()
    assert seen() is not None  # its id cannot be taken by another tensor
    k(seen()), v(seen())
    gc.collect()
    assert seen() is None


CHANGES = {
    "another x": (lambda q, k, x: x.clone(), "got another x"),
    "an equal view": (lambda q, k, x: x[:], "got another x"),
    "x changed in place": (lambda q, k, x: x.add_(1), "changed before k_proj ran"),
    "x requires grad": (lambda q, k, x: x.requires_grad_(), "changed before k_proj ran"),
    "A stepped": (lambda q, k, x: step(k.lora_A["default"].weight, x), "adapters or parameters"),
    "B stepped": (lambda q, k, x: step(k.lora_B["default"].weight, x), "adapters or parameters"),
    "base changed": (lambda q, k, x: step(k.base_layer.weight, x), "adapters or parameters"),
    "base replaced": (lambda q, k, x: replace(k.base_layer, x), "adapters or parameters"),
    "scaling": (lambda q, k, x: k.set_scale("default", 7.0) or x, "adapters or parameters"),
    "frozen": (lambda q, k, x: k.lora_A["default"].weight.requires_grad_(False) is None or x, "adapters or parameters"),
}


def step(p, x):
    with torch.no_grad():
        p.mul_(2)
    return x


def replace(linear, x):
    linear.weight = nn.Parameter(linear.weight.detach() * 2, requires_grad=False)
    return x


@pytest.mark.parametrize("change", CHANGES)
def test_a_sibling_takes_nothing_stale(trio, change, calls):
    fast, report, (q, k, v), (pq, pk, pv) = trio
    act, why = CHANGES[change]
    x = torch.randn(3, 40)
    assert_same_output(q(x), pq, x)
    now = act(q, k, x)
    act(pq, pk, x.clone())
    assert_same_output(k(now), pk, now)
    assert_same_output(v(now), pv, now)
    assert calls == ["group", "single", "single"] and parked(q) is None and report.groups == 3
    alone = [row.reason for row in report.layers if "layers.0.self_attn.k_proj" in row.name]
    assert alone[0].startswith("alone: ") and why in alone[0]
    assert torch.equal(q(x), q(x)) and calls[3:] == ["single", "single"]  # for good


@pytest.mark.parametrize("change", ["disabled", "merged", "hooked", "another adapter", "training"])
def test_a_sibling_on_pefts_code_takes_nothing(change):
    fast, report, plain = pair(lora_dropout=0.5)
    for model in (fast, plain):
        torch.manual_seed(3)
        model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["q_proj", "k_proj"], init_lora_weights=False))
        model.eval()
    (q, k, v), (pq, pk, pv) = qkv(fast), qkv(plain)
    x = torch.randn(3, 40)
    q(x)
    for layer in (k, pk):
        if change == "disabled":
            layer.enable_adapters(False)
        elif change == "merged":
            layer.merge()
        elif change == "hooked":
            layer.lora_B["default"].register_forward_hook(lambda module, args, y: y * 3)
        elif change == "another adapter":
            layer.set_adapter("second")
        else:
            layer.train()
    torch.manual_seed(1)
    y = k(x)
    torch.manual_seed(1)
    if change == "training":
        with pytest.raises(AssertionError, match="error"):
            assert_same_output(y, pk.eval(), x)
    else:
        assert_same_output(y, pk, x)
    assert_same_output(v(x), pv, x)
    assert_same_output(q(x), pq, x)


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "autocast"])
def test_modes_are_compared(trio, mode):
    _, _, (q, k, v), (_, pk, _) = trio
    x = torch.randn(3, 40)
    scope = {
        "no_grad": torch.no_grad, "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }[mode]  # fmt: skip
    q(x)
    with scope():
        y, expected = k(x), pk(x)
    assert y.requires_grad == expected.requires_grad and y.dtype == expected.dtype
    with scope():
        assert_same_output(y, pk, x)
        q(x)
    y = v(x)
    assert y.requires_grad and y.dtype == torch.float32


def test_inference_tensors_have_no_version_and_run_alone(trio, calls):
    _, report, trio_fast, trio_plain = trio
    with torch.inference_mode():
        x = torch.randn(3, 40)
        for layer, peer in zip(trio_fast, trio_plain, strict=True):
            assert_same_output(layer(x), peer, x)
    assert calls == ["single"] * 3 and report.groups == 4


def test_backward_between_siblings(trio):
    """PEFT's layers have a graph each; a parked output whose graph is freed is not given out."""
    _, report, (q, k, v), (_, pk, _) = trio
    x = torch.randn(3, 40)
    q(x).sum().backward()
    exact = double(pk)
    k(x).sum().backward(), pk(x).sum().backward(), exact(x.double()).sum().backward()
    assert_same_results(*({"A": layer.lora_A["default"].weight.grad} for layer in (k, pk, exact)))
    assert "backward ran before k_proj" in str(report)


def test_parked_outputs_stay_out_of_copies_and_files(trio):
    fast, _, (q, k, v), _ = trio
    size = len(pickle.dumps(fast))
    keys = list(fast.state_dict())
    x = torch.randn(5000, 40)
    q(x)
    assert parked(q).waiting.keys() == {1, 2}
    assert len(pickle.dumps(fast)) == size and list(fast.state_dict()) == keys
    twin = qkv(copy.deepcopy(fast))
    assert parked(twin[0]) is None and group_of(twin[0]).members == twin
    assert parked(q).waiting.keys() == {1, 2}


def test_threads_do_not_see_each_others_outputs(trio, calls):
    _, report, (q, k, v), (pq, pk, pv) = trio
    x = torch.randn(3, 40)
    results = []
    q(x)
    thread = threading.Thread(target=lambda: results.extend([k(x), q(x), v(x)]))
    thread.start()
    thread.join()
    for y, peer in zip([*results, k(x), v(x)], [pk, pq, pv, pk, pv], strict=True):
        assert_same_output(y, peer, x)
    assert calls == ["group", "single", "group"] and report.groups == 4


def test_an_exception_in_the_middle_costs_nothing(trio, calls):
    fast, report, (q, k, v), _ = trio
    with contextlib.suppress(ValueError):
        q(torch.randn(3, 40))
        raise ValueError
    ids = tokens()
    output(fast, ids)
    assert report.groups == 4 and parked(q) is None
    with pytest.raises(ValueError):
        q(torch.randn(3, 39))
    output(fast, ids)
    assert report.groups == 4


def test_outputs_that_nobody_takes_end_the_group(trio, calls):
    _, report, (q, k, v), _ = trio
    for _ in range(5):
        q(torch.randn(3, 40))
    assert calls == ["group"] * 3 + ["single"] * 2
    assert "k_proj, v_proj did not follow" in str(report) and parked(q) is None


def test_a_group_forms_only_among_layers_that_can():
    fast, report, plain = pair()
    for model in (fast, plain):
        qkv(model)[1].base_layer.weight.requires_grad_(True)
    assert report.groups == 3 and "alone while k_proj, v_proj cannot join" in str(report)
    assert_like_peft(fast, plain)
    for model in (fast, plain):
        qkv(model)[1].base_layer.weight.requires_grad_(False)
        qkv(model)[1].enable_adapters(False)
    assert report.groups == 4  # one of which has its base alone
    assert_like_peft(fast, plain)


class Attention(nn.Module):
    """q reads x, k and v read memory: siblings in name only, unless memory is x."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(12, 12) for _ in range(3))

    def forward(self, x, memory):
        logits = self.q_proj(x) @ self.k_proj(memory).transpose(-1, -2) / 12
        return x + torch.softmax(logits, -1) @ self.v_proj(memory)


class Decoder(nn.Module):
    def __init__(self, use_reentrant: bool | None, shared: bool = False):
        super().__init__()
        self.use_reentrant = use_reentrant
        self.self_attention = Attention()
        self.cross_attention = self.self_attention if shared else Attention()

    def block(self, x, memory):
        return self.cross_attention(self.self_attention(x, x), memory)

    def forward(self, x, memory):
        for _ in range(2):
            if self.use_reentrant is None:
                x = self.block(x, memory)
            else:
                x = checkpoint(self.block, x, memory, use_reentrant=self.use_reentrant)
        return x


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_cross_attention_under_checkpointing(use_reentrant, dropout, shared):
    """The group ends, but only once no forward is left that checkpointing would replay as a group."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False, lora_dropout=dropout
    )
    model = peft.get_peft_model(Decoder(use_reentrant, shared), config).train()
    report = fastpeft.apply(model)
    x, memory = torch.randn(2, 3, 12, requires_grad=True), torch.randn(2, 5, 12, requires_grad=True)
    for _ in range(3):
        exact = double(model)  # PEFT's code, in float64
        reference = copy.deepcopy(model)
        fastpeft.revert(reference)
        grads = []
        for m in (model, reference, exact):
            m.base_model.model.use_reentrant = use_reentrant if m is model else None
            inputs = (x.double(), memory.double()) if m is exact else (x, memory)
            m.zero_grad()
            m(*inputs).square().mean().backward()
            grads.append({"grads": torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])})
        if dropout == 0.0:
            assert_same_results(*grads)
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(0.0 if p.grad is None else 0.01 * p.grad)
    rows = [row.reason for row in report.layers if "cross_attention" in row.name or shared]
    assert all("k_proj got another x" in reason for reason in rows)
    assert report.groups == (0 if shared else 1)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_group_that_ends_in_a_checkpointed_forward_draws_its_masks_again(use_reentrant):
    """The gradient of B is exact for the masks of the forward: <B, dL/dB> = <y, dL/dy> for the part of L linear in B."""
    torch.manual_seed(0)
    model = Decoder(use_reentrant)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.5)
    model = peft.get_peft_model(model, config).train()
    report = fastpeft.apply(model)
    v_proj = model.base_model.model.cross_attention.v_proj
    b, x, memory = v_proj.lora_B["default"].weight, torch.randn(2, 3, 12, requires_grad=True), torch.randn(2, 5, 12)

    def loss(scale):
        torch.manual_seed(1)
        with torch.no_grad():
            b.mul_(scale)
        y = checkpoint(model.base_model.model.cross_attention, x, memory, use_reentrant=use_reentrant)
        with torch.no_grad():
            b.div_(scale)
        return y

    y = loss(1.0)
    y.sum().backward()
    assert "v_proj got another x" in str(report)
    assert group_of(v_proj).dissolved is None  # while a replay could come: this pass and its replay ran as a group
    zero = copy.deepcopy(model)
    zero_b = zero.base_model.model.cross_attention.v_proj.lora_B["default"].weight
    with torch.no_grad():
        zero_b.zero_()
        torch.manual_seed(1)
        without = zero.base_model.model.cross_attention(x, memory)
    # sums in float64, of terms that are each some float32 roundings off: their walk is far below one eps of every term
    terms = [b.detach().double() * b.grad, y.detach().double(), without.double()]
    slope, value, rest = (t.sum() for t in terms)
    assert abs(slope - (value - rest)) <= 2**-23 * sum(t.abs().sum() for t in terms)


def test_recomputation_that_stops_early(calls):
    """Non-reentrant checkpointing stops a replay once it has what backward needs: here inside the group's op."""
    fast, report, plain = pair()
    exact = double(plain)

    def attention(model, x):
        q, k, v = qkv(model)
        return q(x)[..., :20] + k(x) * v(x)

    for _ in range(4):
        grads = []
        for model in (fast, plain, exact):
            model.zero_grad()
            x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
            x = (x.double() if model is exact else x).requires_grad_()
            y = checkpoint(
                lambda x, model=model: torch.cat([layer(x) for layer in qkv(model)], -1), x, use_reentrant=False
            )
            y.sum().backward()
            named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            grads.append({"x": x.grad} | named)
        assert_same_results(*grads)
    assert report.groups == 4 and calls == ["group"] * 8
    run(fast, tokens())
    assert report.groups == 4


def test_shared_names_with_other_sizes_or_parents_are_no_group():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(12, 8)
            self.gate_proj = self.up_proj = nn.Linear(8, 8)
            self.w1, self.w3 = nn.Linear(8, 6), nn.Linear(8, 6)

        def forward(self, x):
            return self.q_proj(x) + self.k_proj(x.repeat(1, 2)[:, :12]) + self.gate_proj(x) + self.up_proj(x), self.w1(
                x
            ) * self.w3(x)

    def joined(model, x):
        return torch.cat(model(x), -1)

    model = peft.get_peft_model(Odd(), peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    plain = copy.deepcopy(model)
    report = fastpeft.apply(model)
    assert report.groups == 1
    x = torch.randn(3, 8)
    assert_same_output(joined(model, x), plain, x, forward=joined)


def test_revert_of_one_sibling(calls):
    fast, report, plain = pair()
    fastpeft.revert(qkv(fast)[0])
    assert report.groups == 3 and "a sibling is gone" in str(report)
    assert_like_peft(fast, plain)
    fastpeft.apply(fast)
    assert report.groups == 4
    assert_like_peft(fast, plain)
