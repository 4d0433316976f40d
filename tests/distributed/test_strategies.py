"""Our optimizers under Lightning's strategies on two processes train as on one.

The module is also the program that the processes run; all cases share one start, which takes longer than they do.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullStateDictConfig,
    FullyShardedDataParallel,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import Grouping, OptimizerConfig, build_optimizer, processes
from lightning_optim.callbacks import GradientHealth, OptimizerInternals, UpdateSize
from lightning_optim.engine.optimizer import RuleOptimizer

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

STEPS = 5
#: The step before which an element of a gradient becomes NaN, on one process.
NOT_FINITE = 2
ROOT = Path(__file__).parents[2]


class Net(nn.Module):
    """A tied head, a packed projection, uneven shards, and a layer that half of the data does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.qkv = nn.Linear(6, 18)
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)
        self.gate = nn.Linear(6, 1)
        self.sometimes = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, sometimes: bool) -> Tensor:
        h = self.embedding(tokens).mean(1)
        q, k, v = self.qkv(h).chunk(3, -1)
        h = h + q * k.sigmoid() + v
        h = h + self.down(F.gelu(self.up(h)))
        if sometimes:
            h = h + self.sometimes(h)
        return self.head(self.norm(h * self.gate(h).sigmoid()))


class Model(pl.LightningModule):
    def __init__(self, optimizer: str, strategy: str = "", partly: bool = False, nan: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Net().double()
        self.optimizer, self.strategy, self.partly, self.nan = optimizer, strategy, partly, nan

    def configure_model(self) -> None:
        if self.strategy == "fsdp2":
            mesh = self.device_mesh["data_parallel"]
            for layer in (self.net.qkv, self.net.up):
                fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        tokens, kind = batch
        parts = [kind == 0, kind == 1] if self.partly else [kind >= 0]
        losses = [
            F.cross_entropy(self.net(tokens[some], bool(i) or not self.partly), tokens[some, 0], reduction="sum")
            for i, some in enumerate(parts)
            if some.any()
        ]
        return torch.stack(losses).sum() / len(tokens)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self, OptimizerConfig(self.optimizer), Grouping(no_decay=[]))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.nan and self.global_step == NOT_FINITE and (not dist.is_initialized() or dist.get_rank() == 1):
            grads = [processes.local(p.grad) for p in self.parameters() if p.grad is not None]
            grads[-1].view(-1)[-1:] = torch.nan

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(0, 11, (STEPS * 8, 5), generator=generator)
        kinds = torch.arange(len(tokens)) % 2  # with two processes the second has all of the second kind
        rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        part = slice(rank, None, processes)
        return DataLoader(TensorDataset(tokens[part], kinds[part]), batch_size=8 // processes)


class FSDP1OnCPU(FSDPStrategy):
    """Lightning refuses FSDPStrategy itself on a CPU, where it works."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu")

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, device_id=self.root_device, use_orig_params=True)


class HybridOnCPU(FSDP1OnCPU):
    """Two replicas, each of two shards. Lightning itself would make the mesh on GPUs."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        mesh = init_device_mesh("cpu", (2, 2))
        return FullyShardedDataParallel(
            model, device_id=self.root_device, use_orig_params=True, device_mesh=mesh,
            sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        )  # fmt: skip


CASES: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    **{
        f"ddp {name}": ({"optimizer": name, "partly": True}, lambda: DDPStrategy(find_unused_parameters=True))
        for name in ("NAMO", "MVNGrad")
    },
    "two nodes NAMO": ({"optimizer": "NAMO"}, DDPStrategy),
    **{
        f"fsdp2 {name}": ({"optimizer": name, "strategy": "fsdp2"}, lambda: ModelParallelStrategy(2, 1))
        for name in ("NAMO", "SOAP", "HVAdam")
    },
    **{f"fsdp1 {name}": ({"optimizer": name, "strategy": "fsdp1"}, FSDP1OnCPU) for name in ("MVNGrad", "HVAdam")},
}
#: On four processes: two replicas of two shards.
HYBRID: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    f"hybrid {name}": ({"optimizer": name, "strategy": "fsdp1"}, HybridOnCPU) for name in ("MVNGrad", "HVAdam")
}


#: How many processes have the same, share the work and have flat parts.
SPREAD = {"ddp": [2, 2, 0], "two": [2, 1, 0], "fsdp1": [0, 0, 2], "hybrid": [2, 0, 2]}


def fit(model: Model, **options: Any) -> dict[str, Any]:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    optimizers: list[RuleOptimizer] = []
    trainer.callbacks.append(pl.callbacks.LambdaCallback(on_train_end=lambda t, m: optimizers.extend(t.optimizers)))
    weights: dict[str, Tensor] = {}

    def keep(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if model.strategy == "fsdp1":
            everything = FullStateDictConfig(rank0_only=False)
            wrapper: Any = trainer.strategy.model
            with FullyShardedDataParallel.state_dict_type(wrapper, StateDictType.FULL_STATE_DICT, everything):
                weights.update({name: x.clone() for name, x in wrapper.state_dict().items()})
        else:
            for name, p in module.named_parameters():
                weights[name] = p.full_tensor() if isinstance(p, DTensor) else p.detach().clone()

    trainer.callbacks.append(pl.callbacks.LambdaCallback(on_train_end=keep))
    monitors = OptimizerInternals(every_n_steps=1), UpdateSize(every_n_steps=1), GradientHealth(every_n_steps=1)
    trainer.callbacks.extend(monitors)
    trainer.fit(model)
    (optimizer,) = optimizers
    optimizer.settle()
    groups = (optimizer.process_group, optimizer.work_group, optimizer.shard_group)
    spread = [0 if group is None else dist.get_world_size(group) for group in groups]
    history = {tag: list(pairs) for monitor in monitors for tag, pairs in monitor.history.items()}
    return {"weights": weights, "skipped": optimizer.skipped_steps, "spread": spread, "values": history}


def main(out: Path) -> None:
    """What each process does."""
    environment = dict(os.environ)
    cases = CASES if environment["WORLD_SIZE"] == "2" else HYBRID
    for name, (settings, strategy) in cases.items():
        nodes = 2 if name.startswith("two nodes") else 1
        os.environ |= {"LOCAL_RANK": "0", "GROUP_RANK": environment["RANK"]} if nodes == 2 else environment
        devices = int(environment["WORLD_SIZE"]) // nodes
        result = fit(Model(**settings), strategy=strategy(), devices=devices, num_nodes=nodes)
        torch.save(result, out / f"{name} {os.environ['RANK']}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("processes")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for count in (2, 4):
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        done = subprocess.run([*run, __file__, str(out)], capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return lambda name: [torch.load(file) for file in sorted(out.glob(f"{name} *.pt"))]


@pytest.mark.parametrize("name", [*CASES, *HYBRID])
def test_training_is_that_of_a_single_process(name: str, results: Callable[..., Any]) -> None:
    settings = (CASES | HYBRID)[name][0]
    expected = fit(Model(**settings | {"strategy": ""}))
    # Float64 gradients are added in another order; steps divide them by their own size. Lightning's FSDP1 computes in
    # float32. SOAP tells the eigenvectors of a gradient of low rank apart by a ramp of 1e-9 of its size.
    close = 1e-4 if settings.get("strategy") == "fsdp1" else 1e-6 if name.endswith("SOAP") else 1e-10
    for result in results(name):
        assert result["skipped"] == expected["skipped"] == 1
        for key, x in expected["weights"].items():
            found = result["weights"][key]
            torch.testing.assert_close(found.double(), x, rtol=close, atol=close, msg=lambda m, key=key: f"{key}: {m}")
        assert result["values"].keys() == expected["values"].keys() != set()
        for tag, pairs in expected["values"].items():
            near = [(i, pytest.approx(x, rel=10 * close, abs=10 * close)) for i, x in pairs]
            assert result["values"][tag] == near, tag
        assert result["spread"] == SPREAD.get(name.split()[0], [0, 0, 0])


@pytest.mark.parametrize("strategy", [FSDPStrategy(), DeepSpeedStrategy.__new__(DeepSpeedStrategy)])
def test_flat_parameters_are_refused_by_matrix_rules(strategy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model("NAMO")
    trainer = pl.Trainer.__new__(pl.Trainer)
    monkeypatch.setattr(pl.Trainer, "strategy", strategy)
    monkeypatch.setattr(pl.Trainer, "precision_plugin", SimpleNamespace(scaler=None))
    model._trainer = trainer
    with pytest.raises(ValueError, match=r"NAMO needs whole matrices.*ModelParallelStrategy"):
        build_optimizer(model, "NAMO")
    assert build_optimizer(model, "MVNGrad") is not None


def test_sums_over_all_parameters_need_to_know_who_has_what(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy: Any = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
    model = Model("HVAdam")
    monkeypatch.setattr(pl.Trainer, "strategy", strategy)
    monkeypatch.setattr(pl.Trainer, "precision_plugin", SimpleNamespace(scaler=None))
    model._trainer = pl.Trainer.__new__(pl.Trainer)
    for strategy.config in ({}, {"zero_optimization": {"stage": 0}}):
        assert build_optimizer(model, "MVNGrad") is not None
        with pytest.raises(ValueError, match=r"HVAdam needs inner products.*stage 0.*use stage 1 or 2, or DDPStrategy"):
            build_optimizer(model, "HVAdam")
    strategy.config = {"zero_optimization": {"stage": 1}}
    assert build_optimizer(model, "HVAdam") is not None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
