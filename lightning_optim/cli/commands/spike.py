"""``lightning-optim spike``: what a gradient spike does to optimizers."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.optim import Optimizer

from ...diagnostics.spike_response import SpikeResult, scale_name, spike_response
from ...engine.two_rules import MatrixOptimizer
from ...registry import OptimizerInfo, get
from ..errors import explained

DESCRIPTION = (
    "Show what a gradient spike does to optimizers. They get independent normal gradients of a 128 x 64 matrix, one of "
    "them many times too large. The table shows how large the updates are from then on, and after how many steps they "
    "are what they were. Learning rate 1, no weight decay, other hyperparameters at their defaults."
)

_OPTIMIZERS = ("MVNGrad", "AdamW", "LaProp", "AdaBelief", "NAMO", "Muon", "DeVA", "HVAdam", "SOAP")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--optimizers", nargs="+", default=_OPTIMIZERS, metavar="NAME", help=f"default: {' '.join(_OPTIMIZERS)}"
    )
    parser.add_argument(
        "--scales", nargs="+", type=float, default=[1e1, 1e3, 1e6], metavar="X", help="sizes of the spike"
    )
    parser.add_argument("--at", type=int, default=100, help="number of steps before the spike (default: 100)")
    parser.add_argument("--after", type=int, default=300, help="number of steps after the spike (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the gradients (default: 0)")
    parser.add_argument("--out", type=Path, metavar="FIG.png", help="save a plot")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all figures, the RMS of each update included")


def run(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        UsageError: There is no optimizer of a name, or what is to be saved cannot be.
    """
    with explained():
        _run(options)


def _run(options: argparse.Namespace) -> None:
    infos = [get(name) for name in options.optimizers]
    for path in (options.out, options.json):
        if path and not path.parent.is_dir():
            raise ValueError(f"There is no folder {path.parent} to save {path.name} in.")
    torch.set_num_threads(1)  # The matrix is too small to share out.
    jobs = [(info, scale) for info in infos for scale in options.scales]
    results = [
        (info.name, scale, _respond(info, scale, options))
        for info, scale in track(jobs, "Optimizers and spikes", console=Console(stderr=True), transient=True)
    ]
    Console().print(_table(results, options))
    if options.json:
        options.json.write_text(json.dumps([_row(*result) for result in results], indent=1) + "\n")
    if options.out:
        _plot(results, options.out)


def build(info: OptimizerInfo, params: list[nn.Parameter]) -> Optimizer:
    """An optimizer of matrices with a learning rate of 1 and no weight decay."""
    cls: Any = info.cls
    arguments = {"lr": 1.0} | ({"weight_decay": 0.0} if "weight_decay" in info.defaults else {})
    is_matrix = issubclass(cls, MatrixOptimizer)
    return cls([{"params": params, "role": "matrix"}] if is_matrix else params, **arguments)


def _respond(info: OptimizerInfo, scale: float, options: argparse.Namespace) -> SpikeResult:
    return spike_response(
        lambda params: build(info, params), scale, spike_at=options.at, after=options.after, seed=options.seed
    )


Result = tuple[str, float, SpikeResult]


def _table(results: Sequence[Result], options: argparse.Namespace) -> Table:
    table = Table(
        box=box.SIMPLE,
        caption="Update RMS and extra displacement relative to the mean of 30 steps before the spike. Recovery: steps "
        "until it stays within 10 % of that; crossing: until it is there for the first time, maybe on its way from too "
        "large to too small.",
        caption_justify="left",
    )
    table.add_column("optimizer")
    for column in ("spike", "largest", "smallest", "extra displacement", "recovery", "crossing"):
        table.add_column(column, justify="right")
    last = None
    for name, scale, r in results:
        steps = [f">{options.after}" if x is None else str(x) for x in (r.recovery_steps, r.crossing_steps)]
        figures = [f"{x:.3g}" for x in (r.amplification, r.suppression, r.extra_displacement)]
        table.add_row(name if name != last else "", scale_name(scale), *figures, *steps)
        last = name
    return table


def _row(name: str, scale: float, result: SpikeResult) -> dict[str, Any]:
    values = dataclasses.asdict(result)
    return {"optimizer": name, "scale": scale} | {
        key: value.tolist() if key.endswith("rms") else value for key, value in values.items()
    }


def _plot(results: Sequence[Result], path: Path) -> None:
    from matplotlib.figure import Figure

    scales = list(dict.fromkeys(scale for _, scale, _ in results))
    figure = Figure(figsize=(4.5 * len(scales), 4), layout="constrained")
    for axes, scale in zip(figure.subplots(1, len(scales), squeeze=False, sharey=True)[0], scales):
        for i, (name, r) in enumerate((name, r) for name, x, r in results if x == scale):
            axes.plot(range(-r.spike_at, len(r.rms) - r.spike_at), r.rms / r.baseline, label=name, color=f"C{i}")
        axes.set(title=f"gradient x {scale_name(scale)}", xlabel="steps after the spike", yscale="log")
        axes.axhspan(0.9, 1.1, color="0.9", zorder=0)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("update RMS / before the spike")
    figure.axes[-1].legend(fontsize="small")
    figure.savefig(path, dpi=150)
