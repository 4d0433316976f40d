"""Every optimizer at every precision with everything that Lightning does around a step, in automatic optimization.

One run is a cell (optimizer, precision, feature). Whatever the feature, the loss has to fall, the parameters have to
follow the float32 run of the same cell, and repeating the recorded gradients and learning rates outside of Lightning
has to end at the same parameters. What the feature itself promises is checked against its definition.

By default the cells cover all pairs of optimizer and precision, optimizer and feature, and precision and feature, but
for torch.compile, which takes seconds; the cells that are left are marked slow. With Inductor, which takes longest,
every optimizer has one cell.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import OptimizerConfig, build_optimizer

from ..optimizers.rows import OURS, ROWS

#: How far parameters may end from those of the float32 run, as a fraction of the way they went. Gradients of 11 and 8
#: bits (float16, bfloat16) differ by about 1e-3 and 1e-2, which normalising small entries amplifies; parameters of 8
#: bits are rounded by up to 2e-3 of their size in every step, of which a step here is a few times as much. Rounding to
#: float32 alone is seen where eigenvalues of a preconditioner of SOAP or DeVA come close.
PRECISIONS = {"32-true": 1e-3, "64-true": 0.02, "16-mixed": 0.1, "bf16-mixed": 0.2, "16-true": 0.1, "bf16-true": 0.6}
DTYPES = {"64-true": torch.float64, "16-true": torch.float16, "bf16-true": torch.bfloat16}

BATCHES, EPOCHS, SAMPLES = 4, 3, 16


@dataclass
class Record:
    """One step as it was made."""

    before_clipping: list[Tensor]
    gradients: list[Tensor]
    groups: list[dict[str, Any]]
    parameters: list[Tensor]


@dataclass
class Run:
    """A finished training."""

    model: Model
    trainer: pl.Trainer
    initial: list[Tensor]
    losses: tuple[float, float]
    epoch_starts: list[list[Tensor]] = field(default_factory=list)

    @property
    def records(self) -> list[Record]:
        return self.model.records

    @property
    def final(self) -> list[Tensor]:
        return copies(self.model.parameters())


def copies(tensors: Any) -> list[Tensor]:
    return [x.detach().clone() for x in tensors]


class Model(pl.LightningModule):
    """Regression; records its optimizer's steps."""

    def __init__(self, name: str, feature: Feature) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.name, self.feature = name, feature
        self.automatic_optimization = not feature.manual
        self.records: list[Record] = []
        self.unclipped: list[Tensor] = []
        self.starts: list[list[Tensor]] = []

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = (t.to(self.net[0].weight.dtype) for t in batch)
        return (self.net(x) - y).square().mean()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        loss = self.loss(batch)
        if self.feature.spoil and self.trainer.current_epoch == 1 and batch_idx == 1:
            loss = loss * float("inf")
        self.log("loss", loss, on_epoch=True, on_step=False)
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def on_train_epoch_start(self) -> None:
        self.starts.append(copies(self.parameters()))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.unclipped = copies(p.grad for p in self.parameters())

    def build(self, **settings: Any) -> torch.optim.Optimizer:
        return build_optimizer(self, OptimizerConfig(self.name, {"lr": ROWS[self.name].lr} | settings))

    def configure_optimizers(self) -> Any:
        optimizer = self.build()

        def record(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            groups = [
                {key: group[key] for key in ("lr", "betas", "momentum") if key in group}
                for group in optimizer.param_groups
            ]
            grads = copies(p.grad for p in self.parameters())
            self.records.append(Record(self.unclipped, grads, groups, copies(self.parameters())))

        optimizer.register_step_post_hook(record)
        scheduler = self.feature.scheduler(optimizer) if self.feature.scheduler else None
        if scheduler is None:
            return optimizer
        interval = "epoch" if isinstance(scheduler, ReduceLROnPlateau) else "step"
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": interval, "monitor": "loss"},
        }


def data(batch_size: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES * BATCHES, 8, generator=generator)
    y = (x @ torch.randn(8, 8, generator=generator)).sin()
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


# --- features -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Feature:
    """What happens around the steps, and what has to be seen of it."""

    check: Callable[[Run], None]
    trainer: Callable[[], dict[str, Any]] = dict
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    manual: bool = False
    spoil: bool = False
    compiled: str = ""
    steps: int = BATCHES * EPOCHS


def norm(tensors: list[Tensor]) -> float:
    return float(torch.cat([x.double().flatten() for x in tensors]).norm())


def clipped_by_norm(run: Run) -> None:
    assert any(norm(r.before_clipping) > 0.1 for r in run.records)
    for r in run.records:
        total = norm(r.before_clipping)
        factor = min(1.0, 0.1 / total)
        for before, after in zip(r.before_clipping, r.gradients):
            # The norm and the product are rounded to the gradients' dtype.
            torch.testing.assert_close(after, before * factor, rtol=4 * torch.finfo(after.dtype).eps, atol=1e-6)


def clipped_by_value(run: Run) -> None:
    assert any(x.abs().max() > 0.04 for r in run.records for x in r.before_clipping)
    for r in run.records:
        for before, after in zip(r.before_clipping, r.gradients):
            assert torch.equal(after, before.clamp(-0.04, 0.04))


def accumulated(run: Run) -> None:
    """Two batches make one of twice the size."""
    plain = Feature(check=accumulated, trainer=dict, steps=EPOCHS * BATCHES // 2)
    precision = run.trainer.precision
    whole = train(run.model.name, str(precision), plain, run.trainer.strategy.root_device.type, batch_size=2 * SAMPLES)
    assert distance(run, whole) <= PRECISIONS[str(precision)]


def one_cycle(optimizer: torch.optim.Optimizer) -> OneCycleLR:
    peaks = [2 * group["lr"] for group in optimizer.param_groups]
    averages = cycles_momentum(optimizer)
    return OneCycleLR(optimizer, peaks, total_steps=BATCHES * EPOCHS + 1, div_factor=4, cycle_momentum=averages)


def cycled(run: Run) -> None:
    """All groups follow the cycle of one that torch itself is known to cycle."""
    for i, group in enumerate(run.records[0].groups):
        sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], group["lr"] * 2, momentum=0.9)
        schedule = one_cycle(sgd)
        for r in run.records:
            expected, seen = sgd.param_groups[0], r.groups[i]
            assert seen["lr"] == pytest.approx(expected["lr"])
            if cycles_momentum(run.trainer.optimizers[0]):
                assert effective_momentum(seen) == pytest.approx(expected["momentum"])
            sgd.step()
            schedule.step()
    if cycles_momentum(run.trainer.optimizers[0]):
        assert len({effective_momentum(r.groups[-1]) for r in run.records}) > 5


def cycles_momentum(optimizer: torch.optim.Optimizer) -> bool:
    """Whether torch can cycle the momentum of an optimizer."""
    return not {"momentum", "betas"}.isdisjoint(optimizer.defaults)


def effective_momentum(group: dict[str, Any]) -> float:
    """What a schedule wrote: ``repeat`` finds out whether the step was made with it."""
    return group["momentum"] if "momentum" in group else group["betas"][0]


def plateau(optimizer: torch.optim.Optimizer) -> ReduceLROnPlateau:
    return ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1.0)  # No loss falls by all of itself.


def reduced(run: Run) -> None:
    first = [group["lr"] for group in run.records[0].groups]
    for i, r in enumerate(run.records):
        halvings = i // BATCHES
        assert [group["lr"] for group in r.groups] == pytest.approx([lr * 0.5**halvings for lr in first])


def as_in_automatic_optimization(run: Run) -> None:
    other = train(run.model.name, str(run.trainer.precision), PLAIN, run.trainer.strategy.root_device.type)
    for a, b in zip(run.final, other.final):
        assert torch.equal(a, b)


def as_uncompiled(run: Run) -> None:
    precision = str(run.trainer.precision)
    other = train(run.model.name, precision, PLAIN, run.trainer.strategy.root_device.type)
    assert distance(run, other) <= PRECISIONS[precision]


def averaged(run: Run) -> None:
    """The weights are the exponential average of those after each step."""
    average = [x.double() for x in run.records[0].parameters]
    for r in run.records[1:]:
        average = [0.5 * a + 0.5 * x.double() for a, x in zip(average, r.parameters)]
    compare_average(run, average)


def averaged_over_epochs(run: Run) -> None:
    """The weights are the mean of those at the starts of the second and third epoch."""
    mean = [(a.double() + b.double()) / 2 for a, b in zip(*run.model.starts[1:])]
    compare_average(run, mean)
    # Annealed within one epoch.
    assert all(group["lr"] == pytest.approx(0.005) for group in run.records[-1].groups)


def compare_average(run: Run, average: list[Tensor]) -> None:
    for x, expected in zip(run.final, average):
        # Rounded at every averaging.
        eps = torch.finfo(x.dtype).eps
        torch.testing.assert_close(x.double(), expected, rtol=4 * eps, atol=4 * eps * float(expected.abs().max()))


def skipped(run: Run) -> None:
    """The step with the infinite loss changed nothing and was counted, by the loss scaler or by the optimizer."""
    scaler = getattr(run.trainer.precision_plugin, "scaler", None)
    spoiled = BATCHES + 1
    if scaler is not None:
        assert len(run.records) == BATCHES * EPOCHS - 1
        assert scaler.get_scale() == 512.0
    else:
        assert len(run.records) == BATCHES * EPOCHS
        assert run.trainer.optimizers[0].skipped_steps == 1
        for a, b in zip(run.records[spoiled - 1].parameters, run.records[spoiled].parameters):
            assert torch.equal(a, b)


def nothing(run: Run) -> None:
    pass


PLAIN = Feature(nothing)
FEATURES = {
    "clip by norm": Feature(clipped_by_norm, lambda: {"gradient_clip_val": 0.1}),
    "clip by value": Feature(clipped_by_value, lambda: {"gradient_clip_val": 0.04, "gradient_clip_algorithm": "value"}),
    "accumulation": Feature(accumulated, lambda: {"accumulate_grad_batches": 2}, steps=BATCHES * EPOCHS // 2),
    "OneCycleLR": Feature(cycled, scheduler=one_cycle),
    "ReduceLROnPlateau": Feature(reduced, scheduler=plateau),
    "manual optimization": Feature(as_in_automatic_optimization, manual=True),
    "torch.compile": Feature(as_uncompiled, compiled="aot_eager"),
    "Inductor": Feature(as_uncompiled, compiled="inductor"),
    "WeightAveraging": Feature(averaged, lambda: {"callbacks": [WeightAveraging(avg_fn=get_ema_avg_fn(0.5))]}),
    "StochasticWeightAveraging": Feature(
        averaged_over_epochs,
        lambda: {"callbacks": [StochasticWeightAveraging(0.005, swa_epoch_start=2, annealing_epochs=1)]},
    ),
    "an infinite loss": Feature(skipped, spoil=True),
}


# --- training ---------------------------------------------------------------------------------------------------------


def train(name: str, precision: str, feature: Feature, accelerator: str = "cpu", batch_size: int = SAMPLES) -> Run:
    model = Model(name, feature)
    options: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":  # Lightning itself offers it on GPUs only.
        scaler = torch.amp.GradScaler(accelerator, init_scale=1024.0)
        options = {"plugins": [MixedPrecision("16-mixed", accelerator, scaler)]}
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=1,
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
        **feature.trainer(),
    )
    initial = copies(model.to(DTYPES.get(precision, torch.float32)).parameters())
    first = full_loss(model)
    torch._dynamo.reset()  # What others have compiled does not count towards the limit on recompilations.
    trainer.fit(torch.compile(model, backend=feature.compiled) if feature.compiled else model, data(batch_size))
    return Run(model, trainer, initial, (first, full_loss(model)))


@torch.no_grad()
def full_loss(model: Model) -> float:
    wide = copy.deepcopy(model.net).double().cpu()
    x, y = (t.double() for t in next(iter(data(SAMPLES * BATCHES))))
    return float((wide(x) - y).square().mean())


@cache
def in_float32(name: str, feature: str) -> Run:
    return train(name, "32-true", FEATURES[feature])


def distance(run: Run, other: Run) -> float:
    """Between the ends of two runs, as a fraction of the way the second went."""
    apart = norm([a.double().cpu() - b.double().cpu() for a, b in zip(run.final, other.final)])
    way = norm([a.double().cpu() - b.double().cpu() for a, b in zip(other.final, other.initial)])
    return apart / way


def repeat(run: Run) -> list[Tensor]:
    """The parameters after the recorded gradients and hyperparameters, outside of Lightning."""
    model = Model(run.model.name, PLAIN).to(run.initial[0].dtype)
    for p, x in zip(model.parameters(), run.initial):
        p.data = x.clone()
    optimizer = model.build(backend="plain")
    for r in run.records:
        for p, g in zip(model.parameters(), r.gradients):
            p.grad = g.clone()
        for group, seen in zip(optimizer.param_groups, r.groups):
            group["lr"] = seen["lr"]
            if "betas" in group:
                group["betas"] = (effective_momentum(seen), group["betas"][1])
            elif "momentum" in group:
                group["momentum"] = seen["momentum"]
        optimizer.step()
    return copies(model.parameters())


# --- the cells --------------------------------------------------------------------------------------------------------


def cells() -> Iterator[Any]:
    for i, name in enumerate(OURS):
        for k, precision in enumerate(PRECISIONS):
            for j, feature in enumerate(FEATURES):
                if feature == "Inductor" and k != i % len(PRECISIONS):
                    continue
                if feature == "an infinite loss" and name == "ELRA":
                    continue  # It takes the last step back.
                default = k == (i + j) % len(PRECISIONS) and not (FEATURES[feature].compiled and i % 6)
                default = default and feature != "Inductor"
                marks = [] if default else [pytest.mark.slow]
                yield pytest.param(name, precision, feature, id=f"{name}-{precision}-{feature}", marks=marks)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("name", "precision", "feature"), cells())
def test_cell(name: str, precision: str, feature: str, accelerator: str) -> None:
    if accelerator == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    known = precision == "32-true" and accelerator == "cpu"
    run = in_float32(name, feature) if known else train(name, precision, FEATURES[feature], accelerator)
    FEATURES[feature].check(run)
    if not FEATURES[feature].spoil:
        assert len(run.records) == FEATURES[feature].steps
    assert run.losses[1] < run.losses[0]
    # AdmetaS sums gradients up, so that a step is ten gradients long and what bfloat16 loses of it, too.
    most = PRECISIONS[precision] * (1.5 if name == "AdmetaS" else 1)
    assert distance(run, in_float32(name, feature)) <= most
    for x, y in zip(repeat(run), run.records[-1].parameters):
        torch.testing.assert_close(x, y)  # Sums may be taken in another order.
    dtype = DTYPES.get(precision, torch.float32)
    assert all(p.dtype == dtype for p in run.model.parameters())
    for state in run.trainer.optimizers[0].state.values():
        assert all(x.dtype in (torch.float32, torch.float64) for name, x in state.items() if name != "step")


def test_the_default_cells_cover_all_pairs() -> None:
    every = [cell.values for cell in cells() if not FEATURES[cell.values[2]].compiled]
    default = [cell.values for cell in cells() if not cell.marks]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert {(cell[a], cell[b]) for cell in every} == {(cell[a], cell[b]) for cell in default if cell in every}
