"""`fastpeft bench`: the main job and the kernel table of a suite, measured against its peers, with a report at the end."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SUITES = ("lora", "qlora")
PARTS = ("training", "step", "memory", "kernels", "others")
PEER_NAMES = {
    "peft": "PEFT",
    "peft-same-dtype": "PEFT same dtype",
    "peft-compiled": "PEFT compiled",
    "composition": "composition",
}
NEEDED = ("numpy", "peft", "bitsandbytes", "transformers", "gguf", "matplotlib", "tqdm")  # of the extra [bench]
BUDGET, QUICK_BUDGET = 420.0, 90.0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="fastpeft bench",
        description="Fine-tunes SmolLM2-135M with LoRA on movie reviews under Hugging Face PEFT and under fastpeft, "
        "side by side, then measures lora_linear against its peers. With --suite qlora the same over 4-bit weights, beside "
        "PEFT over bitsandbytes, then linear4bit. Writes results.jsonl, plots and report.html.",
    )
    add = made.add_argument
    add("--suite", choices=SUITES, default="lora", help="what to measure (default: %(default)s)")
    add("--parts", type=_parts, default=PARTS, metavar="A,B", help=f"some of {','.join(PARTS)} (default: all)")
    add(
        "--shapes",
        type=_shapes,
        metavar="KxN@M,..",
        help="kernel table for these shapes instead, such as 576x1536@512,4096x4096@1",
    )
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="compute dtype (default: bf16, fp32 for its own target)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda where there is one")
    add(
        "--peer",
        action="append",
        choices=[*PEER_NAMES],
        help="kernel table against this peer; repeat it (default: all)",
    )
    add("--time-budget", type=_seconds, metavar="SECONDS", help=f"aim to be done by then (default: {BUDGET:.0f})")
    add("--out", type=Path, help="folder for results and report (default: bench-results; bench-results/qlora)")
    add("--model", help="a model folder or hub name instead of SmolLM2-135M")
    add("--text", help="a text file to train on instead of movie reviews (documents parted by empty lines)")
    add("--json", action="store_true", help="print result lines as JSON, and nothing else, to stdout")
    add("--quick", action="store_true", help="about a minute: shows that all works, proves nothing")
    add("--targets", action="store_true", help="every target and the sweep with enough rounds for a verdict (an hour)")
    add("--resume", action="store_true", help="keep what --out already has of this commit and machine")
    return made


def _parts(text: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(","))
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown part {unknown[0]!r}, choose from {', '.join(PARTS)}")
    return parts


def _shapes(text: str) -> list[tuple[int, int, int]]:
    found = []
    for one in text.split(","):
        match = re.fullmatch(r"\s*(\d+)x(\d+)@(\d+)\s*", one)
        if match is None or min(map(int, match.groups())) < 1:
            raise argparse.ArgumentTypeError(f"{one!r} is not KxN@M, such as 576x1536@512")
        found.append((int(match[1]), int(match[2]), int(match[3])))
    return found


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 1 <= seconds < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 1 on")
    return seconds


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def missing() -> list[str]:
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


@dataclass(frozen=True)
class Task:
    """One line of the results: `run(seconds)` measures it."""

    part: str
    name: str
    seconds: float  # its share of the budget; with --targets what it may take
    run: Callable[[float], dict[str, Any]]
    least: Callable[[], float] = lambda: 0.0  # seconds below which it cannot be done: left out if fewer are left


class Bench:
    """One run of the suite: what to measure, how long, where results go."""

    def __init__(self, options: argparse.Namespace):
        import torch

        self.options = options
        self.start = time.perf_counter()
        self.device = options.device
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() and options.suite == "lora" else "cpu"
        self.dtype_name = options.dtype or "bf16"
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.dtype_name]
        self.peers = tuple(PEER_NAMES[p] for p in options.peer or PEER_NAMES)
        self.out: Path = options.out or Path("bench-results", *([] if options.suite == "lora" else [options.suite]))
        self.file = self.out / "results.jsonl"
        self.rows: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.bar: Any = None

    # ---------------------------------------------------------------------------------------------------- results

    def open(self) -> None:
        """Make the folder; keep earlier lines that still hold with --resume, else set them aside."""
        from . import _machine

        self.out.mkdir(parents=True, exist_ok=True)
        if not self.file.exists():
            return
        if self.options.resume:
            from .tables import machine_of, read

            now = {**_machine.describe(self.device), "suite": self.options.suite}
            same = [r for r in read([self.file]) if r["commit"] == now["commit"] and machine_of(r) == machine_of(now)]
            self.rows = [r for r in same if r["dirty"] == now["dirty"] and r["kind"] != "error"]
        os.replace(self.file, self.file.with_suffix(".previous.jsonl"))
        for row in self.rows:
            self._append(row)

    def _append(self, row: dict[str, Any]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def add(self, task: Task, row: dict[str, Any], took: float) -> None:
        from . import _machine

        when = datetime.now(UTC).isoformat(timespec="seconds")
        stamp = {"suite": self.options.suite, "time": when, "task": task.name, "took": round(took, 1)}
        row = {**_machine.describe(self.device), **stamp, "device": self.device, "dtype": self.dtype_name, **row}
        row = _without_nan(row)  # JSON has none
        self.rows.append(row)
        self._append(row)
        if self.options.json:
            print(json.dumps(row), flush=True)

    # --------------------------------------------------------------------------------------------------- progress

    def say(self, text: str) -> None:
        """A line on stderr, above the bar."""
        if self.bar is not None and not self.bar.disable:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def tick(self) -> None:
        if self.bar is not None:
            self.bar.n = min(round(time.perf_counter() - self.start), self.bar.total)
            self.bar.refresh()

    @contextlib.contextmanager
    def progress(self, total: float) -> Iterator[None]:
        from tqdm import tqdm

        style = "{desc:<44.44} {percentage:3.0f}%|{bar}| {elapsed} of about " + f"{total / 60:.0f} min"
        with tqdm(total=round(total), file=sys.stderr, disable=not sys.stderr.isatty(), bar_format=style) as self.bar:
            yield
        self.bar = None

    # ------------------------------------------------------------------------------------------------------ tasks

    def tasks(self) -> list[Task]:
        quick, long = self.options.quick, self.options.targets
        made: list[Task] = []
        main = {"training", "step", "memory", *(["others"] if self.options.suite == "qlora" else [])}
        if main & set(self.options.parts):
            made += self._main_job(quick, long)
        if "kernels" in self.options.parts:
            made += self._kernels(quick, long) if self.options.suite == "lora" else self._kernels_4bit(quick, long)
        if "others" in self.options.parts and self.options.suite == "lora":
            made += self._others(quick, long)
        return made

    def _main_job(self, quick: bool, long: bool) -> list[Task]:
        from . import _peers, _smollm2, main_job

        self.say("loading the model and the text (fetched once into the cache)")
        where, label = _smollm2.prepare(self.options.model)
        base = _smollm2.load(where, self.dtype, self.device)
        gpu = self.device == "cuda"
        steps = 4 if quick else 100 if long else 40
        batches, text = _smollm2.batches(where, self.options.text, steps, *((8, 512) if gpu else (2, 128)), self.device)
        (ids,), _ = _smollm2.batches(where, self.options.text, 1, 4, 256, self.device)
        common: dict[str, Any] = {"device": self.device, "tick": self.tick}
        dense, qlora = base, self.options.suite == "qlora"
        ways: tuple[str, ...] = ("frozen", _peers.PEFT, *((_peers.PEFT_LOW,) if long else ()))
        if qlora:
            from . import _bitsandbytes

            base = _bitsandbytes.in_4bit(dense)
            label += " in NF4 with double quantisation"
            ways = (*ways, _peers.OURS)
        else:
            ways = (*ways, *((_peers.COMPOSITION,) if long else ()), _peers.OURS, main_job.FULL)
        about = {"model": label, "text": text}

        took = [5.0]  # seconds of one way's training step, known once training has run

        def training(seconds: float) -> dict[str, Any]:
            start = time.perf_counter()
            row = main_job.train(base, batches, seconds, steps=steps, **common)
            took[0] = (time.perf_counter() - start) / row["steps"] / len(main_job.WAYS)
            return {**row, **about}

        def full(seconds: float) -> dict[str, Any]:
            return {**main_job.full(base, batches, seconds, **common), **about}

        def step(seconds: float) -> dict[str, Any]:
            over = {"dense": dense} if qlora else {}
            return {**main_job.step(base, ids, seconds, label=label, **over, **common), **about}

        def memory(_: float) -> dict[str, Any]:
            return {**main_job.memory(where, ids, dtype=self.dtype, ways=ways, in_4bit=qlora, **common), **about}

        def sizes(_: float) -> dict[str, Any]:
            return main_job.sizes(dense, base, _smollm2.NAME if self.options.model is None else Path(where).name)

        training_name = f"{'QLoRA' if qlora else 'LoRA'} fine-tuning side by side"
        found = [
            Task("training", training_name, 30 if quick else 600 if long else 90, training),
            Task("training", "full fine-tuning beside it", 150 if long else 18, full, lambda: 7 * took[0]),
            Task("memory", "peak memory", 240 if long else 60, memory, lambda: 30 + 12 * took[0]),
            Task("step", "training step over the frozen model", 2400 if long else 60, step, lambda: 48 * took[0]),
        ]
        if qlora:
            found = [Task("others", "bytes of the weights", 1, sizes), found[0], *found[2:]]
        return [t for t in found[: 1 + qlora if quick else None] if t.part in self.options.parts]

    def _kernels(self, quick: bool, long: bool) -> list[Task]:
        from . import bench_lora_linear as bench

        cases = bench.cases(full=long)
        if self.options.shapes:
            cases = [
                bench.Case(k, n, m, self.dtype_name, direction, compiled=True)
                for k, n, m in self.options.shapes
                for direction in (bench.FORWARD, bench.BOTH)
            ]
        elif self.options.dtype:
            cases = [c for c in cases if c.dtype == self.dtype_name] or [
                replace(c, dtype=self.dtype_name, limits=()) for c in bench.target_cases()
            ]
        if self.device == "cuda":
            cases = [c for c in cases if c.isa is None]
        if quick:
            cases = [replace(c, compiled=False) for c in cases]

        def task(case: bench.Case) -> Task:
            def run(seconds: float) -> dict[str, Any]:
                return bench.measure(case, seconds, device=self.device, peers=self.peers, tick=self.tick)

            generous = 75.0 if case.limits and not case.isa else 30.0 if case.isa else 15.0
            work = min(case.k * case.n * case.m / 2048**2 / 512, 1.0)  # 1: some 0.7 s a round on two cores
            return Task("kernels", case.name, generous if long else 6.0 if quick else 12.0 + 18.0 * work, run)

        return [task(case) for case in cases]

    def _kernels_4bit(self, quick: bool, long: bool) -> list[Task]:
        from . import bench_linear4bit as bench

        cases, layers = bench.cases(full=long), bench.qlora_cases()
        if self.options.shapes:
            cases, layers = [bench.Case(*shape) for shape in self.options.shapes], []
            cases += [replace(case, double=True) for case in cases]
        if quick:
            cases, layers = cases[:2], []

        def row(case: bench.Case) -> Task:
            work = min(case.k * case.n * case.m / 4096**2 / 512, 1.0)  # 1: a second a round on two cores
            seconds = 30 + 60 * work if long else 5 if quick else 10 + 10 * work
            return Task("kernels", case.name, seconds, lambda s: bench.measure(case, s, tick=self.tick))

        def layer(case: Any) -> Task:
            seconds = 40 * case.k / 2048 if long else 20
            name = f"qlora layer {case.name}"
            return Task("kernels", name, seconds, lambda s: bench.measure_qlora(case, s, tick=self.tick))

        found = [(c.k, c.n, row(c)) for c in cases] + [(c.k, c.n, layer(c)) for c in layers]
        return [task for *_, task in sorted(found, key=lambda one: one[:2])]  # one shape's weights at a time

    def _others(self, quick: bool, long: bool) -> list[Task]:
        from . import bench_lora_linear as bench

        common: dict[str, Any] = {"device": self.device, "tick": self.tick}

        def dropout(k: int, n: int, m: int) -> Task:
            def run(seconds: float) -> dict[str, Any]:
                return bench.measure_dropout(k, n, m, seconds, **common)

            return Task("others", f"dropout {k}->{n} M={m}", 45 if long else 3 if quick else 10, run)

        return [
            Task("others", "saved bytes", 1, lambda _: bench.measure_saved_bytes(device=self.device)),
            Task("others", "host cost", 15 if long else 4, lambda s: bench.measure_host_cost(s, **common)),
            Task(
                "others", "group q/k/v", 60 if long else 3 if quick else 12, lambda s: bench.measure_group(s, **common)
            ),
            dropout(2048, 2048, 512),
            dropout(576, 1536, 512),
        ]

    # -------------------------------------------------------------------------------------------------------- run

    def run(self) -> int:
        from . import _fetch

        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        try:
            self.open()
            tasks = self.tasks()
        except (_fetch.FetchError, OSError, ImportError) as error:  # ImportError: a mix of builds says what to do
            print(f"fastpeft bench: {error}", file=sys.stderr)
            return 2
        done = {row["task"] for row in self.rows}
        tasks = [task for task in tasks if task.name not in done]
        code = 0
        try:
            self._measure(tasks)
        except KeyboardInterrupt:
            self.say("interrupted; --resume goes on from here")
            code = 130
        if self.rows:
            self._report()
        for failure in self.failures:
            print(f"failed: {failure}", file=sys.stderr)
        return code or (1 if self.failures else 0)

    def _measure(self, tasks: list[Task]) -> None:
        options = self.options
        budget = options.time_budget or (None if options.targets else QUICK_BUDGET if options.quick else BUDGET)
        total = budget or sum(task.seconds * 1.3 + 3 for task in tasks)
        with self.progress(total):
            for i, task in enumerate(tasks):
                if self.bar is not None:
                    self.bar.set_description_str(task.name)
                seconds = task.seconds
                if budget is not None:
                    left = self.start + budget - time.perf_counter()
                    if left <= 0:
                        self.say(f"the time budget is spent: {len(tasks) - i} left out ({task.name}, ..)")
                        break
                    if left < task.least():
                        self.say(f"{task.name}: left out, it needs {task.least():.0f} s of the {left:.0f} s left")
                        continue
                    seconds = left * task.seconds / sum(t.seconds for t in tasks[i:])
                self._one(task, seconds)
                self.tick()

    def _one(self, task: Task, seconds: float) -> None:
        began = time.perf_counter()
        try:
            row = task.run(seconds)
        except Exception as error:
            self.failures.append(f"{task.name}: {type(error).__name__}: {error}")
            self.say(self.failures[-1])
            self.add(task, {"kind": "error", "key": f"error {task.name}", "error": str(error)}, 0.0)
            return
        took = time.perf_counter() - began
        if "fastpeft" in row.get("wrong", []):
            self.failures.append(f"{task.name}: fastpeft's result is wrong, errors {row['error']['fastpeft']}")
        self.add(task, row, took)
        state = row.get("validity", ["ok"])[0]
        verdicts = ", ".join(t["verdict"] for t in row.get("targets", []))
        self.say(f"[{time.perf_counter() - self.start:5.0f} s] {task.name}: {verdicts or state}")

    def _report(self) -> None:
        from . import _report, tables

        rows = [row for row in self.rows if row["kind"] != "error"]
        images = _report.plots(rows, self.out)
        page = _report.page(rows, images, self.out / "report.html")
        if not self.options.json:
            for table in tables.all_tables(rows):
                print(table.text() + "\n")
            speed = next((row for row in rows if row["kind"] == "training"), None)
            if speed and speed["samples"]["kept"]:
                rates = ", ".join(f"{way} {value:.0f}" for way, value in speed["tokens_per_second"].items())
                print(f"tokens a second on this machine: {rates}\n")
        self.say(f"{self.file}\n{page}")


def main(argv: list[str] | None = None) -> int:
    """Run `fastpeft bench`; returns the exit code (0 done, 1 something failed or was wrong, 2 it could not start)."""
    try:
        options = parser().parse_args(argv)
    except SystemExit as exit_:
        return int(exit_.code or 0)
    absent = missing()
    if absent:
        print(f"fastpeft bench needs {', '.join(absent)}: pip install 'fastpeft[bench]'", file=sys.stderr)
        return 2
    if options.suite == "qlora":
        for name, taken in (("dtype", (None, "bf16")), ("device", ("auto", "cpu")), ("peer", (None,))):
            if getattr(options, name) not in taken:
                print(f"fastpeft bench: --suite qlora measures bf16 on the CPU: leave out --{name}", file=sys.stderr)
                return 2
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("fastpeft bench: --device cuda, but torch finds no CUDA GPU here", file=sys.stderr)
            return 2
    return Bench(options).run()


if __name__ == "__main__":
    sys.exit(main())
