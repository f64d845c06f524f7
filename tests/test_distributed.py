"""DDP and FSDP2 on two gloo processes: PEFT's losses and gradients, and the order of apply and fully_shard."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import _ranks
import pytest
import torch

STEPS = 3


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """Runs this file on two ranks; what each of them found."""
    return _ranks.run(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.verifies("lora_linear", "fsdp", backend="cpu", dtype=["float32", "bfloat16"])
def test_ddp_and_fsdp2_train_as_peft_does(ranks):
    """DDP, then FSDP2 by block and whole: in float32, with checkpointing, and in FSDP2's bfloat16 mixed precision,
    and over 4-bit bases."""
    for found in ranks:
        for name, (got, peer, exact) in found["training"].items():
            eps = torch.finfo(torch.bfloat16 if "bfloat16" in name else torch.float32).eps
            error, theirs = (got - exact).norm(), (peer - exact).norm()
            assert error <= 2 * theirs + 4 * eps * exact.norm(), f"{name}: {error:.3e}, PEFT {theirs:.3e}"


def test_apply_and_revert_after_fsdp2_are_refused(ranks):
    for found in ranks:
        assert "call apply before fully_shard" in found["order"]["apply"]
        assert "revert before fully_shard" in found["order"]["revert"]


# ---- on the ranks --------------------------------------------------------------------------------------------------------


def shard(model, dtype, checkpointing):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=dtype) if dtype is not torch.float32 else MixedPrecisionPolicy()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    for block in model.base_model.model.model.layers:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return model


def train(model) -> torch.Tensor:
    """Losses, then gradients of the last step, one vector."""
    import _peft

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    found = []
    for step in range(STEPS):
        optimizer.zero_grad()
        ids = _peft.tokens(seed=10 * step + int(os.environ["RANK"]))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append(loss.detach().reshape(1))
        if step < STEPS - 1:
            optimizer.step()
    grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in trained]
    return torch.cat([*found, *(grad.flatten() for grad in grads)]).double()


def training() -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    import _peft
    from torch.nn.parallel import DistributedDataParallel

    import fastpeft

    results = {}
    plain = _peft.peft_model()
    exact = train(DistributedDataParallel(_peft.double(plain)))
    packed = fastpeft.quantize(copy.deepcopy(plain), tile=False)
    exact_packed = train(DistributedDataParallel(_peft.double(_peft.dense(packed))))
    for name, wrap in {
        "ddp": DistributedDataParallel,
        "fsdp2": lambda model: shard(model, torch.float32, False),
        "fsdp2 checkpointed": lambda model: shard(model, torch.float32, True),
        "fsdp2 bfloat16": lambda model: shard(model, torch.bfloat16, False),
        "ddp 4-bit": DistributedDataParallel,
        "fsdp2 4-bit checkpointed": lambda model: shard(model, torch.float32, True),
    }.items():
        both = []
        for fast in (True, False):
            model = copy.deepcopy(packed if "4-bit" in name else plain)
            if fast:
                report = fastpeft.apply(model)
            with _peft.counted_peft_calls() as calls:
                both.append(train(wrap(model)))
            assert not fast or not calls, f"{name}: {len(calls)} calls of PEFT's forward"
            assert not fast or (report.groups == 4 and {row.path for row in report.layers} == {"fast"}), str(report)
        results[name] = (*both, exact_packed if "4-bit" in name else exact)
    return results


def order() -> dict[str, str]:
    import _peft

    import fastpeft

    found = {}
    applied, plain = _peft.peft_model(), _peft.peft_model()
    fastpeft.apply(applied)
    for what, model in (("revert", applied), ("apply", plain)):
        shard(model, torch.float32, False)
        try:
            getattr(fastpeft, what)(model)
        except RuntimeError as error:
            found[what] = str(error)
    return found


if __name__ == "__main__":
    import torch.distributed

    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    torch.save({"training": training(), "order": order()}, sys.argv[1])
    torch.distributed.destroy_process_group()
