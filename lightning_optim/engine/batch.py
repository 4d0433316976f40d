"""The parameters of a group that a step updates: prepared once, and used until something about them changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from operator import is_
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import private, processes
from .rounding import RESIDUAL, prepare_residual, stream_start
from .rule import MatrixRule, Rule, hyperparameters_of, numbers_of
from .state import State, block_shape, compute_dtype, follow, has_begun, new_state, real_view, state_shapes


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
        owner: The rank that keeps the state and runs the rule for all shards of the parameter, if one does.
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
    owner: int | None = None


@dataclass
class Batch:
    """The parameters of one group that take part in a step.

    Args:
        rule: Their rule.
        group: Their parameter group.
        tasks: One for each parameter; at least one.
        idle: States of the group's other parameters, where they have any.

    Attributes:
        cache: What the code that runs it derived from its tasks; valid as long as the batch is.
    """

    rule: type[Rule]
    group: Mapping[str, Any]
    tasks: list[Task]
    idle: list[State] = field(default_factory=list)
    cache: dict[Any, Any] = field(default_factory=dict, compare=False)


@dataclass
class SharedStep:
    """A step of those parameters of a group that share its number and its scalars.

    Args:
        rule: Their rule.
        group: Their group.
        details: What the rule's ``scalars`` takes besides the step and the hyperparameters.
        before: Step count and host state before the step.
        counters: Step counts and host state of all parameters of the group; see :func:`counters_of`.
        indices: The entries of these parameters in each counter.
        h: Hyperparameters as attributes.

    Attributes:
        t: The number of the step.
        scalars: The numbers of the step; see :func:`.rule.numbers_of`.
        after: Step count and host state after the step.
    """

    rule: type[Rule]
    group: Mapping[str, Any]
    details: Sequence[Any]
    before: tuple[float, ...]
    counters: Mapping[str, Tensor]
    indices: list[int]
    h: SimpleNamespace

    def __post_init__(self) -> None:
        self.t = int(self.before[0]) + 1
        host = dict(zip(self.rule.host_state, self.before[1:]))
        details = [*self.details, *([host] if host else [])]
        self.scalars: dict[str, Any] = numbers_of(self.rule, self.t, self.h, *details)
        self.after: dict[str, float] = {"step": self.t, **host}

    def next(self) -> SharedStep:
        """The step after this one, or this one again if it was skipped."""
        before = tuple(vector[self.indices[0]].item() for vector in self.counters.values())
        return replace(self, before=before, h=hyperparameters_of(self.rule, self.group))

    def write(self, whole_group: bool = False) -> None:
        """Write step count and host state after the step to the state.

        Args:
            whole_group: Whether they are the same for all parameters of the group.
        """
        for name, value in self.after.items():
            vector = self.counters[name]
            if whole_group or len(self.indices) == vector.numel():
                vector.fill_(value)
            else:
                vector[self.indices] = value


def write_step_counts(steps: Sequence[SharedStep]) -> None:
    """Write the step counts and host state of a step that was made to the state."""
    done = 0
    while done < len(steps):
        step = steps[done]
        same = [other for other in steps[done:] if other.counters is step.counters and other.after == step.after]
        if sum([len(other.indices) for other in same]) == step.counters["step"].numel():
            step.write(whole_group=True)
            done += len(same)
        else:
            step.write()
            done += 1


class PreparedGroup:
    """A parameter group ready for a step: its state exists, with the right dtype and on the right device.

    Args:
        rule: The group's rule.
        group: The parameter group.
        params: Those of its parameters that the step updates.
        states: The optimizer's states of these parameters; empty ones are initialised.
        owners: The rank that keeps the state of each parameter; ``None`` where every rank has its own.
        rounding: See :class:`.optimizer.RuleOptimizer`.
        positions: Positions in the optimizer of the parameters with stochastic rounding.
    """

    def __init__(
        self,
        rule: type[Rule],
        group: Mapping[str, Any],
        params: list[Tensor],
        states: list[State],
        owners: Sequence[int | None],
        rounding: str,
        positions: Mapping[Tensor, int],
    ) -> None:
        for p, state, owner in zip(params, states, owners):
            if not has_begun(state):
                state.update(new_state(rule, p, group, owner))
        follow(rule, params, states, group)
        if rounding != "nearest" or any(RESIDUAL in state for state in states):
            for p, state in zip(params, states):
                prepare_residual(state, p, rounding)
        self.rule, self.group = rule, group
        self.params, self.states = params, states
        self.rounding = rounding
        self.counters = counters_of(states, ("step", *rule.host_state))
        self._names = (*state_shapes(rule, params[0], group), *self.counters, RESIDUAL)
        self._layout = _layout(params)
        self._tensors: list[Any] = []
        self._stochastic = [(i, positions[p], processes.flat_offset(p)) for i, p in enumerate(params) if p in positions]
        self._parts = self._by_scalars()
        self._has_views = any(p.is_complex() for p in params)
        tasks = [
            Task(0, processes.local(p), p, 1.0, processes.local_state(p, state), {}, p, owner=owner)
            for p, state, owner in zip(map(real_view, params), states, owners)
        ]
        self.batch = Batch(rule, group, tasks)

    def _by_scalars(self) -> list[tuple[list[Any], list[int]]]:
        """Parameters that share their scalars: equal step counts and, for matrix rules, equal shape and phase.

        Returns:
            For each set, what ``scalars`` takes besides step and hyperparameters, and the indices of its parameters.
        """
        rule = self.rule
        phases = rule.phases(hyperparameters_of(rule, self.group)) if issubclass(rule, MatrixRule) else 0
        place = {p: i % phases for i, p in enumerate(self.group["params"])} if phases else {}
        found: dict[Any, tuple[list[Any], list[int]]] = {}
        for i, (p, counts) in enumerate(zip(self.params, self._counts())):
            details: list[Any] = [block_shape(p.shape, self.group)] if issubclass(rule, MatrixRule) else []
            if place:
                details.append(place[p])
            found.setdefault((counts, *details), (details, []))[1].append(i)
        return list(found.values())

    def _counts(self) -> list[tuple[float, ...]]:
        return list(zip(*[vector.tolist() for vector in self.counters.values()]))

    def holds(self, params: list[Tensor], states: list[State], rounding: str) -> bool:
        """Whether parameters, state tensors, dtypes and devices are those of :meth:`seal`.

        :meth:`begin` checks that step counts which were equal still are.
        """
        if rounding != self.rounding or len(params) != len(self.params):
            return False
        if self._has_views:
            return False  # A view stays where it is when its parameter gets other memory.
        if not (all(map(is_, params, self.params)) and all(map(is_, states, self.states))):
            return False
        if _layout(params) != self._layout:
            return False
        return all(map(is_, self._tensors, [state.get(name) for state in states for name in self._names]))

    def seal(self) -> None:
        """Remember the state tensors, after the first step, which may have replaced them (by views of joined ones)."""
        if not self._tensors:
            self._tensors = [state.get(name) for state in self.states for name in self._names]

    def begin(
        self, grads: Iterable[Tensor], grad_scales: Iterable[Any], given: Iterator[dict[str, Any]] | None = None
    ) -> list[SharedStep] | None:
        """Set the gradients and numbers of a step.

        Args:
            grads: The parameters' gradients.
            grad_scales: What they are multiplied by.
            given: dict[str, Any] to use instead of those that the rule computes, one set for each shared step.

        Returns:
            The shared steps; ``None`` if step counts that were equal no longer are, and the group must be prepared
            again.
        """
        counts, h = self._counts(), hyperparameters_of(self.rule, self.group)
        steps = []
        tasks = self.batch.tasks
        for details, indices in self._parts:
            before = counts[indices[0]]
            if len(indices) > 1 and [counts[i] for i in indices].count(before) < len(indices):
                return None
            step = SharedStep(self.rule, self.group, details, before, self.counters, indices, h)
            if given is not None:
                step.scalars = next(given)
            for i in indices:
                tasks[i].t, tasks[i].scalars = step.t, step.scalars
            steps.append(step)
        ascends = self.group["maximize"]
        for task, g, grad_scale in zip(tasks, grads, grad_scales):
            task.g, task.grad_scale = g, (-grad_scale if ascends else grad_scale)
        for i, position, offset in self._stochastic:
            tasks[i].noise = stream_start(tasks[i].t, position) + offset
        return steps


def _layout(params: list[Tensor]) -> list[Any]:
    return [(p.dtype, p.device, p.shape, p.grad.dtype if p.grad is not None else None) for p in params]


def usable_gradient(p: Tensor) -> Tensor:
    """This rank's shard of a parameter's gradient, zero where it has none.

    A float64 gradient of a parameter with float32 arithmetic is converted: a value out of range becomes infinite, and
    the check for non-finite gradients finds it.
    """
    if p.grad is None:
        return torch.zeros_like(real_view(p))
    g = real_view(processes.local_gradient(p).resolve_conj())
    return g.to(compute_dtype(p.dtype)) if g.dtype == torch.float64 else g


def counters_of(states: list[State], names: Iterable[str]) -> dict[str, Tensor]:
    """Scalar state that the host computes with: one vector per name, whose entries are the tensors in the state.

    All parameters' values are read, or written, in one operation.
    """
    vectors = {}
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
        vectors[name] = vector
    return vectors
