"""Which rank does which work."""

from __future__ import annotations

import heapq
from functools import lru_cache


@lru_cache(maxsize=64)
def assign_owners(costs: tuple[float, ...], fixed: tuple[int | None, ...], ranks: int) -> tuple[int, ...]:
    """The rank that does each piece of work: a fixed one, or else the one with the least load, largest cost first.

    Args:
        costs: The cost of each piece of work.
        fixed: For each, the rank that has to do it (it holds all of the data), or ``None``.
        ranks: How many ranks there are.

    Example:
        >>> assign_owners((1.0, 4.0, 2.0, 1.0, 9.0), (None, None, None, None, 1), 3)
        (2, 0, 2, 2, 1)
    """
    owners = [-1 if rank is None else rank for rank in fixed]
    loads = [0.0] * ranks
    for cost, owner in zip(costs, owners):
        if owner >= 0:
            loads[owner] += cost
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        if owners[i] < 0:
            load, rank = heap[0]
            heapq.heapreplace(heap, (load + costs[i], rank))
            owners[i] = rank
    return tuple(owners)
