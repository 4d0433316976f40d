"""``lightning-optim diagnostics LOGDIR...``: what the diagnostics of runs say, in words and charts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ..errors import UsageError
from ..outputs import check_file

if TYPE_CHECKING:
    from ...diagnostics.report import Run

DESCRIPTION = "Say what the diagnostics of runs show, and draw them. The sources are in docs/diagnostics.md."


_PAGES = (".html", ".htm", ".md")
_FIGURES = (".png", ".svg", ".pdf")


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

    if options.out:
        if Path(options.out).suffix not in (*_PAGES, *_FIGURES):
            raise UsageError(f"--out {options.out}: write a page (.html, .md) or a figure (.png, .svg, .pdf).")
        check_file("--out", options.out)
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

    if path.suffix in (".html", ".htm"):
        report_page(runs, diagnoses).write_html(path)
    elif path.suffix == ".md":
        report_page(runs, diagnoses).write_markdown(path)
    else:
        plot(runs, marks_of(diagnoses)).savefig(path, dpi=130)
    print(f"{'Page' if path.suffix in _PAGES else 'Figure'}: {path}")
