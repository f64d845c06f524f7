"""The README's training script, as printed there: on one process, and under torchrun with FSDP2 on two."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.S)
    path = tmp_path_factory.mktemp("readme") / "train.py"
    path.write_text(next(block for block in blocks if block.startswith("# train.py")), "utf-8")
    return path


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=128, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def losses(command, script):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, str(script)], capture_output=True, text=True, env=env, cwd=README.parent, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "on PEFT's code" in done.stdout, "the report was not printed"
    return [float(found) for found in re.findall(r"step \d+ loss ([\d.]+)", done.stdout)]


@pytest.mark.parametrize("processes", [1, 2])
def test_training_script(script, model_folder, processes):
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "29611"]
    found = losses([*launch, str(script)], model_folder)
    assert len(found) == 5 and found[-1] < found[0]
