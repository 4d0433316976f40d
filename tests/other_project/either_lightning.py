"""A project that imports Lightning by the name in its first argument, and uses all that touches a Trainer."""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from lightning_optim import NonFiniteGradientsError, OptimizerMixin, configure_optimizers
from lightning_optim.callbacks import Diagnostics, OptimizerSwap, RescueCheckpoint, Resume, RNGState
from lightning_optim.checkpoint_io import SafeCheckpointIO

NAME = sys.argv[1]
pl: Any = importlib.import_module(NAME)
tuner: Any = importlib.import_module(f"{NAME}.tuner")
logging.getLogger(NAME).setLevel(logging.ERROR)
torch.set_num_threads(1)
DATA = DataLoader(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), 8)


class Model(pl.LightningModule):
    def __init__(self, configure: Any = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
        self.configure = configure
        self.scale = 1.0

    def training_step(self, batch: torch.Tensor, i: int) -> torch.Tensor:
        return self.net(batch).square().mean() * self.scale

    def validation_step(self, batch: torch.Tensor, i: int) -> None:
        self.log("val_loss", self.net(batch).square().mean())

    def configure_optimizers(self) -> Any:
        if self.configure is not None:
            return self.configure(self)
        optimizer = torch.optim.AdamW(self.parameters(), 1e-3)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)]


class Mixed(OptimizerMixin, Model):
    optimizer = "NAMO"
    lr_scheduler = "WarmupCosine"


def trainer(*callbacks: Any, **arguments: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    settings = {"accelerator": "cpu", "max_epochs": 2, "enable_checkpointing": False, **quiet, **arguments}
    return pl.Trainer(callbacks=list(callbacks), **settings)


def fit(module: Any, *callbacks: Any, **arguments: Any) -> Any:
    run = trainer(*callbacks, **arguments)
    run.fit(module, DATA, DATA)
    return run


# The one line, for a module and for a part of one, with the length of the run and without fused kernels.
run = fit(Model(lambda m: configure_optimizers(m, "NAMO", "WarmupCosine")))
assert run.lr_scheduler_configs[0].scheduler.total_steps == 16
part = Model(lambda m: configure_optimizers(m.net, "AdamW", "WarmupCosine"))
run = fit(part, precision="bf16-mixed", gradient_clip_val=1.0)
assert run.lr_scheduler_configs[0].scheduler.total_steps == 16
plateau = {"name": "ReduceLROnPlateau", "monitor": "val_loss"}
run = fit(Model(lambda m: configure_optimizers(m, "MVNGrad", plateau)), check_val_every_n_epoch=2)
assert run.lr_scheduler_configs[0].frequency == 2

# The mixin, and the learning-rate finder, which sets its rate.
mixed = Mixed()
run = trainer(default_root_dir=".")
found = tuner.Tuner(run).lr_find(mixed, DATA, num_training=20, min_lr=1e-4)
assert mixed.lr == found.suggestion()
run.fit(mixed, DATA, DATA)
assert {g["role"] for g in run.optimizers[0].param_groups} == {"matrix", "fallback"}

# Another optimizer for an unmodified module, with charts of its diagnostics and routing in TensorBoard.
logger = pl.loggers.TensorBoardLogger("logs", name=None, version=0)
own = Model()
run = fit(own, OptimizerSwap("NAMO"), Diagnostics(every_n_steps=2), RNGState(), Resume(), logger=logger)
assert type(run.optimizers[0]).__name__ == "NAMO"
assert [group["lr"] for group in run.optimizers[0].param_groups] == [0.0] * 3  # after the module's own cosine
events = EventAccumulator("logs/version_0").Reload().Tags()
assert "optimizer/routing/text_summary" in events["tensors"], events["tensors"]
assert any("custom_scalars" in tag for tag in events["tensors"]), events["tensors"]
assert len(events["scalars"]) > 15, events["scalars"]

# Finetuning callbacks.
model = Mixed()
model.backbone = model.net[:4]
run = fit(model, pl.callbacks.BackboneFinetuning(1))
added = {g["role"] for g in run.optimizers[0].param_groups if g["name"].startswith("added-1")}
assert added == {"matrix", "fallback"}, run.optimizers

# A checkpoint when the optimizer gives up.
broken = Model(lambda m: configure_optimizers(m, "MVNGrad", max_consecutive_skips=2))
broken.scale = float("nan")
run = trainer(RescueCheckpoint(), enable_checkpointing=True, default_root_dir="rescue", plugins=[SafeCheckpointIO()])
try:
    run.fit(broken, DATA, DATA)
except NonFiniteGradientsError:
    saved = list(Path("rescue").rglob("rescue-*.ckpt"))
    assert len(saved) == 1, saved
    assert isinstance(run.strategy.checkpoint_io, SafeCheckpointIO)
    resumed = trainer(Resume(), plugins=[SafeCheckpointIO()])
    resumed.fit(Model(broken.configure), DATA, DATA, ckpt_path=saved[0])
    assert resumed.global_step == 16
else:
    raise AssertionError("the optimizer did not give up")
print("all done")
