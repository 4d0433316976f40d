"""What is written down of the settings of a run."""

from __future__ import annotations

import math
import time
from collections import deque
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from ..callbacks import Resume
from .run_folder import RunLogger


class RecordSettings(SaveConfigCallback):
    """Writes the configuration of a run into its folder, and the settings that matter to its loggers.

    Those of a run that goes on are replaced when training starts, and not before: a checkpoint that is refused leaves
    the run with the settings that it had, and so does a resumption that does not take the hyperparameters it is given.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A resumed run goes on in the folder of the first.
        super().__init__(*args, **({"overwrite": True} | kwargs))
        # What is said about one resumption does not hold for the next.
        self.config = self.config.clone()
        self.config.resume.override = None
        self.config.resume.change_optimizer = False
        if "ckpt_path" in self.config:  # Without a subcommand there is none.
            self.config.ckpt_path = None
        # Written under another name and renamed, so that a killed run leaves no half of it.
        self.final_name, self.config_filename = self.config_filename, f".{self.config_filename}.part"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # A broadcast, which all ranks have to take part in; `save_config` runs on the first rank alone.
        self._folder = Path(trainer.log_dir or "")
        recorded = (self._folder / self.final_name).is_file()
        if stage == "fit" and not trainer.strategy.broadcast(recorded):
            super().setup(trainer, pl_module, stage)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # By this the newest is found. The times of files are those of their copies.
        checkpoint["saved_at"] = time.time()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, Resume) and callback.kept for callback in callbacks):
            super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        (self._folder / self.config_filename).replace(self._folder / self.final_name)
        config = yaml.safe_load(self.parser.dump(self.config, skip_link_targets=False))
        settings: dict[str, Any] = {}
        for key in ("optimizer", "lr_scheduler", "grouping", "model", "data"):
            value = config.get(key) or {}
            if "class_path" in value:
                settings[key] = value["class_path"].rpartition(".")[2]
                value = value.get("init_args", {})
            settings |= {f"{key}/{name}": setting for name, setting in value.items()}
        settings["seed"] = config.get("seed_everything")
        if monitored := _monitored(trainer):
            settings["validation_metric"] = monitored[0]
        for logger in trainer.loggers:
            logger.log_hyperparams(settings)


class RecordOutcome(pl.Callback):
    """Tells TensorBoard's page HPARAMS how a run goes, after each validation and at its end.

    That is the best and the last value of the validation metric, the training loss and the speed:
    :data:`~.run_folder.OUTCOMES`. The metric is what the Trainer's ``ModelCheckpoint`` monitors, otherwise the first
    that has ``val`` in its name, a loss before others. It is taken to be better the lower it is, unless
    ``ModelCheckpoint`` says otherwise or the name is that of an accuracy.
    """

    def __init__(self) -> None:
        self._best = math.nan
        self._losses: deque[Tensor] = deque(maxlen=50)
        self._begun = self._paused = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begun, self._paused, self._first_step = time.perf_counter(), 0.0, trainer.global_step
        self._losses.clear()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):  # of which Lightning has divided a part of each micro-batch
            self._losses.append(loss.detach() * trainer.accumulate_grad_batches)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._pause = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._paused += time.perf_counter() - self._pause
            self._log(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log(trainer, ended=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self._begun:
            self._log(trainer, ended=False)

    def _log(self, trainer: pl.Trainer, ended: bool | None = None) -> None:
        outcome: dict[str, float] = {}
        if monitored := _monitored(trainer):
            name, better = monitored
            if name in trainer.callback_metrics:
                last = float(trainer.callback_metrics[name])
                self._best = last if math.isnan(self._best) else better(self._best, last)
                outcome |= {"outcome/validation_best": self._best, "outcome/validation_last": last}
        if self._losses:
            outcome["outcome/train_loss"] = float(torch.stack([loss.float() for loss in self._losses]).mean())
        if steps := trainer.global_step - self._first_step:
            seconds = time.perf_counter() - self._begun - self._paused
            outcome["outcome/steps_per_second"] = steps / seconds
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.log_outcome(outcome, trainer.global_step, ended)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best = state_dict["best"]


def _monitored(trainer: pl.Trainer) -> tuple[str, Any] | None:
    """The validation metric of a run, and which of two values is better."""
    checkpoint: Any = trainer.checkpoint_callback
    if isinstance(checkpoint, ModelCheckpoint) and checkpoint.monitor:
        return checkpoint.monitor, max if checkpoint.mode == "max" else min
    names = [name for name in trainer.callback_metrics if "val" in name.lower()]
    for name in sorted(names, key=lambda name: "loss" not in name.lower()):
        return name, max if any(word in name.lower() for word in ("acc", "f1", "auc", "precision", "recall")) else min
    return None
