"""Probes leave the run alone, values are of what the optimizer consumed, and no measurement ends a run."""

from __future__ import annotations

import functools
from collections import deque
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn

from lightning_optim.callbacks import GradientHealth, UpdateSize, UpdateVariance
from lightning_optim.callbacks.isolation import StandInTrainer, classes_of, kept_globals, not_isolated
from lightning_optim.callbacks.monitor import Monitor, Results
from lightning_optim.callbacks.recorder import Step, StepRecorder

BANK: dict[str, Tensor] = {}
NAMES: deque[str] = deque(["a"])
SETTINGS = {"weight": 0.1}
CRITERION = nn.MSELoss()


def fit(module: pl.LightningModule, *callbacks: pl.Callback, steps: int = 4, **kwargs: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        max_steps=steps, callbacks=list(callbacks), accelerator="cpu", devices=1, logger=False, limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **kwargs,
    )  # fmt: skip
    trainer.fit(module)
    return trainer


# --- what a copy shares -----------------------------------------------------------------------------------------


class PreHook(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        seen: list[Any] = []
        self.register_forward_pre_hook(lambda module, args: seen.append(args))


class Partial(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.regularizer = functools.partial(lambda weight: self.weight.square().sum() * weight, 0.1)


class Bank(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        BANK["last"] = x
        return super().forward(x)


class Nested(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([(lambda y: y + len(BANK))(x)]).sum(0)


class Bound(nn.Linear):
    """A hook that is a method is copied with its module."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.register_forward_hook(self.note)

    def note(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.last = output.detach()


class Constants(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        NAMES.append("b")
        return CRITERION(super().forward(x), x) * SETTINGS["weight"]


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (PreHook, "a hook is a function that holds"),
        (Partial, "its attribute 'regularizer' is a function that holds other objects"),
        (lambda: Bank(2, 2), "uses the global 'BANK' (a dict)"),
        (lambda: Nested(2, 2), "uses the global 'BANK' (a dict)"),
        (Bound, ""),
        (lambda: Constants(2, 2), ""),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), ""),
        (lambda: nn.Sequential(nn.BatchNorm1d(2), PreHook()), "a hook of '1' is a function"),
    ],
)  # fmt: skip
def test_what_a_copy_shares_is_named(cls: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BANK, "last", torch.ones(1))
    found = not_isolated(cls())
    assert found.find(reason) >= 0 if reason else found == ""


def test_plain_globals_are_put_back() -> None:
    module = Constants(2, 2)
    with kept_globals(classes_of(module)):
        module(torch.ones(1, 2))
        assert list(NAMES) == ["a", "b"]
    assert list(NAMES) == ["a"]


def test_a_stand_in_trainer_takes_what_is_assigned() -> None:
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    stand_in = StandInTrainer(trainer)
    stand_in.should_stop = True
    stand_in.callback_metrics["loss"] = 1.0
    stand_in.logger.log_metrics({"loss": 1.0})
    assert not trainer.should_stop
    assert "loss" not in trainer.callback_metrics
    assert stand_in.max_epochs == trainer.max_epochs


class Fails(BoringModel):
    """Its second call within a step, which is a probe's, raises something."""

    error: type[Exception] = TypeError

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if getattr(self, "_copied", False):
            raise self.error("only once per step")
        self.__dict__["_copied"] = False
        return super().training_step(batch, batch_idx)

    def __deepcopy__(self, memo: Any) -> Any:
        twin = type(self)()
        twin.load_state_dict(self.state_dict())
        twin.__dict__["_copied"] = True
        return twin


@pytest.mark.parametrize("error", [TypeError, StopIteration, ZeroDivisionError, AttributeError])
def test_a_probe_that_raises_is_left_out(error: type[Exception]) -> None:
    module = Fails()
    module.error = Fails.error = error
    with pytest.warns(UserWarning, match="UpdateVariance leaves probes out of this run"):
        trainer = fit(module, UpdateVariance(every_n_steps=1, probe_every_n_steps=2))
    assert trainer.global_step == 4


# --- what the optimizer consumed --------------------------------------------------------------------------------


class Overwriting(torch.optim.SGD):
    """Doubles gradients in place before it steps, as torch's foreach optimizers add to them."""

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(3)
        super().step()
        return loss


class With(BoringModel):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make
        self.norms: list[float] = []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.norms.append(float(torch.stack([p.grad.norm() for p in self.parameters()]).norm()))

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda p: Overwriting(p, 0.01),
        lambda p: torch.optim.Adagrad(p, 0.01, foreach=True, maximize=True),
        lambda p: torch.optim.SGD(p, 0.01, momentum=0.5, nesterov=True, foreach=True, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, 0.01, foreach=False),
    ],
)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_gradients_are_those_that_the_step_consumed(make: Any, clip: float | None) -> None:
    module, health, size = With(make), GradientHealth(every_n_steps=1), UpdateSize(every_n_steps=1)
    fit(module, health, size, steps=5, gradient_clip_val=clip)
    assert [v for _, v in health.history["gradient/norm"]] == pytest.approx(module.norms, rel=1e-5)
    if clip is None:
        assert {v for _, v in health.history["gradient/clipped_fraction"]} == {0.0}
    else:
        clipped = [min(norm, clip) for norm in module.norms]
        assert [v for _, v in health.history["gradient/norm_clipped"]] == pytest.approx(clipped, rel=1e-4)


# --- nothing ends a run -----------------------------------------------------------------------------------------


class Broken(Monitor):
    family = "broken"

    def __init__(self, where: str) -> None:
        super().__init__(every_n_steps=1)
        self.where = where

    def before_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> bool | None:
        return self.fail("before_step")

    def sums(self, step: Step) -> dict[str, Tensor]:
        self.fail("sums")
        return {"numel": step.change.numel}

    def results(self, step: Step, sums: dict[str, Tensor]) -> Results:
        self.fail("results")
        return Results({})

    def fail(self, where: str) -> None:
        if where == self.where:
            raise NotImplementedError("quantised tensors have no norm")


@pytest.mark.parametrize("where", ["before_step", "sums", "results"])
def test_a_measurement_that_fails_ends_nothing(where: str) -> None:
    size = UpdateSize(every_n_steps=1)
    with pytest.warns(UserWarning, match=r"Broken could not measure a step .*quantised.*Parameters: layer\.weight"):
        trainer = fit(BoringModel(), Broken(where), size)
    assert trainer.global_step == 4
    assert len(size.history["update/rms"]) == 4


class Complex(BoringModel):
    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx)["loss"] + (self.phase.abs() - 2).square().sum()


def test_complex_parameters_are_measured_as_their_real_view() -> None:
    size = UpdateSize(every_n_steps=1, parameters=["phase"])
    module = Complex()
    fit(module, size, steps=1)
    moved = torch.view_as_real(module.phase.detach() - 1)
    assert size.history["update/rms"][0][1] == pytest.approx(float(moved.square().mean().sqrt()), rel=1e-5)


def test_overhead_of_two_optimizers_is_read_once_per_batch() -> None:
    class Two(BoringModel):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.other = nn.Linear(32, 2)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer, layer in zip(self.optimizers(), (self.layer, self.other)):
                optimizer.zero_grad()
                self.manual_backward(layer(batch).sum())
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(layer.parameters(), 1e-3) for layer in (self.layer, self.other)]

    reads = []

    class Reads(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            clock = StepRecorder.of(trainer)._clock
            reads.append((clock._batches_read, clock._batches))

    fit(Two(), UpdateSize(every_n_steps=1), Reads(), steps=8)
    assert all(read in (batches, batches - 1, 0) for read, batches in reads)
    assert len({read for read, _ in reads}) == len(reads)
