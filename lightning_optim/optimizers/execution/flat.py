"""Element-wise and group rules: which elements run together, and the loop over them.

An element-wise rule does not care where a tensor ends, so the parameters of a group are cut and joined at will:

- ``plain``: every parameter alone, as it is: the reference.
- ``chunked``: small tensors joined to vectors, large ones cut into views that stay in cache with their temporaries.
- ``compiled``: small tensors joined, large ones whole, since a compiled kernel has no temporaries.

:func:`plan` makes the cuts; it yields one :class:`Work` at a time and writes back what had to be copied before it goes
on to the next, so that copies never exceed one chunk.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..rule import GroupRule, Rule
from . import kernels, sharding
from .call import call
from .storage import joined_numbers, numbers
from .tensors import Batch, Task, number_names

#: Tensors up to this many elements are joined: below it a copy of a tensor costs less than an operation on it.
SMALL = 2**14
#: Elements of a chunk: its streams and temporaries fit in cache, and its operations are long beside their dispatch.
CHUNK = 2**18
#: ``auto`` compiles where a step updates this many elements or more; see :func:`run`.
COMPILE_FROM = 2**23
#: Longest vector of a compiled kernel, which may count with 32 bits on a GPU.
LONGEST = 2**30

_warned = False
Item = TypeVar("Item")


@dataclass
class Work:
    """What one call updates: vectors (or, in the plain path, whole parameters) of equal size."""

    p: Tensor
    g: Tensor
    gain: float | Tensor
    state: dict[str, Tensor]
    noise: Tensor | None


def run(batches: Sequence[Batch], backend: str, finite: Tensor | None, groups: Sequence[sharding.Group] = ()) -> None:
    """Update the parameters and state of element-wise and group rules in place.

    Args:
        batches: Rules and the parameters they run on.
        backend: One of :data:`.BACKENDS`.
        finite: ``None``, or a 0-d boolean tensor: where it is ``False`` nothing may change.
        groups: Processes that hold other parts of parameters without saying so.
    """
    if backend == "auto":
        elements = sum(task.p.numel() for batch in batches for task in batch.tasks)
        compilable = all(task.p.device.type in ("cpu", "cuda") for batch in batches for task in batch.tasks)
        backend = "compiled or chunked" if compilable and elements >= COMPILE_FROM else "chunked"
    for batch in batches:
        if not isinstance(batch.rule, GroupRule):
            for tasks in _alike(batch.tasks):
                names = _state_names(batch.rule, tasks)
                _each(batch.rule.update, tasks, names, {}, backend, finite)
    grouped = [_Grouped(batch.rule, batch, backend, finite) for batch in batches if isinstance(batch.rule, GroupRule)]
    _run_groups(grouped, tuple(groups))


def _state_names(rule: Rule, tasks: Sequence[Task]) -> list[str]:
    return [name for name in tasks[0].state if name not in number_names(rule)]


def _alike(tasks: Iterable[Task]) -> list[list[Task]]:
    """Split into tasks that one call can take together, leaving out what this process has no element of."""
    groups: dict[Any, list[Task]] = {}
    for task in tasks:
        if not task.p.numel():
            continue
        gain = task.gain if isinstance(task.gain, float) else None
        key = (id(task.scalars), task.p.dtype, task.g.dtype, task.p.device, gain)
        groups.setdefault(key, []).append(task)
    return list(groups.values())


def _each(
    function: Callable[..., Any],
    tasks: Sequence[Task],
    names: Sequence[str],
    coefficients: dict[str, Tensor],
    backend: str,
    finite: Tensor | None,
    takes_gradient: bool = True,
    moves: bool = True,
    longest: int | None = None,
) -> list[Any]:
    """Call ``function`` on everything in ``tasks``, which are alike; returns what it returned.

    ``moves`` says whether it changes the parameters, too. ``longest`` bounds the vectors of a compiled function, which
    otherwise takes tensors whole.
    """
    noisy = moves and tasks[0].noise is not None
    finite = None if finite is None else finite.to(tasks[0].p.device)
    scalars = tasks[0].scalars | coefficients
    compiled = None
    if backend.startswith("compiled"):
        compiled = _compile(function, tasks[0], names, scalars, finite, backend, takes_gradient, noisy, moves)
    if compiled is None:
        go: kernels.Runner = lambda p, g, gain, state, noise: call(  # noqa: E731
            function, p, g, gain, finite, state, scalars, noise, moves
        )
    else:
        go = compiled
    # Random numbers are eight bytes for each element, which should not leave the cache.
    limit = CHUNK if compiled is None or noisy else longest or LONGEST
    works = _whole(tasks, names, noisy) if backend == "plain" else plan(tasks, names, limit, noisy)
    return [go(work.p, work.g if takes_gradient else None, work.gain, work.state, work.noise) for work in works]


def _compile(
    function: Callable[..., Any],
    task: Task,
    names: Sequence[str],
    scalars: dict[str, Any],
    finite: Tensor | None,
    backend: str,
    takes_gradient: bool,
    noisy: bool,
    moves: bool,
) -> kernels.Runner | None:
    """A compiled runner; ``None``, after one warning, where it is optional and cannot be had."""
    global _warned
    state = {name: task.state[name] for name in names}
    make = partial(
        kernels.runner, function, task.p, task.g if takes_gradient else None, task.gain, finite, state, scalars,
        noisy, moves,
    )  # fmt: skip
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


@cache
def _then_sum(update: Callable[..., None], sums: Callable[..., Any]) -> Callable[..., Any]:
    def update_and_sum(p: Tensor, g: Tensor, **kwargs: Any) -> Any:
        update(p, g, **kwargs)
        return sums(**kwargs)

    return update_and_sum


#: Sums over the tensors of a parameter group, apart for each set of processes over which they have to be added up.
Sums = dict[tuple[sharding.Group, ...], Tensor]


@dataclass
class _Grouped:
    """The step of a group rule, which is in two halves."""

    rule: GroupRule
    batch: Batch
    backend: str
    finite: Tensor | None

    def __post_init__(self) -> None:
        self.device = self.batch.tasks[0].p.device

    def update(self, groups: tuple[sharding.Group, ...]) -> Sums:
        """Change the state; returns what the rule wants to have added up.

        Args:
            groups: The processes that hold the other parts of parameters that do not say who does.
        """
        update = _then_sum(self.rule.update, self.rule.sums)
        apart: dict[tuple[sharding.Group, ...], list[Task]] = {}
        for task in self.batch.tasks:
            apart.setdefault(sharding.groups(task.parameter) or groups, []).append(task)
        sums = {}
        for key, tasks in apart.items():
            # Inductor makes one loop of the update and one of the sums: the second should find the vectors in cache.
            parts = [
                part for some in _alike(tasks) for part in self._call(update, some, {}, moves=False, longest=CHUNK)
            ]
            if not parts:  # This process has no element of them, but the others wait for its zeros.
                task = tasks[0]
                names = _state_names(self.rule, tasks)
                parts = [self.rule.sums(**{name: task.state[name] for name in names}, **task.scalars)]
            sums[key] = torch.stack([torch.stack([x.to(self.device) for x in column]).sum(0) for column in zip(*parts)])
        return sums

    def finish(self, totals: Tensor) -> None:
        """Change the parameters and the group's own state."""
        rule, tasks, finite = self.rule, self.batch.tasks, self.finite
        # A parameter that gets its first gradient late joins the group's state, it does not reset it. One that is
        # without a gradient for a while is kept up to date.
        oldest = max(tasks, key=lambda task: task.t)
        old = {name: oldest.state[name].to(self.device) for name in rule.group_state}
        new, coefficients = rule.combine(*totals.unbind(), **old, **oldest.scalars)
        for some in _alike(tasks):
            local = {name: x.to(some[0].p.device) for name, x in coefficients.items()}
            self._call(rule.finish, some, local, takes_gradient=False)
        states = [*(task.state for task in tasks), *self.batch.idle]
        for name, value in new.items():
            if finite is not None:
                value = torch.where(finite.to(self.device), value, old[name])
            torch._foreach_copy_([state[name] for state in states], [value] * len(states))

    def _call(
        self, function: Callable[..., Any], tasks: list[Task], coefficients: dict[str, Tensor], **options: Any
    ) -> list[Any]:
        # Parameters of one group can be of several precisions, and then only some have a residual.
        names = _state_names(self.rule, tasks)
        return _each(function, tasks, names, coefficients, self.backend, self.finite, **options)


def _run_groups(grouped: Sequence[_Grouped], groups: tuple[sharding.Group, ...]) -> None:
    sums = [one.update(groups) for one in grouped]
    totals = [torch.zeros_like(next(iter(each.values()))) for each in sums]
    for key in dict.fromkeys(key for each in sums for key in each):
        members = [i for i, each in enumerate(sums) if key in each]
        device = totals[members[0]].device
        added = sharding.total(torch.cat([sums[i][key].to(device) for i in members]), key)
        for i, part in zip(members, added.split([len(totals[i]) for i in members])):
            totals[i] += part.to(totals[i].device)
    for one, total in zip(grouped, totals):
        one.finish(total)


# --- planning ---------------------------------------------------------------------------------------------------


def _whole(tasks: Iterable[Task], names: Sequence[str], noisy: bool) -> Iterator[Work]:
    for task in tasks:
        noise = _noise(task, 0, task.p.numel()).view(task.p.shape) if noisy else None
        yield Work(task.p, task.g, task.gain, {name: task.state[name] for name in names}, noise)


def plan(tasks: Sequence[Task], names: Sequence[str], limit: int | None, noisy: bool = False) -> Iterator[Work]:
    """Cut and join ``tasks``, which are alike.

    Args:
        tasks: Parameters of equal dtype, device and scalars.
        names: Their state tensors of the parameter's own shape.
        limit: Longest vector to make of a tensor that need not be copied; ``None`` for any length.
        noisy: Whether random numbers are needed.
    """
    small = [task for task in tasks if task.p.numel() <= SMALL]
    for pack in packs(small, [task.p.numel() for task in small]):
        yield from _joined(pack, names, noisy)
    for task in tasks:
        if task.p.numel() > SMALL:
            yield from _slices(task, names, limit, noisy)


def packs(items: Sequence[Item], sizes: Sequence[int], limit: int = CHUNK) -> Iterator[list[Item]]:
    """Split ``items`` into runs whose ``sizes`` add up to at most ``limit``, or that are one item.

    >>> list(packs(["a", "b", "c"], [2**17, 2**17, 1]))
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


def vector(x: Tensor) -> Tensor:
    """The elements of ``x`` in logical order: a view if there is one."""
    return x if x.ndim == 1 else x.reshape(-1)


def _noise(task: Task, start: int, stop: int) -> Tensor:
    assert task.noise is not None
    return numbers(task.noise, start, stop, task.p.device)


def _joined(tasks: Sequence[Task], names: Sequence[str], noisy: bool) -> Iterator[Work]:
    if len(tasks) == 1:
        yield from _slices(tasks[0], names, None, noisy)
        return
    columns = [[task.p for task in tasks], *([task.state[name] for task in tasks] for name in names)]
    vectors = [[vector(x) for x in xs] for xs in columns]
    p, *state = (torch.cat(xs) for xs in vectors)
    g = torch.cat([vector(task.g) for task in tasks])
    gain = tasks[0].gain
    sizes = [task.p.numel() for task in tasks]
    if isinstance(gain, Tensor):
        gains = torch.cat([task.gain.expand(n) for task, n in zip(tasks, sizes)])  # type: ignore[union-attr]
        g, gain = g.mul_(gains), torch.ones_like(gain)  # In place: a kernel is for the dtype of the gradients.
    firsts = [task.noise for task in tasks if task.noise is not None]
    noise = joined_numbers(firsts, sizes, p.device) if noisy else None
    yield Work(p, g, gain, dict(zip(names, state)), noise)
    for xs, views, joined in zip(columns, vectors, (p, *state)):
        parts = joined.split(sizes)
        if all(x.is_contiguous() for x in xs):
            torch._foreach_copy_(views, parts)
        else:
            torch._foreach_copy_(xs, [part.view(x.shape) for part, x in zip(parts, xs)])


def _slices(task: Task, names: Sequence[str], limit: int | None, noisy: bool) -> Iterator[Work]:
    p, g, n = task.p, task.g, task.p.numel()
    if p.is_contiguous() and g.is_contiguous():
        vectors = [x.view(-1) for x in (p, g, *(task.state[name] for name in names))]
        length = n if limit is None else limit
        for start in range(0, n, length):
            p, g, *state = vectors if length >= n else [x[start : start + length] for x in vectors]
            noise = _noise(task, start, start + p.numel()) if noisy else None
            yield Work(p, g, task.gain, dict(zip(names, state)), noise)
        return
    # Other strides than the state's: rows are copied, as many as a chunk holds.
    width = n // p.shape[0]
    rows = max(1, CHUNK // width)
    for i in range(0, p.shape[0], rows):
        part, g_part = (x[i : i + rows].reshape(-1).contiguous() for x in (p, g))
        rows_state = {name: task.state[name][i : i + rows].view(-1) for name in names}
        noise = _noise(task, i * width, i * width + len(part)) if noisy else None
        yield Work(part, g_part, task.gain, rows_state, noise)
        p[i : i + rows].copy_(part.view_as(p[i : i + rows]))
