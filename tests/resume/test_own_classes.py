"""Objects of this library's own classes in checkpoints, as hyperparameters."""

from __future__ import annotations

import dataclasses
import importlib
import pickle
import pkgutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import lightning_optim
from lightning_optim import Grouping, OptimizerConfig, OptimizerMixin, SchedulerConfig
from lightning_optim.checkpoint_io import CheckpointError, SafeCheckpointIO
from lightning_optim.models.networks import GPTConfig, LSTMConfig

VALUES = [
    OptimizerConfig("NAMO", {"lr": 0.01, "betas": (0.9, 0.95)}),
    SchedulerConfig("WarmupCosine", {"warmup": 0.1}, interval="step"),
    Grouping(no_decay=["norm"], lr_multipliers={"0.*": 0.5}, layer_decay=0.9),
    GPTConfig(2, 2, 8),
    LSTMConfig(1, 8, 8),
]


class Model(OptimizerMixin, pl.LightningModule):
    def __init__(self, optimizer: Any = None, grouping: Any = None, other: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.optimizer, self.grouping = optimizer or "AdamW", grouping
        self.net = nn.Linear(2, 2)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_they_are_loaded(value: Any, tmp_path: Path) -> None:
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, plugins=[SafeCheckpointIO()], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    model = Model(other={"nested": [value]})
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert SafeCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")["hyper_parameters"]["other"] == {"nested": [value]}
    assert Model.load_from_checkpoint(tmp_path / "a.ckpt").hparams["other"] == {"nested": [value]}


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_fields_are_checked(value: Any, tmp_path: Path) -> None:
    wrong = {"unknown": 1, "lr_multipliers": {"a": -1.0}, "interval": "day", "layers": 0}
    fields = {field.name for field in dataclasses.fields(value)} | {"unknown"}
    for name in fields & wrong.keys():
        torch.save(
            {"state_dict": {}, "x": unchecked(type(value), vars(value) | {name: wrong[name]})}, tmp_path / "a.ckpt"
        )
        with pytest.raises(CheckpointError):
            SafeCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")
    torch.save({"state_dict": {}, "x": unchecked(type(value), vars(value))}, tmp_path / "a.ckpt")
    assert SafeCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")["x"] == value


def unchecked(cls: type, state: dict[str, Any]) -> Any:
    """An object as only a made-up file can have it."""
    made = cls.__new__(cls)
    vars(made).update(state)
    return made


def test_a_former_path(tmp_path: Path) -> None:
    assert pickle.loads(pickle.dumps(VALUES[2])) == VALUES[2]
    data = pickle.dumps(VALUES[2], protocol=2).replace(b"lightning_optim.grouping\n", b"lightning_optim.factory\n")
    assert b"lightning_optim.factory" in data
    names = {name for _, name in map(named, torch.serialization.get_safe_globals())}
    assert "lightning_optim.factory.Grouping" in names


def named(x: Any) -> tuple[Any, str]:
    return x if isinstance(x, tuple) else (x, f"{x.__module__}.{x.__qualname__}")


def test_public_configurations_are_all_registered() -> None:
    """Every public dataclass whose name ends in Config, or that is exported beside them."""
    safe = {x for x, _ in map(named, torch.serialization.get_safe_globals())}
    found = {Grouping}
    for module in pkgutil.walk_packages(lightning_optim.__path__, "lightning_optim."):
        if module.name.rpartition(".")[2].startswith("_") or ".configs" in module.name:
            continue
        members = vars(importlib.import_module(module.name)).values()
        found |= {x for x in members if dataclasses.is_dataclass(x) and getattr(x, "__name__", "").endswith("Config")}
    assert {x for x in found if x.__module__.startswith("lightning_optim")} <= safe
