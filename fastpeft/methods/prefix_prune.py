"""prune_prefix: a trained prefix without the tokens whose gates are smallest, each layer with as many as it needs.

In one softmax a token of gate 0 adds nothing to the output, but takes e⁰ of the weights. So a layer's dropped tokens D leave
one behind that has a zero key and value and β = log Σ_D e^{β_j}, and takes what they would. With w the softmax weights,
g = |G| and a = scale·|q·pk| of the dropped tokens, o the layer's output before and o' after, a query and head, exactly

    o − o' = Σ_D w_j (G_j pv_j − (1 − e^{−s_j}) o'),   s_j = scale·G_j q·pk_j
    ‖o − o'‖ ≤ Σ_D w_j (g_j ‖pv_j‖ + (e^{g_j a_j} − 1) ‖o'‖)

which is rounding where the dropped gates are 0. In style "llama_adapter" the same holds for its own softmax and output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..nn.prefix_attention import PrefixAttention
from .attach import plain
from .prefix_report import PrefixReport, check_budget, gated, prefix_report


def prune_prefix(model: nn.Module, budget: int, data: Iterable[Mapping[str, Any]], name: str | None) -> PrefixReport:
    """See `fastpeft.prune_prefix`."""
    model = plain(model)
    adapter = gated(model, name, "prune_prefix")
    if any(hasattr(p, "full_tensor") for p in model.parameters()):
        raise RuntimeError(
            "prune_prefix: FSDP2 has sharded this model; prune before fully_shard, or after loading the file"
        )
    check_budget(budget, sum(prefix.tokens for prefix in adapter.given()), "prune_prefix")
    report = prefix_report(model, data, name)
    kept = report.kept(budget)
    prefixes = [None if old is None else _pruned(old, tokens) for old, tokens in zip(adapter.prefixes, kept)]
    config = replace(
        adapter.config,
        length=tuple(0 if prefix is None else prefix.length for prefix in prefixes),
        dropped=tuple(0 if prefix is None else prefix.dropped for prefix in prefixes),
        log_bias=True,
        position_start=adapter.selection.starts[adapter.name],
        mlp=None,
        init="random",
        gates_from=None,
    )
    adapter.replace(config, prefixes)
    return report


@torch.no_grad()
def _pruned(old: PrefixAttention, kept: list[int]) -> PrefixAttention:
    """These tokens of a prefix, and one in the place of the others."""
    keys, values = old.keys_values()
    n, dropped = len(kept), old.dropped + old.tokens - len(kept)
    places = torch.tensor(kept, dtype=torch.int64, device=keys.device)
    new = PrefixAttention(
        old.heads,
        old.kv_heads,
        old.head_dim,
        n + (dropped > 0),
        hidden_size=old.token_gate.shape[1] if hasattr(old, "token_gate") else None,
        gates=old.gates,
        style=old.style,
        log_bias=True,
        dropped=dropped,
        dtype=keys.dtype,
        device=keys.device,
    )
    bias: Any = torch.zeros_like(keys[0, :, 0]) if old.log_bias is None else old.log_bias
    gone = torch.ones_like(bias, dtype=torch.bool)
    gone[places] = False
    new.prefix_k.zero_()[:, :n], new.prefix_v.zero_()[:, :n] = keys[:, places], values[:, places]
    new.log_bias.copy_(torch.cat([bias[places], bias[gone].logsumexp(0, keepdim=True)])[: new.length])
    if hasattr(old, "token_gate"):
        new.token_gate.zero_()[:n] = old.token_gate[places]
    for name in ("layer_gate", "gate_out"):
        if hasattr(old, name):
            getattr(new, name).copy_(getattr(old, name))
    for p in new.parameters():
        p.requires_grad_(next(old.parameters()).requires_grad)
    return new.train(old.training)
