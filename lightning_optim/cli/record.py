"""What is written down of the settings of a run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.cli import SaveConfigCallback

from ..callbacks import Resume


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
        settings: dict[str, Any] = {"seed": config.get("seed_everything")}
        for key in ("optimizer", "lr_scheduler", "grouping", "model", "data"):
            value = config.get(key) or {}
            if "class_path" in value:
                settings[key] = value["class_path"].rpartition(".")[2]
                value = value.get("init_args", {})
            settings |= {f"{key}/{name}": setting for name, setting in value.items()}
        for logger in trainer.loggers:
            logger.log_hyperparams(settings)
