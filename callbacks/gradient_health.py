"""Gradients: their norm before and after clipping, their noise, and the steps that they have cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from functools import partial
from math import isfinite, sqrt
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.diagnostics.charts import CHARTS, Chart
from lightning_optim.diagnostics.noise_scale import NoiseScale
from lightning_optim.diagnostics.parameter_change import sum_of_squares
from lightning_optim.diagnostics.what_if import parameters_of
from lightning_optim.optimizers import NonFiniteGradientsError
from lightning_optim.processes import all_reduce_sum, strategies, world

from .loop import is_automatic, scaler_of
from .monitor import Monitor, Results, layers_of
from .recorder import Step, StepRecorder, dense, label_of

_CLIPPED = 1e-4  # Relative change of the norm from which a gradient counts as clipped; rounding is far below.
_DECAY = 0.95


class GradientHealth(Monitor):
    r"""Norm of the gradient before and after clipping, clipped and skipped steps, loss scale and noise scale.

    ============================== ==================================================================================
    ``gradient/norm``              norm of the gradient over all parameters, unscaled, before clipping
    ``gradient/norm_clipped``      the same as the optimizer consumed it, from the first step on that was clipped
    ``gradient/clipped_fraction``  running mean (decay 0.95 per measured step) of whether clipping changed the gradient
    ``gradient/zeros``             fraction of elements that are exactly zero: dead units, unused embeddings
    ``gradient/nonfinite``         elements that were NaN or infinite in the steps measured since the last log
    ``gradient/skipped_steps``     steps so far that the loss scaler or the optimizer skipped
    ``gradient/loss_scale``        scale of the loss; with 16-mixed precision only
    ``gradient/noise_scale``       simple gradient noise scale in examples, see
                                   :class:`lightning_optim.diagnostics.NoiseScale`; with one optimizer only, from the
                                   micro-batches of ``accumulate_grad_batches`` and, under DDP, of all processes
    ============================== ==================================================================================

    With ``layers``, also ``gradient_norm/PARAMETER`` and ``gradient_norm_clipped/PARAMETER``. The noise scale keeps
    nothing of the gradients of micro-batches but their norms.

    Args:
        every_n_steps: See :class:`.Monitor`, also for the next three.
        first_n_steps: Measure each of the first so many steps, too.
        parameters: Patterns of the names of parameters to measure.
        layers: Patterns of the names of parameters whose own values are logged, too.
        norms_only: Leave ``zeros`` out, whose count costs more than all the rest.

    Example:
        >>> GradientHealth(every_n_steps=10).family
        'gradient'
    """

    family = "gradient"
    needs_updates = False
    charts: ClassVar = CHARTS["gradient"]

    def __init__(
        self,
        every_n_steps: int | Callable[[int], bool] = 50,
        first_n_steps: int = 0,
        parameters: Sequence[str] = ("*",),
        layers: Sequence[str] = (),
        norms_only: bool = False,
    ) -> None:
        super().__init__(every_n_steps, first_n_steps, parameters, layers)
        self.norms_only = norms_only
        #: By label and name of the parameter.
        self._nonfinite: dict[str, Tensor] = {}
        #: Parameters whose gradient a backward pass adds up from several parts.
        self._in_parts: set[Tensor] = set()
        self._small = _SmallBatches(self._in_parts)

    def charts_of(self, trainer: pl.Trainer) -> Mapping[str, Chart]:
        empty = {"gradient noise scale": not self._has_noise_scale(trainer), "zero gradients": self.norms_only}
        return {title: chart for title, chart in self.charts.items() if not empty.get(title)}

    def before_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> bool:
        self._small.finish()
        if not step.watched:
            return False
        if not step.unclipped_sq.isfinite().all():
            # Such a step may be skipped and then has no results; the number waits for those of the next one.
            for name, g in zip(self._keys(step), step.gradients()):
                self._nonfinite[name] = self._nonfinite.get(name, 0) + torch.count_nonzero(~g.isfinite())
        self._skipped = self._skips.get(step.label, 0) + getattr(step.optimizer, "skipped_steps", 0)
        self._loss_scale = _loss_scale(trainer)
        return True

    def sums(self, step: Step) -> dict[str, Tensor]:
        before, after = step.unclipped_sq, step.change.gradient_sq
        none = before.new_zeros(())
        nonfinite = [self._nonfinite.pop(name, none).to(none) for name in self._keys(step)]
        sums = {"before": before, "after": after, "nonfinite": torch.stack(nonfinite)}
        if not self.norms_only:
            sums |= {"driven": step.change.driven, "numel": step.change.numel}
        return sums if step.shards.groups else sums | self._small.take(self._loss_scale, none)

    def results(self, step: Step, sums: dict[str, Tensor]) -> Results:
        before_sq, after_sq = float(sums["before"].sum()), float(sums["after"].sum())
        before, after = sqrt(before_sq), sqrt(after_sq)
        values = {
            "norm": before,
            "clipped_fraction": self._clipped_fraction(step.label, float(abs(after - before) > _CLIPPED * before)),
            "nonfinite": float(sums["nonfinite"].sum()),
            "skipped_steps": float(self._skipped),
        }
        layers = {"norm": sums["before"].sqrt()}
        if values["clipped_fraction"]:
            values["norm_clipped"] = after
            layers["norm_clipped"] = sums["after"].sqrt()
        if "driven" in sums:
            values["zeros"] = 1 - float(sums["driven"].sum() / sums["numel"].sum())
        if self._loss_scale != 1:
            values["loss_scale"] = self._loss_scale
        if "small_sq" in sums and isfinite(float(sums["small_sq"])):
            values["noise_scale"] = self._noise_scale(before_sq, sums)
        return Results(values, layers_of(step, layers))

    @staticmethod
    def _keys(step: Step) -> list[str]:
        return [f"{step.label}{name}" for name in step.names]

    def _clipped_fraction(self, label: str, clipped: float) -> float:
        mean, weight = self.memory.get(f"{label}clipped", torch.zeros(2, dtype=torch.float64)).tolist()
        mean, weight = _DECAY * mean + (1 - _DECAY) * clipped, _DECAY * weight + (1 - _DECAY)
        self.memory[f"{label}clipped"] = torch.tensor([mean, weight], dtype=torch.float64)
        return mean / weight

    def _noise_scale(self, big_sq: float, sums: dict[str, Tensor]) -> float:
        estimate = NoiseScale(*self.memory.get("noise_scale", torch.tensor([_DECAY, 0.0, 0.0, 0.0])).tolist())
        big_sq *= float(sums["big_factor"])
        estimate.update(float(sums["small_sq"]), big_sq, float(sums["small"]), float(sums["big"]))
        self.memory["noise_scale"] = torch.tensor(astuple(estimate), dtype=torch.float64)
        return estimate.value

    def _has_noise_scale(self, trainer: pl.Trainer) -> bool:
        accumulated = trainer.world_size == 1 and trainer.accumulate_grad_batches > 1
        known = is_automatic(trainer) and self.parameters == ("*",)
        return known and len(trainer.optimizers) == 1 and (accumulated or _processes(trainer) > 1)

    # --- hooks for the noise scale --------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._small.complete:
            self._small = _SmallBatches(self._in_parts)
        if self.measures(self._counts.get("", 0) + 1) and self._has_noise_scale(trainer):
            self._small.batch_start(trainer, batch)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self._small.sizes and not self._small.complete:
            self._small.watch(trainer.optimizers[0])

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._small.unwatch()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._small.finish()
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._small.finish()
        if isinstance(exception, NonFiniteGradientsError):
            # Skipped steps have no values of their own, and there is none to come that could tell of them.
            recorder = StepRecorder.of(trainer)
            for optimizer in trainer.optimizers:
                label = label_of(trainer, optimizer)
                skipped = self._skips.get(label, 0) + getattr(optimizer, "skipped_steps", 0)
                recorder.add(self, self.tagged(label, Results({"skipped_steps": float(skipped)}, {})))
            recorder.log(trainer)
        super().on_exception(trainer, pl_module, exception)


class _SmallBatches:
    """Squared norms of the gradients of the micro-batches that one step averages, over all processes of DDP.

    They are caught on their way to where they are added up, so that none has to be kept. Where a block runs twice under
    reentrant checkpointing, a backward pass delivers a gradient in parts. Those are summed up until the pass has ended,
    from the second step on: in the first, in which it turns out, the norm is not known.

    Args:
        in_parts: Parameters whose gradients are known to come in parts; others are added when it turns out.
    """

    def __init__(self, in_parts: set[Tensor]) -> None:
        self.sizes: list[int] = []
        self.complete = False
        self._squares: list[Tensor] = []
        self._handles: list[Any] = []
        self._in_parts = in_parts
        self._seen: set[Tensor] = set()
        self._sums: dict[Tensor, Tensor] = {}
        self._is_known = True

    def batch_start(self, trainer: pl.Trainer, batch: Any) -> None:
        try:
            self.sizes.append(extract_batch_size(batch))
        except MisconfigurationException:  # A batch of unknown size: no noise scale.
            self.sizes = []
        self._micro_batches = trainer.accumulate_grad_batches
        self._processes = _processes(trainer)

    def watch(self, optimizer: Optimizer) -> None:
        """Before the backward pass."""
        trained = [p for p in parameters_of(optimizer) if p.requires_grad]
        self._handles = [p.register_hook(partial(self._catch, p)) for p in trained]

    def _catch(self, p: Tensor, gradient: Tensor) -> None:
        with torch.no_grad():
            gradient = dense(gradient)
            if p in self._in_parts:
                self._sums[p] = self._sums[p].add_(gradient) if p in self._sums else gradient.clone()
            elif p in self._seen:
                self._in_parts.add(p)
                self._is_known = False
            else:
                self._seen.add(p)
                self._squares.append(sum_of_squares([gradient])[0])

    def unwatch(self) -> None:
        """After the backward pass, or where it has failed."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._squares += [sum_of_squares([gradient])[0] for gradient in self._sums.values()]
        self._sums = {}
        self._seen = set()

    def finish(self) -> None:
        """The gradient of the step is complete."""
        self.complete = True
        self.unwatch()

    def take(self, loss_scale: float, zero: Tensor) -> dict[str, Tensor]:
        """Mean squared norm of the small gradients, sizes of small and whole batch, and correction of the latter."""
        parts = len(self.sizes)
        if not parts or self._processes * parts < 2:
            return {}
        small_sq = torch.stack([zero, *(x.to(zero) for x in self._squares)]).sum()
        if not self._is_known:  # One rank may find it out alone, and all of them have to take part in the sum.
            small_sq = small_sq * torch.nan
        if self._processes > 1:
            all_reduce_sum(small_sq, [world()])
        # Lightning divides the loss of each micro-batch by their number, of which the last step of an epoch may have
        # fewer.
        small_sq *= (self._micro_batches / loss_scale) ** 2 / (self._processes * parts)
        numbers = {
            "small": sum(self.sizes) / parts,
            "big": sum(self.sizes) * self._processes,
            "big_factor": (self._micro_batches / parts) ** 2,
        }
        return {"small_sq": small_sq} | {name: small_sq.new_full((), float(x)) for name, x in numbers.items()}


def _processes(trainer: pl.Trainer) -> int:
    """How many gradients are averaged."""
    return trainer.world_size if strategies.averages_gradients(trainer.strategy) else 1


def _loss_scale(trainer: pl.Trainer) -> float:
    scaler = scaler_of(trainer)
    return 1.0 if scaler is None else scaler.get_scale()
