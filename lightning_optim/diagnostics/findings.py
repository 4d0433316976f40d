"""What a diagnosis says: findings, in order of weight, and one verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .coverage import Coverage

Severity = Literal["broken", "wasteful", "worth a look"]

#: What a finding can weigh, heaviest first: the run does not learn or will not end well; it learns and gives away much
#: of what it could; it may be as it is meant, and somebody should know.
SEVERITIES: tuple[Severity, ...] = ("broken", "wasteful", "worth a look")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a run.

    Args:
        cause: Which of :data:`lightning_optim.diagnostics.causes.CAUSES` it is.
        severity: How bad it is.
        sentence: What happened, since when, where, and why we think so.
        since_step: The first step that shows it, where that can be told.
        where: Names of the parameters concerned, worst first; empty where it is the whole run.
        evidence: The numbers that led to it, by name.
        remedy: What to try.
    """

    cause: str
    severity: Severity
    sentence: str
    remedy: str
    since_step: int | None = None
    where: tuple[str, ...] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The finding as plain values, as in the output of ``lightning-optim diagnostics --json``."""
        return {
            "cause": self.cause,
            "severity": self.severity,
            "sentence": self.sentence,
            "since_step": self.since_step,
            "where": list(self.where),
            "evidence": _plain(self.evidence),
            "remedy": self.remedy,
        }


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with a run, causes before their consequences.

    Args:
        name: The run's name.
        optimizer: The class of its optimizer; empty where the logs do not say.
        findings: Heaviest first.
        coverage: Which parameters were trained, and by which rule; ``None`` where the logs do not say.
        measured: Whether there was anything to judge by.

    Example:
        >>> finding = Finding("diverged", "broken", "The loss rose.", "Lower the learning rate.", since_step=40)
        >>> diagnosis = Diagnosis("a", "SGD", (finding,))
        >>> diagnosis.verdict
        'broken'
        >>> print(diagnosis.line)
        broken: diverged (since step 40)
    """

    name: str
    optimizer: str
    findings: tuple[Finding, ...] = ()
    coverage: Coverage | None = None
    measured: bool = True

    @property
    def verdict(self) -> str:
        """The heaviest severity, ``"healthy"`` without findings, ``"unknown"`` without diagnostics in the logs."""
        if not self.measured:
            return "unknown"
        return min((f.severity for f in self.findings), key=SEVERITIES.index, default="healthy")

    @property
    def line(self) -> str:
        """The verdict as one line, with the first cause."""
        if not self.measured:
            return "unknown: no diagnostics in the logs. Add the callback Diagnostics() and train."
        if not self.findings:
            return "healthy"
        first, *others = self.findings
        since = "" if first.since_step is None else f" (since step {first.since_step})"
        more = f", and {len(others)} more" if others else ""
        return f"{self.verdict}: {first.cause.replace('_', ' ')}{since}{more}"

    def as_dict(self) -> dict[str, Any]:
        """The diagnosis as plain values, as in the output of ``lightning-optim diagnostics --json``."""
        return {
            "name": self.name,
            "optimizer": self.optimizer,
            "verdict": self.verdict,
            "findings": [finding.as_dict() for finding in self.findings],
        }


def to_json(diagnoses: Sequence[Diagnosis]) -> str:
    """All diagnoses as one JSON object.

    >>> print(to_json([Diagnosis("a", "SGD")]))
    {
      "runs": [
        {
          "name": "a",
          "optimizer": "SGD",
          "verdict": "healthy",
          "findings": []
        }
      ]
    }
    """
    return json.dumps({"runs": [diagnosis.as_dict() for diagnosis in diagnoses]}, indent=2, allow_nan=False)


def _plain(x: Any) -> Any:
    """Values that JSON can hold; it has no NaN and no infinity, which become strings."""
    if isinstance(x, Mapping):
        return {str(name): _plain(value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value) for value in x]
    if isinstance(x, float):
        return float(f"{x:.6g}") if math.isfinite(x) else str(x)
    return x
