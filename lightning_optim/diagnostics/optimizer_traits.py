"""What an optimizer is like, found by trying it on a matrix of its own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..engine.optimizer import RuleOptimizer
from ..engine.rule import ModelRule, decay_of
from ..engine.two_rules import MatrixOptimizer
from .what_if import fork_rng

_STEPS = 3


def traits(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """What the rule of a parameter group is like.

    Returns:
        - ``rule``: its name;
        - ``scale_invariant``: whether gradients a thousand times as large lead to the same updates, to 1 %; ``None``
          where it could not be tried;
        - ``orthogonalizer``: how it orthogonalises, if it does;
        - ``decay``: the form of its weight decay, ``"decoupled"``, ``"coupled"`` and so on, or ``"none"``;
        - ``steps_back``: whether it goes too far on purpose and takes such steps back, as ELRA does;
        - the group's plain hyperparameters under their own names.

    Example:
        >>> w = [nn.Parameter(torch.ones(2, 2))]
        >>> for optimizer in (torch.optim.SGD(w, lr=0.1), torch.optim.AdamW(w)):
        ...     found = traits(optimizer, optimizer.param_groups[0])
        ...     print(found["rule"], found["scale_invariant"], found["decay"])
        SGD False none
        AdamW True decoupled
    """
    rule = group["rule"] if isinstance(optimizer, RuleOptimizer) else type(optimizer).__name__
    plain = {name: value for name, value in group.items() if isinstance(value, (bool, int, float, str))}
    pairs = {name: list(value) for name, value in group.items() if name == "betas"}
    return {
        **plain,
        **pairs,
        "lr": float(group["lr"]),
        "rule": rule,
        "scale_invariant": _is_scale_invariant(optimizer, group),
        "orthogonalizer": group.get("orthogonalizer") if group.get("role", "matrix") == "matrix" else None,
        "decay": _decay(optimizer, group),
        "steps_back": isinstance(optimizer, ModelRule),
    }


def _decay(optimizer: Optimizer, group: Mapping[str, Any]) -> str:
    if not group.get("weight_decay"):
        return "none"
    if isinstance(optimizer, RuleOptimizer):
        return str(decay_of(optimizer.rule(group), group))
    decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
    return "decoupled" if decoupled else "coupled"


def _is_scale_invariant(optimizer: Optimizer, group: Mapping[str, Any]) -> bool | None:
    try:
        with fork_rng(torch.device("cpu")), warnings.catch_warnings(), torch.device("cpu"):
            warnings.simplefilter("ignore")
            once, scaled = (_moves(optimizer, group, scale) for scale in (1.0, 1e3))
    except Exception:  # It is somebody's class, which may want anything.
        return None
    return bool(torch.linalg.vector_norm(scaled - once) <= 0.01 * torch.linalg.vector_norm(once))


def _moves(optimizer: Optimizer, group: Mapping[str, Any], scale: float) -> Tensor:
    """Where some steps with the class's defaults lead from one start."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(4, 3, generator=generator))
    start = p.detach().clone()
    cls: Any = type(optimizer)
    arguments: dict[str, Any] = {"lr": 1e-3}
    if isinstance(optimizer, MatrixOptimizer):
        if group["role"] == "fallback":
            arguments["fallback"] = group["rule"]
        trial = cls([{"params": [p], "role": group["role"]}], **arguments)
    else:
        trial = cls([p], **arguments)
    with torch.enable_grad():
        for _ in range(_STEPS):
            p.grad = scale * torch.randn(4, 3, generator=generator)
            trial.step()
    return p.detach() - start
