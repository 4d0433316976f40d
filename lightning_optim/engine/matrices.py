"""Matrix rules: equal shapes stacked, and the orthogonalisation that stacks of a step share.

Parameters of one group whose matrices have the same shape run as one stack ``(k, m, n)`` if they are so small that
copying them costs less than running them one after the other; larger ones run alone, on views. An update that needs a
polar factor yields the matrices instead of computing it, so that :func:`run_stacks` can collect the requests of all
stacks and orthogonalise all matrices of one shape, transposed or not, by one call.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import prod
from types import GeneratorType, SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import private
from ..polar import orthogonalize
from .batch import Batch, Task, in_parts
from .call import move_tensor_
from .displacement import adjusted, displacement, sums_of
from .elementwise import split_by_size
from .layout import block_shape, from_blocks, is_split, to_blocks
from .rounding import RESIDUAL, joined_positions, load
from .rule import LIKE_PARAMETER, MatrixRule, Move, Polar, buffers_of, hyperparameters_of, ignore
from .state import compute_dtype
from .switches import adjusting

#: Called as ``report(task, name, value)`` with what rules report of the matrices of a task.
Report: TypeAlias = Callable[[Task, str, Tensor], None]

#: Matrices of up to this many elements, gradient and state included, are stacked: below it copying them costs less than
#: dispatching their operations one by one.
STACK = {"cpu": 2**19, "cuda": 2**22}
#: Matrices of up to this many elements are orthogonalised together: above it one matrix product keeps the device busy.
TOGETHER = {"cpu": 2**18, "cuda": 2**21}
#: Elements that one rank works on at a time. On a CPU, for each thread: these stay in cache, and in memory that is not
#: returned to the system in between. On a GPU this bounds the memory.
WORKING_SET = {"cpu": 2**18, "cuda": 2**24}
#: Elements of a bucket: stacks whose orthogonalisation several ranks share at a time.
BUCKET = 2**24


@dataclass
class Stack:
    """Matrices of one shape and group that run as one tensor ``(k, m, n)``."""

    rule: type[MatrixRule]
    group: Mapping[str, Any]
    tasks: list[Task]

    def __post_init__(self) -> None:
        self.block = block = block_shape(self.tasks[0].g.shape, self.group)
        #: Shapes of the state tensors of one matrix; ``None`` for the shape of the matrix.
        self.shapes = buffers_of(self.rule, block, hyperparameters_of(self.rule, self.group))
        self.elements = sum(task.g.numel() for task in self.tasks)
        #: Shape of a matrix, the smaller dimension first: equal for matrices that are orthogonalised together.
        self.shape = tuple(sorted((block[0], prod(block[1:]))))
        self._views: dict[str, tuple[int | None, Tensor]] = {}
        first = self.tasks[0]
        as_computed = first.p.dtype == compute_dtype(first.p.dtype) and first.noise is None and not first.low
        self._alone = len(self.tasks) == 1 and as_computed and RESIDUAL not in first.state and first.whole is None
        self._places: list[int] = []
        self._in_place: tuple[Tensor, dict[str, Tensor]] | None = None

    @property
    def scalars(self) -> Mapping[str, Any]:
        """The numbers of the step."""
        scalars = self.tasks[0].scalars
        return adjusting(scalars, len(self.block)) or scalars

    def view(self, x: Tensor) -> Tensor:
        """The matrices in a tensor of a parameter's shape, as ``(blocks, m, n)``."""
        y = to_blocks(x, self.group)
        return y.flatten(2) if self.rule.flatten and y.ndim > 3 else y

    def joined(self, name: str, xs: list[Tensor]) -> Tensor:
        """A tensor for each parameter, of its shape, as one stack; of a single one, a view where possible."""
        if len(xs) > 1:
            return torch.cat([self.view(x) for x in xs])
        if name in self.tasks[0].low:
            return self.view(xs[0])
        place, view = self._views.get(name, (None, xs[0]))
        if xs[0].data_ptr() != place:
            view = self.view(xs[0])
            if view.data_ptr() == xs[0].data_ptr():
                self._views[name] = (view.data_ptr(), view)
        return view

    def in_place(self) -> tuple[Tensor, dict[str, Tensor]] | None:
        """The matrices of a single parameter, and its state, as views; ``None`` where something has to be copied."""
        if not self._alone:
            return None
        p, state = self.tasks[0].p, self.tasks[0].state
        places = [p.data_ptr(), *[state[name].data_ptr() for name in self.shapes]]
        if places != self._places:
            views = {
                name: self.view(state[name]) if shape is LIKE_PARAMETER else state[name]
                for name, shape in self.shapes.items()
            }
            matrices = self.view(p)
            are_views = [x.data_ptr() for x in (matrices, *views.values())] == places
            self._places, self._in_place = places, ((matrices, views) if are_views else None)
        return self._in_place


#: What stacks request at the same time.
Requests: TypeAlias = Sequence[tuple[Stack, Polar]]


def move_parameters_(stack: Stack, move: Move, finite: Tensor | None) -> None:
    """Move the parameters of a stack, which this rank holds.

    Args:
        stack: The stack.
        move: What its rule returned.
        finite: ``None``, or a 0-d boolean tensor: where it is ``False`` nothing changes.
    """
    tasks = stack.tasks
    params = [task.p for task in tasks]
    p = stack.joined("parameter", params)
    if RESIDUAL in tasks[0].state:
        residuals = [task.state[RESIDUAL] for task in tasks]
        residual = stack.joined(RESIDUAL, residuals)
        move_tensor_(p, move, stack.scalars, residual, _stack_noise(stack), finite)
        _unstack(residual, residuals, stack.group)
    else:
        move_tensor_(p, move, stack.scalars, None, _stack_noise(stack), finite)
    _unstack(p, params, stack.group)


def parameter_of(task: Task) -> Tensor:
    """The value of a parameter in the dtype of the arithmetic; read only, as it may be the parameter itself."""
    return task.whole if task.whole is not None else load(task.p, task.state.get(RESIDUAL), compute_dtype(task.p.dtype))


@dataclass
class StackStep:
    """How the stacks of a step are run.

    Args:
        plain: Whether to run one parameter at a time.
        finite: ``None``, or a 0-d boolean tensor: where it is ``False`` nothing may change.
        report: Called with what rules report; ``None`` if nothing observes the step.
        move: Moves the parameters of a stack; see :func:`move_parameters_`.
        solve: Orthogonalises what stacks request, with the help of other ranks, for which it waits at each ``yield``.
            It returns a polar factor and total sums for each request. ``None``: this rank does it alone.
        total: Adds up the sums of stacks over ranks that hold other rows of their matrices; ``None``: there are none.
        ranks: How many ranks share the orthogonalisation of a bucket.
    """

    plain: bool
    finite: Tensor | None
    report: Report | None
    move: Callable[[Stack, Move, Tensor | None], None] = move_parameters_
    solve: Callable[[Requests], Generator[None, None, list[tuple[Tensor, tuple[Tensor, ...]]]]] | None = None
    total: Callable[[Sequence[tuple[Stack, Tensor]]], list[Tensor]] | None = None
    ranks: int = 1


def stack_jobs(batches: Iterable[Batch], step: StackStep) -> Iterator[Iterator[None]]:
    """Updates of parameters and state by matrix rules: one job per bucket of stacks, each to be run to its end.

    Args:
        batches: Rules and the parameters they run on, all of whose matrices this rank holds whole.
        step: How to run them.
    """
    for bucket in _stack_buckets(list(batches), step.plain, step.ranks):
        yield run_stacks(bucket, step)


def _stack_buckets(batches: list[Batch], plain: bool, ranks: int) -> list[list[Stack]]:
    """Stacks that run concurrently, bucket by bucket. Cached where scalars depend on the shape alone."""
    key = ("buckets", plain, ranks)
    if len(batches) == 1 and key in batches[0].cache:
        return batches[0].cache[key]
    lasting = len(batches) == 1 and not _phases(batches[0]) and not is_split(batches[0].group)
    stacks = [stack for batch in batches for stack in stacks_of(batch, plain)]
    if not stacks:  # A rank that owns no parameter of a bucket.
        return []
    stacks.sort(key=lambda stack: stack.shape, reverse=True)
    buckets: list[list[Stack]] = []
    small = sum(stack.elements for stack in stacks) <= working_set(stacks[0].tasks[0].g.device)
    # On one rank, one shape at a time keeps memory low. With several, every bucket should have work for each rank.
    for _, some in groupby(stacks, key=lambda stack: stack.shape if ranks == 1 and not small else None):
        alike = list(some)
        sizes = [stack.elements for stack in alike]
        limit = working_set(alike[0].tasks[0].g.device) if ranks == 1 else bucket_limit(sizes, ranks)
        buckets += split_by_size(alike, sizes, 0 if plain else limit)
    if lasting:
        batches[0].cache[key] = buckets
    return buckets


def working_set(device: torch.device) -> int:
    """How many elements one rank works on at a time."""
    return WORKING_SET["cpu"] * torch.get_num_threads() if device.type == "cpu" else WORKING_SET["cuda"]


def bucket_limit(elements: Sequence[int], ranks: int) -> int:
    """How many elements a bucket may have: at least one stack, of the largest size, for each rank."""
    return max(BUCKET, ranks * max(elements, default=0))


def stacks_of(batch: Batch, plain: bool) -> Iterator[Stack]:
    """The stacks of a batch: parameters that can run as one tensor are joined, except where ``plain``."""
    batch = in_parts(batch)
    rule = batch.rule
    assert issubclass(rule, MatrixRule)
    alike: dict[Any, list[Task]] = {}
    elements = {
        shape: _elements_of_matrix(rule, batch.group, shape) for shape in {task.g.shape for task in batch.tasks}
    }
    for i, task in enumerate(batch.tasks):
        g = task.g
        small = not plain and elements[g.shape] <= STACK.get(g.device.type, STACK["cuda"])
        key = (*task.scalars.items(), g.shape, task.p.dtype, g.dtype, g.device) if small else i
        alike.setdefault(key, []).append(task)
    for tasks in alike.values():
        for some in split_by_size(tasks, [task.g.numel() for task in tasks], working_set(tasks[0].g.device)):
            yield Stack(rule, batch.group, some)


def _phases(batch: Batch) -> int:
    rule = batch.rule
    return rule.phases(hyperparameters_of(rule, batch.group)) if issubclass(rule, MatrixRule) else 0


def _elements_of_matrix(rule: type[MatrixRule], group: Mapping[str, Any], shape: torch.Size) -> int:
    """Elements of one matrix of a parameter, its gradient and its state."""
    block = block_shape(shape, group)
    shapes = buffers_of(rule, block, hyperparameters_of(rule, group))
    state = (block if x is LIKE_PARAMETER else x for x in shapes.values())
    return sum(prod(x) for x in (block, block, *state))


@dataclass
class _Displaced:
    """Steps of a stack that wait for sums over ranks.

    Args:
        stack: The stack.
        d: Its displacements.
        sums: See :func:`.displacement.sums_of`.
        keep: The factor of weight decay, if the rule's move says it.
        finite: ``None``, or a 0-d boolean tensor: where it is ``False`` nothing may change.
    """

    stack: Stack
    d: Tensor
    sums: Tensor
    keep: float | Tensor | None
    finite: Tensor | None


def _update_stack(stack: Stack, step: StackStep, waiting: list[_Displaced]) -> Iterator[Polar]:
    """Run the rule on a stack; yields its requests for orthogonalisation and sums, and is sent the results.

    Where the step depends on sums over whole matrices, it is not made but added to ``waiting``.
    """
    rule, group, tasks = stack.rule, stack.group, stack.tasks
    observe = ignore if step.report is None else partial(_report_parts, step.report, stack)
    k = adjusting(tasks[0].scalars, len(stack.block))
    if k is None and step.finite is None and step.move is move_parameters_ and (views := stack.in_place()) is not None:
        p, own = views
        s = SimpleNamespace(**own, parameter=p) if rule.reads_parameter else SimpleNamespace(**own)
        update = rule.update(_stack_gradient(stack), s, SimpleNamespace(**tasks[0].scalars), observe)
        move: Any = (yield from update) if isinstance(update, GeneratorType) else update
        move_tensor_(p, move, tasks[0].scalars, None, None, None)
        return
    finite = None if step.finite is None else step.finite.to(tasks[0].g.device)
    shapes = stack.shapes
    values: list[Any] = [task.read(shapes) if task.low else task.state for task in tasks]
    state, stacked = {}, {}
    for name, shape in shapes.items():
        xs = state[name] = [own[name] for own in values]
        stacked[name] = stack.joined(name, xs) if shape is LIKE_PARAMETER else _concatenated(xs)
    g = _stack_gradient(stack)
    if finite is not None:
        g = torch.where(finite, g, 0.0)  # Decompositions raise an error on NaN, which the host does not know of yet.
    before = [x.clone() for x in stacked.values()] if finite is not None else []
    read = (
        {"parameter": _concatenated([stack.view(parameter_of(task)) for task in tasks])} if rule.reads_parameter else {}
    )
    update = rule.update(g, SimpleNamespace(**stacked, **read), SimpleNamespace(**tasks[0].scalars), observe)
    move = (yield from update) if isinstance(update, GeneratorType) else update
    for x, old in zip(stacked.values(), before):
        torch.where(finite, x, old, out=x)  # type: ignore[arg-type]
    for name, x in stacked.items():
        _unstack(x, state[name], group if shapes[name] is LIKE_PARAMETER else None)
    for task, own in zip(tasks, values):
        if task.low:
            task.write(own, finite)
    if k is None:
        step.move(stack, move, finite)
        return
    d = displacement(move, g, k["cautious"])
    whole = None if k["norm_control"] == "none" else _concatenated([stack.view(parameter_of(task)) for task in tasks])
    waiting.append(_Displaced(stack, d, sums_of(d, whole, move.keep, k), move.keep, finite))


def _concatenated(xs: list[Tensor]) -> Tensor:
    return xs[0] if len(xs) == 1 else torch.cat(xs)


def _stack_gradient(stack: Stack) -> Tensor:
    tasks = stack.tasks
    dtype = compute_dtype(tasks[0].p.dtype)
    if len(tasks) == 1:
        g = stack.view(tasks[0].g)
    else:
        g = torch.cat([stack.view(task.g) for task in tasks])
    if g.dtype != dtype:
        g = g.to(dtype)
    grad_scales = [task.grad_scale for task in tasks]
    if not isinstance(grad_scales[0], Tensor) and grad_scales.count(1.0) == len(grad_scales):
        return g
    factors = torch.stack([torch.as_tensor(grad_scale, dtype=dtype, device=g.device) for grad_scale in grad_scales])
    return g * factors.repeat_interleave(stack.group["blocks"]).view(-1, *(1 for _ in g.shape[1:]))


def _stack_noise(stack: Stack) -> Tensor | None:
    """Stream positions of the elements of a stack; ``None`` without stochastic rounding."""
    if stack.tasks[0].noise is None:
        return None
    firsts = [task.noise for task in stack.tasks if task.noise is not None]
    element = stack.view(stack.tasks[0].elements)
    shifts = joined_positions(firsts, [1] * len(firsts), element.device)
    return (element + shifts.view(-1, *(1 for _ in element.shape))).flatten(0, 1)


def _unstack(stacked: Tensor, targets: list[Tensor], group: Mapping[str, Any] | None) -> None:
    """Copy a stack back to the tensors that it was joined from, unless it is a view of a single one."""
    if len(targets) == 1 and stacked.data_ptr() == targets[0].data_ptr():
        return
    parts = stacked.split(stacked.shape[0] // len(targets))
    if group is not None:
        parts = tuple(from_blocks(part, target.shape, group) for part, target in zip(parts, targets))
    private.copy_each_(targets, list(parts))


def _report_parts(report: Report, stack: Stack, name: str, x: Tensor) -> None:
    for task, part in zip(stack.tasks, x.split(len(x) // len(stack.tasks))):
        report(task, name, part)


# --- orthogonalisation ------------------------------------------------------------------------------------------


def run_stacks(stacks: Sequence[Stack], step: StackStep) -> Iterator[None]:
    """Run stacks concurrently and orthogonalise together what they request at the same time."""
    waiting, displaced = [], list[_Displaced]()
    for stack in stacks:
        update = _update_stack(stack, step, displaced)
        if (request := next(update, None)) is not None:
            waiting.append((stack, update, request))
    while waiting:
        requests = [(stack, request) for stack, _, request in waiting]
        answers = _solve_alone(requests, step.report) if step.solve is None else (yield from step.solve(requests))
        waiting = [
            (stack, update, request)
            for (stack, update, _), answer in zip(waiting, answers)
            if (request := _resumed(update, answer)) is not None
        ]
    if displaced:
        totals = [x.sums for x in displaced]
        if step.total is not None:
            totals = step.total([(x.stack, x.sums) for x in displaced])
        for x, total in zip(displaced, totals):
            step.move(x.stack, adjusted(x.d, total, x.keep, x.stack.scalars), x.finite)


def _resumed(update: Any, answer: Any) -> Polar | None:
    try:
        return update.send(answer)
    except StopIteration:
        return None


def _solve_alone(requests: Requests, report: Report | None) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
    factors = orthogonalized([request for _, request in requests])
    if report is not None:
        report_factors(report, requests, factors)
    return [(factor, request.sums) for factor, (_, request) in zip(factors, requests)]


def report_factors(
    report: Report,
    requests: Requests,
    factors: Iterable[Tensor],
) -> None:
    """Report the matrices that were orthogonalised, and their polar factors."""
    for (stack, request), factor in zip(requests, factors):
        if not request.reported:
            continue
        _report_parts(report, stack, "momentum", request.matrices)
        _report_parts(report, stack, "orthogonal_factor", factor)


def orthogonalized(requests: Sequence[Polar]) -> list[Tensor]:
    """The polar factors of requests: one call for all small matrices of one method and shape."""
    if len(requests) == 1:
        return [orthogonalize(requests[0].matrices, requests[0].method)]
    factors: list[Any] = [None] * len(requests)
    together: dict[Any, list[int]] = {}
    for i, (x, method, *_) in enumerate(requests):
        _, rows, columns = x.shape
        device = x.device
        limit = TOGETHER.get(device.type, TOGETHER["cuda"])
        key = (method, min(rows, columns), max(rows, columns), x.dtype, device) if rows * columns <= limit else i
        together.setdefault(key, []).append(i)
    for indices in together.values():
        x, method, *_ = requests[indices[0]]
        if len(indices) == 1:
            factors[indices[0]] = orthogonalize(x, method)
            continue
        xs = [requests[i].matrices for i in indices]
        shape = x.shape[-2:]
        result = orthogonalize(_concatenated([x if x.shape[-2:] == shape else x.mT for x in xs]), method)
        for i, x, part in zip(indices, xs, result.split([len(x) for x in xs])):
            factors[i] = part if x.shape[-2:] == shape else part.mT
    return factors
