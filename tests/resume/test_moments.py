"""A run that is resumed from any moment is the run that was not interrupted, or a warning said that it would not be."""

from __future__ import annotations

from pathlib import Path

import pytest

from .moments import Cell, judge, matrix, pairs, table


@pytest.mark.parametrize("cell", pairs(), ids=str)
def test_pairs_of_all_dimensions(cell: Cell) -> None:
    assert judge(cell) == ""


@pytest.mark.slow
@pytest.mark.parametrize("cell", matrix(), ids=str)
def test_the_whole_matrix(cell: Cell) -> None:
    assert judge(cell) == ""


def test_the_documentation_has_the_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    assert table() in text
    assert f"run {len(matrix())} combinations" in text
