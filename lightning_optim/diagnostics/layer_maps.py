"""Values of single parameters over the steps of a run: what heat maps are drawn from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

#: Name of the file in a run's folder that holds what its figures are drawn from.
FILE = "pictures.json"


@dataclass
class LayerMaps:
    """Values by name of the value and of the parameter, at measured steps.

    Of a long run every second step is dropped, then every second of the rest, and so on, so that there are never more
    than ``most``.

    Args:
        most: Number of steps from which they are thinned out.

    Example:
        >>> maps = LayerMaps()
        >>> maps.add(10, {"norm": {"a": 1.0, "b": 2.0}})
        >>> maps.add(20, {"norm": {"b": 3.0}})
        >>> maps.matrix("norm")
        (['a', 'b'], [10, 20], array([[ 1., nan],
               [ 2.,  3.]]))
    """

    most: int = 200
    steps: list[int] = field(default_factory=list)
    columns: list[dict[str, dict[str, float]]] = field(default_factory=list)
    _stride: int = 1
    _seen: int = 0

    def add(self, step: int, values: Mapping[str, Mapping[str, float]]) -> None:
        """Add the values of a step; of a step that is there already, as after a restart, more values."""
        if self.steps and self.steps[-1] == step:
            for name, layers in values.items():
                self.columns[-1].setdefault(name, {}).update(layers)
            return
        self._seen += 1
        if (self._seen - 1) % self._stride:
            return
        self.steps.append(step)
        self.columns.append({name: dict(layers) for name, layers in values.items()})
        if len(self.steps) > self.most:
            self.steps, self.columns, self._stride = self.steps[::2], self.columns[::2], 2 * self._stride

    def forget_after(self, step: int) -> None:
        """Drop what is later than a step, which a run that goes on from there makes anew."""
        kept = sum(at <= step for at in self.steps)
        self.steps, self.columns = self.steps[:kept], self.columns[:kept]

    @property
    def names(self) -> list[str]:
        """Names of the values."""
        return list(dict.fromkeys(name for column in self.columns for name in column))

    def matrix(self, name: str) -> tuple[list[str], list[int], np.ndarray]:
        """Parameters, steps, and a matrix with a row per parameter, NaN where there is no value."""
        layers = list(dict.fromkeys(layer for column in self.columns for layer in column.get(name, {})))
        rows = [[column.get(name, {}).get(layer, math.nan) for column in self.columns] for layer in layers]
        return layers, list(self.steps), np.array(rows, float).reshape(len(layers), len(self.steps))


@dataclass
class Pictures:
    """What the figures of a run are drawn from.

    Args:
        maps: Values of single parameters over steps.
        spectra: Singular values, largest first, by what they are of (``updates``, ``weights``) and by parameter.
        spectra_step: Of which step.
    """

    maps: LayerMaps = field(default_factory=LayerMaps)
    spectra: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    spectra_step: int = 0

    def write(self, folder: str | Path) -> None:
        """Write :data:`FILE` in a folder, at once."""
        content: dict[str, Any] = {"spectra": self.spectra, "spectra_step": self.spectra_step, "maps": {}}
        for name in self.maps.names:
            layers, steps, matrix = self.maps.matrix(name)
            rows = [[None if x != x or math.isinf(x) else float(f"{x:.4g}") for x in row] for row in matrix.tolist()]
            content["maps"][name] = {"layers": layers, "steps": steps, "values": rows}
        part = Path(folder) / f".{FILE}.part"
        part.write_text(json.dumps(content))
        part.replace(Path(folder) / FILE)

    @classmethod
    def read(cls, folder: str | Path) -> Pictures:
        """What is in a folder; nothing where there is no :data:`FILE`, or none that can be read."""
        try:
            content = json.loads((Path(folder) / FILE).read_text())
            pictures = cls(spectra=content["spectra"], spectra_step=content["spectra_step"])
            columns: dict[int, dict[str, dict[str, float]]] = {}
            for name, of in content["maps"].items():
                for layer, row in zip(of["layers"], of["values"]):
                    for step, x in zip(of["steps"], row):
                        columns.setdefault(step, {}).setdefault(name, {})[layer] = math.nan if x is None else x
            for step in sorted(columns):
                pictures.maps.add(step, columns[step])
            return pictures
        except (OSError, ValueError, KeyError, TypeError):
            return cls()
