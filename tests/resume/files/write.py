"""Writes the optimizer checkpoints that later versions have to load, with the continuation of the run each is from.

    python tests/resume/files/write.py        # with the version whose files are to be kept installed

They go to the folder of that version's name, ``write.py`` beside it; :mod:`tests.resume.test_formats` reads them. Every
file holds, by a name for the case, what :func:`case` returns. Gradients are small multiples of 1/4, exact in every
precision, so that no generator of random numbers takes part.
"""

from __future__ import annotations

import copy
import importlib.metadata
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from lightning_optim import build_optimizer

try:
    from lightning_optim.registry import OPTIMIZERS
except ImportError:  # 0.1.0
    from lightning_optim.optimizers.registry import OPTIMIZERS

SAVED_AT, UNTIL = 3, 6

#: What else than the defaults is worth keeping: state that only some settings have.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "AdaBelief": [{"rectify": False, "amsgrad": True}],
    "Anon": [{"refresh": "every_step"}],
    "DeVA": [{"form": "efficient"}],
    "HVAdam": [{"weight_decay": 0.1}],
    "LaProp": [{"centered": True, "weight_decay": 0.1}],
    "MAdam": [{"amsgrad": True}],
    "Muon": [{"fallback": "HVAdam"}],
    "SOAP": [{"merge_dims": True, "fallback": "MVNGrad"}],
}
PRECISIONS = [("float32", "nearest"), ("bfloat16", "split"), ("bfloat16", "kahan"), ("float16", "stochastic")]


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    """A matrix and a vector."""
    return [nn.Parameter(torch.arange(-n, n, 2, dtype=torch.float32).view(shape).div(8).to(dtype)) for shape, n in
            (((4, 3), 12), ((5,), 5))]  # fmt: skip


def gradients(params: list[Tensor], t: int) -> list[Tensor]:
    """Gradients of step ``t``."""
    return [((torch.arange(p.numel()) * 7 + t * 3 + i) % 11 - 4).view(p.shape).to(p.dtype) / 4
            for i, p in enumerate(params)]  # fmt: skip


def build(name: str, params: list[Tensor], **arguments: Any) -> torch.optim.Optimizer:
    """An optimizer of bare parameters."""
    groups: Any = params
    if OPTIMIZERS[name].kind == "matrix":
        groups = [{"params": params[:1], "role": "matrix"}, {"params": params[1:], "role": "fallback"}]
    cls: Any = OPTIMIZERS[name].cls
    return cls(groups, **arguments)


def run(optimizer: torch.optim.Optimizer, params: list[Tensor], first: int, last: int) -> None:
    """Steps ``first`` to ``last``."""
    for t in range(first, last + 1):
        for p, g in zip(params, gradients(params, t)):
            p.grad = g
        optimizer.step(lambda: torch.ones(()))  # A loss, for rules that need one.


def values(params: list[Tensor]) -> Tensor:
    """Copies of the parameters, one after another."""
    return nn.utils.parameters_to_vector(params).detach().clone()


def case(name: str, dtype: str, rounding: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A run: its settings, parameters and checkpoint after :data:`SAVED_AT` steps, parameters after :data:`UNTIL`."""
    params = parameters(getattr(torch, dtype))
    optimizer = build(name, params, rounding=rounding, backend="chunked", **arguments)
    run(optimizer, params, 1, SAVED_AT)
    saved = {"parameters": values(params), "checkpoint": copy.deepcopy(optimizer.state_dict())}
    run(optimizer, params, SAVED_AT + 1, UNTIL)
    return {"dtype": dtype, "rounding": rounding, "arguments": arguments, **saved, "continued": values(params)}


def ours() -> list[str]:
    """Names of the optimizers that are not torch's own."""
    return [name for name, info in OPTIMIZERS.items() if not info.cls.__module__.startswith("torch.")]


def machine() -> str:
    """What bits depend on, beside the code of this library."""
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"


class Net(nn.Module):
    """A hidden matrix and a head, no more: a folder of shards takes 3 KB for each value."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)
        for p in self.parameters():
            p.data = torch.arange(p.numel()).sub(5).div(8).view(p.shape)


def write_shards(folder: Path) -> Tensor:
    """A run of NAMO as a folder of torch.distributed.checkpoint; returns its parameters after :data:`UNTIL` steps."""
    net = Net()
    params: list[Tensor] = list(net.parameters())
    optimizer = build_optimizer(net, "NAMO")
    run(optimizer, params, 1, SAVED_AT)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    dcp.save({"net": net.state_dict(), "optimizer": get_optimizer_state_dict(net, optimizer, options=options)},
             checkpoint_id=folder)  # fmt: skip
    run(optimizer, params, SAVED_AT + 1, UNTIL)
    return values(params)


def main() -> None:
    """Write everything."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder = Path(__file__).parent / importlib.metadata.version("lightning-optim")
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(ours()):
        settings = [*SETTINGS.get(name, []), {}]
        low = PRECISIONS[1 + i % (len(PRECISIONS) - 1)]
        cases = [(*PRECISIONS[0], settings[0]), (*low, {})]
        found = {f"{dtype} {rounding} {arguments}": case(name, dtype, rounding, arguments)
                 for dtype, rounding, arguments in cases}  # fmt: skip
        torch.save({"machine": machine(), "cases": found}, folder / f"{name}.pt")
    continued = write_shards(folder / "shards")
    torch.save({"machine": machine(), "continued": continued}, folder / "shards.pt")


if __name__ == "__main__":
    sys.exit(main())
