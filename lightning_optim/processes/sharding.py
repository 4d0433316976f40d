"""Which part of a tensor each rank holds."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from itertools import product
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
    """A tensor that is sharded over the ranks of a group, each of which holds a box of it: a range along each axis.

    Args:
        shape: Shape of the whole tensor.
        placements: Its placements on its device mesh.
        group: All ranks that hold shards: those of a mesh dimension, or of several where several shard the tensor.
        rank: Number of this process in it.
        ranks: Number of ranks in it.
        mesh: Sizes of the mesh dimensions that shard it, by number.
        coordinates: For each rank, its place in each of these dimensions.
    """

    shape: tuple[int, ...]
    placements: tuple[Any, ...]
    group: ProcessGroup
    rank: int
    ranks: int
    mesh: Mapping[int, int]
    coordinates: tuple[tuple[int, ...], ...]

    @property
    def numel(self) -> int:
        """Number of elements of the whole."""
        return torch.Size(self.shape).numel()

    @property
    def dims(self) -> tuple[int, ...]:
        """For each of the mesh dimensions, the axis that it shards."""
        return tuple(self.placements[i].dim for i in self.mesh)

    @property
    def by_rows(self) -> bool:
        """Whether every rank holds whole rows."""
        return set(self.dims) == {0}

    @cached_property
    def boxes(self) -> tuple[tuple[slice, ...], ...]:
        """What each rank holds."""
        sizes, dims = list(self.mesh.values()), self.dims
        order = order_of_cuts(self.shape, [self.placements[i] for i in self.mesh], sizes)
        boxes = []
        for coordinate in self.coordinates:
            box = [slice(0, length) for length in self.shape]
            for i in order:
                part = box[dims[i]]
                step = -(-(part.stop - part.start) // sizes[i])
                start, stop = (min(part.start + (coordinate[i] + j) * step, part.stop) for j in (0, 1))
                box[dims[i]] = slice(start, stop)
            boxes.append(tuple(box))
        return tuple(boxes)

    @cached_property
    def in_order(self) -> list[int]:
        """The ranks, those with the first rows first."""
        return sorted(range(self.ranks), key=self.rows)

    def rows(self, rank: int) -> tuple[int, int]:
        """Where the shard of a rank begins and ends along the first axis."""
        first = self.boxes[rank][0]
        return first.start, first.stop

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of the shard of a rank."""
        return tuple(x.stop - x.start for x in self.boxes[rank])

    def shard(self, whole: Tensor, rank: int) -> Tensor:
        """The shard of a rank, a view of the whole."""
        return whole[self.boxes[rank]]

    def whole(self, shards: Sequence[Tensor]) -> Tensor:
        """The whole of the shards of all ranks."""
        if len(self.mesh) == 1:
            return torch.cat(list(shards), self.dims[0])
        whole = shards[0].new_empty(self.shape)
        for box, shard in zip(self.boxes, shards):
            whole[box].copy_(shard)
        return whole

    def flat_indices(self, rank: int, device: torch.device) -> Tensor:
        """Indices of the elements of a rank's shard in the flattened whole."""
        found = torch.zeros((), dtype=torch.int64, device=device)
        for length, part in zip(self.shape, self.boxes[rank]):
            found = found[..., None] * length + torch.arange(part.start, part.stop, device=device)
        return found

    def with_shape(self, shape: tuple[int, ...], dim: int | None = None) -> Sharding:
        """A tensor of another shape on the same ranks, sharded along the same axes or along another one only."""
        if dim is None:
            return replace(self, shape=shape)
        from torch.distributed.tensor import Shard

        placements = tuple(x if x.is_replicate() else Shard(dim) for x in self.placements)
        return replace(self, shape=shape, placements=placements)


def order_of_cuts(shape: tuple[int, ...], cuts: Sequence[Any], mesh: Sequence[int]) -> list[int]:
    """The order in which dimensions of a mesh cut a tensor, each the parts of those before, as ``torch.chunk`` does.

    That is from left to right. FSDP2 cuts what tensor or expert parallelism has left of a tensor on a rank, and stands
    to the left of them: its placement, ``_StridedShard``, says into how many parts the dimensions to its right have cut
    the axis before.

    Raises:
        ValueError: It says another number, so that shards are not ranges.
    """
    strided = {i: factor for i, placement in enumerate(cuts) if (factor := private.split_factor(placement)) is not None}
    for i, factor in strided.items():
        if factor != math.prod(mesh[j] for j in range(i + 1, len(cuts)) if cuts[j].dim == cuts[i].dim):
            raise ValueError(
                f"A parameter of shape {tuple(shape)} has the placements {tuple(cuts)} on mesh dimensions of sizes "
                f"{tuple(mesh)}, with which ranks hold several pieces along an axis. Shard it as FSDP2 does, or give "
                "it to the fallback rule."
            )
    return [i for i in range(len(cuts)) if i not in strided] + sorted(strided, reverse=True)


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
    sharding = sharding_of(p)
    return tuple(slice(0, n) for n in p.shape) if sharding is None else sharding.boxes[sharding.rank]


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

    Where several dimensions of a mesh shard it, the ranks of these have to ask for it at the same time when they do so
    first: a group of all of them is made.

    Raises:
        ValueError: Ranks hold several pieces of it along an axis.
    """
    if not sharded_dims(p):
        return None
    assert is_sharded(p)
    return _sharding(tuple(p.shape), p.device_mesh, p.placements, dist.group.WORLD)


@lru_cache(maxsize=4096)
def _sharding(shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...], world: ProcessGroup) -> Sharding:
    sizes = {i: mesh.size(i) for i, x in enumerate(placements) if mesh.size(i) > 1 and not x.is_replicate()}
    places = list(product(*map(range, sizes.values())))
    if len(sizes) == 1:
        (group,) = map(mesh.get_group, sizes)
    else:
        here = mesh.get_coordinate()
        part = mesh.mesh[tuple(slice(None) if i in sizes else here[i] for i in range(mesh.ndim))]
        place = {int(part[index]): index for index in places}
        places = [place[i] for i in sorted(place)]
        group = _group_of(tuple(sorted(place)), world)
    return Sharding(shape, placements, group, rank(group), size(group), sizes, tuple(places))


@lru_cache(maxsize=1024)
def _group_of(ranks: tuple[int, ...], world: ProcessGroup) -> ProcessGroup:
    if len(ranks) == size(world):
        return world
    return dist.new_group(list(ranks), use_local_synchronization=True)


def refuse_unknown(p: Tensor) -> None:
    """Refuse a parameter of which it is not known which part this rank has.

    Raises:
        ValueError: It is such a one.
    """
    sharding = sharding_of(p)
    if sharding is not None and (here := local(p.detach()).shape) != sharding.local_shape(sharding.rank):
        raise ValueError(
            f"A parameter of shape {tuple(p.shape)} with the placements {placements(p)} has a shard of shape "
            f"{tuple(here)} here instead of {sharding.local_shape(sharding.rank)}. Shard it as FSDP2 does, or give it "
            "to the fallback rule."
        )


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
    """Number of elements before the local shard in the flattened parameter, where only its first axis is sharded."""
    if {dim for dim, _ in sharded_dims(p)} != {0}:
        return 0
    return local_slices(p)[0].start * (p.numel() // p.shape[0])


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
    sharding = sharding_of(p)
    return local(p).new_zeros(shape if sharding is None or sharding.rank == owner else 0, dtype=dtype)


def from_local(shard: Tensor, p: Tensor, sharding: Sharding) -> Tensor:
    """The tensor that is sharded over the ranks of a parameter, of which this rank has a shard."""
    return _dtensor(shard, p, sharding.shape, sharding.placements)


def _dtensor(shard: Tensor, p: Any, shape: Sequence[int], placements: Sequence[Any]) -> Tensor:
    size = torch.Size(shape)
    stride = torch.empty(size, device="meta").stride()
    return _dtensor_class().from_local(shard, p.device_mesh, placements, run_check=False, shape=size, stride=stride)


def sharded_like(x: Tensor, p: Tensor) -> Tensor:
    """A tensor of which every rank has all, sharded as a parameter is. Nothing is sent."""
    if is_sharded(x) or not is_sharded(p):
        return x
    return _dtensor(x[local_slices(p)].clone(), p, p.shape, p.placements)


# --- sums over shards ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardSums:
    """Adds up what each rank computes from its local shards of some parameters.

    Args:
        groups: The groups that hold shards; none where each rank has all of every parameter.
        flat: Whether every rank holds a part of every parameter that does not say which part it is (FSDP1).
    """

    groups: tuple[ProcessGroup, ...] = ()
    flat: bool = False

    def add(self, tensors: Sequence[Tensor], parameters: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Sums over the ranks that hold shards of a parameter, in float64 where the device has it.

        What is computed from a parameter of which this rank has all is such a sum already. There is one all-reduce per
        group for all tensors.

        Args:
            tensors: What this rank has computed.
            parameters: For each tensor, the parameter from which it was computed, or one for each entry.
        """
        if not self.groups or not tensors:
            return list(tensors)
        device = tensors[0].device
        flat = torch.cat([x.detach().reshape(-1).to(device, widest(device)) for x in tensors])
        for group in self.groups:
            sharded = [
                torch.tensor([self.flat or group in shard_groups(p) for p in some]).repeat_interleave(
                    x.numel() // len(some)
                )
                for x, some in zip(tensors, parameters)
            ]
            if (which := torch.cat(sharded)).all():
                all_reduce_sum(flat, [group])
            elif which.any():
                indices = which.nonzero().flatten().to(device)
                flat[indices] = all_reduce_sum(flat[indices], [group])
        return [part.reshape(x.shape) for part, x in zip(flat.split([x.numel() for x in tensors]), tensors)]
