"""The factory in a run: parts of a module, schedules that wait for validation, both names of Lightning."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_optim import build_optimizer, configure_optimizers

DATA = DataLoader(torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), 4)  # 8 batches


def make_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 1))


class Model(pl.LightningModule):
    """Two networks, and a function that configures the optimizers."""

    def __init__(self, configure: Callable[[Any], Any]) -> None:
        super().__init__()
        self.net, self.other = make_net(), make_net()
        self.configure = configure

    def training_step(self, batch: torch.Tensor, i: int) -> torch.Tensor:
        return self.net(batch).square().mean()

    def validation_step(self, batch: torch.Tensor, i: int) -> None:
        self.log("val_loss", self.net(batch).square().mean())

    def configure_optimizers(self) -> Any:
        return self.configure(self)


class TwoNetworks(Model):
    def __init__(self, configure: Callable[[Any], Any]) -> None:
        super().__init__(configure)
        self.automatic_optimization = False

    def training_step(self, batch: torch.Tensor, i: int) -> None:
        for optimizer, net in zip(self.optimizers(), (self.net, self.other)):
            optimizer.zero_grad()
            self.manual_backward(net(batch).square().mean())
            optimizer.step()


def fit(module: pl.LightningModule, **arguments: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"accelerator": "cpu", "max_epochs": 2, "enable_checkpointing": False, **quiet, **arguments}
    trainer = pl.Trainer(**settings)
    trainer.fit(module, DATA, DATA)
    return trainer


# --- parts of a module ------------------------------------------------------------------------------------------------


def in_a_helper(module: Any) -> Any:
    return (lambda net: partial(build_optimizer, net)("AdamW"))(module.net)


@pytest.mark.parametrize(
    "configure",
    [
        lambda m: build_optimizer(m.net, "AdamW"),
        lambda m: configure_optimizers(m.net, "SGD", lr=0.1),
        lambda m: build_optimizer(nn.ModuleList([m.net, m.other]), "Adam"),
        in_a_helper,
    ],
)
def test_a_part_is_not_fused_where_lightning_clips(configure: Any) -> None:
    trainer = fit(Model(configure), precision="bf16-mixed", gradient_clip_val=1.0, max_epochs=1)
    assert not trainer.optimizers[0].param_groups[0]["fused"]


@pytest.mark.parametrize("length", [{"max_epochs": 3}, {"max_steps": 11, "max_epochs": -1}])
def test_a_part_knows_the_length_of_the_run(length: dict[str, Any]) -> None:
    trainer = fit(Model(lambda m: configure_optimizers(m.net, "MVNGrad", "WarmupCosine")), **length)
    expected = length.get("max_steps", 0) if "max_steps" in length else 8 * length["max_epochs"]
    assert trainer.lr_scheduler_configs[0].scheduler.total_steps == expected


def test_two_networks_have_schedules_of_the_runs_length() -> None:
    def configure(module: Any) -> Any:
        return tuple(configure_optimizers(net, "NAMO", "WarmupLinear") for net in (module.net, module.other))

    trainer = fit(TwoNetworks(configure))
    assert [config.scheduler.total_steps for config in trainer.lr_scheduler_configs] == [16, 16]


def test_a_trainer_can_be_given() -> None:
    trainer = pl.Trainer(accelerator="cpu", precision="bf16-mixed", logger=False, enable_checkpointing=False)
    assert build_optimizer(make_net(), "AdamW").param_groups[0]["fused"]
    assert not build_optimizer(make_net(), "AdamW", trainer=trainer).param_groups[0]["fused"]
    fast = pl.Trainer(accelerator="cpu", fast_dev_run=True, logger=False)
    made = configure_optimizers(make_net(), "AdamW", "WarmupCosine", trainer=fast)
    assert made["lr_scheduler"]["scheduler"].total_steps == 1_000_000


@pytest.mark.parametrize("schedule", ["WarmupCosine", {"name": "OneCycleLR", "args": {"max_lr": 0.1}}])
def test_an_unknown_length_names_what_would_help(schedule: Any) -> None:
    with pytest.raises(ValueError, match=r"Sequential has no Trainer.*pass total_steps"):
        configure_optimizers(make_net(), "SGD", schedule)
    with pytest.raises(ValueError, match=r"max_steps=-1, max_epochs=-1\): set its max_steps.*pass total_steps"):
        fit(Model(lambda m: configure_optimizers(m.net, "SGD", schedule)), max_epochs=-1)
    configure_optimizers(make_net(), "SGD", schedule, total_steps=5)


# --- what Lightning's dictionary can hold -----------------------------------------------------------------------------


def test_every_key_of_lightnings_dictionary_can_be_given() -> None:
    keys = {"interval": "step", "frequency": 3, "monitor": "loss", "strict": False, "reduce_on_plateau": True}
    for schedule in (
        {"class_path": "StepLR", "init_args": {"step_size": 2}, "name": "mine", **keys},
        {"name": "StepLR", "args": {"step_size": 2}, "log_name": "mine", **keys},
    ):
        entry = configure_optimizers(make_net(), "SGD", schedule)["lr_scheduler"]
        del entry["scheduler"]
        assert entry == {"name": "mine", **keys}


@pytest.mark.parametrize("frequency", [0, -1, 1.5, "often"])
def test_a_wrong_frequency(frequency: Any) -> None:
    with pytest.raises(ValueError, match=r"lr_scheduler\.frequency must be a whole number >= 1"):
        configure_optimizers(make_net(), "SGD", {"name": "WarmupConstant", "frequency": frequency})


@pytest.mark.parametrize(
    ("schedule", "validation", "frequency"),
    [
        ({}, {}, 1),
        ({}, {"check_val_every_n_epoch": 2}, 2),
        ({}, {"val_check_interval": 4}, 1),
        ({"interval": "step"}, {"val_check_interval": 4}, 4),
        ({"interval": "step"}, {"val_check_interval": 0.25}, 2),
        ({"interval": "step", "frequency": 8}, {"val_check_interval": 4}, 8),
    ],
)
def test_a_plateau_waits_for_validation(schedule: Any, validation: Any, frequency: int) -> None:
    plateau = {"name": "ReduceLROnPlateau", "args": {"patience": 0}, "monitor": "val_loss", **schedule}
    trainer = fit(Model(lambda m: configure_optimizers(m, "SGD", plateau)), **validation)
    assert trainer.lr_scheduler_configs[0].frequency == frequency


def test_a_schedule_that_advances_every_few_steps_is_shorter() -> None:
    schedule = {"name": "WarmupLinear", "frequency": 4}
    trainer = fit(Model(lambda m: configure_optimizers(m, "SGD", schedule)))
    assert trainer.lr_scheduler_configs[0].scheduler.total_steps == 4


# --- the other name of Lightning --------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_both_names_of_lightning(package: str, tmp_path: Path) -> None:
    """All that touches a Trainer, in a process that imports one of them."""
    pytest.importorskip(package)
    program = Path(__file__).parent / "other_project" / "either_lightning.py"
    command = [sys.executable, "-W", "ignore", str(program), package]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all done" in done.stdout
