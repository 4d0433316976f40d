"""The parameters of a group that a step updates: prepared once, and used until something changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from operator import is_
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import private, processes
from . import storage
from .arithmetic import regularize
from .layout import Part, is_split, parts_of, without_split
from .rounding import RESIDUAL, is_narrow, load, prepare_residual, random_bits, stream_positions, stream_start
from .rule import MatrixRule, Rule, Shape, hyperparameters_of, lasting_numbers
from .state import (
    State,
    compute_dtype,
    convert_storage,
    follow,
    has_begun,
    new_state,
    real_view,
    state_shapes,
    states_of_parts,
)


@dataclass
class Task:
    """One parameter's share of a step.

    Args:
        t: The number of this step for the parameter, from 1.
        p: The parameter, or this rank's shard of it.
        g: Its gradient; read only.
        grad_scale: What the gradient is multiplied by: -1 to ascend, below 1 in magnitude to bound it. A 0-d tensor
            where the host does not know it.
        state: The rule's state tensors, or this rank's shards of them.
        scalars: The numbers of the step; the same object for all parameters that share them.
        parameter: The parameter as the optimizer has it, a complex one as its real view.
        first: Index of the first of the parameter's matrices that ``p`` holds.
        noise: Position of the first element in the random stream (see :func:`.rounding.stream_start`); ``None``
            without stochastic rounding.
        low: The state tensors that are stored in low precision, and what is added to their random bits.
        low_noise: Position in the random stream of the first element of state in low precision.
        owner: The rank that keeps the state and runs the rule for all shards of the parameter, if one does.
        whole: On that rank, the whole parameter in the gradient's dtype, for a rule that reads it.
        part: The part of the parameter that ``p``, ``g`` and ``state`` are views of; ``None`` for all of it.
        by_shape: Of a parameter whose matrices are split, the numbers for those of each shape, in place of ``scalars``.
    """

    t: int
    p: Tensor
    g: Tensor
    grad_scale: float | Tensor
    state: State
    scalars: dict[str, Any]
    parameter: Tensor
    first: int = 0
    noise: int | None = None
    low: Mapping[str, int] = field(default_factory=dict)
    low_noise: int = 0
    owner: int | None = None
    whole: Tensor | None = None
    part: Part | None = None
    by_shape: dict[Shape, dict[str, Any]] = field(default_factory=dict)

    @property
    def elements(self) -> Tensor:
        """Index of each element of ``g`` among the parameter's, less that of the first."""
        if self.part is None:
            return stream_positions(0, 0, self.g.numel(), self.g.device).view(self.g.shape)
        whole = stream_positions(0, 0, self.parameter.numel(), self.g.device).view(self.parameter.shape)
        return self.part.of(whole) - self.part.offset

    def read(self, names: Iterable[str], rows: slice | None = None) -> dict[str, Tensor]:
        """State tensors in the precision of the arithmetic; copies of those that are stored in low precision.

        Args:
            names: Their names.
            rows: Which rows of them; ``None`` for all.
        """
        state, dtype = self.state, compute_dtype(self.p.dtype)
        found = {}
        for name in names:
            if name in self.low:
                stored, scale = _rows(state[name], rows), _rows(state.get(storage.scale_name(name)), rows)
                found[name] = storage.read(stored, scale, dtype)
            else:
                found[name] = _rows(state[name], rows)
        return found

    def write(self, values: Mapping[str, Tensor], finite: Tensor | None, rows: slice | None = None) -> None:
        """Round values that :meth:`read` returned back to state in low precision.

        Args:
            values: State tensors by name; others than those in low precision are left out.
            finite: ``None``, or a 0-d boolean tensor: where it is ``False`` nothing changes.
            rows: As in :meth:`read`.
        """
        bits = random_bits(_rows(self.elements, rows) + self.low_noise)
        for name, shift in self.low.items():
            stored, scale = _rows(self.state[name], rows), _rows(self.state.get(storage.scale_name(name)), rows)
            storage.write_(stored, scale, values[name].view(stored.shape), (bits + shift) & 0xFFFF, finite)


def _rows(x: Any, rows: slice | None) -> Any:
    return x if rows is None or x is None else x[rows]


@dataclass
class SharedStep:
    """The step of those parameters of a group that share its number and its scalars.

    Args:
        rule: Their rule.
        group: Their group.
        details: What the rule's ``scalars`` takes besides the step and the hyperparameters.
        counters: Step counts and host state of all parameters of the group; see :func:`counters_of`.
        indices: The entries of these parameters in each counter.

    Attributes:
        t: The number of the step.
        scalars: The numbers of the step; see :func:`.rule.numbers_of`.
        after: Step count and host state after the step.
    """

    rule: type[Rule]
    group: Mapping[str, Any]
    details: Sequence[Any]
    counters: Mapping[str, np.ndarray]
    indices: list[int]
    t: int = 0
    scalars: dict[str, Any] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)

    def begin(self, h: Any, lasting: dict[str, Any]) -> None:
        """Compute the numbers of the step after those that were made.

        Args:
            h: Hyperparameters as attributes.
            lasting: See :func:`.rule.lasting_numbers`.
        """
        first, rule = self.indices[0], self.rule
        self.t = t = self.counters["step"].item(first) + 1
        if rule.host_state:
            host = {name: self.counters[name].item(first) for name in rule.host_state}
            self.scalars = lasting | rule.scalars(t, h, *self.details, host)
            self.after = {"step": t, **host}
        else:
            self.scalars = lasting | rule.scalars(t, h, *self.details)
            self.after = {"step": t}

    def write(self, whole_group: bool = False) -> None:
        """Write step count and host state after the step to the state.

        Args:
            whole_group: Whether they are the same for all parameters of the group.
        """
        for name, value in self.after.items():
            vector = self.counters[name]
            if whole_group or len(self.indices) == len(vector):
                vector.fill(value)
            else:
                vector[self.indices] = value


def write_step_counts(steps: Sequence[SharedStep]) -> None:
    """Write the step counts and host state of a step that was made to the state."""
    done = 0
    while done < len(steps):
        step = steps[done]
        if len(step.indices) == len(step.counters["step"]):
            step.write()
            done += 1
            continue
        same = [other for other in steps[done:] if other.counters is step.counters and other.after == step.after]
        if len({i for other in same for i in other.indices}) == len(step.counters["step"]):
            step.write(whole_group=True)
            done += len(same)
        else:
            step.write()
            done += 1


@dataclass(eq=False)
class Batch:
    """The parameters of one group that take part in a step.

    :func:`prepare` makes one, which is used for every step as long as it :meth:`holds`.

    Args:
        rule: Their rule.
        group: Their parameter group.
        tasks: One for each parameter; at least one.
        idle: States of the group's other parameters, where they have any.
        steps: The steps that tasks share.
        params: The parameters, as the optimizer has them.
        states: Their states, as the optimizer has them.
        rounding: See :class:`.optimizer.RuleOptimizer`.
        state_dtype: See :class:`.optimizer.RuleOptimizer`.
        noisy: Of parameters with stochastic rounding: index, position in the optimizer, and number of elements that
            come before this rank's.
        noisy_state: The same of parameters with state in low precision.

    Attributes:
        even: Whether all gradients are multiplied by the same number.
        cache: What the code that runs it derived from its tasks; valid as long as the batch is.
    """

    rule: type[Rule]
    group: Mapping[str, Any]
    tasks: list[Task]
    idle: list[State] = field(default_factory=list)
    steps: list[SharedStep] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    rounding: str = "nearest"
    state_dtype: str = "float32"
    noisy: list[tuple[int, int, int]] = field(default_factory=list)
    noisy_state: list[tuple[int, int, int]] = field(default_factory=list)
    even: bool = False
    cache: dict[Any, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        self._layout: list[Any] = []
        self._names: tuple[str, ...] = ()
        self._tensors: list[Any] = []
        self._entries: list[Any] = []
        self._hyperparameters: Any = None

    def holds(
        self,
        group: Mapping[str, Any],
        params: list[Tensor],
        states: Mapping[Tensor, State],
        rounding: str,
        state_dtype: str,
    ) -> bool:
        """Whether a step of some parameters can use this batch as it is.

        It can as long as parameters, state tensors, dtypes and devices are the same as at :meth:`seal`, and step counts
        that were equal still are.

        Args:
            group: A parameter group.
            params: Those of its parameters that the step updates.
            states: The optimizer's state.
            rounding: See :class:`.optimizer.RuleOptimizer`.
            state_dtype: See :class:`.optimizer.RuleOptimizer`.
        """
        if (rounding, state_dtype) != (self.rounding, self.state_dtype):
            return False
        if group is not self.group or len(params) != len(self.params):
            return False
        if not all(map(is_, params, self.params)) or _layout(params) != self._layout:
            return False
        now = [states.get(p) for p in params]
        if not all(map(is_, now, self.states)):
            return False
        names = self._names
        if not all(map(is_, self._tensors, [state.get(name) for state in self.states for name in names])):
            return False
        for step in self.steps:
            if len(step.indices) > 1:
                for vector in step.counters.values():
                    values = vector.tolist()
                    if len(step.indices) < len(values):
                        values = [values[i] for i in step.indices]
                    if values.count(values[0]) < len(values):
                        return False
        return True

    def seal(self) -> None:
        """Remember the state tensors, after the first step, which may have replaced them (by views of joined ones)."""
        if not self._names and not any(p.is_complex() for p in self.params):
            # (A view of a complex parameter stays where it is when the parameter gets other memory.)
            self._layout = _layout(self.params)
            shapes = state_shapes(self.rule, self.params[0], self.group)
            self._names = (*shapes, "step", *self.rule.host_state, RESIDUAL)
            self._tensors = [state.get(name) for state in self.states for name in self._names]

    def hyperparameters(self) -> tuple[SimpleNamespace, dict[str, Any]]:
        """The group's hyperparameters as attributes, and the numbers that follow from them."""
        entries = list(self.group.values())
        if len(entries) != len(self._entries) or not all(map(is_, entries, self._entries)):
            h = hyperparameters_of(self.rule, self.group)
            self._hyperparameters = h, lasting_numbers(self.rule, h)
            # Values that may be edited in place are read again in every step.
            lasting = not any(isinstance(self.group.get(name), (Tensor, list)) for name in self.rule.fields)
            self._entries = entries if lasting else []
        return self._hyperparameters

    def begin(
        self, grads: Iterable[Tensor], grad_scales: list[Any], given: Iterator[dict[str, Any]] | None = None
    ) -> None:
        """Set the gradients and numbers of a step.

        Args:
            grads: The parameters' gradients.
            grad_scales: What they are multiplied by.
            given: Scalars to use instead of those that the rule computes, one set for each shared step.
        """
        h, lasting = self.hyperparameters()
        tasks, split = self.tasks, "split" in self.group and is_split(self.group)
        for step in self.steps:
            step.begin(h, lasting)
            if given is not None:
                step.scalars = next(given)
            for i in step.indices:
                tasks[i].t, tasks[i].scalars = step.t, step.scalars
                if split:
                    tasks[i].by_shape[step.details[0]] = step.scalars
        self.even = type(grad_scales[0]) is float and grad_scales.count(grad_scales[0]) == len(grad_scales)
        ascends = self.group["maximize"]
        for task, g, grad_scale in zip(tasks, grads, grad_scales):
            task.g, task.grad_scale = g, (-grad_scale if ascends else grad_scale)
        for i, position, offset in self.noisy:
            tasks[i].noise = stream_start(tasks[i].t, position) + offset
        for i, position, offset in self.noisy_state:
            tasks[i].low_noise = stream_start(tasks[i].t, position) + offset


def regularized(batch: Batch) -> Batch:
    """The same with coupled weight decay, if there is any, in the gradients; for matrix rules.

    Other rules need no such copy of all gradients: :func:`.call.call` does it for each chunk.
    """
    if batch.tasks[0].scalars["l2"] is None:
        return batch
    tasks = []
    for task in batch.tasks:
        dtype = compute_dtype(task.p.dtype)
        value = load(task.p, task.state.get(RESIDUAL), dtype)
        g = regularize(task.g.to(dtype) * task.grad_scale, value, task.scalars["l2"])
        tasks.append(replace(task, g=g, grad_scale=1.0))
    return replace(batch, tasks=tasks, cache={})


def in_parts(batch: Batch) -> Batch:
    """The same with a task for each part, where matrices are split; for parameters that this rank holds whole."""
    if not is_split(batch.group):
        return batch
    tasks = []
    for task in batch.tasks:
        p = task.parameter
        for part, like, others in states_of_parts(batch.rule, p, batch.group, task.state):
            # Where other ranks move their shards of it, residuals stay with them.
            state = {
                **{name: part.of(x) for name, x in like.items() if name != RESIDUAL or x.shape == p.shape},
                **others,
            }
            own = replace(task, g=part.of(task.g), state=state, scalars=task.by_shape[part.shape])
            own.first, own.part, own.low_noise = part.first, part, task.low_noise + part.offset
            if task.p.shape == p.shape:
                own.p = part.of(task.p)
            if task.noise is not None:
                own.noise = task.noise + part.offset
            if task.whole is not None:
                own.whole = part.of(task.whole)
            tasks.append(own)
    return replace(batch, group=without_split(batch.group), tasks=tasks, cache={})


def prepare(
    rule: type[Rule],
    group: Mapping[str, Any],
    params: list[Tensor],
    states: list[State],
    owners: Sequence[int | None],
    rounding: str,
    state_dtype: str,
    positions: Mapping[Tensor, int],
) -> Batch:
    """A batch of some parameters of a group, whose state exists then, with the right dtype and on the right device.

    Args:
        rule: The group's rule.
        group: The parameter group.
        params: Those of its parameters that the step updates.
        states: The optimizer's states of these parameters; empty ones are initialised.
        owners: The rank that keeps the state of each parameter; ``None`` where every rank has its own.
        rounding: See :class:`.optimizer.RuleOptimizer`.
        state_dtype: See :class:`.optimizer.RuleOptimizer`.
        positions: Positions of parameters in the optimizer, where something is rounded at random.
    """
    for p, state, owner in zip(params, states, owners):
        if not has_begun(state):
            state.update(new_state(rule, p, group, owner))
    follow(rule, params, states, group)
    if rounding != "nearest" or any(RESIDUAL in state for state in states):
        for p, state in zip(params, states):
            prepare_residual(state, p, rounding)
    low = [convert_storage(rule, p, state, group, state_dtype) for p, state in zip(params, states)]
    tasks = [
        Task(0, processes.local(p), p, 1.0, processes.local_state(p, state), {}, p, low=shifts, owner=owner)
        for p, state, shifts, owner in zip(map(real_view, params), states, low, owners)
    ]
    noisy, noisy_state = [], []
    for i, (p, task) in enumerate(zip(params, tasks)):
        if rounding == "stochastic" and is_narrow(p.dtype):
            noisy.append((i, positions[p], processes.flat_offset(p)))
        if task.low:  # An owner has all of the state.
            noisy_state.append(
                (i, positions[p], 0 if task.owner is not None else processes.flat_offset(task.parameter))
            )
    steps = _shared_steps(rule, group, params, states)
    return Batch(rule, group, tasks, [], steps, params, states, rounding, state_dtype, noisy, noisy_state)


def _shared_steps(
    rule: type[Rule], group: Mapping[str, Any], params: list[Tensor], states: list[State]
) -> list[SharedStep]:
    """One for each set of parameters with equal step counts and, for matrix rules, equal shape and phase."""
    counters = counters_of(states, ("step", *rule.host_state))
    phases = rule.phases(hyperparameters_of(rule, group)) if issubclass(rule, MatrixRule) else 0
    place = {p: i % phases for i, p in enumerate(group["params"])} if phases else {}
    found: dict[Any, SharedStep] = {}
    for i, (p, *counts) in enumerate(zip(params, *[vector.tolist() for vector in counters.values()])):
        matrices = issubclass(rule, MatrixRule)
        for shape in dict.fromkeys(part.shape for part in parts_of(p.shape, group)) if matrices else [None]:
            details: list[Any] = [] if shape is None else [shape]
            if place:
                details.append(place[p])
            found.setdefault((*counts, *details), SharedStep(rule, group, details, counters, [])).indices.append(i)
    return list(found.values())


def _layout(params: list[Tensor]) -> list[Any]:
    """All that a step depends on of parameters and gradients besides their values."""
    return [
        (p.dtype, p.device, p.shape, *(() if (g := p.grad) is None else (g.dtype, g.shape, g.layout))) for p in params
    ]


def usable_gradient(p: Tensor) -> Tensor:
    """This rank's shard of a parameter's gradient, zero where it has none.

    A float64 gradient of a parameter with float32 arithmetic is converted: a value out of range becomes infinite, and
    the check for non-finite gradients finds it.
    """
    if p.grad is None:
        return torch.zeros_like(real_view(p))
    g = real_view(processes.local_gradient(p).resolve_conj())
    return g.to(compute_dtype(p.dtype)) if g.dtype == torch.float64 else g


def counters_of(states: list[State], names: Iterable[str]) -> dict[str, np.ndarray]:
    """Scalar state that the host computes with: one vector per name, which shares memory with the tensors in the state.

    All parameters' values are read, or written, in one operation, which takes NumPy a tenth of the time.
    """
    vectors: dict[str, np.ndarray] = {}
    for name in names:
        column = [state[name] for state in states]
        vector = private.base(column[0]) if isinstance(column[0], Tensor) else None
        if vector is None or vector.shape != (len(column),) or not private.are_views(column, count(), vector):
            # New state, state from a checkpoint, or another selection of parameters than last time. Wrappers may have
            # written a count as a float, too; it has to count beyond 2^24.
            dtype = torch.int64 if name == "step" else torch.float64
            vector = torch.stack([torch.as_tensor(x, dtype=dtype, device="cpu") for x in column])
            for i, state in enumerate(states):
                state[name] = vector[i]
        vectors[name] = vector.numpy()
    return vectors
