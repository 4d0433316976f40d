"""One page about some runs: what is wrong, how they went, and how their layers did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..page import Page
from . import figures
from .charts import LEARNING, Chart
from .layer_maps import Pictures
from .run import Run

#: Runs whose layers are shown. A page of many runs is about the differences between them.
_MOST_IN_DETAIL = 12


def report_page(runs: Sequence[Run], diagnoses: Sequence[Any] = ()) -> Page:
    """A page with the verdict on each run, its coverage, curves of all runs, heat maps and spectra.

    Args:
        runs: The runs.
        diagnoses: What is wrong with them, in the same order: :class:`.findings.Diagnosis`.

    Raises:
        ValueError: There is nothing to show.
    """
    groups = figures.panels(runs)
    if not groups:
        raise ValueError("There is nothing to show: the runs hold no diagnostics. Add the callback Diagnostics().")
    names = ", ".join(run.name for run in runs[:6]) + (f" and {len(runs) - 6} more" if len(runs) > 6 else "")
    page = Page("Diagnostics of 1 run" if len(runs) == 1 else f"Diagnostics of {len(runs)} runs", names)
    if diagnoses:
        _verdict(page, diagnoses)
    _outcome(page, runs)
    marks = marks_of(diagnoses)
    learning = next(iter(LEARNING.values())).question
    for question, group in groups.items():
        page.heading(question)
        page.figure(
            figures.curves(group, runs, marks if question == learning else None),
            _caption(group, marked=question == learning and any(marks.values())),
        )
        page.table(
            ["chart", "what it shows", "unit", "usually healthy", "what to look for"],
            [[chart.title, chart.about, chart.unit, chart.bounds or "-", chart.advice] for chart in _declared(group)],
        )
    for run in runs[:_MOST_IN_DETAIL]:
        _layers(page, run)
    return page


def marks_of(diagnoses: Sequence[Any]) -> dict[str, list[tuple[int, str]]]:
    """By run, the steps since which something is wrong, and what."""
    return {d.name: [(f.since_step, f.cause) for f in d.findings if f.since_step is not None] for d in diagnoses}


def _verdict(page: Page, diagnoses: Sequence[Any]) -> None:
    page.heading("What is wrong?")
    page.table(["run", "optimizer", "verdict"], [[d.name, d.optimizer or "-", d.line] for d in diagnoses])
    for diagnosis in diagnoses:
        if diagnosis.findings:
            page.table(
                ["severity", "since step", "what", "what to try"],
                [
                    [f.severity, "-" if f.since_step is None else f.since_step, f.sentence, f.remedy]
                    for f in diagnosis.findings
                ],
                caption=f"**{diagnosis.name}**",
            )
    covered = [d for d in diagnoses if getattr(d, "coverage", None) is not None]
    if covered:
        page.heading("Which rule trains what?")
        for diagnosis in covered:
            page.text(f"**{diagnosis.name}**: {diagnosis.coverage.summary()}")
            for warning in diagnosis.coverage.warnings():
                page.text(warning)


_OUTCOMES = {
    "best validation": r"outcome/validation_best$",
    "last validation": r"outcome/validation_last$",
    "train loss": r"outcome/train_loss$",
    "steps/s": r"outcome/steps_per_second$",
}


def _outcome(page: Page, runs: Sequence[Run]) -> None:
    rows = []
    for run in runs:
        found = {name: run.tags(pattern) for name, pattern in _OUTCOMES.items()}
        last = max((steps[-1] for steps, _ in run.scalars.values() if steps), default=0)
        rows.append(
            [run.name, last, *(f"{run.scalars[tags[0]][1][-1]:.4g}" if tags else "-" for tags in found.values())]
        )
    page.heading("How did it go?")
    page.table(["run", "last step", *_OUTCOMES], rows)


def _caption(group: Sequence[figures.Panel], marked: bool) -> str:
    parts = ["A colour per run."]
    if any(len(panel.tags) > 1 for panel in group):
        parts.append("A line style per value.")
    if any(panel.chart.bounds for panel in group):
        parts.append("Green: usually healthy.")
    if marked:
        parts.append("Triangles: a finding begins.")
    return " ".join(parts)


def _declared(group: Sequence[figures.Panel]) -> list[Chart]:
    """The charts of panels, each once: single losses and metrics have panels of their own."""
    by_description = {chart.about: chart for chart in LEARNING.values()}
    return list({panel.chart.about: by_description.get(panel.chart.about, panel.chart) for panel in group}.values())


def _layers(page: Page, run: Run) -> None:
    pictures = Pictures.read(run.folder) if run.folder is not None else Pictures()
    maps = [name for name in pictures.maps.names if any(name in column for column in pictures.maps.columns)]
    drawn = [(name, figure) for name in maps if (figure := figures.heat_map(pictures.maps, name)) is not None]
    if not drawn and not any(pictures.spectra.values()):
        return
    page.heading(f"Layers of {run.name}", folded=True)
    for name, figure in drawn:
        page.figure(figure, f"`{name}`: a row per parameter, a column per measured step.")
    for kind, values in pictures.spectra.items():
        if values:
            page.figure(
                figures.spectra(values, f"spectra of {kind}"),
                f"Singular values of the {kind} of some matrices over their mean, at step {pictures.spectra_step}. A "
                "flat line at 1 is an orthogonal matrix.",
            )
