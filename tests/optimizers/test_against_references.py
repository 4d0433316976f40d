"""Every rule against an independent float64 reference, at any hyperparameters, with a changing learning rate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_optim.engine.optimizer import RuleOptimizer
from lightning_optim.engine.rule import RULES
from lightning_optim.engine.two_rules import MatrixOptimizer
from lightning_optim.registry import OPTIMIZERS

from .references import REFERENCES

betas = st.tuples(st.floats(0, 0.99), st.floats(0.1, 0.999))
eps = st.sampled_from([1e-8, 1e-4])
decay = {"weight_decay": st.sampled_from([0.0, 0.1])}
coupling = {**decay, "decoupled": st.booleans()}
released = st.fixed_dictionaries({"nesterov": st.booleans(), "scale": st.sampled_from([0.2, 0.5])})
paper = st.just({"nesterov": False, "scale": None, "max_step": None})
eigenbasis = {
    **decay,
    "betas": betas,
    "eps": eps,
    "shampoo_beta": st.sampled_from([None, 0.5, 0.9]),
    "precondition_frequency": st.integers(1, 4),
    "stagger": st.booleans(),
    "max_precondition_dim": st.sampled_from([5, 10000]),
    "correct_bias": st.booleans(),
}

#: The arguments to draw for each optimizer. One that is missing here fails the first test.
ARGUMENTS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "MVNGrad": {**coupling, "betas": betas, "eps": eps, "eps_s": st.sampled_from([0.0, 1e-6])},
    "DeVAVector": {**decay, "betas": betas, "nesterov": st.booleans()},
    "HVAdam": {**coupling, "betas": betas, "eps": eps, "gamma": st.floats(0, 1)},
    "Anon": {
        **coupling,
        "betas": betas,
        "eps": eps,
        "gamma": st.floats(-1, 1.5),
        "beta3": st.floats(0, 0.9),
        "refresh": st.sampled_from(["powers_of_two", "every_step"]),
    },
    "AdaBelief": {**coupling, "betas": betas, "eps": eps, "rectify": st.booleans(), "amsgrad": st.booleans()},
    "LaProp": {**decay, "betas": betas, "eps": eps, "centered": st.booleans()},
    "PNM": {**coupling, "momentum": st.floats(0, 0.99), "beta0": st.floats(0, 2)},
    "AdaPNM": {**coupling, "betas": betas, "eps": eps, "beta0": st.floats(0, 2), "amsgrad": st.booleans()},
    "MAdam": {**coupling, "betas": betas, "eps": eps, "beta_min": st.floats(0, 0.9), "amsgrad": st.booleans()},
    "LaMAdam": {**coupling, "betas": betas, "eps": eps, "beta_min": st.floats(0, 0.9)},
    "Muon": {
        **decay,
        "momentum": st.floats(0, 0.99),
        "nesterov": st.booleans(),
        "scale": st.sampled_from(["original", "moonlight"]),
    },
    "NorMuon": {
        **decay,
        "momentum": st.floats(0, 0.99),
        "beta2": st.floats(0, 0.99),
        "nesterov": st.booleans(),
        "scale": st.sampled_from(["original", "rms"]),
    },
    "AdaMuon": {**decay, "momentum": st.floats(0, 0.99), "eps": eps, "nesterov": st.booleans()},
    "MuonVS": {**decay, "momentum": st.floats(0.1, 0.99), "eps": eps},
    "MuonNSR": {**decay, "momentum": st.floats(0.1, 0.99), "eps": eps, "gamma": st.floats(0.1, 20)},
    "NAMO": {**decay, "betas": betas, "eps": eps, "form": released | paper},
    "NAMOD": {**decay, "betas": betas, "eps": eps, "form": released | paper, "clamp": st.floats(0.05, 1)},
    "SOAP": {**eigenbasis, "precondition_1d": st.just(False)},
    "DeVA": {
        **eigenbasis,
        "nesterov": st.booleans(),
        # The signs of the other two turn rounding errors into jumps; the golden cases hold them.
        "form": st.sampled_from(["momentum", "instantaneous"]),
    },
}
ORTHOGONAL = ("Muon", "NorMuon", "AdaMuon", "MuonVS", "MuonNSR", "NAMO", "NAMOD", "DeVA")


def test_every_optimizer_has_a_reference() -> None:
    ours = {name for name, info in OPTIMIZERS.items() if issubclass(info.cls, RuleOptimizer)}
    assert ours == set(ARGUMENTS)
    assert ours | {"AdamW"} <= set(REFERENCES)


def compare(name: str, arguments: dict[str, Any], ours: list[nn.Parameter], optimizer: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    known = {key: value for key, value in arguments.items() if key != "max_step"}
    reference = REFERENCES[name]([p.detach().numpy().copy() for p in ours], **known)
    mean = [rng.normal(size=p.shape) for p in ours]
    for t in range(14):
        lr = 0.01 * (1 + 0.5 * np.sin(t))
        grads = [m + rng.normal(size=m.shape) for m in mean]
        for group in optimizer.param_groups:
            group["lr"] = lr
        for p, g in zip(ours, grads):
            p.grad = torch.from_numpy(g)
        optimizer.step()
        reference.step(grads, lr=lr)
    for p, expected in zip(ours, reference.params):
        # Both are float64 and differ in the order of operations, which roots of small variances, powers and
        # eigenvectors amplify by some orders of magnitude; the references' iteration also adds 1e-7 to the norm.
        rtol = 1e-5 if arguments.get("orthogonalizer") == "kj5" else 1e-7
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize("backend", ["plain", "chunked", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ARGUMENTS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_float64_trajectory(name: str, backend: str, data: st.DataObject) -> None:
    arguments = data.draw(st.fixed_dictionaries(ARGUMENTS[name]))
    if isinstance(arguments.get("form"), dict):
        arguments |= arguments.pop("form")
    if name in ORTHOGONAL:
        arguments["orthogonalizer"] = data.draw(st.sampled_from(["exact", "kj5"]))
    matrix = OPTIMIZERS[name].kind == "matrix"
    # Axes no longer than the rest of the tensor, so that no first outer product is singular.
    shapes = [(4, 4), (6, 6)] if name in ("SOAP", "DeVA") else [(3, 5), (6, 2), (4, 2, 3, 3)]
    if name == "SOAP":
        shapes += [(4, 3, 2, 2), (5,)]
    seed = data.draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed + 1)
    params = [nn.Parameter(torch.from_numpy(rng.normal(size=shape))) for shape in shapes]
    given_arguments = dict(arguments)
    if name == "DeVA" and arguments["orthogonalizer"] == "kj5":
        given_arguments["orthogonalizer"] = "kj5-schatten"
    cls: Any = OPTIMIZERS[name].cls
    groups: Any = [{"params": params, "role": "matrix"}] if issubclass(cls, MatrixOptimizer) else params
    assert matrix == issubclass(cls, MatrixOptimizer)
    compare(name, arguments, params, cls(groups, backend=backend, **given_arguments), seed)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(betas=betas, eps=eps, weight_decay=decay["weight_decay"], seed=st.integers(0, 2**16))
def test_adamw_fallback(betas: tuple[float, float], eps: float, weight_decay: float, seed: int) -> None:
    params = [nn.Parameter(torch.ones(5, dtype=torch.float64))]
    arguments = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
    assert set(arguments) | {"lr"} == set(RULES["AdamW"].fields)
    cls: Any = OPTIMIZERS["Muon"].cls
    compare("AdamW", arguments, params, cls([{"params": params, "role": "fallback", **arguments}]), seed)
