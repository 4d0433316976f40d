"""Figures of runs: curves with what is healthy, heat maps of layers, spectra. They are matplotlib's."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..page import series_style
from .charts import CHARTS, COST, LEARNING, Chart, by_question
from .layer_maps import LayerMaps

if TYPE_CHECKING:
    from .run import Run

#: By run, steps at which something happened, and what.
Marks = Mapping[str, Sequence[tuple[int, str]]]

_TAG_LINES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1, 1, 1)))
_HEALTHY = "#2e9e5b"


def shown_in_notebooks(figure: Any) -> Any:
    """The figure, as a picture where a notebook shows it: notebooks only know figures made with pyplot."""
    figure._repr_png_ = lambda: png(figure)
    return figure


def png(figure: Any) -> bytes:
    """A figure as the content of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=90)
    return file.getvalue()


# --- curves -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """A chart that some runs have values for."""

    chart: Chart
    tags: tuple[str, ...]


def charts() -> dict[str, Chart]:
    """The charts of all diagnostics by title, in the order of the questions that they answer."""
    known = [*LEARNING.values(), *(chart for of_it in CHARTS.values() for chart in of_it.values()), COST]
    return {chart.title: chart for group in by_question(known).values() for chart in group}


def panels(runs: Sequence[Run]) -> dict[str, list[Panel]]:
    """What there is to draw of some runs, below the questions that it answers.

    Losses, metrics and learning rates, whose units differ, get a panel for each tag.
    """
    found: dict[str, list[Panel]] = {}
    for chart in charts().values():
        tags = list(dict.fromkeys(tag for run in runs for tag in run.scalars if chart.shows(tag)))
        if tags and chart.title in ("training loss", "validation"):
            panel = [Panel(replace(chart, title=tag), (tag,)) for tag in tags]
        else:
            panel = [Panel(chart, tuple(tags))] if tags else []
        found.setdefault(chart.question, []).extend(panel)
    return {question: of_it for question, of_it in found.items() if of_it}


def draw(axes: Any, panel: Panel, runs: Sequence[Run], marks: Marks | None = None, size: float = 8) -> None:
    """Draw a panel into axes: a colour per run, a line per tag, what is healthy in green, and marks on the curves.

    Args:
        axes: ``matplotlib.axes.Axes``.
        panel: What to draw.
        runs: The runs, in the order of their colours.
        marks: Marks of the runs.
        size: Size of letters.
    """
    finite: list[float] = []
    for j, tag in enumerate(panel.tags):
        for k, run in enumerate(runs):
            if tag not in run.scalars:
                continue
            steps, values = _thinned(*run.scalars[tag])
            style = series_style(k)
            if len(panel.tags) > 1:
                style["linestyle"] = _TAG_LINES[j % len(_TAG_LINES)]
            if j or len(steps) > 3:
                style["marker"] = ""
            axes.plot(steps, values, **style, linewidth=1.3, markersize=4)
            finite += [x for x in values if np.isfinite(x)]
            for step, _ in (marks or {}).get(run.name, ()) if not j else ():
                y = float(np.interp(step, steps, values))
                axes.plot([step], [y], marker="v", markersize=7, color=style["color"], markeredgecolor="black")
    log = bool(finite) and panel.chart.log and min(finite) > 0 and max(finite) > 10 * min(finite)
    # Losses that fall by orders of magnitude, or explode, are unreadable on a linear axis.
    log = log or (bool(finite) and min(finite) > 0 and max(finite) > 50 * min(finite))
    if log:
        axes.set_yscale("log")
        _few_ticks(axes.yaxis, max(finite) / min(finite))
    _band(axes, panel.chart.healthy, finite, log)
    if len(panel.tags) > 1:
        from matplotlib.lines import Line2D

        lines = [Line2D([], [], color="grey", linestyle=_TAG_LINES[j % 4]) for j in range(len(panel.tags))]
        short = [tag.rpartition("/")[2] for tag in panel.tags]
        names = short if len(set(short)) == len(short) else list(panel.tags)
        axes.legend(lines[:6], names[:6], fontsize=size - 1)
    axes.set_title(panel.chart.title, fontsize=size + 2)
    axes.set_xlabel("step", fontsize=size)
    axes.tick_params(labelsize=size)
    axes.grid(alpha=0.3)


def _thinned(steps: Sequence[int], values: Sequence[float], most: int = 600) -> tuple[Sequence[int], Sequence[float]]:
    """At most so many points of a curve, with its peaks: the smallest and the largest value of each stretch."""
    if len(steps) <= most:
        return steps, values
    x = np.asarray(values, float)
    kept: set[int] = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), most // 2):
        finite = part[np.isfinite(x[part])]
        if finite.size:
            kept |= {int(finite[x[finite].argmin()]), int(finite[x[finite].argmax()])}
    chosen = sorted(kept)
    return [steps[i] for i in chosen], [values[i] for i in chosen]


def _few_ticks(axis: Any, ratio: float) -> None:
    """Ticks at 1 and 3 of each power of ten on a logarithmic axis that is short, where 2 to 9 would be crowded."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if ratio < 300:
        axis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axis.set_minor_formatter(NullFormatter())


def _band(axes: Any, healthy: tuple[float | None, float | None], values: Sequence[float], log: bool) -> None:
    """Shade what is healthy, as far as that is near the values."""
    low, high = healthy
    if (low is None and high is None) or not values:
        return
    smallest, largest = min(values), max(values)
    bounds = [x for x in healthy if x is not None]
    if log:
        near = [x for x in bounds if x > 0 and smallest / 1e3 < x < largest * 1e3]
    else:
        reach = 0.5 * ((largest - smallest) or abs(largest)) or 1.0
        near = [x for x in bounds if smallest - reach <= x <= largest + reach]
    edges = [smallest, largest, *near]
    if log:
        axes.set_ylim(min(edges) / 1.5, max(edges) * 1.5)
    else:
        margin = 0.06 * (max(edges) - min(edges)) or 0.1
        axes.set_ylim(min(edges) - margin, max(edges) + margin)
    bottom, top = axes.get_ylim()
    start, end = (bottom if low is None else max(low, bottom)), (top if high is None else min(high, top))
    if start < end:
        axes.axhspan(start, end, color=_HEALTHY, alpha=0.13, linewidth=0, zorder=0)


def plot(runs: Sequence[Run], marks: Marks | None = None) -> Any:
    """One figure with every chart for which the runs have values, ordered by question.

    A colour stands for a run, a line style for a tag, and green for what is healthy.

    Args:
        runs: Runs, as from :func:`read_runs`.
        marks: By run, steps at which something happened, and what.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        ValueError: There is nothing to plot.
    """
    from matplotlib.figure import Figure

    shown = panels(runs)
    if not shown:
        raise ValueError("There is nothing to plot: the runs hold no diagnostics. Add the callback Diagnostics().")
    columns = min(3, max(len(group) for group in shown.values()))
    heights = [-(-len(group) // columns) for group in shown.values()]
    legend_rows = -(-len(runs) // 3)
    figure = Figure(figsize=(5.2 * columns, 2.9 * sum(heights) + 0.35 * len(shown) + 0.25 * legend_rows))
    figure.set_layout_engine("constrained")
    parts = figure.subfigures(len(shown), 1, height_ratios=[2.9 * rows + 0.35 for rows in heights], squeeze=False)
    for (question, group), rows, (part,) in zip(shown.items(), heights, parts):
        part.suptitle(question, fontsize=12, fontweight="bold", x=0.01, ha="left")
        for i, panel in enumerate(group):
            learning = panel.chart.question == next(iter(LEARNING.values())).question
            draw(part.add_subplot(rows, columns, i + 1), panel, runs, marks if learning else None)
    figure.legend(*legend(runs), loc="outside upper center", ncols=min(3, len(runs)), fontsize=9)
    return shown_in_notebooks(figure)


def curves(group: Sequence[Panel], runs: Sequence[Run], marks: Marks | None = None, columns: int = 2) -> Any:
    """A figure of some panels."""
    from matplotlib.figure import Figure

    columns = min(columns, len(group))
    rows = -(-len(group) // columns)
    lines = -(-len(runs) // 3) if len(runs) > 1 else 0
    width, height = 5.6 * columns, 3.1 * rows + 0.22 * lines
    figure = Figure(figsize=(width, height))
    # Margins in inches: to find them out takes as long as to draw.
    figure.subplots_adjust(
        left=0.7 / width, right=1 - 0.15 / width, bottom=0.5 / height, top=1 - (0.35 + 0.22 * lines) / height,
        wspace=0.8 / (5.6 - 0.8), hspace=0.85 / (3.1 - 0.85),
    )  # fmt: skip
    for i, panel in enumerate(group):
        draw(figure.add_subplot(rows, columns, i + 1), panel, runs, marks, size=9)
    if lines:
        figure.legend(*legend(runs), loc="upper center", ncols=min(3, len(runs)), fontsize=9, frameon=False)
    return figure


def legend(runs: Sequence[Run]) -> tuple[list[Any], list[str]]:
    """Lines and names of runs for a legend."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], **series_style(k) | {"marker": ""}, linewidth=2) for k in range(len(runs))]
    return lines, [run.name for run in runs]


# --- layers -------------------------------------------------------------------------------------------------------


def heat_map(maps: LayerMaps, name: str, title: str = "") -> Any:
    """A heat map of a value with a row per parameter and a column per step, legible at the size of a thumbnail.

    Returns:
        A ``matplotlib.figure.Figure``; ``None`` where there is no value.
    """
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure

    layers, steps, matrix = maps.matrix(name)
    finite = matrix[np.isfinite(matrix)]
    if not finite.size:
        return None
    positive = finite[finite > 0]
    share = finite.min() >= 0 and finite.max() <= 1 and name.rpartition("/")[2] in SHARES
    log = not share and finite.min() >= 0 and positive.size and positive.max() > 10 * positive.min()
    # A few outliers must not make everything else one colour.
    low, high = np.quantile(positive if log else finite, [0.01, 0.99])
    norm = LogNorm(low, max(high, low * 1.01)) if log else Normalize(0, 1) if share else Normalize(low, high)
    figure = Figure(figsize=(5, 3.4), dpi=100)
    # Fixed margins, since finding them out takes several times as long as drawing, which is done in training.
    axes = figure.add_axes((0.3, 0.16, 0.52, 0.72))
    shown = np.where(matrix > 0, matrix, np.nan) if log else matrix
    image = axes.imshow(shown, aspect="auto", interpolation="nearest", norm=norm, cmap="viridis")
    figure.colorbar(image, cax=figure.add_axes((0.84, 0.16, 0.03, 0.72))).ax.tick_params(labelsize=9)
    rows = np.unique(np.linspace(0, len(layers) - 1, min(8, len(layers))).round().astype(int))
    axes.set_yticks(rows, _short([layers[i] for i in rows]), fontsize=9)
    at = np.unique(np.linspace(0, len(steps) - 1, min(5, len(steps))).round().astype(int))
    axes.set_xticks(at, [str(steps[i]) for i in at], fontsize=10)
    axes.set_xlabel("step", fontsize=11)
    axes.set_title(title or name, fontsize=13)
    return figure


#: Last parts of the names of values between 0 and 1, which are drawn on that scale.
SHARES = ("stalled", "online_share", "index", "error")


def _short(names: Sequence[str], most: int = 18) -> list[str]:
    """Names without what all have in front in common, and of long ones the end."""
    parts = [name.split(".") for name in names]
    shared = 0
    while len(names) > 1 and all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    short = [".".join(p[shared:]) for p in parts]
    return [name if len(name) <= most else f"…{name[1 - most :]}" for name in short]


def spectra(singular_values: Mapping[str, Sequence[float]], title: str = "") -> Any:
    """Singular values of matrices over their mean, on one axis: a flat line at 1 is an orthogonal matrix."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), dpi=100)
    axes = figure.add_axes((0.19, 0.16, 0.78, 0.72), yscale="log")
    axes.axhline(1.0, color="grey", linewidth=0.8, linestyle="--")
    smallest, labels = 1.0, _short(list(singular_values))
    for k, values in enumerate(singular_values.values()):
        x = np.asarray(values, float)
        if not x.size or not x.mean() > 0:
            continue
        # Rank-deficient matrices would squeeze all others to a line.
        scaled = np.maximum(x / x.mean(), 1e-6)
        smallest = min(smallest, float(scaled.min()))
        style = series_style(k) | {"marker": ""}
        axes.plot(np.linspace(0, 1, len(x)), scaled, **style, label=labels[k], linewidth=1.8)
    axes.set_ylim(bottom=max(min(smallest / 1.5, 0.1), 1e-4))
    axes.set_xlabel("rank / number of singular values", fontsize=11)
    axes.set_ylabel("singular value / mean", fontsize=11)
    axes.set_title(title, fontsize=13)
    axes.tick_params(labelsize=10)
    if 0 < len(axes.lines) - 1 <= 12:  # the first is that of orthogonal matrices
        axes.legend(fontsize=8 if len(singular_values) <= 6 else 6)
    return figure
