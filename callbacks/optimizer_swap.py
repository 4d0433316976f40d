"""Another optimizer for a LightningModule that stays as it is."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl

from lightning_optim.factory import Grouping, OptimizerConfig, SchedulerConfig, config_of, replace_optimizers
from lightning_optim.trainer import is_lightning


class OptimizerSwap(pl.Callback):
    """Train an unmodified LightningModule with another optimizer than its own.

    Replaces the module's ``configure_optimizers`` while it is fitted and puts it back afterwards. What the module's own
    says of other things than the rule is kept:

    - which parameters each optimizer trains, where the module hands over a part of them or has several optimizers: each
      is replaced;
    - learning rates and weight decays of its parameter groups, relative to one another;
    - its schedules: the new learning rates follow their course.

    The learning rate itself belongs to the module's own rule (that of AdamW is too low for Muon by a factor of ten or
    more), and is not used. A line of the log says which one is; set it here. After a search of ``Tuner.lr_find`` the
    learning rate that was found is used. Other hyperparameters, such as betas, are not kept either; a warning names
    those that the module has chosen.

    Args:
        optimizer: A name, or ``{"name": ..., "args": {...}}``; see :func:`lightning_optim.build_optimizer`.
        lr_scheduler: A schedule that replaces the module's own; see :func:`lightning_optim.configure_optimizers`.
            ``"WarmupConstant"`` is a constant learning rate.
        grouping: Weight-decay exclusions, learning-rate multipliers, overrides by parameter name, routing. Default:
            the weight decays of the module's groups, or where it has not chosen any those of
            :class:`lightning_optim.Grouping`.
        args: Arguments of the optimizer, as in ``OptimizerSwap("NAMO", lr=0.01)``.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> swap = OptimizerSwap("NAMO", lr_scheduler="WarmupCosine", lr=0.01)
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
        **args: Any,
    ) -> None:
        self.optimizer = config_of(OptimizerConfig, "optimizer", optimizer, args)
        self.lr_scheduler = lr_scheduler
        self.grouping = grouping
        self._found_lr: float | None = None
        self._swapped = False
        self._own: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            own = pl_module.configure_optimizers
            if isinstance(own, partial) and own.func is replace_optimizers:
                raise ValueError(
                    f"OptimizerSwap: {own.args[2].name} is swapped in already by another OptimizerSwap of this "
                    f"Trainer, and {self.optimizer.name} cannot be, too: keep one of the two."
                )
            # An attribute of the instance hides the method of its class; LightningCLI, too, sets one.
            self._own = vars(pl_module).get("configure_optimizers")
            self._swapped = True
            swapped = partial(
                replace_optimizers,
                pl_module,
                own,
                self.optimizer,
                self.lr_scheduler,
                self.grouping,
                lr=self._found_lr,
            )
            pl_module.configure_optimizers = swapped  # type: ignore[assignment, method-assign]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore(pl_module)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            # Tuner.lr_find is a fit of its own, with this callback at its end.
            if is_lightning(callback, "LearningRateFinder") and callback.optimal_lr and callback._update_attr:
                self._found_lr = callback.optimal_lr.suggestion()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore(pl_module)

    def _restore(self, pl_module: pl.LightningModule) -> None:
        if self._swapped:
            del pl_module.configure_optimizers
            if self._own is not None:
                pl_module.configure_optimizers = self._own  # type: ignore[method-assign]
            self._swapped, self._own = False, None
