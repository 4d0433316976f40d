"""State that lives with one process.

Where processes hold parts of a parameter whose rule works on whole tensors, one of them, the parameter's owner, runs
the rule and has all of its state. The others have tensors without elements in the place of it: torch's functions for
checkpoints ask every process for its names. In checkpoints state is in parts, cut as the parameter is, so that any
number of processes can go on from them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .. import processes
from ..processes import Sharding
from .elementwise import packs
from .rule import LIKE_PARAMETER, MatrixRule, Rule
from .state import State, lives_with_owner, state_shapes

#: Elements of state that travel at the same time, which bounds the memory for it.
AT_ONCE = 2**24


@dataclass(frozen=True)
class Resident:
    """A parameter whose state lives with one process."""

    rule: type[Rule]
    group: Mapping[str, Any]
    parameter: Tensor

    @property
    def cut(self) -> Sharding:
        """How the parameter is cut."""
        cut = processes.sharding_of(self.parameter)
        assert cut is not None
        return cut

    @property
    def state_cuts(self) -> dict[str, Sharding]:
        """How each tensor of its state is cut in checkpoints."""
        shapes = state_shapes(self.rule, self.parameter, self.group)
        cut = self.cut
        return {name: cut if shape is LIKE_PARAMETER else cut.with_shape(shape, 1) for name, shape in shapes.items()}


def residents(groups: Iterable[tuple[type[Rule], Mapping[str, Any]]]) -> list[Resident]:
    """The parameters of some groups whose state lives with one process each."""
    matrices = [(rule, group) for rule, group in groups if issubclass(rule, MatrixRule)]
    return [
        Resident(rule, group, p)
        for rule, group in matrices
        for p in group["params"]
        if lives_with_owner(rule, p, group)
    ]


def owners(some: Sequence[Resident], known: Mapping[Tensor, int | None]) -> dict[Tensor, int]:
    """An owner for each parameter: the known one, or whoever has least state, the largest first."""
    found: dict[Tensor, int] = {}
    apart: dict[Any, list[Resident]] = defaultdict(list)
    for r in some:
        apart[r.cut.group].append(r)
    for together in apart.values():
        costs = tuple(float(sum(cut.numel for cut in r.state_cuts.values())) for r in together)
        holders = tuple(known.get(r.parameter) for r in together)
        ranks = processes.assign_owners(costs, holders, together[0].cut.ranks)
        found |= dict(zip((r.parameter for r in together), ranks))
    return found


def bring_home(some: Sequence[Resident], owner: Mapping[Tensor, int], states: Mapping[Tensor, State]) -> None:
    """Send state that is in parts, as it comes from checkpoints, to the owners of the parameters."""
    for wave, cut in _waves(_tensors(some, owner, states, in_parts=True)):
        of = [[x for x in wave if x.owner == rank] for rank in range(cut.ranks)]
        arrived = processes.all_to_all(
            [[x.here for x in each] for each in of],
            [[(x.cut.local_shape(rank), x.here.dtype) for x in of[cut.rank]] for rank in range(cut.ranks)],
            wave[0].here.device,
            cut.group,
        ).wait()
        for x, *parts in zip(of[cut.rank], *arrived):
            x.state[x.name] = torch.cat(parts, x.cut.dim)
        for x in wave:
            if x.owner != cut.rank:
                x.state[x.name] = x.here.new_empty(0)


def in_parts(
    some: Sequence[Resident], owner: Mapping[Tensor, int | None], states: Mapping[Tensor, State]
) -> dict[Tensor, State]:
    """State as checkpoints have it, of those parameters whose state is with their owners, where it also stays."""
    found: dict[Tensor, State] = {}
    for wave, cut in _waves(_tensors(some, owner, states, in_parts=False)):
        of = [[x for x in wave if x.owner == rank] for rank in range(cut.ranks)]
        arrived = processes.all_to_all(
            [[x.cut.shard(x.here, rank) for x in of[cut.rank]] for rank in range(cut.ranks)],
            [[(x.cut.local_shape(cut.rank), x.here.dtype) for x in each] for each in of],
            wave[0].here.device,
            cut.group,
        ).wait()
        for x, part in zip(chain(*of), chain(*arrived)):
            # A copy has a storage of its own, as checkpoints need it.
            found.setdefault(x.parameter, {**x.state})[x.name] = processes.from_local(part.clone(), x.parameter, x.cut)
    return found


@dataclass(frozen=True)
class _StateTensor:
    """One tensor of the state of a parameter."""

    parameter: Tensor
    owner: int
    state: State
    name: str
    cut: Sharding

    @property
    def here(self) -> Tensor:
        """What this process has of it."""
        return processes.local(self.state[self.name])


def _tensors(
    some: Iterable[Resident], owner: Mapping[Tensor, int | None], states: Mapping[Tensor, State], in_parts: bool
) -> Iterator[_StateTensor]:
    """The tensors of the parameters' state that are in parts, or those that are not."""
    for r in some:
        state, home = states.get(r.parameter), owner.get(r.parameter)
        if not state or home is None:
            continue
        for name, cut in r.state_cuts.items():
            if (processes.placements(state[name]) is not None) is in_parts:
                yield _StateTensor(r.parameter, home, state, name, cut)


def _waves(tensors: Iterable[_StateTensor]) -> Iterator[tuple[list[_StateTensor], Sharding]]:
    """Tensors that travel at the same time between the same processes."""
    apart: dict[Any, list[_StateTensor]] = defaultdict(list)
    for x in tensors:
        apart[x.cut.group].append(x)
    for together in apart.values():
        for wave in packs(together, [x.cut.numel for x in together], AT_ONCE):
            yield wave, wave[0].cut
