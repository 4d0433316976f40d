"""``backend="plain"``: one parameter at a time, as the rule is written, to be stepped through in a debugger.

The other backends join, chunk, stack and compile; tests check that they give the same result within rounding. Sharded
parameters, and those whose work several ranks share, take the code of the other backends here too, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import GeneratorType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..polar import orthogonalize
from .arithmetic import regularize
from .batch import Batch, Task, in_parts, regularized
from .displacement import adjusted, displacement, sums_of
from .elementwise import combine, over_one_model
from .layout import block_shape, from_blocks, to_blocks
from .rounding import RESIDUAL, load, store_
from .rule import LIKE_PARAMETER, GroupRule, MatrixRule, Move, ignore
from .state import compute_dtype, state_shapes
from .switches import adjusting


def run_reference(
    batches: Sequence[Batch],
    observer: Callable[[Tensor, str, Tensor], None] | None,
    loss: float | None = None,
) -> None:
    """Update parameters and state in place.

    Args:
        batches: Rules and the parameters they run on, which this rank holds whole.
        observer: Called as ``observer(p, name, value)`` with what matrix rules report.
        loss: The loss of the step, for a rule that needs it.
    """
    for some in over_one_model([batch for batch in batches if issubclass(batch.rule, GroupRule)]):
        _update_groups(some, loss)
    for batch in batches:
        if issubclass(batch.rule, GroupRule):
            continue
        if issubclass(batch.rule, MatrixRule):
            batch = in_parts(regularized(batch))
        if issubclass(batch.rule, MatrixRule):
            for task in batch.tasks:
                _update_matrices(batch.rule, batch, task, observer)
        else:
            for task, p in zip(batch.tasks, batch.params, strict=True):
                _update(batch, task, task.scalars, p.ndim)


def _update(batch: Batch, task: Task, scalars: dict[str, Any], axes: int) -> None:
    """One step of an element-wise or group rule for one parameter."""
    rule: Any = batch.rule
    value = load(task.p, task.state.get(RESIDUAL), compute_dtype(task.p.dtype))
    g = regularize(_gradient(task), value, scalars["l2"])
    state = task.read(state_shapes(rule, task.parameter, batch.group))
    move = rule.update(g, SimpleNamespace(**state, parameter=value), SimpleNamespace(**scalars))
    k = adjusting(scalars, axes)
    if k is None:
        _store(task, move.apply_(value, scalars["keep"], scalars["aligned"]))
    else:
        d = displacement(move, g, k["cautious"])[None]
        move = adjusted(d, sums_of(d, value[None], None, k), None, k)
        _store(task, move.apply_(value[None], k["keep"], k["aligned"])[0])
    if task.low:
        task.write(state, None)


def _update_groups(batches: Sequence[Batch], loss: float | None) -> None:
    """One step of a group rule for all of its parameters."""
    rule: Any = batches[0].rule
    tasks = [(batch, task) for batch in batches for task in batch.tasks]
    axes = [p.ndim for batch in batches for p in batch.params]
    sums: list[Any] = []
    for batch, task in tasks:
        value = load(task.p, task.state.get(RESIDUAL), compute_dtype(task.p.dtype))
        g = regularize(_gradient(task), value, task.scalars["l2"])
        own = task.read(state_shapes(rule, task.parameter, batch.group))
        k = SimpleNamespace(**task.scalars)
        sums.append(rule.sums(g, SimpleNamespace(**own, parameter=value), k))
    device = tasks[0][1].p.device
    totals = [torch.stack([x.to(device) for x in column]).sum(0) for column in zip(*sums)]
    _, new, coefficients = combine(batches, totals, loss)
    for (batch, task), n in zip(tasks, axes, strict=True):
        known = task.p.is_cpu
        here = {name: float(x) if known else x.to(task.p.device) for name, x in coefficients.items()}
        _update(batch, task, task.scalars | here, n)
    for state in [*(task.state for _, task in tasks), *(state for batch in batches for state in batch.idle)]:
        for name, x in new.items():
            state[name].copy_(x)


def _update_matrices(
    rule: type[MatrixRule], batch: Batch, task: Task, observer: Callable[[Tensor, str, Tensor], None] | None
) -> None:
    """One step of a matrix rule for the matrices of one parameter, a stack ``(blocks, m, n)``."""

    def stack(x: Tensor) -> Tensor:
        blocks = to_blocks(x, batch.group)
        return blocks.flatten(2) if rule.flatten else blocks

    def observe(name: str, x: Tensor) -> None:
        if observer is not None:
            observer(task.parameter, name, x)

    shapes = state_shapes(rule, task.p, batch.group)
    own_shape = [name for name, shape in shapes.items() if shape is LIKE_PARAMETER]
    stored = task.read(shapes)
    state = {name: stack(x) if name in own_shape else x for name, x in stored.items()}
    value = load(task.p, task.state.get(RESIDUAL), compute_dtype(task.p.dtype))
    update: Any = rule.update(
        stack(_gradient(task)),
        SimpleNamespace(**state, parameter=stack(value)),
        SimpleNamespace(**task.scalars),
        observe if observer else ignore,
    )
    move = _orthogonalize(update, observe) if isinstance(update, GeneratorType) else update
    for name in own_shape:  # A stack is a copy where no view exists, as in transposed convolutions.
        _copy(stored[name], from_blocks(state[name], task.p.shape, batch.group))
    if task.low:
        task.write(stored, None)
    scalars = task.scalars
    if k := adjusting(scalars, len(block_shape(task.p.shape, batch.group))):
        d = displacement(move, stack(_gradient(task)), k["cautious"])
        move, scalars = adjusted(d, sums_of(d, stack(value), move.keep, k), move.keep, k), k
    stacked = move.apply_(stack(value), scalars["keep"], scalars["aligned"])
    _store(task, from_blocks(stacked, task.p.shape, batch.group))


def _orthogonalize(update: Any, observe: Callable[[str, Tensor], None]) -> Move:
    """Orthogonalise what an update requests until it returns its move."""
    try:
        request = next(update)
        while True:
            matrices, method, sums, reported = request
            factor = orthogonalize(matrices, method)
            if reported:
                observe("momentum", matrices)
                observe("orthogonal_factor", factor)
            request = update.send((factor, sums))
    except StopIteration as stop:
        return stop.value


def _gradient(task: Task) -> Tensor:
    g = task.g.to(compute_dtype(task.p.dtype))
    return g if task.grad_scale == 1.0 else g * task.grad_scale


def _store(task: Task, value: Tensor) -> None:
    """Write a float32 or float64 value to the parameter."""
    if task.p.dtype == value.dtype:
        _copy(task.p, value)
        return
    p, noise = task.p, None
    if task.noise is not None:
        noise = task.elements + task.noise
    store_(p, value, task.state.get(RESIDUAL), noise)


def _copy(target: Tensor, value: Tensor) -> None:
    """Copy what may be a view of the target: where an axis has one element its strides differ, and torch refuses."""
    target.copy_(value.clone() if 1 in value.shape else value)
