"""Parameters on many ranks: who holds which shard, and how tensors get from one rank to another.

The only package that knows ``torch.distributed``, ``DTensor`` and the process groups of strategies. Optimizers and
diagnostics work on local shards, which are plain tensors and can be updated in place.

:mod:`.groups`, :mod:`.sharding`, :mod:`.collectives`, :mod:`.owners` and :mod:`.joining` know nothing of Lightning, and
this package exports what is in them. :mod:`.strategies` says what Lightning's strategies do, :mod:`.shard_files` reads
folders of shards, and :mod:`.private` holds what is used of private interfaces.
"""

from .collectives import (
    TensorSpec,
    all_gather,
    all_gather_equal,
    all_gather_object,
    all_reduce_max,
    all_reduce_sum,
    all_to_all,
    any_rank,
    bytes_sent,
)
from .groups import ProcessGroup, new_cpu_group, node_group, nontrivial, rank, size, world
from .joining import is_joining
from .owners import assign_owners
from .sharding import (
    Sharding,
    ShardSums,
    flat_offset,
    from_local,
    local,
    local_gradient,
    local_slices,
    local_state,
    mesh_groups,
    placed_like,
    placements,
    refuse_partial,
    refuse_unknown,
    shard_groups,
    sharded_dims,
    sharded_like,
    sharding_of,
    zeros_like,
    zeros_of_rows,
    zeros_of_shape,
    zeros_on_rank,
)

__all__ = [
    "ProcessGroup",
    "ShardSums",
    "Sharding",
    "TensorSpec",
    "all_gather",
    "all_gather_equal",
    "all_gather_object",
    "all_reduce_max",
    "all_reduce_sum",
    "all_to_all",
    "any_rank",
    "assign_owners",
    "bytes_sent",
    "flat_offset",
    "from_local",
    "is_joining",
    "local",
    "local_gradient",
    "local_slices",
    "local_state",
    "mesh_groups",
    "new_cpu_group",
    "node_group",
    "nontrivial",
    "placed_like",
    "placements",
    "rank",
    "refuse_partial",
    "refuse_unknown",
    "shard_groups",
    "sharded_dims",
    "sharded_like",
    "sharding_of",
    "size",
    "world",
    "zeros_like",
    "zeros_of_rows",
    "zeros_of_shape",
    "zeros_on_rank",
]
