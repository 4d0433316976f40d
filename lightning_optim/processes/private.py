"""Private interfaces of torch and Lightning that this package uses, checked with torch 2.15 and Lightning 2.6.6.

Each has one function here, so that a new version of either library is checked in one place.
"""

from __future__ import annotations

from typing import Any


def split_factor(placement: Any) -> int | None:
    """Into how many parts other mesh dimensions have cut an axis before this placement cuts each of them (FSDP2 with
    tensor parallelism); ``None`` for any placement but ``_StridedShard``.
    """
    return getattr(placement, "split_factor", None)


def replica_group(fsdp_module: Any) -> Any:
    """The group that holds replicas of a module's shards under FSDP1's hybrid sharding, ``None`` otherwise."""
    return getattr(fsdp_module, "_inter_node_pg", None)


def joins(ddp_module: Any) -> bool:
    """Whether torch's ``Join`` context is active for a DDP module."""
    return ddp_module._join_config.enable


def averages_models(ddp_strategy: Any) -> bool:
    """Whether Lightning's DDPStrategy averages models now and then (post-local SGD), so that gradients differ."""
    return ddp_strategy._model_averaging_period is not None


def saves_sharded(fsdp_strategy: Any) -> bool:
    """Whether Lightning's FSDPStrategy writes folders of shards."""
    return fsdp_strategy._state_dict_type == "sharded"


def saves_distributed(model_parallel_strategy: Any) -> bool:
    """Whether Lightning's ModelParallelStrategy writes folders of shards."""
    return model_parallel_strategy._save_distributed_checkpoint
