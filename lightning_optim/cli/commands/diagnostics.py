"""``lightning-optim diagnostics LOGDIR...``: what the diagnostics of runs say, in words and charts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ..errors import UsageError
from ..outputs import check_file

if TYPE_CHECKING:
    from ...diagnostics.findings import Diagnosis
    from ...diagnostics.run import Run

DESCRIPTION = (
    "Say what is wrong with runs, since when, where, and what to try; and which parameters were trained. Causes and "
    "bounds are in docs/diagnostics.md."
)


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
    parser.add_argument("--json", action="store_true", help="print the findings as one JSON object")
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit with 1 if a run is broken or wasteful, was not measured, or does not train parameters as it should",
    )


def run(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        SystemExit: With ``--check``, a run does not pass.
        UsageError: There is nothing to read, or to draw with.
    """
    from ...diagnostics import report
    from ...diagnostics.diagnosis import diagnose
    from ...diagnostics.findings import to_json

    if options.out:
        if Path(options.out).suffix not in (*_PAGES, *_FIGURES):
            raise UsageError(f"--out {options.out}: write a page (.html, .md) or a figure (.png, .svg, .pdf).")
        check_file("--out", options.out)
    try:
        runs = report.read_runs(options.logdir)
        diagnoses = [diagnose(run) for run in runs]
        if options.json:
            print(to_json(diagnoses))
        else:
            for part in report.summary(runs, diagnoses):
                Console().print(part)
        if options.out:
            _draw(runs, Path(options.out), diagnoses)
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
        raise UsageError(str(error)) from error
    if options.check and not all(map(passes, diagnoses)):
        sys.exit(1)


def passes(diagnosis: Diagnosis) -> bool:
    """Whether a run passes ``--check``."""
    covered = diagnosis.coverage is None or not diagnosis.coverage.warnings()
    return diagnosis.verdict in ("healthy", "worth a look") and covered


def _draw(runs: Sequence[Run], path: Path, diagnoses: Sequence[Diagnosis]) -> None:
    """Write a page or a figure of runs, whichever the name of the file says."""
    from ...diagnostics.figures import plot
    from ...diagnostics.report_page import marks_of, report_page

    if path.suffix in (".html", ".htm"):
        report_page(runs, diagnoses).write_html(path)
    elif path.suffix == ".md":
        report_page(runs, diagnoses).write_markdown(path)
    else:
        plot(runs, marks_of(diagnoses)).savefig(path, dpi=130)
    # The output proper may be JSON.
    print(f"{'Page' if path.suffix in _PAGES else 'Figure'}: {path}", file=sys.stderr)
