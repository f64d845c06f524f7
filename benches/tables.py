"""Tables from result lines: for the terminal, the HTML page and the README.

    python -m benches.tables [RESULTS.jsonl ...] [--readme README.md]

puts the tables between `<!-- bench:begin -->` and `<!-- bench:end -->`; without files it reads benches/results/*.jsonl.
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
    """All lines of the files; a later line of the same key and machine replaces an earlier one."""
    found: dict[tuple[str, str], Row] = {}
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}:{number}: not a JSON line: {error}") from error
                found[machine_of(row), row["key"]] = row
    return list(found.values())


def machine_of(row: Row) -> str:
    machine, versions = row["machine"], row["versions"]
    gpu = f", {machine['gpu']}" if "gpu" in machine else ""
    amx = "with AMX" if machine["amx"] else "without AMX"
    return (
        f"{machine['cpu']} ({machine['family']}) {amx}, {machine['cores']} cores, {machine['threads']} threads{gpu}; "
        f"torch {versions['torch']}, peft {versions['peft']}"
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
    for row in _of(rows, "step"):
        overheads = [_short(row["overhead"].get(n)) for n in ("PEFT", "PEFT same dtype", "composition", _OURS)]
        rounds = f"{row['samples']['kept']}/{row['samples']['rounds']}"
        table.lines.append([row["key"], *overheads, _number(row["floor_overhead"]), rounds, row["validity"][0]])
    return table


def training(rows: list[Row]) -> Table:
    table = Table("Fine-tuning side by side", ["what", "PEFT", "PEFT same dtype", _OURS, "full fine-tuning"])
    for row in _of(rows, "training"):
        ways = ("PEFT", "PEFT same dtype", _OURS)
        losses = row["losses"]
        run = f"{row['model']} on {row['text']}, {row['steps']} steps"
        table.note = f"{run}, {row['key'].removeprefix('training ')}, {row['device']} {row['dtype']}. {row['report']}"
        table.lines.append(["first loss", *(f"{losses[w][0]:.4f}" for w in ways), "-"])
        last = max(1, len(losses["PEFT"]) // 5)
        means = (f"{sum(losses[w][-last:]) / last:.4f}" for w in ways)
        table.lines.append([f"mean of the last {last} losses", *means, "-"])
        gaps = row["gaps"]
        table.lines.append(
            ["largest |Δloss| to PEFT", "0", f"{gaps['PEFT same dtype']:.5f}", f"{gaps[_OURS]:.5f}", "-"]
        )
        times = [_short(row["throughput"][w]) for w in ("PEFT", "PEFT same dtype")]
        full = _of(rows, "full")
        over = _short(full[0]["time"]) if full else "-"
        table.lines.append(["time a step over fastpeft's", *times, "1", over])
        stored = [f"{row['stored_bytes'][w] / 1e6:.1f} MB" for w in ways]
        whole = f"{full[0]['stored_bytes']['full fine-tuning'] / 1e6:.1f} MB" if full else "-"
        table.lines.append(["bytes to store per task", *stored, whole])
    for row in _of(rows, "memory"):
        net = {way: data["net_bytes"] for way, data in row["memory"].items()}
        ours = net.get(_OURS)
        ways = ("PEFT", "PEFT same dtype", _OURS, "full fine-tuning")
        shares = [f"{net[w] / ours:.2f}" if ours and net.get(w) else "-" for w in ways]
        table.lines.append([f"{row['key']}, over fastpeft's", *shares])
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
    made: list[Callable[[list[Row]], Table]] = [training, targets, steps, kernels, others]
    return [table for table in (make(rows) for make in made) if table.lines]


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


def put_between(text: str, tables: str) -> str:
    """`text` with what stands between the markers replaced. ValueError where a marker is missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the file has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{tables.rstrip()}\n{END}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.tables", description="Tables from result files.")
    parser.add_argument("files", nargs="*", type=Path, help="results (.jsonl); default: benches/results/*.jsonl")
    parser.add_argument("--readme", type=Path, help=f"replace what stands between {BEGIN} and {END} there")
    options = parser.parse_args(argv)
    files = options.files or sorted((Path(__file__).parent / "results").glob("*.jsonl"))
    try:
        tables = markdown(read(files))
        if not options.readme:
            print(tables)
            return 0
        options.readme.write_text(put_between(options.readme.read_text(), tables))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
