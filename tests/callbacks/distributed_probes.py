"""Run as a script: trains with the diagnostics on several processes and writes what each saw."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_optim.callbacks import SpikeResponse, UpdateVariance, monitor
from lightning_optim.diagnostics.what_if import VirtualOptimizer

DATA = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))


class Net(pl.LightningModule):
    """A network whose parameters are sharded if the strategy can."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
        self.batch_size = batch_size

    def configure_model(self) -> None:
        mesh = self.device_mesh
        if mesh is not None and not hasattr(self, "sharded"):
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.net, mesh=mesh["data_parallel"])
            self.sharded = True

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - 1).square().mean() * (1000 if batch_idx == 55 else 1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> DataLoader[Any]:
        data = TensorDataset(DATA)
        processes = self.trainer.world_size, self.trainer.global_rank
        return DataLoader(data, self.batch_size, sampler=DistributedSampler(data, *processes, shuffle=False))


def run(
    strategy: Any, devices: int, probe: bool, source: Any = "batches", optional: bool = False
) -> tuple[pl.Trainer, dict[str, list[Any]]]:
    """Train; all values."""
    callbacks = [
        UpdateVariance(every_n_steps=5, source=source, probe_every_n_steps=20 if probe else None, layers=["*"]),
        SpikeResponse(follow_steps=20, probe_every_n_steps=15, probe_scales=[1e3], probe_steps=4),
    ]
    for callback in callbacks:
        callback.probes_optional = optional
    trainer = pl.Trainer(
        max_steps=90,
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        use_distributed_sampler=False,  # which would shuffle
        callbacks=callbacks,  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(batch_size=4 // devices))
    return trainer, {tag: list(pairs) for callback in callbacks for tag, pairs in callback.history.items()}


def fail_on_one(call: int, in_touch: bool) -> None:
    """Let the second process fail at a virtual step, in which the first may want something from it."""
    steps = 0
    step = VirtualOptimizer.step

    def failing(self: Any, gradients: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == call and torch.distributed.get_rank() == 1:
            raise RuntimeError("out of memory")
        if steps == call and in_touch:
            torch.distributed.all_reduce(torch.zeros(1))
        return step(self, gradients)

    VirtualOptimizer.step = failing  # type: ignore[method-assign]
    monitor.PATIENCE = timedelta(seconds=5)


if __name__ == "__main__":
    kind, folder = sys.argv[1:]
    if kind.startswith("failing"):
        fail_on_one(call=7, in_touch=kind == "failing-fsdp2")
    optional = kind == "failing-ddp"
    if kind.endswith("ddp"):
        trainer, values = run("ddp", 2, probe=True, source="ranks", optional=optional)
    else:
        trainer, values = run(ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1), 2, probe=False)
    Path(folder, f"{trainer.global_rank}.json").write_text(json.dumps(values))
