"""Freezing and unfreezing parameters in the course of a run: what is resumed is what was not interrupted.

The module is also the program that two ranks run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import configure_optimizers
from lightning_optim.checkpoint_io import SafeModelParallelStrategy

#: The second layer is frozen in the steps of these numbers; the checkpoint is written after the sixth.
FROZEN: dict[str, range] = {
    "never": range(0),
    "from the start to beyond the checkpoint": range(0, 8),
    "around the checkpoint": range(4, 8),
    "before the checkpoint": range(0, 3),
    "from the checkpoint on": range(6, 12),
    "from before the checkpoint to the end": range(3, 12),
}
#: When the module freezes what is to be frozen at a step: in `configure_model`, before a checkpoint is read, or later.
MOMENTS = ("on_train_start", "configure_model")
STEPS, SAVED = 10, 6


class Model(pl.LightningModule):
    def __init__(self, optimizer: str, frozen: range, moment: str, begins_at: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4))
        self.optimizer, self.frozen, self.moment, self.begins_at = optimizer, frozen, moment, begins_at

    def freeze(self, step: int) -> None:
        self.net[2].requires_grad_(step not in self.frozen)

    def configure_model(self) -> None:
        if not isinstance(self.net[0].weight, DTensor):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]

    def configure_optimizers(self) -> Any:
        built = configure_optimizers(self, {"name": self.optimizer, "args": {"lr": 1e-2}})
        if self.moment == "configure_model":  # All parameters are in the optimizer, and then frozen.
            self.freeze(self.begins_at)
        return built

    def on_train_start(self) -> None:
        self.freeze(self.trainer.global_step)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.freeze(self.trainer.global_step)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()


def data() -> DataLoader[Any]:
    """The same batch at every step: torch's loader cannot go on within an epoch."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 8, generator=generator), torch.randn(8, 4, generator=generator)
    return DataLoader(TensorDataset(x.repeat(STEPS, 1), y.repeat(STEPS, 1)), batch_size=8)


def fit(model: Model, steps: int, folder: Path, ranks: int, distributed: bool, ckpt_path: Any = None) -> Any:
    strategy = SafeModelParallelStrategy(ranks, 1, save_distributed_checkpoint=distributed)
    checkpoints = ModelCheckpoint(folder, "x", every_n_train_steps=SAVED, save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu", devices=ranks, strategy=strategy, max_steps=steps, max_epochs=-1,
        use_distributed_sampler=False,
        callbacks=[checkpoints] if ckpt_path is None and steps == SAVED else [], logger=False,
        enable_checkpointing=ckpt_path is None and steps == SAVED, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, data(), ckpt_path=ckpt_path)
    parameters = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}  # type: ignore[attr-defined]
    return {name: p.detach().clone() for name, p in parameters.items()}


def compared(optimizer: str, what: str, moment: str, distributed: bool, folder: Path, ranks: int) -> list[str]:
    """Names of the parameters that differ between a run and one that was resumed."""
    frozen = FROZEN[what]
    straight = fit(Model(optimizer, frozen, moment), STEPS, folder, ranks, distributed)
    fit(Model(optimizer, frozen, moment), SAVED, folder, ranks, distributed)
    model = Model(optimizer, frozen, moment, begins_at=SAVED)
    resumed = fit(model, STEPS, folder, ranks, distributed, folder / "x.ckpt")
    return [name for name in straight if not torch.equal(straight[name], resumed[name])]


#: What torch's loaders refuse, and what they load without the state of what is frozen.
HARD = [
    ("from the start to beyond the checkpoint", "on_train_start"),
    ("around the checkpoint", "configure_model"),
]


@pytest.mark.parametrize("what", FROZEN)
@pytest.mark.parametrize("moment", MOMENTS)
def test_fsdp2(what: str, moment: str, tmp_path: Path) -> None:
    assert compared("MVNGrad", what, moment, True, tmp_path, 1) == []


@pytest.mark.parametrize(("what", "moment"), HARD)
@pytest.mark.parametrize("optimizer", ["AdamW", "SOAP", "NAMO"])
@pytest.mark.parametrize("distributed", [True, False])
def test_fsdp2_with_other_optimizers_and_one_file(
    optimizer: str, what: str, moment: str, distributed: bool, tmp_path: Path
) -> None:
    assert compared(optimizer, what, moment, distributed, tmp_path, 1) == []


@pytest.mark.slow
@pytest.mark.distributed
def test_fsdp2_on_two_ranks(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.load(tmp_path / "results") == {}


def main(folder: Path) -> None:
    """Every rank runs this: the strategy starts the second one."""
    differences = {}
    for i, what in enumerate(FROZEN):
        for optimizer in ("NAMO", "MVNGrad"):
            for distributed in (True, False):
                place = folder / f"{i}-{optimizer}-{distributed}"
                if found := compared(optimizer, what, MOMENTS[i % 2], distributed, place, 2):
                    differences[f"{optimizer}, frozen {what}, {distributed}"] = found
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        torch.save(differences, folder / "results")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
