"""What a step costs on models so small that only Python counts, beside timm's optimizers.

    python -m benchmarks.small_models

Both sides of a pair step copies of the same parameters, turn by turn in one process with one thread. What is compared
is the processor time of the thread, which hardly depends on what else the machine does: the median of the ratios of
turns next to each other, and the ratio of the fastest turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import timm.optim
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import lightning_optim

from .step_time import at_least

#: Shapes of the parameters of the two models.
VECTORS: list[tuple[int, ...]] = [(4,), (3,), (2, 2), (5,)]
MATRICES: list[tuple[int, ...]] = [(8, 8), (16, 8)]
REST: list[tuple[int, ...]] = [(8,), (16,)]


def parameters(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    """Parameters with gradients."""
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def ours(name: str) -> torch.optim.Optimizer:
    """An optimizer of this library for one of the two models."""
    cls: Any = lightning_optim.OPTIMIZERS[name].cls
    if cls.kind != "matrix":
        return cls(parameters(VECTORS))
    return cls([{"params": parameters(MATRICES), "role": "matrix"}, {"params": parameters(REST), "role": "fallback"}])


def timm_muon() -> torch.optim.Optimizer:
    """timm's Muon, whose fallback is AdamW as ours."""
    groups = [{"params": parameters(MATRICES), "use_muon": True}, {"params": parameters(REST), "use_muon": False}]
    return timm.optim.Muon(groups, nesterov=True)


PAIRS: list[tuple[str, str, Callable[[], torch.optim.Optimizer]]] = [
    ("LaProp", "LaProp", lambda: timm.optim.LaProp(parameters(VECTORS))),
    ("AdaBelief", "AdaBelief", lambda: timm.optim.AdaBelief(parameters(VECTORS))),
    ("Muon", "Muon", timm_muon),
    ("NAMO", "Muon", timm_muon),
]


def microseconds(optimizer: torch.optim.Optimizer, steps: int) -> float:
    """Processor time of one step, the mean of some."""
    start = time.thread_time()
    for _ in range(steps):
        optimizer.step()
    return 1e6 * (time.thread_time() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=at_least(3, int), default=200, help="turns of each side of a pair")
    parser.add_argument("--steps", type=at_least(1, int), default=20, help="steps of a turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("ours", "timm's", "ours, µs", "timm's, µs", "median ratio", "ratio of the fastest")
    for name, peer, build in track(PAIRS, transient=True):
        sides = [ours(name), build()]
        for side in sides:
            microseconds(side, 30)
        turns = [[microseconds(side, options.steps) for side in sides] for _ in range(options.turns)]
        mine, theirs = zip(*turns)
        ratios = median(a / b for a, b in turns), min(mine) / min(theirs)
        table.add_row(name, peer, f"{median(mine):.0f}", f"{median(theirs):.0f}", *(f"{x:.2f}" for x in ratios))
    Console().print(table)


if __name__ == "__main__":
    main()
