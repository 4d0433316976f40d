"""The paths of all optimizers over two functions of two numbers, for a picture.

    python -m benchmarks.paths --json benchmarks/results/paths.json    # a few minutes on one core
    python -m benchmarks.report                                        # draws them

Each optimizer has its default settings, no weight decay, and of thirteen learning rates the one that ends lowest.
Rules for matrices see the two numbers as the diagonal of a 2 x 2 matrix, whose gradient is diagonal, too: they are its
singular values. What a picture of two numbers shows is how a rule deals with curvature and with corners; it says
nothing about noise, and little about models.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from lightning_optim.registry import OPTIMIZERS, OptimizerInfo

from .machine import describe

Function = Callable[[Tensor, Tensor], Tensor]

#: The functions, and where the paths begin. The first is HVAdam's, the second Rosenbrock's.
FUNCTIONS: dict[str, tuple[Function, tuple[float, float]]] = {
    "valley": (lambda x, y: 4 * (x - y).abs() + (x + y).abs(), (5.0, 4.0)),
    "rosenbrock": (lambda x, y: (1 - x).square() + 100 * (y - x.square()).square(), (-1.2, 1.0)),
}
STEPS, EVERY = 300, 4
RATES = [3e-5 * 3**i for i in range(13)]


def follow(info: OptimizerInfo, function: str, lr: float) -> list[list[float]]:
    """The points of one path, every :data:`EVERY` steps: x, y and the value."""
    f, start = FUNCTIONS[function]
    cls: Any = info.cls
    matrix = info.kind == "matrix"
    weight = torch.nn.Parameter(torch.diag(torch.tensor(start)) if matrix else torch.tensor(start))
    arguments = {"lr": lr} | ({"weight_decay": 0.0} if "weight_decay" in info.defaults else {})
    optimizer = cls([{"params": [weight], "role": "matrix"}] if matrix else [weight], **arguments)
    points: list[list[float]] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        x, y = weight.diagonal() if matrix else weight
        loss = f(x, y)
        loss.backward()
        return loss

    for step in range(STEPS + 1):
        if step % EVERY == 0:
            x, y = (weight.diagonal() if matrix else weight).tolist()
            points.append([float(f"{number:.4g}") for number in (x, y, float(f(*torch.tensor([x, y]))))])
        if not isfinite(points[-1][2]):
            break
        optimizer.step(closure)
    return points


def best(info: OptimizerInfo, function: str) -> dict[str, Any]:
    """The path that ends lowest, and its learning rate."""
    paths = {lr: follow(info, function, lr) for lr in RATES}
    ends = {lr: points[-1][2] for lr, points in paths.items() if isfinite(points[-1][2])}
    lr = min(ends, key=lambda rate: ends[rate])
    return {"optimizer": info.name, "function": function, "lr": lr, "points": paths[lr]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    rows = [best(info, name) for info in track(list(OPTIMIZERS.values())) for name in FUNCTIONS]
    content = {"machine": describe(torch.device("cpu")), "steps": STEPS, "every": EVERY, "rows": rows}
    args.json.write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
