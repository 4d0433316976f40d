"""Two processes skip the same steps, also where only one of them has seen the spike; the module is their program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from lightning_optim.callbacks import SkipSpikes

SPIKES = {40: 1e4, 44: float("nan")}
CASES = [(by, name) for by in ("gradient", "loss") for name in ("ddp", "fsdp2")]


class Module(BoringModel):
    def __init__(self, sharded: bool) -> None:
        super().__init__()
        self.sharded, self.seen = sharded, []

    def configure_model(self):
        if self.sharded:
            fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])

    def train_dataloader(self):
        return torch.utils.data.DataLoader(RandomDataset(32, 800), batch_size=8)

    def training_step(self, batch, batch_idx):
        weight = self.layer.weight.detach()
        self.seen.append((weight.to_local() if self.sharded else weight).clone())
        mine = SPIKES.get(self.global_step, 1.0) if dist.get_rank() == 1 else 1.0
        return super().training_step(batch, batch_idx)["loss"] * mine


def main(out: Path) -> None:
    """What each process does."""
    for by, name in CASES:
        pl.seed_everything(0, verbose=False)
        skip, module = SkipSpikes(threshold=20, by=by), Module(name == "fsdp2")
        strategy = DDPStrategy() if name == "ddp" else ModelParallelStrategy(2, 1)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        pl.Trainer(
            accelerator="cpu", devices=2, strategy=strategy, max_steps=48, callbacks=[skip], limit_val_batches=0,
            enable_model_summary=False, **quiet,
        ).fit(module)  # fmt: skip
        still = [i for i, (a, b) in enumerate(zip(module.seen, module.seen[1:])) if torch.equal(a, b)]
        torch.save((skip.skipped_steps, still), out / f"{by} {name} {dist.get_rank()}.pt")


@pytest.mark.slow
@pytest.mark.distributed
def test_all_ranks_skip_the_same_steps(tmp_path: Path) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for by, name in CASES:
        for rank in (0, 1):
            assert torch.load(tmp_path / f"{by} {name} {rank}.pt") == (2, [40, 44]), (by, name, rank)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
