"""``lightning-optim diagnostics LOGDIR...``: what the diagnostics of runs say, in words and charts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ..errors import UsageError

if TYPE_CHECKING:
    from ...diagnostics.report import Run

DESCRIPTION = "Say what the diagnostics of runs show, and draw them. The sources are in docs/diagnostics.md."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("logdir", nargs="+", help="folder of TensorBoard logs; runs below it are found")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="a page with everything (report.html, or .md), or one figure of all charts (.png, .svg, .pdf)",
    )


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
            _draw(runs, Path(options.out))
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
        raise UsageError(str(error)) from error


def _draw(runs: Sequence[Run], path: Path, diagnoses: Sequence[Any] = ()) -> None:
    """Write a page or a figure of runs, whichever the name of the file says."""
    from ...diagnostics.figures import plot
    from ...diagnostics.report_page import marks_of, report_page

    if not path.parent.is_dir():
        raise ValueError(f"--out {path}: there is no folder {path.parent}.")
    if path.suffix in (".html", ".htm"):
        report_page(runs, diagnoses).write_html(path)
    elif path.suffix == ".md":
        report_page(runs, diagnoses).write_markdown(path)
    elif path.suffix in (".png", ".svg", ".pdf"):
        plot(runs, marks_of(diagnoses)).savefig(path, dpi=130)
    else:
        raise ValueError(f"--out {path}: write a page (.html, .md) or a figure (.png, .svg, .pdf).")
    print(f"{'Page' if path.suffix in ('.html', '.htm', '.md') else 'Figure'}: {path}")
