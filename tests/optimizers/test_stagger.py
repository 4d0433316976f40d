"""Refreshes of eigenbases spread over steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_optim.registry import OPTIMIZERS

from .rows import MATRIX, build, run

STAGGERED = [name for name in MATRIX if "stagger" in OPTIMIZERS[name].defaults]

FREQUENCY = 4


def refreshed(name: str, steps: int, resume_at: int | None = None, **arguments: Any) -> list[set[int]]:
    """For each parameter, the steps (from 1) after which its basis had changed; the first only starts them."""
    torch.manual_seed(0)
    params: list[Any] = [nn.Parameter(torch.randn(4, 5)) for _ in range(6)]
    optimizer = build(name, params, precondition_frequency=FREQUENCY, **arguments)
    found: list[set[int]] = [set() for _ in params]
    for t in range(1, steps + 1):
        if t == resume_at:
            state = optimizer.state_dict()
            optimizer = build(name, params, precondition_frequency=FREQUENCY, **arguments)
            optimizer.load_state_dict(state)
        before = [optimizer.state[p].get("basis0", torch.zeros(())).clone() for p in params]
        run(optimizer, params, range(t, t + 1))
        for p, old, steps_of in zip(params, before, found):
            if t > 1 and not torch.equal(optimizer.state[p]["basis0"], old):
                steps_of.add(t)
    return found


@pytest.mark.parametrize("name", STAGGERED)
def test_released_schedule_refreshes_everything_at_once(name: str) -> None:
    assert refreshed(name, 10, stagger=False) == [{5, 9}] * 6


@pytest.mark.parametrize("resume_at", [None, 4])
@pytest.mark.parametrize("name", STAGGERED)
def test_by_default_refreshes_are_dealt_evenly_and_survive_a_resume(name: str, resume_at: int | None) -> None:
    found = refreshed(name, 13, resume_at)
    for i, steps in enumerate(found):
        # As often as without, one step earlier for each position in the group.
        assert steps == {t for t in range(2, 14) if (t - 1 + i) % FREQUENCY == 0}
    assert max(sum(t in steps for steps in found) for t in range(2, 14)) == 2  # Six parameters over four steps.
