"""State that one rank keeps for all.

Where ranks hold shards of a parameter whose rule works on whole tensors, one of them, the parameter's owner, runs the
rule and keeps all of its state. The other ranks have empty tensors in its place, because torch's checkpoint functions
ask every rank for its names. In checkpoints this state is sharded as the parameter is, so that a run
can be resumed with any number of ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor

from .. import processes
from ..processes import Sharding
from . import storage
from .elementwise import split_by_size
from .rule import LIKE_PARAMETER, MatrixRule, Rule
from .state import State, has_owner, state_shapes

#: Elements of state that one all-to-all sends, which bounds the memory for it.
MESSAGE_ELEMENTS = 2**24


@dataclass(frozen=True)
class OwnedParameter:
    """A sharded parameter whose state one rank keeps."""

    rule: type[Rule]
    group: Mapping[str, Any]
    parameter: Tensor

    @property
    def sharding(self) -> Sharding:
        """How the parameter is sharded."""
        sharding = processes.sharding_of(self.parameter)
        assert sharding is not None
        return sharding

    @property
    def state_shardings(self) -> dict[str, Sharding]:
        """How each tensor of its state is sharded in checkpoints."""
        shapes = state_shapes(self.rule, self.parameter, self.group)
        own = self.sharding
        return {name: own if shape is LIKE_PARAMETER else own.with_shape(shape, 1) for name, shape in shapes.items()}

    @property
    def scale_sharding(self) -> Sharding:
        """How the scales of state in 8 bits are sharded in checkpoints."""
        shape = tuple(self.parameter.shape)
        axes = storage.row_axes(self.rule, shape, self.group)
        return self.sharding.with_shape(storage.scale_shape(shape, axes))


def owned_parameters(groups: Iterable[tuple[type[Rule], Mapping[str, Any]]]) -> list[OwnedParameter]:
    """The parameters of some groups whose state is kept by one rank each."""
    matrices = [(rule, group) for rule, group in groups if issubclass(rule, MatrixRule)]
    return [
        OwnedParameter(rule, group, p) for rule, group in matrices for p in group["params"] if has_owner(rule, p, group)
    ]


def choose_owners(owned: Sequence[OwnedParameter], known: Mapping[Tensor, int | None]) -> dict[Tensor, int]:
    """The owner of each parameter: the known one, else the rank with the least state so far, largest state first."""
    found: dict[Tensor, int] = {}
    by_group: dict[Any, list[OwnedParameter]] = defaultdict(list)
    for x in owned:
        by_group[x.sharding.group].append(x)
    for together in by_group.values():
        costs = tuple(float(sum(sharding.numel for sharding in x.state_shardings.values())) for x in together)
        holders = tuple(known.get(x.parameter) for x in together)
        ranks = processes.assign_owners(costs, holders, together[0].sharding.ranks)
        found |= dict(zip((x.parameter for x in together), ranks))
    return found


def gather_to_owners(
    owned: Sequence[OwnedParameter], owner: Mapping[Tensor, int], states: Mapping[Tensor, State]
) -> None:
    """Gather sharded state, as it comes from checkpoints, on the owners of the parameters."""
    for message, sharding in _messages(_tensors(owned, owner, states, sharded=True)):
        owned_by = [[x for x in message if x.owner == rank] for rank in range(sharding.ranks)]
        mine = owned_by[sharding.rank]
        received = processes.all_to_all(
            [[x.local for x in theirs] for theirs in owned_by],
            [[(x.sharding.local_shape(rank), x.local.dtype) for x in mine] for rank in range(sharding.ranks)],
            message[0].local.device,
            sharding.group,
        )()
        for x, *shards in zip(mine, *received):
            x.state[x.name] = x.sharding.whole(shards)
        for x in message:
            if x.owner != sharding.rank:
                x.state[x.name] = x.local.new_empty(0)


def sharded_state(
    owned: Sequence[OwnedParameter], owner: Mapping[Tensor, int | None], states: Mapping[Tensor, State]
) -> dict[Tensor, State]:
    """The state of owned parameters as checkpoints hold it: a shard on every rank. The owners keep theirs."""
    found: dict[Tensor, State] = {}
    for message, sharding in _messages(_tensors(owned, owner, states, sharded=False)):
        owned_by = [[x for x in message if x.owner == rank] for rank in range(sharding.ranks)]
        received = processes.all_to_all(
            [[x.sharding.shard(x.local, rank) for x in owned_by[sharding.rank]] for rank in range(sharding.ranks)],
            [[(x.sharding.local_shape(sharding.rank), x.local.dtype) for x in theirs] for theirs in owned_by],
            message[0].local.device,
            sharding.group,
        )()
        for x, shard in zip(chain(*owned_by), chain(*received)):
            # Cloned, because checkpoints need a storage for each tensor.
            whole = processes.from_local(shard.clone(), x.parameter, x.sharding)
            found.setdefault(x.parameter, {**x.state})[x.name] = whole
    return found


@dataclass(frozen=True)
class _StateTensor:
    """One tensor of the state of an owned parameter."""

    parameter: Tensor
    owner: int
    state: State
    name: str
    sharding: Sharding

    @property
    def local(self) -> Tensor:
        """What this rank has of it."""
        return processes.local(self.state[self.name])


def _tensors(
    owned: Iterable[OwnedParameter], owner: Mapping[Tensor, int | None], states: Mapping[Tensor, State], sharded: bool
) -> Iterator[_StateTensor]:
    """The state tensors of parameters that are sharded, or those that their owner has."""
    for x in owned:
        state, rank = states.get(x.parameter), owner.get(x.parameter)
        if not state or rank is None:
            continue
        for name, sharding in x.state_shardings.items():
            if (processes.placements(state[name]) is not None) is sharded:
                yield _StateTensor(x.parameter, rank, state, name, sharding)
                if (scale := storage.scale_name(name)) in state:
                    yield _StateTensor(x.parameter, rank, state, scale, x.scale_sharding)


def _messages(tensors: Iterable[_StateTensor]) -> Iterator[tuple[list[_StateTensor], Sharding]]:
    """The tensors that one all-to-all sends, and a sharding with its process group."""
    by_group: dict[Any, list[_StateTensor]] = defaultdict(list)
    for x in tensors:
        by_group[x.sharding.group].append(x)
    for together in by_group.values():
        for message in split_by_size(together, [x.sharding.numel for x in together], MESSAGE_ELEMENTS):
            yield message, message[0].sharding
