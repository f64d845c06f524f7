"""Plots (PNG) and one HTML page that opens offline."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from . import tables
from ._measure import FROZEN, Samples

_COLOURS = {
    "PEFT": "#c0504d",
    "PEFT same dtype": "#e0a458",
    "PEFT compiled": "#8c6bb1",
    "composition": "#7f8c8d",
    "fastpeft": "#1f77b4",
    "full fine-tuning": "#444444",
    "bitsandbytes eval": "#c0504d",
    "bitsandbytes dequantise + GEMM": "#e0a458",
    "bitsandbytes training": "#8c6bb1",
    "torch int4": "#7f8c8d",
    "fastpeft, double quantisation": "#6baed6",
    FROZEN: "#bbbbbb",
}
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:78rem;padding:0 1rem;color:#1b1f24}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}div{overflow-x:auto}
table{border-collapse:collapse;font-size:.85rem}th,td{padding:.3rem .6rem;border-bottom:1px solid #ddd;text-align:left}
th{background:#f4f5f7}.good{color:#11702c;font-weight:600}.bad{color:#b3261e;font-weight:600}.dull{color:#8a6d00}
img{max-width:100%;margin:1rem 0}p{color:#555}dt{font-weight:600}dd{margin:0 0 .4rem}
@media(prefers-color-scheme:dark){body{background:#16181b;color:#e4e6e8}th{background:#24272b}th,td{border-color:#3a3d41}
p{color:#a9adb2}img{background:#fff}.good{color:#5fd083}.bad{color:#ff8a80}.dull{color:#e2c044}}
"""

Row = dict[str, Any]


def plots(rows: list[Row], folder: Path) -> list[Path]:
    """Write what the rows have data for; the files' paths."""
    makers = (_losses, _memory, _overheads, _sweep, _linear4bit)
    made = [maker(rows, folder) for maker in makers]
    return [path for path in made if path is not None]


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _losses(rows: list[Row], folder: Path) -> Path | None:
    found = [row for row in rows if row["kind"] == "training"]
    if not found:
        return None
    row = found[0]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 6), sharex=True, height_ratios=[2, 1])
    steps = range(1, row["steps"] + 1)
    for way, values in row["losses"].items():
        style = "--" if way == "fastpeft" else "-"
        top.plot(steps, values, style, label=way, color=_COLOURS.get(way), linewidth=2 if way != "fastpeft" else 1.5)
    for way in ("PEFT same dtype", "fastpeft"):
        gaps = [abs(a - b) for a, b in zip(row["losses"][way], row["losses"]["PEFT"], strict=True)]
        bottom.plot(steps, gaps, label=way, color=_COLOURS[way])
    top.set(
        ylabel="loss",
        title=f"{row['model']}, {'QLoRA' if tables.suite_of(row) == 'qlora' else 'LoRA'} on {row['text']}",
    )
    bottom.set(xlabel="step", ylabel="|Δloss| to PEFT", yscale="symlog")
    bottom.set_yscale("symlog", linthresh=1e-4)
    top.legend()
    bottom.legend()
    return _save(figure, folder / "losses.png")


def _memory(rows: list[Row], folder: Path) -> Path | None:
    found = [row for row in rows if row["kind"] == "memory"]
    if not found or any(data["net_bytes"] is None for data in found[0]["memory"].values()):
        return None
    sizes = {way: data["net_bytes"] / 2**20 for way, data in found[0]["memory"].items()}
    figure, axis = plt.subplots(figsize=(8, 3.2))
    axis.barh(list(sizes), list(sizes.values()), color=[_COLOURS.get(way) for way in sizes])
    axis.invert_yaxis()
    for i, value in enumerate(sizes.values()):
        axis.text(value, i, f" {value:.0f}", va="center")
    axis.set(xlabel="MiB", title=found[0]["key"])
    axis.margins(x=0.12)
    return _save(figure, folder / "memory.png")


def _overheads(rows: list[Row], folder: Path) -> Path | None:
    found = [row for row in rows if row["kind"] == "step" or (row["kind"] == "lora_linear" and row["case"]["limits"])]
    if not found:
        return None
    names = [n for n in _COLOURS if any(n in row["overhead"] for row in found)]
    figure, axis = plt.subplots(figsize=(max(8.0, 1.7 * len(found)), 4.6))
    width = 0.8 / len(names)
    for j, name in enumerate(names):
        at, heights, below, above = [], [], [], []
        for i, row in enumerate(found):
            values = row["overhead"].get(name)
            if values is None or None in values:
                continue
            median, low, high = values
            at.append(i + (j - (len(names) - 1) / 2) * width)
            heights.append(median)
            below.append(max(median - low, 0))
            above.append(max(high - median, 0))
        axis.bar(at, heights, width, yerr=[below, above], capsize=2, color=_COLOURS[name], label=name)
    for i, row in enumerate(found):
        if row["floor_overhead"] is None:
            continue
        axis.hlines(
            row["floor_overhead"], i - 0.42, i + 0.42, color="black", linewidth=1, label="floor" if not i else None
        )
    labels = [row["key"].replace(" training step ", "\n").replace(" M=", "\nM=").replace(" r=16", "") for row in found]
    axis.set_xticks(range(len(found)), [label.split(",")[0] for label in labels], fontsize=8)
    axis.set(ylabel="overhead over the frozen layer", title="What the adapter costs (median, 95 % interval)")
    axis.axhline(0, color="grey", linewidth=0.6)
    axis.legend(fontsize=8)
    return _save(figure, folder / "overhead.png")


def _sweep(rows: list[Row], folder: Path) -> Path | None:
    found = [row for row in rows if row["kind"] == "lora_linear" and row.get("best_peer") in row["time"]]
    if len(found) < 2:
        return None
    figure, axis = plt.subplots(figsize=(9, 0.28 * len(found) + 1.6))
    for i, row in enumerate(found):
        median, low, high = row["time"][row["best_peer"]]
        if None in (median, low, high):
            continue
        reliable = row["validity"][0] == "ok"
        speed, least, most = 1 / median, 1 / high, 1 / low
        error = [[max(speed - least, 0)], [max(most - speed, 0)]]
        colour = "#1f77b4" if reliable else "#bbbbbb"
        axis.errorbar(speed, i, xerr=error, fmt="o", markersize=4, capsize=2, color=colour)
    axis.set_yticks(range(len(found)), [row["key"].replace(" r=16", "") for row in found], fontsize=7)
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=0.8)
    axis.axvline(0.97, color="#c0504d", linewidth=0.8, linestyle=":")
    axis.set(xlabel="speed over the best of the three peers (grey: too noisy or void)")
    return _save(figure, folder / "speed.png")


def _linear4bit(rows: list[Row], folder: Path) -> Path | None:
    """Time over the dense layer's by M, one panel a shape; hollow: too noisy or void."""
    found = [row for row in rows if row["kind"] == "linear4bit" and not row["case"]["double"]]
    shapes = sorted({(row["case"]["k"], row["case"]["n"]) for row in found})
    if not found:
        return None
    figure, axes = plt.subplots(1, len(shapes), figsize=(5.2 * len(shapes), 4.4), sharey=True, squeeze=False)
    for axis, (k, n) in zip(axes[0], shapes, strict=True):
        own = sorted((r for r in found if (r["case"]["k"], r["case"]["n"]) == (k, n)), key=lambda r: r["case"]["m"])
        for name, colour in _COLOURS.items():
            points = [(r, r["over_dense"][name]) for r in own if None not in r["over_dense"].get(name, [None])]
            at = [r["case"]["m"] for r, _ in points]
            axis.plot(at, [v[0] for _, v in points], color=colour, linewidth=1, label=name if points else None)
            for r, (median, low, high) in points:
                error, fill = [[max(median - low, 0)], [max(high - median, 0)]], r["validity"][0] == "ok"
                face = colour if fill else "white"
                axis.errorbar(
                    r["case"]["m"], median, yerr=error, fmt="o", markersize=4, capsize=2, color=colour, mfc=face
                )
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=f"{k}->{n}", xlabel="M", xscale="log", yscale="log")
        axis.set_xticks(ticks := sorted({r["case"]["m"] for r in own}), map(str, ticks))
    axes[0][0].set(ylabel="time over the dense bf16 layer's")
    axes[0][0].legend(fontsize=7)
    return _save(figure, folder / "linear4bit.png")


def page(rows: list[Row], images: list[Path], path: Path) -> Path:
    """One HTML file with everything inline: no network, no script."""
    parts = ["<h1>fastpeft bench</h1>"]
    for machine, group in tables.by_machine(rows).items():
        parts.append(f"<p>{html.escape(machine)}; commit {html.escape(tables.commit_of(group))}</p>")
        parts += [table.html() for table in tables.all_tables(group)]
        parts.append(rates(group).html())
    for image in images:
        data = base64.b64encode(image.read_bytes()).decode()
        parts.append(f'<img alt="{html.escape(image.stem)}" src="data:image/png;base64,{data}">')
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    head += f"<title>fastpeft bench</title><style>{_STYLE}</style>"
    path.write_text(
        f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>', encoding="utf-8"
    )
    return path


def rates(rows: list[Row]) -> tables.Table:
    """Absolute times, which hold for this machine only."""
    table = tables.Table("Times on this machine (medians)", ["what", "function", "ms", "share of the roofline"])
    for row in rows:
        if "samples" not in row or not row["samples"]["kept"]:
            continue
        samples = Samples.from_json(row["samples"])
        for name in samples.seconds:
            share = f"{row['floor']['seconds'] / samples.median(name):.0%}" if "floor" in row else "-"
            table.lines.append([row["key"], name, f"{samples.median(name) * 1e3:.4g}", share])
    return table
