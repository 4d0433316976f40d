"""The records of a run, put in order for a diagnosis."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .coverage import Coverage, Parameter
from .run import Run

Array = NDArray[np.float64]

#: Starting weights that are smaller than this, relative to those of other layers, are zero on purpose.
_ZERO_START = 1e-2


@dataclass(frozen=True)
class Layer:
    """What was recorded of one parameter: a value for each of some measured steps.

    Args:
        name: Its name.
        parameter: What the coverage says of it.
        group: Hyperparameters and traits of its parameter group.
        steps: The steps.
        weight: RMS of the weights after the step.
        start: RMS of the weights before the first measured step.
        update: RMS of the update.
        gradient: RMS of the gradient before clipping.
        along: Cosine between update and weights; -1 for weight decay alone.
        stalled: Fraction of the elements with a gradient that did not move.
        zero_rows: Fraction of rows (units) whose gradient was zero.
        untouched: Fraction of rows whose gradient has been zero in all measured steps up to now.
    """

    name: str
    parameter: Parameter
    group: Mapping[str, Any]
    steps: Array
    weight: Array
    start: Array
    update: Array
    gradient: Array
    along: Array
    stalled: Array
    zero_rows: Array
    untouched: Array

    @property
    def is_weight(self) -> bool:
        """Whether it has two axes or more."""
        return sum(n > 1 for n in self.parameter.shape) >= 2

    @property
    def is_embedding(self) -> bool:
        """Whether it is a table of rows of which a batch uses some."""
        return "embedding" in self.parameter.kind

    @cached_property
    def first(self) -> float:
        """RMS of the weights before training."""
        return float(self.start[0]) if len(self.start) else math.nan

    @cached_property
    def reach(self) -> Array:
        """Updates relative to the weights before training, so that weights that have grown do not hide large ones."""
        return self.update / self.first if self.first > 0 else np.full(len(self.update), math.nan)

    @cached_property
    def growth(self) -> Array:
        """Weights relative to those before training."""
        return self.weight / self.first if self.first > 0 else np.full(len(self.update), math.nan)

    @cached_property
    def travel(self) -> float:
        """Sum over all steps of update to weight: how far it came at most, in units of the weights."""
        ratio = np.divide(self.update, self.weight, out=np.zeros_like(self.update), where=self.weight > 0)
        if len(ratio) < 2:
            return float(ratio.sum())
        return float(np.nansum((ratio[1:] + ratio[:-1]) / 2 * np.diff(self.steps)) + ratio[0])


@dataclass(frozen=True)
class Evidence:
    """What a diagnosis looks at.

    Args:
        run: The logs.
    """

    run: Run
    _cache: dict[str, Any] = field(default_factory=dict, repr=False)

    # --- records ------------------------------------------------------------------------------------------------

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """Settings of the run, as :class:`.RunRecord` has written them last; empty where there are none."""
        return next((record["run"] for _, record in reversed(self.run.records) if "run" in record), {})

    @cached_property
    def optimizers(self) -> list[str]:
        """Classes of the optimizers, in the order of their first steps."""
        return list(dict.fromkeys(r["run"]["optimizer"] for _, r in self.run.records if "run" in r))

    @cached_property
    def groups(self) -> Sequence[Mapping[str, Any]]:
        """Hyperparameters and traits of the parameter groups of all optimizers."""
        return [group for _, r in self.run.records if "run" in r for group in r["run"]["groups"]]

    @cached_property
    def coverage(self) -> Coverage | None:
        """Which parameters were trained."""
        last = next((r["coverage"] for _, r in reversed(self.run.records) if "coverage" in r), None)
        return None if last is None else Coverage.from_dict(last)

    @property
    def ended(self) -> bool:
        """Whether the run has come to its end, or to an error."""
        return any("end" in record for _, record in self.run.records)

    @cached_property
    def _course(self) -> Array:
        """Columns: step, mean loss, largest loss, largest gradient norm."""
        parts = [np.array(r["course"], float) for _, r in self.run.records if "course" in r]
        course = np.concatenate(parts, axis=1) if parts else np.zeros((4, 0))
        # Of steps that were made twice, after a resume, the later ones count.
        _, last = np.unique(course[0][::-1], return_index=True)
        return _in_blocks(course[:, course.shape[1] - 1 - last])

    @property
    def steps(self) -> Array:
        """Steps of which the loss is known."""
        return self._course[0]

    @property
    def loss(self) -> Array:
        """Their losses."""
        return self._course[1]

    @property
    def norms(self) -> Array:
        """Norms of their gradients before clipping."""
        return self._course[3]

    @cached_property
    def length(self) -> int:
        """Number of steps that were recorded."""
        last = max((step for step, r in self.run.records if "lr" in r), default=-1)
        return int(max(last, self.steps[-1] if len(self.steps) else -1)) + 1

    @cached_property
    def skipped(self) -> list[tuple[int, int]]:
        """Steps, and how many had been skipped up to then."""
        return [(step, r["skipped"]) for step, r in self.run.records if "skipped" in r]

    @cached_property
    def rates(self) -> tuple[Array, Array]:
        """Measured steps and their learning rates."""
        pairs = {step: r["lr"]["lr"] for step, r in self.run.records if "lr" in r}
        return np.array(list(pairs), float), np.array(list(pairs.values()), float)

    @cached_property
    def validation(self) -> dict[str, tuple[Array, Array]]:
        """Validation metrics by name: steps and values."""
        found: dict[str, dict[int, float]] = {}
        for step, record in self.run.records:
            for name, value in record.get("validation", {}).items():
                found.setdefault(name, {})[step] = value
        return {name: (np.array(list(x), float), np.array(list(x.values()), float)) for name, x in found.items()}

    @cached_property
    def validation_loss(self) -> tuple[Array, Array] | None:
        """The validation loss, if there is one metric with that in its name."""
        names = [name for name in self.validation if "loss" in name.lower()]
        return self.validation[names[0]] if len(names) == 1 else None

    def scalar(self, tag: str) -> tuple[Array, Array]:
        """Steps and values of a scalar; none where it was not logged."""
        tags = self.run.tags(f"{tag}$")
        steps, values = self.run.scalars[tags[0]] if tags else ([], [])
        return np.array(steps, float), np.array(values, float)

    # --- layers -------------------------------------------------------------------------------------------------

    @cached_property
    def layers(self) -> list[Layer]:
        """Every parameter that was measured, in the order of the module."""
        tables: dict[str, dict[int, Mapping[str, Any]]] = {}
        for step, record in self.run.records:
            if "layers" in record:
                tables.setdefault(record["label"], {})[step] = record["layers"]
        known = {p.name: p for p in self.coverage.parameters} if self.coverage else {}
        layers = []
        for label, table in tables.items():
            settings = next(
                r["run"] for _, r in reversed(self.run.records) if "run" in r and r["run"]["label"] == label
            )
            steps = np.array(list(table), float)
            columns = {c: np.array([_column(t, c, len(settings["names"])) for t in table.values()]) for c in _COLUMNS}
            for i, name in enumerate(settings["names"]):
                there = ~np.isnan(columns["weight"][:, i])
                if not there.any():
                    continue
                group = settings["groups"][settings["group_of"][i]] if settings["group_of"][i] >= 0 else {}
                values = {c: x[there, i] for c, x in columns.items()}
                layers.append(Layer(name, known.get(name) or Parameter(name, ()), group, steps[there], **values))
        order = {name: i for i, name in enumerate(known)}
        return sorted(layers, key=lambda layer: order.get(layer.name, len(order)))

    @cached_property
    def weights(self) -> list[Layer]:
        """Layers with two axes or more that did not start at zero."""
        found = [layer for layer in self.layers if layer.is_weight]
        typical = float(np.median([layer.first for layer in found])) if found else 0.0
        return [layer for layer in found if layer.first > _ZERO_START * typical]

    # --- what the loss says -------------------------------------------------------------------------------------

    @cached_property
    def has_loss(self) -> bool:
        """Whether there is a positive loss to judge by."""
        return len(self.loss) >= 2 and bool(np.isfinite(self.loss[0])) and float(self.loss[0]) > 0

    @cached_property
    def first_loss(self) -> float:
        """Loss before training."""
        return min(float(self.loss[0]), float(np.median(self.loss[:3])))

    @cached_property
    def smooth(self) -> Array:
        """Running median of the loss, over a twentieth of the run at least five steps to each side."""
        return running_median(self.loss, max(2, len(self.loss) // 40))

    @cached_property
    def last_loss(self) -> float:
        """Median loss of the last tenth of the run."""
        return float(np.median(self.loss[-max(3, len(self.loss) // 10) :]))

    @cached_property
    def best_loss(self) -> float:
        """The smallest smoothed loss."""
        finite = self.smooth[np.isfinite(self.smooth)]
        return float(finite.min()) if len(finite) else math.nan

    @cached_property
    def fall(self) -> float:
        """By which part of itself the loss fell; negative where it rose."""
        if not self.has_loss or not math.isfinite(self.last_loss):
            return math.nan
        return (self.first_loss - self.last_loss) / self.first_loss

    @cached_property
    def chance(self) -> float:
        """Loss of a classifier that knows nothing, where the run began there; otherwise NaN."""
        outputs = self.settings.get("outputs", 0)
        if outputs < 2 or not self.has_loss:
            return math.nan
        chance = math.log(outputs)
        return chance if abs(self.first_loss - chance) < 0.3 * chance else math.nan

    @property
    def begins_far_above_chance(self) -> bool:
        """Whether a classifier's first loss is three times that of one that knows nothing: its outputs are huge."""
        outputs = self.settings.get("outputs", 0)
        return outputs >= 2 and self.has_loss and bool(self.loss[0] > 3 * math.log(outputs))

    @property
    def learns(self) -> bool:
        """Whether the loss fell by a sixth at least; true where there is no loss to judge by."""
        return not self.has_loss or self.fall > 1 / 6


#: Longer courses are looked at in so many blocks.
_MOST_POINTS = 4000


def _in_blocks(course: Array) -> Array:
    if course.shape[1] <= _MOST_POINTS:
        return course
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of blocks in which all norms are unknown
        return np.array(
            [
                (block[0, -1], block[1].mean(), block[2].max(), np.nanmax(block[3]))
                for block in np.array_split(course, _MOST_POINTS, axis=1)
            ]
        ).T


_COLUMNS = ("weight", "start", "update", "gradient", "along", "stalled", "zero_rows", "untouched")


def _column(table: Mapping[str, Any], name: str, length: int) -> list[float]:
    return [math.nan if x is None else x for x in table.get(name, [None] * length)]


def running_median(x: Array, side: int) -> Array:
    """Median over a window that reaches ``side`` values to each side.

    >>> running_median(np.array([1.0, 9.0, 1.0, 1.0]), 1).tolist()
    [5.0, 1.0, 1.0, 1.0]
    """
    return np.array([np.median(x[max(0, i - side) : i + side + 1]) for i in range(len(x))])
