"""What gradient spikes do to the updates that follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_optim.diagnostics.charts import CHARTS, Chart
from lightning_optim.diagnostics.spike_response import (
    THRESHOLD,
    WINDOW,
    SpikeWatch,
    spike_probe,
    spike_probe_sums,
)
from lightning_optim.diagnostics.what_if import gradients_of
from lightning_optim.processes import local

from .isolation import isolated_steps
from .monitor import ProbingMonitor, Results
from .recorder import Step
from .update_variance import clipping


class SpikeResponse(ProbingMonitor):
    r"""Gradient spikes, and how the updates after them differ from what they were.

    ===================================== ===========================================================================
    ``spike/zscore``                      robust z-score of the gradient norm before clipping, the largest since it
                                          was logged last
    ``spike/zscore_log10``                its decimal logarithm, 0 for a z-score of 1 or less
    ``spike/norm_max``                    largest gradient norm before clipping since it was logged last
    ``spike/count``                       number of spikes until now, from the first one on
    ``spike/score``                       share of the steps until now that were spikes
    ``spike/amplification``               largest update RMS after a spike, relative to the baseline
    ``spike/suppression``                 smallest update RMS after a spike, relative to the baseline
    ``spike/recovery_steps``              steps after a spike until the update RMS stays at the baseline
    ``spike/probe_amplification/SCALE``   of a probe: largest ratio of update RMS with and without a spike
    ``spike/probe_displacement/SCALE``    of a probe: by how many updates parameters end up elsewhere
    ``spike/probe_recovery_steps/SCALE``  of a probe: steps until update RMS is what it is without the spike
    ===================================== ===========================================================================

    *Real spikes* are steps whose gradient norm :math:`x` has a z-score
    :math:`(x - \mathrm{median}) / (1.4826\,\mathrm{MAD})` above ``threshold``, by the last ``window`` norms (at least
    32). The baseline is the median of the last nine update RMS, measured away from spikes, at every tenth step up to
    the hundredth and at every fiftieth after it. Updates have recovered when their RMS has stayed within 10 % of it for
    five steps (or within three robust standard deviations, where calm updates vary more than that); after
    ``follow_steps`` steps they have not, and that number is logged. The cost of an ordinary step is that of the
    gradient norm, which a GPU has to finish first; of steps after a spike, that of :class:`.UpdateSize` at every step.
    Where parameters are sharded, each process copies its part at every step, since whether there is a spike is known
    after the one reduction only.

    *Probes*, made every ``probe_every_n_steps``, follow a copy of the optimizer from the state it is in for
    ``probe_steps`` steps with the present gradient, to which a spike is added in the first: in each element its sign is
    random, its size ``scale`` times the RMS gradient of the parameter. They are compared step by step with the same
    steps without the spike, on at most 4,096 elements of each parameter. Gradients are clipped as the Trainer clips
    (but not by an overridden ``configure_gradient_clipping``), so what is seen is the response of this run; for that of
    optimizers alone see :func:`lightning_optim.diagnostics.spike_response`. One probe costs
    ``(len(probe_scales) + 1) * (probe_steps + 1)`` optimizer steps, one reduction more where parameters are sharded,
    and, until it is done, memory for a copy of the optimizer's state and five of the parameters: gradients and changes
    are as large.

    Args:
        every_n_steps: Look at the gradient norm every so many optimizer steps, or where a function of the step is
            true. Spikes in between go unnoticed.
        first_n_steps: Look at each of the first so many steps, too.
        parameters: Shell-style patterns of the names of parameters to measure.
        threshold: z-score from which a gradient norm is a spike; 6 as in OLMo-core's SpikeScore.
        window: Number of gradient norms that one is compared with; 128 as there.
        follow_steps: Steps after which a spike counts as not recovered.
        probe_every_n_steps: Probe every so many optimizer steps; ``None`` for never.
        probe_scales: Sizes of the spikes.
        probe_steps: Steps after the spike.
        seed: Seed of the signs.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> spikes = SpikeResponse(probe_every_n_steps=4, probe_scales=[1e3], probe_steps=5)
        >>> trainer = pl.Trainer(max_steps=8, callbacks=[spikes], accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())  # with SGD, of which a spike moves one step only
        >>> list(spikes.history["spike/probe_recovery_steps/1e+03"])
        [(3, 1.0), (7, 1.0)]
    """

    family = "spike"
    charts: ClassVar = CHARTS["spike"]

    def __init__(
        self,
        every_n_steps: int | Callable[[int], bool] = 1,
        first_n_steps: int = 0,
        parameters: Sequence[str] = ("*",),
        threshold: float = THRESHOLD,
        window: int = WINDOW,
        follow_steps: int = 100,
        probe_every_n_steps: int | None = None,
        probe_scales: Sequence[float] = (1e1, 1e3, 1e9),
        probe_steps: int = 30,
        seed: int = 0,
    ) -> None:
        super().__init__(every_n_steps, first_n_steps, parameters)
        for argument, value, least in (
            ("window", window, 2),
            ("follow_steps", follow_steps, 1),
            ("probe_every_n_steps", probe_every_n_steps, 1),
            ("probe_steps", probe_steps, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"SpikeResponse: {argument} must be at least {least}, got {value!r}.")
        if threshold <= 0 or any(scale <= 0 for scale in probe_scales):
            raise ValueError(
                f"SpikeResponse: threshold and probe_scales must be positive, got {threshold!r} and {probe_scales!r}."
            )
        self.threshold = threshold
        self.window = window
        self.follow_steps = follow_steps
        self.probe_every_n_steps = probe_every_n_steps
        self.probe_scales = tuple(probe_scales)
        self.probe_steps = probe_steps
        self.seed = seed
        self._watches: dict[str, SpikeWatch] = {}
        self._probe: dict[str, Tensor] = {}

    def charts_of(self, trainer: pl.Trainer) -> Mapping[str, Chart]:
        return {title: chart for title, chart in self.charts.items() if self.can_probe or "virtual" not in title}

    # --- values -------------------------------------------------------------------------------------------------

    def before_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> bool:
        self._probe = {}
        if not step.watched:
            return False
        # The norm of a sharded gradient is known from the one reduction after the step. Until then any step may be one
        # to measure, also if the gradient is calm in this process, whose part of the parameters is copied therefore.
        self._wanted = bool(step.shards.groups) or self._see(step, step.unclipped_norm)
        if self.probes(step.index):
            with self.probing():
                self._probe = self._respond(trainer, step)
            if not self.can_probe:  # Another process cannot.
                self._probe = {}
        return self._wanted or bool(self._probe)

    def sums(self, step: Step) -> dict[str, Tensor]:
        sums = {"update_sq": step.change.update_sq, "numel": step.change.numel} | self._probe
        return sums | {"gradient_sq": step.unclipped_sq} if step.shards.groups else sums

    def results(self, step: Step, sums: dict[str, Tensor]) -> Results:
        wanted = self._see(step, sums["gradient_sq"].sum().sqrt()) if step.shards.groups else self._wanted
        if not wanted and not self._probe:
            return Results({})
        rms = float((sums["update_sq"].sum() / sums["numel"].sum()).sqrt())
        values = self._watch(step.label).measured(step.index, rms)
        if self._probe:
            probe = {name: sums[name] for name in self._probe}
            values |= {f"probe_{name}": x for name, x in spike_probe(probe, self.probe_scales).items()}
        return Results(values)

    def _watch(self, label: str) -> SpikeWatch:
        return self._watches.setdefault(label, SpikeWatch(self.threshold, self.window, self.follow_steps))

    def _see(self, step: Step, norm: Tensor) -> bool:
        return self._watch(step.label).see(norm.item())

    def _respond(self, trainer: pl.Trainer, step: Step) -> dict[str, Tensor]:
        gradients = gradients_of(step.optimizer, step.loss_scale)
        # A probe of sharded parameters takes a reduction of its own: the sums that it adds to the one after the step
        # depend on the size of the spike, which is itself a sum over processes.
        numel = step.unclipped_sq.new_tensor([local(w.parameter).numel() for w in step.watched])
        gradient_sq, numel = step.shards.add([step.unclipped_sq, numel], [step.parameters] * 2)
        rms = (gradient_sq / numel.clamp(min=1)).sqrt()
        spike = {}
        for w, size in zip(step.watched, rms.tolist()):
            spike[w.parameter] = torch.empty_like(w.parameter)
            signs = local(spike[w.parameter])
            generator = torch.Generator(signs.device).manual_seed(self.seed + step.index)
            signs.bernoulli_(0.5, generator=generator).mul_(2 * size).sub_(size)
        with isolated_steps(step.optimizer):
            return spike_probe_sums(
                step.optimizer, gradients, spike, self.probe_scales, self.probe_steps, clipping(trainer)
            )

    # --- checkpoints --------------------------------------------------------------------------------------------

    def forget(self) -> None:
        super().forget()
        self._watches = {}

    def state_dict(self) -> dict[str, Any]:
        watches = {label: dataclasses.asdict(watch) for label, watch in self._watches.items()}
        return super().state_dict() | {"watches": watches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._watches = {label: SpikeWatch(**watch) for label, watch in state_dict["watches"].items()}
