"""Which part of a tensor each rank holds."""

from __future__ import annotations

import sys
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from ..devices import widest
from . import private
from .collectives import all_reduce_sum
from .groups import ProcessGroup, rank, size

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_DTENSOR = "torch.distributed.tensor"


def is_sharded(x: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a ``DTensor``.

    Nothing is imported to find out, since this takes seconds: where the module is not loaded, there are none.
    """
    return type(x) not in (Tensor, Parameter) and _DTENSOR in sys.modules and isinstance(x, _dtensor_class())


@cache
def _dtensor_class() -> type[DTensor]:
    from torch.distributed.tensor import DTensor

    return DTensor


@dataclass(frozen=True)
class Sharding:
    """A tensor that is sharded along one dimension, as ``torch.chunk`` splits it, over the ranks of a group.

    Args:
        shape: tuple[int, ...] of the whole tensor.
        dim: The sharded dimension.
        group: The process group.
        rank: Number of this process in it.
        ranks: Number of ranks in it.
    """

    shape: tuple[int, ...]
    dim: int
    group: ProcessGroup
    rank: int
    ranks: int

    @property
    def numel(self) -> int:
        """Number of elements of the whole."""
        return torch.Size(self.shape).numel()

    def span(self, rank: int) -> tuple[int, int]:
        """Where the shard of a rank begins and ends in the sharded dimension.

        >>> whole = Sharding((5, 2), 0, None, 0, 4)
        >>> [whole.span(rank) for rank in range(4)]
        [(0, 2), (2, 4), (4, 5), (5, 5)]
        """
        length = self.shape[self.dim]
        step = -(-length // self.ranks)
        return min(rank * step, length), min((rank + 1) * step, length)

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """tuple[int, ...] of the shard of a rank."""
        start, stop = self.span(rank)
        return (*self.shape[: self.dim], stop - start, *self.shape[self.dim + 1 :])

    def shard(self, whole: Tensor, rank: int) -> Tensor:
        """The shard of a rank, a view of the whole."""
        start, stop = self.span(rank)
        return whole.narrow(self.dim, start, stop - start)

    def flat_indices(self, rank: int, device: torch.device) -> Tensor:
        """Indices of the elements of a rank's shard in the flattened whole.

        >>> Sharding((2, 3), 1, None, 0, 2).flat_indices(0, torch.device("cpu"))
        tensor([[0, 1],
                [3, 4]])
        """
        inner = torch.Size(self.shape[self.dim + 1 :]).numel()
        start, stop = self.span(rank)
        rows = torch.arange(0, self.numel, self.shape[self.dim] * inner, device=device)
        return (rows[:, None] + torch.arange(start * inner, stop * inner, device=device)).view(self.local_shape(rank))

    def with_shape(self, shape: tuple[int, ...], dim: int) -> Sharding:
        """A tensor of another shape on the same ranks."""
        return replace(self, shape=shape, dim=dim)


# --- local tensors ------------------------------------------------------------------------------------------------


def local(x: Tensor) -> Tensor:
    """The local shard of a tensor; a tensor that is not sharded itself. Gradients have to be off."""
    return x.to_local() if is_sharded(x) else x


def local_state(p: Tensor, state: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """The state of a parameter with local shards in place of sharded tensors."""
    return {name: local(x) for name, x in state.items()} if is_sharded(p) else state


def local_gradient(p: Tensor) -> Tensor:
    """The local shard of a parameter's gradient, sharded as the parameter is."""
    g = p.grad
    assert g is not None
    if is_sharded(g) and is_sharded(p) and g.placements != p.placements:
        g = g.redistribute(p.device_mesh, p.placements)
    return local(g)


def local_slices(p: Tensor) -> tuple[slice, ...]:
    """Where the local shard stands in the whole parameter."""
    if not is_sharded(p):
        return tuple(slice(0, n) for n in p.shape)
    shape, offset = private.local_shape_and_offset(p)
    return tuple(slice(start, start + n) for start, n in zip(offset, shape))


# --- where the other shards are ------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _mesh_dimensions(
    mesh: Any, placements: tuple[Any, ...], world: ProcessGroup
) -> tuple[tuple[Any, ProcessGroup], ...]:
    """Placement and group of each mesh dimension that has several ranks.

    Meshes of the same ranks are equal, also when ``world`` and their groups with it were destroyed and created again.
    """
    return tuple((placement, mesh.get_group(i)) for i, placement in enumerate(placements) if mesh.size(i) > 1)


def _mesh_dimensions_of(p: Tensor) -> tuple[tuple[Any, ProcessGroup], ...]:
    return _mesh_dimensions(p.device_mesh, p.placements, dist.group.WORLD) if is_sharded(p) else ()


def sharded_dims(p: Tensor) -> tuple[tuple[int, ProcessGroup], ...]:
    """The dimensions along which a parameter is sharded, each with the group that holds the shards."""
    return tuple((placement.dim, group) for placement, group in _mesh_dimensions_of(p) if not placement.is_replicate())


def shard_groups(p: Tensor) -> tuple[ProcessGroup, ...]:
    """The groups that hold the shards of a parameter."""
    return tuple(group for _, group in sharded_dims(p))


def mesh_groups(params: Sequence[Tensor]) -> list[ProcessGroup]:
    """The groups that hold shards or replicas of some parameters."""
    # Nearly all parameters are plain, and each step asks.
    sharded = [p for p in params if type(p) is not Parameter and is_sharded(p)]
    return list(dict.fromkeys([group for p in sharded for _, group in _mesh_dimensions_of(p)]))


def sharding_of(p: Tensor) -> Sharding | None:
    """How a parameter is sharded; ``None`` where this rank has all of it.

    Raises:
        ValueError: It is sharded over more than one dimension of its mesh.
    """
    found = sharded_dims(p)
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(
            f"A parameter of shape {tuple(p.shape)} is sharded over {len(found)} dimensions of its device mesh "
            f"(placements {placements(p)}), and matrix rules take one. Shard hidden matrices over one dimension and "
            "replicate them over the others, as FSDP2 or HSDP alone do, or give them to the fallback rule."
        )
    ((dim, group),) = found
    return Sharding(tuple(p.shape), dim, group, rank(group), size(group))


def refuse_partial(p: Tensor) -> None:
    """Refuse a parameter with the placement ``Partial``.

    Raises:
        ValueError: It has.
    """
    if is_sharded(p) and any(placement.is_partial() for placement in p.placements):
        raise ValueError(
            f"A parameter of shape {tuple(p.shape)} has the placements {p.placements}: each rank holds a summand of "
            "it. Redistribute it to Shard or Replicate."
        )


def flat_offset(p: Tensor) -> int:
    """Number of elements before the local shard in the flattened parameter, where its first dimension is sharded."""
    found = sharded_dims(p)
    if len(found) != 1 or found[0][0] != 0:
        return 0
    sharding = sharding_of(p)
    assert sharding is not None
    return sharding.span(sharding.rank)[0] * (p.numel() // p.shape[0])


def placements(x: Tensor) -> tuple[Any, ...] | None:
    """Placements of a tensor on its device mesh; ``None`` for a plain tensor."""
    return x.placements if is_sharded(x) else None


# --- new tensors ---------------------------------------------------------------------------------------------------


def zeros_like(p: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros of a parameter's shape, sharded as it is."""
    if not is_sharded(p):
        return torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)
    return _dtensor(local(p).new_zeros(local(p).shape, dtype=dtype), p, p.shape, p.placements)


def zeros_of_shape(p: Tensor, shape: tuple[int, ...], dtype: torch.dtype, replicated: bool) -> Tensor:
    """Zeros of any shape that belong to a parameter.

    Args:
        p: The parameter.
        shape: Their shape.
        dtype: Their dtype.
        replicated: Whether every rank has all of them; otherwise dimension 1 is sharded where the parameter is.
    """
    sharding = None if replicated else sharding_of(p)
    if sharding is None:
        return local(p).new_zeros(shape, dtype=dtype)
    sharding = sharding.with_shape(shape, 1)
    return from_local(local(p).new_zeros(sharding.local_shape(sharding.rank), dtype=dtype), p, sharding)


def zeros_of_rows(p: Tensor, shape: tuple[int, ...]) -> Tensor:
    """float32 zeros of the first axes of a parameter's shape and others, sharded as it is along its first axes."""
    if not is_sharded(p):
        return p.new_zeros(shape, dtype=torch.float32)
    axes = len(shape) - 1
    here = local(p).new_zeros((*local(p).shape[:axes], *shape[axes:]), dtype=torch.float32)
    return _dtensor(here, p, shape, p.placements)


def placed_like(x: Tensor, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of which ``x`` is the local shard, sharded as another is; ``x`` itself where that is a plain tensor."""
    return _dtensor(x, like, shape, like.placements) if is_sharded(like) else x


def zeros_on_rank(p: Tensor, shape: tuple[int, ...], dtype: torch.dtype, owner: int) -> Tensor:
    """Zeros of any shape on one of the ranks that hold shards of a parameter, an empty tensor on the others."""
    (group,) = shard_groups(p)
    return local(p).new_zeros(shape if rank(group) == owner else 0, dtype=dtype)


def from_local(shard: Tensor, p: Tensor, sharding: Sharding) -> Tensor:
    """The tensor that is sharded over the ranks of a parameter, of which this rank has a shard."""
    from torch.distributed.tensor import Shard

    assert is_sharded(p)
    placements = tuple(x if x.is_replicate() else Shard(sharding.dim) for x in p.placements)
    return _dtensor(shard, p, sharding.shape, placements)


def _dtensor(shard: Tensor, p: Any, shape: Sequence[int], placements: Sequence[Any]) -> Tensor:
    size = torch.Size(shape)
    stride = torch.empty(size, device="meta").stride()
    return _dtensor_class().from_local(shard, p.device_mesh, placements, run_check=False, shape=size, stride=stride)


def sharded_like(x: Tensor, p: Tensor) -> Tensor:
    """A tensor of which every rank has all, sharded as a parameter is. Nothing is sent."""
    if is_sharded(x) or not is_sharded(p):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None)


# --- sums over shards ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardSums:
    """Adds up what each rank computes from its local shards of some parameters.

    Args:
        groups: Groups over which sums are added; none where each rank has all of every parameter.
        flat: Whether every rank holds a part of every parameter that does not say which part it is (FSDP1).
    """

    groups: tuple[ProcessGroup, ...] = ()
    flat: bool = False

    def counts(self, p: Tensor) -> bool:
        """Whether this rank counts its part of a parameter, so that over all groups each element is counted once."""
        sharded = shard_groups(p)
        return self.flat or all(g in sharded or rank(g) == 0 for g in self.groups)

    def counted(self, params: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Vectors with one entry per parameter, with zeros for those that another rank counts; other tensors as is."""
        if not self.groups:
            return list(tensors)
        counts = [self.counts(p) for p in params]
        return [x * x.new_tensor(counts) if x.shape == (len(counts),) else x for x in tensors]

    def add(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over ranks, in float64 where the device has it, by one all-reduce per group for all tensors."""
        if not self.groups or not tensors:
            return list(tensors)
        device = tensors[0].device
        flat = torch.cat([x.detach().reshape(-1).to(device, widest(device)) for x in tensors])
        all_reduce_sum(flat, self.groups)
        return [part.reshape(x.shape) for part, x in zip(flat.split([x.numel() for x in tensors]), tensors)]
