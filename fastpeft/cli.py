"""The command line: `fastpeft doctor`, `fastpeft tune` and `fastpeft bench`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import __version__, _build, machine, native, ops, tune
from .backends import plans

EXTRAS = ("bench", "test", "dev")
_HERE = Path(__file__).parent


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["bench"]:  # it reads its own arguments, as tune does
        return bench(argv[1:])
    if argv[:1] == ["tune"]:
        return tune.main(argv[1:])
    parser = argparse.ArgumentParser(prog="fastpeft", description="Fast kernels for parameter-efficient fine-tuning.")
    parser.add_argument("--version", action="version", version=f"fastpeft {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("doctor", help="what this machine has, and what fastpeft will run on it")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    commands.add_parser("tune", help="measure which way is fastest on this machine, and keep it (tune --help)")
    commands.add_parser("bench", help="measure fastpeft against Hugging Face PEFT (bench --help lists the choices)")
    return doctor(parser.parse_args(argv).json)


def doctor(as_json: bool = False) -> int:
    """Print what this machine has. The exit code is 1 if a compiled module is there and does not load, else 0."""
    found = diagnose()
    print(json.dumps(found, indent=2) if as_json else _as_text(found))
    return 1 if found["broken"] else 0


def diagnose() -> dict[str, Any]:
    """Everything `fastpeft doctor` knows."""
    module = native.cpu()
    return {
        "fastpeft": __version__,
        "installed_in": str(_HERE),
        "build_id": _build.package_id(_HERE),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": machine.version("triton"),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": machine.cpu(),
        "threads": torch.get_num_threads(),
        "gpus": machine.gpus(),
        "nvcc": machine.nvcc_version(),
        "cpu_module": module.__file__ if module else None,
        "cpu_module_missing": native.why_not_cpu(),
        "cpu_module_isas": list(module.isas()) if module else [],
        "cpu_module_isa": module.isa() if module else None,
        "cuda_module": native.cuda().__file__ if native.cuda() else None,
        "cuda_module_missing": native.why_not_cuda(),
        "plan": plans.current.about(),
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith("FASTPEFT_")},
        "backends": ops.backends(),
        "extras_missing": {extra: _missing(extra) for extra in EXTRAS},
        "broken": (module is None and native.is_built("_cpu")) or (native.cuda() is None and native.is_built("_cuda")),
    }


def _as_text(found: dict[str, Any]) -> str:
    cpu = found["cpu"]
    none = "none"
    rows = [
        ("fastpeft", f"{found['fastpeft']} (build {found['build_id']}) in {found['installed_in']}"),
        ("python, torch", f"{found['python']}, {found['torch']}; triton {found['triton'] or none}"),
        ("system", f"{found['system']}, {cpu['cores']} cores, {found['threads']} torch threads"),
        ("cpu", f"{cpu['model']}: {', '.join(cpu['isa']) or 'baseline'}; AMX {'yes' if cpu['amx'] else 'no'}"),
        ("gpu", ", ".join(found["gpus"]) or none),
        ("nvcc", found["nvcc"] or none),
        ("environment", " ".join(f"{key}={value}" for key, value in found["environment"].items()) or "no FASTPEFT_*"),
    ]
    if found["cpu_module"]:
        kernels = f"{found['cpu_module_isa']}; FASTPEFT_CPU_ISA takes {', '.join(found['cpu_module_isas'])}"
    else:
        kernels = f"{'BROKEN' if found['broken'] else 'missing'}: {found['cpu_module_missing']}"
    rows += [("cpu kernels", kernels), ("plans", _plan(found))]
    rows.append(("cuda kernels", "built" if found["cuda_module"] else f"missing: {found['cuda_module_missing']}"))
    for op, backends in found["backends"].items():
        usable = [name for name, reason in backends.items() if reason is None]
        reasons = {name: reason for name, reason in backends.items() if reason}
        left = "".join(f"; not {name}: {_see(reason, found)}" for name, reason in reasons.items())
        rows.append((op, f"{', else '.join(usable)}{left}"))
    for extra, absent in found["extras_missing"].items():
        rows.append((f"extra [{extra}]", f"missing {_names(absent)}" if absent else "complete"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _plan(found: dict[str, Any]) -> str:
    plan, own = found["plan"], found["plan"]["own"]
    if own is None:
        text = f"of kind {plan['kind']}, built in ({plan['built_in']})"
        if plan["named"]:
            return f"{text}, by FASTPEFT_PLAN, with which no file of one's own is read"
        return f"{text}; {plan['ignored']}" if plan["ignored"] else text
    text = f"of kind {plan['kind']} with this machine's own, measured {own['measured'].replace('T', ' ')[:16]}"
    since = [("torch", own["torch"], found["torch"]), ("fastpeft", own["fastpeft"], found["fastpeft"])]
    since.append(("threads", own["threads"], found["threads"]))
    text += f" with torch {own['torch']} ({plan['file']})"
    return text + "".join(f"; {name} was {then}, is {now}" for name, then, now in since if then != now)


def _see(reason: str, found: dict[str, Any]) -> str:
    return "its kernels are missing" if reason == found["cpu_module_missing"] else reason


def bench(argv: list[str]) -> int:
    """Run the benchmark suite: the installed copy, or the clone's."""
    absent = [] if {"-h", "--help"} & set(argv) else _missing("bench")
    if absent:
        print(f"fastpeft bench needs the extra [bench]; not installed: {_names(absent)}", file=sys.stderr)
        print(f"Install with: pip install {shlex.join(absent)}", file=sys.stderr)
        return 2
    root = _build.clone_root(_HERE)
    if root:
        sys.path.insert(0, str(root))
    return importlib.import_module("benches.cli" if root else "fastpeft._benches.cli").main(argv)


def _names(requirements: list[str]) -> str:
    return ", ".join(re.split(r"[<>=!~ ]", requirement)[0] for requirement in requirements)


def _missing(extra: str) -> list[str]:
    try:
        return machine.missing(extra)
    except metadata.PackageNotFoundError:
        return ["fastpeft"]  # it runs from a clone that is not installed
