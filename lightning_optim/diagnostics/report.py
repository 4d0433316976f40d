"""What the logs of diagnostics say, in words and charts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.table import Table
from rich.text import Text

from .figures import charts, plot

__all__ = ["CHECKS", "Check", "Finding", "Run", "charts", "examine", "plot", "read_runs", "summary"]


@dataclass(frozen=True)
class Run:
    """The scalars of one run.

    Args:
        name: What to call it.
        scalars: By tag, steps and values.
        folder: Where its logs are.
    """

    name: str
    scalars: Mapping[str, tuple[list[int], list[float]]]
    folder: Path | None = None

    def tags(self, pattern: str) -> list[str]:
        """Its tags that match a regular expression, which may begin after the label of an optimizer."""
        return [tag for tag in self.scalars if re.search(rf"(^|/){pattern}", tag)]


def read_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Every TensorBoard run in some folders and the folders below them.

    Args:
        folders: Folders of TensorBoard's event files.

    Returns:
        Runs in the order of their names. A run that was resumed, and so has several event files, is one; of values
        that were logged twice for a step, the later one counts.

    Raises:
        FileNotFoundError: A folder holds no event files.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs: dict[Path, Run] = {}
    for folder in map(Path, folders):
        places = sorted({path.parent for path in folder.rglob("events.out.tfevents.*")})
        if not places:
            raise FileNotFoundError(f"{folder}: no TensorBoard event files here or below.")
        for place in places:
            events = EventAccumulator(str(place), size_guidance={"scalars": 0}).Reload()
            scalars = {}
            for tag in events.Tags()["scalars"]:
                # Files come by their names, in which 10 sorts before 9.
                by_time = sorted(events.Scalars(tag), key=lambda event: event.wall_time)
                series = {event.step: event.value for event in by_time}
                scalars[tag] = (sorted(series), [series[step] for step in sorted(series)])
            name = str(place.relative_to(folder)) if place != folder else place.name
            runs[place] = Run(
                name if name not in {run.name for run in runs.values()} else str(place), scalars, folder=place
            )
    return list(runs.values())


# --- what is healthy ---------------------------------------------------------------------------------------------


def _typical(values: Sequence[float]) -> float:
    """Median of the second half, which the beginning of a run does not touch."""
    return median(values[len(values) // 2 :])


def _last(values: Sequence[float]) -> float:
    return values[-1]


@dataclass(frozen=True)
class Check:
    """One thing to look at.

    Args:
        tag: The scalar.
        value: The number that is looked at, from the scalar's values.
        low: What is below it is not healthy.
        high: What is above it is not healthy.
        healthy: What it means within these bounds.
        below: What it means below.
        above: What it means above.
        source: Where the bounds are from.
    """

    tag: str
    value: Callable[[Sequence[float]], float]
    low: float
    high: float
    healthy: str
    below: str
    above: str
    source: str


_OURS = "a rule of thumb of this library"

#: What ``lightning-optim diagnostics`` looks at, with the bounds of what it calls healthy.
CHECKS = (
    Check(
        "update/to_weight", _typical, 1e-4, 1e-2,
        "Weights move by about a thousandth per step.",
        "Weights hardly move: the learning rate may be too small.",
        "Weights move by more than a hundredth per step: the learning rate may be too large.",
        "guide of 1e-3, A. Karpathy, 'Building makemore 3'; a factor of ten to each side",
    ),
    Check(
        "update/stalled", _typical, 0.0, 0.1,
        "Updates reach the weights.",
        "",
        "Updates are lost to rounding: keep float32 weights (bf16-mixed instead of bf16-true).",
        _OURS,
    ),
    Check(
        "gradient/clipped_fraction", _typical, 0.0, 0.5,
        "Most steps are not clipped.",
        "",
        "Most steps are clipped: the clipping threshold sets the step size. Raise it, or lower the learning rate.",
        _OURS,
    ),
    Check(
        "gradient/zeros", _typical, 0.0, 0.5,
        "Most weights get a gradient.",
        "",
        "Most weights get no gradient: units are dead, or inputs (rare tokens, padded borders) never reach them.",
        _OURS,
    ),
    Check(
        "gradient/nonfinite", max, 0.0, 0.0,
        "All gradients were finite.",
        "",
        "Some gradients held NaN or infinity: look at the loss and the data of those steps.",
        "what optimizers expect",
    ),
    Check(
        "gradient/skipped_steps", _last, 0.0, 10.0,
        "None or few steps were skipped, as a loss scaler does while it finds its scale.",
        "",
        "Steps keep being skipped: gradients overflow. Lower the learning rate, or use bf16-mixed.",
        "torch.amp.GradScaler starts at 65,536 and halves the scale at each overflow",
    ),
    Check(
        "sign_collapse/index", _typical, 0.0, 0.95,
        "Entries of the updates differ in size.",
        "",
        "All entries of the updates have the same size: the optimizer follows only the sign of the gradient.",
        "1 for a sign vector, 0.64 for a Gaussian one",
    ),
    Check(
        "orthogonality/factor_error", _typical, 0.0, 0.6,
        "Orthogonalised momentum is as orthogonal as five steps of Newton-Schulz make it.",
        "",
        "Orthogonalised momentum is far from orthogonal: choose an orthogonalizer with more steps, as pe6 or pe8.",
        "0.2 to 0.4 with kj5, whose singular values lie between 0.7 and 1.2",
    ),
    Check(
        "spike/amplification", max, 0.0, 10.0,
        "Updates after gradient spikes stayed within ten times their size.",
        "",
        "A gradient spike was followed by updates ten times as large or more: clip gradients, or look at that batch.",
        _OURS,
    ),
    Check(
        "diagnostics/overhead_share", _typical, 0.0, 0.05,
        "Diagnostics cost little.",
        "",
        "Diagnostics take more than a twentieth of the time: raise every_n_steps, or choose a lower tier.",
        _OURS,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """What a check says about a run."""

    tag: str
    value: float
    healthy: bool
    meaning: str
    bounds: str
    source: str


def examine(run: Run) -> list[Finding]:
    """Apply every check to the scalars that a run has.

    Example:
        >>> finding, = examine(Run("r", {"update/to_weight": ([0, 1], [0.2, 0.3])}))
        >>> finding.healthy, finding.meaning
        (False, 'Weights move by more than a hundredth per step: the learning rate may be too large.')
    """
    findings = []
    for check in CHECKS:
        for tag in run.tags(f"{re.escape(check.tag)}$"):
            value = check.value(run.scalars[tag][1])
            meaning = check.healthy
            if value < check.low:
                meaning = check.below
            elif value > check.high or math.isnan(value):
                meaning = check.above
            bounds = f"{check.low:g} to {check.high:g}" if check.low else f"at most {check.high:g}"
            findings.append(Finding(tag, value, meaning == check.healthy, meaning, bounds, check.source))
    return findings


# --- words -----------------------------------------------------------------------------------------------------


def summary(runs: Sequence[Run]) -> Iterable[Table | Text]:
    """What looks healthy in each run and what does not, ready to be printed by rich."""
    for run in runs:
        findings = examine(run)
        if not findings:
            yield Text(f"{run.name}: no diagnostics in its logs. Add the callback Diagnostics() and train.")
            continue
        table = Table.grid(padding=(0, 2))
        for finding in sorted(findings, key=lambda finding: finding.healthy):
            mark = Text("ok", "green") if finding.healthy else Text("look", "bold yellow")
            table.add_row(mark, f"{finding.tag:<27}{finding.value:<10.3g}{finding.bounds}\n{finding.meaning}")
        yield Text(run.name, "bold")
        yield table
