"""One row per optimizer: the configurations that every shared test runs it in.

A new optimizer joins all of them by its row here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim.engine.optimizer import RuleOptimizer
from lightning_optim.engine.two_rules import MatrixOptimizer
from lightning_optim.registry import OPTIMIZERS

#: Optimizer -> configurations that take different paths through its rule; the defaults are always among them.
ROWS: dict[str, list[dict[str, Any]]] = {
    "MVNGrad": [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled": False}],
    "DeVA": [{"precondition_frequency": 2}]
    + [{"form": form, "precondition_frequency": 2} for form in ("sign", "instantaneous", "efficient")]
    + [{"max_precondition_dim": 5, "weight_decay": 0.1}],
    "DeVAVector": [{}, {"nesterov": True, "weight_decay": 0.1}],
    "NAMO": [{}, {"nesterov": False, "scale": None, "max_step": None, "orthogonalizer": "exact"}],
    "NAMOD": [{}, {"nesterov": False, "scale": None, "max_step": None, "orthogonalizer": "exact"}, {"clamp": None}],
    "HVAdam": [{}, {"gamma": 0.5, "weight_decay": 0.1}, {"betas": (0.5, 0.5), "decoupled": True}],
    "Anon": [{}, {"gamma": 1.0, "weight_decay": 0.1}, {"gamma": -0.1, "refresh": "every_step", "decoupled": True}],
    "AdaBelief": [{}, {"rectify": False, "weight_decay": 0.1}, {"rectify": False, "amsgrad": True, "decoupled": False}],
    "LaProp": [{}, {"centered": True, "weight_decay": 1e-3}],
    "PNM": [{}, {"beta0": 0.5, "weight_decay": 0.1, "decoupled": False}],
    "AdaPNM": [{}, {"amsgrad": False, "beta0": 2.0, "weight_decay": 0.1, "decoupled": False}],
    "MAdam": [{}, {"amsgrad": True, "weight_decay": 0.1}, {"betas": (0.9, 0.9), "beta_min": 0.2, "decoupled": False}],
    "LaMAdam": [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled": True}],
    "Muon": [{}, {"scale": "moonlight", "nesterov": False, "weight_decay": 0.1}, {"fallback": "HVAdam"}],
    "NorMuon": [{}, {"scale": "rms", "nesterov": False, "weight_decay": 0.1}],
    "AdaMuon": [{}, {"nesterov": False, "weight_decay": 0.1, "orthogonalizer": "exact"}],
    "MuonVS": [{}, {"momentum": 0.8, "eps": 1e-3, "weight_decay": 0.1}],
    "MuonNSR": [{}, {"gamma": 0.5, "weight_decay": 0.1}],
    "SOAP": [
        {"precondition_frequency": 2},
        {"precondition_frequency": 3, "merge_dims": True, "correct_bias": False, "max_precondition_dim": 12},
        {"precondition_1d": True, "shampoo_beta": 0.8, "fallback": "MVNGrad"},
    ],
}

OURS = [name for name, info in OPTIMIZERS.items() if issubclass(info.cls, RuleOptimizer)]

each_optimizer = pytest.mark.parametrize("name", OURS)
each_configuration = pytest.mark.parametrize(
    ("name", "arguments"),
    [
        pytest.param(name, arguments, id=f"{name}-{'-'.join(f'{k}={v}' for k, v in arguments.items()) or 'defaults'}")
        for name in OURS
        for arguments in ROWS[name]
    ],
)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A convolution, a linear layer, vectors, and a scalar."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3))
    model.register_parameter("scale", nn.Parameter(torch.tensor(1.5)))
    return model.to(dtype)


def build(name: str, params: list[Tensor], **arguments: Any) -> RuleOptimizer:
    """An optimizer over bare parameters; those with two axes or more are matrices."""
    cls: Any = OPTIMIZERS[name].cls
    if not issubclass(cls, MatrixOptimizer):
        return cls(params, **arguments)
    roles = {"matrix": [p for p in params if p.ndim >= 2], "fallback": [p for p in params if p.ndim < 2]}
    return cls([{"params": ps, "role": role} for role, ps in roles.items() if ps], **arguments)


def gradients(params: list[Tensor], t: int) -> list[Tensor]:
    """Gradients of step ``t``: a drifting mean and noise, the same whatever the parameters."""
    generator = torch.Generator().manual_seed(1000 + t)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).add_(0.5).to(p.dtype) for p in params]


def run(optimizer: torch.optim.Optimizer, params: list[Tensor], steps: range) -> None:
    for t in steps:
        for p, g in zip(params, gradients(params, t)):
            p.grad = g
        optimizer.step()
