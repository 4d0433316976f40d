"""Runs under settings of the Trainer that the matrix of moments leaves out are continued exactly, too."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_optim import build_optimizer, configure_optimizers
from lightning_optim.callbacks import Resume, SkipSpikes
from lightning_optim.checkpoint_io import SafeCheckpointIO
from lightning_optim.data.loading import EpochSampler, ResumableLoader

from .moments import Rows, unchanged


def loader(batches: int = 7, seed: int = 3) -> ResumableLoader:
    rows = Rows(batches)
    sampler = EpochSampler(rows, seed=seed, num_replicas=1, rank=0)
    return ResumableLoader(rows, sampler=sampler, batch_size=4, collate_fn=unchanged, drop_last=True)


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.Linear(16, 16), nn.Linear(16, 1))
        self.trail: list[Any] = []

    def note(self, kind: str, x: Tensor) -> None:
        numbers = torch.get_rng_state().sum().item()
        self.trail.append((kind, self.trainer.current_epoch, self.trainer.global_step, x.sum().item(), numbers))

    def loss(self, batch: Any) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.note("training", batch[0])
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.note("validation", batch)
            self.log("v", self.net(batch).mean().abs())

    def configure_optimizers(self) -> Any:
        return configure_optimizers(self, "NAMO", {"name": "WarmupCosine", "args": {"warmup": 3, "total_steps": 60}})

    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return DataLoader(torch.randn(8, 6, generator=torch.Generator().manual_seed(9)), batch_size=8)


class ByHand(Module):
    """Two optimizers, of which the second one makes every other step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(6, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.note("training", batch[0])
        for optimizer, net in list(zip(self.optimizers(), (self.net, self.other)))[: 1 + batch_idx % 2]:
            optimizer.zero_grad()
            self.manual_backward((net(batch[0]) - batch[1]).square().mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return build_optimizer(self.net, "NAMO"), build_optimizer(self.other, "MVNGrad")


class TwoLoaders(Module):
    """Of unequal lengths, the shorter one begins again."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return sum(super(TwoLoaders, self).training_step(part, batch_idx) for part in batch.values())

    def train_dataloader(self) -> Any:
        return pl.utilities.CombinedLoader({"a": loader(), "b": loader(5, 8)}, "max_size_cycle")


class NoLength(Module):
    def train_dataloader(self) -> Any:
        class Stream(IterableDataset[Any]):
            def __iter__(self) -> Any:
                for i in range(7):
                    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(i))
                    yield x, x[:, :1]

        return DataLoader(Stream(), batch_size=None)


class Normalised(Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 1))


class End(pl.Callback):
    """Ends the process amid a step, as a cluster does."""

    def __init__(self, epoch: int, batch: int) -> None:
        self.when = (epoch, batch)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        if (trainer.current_epoch, args[2]) == self.when:
            os.kill(os.getpid(), signal.SIGTERM)


def fit(cls: type[Module], settings: dict[str, Any], *callbacks: pl.Callback, ckpt_path: Path | None = None) -> Module:
    pl.seed_everything(5 if ckpt_path is None else 77, verbose=False)
    module = cls()
    of_run = [make() for make in settings.get("callbacks", [])]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = pl.Trainer(
        **{"max_epochs": 4, **settings, "callbacks": [*callbacks, *of_run]}, **quiet, accelerator="cpu", devices=1,
        plugins=[SafeCheckpointIO()], enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    )  # fmt: skip
    try:
        trainer.fit(module, ckpt_path=ckpt_path)
    except SystemExit:
        assert any(isinstance(callback, End) for callback in callbacks)
    return module


def every(n: int) -> Callable[[Path], ModelCheckpoint]:
    return lambda folder: ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=n)


def at_the_end(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)


RUNS: dict[str, tuple[type[Module], dict[str, Any], Callable[[Path], ModelCheckpoint]]] = {
    "validation across epochs": (Module, {"check_val_every_n_epoch": None, "val_check_interval": 5}, every(3)),
    "... within an accumulation": (
        Module,
        {"check_val_every_n_epoch": None, "val_check_interval": 5, "accumulate_grad_batches": 2},
        every(3),
    ),
    "validation every other epoch": (Module, {"check_val_every_n_epoch": 2}, every(4)),
    "... saved between epochs": (Module, {"check_val_every_n_epoch": 2}, at_the_end),
    "part of an epoch": (Module, {"limit_train_batches": 5}, every(3)),
    "fraction of an epoch": (Module, {"limit_train_batches": 0.6, "max_steps": 14, "max_epochs": -1}, every(3)),
    "no validation": (Module, {"limit_val_batches": 0}, every(3)),
    "sanity check": (Module, {"num_sanity_val_steps": 2}, every(4)),
    "accumulation by epoch": (Module, {"callbacks": [lambda: GradientAccumulationScheduler({1: 2, 2: 3})]}, every(3)),
    "loaders anew": (Module, {"reload_dataloaders_every_n_epochs": 1}, every(3)),
    "overfitting": (Module, {"overfit_batches": 3}, every(2)),
    "two optimizers by hand": (ByHand, {}, every(4)),
    "two loaders": (TwoLoaders, {}, every(3)),
    "no length": (NoLength, {"max_steps": 17, "max_epochs": -1}, at_the_end),
    "bf16-mixed": (Module, {"precision": "bf16-mixed"}, every(4)),
    "bf16-true": (Module, {"precision": "bf16-true"}, every(4)),
    "clipped": (Module, {"gradient_clip_val": 0.1, "accumulate_grad_batches": 3}, every(2)),
    "moving average": (Module, {"callbacks": [lambda: EMAWeightAveraging(decay=0.9)]}, every(4)),
    "early stopping": (Module, {"callbacks": [lambda: EarlyStopping("v", patience=1)], "max_epochs": 8}, every(4)),
    "skipped spikes": (Module, {"callbacks": [SkipSpikes]}, every(4)),
    "batch normalisation": (Normalised, {"accumulate_grad_batches": 2}, every(3)),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_run_is_continued_exactly(run: str, tmp_path: Path) -> None:
    cls, settings, writer = RUNS[run]
    whole = fit(cls, settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The checkpoint of step .* does not continue exactly")
        warnings.filterwarnings("ignore", message="The checkpoint of step 17 ")  # the end of a run within an epoch
        fit(cls, settings, Resume(), writer(tmp_path))
    files = [(torch.load(file, weights_only=True)["global_step"], file) for file in tmp_path.glob("*.ckpt")]
    begun = sorted((step, file) for step, file in files if 0 < step < whole.trainer.global_step)
    assert begun
    for _, file in {begun[0], begun[len(begun) // 2]}:
        resumed = fit(cls, settings, Resume(), ckpt_path=file)
        assert resumed.trail == whole.trail[-len(resumed.trail) :], file.name
        state, expected = resumed.state_dict(), whole.state_dict()
        assert all(torch.equal(state[name], expected[name]) for name in expected), file.name


def test_a_run_that_is_ended_again_and_again(tmp_path: Path) -> None:
    settings = {"val_check_interval": 0.5, "accumulate_grad_batches": 2}
    whole = fit(Module, settings)
    trail, path = [], None
    for i, (epoch, batch) in enumerate([(0, 4), (1, 2), (2, 6), (9, 9)]):
        writer = ModelCheckpoint(tmp_path / str(i), save_on_exception=True, every_n_train_steps=10**6)
        part = fit(Module, settings, Resume(), End(epoch, batch), writer, ckpt_path=path)
        trail += part.trail
        path = next((tmp_path / str(i)).glob("*.ckpt"), None)
    assert trail == whole.trail
    assert all(torch.equal(p, q) for p, q in zip(part.parameters(), whole.parameters()))
