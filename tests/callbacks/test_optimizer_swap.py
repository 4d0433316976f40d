"""OptimizerSwap on LightningModules that know nothing of it."""

from __future__ import annotations

from collections.abc import Callable
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


# --- what the module's own optimizers say -----------------------------------------------------------------------------


class Own(BoringModel):
    """Two layers, and a function that configures the optimizers."""

    def __init__(self, configure: Callable[[Any], Any], manual: bool = False) -> None:
        super().__init__()
        del self.layer  # to be registered last, as the layer that makes the output
        self.body, self.layer = torch.nn.Linear(32, 32), torch.nn.Linear(32, 2)
        self.automatic_optimization = not manual
        self.configure = configure
        self.rates: list[list[float]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizers = self.optimizers(use_pl_optimizer=False)
        first = optimizers[0] if isinstance(optimizers, list) else optimizers
        self.rates.append([group["lr"] for group in first.param_groups])
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self(batch).square().mean())
            optimizer.step()
        return None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", 1.0)  # a plateau

    def configure_optimizers(self) -> Any:
        return self.configure(self)


def groups_of(module: Any) -> list[dict[str, Any]]:
    return [{"params": module.body.parameters(), "lr": 1e-5}, {"params": module.layer.parameters()}]


def adamw(module: Any, **arguments: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups_of(module), **{"lr": 1e-4, **arguments})


def scheduled(make: Callable[[Any], Any], **entry: Any) -> Callable[[Any], Any]:
    def configure(module: Any) -> Any:
        optimizer = adamw(module)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), **entry}}

    return configure


def with_list(module: Any) -> Any:
    optimizer = adamw(module)
    return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)]


def chained(optimizer: Any) -> Any:
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2)
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], [2])


def plateau(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)


SCHEDULES = {
    "none": adamw,
    "list": with_list,
    "cosine": scheduled(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 6, eta_min=1e-6), interval="step"),
    "sequential": scheduled(chained, interval="step"),
    "one cycle": scheduled(
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, [1e-5, 1e-4], total_steps=6, cycle_momentum=False),
        interval="step",
    ),
    "plateau": scheduled(plateau, monitor="loss"),
    "every second step": scheduled(lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.1), interval="step", frequency=2),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_modules_schedule_and_ratios_are_kept(schedule: str) -> None:
    """Learning rates of MVNGrad are those that the module's AdamW would have had, times one number."""
    own, swapped = Own(SCHEDULES[schedule]), Own(SCHEDULES[schedule])
    make_trainer(limit_val_batches=1).fit(own)
    make_trainer(OptimizerSwap("MVNGrad", lr=3e-2, grouping=Grouping(no_decay=[])), limit_val_batches=1).fit(swapped)
    assert len(own.rates) == len(swapped.rates) == 6
    for before, after in zip(own.rates, swapped.rates):
        assert sorted(after) == pytest.approx(sorted(300 * rate for rate in before))


def test_a_schedule_that_makes_the_rate_itself_reaches_the_new_one() -> None:
    """As in "Attention is all you need": lr is 1, and the schedule's factor is the learning rate."""

    def noam(module: Any) -> Any:
        optimizer = torch.optim.Adam(module.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 512**-0.5 * min((step + 1) ** -0.5, (step + 1) * 3**-1.5)
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    model = Own(noam)
    make_trainer(OptimizerSwap("MVNGrad", lr=0.02)).fit(model)
    assert max(max(rates) for rates in model.rates) == pytest.approx(0.02)
    assert model.rates[0] == pytest.approx([0.02 / 3])


@pytest.mark.parametrize("name", ["MVNGrad", "NAMO", "AdamW"])
def test_weight_decays_are_kept_as_ratios(name: str) -> None:
    def decays(configure: Callable[[Any], Any], **arguments: Any) -> dict[str, float]:
        trainer = make_trainer(OptimizerSwap(name, weight_decay=0.2, **arguments), fast_dev_run=True)
        trainer.fit(Own(configure))
        return {n: g["weight_decay"] for g in trainer.optimizers[0].param_groups for n in g["param_names"]}

    def split(module: Any) -> Any:
        layer = {"params": module.layer.parameters(), "weight_decay": 0.0}
        return torch.optim.AdamW([{"params": module.body.parameters()}, layer])

    assert decays(split) == {"body.weight": 0.2, "body.bias": 0.2, "layer.weight": 0.0, "layer.bias": 0.0}
    one_for_all = decays(lambda m: adamw(m, weight_decay=0.3))  # as the module has chosen
    assert set(one_for_all.values()) == {0.2}
    none = decays(lambda m: torch.optim.AdamW(m.parameters(), weight_decay=0.0))
    assert set(none.values()) == {0.0}
    unsaid = decays(lambda m: torch.optim.Adam(m.parameters()))
    assert unsaid == {"body.weight": 0.2, "body.bias": 0.0, "layer.weight": 0.2, "layer.bias": 0.0}
    assert decays(lambda m: adamw(m, weight_decay=0.3), grouping=Grouping())["body.bias"] == 0.0


@pytest.mark.parametrize(
    ("configure", "moves"),
    [
        (lambda m: torch.optim.AdamW(m.layer.parameters()), {"layer"}),
        (lambda m: [torch.optim.SGD([m.body.weight], lr=0.1)], {"body"}),
        (lambda m: {"optimizer": torch.optim.Adam(m.parameters())}, {"body", "layer"}),
    ],
)
def test_only_what_the_module_trains_is_trained(configure: Any, moves: set[str]) -> None:
    model = Own(configure)
    before = {name: p.clone() for name, p in model.named_parameters()}
    make_trainer(OptimizerSwap("NAMO", lr=0.1)).fit(model)
    moved = {name.partition(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == moves


def test_a_frozen_parameter_of_the_own_optimizer_can_be_trained_later() -> None:
    def configure(module: Any) -> Any:
        module.body.requires_grad_(False)
        return torch.optim.AdamW(module.parameters())

    trainer = make_trainer(OptimizerSwap("NAMO"), fast_dev_run=True)
    trainer.fit(Own(configure))
    names = {name for group in trainer.optimizers[0].param_groups for name in group["param_names"]}
    assert {"body.weight", "body.bias"} < names


def test_the_line_counts_what_is_trained(caplog: pytest.LogCaptureFixture) -> None:
    def configure(module: Any) -> Any:
        module.body.requires_grad_(False)
        return torch.optim.AdamW(module.parameters())

    with caplog.at_level("INFO", "lightning.pytorch"):
        make_trainer(OptimizerSwap("NAMO"), fast_dev_run=True).fit(Own(configure))
    assert "NAMO replaces AdamW for 2 of 2 parameter tensors" in caplog.text


def test_two_swaps_of_one_module_are_refused_and_undone() -> None:
    model = Own(adamw)
    with pytest.raises(ValueError, match=r"NAMO is swapped in already by another OptimizerSwap.*MVNGrad cannot be"):
        make_trainer(OptimizerSwap("NAMO"), OptimizerSwap("MVNGrad")).fit(model)
    assert "configure_optimizers" not in vars(model)
    assert type(model.configure_optimizers()) is torch.optim.AdamW


def test_every_optimizer_of_a_module_is_replaced() -> None:
    def configure(module: Any) -> Any:
        first, second = torch.optim.Adam(module.body.parameters()), torch.optim.Adam(module.layer.parameters(), 1e-2)
        return [first, second], [torch.optim.lr_scheduler.StepLR(second, 1)]

    model = Own(configure, manual=True)
    trainer = make_trainer(OptimizerSwap("NAMO"))
    trainer.fit(model)
    assert [type(optimizer) for optimizer in trainer.optimizers] == [NAMO, NAMO]
    trained = [{p for group in o.param_groups for p in group["params"]} for o in trainer.optimizers]
    assert trained == [set(model.body.parameters()), set(model.layer.parameters())]
    assert [config.scheduler.optimizer for config in trainer.lr_scheduler_configs] == trainer.optimizers[1:]


def test_what_is_not_kept_is_said() -> None:
    def configure(module: Any) -> Any:
        return torch.optim.AdamW(module.parameters(), betas=(0.9, 0.95), amsgrad=True)

    with pytest.warns(UserWarning, match=r"OptimizerSwap: NAMO does not keep .*betas=\(0\.9, 0\.95\), amsgrad=True"):
        make_trainer(OptimizerSwap("NAMO"), fast_dev_run=True).fit(Own(configure))

    def failing(module: Any) -> Any:
        raise ImportError("no deepspeed here")

    with pytest.warns(UserWarning, match="configure_optimizers of Own fails.*no deepspeed.*trains all trainable"):
        make_trainer(OptimizerSwap("NAMO"), fast_dev_run=True).fit(Own(failing))


def test_tensors_outside_of_the_module_are_trained(recwarn: Any) -> None:
    class Temperature(Own):
        def __init__(self, alone: bool) -> None:
            super().__init__(lambda m: torch.optim.Adam([m.temperature, *([] if alone else m.parameters())]))
            self.temperature = torch.ones(1, requires_grad=True)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self(batch) * self.temperature).square().mean()

    for alone, optimizer in ((True, torch.optim.Adam), (False, NAMO)):
        model = Temperature(alone)
        trainer = make_trainer(OptimizerSwap("NAMO"))
        trainer.fit(model)
        assert type(trainer.optimizers[0]) is optimizer
        assert model.temperature != 1


# Lightning advances plateaus after the hook in which this checkpoint is written, with any optimizer.
@pytest.mark.parametrize("schedule", ["cosine", "sequential", "every second step", "list"])
def test_a_run_with_the_modules_schedule_resumes_exactly(schedule: str, tmp_path: Any) -> None:
    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    def fit(*callbacks: pl.Callback, **arguments: Any) -> Own:
        torch.manual_seed(0)
        model, data = Own(SCHEDULES[schedule]), BoringDataModule()
        make_trainer(OptimizerSwap("NAMO"), *callbacks, max_epochs=3, limit_val_batches=1).fit(
            model, datamodule=data, **arguments
        )
        return model

    whole, resumed = fit(Save()), fit(ckpt_path=tmp_path / "0.ckpt")
    assert resumed.rates == whole.rates[3:]
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters()))
