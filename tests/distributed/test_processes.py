"""Steps on two and four processes are those of one.

``program.py`` is what the processes run; all cases of a number of processes share one start.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_optim import processes
from lightning_optim.registry import OPTIMIZERS
from tests.distributed import program

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
CONFIGURATIONS = [f"{name} {arguments}" for name, arguments in program.configurations()]
REPORTING = [c for c in CONFIGURATIONS if OPTIMIZERS[c.split()[0]].kind == "matrix"]
#: Processes and case.
SPREAD = [
    (2, "fsdp2"),
    (2, "ddp"),
    pytest.param(4, "fsdp2", marks=pytest.mark.slow),
    pytest.param(4, "hsdp", marks=pytest.mark.slow),
    pytest.param(4, "tensor parallel", marks=pytest.mark.slow),
]
#: Processes and the first word of cases that there are for FSDP2, and for FSDP2 on top of tensor parallelism.
MESHES = [(2, ""), pytest.param(4, "tensor parallel ", marks=pytest.mark.slow)]
Results = Callable[[int, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each process of a case returned, by number of processes and case."""
    known: dict[int, list[dict[str, Any]]] = {}

    def get(processes: int, case: str) -> list[dict[str, Any]]:
        if processes not in known:
            known[processes] = []  # They do not start again where they fail.
            known[processes] = start(processes, tmp_path_factory.mktemp("processes"))
        assert known[processes], "the processes have failed"
        return [result[case] for result in known[processes]]

    return get


def start(processes: int, out: Path) -> list[dict[str, Any]]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*run, program.__file__, str(out)], capture_output=True, text=True, timeout=500, env=environment
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    # Weights only would refuse counters and sets.
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def is_element_wise(configuration: str) -> bool:
    return OPTIMIZERS[configuration.split()[0]].kind == "element-wise"


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize(("processes", "case"), SPREAD)
def test_a_step_on_many_processes_is_that_of_one(
    processes: int, case: str, configuration: str, results: Results
) -> None:
    for result in results(processes, case):
        found = result[configuration]
        # Float64: what differs is the order of additions in norms, inner products and the orthogonalisation's matrix
        # products, 1e-16 each. Slices of a tensor get the very same arithmetic.
        assert found["difference"] <= (0.0 if is_element_wise(configuration) else 1e-13)
        assert found["skipped"] == 1  # the step in which one shard, with HSDP of one replica, holds NaN
        assert found["same"] is not False


# Float32 state is compared, too: sums in another order, 6e-8 each; of "split" the lowest of the 16 bits rounded off.
# Random numbers are those of one process, but for columns under element-wise rules: these round to the other neighbour.
@pytest.mark.parametrize(
    ("processes", "case", "close"),
    [
        (2, "fsdp2 bf16", 1e-6),
        (2, "fsdp2 split", 2**-12),
        (2, "fsdp2 stochastic", 2**-7),
        pytest.param(4, "tensor parallel split", 2**-12, marks=pytest.mark.slow),
    ],
)
def test_bfloat16_parameters_keep_float32_state(processes: int, case: str, close: float, results: Results) -> None:
    for result in results(processes, case):
        for name, found in result.items():
            assert found["difference"] <= close, name


@pytest.mark.parametrize(("processes", "mesh"), MESHES)
def test_state_in_low_precision(processes: int, mesh: str, results: Results) -> None:
    """Shards are stored as the whole is, with the same random numbers, and resumed bit for bit by torch's functions.

    Sums in another order let an entry be rounded to the other neighbour now and then: two codes of 127 (eighth bits of
    bfloat16) apart at most, which orthogonalisation passes on.
    """
    for result in results(processes, f"{mesh}low state"):
        assert "sharded within its rows" in result.pop("refused")
        for name, found in result.items():
            if name.startswith("checkpoint"):
                assert found, name
                continue
            assert found["skipped"] == 1
            assert found["same"] in (True, None)
            assert found["difference"] <= (0.02 if "NAMO" in name else 1e-6), name


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_ddp_in_float32(configuration: str, results: Results) -> None:
    for result in results(2, "ddp float32"):
        redundant = "orthogonalizer" not in OPTIMIZERS[configuration.split()[0]].defaults
        # Matrices that are orthogonalised alone or with others get other matrix products.
        assert result[configuration]["difference"] <= (0.0 if redundant else 1e-6)
        assert result[configuration]["same"]  # bit for bit, on all processes


@pytest.mark.parametrize(("processes", "case"), SPREAD)
@pytest.mark.parametrize("configuration", REPORTING)
def test_observers_get_whole_matrices_on_one_process(
    processes: int, case: str, configuration: str, results: Results
) -> None:
    found = [result[configuration] for result in results(processes, case)]
    # Newton-Schulz takes small singular values times 3.4 in each of five steps: 500 roundings of 1e-16.
    # (Rules that orthogonalise nothing, as MARS in its AdamW form, may report nothing.)
    assert max((x for each in found for x in each["reports"].values()), default=0.0) <= 1e-13
    name = configuration.split()[0]
    if "orthogonalizer" in OPTIMIZERS[name].defaults and name != "MARS":
        assert any(each["reports"] for each in found)
    assert not set.intersection(*(each["missing"] for each in found))
    if case == "fsdp2":
        reports = [key for each in found for key in each["reports"] if key[0] not in ("replicated", "plain")]
        assert len(reports) == len(set(reports))


def test_the_verdict_is_common_where_the_host_does_not_wait_for_it(results: Results) -> None:
    for result in results(2, "on accelerators"):
        for name, found in result.items():
            assert found["difference"] <= 1e-13, name
            assert found["skipped"] == 1


def test_weight_decay_on_shards(results: Results) -> None:
    for result in results(2, "decay"):
        assert len(result) == 8
        for name, found in result.items():
            assert found["difference"] <= 1e-13, name  # Float64: sums in another order.


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_cautious_steps_and_control_of_norms_on_shards(processes: int, results: Results) -> None:
    for result in results(processes, "switches"):
        assert len(result) == 30
        for name, found in result.items():
            assert found["difference"] <= 1e-13, name  # Float64: sums in another order.


def test_parameters_without_a_gradient_for_a_while(results: Results) -> None:
    for result in results(2, "unused"):
        for name, found in result.items():
            assert found["difference"] <= 1e-13, name


def test_ranks_decide_by_the_mean_of_their_losses(results: Results) -> None:
    for result in results(2, "losses"):
        for name, (difference, retraces) in result.items():
            # Float64: losses are summed, and inner products in another order.
            assert difference <= 1e-12, name
            assert retraces == 1, name


@pytest.mark.parametrize(("processes", "mesh"), MESHES)
def test_distributed_checkpoint_takes_the_state(processes: int, mesh: str, results: Results) -> None:
    for result in results(processes, f"{mesh}checkpoint"):
        assert all(result.values()), result


@pytest.mark.parametrize(("processes", "mesh"), MESHES)
def test_sharded_parameters_take_their_part_of_whole_state(processes: int, mesh: str, results: Results) -> None:
    for result in results(processes, f"{mesh}whole state"):
        message = result.pop("refused")
        wrong, right = ("Shard(dim=0),", "Shard(dim=1),") if not mesh else ("Shard(dim=0), Shard(dim=0)", "_Strided")
        assert f"m has placements ({wrong}) instead of ({right}" in message
        for name, difference in result.items():
            assert difference <= 2**-11, name  # as in the case "fsdp2 split", after a step more


@pytest.mark.parametrize(("processes", "mesh"), MESHES)
@pytest.mark.parametrize("name", ["NAMO", "SOAP", "DeVA"])
def test_one_process_keeps_the_state(name: str, processes: int, mesh: str, results: Results) -> None:
    """After a first step that is skipped, with parameters that come later, and through a checkpoint."""
    found = [result[name] for result in results(processes, f"{mesh}lives of state")]
    for result in found:
        assert result["same"] <= 1e-13
        assert result["tried"]  # a copy of the optimizer makes the same step
        assert result["cast"] <= 1e-6  # goes on in float32
    # A process has all of a parameter's state or nothing.
    whole, elements = found[0]["whole"], [result["elements"] for result in found]
    matrices = [key for key in elements[0] if name == "NAMO" or key not in ("bias", "short")]
    for key in matrices:
        nothing = [0] * len(whole[key])
        assert sorted(each[key] for each in elements) == [*[nothing] * (processes - 1), whole[key]]
    # No process has more than its share and the largest parameter's, which is what largest first guarantees.
    sizes = [sum(whole[key]) for key in matrices]
    assert max(sum(map(sum, each.values())) for each in elements) <= sum(sizes) / processes + max(sizes)


def test_checkpoints_have_state_in_parts(results: Results) -> None:
    for result in results(2, "lives of state"):
        placed = result["SOAP"]["placed"]
        assert placed.pop("step") == "None"
        for name, x in placed.items():
            assert x == ("(Shard(dim=0),)" if name in ("m", "v") else "(Shard(dim=1),)"), name
        assert "transposed=False (was True) does not go with the state" in result["refused"]


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_bytes_are_at_their_minimum(processes: int, results: Results) -> None:
    n = processes
    rows = 4 * (16 * 8 + 8 * 32)  # the two matrices in float32; the experts are where they are needed already
    there_and_back = 2 * rows * (n - 1) // n
    # Two norms of each of two matrices, and of four experts, go to the owner and come back from it.
    norms = 2 * (2 + 4) * 2 * 4 * (n - 1)
    column_norms = 2 * (8 + 32 + 4 * 8) * 2 * 4 * (n - 1)
    # SOAP and DeVA: the gradient there, the direction back. The experts are one parameter.
    elements = 16 * 8 + 8 * 32 + 4 * 4 * 8
    carried = 2 * 4 * elements * (n - 1) // n
    # A checkpoint has m and v, and for each axis gram and basis.
    bases = 2 * (16**2 + 8**2 + 8**2 + 32**2 + 4 * (4**2 + 8**2))
    state = 4 * (2 * elements + bases) * (n - 1) // n
    # Six columns of four rows, of which the first process has its own already.
    columns = 4 * 4 * (6 - math.ceil(6 / n))
    verdict = 4 * 2 * (n - 1)
    inner_products = 3 * 8 * 2 * (n - 1)
    expected = {
        "Muon": (there_and_back, verdict),
        "NAMO": (there_and_back + norms, verdict),
        "NAMOD": (there_and_back + column_norms, verdict),
        "SOAP": (carried, verdict),
        "DeVA": (carried, verdict),
        "Muon, columns": (2 * columns, verdict),
        "NAMO, columns": (3 * columns, verdict),  # the weight decay of each matrix is another
        "SOAP's checkpoint": (state, 0),
        "SOAP after loading": (state + carried, verdict),
        "MVNGrad": (0, verdict),
        "HVAdam": (0, verdict + inner_products),
    }
    found = results(processes, "bytes")
    for name, (exchanged, reduced) in expected.items():
        assert sum(result[name]["all_to_all"] for result in found) == exchanged, name
        # Each process rounds what it sends down to whole bytes.
        assert sum(result[name]["all_reduce"] for result in found) == pytest.approx(reduced, abs=2 * n), name


def test_ddp_gathers_what_the_busiest_process_made(results: Results) -> None:
    # The wide matrix costs most, and the other process makes the rest: (16 * 8 + 4 * 4 * 8) * 4 bytes.
    assert [result["DDP"] for result in results(2, "bytes")] == [{"all_gather": 8 * 32 * 4, "all_reduce": 4}] * 2


@pytest.mark.slow
def test_no_dtensor_stays_behind(results: Results) -> None:
    for result in results(4, "leaked"):
        before, after = result["counts"]
        assert after == before > 0


@pytest.mark.slow
def test_replicas_of_shards_over_two_dimensions(results: Results) -> None:
    """Two replicas of tensor parallelism, in a mesh one of whose dimensions has one rank."""
    for result in results(4, "replicas of tensor parallel"):
        for name, found in result.items():
            assert found["difference"] <= 1e-13, name  # Float64: sums in another order.
            assert found["skipped"] == 1


@pytest.mark.slow
def test_placements_that_cannot_work_are_refused(results: Results) -> None:
    for result in results(4, "refused"):
        assert "ranks hold several pieces along an axis" in result["pieces"]
        assert "fallback" in result["pieces"]
        assert "Redistribute" in result["summand"]
        assert result["element-wise"] == "(4, 8)"


#: Sizes of a mesh, and placements on it as FSDP2 makes them on top of tensor or expert parallelism.
LAYOUTS = {
    "rows": ((4,), [Shard(0)]),
    "columns of rows": ((2, 2), [Shard(0), Shard(1)]),
    "rows of rows": ((2, 3), [_StridedShard(0, split_factor=3), Shard(0)]),
    "columns of columns": ((3, 2), [_StridedShard(1, split_factor=2), Shard(1)]),
    "without FSDP2": ((2, 3), [Shard(0), Shard(0)]),
    "replicas of rows": ((2, 2, 2), [Replicate(), _StridedShard(0, split_factor=2), Shard(0)]),
    "columns of rows of rows": ((2, 2, 2), [_StridedShard(0, split_factor=2), Shard(0), Shard(1)]),
    "rows of rows of rows": ((2, 2, 2), [_StridedShard(0, split_factor=4), Shard(0), Shard(0)]),
    "one rank": ((2, 1, 3), [Shard(1), Shard(0), Shard(1)]),
}


@pytest.mark.parametrize("shape", [(12, 12), (13, 7), (5, 11), (2, 3)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_parts_of_all_ranks_are_where_torch_puts_them(layout: str, shape: tuple[int, int]) -> None:
    sizes, placements = LAYOUTS[layout]
    ranks = math.prod(sizes)
    found = []
    for rank in range(ranks):
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        try:
            mesh = init_device_mesh("cpu", sizes)
            p = DTensor.from_local(torch.empty(0), mesh, placements, run_check=False, shape=shape, stride=(shape[1], 1))
            local, start = compute_local_shape_and_global_offset(shape, mesh, placements)
            sharding = processes.sharding_of(p)
            assert sharding is not None
            own = sharding.boxes[sharding.rank]
            if shape == (12, 12) or "of" not in layout:  # Of what is cut unevenly twice, FSDP2 has other parts.
                assert sharding.local_shape(sharding.rank) == local
                assert all(x.start == first for x, first, n in zip(own, start, local) if n)
            found.append((dist.get_process_group_ranks(sharding.group), sharding.boxes))
        finally:
            dist.destroy_process_group()
    whole = torch.arange(math.prod(shape)).view(shape)
    for rank, (group, boxes) in enumerate(found):
        own = boxes[group.index(rank)]
        # What other ranks of the group think that this rank has is what it has, and together they have everything.
        assert all(found[other][1][found[other][0].index(rank)] == own for other in group)
        assert sorted(x for box in boxes for x in whole[box].flatten().tolist()) == whole.flatten().tolist()
        shards = [whole[box] for box in boxes]
        assert torch.equal(sharding.whole(shards), whole)
        indices = sharding.flat_indices(0, torch.device("cpu"))
        assert torch.equal(whole.flatten()[indices], sharding.shard(whole, 0))


def test_processes_that_were_joined_anew() -> None:
    """As in a notebook: the mesh of the second time equals the first, and its process groups are others."""
    for _ in range(2):
        dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
        try:
            mesh = init_device_mesh("cpu", (2,))
            p = DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)], run_check=False)
            assert processes.shard_groups(p) == (mesh.get_group(0),)
        finally:
            dist.destroy_process_group()


@pytest.mark.parametrize(
    ("counts", "rank", "expected"),
    [
        ([4, 4, 4, 4], 1, [0, 1, 2, 3]),
        ([2, 2, 2, 2], 3, [2, 3]),
        ([3, 3, 3, 1], 3, [3]),
        ([2, 2, 1, 3, 3, 3], 4, [3, 4, 5]),
        ([1, 4, 4, 4, 4], 2, [1, 2, 3, 4]),
    ],
)
def test_ranks_of_a_node_where_nodes_have_unequal_numbers(
    counts: list[int], rank: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(found: list[Any], own: int, group: Any) -> None:
        assert own == counts[rank]
        found[:] = counts

    dist.init_process_group("fake", rank=rank, world_size=len(counts), store=FakeStore())
    monkeypatch.setattr(dist, "all_gather_object", gather)
    try:
        group = processes.node_group(dist.group.WORLD, counts[rank])
        assert dist.get_process_group_ranks(group) == expected
    finally:
        dist.destroy_process_group()
