"""Leaving out the steps of gradients, or losses, that are far out of the ordinary."""

from __future__ import annotations

import math
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.diagnostics.parameter_change import squares_of_gradients
from lightning_optim.diagnostics.spike_response import WINDOW, robust_zscore
from lightning_optim.diagnostics.what_if import parameters_of
from lightning_optim.processes import all_reduce_max, all_reduce_sum, strategies, world

from .loop import loss_scale, scaler_of, steps_made
from .monitor import Keyed
from .recorder import gradient_of, label_of

#: Values that there must be before one is compared with them.
_LEAST = 32


class SkipSpikes(Keyed):
    r"""Skips the optimizer steps whose gradient norm or loss is an outlier; for any optimizer.

    A step is skipped where the robust z-score :math:`(x - \mathrm{median}) / (1.4826\,\mathrm{MAD})` of its value
    :math:`x` among the last ``window`` ones is above ``threshold``, or :math:`x` is not finite: gradients are set to
    ``None`` before the step, so that neither parameters nor the optimizer's state change. Schedules and counters go on.
    Values of skipped steps count among the last ones, so that a new level is accepted in time; after ``max_in_a_row``
    skipped steps one is made whatever its value.

    The gradient norm is that of all ranks' shards before clipping, and the loss is the mean over ranks and
    micro-batches; all ranks come to the same verdict. This takes one small reduction per step where there are several
    ranks, and the value has to be fetched from the device.

    Logged at each skipped step: ``spike/skipped_steps``, their number until then, which is also in
    ``trainer.callback_metrics`` and ``skipped_steps``.

    Args:
        threshold: Smallest z-score of a step that is skipped.
        by: ``"gradient"`` for the gradient norm, or ``"loss"``, with automatic optimization only.
        window: Number of values that one is compared with, once there are 32.
        max_in_a_row: Most steps that are skipped one after another.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> skip = SkipSpikes(threshold=10)
        >>> trainer = pl.Trainer(max_steps=4, callbacks=[skip], accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())
        >>> skip.skipped_steps
        0
    """

    def __init__(
        self,
        threshold: float = 6.0,
        by: Literal["gradient", "loss"] = "gradient",
        window: int = WINDOW,
        max_in_a_row: int = 3,
    ) -> None:
        if not threshold > 0:
            raise ValueError(f"SkipSpikes: threshold must be positive, got {threshold!r}.")
        if by not in ("gradient", "loss"):
            raise ValueError(f"SkipSpikes: by={by!r} is not one of 'gradient', 'loss'.")
        for argument, value, least in (("window", window, _LEAST), ("max_in_a_row", max_in_a_row, 1)):
            if value < least:
                raise ValueError(f"SkipSpikes: {argument} must be at least {least}, got {value!r}.")
        self.threshold = threshold
        self.by = by
        self.window = window
        self.max_in_a_row = max_in_a_row
        self._counts: dict[str, int] = {}
        self._values: dict[str, list[float]] = {}
        self._in_a_row: dict[str, int] = {}
        self._losses: list[Tensor] = []

    @property
    def skipped_steps(self) -> int:
        """Number of steps skipped until now, of all optimizers."""
        return sum(self._counts.values())

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self.by == "loss" and pl_module.automatic_optimization:
            scaler = scaler_of(trainer)
            self._losses.append(loss.detach().float().mean() / (1 if scaler is None else scaler.get_scale()))

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        value = self._loss(trainer) if self.by == "loss" else self._norm(trainer, optimizer)
        if value is None:
            return
        label = label_of(trainer, optimizer)
        values = self._values.setdefault(label, [])
        finite = math.isfinite(value)
        zscore = robust_zscore(value, values) if finite and len(values) >= _LEAST else 0.0
        is_spike = zscore > self.threshold or not finite
        if finite:
            self._values[label] = [*values, value][-self.window :]
        in_a_row = self._in_a_row.get(label, 0)
        if not is_spike or in_a_row >= self.max_in_a_row:
            self._in_a_row[label] = 0
            return
        self._in_a_row[label] = in_a_row + 1
        self._counts[label] = self._counts.get(label, 0) + 1
        for p in parameters_of(optimizer):
            p.grad = None
        self._tell(trainer, label, value, zscore)

    def _tell(self, trainer: pl.Trainer, label: str, value: float, zscore: float) -> None:
        x = steps_made(trainer)
        count = float(self._counts[label])
        for logger in trainer.loggers:
            logger.log_metrics({f"{label}spike/skipped_steps": count}, step=x)
        trainer.callback_metrics[f"{label}spike/skipped_steps"] = torch.tensor(count)
        how = f"{zscore:.3g} standard deviations above the last ones" if math.isfinite(value) else "not finite"
        rank_zero_info(
            f"SkipSpikes, step {x}: skipped, {self.by} {value:.3g} is {how} ({count:.0f} skipped until now)."
        )

    def _norm(self, trainer: pl.Trainer, optimizer: Optimizer) -> float | None:
        members = parameters_of(optimizer)
        if trainer.world_size == 1 and all(p.grad is None for p in members):
            return None
        shards = strategies.shard_sums(trainer.strategy, members)
        squares = squares_of_gradients([gradient_of(p) for p in members])
        (squares,) = shards.add([squares], [members])
        norm = squares.sum().sqrt().float()
        # An infinity from a NaN, which a maximum over ranks may lose.
        norm = norm.nan_to_num(math.inf, math.inf) / loss_scale(trainer, optimizer)
        if trainer.world_size > 1:
            all_reduce_max(norm, [world()])
        return float(norm)

    def _loss(self, trainer: pl.Trainer) -> float | None:
        losses, self._losses = self._losses, []
        if not losses:
            return None
        loss = torch.stack(losses).mean()
        if trainer.world_size > 1:
            all_reduce_sum(loss, [world()])
        return float(loss)

    def state_dict(self) -> dict[str, Any]:
        return {"counts": dict(self._counts), "values": dict(self._values), "in_a_row": dict(self._in_a_row)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._counts = dict(state_dict["counts"])
        self._values = dict(state_dict["values"])
        self._in_a_row = dict(state_dict["in_a_row"])
