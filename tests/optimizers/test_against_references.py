"""Every rule against an independent float64 reference, at any hyperparameters, with a changing learning rate."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_optim.engine.rule import RULES
from lightning_optim.registry import OPTIMIZERS

from .rows import MATRIX, OURS, REFERENCES, ROWS, amplifies
from .strategies import usual

#: The optimizers themselves, and the fallback that is none of them.
RULE_NAMES = [*OURS, "AdamW"]


@pytest.mark.parametrize("name", RULE_NAMES)
def test_a_reference_has_the_hyperparameters_of_its_optimizer(name: str) -> None:
    """One that the reference lacked would never be compared, and another default compares something else."""
    own = {field.name: field.default for field in fields(REFERENCES[name])}
    declared = RULES[name].hyperparameters()
    missing = declared.keys() - own.keys()
    assert not missing, f"{REFERENCES[name].__name__} lacks {', '.join(sorted(missing))}: add them to the reference"
    assert {key: own[key] for key in declared} == declared


def drawn(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """Arguments of an optimizer, from its declaration, or from its row where that says otherwise."""
    declared = {key: field for key, field in RULES[name].fields.items() if key != "lr"}
    special = ROWS[name].trajectory if name in ROWS else {}
    assert special.keys() <= declared.keys(), f"the row of {name} has values for what is no hyperparameter of it"
    derived = {key: usual(field) for key, field in declared.items() if key not in special}
    return st.fixed_dictionaries(derived | dict(special))


def compare(name: str, arguments: dict[str, Any], ours: list[nn.Parameter], optimizer: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    reference = REFERENCES[name]([p.detach().numpy().copy() for p in ours], **arguments)
    mean = [rng.normal(size=p.shape) for p in ours]
    for t in range(14):
        lr = 0.01 * (1 + 0.5 * np.sin(t))
        grads = [m + rng.normal(size=m.shape) for m in mean]
        for group in optimizer.param_groups:
            group["lr"] = lr
            if arguments.get("decay") == "corrected":
                group["initial_lr"] = reference.lr_max = 0.016  # As a schedule leaves it there.
        for p, g in zip(ours, grads):
            p.grad = torch.from_numpy(g)
        optimizer.step()
        reference.step(grads, lr=lr)
    for p, expected in zip(ours, reference.params):
        # Both are float64 and differ in the order of operations, which roots of small variances, powers and
        # eigenvectors amplify by some orders of magnitude; the references' iteration also adds 1e-7 to the norm.
        rtol = 1e-7 if arguments.get("orthogonalizer", "exact") == "exact" else 1e-5
        if amplifies(name, "bases"):
            rtol *= 10  # Eigenvectors of nearly equal eigenvalues turn by far more than the rounding that moves them.
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize("backend", ["plain", "chunked", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OURS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_float64_trajectory(name: str, backend: str, data: st.DataObject) -> None:
    arguments = data.draw(drawn(name))
    cls: Any = OPTIMIZERS[name].cls
    # Bases: axes no longer than the rest of the tensor, so that no first outer product is singular.
    shapes: list[tuple[int, ...]] = [(4, 4), (6, 6)] if amplifies(name, "bases") else [(3, 5), (6, 2), (4, 2, 3, 3)]
    if name in MATRIX and not cls.flatten:
        shapes += [(4, 3, 2, 2), (5,)]
    seed = data.draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed + 1)
    params = [nn.Parameter(torch.from_numpy(rng.normal(size=shape))) for shape in shapes]
    groups: Any = [{"params": params, "role": "matrix"}] if name in MATRIX else params
    compare(name, arguments, params, cls(groups, backend=backend, **arguments), seed)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(arguments=drawn("AdamW"), seed=st.integers(0, 2**16))
def test_adamw_fallback(arguments: dict[str, Any], seed: int) -> None:
    params = [nn.Parameter(torch.ones(5, dtype=torch.float64))]
    cls: Any = OPTIMIZERS["Muon"].cls
    compare("AdamW", arguments, params, cls([{"params": params, "role": "fallback", **arguments}]), seed)
