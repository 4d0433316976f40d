"""Folders of shards of FSDP1 on two ranks: written, read without executing anything, continued.

The module is also the program that each rank runs.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import configure_optimizers
from lightning_optim.callbacks.exact_resume import _not_restored
from lightning_optim.checkpoint_io import CheckpointError, SafeFSDPStrategy

REPOSITORY = Path(__file__).parents[2]
STEPS, SAVED = 7, 4
#: Element-wise rules, one with sums over all parameters, and torch's own. Flat parameters leave no matrices to others.
OPTIMIZERS = ("MVNGrad", "HVAdam", "AdamW")


class OnCPU(SafeFSDPStrategy):
    """Lightning refuses FSDPStrategy on a CPU, where it works."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu")

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, device_id=self.root_device, use_orig_params=True)


class Model(pl.LightningModule):
    def __init__(self, optimizer: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 13), nn.Tanh(), nn.Linear(13, 12), nn.Tanh(), nn.Linear(12, 3))
        self.optimizer = optimizer

    def configure_optimizers(self) -> Any:
        return configure_optimizers(
            self, {"name": self.optimizer, "args": {"lr": 1e-2}}, {"name": "StepLR", "args": {"step_size": 2}}
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def train_dataloader(self) -> DataLoader[Any]:
        """The same batch at every step, another one on each rank: torch's loader cannot go on within an epoch."""
        generator = torch.Generator().manual_seed(1 + self.global_rank)
        x, y = torch.randn(8, 8, generator=generator), torch.randn(8, 3, generator=generator)
        return DataLoader(TensorDataset(x.repeat(STEPS, 1), y.repeat(STEPS, 1)), batch_size=8)


class Weights(pl.Callback):
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        wrapper: Any = trainer.strategy.model
        everything = FullStateDictConfig(rank0_only=False)
        with FullyShardedDataParallel.state_dict_type(wrapper, StateDictType.FULL_STATE_DICT, everything):
            self.found = {name: x.clone() for name, x in wrapper.state_dict().items()}


def fit(optimizer: str, steps: int, folder: Path, ckpt_path: Path | None = None) -> dict[str, Tensor]:
    weights = Weights()
    saves = ckpt_path is None and steps == SAVED
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=OnCPU(state_dict_type="sharded"), plugins=[TorchElasticEnvironment()],
        max_steps=steps, max_epochs=-1, use_distributed_sampler=False, logger=False, enable_progress_bar=False,
        callbacks=[weights, *([ModelCheckpoint(folder, "x", every_n_train_steps=SAVED)] if saves else [])],
        enable_checkpointing=saves, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Model(optimizer), ckpt_path=ckpt_path)
    return weights.found


class Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


def main(out: Path) -> None:
    """What each rank does."""
    wrong: list[str] = []
    rank = int(os.environ["RANK"])
    for optimizer in OPTIMIZERS:
        folder = out / optimizer
        straight = fit(optimizer, STEPS, folder)
        fit(optimizer, SAVED, folder)
        resumed = fit(optimizer, STEPS, folder, folder / "x.ckpt")
        wrong += [f"{optimizer} {name}" for name in straight if not torch.equal(straight[name], resumed[name])]
    path = out / OPTIMIZERS[0] / "x.ckpt"
    if not path.is_dir():
        wrong.append(f"{path} is no folder of shards")
    if rank == 0:
        (path / ".metadata").write_bytes(pickle.dumps(Evil()))
    torch.distributed.barrier()
    try:
        fit(OPTIMIZERS[0], STEPS, path.parent, path)
        wrong.append("a made-up table was read")
    except CheckpointError:
        pass
    if Path("executed").exists():
        wrong.append("a made-up table was executed")
    torch.save(wrong, out / f"{rank}.pt")


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        (FSDPStrategy(state_dict_type="full"), 'state_dict_type="sharded"'),
        (SafeFSDPStrategy(state_dict_type="full"), 'state_dict_type="sharded"'),
        (SafeFSDPStrategy(state_dict_type="sharded"), ""),
        (DDPStrategy(), ""),
    ],
    ids=["Lightning's file", "a file", "a folder of shards", "DDP"],
)
def test_a_file_is_said_not_to_continue_exactly(strategy: Strategy, said: str) -> None:
    reasons = list(_not_restored(strategy))
    assert len(reasons) == bool(said)
    assert said in "".join(reasons)


@pytest.mark.slow
@pytest.mark.distributed
def test_fsdp1_on_two_ranks(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*program, __file__, str(tmp_path)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == []


if __name__ == "__main__":
    main(Path(sys.argv[1]))
