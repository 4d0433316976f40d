"""Modern optimizers for PyTorch Lightning, and diagnostics that show what they do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .engine.carry_over import carry_over
from .optimizers import *  # noqa: F403
from .optimizers import __all__ as _algorithms
from .registry import OPTIMIZERS

if TYPE_CHECKING:
    from .callbacks.watch import Watch
    from .factory import (
        Grouping,
        OptimizerConfig,
        OptimizerMixin,
        SchedulerConfig,
        build_optimizer,
        configure_optimizers,
    )

__all__ = [
    "OPTIMIZERS",
    "Grouping",
    "OptimizerConfig",
    "OptimizerMixin",
    "SchedulerConfig",
    "Watch",
    "build_optimizer",
    "carry_over",
    "configure_optimizers",
    *_algorithms,
]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    # The factory and the diagnostics import Lightning, which takes seconds and which optimizers do not need.
    if name == "Watch":
        from .callbacks.watch import Watch

        return Watch
    if name in __all__:
        from . import factory

        return getattr(factory, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
