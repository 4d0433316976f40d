"""What Lightning's strategies, and wrappers of torch without Lightning, do with parameters and gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from ..trainer import is_lightning
from . import private
from .groups import ProcessGroup, node_group, world
from .sharding import ShardSums, shard_groups

if dist.is_available():
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
    from torch.nn.parallel import DistributedDataParallel


class OptimizerGroups(NamedTuple):
    """The process groups that an optimizer of this library is told of.

    Args:
        process_group: Ranks that hold equal parameters and gradients.
        work_group: Those of them that share the work of orthogonalisation; ``None`` for all.
        shard_group: Ranks that hold parts of flattened parameters.
    """

    process_group: ProcessGroup | None = None
    work_group: ProcessGroup | None = None
    shard_group: ProcessGroup | None = None


def optimizer_groups(strategy: Any, ranks_per_node: int) -> OptimizerGroups:
    """The process groups of a strategy. The parameters of FSDP2 name theirs themselves. All ranks call it."""
    all_ranks = world()
    if all_ranks is None:
        return OptimizerGroups()
    if is_deepspeed(strategy):
        return OptimizerGroups(shard_group=all_ranks)
    if is_fsdp1(strategy) and shards_parameters(strategy):
        (wrapped, *_) = FullyShardedDataParallel.fsdp_modules(strategy.model)
        return OptimizerGroups(private.replica_group(wrapped), None, wrapped.process_group)
    if averages_gradients(strategy) and not private.averages_models(strategy):
        # Between nodes, factors take longer to arrive than to compute.
        return OptimizerGroups(all_ranks, node_group(all_ranks, ranks_per_node))
    return OptimizerGroups()


def shard_sums(strategy: Any, params: Iterable[Tensor]) -> ShardSums:
    """How sums over the local shards of a strategy's parameters are added up."""
    if is_fsdp1(strategy):
        if not shards_parameters(strategy):
            return ShardSums()
        (wrapped, *_) = FullyShardedDataParallel.fsdp_modules(strategy.model)
        return ShardSums((wrapped.process_group,), flat=True)  # Of one replica, where there are several.
    return ShardSums(tuple(dict.fromkeys(group for p in params for group in shard_groups(p))))


def averages_gradients(strategy: Any) -> bool:
    """Whether the gradients of several ranks, which hold equal parameters, are averaged (DDP)."""
    if world() is None:
        return False
    return is_lightning(strategy, "DDPStrategy") or isinstance(strategy, DistributedDataParallel)


def flattens_parameters(strategy: Any) -> bool:
    """Whether ranks train parts of flattened parameters, which are no matrices (FSDP1, DeepSpeed)."""
    return is_deepspeed(strategy) or (is_fsdp1(strategy) and shards_parameters(strategy))


def is_deepspeed(strategy: Any) -> bool:
    """Whether a strategy is DeepSpeedStrategy, whose engine keeps gradients and updates to itself."""
    return is_lightning(strategy, "DeepSpeedStrategy")


def is_fsdp1(strategy: Any) -> bool:
    """Whether a strategy is FSDPStrategy, which flattens parameters."""
    return is_lightning(strategy, "FSDPStrategy")


def saves_flat_file(strategy: Any) -> bool:
    """Whether a strategy is FSDPStrategy and writes one file, not a folder of shards."""
    return is_fsdp1(strategy) and not private.saves_sharded(strategy)


def shards_parameters(fsdp_strategy: Any) -> bool:
    """Whether an FSDPStrategy gives each rank a part of the parameters."""
    return fsdp_strategy.sharding_strategy is not ShardingStrategy.NO_SHARD
