"""Optimizers and diagnostics on devices that lack float64 and decompositions, as Apple's GPUs and some of Intel's do.

Each kind of device is pretended, in a process of its own; see :mod:`.pretended`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils import backend_registration

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this version of torch takes no devices written in Python",
)


def run(program: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"tests.devices.{program}", *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_optimizer_runs_saves_and_resumes_without_float64_and_decompositions() -> None:
    assert run("program", "mps", "first") == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mps", "xpu", "cuda"])
def test_every_configuration_and_rounding(kind: str) -> None:
    assert run("program", kind) == {}


@pytest.mark.parametrize("kind", ["mps", pytest.param("xpu", marks=pytest.mark.slow), "cuda"])
def test_a_run_with_all_diagnostics_waits_for_one_number_per_step(kind: str) -> None:
    found = run("training", kind)
    # Gradient spikes are looked for in every step, by the norm of the gradient. Lightning adds some for its logs,
    # and the losses and norms that the record collects are read together, once.
    waits = found.pop("waits in ten steps")
    assert waits["_local_scalar_dense"] == 10
    assert sum(waits.values()) <= 15
    assert found == {"NAMO": {}, "SOAP": {}, "LaProp": {}, "HVAdam": {}}, "values that are not numbers"


def test_offloaded_shards_go_through_groups_that_move_tensors_of_the_device_only() -> None:
    found = run("collectives")
    assert found["direct"] == "refused"
    vector, number = ["cpu", [1.0, 2.0]], ["cpu", [3]]
    assert found["ours"] == [vector, vector, number, vector, number, vector, ["cpu", 3.0]]


def test_sharing_orthogonalisation_waits_for_nothing() -> None:
    assert {name: waits for name, waits in run("exchange").items() if waits} == {}
