"""How many Python calls a step makes, and which files it enters: what a step costs on small models.

Calls are counted, not timed: a count is the same on every machine. Comprehensions are calls of their own before Python
3.12, so newer versions make fewer.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from lightning_optim import NAMO, MVNGrad
from lightning_optim.engine.optimizer import RuleOptimizer

TINY = [(4,), (3,), (2, 2), (5,)]
MATRICES, VECTORS = [(8, 8), (16, 8)], [(8,), (16,)]


def parameters(shapes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def mvn_grad() -> RuleOptimizer:
    return MVNGrad(parameters(TINY))


def namo() -> RuleOptimizer:
    groups: list[dict[str, Any]] = [
        {"params": parameters(MATRICES), "role": "matrix"},
        {"params": parameters(VECTORS), "role": "fallback"},
    ]
    return NAMO(groups)


def calls(optimizer: RuleOptimizer) -> Counter[str]:
    """Calls of Python functions by file, in a step after those that create state and caches."""
    for _ in range(5):
        optimizer.step()
    found: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            found[frame.f_code.co_filename] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        optimizer.step()
    finally:
        sys.setprofile(before)
    return found


def test_an_element_wise_step_enters_no_matrix_file() -> None:
    paths = [Path(name) for name in calls(mvn_grad())]
    assert not [path for path in paths if path.name in ("matrices.py", "distributed_matrices.py")]
    assert not [path for path in paths if path.parent.name == "polar"]


def test_a_step_with_matrices_enters_the_files_that_the_other_does_not() -> None:
    """So that the test above cannot pass because files were renamed."""
    paths = [Path(name) for name in calls(namo())]
    assert {"matrices.py", "distributed_matrices.py"} <= {path.name for path in paths}
    assert "polar" in {path.parent.name for path in paths}


@pytest.mark.parametrize(
    ("build", "most"),
    [
        # It was 263 when parameters and state were looked up in every step. Measured: 103 with Python 3.11, of which
        # torch's own wrappers of step() make 15 to 20, other versions a few more.
        pytest.param(mvn_grad, 125, id="MVNGrad"),
        # It was 601 then. Measured: 202, of which 16 are the iterations of the polar factors.
        pytest.param(namo, 240, id="NAMO"),
    ],
)
def test_a_step_makes_few_calls(build: Any, most: int) -> None:
    found = calls(build())
    assert sum(found.values()) <= most, found.most_common()
