"""What a step costs on many processes: measured on this machine's cores, and modelled for many GPUs.

    python -m benchmarks.scaling --json benchmarks/results/scaling.json

Measured: a small stack of transformer layers on 1, 2 and 4 processes of one thread each (gloo), with parameters sharded
as FSDP2 does and, apart, replicated as under DDP. Sharded, every process has 1/N of the element-wise work and of the
orthogonalisation; what does not shrink is communication.

The model adds up, for a transformer's hidden matrices, what the busiest GPU has to do: its share of orthogonalisation
(the engine's own assignment of matrices to processes), the momentum's traffic to memory, the bytes that the engine
counts over the slowest link, and the start of each collective. Nothing overlaps in it. The rate of the
orthogonalisation is the share of large matrix products' rate that its kernels reach on this machine, of the GPU's rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_optim.optimizers.execution import sharding
from lightning_optim.optimizers.registry import OPTIMIZERS
from lightning_optim.polar import orthogonalize

from .machine import describe, limits

PROCESSES = (1, 2, 4)
STRATEGIES = ("fsdp2", "ddp")
MEASURED = ("MVNGrad", "HVAdam", "Muon", "NAMO", "SOAP")
LAYERS, WIDTH = 2, 256

#: The assumptions of the model; rates are the makers' figures for an H100 SXM and for 400 Gb/s per GPU between nodes.
ASSUMED = {
    "gpus_per_node": 8,
    "matmul_tflop_per_s": 989.0,  # bfloat16, dense
    "memory_gb_per_s": 3350.0,
    "link_in_node_gb_per_s": 450.0,  # NVLink 4, one direction
    "link_between_nodes_gb_per_s": 50.0,
    "start_of_a_collective_us": 20.0,
    "start_per_process_us": 0.5,  # an all-to-all has a message for each
}
#: Layers and width of the transformers.
MODELS = {"1.3B": (24, 2048), "13B": (40, 5120), "70B": (80, 8192)}
GPUS = (8, 64, 512, 4096)


def shapes(layers: int, width: int) -> list[tuple[int, int]]:
    """The hidden matrices of a transformer, the packed projections as three."""
    return [*[(width, width)] * 4, (4 * width, width), (width, 4 * width)] * layers


# --- measured -------------------------------------------------------------------------------------------------------


def worker(rounds: int, out: Path) -> None:
    """What each process does: times steps and counts bytes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    processes = dist.get_world_size()
    rows = []
    for strategy in STRATEGIES:
        for name in MEASURED:
            step = _prepare(name, strategy)
            step()  # makes the state
            step()
            before, times = sharding.sent.copy(), []
            for _ in range(rounds):
                dist.barrier()
                start = time.perf_counter()
                step()
                times.append(1e3 * (time.perf_counter() - start))
            sent = sum((sharding.sent - before).values()) / rounds
            rows.append(
                {
                    "strategy": strategy,
                    "optimizer": name,
                    "processes": processes,
                    "median_ms": statistics.median(times),
                    "best_ms": min(times),
                    "sent_bytes": sent,
                }
            )
    if dist.get_rank() == 0:
        out.write_text(json.dumps(rows))
    dist.destroy_process_group()


def _prepare(name: str, strategy: str) -> Any:
    generator = torch.Generator().manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parameters = []
    for shape in shapes(LAYERS, WIDTH):
        x, g = (torch.randn(shape, generator=generator) for _ in range(2))
        if strategy == "fsdp2":
            x, g = (distribute_tensor(y, mesh, [Shard(0)], src_data_rank=None) for y in (x, g))
        parameters.append(nn.Parameter(x))
        parameters[-1].grad = g
    cls: Any = OPTIMIZERS[name].cls
    matrix = "orthogonalizer" in cls.default_hyperparameters() or name == "SOAP"
    optimizer = cls([{"params": parameters, "role": "matrix"}] if matrix else parameters, backend="chunked")
    if strategy == "ddp":
        optimizer.process_group = dist.group.WORLD
    return optimizer.step


def measure(rounds: int) -> Iterator[dict[str, Any]]:
    """Rows for every number of processes."""
    for processes in PROCESSES:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rows.json"
            run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            program = ["-m", "benchmarks.scaling", "--worker", str(out), "--rounds", str(rounds)]
            subprocess.run([*run, *program], check=True, stderr=subprocess.DEVNULL)
            yield from json.loads(out.read_text())


# --- modelled -------------------------------------------------------------------------------------------------------


def operations(m: int, n: int, steps: int = 5) -> float:
    """Floating-point operations of Newton-Schulz on a matrix."""
    m, n = sorted((m, n))
    return steps * (4.0 * m * m * n + 2.0 * m**3)


def efficiency(product_gflop_per_s: float, width: int = 1024) -> float:
    """The share of the rate of large products that orthogonalisation reaches on this machine.

    Of a square matrix: long ones need fewer operations than are counted.
    """
    x = torch.randn(width, width)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        orthogonalize(x, "kj5")
        seconds.append(time.perf_counter() - start)
    return min(1.0, operations(width, width) / min(seconds) / 1e9 / product_gflop_per_s)


def model(share: float) -> Iterator[dict[str, Any]]:
    """Milliseconds of a step of Muon or NAMO on many GPUs, by part.

    Args:
        share: The share of the rate of large products that orthogonalisation reaches.
    """
    a = ASSUMED
    for name, (layers, width) in MODELS.items():
        matrices = shapes(layers, width)
        costs = tuple(operations(*shape) for shape in matrices)
        elements = sum(m * n for m, n in matrices)
        for gpus in GPUS:
            owners = sharding.owners(costs, (None,) * len(costs), gpus)
            busiest = [0.0] * gpus
            for cost, owner in zip(costs, owners):
                busiest[owner] += cost
            waves = max(1, round(elements / max(2**24, gpus * 4 * width * width)))
            link = a["link_in_node_gb_per_s" if gpus <= a["gpus_per_node"] else "link_between_nodes_gb_per_s"]
            start = waves * (a["start_of_a_collective_us"] + a["start_per_process_us"] * gpus) / 1e3
            for strategy in STRATEGIES:
                sharded = strategy == "fsdp2"
                local = elements / gpus if sharded else elements
                sent = 4.0 * (2 * elements / gpus if sharded else elements) * (gpus - 1) / gpus
                parts = {
                    "orthogonalisation_ms": max(busiest) / (a["matmul_tflop_per_s"] * share) / 1e9,
                    "memory_ms": 4.0
                    * 7
                    * local
                    / a["memory_gb_per_s"]
                    / 1e6,  # g, m, p in; m, p out; factor in and out
                    "links_ms": sent / link / 1e6,
                    "starts_ms": start * (2 if sharded else 1),
                }
                yield {
                    "model": name,
                    "strategy": strategy,
                    "gpus": gpus,
                    "sent_bytes": sent,
                    **parts,
                    "total_ms": sum(parts.values()),
                }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=30, help="samples of each step")
    arguments.add_argument("--json", type=Path, help="write the figures to this file")
    arguments.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.worker:
        worker(options.rounds, options.worker)
        return
    torch.set_num_threads(1)
    machine = describe(torch.device("cpu"), ("lightning",)) | limits(torch.device("cpu"))
    share = efficiency(machine["matmul_gflop_per_s"]["float32"])
    content = {
        "machine": machine,
        "settings": {"rounds": options.rounds, "layers": LAYERS, "width": WIDTH},
        "rows": list(measure(options.rounds)),
        "assumed": ASSUMED | {"orthogonalisation_share_of_matmul_rate": round(share, 3)},
        "modelled": list(model(share)),
    }
    Console().print_json(data=content)
    if options.json:
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
