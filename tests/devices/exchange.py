"""Matrix rules that share orthogonalisation as under DDP, on a pretended GPU; prints the waits of an ordinary step.

The process group is torch's fake one, of two ranks, which moves nothing; so the values of a step mean nothing.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_optim.processes import collectives

from ..optimizers.drive import build
from .pretended import DEVICE, KINDS, PretendedDevice, register

SHAPES = [(12, 8), (8, 12), (12, 8), (6, 6), (6, 6), (6, 6), (5,), (4, 3, 2, 2)]


def waits(device: PretendedDevice, name: str, observed: bool) -> dict[str, int]:
    params: list[Any] = [nn.Parameter(torch.ones(shape).to(DEVICE)) for shape in SHAPES]
    optimizer = build(name, params)
    optimizer.process_group = dist.group.WORLD
    optimizer.observer = (lambda p, name, value: None) if observed else None
    for _ in range(4):
        for p in params:
            p.grad = torch.ones(p.shape).to(DEVICE)
        device.waits.clear()
        optimizer.step()
    return dict(+device.waits)


def main() -> None:
    register()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    collectives.transport = lambda group, kind: kind  # type: ignore[assignment]
    with PretendedDevice(KINDS["cuda"]) as device:
        found = {
            f"{name}{', observed' * observed}": waits(device, name, observed)
            for name in ("Muon", "NAMO", "NAMOD", "NorMuon", "AdaMuon")
            for observed in (False, True)
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
