"""Every optimizer under DDP with torch's ``Join``: ranks with unequal numbers of batches.

The module is also the program that the two ranks run; all cases share one start.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from lightning_optim import build_optimizer, processes
from lightning_optim.engine.rule import ModelRule
from lightning_optim.registry import OPTIMIZERS

pytestmark = pytest.mark.distributed

RANKS = 2
#: Batches of the first rank, and of the second.
BATCHES = (2, 4)


class Run:
    """A model, the wrapper of which nothing but the test holds, and an optimizer that is told to share work."""

    def __init__(self, name: str, shares: bool) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 2))
        self.wrapped = DistributedDataParallel(self.net)
        self.optimizer: Any = build_optimizer(self.net, {"name": name, "args": {"lr": 0.01}})
        if shares:
            self.optimizer.process_group = dist.group.WORLD
        self.data = torch.Generator().manual_seed(dist.get_rank())

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            self.wrapped(torch.randn(4, 6, generator=self.data)).square().mean().backward()
            self.optimizer.step()

    def parameters(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.net.parameters()])

    def join(self, how: str) -> AbstractContextManager[Any]:
        return Join([self.wrapped]) if how == "Join" else self.wrapped.join()


def everywhere(x: Tensor) -> list[Tensor]:
    found = [torch.empty_like(x) for _ in range(RANKS)]
    dist.all_gather(found, x)
    return found


def case(name: str, how: str, first: str) -> dict[str, Any]:
    """Steps with every rank, then with ranks that end early, with shared work and without."""
    found = []
    for shares in (True, False):
        run = Run(name, shares)
        run.steps(1 if first == "after a step" else 0)
        with run.join(how):
            run.steps(BATCHES[dist.get_rank()])
        found.append(run.parameters())
    one, other = everywhere(found[0])
    return {"equal": torch.equal(one, other), "difference": float((found[0] - found[1]).abs().max())}


def cases() -> Iterator[tuple[str, str, str]]:
    for name, info in OPTIMIZERS.items():
        if not issubclass(info.cls, ModelRule):  # It needs the mean of the losses, and ranks without a batch have none.
            yield name, "Join", "at once"
    for name in ("NAMO", "MVNGrad", "SOAP"):
        yield name, "join", "at once"
        yield name, "Join", "after a step"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("join")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE)
        for rank in range(RANKS)
    ]
    errors = [process.communicate(timeout=300)[1].decode() for process in ranks]
    assert not any(process.returncode for process in ranks), errors
    return torch.load(folder / "results")


@pytest.mark.slow
@pytest.mark.parametrize("each", list(cases()), ids=" ".join)
def test_ranks_end_equal_and_as_without_sharing(each: tuple[str, str, str], results: Any) -> None:
    found = results[each]
    assert found["equal"]
    # Orthogonalised on one rank or on both, matrices come to the same numbers; stacked differently, within rounding.
    assert found["difference"] < 1e-5


def test_a_context_is_found_while_it_is_active(tmp_path: Path) -> None:
    if dist.is_initialized():  # by a Trainer of another test
        dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        run, other = Run("MVNGrad", shares=True), Run("AdamW", shares=False)
        with Join([run.wrapped]):
            assert processes.is_joining(run.optimizer)
            assert not processes.is_joining(other.optimizer)
        assert processes.is_joining(run.optimizer), "torch does not note the end of a context"
        with run.wrapped.join(enable=False):
            assert not processes.is_joining(run.optimizer)
        copied = copy.deepcopy(run.optimizer)
        with run.wrapped.join():
            assert not processes.is_joining(copied), "its parameters are others"
    finally:
        dist.destroy_process_group()


def main(rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    results = {each: case(*each) for each in cases()}
    if rank == 0:
        torch.save(results, folder / "results")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
