"""What each process of ``benchmarks.gpu``'s part on processes does: a small network with the others, and alone.

    python -m benchmarks.gpu_processes HOW BACKEND DEVICE FOLDER RANK PROCESSES

The processes meet in the folder, where each leaves ``RANK.json``: a row for each optimizer.
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from lightning_optim.engine.two_rules import MatrixOptimizer
from lightning_optim.grouping import Grouping, parameter_groups
from lightning_optim.registry import OPTIMIZERS
from lightning_optim.routing import route

#: One of each kind. SOAP in float64 and without low precision: where the gradient has no component, its normalised
#: directions are roundings, which differ between one process and two.
NAMES = ("LaProp", "NAMO", "HVAdam", "SOAP")
STEPS = 5
#: Distance from one process over the way that is moved. In float32 sums come in another order, which the iteration's
#: float16 products and the bases amplify; bfloat16 gradients of half batches are rounded apart.
FAR = {"ddp": 2e-2, "fsdp2": 2e-2, "fsdp2-bf16": 0.3, "ddp-16-mixed": 0.1}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))


def optimizer_of(module: nn.Module, name: str) -> Any:
    cls: Any = OPTIMIZERS[name].cls
    routed = issubclass(cls, MatrixOptimizer)
    groups = parameter_groups(module, route(module), Grouping(), routed, lambda some: [{}] * len(some))
    # Less is moved, so that the two runs see nearly the same gradients.
    return cls(groups, lr=1e-3)


def train(module: nn.Module, optimizer: Any, device: torch.device, how: str, ranks: slice) -> None:
    half = how == "ddp-16-mixed"
    # The first scales overflow: float16 ends at 2^16, and these gradients are about 2^-4.
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**22, enabled=half)
    for t in range(STEPS + 4 * half):
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(t))[ranks].to(next(module.parameters()))
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16) if half else contextlib.nullcontext():
            out = module(x)
        scaler.scale((out.to(x.dtype) - x[:, :4].sin()).square().mean()).backward()
        if half:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()


def whole(module: nn.Module) -> Tensor:
    """All parameters, as one vector."""
    parts = []
    for p in module.parameters():
        x: Any = p.detach()
        parts.append((x.full_tensor() if hasattr(x, "full_tensor") else x).flatten())
    return torch.cat(parts)


def compare(name: str, how: str, device: torch.device, rank: int, processes: int) -> dict[str, Any]:
    alone = network().to(device, torch.float64 if name == "SOAP" else torch.float32)
    together: Any = copy.deepcopy(alone)
    begin = whole(alone)
    size = 32 // processes
    mine = slice(rank * size, (rank + 1) * size)
    if how.startswith("fsdp2"):
        dtype = torch.bfloat16 if how == "fsdp2-bf16" else None
        for layer in together:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
        fully_shard(together)
        optimizer = optimizer_of(together, name)
        train(together, optimizer, device, how, mine)
    else:
        wrapped = DistributedDataParallel(together, device_ids=[device.index or 0] if device.type == "cuda" else None)
        optimizer = optimizer_of(together, name)
        optimizer.process_group = dist.group.WORLD
        train(wrapped, optimizer, device, how, mine)
    train(alone, optimizer_of(alone, name), device, how, slice(None))
    found, expected = whole(together), whole(alone)
    apart = ((found - expected).norm() / (expected - begin).norm()).item()
    everywhere = [torch.empty_like(found) for _ in range(processes)]
    dist.all_gather(everywhere, found)
    same = all(torch.equal(x, found) for x in everywhere)
    return {"what": name, "ok": same and apart <= FAR[how], "apart": apart, "same_on_all": same}


def main(how: str, backend: str, where: str, folder: str, rank: int, processes: int) -> None:
    device = torch.device(where)
    if device.type == "cuda":
        device = torch.device("cuda", rank if torch.cuda.device_count() >= processes else 0)
        torch.cuda.set_device(device)
    store = dist.FileStore(f"{folder}/store", processes)
    dist.init_process_group(backend, store=store, rank=rank, world_size=processes)
    rows = []
    for name in NAMES[: -1 if how in ("fsdp2-bf16", "ddp-16-mixed") else None]:
        try:
            rows.append(compare(name, how, device, rank, processes))
        except Exception as error:
            rows.append({"what": name, "ok": False, "error": f"{type(error).__name__}: {error}"[:500]})
            break  # The other processes may wait for this one; a new start has no such past.
    Path(folder, f"{rank}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:5], *map(int, sys.argv[5:]))  # type: ignore[arg-type]
