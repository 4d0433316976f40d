"""The page about some runs, and what its figures show."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from torch.utils.tensorboard import SummaryWriter

from lightning_optim.cli import main
from lightning_optim.diagnostics import figures
from lightning_optim.diagnostics.charts import LEARNING, QUESTIONS, Chart, by_question
from lightning_optim.diagnostics.layer_maps import LayerMaps, Pictures
from lightning_optim.diagnostics.report import Run, read_runs
from lightning_optim.diagnostics.report_page import report_page

STEPS = list(range(0, 100, 10))
VALUES = [1.0 - 0.05 * i for i in range(10)]


def some_runs(count: int, **scalars: Any) -> list[Run]:
    common = {"train/loss": (STEPS, VALUES), "update/to_weight": (STEPS, [1e-3 * v for v in VALUES])}
    return [Run(f"task/run{i}", common | scalars) for i in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("AdamW-lr0.001-s1", "NAMO-lr0.01-s1"):
        writer = SummaryWriter(tmp_path / name)
        for step in range(20):
            writer.add_scalar("train/loss", 2.0 / (1 + step), step)
            writer.add_scalar("update/to_weight", 1e-3, step)
            writer.add_scalar("outcome/validation_best", 0.875, step)
        writer.close()
        pictures = Pictures(spectra={"updates": {"layer.weight": [3.0, 1.0]}}, spectra_step=19)
        for step in range(20):
            pictures.maps.add(step, {"gradient/norm": {"layer.weight": 1.0 + step, "layer.bias": 0.1}})
        pictures.write(tmp_path / name)
    return tmp_path


def test_the_command_writes_one_page_that_needs_nothing_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = folder / "report.html"
    main(["diagnostics", str(folder), "--out", str(page)])
    assert f"Page: {page}" in capsys.readouterr().err
    text = page.read_text()
    assert not re.search(r'(src|href)="(https?:|//|[^"#d])', text), "nothing from elsewhere"
    for part in ("AdamW-lr0.001-s1", "NAMO-lr0.01-s1", QUESTIONS[0], QUESTIONS[1], "Layers of NAMO-lr0.01-s1", "0.875"):
        assert part in text
    # Curves below two questions; a heat map and a spectrum of each run.
    assert text.count("<svg ") == 2 + 2 * 2
    assert "Norm of the change of all parameters in a step" in text


@pytest.mark.parametrize(
    ("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.md", b"# Diagnostics of 2 runs")]
)
def test_the_name_of_the_file_says_what_is_written(name: str, start: bytes, folder: Path) -> None:
    main(["diagnostics", str(folder), "--out", str(folder / name)])
    assert (folder / name).read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.txt", "write a page (.html, .md) or a figure (.png, .svg, .pdf)"),
        ("report", "write a page (.html, .md) or a figure (.png, .svg, .pdf)"),
        ("nowhere/a.html", "there is no folder"),
    ],
)
def test_other_names_are_refused(name: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["diagnostics", str(folder), "--out", str(folder / name)])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def finding(cause: str, step: int | None) -> Any:
    return SimpleNamespace(
        cause=cause, severity="broken", sentence=f"{cause} happened.", remedy="Lower it.", since_step=step, where=()
    )


def diagnosis(name: str, *findings: Any) -> Any:
    line = "broken: diverged" if findings else "healthy"
    coverage = SimpleNamespace(summary=lambda: "NAMO: 45 % of the parameters", warnings=lambda: ["much is left over"])
    return SimpleNamespace(name=name, optimizer="NAMO", findings=findings, line=line, coverage=coverage)


def test_the_verdict_comes_first_and_is_marked_on_the_curves() -> None:
    runs = some_runs(2)
    diagnoses = [
        diagnosis(runs[0].name, finding("diverged", 40), finding("lr_too_high", None)),
        diagnosis(runs[1].name),
    ]
    text = report_page(runs, diagnoses).markdown()
    order = [text.index(part) for part in ("What is wrong?", "diverged happened.", "45 %", QUESTIONS[0], QUESTIONS[1])]
    assert order == sorted(order)
    assert "Triangles: a finding begins." in text
    (axes, *_) = figures.plot(runs, {runs[0].name: [(40, "diverged")]}).axes
    marks = [line for line in axes.lines if line.get_marker() == "v"]
    assert [line.get_xydata().tolist() for line in marks] == [[[40, pytest.approx(0.8)]]]


def test_twelve_runs_have_colours_of_their_own() -> None:
    (axes, *_) = figures.plot(some_runs(12)).axes
    colours = np.array([to_rgb(line.get_color()) for line in axes.lines])
    assert len(colours) == 12
    distances = np.abs(colours[:, None] - colours).max(-1)[np.triu_indices(12, 1)]
    assert distances.min() > 0.1, "a tenth of the range, in one of red, green and blue"


def test_panels_are_ordered_by_question_and_metrics_stand_alone() -> None:
    metrics = {"val/loss": (STEPS, VALUES), "val/accuracy": (STEPS, VALUES), "gradient/norm": (STEPS, VALUES)}
    metrics |= {"lr-AdamW/pg1": (STEPS, VALUES), "AdamW0/update/rms": (STEPS, VALUES)}
    found = figures.panels(some_runs(1, **metrics))
    assert list(found) == [question for question in QUESTIONS if question in found]
    titles = [panel.chart.title for panel in found[QUESTIONS[0]]]
    assert titles == ["train/loss", "val/loss", "val/accuracy", "learning rate"]
    # Labels of several optimizers come before the tag.
    assert ("AdamW0/update/rms",) in [panel.tags for panel in found[QUESTIONS[1]]]


def test_every_chart_says_what_it_is() -> None:
    charts = figures.charts()
    assert set(LEARNING) < set(charts)
    for title, chart in charts.items():
        assert title == chart.title
        assert chart.question in QUESTIONS
        for words in (chart.about, chart.advice):
            assert words.endswith("."), title
        assert chart.unit
        low, high = chart.healthy
        assert low is None or high is None or low < high
    assert list(by_question(charts.values())) == list(QUESTIONS)


@pytest.mark.parametrize(
    ("healthy", "values", "log", "expected"),
    [
        ((1e-4, 1e-2), [1e-3, 5e-3, 2e-2], True, (1e-4, 1e-2)),
        ((None, 0.5), [0.1, 0.4], False, (None, 0.5)),
        ((None, 0.5), [100.0, 200.0], False, None),
        ((0.1, 10.0), [0.01, 20.0], True, (0.1, 10.0)),
    ],
)
def test_what_is_healthy_is_shaded(
    healthy: Any, values: list[float], log: bool, expected: tuple[float | None, float] | None
) -> None:
    from matplotlib.figure import Figure

    chart = Chart("x", ("x$",), "About.", "none", "Advice.", QUESTIONS[1], healthy=healthy, log=log)
    axes = Figure().add_subplot()
    figures.draw(axes, figures.Panel(chart, ("x",)), [Run("a", {"x": (list(range(len(values))), values)})])
    bottom, top = axes.get_ylim()
    assert bottom < min(values) < max(values) < top
    bands = [patch.get_extents().transformed(axes.transData.inverted()) for patch in axes.patches]
    if expected is None:
        assert bands == []
    else:
        (band,) = bands
        assert band.y1 == pytest.approx(expected[1])
        assert band.y0 == pytest.approx(bottom if expected[0] is None else expected[0])


def test_long_curves_keep_their_peaks() -> None:
    values = np.sin(np.arange(100_000) / 1000)
    values[77_777] = 50.0
    steps, thin = figures._thinned(list(range(100_000)), values.tolist())
    assert len(steps) <= 602
    assert (77_777, 50.0) in set(zip(steps, thin))
    assert (steps[0], steps[-1]) == (0, 99_999)


@pytest.mark.parametrize("layers", [1, 5, 400])
def test_a_heat_map_is_legible_as_a_thumbnail(layers: int) -> None:
    maps = LayerMaps()
    for step in range(30):
        maps.add(
            step, {"norm": {f"blocks.{i}.attention.output.weight": 10.0**-i if i < 9 else 1.0 for i in range(layers)}}
        )
    figure = figures.heat_map(maps, "norm", "gradient norm")
    axes = figure.axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(labels) <= 8
    assert all(len(label) <= 18 for label in labels)
    # Shown at a third of its size, letters are at least 3 pixels high: 9 points are 12.5 pixels at 100 dpi.
    assert min(label.get_fontsize() for label in axes.get_yticklabels()) >= 9
    assert figures.heat_map(maps, "none") is None


def test_nothing_to_show() -> None:
    with pytest.raises(ValueError, match="nothing to show"):
        report_page([Run("empty", {"epoch": ([0], [0.0])})])


def test_runs_know_their_folder(folder: Path) -> None:
    assert [run.folder for run in read_runs([folder])] == [folder / "AdamW-lr0.001-s1", folder / "NAMO-lr0.01-s1"]
