"""What heat maps are drawn from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lightning_optim.diagnostics.layer_maps import FILE, LayerMaps, Pictures


@pytest.mark.parametrize("count", [1, 7, 8, 9, 100, 1000])
def test_a_long_run_is_thinned_out_evenly(count: int) -> None:
    maps = LayerMaps(most=8)
    for step in range(count):
        maps.add(step, {"norm": {"w": float(step)}})
    layers, steps, matrix = maps.matrix("norm")
    assert layers == ["w"]
    assert matrix.tolist() == [[float(step) for step in steps]]
    assert min(count, 4) <= len(steps) <= 8
    assert steps[0] == 0
    assert len(set(np.diff(steps).tolist())) <= 1


def test_layers_may_come_and_go() -> None:
    maps = LayerMaps()
    maps.add(1, {"norm": {"a": 1.0}})
    maps.add(2, {"norm": {"b": 2.0}, "rms": {"a": 3.0}})
    maps.add(2, {"norm": {"a": 4.0}})  # of another optimizer, in the same step
    layers, steps, matrix = maps.matrix("norm")
    assert (layers, steps) == (["a", "b"], [1, 2])
    assert np.array_equal(matrix, [[1, 4], [np.nan, 2]], equal_nan=True)
    assert maps.names == ["norm", "rms"]
    maps.forget_after(1)
    assert maps.steps == [1]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    pictures = Pictures(spectra={"updates": {"w": [2.0, 1.0]}}, spectra_step=7)
    pictures.maps.add(1, {"norm": {"a": 1.0, "b": float("nan")}})
    pictures.maps.add(5, {"norm": {"a": 1e-30, "b": float("inf")}})
    pictures.write(tmp_path)
    again = Pictures.read(tmp_path)
    assert (again.spectra, again.spectra_step, again.maps.steps) == (pictures.spectra, 7, [1, 5])
    assert np.array_equal(again.maps.matrix("norm")[2], [[1, 1e-30], [np.nan, np.nan]], equal_nan=True)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"maps": 1}', '{"spectra": {}, "spectra_step": 0}'])
def test_a_file_that_cannot_be_read_is_none(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / FILE).write_text(content)
    assert Pictures.read(tmp_path).maps.steps == []
