"""What the tests of the callbacks that probe share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Quadratic(pl.LightningModule):
    r"""Loss :math:`\frac12\|w - x\|^2` of data x, whose gradient w - x has the noise of the data."""

    def __init__(
        self,
        data: Tensor,
        optimizer: Callable[[Any], torch.optim.Optimizer],
        batch_size: int = 4,
        shuffle: bool = False,
        start: float = 0.0,
    ) -> None:
        super().__init__()
        self.data, self.optimizer, self.batch_size, self.shuffle = data, optimizer, batch_size, shuffle
        self.w = nn.Parameter(torch.full((data.shape[1],), start))
        #: Factors of the loss, by batches.
        self.factors: dict[int, float] = {}

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return 0.5 * (self.w - batch[0]).square().sum(1).mean() * self.factors.get(batch_idx, 1.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.data), batch_size=self.batch_size, shuffle=self.shuffle)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sgd(lr: float = 0.1, **options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda params: torch.optim.SGD(params, lr=lr, **options)


def fit(
    module: pl.LightningModule,
    callbacks: list[pl.Callback],
    steps: int,
    ckpt_path: Path | None = None,
    **options: Any,
) -> pl.Trainer:
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=callbacks,
        **{
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        | options,
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


def values(callback: Any, name: str) -> list[float]:
    return [value for _, value in callback.history[f"{callback.family}/{name}"]]
