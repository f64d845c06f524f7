"""Tables of what was compared, for the terminal, the HTML page and docs/benchmarks.md.

Numbers are ratios, `median [low, high]` with the 95 % interval, or `median ±half of it` where a table is wide.
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass, field

from .case import OURS
from .results import Row, of_kind, samples_of
from .rounds import OK, Estimate
from .verdict import Target, worst

PEERS = ("PEFT", "PEFT same dtype", "PEFT compiled", "composition")
NOISE = (
    "Each figure: median ± half the 95 % interval. Rounds: those that no other process disturbed, where there are 30 of them, "
    "else all. Noisy: running the same thing twice did not give 1 within 0.98-1.02."
)


@dataclass
class Table:
    title: str
    header: list[str]
    lines: list[list[str]] = field(default_factory=list)
    note: str = ""

    def text(self) -> str:
        widths = [max(len(line[i]) for line in (self.header, *self.lines)) for i in range(len(self.header))]
        padded = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in (self.header, *self.lines))
        rows = ["  ".join(line).rstrip() for line in padded]
        rows.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join([self.title, *rows, *([self.note] if self.note else [])])

    def markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.lines]
        body = "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines)
        return f"**{self.title}**\n\n{body}\n" + (f"\n{self.note}\n" if self.note else "")

    def html(self) -> str:
        def cells(line: list[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in line) + "</tr>"

        body = "".join(cells(line, "td") for line in self.lines)
        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        table = f"<table><thead>{cells(self.header, 'th')}</thead><tbody>{body}</tbody></table>"
        return f"<h2>{html.escape(self.title)}</h2><div>{table}</div>{note}"


def short(values: list[float | None] | None) -> str:
    """median ± half the interval"""
    if values is None or values[0] is None:
        return "-"
    median, low, high = values
    half = math.nan if low is None or high is None else (high - low) / 2
    return f"{median:.3f} ±{half:.3f}"


def _last(row: Row) -> list[str]:
    samples = samples_of(row)
    state = "wrong: " + ", ".join(row["wrong"]) if row.get("wrong") else row["validity"][0]
    return [samples.about() if samples else "-", "" if state == OK else state]


def _name(row: Row) -> str:
    return row["key"].replace(", all linear, r=16", "").replace(" r=16", "")


def _number(value: float | None, percent: bool = False) -> str:
    return "-" if value is None else f"{value:.0%}" if percent else f"{value:.3f}"


def compared(title: str, rows: list[Row]) -> Table:
    """Rows of one op: fastpeft's time over each function's; then over the reference's, and its share of the floor."""
    names: list[str] = list(dict.fromkeys(name for row in rows for name in row["time"]))
    names.sort(key=lambda name: PEERS.index(name) if name in PEERS else len(PEERS))
    table = Table(f"{title}: fastpeft's time over that of", ["what", *names, "floor", "rounds", "noise"])
    if any(row["floor_share"] for row in rows):
        table.note = "Floor: the least time by bytes and FLOPs at this machine's best rates, over fastpeft's."
    for row in rows:
        times = [short(row["time"].get(n)) for n in names]
        table.lines.append([_name(row), *times, _number(row["floor_share"], percent=True), *_last(row)])
    return table


def overheads(title: str, rows: list[Row]) -> Table:
    """Time over the frozen layer or model, less 1."""
    names = [n for n in (*PEERS, OURS) if any(n in row["over"] for row in rows)]
    table = Table(f"{title}: overhead over the frozen one", ["what", *names, "floor", "rounds", "noise"])
    for row in rows:
        less = [short([x if x is None else x - 1 for x in row["over"].get(n, [None])]) for n in names]
        table.lines.append([_name(row), *less, _number(row["floor_overhead"]), *_last(row)])
    return table


def training(rows: list[Row]) -> Table:
    full = of_kind(rows, "full")
    ways = next((tuple(row["losses"]) for row in of_kind(rows, "training")), ("PEFT", "PEFT same dtype", OURS))
    table = Table("Fine-tuning side by side", ["what", *ways, *(["full fine-tuning"] if full else [])])

    def add(*cells: str) -> None:
        table.lines.append([*cells, *["-"] * (len(table.header) - len(cells))])

    for row in of_kind(rows, "training"):
        losses, gaps, samples = row["losses"], row["gaps"], samples_of(row)
        run = f"{row['model']} on {row['text']}, {row['steps']} steps"
        table.note = f"{run}, {row['key'].removeprefix('training ')}, {row['device']} {row['dtype']}. {row['report']}"
        add("first loss", *(f"{losses[w][0]:.4f}" for w in ways))
        last = max(1, len(losses["PEFT"]) // 5)
        add(f"mean of the last {last} losses", *(f"{sum(losses[w][-last:]) / last:.4f}" for w in ways))
        add("largest |Δloss| to PEFT", "0", *(f"{gaps[w]:.5f}" if w in gaps else "-" for w in ways[1:]))
        if samples is not None and samples.kept:
            times = ["1" if w == OURS else short(samples.ratio(w, OURS).as_json()) for w in ways]
            add("time a step, optimizer too, over fastpeft's", *times, *(short(f["time"]) for f in full[:1]))
        stored = [f"{row['stored_bytes'][w] / 1e6:.1f} MB" for w in ways]
        add(
            "bytes to store per task",
            *stored,
            *(f"{f['stored_bytes']['full fine-tuning'] / 1e6:.1f} MB" for f in full[:1]),
        )
    for row in of_kind(rows, "memory"):
        for name, text in (("net_bytes", row["key"]), ("peak_bytes", "peak memory of the whole process")):
            found = {way: data.get(name) for way, data in row["memory"].items()}
            ours = found.get(OURS)
            shares = [f"{found[w] / ours:.2f}" if ours and found.get(w) else "-" for w in table.header[1:]]
            add(f"{text}, over fastpeft's", *shares)
    return table


def accuracy(rows: list[Row]) -> list[Table]:
    """Of classifiers: a table each, a column a way."""
    found = []
    for row in of_kind(rows, "accuracy"):
        table = Table(f"{row['key']}, {row['steps']} steps", ["what", *row["accuracy"]])
        samples, ours = samples_of(row), row["saved_bytes"][OURS]
        table.lines += [
            [f"accuracy on {row['held_out']} held-out reviews", *(f"{a:.1%}" for a in row["accuracy"].values())],
            ["on as many of those trained on", *(f"{a:.1%}" for a in row["train_accuracy"].values())],
            [
                "bytes kept for backward, over fastpeft's",
                *(f"{kept / ours:.2f}" for kept in row["saved_bytes"].values()),
            ],
            ["bytes to store per task", *(f"{size / 1e6:.2f} MB" for size in row["stored_bytes"].values())],
        ]
        if samples is not None and samples.kept:
            times = ("1" if way == OURS else short(samples.ratio(way, OURS).as_json()) for way in row["accuracy"])
            table.lines.append(["time a step, optimizer too, over fastpeft's", *times])
        found.append(table)
    return found


def sizes(rows: list[Row]) -> Table:
    table = Table("Bytes of the weights", ["weights", "bf16", "NF4", "NF4 + double quantisation", "how"])
    for row in of_kind(rows, "sizes"):
        for name, (dense, quantised) in row["stored"].items():
            table.lines.append([name, f"{dense / 1e6:.1f} MB", "-", f"{quantised / 1e6:.1f} MB", "as stored"])
        for name, computed in row["computed"].items():
            table.lines.append([name, *(f"{size / 1e9:.1f} GB" for size in computed), "computed"])
    return table


def counts(rows: list[Row]) -> Table:
    """Bytes kept for backward; host time outside passes."""
    table = Table("Bytes kept for backward, host time", ["what", "PEFT", OURS, "noise"])
    for row in of_kind(rows, "saved bytes"):
        for name, found in row["bytes"].items():
            table.lines.append([name, *(f"{found[n] / found['x']:.3f} bytes(x)" for n in ("PEFT", OURS)), ""])
    for row in of_kind(rows, "outside"):
        state = row["validity"][0]
        own = str(Estimate.from_json(row["milliseconds"]))
        table.lines.append([row["key"], "-", own, "" if state == OK else state])
    return table


def target_lines(rows: list[Row]) -> list[Target]:
    return worst(Target.from_json(item) for row in rows for item in row.get("targets", []))


def verdicts(rows: list[Row]) -> Table:
    """Every target: its limit, what was measured, 1.3x the floor in the same unit, the verdict."""
    table = Table("Targets", ["target", "at most", "measured", "1.3x floor", "verdict", "why"])
    table.note = (
        "Met, or not met: the whole interval lies on that side of the limit, or of 1.3x the byte/FLOP floor where that is "
        "higher, and the A/A row's interval within 0.98-1.02; else not shown. Of several rows: the worst."
    )
    for one in target_lines(rows):
        line = [one.text, f"{one.limit:.3g}", str(one.measured), _number(one.floor_limit)]
        table.lines.append([*line, one.verdict, one.note])
    return table


def all_tables(rows: list[Row], targets: bool = False) -> list[Table]:
    """Each suite's, the suites apart. targets: with those and their verdicts."""
    found = []
    for suite in dict.fromkeys(row["suite"] for row in rows):
        own = [row for row in rows if row["suite"] == suite]
        found += [training(own), *accuracy(own), sizes(own)]
        models = [row for row in own if row["kind"] in ("step", "decode")]
        found.append(compared("SmolLM2-135M or your model", models))
        found.append(overheads("A step and a token", models))
        ops = [row for row in own if row["kind"] == "row"]
        for title in dict.fromkeys(row["table"] for row in ops):
            of = [row for row in ops if row["table"] == title]
            found.append(compared(title, of))
            if any(row["floor_overhead"] for row in of):
                found.append(overheads(title, of))
        found.append(counts(own))
        found += [verdicts(own)] if targets else []
    found = [table for table in found if table.lines]
    for table in [table for table in found if "rounds" in table.header][:1]:
        table.note = f"{NOISE} {table.note}".rstrip()
    return found
