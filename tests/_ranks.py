"""Runs a test file as a script on two ranks of a gloo group."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch


def run(file: str, folder: Path) -> list[dict]:
    """What each rank found: `python file OUT` saves it to OUT, and finds its rank in the environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        with open(folder / f"{rank}.log", "w") as log:
            command = [sys.executable, file, str(folder / f"{rank}.pt")]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        for rank, process in enumerate(processes):
            assert process.wait(timeout=240) == 0, (folder / f"{rank}.log").read_text()
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
