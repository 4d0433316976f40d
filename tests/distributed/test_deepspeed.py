"""DeepSpeed on two processes trains as one process does, with ours as its client optimizer.

The module is also the program that the processes run. Needs `deepspeed`, which is no dependency.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_optim import build_optimizer
from lightning_optim.registry import OPTIMIZERS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed"),
]

STEPS, PROCESSES = 8, 2
#: The step whose loss is NaN on the second process, where one is.
NOT_FINITE = 4
DATA = torch.randn(STEPS, 8, 6, generator=torch.Generator().manual_seed(1))
NAMES = [name for name, info in OPTIMIZERS.items() if info.kind != "matrix"]
#: ZeRO stage, dtype, whether a loss is NaN.
CASES = [
    *((name, stage, "fp32", False) for name in NAMES for stage in (1, 2)),
    *((name, stage, "fp32", True) for name in ("MVNGrad", "HVAdam") for stage in (1, 2)),
    *((name, stage, "bf16", False) for name in ("MVNGrad", "HVAdam") for stage in (1, 2)),
    *((name, stage, "fp32", False) for name in ("MVNGrad", "HVAdam") for stage in (0, 3)),
]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 17), nn.Tanh(), nn.Linear(17, 5), nn.LayerNorm(5), nn.Linear(5, 3))


def loss(net: Any, x: Tensor) -> Tensor:
    return (net(x) - 1).square().mean()


def optimizer_of(net: nn.Module, name: str) -> Any:
    return build_optimizer(net, {"name": name, "args": {"lr": 1e-2, "weight_decay": 0.1}})


def trained(name: str, stage: int, dtype: str, spoiled: bool) -> list[list[float]]:
    """The parameters at the end."""
    import deepspeed

    net = network()
    optimizer = optimizer_of(net, name)
    config = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 8 // PROCESSES,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # By default it clips to 1.
    } | ({"bf16": {"enabled": True}} if dtype == "bf16" else {})
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
    if stage and hasattr(optimizer, "shard_group"):
        optimizer.shard_group = dist.group.WORLD
    rank = dist.get_rank()
    for t, batch in enumerate(DATA):
        part = batch.chunk(PROCESSES)[rank].to(next(net.parameters()).dtype)
        value = loss(engine, part) * (float("nan") if spoiled and t == NOT_FINITE and rank == 1 else 1.0)
        engine.backward(value)
        engine.step()
    with deepspeed.zero.GatheredParameters(list(net.parameters()), enabled=stage == 3):
        return [p.detach().float().flatten().tolist() for p in net.parameters()]


def alone(name: str, dtype: str, spoiled: bool) -> list[Tensor]:
    """The same with float32 parameters beside those of the dtype, on one process."""
    net = network().to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    master = copy.deepcopy(net).float()
    optimizer = optimizer_of(master, name)
    for t, batch in enumerate(DATA):
        if spoiled and t == NOT_FINITE:
            continue
        net.zero_grad()
        loss(net, batch.to(net[0].weight.dtype)).backward()
        for p, wide in zip(net.parameters(), master.parameters()):
            wide.grad = p.grad.float()
        optimizer.step()
        for p, wide in zip(net.parameters(), master.parameters()):
            p.data.copy_(wide.data)
    return [p.detach().float().flatten() for p in net.parameters()]


def main(out: Path) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # It would compile an operation for shared memory, for minutes.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(dist_backend="gloo")
    results = {str(case): trained(*case) for case in CASES}
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("deepspeed")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([*launch, __file__, str(out)], capture_output=True, text=True, timeout=180, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_is_that_of_a_single_process(case: tuple[Any, ...], results: list[dict[str, Any]]) -> None:
    first, second = (result[str(case)] for result in results)
    assert first == second
    # Gradients are averaged over halves of the batch: roundings of float32, which steps of 1e-2 hardly amplify.
    # In bfloat16 gradients have 8 bits and parameters are rounded.
    tolerance = 1e-2 if case[2] == "bf16" else 1e-5
    for a, b, start in zip(first, alone(case[0], *case[2:]), network().parameters()):
        torch.testing.assert_close(torch.tensor(a), b, rtol=0, atol=tolerance)
        assert (b - start.detach().flatten()).abs().max() > 5e-3


if __name__ == "__main__":
    main(Path(sys.argv[1]))
