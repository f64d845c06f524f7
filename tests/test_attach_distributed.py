"""DDP and FSDP2 on two gloo processes over attached adapters: the gradients of one process, and the same file."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import _ranks
import pytest
import torch


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """Runs this file on two ranks; what each of them found."""
    return _ranks.run(__file__, tmp_path_factory.mktemp("ranks"))


def test_gradients_are_those_of_one_process(ranks):
    from _peft import assert_same_results

    for found in ranks:
        for name, (got, one, exact) in found["training"].items():
            assert got.keys() == one.keys(), name
            assert_same_results(got, one, exact)


def test_shards_are_saved_whole(ranks):
    for found in ranks:
        assert found["saved"]


# ---- on the ranks --------------------------------------------------------------------------------------------------------


def results(wrapped, model) -> dict[str, torch.Tensor]:
    """Output, and gradients of both adapters in turn."""
    import _attach

    import fastpeft as fp

    found = {}
    for name in ("two", "one"):
        fp.activate(model, name)
        model.zero_grad()
        _attach.loss(wrapped, _attach.batch("bert")).backward()
        for key, p in _attach.adapter(model, name).items():
            found[f"{name} {key}"] = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
    return {key: grad.clone() for key, grad in found.items()}


def main(folder: Path) -> dict[str, object]:
    import _attach
    from safetensors.torch import load_file
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    import fastpeft as fp

    def model():
        model = _attach.base_model("bert")
        for name in ("one", "two"):
            torch.manual_seed(len(name))
            fp.attach(model, fp.LoraConfig(r=4), name)
            _attach.move_away(model, name)
        return model

    def sharded(model, checkpointed: bool = False):
        if checkpointed:
            model.gradient_checkpointing_enable()
        for block in model.bert.encoder.layer:
            fully_shard(block)
        return fully_shard(model)

    one, exact = (results(it, it) for it in (model(), _attach.exact(model())))
    ways = {
        "ddp": lambda model: DistributedDataParallel(model, find_unused_parameters=True),  # adapters take turns
        "fsdp2": sharded,
        "fsdp2 checkpointed": lambda model: sharded(model, True),
    }
    training = {}
    for name, wrap in ways.items():
        it = model()
        training[name] = (results(wrap(it), it), one, exact)
    fp.save_adapter(model(), folder / "plain", "one")
    fp.save_adapter(sharded(model()), folder / "sharded", "one")
    files = [folder / name / "adapter_model.safetensors" for name in ("plain", "sharded")]
    plain, shards = map(load_file, files)
    same = plain.keys() == shards.keys() and all(torch.equal(plain[key], shards[key]) for key in plain)
    return {"training": training, "saved": same and files[0].read_bytes() == files[1].read_bytes()}


if __name__ == "__main__":
    import torch.distributed

    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    torch.save(main(Path(sys.argv[1]).with_suffix(f".{os.environ['RANK']}")), sys.argv[1])
    torch.distributed.destroy_process_group()
