"""A run that is resumed from any moment is the run that was not interrupted, or a warning said that it would not be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .moments import ON_TWO, Cell, judge, matrix, pairs, table

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("cell", pairs(), ids=str)
def test_pairs_of_all_dimensions(cell: Cell) -> None:
    assert judge(cell) == ""


@pytest.mark.slow
@pytest.mark.parametrize("cell", matrix(), ids=str)
def test_the_whole_matrix(cell: Cell) -> None:
    assert judge(cell) == ""


def test_the_documentation_has_the_table() -> None:
    text = (REPOSITORY / "docs" / "checkpoints.md").read_text()
    assert table() in text
    assert f"run {len(matrix())} combinations" in text


#: Workers that load, and the callbacks of all diagnostics at every step.
OTHERS = [
    *(Cell("max_epochs", moment, 2, workers=2, loader=loader) for moment, loader in
      (("end of epoch", "ordinary"), ("accumulation", "resumable"), ("exception", "resumable"))),
    *(Cell(limit, moment, 2, 0.5, 7, optimizer, "step", diagnostics=True) for limit, moment, optimizer in
      (("max_steps", "end of epoch", "NAMO"), ("max_epochs", "accumulation", "MVNGrad"), ("both", "SIGTERM", "SOAP"))),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("cell", OTHERS, ids=str)
def test_workers_and_diagnostics(cell: Cell) -> None:
    assert judge(cell) == ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have found."""
    out = tmp_path_factory.mktemp("moments")
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*program, "-m", "tests.resume.moments", str(out)],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return out


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("cell", ON_TWO, ids=str)
def test_two_processes(cell: Cell, folder: Path) -> None:
    for rank in range(2):
        assert json.loads((folder / f"{rank}.json").read_text())[str(cell)] == ""
