"""Runs that are resumed with RNGState make the steps that they would have made without the interruption."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim.callbacks import RNGState
from lightning_optim.callbacks.random_numbers import RandomNumbers
from lightning_optim.data import VisionData
from lightning_optim.models import VisionClassifier


class Noisy(pl.LightningModule):
    """Draws from every generator in training, and torch's in validation; its loader shuffles with the global one."""

    def __init__(self, validates: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        if not validates:
            self.validation_step = None  # type: ignore[method-assign, assignment]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0]).mean() * (random.random() + np.random.rand())  # noqa: NPY002

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        torch.rand(3)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        return DataLoader(TensorDataset(torch.randn(24, 4, generator=generator)), batch_size=4, shuffle=True)

    val_dataloader = train_dataloader


def fit(model: pl.LightningModule, folder: Path, **options: Any) -> dict[str, Tensor]:
    options = {"callbacks": [RNGState()], "max_epochs": 3} | options
    checkpoint = ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=options.pop("every_n_steps", None))
    data, ckpt_path = options.pop("datamodule", None), options.pop("ckpt_path", None)
    trainer = pl.Trainer(
        **options | {"callbacks": [*options["callbacks"], checkpoint]},
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("validates", [False, True])
def test_a_run_goes_on_from_the_end_of_an_epoch(tmp_path: Path, validates: bool) -> None:
    pl.seed_everything(0)
    straight = fit(Noisy(validates), tmp_path)
    pl.seed_everything(1)
    resumed = fit(Noisy(validates), tmp_path / "again", ckpt_path=tmp_path / "epoch=0-step=6.ckpt")
    assert same(straight, resumed)


def test_without_it_a_run_does_not(tmp_path: Path) -> None:
    pl.seed_everything(0)
    straight = fit(Noisy(), tmp_path, callbacks=[])
    pl.seed_everything(1)
    resumed = fit(Noisy(), tmp_path / "again", callbacks=[], ckpt_path=tmp_path / "epoch=0-step=6.ckpt")
    assert not same(straight, resumed)


def test_a_run_goes_on_within_an_epoch(tmp_path: Path) -> None:
    """With a loader that can. Mixup draws from torch's global generator at every step."""

    def classifier() -> VisionClassifier:
        return VisionClassifier(10, 1, 8, "test_resnet", stem_stride=2, mixup=0.2)

    options = {"limit_train_batches": 6, "max_epochs": 2, "limit_val_batches": 1, "every_n_steps": 4}
    pl.seed_everything(0)
    straight = fit(classifier(), tmp_path, datamodule=VisionData("digits", batch_size=16), **options)
    checkpoint = tmp_path / "epoch=0-step=4.ckpt"
    pl.seed_everything(0)
    data = VisionData("digits", batch_size=16)
    resumed = fit(classifier(), tmp_path / "again", datamodule=data, ckpt_path=checkpoint, **options)
    assert same(straight, resumed)


class Device:
    """Stands for ``torch.mps`` and the like."""

    def __init__(self, used: bool | None) -> None:
        self.state = torch.tensor([1, 2, 3], dtype=torch.uint8)
        if used is not None:
            self.is_initialized = lambda: used

    def is_available(self) -> bool:
        return True

    def get_rng_state(self) -> Tensor:
        return self.state.clone()

    def set_rng_state(self, state: Tensor) -> None:
        self.state = state


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu", "mtia"])
@pytest.mark.parametrize("used", [True, False, None])
def test_any_accelerator(kind: str, used: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``None``: it does not say whether it is in use, as ``torch.mps``."""
    device = Device(used)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device(kind))
    monkeypatch.setattr(torch, "get_device_module", lambda device_kind: device)
    torch.save(RandomNumbers.now().state(), tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=True)
    device.state = torch.zeros(3, dtype=torch.uint8)
    RandomNumbers.of(saved).set()
    assert device.state.tolist() == ([0, 0, 0] if used is False else [1, 2, 3])


def test_checkpoints_of_version_0_1_0(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch, "get_device_module", lambda kind: device)
    state = RandomNumbers.now().state()
    del state["accelerator"]
    RandomNumbers.of(state | {"cuda": torch.tensor([7], dtype=torch.uint8)}).set()
    assert device.state.tolist() == [7]
    RandomNumbers.of(state | {"cuda": None}).set()
    assert device.state.tolist() == [7]


def test_another_accelerator_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    state = RandomNumbers.now().state() | {"accelerator": {"cuda": torch.tensor([7], dtype=torch.uint8)}}
    RandomNumbers.of(state).set()  # This machine may have none.
    device = Device(True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("xpu"))
    monkeypatch.setattr(torch, "get_device_module", lambda kind: device)
    RandomNumbers.of(state).set()
    assert device.state.tolist() == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.distributed
def test_each_process_goes_on_with_its_own_numbers(tmp_path: Path) -> None:
    processes = {"strategy": "ddp_fork", "devices": 2}
    straight = fit(Noisy(), tmp_path, **processes)
    resumed = fit(Noisy(), tmp_path / "again", ckpt_path=tmp_path / "epoch=0-step=3.ckpt", **processes)
    assert same(straight, resumed)
