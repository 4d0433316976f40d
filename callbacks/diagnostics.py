"""A sensible set of diagnostics in one line."""

from __future__ import annotations

import base64
import html
import io
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.console import Console
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.diagnostics import figures, report
from lightning_optim.diagnostics.charts import LEARNING
from lightning_optim.diagnostics.diagnosis import diagnose
from lightning_optim.diagnostics.findings import Diagnosis
from lightning_optim.diagnostics.run import Run

from .gradient_health import GradientHealth
from .monitor import Keyed, Monitor, ProbingMonitor
from .optimizer_internals import OptimizerInternals
from .orthogonality_error import OrthogonalityError
from .pictures import Pictures
from .recorder import StepRecorder
from .run_record import RunRecord
from .sign_collapse import SignCollapse
from .spike_response import SpikeResponse
from .update_size import UpdateSize
from .update_variance import UpdateVariance

#: Probes are made at every so many-th measured step.
_PROBES = 20


#: Hooks that are called at every batch or step, also at those that are not measured.
_HOOKS_OF_BATCHES = (
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


def _called(monitors: Sequence[Monitor], hook: str) -> list[Monitor]:
    """Those of some monitors that do something of their own in a hook, and the first, which speaks for all."""
    return [m for m in monitors if m is monitors[0] or getattr(type(m), hook) is not getattr(Monitor, hook)]


class Text(str):
    """Words that a notebook shows line by line."""

    def __repr__(self) -> str:
        return str(self)


class Diagnostics(Keyed):
    """Shows what the optimizer does: one line that attaches the other diagnostic callbacks.

    ============ ===================================================================================================
    tier         monitors
    ============ ===================================================================================================
    ``off``      none
    ``light``    :class:`.GradientHealth`, :class:`.UpdateSize` and :class:`.RunRecord`, norms only: for every step
    ``standard`` all of these, :class:`.UpdateVariance` (online), :class:`.OrthogonalityError`, :class:`.SignCollapse`,
                 :class:`.OptimizerInternals`, :class:`.SpikeResponse`, which looks at the norm of every gradient, and
                 :class:`.Pictures`
    ``full``     the same, with the values of every layer and more pictures, and probes of update variance and spike
                 response at every 20th measured step, which cost several training steps each; a run that cannot be
                 probed (manual optimization, a data set without indices, ...) goes on without, after a warning
    ============ ===================================================================================================

    Works with any torch optimizer and never changes training. Values go to every logger of the Trainer, to
    ``trainer.callback_metrics`` (for early stopping and checkpoints) and to the ``history`` of each of ``monitors``;
    TensorBoard shows them on one page, "Custom scalars", below the questions that they answer. What they cost is logged
    as ``diagnostics/overhead_ms`` and ``diagnostics/overhead_share``.

    After training, also in a notebook, :meth:`plot` draws all of them, :meth:`summary` says what they mean, and
    :meth:`to_frame` makes a table of them. A notebook shows the callback itself as both.

    The console says what is broken when it happens, once each: a loss that is NaN or diverges, steps that are skipped,
    parameters that do not move. At the end of training it says the verdict on the run, as ``lightning-optim
    diagnostics`` does for its logs, and which rule trained which parameters.

    Args:
        tier: How much to measure.
        every_n_steps: Measure every so many optimizer steps.
        first_n_steps: Measure each of the first so many steps, too. Two, since some values compare two steps: early
            stopping finds all others from the first step on.
        layers: Shell-style patterns of the names of parameters whose own values are logged, too.
        quiet: Say nothing on the console: neither what is broken when it happens, nor the verdict at the end.

    Raises:
        ValueError: There is no such tier.

    Example:
        >>> diagnostics = Diagnostics("light", every_n_steps=10)
        >>> trainer = pl.Trainer(callbacks=[diagnostics], accelerator="cpu", logger=False)
        >>> [type(monitor).__name__ for monitor in diagnostics.monitors]
        ['GradientHealth', 'UpdateSize', 'RunRecord']
    """

    def __init__(
        self,
        tier: Literal["off", "light", "standard", "full"] = "standard",
        every_n_steps: int = 50,
        first_n_steps: int = 2,
        layers: Sequence[str] = (),
        quiet: bool = False,
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
            del common["layers"]
            self.monitors.append(Pictures(details=tier == "full", **common))
        if tier != "off":
            common["layers"] = layers
            self.monitors.append(RunRecord(norms_only=tier == "light", quiet=quiet, **common))
        for monitor in self.monitors:
            if isinstance(monitor, ProbingMonitor):
                monitor.probes_optional = True
        #: Which of the monitors each hook of a batch calls.
        self._calls: Mapping[str, Sequence[Monitor]] = {}
        #: Losses and validation metrics by tag, for :meth:`plot`.
        self._learning: dict[str, deque[tuple[int, Tensor]]] = {}
        self.tier = tier
        self.every_n_steps = every_n_steps
        self.first_n_steps = first_n_steps
        self.layers = tuple(layers)
        self.quiet = quiet

    # --- afterwards ---------------------------------------------------------------------------------------------

    def run(self, name: str = "this run") -> Run:
        """What has been measured, as :func:`lightning_optim.diagnostics.read_runs` reads it from logs."""
        series: dict[str, Iterable[tuple[int, Any]]] = dict(self._learning)
        for monitor in self.monitors:
            series |= monitor.history
        columns = {tag: list(zip(*values)) for tag, values in series.items()}
        scalars = {tag: (list(map(int, x)), list(map(float, y))) for tag, (x, y) in columns.items()}
        records = [record for monitor in self.monitors if isinstance(monitor, RunRecord) for record in monitor.records]
        return Run(name, scalars, records=tuple(records))

    def diagnosis(self, name: str = "this run") -> Diagnosis:
        """What is wrong with the run, by what has been recorded up to now."""
        return diagnose(self.run(name))

    def _conclude(self) -> None:
        """Say the verdict, with the first finding and what is not trained."""
        if self.quiet or not self.monitors:
            return
        found = self.diagnosis()
        if not found.measured:
            return
        lines = [f"Diagnostics: {found.line}."]
        lines += [f"{finding.sentence} Try: {finding.remedy}" for finding in found.findings[:1]]
        if found.coverage is not None:
            lines += [found.coverage.summary(), *found.coverage.warnings()]
        rank_zero_info("\n  ".join(lines))

    def plot(self) -> Any:
        """Every chart of what has been measured, as a ``matplotlib.figure.Figure``.

        Raises:
            ValueError: Nothing has been measured yet.
        """
        return figures.plot([self.run()])

    def summary(self) -> str:
        """What the values mean, in words."""
        text = io.StringIO()
        console = Console(file=text, width=100, force_jupyter=False)
        for part in report.summary([self.run()]):
            console.print(part)
        return Text(text.getvalue().strip())

    def to_frame(self) -> Any:
        """The values as a ``pandas.DataFrame`` with a row per step and a column per tag.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("Diagnostics.to_frame needs pandas: pip install pandas") from error
        columns = {
            tag: pandas.Series(values, index=pandas.Index(steps, name="step"), dtype=float).groupby(level=0).last()
            for tag, (steps, values) in self.run().scalars.items()
        }
        return pandas.DataFrame(columns).sort_index().rename_axis("step")

    def _repr_html_(self) -> str:
        if not self.run().scalars:
            return f"<p>Diagnostics({self.tier!r}): nothing has been measured yet.</p>"
        picture = base64.b64encode(figures.png(self.plot())).decode()
        return f'<pre>{html.escape(self.summary())}</pre><img alt="Diagnostics" src="data:image/png;base64,{picture}">'

    def _note(self, tag: str, trainer: pl.Trainer, value: Any) -> None:
        if isinstance(value, Tensor) and value.numel() == 1:
            self._learning.setdefault(tag, deque(maxlen=10_000)).append((trainer.global_step, value.detach().clone()))

    # --- every hook that a monitor uses -------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._calls = {hook: _called(self.monitors, hook) for hook in _HOOKS_OF_BATCHES}
        for monitor in self.monitors:
            monitor.setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for monitor in self.monitors:
            monitor.on_train_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        with StepRecorder.of(trainer).host_clock:
            for monitor in self._calls["on_train_batch_start"]:
                monitor.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        with StepRecorder.of(trainer).host_clock:
            for monitor in self._calls["on_before_backward"]:
                monitor.on_before_backward(trainer, pl_module, loss)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with StepRecorder.of(trainer).host_clock:
            for monitor in self._calls["on_after_backward"]:
                monitor.on_after_backward(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        with StepRecorder.of(trainer).host_clock:
            for monitor in self._calls["on_before_optimizer_step"]:
                monitor.on_before_optimizer_step(trainer, pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        with StepRecorder.of(trainer).host_clock:
            for monitor in self._calls["on_train_batch_end"]:
                monitor.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            if self.monitors and self.monitors[0].measures(max(1, self.monitors[0].counted)):
                loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
                if isinstance(loss, Tensor):  # which Lightning has divided by the number of micro-batches
                    self._note("train/loss", trainer, loss * trainer.accumulate_grad_batches)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or not self.monitors:
            return
        for monitor in self.monitors:
            monitor.on_validation_end(trainer, pl_module)
        for tag, value in trainer.callback_metrics.items():
            if LEARNING["validation"].shows(tag):
                self._note(tag, trainer, value)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for monitor in self.monitors:
            monitor.on_train_end(trainer, pl_module)
        self._conclude()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for monitor in self.monitors:
            monitor.teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        for monitor in self.monitors:
            monitor.on_exception(trainer, pl_module, exception)
        self._conclude()

    def state_dict(self) -> dict[str, Any]:
        return {monitor.settings_key: monitor.state_dict() for monitor in self.monitors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for monitor in self.monitors:
            # A monitor that was added since, or whose settings have changed, begins anew.
            if monitor.settings_key in state_dict:
                monitor.load_state_dict(state_dict[monitor.settings_key])
