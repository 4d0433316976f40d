"""What the factory asks of Lightning's Trainer.

Lightning has two names, ``lightning.pytorch`` and ``pytorch_lightning``: two packages with the same code and classes of
their own. Objects are told by the names of their classes, so that both work and neither is imported here.
"""

from __future__ import annotations

import math
import sys
from typing import Any, Literal

from torch import nn

_PACKAGES = ("lightning", "pytorch_lightning")

# A fast_dev_run makes the first steps of a run of unknown length.
_FAST_DEV_RUN_LENGTH = 1_000_000


def is_lightning(x: Any, name: str) -> bool:
    """Whether an object is an instance of Lightning's class of that name, of either package.

    >>> import lightning.pytorch as pl
    >>> is_lightning(pl.LightningModule(), "LightningModule"), is_lightning(pl.LightningModule(), "Trainer")
    (True, False)
    """
    return any(c.__name__ == name and c.__module__.partition(".")[0] in _PACKAGES for c in type(x).__mro__)


def trainer_of(module: nn.Module) -> Any | None:
    """The Trainer that trains a module.

    A LightningModule knows its own. For a part of one, it is the Trainer that is calling ``configure_optimizers`` or
    another hook right now, which is found on the call stack.
    """
    try:
        trainer = module.trainer
    except (AttributeError, RuntimeError):  # not a LightningModule, or one without a Trainer
        trainer = None
    if is_lightning(trainer, "Trainer"):
        return trainer
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if is_lightning(caller, "Trainer"):
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    return None


def is_default_hook(hook: Any) -> bool:
    """Whether a method is LightningModule's own, which no subclass has overridden.

    >>> import lightning.pytorch as pl
    >>> is_default_hook(pl.LightningModule().configure_optimizers)
    True
    """
    function = getattr(hook, "__func__", hook)
    name, package = getattr(function, "__qualname__", ""), getattr(function, "__module__", None) or ""
    return name.startswith("LightningModule.") and package.partition(".")[0] in _PACKAGES


def run_length(trainer: Any, interval: Literal["step", "epoch"]) -> int | None:
    """How many optimizer steps or epochs the Trainer will make, if it knows."""
    if trainer.fast_dev_run:
        return _FAST_DEV_RUN_LENGTH
    length = _number_of_steps(trainer) if interval == "step" else trainer.max_epochs
    # -1 and inf stand for training without end.
    return int(length) if length is not None and 0 < length < math.inf else None


def why_unknown(trainer: Any | None, module: nn.Module) -> str:
    """Why the length of the run is not known, and what to do."""
    if trainer is None:
        return (
            f"{type(module).__name__} has no Trainer that says how long the run is: pass total_steps, or call this in "
            "the configure_optimizers of the LightningModule."
        )
    return (
        f"The Trainer does not know how long the run is (max_steps={trainer.max_steps}, "
        f"max_epochs={trainer.max_epochs}): set its max_steps, or max_epochs for training data that has a length, or "
        "pass total_steps."
    )


def _number_of_steps(trainer: Any) -> int | float:
    """The Trainer's estimate, for which it builds the training data loaders."""
    loop = trainer.fit_loop
    were_built = loop._combined_loader is not None
    length = trainer.estimated_stepping_batches
    if trainer.ckpt_path and not were_built:
        # When the Trainer builds the loaders, it gives them their place in the epoch from the checkpoint, which has
        # not been read yet.
        loop._combined_loader = None
    return length


def validation_interval(trainer: Any, interval: Literal["step", "epoch"]) -> int:
    """Every how many epochs, or batches of an epoch, the Trainer validates; 1 where it does so at the end only."""
    if interval == "epoch":
        return trainer.check_val_every_n_epoch or 1
    _number_of_steps(trainer)  # Building the loaders finds out how many batches there are.
    every = trainer.val_check_batch
    return every if every is not None and every < math.inf else 1


def is_searching_rate(trainer: Any) -> bool:
    """Whether Lightning's learning-rate finder is at work, which gives all parameter groups one rate."""
    return any(type(c.scheduler).__module__.endswith("tuner.lr_finder") for c in trainer.lr_scheduler_configs)


def unfreezes_later(trainer: Any | None) -> bool:
    """Whether a finetuning callback of Lightning will add parameters, without names, to the optimizer."""
    return trainer is not None and any(is_lightning(callback, "BaseFinetuning") for callback in trainer.callbacks)
