"""Tables from result lines: for the terminal, the HTML page and the README.

    python -m benches.tables [RESULTS.jsonl ...] [--readme README.md]

puts the tables between `<!-- bench:begin -->` and `<!-- bench:end -->`, those of the suite qlora between
`<!-- bench-qlora:begin -->` and `<!-- bench-qlora:end -->`; without files it reads benches/results/*.jsonl.
Numbers are ratios, `median [low, high]` with the 95 % interval; overhead is time over the frozen layer alone, less 1.
"""

from __future__ import annotations

import argparse
import html
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ._measure import Estimate

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
MARKERS = {"lora": (BEGIN, END), "qlora": ("<!-- bench-qlora:begin -->", "<!-- bench-qlora:end -->")}
_PEERS = ("PEFT", "PEFT same dtype", "PEFT compiled", "composition")
_OURS = "fastpeft"

Row = dict[str, Any]


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
            return "<tr>" + "".join(f'<{tag} class="{_class(c)}">{html.escape(c)}</{tag}>' for c in line) + "</tr>"

        body = "".join(cells(line, "td") for line in self.lines)
        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        head = cells(self.header, "th")
        table = f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"
        return f"<h2>{html.escape(self.title)}</h2><div>{table}</div>{note}"


def _class(cell: str) -> str:
    return {"met": "good", "not met": "bad", "wrong result": "bad", "void": "dull", "too noisy": "dull"}.get(cell, "")


def read(paths: Iterable[Path]) -> list[Row]:
    """All lines of the files; a later line of the same suite, key and machine replaces an earlier one."""
    found: dict[tuple[str, str, str], Row] = {}
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}:{number}: not a JSON line: {error}") from error
                found[machine_of(row), suite_of(row), row["key"]] = row
    return list(found.values())


def suite_of(row: Row) -> str:
    return row.get("suite", "lora")  # lines from before there was another


def machine_of(row: Row) -> str:
    machine, versions = row["machine"], row["versions"]
    gpu = f", {machine['gpu']}" if "gpu" in machine else ""
    amx = "with AMX" if machine["amx"] else "without AMX"
    return (
        f"{machine['cpu']} ({machine['family']}) {amx}, {machine['cores']} cores, {machine['threads']} threads{gpu}; "
        f"torch {versions['torch']}, peft {versions['peft']}"
        + (f", bitsandbytes {versions['bitsandbytes']}" if suite_of(row) == "qlora" else "")
    )


def estimate(values: list[float | None] | None) -> str:
    return "-" if values is None else str(Estimate.from_json(values))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _short(values: list[float | None] | None) -> str:
    """median ± half the interval, for wide tables."""
    if values is None or values[0] is None:
        return "-"
    median, low, high = values
    half = math.nan if low is None or high is None else (high - low) / 2
    return f"{median:.3f} ±{half:.3f}"


def _of(rows: list[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def targets(rows: list[Row]) -> Table:
    """Every target: its limit, what was measured, 1.3x the floor in the same unit, the verdict."""
    table = Table(
        "Targets",
        ["target", "at most", "measured", "1.3x floor", "verdict", "why"],
        note="A target is met when the far end of its interval is within the limit, or within 1.3x the byte/FLOP floor "
        "where that is higher. Void: the A/A row is off, or wider than a fifth of what is claimed. Too noisy: under 30 "
        "rounds.",
    )
    if not all(row["samples"]["delay_known"] for row in rows if "samples" in row):
        table.note += " This system does not tell how long threads waited for a CPU, so no round could be dropped."
    implied = []  # the rule that holds for every row of the kernel table: one line for all
    for row in rows:
        for item in row.get("targets", []):
            if "the best peer" in item["text"] and ": time" in item["text"]:
                implied.append(item)
                continue
            floor = item["floor_limit"]
            line = [item["text"], f"{item['limit']:.3g}", estimate(item["measured"])]
            table.lines.append([*line, _number(floor), item["verdict"], item["note"]])
    if implied:
        counts = {v: sum(i["verdict"] == v for i in implied) for v in sorted({i["verdict"] for i in implied})}
        worst = max(implied, key=lambda i: i["measured"][0] or 0.0)
        failed = [i["text"].split(": ")[0] for i in implied if i["verdict"] == "not met"]
        table.lines.append(
            [
                f"time over the best of the three peers', worst of {len(implied)} rows",
                "1.03",
                estimate(worst["measured"]),
                _number(worst["floor_limit"]),
                "not met" if failed else "met" if set(counts) == {"met"} else max(counts, key=lambda v: counts[v]),
                ", ".join(f"{n} {v}" for v, n in counts.items()) + (": " + "; ".join(failed) if failed else ""),
            ]
        )
    return table


def kernels(rows: list[Row]) -> Table:
    table = Table(
        "lora_linear: overhead over the frozen layer alone",
        ["K->N, M, dtype", *_PEERS, _OURS, "floor", "time over best peer", "rounds", "state"],
        note="Overhead: median ± half the 95 % interval. Floor: the adapter's own bytes and FLOPs at this "
        "machine's best rates.",
    )
    for row in _of(rows, "lora_linear"):
        times = row["time"]
        best = row.get("best_peer")
        name = row["key"].replace(" r=16", "")
        overheads = [_short(row["overhead"].get(n)) for n in (*_PEERS, _OURS)]
        state = "wrong: " + ", ".join(row["wrong"]) if row["wrong"] else row["validity"][0]
        samples = row["samples"]
        rounds = f"{samples['kept']}/{samples['rounds']}"
        against = f"{_short(times.get(best))} ({best})" if best in times else "-"
        table.lines.append([name, *overheads, _number(row["floor_overhead"]), against, rounds, state])
    return table


def steps(rows: list[Row]) -> Table:
    table = Table(
        "Training step without optimizer: overhead over the frozen model",
        ["step", "PEFT", "PEFT same dtype", "composition", _OURS, "floor", "rounds", "state"],
    )
    if any(suite_of(row) == "qlora" for row in _of(rows, "step")):
        table.note = "The frozen model is the dense one; PEFT runs over bitsandbytes."
    for row in _of(rows, "step"):
        overheads = [_short(row["overhead"].get(n)) for n in ("PEFT", "PEFT same dtype", "composition", _OURS)]
        rounds = f"{row['samples']['kept']}/{row['samples']['rounds']}"
        table.lines.append([row["key"], *overheads, _number(row["floor_overhead"]), rounds, row["validity"][0]])
    return table


def training(rows: list[Row]) -> Table:
    full = _of(rows, "full")
    columns = ["PEFT", "PEFT same dtype", _OURS, *(["full fine-tuning"] if full else [])]
    table = Table("Fine-tuning side by side", ["what", *columns])

    def add(*cells: str) -> None:
        table.lines.append([*cells, "-"][: len(table.header)])

    for row in _of(rows, "training"):
        ways = ("PEFT", "PEFT same dtype", _OURS)
        losses = row["losses"]
        run = f"{row['model']} on {row['text']}, {row['steps']} steps"
        table.note = f"{run}, {row['key'].removeprefix('training ')}, {row['device']} {row['dtype']}. {row['report']}"
        add("first loss", *(f"{losses[w][0]:.4f}" for w in ways))
        last = max(1, len(losses["PEFT"]) // 5)
        means = (f"{sum(losses[w][-last:]) / last:.4f}" for w in ways)
        add(f"mean of the last {last} losses", *means)
        gaps = row["gaps"]
        add("largest |Δloss| to PEFT", "0", f"{gaps['PEFT same dtype']:.5f}", f"{gaps[_OURS]:.5f}")
        times = [_short(row["throughput"][w]) for w in ("PEFT", "PEFT same dtype")]
        add("time a step over fastpeft's", *times, "1", *(_short(f["time"]) for f in full[:1]))
        stored = [f"{row['stored_bytes'][w] / 1e6:.1f} MB" for w in ways]
        whole = [f"{f['stored_bytes']['full fine-tuning'] / 1e6:.1f} MB" for f in full[:1]]
        add("bytes to store per task", *stored, *whole)
    for row in _of(rows, "memory"):
        whole_too = suite_of(row) == "qlora"
        peaks = [("net_bytes", row["key"])] + [("peak_bytes", "peak memory of the whole process")] * whole_too
        for name, text in peaks:
            found = {way: data.get(name) for way, data in row["memory"].items()}
            ours = found.get(_OURS)
            shares = [f"{found[w] / ours:.2f}" if ours and found.get(w) else "-" for w in columns]
            add(f"{text}, over fastpeft's", *shares)
    return table


def sizes(rows: list[Row]) -> Table:
    table = Table("Bytes of the weights", ["weights", "bf16", "NF4", "NF4 + double quantisation", "how"])
    for row in _of(rows, "sizes"):
        for name, (dense, quantised) in row["stored"].items():
            shares = [f"{dense / 1e6:.1f} MB", "-", f"{quantised / 1e6:.1f} MB"]
            table.lines.append([name, *shares, "as stored"])
        for name, computed in row["computed"].items():
            table.lines.append([name, *(f"{size / 1e9:.1f} GB" for size in computed), "computed"])
    return table


def linear4bit(rows: list[Row]) -> Table:
    peers = {
        "frozen": "dense bf16",
        "bitsandbytes eval": "bitsandbytes eval",
        "bitsandbytes dequantise + GEMM": "its dequantise + GEMM",
        "bitsandbytes training": "its training path",
        "torch int4": "torch int4",
    }
    table = Table(
        "linear4bit: fastpeft's time over its peers'",
        ["K->N, M", *peers.values(), "double quantisation over single", "share of the floor", "rounds", "state"],
        note="Median ± half the 95 % interval. Floor: codes, scales, x and y read once at this machine's read bandwidth, or "
        "the FLOPs at its best matmul rate. torch int4 is another format, with one scale and zero for 64 weights.",
    )
    for row in _of(rows, "linear4bit"):
        times = [_short(row["time"].get(name)) for name in peers]
        over = row["time"].get("fastpeft, double quantisation")
        double = "-" if over is None or over[0] is None else f"{1 / over[0]:.3f}"
        state = "wrong: " + ", ".join(row["wrong"]) if row["wrong"] else row["validity"][0]
        rounds = f"{row['samples']['kept']}/{row['samples']['rounds']}"
        share = row["floor_share"]
        share = "-" if share is None else f"{share:.0%}"
        name = row["key"].removesuffix(" bf16 fwd")
        table.lines.append([name, *times, double, share, rounds, state])
    return table


def qlora_layers(rows: list[Row]) -> Table:
    names = ("PEFT + bitsandbytes", _OURS, "fastpeft.apply")
    table = Table(
        "The QLoRA layer, forward and backward: time over the frozen dense layer's",
        ["K->N, M", *names, "fastpeft over PEFT + bitsandbytes", "rounds", "state"],
        note="fastpeft: `fp.ops.lora_linear` over a `Weight4bit`; fastpeft.apply: PEFT's own layer after `fp.apply`.",
    )
    for row in _of(rows, "qlora layer"):
        times = [_short(row["over_dense"].get(name)) for name in names]
        state = "wrong: " + ", ".join(row["wrong"]) if row["wrong"] else row["validity"][0]
        rounds = f"{row['samples']['kept']}/{row['samples']['rounds']}"
        over = _short(row["time"].get("PEFT + bitsandbytes"))
        name = row["key"].removeprefix("qlora ").replace(" r=16", "")
        table.lines.append([name, *times, over, rounds, state])
    return table


def others(rows: list[Row]) -> Table:
    """Saved bytes, groups, dropout and host cost."""
    table = Table("Groups, dropout, memory for backward, host cost", ["what", "measured", "rounds", "state"])
    for row in rows:
        samples = row.get("samples", {})
        rounds = f"{samples['kept']}/{samples['rounds']}" if samples else "-"
        if row["kind"] == "dropout":
            text = f"time at 0.1 over time at 0: {estimate(row['ratio'])}"
        elif row["kind"] == "group":
            text = "overhead " + ", ".join(f"{n} {_short(v)}" for n, v in row["overhead"].items())
        elif row["kind"] == "host cost":
            text = "fastpeft's time over " + ", ".join(f"{n} {_short(v)}" for n, v in row["time"].items())
        elif row["kind"] == "saved bytes":
            for name, sizes in row["bytes"].items():
                shown = ", ".join(f"{n} {size / sizes['x']:.3f} bytes(x)" for n, size in sizes.items() if n != "x")
                table.lines.append([name, shown, "-", "ok"])
            continue
        else:
            continue
        table.lines.append([row["key"], text, rounds, row["validity"][0]])
    return table


def all_tables(rows: list[Row]) -> list[Table]:
    """Each suite's, the suites apart."""
    parts: tuple[Callable[[list[Row]], Table], ...]
    parts = (training, sizes, targets, steps, kernels, linear4bit, qlora_layers, others)
    suites = [[row for row in rows if suite_of(row) == suite] for suite in MARKERS]
    return [table for own in suites for table in (make(own) for make in parts) if table.lines]


def by_machine(rows: list[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(machine_of(row), []).append(row)
    return groups


def commit_of(rows: list[Row]) -> str:
    commits = sorted({f"{(r['commit'] or 'no clone')[:12]}{' with changes' if r['dirty'] else ''}" for r in rows})
    return ", ".join(commits)


def markdown(rows: list[Row]) -> str:
    """Every machine's tables; machines are never mixed in one table."""
    parts = []
    for machine, group in by_machine(rows).items():
        parts.append(f"Measured on {machine}; commit {commit_of(group)}.\n")
        parts += [table.markdown() for table in all_tables(group)]
    return "\n".join(parts)


def put_between(text: str, tables: str, markers: tuple[str, str] = (BEGIN, END)) -> str:
    """`text` with what stands between the markers replaced. ValueError where a marker is missing."""
    first, last = markers
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"the file has no {first} ... {last}")
    return f"{before}{first}\n{tables.rstrip()}\n{last}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.tables", description="Tables from result files.")
    parser.add_argument("files", nargs="*", type=Path, help="results (.jsonl); default: benches/results/*.jsonl")
    parser.add_argument("--readme", type=Path, help=f"replace what stands between {BEGIN} and {END} there, and so on")
    options = parser.parse_args(argv)
    files = options.files or sorted((Path(__file__).parent / "results").glob("*.jsonl"))
    try:
        rows = read(files)
        if not options.readme:
            print(markdown(rows))
            return 0
        text = options.readme.read_text()
        for suite, markers in MARKERS.items():
            own = [row for row in rows if suite_of(row) == suite]
            if own:  # without results of a suite its block stays as it is
                text = put_between(text, markdown(own), markers)
        options.readme.write_text(text)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
