"""The scaling benchmark counts what it says, and the cost model does what its assumptions imply."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from benchmarks import scaling
from benchmarks.cluster import Cluster, Strategy, Transformer, orthogonalization_flops, step_seconds

MODEL = Transformer(512, 4, 1000)
CLUSTER = Cluster()


def step(gpus: int, strategy: Strategy, cluster: Cluster = CLUSTER) -> dict[str, float]:
    return step_seconds(MODEL, cluster, gpus, strategy, 20.0, True, 1.0, 1.0)


def test_a_gpu_alone_makes_the_whole_step() -> None:
    alone = [step(1, strategy) for strategy in get_args(Strategy)]
    assert all(parts == alone[0] for parts in alone)
    flops = sum(orthogonalization_flops(m, n) for m, n in MODEL.matrices)
    assert alone[0]["orthogonalization"] == pytest.approx(flops / CLUSTER.flops)
    assert alone[0]["communication"] == 0


def test_shares_shrink_and_traffic_follows_the_formula() -> None:
    free = Cluster(latency=0.0, latency_per_peer=0.0)
    elements = sum(m * n for m, n in MODEL.matrices)
    for gpus in (2, 8, 16):
        link = free.link(gpus)
        shared, sharded = step(gpus, "DDP, shared by all", free), step(gpus, "FSDP2", free)
        assert shared["communication"] == pytest.approx(4 * elements * (gpus - 1) / gpus / link)
        assert sharded["communication"] == pytest.approx(2 * 4 * elements / gpus * (gpus - 1) / gpus / link)
        assert sharded["orthogonalization"] == shared["orthogonalization"]
        assert sharded["elementwise"] == pytest.approx(shared["elementwise"] / gpus)
    # With a GPU for each matrix, the largest matrix is what takes long.
    largest = max(orthogonalization_flops(m, n) for m, n in MODEL.matrices)
    assert step(4096, "FSDP2")["orthogonalization"] == pytest.approx(largest / free.flops)
    # Nodes do not depend on one another.
    assert step(8, "DDP, shared in nodes") == step(64, "DDP, shared in nodes")


@pytest.mark.slow
@pytest.mark.distributed
def test_processes_are_timed_and_bytes_counted(tmp_path: Path) -> None:
    file = tmp_path / "scaling.json"
    small = ["--models", "cnn-small", "--optimizers", "MVNGrad", "Muon", "--processes", "1", "2", "--steps", "2"]
    scaling.main([*small, "--json", str(file)])
    content = json.loads(file.read_text())
    rows = {(row["optimizer"], row["strategy"]): row for row in content["measured"]}
    assert len(rows) == 6
    assert all(row["median_ms"] > 0 for row in rows.values())
    assert rows["Muon", "one process"]["sent_bytes"] == 0
    verdict = 4  # one number
    assert rows["MVNGrad", "fsdp2"]["sent_bytes"] == verdict
    # Rows of half of the matrices there and back: with two processes, each matrix's half once.
    matrices = 9 * (3 * 32 + 32 * 64 + 64 * 96 + 96 * 128 + 128 * 192 + 192 * 96)
    sent = rows["Muon", "fsdp2"]["sent_bytes"]
    assert sent == pytest.approx(4 * matrices / 2, rel=0.05)  # uneven matrices have owners with a little more
    # Momenta in float32 of all matrices, and two moments of the rest, are cut in two.
    assert rows["Muon", "fsdp2"]["state_bytes"] == pytest.approx(rows["Muon", "ddp"]["state_bytes"] / 2, rel=0.01)
    assert 0 < content["fractions"]["bandwidth"] <= 1
    assert {row["gpus"] for row in content["computed"]} == set(scaling.GPUS)
