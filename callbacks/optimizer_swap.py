"""Another optimizer for a LightningModule that stays as it is."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl

from lightning_optim.factory import Grouping, OptimizerConfig, SchedulerConfig, configure_optimizers


class OptimizerSwap(pl.Callback):
    """Train an unmodified LightningModule with another optimizer and schedule than its own.

    Replaces the module's ``configure_optimizers`` while it is fitted and puts it back afterwards.

    Args:
        optimizer: A name, or ``{"name": ..., "args": {...}}``; see :func:`lightning_optim.build_optimizer`.
        lr_scheduler: Likewise, see :func:`lightning_optim.configure_optimizers`. Default: a constant learning
            rate. The module's own schedule belongs to its own optimizer and is not used.
        grouping: Weight-decay exclusions, learning-rate multipliers, overrides by parameter name, routing.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> swap = OptimizerSwap({"name": "NAMO", "args": {"lr": 0.01}}, lr_scheduler="WarmupCosine")
        >>> trainer = pl.Trainer(
        ...     callbacks=[swap], fast_dev_run=True, enable_progress_bar=False, enable_model_summary=False
        ... )
        >>> trainer.fit(BoringModel())
        >>> type(trainer.optimizers[0]).__name__
        'NAMO'
    """

    def __init__(
        self,
        optimizer: OptimizerConfig | str | dict[str, Any],
        lr_scheduler: SchedulerConfig | str | dict[str, Any] | None = None,
        grouping: Grouping | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.grouping = grouping
        self._swapped = False
        self._own: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            # An attribute of the instance hides the method of its class; LightningCLI, too, sets one.
            self._own = vars(pl_module).get("configure_optimizers")
            self._swapped = True
            swapped = partial(configure_optimizers, pl_module, self.optimizer, self.lr_scheduler, self.grouping)
            pl_module.configure_optimizers = swapped  # type: ignore[assignment, method-assign]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore(pl_module)

    def _restore(self, pl_module: pl.LightningModule) -> None:
        if self._swapped:
            del pl_module.configure_optimizers
            if self._own is not None:
                pl_module.configure_optimizers = self._own  # type: ignore[method-assign]
            self._swapped, self._own = False, None
