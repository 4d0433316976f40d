"""The table of differences from released code: true of ours, of the released formulas, and of the documentation."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_optim.registry import OPTIMIZERS

from .references import Reference
from .released import DIFFERENCES, difference
from .rows import REFERENCES

FORMULAS = [
    pytest.param(x, name, formula, id=f"{name}-{x.tensors.replace(' ', '_')}")
    for x in DIFFERENCES
    for name, formula in (x.formulas or {}).items()
]
SHAPES = [(4, 6), (6, 4), (5, 5), (4, 3, 3, 3), (6, 2, 2, 3), (4, 3, 5), (6, 2, 3)]


def steps(cls: type[Reference], shape: tuple[int, ...], count: int = 5) -> list[Any]:
    rng = np.random.default_rng(0)
    reference = cls([rng.normal(size=shape)], **{"orthogonalizer": "exact"})
    start = [reference.params[0]]
    for _ in range(count):
        reference.step([rng.normal(size=shape)])
        start.append(reference.params[0])
    return start


@pytest.mark.parametrize(("entry", "name", "formula"), FORMULAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_formulas_differ_where_the_table_says_so(
    entry: Any, name: str, formula: type[Reference], shape: tuple[int, ...]
) -> None:
    assert {x.name for x in fields(formula)} == {x.name for x in fields(REFERENCES[name])}
    ours, released = steps(REFERENCES[name], shape), steps(formula, shape)
    same = np.allclose(ours[-1], released[-1], rtol=1e-9, atol=1e-12)
    assert same is (difference(name, shape, {}) is None)


@pytest.mark.parametrize("shape", [(64, 64, 3, 3), (8, 3, 3, 3), (5, 2, 3, 1)])
def test_adamuons_kernels_differ_by_their_scale_only(shape: tuple[int, ...]) -> None:
    (entry,) = [x for x in DIFFERENCES if x.tensors.endswith("four axes") and x.optimizers == ("AdaMuon",)]
    assert entry.formulas is not None
    arguments: dict[str, Any] = {"weight_decay": 0.0, "orthogonalizer": "kj5"}
    rng = np.random.default_rng(0)
    p, g = rng.normal(size=shape), rng.normal(size=shape)
    moved = []
    for cls in (REFERENCES["AdaMuon"], entry.formulas["AdaMuon"]):
        reference = cls([p], **arguments)
        reference.step([g])
        moved.append(reference.params[0] - p)
    ratio = math.sqrt(math.prod(shape) / (min(shape) * max(shape)))
    np.testing.assert_allclose(moved[0], ratio * moved[1], rtol=1e-6, atol=1e-12)  # eps beside the norm
    if shape == (64, 64, 3, 3):
        assert ratio == pytest.approx(13.86, abs=0.01)


def test_documentation_says_every_difference() -> None:
    documentation = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text()
    for entry in DIFFERENCES:
        assert entry.row() in documentation, f"docs/optimizers.md lacks {entry.row()}"
        for name in entry.optimizers:
            text = OPTIMIZERS[name].cls.__doc__ or ""
            assert "released treatment" in text or "released code" in text or "release" in text, name
            if entry.formulas:
                assert "kernel" in text, name
