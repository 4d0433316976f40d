"""``lightning-optim spike``: what a gradient spike does to optimizers."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.optim import Optimizer

from ...diagnostics.spike_response import TOLERANCE, SpikeResult, scale_name, spike_response
from ...engine.two_rules import MatrixOptimizer
from ...page import COLOURS
from ...registry import OptimizerInfo, get
from ..errors import explained
from ..outputs import check_figure, check_file

DESCRIPTION = (
    "Show what a gradient spike does to optimizers. They get independent normal gradients of a 128 x 64 matrix, in one "
    "of which the noise is many times too large, and are compared step by step with themselves without the spike. The "
    "table shows how large updates are from then on, after how many steps they are what they would have been, and how "
    "much progress is lost where gradients have a mean, too. Learning rate 1, no weight decay, other hyperparameters "
    "at their defaults."
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
    parser.add_argument(
        "--signal",
        type=float,
        default=1.0,
        help="size of the mean of the gradients relative to the noise, where they have one (default: 1)",
    )
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
    infos = [get(name) for name in dict.fromkeys(options.optimizers)]
    if options.out:
        check_figure("--out", options.out)
    if options.json:
        check_file("--json", options.json)
    if not options.signal > 0:
        raise ValueError(f"--signal must be positive, got {options.signal}.")
    torch.set_num_threads(1)  # The matrix is too small to share out.
    scales = sorted(dict.fromkeys(options.scales))
    jobs = [(info, scale) for info in infos for scale in scales]
    results = [
        Result(info.name, scale, _respond(info, scale, options), _respond(info, scale, options, options.signal))
        for info, scale in track(jobs, "Optimizers and spikes", console=Console(stderr=True), transient=True)
    ]
    Console().print(_table(results, options))
    for sentence in conclusions(results):
        print(sentence)
    if options.json:
        options.json.write_text(json.dumps([_row(result) for result in results], indent=1) + "\n")
    if options.out:
        _plot(results, options)


class Result(NamedTuple):
    """Responses of an optimizer to a spike."""

    name: str
    scale: float
    noise: SpikeResult  # among gradients that are noise alone
    signal: SpikeResult  # among gradients that have a mean


def build(info: OptimizerInfo, params: list[nn.Parameter]) -> Optimizer:
    """An optimizer of matrices with a learning rate of 1 and no weight decay."""
    cls: Any = info.cls
    arguments = {"lr": 1.0} | ({"weight_decay": 0.0} if "weight_decay" in info.defaults else {})
    is_matrix = issubclass(cls, MatrixOptimizer)
    return cls([{"params": params, "role": "matrix"}] if is_matrix else params, **arguments)


def _respond(info: OptimizerInfo, scale: float, options: argparse.Namespace, signal: float = 0.0) -> SpikeResult:
    return spike_response(
        lambda params: build(info, params),
        scale,
        spike_at=options.at,
        after=options.after,
        seed=options.seed,
        signal=signal,
    )


def _table(results: Sequence[Result], options: argparse.Namespace) -> Table:
    table = Table(
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
        caption="Largest, smallest: update RMS relative to that without the spike in the same step. Recovery: steps "
        "until it stays within 10 % of that. Crossing: until it is within 10 % of the last steps for the first time, "
        "maybe on its way from too large to too small. Astray: sum of the differences to the updates without the "
        "spike, in ordinary updates. Lost: steps of progress where gradients have a mean, "
        f"{options.signal:g} times the noise.",
        caption_justify="left",
    )
    table.add_column("optimizer")
    for column in ("spike", "largest", "smallest", "recovery", "crossing", "astray", "lost"):
        table.add_column(column, justify="right")
    last = None
    for name, scale, r, with_signal in results:
        steps = [f">{options.after}" if x is None else str(x) for x in (r.recovery_steps, r.crossing_steps)]
        largest, smallest, astray, lost = (
            f"{x:.3g}" for x in (r.amplification, r.suppression, r.extra_displacement, with_signal.lost_steps)
        )
        table.add_row(name if name != last else "", scale_name(scale), largest, smallest, *steps, astray, lost)
        last = name
    return table


# --- conclusions --------------------------------------------------------------------------------------------------


def conclusions(results: Sequence[Result]) -> list[str]:
    """A sentence for each optimizer, and one for those that respond alike."""
    by_name: dict[str, list[Result]] = {}
    for result in results:
        by_name.setdefault(result.name, []).append(result)
    sentences = [f"{name}: {_conclusion(of_it)}" for name, of_it in by_name.items()]
    for group in _alike(by_name):
        sentences.append(f"{' and '.join(group)} respond alike: to within 10 % at every step.")
    return sentences


def _conclusion(results: Sequence[Result]) -> str:
    """What the largest spike does to an optimizer, and whether a larger one does more."""
    worst = results[-1]
    r, lost = worst.noise, worst.signal.lost_steps
    spike = f"a spike of {scale_name(worst.scale)}"
    if r.amplification <= 1 + TOLERANCE and r.suppression >= 1 - TOLERANCE:
        size = f"the size of its updates does not respond to {spike}"
    else:
        size = f"{spike} makes its updates up to {r.amplification:.3g} times as large"
        if len(results) > 1 and r.amplification > 1 + TOLERANCE:
            grown = r.amplification / results[-2].noise.amplification
            size += ", and a larger one more" if grown > 2 else ", and a larger one hardly more"
        if r.suppression < 1 - TOLERANCE:
            size += f"; then they are too small, down to {r.suppression:.2g} of what they were"
    after = len(r.rms) - r.spike_at - 1
    steps = f"after {r.recovery_steps} steps" if r.recovery_steps != 1 else "with the next step"
    recovered = f"not recovered after {after} steps" if r.recovery_steps is None else f"back to normal {steps}"
    if size.startswith("the size"):
        recovered = (
            "where they point to does, while momentum holds the spike" if abs(lost) >= 1 else "nothing to recover"
        )
    cost = "no progress is lost" if abs(lost) < 1 else f"{abs(lost):.3g} steps of progress are lost"
    if lost <= -1:
        cost = f"it ends {-lost:.3g} steps ahead"
    return f"{size}; {recovered}; {cost}."


def _alike(by_name: Mapping[str, Sequence[Result]]) -> list[list[str]]:
    """Groups of optimizers whose curves cannot be told apart."""
    groups: list[list[str]] = []
    for name, of_it in by_name.items():
        for group in groups:
            if all(_same(x, y) for x, y in zip(of_it, by_name[group[0]])):
                group.append(name)
                break
        else:
            groups.append([name])
    return [group for group in groups if len(group) > 1]


def _same(x: Result, y: Result) -> bool:
    """Whether sizes of updates differ by 10 % at most, and progress by a tenth or by one step."""
    a, b = x.noise.ratios, y.noise.ratios
    behind, other = x.signal.lost, y.signal.lost
    sizes = bool(((a - b).abs() <= TOLERANCE * b.abs()).all())
    return sizes and bool(((behind - other).abs() <= TOLERANCE * other.abs() + 1).all())


def _row(result: Result) -> dict[str, Any]:
    values = dataclasses.asdict(result.noise) | {"lost": result.signal.lost, "lost_steps": result.signal.lost_steps}
    return {"optimizer": result.name, "scale": result.scale} | {
        key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in values.items()
    }


# --- figure -------------------------------------------------------------------------------------------------------


def _plot(results: Sequence[Result], options: argparse.Namespace) -> None:
    """A column per size of the spike; above the size of updates, below the progress that is lost."""
    from matplotlib.figure import Figure

    scales = list(dict.fromkeys(result.scale for result in results))
    names = list(dict.fromkeys(result.name for result in results))
    figure = Figure(figsize=(4.6 * len(scales), 7.4), layout="constrained")
    sizes, behind = figure.subplots(2, len(scales), squeeze=False, sharex=True, sharey="row")
    for upper, lower, scale in zip(sizes, behind, scales):
        for result in results:
            if result.scale == scale:
                k = names.index(result.name)
                # Of curves that lie on each other, every one shows beside those above it.
                style: dict[str, Any] = {"color": COLOURS[k % len(COLOURS)]}
                style["linewidth"] = 1.2 + 3 * (1 - k / len(names))
                x = range(-options.at, options.after + 1)
                upper.plot(x, result.noise.ratios.clamp(min=1e-7), label=result.name, **style)
                lower.plot(x, result.signal.lost, **style)
        upper.set(title=f"spike x {scale_name(scale)}", yscale="log")
        upper.axhspan(1 - TOLERANCE, 1 + TOLERANCE, color="0.9", zorder=0)
        lower.set_yscale("symlog", linthresh=10)
        lower.set_xlabel("steps after the spike")
        for axes in (upper, lower):
            axes.set_xlim(-min(10, options.at), options.after)
            axes.grid(alpha=0.3)
    sizes[0].set_ylabel("size: update RMS over that without the spike")
    behind[0].set_ylabel(f"steps of progress lost (mean of gradients {options.signal:g} x noise)")
    figure.legend(*sizes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(options.out, dpi=130)
