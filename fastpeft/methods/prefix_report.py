"""prefix_report: what a prefix's gates say of its layers and tokens, averaged over data; a shorter prefix follows from it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..nn.prefix_attention import PrefixAttention
from .attach import activate, pick, plain
from .prefix import PrefixAdapter

SHOWN = 6  # tokens of a layer in the table


@dataclass(frozen=True, eq=False)
class PrefixReport:
    """The gates λ·α of a prefix (APT: Zhang et al. 2023, arXiv 2305.15212), averaged over rows.

    A row counts once: on a causal model its gates are first averaged over its tokens that are attended.

    Attributes:
        name, gates: of the adapter and its kind.
        weights: float64 [layers, P], NaN beyond a layer's length; P is the longest. A token that stands for pruned ones is
            not among them.
        rows: how many rows of data.
        right, wrong: the same [layers, P] over the rows that were classified rightly and wrongly, or None: none was, or the
            batches had no `labels`. right_rows, wrong_rows: their numbers.
    """

    name: str
    gates: str
    weights: torch.Tensor
    rows: int
    right: torch.Tensor | None
    wrong: torch.Tensor | None
    right_rows: int
    wrong_rows: int

    def kept(self, budget: int) -> list[list[int]]:
        """The tokens of each layer, in order, that are among the `budget` of largest |weight| in all layers."""
        inside = ~self.weights.isnan()
        check_budget(budget, int(inside.sum()), "PrefixReport")
        sizes = self.weights.abs().masked_fill(~inside, -1.0).flatten()
        keep = torch.zeros_like(sizes, dtype=torch.bool)
        keep[sizes.argsort(descending=True, stable=True)[:budget]] = True
        return [row.nonzero()[:, 0].tolist() for row in keep.view_as(self.weights)]

    def lengths(self, budget: int) -> tuple[int, ...]:
        """How many of them each layer has: `fp.PrefixConfig(length=report.lengths(budget))`."""
        return tuple(map(len, self.kept(budget)))

    def rank_correlation(self, other: PrefixReport, by: str = "token") -> float:
        """Spearman's ρ between two adapters' weights: of all tokens, or by="layer" of the layers' means.

        Tokens that began at random have no order in common from one seed to another; their layers have, and so have tokens
        that began as those of a text. NaN where all weights of one are equal.

        Raises:
            ValueError: other lengths, or another `by`.
        """
        if by not in ("token", "layer"):
            raise ValueError(f"PrefixReport: by must be 'token' or 'layer', got {by!r}")
        inside = ~self.weights.isnan()
        if not torch.equal(inside, ~other.weights.isnan()):
            lengths = [report.weights.isnan().logical_not().sum(1).tolist() for report in (self, other)]
            raise ValueError(f"PrefixReport: the lengths of both must be the same, got {lengths[0]} and {lengths[1]}")
        if by == "layer":
            x, y = (report.weights[inside.any(1)].nanmean(1) for report in (self, other))
        else:
            x, y = self.weights[inside], other.weights[inside]
        return torch.corrcoef(torch.stack([_ranks(x), _ranks(y)]))[0, 1].item()

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Save a heat map, a row a layer and a column a token; the file's ending says of what kind (.png, .svg, .pdf).

        With rows of both kinds a second one shows how much larger the weights of the right ones are. Needs matplotlib,
        which comes with fastpeft[bench]; ImportError without it.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            wanted = 'matplotlib, which cannot be imported; pip install "fastpeft[bench]" brings it'
            raise ImportError(f"PrefixReport.plot needs {wanted}") from error
        maps = [(f"mean gate, {self.rows} rows", self.weights, bool((self.weights < 0).any()))]
        if self.right is not None and self.wrong is not None:
            maps.append((f"{self.right_rows} right minus {self.wrong_rows} wrong", self.right - self.wrong, True))
        layers, tokens = self.weights.shape
        size = (1.5 + max(4.0, 0.16 * tokens)) * len(maps), 1.3 + max(1.5, 0.22 * layers)
        figure = Figure(figsize=size, layout="constrained")
        for axis, (title, values, signed) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps):
            top = values.abs().nan_to_num().max().item() or 1.0
            axis.set_facecolor("#dddddd")  # no such token
            image = axis.imshow(
                values.numpy(),
                aspect="auto",
                cmap="RdBu_r" if signed else "Blues",
                vmin=-top if signed else 0.0,
                vmax=top,
            )
            axis.set(title=title, xlabel="prefix token", ylabel="layer")
            for ticks in (axis.xaxis, axis.yaxis):
                ticks.get_major_locator().set_params(integer=True)
            figure.colorbar(image, ax=axis)
        figure.savefig(path, dpi=110)

    def __str__(self) -> str:
        split = f", {self.right_rows} right and {self.wrong_rows} wrong" if self.right_rows + self.wrong_rows else ""
        parts = {"mean": self.weights, "right": self.right, "wrong": self.wrong}
        columns = {title: values.nanmean(1) for title, values in parts.items() if values is not None}
        lines = [f"prefix {self.name!r}, {self.gates} gates, averaged over {self.rows} rows{split}"]
        lines.append("".join([" layer", *(f"{title:>8}" for title in columns), "  largest (token: gate)"]))
        for i, row in enumerate(self.weights):
            own = row[~row.isnan()]
            order = own.abs().argsort(descending=True, stable=True)[:SHOWN].tolist()
            means = "".join("       -" if mean[i].isnan() else f"{mean[i]:8.3f}" for mean in columns.values())
            shown = "  ".join(f"{j}: {own[j]:.3f}" for j in order)
            lines.append(f"{i:6}{means}  {shown}".rstrip())
        return "\n".join(lines)


# ---- averaging -------------------------------------------------------------------------------------------------------

UNKNOWN, WRONG, RIGHT = range(3)  # groups of rows


def prefix_report(model: nn.Module, data: Iterable[Mapping[str, Any]], name: str | None) -> PrefixReport:
    """See `fastpeft.prefix_report`."""
    model = plain(model)
    adapter = gated(model, name, "prefix_report")
    tokens = [0 if prefix is None else prefix.tokens for prefix in adapter.prefixes]
    sums = torch.zeros(3, len(tokens), max(tokens), dtype=torch.float64)
    counts = torch.zeros(3, dtype=torch.int64)
    with _measuring(model, adapter) as seen:
        for batch in data:
            if not isinstance(batch, Mapping):
                raise TypeError(f"prefix_report: data must be batches of keywords, dicts, got {type(batch).__name__}")
            seen.clear()
            output = model(**batch)
            rows = _rows(seen, tokens)
            group = _verdicts(output, batch.get("labels"), len(rows))
            sums.index_add_(0, group, rows)
            counts += group.bincount(minlength=3)
    if not counts.any():
        raise ValueError("prefix_report: data must have a row at least, got none")
    of = {g: sums[g] / counts[g] if counts[g] else None for g in (WRONG, RIGHT)}
    right, wrong, all_rows = int(counts[RIGHT]), int(counts[WRONG]), int(counts.sum())
    weights = sums.sum(0) / all_rows
    return PrefixReport(adapter.name, adapter.config.gates, weights, all_rows, of[RIGHT], of[WRONG], right, wrong)


def gated(model: nn.Module, name: str | None, op: str) -> PrefixAdapter:
    """An attached prefix with gates. Raises ValueError."""
    record, name = pick(model, name, op)
    adapter = record.attached[name].adapter
    if not isinstance(adapter, PrefixAdapter):
        raise ValueError(f"{op}: {name!r} must be a prefix, got an adapter of {type(adapter.config).__name__}")
    if adapter.config.gates is None:
        wanted = "a prefix with gates, which are what is measured: fp.PrefixConfig(gates='token+layer')"
        raise ValueError(f"{op}: {name!r} must be {wanted}; it has none")
    if adapter.selection.rows is not None:
        raise ValueError(f"{op}: one prefix is measured, but prefix_rows gives every row its own now; leave it first")
    return adapter


def check_budget(budget: int, most: int, op: str) -> None:
    if not isinstance(budget, int) or isinstance(budget, bool) or not 1 <= budget <= most:
        raise ValueError(f"{op}: budget must be an int from 1 to {most}, the tokens of all layers, got {budget!r}")


@contextmanager
def _measuring(model: nn.Module, adapter: PrefixAdapter) -> Iterator[dict[int, torch.Tensor]]:
    """The adapter alone runs, without dropout and gradients; after a run the dict has the gates [B, tokens] by layer."""
    record, _ = pick(model, adapter.name, "prefix_report")
    active, trained = record.active, record.trained
    flags = [(p, p.requires_grad) for p in model.parameters()]
    training = [(module, module.training) for module in model.modules()]
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        prefix.register_forward_pre_hook(partial(_see, seen, i), with_kwargs=True)
        for i, prefix in enumerate(adapter.prefixes)
        if prefix is not None
    ]
    try:
        activate(model, adapter.name)
        model.eval()
        with torch.no_grad():
            yield seen
    finally:
        for hook in hooks:
            hook.remove()
        for module, was in training:
            module.training = was
        activate(model, active)
        record.trained = trained
        for p, was in flags:
            p.requires_grad_(was)


def _see(seen: dict[int, torch.Tensor], layer: int, prefix: PrefixAttention, args: tuple, kwargs: dict) -> None:
    """Pre-hook of a prefix."""
    q, k, _, hidden = args
    if q.shape[2] != k.shape[2]:
        got = f"{q.shape[2]} queries and {k.shape[2]} keys"
        raise ValueError(f"prefix_report: data must be whole rows, which continue no cache, got {got}")
    masks = {key: kwargs[key] for key in ("is_causal", "key_padding_mask", "attn_mask")}
    if prefix.tokens:
        seen[layer] = prefix.mean_gate(hidden, **masks).expand(len(q), -1)


def _rows(seen: Mapping[int, torch.Tensor], tokens: list[int]) -> torch.Tensor:
    """float64 [B, layers, P], NaN beyond a layer's length."""
    if set(seen) != {i for i, n in enumerate(tokens) if n}:
        raise ValueError("prefix_report: the model must run each of its layers once a batch")
    rows = torch.full((len(next(iter(seen.values()))), len(tokens), max(tokens)), torch.nan, dtype=torch.float64)
    for i, gates in seen.items():
        rows[:, i, : tokens[i]] = gates
    return rows


def _verdicts(output: Any, labels: Any, rows: int) -> torch.Tensor:
    """int64 [rows]: whether each was classified rightly; UNKNOWN where this is no classification of rows."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    unknown = torch.full((rows,), UNKNOWN)
    if not isinstance(logits, torch.Tensor) or not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        return unknown
    if not (labels.shape == (rows,) == logits.shape[:1] and logits.dim() == 2 and logits.shape[1] > 1):
        return unknown
    return torch.where(logits.argmax(1) == labels.to(logits.device), RIGHT, WRONG).cpu()


def _ranks(x: torch.Tensor) -> torch.Tensor:
    """1 for the smallest; equal ones share the mean of their ranks."""
    _, place, count = x.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[place].double()
