"""Optimizers: one file per algorithm, each a declaration; see :mod:`lightning_optim.engine.rule` for what one is.

A file that is put here is found: its optimizers are exported, and known by name to everything else.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from ..engine.cuda_graphs import capture_step
from ..engine.optimizer import NonFiniteGradientsError, RuleOptimizer
from ..engine.rule import RULES


def _algorithms() -> dict[str, Any]:
    """The optimizers that the files of this folder declare, element-wise ones first, each kind by name."""
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        importlib.import_module(f"{__name__}.{module}")
    kinds = ("element-wise", "group", "matrix")
    found = [rule for rule in RULES.values() if issubclass(rule, RuleOptimizer)]
    return {rule.name: rule for rule in sorted(found, key=lambda rule: (kinds.index(rule.kind), rule.name.lower()))}


ALGORITHMS = _algorithms()
globals().update(ALGORITHMS)

__all__ = [*ALGORITHMS, "NonFiniteGradientsError", "capture_step"]
