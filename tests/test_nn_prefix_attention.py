"""fp.nn.PrefixAttention: its formula, what gates read, what it starts as."""

from __future__ import annotations

import math

import pytest
import torch
from _close import assert_close
from torch.nn.functional import scaled_dot_product_attention

from fastpeft.nn import PrefixAttention

B, H, HK, T, D, WIDTH = 2, 4, 2, 5, 8, 12
KINDS = {
    "joint": {},
    "apt": {"gates": "token+layer"},
    "token gates": {"gates": "token"},
    "layer gates": {"gates": "layer"},
    "llama_adapter": {"style": "llama_adapter"},
    "llama_adapter, gates": {"style": "llama_adapter", "gates": "token+layer"},
    "mlp": {"mlp": 6},
    "log-bias": {"log_bias": True},
}

pytestmark = pytest.mark.usefixtures("one_thread")


def module(length: int = 3, stirred: bool = True, **options) -> PrefixAttention:
    prefix = PrefixAttention(H, HK, D, length, hidden_size=WIDTH, **options)
    for p in prefix.parameters() if stirred else ():
        p.data.normal_()
    if prefix.log_bias is not None:
        prefix.log_bias.normal_()
    return prefix


def call(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """q, k, v, h"""
    generator = torch.Generator().manual_seed(3)
    shapes = (B, H, T, D), (B, HK, T, D), (B, HK, T, D), (B, T, WIDTH)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def definition(prefix, q, k, v, hidden, causal, padding):
    """The docstring's formula, a row and a head at a time; padding: bool [B, T] or None."""
    pk, pv = prefix.keys_values()
    rows = []
    for b in range(B):
        kept = torch.ones(T, dtype=torch.bool) if padding is None else padding[b]
        heads = []
        for h in range(H):
            keys, values, n = k[b, h // (H // HK)], v[b, h // (H // HK)], h // (H // HK)
            seen = kept.expand(T, T) & (torch.ones(T, T, dtype=torch.bool).tril() if causal else True)
            gate = torch.ones(T, prefix.length, dtype=q.dtype)
            if prefix.gates in ("token", "token+layer"):
                read = hidden[b] if causal else hidden[b][kept].mean(0, keepdim=True)
                gate = gate * torch.sigmoid(read @ prefix.token_gate.T)
            if prefix.gates in ("layer", "token+layer"):
                gate = gate * prefix.layer_gate
            tokens = (q[b, h] @ keys.T / D**0.5).masked_fill(~seen, -torch.inf)
            first = gate * (q[b, h] @ pk[n].T) / D**0.5
            first = first if prefix.log_bias is None else first + prefix.log_bias
            if prefix.style == "joint":
                weights = torch.cat([first, tokens], 1).softmax(1)
                heads.append((weights[:, : prefix.length] * gate) @ pv[n] + weights[:, prefix.length :] @ values)
            else:
                own = (first.softmax(1) * gate) @ pv[n]
                heads.append(tokens.softmax(1) @ values + prefix.gate_out[h].tanh() * own)
        rows.append(torch.stack(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_the_formulas(kind, causal, padded):
    prefix = module(**KINDS[kind])
    padding = torch.ones(B, T, dtype=torch.bool)
    padding[1, 3:] = False
    padding = padding if padded else None
    found = []
    for dtype, compute in ((torch.float32, None), (torch.float32, definition), (torch.float64, definition)):
        inputs = [x.requires_grad_() for x in call(dtype)]
        prefix = prefix.to(dtype)
        wanted = [*inputs[: 4 if "token" in (prefix.gates or "") else 3], *prefix.parameters()]
        if compute is None:
            o = prefix(*inputs, is_causal=causal, key_padding_mask=padding)
        else:
            o = compute(prefix, *inputs, causal, padding)
        weights = torch.linspace(-1, 1, o.numel(), dtype=dtype).view_as(o)
        grads = torch.autograd.grad((o * weights).sum(), wanted)
        found.append((o.detach(), torch.cat([g.flatten() for g in grads])))
    for what, results in zip(("o", "gradients"), zip(*found)):
        assert_close(*results, what)


def test_llama_adapter_starts_as_attention_without_a_prefix():
    q, k, v, _ = call()
    prefix = module(stirred=False, style="llama_adapter", init="random")
    assert torch.equal(prefix.gate_out, torch.zeros(H))
    o, exact = (scaled_dot_product_attention(*call(dtype)[:3], is_causal=True, enable_gqa=True) for dtype in _BOTH)
    assert_close(prefix(q, k, v, is_causal=True), o, exact)


_BOTH = torch.float32, torch.float64


def test_what_it_starts_as():
    prefix = PrefixAttention(H, HK, 64, 500, hidden_size=WIDTH, gates="token+layer")
    for p in (prefix.prefix_k, prefix.prefix_v, prefix.token_gate):
        assert abs(p.std().item() / 0.02 - 1) < 4 / (2 * p.numel()) ** 0.5  # four deviations of a deviation
    assert torch.equal(prefix.layer_gate, torch.ones(1))
    zeros = PrefixAttention(H, HK, D, 3, init="zeros")
    made = PrefixAttention(H, HK, D, 3, hidden_size=WIDTH, mlp=4, init="zeros")
    for prefix in (zeros, made):
        assert not any(x.any() for x in prefix.keys_values())
        assert [x.shape for x in prefix.keys_values()] == [(HK, 3, D)] * 2
    assert set(dict(made.named_parameters())) == {
        "embedding",
        *(f"mlp.{i}.{x}" for i in (0, 2) for x in ("weight", "bias")),
    }


def test_a_bias_of_minus_infinity_prunes_and_log_n_counts_for_n():
    q, k, v, _ = call(torch.float64)
    prefix = module(4, log_bias=True).double()
    keys, values = (x.detach().clone() for x in prefix.keys_values())
    prefix.log_bias.copy_(torch.tensor([0.0, -torch.inf, 0.0, math.log(3)], dtype=torch.float64))
    several = module(5).double()
    several.set_keys_values(*(x[:, [0, 2, 3, 3, 3]] for x in (keys, values)))
    o, expected = prefix(q, k, v), several(q, k, v)
    assert (o - expected).abs().max() <= 8 * torch.finfo(torch.float64).eps * expected.abs().max()


def test_masters_stay_float32_under_bfloat16():
    prefix = module(gates="token+layer", style="llama_adapter")
    o = prefix(*call(torch.bfloat16), is_causal=True)
    o.sum().backward()
    assert o.dtype == torch.bfloat16
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.any() for p in prefix.parameters())


def test_a_full_mask_says_which_tokens_a_gate_averages():
    """One that some query sees is read; bool and added masks alike."""
    q, k, v, hidden = call()
    prefix = module(gates="token")
    padding = torch.ones(B, T, dtype=torch.bool)
    padding[1, 3:] = False
    expected = prefix.gate(hidden, False, padding)
    full = padding[:, None, None].expand(B, 1, T, T)
    added = torch.zeros(B, 1, T, T).masked_fill(~full, torch.finfo(torch.float32).min)
    for mask in (full, added):
        assert torch.equal(prefix.gate(hidden, False, None, mask), expected)
    assert expected.shape == (B, 1, 1, 3) and prefix.gate(hidden, True).shape == (B, 1, T, 3)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"length": 0}, "length must be at least 1"),
        ({"kv_heads": 3}, "heads a multiple of kv_heads"),
        ({"gates": "head"}, "gates must be one of"),
        ({"style": "both"}, "style must be one of"),
        ({"init": "ones"}, "init must be one of"),
        ({"style": "llama_adapter", "init": "zeros"}, "zeros behind g = 0 never train"),
        ({"gates": "token"}, "hidden_size is needed"),
        ({"mlp": 3}, "hidden_size is needed"),
    ],
)
def test_wrong_arguments(wrong, message):
    with pytest.raises(ValueError, match=f"PrefixAttention: .*{message}"):
        PrefixAttention(**{"heads": H, "kv_heads": HK, "head_dim": D, "length": 3} | wrong)


def test_wrong_calls():
    q, k, v, _ = call()
    with pytest.raises(ValueError, match="token gates need `hidden`"):
        module(gates="token")(q, k, v)
    with pytest.raises(ValueError, match="an MLP makes the keys and values"):
        module(mlp=3).set_keys_values(torch.zeros(HK, 3, D), torch.zeros(HK, 3, D))
    with pytest.raises(ValueError, match="prefix_attention: prefix_k must be"):
        module()(q, torch.randn(B, H, T, D), torch.randn(B, H, T, D))
