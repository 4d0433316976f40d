"""Runs that freeze parameters for a part of the time are resumed exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint

from lightning_optim.callbacks import Resume

from . import moments
from .moments import Cell, Module, difference, everything, fit


class FrozenForAnEpoch(Module):
    """As docs/lightning.md says: after the optimizer is built."""

    def on_train_start(self) -> None:
        self.net[0].requires_grad_(self.current_epoch >= 1)

    def on_train_epoch_start(self) -> None:
        self.net[0].requires_grad_(self.current_epoch >= 1)


class FrozenForever(Module):
    def on_train_start(self) -> None:
        self.net[0].requires_grad_(False)


class WithBackbone(Module):
    def __init__(self, cell: Cell, fails: bool) -> None:
        super().__init__(cell, fails)
        self.backbone = self.net[0]


@pytest.mark.parametrize("module", [FrozenForAnEpoch, FrozenForever, WithBackbone])
@pytest.mark.parametrize("name", ["MVNGrad", "torch.optim.AdamW"])
def test_frozen_and_thawed(name: str, module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "Module", module)
    cell = Cell("max_epochs", optimizer=name, accumulation=2)

    def run(seed: int, *callbacks: pl.Callback, ckpt_path: Path | None = None) -> dict[str, Any]:
        finetuning = [BackboneFinetuning(1, lambda epoch: 1.5)] if module is WithBackbone else []
        end = everything(fit(cell, seed, [Resume(), *finetuning, *callbacks], ckpt_path=ckpt_path))
        return end["parameters"]

    expected = run(5, ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=2))
    for step in (2, 4, 6):  # in the first epoch, in the second, at its end
        assert difference(run(77, ckpt_path=tmp_path / f"step={step}.ckpt"), expected) == ""
