"""How diagnostics are shown by TensorBoard: pages of charts, healthy ranges, and a description of every scalar."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

from lightning_optim.diagnostics.charts import Chart, by_question
from lightning_optim.trainer import is_lightning

#: First part of the tags of healthy ranges, which charts with a margin are drawn from.
_HEALTHY = "healthy"


def is_board(logger: Any) -> bool:
    """Whether a logger is Lightning's for TensorBoard."""
    return is_lightning(logger, "TensorBoardLogger")


def layout(charts: Sequence[Chart], bands: bool) -> dict[str, dict[str, list[Any]]]:
    """The page "Custom scalars": charts below the questions that they answer.

    Args:
        charts: The charts.
        bands: Whether healthy ranges are drawn. TensorBoard draws them in charts of one tag that is known in full.
    """
    page: dict[str, dict[str, list[Any]]] = {}
    for question, of_it in by_question(charts).items():
        page[question] = {}
        for chart in of_it:
            if bands and (tag := _banded(chart)):
                page[question][chart.title] = ["Margin", [tag, *_margin(tag)]]
            else:
                # TensorBoard matches from the beginning of a tag, where labels of several optimizers are.
                page[question][chart.title] = ["Multiline", [f"(.*/)?{tag}" for tag in chart.tags]]
    return page


def log(logger: Any, values: Mapping[str, float], step: int, charts: Sequence[Chart], described: set[str]) -> None:
    """Log values, the first of each tag with the description of its chart, and the bounds of healthy ranges.

    Args:
        logger: TensorBoard's.
        values: By tag.
        step: Their step.
        charts: The charts of the run.
        described: Tags that have a description already; new ones are added.
    """
    bounds: dict[str, float] = {}
    for chart in charts:
        if (tag := _banded(chart)) and tag in values:
            bounds |= dict(zip(_margin(tag), _range(chart)))
    rest = log_described(logger, values, step, partial(_description, charts), described)
    logger.log_metrics(rest | bounds, step=step)


def log_described(
    logger: Any, values: Mapping[str, float], step: int | None, about: Callable[[str], str], described: set[str]
) -> dict[str, float]:
    """Log the first value of each tag together with its description, which TensorBoard shows beside the chart.

    Args:
        logger: TensorBoard's.
        values: By tag.
        step: Their step.
        about: The description of a tag in Markdown; empty for none.
        described: Tags that have had a value; new ones are added.

    Returns:
        The values that have yet to be logged.
    """
    new = {tag: words for tag in values if tag not in described and (words := about(tag))}
    described |= values.keys()
    if getattr(logger, "_prefix", "") or find_spec("tensorboard") is None:  # tags of others, or tensorboardX
        return dict(values)
    for tag, words in new.items():
        _write(logger.experiment.file_writer, tag, float(values[tag]), step, words)
    return {tag: value for tag, value in values.items() if tag not in new}


def _write(writer: Any, tag: str, value: float, step: int | None, about: str) -> None:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.scalar.metadata import create_summary_metadata

    metadata = create_summary_metadata(display_name="", description=about)
    writer.add_summary(Summary(value=[Summary.Value(tag=tag, simple_value=value, metadata=metadata)]), step)


def _description(charts: Iterable[Chart], tag: str) -> str:
    return next((chart.description for chart in charts if chart.shows(tag)), "")


def _banded(chart: Chart) -> str:
    """The tag of a chart that is drawn with its healthy range; empty for others."""
    tag = chart.tags[0].removesuffix("$")
    plain = len(chart.tags) == 1 and all(c.isalnum() or c in "/_" for c in tag)
    return tag if plain and chart.healthy[1] is not None else ""


def _margin(tag: str) -> tuple[str, str]:
    """Tags of the lower and the upper bound of what is healthy."""
    return f"{_HEALTHY}/{tag}/low", f"{_HEALTHY}/{tag}/high"


def _range(chart: Chart) -> tuple[float, float]:
    low, high = chart.healthy
    assert high is not None
    return low or 0.0, high
