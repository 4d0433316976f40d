"""Matrix rules: equal shapes stacked, and the orthogonalisation that stacks of a step share.

Parameters of one group whose matrices have the same shape run as one stack ``(k, m, n)``, if they are so small that
copying them costs less than running one after the other; larger ones run alone, on views. A rule updates state only,
and how parameters are to move goes to a :data:`Mover`. An update that needs a polar
factor yields the matrices instead of computing it, so that :func:`drive` can gather what all stacks ask for and
orthogonalise everything of one shape, tall and wide twins included, in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import prod
from types import GeneratorType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import private
from ..polar import orthogonalize
from .batch import Batch, Task
from .elementwise import split_by_size
from .rounding import RESIDUAL, joined_positions, load, store_, stream_positions
from .rule import LIKE_PARAMETER, MatrixRule, Move, Polar, buffers_of, hyperparameters_of, ignore
from .state import block_shape, compute_dtype, from_blocks, to_blocks

ParameterObserver = Callable[[Tensor, str, Tensor], None]
#: What becomes of something that a rule reports of a task's matrices.
Report = Callable[[Task, str, Tensor], None]

#: Matrices are stacked that have up to this many elements, with gradient and state: below it copying all of them costs
#: less than dispatching their operations.
STACK = {"cpu": 2**19, "cuda": 2**22}
#: Matrices up to this many elements are orthogonalised together: above it one matrix product keeps the device busy.
TOGETHER = {"cpu": 2**18, "cuda": 2**21}
#: Elements that one process works on at the same time, on a CPU for each thread: what stays in its cache and in memory
#: that is not handed back to the system in between; elsewhere what bounds the memory.
LOT = {"cpu": 2**18, "cuda": 2**24}
#: Elements whose orthogonalisation several processes share at the same time.
WAVE = 2**24


@dataclass
class Stack:
    """Equal-shape matrices of one group that run as one."""

    rule: type[MatrixRule]
    group: Mapping[str, Any]
    tasks: list[Task]

    def __post_init__(self) -> None:
        block = block_shape(self.tasks[0].g.shape, self.group)
        #: Shapes of the state tensors of one matrix, ``None`` for its own.
        self.shapes = buffers_of(self.rule, block, hyperparameters_of(self.rule, self.group))
        self.elements = sum(task.g.numel() for task in self.tasks)
        #: Sorted shape of a matrix: that of its orthogonalisation.
        self.shape = tuple(sorted((block[0], prod(block[1:]))))
        self._views: dict[str, tuple[int | None, Tensor]] = {}

    def view(self, x: Tensor) -> Tensor:
        """The matrices of one of its parameters, or of something of that shape."""
        y = to_blocks(x, self.group)
        return y.flatten(2) if self.rule.flatten else y

    def joined(self, name: str, xs: list[Tensor]) -> Tensor:
        """Tensors of the parameters' shape, one for each of them, as a stack; of one, if possible, a view."""
        if len(xs) > 1:
            return torch.cat([self.view(x) for x in xs])
        place, view = self._views.get(name, (None, xs[0]))
        if xs[0].data_ptr() != place:
            view = self.view(xs[0])
            if view.data_ptr() == xs[0].data_ptr():
                self._views[name] = (view.data_ptr(), view)
        return view


#: Moves the parameters of a stack; where the verdict, its last argument, is ``False`` nothing may change.
Mover = Callable[[Stack, Move, "Tensor | None"], None]
#: Answers what stacks ask for with the help of other processes, on which it waits where it yields.
Answer = tuple[Tensor, tuple[Tensor, ...]]
Solver = Callable[[Sequence[tuple[Stack, Polar]]], Generator[None, None, list[Answer]]]


def move_(stack: Stack, move: Move, finite: Tensor | None) -> None:
    """Move the parameters of a stack, which are all here."""
    tasks = stack.tasks
    params = [task.p for task in tasks]
    residuals = [task.state[RESIDUAL] for task in tasks if RESIDUAL in task.state]
    p = stack.joined("parameter", params)
    residual = stack.joined(RESIDUAL, residuals) if residuals else None
    move_tensor_(p, move, tasks[0].scalars["keep"], residual, _noise(stack), finite)
    _store(p, params, stack.group)
    if residual is not None:
        _store(residual, residuals, stack.group)


def move_tensor_(
    p: Tensor,
    move: Move,
    keep: float | Tensor,
    residual: Tensor | None,
    noise: Tensor | None,
    finite: Tensor | None,
) -> None:
    """Move a tensor of any precision; for the last arguments see :func:`.rounding.store_`."""
    value = load(p, residual, compute_dtype(p.dtype))
    if value is p and finite is not None:
        value = p.clone()
    move.apply_(value, keep)
    if value is not p:
        store_(p, value, residual, noise, finite)


def jobs(
    batches: Iterable[Batch],
    plain: bool,
    finite: Tensor | None,
    report: Report | None,
    solve: Solver | None = None,
    processes: int = 1,
    move: Mover = move_,
) -> Iterator[Iterator[None]]:
    """Updates of the parameters and state of matrix rules, a wave of them at a time; each is to be run to its end.

    Args:
        batches: Rules and the parameters they run on, of which this process has everything.
        plain: Whether to run one parameter at a time.
        finite: ``None``, or a 0-d boolean tensor: where it is ``False`` nothing may change.
        report: Called with what rules report.
        solve: What orthogonalises; by default this process alone.
        processes: How many processes share a wave's orthogonalisation.
        move: What moves the parameters.
    """
    for wave in _waves(list(batches), plain, processes):
        yield drive(wave, finite, report, solve, move)


def _waves(batches: list[Batch], plain: bool, processes: int) -> list[list[Stack]]:
    """Stacks that run side by side. Those of a batch whose numbers go by shape alone stay together for good."""
    key = ("waves", plain, processes)
    lasting = len(batches) == 1 and not _phases(batches[0])
    if lasting and key in batches[0].cache:
        return batches[0].cache[key]
    stacks = [stack for batch in batches for stack in split(batch, plain)]
    stacks.sort(key=lambda stack: stack.shape, reverse=True)
    waves: list[list[Stack]] = []
    small = sum(stack.elements for stack in stacks) <= lot(stacks[0].tasks[0].g.device)
    # Alone, one shape at a time keeps memory low. Several ranks should all have something to do in each wave.
    for _, some in groupby(stacks, key=lambda stack: stack.shape if processes == 1 and not small else None):
        alike = list(some)
        sizes = [stack.elements for stack in alike]
        limit = lot(alike[0].tasks[0].g.device) if processes == 1 else wave_limit(sizes, processes)
        waves += split_by_size(alike, sizes, 0 if plain else limit)
    if lasting:
        batches[0].cache[key] = waves
    return waves


def lot(device: torch.device) -> int:
    """How many elements one process works on at the same time."""
    return LOT["cpu"] * torch.get_num_threads() if device.type == "cpu" else LOT["cuda"]


def wave_limit(elements: Sequence[int], processes: int) -> int:
    """How many elements a wave may have: enough for each process to work on the largest."""
    return max(WAVE, processes * max(elements, default=0))


def split(batch: Batch, plain: bool) -> Iterator[Stack]:
    """Join what can run as one."""
    rule = batch.rule
    assert issubclass(rule, MatrixRule)
    alike: dict[Any, list[Task]] = {}
    elements = {shape: _elements(rule, batch.group, shape) for shape in {task.g.shape for task in batch.tasks}}
    for i, task in enumerate(batch.tasks):
        g = task.g
        small = not plain and elements[g.shape] <= STACK.get(g.device.type, STACK["cuda"])
        key = (*task.scalars.items(), g.shape, task.p.dtype, g.dtype, g.device) if small else i
        alike.setdefault(key, []).append(task)
    for tasks in alike.values():
        for some in split_by_size(tasks, [task.g.numel() for task in tasks], lot(tasks[0].g.device)):
            yield Stack(rule, batch.group, some)


def _phases(batch: Batch) -> int:
    rule = batch.rule
    return rule.phases(hyperparameters_of(rule, batch.group)) if issubclass(rule, MatrixRule) else 0


def _elements(rule: type[MatrixRule], group: Mapping[str, Any], shape: torch.Size) -> int:
    """Elements of one matrix of a parameter, its gradient and its state."""
    block = block_shape(shape, group)
    shapes = buffers_of(rule, block, hyperparameters_of(rule, group))
    state = (block if x is LIKE_PARAMETER else x for x in shapes.values())
    return sum(prod(x) for x in (block, block, *state))


def _update(stack: Stack, finite: Tensor | None, report: Report | None, move: Mover) -> Iterator[Polar]:
    """Run the rule on a stack; yields what it wants orthogonalised and added up, and is sent the result."""
    rule, group, tasks = stack.rule, stack.group, stack.tasks
    finite = None if finite is None else finite.to(tasks[0].g.device)
    shapes = stack.shapes
    state = {name: [task.state[name] for task in tasks] for name in shapes}
    stacked = {
        name: stack.joined(name, xs) if shapes[name] is LIKE_PARAMETER else _join(xs) for name, xs in state.items()
    }
    g = _gradient(stack)
    if finite is not None:
        g = torch.where(finite, g, 0.0)  # Decompositions refuse NaN before the host knows of it.
    before = [x.clone() for x in stacked.values()] if finite is not None else []
    observe = ignore if report is None else partial(_report, report, stack)
    update = rule.update(g, SimpleNamespace(**stacked), SimpleNamespace(**tasks[0].scalars), observe)
    movement: Any = (yield from update) if isinstance(update, GeneratorType) else update
    for x, old in zip(stacked.values(), before):
        x.copy_(torch.where(finite, x, old))  # type: ignore[arg-type]
    for name, x in stacked.items():
        _store(x, state[name], group if shapes[name] is LIKE_PARAMETER else None)
    move(stack, movement, finite)


def _join(xs: list[Tensor]) -> Tensor:
    return xs[0] if len(xs) == 1 else torch.cat(xs)


def _gradient(stack: Stack) -> Tensor:
    tasks = stack.tasks
    dtype = compute_dtype(tasks[0].p.dtype)
    g = _join([stack.view(task.g) for task in tasks]).to(dtype)
    grad_scales = [task.grad_scale for task in tasks]
    if not isinstance(grad_scales[0], Tensor) and grad_scales.count(1.0) == len(grad_scales):
        return g
    factors = torch.stack([torch.as_tensor(grad_scale, dtype=dtype, device=g.device) for grad_scale in grad_scales])
    return g * factors.repeat_interleave(stack.group["blocks"]).view(-1, *(1 for _ in g.shape[1:]))


def _noise(stack: Stack) -> Tensor | None:
    """The numbers of the elements of a stack, where random ones are needed."""
    firsts = [task.noise for task in stack.tasks if task.noise is not None]
    if not firsts:
        return None
    p = stack.tasks[0].p
    element = stack.view(stream_positions(0, 0, p.numel(), p.device).view(p.shape))
    shifts = joined_positions(firsts, [1] * len(firsts), p.device)
    return (element + shifts.view(-1, *(1 for _ in element.shape))).flatten(0, 1)


def _store(stacked: Tensor, targets: list[Tensor], group: Mapping[str, Any] | None) -> None:
    """Write a stack back, unless it is a view of its only parameter."""
    if len(targets) == 1 and stacked.data_ptr() == targets[0].data_ptr():
        return
    parts = stacked.split(stacked.shape[0] // len(targets))
    if group is not None:
        parts = tuple(from_blocks(part, target.shape, group) for part, target in zip(parts, targets))
    private.copy_each_(targets, list(parts))


def _report(report: Report, stack: Stack, name: str, x: Tensor) -> None:
    for task, part in zip(stack.tasks, x.split(len(x) // len(stack.tasks))):
        report(task, name, part)


# --- orthogonalisation ------------------------------------------------------------------------------------------


def drive(
    stacks: Sequence[Stack], finite: Tensor | None, report: Report | None, solve: Solver | None, move: Mover = move_
) -> Iterator[None]:
    """Run stacks side by side and orthogonalise together what they ask for at the same time."""
    updates = [(stack, _update(stack, finite, report, move)) for stack in stacks]
    waiting = [(stack, update, request) for stack, update in updates if (request := next(update, None)) is not None]
    while waiting:
        asked = [(stack, request) for stack, _, request in waiting]
        answers = (yield from solve(asked)) if solve is not None else _alone(asked, report)
        waiting = [
            (stack, update, request)
            for (stack, update, _), answer in zip(waiting, answers)
            if (request := _send(update, answer)) is not None
        ]


def _send(update: Any, answer: Any) -> Polar | None:
    try:
        return update.send(answer)
    except StopIteration:
        return None


def _alone(asked: Sequence[tuple[Stack, Polar]], report: Report | None) -> list[Any]:
    factors = orthogonalized([request for _, request in asked])
    report_factors(report, asked, factors)
    return [(factor, request.sums) for factor, (_, request) in zip(factors, asked)]


def report_factors(report: Report | None, asked: Iterable[tuple[Stack, Polar]], factors: Iterable[Tensor]) -> None:
    """Report what was orthogonalised and what came of it."""
    if report is not None:
        for (stack, request), factor in zip(asked, factors):
            _report(report, stack, "momentum", request.matrices)
            _report(report, stack, "orthogonal_factor", factor)


def _polar(x: Tensor, method: str) -> Tensor:
    # One matrix alone is faster without the axis of the stack.
    return orthogonalize(x[0], method)[None] if x.shape[0] == 1 else orthogonalize(x, method)


def orthogonalized(requests: Sequence[Polar]) -> list[Tensor]:
    """The polar factors of what is requested, one call for all small matrices of a method and shape."""
    factors: list[Any] = [None] * len(requests)
    together: dict[Any, list[int]] = {}
    if len(requests) == 1:
        return [_polar(requests[0].matrices, requests[0].method)]
    for i, (x, method, _) in enumerate(requests):
        rows, columns = x.shape[-2:]
        limit = TOGETHER.get(x.device.type, TOGETHER["cuda"])
        key = (method, min(rows, columns), max(rows, columns), x.dtype, x.device) if rows * columns <= limit else i
        together.setdefault(key, []).append(i)
    for indices in together.values():
        x, method, _ = requests[indices[0]]
        if len(indices) == 1:
            factors[indices[0]] = _polar(x, method)
            continue
        xs = [requests[i].matrices for i in indices]
        shape = x.shape[-2:]
        result = _polar(_join([x if x.shape[-2:] == shape else x.mT for x in xs]), method)
        for i, x, part in zip(indices, xs, result.split([len(x) for x in xs])):
            factors[i] = part if x.shape[-2:] == shape else part.mT
    return factors
