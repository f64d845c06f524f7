"""`fastpeft bench`: the main job and the ops of a suite beside their peers, with a report at the end."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import sys
from pathlib import Path

SUITES = ("lora", "qlora", "prefix")
PARTS = ("training", "accuracy", "step", "decode", "memory", "kernels", "others")
PEER_NAMES = {
    "peft": "PEFT",
    "peft-same-dtype": "PEFT same dtype",
    "peft-compiled": "PEFT compiled",
    "composition": "composition",
}
FIXED = {  # what a suite takes of an option
    "qlora": {"dtype": (None, "bf16"), "device": ("auto", "cpu"), "peer": (None,)},
    "prefix": {"dtype": (None, "bf16", "fp32"), "device": ("auto", "cpu"), "peer": (None,), "shapes": (None,)},
}
NEEDED = ("numpy", "peft", "bitsandbytes", "transformers", "gguf", "matplotlib", "tqdm")  # of the extra [bench]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="fastpeft bench",
        description="Fine-tunes SmolLM2-135M with LoRA on movie reviews under Hugging Face PEFT and under fastpeft, side by "
        "side, then measures lora_linear against its peers: how much faster is a training step, how much memory is left, how "
        "much faster is decoding, do the losses agree, on this machine. With --suite qlora the same over 4-bit weights, "
        "beside PEFT over bitsandbytes; with --suite prefix prefix tuning, of an encoder too. Writes results.jsonl, plots "
        "and report.html.",
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
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="compute dtype (default: bf16; fp32 where the CPU has none)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda where there is one")
    add(
        "--peer",
        action="append",
        choices=[*PEER_NAMES],
        help="kernel table against this peer; repeat it (default: all)",
    )
    add("--time-budget", type=_seconds, metavar="SECONDS", help="aim to be done by then (default: 420; --quick: 90)")
    add("--out", type=Path, help="folder for results and report (default: bench-results; bench-results/qlora)")
    add("--model", help="a model folder or hub name instead of SmolLM2-135M")
    add("--text", help="a text file to train on instead of movie reviews (documents parted by empty lines)")
    add("--json", action="store_true", help="print result lines as JSON, and nothing else, to stdout")
    add("--quick", action="store_true", help="a minute or two: shows that all works, with few rounds")
    add("--targets", action="store_true", help="for those who build fastpeft: every target with its verdict (an hour)")
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


def missing() -> list[str]:
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


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
    for name, taken in FIXED.get(options.suite, {}).items():
        if getattr(options, name) not in taken:
            print(f"fastpeft bench: --suite {options.suite} has its own {name}: leave out --{name}", file=sys.stderr)
            return 2
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("fastpeft bench: --device cuda, but torch finds no CUDA GPU here", file=sys.stderr)
            return 2
    from .kit.runner import Run

    suite = importlib.import_module(f".suites.{options.suite}", __package__)
    return Run(options).run(suite.tasks)


if __name__ == "__main__":
    sys.exit(main())
