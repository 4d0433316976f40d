"""Matrix rules on several ranks: which rank works on which matrix, and how matrices get there and back.

There are three cases, by what a rank holds of a parameter:

- all of it, as every other rank does (DDP): each rank orthogonalises its share of the matrices, and an all-gather sends
  the factors to all;
- some rows, and the rule runs on rows: an all-to-all collects the rows of each matrix that is to be orthogonalised on
  one rank, its owner, and another sends the rows of the factor back;
- any shard, and the rule needs whole tensors: an all-to-all collects the gradient on the parameter's owner, which has
  the state and runs the rule (:mod:`.owned_state`), and another sends back the direction in which the parameter moves.

Parameters are sent in buckets. While the tensors of one bucket are on their way, another is worked on, and so are the
element-wise rules of the step. Every rank of a group forms the same buckets in the same order, because they follow from
whole shapes and never from what a rank holds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby, islice
from math import prod
from typing import Any

import torch
from torch import Tensor

from .. import processes
from ..processes import ProcessGroup, Sharding, TensorSpec
from . import matrices
from .batch import Batch, Task
from .elementwise import split_by_size
from .matrices import Report, Requests, Stack, StackStep
from .rounding import RESIDUAL
from .rule import LIKE_PARAMETER, MatrixRule, Move, Polar
from .state import block_shape, compute_dtype, from_blocks, state_shapes, tensor_names


def run_matrices(
    batches: Sequence[Batch],
    backend: str,
    finite: Tensor | None,
    observer: Callable[[Tensor, str, Tensor], None] | None,
    replicas: Sequence[ProcessGroup],
) -> Iterator[None]:
    """Update the parameters and state of matrix rules in place; yields while it waits for other ranks.

    Args:
        batches: Rules and the parameters they run on.
        backend: One of :data:`.BACKENDS`.
        finite: ``None``, or a 0-d boolean tensor: where it is ``False`` nothing may change.
        observer: Called as ``observer(p, name, value)`` with what rules report.
        replicas: Ranks that hold equal parameters and gradients and share the work, if any do.
    """
    unsharded: list[Batch] = []
    on_rows: dict[ProcessGroup, list[_ShardedTask]] = defaultdict(list)
    on_owners: dict[ProcessGroup, list[_ShardedTask]] = defaultdict(list)
    for batch in batches:
        if "sharded" not in batch.cache:
            batch.cache["sharded"] = any(processes.sharding_of(task.parameter) for task in batch.tasks)
        if not batch.cache["sharded"]:
            unsharded.append(batch)
            continue
        whole = []
        for task in batch.tasks:
            sharding = processes.sharding_of(task.parameter)
            if sharding is None:
                whole.append(task)
            else:
                by_group = on_rows if task.owner is None else on_owners
                by_group[sharding.group].append(_ShardedTask(batch, task, sharding))
        if whole:
            unsharded.append(replace(batch, tasks=whole, cache={}))
    report = None if observer is None else lambda task, name, x: observer(task.parameter, name, x)
    step = StackStep(backend == "plain", finite, report)
    jobs = chain(
        chain.from_iterable(_jobs_on_rows(sharded, step) for sharded in on_rows.values()),
        chain.from_iterable(_jobs_on_owners(sharded, step) for sharded in on_owners.values()),
        _jobs_unsharded(unsharded, step, replicas),
    )
    yield from _overlapped(jobs)


def _overlapped(jobs: Iterable[Iterator[None]]) -> Iterator[None]:
    """Run jobs two at a time: while one waits, the other works."""
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
class _ShardedTask:
    """A task whose parameter is sharded."""

    batch: Batch
    task: Task
    sharding: Sharding

    @property
    def parameter(self) -> Tensor:
        return self.task.parameter

    @property
    def blocks(self) -> int:
        """How many matrices the parameter holds."""
        return self.batch.group["blocks"]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape of each of its matrices."""
        return _matrix_shape(self.parameter, self.batch.group)

    def rows(self, block: int, rank: int) -> tuple[int, int]:
        """The first row that a rank holds of one of the matrices, and the row after the last."""
        m, n = self.matrix_shape
        rows_per_index = prod(self.sharding.shape[1:]) // n
        first, last = (min(max(i * rows_per_index - block * m, 0), m) for i in self.sharding.span(rank))
        return first, last


def _matrix_shape(p: Tensor, group: Mapping[str, Any]) -> tuple[int, int]:
    m, *rest = block_shape(p.shape, group)
    return m, prod(rest)


def _cost(m: int, n: int) -> float:
    """Time of orthogonalising a matrix, up to a factor."""
    return float(m * n * min(m, n))


def _shard_buckets(sharded: Sequence[_ShardedTask], plain: bool) -> Iterator[list[_ShardedTask]]:
    sharded = sorted(sharded, key=lambda x: -_cost(*x.matrix_shape))
    sizes = [x.parameter.numel() for x in sharded]
    limit = 0 if plain else matrices.bucket_limit(sizes, sharded[0].sharding.ranks)
    return split_by_size(sharded, sizes, limit)


# --- every rank has whole parameters ----------------------------------------------------------------------------------


def _jobs_unsharded(
    batches: Sequence[Batch], step: StackStep, replicas: Sequence[ProcessGroup]
) -> Iterator[Iterator[None]]:
    if not replicas or not batches:
        return matrices.stack_jobs(batches, step)
    costs = {
        (task.parameter, block): _cost(*_matrix_shape(task.parameter, batch.group))
        for batch in batches
        for task in batch.tasks
        for block in range(batch.group["blocks"])
    }
    (group,) = replicas
    ranks = processes.size(group)
    owner = dict(zip(costs, processes.assign_owners(tuple(costs.values()), (None,) * len(costs), ranks)))
    solve = partial(_solve_shares, owner=owner, group=group, report=step.report)
    return matrices.stack_jobs(batches, replace(step, solve=solve, ranks=ranks))


def _solve_shares(
    requests: Requests,
    owner: Mapping[tuple[Tensor, int], int],
    group: ProcessGroup,
    report: Report | None,
) -> Generator[None, None, list[Any]]:
    """Orthogonalise this rank's share of the matrices and get the other factors from the other ranks."""
    ranks = range(processes.size(group))
    # For each rank and request, the indices of its matrices in the stack.
    shares = [[[i for i, key in enumerate(_keys(s)) if owner[key] == rank] for s, _ in requests] for rank in ranks]
    mine = shares[processes.rank(group)]
    own = [Polar(x[indices], method) for indices, (_, (x, method, _)) in zip(mine, requests) if indices]
    specs = [
        [((len(indices), *x.shape[1:]), x.dtype) for indices, (_, (x, _, _)) in zip(share, requests) if indices]
        for share in shares
    ]
    receive = processes.all_gather(matrices.orthogonalized(own), specs, requests[0][1].matrices.device, group)
    yield
    factors = [torch.empty_like(request.matrices) for _, request in requests]
    for share, received in zip(shares, receive()):
        parts = iter(received)
        for indices, factor in zip(share, factors):
            if indices:
                factor[indices] = next(parts)
    matrices.report_factors(report, requests, factors)
    return [(factor, request.sums) for factor, (_, request) in zip(factors, requests)]


def _keys(stack: Stack) -> list[tuple[Tensor, int]]:
    blocks = stack.group["blocks"]
    return [(task.parameter, task.first + i) for task in stack.tasks for i in range(blocks)]


# --- rows -------------------------------------------------------------------------------------------------------------


def _jobs_on_rows(sharded: Sequence[_ShardedTask], step: StackStep) -> Iterator[Iterator[None]]:
    ranks = sharded[0].sharding.ranks
    keys = [(x.parameter, block) for x in sharded for block in range(x.blocks)]
    costs = tuple(_cost(*x.matrix_shape) for x in sharded for _ in range(x.blocks))
    holders = tuple(_holder(x, block) for x in sharded for block in range(x.blocks))
    owner = dict(zip(keys, processes.assign_owners(costs, holders, ranks)))
    for bucket in _shard_buckets(sharded, step.plain):
        yield _run_on_rows(bucket, owner, step)


def _holder(x: _ShardedTask, block: int) -> int | None:
    """The rank that holds all rows of a matrix, if one does."""
    m, _ = x.matrix_shape
    return next((rank for rank in range(x.sharding.ranks) if x.rows(block, rank) == (0, m)), None)


def _run_on_rows(
    bucket: Sequence[_ShardedTask], owner: Mapping[tuple[Tensor, int], int], step: StackStep
) -> Iterator[None]:
    """Run the rule on this rank's rows; only the matrices to orthogonalise are sent."""
    tasks_of: dict[Any, list[Task]] = defaultdict(list)
    batches = {}
    for x in bucket:
        for count, task in _equal_rows(x):
            tasks_of[id(x.batch), count].append(task)
            batches[id(x.batch), count] = replace(x.batch, group={**x.batch.group, "blocks": count}, cache={})
    stacks = [
        stack
        for key, tasks in tasks_of.items()
        for stack in matrices.stacks_of(replace(batches[key], tasks=tasks, cache={}), step.plain)
    ]
    solve = partial(_solve_on_owners, bucket=bucket, owner=owner, report=step.report)
    return matrices.run_stacks(stacks, replace(step, solve=solve, report=_collector(bucket, owner, step.report)))


def _equal_rows(x: _ShardedTask) -> Iterator[tuple[int, Task]]:
    """Successive matrices of a parameter of which this rank has equally many rows: their number, and a task for them.

    The shards of a parameter with several matrices may begin and end within one. A rank then has all rows of some
    matrices, part of the rows of others, and no rows of the rest. State that is not sharded by rows is on all ranks.
    """
    _, n = x.matrix_shape
    task = x.task
    shapes = state_shapes(x.batch.rule, x.parameter, x.batch.group)
    first = start = 0
    for rows, same in groupby(last - start for start, last in (x.rows(i, x.sharding.rank) for i in range(x.blocks))):
        count = len(list(same))
        stop, shape = start + count * rows, (rows, n) if count == 1 else (count, rows, n)

        def part(y: Tensor) -> Tensor:
            return y.view(-1, n)[start:stop].view(shape)  # noqa: B023

        state = dict(task.state)
        for name in tensor_names(x.batch.rule, x.parameter, x.batch.group, state):
            by_rows = shapes.get(name, LIKE_PARAMETER) is LIKE_PARAMETER
            state[name] = part(state[name]) if by_rows else state[name][first : first + count]
        noise = None if task.noise is None else task.noise + start * n
        g = part(task.g.contiguous())
        yield count, replace(task, p=part(task.p), g=g, state=state, first=first, noise=noise)
        first, start = first + count, stop


def _collector(
    bucket: Sequence[_ShardedTask],
    owner: Mapping[tuple[Tensor, int], int],
    report: Report | None,
) -> Report | None:
    """A report that waits for the values of all matrices of a parameter and passes them on together.

    All ranks compute all of these values. The owner of the parameter's first matrix reports them.
    """
    if report is None:
        return None
    blocks = {x.parameter: x.blocks for x in bucket if owner[x.parameter, 0] == x.sharding.rank}
    known: dict[tuple[Tensor, str], dict[int, Tensor]] = defaultdict(dict)

    def collect(task: Task, name: str, value: Tensor) -> None:
        if task.parameter not in blocks:
            return
        parts = known[task.parameter, name]
        parts[task.first] = value
        if sum(map(len, parts.values())) == blocks[task.parameter]:
            del known[task.parameter, name]
            report(task, name, torch.cat([parts[first] for first in sorted(parts)]))

    return collect


@dataclass(frozen=True)
class _Solution:
    """A whole matrix, its polar factor and, on its owner, the totals of its sums over ranks."""

    matrix: Tensor
    factor: Tensor
    totals: Sequence[Tensor] = ()


def _solve_on_owners(
    requests: Requests,
    bucket: Sequence[_ShardedTask],
    owner: Mapping[tuple[Tensor, int], int],
    report: Report | None,
) -> Generator[None, None, list[Any]]:
    """Collect each matrix on its owner, which orthogonalises it, adds up its sums and sends the rows back."""
    sharding, device = bucket[0].sharding, requests[0][1].matrices.device
    ranks, me = range(sharding.ranks), sharding.rank
    # For each matrix, this rank's rows and its sums over them; and the method.
    parts: dict[tuple[Tensor, int], list[Tensor]] = {}
    methods: dict[tuple[Tensor, int], str] = {}
    for stack, (x, method, sums) in requests:
        for i, key in enumerate(_keys(stack)):
            parts[key], methods[key] = [y[i] for y in (x, *sums)], method
    tasks = {(x.parameter, block): x for x in bucket for block in range(x.blocks) if (x.parameter, block) in parts}
    owned_by = [[key for key in tasks if owner[key] == rank] for rank in ranks]

    def specs(key: tuple[Tensor, int], rank: int) -> list[TensorSpec]:
        start, stop = tasks[key].rows(key[1], rank)
        rows, *sums = parts[key]
        return [((stop - start, rows.shape[1]), rows.dtype), *((y.shape, y.dtype) for y in sums)]

    receive = processes.all_to_all(
        [[x for key in keys for x in parts[key]] for keys in owned_by],
        [[spec for key in owned_by[me] for spec in specs(key, rank)] for rank in ranks],
        device,
        sharding.group,
    )
    yield
    received = [iter(xs) for xs in receive()]
    solved = _solve({key: [[next(xs) for xs in received] for _ in parts[key]] for key in owned_by[me]}, methods)

    # Observers get all matrices of a parameter at once. The owner of its first matrix calls them, and the owners of the
    # others send it theirs.
    reporters = {key: rank for key in tasks if report and (rank := owner[key[0], 0]) != owner[key]}

    def returned(key: tuple[Tensor, int], rank: int) -> list[Tensor]:
        start, stop = tasks[key].rows(key[1], rank)
        one = solved[key]
        return [one.factor[start:stop], *one.totals] + [one.matrix, one.factor] * (reporters.get(key) == rank)

    def returned_specs(key: tuple[Tensor, int]) -> list[TensorSpec]:
        return specs(key, me) + [(tasks[key].matrix_shape, parts[key][0].dtype)] * 2 * (reporters.get(key) == me)

    receive = processes.all_to_all(
        [[x for key in owned_by[me] for x in returned(key, rank)] for rank in ranks],
        [[spec for key in keys for spec in returned_specs(key)] for keys in owned_by],
        device,
        sharding.group,
    )
    yield
    for keys, tensors in zip(owned_by, map(iter, receive())):
        for key in keys:
            parts[key] = [next(tensors) for _ in parts[key]]
            if reporters.get(key) == me:
                solved[key] = _Solution(next(tensors), next(tensors))
    if report is not None:
        _report_solved([x for x in bucket if owner[x.parameter, 0] == me and (x.parameter, 0) in tasks], solved, report)
    answers = []
    for stack, _ in requests:
        factor, *totals = (torch.stack(xs) for xs in zip(*(parts[key] for key in _keys(stack))))
        answers.append((factor, tuple(totals)))
    return answers


def _solve(
    received: Mapping[tuple[Tensor, int], list[list[Tensor]]], methods: Mapping[tuple[Tensor, int], str]
) -> dict[tuple[Tensor, int], _Solution]:
    """Orthogonalise matrices and add up their sums, given each rank's part of both."""
    wholes = [torch.cat(rows) for rows, *_ in received.values()]
    factors = matrices.orthogonalized([Polar(x[None], methods[key]) for key, x in zip(received, wholes)])
    return {
        key: _Solution(x, factor[0], [torch.stack(summands).sum(0) for summands in sums])
        for (key, (_, *sums)), x, factor in zip(received.items(), wholes, factors)
    }


def _report_solved(
    some: Iterable[_ShardedTask],
    solved: Mapping[tuple[Tensor, int], _Solution],
    report: Report,
) -> None:
    """Report all matrices of each parameter at once."""
    for x in some:
        solutions = [solved[x.parameter, block] for block in range(x.blocks)]
        report(x.task, "momentum", torch.stack([one.matrix for one in solutions]))
        report(x.task, "orthogonal_factor", torch.stack([one.factor for one in solutions]))


# --- whole tensors ----------------------------------------------------------------------------------------------------


def _jobs_on_owners(sharded: Sequence[_ShardedTask], step: StackStep) -> Iterator[Iterator[None]]:
    for bucket in _shard_buckets(sharded, step.plain):
        yield _run_on_owners(bucket, step)


def _run_on_owners(bucket: Sequence[_ShardedTask], step: StackStep) -> Iterator[None]:
    """Collect gradients on the owners of their parameters, which run the rule, and send back how these move."""
    sharding, device = bucket[0].sharding, bucket[0].task.p.device
    ranks = range(sharding.ranks)
    owned_by = [[x for x in bucket if x.task.owner == rank] for rank in ranks]
    mine = owned_by[sharding.rank]
    needs = {x.parameter: _needs_of_owner(x) for x in bucket}
    receive = processes.all_to_all(
        [[y for x in theirs for y in needs[x.parameter].values()] for theirs in owned_by],
        [
            [(x.sharding.local_shape(rank), y.dtype) for x in mine for y in needs[x.parameter].values()]
            for rank in ranks
        ],
        device,
        sharding.group,
    )
    yield
    received = [iter(xs) for xs in receive()]
    batches: dict[int, Batch] = {}
    for x in mine:
        wholes: dict[str, Any] = {
            name: torch.cat([next(xs) for xs in received], x.sharding.dim) for name in needs[x.parameter]
        }
        batch = batches.setdefault(id(x.batch), replace(x.batch, tasks=[], cache={}))
        batch.tasks.append(replace(x.task, **wholes))
    packed: dict[Tensor, list[Tensor]] = {}
    for job in matrices.stack_jobs(batches.values(), replace(step, move=partial(_pack_move, packed))):
        for _ in job:
            pass
    receive = processes.all_to_all(
        [[x.sharding.shard(y, rank) for x in mine for y in packed[x.parameter]] for rank in ranks],
        [[spec for x in theirs for spec in _packed_specs(x)] for theirs in owned_by],
        device,
        sharding.group,
    )
    yield
    for theirs, tensors in zip(owned_by, map(iter, receive())):
        for x in theirs:
            _move_shard(x, [next(tensors) for _ in _packed_specs(x)], step.finite)


def _needs_of_owner(x: _ShardedTask) -> dict[str, Tensor]:
    """This rank's shards of what the owner runs the rule on: the gradient and, if the rule reads it, the parameter."""
    rule, task = x.batch.rule, x.task
    reads = issubclass(rule, MatrixRule) and rule.reads_parameter
    return {"g": task.g, **({"whole": matrices.parameter_of(task)} if reads else {})}


def _pack_move(packed: dict[Tensor, list[Tensor]], stack: Stack, move: Move, finite: Tensor | None) -> None:
    """Keep what other ranks do not know of a move, in the parameters' shape, to send it to them."""
    rule, k = stack.rule, stack.tasks[0].scalars
    if "step" in k and (isinstance(move.step, Tensor) or move.step != k["step"]) and not isinstance(k["step"], Tensor):
        raise RuntimeError(
            f"{rule.name}: other ranks take k.step for the step of a move, and this move has another; rename one."
        )
    if (move.keep is not None) is not rule.own_decay:
        raise RuntimeError(f"{rule.name}: a rule returns Move(keep=...) if, and only if, it says own_decay = True.")
    direction = move.direction if move.over is None else move.direction / move.over
    parts = [direction if "step" in k else move.step * direction]
    if rule.own_decay:
        parts.append(torch.as_tensor(move.keep).expand_as(direction))
    for i, task in enumerate(stack.tasks):
        blocks = slice(i * stack.group["blocks"], (i + 1) * stack.group["blocks"])
        packed[task.parameter] = [from_blocks(y[blocks], task.g.shape, stack.group) for y in parts]


def _packed_specs(x: _ShardedTask) -> list[TensorSpec]:
    """Shapes and dtypes of this rank's shards of a packed move."""
    p = x.task.p
    return [(p.shape, compute_dtype(p.dtype))] * (2 if x.batch.rule.own_decay else 1)


def _move_shard(x: _ShardedTask, packed: Sequence[Tensor], finite: Tensor | None) -> None:
    """Move this rank's shard of a parameter."""
    task, k, p = x.task, x.task.scalars, x.task.p
    direction, *keep = packed
    move = Move(direction, k.get("step", 1.0), keep=keep[0] if keep else None)
    noise = None
    if task.noise is not None:
        noise = x.sharding.flat_indices(x.sharding.rank, p.device).add_(task.noise - processes.flat_offset(x.parameter))
    finite = None if finite is None else finite.to(p.device)
    matrices.move_tensor_(p, move, k["keep"], task.state.get(RESIDUAL), noise, finite)
