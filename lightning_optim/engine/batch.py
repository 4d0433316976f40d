"""The parameters of a group that take part in a step: looked up once, and used until something about them changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import is_
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import processes
from .rounding import RESIDUAL, first_number, prepare_residual
from .rule import MatrixRule, Rule, Scalars, hyperparameters_of, numbers_of
from .state import State, block_shape, compute_dtype, follow, has_begun, new_state, real_view, state_shapes


@dataclass
class Task:
    """One parameter's share of a step.

    Args:
        t: The number of this step for the parameter, from 1.
        p: The parameter, or this rank's shard of it.
        g: Its gradient; read only.
        gain: What the gradient is multiplied by: -1 to ascend, less than 1 in size to bound it. A 0-d tensor where
            the host does not know it.
        state: The rule's state tensors, or this rank's shards of them.
        scalars: The numbers of the step; the same object for all parameters that share them.
        parameter: The parameter as the optimizer has it, a complex one as its real view.
        first: The first of its matrices that the task is about, if not all.
        noise: The number of the first element in the stream of random numbers; ``None`` where none are needed.
        owner: The rank that has the state and runs the rule, where several hold shards of the parameter and one does.
    """

    t: int
    p: Tensor
    g: Tensor
    gain: float | Tensor
    state: State
    scalars: Scalars
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
        tasks: What is to be done, for one parameter at least.
        idle: States of the group's other parameters that have one.

    Attributes:
        cache: What those who run it found out about its tasks, which holds as long as the batch does.
    """

    rule: type[Rule]
    group: Mapping[str, Any]
    tasks: list[Task]
    idle: list[State] = field(default_factory=list)
    cache: dict[Any, Any] = field(default_factory=dict, compare=False)


@dataclass
class Tick:
    """A step of all parameters of a group that have made equally many, and whose numbers are the same.

    Args:
        rule: Their rule.
        group: Their group.
        details: What the rule's ``scalars`` gets beside the step and the hyperparameters.
        before: Step count and host state before the step.
        clocks: Where those of the group's parameters are kept; see :func:`clocks_of`.
        indices: Which entries of it are those of this tick's parameters.
        h: Hyperparameters as attributes.

    Attributes:
        t: The number of the step.
        scalars: The numbers of the step; see :func:`.rule.numbers_of`.
        clock: Step count and host state after the step.
    """

    rule: type[Rule]
    group: Mapping[str, Any]
    details: Sequence[Any]
    before: tuple[float, ...]
    clocks: Mapping[str, Tensor]
    indices: list[int]
    h: SimpleNamespace

    def __post_init__(self) -> None:
        self.t = int(self.before[0]) + 1
        host = dict(zip(self.rule.host_state, self.before[1:]))
        details = [*self.details, *([host] if host else [])]
        self.scalars: Scalars = numbers_of(self.rule, self.t, self.h, *details)
        self.clock: dict[str, float] = {"step": self.t, **host}

    def next(self) -> Tick:
        """The step after this one, or the same again if it was skipped."""
        before = tuple(vector[self.indices[0]].item() for vector in self.clocks.values())
        return replace(self, before=before, h=hyperparameters_of(self.rule, self.group))

    def settle(self, everyone: bool = False) -> None:
        """Write step count and host state down: the step was made.

        Args:
            everyone: Whether those of all parameters of the group are the same.
        """
        for name, value in self.clock.items():
            vector = self.clocks[name]
            if everyone or len(self.indices) == vector.numel():
                vector.fill_(value)
            else:
                vector[self.indices] = value


def settle(ticks: Sequence[Tick]) -> None:
    """Write down the step counts and host states of a step that was made."""
    done = 0
    while done < len(ticks):
        tick = ticks[done]
        same = [other for other in ticks[done:] if other.clocks is tick.clocks and other.clock == tick.clock]
        if sum(len(other.indices) for other in same) == tick.clocks["step"].numel():
            tick.settle(everyone=True)
            done += len(same)
        else:
            tick.settle()
            done += 1


class PreparedGroup:
    """What a parameter group has to do in a step, prepared: its state exists, in the right precision and place.

    Args:
        rule: The group's rule.
        group: The parameter group.
        params: Those of its parameters that take part.
        states: The optimizer's states of these parameters; empty ones are filled.
        owners: The rank that keeps the state of each parameter, ``None`` where every rank has its own.
        rounding: See :class:`.optimizer.RuleOptimizer`.
        positions: Positions in the optimizer of the parameters that are rounded at random.
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
        self.clocks = clocks_of(states, ("step", *rule.host_state))
        self._names = (*state_shapes(rule, params[0], group), *self.clocks, RESIDUAL)
        self._layout = _layout(params)
        self._tensors: list[Any] = []
        self._noisy = [(i, positions[p], processes.flat_offset(p)) for i, p in enumerate(params) if p in positions]
        self._parts = self._dealt()
        self._has_views = any(p.is_complex() for p in params)
        tasks = [
            Task(0, processes.local(p), p, 1.0, processes.local_state(p, state), {}, p, owner=owner)
            for p, state, owner in zip(map(real_view, params), states, owners)
        ]
        self.batch = Batch(rule, group, tasks)

    def _dealt(self) -> list[tuple[list[Any], list[int]]]:
        """Which parameters have the same numbers: those of one clock, for matrix rules also of one shape and schedule.

        Returns:
            For each set what ``scalars`` gets beside the step and the hyperparameters, and indices of its parameters.
        """
        rule = self.rule
        phases = rule.phases(hyperparameters_of(rule, self.group)) if issubclass(rule, MatrixRule) else 0
        place = {p: i % phases for i, p in enumerate(self.group["params"])} if phases else {}
        found: dict[Any, tuple[list[Any], list[int]]] = {}
        for i, (p, clock) in enumerate(zip(self.params, self._now())):
            details: list[Any] = [block_shape(p.shape, self.group)] if issubclass(rule, MatrixRule) else []
            if place:
                details.append(place[p])
            found.setdefault((clock, *details), (details, []))[1].append(i)
        return list(found.values())

    def _now(self) -> list[tuple[float, ...]]:
        return list(zip(*(vector.tolist() for vector in self.clocks.values())))

    def holds(self, params: list[Tensor], states: list[State], rounding: str) -> bool:
        """Whether nothing has changed since :meth:`seal`: parameters, tensors of state, precisions and devices.

        Step counts change together; whether they still do is looked at by :meth:`begin`.
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
        """Remember the tensors of state, once the first step has put them where it wants them."""
        if not self._tensors:
            self._tensors = [state.get(name) for state in self.states for name in self._names]

    def begin(
        self, grads: Iterable[Tensor], gains: Iterable[Any], given: Iterator[Scalars] | None = None
    ) -> list[Tick] | None:
        """Set the gradients and numbers of a step.

        Args:
            grads: The parameters' gradients.
            gains: What they are multiplied by.
            given: What to use for the numbers of each tick, if not those that the rule computes.

        Returns:
            What the step will do to step counts; ``None`` if these have parted ways: the group is to be prepared anew.
        """
        now, h = self._now(), hyperparameters_of(self.rule, self.group)
        ticks = []
        tasks = self.batch.tasks
        for details, indices in self._parts:
            before = now[indices[0]]
            if len(indices) > 1 and [now[i] for i in indices].count(before) < len(indices):
                return None
            tick = Tick(self.rule, self.group, details, before, self.clocks, indices, h)
            if given is not None:
                tick.scalars = next(given)
            for i in indices:
                tasks[i].t, tasks[i].scalars = tick.t, tick.scalars
            ticks.append(tick)
        sign = -1.0 if self.group["maximize"] else 1.0
        for task, g, gain in zip(tasks, grads, gains):
            task.g, task.gain = g, gain * sign
        for i, position, offset in self._noisy:
            tasks[i].noise = first_number(tasks[i].t, position) + offset
        return ticks


def _layout(params: list[Tensor]) -> list[Any]:
    return [(p.dtype, p.device, p.shape, p.grad.dtype if p.grad is not None else None) for p in params]


def local_gradient(p: Tensor) -> Tensor:
    """This rank's shard of a parameter's gradient, zero where it has none.

    One of more precision than the arithmetic is converted: what is beyond its range becomes infinite and is found.
    """
    if p.grad is None:
        return torch.zeros_like(real_view(p))
    g = real_view(processes.local_gradient(p).resolve_conj())
    return g.to(compute_dtype(p.dtype)) if g.dtype == torch.float64 else g


def clocks_of(states: list[State], names: Iterable[str]) -> dict[str, Tensor]:
    """Scalar state that the host computes with, one vector per name, of which the state's tensors are the entries.

    To read and write it as a whole is one operation, whatever the number of parameters.
    """
    vectors = {}
    for name in names:
        column = [state[name] for state in states]
        vector = column[0]._base
        if vector is None or vector.shape != (len(column),) or not _are_entries(column, vector):
            # New, from a checkpoint (which may have been moved as a whole), or of other parameters than the last time.
            # A count that a wrapper has written as a float, too, counts beyond 2^24.
            dtype = torch.int64 if name == "step" else torch.float64
            vector = torch.stack([x.to("cpu", dtype) for x in column])
            for i, state in enumerate(states):
                state[name] = vector[i]
        vectors[name] = vector
    return vectors


def _are_entries(column: Sequence[Tensor], vector: Tensor) -> bool:
    return all(x._base is vector and x.storage_offset() == i for i, x in enumerate(column))
