"""Tensors on the CPU through a process group that moves those of the pretended device only, as NCCL's."""

from __future__ import annotations

import json
import os

import torch
import torch.distributed as dist

from lightning_optim import processes
from lightning_optim.processes import collectives

from .pretended import KINDS, PretendedDevice, register


def refused() -> bool:
    try:
        dist.all_reduce(torch.ones(1))
    except RuntimeError:
        return True
    return False


def main() -> None:
    register()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.get_backend_config = lambda group=None: "pretended:nccl"  # type: ignore[assignment]
    group = dist.group.WORLD
    with PretendedDevice(KINDS["cuda"], accelerator_groups=True):
        x = torch.tensor([1.0, 2.0])
        parts = [torch.tensor([1.0, 2.0]), torch.tensor([3], dtype=torch.int64)]
        specs = [((2,), torch.float32), ((1,), torch.int64)]
        here = torch.device("cpu")
        sent = collectives.all_to_all([parts], [specs], here, group)()[0]
        gathered = collectives.all_gather(parts, [specs], here, group)()[0]
        sums = processes.ShardSums((group,), flat=True).add([x, x.sum()], [[x, x], [x]])
        results = [collectives.all_reduce_max(x, [group]), *sent, *gathered, *sums]
        found = [[x.device.type, x.tolist()] for x in results]
        print(json.dumps({"direct": "refused" if refused() else "sent", "ours": found}))


if __name__ == "__main__":
    main()
