"""Diagnostics change nothing that belongs to the user."""

from __future__ import annotations

import inspect
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy, Strategy

from lightning_optim import OptimizerMixin, callbacks
from lightning_optim.callbacks.monitor import Keyed


class OwnStrategy(SingleDeviceStrategy):
    pass


class OwnIO(TorchCheckpointIO):
    pass


def every_callback() -> dict[str, type[pl.Callback]]:
    """All callbacks that can be made without arguments; those that need some swap optimizers."""
    found = {}
    for name in callbacks.__all__:
        cls = getattr(callbacks, name)
        if inspect.isclass(cls) and issubclass(cls, pl.Callback):
            required = [p for p in inspect.signature(cls).parameters.values() if p.default is p.empty]
            if not required and not inspect.isabstract(cls):
                found[name] = cls
    return found


CALLBACKS = every_callback()


class Model(OptimizerMixin, BoringModel):
    optimizer = "AdamW"


STRATEGIES: dict[str, Any] = {
    "auto": lambda: "auto",
    "own": lambda: OwnStrategy("cpu", checkpoint_io=OwnIO()),
    "asynchronous": lambda: SingleDeviceStrategy("cpu", checkpoint_io=AsyncCheckpointIO(TorchCheckpointIO())),
    "FSDP2": lambda: ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1),
}


def test_the_list_is_not_empty() -> None:
    assert {"Diagnostics", "GradientHealth", "UpdateVariance", "SpikeResponse", "Resume", "RNGState"} <= set(CALLBACKS)
    assert all(issubclass(cls, pl.Callback) for cls in CALLBACKS.values())
    assert any(issubclass(cls, Keyed) for cls in CALLBACKS.values())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", CALLBACKS)
def test_strategy_and_checkpoint_io_stay(name: str, strategy: str) -> None:
    """Through `setup`, where a callback sees the strategy first."""
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=STRATEGIES[strategy](), callbacks=[CALLBACKS[name]()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    before = state_of(trainer.strategy)
    model = Model()
    trainer.strategy.connect(model)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        callback.setup(trainer, model, "fit")
    model.setup("fit")
    assert state_of(trainer.strategy) == before
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        callback.teardown(trainer, model, "fit")


def state_of(strategy: Strategy) -> tuple[Any, ...]:
    plugin = strategy.checkpoint_io
    own = {name: value for name, value in vars(type(strategy)).items() if callable(value)}
    return type(strategy), id(strategy), type(plugin), id(plugin), own, strategy.save_checkpoint.__func__  # type: ignore[attr-defined]


def test_a_whole_run_with_all_diagnostics() -> None:
    for tier in ("light", "standard", "full"):
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_steps=2, callbacks=[callbacks.Diagnostics(tier=tier, every_n_steps=1)],  # type: ignore[arg-type]
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        before = state_of(trainer.strategy)
        trainer.fit(Model())
        assert state_of(trainer.strategy) == before
