"""What all diagnostic callbacks have in common."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import takewhile
from typing import Any, ClassVar, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim import processes
from lightning_optim.diagnostics.charts import Chart
from lightning_optim.routing import clean_name

from .recorder import Step, StepRecorder, Watched

_HISTORY = 10_000

#: How long a process waits for others to end a probe.
PATIENCE = timedelta(minutes=5)


#: Values of single parameters by their names, to which ``/`` and a part may be added.
Layers = Mapping[str, float]


class Results(NamedTuple):
    """What a monitor makes of a step.

    Args:
        values: Values by name.
        layers: By name, the values of all single parameters that have one. Which of them are logged,
            ``Monitor.layers`` says.
    """

    values: dict[str, float]
    layers: Mapping[str, Layers] = {}


class Keyed(pl.Callback):
    """A callback whose state in checkpoints is told from that of others by its settings, and then by its place.

    Callbacks with equal settings, or that differ in what has no name in a checkpoint, like functions, are numbered in
    the order in which the Trainer has them.
    """

    _state_key: str | None = None

    @cached_property
    def settings_key(self) -> str:
        """Class and settings as one string."""
        plain = {name: value for name, value in vars(self).items() if isinstance(value, (int, float, str, tuple))}
        return self._generate_state_key(**{name: value for name, value in plain.items() if not name.startswith("_")})

    @property
    def state_key(self) -> str:
        # The Trainer's constructor, which does not yet say which others it has, only wants them all different.
        return self._state_key or f"{self.settings_key} {id(self)}"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        before = takewhile(lambda callback: callback is not self, trainer.callbacks)  # type: ignore[attr-defined]
        equal = sum(isinstance(callback, Keyed) and callback.settings_key == self.settings_key for callback in before)
        self._state_key = f"{self.settings_key} {equal + 1}" if equal else self.settings_key

    def on_after_setup(self, fabric: Any, module: Any) -> None:
        """Called by ``Fabric.setup``, which calls nothing else: say so, instead of measuring nothing.

        Raises:
            MisconfigurationException: Always.
        """
        raise MisconfigurationException(
            f"Fabric never calls {type(self).__name__}, which is a callback of Lightning's Trainer. Leave it out of "
            "Fabric(callbacks=...), and write `watch = lightning_optim.Watch(model, optimizer, folder=...)` after "
            "fabric.setup."
        )


class Monitor(Keyed):
    """Base of the diagnostic callbacks: which steps and which parameters it measures, and how its values are named.

    A subclass says which sums over elements it needs (:meth:`sums`, computed by each process on its part and added up
    over processes) and what to make of them (:meth:`results`). Everything else, the copy of the parameters, skipped
    steps, precision, processes and loggers, is the :class:`.recorder.StepRecorder`'s, which all monitors of a Trainer
    share.

    Training is never changed: weights are bit for bit those of a run without the callback.

    A value ``name`` is logged as ``family/name``, and for the layers asked for as ``family_name/PARAMETER``. Where a
    module has several optimizers, their class and number come before the tag.

    Args:
        every_n_steps: Measure every so many optimizer steps, or the steps (counted from 1) for which a function of the
            step is true. All processes must come to the same answer.
        first_n_steps: Measure each of the first so many steps, too.
        parameters: Shell-style patterns of the names of parameters to measure.
        layers: Shell-style patterns of the names of parameters whose own values are logged, too.

    Raises:
        ValueError: An interval is below 1, or patterns are not in a list.
        MisconfigurationException: When training starts: a pattern matches no parameter, or the strategy hides what
            is to be measured.

    Attributes:
        history: By tag, the last 10,000 pairs of step and value, also where there is no logger.
    """

    #: First part of the tags.
    family: ClassVar[str]
    #: Charts of its values by title: for TensorBoard's custom scalars, and for reports.
    charts: ClassVar[Mapping[str, Chart]] = {}
    #: Whether it measures hidden matrices only, which FSDP1 does not keep.
    needs_matrices: ClassVar[bool] = False
    #: Whether it looks at the change of the parameters, for which they are copied.
    needs_updates: ClassVar[bool] = True
    #: Whether it wants what our matrix rules report during a step.
    needs_observations: ClassVar[bool] = False
    #: The module of the last run. Another module starts from the beginning.
    _module: weakref.ref[pl.LightningModule] | None = None

    def __init__(
        self,
        every_n_steps: int | Callable[[int], bool] = 50,
        first_n_steps: int = 0,
        parameters: Sequence[str] = ("*",),
        layers: Sequence[str] = (),
    ) -> None:
        name = type(self).__name__
        if not callable(every_n_steps) and every_n_steps < 1:
            raise ValueError(f"{name}: every_n_steps must be at least 1 or a function, got {every_n_steps!r}.")
        if first_n_steps < 0:
            raise ValueError(f"{name}: first_n_steps must not be negative, got {first_n_steps!r}.")
        for argument, patterns in (("parameters", parameters), ("layers", layers)):
            if isinstance(patterns, str):
                raise ValueError(
                    f"{name}: {argument} must be a list of patterns, got {patterns!r}; write [{patterns!r}]."
                )
        self.every_n_steps = every_n_steps
        self.first_n_steps = first_n_steps
        self.parameters = tuple(parameters)
        self.layers = tuple(layers)
        self.history: dict[str, deque[tuple[int, float]]] = {}
        #: Tensors that are remembered from step to step, by name; saved in checkpoints.
        self.memory: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._selection: tuple[Sequence[Watched], list[Watched]] = ((), [])
        self._skips: dict[str, int] = {}
        self._sharded = False

    # --- for subclasses -----------------------------------------------------------------------------------------

    def before_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> bool | None:
        """Called before a step that is measured: gradients are there, complete and not clipped.

        Returns:
            ``False`` to leave it at that: for this monitor, parameters need not be copied nor the step measured.
        """
        return None

    def sums(self, step: Step) -> dict[str, Tensor]:
        """Called after the step. What this rank computes from its shards, to be added up over ranks.

        Vectors with one entry per parameter of ``step.watched``, unless :meth:`summed_from` says something else.
        """
        return {}

    def summed_from(self, step: Step, sums: Mapping[str, Tensor]) -> Sequence[Sequence[Tensor]]:
        """From which parameters each of the :meth:`sums` is computed: one for each entry, or one for all of it."""
        return [step.parameters] * len(sums)

    def observe(self, parameter: Tensor, name: str, value: Tensor) -> None:
        """Called during a step that is measured with what a matrix rule of ours reports.

        To be called, :attr:`needs_observations` must be true. Values belong to the optimizer: take of them what is
        needed at once, and keep none.
        """

    def condense(self, step: Step, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Called with the added sums where they are, on the device: make small what is large."""
        return sums

    def results(self, step: Step, sums: dict[str, Tensor]) -> Results:
        """The values, from the condensed sums, which are float64 on the CPU."""
        raise NotImplementedError

    def look(self, step: Step, layers: Mapping[str, Layers]) -> None:
        """Called when all monitors have their results, with the values of single parameters by ``family/name``."""

    def remembered(self, step: Step, name: str, current: Sequence[Tensor]) -> list[Tensor]:
        """What was remembered under a name for each parameter of the step, like ``current``; zeros at first."""
        self._sharded = bool(step.shards.groups)
        known = [self.memory.get(f"{step.label}{name}/{parameter}") for parameter in step.names]
        # What another number of processes has remembered may be of other elements.
        return [
            torch.zeros_like(x) if old is None or old.shape != x.shape else old.to(x) for old, x in zip(known, current)
        ]

    def remember(self, step: Step, name: str, current: Sequence[Tensor]) -> None:
        """Remember a tensor for each parameter of the step."""
        self.memory |= {f"{step.label}{name}/{parameter}": x.clone() for parameter, x in zip(step.names, current)}

    def charts_of(self, trainer: pl.Trainer) -> Mapping[str, Chart]:
        """Those of :attr:`charts` that a run of this Trainer fills."""
        return self.charts

    # --- which steps, which parameters --------------------------------------------------------------------------

    def count(self, label: str) -> int:
        """Count a step of the optimizer with that label. Returns its number if it is measured, otherwise 0."""
        index = self._counts[label] = self._counts.get(label, 0) + 1
        return index if self.measures(index) else 0

    def skip(self, label: str) -> None:
        """Count a step of the optimizer with that label that the loss scaler has skipped."""
        self._skips[label] = self._skips.get(label, 0) + 1

    @property
    def counted(self) -> int:
        """Steps up to now, of all optimizers."""
        return sum(self._counts.values())

    def measures(self, index: int) -> bool:
        """Whether the step with that number, from 1, is measured."""
        if index <= self.first_n_steps:
            return True
        return self.every_n_steps(index) if callable(self.every_n_steps) else index % self.every_n_steps == 0

    def select(self, watched: Sequence[Watched]) -> Sequence[Watched]:
        """Those of an optimizer's parameters that are measured."""
        if self._selection[0] is not watched:  # which is the same list from step to step
            of_kind = [w for w in watched if w.is_matrix or not self.needs_matrices]
            self._selection = watched, [w for w in of_kind if matches(w.name, self.parameters)]
        return self._selection[1]

    # --- values -------------------------------------------------------------------------------------------------

    def tagged(self, label: str, results: Results) -> dict[str, float]:
        """Results by their tags, of the layers only those asked for, without what is undefined (NaN)."""
        values = {f"{label}{self.family}/{name}": value for name, value in results.values.items()}
        for name, layers in results.layers.items():
            for layer, value in layers.items():
                if matches(layer.partition("/")[0], self.layers):
                    values[f"{label}{self.family}_{name}/{layer}"] = value
        return {tag: value for tag, value in values.items() if not math.isnan(value)}

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Add values to :attr:`history`."""
        for tag, value in values.items():
            self.history.setdefault(tag, deque(maxlen=_HISTORY)).append((step, value))

    def take_records(self, step: int) -> Sequence[Mapping[str, Any]]:
        """What is to be written to event files besides values, with the values of a step; handed over once."""
        return ()

    # --- hooks --------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_module"}

    def forget(self) -> None:
        """Start from the beginning, as for another module. The history stays."""
        self._counts, self._skips, self.memory = {}, {}, {}

    def state_dict(self) -> dict[str, Any]:
        # Lightning saves the state of the first process. What the others remember of their shards is not in it.
        counts = {"counts": dict(self._counts), "skips": dict(self._skips)}
        return counts | {"memory": {} if self._sharded else dict(self.memory)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._counts = dict(state_dict["counts"])
        self._skips = dict(state_dict["skips"])
        self.memory = dict(state_dict["memory"])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            if self._module is not None and self._module() is not pl_module:
                self.forget()
            self._module = weakref.ref(pl_module)
            StepRecorder.of(trainer).attach(self, trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            StepRecorder.of(trainer).watch(optimizer)
        names = [clean_name(name) for name, _ in pl_module.named_parameters()]
        for argument, patterns in (("parameters", self.parameters), ("layers", self.layers)):
            for pattern in patterns:
                if pattern != "*" and not any(matches(name, [pattern]) for name in names):
                    raise MisconfigurationException(
                        f"{type(self).__name__}: {argument}: no parameter matches {pattern!r}. "
                        f"There are {', '.join(names[:5])}, ..."
                    )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._lead(trainer, "batch_start")

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._lead(trainer, "before", trainer, pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._lead(trainer, "batch_end")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._detach(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._detach(trainer)

    def _detach(self, trainer: pl.Trainer) -> None:
        StepRecorder.of(trainer).detach(self)
        self._selection = ((), [])  # A callback outlives the module.

    def _lead(self, trainer: pl.Trainer, method: str, *args: Any) -> None:
        """Lightning calls every monitor; the first speaks to the recorder for all."""
        recorder = StepRecorder.of(trainer)
        if recorder.monitors and recorder.monitors[0] is self:
            getattr(recorder, method)(*args)


class ProbingMonitor(Monitor):
    """A monitor that every ``probe_every_n_steps`` steps also tries out what the optimizer would do."""

    probe_every_n_steps: int | None = None
    #: Whether a run that does not allow probes from the start goes on without, after a warning, instead of failing.
    probes_optional = False
    _left_out = False
    #: All ranks, for verdicts that are not mixed up with what a probe itself sends.
    _verdicts: processes.ProcessGroup | None = None

    @property
    def can_probe(self) -> bool:
        """Whether there are probes in this run."""
        return self.probe_every_n_steps is not None and not self._left_out

    def probes(self, index: int) -> bool:
        """Whether there is a probe at the step with that number, from 1."""
        return self.can_probe and index % self.probe_every_n_steps == 0  # type: ignore[operator]

    def measures(self, index: int) -> bool:
        return super().measures(index) or self.probes(index)

    @contextmanager
    def probing(self, starting: bool = False) -> Iterator[None]:
        """To be entered, by all processes, for whatever a run may not allow that cannot be probed.

        What fails on one rank fails on all of them. Where others wait inside for a collective of the rank that failed,
        all end with an error after :data:`PATIENCE`. A probe that fails never ends the run: probes are left out of the
        rest of it, after a warning.

        Args:
            starting: Whether training has not begun yet, so that probes that were asked for can be refused.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # A probe runs code of the user's, which may raise anything.
            failure = error
        if not self._failed_somewhere(failure is not None):
            return
        failure = failure or RuntimeError("another process failed to make one.")
        if starting and not self.probes_optional:
            raise failure
        self._left_out = True
        reason = str(failure) if isinstance(failure, (MisconfigurationException, RuntimeError)) else repr(failure)
        rank_zero_warn(f"{type(self).__name__} leaves probes out of this run: {reason}")

    def _failed_somewhere(self, failed: bool) -> bool:
        try:
            return processes.any_rank(failed, self._verdicts)
        except RuntimeError as error:
            here = "failed on this process" if failed else "ended on this process"
            raise RuntimeError(
                f"{type(self).__name__}: a probe {here} and did not end on all others within {PATIENCE}. Leave "
                "probe_every_n_steps out, or look at what the others say."
            ) from error

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._left_out = False
        if self.can_probe:
            self._verdicts = processes.new_cpu_group(PATIENCE)
        super().on_train_start(trainer, pl_module)

    def _detach(self, trainer: pl.Trainer) -> None:
        super()._detach(trainer)
        self._verdicts = None


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name matches one of several shell-style patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def layers_of(step: Step, values: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """By name, the values of single parameters by their names, from vectors with one entry per parameter."""
    return {name: dict(zip(step.names, x.tolist())) for name, x in values.items()}
