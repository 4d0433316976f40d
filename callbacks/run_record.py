"""What a diagnosis of a run needs to know, recorded while it trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.diagnostics.alarms import Alarms
from lightning_optim.diagnostics.charts import CHARTS
from lightning_optim.diagnostics.coverage import Coverage, Parameter, suspected_blocks
from lightning_optim.diagnostics.optimizer_traits import traits
from lightning_optim.diagnostics.parameter_change import inner_products, sum_of_squares
from lightning_optim.engine.optimizer import RuleOptimizer
from lightning_optim.engine.two_rules import MatrixOptimizer
from lightning_optim.processes import strategies
from lightning_optim.routing import clean_name, route

from .loop import is_automatic, steps_made, unscaled_loss
from .monitor import Monitor, Results
from .recorder import Step, StepRecorder, label_of

#: Layers are recorded at every measured step up to this many records, then at steps that are 5 % apart.
_ALL_RECORDS = 64
#: Losses are kept one by one up to this step, then in this many blocks per measured step.
_SINGLE_STEPS, _BLOCKS = 2000, 8
#: Steps whose numbers may wait on an accelerator, in tier `light` between measured steps.
_PENDING, _ALL_PENDING = 16, 1024
_VALIDATION = ("val", "eval", "test")


class RunRecord(Monitor):
    r"""Loss, learning rates, and a few numbers of every layer, from which a run is diagnosed.

    ================================ ================================================================================
    ``training/loss``                mean of the losses of the steps since it was logged last
    ``training/loss_max``            the largest loss of a micro-batch among them
    ``training/lr``                  learning rate, of the matrices where an optimizer has a rule for them
    ``training/lr_fallback``         that of the fallback rule
    ``training/matrix_to_weight``    ``update/to_weight`` of hidden matrices only
    ``training/other_to_weight``     the same of all other parameters
    ``training/growth``              norm of all weights over that before the first measured step
    ================================ ================================================================================

    The loss is what automatic optimization differentiates, without loss scale and accumulation; modules with several
    optimizers or manual optimization have none. Besides, records are written to TensorBoard's event files, under a
    plugin of their own, so that TensorBoard shows nothing of them: the settings of the run, which rule trains which
    parameter, and for every layer its sizes of weight, update and gradient. ``lightning-optim diagnostics`` reads them.
    Measured steps are those of :class:`.Monitor` and, below the interval, the powers of two.

    Args:
        every_n_steps: See :class:`.Monitor`, also for the next three.
        first_n_steps: Measure each of the first so many steps, too.
        parameters: Patterns of the names of parameters to measure.
        layers: Patterns of the names of parameters whose own values are logged, too.
        norms_only: Leave out what needs a look at every element besides norms, and the gradient norm between measured
            steps.
        quiet: Do not say on the console what is broken (a loss that is NaN or diverges, steps that are skipped,
            parameters that do not move) when it happens, once each.

    Attributes:
        records: What has been recorded, each with its step.
        coverage: Which parameters have been trained, and by which rule; from the end of the first measured step.

    Example:
        >>> RunRecord(every_n_steps=10).family
        'training'
    """

    family = "training"
    charts: ClassVar = CHARTS["training"]

    def __init__(
        self,
        every_n_steps: int | Callable[[int], bool] = 50,
        first_n_steps: int = 1,
        parameters: Sequence[str] = ("*",),
        layers: Sequence[str] = (),
        norms_only: bool = False,
        quiet: bool = False,
    ) -> None:
        super().__init__(every_n_steps, first_n_steps, parameters, layers)
        self.norms_only = norms_only
        self.quiet = quiet
        self.records: list[tuple[int, dict[str, Any]]] = []
        self._reset()

    def _reset(self) -> None:
        self._alarms = Alarms()
        self._new: list[dict[str, Any]] = []
        #: Losses of the micro-batches of the step to come, on the device.
        self._losses: list[Tensor] = []
        #: Step, losses of its micro-batches, and gradient norm if it is known; on the device until they are fetched.
        self._pending: list[tuple[int, list[Tensor], Tensor | None]] = []
        self._course: list[tuple[int, float, float, float]] = []
        self._names: list[str] = []
        self._described: set[str] = set()
        self._last_layers = 0
        self._driven: set[str] = set()
        self._moved: set[str] = set()
        self._rows: dict[str, Tensor] = {}
        self._batch_size = 0
        #: Which parameters have been trained up to now, and by which rule.
        self.coverage: Coverage | None = None
        self._fresh = self._ended = self._is_wanted = False
        self._norm: Tensor | None = None
        self._last_step = -1
        self._has_loss = False

    def forget(self) -> None:
        super().forget()
        self.records = []
        self._reset()

    # --- which steps --------------------------------------------------------------------------------------------

    def _is_due(self, index: int) -> bool:
        if super().measures(index):
            return True
        # The first steps decide much, and a run may be shorter than the interval.
        below = not callable(self.every_n_steps) and index < self.every_n_steps
        return below and index & (index - 1) == 0

    def measures(self, index: int) -> bool:
        return self._is_due(index) or not self.norms_only

    # --- every step ---------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self._batch_size:
            try:
                self._batch_size = extract_batch_size(batch)
            except MisconfigurationException:
                self._batch_size = -1

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self._has_loss and loss.numel() == 1:
            self._losses.append(unscaled_loss(trainer, loss))

    def before_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> bool:
        self._norm = None
        if not self.norms_only and not step.shards.groups and step.watched:
            self._norm = step.unclipped_norm
        if not self._is_due(step.index):
            return False
        self._is_wanted = True
        self._x = steps_made(trainer)
        if step.label not in self._described:
            self._describe(trainer, pl_module, step)
        return bool(step.watched)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        # All steps are recorded here, and not in `before_step`, which is called for measured steps only.
        x = steps_made(trainer)
        losses, self._losses = self._losses, []
        norm, self._norm = self._norm, None
        if losses and x != self._last_step:  # LBFGS computes several losses in a step.
            self._last_step = x
            self._pending.append((x, losses, norm))
        # Without the norms of gradients, which make every step wait for the device, nothing else is to.
        most = 1 if all(map(_is_on_host, losses)) else _ALL_PENDING if self.norms_only else _PENDING
        if self._is_wanted or len(self._pending) >= most:
            self._is_wanted = False
            self._fetch()
            self._say(self._alarms.skips(x, self._skipped(label_of(trainer, optimizer), optimizer)))

    def _fetch(self) -> None:
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        numbers = iter(_numbers([x for _, losses, norm in pending for x in (*losses, norm) if x is not None]))
        for x, losses, norm in pending:
            values = [next(numbers) for _ in losses]
            mean, largest = sum(values) / len(values), _largest(values)
            self._course.append((x, mean, largest, math.nan if norm is None else next(numbers)))
            self._say(self._alarms.loss(x, mean))

    def _say(self, words: Sequence[str]) -> None:
        if not self.quiet:
            for line in words:
                rank_zero_info(f"Diagnostics, {line}")

    # --- measured steps -----------------------------------------------------------------------------------------

    def sums(self, step: Step) -> dict[str, Tensor]:
        change = step.change
        sums = {
            "numel": change.numel,
            "update_sq": change.update_sq,
            "weight_sq": change.weight_sq,
            "gradient_sq": step.unclipped_sq,
        }
        sums["start_sq"] = self._start_sq(step)
        if self.norms_only:
            return sums
        zero, untouched, rows = self._zero_rows(step)
        return sums | {
            "along": inner_products(change.updates, change.weights),
            "driven": change.driven,
            "stalled": change.stalled,
            "zero_rows": zero,
            "untouched": untouched,
            "rows": rows,
        }

    def _start_sq(self, step: Step) -> Tensor:
        """Sum of the squared weights before the first measured step of each parameter."""
        for name, w, u in zip(step.names, step.change.weights, step.change.updates):
            key = f"{step.label}start_sq/{name}"
            if key not in self.memory:
                self.memory[key] = sum_of_squares([w - u])[0]
        return torch.stack([self.memory[f"{step.label}start_sq/{name}"].to(step.change.numel) for name in step.names])

    def _zero_rows(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Rows without a gradient, those that never had one, and rows, of each parameter with two axes or more."""
        counts = []
        for w, g in zip(step.watched, step.change.gradients):
            none = step.change.numel.new_zeros(())
            if g.ndim < 2 or not g.numel():
                counts.append(none.expand(3))
                continue
            transposed = w.route is not None and w.route.transposed
            driven = (g.transpose(0, 1) if transposed else g).flatten(1).any(-1)
            key = f"{step.label}{w.name}"
            known = self._rows.get(key)
            self._rows[key] = ever = driven if known is None or known.shape != driven.shape else known | driven
            counts.append(torch.stack([none + x for x in ((~driven).sum(), (~ever).sum(), driven.numel())]))
        zero, untouched, rows = torch.stack([x.to(counts[0]) for x in counts]).unbind(-1)
        return zero, untouched, rows

    def results(self, step: Step, sums: dict[str, Tensor]) -> Results:
        self._driven |= {f"{step.label}{name}" for name in step.names}
        self._moved |= {f"{step.label}{n}" for n, x in zip(step.names, sums["update_sq"].tolist()) if x > 0}
        values = self._values(step, sums)
        record: dict[str, Any] = {"lr": self._rates(step), "index": step.index, "label": step.label}
        if skipped := self._skipped(step.label, step.optimizer):
            record["skipped"] = skipped
        self._say(self._alarms.moved(self._x, float(sums["update_sq"].sum())))
        if course := self._take_course():
            record["course"] = course
        last = self._last_layers
        if step.index <= last or len(self.records) <= _ALL_RECORDS or step.index >= 1.05 * last:
            self._last_layers = step.index
            record["layers"] = self._layers(step, sums)
        self._new.append(record)
        return Results(values)

    def _skipped(self, label: str, optimizer: Optimizer) -> int:
        return self._skips.get(label, 0) + getattr(optimizer, "skipped_steps", 0)

    def _values(self, step: Step, sums: dict[str, Tensor]) -> dict[str, float]:
        values = {"growth": _root(float(sums["weight_sq"].sum()), float(sums["start_sq"].sum()))}
        matrices = torch.tensor([w.is_matrix for w in step.watched])
        for name, chosen in (("matrix_to_weight", matrices), ("other_to_weight", ~matrices)):
            values[name] = _root(float(sums["update_sq"][chosen].sum()), float(sums["weight_sq"][chosen].sum()))
        rates = self._rates(step)
        values |= {"lr": rates["lr"]} | ({"lr_fallback": rates["fallback"]} if "fallback" in rates else {})
        if self._course:
            _, means, largest, _ = zip(*self._course)
            values |= {"loss": sum(means) / len(means), "loss_max": _largest(largest)}
        return values

    @staticmethod
    def _rates(step: Step) -> dict[str, float]:
        groups = step.optimizer.param_groups
        matrix = next((g for g in groups if g.get("role") == "matrix" and g["params"]), None)
        fallback = next((g for g in groups if g.get("role") == "fallback" and g["params"]), None)
        if matrix is not None and fallback is not None:
            return {"lr": float(matrix["lr"]), "fallback": float(fallback["lr"])}
        return {"lr": max(float(g["lr"]) for g in groups)}

    def _layers(self, step: Step, sums: dict[str, Tensor]) -> dict[str, list[float | None]]:
        places = {name: i for i, name in enumerate(self._names)}
        numel = sums["numel"]
        columns = {
            "weight": (sums["weight_sq"] / numel).sqrt(),
            "start": (sums["start_sq"] / numel).sqrt(),
            "update": (sums["update_sq"] / numel).sqrt(),
            "gradient": (sums["gradient_sq"] / numel).sqrt(),
        }
        if not self.norms_only:
            columns |= {
                "along": sums["along"] / (sums["update_sq"] * sums["weight_sq"]).sqrt(),
                "stalled": sums["stalled"] / sums["driven"],
                "zero_rows": sums["zero_rows"] / sums["rows"],
                "untouched": sums["untouched"] / sums["rows"],
            }
        layers: dict[str, list[float | None]] = {}
        for column, x in columns.items():
            values: list[float | None] = [None] * len(places)
            for name, value in zip(step.names, x.tolist()):
                if name in places and value == value:
                    values[places[name]] = _short(value)
            layers[column] = values
        return layers

    # --- records ------------------------------------------------------------------------------------------------

    def _take_course(self) -> list[list[float]]:
        """Steps, mean loss, largest loss and largest gradient norm, since it was taken last."""
        course, self._course = self._course, []
        if not course:
            return []
        size = 1 if course[-1][0] < _SINGLE_STEPS else -(-len(course) // _BLOCKS)
        blocks = [course[i : i + size] for i in range(0, len(course), size)]
        return [
            [b[-1][0] for b in blocks],
            [_short(sum(mean for _, mean, _, _ in b) / len(b)) for b in blocks],
            [_short(_largest([largest for _, _, largest, _ in b])) for b in blocks],
            [_short(_largest([norm for _, _, _, norm in b])) for b in blocks],
        ]

    def take_records(self, step: int) -> Sequence[Mapping[str, Any]]:
        taken, self._new = self._new, []
        self.records += [(step, record) for record in taken]
        return taken

    def _describe(self, trainer: pl.Trainer, module: pl.LightningModule, step: Step) -> None:
        self._described.add(step.label)
        names = [clean_name(name) for name, _ in module.named_parameters()]
        self._names = names
        groups = [g for g in step.optimizer.param_groups if g["params"]]
        found: dict[tuple[Any, ...], dict[str, Any]] = {}
        in_group: dict[str, int] = {}
        by_parameter = {p: clean_name(name) for name, p in module.named_parameters()}
        for group in groups:
            values = traits(step.optimizer, group)
            key = tuple(sorted((name, str(x)) for name, x in values.items()))
            position = list(found).index(key) if key in found else len(found)
            found.setdefault(key, values)
            in_group |= {by_parameter[p]: position for p in group["params"] if p in by_parameter}
        kinds = {w.name: w.route.kind for w in step.watched if w.route is not None}
        head = [w.parameter.shape[0] for w in step.watched if kinds.get(w.name) == "head" and w.parameter.ndim == 2]
        settings = {
            "optimizer": type(step.optimizer).__name__,
            "label": step.label,
            "groups": list(found.values()),
            "group_of": [in_group.get(name, -1) for name in names],
            "names": names,
            "precision": str(trainer.precision),
            "accumulate": trainer.accumulate_grad_batches,
            "clip": trainer.gradient_clip_val,
            "batch_size": max(self._batch_size, 0),
            "max_steps": _limit(trainer),
            "outputs": head[0] if len(head) == 1 else 0,
            "ranks": trainer.world_size,
            "epoch_steps": _epoch_steps(trainer),
        }
        self._new.append({"run": settings})
        self._fresh = True

    # --- the course of a run ------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._described, self._fresh, self._ended, self._last_step = set(), False, False, -1
        self._has_loss = _has_loss(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._fresh:
            self._fresh = False
            self._write_coverage(trainer, pl_module)
            StepRecorder.of(trainer).log(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or self not in StepRecorder.of(trainer).monitors:
            return
        metrics = {
            name: _short(float(value))
            for name, value in trainer.callback_metrics.items()
            if name.lower().startswith(_VALIDATION) and "/dataloader_idx_" not in name
        }
        if metrics:
            self._new.append({"validation": metrics})
            StepRecorder.of(trainer).log(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer, pl_module, "")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self in StepRecorder.of(trainer).monitors:
            self._end(trainer, pl_module, type(exception).__name__)
        super().on_exception(trainer, pl_module, exception)

    def _end(self, trainer: pl.Trainer, module: pl.LightningModule, error: str) -> None:
        """Record what has come since the last measured step."""
        if self._ended or not self._described:
            return
        self._ended = True
        self._fetch()
        course = self._take_course()
        skipped = sum(self._skips.values()) + sum(getattr(o, "skipped_steps", 0) for o in trainer.optimizers)
        self._new.append({"end": error or "completed", "skipped": skipped} | ({"course": course} if course else {}))
        self._write_coverage(trainer, module)
        StepRecorder.of(trainer).log(trainer)

    def _write_coverage(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if strategies.is_fsdp1(trainer.strategy):
            return  # Its parameters are not those of the module.
        self.coverage = self._covered(trainer, module)
        self._new.append({"coverage": self.coverage.as_dict()})

    # --- coverage -----------------------------------------------------------------------------------------------

    def _covered(self, trainer: pl.Trainer, module: pl.LightningModule) -> Coverage:
        """Which parameters have been trained up to now, and by which rule."""
        routes = {clean_name(name): r for name, r in route(module).items()}
        rules: dict[Tensor, tuple[str, Mapping[str, Any], Optimizer | None]] = {}
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                rule = group["rule"] if isinstance(optimizer, RuleOptimizer) else type(optimizer).__name__
                rules |= dict.fromkeys(group["params"], (rule, group, optimizer))
        driven = {key.rpartition("/")[2] for key in self._driven}
        moved = {key.rpartition("/")[2] for key in self._moved}
        parameters = []
        for full_name, p in module.named_parameters():
            name = clean_name(full_name)
            r = routes.get(name)
            rule, settings, owner = rules.get(p, ("", {}, None))
            blocks = int(settings.get("blocks", 1))
            matrix = isinstance(owner, MatrixOptimizer) and settings.get("role") == "matrix"
            parameters.append(
                Parameter(
                    name,
                    tuple(p.shape),
                    str(p.dtype).removeprefix("torch."),
                    r.kind if r else "",
                    rule,
                    not p.requires_grad,
                    name in driven,
                    name in moved,
                    blocks,
                    suspected_blocks(name, tuple(p.shape), blocks) if matrix else 0,
                )
            )
        matrix_rules = [type(o).__name__ for o in trainer.optimizers if isinstance(o, MatrixOptimizer)]
        return Coverage(tuple(parameters), matrix_rules[0] if matrix_rules else "")


def _root(x_sq: float, y_sq: float) -> float:
    return math.sqrt(x_sq / y_sq) if y_sq > 0 else math.nan


def _is_on_host(x: Tensor) -> bool:
    return x.is_cpu


def _numbers(scalars: Sequence[Tensor]) -> list[float]:
    """Tensors with one element as numbers, from an accelerator by one transfer."""
    if all(map(_is_on_host, scalars)):
        return [x.item() for x in scalars]
    return torch.stack([x.reshape(()).float().to(scalars[0].device) for x in scalars]).cpu().tolist()


def _short(x: float) -> float:
    return float(f"{x:.4g}")


def _largest(values: Sequence[float]) -> float:
    """The largest of some values; NaN where all are, infinity where one is not finite."""
    known = [x for x in values if x == x]
    return max(known, default=math.nan) if len(known) == len(values) or not known else math.inf


def _limit(trainer: pl.Trainer) -> int:
    """How many steps the run is to have; 0 where that is not known."""
    try:
        steps = trainer.estimated_stepping_batches
    except Exception:  # of data whose length cannot be asked for
        steps = trainer.max_steps
    return int(steps) if 0 < steps < math.inf else 0


def _epoch_steps(trainer: pl.Trainer) -> int:
    batches = trainer.num_training_batches
    return int(batches) // trainer.accumulate_grad_batches if batches < math.inf else 0


def _has_loss(trainer: pl.Trainer) -> bool:
    """Whether there is one loss that automatic optimization differentiates."""
    return is_automatic(trainer) and len(trainer.optimizers) == 1
