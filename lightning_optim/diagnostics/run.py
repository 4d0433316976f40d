"""The logs of one run, as a diagnosis needs them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Tag and plugin under which TensorBoard's event files hold records; TensorBoard itself shows nothing of them.
RECORD_TAG = "diagnostics/record"
RECORD_PLUGIN = "lightning_optim"


@dataclass(frozen=True)
class Run:
    """What one run has logged.

    Args:
        name: What to call it.
        scalars: By tag, steps and values.
        folder: Where its logs are.
        records: What the diagnostics have written for a diagnosis, each at a step; see :class:`.RunRecord`.
    """

    name: str
    scalars: Mapping[str, tuple[list[int], list[float]]]
    folder: Path | None = None
    records: tuple[tuple[int, Mapping[str, Any]], ...] = field(default=(), repr=False)

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
    from .event_files import read_folder

    runs: dict[Path, Run] = {}
    for folder in map(Path, folders):
        places = sorted({path.parent for path in folder.rglob("events.out.tfevents.*")})
        if not places:
            raise FileNotFoundError(f"{folder}: no TensorBoard event files here or below.")
        for place in places:
            scalars, records = read_folder(place)
            name = str(place.relative_to(folder)) if place != folder else place.name
            known = {run.name for run in runs.values()}
            runs[place] = Run(name if name not in known else str(place), scalars, place, records)
    return list(runs.values())
