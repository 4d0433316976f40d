"""Values on several processes are those of one, and the same on each."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from . import distributed_probes
from .distributed_probes import Net


def launch(kind: str, folder: Path) -> list[dict[str, Any]]:
    command = [sys.executable, distributed_probes.__file__, kind, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_values_are_those_of_one_process(kind: str, tmp_path: Path) -> None:
    first, second = launch(kind, tmp_path)
    assert first == second
    # Each process takes every other example, so that both together take the same in a step as one does.
    _, alone = distributed_probes.run("auto", 1, probe=False)
    assert "spike/recovery_steps" in alone
    assert set(alone) <= set(first)
    for tag, pairs in alone.items():
        steps, values = zip(*pairs)
        assert [step for step, _ in first[tag]] == list(steps)
        # Gradients are averaged in another order; Adam's first updates divide by the root of their rounded squares.
        tolerance = 1e-3 if "ratio" not in tag else 1e-2
        if kind == "fsdp2" and "probe" in tag:
            tolerance = 0.15  # Shards have the same random signs, so that together they have others.
        assert [value for _, value in first[tag]] == pytest.approx(values, rel=tolerance, abs=1e-7), tag


@pytest.mark.slow
@pytest.mark.distributed
def test_a_probe_that_fails_on_one_process_is_left_out_by_all(tmp_path: Path) -> None:
    first, second = launch("failing-ddp", tmp_path)
    assert first == second
    # The spike's first probe is made of ten virtual steps, of which the seventh fails; the updates of processes go on.
    assert not [tag for tag in first if tag.startswith("spike/probe")]
    assert [step for step, _ in first["spike/zscore"]][-1] == 89
    assert len(first["update_variance/conditional"]) == 4


@pytest.mark.slow
@pytest.mark.distributed
def test_no_rank_waits_forever_for_one_that_fails(tmp_path: Path) -> None:
    """With shards the first process is in the middle of a virtual step that the second does not make."""
    command = [sys.executable, distributed_probes.__file__, "failing-fsdp2", str(tmp_path)]
    # A minute is enough to start two processes, train a little and wait for five seconds.
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert result.returncode != 0
    assert "SpikeResponse: a probe failed on this process and did not end on all others" in result.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_the_local_gradients_of_processes_are_compared(tmp_path: Path) -> None:
    values = launch("ddp", tmp_path)[0]
    assert [value for _, value in values["update_variance/batches"]] == [2] * 4
    # By hand: 20 steps of Adam on 4 examples each, the last of which from both halves of its examples.
    net = Net(batch_size=4)
    optimizer: Any = net.configure_optimizers()
    parameters = list(net.parameters())
    updates = []
    for step in range(20):
        batch = distributed_probes.DATA[4 * step : 4 * step + 4]
        if step < 19:
            optimizer.zero_grad()
            net.training_step([batch], step).backward()
            optimizer.step()
            continue
        weights, state = [p.detach().clone() for p in parameters], optimizer.state_dict()
        for half in (batch[::2], batch[1::2]):
            fresh = Net(batch_size=4)
            fresh.load_state_dict(net.state_dict())
            adam: Any = fresh.configure_optimizers()
            adam.load_state_dict(copy.deepcopy(state))
            fresh.training_step([half], step).backward()
            adam.step()
            updates.append(torch.cat([(p - w).flatten() for p, w in zip(fresh.parameters(), weights)]))
    expected = (updates[0] - updates[1]).square().sum().item() / 2
    # Twenty steps of float32 arithmetic in another order.
    assert values["update_variance/conditional"][0][1] == pytest.approx(expected, rel=1e-3)
