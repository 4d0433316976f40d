"""Process groups."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from typing import Any

import torch.distributed as dist

ProcessGroup = Any  # torch.distributed.ProcessGroup, a name that builds without torch.distributed lack


def rank(group: ProcessGroup) -> int:
    """The number of this process in a group."""
    return dist.get_rank(group)


def size(group: ProcessGroup) -> int:
    """The number of ranks in a group."""
    return dist.get_world_size(group)


@cache
def transport(group: ProcessGroup, kind: str) -> str:
    """The kind of device from which a group sends tensors of a kind of device.

    NCCL has no way for those on the CPU, where offloaded shards are: they make a detour over the GPU.
    """
    kinds = [pair.partition(":")[0] for pair in dist.get_backend_config(group).split(",") if ":" in pair]
    return kind if kind in kinds or not kinds else kinds[0]


def nontrivial(group: ProcessGroup | None) -> tuple[ProcessGroup, ...]:
    """The group in a tuple, which is empty where there is no group or this process is alone in it."""
    return (group,) if group is not None and size(group) > 1 else ()


def world() -> ProcessGroup | None:
    """The group of all ranks, ``None`` where this process is alone."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else None


def new_cpu_group(timeout: timedelta) -> ProcessGroup | None:
    """A gloo group of all ranks, for tensors on the CPU; ``None`` where this process is alone. All ranks call it."""
    return None if world() is None else dist.new_group(backend="gloo", timeout=timeout)


@cache
def node_group(group: ProcessGroup, ranks_per_node: int) -> ProcessGroup:
    """The ranks that are on the same node as this one; nodes may have unequal numbers of them. All ranks call it.

    Args:
        group: The group of all ranks.
        ranks_per_node: How many there are on this node.
    """
    if ranks_per_node == size(group):
        return group
    counts: list[Any] = [None] * size(group)
    dist.all_gather_object(counts, ranks_per_node, group)
    return dist.new_subgroups_by_enumeration(nodes_of(counts))[0]


def nodes_of(counts: Sequence[int]) -> list[list[int]]:
    """The ranks of each node, given, for each rank, how many there are on its node; launchers number node by node.

    >>> nodes_of([2, 2, 1, 3, 3, 3])
    [[0, 1], [2], [3, 4, 5]]
    """
    nodes: list[list[int]] = []
    first = 0
    while first < len(counts):
        nodes.append(list(range(first, min(first + counts[first], len(counts)))))
        first = nodes[-1][-1] + 1
    return nodes
