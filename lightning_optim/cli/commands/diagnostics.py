"""``lightning-optim diagnostics LOGDIR...``: what the diagnostics of runs say, in words and charts."""

from __future__ import annotations

import argparse

from rich.console import Console

from ..errors import UsageError

DESCRIPTION = "Say what the diagnostics of runs show, and draw them. The sources are in docs/diagnostics.md."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("logdir", nargs="+", help="folder of TensorBoard logs; runs below it are found")
    parser.add_argument("--out", metavar="FIG.png", help="draw all charts of all runs into this file")


def run(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        UsageError: There is nothing to read, or to draw with.
    """
    from ...diagnostics import report

    try:
        runs = report.read_runs(options.logdir)
        for part in report.summary(runs):
            Console().print(part)
        if options.out:
            report.plot(runs).savefig(options.out, dpi=130)
            print(f"Figure: {options.out}")
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
        raise UsageError(str(error)) from error
