"""Which optimizer is better on a model: studies that tune all contenders equally, and say what their result means.

``design`` holds the terms of a study, ``search`` decides what is tried next, ``ledger`` keeps the runs in a storage of
Optuna, ``workers`` make them, ``task`` is what is trained and ``recording`` what is written down of it, ``study`` joins
them, ``statistics`` judges, ``result`` and ``report`` say it.

Names are imported when they are used: processes that only wait for others need neither torch nor Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .result import Comparison
    from .study import compare

__all__ = ["Comparison", "compare"]

_LATE = {"Comparison": "result", "compare": "study"}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(importlib.import_module(f".{_LATE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
