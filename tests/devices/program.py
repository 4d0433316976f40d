"""Every optimizer on a pretended device, against the CPU; prints what went wrong as JSON, by optimizer."""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_optim.engine.rule import RULES

from ..optimizers.rows import CONFIGURATIONS, amplifies, build, label
from .pretended import DEVICE, KINDS, PretendedDevice, register

SHAPES = [(5,), (12, 8), (8, 12), (4, 3, 2, 2), ()]
#: Dtypes by way of rounding.
ROUNDINGS = {"nearest": torch.float32, "kahan": torch.bfloat16, "split": torch.bfloat16, "stochastic": torch.bfloat16}


def parameters(device: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]


def steps(optimizer: torch.optim.Optimizer, params: list[Tensor], of: range) -> None:
    for t in of:
        generator = torch.Generator().manual_seed(t)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        optimizer.step(lambda: torch.ones(()))  # A loss, for rules that need one.


def fault(device: PretendedDevice, name: str, arguments: dict[str, Any]) -> str | None:
    """What goes wrong with one optimizer; ``None`` if nothing does."""
    on_host = not RULES[name].capturable or arguments.get("orthogonalizer") == "exact"
    dtype = ROUNDINGS[arguments.get("rounding", "nearest")]
    here, there = parameters("cpu", dtype), parameters(DEVICE, dtype)
    steps(build(name, here, **arguments), here, range(6))
    optimizer = build(name, there, **arguments)
    steps(optimizer, there, range(3))
    device.waits.clear()
    steps(optimizer, there, range(3, 4))
    device.waits.subtract({"_to_copy": len(there)})  # the gradients
    if not on_host and (waits := +device.waits):
        return f"waits for the device: {dict(waits)}"
    resumed = build(name, there, **arguments)
    resumed.load_state_dict(tree_map_only(Tensor, Tensor.cpu, optimizer.state_dict()))
    for state in resumed.state.values():  # as Lightning does when it resumes
        for key, value in state.items():
            if key != "step" and isinstance(value, Tensor):
                state[key] = value.to(torch.device(DEVICE, 0))
    steps(resumed, there, range(4, 6))
    if arguments.get("rounding") == "stochastic" or amplifies(name, "rounding"):
        return None
    far = {"nearest": 1e-4}.get(arguments.get("rounding", "nearest"), 2e-2)
    for p, expected in zip(there, here):
        if not torch.allclose(p.detach().cpu().float(), expected.detach().float(), rtol=far, atol=far / 10):
            return f"shape {tuple(p.shape)} differs by {(p.detach().cpu() - expected.detach()).abs().max():.1e}"
    return None


def main(kind: str, *only: str) -> None:
    """Check ``only`` the first configuration of each optimizer, or all of them and all ways of rounding."""
    register()
    faults = {}
    with PretendedDevice(KINDS[kind]) as device:
        for name, configurations in CONFIGURATIONS.items():
            rounded = [{"rounding": rounding} for rounding in ("kahan", "split", "stochastic")]
            for arguments in configurations[:1] if "first" in only else [*configurations, *rounded]:
                try:
                    wrong = fault(device, name, arguments)
                except Exception as error:
                    frame = traceback.extract_tb(error.__traceback__)
                    ours = [f for f in frame if "lightning_optim" in f.filename or "tests" in f.filename][-1]
                    wrong = f"{type(error).__name__}: {error} ({ours.filename}:{ours.lineno})"
                if wrong:
                    faults[f"{name} {label(arguments)}"] = wrong
    print(json.dumps(faults))


if __name__ == "__main__":
    main(*sys.argv[1:])
