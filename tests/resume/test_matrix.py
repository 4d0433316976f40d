"""Saved, loaded by fresh objects and continued is the same as not stopping, for every optimizer in every way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_optim.registry import OPTIMIZERS

from .program import CASES, across, resume

PROGRAM = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(("name", "precision", "way"), CASES)
def test_one_process_continues_bit_for_bit(name: str, precision: str, way: str, tmp_path: Path) -> None:
    assert resume(name, precision, way, "single", tmp_path) == ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes, and then four, have found and left."""
    out = tmp_path_factory.mktemp("processes")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    for size in (2, 4):
        command = [*PROGRAM, f"--nproc-per-node={size}", "-m", "tests.resume.program", str(out)]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return out


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("name", "precision", "way"), CASES)
def test_two_processes_continue_bit_for_bit(name: str, precision: str, way: str, kind: str, folder: Path) -> None:
    for rank in range(2):
        results = json.loads((folder / f"2-{rank}.json").read_text())
        assert results[f"{kind}-{name}-{precision}-{way}"] == ""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_shards_continue_as_one_process_and_as_four(name: str, folder: Path) -> None:
    expected = torch.load(folder / f"2-0-{name}.pt")
    others = [across(name, "single", folder / f"across-{name}")]
    others += [torch.load(folder / f"4-{rank}-{name}.pt") for rank in range(4)]
    for found in others:
        for key, p in expected.items():
            # Float64: sums in another order, 1e-16, through five steps of rules that divide by small numbers.
            torch.testing.assert_close(found[key], p, rtol=1e-9, atol=1e-9)
