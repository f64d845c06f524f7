"""PrefixAttention: a trained prefix of keys and values in an attention layer, on `ops.prefix_attention`; Prefixes: several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, pad

from .. import ops

GATES = (None, "token", "layer", "token+layer")
STYLES = ("joint", "llama_adapter")
INITS = ("random", "zeros")
STD = 0.02  # of random keys and values (as BERT's and GPT-2's embeddings) and of the token gates' weight


class PrefixAttention(nn.Module):
    """Attention over a prefix that is trained and the tokens, for one layer.

        joint:          o = softmax([σ·G⊙(q pkᵀ) + β, σ·q kᵀ]) [G⊙pv; v]
        llama_adapter:  o = softmax(σ·q kᵀ) v + tanh(g_h) · softmax(σ·G⊙(q pkᵀ) + β) (G⊙pv)        G = λ · sigmoid(h Wᵀ)

    "joint" without gates is prefix tuning (Li and Liang 2021) and P-tuning v2 (Liu et al. 2022); with them Adaptive Prefix
    Tuning (APT, Zhang et al. 2023, arXiv 2305.15212: token-level α and layer-level λ). "llama_adapter" is the zero-init
    attention of LLaMA-Adapter (Zhang et al. 2023, arXiv 2303.16199, section 3.2): a softmax of its own, scaled by tanh(g) a
    head, so that the layer begins as its base. (The paper projects keys and values from a prompt; here they are the
    parameters. PEFT's AdaptionPromptConfig is another method: one gate a layer, without tanh, on outputs of its own.)

    **What a gate sees.** h is what the layer's attention reads. In a bidirectional layer the mean of h over the tokens
    that are not masked gives one gate vector a row; in a causal one every query has its own gates, from its own h_t, so
    that a gate never sees the future.

    Args:
        heads, kv_heads, head_dim: of the layer (H, Hk, D). length: P, at least 1.
        hidden_size: d, the width of h; needed for token gates and an MLP.
        gates: "token" trains W, "layer" λ, "token+layer" both; None: G = 1.
        style: "joint" or "llama_adapter".
        mlp: None, or the width of an MLP (tanh) that makes keys and values from an embedding [P, d], for a steadier
            training (Li and Liang 2021, section 4.3; theirs is one MLP for all layers).
        init: "random", N(0, 0.02), or "zeros", where all tokens of an ungated prefix stay alike for ever; with an MLP they
            are what its last layer begins as. Keys and values of real text are copied in by `set_keys_values`.
        log_bias: keep β, a buffer [P] that is 0 at first; −∞ prunes a token, log(n) makes it count for n of them.
        dtype: of the parameters; float32 masters by default (the kernel rounds them).

    Shapes: q [B, H, T, D], k and v [B, Hk, S, D], h [B, T, d] -> o [B, H, T, D]. Parameters: prefix_k, prefix_v
    [Hk, P, D] or embedding [P, d] and mlp; token_gate [P, d], layer_gate [1], gate_out [H].

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        length: int,
        *,
        hidden_size: int | None = None,
        gates: str | None = None,
        style: str = "joint",
        mlp: int | None = None,
        init: str = "random",
        log_bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if length < 1 or kv_heads < 1 or heads % kv_heads:
            got = f"length {length}, heads {heads}, kv_heads {kv_heads}"
            raise ValueError(f"PrefixAttention: length must be at least 1 and heads a multiple of kv_heads, got {got}")
        for name, value, known in (("gates", gates, GATES), ("style", style, STYLES), ("init", init, INITS)):
            if value not in known:
                raise ValueError(f"PrefixAttention: {name} must be one of {known}, got {value!r}")
        if style == "llama_adapter" and init == "zeros":
            raise ValueError(
                "PrefixAttention: with style 'llama_adapter' init must be 'random': zeros behind g = 0 never train"
            )
        if hidden_size is None and (mlp is not None or "token" in (gates or "")):
            raise ValueError("PrefixAttention: hidden_size is needed for token gates and for an MLP")
        self.heads, self.kv_heads, self.head_dim, self.length = heads, kv_heads, head_dim, length
        self.gates, self.style = gates, style
        like: dict[str, Any] = {"dtype": dtype, "device": device}
        if mlp is None:
            self.prefix_k = nn.Parameter(torch.zeros(kv_heads, length, head_dim, **like))
            self.prefix_v = nn.Parameter(torch.zeros(kv_heads, length, head_dim, **like))
            fresh: tuple[torch.Tensor, ...] = (self.prefix_k, self.prefix_v)
        else:
            self.embedding = nn.Parameter(torch.randn(length, hidden_size, **like))
            last = nn.Linear(mlp, 2 * kv_heads * head_dim, **like)
            self.mlp = nn.Sequential(nn.Linear(hidden_size, mlp, **like), nn.Tanh(), last)
            fresh = (last.weight, last.bias)
        for parameter in fresh:
            nn.init.normal_(parameter, std=STD) if init == "random" else nn.init.zeros_(parameter)
        if gates in ("token", "token+layer"):
            self.token_gate = nn.Parameter(torch.randn(length, hidden_size, **like) * STD)
        if gates in ("layer", "token+layer"):
            self.layer_gate = nn.Parameter(torch.ones(1, **like))  # [1]: FSDP2 takes no 0-dim parameter
        if style == "llama_adapter":
            self.gate_out = nn.Parameter(torch.zeros(heads, **like))
        self.register_buffer("log_bias", torch.zeros(length, **like) if log_bias else None)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        hidden: torch.Tensor | None = None,
        *,
        is_causal: bool = False,
        key_padding_mask: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        scale: float | None = None,
    ) -> torch.Tensor:
        """o [B, H, T, D]; masks, `dropout_p` and `scale` as for `fastpeft.ops.prefix_attention`.

        hidden: h [B, T, d]; needed with token gates. is_causal says how gates read it; with an `attn_mask`, which is
        already causal where it needs to be, the attention itself takes it from there.
        """
        pk, pv = self.keys_values()
        gate = self.gate(hidden, is_causal, key_padding_mask, attn_mask)
        return ops.prefix_attention(
            q,
            k,
            v,
            pk[None],
            pv[None],
            mode="joint" if self.style == "joint" else "separate",
            gate_k=gate,
            gate_v=gate,
            log_bias=None if self.log_bias is None else self.log_bias.expand(self.heads, -1),
            gate_out=torch.tanh(self.gate_out) if self.style == "llama_adapter" else None,
            is_causal=is_causal and attn_mask is None,
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            scale=scale,
        )

    def keys_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The prefix's keys and values [Hk, P, D]; those that the MLP makes where there is one."""
        if "mlp" in self._modules:
            made = self.mlp(self.embedding).view(self.length, 2, self.kv_heads, self.head_dim)
            pk, pv = made.permute(1, 2, 0, 3).unbind()
            return pk, pv
        return self.prefix_k, self.prefix_v

    @torch.no_grad()
    def set_keys_values(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Begin at these keys and values [Hk, P, D] (of real text, after rotary). ValueError with an MLP."""
        if "mlp" in self._modules:
            raise ValueError("PrefixAttention.set_keys_values: an MLP makes the keys and values; use mlp=None")
        self.prefix_k.copy_(keys)
        self.prefix_v.copy_(values)

    def gate(
        self,
        hidden: torch.Tensor | None,
        is_causal: bool,
        key_padding_mask: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """G: [B, 1, T, P] in a causal layer, [B, 1, 1, P] in a bidirectional one, [1, 1, 1, 1] for λ alone; None: no gates."""
        if self.gates is None:
            return None
        gate = None
        if self.gates != "layer":
            if hidden is None:
                raise ValueError("PrefixAttention: token gates need `hidden`, the hidden states [B, T, d] of the layer")
            if not is_causal:
                hidden = _mean(hidden, _attended(key_padding_mask, attn_mask))
            logits = linear(hidden, self.token_gate.to(hidden.dtype))  # [B, T or 1, P]
            gate = torch.sigmoid(logits.to(torch.promote_types(logits.dtype, self.token_gate.dtype)))[:, None]
        if self.gates != "token":
            gate = self.layer_gate.view(1, 1, 1, 1) if gate is None else gate * self.layer_gate
        return gate

    def extra_repr(self) -> str:
        shape = f"heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, length={self.length}"
        return f"{shape}, gates={self.gates}, style={self.style}"


class Prefixes(nn.ModuleDict):
    """The prefixes of one attention layer, by adapter, of which it runs none, one, or one a row.

    One that has no tokens in this layer has no entry. `selection` is shared by all layers of a model: `active` is the name
    that runs; in a mixed batch `rows` are the names that its `index`, int32 [B], counts, −1 being none.
    """

    def __init__(self, selection: Any) -> None:
        super().__init__()
        self.selection = selection
        self.offsets: torch.Tensor | None = None  # in a mixed batch, int64 [A + 1]: where each one's tokens begin

    def in_use(self) -> list[PrefixAttention | None]:
        names = (self.selection.active,) if self.selection.rows is None else self.selection.rows
        return [self._modules.get(name) for name in names]  # type: ignore[misc]

    def mix(self, device: torch.device) -> None:
        """Get ready for `rows`, before they run."""
        lengths = [0 if prefix is None else prefix.length for prefix in self.in_use()]
        self.offsets = torch.tensor([0, *lengths], device=device).cumsum(0)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        hidden: torch.Tensor | None = None,
        *,
        is_causal: bool = False,
        key_padding_mask: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        scale: float | None = None,
    ) -> torch.Tensor:
        """As `PrefixAttention.forward`; without a prefix the same op with an empty one."""
        masks: dict[str, Any] = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
        numbers: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale}
        prefixes = self.in_use()
        some = [prefix for prefix in prefixes if prefix is not None]
        if some and self.selection.rows is None:
            return some[0](q, k, v, hidden, is_causal=is_causal, **masks, **numbers)
        causal = is_causal and attn_mask is None
        if not some:
            none = q.new_empty(1, k.shape[1], 0, q.shape[-1])
            return ops.prefix_attention(q, k, v, none, none, is_causal=causal, **masks, **numbers)
        index, heads, style = self.selection.index, some[0].heads, some[0].style
        keys, values = zip(*(prefix.keys_values() for prefix in some))
        log_bias = gate_out = None
        if any(prefix.log_bias is not None for prefix in some):
            each: list[Any] = [keys[0].new_zeros(p.length) if p.log_bias is None else p.log_bias for p in some]
            log_bias = torch.cat(each).expand(heads, -1)
        if style != "joint":
            each = [keys[0].new_zeros(heads) if prefix is None else prefix.gate_out for prefix in prefixes]
            gate_out = torch.tanh(torch.stack(each))
        gate = _mixed_gate(prefixes, index, hidden, is_causal, masks)
        return ops.prefix_attention(
            q,
            k,
            v,
            torch.cat(keys, dim=1),  # flat: [Hk, ΣP, D]
            torch.cat(values, dim=1),
            mode="joint" if style == "joint" else "separate",
            gate_k=gate,
            gate_v=gate,
            log_bias=log_bias,
            gate_out=gate_out,
            is_causal=causal,
            prefix_index=index,
            prefix_offsets=self.offsets,
            **masks,
            **numbers,
        )


def _mixed_gate(
    prefixes: Sequence[PrefixAttention | None], index: torch.Tensor, hidden: Any, is_causal: bool, masks: dict[str, Any]
) -> torch.Tensor | None:
    """Each row's own gates [B, 1, T or 1, longest P], 1 where its prefix has none; None: none has."""
    longest = max(prefix.length for prefix in prefixes if prefix is not None)
    rows, gate = index.view(-1, 1, 1, 1), None
    for number, prefix in enumerate(prefixes):
        if prefix is not None and prefix.gates is not None:
            own = prefix.gate(hidden, is_causal, **masks)
            own = own.expand(*own.shape[:3], prefix.length)
            own = pad(own, (0, longest - prefix.length), value=1.0)
            gate = torch.where(rows == number, own, 1.0 if gate is None else gate)
    return gate


def _attended(key_padding_mask: torch.Tensor | None, attn_mask: torch.Tensor | None) -> torch.Tensor | None:
    """bool [B or 1, S]: the tokens that some query sees; None: all of them."""
    if attn_mask is None:
        return key_padding_mask
    seen = attn_mask if attn_mask.dtype == torch.bool else attn_mask > torch.finfo(attn_mask.dtype).min / 2
    return seen.flatten(1, 2).any(1)


def _mean(hidden: torch.Tensor, attended: torch.Tensor | None) -> torch.Tensor:
    """h over the tokens attended, [B, 1, d]; zeros where there is none."""
    if attended is None:
        return hidden.mean(1, keepdim=True)
    kept = hidden.masked_fill(~attended[..., None], 0.0)
    share = attended.shape[1] / attended.sum(1).clamp(min=1)
    return kept.mean(1, keepdim=True) * share[:, None, None].to(hidden.dtype)
