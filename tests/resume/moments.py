"""Whole runs that are interrupted and resumed at every kind of moment, beside runs that are not interrupted.

Used by the tests in their own process, and run as a program by two: ``python -m torch.distributed.run ...``.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from datetime import timedelta
from functools import cache
from itertools import combinations, cycle, islice, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import configure_optimizers
from lightning_optim.callbacks import Diagnostics, RescueCheckpoint, Resume, RNGState
from lightning_optim.checkpoint_io import SafeCheckpointIO
from lightning_optim.data.loading import BatchDataset, EpochSampler, ResumableLoader

EPOCHS = 3
LIMITS = ("max_steps", "max_epochs", "both", "max_time")
MOMENTS = {
    "end of epoch": "at the end of an epoch",  # ModelCheckpoint(save_on_train_epoch_end=True)
    "every n steps": "every n steps",  # ModelCheckpoint(every_n_train_steps=...)
    "validation": "at the end of a validation",  # ModelCheckpoint(monitor=...)
    # trainer.save_checkpoint in on_train_batch_end
    "accumulation": "by `trainer.save_checkpoint` after any batch, also within an accumulation",
    # ModelCheckpoint(save_on_exception=True)
    "exception": "on an exception in a training step, before gradients are added",
    "exception in validation": "on an exception in a validation",
    "exception in step": "on an exception amid the optimizer's step",
    "SIGTERM": "on SIGTERM",  # ModelCheckpoint(save_on_exception=True)
    "Ctrl-C": "on Ctrl-C, by `RescueCheckpoint`",
    "start of epoch": "at the start of an epoch",  # trainer.save_checkpoint in on_train_epoch_start
    # trainer.save_checkpoint after a fit with a lower limit
    "stop at end of epoch": "after `fit`, stopped at the end of an epoch",
    "stop within epoch": "after `fit`, stopped within an epoch",
}
SIGNALS = {"SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}
ACCUMULATIONS = (1, 2, 3)
INTERVALS = (0.5, 1.0)
BATCHES = (6, 7)
OPTIMIZERS = ("MVNGrad", "NAMO", "torch.optim.AdamW", "SOAP")
SCHEDULES = ("none", "step", "epoch", "plateau", "plateau every step")
LOADERS = ("resumable", "ordinary", "own generator")
CALLBACKS = ("RNGState", "Resume")


@dataclass(frozen=True)
class Cell:
    limit: str = "max_steps"
    moment: str = "end of epoch"
    accumulation: int = 1
    interval: float = 1.0
    batches: int = 6
    optimizer: str = "MVNGrad"
    schedule: str = "none"
    loader: str = "resumable"
    callback: str = "RNGState"
    workers: int = 0
    diagnostics: bool = False
    processes: int = 1

    def __str__(self) -> str:
        return "-".join(map(str, astuple(self)))

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.batches // self.accumulation)

    @property
    def within(self) -> int:
        """Batches of the second epoch that are over at moments within an epoch."""
        return self.accumulation + 1

    @property
    def is_exact(self) -> bool:
        """What is promised: the same bits, or else a warning when the checkpoint is written."""
        if self.moment == "exception in step":
            return False
        between = self.moment in ("end of epoch", "start of epoch", "stop at end of epoch")
        after_all = self.moment in ("validation", "exception in validation") and self.interval == 1.0
        return self.loader == "resumable" or between or after_all


class Clock:
    """Stands for the time that a run takes: its number of training batches."""

    ticks = 0


class Rows(BatchDataset):
    """Inputs that are other ones in every epoch, from the key alone."""

    def __init__(self, batches: int) -> None:
        self.rows = 4 * batches

    def __len__(self) -> int:
        return self.rows

    def __getitems__(self, keys: list[int]) -> tuple[Tensor, Tensor]:
        x = torch.stack([torch.randn(6, generator=torch.Generator().manual_seed(int(key))) for key in keys])
        return x, x[:, :1]


def unchanged(batch: Any) -> Any:
    return batch


class Module(pl.LightningModule):
    """Draws from all generators, and keeps a trail of what it sees."""

    def __init__(self, cell: Cell, fails: bool) -> None:
        super().__init__()
        self.cell, self.fails = cell, fails
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.trail: list[Any] = []
        self.over = 0  # Length of the trail when the last batch or validation was over.

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.note(batch[0])
        loss = (self.net(batch[0] + 0.1 * random.random()) - np.random.rand() * batch[1]).square().mean()  # noqa: NPY002
        if self.fails and self.trainer.current_epoch == 1 and batch_idx == self.cell.within:
            if self.cell.moment == "exception":
                raise OSError("a training step fails")
            if self.cell.moment in SIGNALS:
                os.kill(os.getpid(), SIGNALS[self.cell.moment])
        Clock.ticks += 1
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if self.trainer.sanity_checking:
            return
        if batch_idx == 0:
            self.note(batch[0])
        elif self.fails and self.trainer.current_epoch == 1 and self.cell.moment == "exception in validation":
            raise OSError("a validation fails")
        self.log("v", self.net(batch[0]).mean().abs(), sync_dist=self.cell.processes > 1)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.fails and self.trainer.current_epoch == 1 and self.cell.moment == "exception in step":
            raise OSError("an optimizer's step fails")

    def note(self, x: Tensor) -> None:
        trainer = self.trainer
        numbers = (torch.get_rng_state().sum().item(), random.getstate()[1][-1], np.random.get_state()[2])  # noqa: NPY002
        kind = "validation" if trainer.validating else "training"
        rates = [round(group["lr"], 12) for group in trainer.optimizers[0].param_groups]
        self.trail.append((kind, trainer.current_epoch, trainer.global_step, x.sum().item(), *numbers, *rates))

    def on_train_batch_end(self, *args: Any) -> None:
        self.over = len(self.trail)

    def on_validation_end(self) -> None:
        self.over = len(self.trail)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["trail"] = self.over if self.fails else len(self.trail)

    def configure_optimizers(self) -> Any:
        schedule: Any = {
            "none": None,
            "step": {"name": "WarmupCosine", "args": {"warmup": 0.3, "total_steps": 60}},
            "epoch": {
                "name": "torch.optim.lr_scheduler.StepLR",
                "args": {"step_size": 1, "gamma": 0.7},
                "interval": "epoch",
            },
        }.get(self.cell.schedule)
        configured: Any = configure_optimizers(self, {"name": self.cell.optimizer, "args": {"lr": 0.02}}, schedule)
        if self.cell.schedule.startswith("plateau"):
            optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
            # A threshold that most validations miss.
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5, factor=0.7)
            interval = "epoch" if self.cell.schedule == "plateau" else "step"
            entry = {"scheduler": plateau, "monitor": "v", "interval": interval, "strict": False}
            return {"optimizer": optimizer, "lr_scheduler": entry}
        return configured

    def train_dataloader(self) -> DataLoader[Any]:
        rows = Rows(self.cell.batches * self.cell.processes)
        options: dict[str, Any] = {"batch_size": 4, "num_workers": self.cell.workers}
        if self.cell.loader == "resumable":
            processes = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
            sampler = EpochSampler(rows, seed=3, **processes)
            return ResumableLoader(rows, sampler=sampler, collate_fn=unchanged, drop_last=True, **options)
        if self.cell.loader == "own generator":
            options["generator"] = torch.Generator().manual_seed(4)
        return DataLoader(TensorDataset(*rows.__getitems__(list(range(len(rows))))), shuffle=True, **options)

    def val_dataloader(self) -> DataLoader[Any]:
        x = torch.randn(8 * self.cell.processes, 6, generator=torch.Generator().manual_seed(9))
        return DataLoader(TensorDataset(x), batch_size=4)


class Save(pl.Callback):
    """Calls ``trainer.save_checkpoint`` in a hook."""

    def __init__(self, hook: str, cell: Cell, path: Path) -> None:
        self.cell, self.path = cell, path
        setattr(self, hook, self.save)

    def save(self, trainer: pl.Trainer, *args: Any) -> None:
        batch_idx = args[3] if len(args) > 3 else self.cell.within - 1
        if trainer.current_epoch == 1 and batch_idx == self.cell.within - 1:
            trainer.save_checkpoint(self.path)


def writers(cell: Cell, folder: Path) -> list[pl.Callback]:
    """What writes the checkpoints of a moment."""
    options: dict[str, Any] = {"save_top_k": -1, "filename": "{step}"}
    steps = cell.steps_per_epoch
    if cell.moment == "end of epoch":
        return [ModelCheckpoint(folder, **options, save_on_train_epoch_end=True)]
    if cell.moment == "every n steps":
        return [ModelCheckpoint(folder, **options, every_n_train_steps=steps + 1)]
    if cell.moment == "validation":
        return [ModelCheckpoint(folder, **options, monitor="v")]
    if cell.moment == "accumulation":
        return [Save("on_train_batch_end", cell, folder / "by hand.ckpt")]
    if cell.moment == "start of epoch":
        return [Save("on_train_epoch_start", cell, folder / "by hand.ckpt")]
    if cell.moment == "Ctrl-C":
        return [RescueCheckpoint(), ModelCheckpoint(folder, save_top_k=0)]
    if cell.moment.startswith("exception") or cell.moment == "SIGTERM":
        return [ModelCheckpoint(folder, **options, every_n_train_steps=10**6, save_on_exception=True)]
    return []


def limits(cell: Cell, stops: bool) -> dict[str, Any]:
    """The Trainer's limits; those of a run that stops early, or of one that ends within the third epoch, or with it."""
    within = cell.moment == "stop within epoch"
    steps, batches = cell.steps_per_epoch, cell.batches
    end = {"max_steps": 3 * steps - 1, "max_time": 3 * batches - 2}
    if stops:
        end = {"max_steps": steps + 1 if within else steps, "max_time": batches + cell.within if within else batches}
    if cell.limit == "max_steps":
        return {"max_steps": end["max_steps"], "max_epochs": -1}
    if cell.limit == "max_time":
        return {"max_time": timedelta(seconds=end["max_time"])}
    if cell.limit == "both":
        return {"max_steps": end["max_steps"], "max_epochs": EPOCHS}
    if stops and within:  # Without max_steps, a run stops within an epoch by a callback.
        return {"max_epochs": EPOCHS, "callbacks": [Stop(cell)]}
    return {"max_epochs": 1 if stops else EPOCHS}


class Stop(pl.Callback):
    def __init__(self, cell: Cell) -> None:
        self.cell = cell

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        trainer.should_stop = trainer.current_epoch == 1 and args[2] == self.cell.within - 1


@contextmanager
def batches_as_time() -> Iterator[None]:
    """Timers count batches, the same ones in every run."""
    elapsed = Timer.time_elapsed
    Timer.time_elapsed = lambda self, stage="train": self._offset + Clock.ticks
    Clock.ticks = 0
    try:
        yield
    finally:
        Timer.time_elapsed = elapsed


def fit(
    cell: Cell, seed: int, callbacks: list[pl.Callback], *, stops: bool = False, fails: bool = False,
    ckpt_path: Path | None = None, save: Path | None = None,
) -> Module:  # fmt: skip
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    pl.seed_everything(seed, verbose=False)
    module = Module(cell, fails)
    torch.rand(3 if ckpt_path else 1)  # Random numbers are to be those of the checkpoint, whatever is drawn before.
    until = limits(cell, stops)
    if cell.diagnostics:
        callbacks = [*callbacks, Diagnostics("full", every_n_steps=1)]
    with batches_as_time():
        trainer = pl.Trainer(
            **until | {"callbacks": [*callbacks, *until.get("callbacks", [])]},
            accelerator="cpu", devices=cell.processes,
            strategy=DDPStrategy() if cell.processes > 1 else "auto", accumulate_grad_batches=cell.accumulation,
            val_check_interval=cell.interval, logger=False, enable_checkpointing=True, plugins=[SafeCheckpointIO()],
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=None,
            use_distributed_sampler=cell.loader != "resumable",
        )  # fmt: skip
        if not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
            trainer.callbacks = [x for x in trainer.callbacks if not isinstance(x, ModelCheckpoint)]
        try:
            trainer.fit(module, ckpt_path=ckpt_path)
        except (OSError, SystemExit):
            if not fails:
                raise
        else:
            assert not fails
        if save is not None:
            if cell.accumulation == 1 or cell.moment == "stop at end of epoch":
                trainer.validate(module, verbose=False)  # What happens after fit is not part of the run.
            trainer.save_checkpoint(save)
    return module


def everything(module: Module) -> dict[str, Any]:
    trainer = module.trainer
    optimizer = trainer.optimizers[0].state_dict()
    for group in optimizer["param_groups"]:
        group.pop("initial_lr", None)  # which Resume notes down
    return {
        "parameters": {name: p.detach().clone() for name, p in module.named_parameters()},
        "optimizer": optimizer,
        "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "logged": trainer.fit_loop.epoch_loop._batches_that_stepped,
    }


def difference(a: Any, b: Any, path: str = "") -> str:
    """Where two nested values are not the same bits."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return next((found for key in a if (found := difference(a[key], b[key], f"{path}/{key}"))), "")
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return next((found for i, (x, y) in enumerate(zip(a, b)) if (found := difference(x, y, f"{path}/{i}"))), "")
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return "" if a.dtype == b.dtype and torch.equal(a, b) else f"{path} {(a - b).abs().max()}"
    return "" if a == b else f"{path}: {a} {b}"


@cache
def straight(cell: Cell) -> tuple[dict[str, Any], list[Any]]:
    """A run that nothing interrupts and no callback of ours sees."""
    module = fit(cell, 5, [])
    return everything(module), module.trail


def resume(cell: Cell, folder: Path) -> tuple[str, str]:
    """How the resumed run differs from the one that was not interrupted, and what was said when it was written."""
    plain = replace(cell, moment="", callback="", diagnostics=False)
    expected, trail = straight(plain)
    stops, fails = cell.moment.startswith("stop"), cell.moment.startswith("exception") or cell.moment in SIGNALS
    file = folder / "after fit.ckpt" if stops else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback = {"RNGState": RNGState, "Resume": Resume}[cell.callback]
        first = fit(cell, 5, [callback(), *writers(cell, folder)], stops=stops, fails=fails, save=file)
    # At its very end, a run may stop within an epoch.
    end = f"step {expected['step']} does not continue exactly"
    said = "".join(text for w in caught if "does not continue exactly" in (text := str(w.message)) and end not in text)
    files = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    # From a checkpoint of its end, a run does not go on.
    files = [file for file in files if torch.load(file, weights_only=True)["global_step"] < expected["step"]]
    assert files, "no checkpoint was written"
    if not stops and not fails and (found := difference(everything(first), expected)):
        return f"writing changes the run: {found}", said
    for file in files[:1] if len(files) == 1 else (files[0], files[len(files) // 2]):
        callbacks: list[pl.Callback] = [callback()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Lightning's sampler for several processes takes the order of the data from the seed.
            second = fit(cell, 77 if cell.processes == 1 else 5, callbacks, ckpt_path=file)
        if found := difference(everything(second), expected):
            return f"{file.name}: {found}", said
        if second.trail != trail[len(trail) - len(second.trail) :]:
            return f"{file.name}: other data or random numbers", said
        seen = first.trail[: torch.load(file, weights_only=True)["trail"]]
        begin = next((i for i, (x, y) in enumerate(zip(seen, trail)) if x != y), min(len(seen), len(trail)))
        if begin + len(second.trail) != len(trail):
            return f"{file.name}: {begin} + {len(second.trail)} of {len(trail)} training steps and validations", said
    return "", said


def judge(cell: Cell, folder: Path | None = None) -> str:
    """What is wrong with a cell."""
    if folder is None:
        with TemporaryDirectory() as temporary:
            return judge(cell, Path(temporary))
    found, said = resume(cell, folder)
    if cell.is_exact:
        return found or (f"warned without a reason: {said}" if said else "")
    if int(os.environ.get("RANK", 0)):
        return ""  # Only the first rank warns.
    return "" if said else f"not a word that it is not exact ({found or 'it is'})"


def matrix() -> list[Cell]:
    """All limits, moments, accumulations, intervals and lengths of epochs, with the rest in turn."""
    rest = list(zip(*(islice(cycle(values), 60) for values in (OPTIMIZERS, SCHEDULES, LOADERS, CALLBACKS))))
    every = product(LIMITS, MOMENTS, ACCUMULATIONS, INTERVALS, BATCHES)
    return [Cell(*dimensions, *rest[i * 7 % 60]) for i, dimensions in enumerate(every)]


def pairs() -> list[Cell]:
    """Cells in which every two values of two dimensions occur together."""
    dimensions = (LIMITS, tuple(MOMENTS), ACCUMULATIONS, INTERVALS, BATCHES, OPTIMIZERS, SCHEDULES, LOADERS, CALLBACKS)
    axes = list(combinations(range(len(dimensions)), 2))
    left = {(i, j, x, y) for i, j in axes for x in dimensions[i] for y in dimensions[j]}
    draw = random.Random(0)
    cells = []
    while left:
        i, j, x, y = min(left, key=str)
        tries = []
        for _ in range(30):
            values = [draw.choice(values) for values in dimensions]
            values[i], values[j] = x, y
            tries.append(values)
        best = max(tries, key=lambda values: sum((i, j, values[i], values[j]) in left for i, j in axes))
        left -= {(i, j, best[i], best[j]) for i, j in axes}
        cells.append(Cell(*best))
    return cells


def table() -> str:
    """What is promised of every moment, as the documentation shows it."""
    lines = ["| checkpoint written | loader with state | other loaders |", "|---|---|---|"]
    words = {(True,): "exact", (False,): "warns", (False, True): "exact after the epoch's last batch, else warns"}
    for moment, text in MOMENTS.items():
        kinds = [
            tuple(sorted({Cell(moment=moment, loader=loader, interval=interval).is_exact for interval in INTERVALS}))
            for loader in ("resumable", "ordinary")
        ]
        lines.append(f"| {text} | {words[kinds[0]]} | {words[kinds[1]]} |")
    return "\n".join(lines)


#: What two processes run. Exceptions amid a step are left out: one rank waits there for the other.
ON_TWO = [replace(cell, processes=2) for cell in pairs()[::3] if cell.moment not in ("exception", *SIGNALS)]
ON_TWO += [replace(ON_TWO[0], moment=moment, loader="resumable") for moment in ("exception", "SIGTERM")]


def main(out: Path) -> None:
    """What each of two processes does; both write what came of it."""
    results = {}
    for i, cell in enumerate(ON_TWO):
        try:
            results[str(cell)] = judge(cell, out / str(i))
        except Exception:
            results[str(cell)] = traceback.format_exc()
    (out / f"{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
