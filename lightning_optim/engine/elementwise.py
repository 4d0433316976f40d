"""Element-wise and group rules: which elements run together, and the loop over them.

An element-wise rule does not care where a tensor ends, so the parameters of a group are cut and joined at will:

- ``plain``: every parameter alone, as it is: the reference.
- ``chunked``: small tensors joined to vectors, large ones cut into views that stay in cache with their temporaries.
- ``compiled``: small tensors joined, large ones whole, since a compiled kernel has no temporaries.

:func:`plan` makes the cuts; it yields one :class:`Piece` at a time and moves back what had to be copied before it goes
on to the next, so that copies never exceed one chunk.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import private, processes
from . import compile
from .batch import Batch, Task
from .call import call
from .rounding import joined_positions, stream_positions
from .rule import ElementwiseRule, GroupRule
from .state import compute_dtype, tensor_names

#: Tensors up to this many elements are joined for one call on all: below it a copy of a tensor costs less than a call.
SMALL = {"cpu": 2**14, "cuda": 2**18}
#: The same where a rule is not one call, but one for each of its operations.
SMALL_EAGER = {"cpu": 2**16, "cuda": 2**18}
#: Elements of a chunk: its operations are long beside their dispatch (a GPU's launch takes about as long as moving 2^22
#: numbers), and on a CPU its streams and temporaries fit in cache.
CHUNK = {"cpu": 2**18, "cuda": 2**22}
#: ``auto`` compiles where a step updates this many elements or more; see :func:`run`.
COMPILE_FROM = 2**23
#: A compiled kernel looks at tensors of this many elements or more: below it its call takes longer than it saves.
LONG = 2**16
#: Longest vector of a compiled kernel, which may count with 32 bits on a GPU.
LONGEST = 2**30

_warned = False
Item = TypeVar("Item")


@dataclass
class Piece:
    """What one call updates: vectors (or, in the plain path, whole parameters) of equal size."""

    p: Tensor
    g: Tensor
    grad_scale: float | Tensor
    state: dict[str, Tensor]
    noise: Tensor | None


def run(batches: Sequence[Batch], backend: str, finite: Tensor | None, groups: Sequence[processes.Group] = ()) -> None:
    """Update the parameters and state of element-wise and group rules in place.

    Args:
        batches: Rules and the parameters they run on.
        backend: One of :data:`.BACKENDS`.
        finite: ``None``, or a 0-d boolean tensor: where it is ``False`` nothing may change.
        groups: Process groups that hold other shards of parameters that do not say so themselves.
    """
    backend = _chosen(backend, batches)
    grouped = []
    for batch in batches:
        if issubclass(batch.rule, GroupRule):
            grouped.append(_Grouped(batch.rule, batch, backend, finite))
        elif issubclass(batch.rule, ElementwiseRule):
            for alike in _alike(batch):
                _each(batch.rule.update, alike, {}, backend, finite)
    if grouped:
        _run_groups(grouped, tuple(groups))


def _chosen(backend: str, batches: Sequence[Batch]) -> str:
    """What ``auto`` stands for."""
    if backend != "auto":
        return backend
    size = sum([_size(batch) for batch in batches])
    return "compiled or chunked" if size >= COMPILE_FROM else "chunked"


def _size(batch: Batch) -> float:
    """How many elements there are to update; minus infinity where they cannot be compiled for."""
    size = batch.cache.get("size")
    if size is None:
        size = batch.cache["size"] = _compilable([task.p for task in batch.tasks])
    return size


def _compilable(xs: Sequence[Tensor]) -> float:
    return sum([x.numel() for x in xs]) if all(x.device.type in ("cpu", "cuda") for x in xs) else -math.inf


@dataclass
class Alike:
    """Tasks that one call can take together.

    Args:
        tasks: Those of one precision, device and clock.
        names: Their state tensors of the parameter's own shape.
        packs: What is joined and what is not, by the size up to which tensors are; see :meth:`split`.
    """

    tasks: list[Task]
    names: list[str]
    packs: dict[int, tuple[list[Pack], list[Task]]] = field(default_factory=dict)

    def split(self, small: int) -> tuple[list[Pack], list[Task]]:
        """Tensors of up to ``small`` elements in packs, and the others."""
        if small not in self.packs:
            short = [task for task in self.tasks if task.p.numel() <= small]
            limit = _of(CHUNK, self.tasks[0].p)
            parts = split_by_size(short, [task.p.numel() for task in short], limit)
            joined = [Pack(some, self.names) for some in parts]
            self.packs[small] = joined, [task for task in self.tasks if task.p.numel() > small]
        return self.packs[small]


def _alike(batch: Batch) -> list[Alike]:
    """A batch in parts that one call can take together, without those of which this rank has no element."""
    grad_scales = [task.grad_scale for task in batch.tasks]
    same = not isinstance(grad_scales[0], Tensor) and grad_scales.count(grad_scales[0]) == len(grad_scales)
    if same and "alike" in batch.cache:
        return batch.cache["alike"]
    groups: dict[Any, list[Task]] = {}
    for task in batch.tasks:
        if task.p.numel():
            grad_scale = task.grad_scale if isinstance(task.grad_scale, float) else None
            key = (id(task.scalars), task.p.dtype, task.g.dtype, task.p.device, grad_scale)
            groups.setdefault(key, []).append(task)
    # Parameters of one group can be of several precisions, and then only some have a residual.
    found = [Alike(tasks, _tensor_names(batch, tasks[0])) for tasks in groups.values()]
    if same:
        batch.cache["alike"] = found
    return found


def _tensor_names(batch: Batch, task: Task) -> list[str]:
    return tensor_names(batch.rule, task.parameter, batch.group, task.state)


def _each(
    function: Callable[..., Any],
    alike: Alike,
    coefficients: dict[str, float | Tensor],
    backend: str,
    finite: Tensor | None,
    moves: bool = True,
) -> list[Any]:
    """Call ``function`` on everything in ``alike``; returns what it returned.

    ``moves`` says whether it returns a move, or changes nothing.
    """
    first = alike.tasks[0]
    noisy = moves and first.noise is not None
    finite = None if finite is None or not moves else finite.to(first.p.device)
    scalars = first.scalars | coefficients if coefficients else first.scalars
    compiled = None
    if backend.startswith("compiled"):
        state = {name: first.state[name] for name in alike.names}
        compiled = compile_or_warn(
            partial(compile.runner, function, first.p, first.g, first.grad_scale, finite, state, scalars, noisy, moves),
            backend,
        )
    # Random numbers are eight bytes for each element, which should not leave the cache.
    limit = _of(CHUNK, first.p) if compiled is None or noisy else LONGEST
    small = _of(SMALL_EAGER if compiled is None else SMALL, first.p)
    pieces = _whole(alike, noisy) if backend == "plain" else plan(alike, small, limit, noisy, moves)
    if compiled is not None:
        return [compiled(x.p, x.g, x.grad_scale, x.state, x.noise) for x in pieces]
    return [call(function, x.p, x.g, x.grad_scale, finite, x.state, scalars, x.noise, moves) for x in pieces]


def compile_or_warn(make: Callable[[], Item], backend: str) -> Item | None:
    """What ``make`` compiles; ``None``, after one warning, where that is optional and does not work."""
    global _warned
    if backend != "compiled" and _warned:
        return None
    try:
        return make()
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.200}"
        if backend == "compiled":
            raise RuntimeError(
                f"backend='compiled': compiling the optimizer's step failed ({reason}). A C++ compiler (Triton for "
                "GPUs) is needed; backend='chunked' does without, backend='auto' compiles where that works."
            ) from error
        _warned = True
        warnings.warn(
            f"Compiling the optimizer's step failed ({reason}), so it runs uncompiled, with the same results. A C++ "
            "compiler (Triton for GPUs) is needed; backend='chunked' does without and turns this warning off.",
            stacklevel=2,
        )
        return None


# --- group rules ------------------------------------------------------------------------------------------------


#: Sums over the tensors of a parameter group, apart for each set of processes over which they have to be added up.
Sums = dict[tuple[processes.Group, ...], Tensor]


@dataclass
class _Grouped:
    """The step of a group rule: its sums, then its update."""

    rule: type[GroupRule]
    batch: Batch
    backend: str
    finite: Tensor | None

    def __post_init__(self) -> None:
        self.device = self.batch.tasks[0].p.device

    def sums(self, groups: tuple[processes.Group, ...]) -> Sums:
        """What the rule wants to have added up.

        Args:
            groups: The processes that hold the other parts of parameters that do not say who does.
        """
        apart: dict[tuple[processes.Group, ...], list[Task]] = {}
        for task in self.batch.tasks:
            apart.setdefault(processes.shard_groups(task.parameter) or groups, []).append(task)
        sums = {}
        for key, tasks in apart.items():
            some = self.batch if len(tasks) == len(self.batch.tasks) else replace(self.batch, tasks=tasks, cache={})
            parts = [part for alike in _alike(some) for part in self._call(self.rule.sums, alike, {}, moves=False)]
            if not parts:  # This rank has no element of them, but the others wait for its zeros.
                task = tasks[0]
                state = {name: task.state[name] for name in _tensor_names(self.batch, task)}
                parts = [call(self.rule.sums, task.p, task.g, task.grad_scale, None, state, task.scalars, moves=False)]
            sums[key] = torch.stack([torch.stack([x.to(self.device) for x in column]).sum(0) for column in zip(*parts)])
        return sums

    def update(self, totals: Tensor) -> None:
        """Change the parameters, their state and the group's own."""
        rule, tasks, finite = self.rule, self.batch.tasks, self.finite
        # A parameter that gets its first gradient late joins the group's state, it does not reset it. One that is
        # without a gradient for a while is kept up to date.
        oldest = max(tasks, key=lambda task: task.t)
        old = {name: oldest.state[name].to(self.device) for name in rule.group_state}
        new, coefficients = rule.combine(totals.unbind(), SimpleNamespace(**old), SimpleNamespace(**oldest.scalars))
        for alike in _alike(self.batch):
            device = alike.tasks[0].p.device
            # With numbers, operations need no temporaries; reading them from an accelerator would wait for it.
            known = finite is None and device.type == "cpu"
            local = {name: float(x) if known else x.to(device) for name, x in coefficients.items()}
            self._call(rule.update, alike, local)
        states = [*(task.state for task in tasks), *self.batch.idle]
        for name, value in new.items():
            if finite is not None:
                value = torch.where(finite.to(self.device), value, old[name])
            private.copy_each_([state[name] for state in states], [value] * len(states))

    def _call(
        self, function: Callable[..., Any], alike: Alike, coefficients: dict[str, Any], moves: bool = True
    ) -> list[Any]:
        return _each(function, alike, coefficients, self.backend, self.finite, moves)


def _run_groups(grouped: Sequence[_Grouped], groups: tuple[processes.Group, ...]) -> None:
    sums = [one.sums(groups) for one in grouped]
    totals = [torch.zeros_like(next(iter(each.values()))) for each in sums]
    for key in dict.fromkeys(key for each in sums for key in each):
        members = [i for i, each in enumerate(sums) if key in each]
        device = totals[members[0]].device
        added = processes.all_reduce_sum(torch.cat([sums[i][key].to(device) for i in members]), key)
        for i, part in zip(members, added.split([len(totals[i]) for i in members])):
            totals[i] += part.to(totals[i].device)
    for one, total in zip(grouped, totals):
        one.update(total)


# --- planning ---------------------------------------------------------------------------------------------------


def _whole(alike: Alike, noisy: bool) -> Iterator[Piece]:
    for task in alike.tasks:
        noise = _noise(task, 0, task.p.numel()).view(task.p.shape) if noisy else None
        yield Piece(task.p, task.g, task.grad_scale, {name: task.state[name] for name in alike.names}, noise)


def plan(alike: Alike, small: int, limit: int | None, noisy: bool = False, moves: bool = True) -> Iterator[Piece]:
    """Cut and join tasks that are alike.

    Args:
        alike: Parameters of equal dtype, device and scalars.
        small: Elements up to which tensors are joined.
        limit: Longest vector to make of a tensor that need not be copied; ``None`` for any length.
        noisy: Whether random numbers are needed.
        moves: Whether what had to be copied is written back.
    """
    joined, long = alike.split(small)
    for pack in joined:
        if len(pack.tasks) == 1:
            yield from _slices(pack.tasks[0], alike.names, None, noisy, moves)
            continue
        piece = pack.piece(noisy)
        yield piece
        if moves:
            pack.write_back(piece)
    for task in long:
        yield from _slices(task, alike.names, limit, noisy, moves)


def _of(limits: Mapping[str, int], x: Tensor) -> int:
    """The limit that holds where a tensor lies."""
    return limits.get(x.device.type, limits["cuda"])


def split_by_size(items: Sequence[Item], sizes: Sequence[int], limit: int) -> Iterator[list[Item]]:
    """Split ``items`` into runs whose ``sizes`` add up to at most ``limit``, or that are one item.

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


def _noise(task: Task, start: int, stop: int) -> Tensor:
    assert task.noise is not None
    return stream_positions(task.noise, start, stop, task.p.device)


class Pack:
    """Small tensors that are joined to vectors, each time for parameters and gradients, once and for all for state.

    Args:
        tasks: The parameters.
        names: Their state tensors of the parameter's own shape.
    """

    def __init__(self, tasks: list[Task], names: Sequence[str]) -> None:
        self.tasks, self.names = tasks, names
        self.params = [task.p for task in tasks]
        self.sizes = [p.numel() for p in self.params]
        # State of sharded parameters is part of something else and has to stay where it is.
        self.owns_state = all(task.p is task.parameter for task in tasks)
        self._state: dict[str, Tensor] = {}

    def piece(self, noisy: bool) -> Piece:
        """The vectors."""
        tasks = self.tasks
        p, g = private.flatten(self.params), private.flatten([task.g for task in tasks])
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
        return Piece(p, g, grad_scale, state, joined_positions(firsts, self.sizes, p.device) if noisy else None)

    def write_back(self, piece: Piece) -> None:
        """Copy the vectors back to what they were made of."""
        private.copy_each_(self.params, private.unflatten(piece.p, self.params))
        if not self.owns_state:
            for name in self.names:
                xs = [task.state[name] for task in self.tasks]
                private.copy_each_(xs, private.unflatten(piece.state[name], xs))


def _joined_state(tasks: Sequence[Task], name: str, sizes: Sequence[int]) -> Tensor:
    """A vector of which the state tensors of some tasks are the parts, one after another."""
    xs = [task.state[name] for task in tasks]
    vector = private.base(xs[0])
    if vector is None or not _are_parts(xs, sizes, vector):
        # New, from a checkpoint, or of other parameters than the last time.
        vector = private.flatten(xs)
        for task, part in zip(tasks, private.unflatten(vector, xs)):
            task.state[name] = part
    return vector


def _are_parts(xs: Sequence[Tensor], sizes: Sequence[int], vector: Tensor) -> bool:
    *starts, end = accumulate(sizes, initial=0)
    return vector.shape == (end,) and private.are_views(xs, starts, vector)


def _slices(task: Task, names: Sequence[str], limit: int | None, noisy: bool, moves: bool) -> Iterator[Piece]:
    p, g, n = task.p, task.g, task.p.numel()
    if p.is_contiguous() and g.is_contiguous():
        vectors = [x.view(-1) for x in (p, g, *(task.state[name] for name in names))]
        length = n if limit is None else limit
        for start in range(0, n, length):
            p, g, *state = vectors if length >= n else [x[start : start + length] for x in vectors]
            noise = _noise(task, start, start + p.numel()) if noisy else None
            yield Piece(p, g, task.grad_scale, dict(zip(names, state)), noise)
        return
    # Other strides than the state's: rows are copied, as many as a chunk holds.
    width = n // p.shape[0]
    rows = max(1, _of(CHUNK, p) // width)
    for i in range(0, p.shape[0], rows):
        part, g_part = (x[i : i + rows].reshape(-1).contiguous() for x in (p, g))
        rows_state = {name: task.state[name][i : i + rows].view(-1) for name in names}
        noise = _noise(task, i * width, i * width + len(part)) if noisy else None
        yield Piece(part, g_part, task.grad_scale, rows_state, noise)
        if moves:
            p[i : i + rows].copy_(part.view_as(p[i : i + rows]))


# --- how large is what goes in? -------------------------------------------------------------------------------------


def largest(xs: Sequence[Tensor], backend: str) -> float:
    """The largest absolute value in tensors on the CPU, NaN if they hold one."""
    sizes = [x.numel() for x in xs]
    if sum(sizes) <= SMALL_EAGER["cpu"] and len({x.dtype for x in xs}) == 1 and any(sizes):
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
            # The last first: the step, which begins with the first, then finds those in cache.
            extremes += [peak(x.view(-1)) for x in reversed(some) if x.numel() >= LONG and x.is_contiguous()]
            some = [x for x in some if x.numel() < LONG or not x.is_contiguous()]
        small = [x for x in some if x.numel() <= SMALL["cpu"]]
        rest = [x for x in some if x.numel() > SMALL["cpu"]]
        rest += [private.flatten(pack) for pack in split_by_size(small, [x.numel() for x in small], CHUNK["cpu"])]
        for x in rest:
            extremes += torch.aminmax(x)  # Without a temporary, and in several threads.
        peaks.append(torch.stack(extremes).abs().max().to(compute_dtype(dtype)))
    return float(torch.stack(peaks).max()) if peaks else 0.0
