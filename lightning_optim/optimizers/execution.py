"""How rules are run: the plain, readable path, one parameter at a time.

:func:`run` is the only entry. It receives the parameters of one group whose gradients are fit to be used, and
updates parameters and state in place. Everything that would change with the way of running (views of matrices,
precision of the arithmetic, a verdict on the gradients that is not known on the host) is handled here, so that
rules stay free of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .rule import LIKE_PARAMETER, GroupRule, MatrixRule, Rule, Scalars, Shape

State = MutableMapping[str, Any]
ParameterObserver = Callable[[Tensor, str, Tensor], None]


@dataclass
class Task:
    """One parameter's share of a step.

    Args:
        t: The number of this step for the parameter, from 1.
        p: The parameter.
        g: Its gradient, in the precision of the arithmetic, never the parameter's ``.grad`` edited in place.
        state: The rule's state tensors.
        scalars: What the rule's ``scalars`` returned for this parameter.
    """

    t: int
    p: Tensor
    g: Tensor
    state: dict[str, Tensor]
    scalars: Scalars


def compute_dtype(p: Tensor) -> torch.dtype:
    """State and arithmetic are float32, or float64 for float64 parameters.

    >>> compute_dtype(torch.zeros(1, dtype=torch.bfloat16)), compute_dtype(torch.zeros(1, dtype=torch.float64))
    (torch.float32, torch.float64)
    """
    return torch.promote_types(p.dtype, torch.float32)


def new_state(rule: Rule, p: Tensor, group: Mapping[str, Any]) -> State:
    """Zero state for one parameter: its step count, the rule's host scalars and the rule's tensors.

    Counts and host scalars live on the CPU whatever the device, since the host computes with them.
    """
    dtype = compute_dtype(p)
    shape = block_shape(p.shape, group) if isinstance(rule, MatrixRule) else tuple(p.shape)
    state: State = {"step": torch.tensor(0.0)}
    for name in rule.host_state:
        state[name] = torch.tensor(0.0, dtype=torch.float64)
    for name, tensor_shape in rule.state(shape, group).items():
        if tensor_shape is LIKE_PARAMETER:
            state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)
        else:
            state[name] = p.new_zeros((group["blocks"], *tensor_shape), dtype=dtype)
    if isinstance(rule, GroupRule):
        for name, value in rule.group_state.items():
            state[name] = torch.tensor(value, dtype=accumulation_dtype(p.device), device=p.device)
    return state


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Sums over a whole parameter group are taken in float64, which Apple's GPUs lack."""
    return torch.float32 if device.type == "mps" else torch.float64


# --- matrices inside parameters ---------------------------------------------------------------------------------


def block_shape(shape: Sequence[int], group: Mapping[str, Any]) -> Shape:
    """Shape ``(out, in, ...)`` of one of the ``blocks`` tensors that a parameter of the given shape holds.

    >>> block_shape((12, 4), {"blocks": 3, "transposed": False})  # a packed query, key and value projection
    (4, 4)
    >>> block_shape((6, 2, 3, 3), {"blocks": 1, "transposed": True})  # a transposed convolution
    (2, 6, 3, 3)
    >>> block_shape((8, 16, 32), {"blocks": 8, "transposed": False})  # eight experts
    (16, 32)
    """
    rows, *rest = shape[0] // group["blocks"], *shape[1:]
    if group["blocks"] > 1 and rows == 1 and len(rest) > 1:
        rows, *rest = rest
    if group["transposed"]:
        rows, rest[0] = rest[0], rows
    return (rows, *rest)


def to_blocks(x: Tensor, group: Mapping[str, Any]) -> Tensor:
    """View (a copy where no view exists) of ``x`` as ``(blocks, *block_shape)``."""
    blocks = group["blocks"]
    y = x.reshape(blocks, x.shape[0] // blocks, *x.shape[1:])
    if blocks > 1 and y.shape[1] == 1 and y.ndim > 3:
        y = y.squeeze(1)
    return y.transpose(1, 2) if group["transposed"] else y


def from_blocks(y: Tensor, shape: Sequence[int], group: Mapping[str, Any]) -> Tensor:
    """Inverse of :func:`to_blocks`."""
    block = (group["blocks"], *block_shape(shape, group))
    y = y.reshape(block)
    return (y.transpose(1, 2) if group["transposed"] else y).reshape(tuple(shape))


# --- running ----------------------------------------------------------------------------------------------------


def run(
    rule: Rule,
    group: Mapping[str, Any],
    tasks: Sequence[Task],
    finite: Tensor | None = None,
    observer: ParameterObserver | None = None,
) -> None:
    """Update the parameters and state of ``tasks`` in place by ``rule``.

    Args:
        rule: The rule.
        group: The parameter group, for how its parameters hold matrices.
        tasks: The group's parameters that have a gradient.
        finite: ``None``, or a 0-d boolean tensor: where it is ``False`` nothing may change.
        observer: Called as ``observer(p, name, value)`` with what matrix rules report.
    """
    targets = [[task.p, *task.state.values()] for task in tasks]
    before = [[x.clone() for x in tensors] for tensors in targets] if finite is not None else []
    if isinstance(rule, GroupRule):
        _run_group(rule, tasks)
    else:
        for task in tasks:
            work = task.p.to(compute_dtype(task.p))
            if isinstance(rule, MatrixRule):
                work = _run_matrix(rule, group, task, work, observer)
            else:
                rule.update(work, task.g, **task.state, **task.scalars)
            _store(task.p, work)
    for tensors, old in zip(targets, before):
        for x, x_old in zip(tensors, old):
            x.copy_(torch.where(finite, x, x_old))  # type: ignore[arg-type]


def _store(p: Tensor, work: Tensor) -> None:
    if work is not p:
        p.copy_(work)


def _run_matrix(
    rule: MatrixRule, group: Mapping[str, Any], task: Task, work: Tensor, observer: ParameterObserver | None
) -> Tensor:
    """Run on the blocks of one parameter; returns the updated parameter."""
    shapes = rule.state(block_shape(task.p.shape, group), group)
    like_parameter = {name for name, shape in shapes.items() if shape is LIKE_PARAMETER}

    def view(x: Tensor) -> Tensor:
        y = to_blocks(x, group)
        return y.flatten(2) if rule.flatten else y

    p, g = view(work), view(task.g)
    state = {name: view(x) if name in like_parameter else x for name, x in task.state.items()}
    kwargs = dict(task.scalars)
    if observer is not None:
        kwargs["observe"] = lambda name, value: observer(task.p, name, value)
    rule.update(p, g, **state, **kwargs)
    for name in like_parameter:
        x = task.state[name]
        if state[name].data_ptr() != x.data_ptr():
            x.copy_(from_blocks(state[name], x.shape, group))
    if p.data_ptr() == work.data_ptr():
        return work
    return from_blocks(p, work.shape, group)


def _run_group(rule: GroupRule, tasks: Sequence[Task]) -> None:
    totals: list[Tensor] | None = None
    works = []
    for task in tasks:
        work = task.p.to(compute_dtype(task.p))
        tensors = {name: x for name, x in task.state.items() if name not in rule.group_state}
        rule.update(work, task.g, **tensors, **task.scalars)
        sums = rule.sums(**tensors, **task.scalars)
        totals = list(sums) if totals is None else [a + b.to(a.device) for a, b in zip(totals, sums)]
        works.append(work)
    if totals is None:
        return
    # A parameter that gets its first gradient late joins the group's state, it does not reset it.
    oldest = max(tasks, key=lambda task: task.t)
    old = {name: oldest.state[name] for name in rule.group_state}
    new, coefficients = rule.combine(*totals, **old, **oldest.scalars)
    for task, work in zip(tasks, works):
        tensors = {name: x for name, x in task.state.items() if name not in rule.group_state}
        local = {name: x.to(work.device) for name, x in coefficients.items()}
        rule.finish(work, **tensors, **local)
        _store(task.p, work)
        for name, value in new.items():
            task.state[name].copy_(value)
