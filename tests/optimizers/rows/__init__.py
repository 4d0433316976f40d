"""Every optimizer in the shared tests: one row each, in a file of this folder.

A file that is put here is found, as the optimizers themselves are: see :class:`tests.optimizers.row.Row` for what a row
says, and CONTRIBUTING for how to add one.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim.engine import losses
from lightning_optim.engine import optimizer as engine
from lightning_optim.engine.optimizer import RuleOptimizer
from lightning_optim.engine.rule import RULES
from lightning_optim.registry import OPTIMIZERS

from ..drive import build as build
from ..drive import gradients as gradients
from ..references import AdamWReference, Reference
from ..row import Row

OURS = [name for name, info in OPTIMIZERS.items() if issubclass(info.cls, RuleOptimizer)]
FLAT = [name for name in OURS if OPTIMIZERS[name].kind != "matrix"]
MATRIX = [name for name in OURS if OPTIMIZERS[name].kind == "matrix"]


def _rows() -> dict[str, Row]:
    """The rows of the files of this folder, in the order of the registry."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    found = {row.name: row for module in modules for row in module.ROWS}
    for name in OURS:
        if name not in found:
            file = OPTIMIZERS[name].cls.__module__.rpartition(".")[2]
            raise LookupError(
                f"{name} has no row in the tests: add tests/optimizers/rows/{file}.py with its float64 reference, "
                f"written from the paper, and ROWS = [Row({name!r}, {name}Reference, golden=...)]. "
                "CONTRIBUTING, 'Adding an optimizer', has an example."
            )
    if unknown := found.keys() - set(OURS):
        raise LookupError(f"tests/optimizers/rows: there is no optimizer {', '.join(sorted(unknown))}.")
    return {name: found[name] for name in OURS}


ROWS = _rows()
#: Optimizer -> configurations that take different paths through its rule.
CONFIGURATIONS = {name: list(row.configurations) for name, row in ROWS.items()}
#: Rule -> float64 reference.
REFERENCES: dict[str, type[Reference]] = {"AdamW": AdamWReference} | {name: row.reference for name, row in ROWS.items()}


def amplifies(rule: str, what: str) -> bool:
    """Whether a rule makes rounding errors large in that way; see :class:`tests.optimizers.row.Row`."""
    return rule in ROWS and what in ROWS[rule].amplifies


def kind_of(rule: str) -> str:
    """``"element-wise"``, ``"group"`` or ``"matrix"``, of fallback rules, too."""
    return RULES[rule].kind


def label(arguments: dict[str, Any]) -> str:
    return "-".join(f"{k}={v}" for k, v in arguments.items()) or "defaults"


each_optimizer = pytest.mark.parametrize("name", OURS)
each_configuration = pytest.mark.parametrize(
    ("name", "arguments"),
    [
        pytest.param(name, arguments, id=f"{name}-{label(arguments)}")
        for name in OURS
        for arguments in CONFIGURATIONS[name]
    ],
)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A convolution, a linear layer, vectors, and a scalar."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3))
    model.register_parameter("scale", nn.Parameter(torch.tensor(1.5)))
    return model.to(dtype)


def assume_losses(setattr: Callable[[Any, str, Any], None]) -> None:
    """Let a step without a closure have the loss 1, and processes that nothing is known of be alone.

    Users' steps are refused then, where the rule needs the loss. Shared tests call ``step()`` for every rule alike.
    """
    setattr(engine, "loss_of", lambda result, *rest: 1.0 if result is None else losses.loss_of(result, *rest))
    setattr(engine, "mean_loss", lambda loss, groups, *rest: losses.mean_loss(loss, groups, *rest) if groups else loss)


def run(optimizer: torch.optim.Optimizer, params: list[Tensor], steps: range) -> None:
    for t in steps:
        for p, g in zip(params, gradients(params, t)):
            p.grad = g
        optimizer.step()
