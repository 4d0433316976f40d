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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import processes
from ..processes import ProcessGroup, Sharding, TensorSpec
from . import matrices
from .batch import Batch, Task, regularized
from .call import move_tensor_
from .elementwise import split_by_size
from .layout import block_shape, from_blocks, is_split, parts_of, without_split
from .matrices import Report, Requests, Stack, StackStep
from .rounding import RESIDUAL
from .rule import MatrixRule, Move, Polar, decay_of, gives_keep
from .state import compute_dtype, states_of_parts
from .switches import adjusting


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
    for batch in map(regularized, batches):
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
    report = None if observer is None else _part_by_part(batches, observer)
    step = StackStep(backend == "plain", finite, report)
    if not (replicas or on_rows or on_owners):  # There is nothing to wait for.
        for job in matrices.stack_jobs(unsharded, step):
            yield from job
        return
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
    def adjusting(self) -> dict[str, Any] | None:
        """The numbers of the step, where it is not that of the rule; see :func:`.switches.adjusting`."""
        return adjusting(self.task.scalars, len(block_shape(self.parameter.shape, self.batch.group)))

    @property
    def controls_norm(self) -> bool:
        """Whether norms are controlled."""
        k = self.adjusting
        return k is not None and k["norm_control"] != "none"

    @property
    def matrices(self) -> tuple[_Place, ...]:
        """Where each of the parameter's matrices is."""
        return _places(self.parameter, self.batch.group)

    @property
    def cost(self) -> float:
        """Time of orthogonalising the largest of them."""
        return max(_cost(*x.shape) for x in self.matrices)

    def rows(self, index: int, rank: int) -> tuple[int, int]:
        """The first row that a rank holds of one of the matrices, and the row after the last."""
        (m, n), start = self.matrices[index]
        rows_per_index = prod(self.sharding.shape[1:]) // n
        first, last = (min(max(i * rows_per_index - start, 0), m) for i in self.sharding.rows(rank))
        return first, last

    def local_start(self, index: int) -> int:
        """Where these rows begin in this rank's shard."""
        (_, n), start = self.matrices[index]
        shard = self.sharding.rows(self.sharding.rank)[0] * (prod(self.sharding.shape[1:]) // n)
        return max(start - shard, 0)


class _Place(NamedTuple):
    """A matrix of a parameter: its shape, and where its rows begin among the parameter's."""

    shape: tuple[int, int]
    start: int


def _places(p: Tensor, group: Mapping[str, Any]) -> tuple[_Place, ...]:
    found = parts_of(p.shape, group)
    rows = sum(part.shape[0] for part in found)  # of a block
    return tuple(_Place(part.matrix, i * rows + part.start) for part in found for i in range(part.blocks))


def _cost(m: int, n: int) -> float:
    """Time of orthogonalising a matrix, up to a factor."""
    return float(m * n * min(m, n))


def _shard_buckets(sharded: Sequence[_ShardedTask], plain: bool) -> Iterator[list[_ShardedTask]]:
    sharded = sorted(sharded, key=lambda x: -x.cost)
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
        (task.parameter, i): _cost(*place.shape)
        for batch in batches
        for task in batch.tasks
        for i, place in enumerate(_places(task.parameter, batch.group))
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
    # Slices: indices in a list would be copied to the device, for which the host waits.
    own = [
        Polar(torch.stack([x[i] for i in indices]), method)
        for indices, (_, (x, method, *_)) in zip(mine, requests)
        if indices
    ]
    specs = [
        [((len(indices), *x.shape[1:]), x.dtype) for indices, (_, (x, *_)) in zip(share, requests) if indices]
        for share in shares
    ]
    receive = processes.all_gather(matrices.orthogonalized(own), specs, requests[0][1].matrices.device, group)
    yield
    found: list[dict[int, Tensor]] = [{} for _ in requests]
    for share, received in zip(shares, receive()):
        parts = iter(received)
        for indices, by_index in zip(share, found):
            if indices:
                by_index.update(zip(indices, next(parts)))
    factors = [torch.stack([by_index[i] for i in range(len(by_index))]) for by_index in found]
    if report is not None:
        matrices.report_factors(report, requests, factors)
    return [(factor, request.sums) for factor, (_, request) in zip(factors, requests)]


def _keys(stack: Stack) -> list[tuple[Tensor, int]]:
    blocks = stack.group["blocks"]
    return [(task.parameter, task.first + i) for task in stack.tasks for i in range(blocks)]


# --- rows -------------------------------------------------------------------------------------------------------------


def _jobs_on_rows(sharded: Sequence[_ShardedTask], step: StackStep) -> Iterator[Iterator[None]]:
    ranks = sharded[0].sharding.ranks
    keys = [(x.parameter, i) for x in sharded for i in range(len(x.matrices))]
    costs = tuple(_cost(*place.shape) for x in sharded for place in x.matrices)
    holders = tuple(_holder(x, i) for x in sharded for i in range(len(x.matrices)))
    owner = dict(zip(keys, processes.assign_owners(costs, holders, ranks)))
    for bucket in _shard_buckets(sharded, step.plain):
        yield _run_on_rows(bucket, owner, step)


def _holder(x: _ShardedTask, index: int) -> int | None:
    """The rank that holds all rows of a matrix, if one does."""
    m, _ = x.matrices[index].shape
    return next((rank for rank in range(x.sharding.ranks) if x.rows(index, rank) == (0, m)), None)


def _run_on_rows(
    bucket: Sequence[_ShardedTask], owner: Mapping[tuple[Tensor, int], int], step: StackStep
) -> Iterator[None]:
    """Run the rule on this rank's rows; only the matrices to orthogonalise are sent."""
    tasks_of: dict[Any, list[Task]] = defaultdict(list)
    batches = {}
    for x in bucket:
        for count, task in _equal_rows(x):
            tasks_of[id(x.batch), count].append(task)
            group = {**without_split(x.batch.group), "blocks": count}
            batches[id(x.batch), count] = replace(x.batch, group=group, cache={})
    stacks = [
        stack
        for key, tasks in tasks_of.items()
        for stack in matrices.stacks_of(replace(batches[key], tasks=tasks, cache={}), step.plain)
    ]
    solve = partial(_solve_on_owners, bucket=bucket, owner=owner, report=step.report)
    report, total = _collector(bucket, owner, step.report), partial(_total, bucket=bucket)
    return matrices.run_stacks(stacks, replace(step, solve=solve, report=report, total=total))


def _total(stacks: Sequence[tuple[Stack, Tensor]], bucket: Sequence[_ShardedTask]) -> list[Tensor]:
    """The sums of stacks over the ranks that hold rows of their matrices."""
    here = {key: x for stack, sums in stacks for key, x in zip(_keys(stack), sums.unbind())}
    keys = [(x.parameter, i) for x in bucket for i in range(len(x.matrices))]
    added = processes.all_reduce_sum(torch.stack([here[key] for key in keys]), (bucket[0].sharding.group,))
    totals = dict(zip(keys, added.unbind()))
    return [torch.stack([totals[key] for key in _keys(stack)]) for stack, _ in stacks]


def _equal_rows(x: _ShardedTask) -> Iterator[tuple[int, Task]]:
    """Successive matrices of a parameter of which this rank has equally many rows: their number, and a task for them.

    The shards of a parameter with several matrices may begin and end within one. A rank then has all rows of some
    matrices, part of the rows of others, and no rows of the rest. State that is not sharded by rows is on all ranks.
    """
    task, split = x.task, is_split(x.batch.group)
    g = task.g.contiguous()
    for part, like, others in states_of_parts(x.batch.rule, x.parameter, x.batch.group, task.state):
        _, n = part.matrix
        apart = split and part.blocks > 1  # Other parts lie between these matrices.

        def rows_of(i: int, apart: bool = apart) -> tuple[int, int]:
            start, stop = x.rows(i, x.sharding.rank)
            return stop - start, i if apart else 0

        for (length, _), same in groupby(part.indices, rows_of):
            first, *more = same
            count, start = 1 + len(more), x.local_start(first)
            stop, shape = start + count * length, (count, length, n) if more else (length, n)

            def own(y: Tensor) -> Tensor:
                # There are fewer scales than elements in a row.
                columns = shape[-1] if y.shape == g.shape else y.shape[-1]  # noqa: B023
                return y.view(-1, columns)[start:stop].view(*shape[:-1], columns)  # noqa: B023

            state = {name: own(y) for name, y in like.items()}
            state |= {name: y[first - part.first :][:count] for name, y in others.items()}
            scalars = task.by_shape[part.shape] if split else task.scalars
            rows = replace(task, p=own(task.p), g=own(g), state=state, scalars=scalars, first=first)
            rows.noise = None if task.noise is None else task.noise + start * n
            rows.low_noise += start * n
            yield count, rows


def _collector(
    bucket: Sequence[_ShardedTask],
    owner: Mapping[tuple[Tensor, int], int],
    report: Report | None,
) -> Report | None:
    """A report that waits for the values of all matrices of a part and passes them on together.

    All ranks compute all of these values. The owner of the parameter's first matrix reports them.
    """
    if report is None:
        return None
    parts = {
        (x.parameter, i): part
        for x in bucket
        if owner[x.parameter, 0] == x.sharding.rank
        for part in parts_of(x.parameter.shape, x.batch.group)
        for i in part.indices
    }
    known: dict[tuple[Tensor, str, int], dict[int, Tensor]] = defaultdict(dict)

    def collect(task: Task, name: str, value: Tensor) -> None:
        part = parts.get((task.parameter, task.first))
        if part is None:
            return
        key = (task.parameter, name, part.first)
        known[key][task.first] = value
        if sum(map(len, known[key].values())) == part.blocks:
            values = known.pop(key)
            report(replace(task, first=part.first), name, torch.cat([values[first] for first in sorted(values)]))

    return collect


def _part_by_part(batches: Sequence[Batch], observer: Callable[[Tensor, str, Tensor], None]) -> Report:
    """A report that tells an observer of a parameter's parts in their order."""
    firsts = {
        task.parameter: [part.first for part in parts_of(task.parameter.shape, batch.group)]
        for batch in batches
        if is_split(batch.group)
        for task in batch.tasks
    }
    known: dict[tuple[Tensor, str], dict[int, Tensor]] = defaultdict(dict)

    def report(task: Task, name: str, value: Tensor) -> None:
        p = task.parameter
        if p not in firsts:
            observer(p, name, value)
            return
        known[p, name][task.first] = value
        if len(known[p, name]) == len(firsts[p]):
            values = known.pop((p, name))
            for first in firsts[p]:
                observer(p, name, values[first])

    return report


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
    for stack, (x, method, sums, _) in requests:
        for i, key in enumerate(_keys(stack)):
            parts[key], methods[key] = [y[i] for y in (x, *sums)], method
    tasks = {(x.parameter, i): x for x in bucket for i in range(len(x.matrices)) if (x.parameter, i) in parts}
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
    shards = {key: [[next(xs) for xs in received] for _ in parts[key]] for key in owned_by[me]}
    solved = _solve(shards, methods, {key: tasks[key].sharding.in_order for key in shards})

    # Observers get all matrices of a parameter at once. The owner of its first matrix calls them, and the owners of the
    # others send it theirs.
    reporters = {key: rank for key in tasks if report and (rank := owner[key[0], 0]) != owner[key]}

    def returned(key: tuple[Tensor, int], rank: int) -> list[Tensor]:
        start, stop = tasks[key].rows(key[1], rank)
        one = solved[key]
        return [one.factor[start:stop], *one.totals] + [one.matrix, one.factor] * (reporters.get(key) == rank)

    def returned_specs(key: tuple[Tensor, int]) -> list[TensorSpec]:
        matrix = (tasks[key].matrices[key[1]].shape, parts[key][0].dtype)
        return specs(key, me) + [matrix] * 2 * (reporters.get(key) == me)

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
    received: Mapping[tuple[Tensor, int], list[list[Tensor]]],
    methods: Mapping[tuple[Tensor, int], str],
    in_order: Mapping[tuple[Tensor, int], Sequence[int]],
) -> dict[tuple[Tensor, int], _Solution]:
    """Orthogonalise matrices and add up their sums, given each rank's part of both and who has the first rows."""
    wholes = [torch.cat([rows[rank] for rank in in_order[key]]) for key, (rows, *_) in received.items()]
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
    """Report all matrices of each part at once."""
    for x in some:
        for part in parts_of(x.parameter.shape, x.batch.group):
            solutions = [solved[x.parameter, i] for i in part.indices]
            task = replace(x.task, first=part.first)
            report(task, "momentum", torch.stack([one.matrix for one in solutions]))
            report(task, "orthogonal_factor", torch.stack([one.factor for one in solutions]))


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
        wholes: dict[str, Any] = {name: x.sharding.whole([next(xs) for xs in received]) for name in needs[x.parameter]}
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
    reads = (issubclass(rule, MatrixRule) and rule.reads_parameter) or x.controls_norm
    return {"g": task.g, **({"whole": matrices.parameter_of(task)} if reads else {})}


def _pack_move(packed: dict[Tensor, list[Tensor]], stack: Stack, move: Move, finite: Tensor | None) -> None:
    """Keep what other ranks do not know of a move, in the parameters' shape, to send it to them."""
    rule, k = stack.rule, stack.tasks[0].scalars
    is_own = adjusting(k, len(stack.block)) is None
    known = "step" in k and not isinstance(k["step"], Tensor)
    if is_own and known and (isinstance(move.step, Tensor) or move.step != k["step"]):
        raise RuntimeError(
            f"{rule.name}: other ranks take k.step for the step of a move, and this move has another; rename one."
        )
    own_decay = gives_keep(rule, decay_of(rule, stack.group))
    if is_own and (move.keep is not None) is not own_decay:
        raise RuntimeError(f"{rule.name}: a rule returns Move(keep=...) if, and only if, its own_decay says so.")
    direction = move.direction if move.over is None else move.direction / move.over
    split = stack.tasks[0].part is not None  # Other matrices of the parameter may have another step.
    parts = [direction if is_own and "step" in k and not split else move.step * direction]
    if move.keep is not None:
        parts.append(torch.as_tensor(move.keep).expand_as(direction))
    for i, task in enumerate(stack.tasks):
        blocks = slice(i * stack.group["blocks"], (i + 1) * stack.group["blocks"])
        own = [from_blocks(y[blocks], task.g.shape, stack.group) for y in parts]
        if task.part is None:
            packed[task.parameter] = own
            continue
        whole = packed.setdefault(task.parameter, [y.new_empty(task.parameter.shape) for y in own])
        for y, part in zip(whole, own):
            task.part.of(y).copy_(part)


def _packed_specs(x: _ShardedTask) -> list[TensorSpec]:
    """Shapes and dtypes of this rank's shards of a packed move."""
    p, batch = x.task.p, x.batch
    keeps = x.controls_norm or gives_keep(batch.rule, decay_of(batch.rule, batch.group))
    return [(p.shape, compute_dtype(p.dtype))] * (2 if keeps else 1)


def _move_shard(x: _ShardedTask, packed: Sequence[Tensor], finite: Tensor | None) -> None:
    """Move this rank's shard of a parameter."""
    task, k, p = x.task, x.adjusting or x.task.scalars, x.task.p
    direction, *keep = packed
    step = 1.0 if is_split(x.batch.group) or x.adjusting else k.get("step", 1.0)
    move = Move(direction, step, keep=keep[0] if keep else None)
    noise = None
    if task.noise is not None:
        noise = x.sharding.flat_indices(x.sharding.rank, p.device).add_(task.noise - processes.flat_offset(x.parameter))
    finite = None if finite is None else finite.to(p.device)
    move_tensor_(p, move, k, task.state.get(RESIDUAL), noise, finite)
