"""The real change of parameters in a step."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_optim import MVNGrad
from lightning_optim.callbacks import UpdateSize


class Pulled(pl.LightningModule):
    """Weights between 1 and 2, which all have the same unit in the last place, and gradients of 1 and some noise."""

    def __init__(self, rounding: str) -> None:
        super().__init__()
        self.w = nn.Parameter(1 + torch.rand(4096, generator=torch.Generator().manual_seed(0)))
        self.rounding = rounding

    def training_step(self, batch: Tensor) -> Tensor:
        return (self.w * batch[0]).sum()

    def configure_optimizers(self) -> Any:
        return MVNGrad(self.parameters(), lr=2e-4, rounding=self.rounding)  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(1 + torch.randn(60, 4096, generator=torch.Generator().manual_seed(1)))  # type: ignore[arg-type]


def stalled(rounding: str) -> tuple[list[float], list[float]]:
    """Fraction of elements that do not move and mean change per step, as logged."""
    size = UpdateSize(every_n_steps=1)
    trainer = pl.Trainer(
        max_epochs=1, precision="bf16-true", callbacks=[size], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Pulled(rounding))
    return tuple([value for _, value in size.history[f"update/{name}"]] for name in ("stalled", "rms"))


def test_the_stalled_fraction_tells_the_ways_of_rounding_apart() -> None:
    """Updates of 1e-4 of the weights, and a spacing of bfloat16 of 1/128."""
    fraction, size = stalled("nearest")
    assert min(fraction) == 1
    assert max(size) == 0
    for rounding in ("kahan", "split"):
        fraction, size = stalled(rounding)
        assert max(fraction) < 0.02
        assert 1e-4 < min(size) < max(size) < 4e-4
    # An update u moves the fraction 128 u of the elements; its mean lies between 0.8 and 1 times its root mean square.
    fraction, _ = stalled("stochastic")
    moved, expected = 1 - sum(fraction) / len(fraction), 128 * sum(size) / len(size)
    assert 0.8 * expected - 0.002 < moved < expected + 0.002  # 4 standard errors of 250,000 draws of odds 0.03
