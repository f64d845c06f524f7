"""One run of a suite: tasks under a time budget, lines into a results file, a report at the end."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from . import machine
from .case import DTYPES, OURS
from .fetch import FetchError
from .results import Row, machine_of, read, without_nan

BUDGET, QUICK_BUDGET = 420.0, 90.0


@dataclass(frozen=True)
class Task:
    """Rows of the results: `run(seconds)` measures them."""

    part: str
    name: str
    seconds: float  # its share of the budget; with --targets what it may take
    run: Callable[[float], list[Row]]
    least: Callable[[], float] = lambda: 0.0  # seconds below which it cannot be done: left out if fewer are left


@dataclass
class Run:
    options: argparse.Namespace
    start: float = field(default_factory=time.perf_counter)
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    bar: Any = None

    def __post_init__(self) -> None:
        options = self.options
        self.quick, self.long, self.parts = options.quick, options.targets, options.parts
        self.device = options.device
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() and options.suite == "lora" else "cpu"
        # bf16 without instructions for it takes minutes
        slow = options.suite != "qlora" and self.device == "cpu" and not machine.has_bf16()
        self.dtype_name = options.dtype or ("fp32" if slow else "bf16")
        self.dtype = DTYPES[self.dtype_name]
        self.out: Path = options.out or Path("bench-results", *([] if options.suite == "lora" else [options.suite]))
        self.file = self.out / "results.jsonl"

    # ---------------------------------------------------------------------------------------------------- results

    def open(self) -> None:
        """Make the folder; keep earlier lines that still hold with --resume, else set them aside."""
        self.out.mkdir(parents=True, exist_ok=True)
        if not self.file.exists():
            return
        if self.options.resume:
            now: Row = {**machine.describe(self.device), "suite": self.options.suite}
            same = [r for r in read([self.file]) if r["commit"] == now["commit"] and machine_of(r) == machine_of(now)]
            self.rows = [r for r in same if r["dirty"] == now["dirty"] and r["kind"] != "error"]
        os.replace(self.file, self.file.with_suffix(".previous.jsonl"))
        for row in self.rows:
            self._append(row)

    def _append(self, row: Row) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def add(self, task: Task, row: Row, took: float) -> None:
        when = datetime.now(UTC).isoformat(timespec="seconds")
        stamp = {"suite": self.options.suite, "measured_at": when, "task": task.name, "took": round(took, 1)}
        row = {**machine.describe(self.device), **stamp, "device": self.device, "dtype": self.dtype_name, **row}
        row = without_nan(row)
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

    # -------------------------------------------------------------------------------------------------------- run

    def run(self, tasks: Callable[[Run], list[Task]]) -> int:
        """tasks: of a suite. The exit code: 0 done, 1 something failed or was wrong, 2 it could not start."""
        warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, called through torch
        try:
            self.open()
            wanted = [task for task in tasks(self) if task.part in self.parts]
        except (FetchError, OSError, ImportError) as error:  # ImportError: a mix of builds says what to do
            print(f"fastpeft bench: {error}", file=sys.stderr)
            return 2
        done = {row["task"] for row in self.rows}
        code = 0
        try:
            self._measure([task for task in wanted if task.name not in done])
        except KeyboardInterrupt:
            self.say("interrupted; --resume goes on from here")
            code = 130
        if self.rows:
            self._report()
        for failure in self.failures:
            print(f"failed: {failure}", file=sys.stderr)
        return code or (1 if self.failures else 0)

    def _measure(self, tasks: list[Task]) -> None:
        budget = self.options.time_budget or (None if self.long else QUICK_BUDGET if self.quick else BUDGET)
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
            rows = task.run(seconds)
        except Exception as error:
            self.failures.append(f"{task.name}: {type(error).__name__}: {error}")
            self.say(self.failures[-1])
            self.add(task, {"kind": "error", "key": f"error {task.name}", "error": str(error)}, 0.0)
            return
        for row in rows:
            if OURS in row.get("wrong", []):
                self.failures.append(f"{task.name}: fastpeft's result is wrong, errors {row['error'][OURS]}")
            self.add(task, row, time.perf_counter() - began)
        self.say(f"[{time.perf_counter() - self.start:5.0f} s] {task.name}")

    def _report(self) -> None:
        from . import answers, plots, tables

        rows = [row for row in self.rows if row["kind"] != "error"]
        found = answers.answers(rows)
        page = plots.page(rows, found, self.out, targets=self.long)
        if not self.options.json:
            for table in tables.all_tables(rows, targets=self.long):
                print(table.text() + "\n")
            for answer in found:
                print(answer.text() + "\n")
        self.say(f"{self.file}\n{page}")
