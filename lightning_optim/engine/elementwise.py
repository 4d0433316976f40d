"""Element-wise and group rules: which elements run together, and the loop over them.

An element-wise rule gives the same result on any vector of elements, so small parameters are joined and large ones are
split:

- ``plain``: one parameter at a time, unchanged: the reference.
- ``chunked``: small tensors are joined to vectors, large ones split into views that fit in cache with temporaries.
- ``compiled``: small tensors are joined, large ones stay whole, since a compiled kernel has no temporaries.

:func:`chunks_of` yields one :class:`Chunk` at a time. What had to be copied for it is written back before the next
one is made, so that copies never exceed one chunk.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from .. import devices, private, processes
from . import compile
from .batch import Batch, Task
from .call import call, move_tensor_
from .displacement import decay_factor, displacing, factors, sums_of
from .rounding import RESIDUAL, joined_positions, load, stream_positions
from .rule import ElementwiseRule, ModelRule, Move
from .state import compute_dtype, tensor_names
from .switches import adjusting, is_adjusted

#: Tensors of up to this many elements are joined, so that one call updates all: copies cost less than a call for each.
SMALL = {"cpu": 2**14, "cuda": 2**18}
#: The same for eager rules, which make one call for each of their operations.
SMALL_EAGER = {"cpu": 2**16, "cuda": 2**18}
#: Joined parameters of up to this many elements in all have memory of their own, which saves finding it in every step.
KEPT = 2**14
#: Elements of a chunk: enough that operations take longer than their dispatch (on a GPU a launch takes about as long as
#: moving 2^22 numbers), and on a CPU few enough that operands and temporaries fit in cache.
CHUNK = {"cpu": 2**18, "cuda": 2**22}
#: ``auto`` compiles where a step updates this many elements or more; see :func:`run_elementwise`.
COMPILE_FROM = 2**23
#: A compiled kernel checks gradients of this many elements or more; below it, its call costs more than it saves.
LONG = 2**16
#: Elements of parameters whose displacements are kept at the same time, where steps depend on sums over parameters.
BUCKET = 2**24
#: Longest vector of a compiled kernel, whose indices may have 32 bits on a GPU.
LONGEST = 2**30

_warned = False
Item = TypeVar("Item")


@dataclass
class Chunk:
    """What one call of a rule updates: vectors of equal size, or whole tensors where ``plain``, of some tasks."""

    tasks: Sequence[Task]

    p: Tensor
    g: Tensor
    grad_scale: float | Tensor
    state: dict[str, Tensor]
    noise: Tensor | None


def run_elementwise(
    batches: Sequence[Batch],
    backend: str,
    finite: Tensor | None,
    groups: Sequence[processes.ProcessGroup] = (),
    loss: float | None = None,
) -> None:
    """Update the parameters and state of element-wise and group rules in place.

    Args:
        batches: Rules and the parameters they run on.
        backend: One of :data:`.BACKENDS`.
        finite: ``None``, or a 0-d boolean tensor: where it is ``False`` nothing may change.
        groups: Process groups that hold other shards of the parameters, where these are not ``DTensor``.
        loss: The loss of the step, for a rule that needs it.
    """
    backend = _resolve_auto(backend, batches)
    grouped = []
    for batch in batches:
        if batch.rule.kind == "group":
            grouped.append(batch)
            continue
        _update_batch(batch, {}, backend, finite, tuple(groups))
    if grouped:
        _run_group_rules(grouped, backend, finite, tuple(groups), loss)


def _update_batch(
    batch: Batch,
    coefficients: Mapping[str, Tensor],
    backend: str,
    finite: Tensor | None,
    groups: tuple[processes.ProcessGroup, ...],
) -> None:
    """Update the parameters and state of an element-wise rule, or of a group rule with its coefficients."""
    update = cast("type[ElementwiseRule]", batch.rule).update
    for some, k in _parts(batch):
        if k is not None:
            _update_adjusted(update, some, k, coefficients, backend, finite, groups)
            continue
        for joint in _joint_tasks(some):
            _each(update, joint, _on_host(coefficients, joint, finite) if coefficients else {}, backend, finite)


def _on_host(coefficients: Mapping[str, Tensor], joint: JointTasks, finite: Tensor | None) -> dict[str, float | Tensor]:
    """Coefficients of a group rule where the tasks are.

    Operations with numbers need no temporaries; on an accelerator, the host would have to wait for them.
    """
    here = joint.tasks[0].p.device
    known = finite is None and here.type == "cpu"
    return {name: float(x) if known else x.to(here) for name, x in coefficients.items()}


def _resolve_auto(backend: str, batches: Sequence[Batch]) -> str:
    """The backend that ``auto`` stands for."""
    if backend != "auto":
        return backend
    size = 0.0
    for batch in batches:
        if "size" not in batch.cache:
            batch.cache["size"] = _compilable([task.p for task in batch.tasks])
        size += batch.cache["size"]
    return "compiled or chunked" if size >= COMPILE_FROM else "chunked"


def _compilable(xs: Sequence[Tensor]) -> float:
    """How many elements tensors have; minus infinity on devices without compiled kernels."""
    return sum([x.numel() for x in xs]) if all(x.device.type in ("cpu", "cuda") for x in xs) else -math.inf


@dataclass
class JointTasks:
    """Tasks that one call can take together.

    Args:
        tasks: Tasks with the same dtype, device, scalars and gradient scale.
        names: Names of their state tensors of the parameter's shape.
        split_at: Results of :meth:`split`, by its argument.
    """

    tasks: list[Task]
    names: list[str]
    split_at: dict[int, tuple[list[FlatBuffer], list[Task]]] = field(default_factory=dict)

    def split(self, small: int) -> tuple[list[FlatBuffer], list[Task]]:
        """Tensors of up to ``small`` elements, joined to flat buffers, and the tasks of the others."""
        if small not in self.split_at:
            short = [task for task in self.tasks if task.p.numel() <= small and not task.low]
            limit = _on_device(CHUNK, self.tasks[0].p)
            parts = split_by_size(short, [task.p.numel() for task in short], limit)
            joined = [FlatBuffer(some, self.names) for some in parts]
            self.split_at[small] = joined, [task for task in self.tasks if task.p.numel() > small or task.low]
        return self.split_at[small]


def _joint_tasks(batch: Batch) -> list[JointTasks]:
    """The tasks of a batch in sets that one call can take together, except those without elements on this rank."""
    if batch.even and "joint" in batch.cache:
        return batch.cache["joint"]
    groups: dict[Any, list[Task]] = {}
    for task in batch.tasks:
        if task.p.numel():
            grad_scale = task.grad_scale if isinstance(task.grad_scale, float) else None
            key = (id(task.scalars), task.p.dtype, task.g.dtype, task.p.device, grad_scale)
            groups.setdefault(key, []).append(task)
    # Parameters of one group can have several dtypes, and then only some have a residual.
    found = [JointTasks(tasks, _tensor_names(batch, tasks[0])) for tasks in groups.values()]
    if batch.even:
        batch.cache["joint"] = found
    return found


def _tensor_names(batch: Batch, task: Task) -> list[str]:
    return tensor_names(batch.rule, task.parameter, batch.group, task.state)


def _each(
    function: Callable[..., Any],
    joint: JointTasks,
    coefficients: dict[str, float | Tensor],
    backend: str,
    finite: Tensor | None,
    changes: Literal["all", "state", "nothing"] = "all",
) -> list[tuple[Sequence[Task], Any]]:
    """Call ``function`` on every chunk of ``joint``; returns the tasks of each and what it returned.

    ``changes`` says what it changes: ``"all"``, parameters and state, for an update.
    """
    first = joint.tasks[0]
    moves = changes != "nothing"
    noisy = changes == "all" and first.noise is not None
    finite = None if finite is None or not moves else finite.to(first.p.device)
    scalars = first.scalars | coefficients if coefficients else first.scalars
    compiled = None
    if backend.startswith("compiled"):
        state = first.read(joint.names, slice(0, 1) if first.p.ndim else None)
        compiled = compile_or_warn(
            partial(compile.runner, function, first.p, first.g, first.grad_scale, finite, state, scalars, noisy),
            backend,
        )
    # Random numbers take eight bytes per element, which should stay in cache.
    limit = _on_device(CHUNK, first.p) if compiled is None or noisy else LONGEST
    small = _on_device(SMALL_EAGER if compiled is None else SMALL, first.p)
    if backend == "plain":
        chunks = _whole(joint, noisy, finite, moves)
    else:
        chunks = chunks_of(joint, small, limit, noisy, finite, moves)
    if compiled is not None:
        return [(x.tasks, compiled(x.p, x.g, x.grad_scale, x.state, x.noise)) for x in chunks]
    return [(x.tasks, call(function, x.p, x.g, x.grad_scale, finite, x.state, scalars, x.noise)) for x in chunks]


def compile_or_warn(make: Callable[[], Item], backend: str) -> Item | None:
    """The result of ``make``, which compiles; ``None``, after one warning, if it fails and compiling is optional."""
    global _warned
    if backend != "compiled" and _warned:
        return None
    try:
        return make()
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.200}"
        if backend == "compiled":
            raise RuntimeError(
                f"backend='compiled': compiling the optimizer's step failed ({reason}). It needs a C++ compiler "
                "(Triton for GPUs). backend='chunked' needs none, and backend='auto' compiles only where that works."
            ) from error
        _warned = True
        warnings.warn(
            f"Compiling the optimizer's step failed ({reason}), so it runs uncompiled, with the same results. It needs "
            "a C++ compiler (Triton for GPUs); backend='chunked' needs none and avoids this warning.",
            stacklevel=2,
        )
        return None


# --- group rules ------------------------------------------------------------------------------------------------


def _run_group_rules(
    batches: Sequence[Batch],
    backend: str,
    finite: Tensor | None,
    groups: tuple[processes.ProcessGroup, ...],
    loss: float | None,
) -> None:
    """Add up the sums of all group rules, together, then update parameters and state."""
    sums = [_group_sums(batch, backend, groups) for batch in batches]
    totals = [torch.zeros_like(next(iter(each.values()))) for each in sums]
    for key in dict.fromkeys(key for each in sums for key in each):
        members = [i for i, each in enumerate(sums) if key in each]
        device = totals[members[0]].device
        added = processes.all_reduce_sum(torch.cat([sums[i][key].to(device) for i in members]), key)
        for i, part in zip(members, added.split([len(totals[i]) for i in members])):
            totals[i] += part.to(totals[i].device)
    for some in over_one_model(batches):
        indices = [i for i, batch in enumerate(batches) if any(batch is one for one in some)]
        device = totals[indices[0]].device
        total = torch.stack([totals[i].to(device) for i in indices]).sum(0) if len(indices) > 1 else totals[indices[0]]
        old, new, coefficients = combine(some, total.unbind(), loss)
        for batch in some:
            _update_group(batch, old, new, coefficients, backend, finite, groups)


def over_one_model(batches: Sequence[Batch]) -> list[list[Batch]]:
    """Batches of group rules by what their sums run over: all batches of a :class:`.rule.ModelRule`, one of others."""
    found: dict[Any, list[Batch]] = {}
    for i, batch in enumerate(batches):
        found.setdefault(batch.rule if issubclass(batch.rule, ModelRule) else i, []).append(batch)
    return list(found.values())


def combine(
    batches: Sequence[Batch], totals: Sequence[Tensor], loss: float | None
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Call ``combine`` of the rule of some batches, of whose sums these are the totals.

    Returns:
        The state of the group before and after the step, and the coefficients of the update.
    """
    rule: Any = batches[0].rule
    # A parameter that gets its first gradient late joins the group's state instead of resetting it.
    oldest = max((task for batch in batches for task in batch.tasks), key=lambda task: task.t)
    old = {name: oldest.state[name].to(totals[0].device) for name in rule.group_state}
    k = SimpleNamespace(**oldest.scalars)
    if issubclass(rule, ModelRule):
        k.loss = loss
    new, coefficients = rule.combine(tuple(totals), SimpleNamespace(**old), k)
    return old, new, coefficients


def _group_sums(
    batch: Batch, backend: str, groups: tuple[processes.ProcessGroup, ...]
) -> dict[tuple[processes.ProcessGroup, ...], Tensor]:
    """A rule's sums over this rank's tensors, for each set of process groups over which to add them up.

    Args:
        batch: The rule and its parameters.
        backend: One of :data:`.BACKENDS`.
        groups: Process groups that hold the other shards of parameters that are not ``DTensor``.
    """
    rule: Any = batch.rule
    device = batch.tasks[0].p.device
    found: dict[tuple[processes.ProcessGroup, ...], list[Any]] = {}
    for whole, _ in _parts(batch):
        by_groups: dict[tuple[processes.ProcessGroup, ...], list[Task]] = {}
        for task in whole.tasks:
            by_groups.setdefault(processes.shard_groups(task.parameter) or groups, []).append(task)
        for key, tasks in by_groups.items():
            some = whole if len(tasks) == len(whole.tasks) else replace(whole, tasks=tasks, cache={})
            parts = [
                part
                for joint in _joint_tasks(some)
                for _, part in _each(rule.sums, joint, {}, backend, None, "nothing")
            ]
            if not parts:  # This rank has none of their elements, but the other ranks wait for its zeros.
                task = tasks[0]
                state = task.read(_tensor_names(batch, task))
                parts = [call(rule.sums, task.p, task.g, task.grad_scale, None, state, task.scalars)]
            found.setdefault(key, []).extend(parts)
    return {
        key: torch.stack([torch.stack([x.to(device) for x in column]).sum(0) for column in zip(*parts)])
        for key, parts in found.items()
    }


def _update_group(
    batch: Batch,
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    coefficients: Mapping[str, Any],
    backend: str,
    finite: Tensor | None,
    groups: tuple[processes.ProcessGroup, ...],
) -> None:
    """Update the parameters, their state and the state of the group; see :func:`combine`."""
    _update_batch(batch, coefficients, backend, finite, groups)
    states = [*(task.state for task in batch.tasks), *batch.idle]  # Without a gradient they get the new state, too.
    for name, value in new.items():
        if finite is not None:
            value = torch.where(finite.to(value.device), value, old[name])
        private.copy_each_([state[name] for state in states], [value] * len(states))


# --- cautious steps and control of norms ------------------------------------------------------------------------


def _parts(batch: Batch) -> list[tuple[Batch, dict[str, Any] | None]]:
    """Parts of a batch and the numbers of their steps, ``None`` where these are those of the rule.

    A part has matrices or vectors, which may have other steps, and as many as have their displacements kept at the same
    time. The parts are the same on all ranks. Whatever runs on the batch in a step has to run on them, since each keeps
    state of its own joined.
    """
    if not is_adjusted(batch.tasks[0].scalars):
        return [(batch, None)]
    if not (batch.even and "parts" in batch.cache):
        found = []
        for axes in (1, 2):
            pairs = zip(batch.tasks, batch.params, strict=True)
            tasks = [task for task, p in pairs if (p.ndim > 1) is (axes > 1)]
            sizes = [task.parameter.numel() for task in tasks]
            limit = BUCKET if adjusting(batch.tasks[0].scalars, axes) else sum(sizes)
            for some in split_by_size(tasks, sizes, limit):
                found.append((axes, replace(batch, tasks=some, cache={})))
        batch.cache["parts"] = found
    return [(some, adjusting(some.tasks[0].scalars, axes)) for axes, some in batch.cache["parts"]]


def _update_adjusted(
    update: Callable[..., Move],
    batch: Batch,
    k: Mapping[str, Any],
    coefficients: Mapping[str, Tensor],
    backend: str,
    finite: Tensor | None,
    groups: tuple[processes.ProcessGroup, ...],
) -> None:
    """Make steps that depend on sums over whole parameters: update all states, add up the sums, move the parameters.

    Args:
        update: The update of the rule.
        batch: The parameters.
        k: The numbers of the step, from :func:`.switches.adjusting`.
        coefficients: Those of a group rule.
        backend: One of :data:`.BACKENDS`.
        finite: ``None``, or a 0-d boolean tensor: where it is ``False`` nothing may change.
        groups: Process groups that hold the other shards of parameters that are not ``DTensor``.
    """
    displace = displacing(update, k["cautious"])
    pieces: list[tuple[Sequence[Task], list[Tensor]]] = []  # Of a task that is split, several.
    for joint in _joint_tasks(batch):
        for tasks, (d,) in _each(displace, joint, _on_host(coefficients, joint, finite), backend, finite, "state"):
            if pieces and len(tasks) == 1 and pieces[-1][0][-1] is tasks[0]:
                pieces[-1][1].append(d.reshape(-1))
            else:
                pieces.append((tasks, [d.reshape(-1)]))
    displaced = [(tasks, ds[0] if len(ds) == 1 else torch.cat(ds)) for tasks, ds in pieces]
    sums = {id(task): x for tasks, d in displaced for task, x in zip(tasks, _sums(tasks, d, k))}
    totals = _totals(batch.tasks, sums, groups)
    for tasks, d in displaced:
        total = torch.stack([totals[id(task)].to(d.device) for task in tasks])
        _move(tasks, d, *factors(total, k, d.dtype), k, None if finite is None else finite.to(d.device))


def _sums(tasks: Sequence[Task], d: Tensor, k: Mapping[str, Any]) -> list[Tensor]:
    """The sums over each task's part of a vector of displacements."""
    found = []
    for task, part in zip(tasks, d.split([task.p.numel() for task in tasks])):
        p = None if k["norm_control"] == "none" else load(task.p, task.state.get(RESIDUAL), d.dtype).reshape(1, -1)
        found.append(sums_of(part[None], p, None, k)[0])
    return found


def _totals(
    tasks: Sequence[Task], sums: Mapping[int, Tensor], groups: tuple[processes.ProcessGroup, ...]
) -> dict[int, Tensor]:
    """The sums of each task over all ranks, of which some have none of its elements; by its identity."""
    device = tasks[0].p.device
    zero = torch.zeros(5, dtype=devices.widest(device), device=device)
    by_groups: dict[tuple[processes.ProcessGroup, ...], list[int]] = {}
    for task in tasks:
        by_groups.setdefault(processes.shard_groups(task.parameter) or groups, []).append(id(task))
    totals: dict[int, Tensor] = {}
    for sharing, keys in by_groups.items():
        here = torch.stack([sums[key].to(zero) if key in sums else zero for key in keys])
        totals |= zip(keys, processes.all_reduce_sum(here, sharing).unbind())
    return totals


def _move(
    tasks: Sequence[Task], d: Tensor, kept: Tensor | None, step: Tensor, k: Mapping[str, Any], finite: Tensor | None
) -> None:
    """Move the parameters of some tasks, whose displacements are one vector, and their factors one number each."""
    kept = None if kept is None else kept * decay_factor(None, k)
    if len(tasks) == 1:
        (task,) = tasks
        noise = None if task.noise is None else _chunk_noise(task, 0, len(d)).view(task.p.shape)
        move = Move(d.view(task.p.shape), step[0], keep=None if kept is None else kept[0])
        move_tensor_(task.p, move, k, task.state.get(RESIDUAL), noise, finite)
        return
    sizes = [task.p.numel() for task in tasks]
    targets = [[task.p for task in tasks]]
    if RESIDUAL in tasks[0].state:
        targets.append([task.state[RESIDUAL] for task in tasks])
    p, *residual = vectors = [private.flatten(xs) for xs in targets]
    firsts = [task.noise for task in tasks if task.noise is not None]
    noise = joined_positions(firsts, sizes, p.device) if firsts else None
    move = Move(d, _per_element(step, sizes), keep=None if kept is None else _per_element(kept, sizes))
    move_tensor_(p, move, k, residual[0] if residual else None, noise, finite)
    for xs, vector in zip(targets, vectors):
        private.copy_each_(xs, private.unflatten(vector, xs))


def _per_element(x: Tensor, sizes: Sequence[int]) -> Tensor:
    return torch.cat([y.expand(n) for y, n in zip(x.unbind(), sizes)])


# --- chunks -----------------------------------------------------------------------------------------------------


def _whole(joint: JointTasks, noisy: bool, finite: Tensor | None, moves: bool) -> Iterator[Chunk]:
    for task in joint.tasks:
        noise = _chunk_noise(task, 0, task.p.numel()).view(task.p.shape) if noisy else None
        state = task.read(joint.names)
        yield Chunk([task], task.p, task.g, task.grad_scale, state, noise)
        if moves and task.low:
            task.write(state, finite)


def chunks_of(
    joint: JointTasks,
    small: int,
    limit: int | None,
    noisy: bool = False,
    finite: Tensor | None = None,
    moves: bool = True,
) -> Iterator[Chunk]:
    """Join and split tasks into chunks; what had to be copied is written back before the next chunk is made.

    Args:
        joint: The tasks.
        small: Tensors of up to this many elements are joined.
        limit: Longest view of a tensor that need not be copied; ``None`` for any length.
        noisy: Whether to add stream positions, for stochastic rounding.
        finite: ``None``, or a 0-d boolean tensor: where it is ``False`` nothing may change.
        moves: Whether to write back what had to be copied.
    """
    joined, long = joint.split(small)
    for pack in joined:
        if len(pack.tasks) == 1:
            yield from _slices(pack.tasks[0], joint.names, None, noisy, finite, moves)
            continue
        chunk = pack.chunk(noisy)
        yield chunk
        if moves:
            pack.write_back(chunk)
    for task in long:
        yield from _slices(task, joint.names, limit, noisy, finite, moves)


def _on_device(limits: Mapping[str, int], x: Tensor) -> int:
    """The limit for the device of a tensor."""
    return limits.get(x.device.type, limits["cuda"])


def split_by_size(items: Sequence[Item], sizes: Sequence[int], limit: int) -> Iterator[list[Item]]:
    """Split ``items`` into lists whose ``sizes`` add up to at most ``limit``, or that have one item.

    >>> list(split_by_size(["a", "b", "c"], [2, 2, 1], 4))
    [['a', 'b'], ['c']]
    """
    pack: list[Item] = []
    total = 0
    for item, size in zip(items, sizes):
        if pack and total + size > limit:
            yield pack
            pack, total = [], 0
        pack.append(item)
        total += size
    if pack:
        yield pack


def _chunk_noise(task: Task, start: int, stop: int) -> Tensor:
    assert task.noise is not None
    return stream_positions(task.noise, start, stop, task.p.device)


class FlatBuffer:
    """Small tensors joined to vectors: state once, so that its tensors are views; parameters and gradients every step.

    Args:
        tasks: The parameters.
        names: Names of their state tensors of the parameter's shape.
    """

    def __init__(self, tasks: list[Task], names: Sequence[str]) -> None:
        self.tasks, self.names = tasks, names
        self.params = [task.p for task in tasks]
        self.sizes = [p.numel() for p in self.params]
        #: The parameters' values, and views of them; made in every step, unless they take so little that they are kept.
        self._vector: Tensor | None = None
        self._views: Sequence[Tensor] = ()
        # State of sharded parameters is the local part of a DTensor and cannot become a view of something else.
        self.owns_state = all(task.p is task.parameter for task in tasks)
        self._state: dict[str, Tensor] = {}

    def chunk(self, noisy: bool) -> Chunk:
        """Join what changes every step."""
        tasks = self.tasks
        if self._vector is None:
            p = private.flatten(self.params)
            self._views = private.unflatten(p, self.params)
            self._vector = p if len(p) <= KEPT else None
        else:
            p = self._vector
            private.copy_each_(self._views, self.params)
        g = private.flatten([task.g for task in tasks])
        if self.owns_state:
            state = self._state = self._state or {name: _joined_state(tasks, name, self.sizes) for name in self.names}
        else:
            state = {name: private.flatten([task.state[name] for task in tasks]) for name in self.names}
        grad_scale = tasks[0].grad_scale
        if isinstance(grad_scale, Tensor):
            scales = [task.grad_scale.expand(n) for task, n in zip(tasks, self.sizes)]  # type: ignore[union-attr]
            # In place, since a compiled kernel expects the gradients' dtype.
            g, grad_scale = g.mul_(torch.cat(scales)), torch.ones_like(grad_scale)
        firsts = [task.noise for task in tasks if task.noise is not None] if noisy else []
        return Chunk(tasks, p, g, grad_scale, state, joined_positions(firsts, self.sizes, p.device) if noisy else None)

    def write_back(self, chunk: Chunk) -> None:
        """Copy the vectors back to the tensors that they were joined from."""
        private.copy_each_(self.params, self._views)
        if self._vector is None:
            self._views = ()
        if not self.owns_state:
            for name in self.names:
                xs = [task.state[name] for task in self.tasks]
                private.copy_each_(xs, private.unflatten(chunk.state[name], xs))


def _joined_state(tasks: Sequence[Task], name: str, sizes: Sequence[int]) -> Tensor:
    """A vector whose successive parts are the state tensors of the tasks."""
    xs = [task.state[name] for task in tasks]
    vector = private.base(xs[0])
    if vector is None or not _are_parts(xs, sizes, vector):
        # New state, state from a checkpoint, or another selection of parameters than last time.
        vector = private.flatten(xs)
        for task, part in zip(tasks, private.unflatten(vector, xs)):
            task.state[name] = part
    return vector


def _are_parts(xs: Sequence[Tensor], sizes: Sequence[int], vector: Tensor) -> bool:
    *starts, end = accumulate(sizes, initial=0)
    return vector.shape == (end,) and private.are_views(xs, starts, vector)


def _slices(
    task: Task, names: Sequence[str], limit: int | None, noisy: bool, finite: Tensor | None, moves: bool
) -> Iterator[Chunk]:
    p, g, n = task.p, task.g, task.p.numel()
    if p.is_contiguous() and g.is_contiguous() and not task.low:
        vectors = [x.view(-1) for x in (p, g, *(task.state[name] for name in names))]
        length = n if limit is None else limit
        for start in range(0, n, length):
            p, g, *state = vectors if length >= n else [x[start : start + length] for x in vectors]
            noise = _chunk_noise(task, start, start + p.numel()) if noisy else None
            yield Chunk([task], p, g, task.grad_scale, dict(zip(names, state)), noise)
        return
    # State in low precision, or strides other than the state's: copy rows, as many as a chunk holds.
    width = n // p.shape[0]
    rows = max(1, _on_device(CHUNK, p) // width)
    for i in range(0, p.shape[0], rows):
        part, g_part = (x[i : i + rows].reshape(-1).contiguous() for x in (p, g))
        some = slice(i, i + rows)
        rows_state = {name: x.reshape(-1) for name, x in task.read(names, some).items()}
        noise = _chunk_noise(task, i * width, i * width + len(part)) if noisy else None
        yield Chunk([task], part, g_part, task.grad_scale, rows_state, noise)
        if not moves:
            continue
        if part.data_ptr() != p[some].data_ptr():
            p[some].copy_(part.view_as(p[some]))
        if task.low:
            task.write(rows_state, finite, some)


# --- the largest gradient entry -------------------------------------------------------------------------------------


def largest_entry(xs: Sequence[Tensor], backend: str) -> float:
    """The largest absolute value in some tensors on the CPU; NaN if they hold NaN."""
    if 0 < sum([x.numel() for x in xs]) <= SMALL_EAGER["cpu"] and len({x.dtype for x in xs}) == 1:
        least, most = torch.aminmax(private.flatten(xs))  # NaN both if there is one.
        return max(float(most), -float(least))
    kinds: dict[Any, list[Tensor]] = {}
    for x in xs:
        if x.numel():
            kinds.setdefault((x.dtype, x.device), []).append(x)
    compile_ = backend == "compiled" or (backend == "auto" and _compilable(xs) >= COMPILE_FROM)
    peaks: list[Tensor] = []
    for (dtype, device), some in kinds.items():
        extremes: list[Tensor] = []
        peak = compile_or_warn(partial(compile.peak, dtype, device), backend) if compile_ else None
        if peak is not None:
            # Last to first, so that the first ones are in cache when the step begins with them.
            extremes += [peak(x.view(-1)) for x in reversed(some) if x.numel() >= LONG and x.is_contiguous()]
            some = [x for x in some if x.numel() < LONG or not x.is_contiguous()]
        small = [x for x in some if x.numel() <= SMALL["cpu"]]
        rest = [x for x in some if x.numel() > SMALL["cpu"]]
        rest += [private.flatten(pack) for pack in split_by_size(small, [x.numel() for x in small], CHUNK["cpu"])]
        for x in rest:
            extremes += torch.aminmax(x)  # Needs no temporary and uses several threads.
        peaks.append(torch.stack(extremes).abs().max().to(compute_dtype(dtype)))
    return float(torch.stack(peaks).max()) if peaks else 0.0
