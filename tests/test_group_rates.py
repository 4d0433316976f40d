"""One value for groups that have several: scaled where we build, told where it comes from outside."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import count
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, StochasticWeightAveraging
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    SequentialLR,
)
from torch.optim.swa_utils import SWALR
from torch.utils.data import DataLoader

from lightning_optim import Grouping, OptimizerMixin, build_optimizer, configure_optimizers
from lightning_optim.callbacks import OptimizerSwap

GROUPING = Grouping(lr_multipliers={"0.*": 0.1})


def make_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))


def ratios(optimizer: Optimizer) -> list[float]:
    """Learning rates of all groups over that of the first."""
    first = optimizer.param_groups[0]["lr"]
    return [group["lr"] / first for group in optimizer.param_groups]


def advance(optimizer: Optimizer, scheduler: Any, *args: Any) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    scheduler.step(*args)


@pytest.mark.parametrize(
    ("name", "args", "highest"),
    [
        ("OneCycleLR", {"max_lr": 0.03}, 0.03),
        ("CyclicLR", {"base_lr": 0.003, "max_lr": 0.03, "step_size_up": 5}, 0.03),
        ("torch.optim.swa_utils.SWALR", {"swa_lr": 0.03, "anneal_epochs": 4}, 0.03),
        ("WarmupCosine", {"warmup": 3}, 0.02),
    ],
)
@pytest.mark.parametrize("optimizer", ["NAMO", "Muon", "AdamW"])
def test_schedules_that_we_build_keep_the_ratios_of_groups(
    name: str, args: dict[str, Any], highest: float, optimizer: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        made = configure_optimizers(make_net(), optimizer, {"name": name, "args": args}, GROUPING, 20, lr=0.02)
        built, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
        expected = ratios(build_optimizer(make_net(), optimizer, GROUPING, lr=0.02))
        reached = 0.0
        for _ in range(19):
            assert ratios(built) == pytest.approx(expected)
            reached = max(reached, max(group["lr"] for group in built.param_groups))
            advance(built, scheduler)
    assert reached == pytest.approx(highest, rel=0.1)  # a cycle may turn between two steps


def test_the_lowest_rate_of_a_plateau_is_scaled() -> None:
    plateau = {"name": "ReduceLROnPlateau", "args": {"patience": 0, "factor": 0.01, "min_lr": 1e-3}, "monitor": "loss"}
    made = configure_optimizers(make_net(), "NAMO", plateau, GROUPING)
    expected = ratios(made["optimizer"])
    for _ in range(4):
        advance(made["optimizer"], made["lr_scheduler"]["scheduler"], 1.0)
    assert ratios(made["optimizer"]) == pytest.approx(expected)
    assert max(group["lr"] for group in made["optimizer"].param_groups) == pytest.approx(1e-3)


def written_by_hand(optimizer: Optimizer) -> Callable[[], None]:
    def step() -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.015
        optimizer.step()

    return step


def loop_of(rate: Callable[[int], float]) -> Callable[[Optimizer], Callable[[], None]]:
    """A training loop that computes the learning rate itself, as nanoGPT's."""

    def prepare(optimizer: Optimizer) -> Callable[[], None]:
        steps = count()

        def step() -> None:
            lr = rate(next(steps))
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()

        return step

    return prepare


def scheduled(make: Callable[[Optimizer], Any]) -> Callable[[Optimizer], Callable[[], None]]:
    def prepare(optimizer: Optimizer) -> Callable[[], None]:
        scheduler = make(optimizer)
        return lambda: advance(optimizer, scheduler)

    return prepare


@pytest.mark.parametrize(
    "prepare",
    [
        written_by_hand,
        scheduled(lambda o: OneCycleLR(o, max_lr=0.05, total_steps=30)),
        scheduled(lambda o: SWALR(o, swa_lr=0.05)),
        loop_of(lambda step: 1e-5 * (step + 1)),  # low for all, and no schedule's beginning or end
        loop_of(lambda step: np.float32(0.015)),
        scheduled(lambda o: CosineAnnealingLR(o, 20, eta_min=0.009)),
        scheduled(lambda o: CosineAnnealingWarmRestarts(o, 20, eta_min=0.009)),
    ],
)
@pytest.mark.parametrize("optimizer", ["NAMO", "AdamW"])
def test_one_rate_from_outside_is_told_once_with_names_and_rates(prepare: Any, optimizer: str) -> None:
    built = build_optimizer(make_net(), optimizer, GROUPING, lr=0.02)
    step = prepare(built)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(5):
            step()
    (told,) = [str(w.message) for w in said if "one learning rate for all parameter groups" in str(w.message)]
    assert "/0.* 0.00" in told
    assert "list" in told


@pytest.mark.parametrize(
    "make",
    [
        lambda o: CosineAnnealingLR(o, 5),  # ends at zero for all
        lambda o: CosineAnnealingLR(o, 5, eta_min=1e-5),
        lambda o: LambdaLR(o, lambda step: 1 / (step + 1)),
        lambda o: LinearLR(o, 0.1, total_iters=3),
        lambda o: OneCycleLR(o, [0.1 * group["lr"] for group in o.param_groups], total_steps=8),
        lambda o: OneCycleLR(o, [30 * group["lr"] for group in o.param_groups], total_steps=8),
        lambda o: SequentialLR(o, [ConstantLR(o, 0.0, 2), CosineAnnealingLR(o, 3, 1e-6)], [2]),
    ],
)
def test_what_keeps_ratios_or_ends_low_is_not_told(make: Any) -> None:
    built = build_optimizer(make_net(), "NAMO", GROUPING)
    step = scheduled(make)(built)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(7):
            step()
        alike = build_optimizer(make_net(), "AdamW")
        for _ in range(2):
            written_by_hand(alike)()


def test_a_floor_above_a_groups_rate_is_told() -> None:
    with pytest.warns(UserWarning, match=r"CosineAnnealingLR\(eta_min=0\.005\).*fallback"):
        configure_optimizers(make_net(), "NAMO", {"name": "CosineAnnealingLR", "args": {"T_max": 9, "eta_min": 5e-3}})


# --- weight decay -----------------------------------------------------------------------------------------------------


def all_groups(value: float) -> Callable[[Optimizer, int], None]:
    def write(optimizer: Optimizer, step: int) -> None:
        for group in optimizer.param_groups:
            group["weight_decay"] = value

    return write


def cosine(optimizer: Optimizer, step: int) -> None:
    """DINO's schedule of weight decay, without its condition."""
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.4 - 0.3 * math.cos(math.pi * step / 4)


def of_the_first(optimizer: Optimizer, step: int) -> None:
    for group in optimizer.param_groups[1:]:
        group["weight_decay"] = optimizer.param_groups[0]["weight_decay"]


def in_proportion(optimizer: Optimizer, step: int) -> None:
    for group in optimizer.param_groups:
        group["weight_decay"] *= 0.9


@pytest.mark.parametrize("write", [all_groups(0.1), all_groups(0.3), cosine, of_the_first])
@pytest.mark.parametrize("optimizer", ["NAMO", "MVNGrad", "AdamW"])
def test_one_weight_decay_from_outside_is_told_once(write: Any, optimizer: str) -> None:
    built = build_optimizer(make_net(), optimizer, weight_decay=0.1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(4):
            write(built, step)
            built.step()
    (told,) = [str(w.message) for w in said if "one weight decay for all" in str(w.message)]
    assert "no_decay 0," in told or "no_decay 0." in told
    assert " 0.1" in told


@pytest.mark.parametrize("write", [in_proportion, all_groups(0.0), lambda optimizer, step: None])
def test_weight_decays_in_proportion_or_switched_off_are_not_told(write: Any) -> None:
    built = build_optimizer(make_net(), "NAMO", weight_decay=0.1)
    alike = build_optimizer(make_net(), "MVNGrad", Grouping(no_decay=[]), weight_decay=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            write(built, step)
            built.step()
            cosine(alike, step)
            alike.step()


# --- Lightning's learning-rate finder ---------------------------------------------------------------------------------


class Plain(pl.LightningModule):
    """Its own optimizer, and what every training step finds in it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()
        self.lr = 1e-3
        self.seen: set[tuple[float, ...]] = set()

    def training_step(self, batch: torch.Tensor, i: int) -> torch.Tensor:
        self.seen.add(tuple(round(x, 6) for x in ratios(self.trainer.optimizers[0])))
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), self.lr)


class Mixed(OptimizerMixin, Plain):
    optimizer = {"name": "NAMO", "args": {"lr": 0.02, "fallback_lr": 1e-3}}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.lr = None


def data() -> DataLoader:
    return DataLoader(torch.randn(240, 8, generator=torch.Generator().manual_seed(0)), 8)


def trainer(folder: Any, *callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": folder, **quiet, **arguments}
    return pl.Trainer(callbacks=list(callbacks), **settings)


@pytest.mark.filterwarnings("error:.*one learning rate:UserWarning")
@pytest.mark.parametrize("mode", ["exponential", "linear"])
@pytest.mark.parametrize(("module", "swap", "share"), [(Mixed, False, 0.05), (Plain, True, 0.1)])
def test_a_search_keeps_ratios_and_its_rate_is_used(tmp_path, module, swap, share, mode) -> None:
    torch.manual_seed(0)
    model = module()
    run = trainer(tmp_path, *([OptimizerSwap("NAMO")] if swap else []))
    found = Tuner(run).lr_find(model, data(), num_training=25, min_lr=1e-4, max_lr=1e-1, mode=mode, attr_name="lr")
    assert {tuple(sorted(set(ratio), reverse=True)) for ratio in model.seen} == {(1.0, share)}
    assert model.lr == found.suggestion()
    model.seen.clear()
    run.fit(model, data())
    assert {tuple(sorted(set(ratio), reverse=True)) for ratio in model.seen} == {(1.0, share)}
    assert max(group["lr"] for group in run.optimizers[0].param_groups) == pytest.approx(found.suggestion())


@pytest.mark.filterwarnings("error:.*one learning rate:UserWarning")
def test_training_goes_on_with_ratios_after_a_search_by_callback(tmp_path) -> None:
    torch.manual_seed(0)
    model, finder = Mixed(), LearningRateFinder(min_lr=1e-4, max_lr=1e-1, num_training_steps=25)
    run = trainer(tmp_path, finder)
    run.fit(model, data())
    assert {tuple(sorted(set(ratio), reverse=True)) for ratio in model.seen} == {(1.0, 0.05)}
    assert max(g["lr"] for g in run.optimizers[0].param_groups) == pytest.approx(finder.optimal_lr.suggestion())


def test_the_rate_of_the_mixin_replaces_the_optimizers() -> None:
    model = Mixed()
    model.lr = 0.1
    optimizer = model.configure_optimizers()["optimizer"]
    assert {group["role"]: group["lr"] for group in optimizer.param_groups} == {
        "matrix": 0.1,
        "fallback": pytest.approx(5e-3),
    }


def test_one_rate_of_lightnings_weight_averaging_is_told(tmp_path) -> None:
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1)
    with pytest.warns(UserWarning, match=r"swa_lr.*one learning rate"):
        trainer(tmp_path, swa, max_epochs=3, limit_train_batches=2).fit(Mixed(), data())
