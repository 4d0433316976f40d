"""What user code keeps, hooks and logs is the same with probes as without."""

from __future__ import annotations

import random
import warnings
from collections import deque
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_optim.callbacks import SpikeResponse, UpdateVariance

QUEUE: deque[Tensor] = deque(maxlen=3)


class Remembers(Logger):
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Any] = []

    name, version = "remembers", 0

    @property
    def experiment(self) -> Remembers:
        return self

    def add_scalar(self, *line: Any) -> None:
        self.lines.append(line)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        plain = {k: v for k, v in metrics.items() if not k.startswith(("update_variance", "spike", "diagnostics"))}
        if plain:
            self.lines.append((plain, step))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


class Base(BoringModel):
    """Its loss depends on what it keeps, so that a probe that adds to it would show in the weights."""

    def kept(self) -> list[Any]:
        return []

    def extra(self, out: Tensor) -> Any:
        return 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.layer(batch)
        return out.square().mean() + self.extra(out)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


# --- memory banks -------------------------------------------------------------------------------------------------


class BufferBank(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(4, 2))
        self.at = 0

    def extra(self, out: Tensor) -> Tensor:
        loss = (out.mean(0) @ self.bank.clone().T).sum()
        self.bank[self.at % 4] = out.detach().mean(0)
        self.at += 1
        return loss

    def kept(self) -> list[Any]:
        return [self.bank, self.at]


class GlobalBank(Base):
    def extra(self, out: Tensor) -> Tensor:
        QUEUE.append(out.detach().mean(0))
        return torch.stack(list(QUEUE)).mean(0) @ out.mean(0)

    def kept(self) -> list[Any]:
        return list(QUEUE)


class ClassBank(Base):
    bank: ClassVar[list[Tensor]] = []

    def extra(self, out: Tensor) -> Tensor:
        type(self).bank.append(out.detach().mean(0))
        return torch.stack(type(self).bank).mean(0) @ out.mean(0)

    def kept(self) -> list[Any]:
        return list(type(self).bank)


# --- hooks with closures ------------------------------------------------------------------------------------------


class ListHook(Base):
    def __init__(self) -> None:
        super().__init__()
        self.seen = seen = []
        self.layer.register_forward_hook(lambda module, args, out: seen.append(out.detach().sum()))

    def kept(self) -> list[Any]:
        return self.seen


class CountingHook(Base):
    def __init__(self) -> None:
        super().__init__()
        counts = {"calls": 0}
        self.counts = lambda: counts["calls"]

        def count(module: nn.Module, args: Any) -> None:
            counts["calls"] += 1

        self.layer.register_forward_pre_hook(count)

    def kept(self) -> list[Any]:
        return [self.counts()]


class RunningMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


class HookWithModule(Base):
    """A hook that goes through a layer with running statistics, which is no part of the module."""

    def __init__(self) -> None:
        super().__init__()
        norm = RunningMean()
        self.statistics = lambda: [norm.mean.clone()]
        self.layer.register_forward_hook(lambda module, args, out: norm(out))

    def kept(self) -> list[Any]:
        return self.statistics()


# --- modules that keep their outputs ------------------------------------------------------------------------------


class KeepsGraph(Base):
    """A tensor with a graph, which cannot be copied."""

    def extra(self, out: Tensor) -> Any:
        self.last = out
        return 0.0

    def kept(self) -> list[Any]:
        return [self.last.detach()]


class KeepsList(Base):
    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []

    def extra(self, out: Tensor) -> Any:
        self.outputs.append(out)
        return torch.stack([x.detach().mean() for x in self.outputs]).mean() * out.mean()

    def kept(self) -> list[Any]:
        return [x.detach() for x in self.outputs]


class KeepsInLayer(Base):
    def __init__(self) -> None:
        super().__init__()

        class Keeping(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                self.cache = {"x": x, "y": super().forward(x)}
                return self.cache["y"]

        self.layer = Keeping(32, 2)

    def kept(self) -> list[Any]:
        return [x.detach() for x in self.layer.cache.values()]


# --- steps that log -----------------------------------------------------------------------------------------------


class LogsMetrics(Base):
    def extra(self, out: Tensor) -> Any:
        self.logger.log_metrics({"mine": float(out.mean())}, step=self.global_step)
        return 0.0


class LogsToExperiment(Base):
    def extra(self, out: Tensor) -> Any:
        for logger in self.loggers:
            logger.experiment.add_scalar("mine", float(out.mean()), self.global_step)
        return 0.0


class LogsThroughTrainer(Base):
    def extra(self, out: Tensor) -> Any:
        self.log("mine", out.mean(), on_step=True, on_epoch=True, prog_bar=True)
        self.trainer.logger.log_metrics({"direct": float(out.mean())}, step=self.global_step)
        return 0.0


# --- optimizers of one's own --------------------------------------------------------------------------------------


STEPS: list[int] = []
HISTORY: dict[str, list[int]] = {"steps": []}


class CountsInAGlobal(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        STEPS.append(len(STEPS))
        return super().step(closure)


class CountsWithinAGlobal(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        HISTORY["steps"].append(len(HISTORY["steps"]))
        return super().step(closure)


class CountsInItsClass(torch.optim.SGD):
    steps: ClassVar[list[int]] = []

    def step(self, closure: Any = None) -> Any:
        self.steps.append(len(self.steps))
        return super().step(closure)


class OwnOptimizer(Base):
    """Trains with the optimizer of a function, which closes over a list that is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        for kept in (STEPS, HISTORY["steps"], CountsInItsClass.steps):
            kept.clear()

    def kept(self) -> list[Any]:
        return [*self.steps, *STEPS, *HISTORY["steps"], *CountsInItsClass.steps]

    def configure_optimizers(self) -> Any:
        return self.optimizer_class()(self.parameters(), 0.1)

    def optimizer_class(self) -> Any:
        steps = self.steps

        class Counts(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                steps.append(len(steps))
                return super().step(closure)

        return Counts


class DecoratedOptimizer(OwnOptimizer):
    def optimizer_class(self) -> Any:
        steps = self.steps

        class Counts(torch.optim.SGD):
            @torch.no_grad()
            def step(self, closure: Any = None) -> Any:
                steps.append(len(steps))
                return super().step(closure)

        return Counts


class OptimizerWithAGlobal(OwnOptimizer):
    def optimizer_class(self) -> Any:
        return CountsInAGlobal


class DecoratedOptimizerWithAGlobal(OwnOptimizer):
    def optimizer_class(self) -> Any:
        return CountsWithinAGlobal


class OptimizerWithAClassVariable(OwnOptimizer):
    def optimizer_class(self) -> Any:
        return CountsInItsClass


# --- data and settings of the run -------------------------------------------------------------------------------


GIVEN: list[int] = []


def stacked(samples: list[Tensor]) -> Tensor:
    GIVEN.append(len(GIVEN))
    return torch.stack(samples) / len(GIVEN)


class Counting(Dataset[Tensor]):
    """Adds noise that falls with the number of samples given so far, from a generator of its own."""

    seen: ClassVar[dict[int, int]] = {}

    def __init__(self) -> None:
        self.seen.clear()
        GIVEN.clear()
        self.given = 0
        self.log: dict[str, list[int]] = {"indices": []}
        self.noise = np.random.default_rng(0)
        self.shift = random.Random(1)
        self.scale = torch.Generator().manual_seed(2)

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> Tensor:
        self.given += 1
        self.seen[i] = self.given
        self.log["indices"].append(i)
        noise = torch.from_numpy(self.noise.standard_normal(32)).float() * torch.rand(1, generator=self.scale)
        return noise / self.given + self.shift.random()


class OwnData(Base):
    def __init__(self) -> None:
        super().__init__()
        self.data = [Counting()]

    def train_dataloader(self) -> Any:
        return DataLoader(Subset(self.data[0], range(60)), batch_size=4, collate_fn=stacked)

    def kept(self) -> list[Any]:
        return [self.data[0].given, self.data[0].log["indices"], dict(Counting.seen), list(GIVEN)]


class Mixes:
    def __init__(self) -> None:
        self.calls = 0
        self.random = np.random.RandomState(0)

    def __call__(self, samples: list[Tensor]) -> Tensor:
        self.calls += 1
        return torch.stack(samples) * float(self.random.rand()) / self.calls


class OwnCollate(Base):
    def __init__(self) -> None:
        super().__init__()
        self.mixes = [Mixes()]

    def train_dataloader(self) -> Any:
        return DataLoader(RandomDataset(32, 64), batch_size=4, collate_fn=self.mixes[0])

    def kept(self) -> list[Any]:
        return [self.mixes[0].calls]


class ClosureCollate(OwnCollate):
    def train_dataloader(self) -> Any:
        mixes = self.mixes[0]
        return DataLoader(RandomDataset(32, 64), batch_size=4, collate_fn=lambda samples: mixes(samples))


class TransfersBatches(Base):
    """Augments batches by hooks that count."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = [0, 0]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls[0] += 1
        return batch / self.calls[0]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls[1] += 1
        return batch * self.calls[1] ** 0.5

    def kept(self) -> list[Any]:
        return list(self.calls)


class Augments(pl.LightningDataModule):
    """As :class:`TransfersBatches`, in the data module."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def train_dataloader(self) -> Any:
        return DataLoader(RandomDataset(32, 64), batch_size=4)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls += 1
        return batch / self.calls


class WithDataModule(Base):
    def __init__(self) -> None:
        super().__init__()
        self.data = [Augments()]

    def kept(self) -> list[Any]:
        return [self.data[0].calls]


class SetsTheRate(Base):
    def extra(self, out: Tensor) -> Any:
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] *= 0.9
        return 0.0


class StepsTheSchedule(Base):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, 3)]

    def extra(self, out: Tensor) -> Any:
        schedule: Any = self.lr_schedulers()
        schedule.step()
        return 0.0


MODULES = [
    BufferBank, GlobalBank, ClassBank, ListHook, CountingHook, HookWithModule, KeepsGraph, KeepsList, KeepsInLayer,
    LogsMetrics, LogsToExperiment, LogsThroughTrainer, OwnOptimizer, DecoratedOptimizer,
    OptimizerWithAGlobal, DecoratedOptimizerWithAGlobal, OptimizerWithAClassVariable, OwnData, OwnCollate,
    ClosureCollate, TransfersBatches, WithDataModule, SetsTheRate, StepsTheSchedule,
]  # fmt: skip


def trained(cls: type[Base], probes: bool) -> tuple[list[Tensor], list[Any], list[Any]]:
    pl.seed_everything(0, verbose=False)
    QUEUE.clear()
    ClassBank.bank.clear()
    module, logger, monitors = cls(), Remembers(), []
    if probes:
        monitors = [
            UpdateVariance(every_n_steps=2, probe_every_n_steps=2, batches=2),
            SpikeResponse(probe_every_n_steps=3, probe_scales=[10.0], probe_steps=2),
        ]
        for monitor in monitors:
            monitor.probes_optional = True  # as `Diagnostics` sets it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Where a module cannot be isolated, probes are left out, after a warning.
        trainer = pl.Trainer(
            max_steps=8, callbacks=monitors, accelerator="cpu", devices=1, logger=logger, limit_val_batches=0,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        )  # fmt: skip
        trainer.fit(module, datamodule=next((x for x in getattr(module, "data", ()) if isinstance(x, Augments)), None))
    assert trainer.global_step == 8
    return [p.detach() for p in module.parameters()], module.kept(), logger.lines


@pytest.mark.parametrize("cls", MODULES)
def test_probes_harm_nothing(cls: type[Base]) -> None:
    with_probes, without = trained(cls, True), trained(cls, False)
    assert all(map(torch.equal, with_probes[0], without[0]))
    assert len(with_probes[1]) == len(without[1])
    for a, b in zip(with_probes[1], without[1]):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    assert with_probes[2] == without[2]


class Ordinary(torch.optim.Optimizer):
    """As most people write theirs."""

    SCALE = 0.5

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"] * self.SCALE)


class TrainsWithOrdinary(Base):
    def configure_optimizers(self) -> Any:
        return Ordinary(self.parameters())


@pytest.mark.parametrize("cls", [TrainsWithOrdinary, OptimizerWithAGlobal, DecoratedOptimizerWithAGlobal])
def test_optimizers_that_keep_plain_values_are_probed(cls: type[Base]) -> None:
    monitor = SpikeResponse(probe_every_n_steps=3, probe_scales=[10.0], probe_steps=2)
    trainer = pl.Trainer(
        max_steps=4, callbacks=[monitor], accelerator="cpu", devices=1, logger=False, limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(cls())
    assert any("probe" in name for name in monitor.history)
