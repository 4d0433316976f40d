"""Matrix rules on many processes: who works on which matrix, and how matrices get there and back.

Three ways, by what a process has of a parameter:

- all of it, like the other processes (DDP): each orthogonalises its share of the matrices and sends the factors to all;
- some rows, and the rule works on rows: only what is to be orthogonalised travels, to the one process that does it for
  that matrix, and the rows of the factor travel back;
- any part, and the rule wants whole tensors: the gradient travels to the one process that has the state and runs the
  rule (:mod:`.owned_state`), and the direction in which the parameter moves travels back.

What travels at the same time is a wave. While the tensors of one wave travel, another is worked on, and so are the
element-wise rules of the step. Every process of a group makes the same waves in the same order; which follows from
whole shapes, never from what a process happens to hold.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby, islice
from math import prod
from typing import Any

import torch
from torch import Tensor

from .. import processes
from ..processes import Group, Sharding, TensorSpec
from . import matrices
from .batch import Batch, Task
from .elementwise import split_by_size
from .matrices import ParameterObserver, Report, Stack
from .rounding import RESIDUAL
from .rule import LIKE_PARAMETER, Move, Polar
from .state import block_shape, compute_dtype, from_blocks, state_shapes, tensor_names

Asked = Sequence[tuple[Stack, Polar]]
#: A matrix of a step: its parameter and which of the parameter's matrices it is.
Key = tuple[Tensor, int]


def run(
    batches: Sequence[Batch],
    backend: str,
    finite: Tensor | None,
    observer: ParameterObserver | None,
    replicas: Sequence[Group],
) -> Iterator[None]:
    """Update the parameters and state of matrix rules in place; yields where there is time for other work.

    Args:
        batches: Rules and the parameters they run on.
        backend: One of :data:`.BACKENDS`.
        finite: ``None``, or a 0-d boolean tensor: where it is ``False`` nothing may change.
        observer: Called as ``observer(p, name, value)`` with what rules report.
        replicas: The processes that hold equal parameters and gradients and share the work, if any do.
    """
    here: list[Batch] = []
    in_rows: dict[Group, list[_Cut]] = defaultdict(list)
    carried: dict[Group, list[_Cut]] = defaultdict(list)
    for batch in batches:
        if "sharded" not in batch.cache:
            batch.cache["sharded"] = any(processes.sharding_of(task.parameter) for task in batch.tasks)
        if not batch.cache["sharded"]:
            here.append(batch)
            continue
        whole = []
        for task in batch.tasks:
            cut = processes.sharding_of(task.parameter)
            if cut is None:
                whole.append(task)
            else:
                (in_rows if task.owner is None else carried)[cut.group].append(_Cut(batch, task, cut))
        if whole:
            here.append(replace(batch, tasks=whole, cache={}))
    context = _Context(backend == "plain", finite, observer)
    jobs = chain(
        chain.from_iterable(_jobs_in_rows(cuts, context) for cuts in in_rows.values()),
        chain.from_iterable(_jobs_carried(cuts, context) for cuts in carried.values()),
        _jobs_here(here, context, replicas),
    )
    yield from _overlapped(jobs)


def _overlapped(jobs: Iterable[Iterator[None]]) -> Iterator[None]:
    """Run jobs, two at a time: when one waits the other works."""
    done = object()
    jobs = iter(jobs)
    running = list(islice(jobs, 2))
    while running:
        for job in list(running):
            if next(job, done) is done:
                running.remove(job)
                running.extend(islice(jobs, 1))
        if running:
            yield


@dataclass(frozen=True)
class _Context:
    """What is the same for all waves of a step."""

    plain: bool
    finite: Tensor | None
    observer: ParameterObserver | None

    @property
    def report(self) -> Report | None:
        """To be called with what is reported of all matrices of a task's parameter."""
        observer = self.observer
        return None if observer is None else lambda task, name, x: observer(task.parameter, name, x)


@dataclass(frozen=True)
class _Cut:
    """A parameter of which this process holds a part."""

    batch: Batch
    task: Task
    cut: Sharding

    @property
    def parameter(self) -> Tensor:
        return self.task.parameter

    @property
    def blocks(self) -> int:
        return self.batch.group["blocks"]

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape of each of its matrices."""
        return _matrix(self.parameter, self.batch.group)

    def rows(self, block: int, rank: int) -> tuple[int, int]:
        """Which rows of one of its matrices a process holds."""
        m, n = self.matrix
        per_index = prod(self.cut.shape[1:]) // n
        first, last = (min(max(i * per_index - block * m, 0), m) for i in self.cut.span(rank))
        return first, last


def _matrix(p: Tensor, group: Mapping[str, Any]) -> tuple[int, int]:
    m, *rest = block_shape(p.shape, group)
    return m, prod(rest)


def _cost(m: int, n: int) -> float:
    return float(m * n * min(m, n))


def _waves(cuts: Sequence[_Cut], plain: bool) -> Iterator[list[_Cut]]:
    cuts = sorted(cuts, key=lambda c: -_cost(*c.matrix))
    sizes = [c.parameter.numel() for c in cuts]
    return split_by_size(cuts, sizes, 0 if plain else matrices.wave_limit(sizes, cuts[0].cut.ranks))


# --- every process has everything ------------------------------------------------------------------------------------


def _jobs_here(batches: Sequence[Batch], context: _Context, replicas: Sequence[Group]) -> Iterator[Iterator[None]]:
    if not replicas or not batches:
        return matrices.jobs(batches, context.plain, context.finite, context.report)
    pieces = [
        ((task.parameter, block), _cost(*_matrix(task.parameter, batch.group)))
        for batch in batches
        for task in batch.tasks
        for block in range(batch.group["blocks"])
    ]
    (group,) = replicas
    ranks = processes.size(group)
    keys, costs = zip(*pieces)
    owner = dict(zip(keys, processes.assign_owners(costs, (None,) * len(costs), ranks)))
    solve = partial(_shared, owner=owner, group=group, report=context.report)
    return matrices.jobs(batches, context.plain, context.finite, context.report, solve, ranks)


def _shared(
    asked: Asked, owner: Mapping[Key, int], group: Group, report: Report | None
) -> Generator[None, None, list[Any]]:
    """Orthogonalise this process's share and get the rest from the others."""
    ranks = range(processes.size(group))
    theirs = [[[i for i, key in enumerate(_keys(s)) if owner[key] == rank] for s, _ in asked] for rank in ranks]
    mine = theirs[processes.rank(group)]
    own = [Polar(x[indices], method) for indices, (_, (x, method, _)) in zip(mine, asked) if indices]
    kinds = [
        [((len(indices), *x.shape[1:]), x.dtype) for indices, (_, (x, _, _)) in zip(each, asked) if indices]
        for each in theirs
    ]
    pending = processes.all_gather(matrices.orthogonalized(own), kinds, asked[0][1].matrices.device, group)
    yield
    factors = [torch.empty_like(request.matrices) for _, request in asked]
    for each, received in zip(theirs, pending.wait()):
        parts = iter(received)
        for indices, factor in zip(each, factors):
            if indices:
                factor[indices] = next(parts)
    matrices.report_factors(report, asked, factors)
    return [(factor, request.sums) for factor, (_, request) in zip(factors, asked)]


def _keys(stack: Stack) -> list[Key]:
    blocks = stack.group["blocks"]
    return [(task.parameter, task.first + i) for task in stack.tasks for i in range(blocks)]


# --- rows -------------------------------------------------------------------------------------------------------------


def _jobs_in_rows(cuts: Sequence[_Cut], context: _Context) -> Iterator[Iterator[None]]:
    ranks = cuts[0].cut.ranks
    keys = [(c.parameter, block) for c in cuts for block in range(c.blocks)]
    costs = tuple(_cost(*c.matrix) for c in cuts for _ in range(c.blocks))
    holders = tuple(_holder(c, block) for c in cuts for block in range(c.blocks))
    owner = dict(zip(keys, processes.assign_owners(costs, holders, ranks)))
    for wave in _waves(cuts, context.plain):
        yield _in_rows(wave, owner, context)


def _holder(c: _Cut, block: int) -> int | None:
    """The process that holds all rows of a matrix, if one does."""
    m, _ = c.matrix
    return next((rank for rank in range(c.cut.ranks) if c.rows(block, rank) == (0, m)), None)


def _in_rows(wave: Sequence[_Cut], owner: Mapping[Key, int], context: _Context) -> Iterator[None]:
    """Run the rule on the rows that are here; what is to be orthogonalised travels."""
    apart: dict[Any, list[Task]] = defaultdict(list)
    batches = {}
    for c in wave:
        for count, task in _runs(c):
            apart[id(c.batch), count].append(task)
            batches[id(c.batch), count] = replace(c.batch, group={**c.batch.group, "blocks": count}, cache={})
    parts = [
        stack
        for key, tasks in apart.items()
        for stack in matrices.split(replace(batches[key], tasks=tasks, cache={}), context.plain)
    ]
    solve = partial(_gathered, wave=wave, owner=owner, report=context.report)
    return matrices.drive(parts, context.finite, _collector(wave, owner, context.report), solve)


def _runs(c: _Cut) -> Iterator[tuple[int, Task]]:
    """The matrices of a parameter in runs of which this process has equally many rows: their number, and a task.

    A parameter with several matrices may be cut within one. Of some a process then has all rows, of one some, and of
    others none, but their state that is not in rows is kept by all processes.
    """
    _, n = c.matrix
    task = c.task
    shapes = state_shapes(c.batch.rule, c.parameter, c.batch.group)
    first = start = 0
    for rows, same in groupby(last - start for start, last in (c.rows(i, c.cut.rank) for i in range(c.blocks))):
        count = len(list(same))
        stop, shape = start + count * rows, (rows, n) if count == 1 else (count, rows, n)

        def here(x: Tensor) -> Tensor:
            return x.view(-1, n)[start:stop].view(shape)  # noqa: B023

        state = dict(task.state)
        for name in tensor_names(c.batch.rule, c.parameter, c.batch.group, state):
            in_rows = shapes.get(name, LIKE_PARAMETER) is LIKE_PARAMETER
            state[name] = here(state[name]) if in_rows else state[name][first : first + count]
        noise = None if task.noise is None else task.noise + start * n
        g = here(task.g.contiguous())
        yield count, replace(task, p=here(task.p), g=g, state=state, first=first, noise=noise)
        first, start = first + count, stop


def _collector(wave: Sequence[_Cut], owner: Mapping[Key, int], report: Report | None) -> Report | None:
    """Passes on what is reported of a parameter's runs of matrices when all of it is there.

    All processes know all of it. The one that reports is the owner of the first matrix.
    """
    if report is None:
        return None
    blocks = {c.parameter: c.blocks for c in wave if owner[c.parameter, 0] == c.cut.rank}
    known: dict[tuple[Tensor, str], dict[int, Tensor]] = defaultdict(dict)

    def collect(task: Task, name: str, x: Tensor) -> None:
        if task.parameter not in blocks:
            return
        parts = known[task.parameter, name]
        parts[task.first] = x
        if sum(map(len, parts.values())) == blocks[task.parameter]:
            del known[task.parameter, name]
            report(task, name, torch.cat([parts[first] for first in sorted(parts)]))

    return collect


@dataclass(frozen=True)
class _Solved:
    """A matrix: all of its rows, what came of them, and, where it was solved, its sums over processes."""

    matrix: Tensor
    factor: Tensor
    totals: Sequence[Tensor] = ()


def _gathered(
    asked: Asked, wave: Sequence[_Cut], owner: Mapping[Key, int], report: Report | None
) -> Generator[None, None, list[Any]]:
    """Bring matrices together, each at its owner, who orthogonalises it, adds up its sums, and sends the rows back."""
    cut, device = wave[0].cut, asked[0][1].matrices.device
    ranks, me = range(cut.ranks), cut.rank
    # Of each matrix that is asked for, what this process has of it and of its sums, and the method.
    parts: dict[Key, list[Tensor]] = {}
    methods: dict[Key, str] = {}
    for stack, (x, method, sums) in asked:
        for i, key in enumerate(_keys(stack)):
            parts[key], methods[key] = [y[i] for y in (x, *sums)], method
    cuts = {(c.parameter, block): c for c in wave for block in range(c.blocks) if (c.parameter, block) in parts}
    of = [[key for key in cuts if owner[key] == rank] for rank in ranks]

    def kinds(key: Key, rank: int) -> list[TensorSpec]:
        start, stop = cuts[key].rows(key[1], rank)
        rows, *sums = parts[key]
        return [((stop - start, rows.shape[1]), rows.dtype), *((y.shape, y.dtype) for y in sums)]

    there = processes.all_to_all(
        [[x for key in keys for x in parts[key]] for keys in of],
        [[kind for key in of[me] for kind in kinds(key, rank)] for rank in ranks],
        device,
        cut.group,
    )
    yield
    received = [iter(xs) for xs in there.wait()]
    solved = _solved({key: [[next(xs) for xs in received] for _ in parts[key]] for key in of[me]}, methods)

    # Observers want all matrices of a parameter in one place: where the first of them is.
    told = {key: home for key in cuts if report and (home := owner[key[0], 0]) != owner[key]}

    def back(key: Key, rank: int) -> list[Tensor]:
        start, stop = cuts[key].rows(key[1], rank)
        one = solved[key]
        return [one.factor[start:stop], *one.totals] + [one.matrix, one.factor] * (told.get(key) == rank)

    def back_kinds(key: Key) -> list[TensorSpec]:
        return kinds(key, me) + [(cuts[key].matrix, parts[key][0].dtype)] * 2 * (told.get(key) == me)

    returning = processes.all_to_all(
        [[x for key in of[me] for x in back(key, rank)] for rank in ranks],
        [[kind for key in keys for kind in back_kinds(key)] for keys in of],
        device,
        cut.group,
    )
    yield
    for keys, arrived in zip(of, map(iter, returning.wait())):
        for key in keys:
            parts[key] = [next(arrived) for _ in parts[key]]
            if told.get(key) == me:
                solved[key] = _Solved(next(arrived), next(arrived))
    if report is not None:
        _tell([c for c in wave if owner[c.parameter, 0] == me and (c.parameter, 0) in cuts], solved, report)
    answers = []
    for stack, _ in asked:
        factor, *totals = (torch.stack(xs) for xs in zip(*(parts[key] for key in _keys(stack))))
        answers.append((factor, tuple(totals)))
    return answers


def _solved(arrived: Mapping[Key, list[list[Tensor]]], methods: Mapping[Key, str]) -> dict[Key, _Solved]:
    """Orthogonalise matrices and add up their sums, of which the parts of all processes are there."""
    wholes = [torch.cat(rows) for rows, *_ in arrived.values()]
    factors = matrices.orthogonalized([Polar(x[None], methods[key]) for key, x in zip(arrived, wholes)])
    return {
        key: _Solved(x, factor[0], [torch.stack(summands).sum(0) for summands in sums])
        for (key, (_, *sums)), x, factor in zip(arrived.items(), wholes, factors)
    }


def _tell(some: Iterable[_Cut], solved: Mapping[Key, _Solved], report: Report) -> None:
    """Report all matrices of parameters together."""
    for c in some:
        some_solved = [solved[c.parameter, block] for block in range(c.blocks)]
        report(c.task, "momentum", torch.stack([x.matrix for x in some_solved]))
        report(c.task, "orthogonal_factor", torch.stack([x.factor for x in some_solved]))


# --- whole tensors ----------------------------------------------------------------------------------------------------


def _jobs_carried(cuts: Sequence[_Cut], context: _Context) -> Iterator[Iterator[None]]:
    for wave in _waves(cuts, context.plain):
        yield _carried(wave, context)


def _carried(wave: Sequence[_Cut], context: _Context) -> Iterator[None]:
    """Bring whole gradients to the owners of their parameters, who run the rule, and bring back how these move."""
    cut, device = wave[0].cut, wave[0].task.p.device
    ranks = range(cut.ranks)
    of = [[c for c in wave if c.task.owner == rank] for rank in ranks]
    mine = of[cut.rank]
    there = processes.all_to_all(
        [[c.task.g for c in each] for each in of],
        [[(c.cut.local_shape(rank), c.task.g.dtype) for c in mine] for rank in ranks],
        device,
        cut.group,
    )
    yield
    batches: dict[int, Batch] = {}
    for c, *parts in zip(mine, *there.wait()):
        batch = batches.setdefault(id(c.batch), replace(c.batch, tasks=[], cache={}))
        batch.tasks.append(replace(c.task, g=torch.cat(parts, c.cut.dim)))
    moves: dict[Tensor, list[Tensor]] = {}
    move = partial(_pack_moves, moves)
    for job in matrices.jobs(batches.values(), context.plain, context.finite, context.report, move=move):
        for _ in job:
            pass
    returning = processes.all_to_all(
        [[c.cut.shard(x, rank) for c in mine for x in moves[c.parameter]] for rank in ranks],
        [[kind for c in each for kind in _move_kinds(c)] for each in of],
        device,
        cut.group,
    )
    yield
    for each, arrived in zip(of, map(iter, returning.wait())):
        for c in each:
            _move(c, [next(arrived) for _ in _move_kinds(c)], context.finite)


def _pack_moves(moves: dict[Tensor, list[Tensor]], stack: Stack, move: Move, finite: Tensor | None) -> None:
    """Note down how parameters move that are on other ranks: what these do not know, in the parameters' shape."""
    rule, k = stack.rule, stack.tasks[0].scalars
    if "step" in k and (isinstance(move.step, Tensor) or move.step != k["step"]) and not isinstance(k["step"], Tensor):
        raise RuntimeError(f"{rule.name}: the step of a move is not k.step, which other ranks take it for; rename one.")
    if (move.keep is not None) is not rule.own_decay:
        raise RuntimeError(f"{rule.name}: a rule returns Move(keep=...) if, and only if, it says own_decay = True.")
    direction = move.direction if move.over is None else move.direction / move.over
    parts = [direction if "step" in k else move.step * direction]
    if rule.own_decay:
        parts.append(torch.as_tensor(move.keep).expand_as(direction))
    for i, task in enumerate(stack.tasks):
        each = slice(i * stack.group["blocks"], (i + 1) * stack.group["blocks"])
        moves[task.parameter] = [from_blocks(x[each], task.g.shape, stack.group) for x in parts]


def _move_kinds(c: _Cut) -> list[TensorSpec]:
    """What this rank gets of a move that was packed."""
    p = c.task.p
    return [(p.shape, compute_dtype(p.dtype))] * (2 if c.batch.rule.own_decay else 1)


def _move(c: _Cut, packed: Sequence[Tensor], finite: Tensor | None) -> None:
    """Move what this rank has of a parameter."""
    task, k, p = c.task, c.task.scalars, c.task.p
    direction, *keep = packed
    move = Move(direction, k.get("step", 1.0), keep=keep[0] if keep else None)
    noise = None
    if task.noise is not None:
        noise = c.cut.flat_indices(c.cut.rank, p.device).add_(task.noise - processes.flat_offset(c.parameter))
    finite = None if finite is None else finite.to(p.device)
    matrices.move_tensor_(p, move, k["keep"], task.state.get(RESIDUAL), noise, finite)
