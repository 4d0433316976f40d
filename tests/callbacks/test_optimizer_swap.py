"""OptimizerSwap on LightningModules that know nothing of it."""

from __future__ import annotations

from types import MethodType
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

from lightning_optim import NAMO, MVNGrad
from lightning_optim.callbacks import OptimizerSwap
from lightning_optim.factory import Grouping
from lightning_optim.schedules import WarmupCosine


class LateModel(BoringModel):
    """Creates its parameters, always the same, in configure_model."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = None

    def configure_model(self) -> None:
        if self.layer is None:
            with torch.random.fork_rng():
                torch.manual_seed(3)
                self.layer = torch.nn.Linear(32, 2)


def make_trainer(*callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    batches = {"max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 0}
    trainer = {"accelerator": "cpu", "enable_checkpointing": False, **quiet, **batches, **arguments}
    return pl.Trainer(callbacks=list(callbacks), **trainer)


def test_another_optimizer_and_schedule_train_and_the_own_ones_come_back():
    model = BoringModel()
    before = model.layer.weight.detach().clone()
    swap = OptimizerSwap(
        {"name": "MVNGrad", "args": {"lr": 0.1}},
        lr_scheduler={"name": "WarmupCosine", "args": {"warmup": 2}},
        grouping=Grouping(lr_multipliers={"layer.bias": 2.0}),
    )
    trainer = make_trainer(swap)
    trainer.fit(model)
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is MVNGrad
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    (schedule,) = trainer.lr_scheduler_configs
    assert type(schedule.scheduler) is WarmupCosine
    assert (schedule.interval, schedule.scheduler.total_steps) == ("step", 6)
    assert not torch.equal(model.layer.weight, before)
    assert "configure_optimizers" not in vars(model)

    own = make_trainer()
    own.fit(model)
    assert type(own.optimizers[0]) is torch.optim.SGD


def test_only_fit_is_touched():
    class Watching(BoringModel):
        def on_validation_start(self) -> None:
            assert "configure_optimizers" not in vars(self)

    make_trainer(OptimizerSwap("NAMO"), limit_val_batches=1).validate(Watching(), verbose=False)


def test_comes_back_after_an_exception():
    class Failing(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("stop here")

    model = Failing()
    with pytest.raises(RuntimeError, match="stop here"):
        make_trainer(OptimizerSwap("NAMO")).fit(model)
    assert type(model.configure_optimizers()[0][0]) is torch.optim.SGD


def test_a_method_of_the_instance_comes_back():
    model = BoringModel()
    model.configure_optimizers = MethodType(lambda self: torch.optim.Adam(self.parameters()), model)
    trainer = make_trainer(OptimizerSwap("NAMO"))
    trainer.fit(model)
    assert type(trainer.optimizers[0]) is NAMO
    assert type(model.configure_optimizers()) is torch.optim.Adam


def test_configure_model_and_resume(tmp_path):
    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    def fit(*callbacks: pl.Callback, **arguments: Any) -> torch.Tensor:
        torch.manual_seed(0)  # the data
        model = LateModel()
        swap = OptimizerSwap("NAMO", {"name": "WarmupLinear", "args": {"warmup": 0.5}})
        data = BoringDataModule()
        make_trainer(swap, *callbacks).fit(model, datamodule=data, **arguments)
        return model.layer.weight.detach()

    whole = fit(Save())
    resumed = fit(ckpt_path=tmp_path / "0.ckpt")
    assert torch.equal(whole, resumed)
    initial = LateModel()
    initial.configure_model()
    assert not torch.equal(whole, initial.layer.weight)


def test_flags_of_a_stock_command_line():
    trainer = {"fast_dev_run": True, "accelerator": "cpu", "enable_progress_bar": False}
    cli = LightningCLI(
        BoringModel,
        BoringDataModule,
        trainer_defaults={**trainer, "enable_model_summary": False},
        save_config_callback=None,
        args=[
            "fit",
            "--trainer.callbacks+=lightning_optim.callbacks.OptimizerSwap",
            "--trainer.callbacks.optimizer.name=NAMO",
            "--trainer.callbacks.optimizer.args={lr: 0.25}",
            "--trainer.callbacks.lr_scheduler=WarmupConstant",
        ],
    )
    (optimizer,) = cli.trainer.optimizers
    assert type(optimizer) is NAMO
    assert optimizer.defaults["lr"] == 0.25
    assert type(cli.trainer.lr_scheduler_configs[0].scheduler).__name__ == "WarmupConstant"
