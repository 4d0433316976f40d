"""The measuring primitive: what every optimizer step really did, seen from outside.

Parameters are copied in the callback hook ``on_before_optimizer_step`` and compared in torch's optimizer post-hook. At
that point, at every precision, the parameters have moved, gradients are unscaled and clipped, and the learning rate is
that of the step. (The callback hook alone comes before clipping; torch's pre-hook comes before the backward pass
where no loss scaler is used; and at the end of the batch the scheduler has already changed the learning rate.)
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, product
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.devices import stopwatch, widest
from lightning_optim.diagnostics.charts import COST, LEARNING, Chart
from lightning_optim.diagnostics.event_files import record_summary
from lightning_optim.diagnostics.parameter_change import Change, sample, squares_of_gradients
from lightning_optim.engine.layout import layout_of
from lightning_optim.engine.optimizer import RuleOptimizer
from lightning_optim.engine.two_rules import MatrixOptimizer
from lightning_optim.processes import ShardSums, local, local_slices, sharded_dims, strategies
from lightning_optim.routing import Route, clean_name, route, routing_table
from lightning_optim.trainer import is_lightning

from . import tensorboard
from .loop import Place, device_of, loss_scale, scaler_of, steps_made

if TYPE_CHECKING:
    from .monitor import Monitor


@dataclass(frozen=True, eq=False)
class Watched:
    """A parameter of the optimizer.

    Args:
        name: Its name in the LightningModule, without the prefixes of wrappers.
        parameter: The parameter.
        route: What the router says of it (:func:`lightning_optim.routing.route`), or ``None`` where it is no parameter
            of the module or flattened (FSDP1).
        group: Its parameter group in the optimizer.
    """

    name: str
    parameter: Tensor
    route: Route | None
    group: Mapping[str, Any]

    @property
    def is_matrix(self) -> bool:
        """Whether it holds hidden matrices."""
        return self.route is not None and self.route.role == "matrix"


@dataclass(eq=False)
class Step:
    """One optimizer step as one monitor sees it: only the parameters that it tracks and that have a gradient.

    Args:
        optimizer: The optimizer.
        label: Prefix that tells its tags from those of other optimizers; empty where there is one.
        index: Number of the step, from 1, steps that the loss scaler skipped included.
        watched: The parameters.
        loss_scale: What gradients are still multiplied by before the step; 1 where they are already unscaled.
        shards: Adds up over ranks what each knows of its shards.
    """

    optimizer: Optimizer
    label: str
    index: int
    watched: Sequence[Watched]
    loss_scale: float
    shards: ShardSums
    _changes: dict[Tensor, Tensor] = field(default_factory=dict)
    _gradients: dict[Tensor, Tensor] = field(default_factory=dict)
    _unclipped_sq: Tensor | None = None
    _unclipped_norm: Tensor | None = None
    _change: Change | None = None

    @property
    def names(self) -> list[str]:
        """Names of the parameters."""
        return [w.name for w in self.watched]

    def gradients(self) -> list[Tensor]:
        """Local shards of the gradients as they are now: before the step unclipped, and times :attr:`loss_scale`."""
        return [gradient_of(w.parameter) for w in self.watched]

    @property
    def unclipped_sq(self) -> Tensor:
        """Sum of the squares of each parameter's local gradient, unscaled and before clipping.

        To be asked for before the step; the same for all monitors, and after the step, too.
        """
        if self._unclipped_sq is None:
            squares = squares_of_gradients(self.gradients())
            self._unclipped_sq = squares if self.loss_scale == 1 else squares / self.loss_scale**2
        return self._unclipped_sq

    @property
    def unclipped_norm(self) -> Tensor:
        """Norm of all local gradients together, likewise."""
        if self._unclipped_norm is None:
            self._unclipped_norm = self.unclipped_sq.sum().sqrt()
        return self._unclipped_norm

    def sampled(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """At most 4,096 elements of each parameter's tensor, the same ones also if its first dimension is sharded.

        Where another dimension is sharded, that many of each local shard.
        """
        return [_sample(w.parameter, x) for w, x in zip(self.watched, tensors)]

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters themselves."""
        return [w.parameter for w in self.watched]

    @property
    def change(self) -> Change:
        """What the step did. Known after the step only."""
        if self._change is None:
            parameters = self.parameters
            self._change = Change(
                self.names,
                [_real(local(p.detach())) for p in parameters],
                [self._changes[p] for p in parameters if p in self._changes],
                [self._gradients[p] if p in self._gradients else gradient_of(p) for p in parameters],
                [float(w.group["lr"]) for w in self.watched],
            )
        return self._change


def _sample(p: Tensor, x: Tensor) -> Tensor:
    if {dim for dim, _ in sharded_dims(p)} != {0}:
        return sample(x)
    return sample(x, start=local_slices(p)[0].start * math.prod(p.shape[1:]), numel=p.numel())


def dense(x: Tensor) -> Tensor:
    """A tensor that may be sparse as a dense one."""
    return x.to_dense() if x.is_sparse else x


def gradient_of(p: Tensor) -> Tensor:
    g = p.grad
    return torch.zeros_like(p) if g is None else _real(dense(local(g)))


def _real(x: Tensor) -> Tensor:
    """A complex tensor as its real view, with a last dimension of size 2."""
    return torch.view_as_real(x) if x.is_complex() else x


def _to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies on the CPU in float64, by one transfer however many tensors there are."""
    if not tensors:
        return []
    dtype = widest(tensors[0].device)
    flat = torch.cat([x.detach().reshape(-1).to(tensors[0].device, dtype) for x in tensors])
    parts = flat.cpu().double().split([x.numel() for x in tensors])
    return [part.reshape(x.shape) for part, x in zip(parts, tensors)]


def when_gradients_are_there(args: Any, kwargs: Any, work: Callable[[], None]) -> tuple[Any, Any] | None:
    """For a pre-hook of ``optimizer.step``: do something now, or each time when the closure of the step has run.

    Args:
        args: Of the step; the first is the optimizer.
        kwargs: Of the step.
        work: What to do.

    Returns:
        Other arguments for the step, where it has a closure.
    """
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        work()
        return None

    def then_work() -> Any:
        loss = closure()
        work()
        return loss

    if len(args) > 1:
        return (args[0], then_work, *args[2:]), kwargs
    return args, {**kwargs, "closure": then_work}


# --- the recorder -----------------------------------------------------------------------------------------------


class StepRecorder:
    """Watches the optimizer steps of one loop for all of its monitors: one copy, one reduction, one log call."""

    _of: ClassVar[WeakKeyDictionary[Place, StepRecorder]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self.monitors: list[Monitor] = []
        self._handles: WeakKeyDictionary[Optimizer, list[Any]] = WeakKeyDictionary()
        #: Optimizers that were seen not to write to gradients in their step; of the others copies are kept.
        self._leave_gradients: WeakSet[Optimizer] = WeakSet()
        self._failed: set[str] = set()
        #: Groups and parameters of an optimizer as they were found, and what was made of them.
        self._watched: WeakKeyDictionary[Optimizer, tuple[list[Any], list[Watched], ShardSums]] = WeakKeyDictionary()
        self._open: _OpenStep | None = None
        self._values: list[tuple[Monitor, Mapping[str, float]]] = []
        self._layout_written = False
        self._described: set[str] = set()
        self._clock = _Clock()

    @classmethod
    def of(cls, trainer: Place) -> StepRecorder:
        """The one recorder of a Trainer, or of a loop."""
        known = cls._of.get(trainer)
        return cls._of.setdefault(trainer, cls()) if known is None else known

    @property
    def clock(self) -> AbstractContextManager[None]:
        """To be entered for work that a monitor does outside of a step, which then counts as overhead."""
        return self._clock

    @property
    def host_clock(self) -> AbstractContextManager[None]:
        """The same for work of the host alone, which an accelerator does not wait for."""
        return self._clock if self._clock.device.type == "cpu" else _NOT_TIMED

    def attach(self, monitor: Monitor, trainer: Place) -> None:
        """Begin to serve a monitor.

        Raises:
            MisconfigurationException: The strategy hides parameters or gradients from callbacks.
        """
        if strategies.is_deepspeed(trainer.strategy):
            raise MisconfigurationException(
                f"{type(monitor).__name__} does not work with {type(trainer.strategy).__name__}, which keeps gradients "
                "and updates inside its engine; use DDP or FSDP2 (ModelParallelStrategy)."
            )
        if strategies.is_fsdp1(trainer.strategy) and monitor.needs_matrices:
            raise MisconfigurationException(
                f"{type(monitor).__name__} needs whole matrices, and FSDPStrategy (FSDP1) flattens them; use "
                "ModelParallelStrategy (FSDP2)."
            )
        if not self.monitors:
            self._layout_written = False
            self._described.clear()
        if monitor not in self.monitors:
            self.monitors.append(monitor)

    def detach(self, monitor: Monitor) -> None:
        """Stop serving a monitor; the last one to go leaves nothing behind."""
        if monitor in self.monitors:
            self.monitors.remove(monitor)
        if not self.monitors:
            self._discard()
            for handles in self._handles.values():
                for handle in handles:
                    handle.remove()
            self._handles.clear()
            self._failed.clear()
            self._watched.clear()
            self._clock.batch_end()  # of a batch that has not come to its end

    # --- one step -----------------------------------------------------------------------------------------------

    def batch_start(self) -> None:
        self._clock.batch_start()

    def batch_end(self) -> None:
        self._settle()
        self._clock.batch_end()

    def watch(self, optimizer: Optimizer) -> None:
        """Hear of an optimizer's steps, from the next one on also right before it begins to work."""
        if optimizer not in self._handles:
            self._handles[optimizer] = [
                optimizer.register_step_pre_hook(self._at_step),
                optimizer.register_step_post_hook(self._after),
            ]

    @torch.no_grad()
    def before(self, trainer: Place, module: nn.Module, optimizer: Optimizer) -> None:
        """Called in ``on_before_optimizer_step``."""
        if self._open is not None and self._open.optimizer is optimizer and scaler_of(trainer) is None:
            return  # LBFGS calls its closure, and with it this, several times in a step.
        self._settle()
        self.watch(optimizer)
        label = label_of(trainer, optimizer)
        due = [(monitor, index) for monitor in self.monitors if (index := monitor.count(label))]
        self._open = _OpenStep(trainer, optimizer, label, due)
        if due:
            with self._clock:
                self._begin(module, self._open)

    def _begin(self, module: Any, opened: _OpenStep) -> None:
        trainer, optimizer = opened.trainer, opened.optimizer
        watched, shards = self._watch(trainer, module, optimizer)
        scale = loss_scale(trainer, optimizer)
        views: dict[Any, Step] = {}
        for monitor, index in opened.due:
            key = (index, monitor.needs_matrices, monitor.parameters)
            if key not in views:
                tracked = monitor.select(watched)
                views[key] = Step(
                    optimizer, opened.label, index, tracked, scale, shards, opened.changes, opened.gradients
                )
            opened.steps.append((monitor, views[key]))
        observers = [monitor for monitor, _ in opened.due if monitor.needs_observations]
        if observers and isinstance(optimizer, RuleOptimizer):
            opened.restore_observer = partial(setattr, optimizer, "observer", optimizer.observer)
            optimizer.observer = partial(_tell, observers)
        # A parameter without a gradient is not stepped. (FSDP1 leaves those without one of which a process has nothing;
        # what is watched must be the same everywhere.)
        for step in views.values():
            step.watched = [w for w in step.watched if shards.flat or w.parameter.grad is not None]
        opened.steps = [
            (m, step)
            for m, step in opened.steps
            if self._attempt(m, step, partial(m.before_step, trainer, module, step), False) is not False
        ]
        if not opened.steps:
            return
        opened.own_skips = _own_skips(optimizer)
        updated = {w.parameter for monitor, step in opened.steps if monitor.needs_updates for w in step.watched}
        opened.changes.update({p: _value(optimizer, p).clone() for p in updated})

    def _at_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Called by torch when ``optimizer.step`` begins. Gradients are final there, or when its closure has run."""
        return when_gradients_are_there(args, kwargs, partial(self._keep_gradients, optimizer))

    @torch.no_grad()
    def _keep_gradients(self, optimizer: Optimizer) -> None:
        """Keep what a step that is measured consumes, since optimizers may work in ``p.grad``.

        torch's own do where they run for many tensors at once (``foreach``, the default on GPUs). Whether an optimizer
        does is seen in the first measured step by the versions of the gradients; one that does not is trusted from then
        on, so that gradients are copied once, and looked at in every measured step.
        """
        opened = self._open
        if opened is None or opened.optimizer is not optimizer or not opened.changes or opened.versions:
            return  # Steps within a step, as of a subclass that calls its base's, begin later than the step.
        if loss_scale(opened.trainer, optimizer) != 1:
            return  # It divides gradients by the loss scale in its step, in place, and works with what comes of that.
        with self._clock:
            opened.versions = {p: _version(p) for p in opened.changes if p.grad is not None}
            if not isinstance(optimizer, RuleOptimizer) and optimizer not in self._leave_gradients:
                opened.gradients.update({p: gradient_of(p).clone() for p in opened.versions})

    def _check_gradients(self, opened: _OpenStep) -> bool:
        """Whether what is known of the gradients is what the step consumed."""
        unchanged = all(p.grad is not None and _version(p) == before for p, before in opened.versions.items())
        if not unchanged:
            self._leave_gradients.discard(opened.optimizer)
        elif opened.gradients:
            self._leave_gradients.add(opened.optimizer)
        return unchanged or bool(opened.gradients) or not opened.versions

    def _attempt(self, monitor: Monitor, step: Step, work: Callable[[], Any], otherwise: Any) -> Any:
        """Do something for a monitor. If it fails, say so once and go on without: it must not end the run.

        Where ranks hold shards, an error passes: the other ranks would wait for this one's sums.
        """
        try:
            return work()
        except MisconfigurationException:
            raise
        except Exception as error:
            if step.shards.groups:
                raise
            name = type(monitor).__name__
            if name not in self._failed:
                self._failed.add(name)
                rank_zero_warn(
                    f"{name} could not measure a step and leaves such steps out ({type(error).__name__}: {error}). "
                    f"Parameters: {', '.join(step.names[:5])}{', ...' if len(step.names) > 5 else ''}."
                )
            return otherwise

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Called by torch after the step."""
        opened = self._open
        if opened is None or opened.optimizer is not optimizer:
            return  # a step that Lightning did not announce
        # Fused optimizers handle the loss scaler's verdict themselves and are called for skipped steps, too.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and found_inf.item():
            self._settle()
            return
        if not opened.steps or _own_skips(optimizer) > opened.own_skips:
            self._discard()
            return
        with self._clock, torch.no_grad():
            if self._check_gradients(opened):
                _to_changes(opened.changes, optimizer)
                self._measure(opened)
            self._discard()
            self._log(opened.trainer)

    def _measure(self, opened: _OpenStep) -> None:
        asked = [
            (monitor, step, sums)
            for monitor, step in opened.steps
            if step.watched and (sums := self._attempt(monitor, step, partial(monitor.sums, step), None)) is not None
        ]
        shards = opened.steps[0][1].shards
        parts = chain.from_iterable(sums.values() for _, _, sums in asked)
        of = [x for monitor, step, sums in asked for x in monitor.summed_from(step, sums)] if shards.groups else []
        added = iter(shards.add(list(parts), of))
        condensed = [
            (monitor, step, monitor.condense(step, {name: next(added) for name in sums}))
            for monitor, step, sums in asked
        ]
        on_host = iter(_to_host([x for _, _, sums in condensed for x in sums.values()]))
        layers: dict[str, Mapping[str, float]] = {}
        for monitor, step, sums in condensed:
            numbers = {name: next(on_host) for name in sums}
            results = self._attempt(monitor, step, partial(monitor.results, step, numbers), None)
            if results is not None:
                self.add(monitor, monitor.tagged(step.label, results))
                layers |= {f"{monitor.family}/{name}": values for name, values in results.layers.items()}
        for monitor, step, _ in condensed:
            self._attempt(monitor, step, partial(monitor.look, step, layers), None)

    def _settle(self) -> None:
        """A step that was announced and did not come was skipped by the loss scaler."""
        if self._open is not None:
            for monitor in self.monitors:
                monitor.skip(self._open.label)
            self._discard()

    def _discard(self) -> None:
        if self._open is not None:
            self._open.restore_observer()
        self._open = None

    # --- what there is to watch ---------------------------------------------------------------------------------

    def _watch(self, trainer: Place, module: nn.Module, optimizer: Optimizer) -> tuple[list[Watched], ShardSums]:
        members = [x for group in optimizer.param_groups for x in (group, *group["params"])]
        if optimizer in self._watched:
            known, watched, shards = self._watched[optimizer]
            if len(known) == len(members) and all(map(operator.is_, known, members)):
                return watched, shards
        self._clock.device = device_of(module)
        names = {p: clean_name(name) for name, p in module.named_parameters()}
        flat = strategies.is_fsdp1(trainer.strategy)
        routes = {} if flat else {clean_name(name): r for name, r in route(module).items()}
        watched = []
        for p, group in ((p, g) for g in optimizer.param_groups for p in g["params"]):
            name = names.get(p, f"parameter{len(watched)}")
            watched.append(Watched(name, p, _as_grouped(routes.get(name), optimizer, group), group))
        shards = strategies.shard_sums(trainer.strategy, (w.parameter for w in watched))
        self._watched[optimizer] = members, watched, shards
        return watched, shards

    # --- logging ------------------------------------------------------------------------------------------------

    def add(self, monitor: Monitor, values: Mapping[str, float]) -> None:
        """Values to be logged with those of the step that is being measured, or of the next one."""
        if values:
            self._values.append((monitor, values))

    def log(self, trainer: Place) -> None:
        """Log what has been added, for a run that ends without another measured step."""
        with self._clock:
            self._log(trainer)

    def _log_records(self, trainer: Place, x: int) -> None:
        records = [record for monitor in self.monitors for record in monitor.take_records(x)]
        if not records or not trainer.is_global_zero:
            return
        boards: list[Any] = [logger for logger in trainer.loggers if is_lightning(logger, "TensorBoardLogger")]
        for logger, record in product(boards, records):
            logger.experiment._get_file_writer().add_summary(record_summary(record), x)

    def _log(self, trainer: Place) -> None:
        self._log_records(trainer, steps_made(trainer))
        if not self._values:
            return
        # The step that Lightning gives to what the LightningModule logs in this batch.
        x = steps_made(trainer)
        merged = self._clock.read()
        for monitor, values in self._values:
            monitor.record(x, values)
            merged |= values
        self._values = []
        self._write_layout(trainer)
        for logger in trainer.loggers:
            if tensorboard.is_board(logger) and trainer.is_global_zero:
                tensorboard.log(logger, merged, x, self._charts(trainer), self._described)
            else:
                logger.log_metrics(merged, step=x)
        trainer.callback_metrics.update({tag: torch.tensor(value) for tag, value in merged.items()})

    def _write_layout(self, trainer: Place) -> None:
        """TensorBoard keeps one layout of charts per run, so that of all monitors is written at once."""
        if self._layout_written or not trainer.is_global_zero:
            return
        self._layout_written = True
        routes = [w.route for _, watched, _ in self._watched.values() for w in watched if w.route is not None]
        layout = tensorboard.layout(self._charts(trainer), bands=len(trainer.optimizers) == 1)
        boards: list[Any] = [logger for logger in trainer.loggers if tensorboard.is_board(logger)]
        for logger in boards:
            logger.experiment.add_custom_scalars(layout)
            if routes and any(monitor.needs_matrices for monitor in self.monitors):
                logger.experiment.add_text("diagnostics/matrices", routing_table(routes))

    def _charts(self, trainer: Any) -> list[Chart]:
        """The charts that the run fills, those of what Lightning and the module log first."""
        ours = [chart for monitor in self.monitors for chart in monitor.charts_of(trainer).values()]
        logged = [*trainer.callback_metrics, *trainer.logged_metrics]
        filled = {
            "training loss": any(LEARNING["training loss"].shows(tag) for tag in logged),
            "validation": trainer.enable_validation,
            "learning rate": any(is_lightning(x, "LearningRateMonitor") for x in trainer.callbacks),
        }
        return [*(chart for title, chart in LEARNING.items() if filled[title]), *ours, COST]


@dataclass(eq=False)
class _OpenStep:
    """A step that has been announced and has not happened yet."""

    trainer: Any
    optimizer: Optimizer
    label: str
    due: list[tuple[Monitor, int]]
    steps: list[tuple[Monitor, Step]] = field(default_factory=list)
    changes: dict[Tensor, Tensor] = field(default_factory=dict)
    gradients: dict[Tensor, Tensor] = field(default_factory=dict)
    versions: dict[Tensor, int] = field(default_factory=dict)
    own_skips: int = 0
    restore_observer: Callable[[], None] = lambda: None


_NOT_TIMED: AbstractContextManager[None] = nullcontext()


class _Clock(AbstractContextManager[None]):
    """How long the diagnostics take, and what share of training that is.

    An accelerator works behind the host, and is not made to wait for the sake of the clock: it notes the time itself
    when it begins and ends the work of the diagnostics, and these notes are read when a step's values are.

    Work within work is counted once.
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._own = self._training = 0.0
        self._depth = 0
        self._noted: list[Callable[[], float | None]] = []
        self._batch_start: float | None = None
        self._batches = 0
        self._read: tuple[float, float] | None = None
        self._batches_read = 0

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self._stop = stopwatch(self.device)
            self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        if self._stop is None:
            self._own += time.perf_counter() - self._start
        else:
            self._noted.append(self._stop())

    def _collect(self) -> None:
        """Add up what the accelerator has done; what it has yet to do is left for the next time."""
        times = [(note, note()) for note in self._noted]
        self._own += sum(seconds for _, seconds in times if seconds is not None)
        self._noted = [note for note, seconds in times if seconds is None]

    def batch_start(self) -> None:
        if self._batch_start is None:
            self._batch_start = time.perf_counter()

    def batch_end(self) -> None:
        if self._batch_start is not None:
            self._training += time.perf_counter() - self._batch_start
            self._batch_start = None
            self._batches += 1

    def read(self) -> dict[str, float]:
        """Milliseconds since it was read last, and the share of the time spent in training batches.

        Nothing where no batch has ended since: a second optimizer's step in the same batch would be compared with the
        time since the first one's. To be called between ``__enter__`` and ``__exit__``.
        """
        if self._read is not None and self._batches == self._batches_read:
            return {}
        self._collect()
        now = time.perf_counter()
        own = self._own + (now - self._start if self._stop is None else 0.0)
        training = self._training + (now - self._batch_start if self._batch_start is not None else 0.0)
        own_before, training_before = self._read or (0.0, 0.0)
        own_since, training_since = own - own_before, training - training_before
        self._read, self._batches_read = (own, training), self._batches
        share = own_since / training_since if training_since else 0.0
        return {"diagnostics/overhead_ms": 1e3 * own_since, "diagnostics/overhead_share": share}


def _value(optimizer: Optimizer, p: Tensor) -> Tensor:
    """A parameter, with what an optimizer of ours keeps of it where its precision ends."""
    return _real(local(optimizer.exact(p) if isinstance(optimizer, RuleOptimizer) else p.detach()))


def _version(p: Tensor) -> int:
    """How often a gradient has been written to."""
    assert p.grad is not None
    g = local(p.grad)
    return 0 if g.is_inference() else g._version


def _to_changes(copies: dict[Tensor, Tensor], optimizer: Optimizer) -> None:
    """Turn copies of parameters into their changes since, in place where the copies are precise enough."""
    wide = (torch.float32, torch.float64)
    real = {p: _real(local(p.detach())) for p in copies}
    exact = [(p, before) for p, before in copies.items() if before.dtype == real[p].dtype and before.dtype in wide]
    if exact:
        parameters, before = zip(*exact)
        torch._foreach_neg_(before)
        torch._foreach_add_(before, [real[p] for p in parameters])
    for p, copy in copies.items():
        if real[p].dtype not in wide:
            copies[p] = _value(optimizer, p).float() - copy.float()


def label_of(trainer: Place, optimizer: Optimizer) -> str:
    """What the tags of an optimizer begin with, where there are several."""
    if len(trainer.optimizers) == 1:
        return ""
    index = next((i for i, o in enumerate(trainer.optimizers) if o is optimizer), "")
    return f"{type(optimizer).__name__}{index}/"


def _own_skips(optimizer: Optimizer) -> int:
    """Steps that an optimizer of ours has skipped up to now; on an accelerator it has to be waited for."""
    if not isinstance(optimizer, RuleOptimizer):
        return 0
    optimizer.settle()
    return optimizer.skipped_steps


def _tell(monitors: Sequence[Monitor], parameter: Tensor, name: str, value: Tensor) -> None:
    for monitor in monitors:
        monitor.observe(parameter, name, value)


def _as_grouped(r: Route | None, optimizer: Optimizer, group: Mapping[str, Any]) -> Route | None:
    """A route as the parameter groups of a matrix optimizer of ours have it, which the user may have changed."""
    if r is None or not isinstance(optimizer, MatrixOptimizer):
        return r
    layout: dict[str, Any] = {"blocks": 1, "transposed": False, "split": (), "interleaved": False}
    return replace(r, role=group["role"], **(layout | layout_of(group)))
