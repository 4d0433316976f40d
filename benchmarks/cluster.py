"""The time of an optimizer step on many GPUs: computed, since no such machine was available.

A model of two numbers per GPU, two per link, and two that are measured: which fractions of the memory's bandwidth and
of the rate of matrix products our kernels reach (``benchmarks.scaling`` takes them from the machine it runs on, on the
assumption that they carry over). What it leaves out makes it an upper bound: nothing overlaps, neither with other work
of the step nor with the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_optim.engine.matrices import bucket_limit
from lightning_optim.polar import find
from lightning_optim.processes import assign_owners

Strategy = Literal["DDP, each for itself", "DDP, shared by all", "DDP, shared in nodes", "FSDP2"]

ITERATIONS = len(find("kj5").coefficients)
_FLOAT = 4


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes. The defaults are the maker's figures for a node of eight H100 SXM with 400 Gb/s per GPU.

    Args:
        flops: Dense matrix products in float16, per second.
        bandwidth: Of the memory, in bytes per second.
        gpus_per_node: How many share the fast links.
        fast_link: Bytes per second that a GPU sends within its node.
        slow_link: Bytes per second that a GPU sends to other nodes.
        latency: Seconds that a collective takes however small it is; an assumption.
        latency_per_peer: Seconds per message of an all-to-all; an assumption.
    """

    flops: float = 989e12
    bandwidth: float = 3.35e12
    gpus_per_node: int = 8
    fast_link: float = 450e9
    slow_link: float = 50e9
    latency: float = 20e-6
    latency_per_peer: float = 1e-6

    def link(self, gpus: int) -> float:
        """Bytes per second that each of ``gpus`` sends in a collective over all of them."""
        return self.fast_link if gpus <= self.gpus_per_node else self.slow_link


@dataclass(frozen=True)
class Transformer:
    """The hidden matrices of a decoder, four (d, d) and two (4d, d) per layer, and its embedding.

    >>> Transformer(768, 12, 50257).parameters
    123532032
    """

    width: int
    layers: int
    vocabulary: int

    @property
    def matrices(self) -> list[tuple[int, int]]:
        d = self.width
        return [*[(d, d)] * 4, (d, 4 * d), (d, 4 * d)] * self.layers

    @property
    def parameters(self) -> int:
        return sum(m * n for m, n in self.matrices) + self.vocabulary * self.width


def orthogonalization_flops(m: int, n: int) -> float:
    """Floating-point operations of the Newton-Schulz steps on a matrix with ``m <= n``."""
    return ITERATIONS * (4 * m * m * n + 2 * m**3)


def largest_share(costs: Sequence[float], shares: int) -> float:
    """The work of the busiest process, as the optimizers distribute matrices.

    >>> largest_share([3, 3, 2, 2, 2], 2)
    7.0
    >>> largest_share([5, 1], 8)
    5.0
    """
    loads = [0.0] * shares
    for cost, owner in zip(costs, assign_owners(tuple(costs), (None,) * len(costs), shares)):
        loads[owner] += cost
    return max(loads)


def step_seconds(
    model: Transformer,
    cluster: Cluster,
    gpus: int,
    strategy: Strategy,
    bytes_per_parameter: float,
    orthogonalized: bool,
    bandwidth_fraction: float,
    matmul_fraction: float,
) -> dict[str, float]:
    """Seconds that a step takes on every GPU, by part.

    Args:
        model: What is trained.
        cluster: What it is trained on.
        gpus: How many GPUs.
        strategy: Who orthogonalises what.
        bytes_per_parameter: What the element-wise part of the rule reads and writes.
        orthogonalized: Whether hidden matrices are orthogonalised.
        bandwidth_fraction: The share of the memory's bandwidth that the element-wise part reaches.
        matmul_fraction: The share of the rate of matrix products that orthogonalisation reaches.
    """
    elements = sum(m * n for m, n in model.matrices)
    costs = [orthogonalization_flops(m, n) for m, n in model.matrices] if orthogonalized else []
    sharded = strategy == "FSDP2"
    together = {"DDP, each for itself": 1, "DDP, shared in nodes": min(gpus, cluster.gpus_per_node)}.get(strategy, gpus)
    sent = latency = 0.0
    if orthogonalized and together > 1:
        # An all-gather brings all factors; two all-to-alls bring the shards of a GPU there and back.
        sent = _FLOAT * elements * (together - 1) / together * (2 / together if sharded else 1)
        peers = together - 1 if sharded else math.log2(together)
        sizes = [m * n for m, n in model.matrices]
        buckets = math.ceil(elements / bucket_limit(sizes, together))
        latency = buckets * (2 if sharded else 1) * (cluster.latency + cluster.latency_per_peer * peers)
    held = model.parameters / gpus if sharded else model.parameters
    mine = largest_share(costs, together) if costs else 0.0
    return {
        "elementwise": held * bytes_per_parameter / (cluster.bandwidth * bandwidth_fraction),
        "orthogonalization": mine / (cluster.flops * matmul_fraction),
        "communication": sent / cluster.link(together) + latency,
    }
