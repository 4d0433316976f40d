"""What the logs of diagnostics say, in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

from .diagnosis import diagnose
from .figures import charts, plot
from .findings import Diagnosis
from .run import Run, read_runs

__all__ = ["Run", "charts", "plot", "read_runs", "summary"]

_STYLES = {"broken": "bold red", "wasteful": "bold yellow", "worth a look": "yellow", "healthy": "green"}


def summary(runs: Sequence[Run], diagnoses: Sequence[Diagnosis] | None = None) -> Iterable[Table | Text]:
    """What is wrong with each run and what to try, ready to be printed by rich.

    Args:
        runs: The runs.
        diagnoses: What is wrong with them, in the same order. Default: :func:`.diagnosis.diagnose` is asked.
    """
    for diagnosis in diagnoses or [diagnose(run) for run in runs]:
        yield Text(f"{diagnosis.name} ({diagnosis.optimizer})" if diagnosis.optimizer else diagnosis.name, "bold")
        table = Table.grid(padding=(0, 2))
        for finding in diagnosis.findings:
            table.add_row(Text(finding.severity, _STYLES[finding.severity]), Text(finding.sentence))
            table.add_row("", Text(f"Try: {finding.remedy}"))
        if diagnosis.coverage is not None:
            table.add_row("trained", Text(diagnosis.coverage.summary()))
            for warning in diagnosis.coverage.warnings():
                table.add_row("", Text(warning, "yellow"))
        if table.row_count:
            yield table
        yield Text(f"{diagnosis.line}\n", _STYLES.get(diagnosis.verdict, ""))
