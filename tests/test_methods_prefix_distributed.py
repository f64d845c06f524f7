"""Prefixes under DDP and FSDP2, on two gloo processes: gradients are those of one process that sees both batches."""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from pathlib import Path

import _ranks
import pytest
import torch

KINDS = ("llama", "bert")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """Runs this file on two ranks; what each of them found."""
    return _ranks.run(__file__, tmp_path_factory.mktemp("ranks"))


def test_ddp_and_fsdp2_have_the_gradients_of_one_process(ranks):
    from _prefix import assert_same

    for found in ranks:
        for kind in KINDS:
            for how in ("ddp", "fsdp2", "fsdp2 checkpointed"):
                assert_same(found[kind, how], found[kind, "alone"], found[kind, "single"], f"{kind} under {how}")


def test_shards_are_saved_whole(ranks):
    for found in ranks:
        assert found["saved"] == [True, True]


# ---- on the ranks ----------------------------------------------------------------------------------------------------


def gradients(model, batches) -> torch.Tensor:
    """Of the mean loss over the batches, one vector."""
    import _prefix

    for inputs in batches:
        (_prefix.loss(model(**inputs).logits, None) / len(batches)).backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(grads) > 4
    return torch.cat([(g.full_tensor() if hasattr(g, "full_tensor") else g).flatten() for g in grads]).detach()


def sharded(model, checkpointing: bool):
    from torch.distributed.fsdp import fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(layer)
    return fully_shard(model)


def found() -> dict:
    import _prefix
    from torch.nn.parallel import DistributedDataParallel

    import fastpeft as fp

    results = {}
    for kind in KINDS:
        model = _prefix.base_model(kind).double()
        fp.attach(model, fp.PrefixConfig((4, 3), gates="token+layer"))
        _prefix.stir([p for p in model.parameters() if p.requires_grad])
        both = [_prefix.batch(kind, seed=seed) for seed in (0, 1)]
        own = [both[int(os.environ["RANK"])]]
        results[kind, "alone"] = gradients(copy.deepcopy(model), both)
        results[kind, "single"] = gradients(copy.deepcopy(model).float(), both)
        results[kind, "ddp"] = gradients(DistributedDataParallel(copy.deepcopy(model)), own)
        results[kind, "fsdp2"] = gradients(sharded(copy.deepcopy(model), False), own)
        results[kind, "fsdp2 checkpointed"] = gradients(sharded(copy.deepcopy(model), True), own)
    return results


def saved(folder: Path) -> list[bool]:
    """Whether the file is the one of before; an MLP's result, too."""
    import _prefix

    import fastpeft as fp

    same = []
    for config in (fp.PrefixConfig(4, mlp=6), fp.PrefixConfig((4, 3), gates="token+layer", style="llama_adapter")):
        model = _prefix.base_model("llama")
        fp.attach(model, config)
        fp.save_adapter(model, folder / "whole")
        fp.save_adapter(sharded(model, False), folder / "shards")
        files = [folder / which / "adapter_model.safetensors" for which in ("whole", "shards")]
        same.append(files[0].read_bytes() == files[1].read_bytes())
    return same


if __name__ == "__main__":
    import torch.distributed

    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    with tempfile.TemporaryDirectory() as folder:
        torch.save(found() | {"saved": saved(Path(folder))}, sys.argv[1])
    torch.distributed.destroy_process_group()
