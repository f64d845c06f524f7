"""Pictures (one a question, one of all rows), and one HTML page that opens offline."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from . import tables
from .answers import Answer
from .case import OURS
from .results import Row, commit_of, grouped, machine_of, of_kind, samples_of
from .rounds import OK

COLOURS = {
    "PEFT": "#c0504d",
    "PEFT same dtype": "#e0a458",
    "composition": "#7f8c8d",
    OURS: "#1f77b4",
    "full fine-tuning": "#444444",
    "frozen": "#bbbbbb",
}
SURE, UNSURE = "#1f77b4", "#bbbbbb"
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:78rem;padding:0 1rem;color:#1b1f24}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}div{overflow-x:auto}
table{border-collapse:collapse;font-size:.85rem}th,td{padding:.3rem .6rem;border-bottom:1px solid #ddd;text-align:left}
th{background:#f4f5f7}img{max-width:100%;margin:1rem 0}p{color:#555}p.answer{color:inherit;font-size:1.05rem}
@media(prefers-color-scheme:dark){body{background:#16181b;color:#e4e6e8}th{background:#24272b}th,td{border-color:#3a3d41}
p{color:#a9adb2}img{background:#fff}}
"""


def save(figure: Any, path: Path, **about: str | None) -> Path:
    """about: metadata of the file; an SVG without a date is the same each time."""
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata=about or None)
    plt.close(figure)
    return path


def bars(axis: Any, answer: Answer) -> None:
    """One bar a way, with its interval."""
    names = list(answer.bars)
    for i, name in enumerate(names):
        bar = answer.bars[name]
        ends = [[max(bar.median - bar.low, 0)], [max(bar.high - bar.median, 0)]]
        axis.barh(i, bar.median, xerr=ends, capsize=3, height=0.66, color=COLOURS.get(name, UNSURE))
        axis.text(max(bar.high, bar.median), i, f"  {bar.median:.3g}", va="center", fontsize=9)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set(xlabel=answer.unit if answer.sure else f"{answer.unit} (noisy)")


def picture(answer: Answer, folder: Path) -> Path:
    """The picture of one question."""
    if answer.lines:
        figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 5), sharex=True, height_ratios=[2, 1])
        for way, values in answer.lines.items():
            steps = range(1, len(values) + 1)
            top.plot(steps, values, "--" if way == OURS else "-", label=way, color=COLOURS.get(way))
            gaps = [abs(a - b) for a, b in zip(values, answer.lines["PEFT"], strict=True)]
            bottom.plot(steps, gaps, color=COLOURS.get(way))
        bottom.set_yscale("symlog", linthresh=1e-4)
        bottom.set(xlabel="step", ylabel="|Δloss| to PEFT", ylim=(0, None))
        top.set(ylabel="loss")
        top.legend()
    else:
        figure, top = plt.subplots(figsize=(8, 0.5 * len(answer.bars) + 1.3))
        bars(top, answer)
    top.set_title(f"{answer.question}\n{answer.context}", fontsize=10)
    return save(figure, folder / f"{answer.file}.png")


def speeds(rows: list[Row], path: Path) -> Path | None:
    """Speed over the best peer and share of the roofline, a line a row of an op."""
    found = [row for row in of_kind(rows, "row") if (row["best_peer"] or row["reference"]) in row["time"]]
    if len(found) < 2:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 0.24 * len(found) + 1.6), sharey=True)
    for i, row in enumerate(found):
        samples = samples_of(row)
        gain = samples.ratio(row["best_peer"] or row["reference"], OURS)
        colour = SURE if row["validity"][0] == OK else UNSURE
        ends = [[max(gain.median - gain.low, 0)], [max(gain.high - gain.median, 0)]]
        left.errorbar(gain.median, i, xerr=ends, fmt="o", markersize=4, capsize=2, color=colour)
        right.barh(i, row["floor_share"] or 0.0, color=colour)
    left.set_yticks(range(len(found)), [row["key"].replace(" r=16", "") for row in found], fontsize=7)
    left.invert_yaxis()
    left.set_xscale("log")
    left.axvline(1, color="black", linewidth=0.8)
    left.set(xlabel="times as fast as the best peer (grey: noisy)")
    right.set(xlabel="share of the roofline")
    return save(figure, path)


def peaks(rows: list[Row], path: Path) -> Path | None:
    """Peak memory of a call over the best peer's, on a GPU."""
    found = [row for row in of_kind(rows, "row") if row["peak_bytes"].get(row["best_peer"])]
    if not found:
        return None
    figure, axis = plt.subplots(figsize=(9, 0.25 * len(found) + 1.6))
    for i, row in enumerate(found):
        axis.barh(i, row["peak_bytes"][OURS] / row["peak_bytes"][row["best_peer"]], color=SURE)
    axis.set_yticks(range(len(found)), [row["key"] for row in found], fontsize=7)
    axis.invert_yaxis()
    axis.set(xlabel="peak memory of a call over the best peer's")
    return save(figure, path)


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'


def page(rows: list[Row], answers: list[Answer], folder: Path, targets: bool = False) -> Path:
    """report.html with everything inline (no network, no script): questions first, then what was compared."""
    parts = ["<h1>fastpeft bench</h1>"]
    for answer in answers:
        parts.append(f'<h2>{html.escape(answer.question)}</h2><p class="answer">{html.escape(answer.sentence)}</p>')
        parts.append(_image(picture(answer, folder)))
    for machine, group in grouped(rows, machine_of).items():
        parts.append(f"<p>{html.escape(machine)}; commit {html.escape(commit_of(group))}</p>")
        parts += [table.html() for table in tables.all_tables(group, targets)]
    overview = speeds(rows, folder / "speed.png")
    parts += [_image(overview)] if overview else []
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    head += f"<title>fastpeft bench</title><style>{_STYLE}</style>"
    text = f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>'
    path = folder / "report.html"
    path.write_text(text, encoding="utf-8")
    return path
