"""``lightning-optim compare``: which optimizer is better on a model."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path

from rich.console import Console

from ..compared import CommandLineTask
from ..errors import UsageError, explained
from ..invocation import check_options

DESCRIPTION = (
    "Compare optimizers on a model, all tuned equally. Arguments of `lightning-optim fit` say what is trained (-c, "
    "--model, --data, --trainer.*; default: the preset digits). Results are kept, and the same command goes on where "
    "it was ended. docs/compare.md says what makes it fair, and how to read the report."
)

#: Arguments that are not those of this command are those of the task.
TAKES_OTHERS = True

#: Length of a run where nothing is said of the task: with it, three optimizers take a few minutes on two cores.
_DEFAULT_STEPS = 100

_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.allow_abbrev = False
    parser.add_argument(
        "--optimizers",
        nargs="+",
        default=["AdamW", "MVNGrad", "NAMO"],
        metavar="NAME",
        help="names, or dotted paths of torch optimizers, perhaps with arguments: NAMO:scale=0.4,nesterov=false. AdamW "
        "is always among them (default: AdamW MVNGrad NAMO)",
    )
    parser.add_argument(
        "--lr",
        metavar="LOW:HIGH:xFACTOR",
        help="learning rates to begin with, as 1e-4:1e-1:x2 (default: rates around that of each one's declaration)",
    )
    parser.add_argument("--trials", type=int, default=7, metavar="N", help="settings to try of each at first (7)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="reporting runs of each (5)")
    parser.add_argument("--tuning_seeds", type=int, default=3, metavar="N", help="runs of the best settings (3)")
    parser.add_argument("--steps", type=int, metavar="N", help="length of a run (default: that of the task)")
    parser.add_argument("--budget", type=_seconds, metavar="TIME", help="as 90s, 30m, 2h: the largest design that fits")
    parser.add_argument(
        "--also",
        nargs="+",
        default=[],
        metavar="NAME=LOW:HIGH",
        help="hyperparameters to search beside the learning rate, as weight_decay=1e-3:1 fallback_ratio=0.03:1; by TPE",
    )
    parser.add_argument("--search", choices=["grid", "tpe"], help="how to search (default: grid, tpe with --also)")
    parser.add_argument(
        "--weight_decay", default="0.01", metavar="X", help="of all; `own` for each one's default (0.01)"
    )
    parser.add_argument(
        "--decay", choices=["decoupled", "own"], default="decoupled", help="its form: decoupled wherever one can be"
    )
    parser.add_argument("--metric", metavar="NAME", help="what is compared (default: the validation loss)")
    parser.add_argument("--mode", choices=["min", "max"], default="min", help="whether it is to be small or large")
    parser.add_argument("--study", type=Path, metavar="DIR", help="folder (default: comparisons/ and the task's name)")
    parser.add_argument(
        "--storage", metavar="URL", help="database that several machines share, as postgresql://... (default: a file)"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one per GPU, or per core)")
    parser.add_argument("--executor", choices=["local", "ray"], default="local", help="where runs are made")


def run(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        UsageError: An argument is wrong.
    """
    check_options(options.others)
    for arg in options.others:
        if re.match(r"--(optimizer|seed_everything)\b", arg):
            raise UsageError(
                f"{arg} has no place in a comparison: --optimizers NAME:ARGUMENT=VALUE names contenders and their "
                "arguments, and seeds are --seeds."
            )
    from ...compare.design import Design, Rates, contenders
    from ...compare.study import run_study

    task = CommandLineTask(options.others)
    weight_decay = None if options.weight_decay == "own" else _number("--weight_decay", options.weight_decay)
    if options.jobs is not None and options.jobs < 1:
        raise UsageError(f"--jobs must be at least 1, got {options.jobs}.")
    console = Console(stderr=True)
    if not options.others and options.steps is None:
        options.steps = _DEFAULT_STEPS
        console.print(
            f"The preset {task.name}, shortened to {options.steps} steps a run; --steps N sets another length."
        )
    folder = options.study or Path("comparisons") / task.name
    command = shlex.join(["lightning-optim", "compare", *sys.argv[2:]])
    also = dict(_range(text) for text in options.also)
    with explained():
        design = Design(
            tuple(contenders(options.optimizers, weight_decay, options.decay)),
            trials=options.trials,
            most_trials=2 * options.trials,
            seeds=options.seeds,
            tuning_seeds=options.tuning_seeds,
            steps=options.steps,
            rates=Rates.parse(options.lr) if options.lr else None,
            search=options.search or ("tpe" if also else "grid"),
            also=also,
            metric=options.metric,
            mode=options.mode,
        )
        try:
            comparison = run_study(
                task, design, folder, options.storage, options.budget, options.jobs, options.executor, console, command
            )
        except KeyboardInterrupt:
            print(f"\nEnded. The finished runs are kept in {folder}; the same command goes on.", file=sys.stderr)
            raise SystemExit(130) from None
    print(comparison.table())
    for remark in comparison.remarks:
        print(remark)
    print(f"Report: {folder / 'report.html'}   All runs: tensorboard --logdir {folder / 'tensorboard'}")


def _seconds(text: str) -> float:
    found = re.fullmatch(r"([\d.]+)\s*([a-z]+)", text)
    if not found or found[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"expected a time as 90s, 30m or 2h, got {text!r}")
    return float(found[1]) * _UNITS[found[2]]


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(f"{option} must be a number, got {text!r}.") from error


def _range(text: str) -> tuple[str, tuple[float, float]]:
    name, _, bounds = text.partition("=")
    low, _, high = bounds.partition(":")
    try:
        return name, (float(low), float(high))
    except ValueError as error:
        raise UsageError(f"--also {text}: write NAME=LOW:HIGH, as weight_decay=1e-3:1.") from error
