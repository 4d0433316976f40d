"""What a step costs on models so small that only the host's work counts, beside torch's and timm's optimizers.

    python -m benchmarks.small_models --json benchmarks/results/small-models.json

Three models: four tiny tensors; two matrices of different shapes and two vectors; eight matrices of those two shapes
and two vectors. Both sides of a pair step copies of the same parameters, turn by turn in one process with one thread.
What is compared is the processor time of the thread, which hardly depends on what else the machine does: the median of
the ratios of turns next to each other, and the ratio of the fastest turns.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import timm.optim
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import lightning_optim

from .machine import describe
from .step_time import at_least

Shapes = list[tuple[int, ...]]

#: Shapes of the hidden matrices and of the other parameters of each model.
MODELS: dict[str, tuple[Shapes, Shapes]] = {
    "4 tensors": ([], [(4,), (3,), (2, 2), (5,)]),
    "2 matrices, 2 vectors": ([(8, 8), (16, 8)], [(8,), (16,)]),
    "8 matrices, 2 vectors": ([(8, 8), (16, 8)] * 4, [(8,), (16,)]),
}


def parameters(shapes: Shapes) -> list[nn.Parameter]:
    """Parameters with gradients."""
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def ours(name: str, model: str) -> torch.optim.Optimizer:
    """An optimizer of this library for a model."""
    cls: Any = lightning_optim.OPTIMIZERS[name].cls
    matrices, rest = MODELS[model]
    if cls.kind != "matrix":
        return cls(parameters(matrices + rest))
    return cls([{"params": parameters(matrices), "role": "matrix"}, {"params": parameters(rest), "role": "fallback"}])


def torch_adamw(model: str) -> torch.optim.Optimizer:
    """torch's AdamW with one call for all tensors."""
    matrices, rest = MODELS[model]
    return torch.optim.AdamW(parameters(matrices + rest), foreach=True)


def timm_elementwise(name: str, model: str) -> torch.optim.Optimizer:
    """An element-wise optimizer of timm."""
    matrices, rest = MODELS[model]
    return getattr(timm.optim, name)(parameters(matrices + rest))


def timm_muon(model: str) -> torch.optim.Optimizer:
    """timm's Muon, whose fallback is AdamW as ours."""
    matrices, rest = MODELS[model]
    groups = [{"params": parameters(matrices), "use_muon": True}, {"params": parameters(rest), "use_muon": False}]
    return timm.optim.Muon(groups, nesterov=True)


#: Model, our optimizer, and the other one with its name.
PAIRS: list[tuple[str, str, str, Callable[[str], torch.optim.Optimizer]]] = [
    ("4 tensors", "MVNGrad", "torch's AdamW, foreach", torch_adamw),
    ("4 tensors", "LaProp", "torch's AdamW, foreach", torch_adamw),
    ("4 tensors", "LaProp", "timm's LaProp", partial(timm_elementwise, "LaProp")),
    ("4 tensors", "AdaBelief", "timm's AdaBelief", partial(timm_elementwise, "AdaBelief")),
    *((model, name, "timm's Muon", timm_muon) for model in list(MODELS)[1:] for name in ("Muon", "NAMO")),
]


def microseconds(optimizer: torch.optim.Optimizer, steps: int) -> float:
    """Processor time of one step, the mean of some."""
    start = time.thread_time()
    for _ in range(steps):
        optimizer.step()
    return 1e6 * (time.thread_time() - start) / steps


def compare(sides: tuple[torch.optim.Optimizer, torch.optim.Optimizer], turns: int, steps: int) -> dict[str, float]:
    """Times of both sides of a pair in µs, and their ratios."""
    for side in sides:
        microseconds(side, 30)
    mine, theirs = zip(*([microseconds(side, steps) for side in sides] for _ in range(turns)))
    return {
        "ours_us": median(mine),
        "theirs_us": median(theirs),
        "ratio": median(a / b for a, b in zip(mine, theirs)),
        "ratio_of_fastest": min(mine) / min(theirs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=at_least(3, int), default=200, help="turns of each side of a pair")
    parser.add_argument("--steps", type=at_least(1, int), default=20, help="steps of a turn")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe(torch.device("cpu"), ["timm"])
    table = Table("model", "ours", "other", "ours, µs", "other, µs", "median ratio", "ratio of the fastest")
    rows = []
    for model, name, peer, build in track(PAIRS, transient=True):
        found = compare((ours(name, model), build(model)), options.turns, options.steps)
        rows.append({"model": model, "optimizer": name, "peer": peer, **found})
        times = (f"{found[key]:.0f}" for key in ("ours_us", "theirs_us"))
        table.add_row(model, name, peer, *times, *(f"{found[key]:.2f}" for key in ("ratio", "ratio_of_fastest")))
    Console().print(table)
    if options.json:
        settings = {"turns": options.turns, "steps": options.steps}
        options.json.write_text(json.dumps({"machine": machine, "settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
