"""Parameters spread over processes: who has which part, and how tensors get from one process to another.

The only module that knows of ``DTensor`` and of process groups. Everything else works on local tensors: what this
process holds of a parameter, all of it or some rows, is a plain tensor that updates can be made to in place.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available():
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor
else:
    DTensor = Shard = ()  # type: ignore[assignment, misc]

Group = Any  # torch.distributed.ProcessGroup, a name that builds without torch.distributed lack
Shape = tuple[int, ...]
#: What a tensor that is to arrive looks like.
Kind = tuple[Shape, torch.dtype]

#: Bytes that this process has sent since it started, by operation. Of an all-reduce, what a ring sends.
sent: Counter[str] = Counter()


# --- which part is here -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sharding:
    """A tensor that is cut along one axis, as ``torch.chunk`` does, over the processes of a group.

    Args:
        shape: Shape of the whole.
        axis: Which axis is cut.
        group: The process group.
        rank: Number of this process in it.
        processes: How many there are.
    """

    shape: Shape
    axis: int
    group: Group
    rank: int
    processes: int

    @property
    def elements(self) -> int:
        """How many elements the whole has."""
        return torch.Size(self.shape).numel()

    def span(self, rank: int) -> tuple[int, int]:
        """Where the part of a process begins and ends.

        >>> whole = Sharding((5, 2), 0, None, 0, 4)
        >>> [whole.span(rank) for rank in range(4)]
        [(0, 2), (2, 4), (4, 5), (5, 5)]
        """
        length = self.shape[self.axis]
        step = -(-length // self.processes)
        return min(rank * step, length), min((rank + 1) * step, length)

    def part(self, rank: int) -> Shape:
        """Shape of the part of a process."""
        start, stop = self.span(rank)
        return (*self.shape[: self.axis], stop - start, *self.shape[self.axis + 1 :])

    def take(self, whole: Tensor, rank: int) -> Tensor:
        """The part of a process."""
        start, stop = self.span(rank)
        return whole.narrow(self.axis, start, stop - start)

    def positions(self, rank: int, device: torch.device) -> Tensor:
        """Where the elements of the part of a process stand among those of the whole.

        >>> Sharding((2, 3), 1, None, 0, 2).positions(0, torch.device("cpu"))
        tensor([[0, 1],
                [3, 4]])
        """
        inner = torch.Size(self.shape[self.axis + 1 :]).numel()
        start, stop = self.span(rank)
        rows = torch.arange(0, self.elements, self.shape[self.axis] * inner, device=device)
        return (rows[:, None] + torch.arange(start * inner, stop * inner, device=device)).view(self.part(rank))

    def of(self, shape: Shape, axis: int) -> Sharding:
        """The same processes with a tensor of another shape."""
        return replace(self, shape=shape, axis=axis)


def local(x: Tensor) -> Tensor:
    """What this process holds of a tensor. Gradients have to be off."""
    return x.to_local() if isinstance(x, DTensor) else x


def local_state(p: Tensor, state: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """What this process holds of a parameter's state."""
    return {name: local(x) for name, x in state.items()} if isinstance(p, DTensor) else state


def gradient(p: Tensor) -> Tensor:
    """What this process holds of a parameter's gradient, cut up as the parameter is."""
    g = p.grad
    assert g is not None
    if isinstance(g, DTensor) and isinstance(p, DTensor) and g.placements != p.placements:
        g = g.redistribute(p.device_mesh, p.placements)
    return local(g)


@lru_cache(maxsize=1024)
def _dimensions(mesh: Any, placements: tuple[Any, ...], world: Group) -> tuple[tuple[Any, Group], ...]:
    """How tensors are placed on the dimensions of a mesh that have several processes, and which those are.

    Meshes of the same processes are equal, also when ``world`` was destroyed and made anew, and their groups with it.
    """
    return tuple((placed, mesh.get_group(i)) for i, placed in enumerate(placements) if mesh.size(i) > 1)


def _placed(p: Tensor) -> tuple[tuple[Any, Group], ...]:
    return _dimensions(p.device_mesh, p.placements, dist.group.WORLD) if isinstance(p, DTensor) else ()


def cuts(p: Tensor) -> tuple[tuple[int, Group], ...]:
    """The axes along which a parameter is cut, and over which processes."""
    return tuple((placed.dim, group) for placed, group in _placed(p) if not placed.is_replicate())


def groups(p: Tensor) -> tuple[Group, ...]:
    """The process groups that hold the other parts of a parameter."""
    return tuple(group for _, group in cuts(p))


def peers(params: Sequence[Tensor]) -> list[Group]:
    """The process groups that hold other parts or copies of some parameters."""
    return list(dict.fromkeys([group for p in params if isinstance(p, DTensor) for _, group in _placed(p)]))


def sharding(p: Tensor) -> Sharding | None:
    """How a parameter is cut; ``None`` where this process has all of it.

    Raises:
        ValueError: It is cut along more than one dimension of its mesh.
    """
    found = cuts(p)
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(
            f"A parameter of shape {tuple(p.shape)} is sharded over {len(found)} dimensions of its device mesh "
            f"(placements {p.placements}), and matrix rules take one. Shard hidden matrices over one dimension and "  # type: ignore[attr-defined]
            "replicate them over the others, as FSDP2 or HSDP alone do, or give them to the fallback rule."
        )
    ((axis, group),) = found
    return Sharding(tuple(p.shape), axis, group, dist.get_rank(group), dist.get_world_size(group))


def check(p: Tensor) -> None:
    """Refuse a parameter of which every process has a summand.

    Raises:
        ValueError: It is one.
    """
    if isinstance(p, DTensor) and any(placed.is_partial() for placed in p.placements):
        raise ValueError(
            f"A parameter of shape {tuple(p.shape)} has the placements {p.placements}: each process holds a summand of "
            "it. Redistribute it to Shard or Replicate."
        )


def offset(p: Tensor) -> int:
    """How many elements of a parameter come before what this process holds, where it is cut along the first axis."""
    found = cuts(p)
    if len(found) != 1 or found[0][0] != 0:
        return 0
    cut = sharding(p)
    assert cut is not None
    return cut.span(cut.rank)[0] * (p.numel() // p.shape[0])


def zeros(p: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros of a parameter's shape, cut up as it is."""
    if not isinstance(p, DTensor):
        return torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)
    return _spread(local(p).new_zeros(local(p).shape, dtype=dtype), p, p.shape, p.placements)


def zeros_beside(p: Tensor, shape: Shape, dtype: torch.dtype, whole: bool) -> Tensor:
    """Zeros of any shape.

    Args:
        p: The parameter they belong to.
        shape: Their shape.
        dtype: Their type.
        whole: Whether every process has all of them; otherwise they are cut along axis 1 where the parameter is cut.
    """
    cut = None if whole else sharding(p)
    if cut is None:
        return local(p).new_zeros(shape, dtype=dtype)
    cut = cut.of(shape, 1)
    return joined(local(p).new_zeros(cut.part(cut.rank), dtype=dtype), p, cut)


def zeros_with_owner(p: Tensor, shape: Shape, dtype: torch.dtype, owner: int) -> Tensor:
    """Zeros of any shape on one of the processes that hold parts of a parameter, nothing on the others."""
    (group,) = groups(p)
    return local(p).new_zeros(shape if rank(group) == owner else 0, dtype=dtype)


def joined(part: Tensor, p: Tensor, cut: Sharding) -> Tensor:
    """The whole that is cut over the processes of a parameter, of which this process has a part."""
    assert isinstance(p, DTensor)
    placements = tuple(placed if placed.is_replicate() else Shard(cut.axis) for placed in p.placements)
    return _spread(part, p, cut.shape, placements)


def _spread(part: Tensor, p: Any, shape: Sequence[int], placements: Sequence[Any]) -> Tensor:
    size = torch.Size(shape)
    stride = torch.empty(size, device="meta").stride()
    return DTensor.from_local(part, p.device_mesh, placements, run_check=False, shape=size, stride=stride)


def placements(x: Tensor) -> tuple[Any, ...] | None:
    """How a tensor lies on its mesh; ``None`` for one that this process has for itself."""
    return x.placements if isinstance(x, DTensor) else None


def placed(x: Tensor, like: Tensor) -> Tensor:
    """A tensor cut up as another is; of one that is not, every process has all. Nothing is sent."""
    if isinstance(x, DTensor) or not isinstance(like, DTensor):
        return x
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


def rank(group: Group) -> int:
    """The number of this process in a group."""
    return dist.get_rank(group)


def size(group: Group) -> int:
    """How many processes a group has."""
    return dist.get_world_size(group)


def several(group: Group | None) -> tuple[Group, ...]:
    """The group, if there is one and it has other processes than this."""
    return (group,) if group is not None and size(group) > 1 else ()


# --- work for each process ----------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def owners(costs: tuple[float, ...], holders: tuple[int | None, ...], processes: int) -> tuple[int, ...]:
    """Who works on what: everybody on what they hold all of, the rest to whoever has least to do, largest first.

    Args:
        costs: The cost of each piece of work.
        holders: For each, the process that holds all of what it needs, if there is one.
        processes: How many processes there are.

    Example:
        >>> owners((1.0, 4.0, 2.0, 1.0, 9.0), (None, None, None, None, 1), 3)
        (2, 0, 2, 2, 1)
    """
    result = [-1 if holder is None else holder for holder in holders]
    loads = [0.0] * processes
    for cost, owner in zip(costs, result):
        if owner >= 0:
            loads[owner] += cost
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        if result[i] < 0:
            load, rank = heap[0]
            heapq.heapreplace(heap, (load + costs[i], rank))
            result[i] = rank
    return tuple(result)


# --- between processes ---------------------------------------------------------------------------------------------


def largest(x: Tensor, groups: Sequence[Group]) -> Tensor:
    """The element-wise maximum of a tensor, which holds no NaN, over the processes of some groups; in place."""
    return _reduce(x, groups, dist.ReduceOp.MAX) if groups else x


def total(x: Tensor, groups: Sequence[Group]) -> Tensor:
    """The sum of a tensor over the processes of some groups; in place."""
    return _reduce(x, groups, dist.ReduceOp.SUM) if groups else x


def _reduce(x: Tensor, groups: Sequence[Group], operation: Any) -> Tensor:
    for group in groups:
        dist.all_reduce(x, operation, group)
        processes = dist.get_world_size(group)
        sent["all_reduce"] += 2 * x.nbytes * (processes - 1) // processes
    return x


@dataclass
class Pending:
    """Tensors that are on their way; what is sent must not change until they are there."""

    work: Any
    received: Tensor
    kinds: list[list[Kind]]
    lengths: list[int]
    kept: Tensor

    def wait(self) -> list[list[Tensor]]:
        """The tensors from each process."""
        self.work.wait()
        parts = self.received.split(self.lengths)
        return [_unpacked(part, kinds) for part, kinds in zip(parts, self.kinds)]


def exchange(
    send: Sequence[Sequence[Tensor]], receive: Sequence[Sequence[Kind]], device: torch.device, group: Group
) -> Pending:
    """Send tensors of any types to each process of a group, by one all-to-all.

    Args:
        send: What each process is to get.
        receive: What comes from each process.
        device: Where.
        group: The process group.
    """
    parcels = [_packed(xs, device) for xs in send]
    lengths = [sum(map(_bytes, kinds)) for kinds in receive]
    packed = torch.cat(parcels)
    received = packed.new_empty(sum(lengths))
    work = dist.all_to_all_single(received, packed, lengths, [len(x) for x in parcels], group=group, async_op=True)
    sent["all_to_all"] += len(packed) - len(parcels[dist.get_rank(group)])
    return Pending(work, received, [list(kinds) for kinds in receive], lengths, packed)


def gather(xs: Sequence[Tensor], kinds: Sequence[Sequence[Kind]], device: torch.device, group: Group) -> Pending:
    """Send tensors to all processes of a group, by one all-gather.

    Args:
        xs: What this process has.
        kinds: What each process has.
        device: Where.
        group: The process group.
    """
    sizes = [sum(map(_bytes, each)) for each in kinds]
    length = max(sizes)
    packed = _packed(xs, device)
    packed = torch.cat([packed, packed.new_empty(length - len(packed))])
    received = packed.new_empty(length * len(kinds))
    work = dist.all_gather_into_tensor(received, packed, group=group, async_op=True)
    sent["all_gather"] += length * (len(kinds) - 1)
    return Pending(work, received, [list(each) for each in kinds], [length] * len(kinds), packed)


def _bytes(kind: Kind) -> int:
    shape, dtype = kind
    return torch.Size(shape).numel() * dtype.itemsize


def _packed(xs: Sequence[Tensor], device: torch.device) -> Tensor:
    if not xs:
        return torch.empty(0, dtype=torch.uint8, device=device)
    return torch.cat([x.contiguous().view(-1).view(torch.uint8) for x in xs])


def _unpacked(buffer: Tensor, kinds: Sequence[Kind]) -> list[Tensor]:
    tensors, offset = [], 0
    for shape, dtype in kinds:
        part = buffer[offset : offset + _bytes((shape, dtype))]
        offset += len(part)
        if part.storage_offset() % dtype.itemsize:
            part = part.clone()  # Behind a tensor of a shorter type.
        tensors.append(part.view(dtype).view(shape))
    return tensors
