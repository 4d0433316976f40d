"""A sensible set of diagnostics in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer

from .gradient_health import GradientHealth
from .monitor import Keyed, Monitor, ProbingMonitor
from .optimizer_internals import OptimizerInternals
from .orthogonality_error import OrthogonalityError
from .sign_collapse import SignCollapse
from .spike_response import SpikeResponse
from .update_size import UpdateSize
from .update_variance import UpdateVariance

#: Probes are made at every so many-th measured step.
_PROBES = 20


class Diagnostics(Keyed):
    """Shows what the optimizer does: one line that attaches the other diagnostic callbacks.

    ============ ===================================================================================================
    tier         monitors
    ============ ===================================================================================================
    ``off``      none
    ``light``    :class:`.GradientHealth` and :class:`.UpdateSize`, norms only: for every step
    ``standard`` all of these, :class:`.UpdateVariance` (online), :class:`.OrthogonalityError`, :class:`.SignCollapse`,
                 :class:`.OptimizerInternals`, and :class:`.SpikeResponse`, which looks at the norm of every gradient
    ``full``     the same, with the values of every layer, and probes of update variance and spike response at every
                 20th measured step, which cost several training steps each; a run that cannot be probed (manual
                 optimization, a data set without indices, ...) goes on without, after a warning
    ============ ===================================================================================================

    Works with any torch optimizer and never changes training. Values go to every logger of the Trainer, to
    ``trainer.callback_metrics`` (for early stopping and checkpoints) and to the ``history`` of each of ``monitors``;
    TensorBoard shows them on one page, "Custom scalars", "Diagnostics". What they cost is logged as
    ``diagnostics/overhead_ms`` and ``diagnostics/overhead_share``.

    Args:
        tier: How much to measure.
        every_n_steps: Measure every so many optimizer steps.
        first_n_steps: Measure each of the first so many steps, too.
        layers: Shell-style patterns of the names of parameters whose own values are logged, too.

    Raises:
        ValueError: There is no such tier.

    Example:
        >>> diagnostics = Diagnostics("light", every_n_steps=10)
        >>> trainer = pl.Trainer(callbacks=[diagnostics], accelerator="cpu", logger=False)
        >>> [type(monitor).__name__ for monitor in diagnostics.monitors]
        ['GradientHealth', 'UpdateSize']
    """

    def __init__(
        self,
        tier: Literal["off", "light", "standard", "full"] = "standard",
        every_n_steps: int = 50,
        first_n_steps: int = 0,
        layers: Sequence[str] = (),
    ) -> None:
        if tier not in ("off", "light", "standard", "full"):
            raise ValueError(f"Diagnostics: tier={tier!r} is not one of 'off', 'light', 'standard', 'full'.")
        if tier == "full" and not layers:
            layers = ("*",)
        common: dict[str, Any] = {"every_n_steps": every_n_steps, "first_n_steps": first_n_steps, "layers": layers}
        self.monitors: list[Monitor] = []
        if tier != "off":
            norms_only = tier == "light"
            self.monitors += [
                GradientHealth(norms_only=norms_only, **common),
                UpdateSize(norms_only=norms_only, **common),
            ]
        if tier in ("standard", "full"):
            probes: dict[str, Any] = {"probe_every_n_steps": _PROBES * every_n_steps if tier == "full" else None}
            self.monitors += [
                UpdateVariance(**common, **probes),
                OrthogonalityError(**common),
                SignCollapse(**common),
                OptimizerInternals(**common),
                SpikeResponse(**probes),
            ]
        for monitor in self.monitors:
            if isinstance(monitor, ProbingMonitor):
                monitor.probes_optional = True
        self.tier = tier
        self.every_n_steps = every_n_steps
        self.first_n_steps = first_n_steps
        self.layers = tuple(layers)

    # --- every hook that a monitor uses -------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        for monitor in self.monitors:
            monitor.setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for monitor in self.monitors:
            monitor.on_train_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        for monitor in self.monitors:
            monitor.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        for monitor in self.monitors:
            monitor.on_before_backward(trainer, pl_module, loss)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for monitor in self.monitors:
            monitor.on_after_backward(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        for monitor in self.monitors:
            monitor.on_before_optimizer_step(trainer, pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for monitor in self.monitors:
            monitor.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for monitor in self.monitors:
            monitor.teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        for monitor in self.monitors:
            monitor.on_exception(trainer, pl_module, exception)

    def state_dict(self) -> dict[str, Any]:
        return {monitor.settings_key: monitor.state_dict() for monitor in self.monitors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for monitor in self.monitors:
            # A monitor that was added since, or whose settings have changed, begins anew.
            if monitor.settings_key in state_dict:
                monitor.load_state_dict(state_dict[monitor.settings_key])
