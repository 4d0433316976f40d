"""How the time of a step changes with the number of processes: measured here, and computed for clusters of GPUs.

    python -m benchmarks.scaling --json benchmarks/results/scaling.json

Measured: 1, 2 and 4 processes of one thread each, with gloo, which share the memory and caches of one machine. Replicas
(``ddp``) hold all parameters and share the orthogonalisation, shards (``fsdp2``) hold a part of each. A step takes as
long as on the slowest process, and gradients are there already. Bytes are those that a process sends in a step, and
those of the optimizer's state that it holds, where these are most.

Computed: :mod:`benchmarks.cluster`, with the fractions of this machine's limits that our kernels reach in the same run.
The JSON file holds ``{"machine": ..., "cluster": ..., "fractions": ..., "measured": [...], "computed": [...]}``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_optim import build_optimizer, processes
from lightning_optim.engine.optimizer import RuleOptimizer
from lightning_optim.polar import orthogonalize

from .cluster import Cluster, Strategy, Transformer, orthogonalization_flops, step_seconds
from .machine import describe, limits
from .step_time import at_least
from .workload import MODELS

PROCESSES = (1, 2, 4)
#: ``torch.optim.AdamW`` is the usual baseline; the others are one of each kind of rule.
OPTIMIZERS = ("torch.optim.AdamW", "MVNGrad", "HVAdam", "Muon", "NAMO", "SOAP")
WARM_UP = 3

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
TRANSFORMERS = {"124M": Transformer(768, 12, 50257), "6.6B": Transformer(4096, 32, 50257)}
#: Bytes per parameter that the element-wise part of a step moves: gradient once, parameter and momentum twice.
MOVED = 20.0


def _module(model: str, strategy: str) -> nn.Module:
    torch.manual_seed(0)
    module = MODELS[model]()
    if strategy == "fsdp2":
        fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return module


def _gradient(p: Tensor) -> Tensor:
    if not isinstance(p, DTensor):
        return torch.randn_like(p)
    part = torch.randn_like(p.to_local())
    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _time(model: str, strategy: str, optimizer: str, steps: int) -> dict[str, Any]:
    """The time of the slowest process in each step, and the most that one sends and holds."""
    module = _module(model, strategy)
    built = build_optimizer(module, optimizer)
    if strategy == "ddp" and isinstance(built, RuleOptimizer):
        built.process_group = dist.group.WORLD
    for p in module.parameters():
        p.grad = _gradient(p)
    seconds = []
    for i in range(WARM_UP + steps):
        if i == WARM_UP:
            processes.bytes_sent.clear()
        if dist.is_initialized():
            dist.barrier()
        start = time.perf_counter()
        built.step()
        seconds.append(time.perf_counter() - start)
    sent = sum(processes.bytes_sent.values()) / steps
    held = sum(x.nbytes for state in built.state.values() for x in map(_local, state.values()))
    most = torch.tensor([*seconds[WARM_UP:], sent, held], dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(most, dist.ReduceOp.MAX)
    *slowest, sent, held = most.tolist()
    return {
        "parameters": sum(p.numel() for p in module.parameters()),
        "median_ms": round(1e3 * median(slowest), 3),
        "sent_bytes": round(sent),
        "state_bytes": round(held),
    }


def _work(rank: int, processes: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/{processes}", rank=rank, world_size=processes)
    rows = []
    for model in options.models:
        for optimizer in options.optimizers:
            for strategy in ("ddp", "fsdp2") if processes > 1 else ("one process",):
                row = {"model": model, "optimizer": optimizer, "strategy": strategy, "processes": processes}
                rows.append(row | _time(model, strategy, optimizer, options.steps))
    if rank == 0:
        Path(folder, f"{processes}.json").write_text(json.dumps(rows))
    if processes > 1:
        dist.destroy_process_group()


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time every optimizer on every number of processes."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, Progress(transient=True) as progress:
        for processes in progress.track(options.processes, description="processes"):
            mp.spawn(_work, (processes, folder, options), nprocs=processes)
            rows += json.loads(Path(folder, f"{processes}.json").read_text())
    return rows


def fractions(machine: dict[str, Any], seconds: float = 2.0) -> dict[str, float]:
    """What share of the machine's bandwidth element-wise rules reach, and of its matrix products orthogonalisation."""
    size, shape = 2**24, (4, 512, 2048)
    p = nn.Parameter(torch.randn(size))
    p.grad = torch.randn(size)
    rule = build_optimizer(nn.ParameterDict({"p": p}), {"name": "LaProp"})
    matrices = torch.randn(shape)
    moved = size * 4 * 7
    flops = shape[0] * orthogonalization_flops(*shape[1:])
    bandwidth = moved / _best(rule.step, seconds) / 1e9 / machine["bandwidth_gb_per_s"]["best"]
    products = flops / _best(lambda: orthogonalize(matrices, "kj5"), seconds) / 1e9
    matmul = products / max(machine["matmul_gflop_per_s"].values())
    # Tall matrices take fewer operations than are counted.
    return {"bandwidth": round(min(bandwidth, 1.0), 3), "matmul": round(min(matmul, 1.0), 3)}


def _best(work: Any, seconds: float) -> float:
    work()
    times: list[float] = []
    while sum(times) < seconds:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def compute(cluster: Cluster, reached: dict[str, float]) -> list[dict[str, Any]]:
    """Milliseconds of a NAMO step by the cost model."""
    rows = []
    for name, model in TRANSFORMERS.items():
        for strategy in get_args(Strategy):
            for gpus in GPUS:
                parts = step_seconds(
                    model, cluster, gpus, strategy, MOVED, True, reached["bandwidth"], reached["matmul"]
                )
                row = {"model": name, "parameters": model.parameters, "strategy": strategy, "gpus": gpus}
                row |= {f"{part}_ms": round(1e3 * x, 4) for part, x in parts.items()}
                rows.append(row | {"total_ms": round(1e3 * sum(parts.values()), 4)})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit-tiny", "d512"], choices=MODELS)
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS))
    parser.add_argument("--processes", nargs="+", type=at_least(1, int), default=list(PROCESSES))
    parser.add_argument("--steps", type=at_least(1, int), default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    machine = describe(torch.device("cpu")) | limits(torch.device("cpu"))
    measured = measure(options)
    table = Table("model", "optimizer", "strategy", "processes", "median ms", "MB sent", "MB of state")
    for row in measured:
        cells = [row[key] for key in ("model", "optimizer", "strategy", "processes", "median_ms")]
        table.add_row(*map(str, cells), f"{row['sent_bytes'] / 1e6:.3g}", f"{row['state_bytes'] / 1e6:.3g}")
    Console().print(table)
    reached = fractions(machine)
    cluster = Cluster()
    computed = compute(cluster, reached)
    if options.json:
        content = {"machine": machine, "steps": options.steps, "cluster": asdict(cluster), "fractions": reached}
        options.json.write_text(json.dumps(content | {"measured": measured, "computed": computed}, indent=1) + "\n")


if __name__ == "__main__":
    main()
