"""The command line ``lightning-optim``, and :class:`OptimCLI`, its part for other projects.

``entry`` finds the command and ``invocation`` completes its arguments. ``train`` holds the commands of LightningCLI
with this library's models and data, and ``commands`` the others, one file each. ``optim_cli`` is LightningCLI with
optimizers that are built late, ``parser`` reads its arguments, ``presets`` finds configuration files, ``checkpoints``
finds checkpoints, ``trust`` says what they may name, ``record`` saves the settings of a run, ``errors`` says what is
wrong with an argument, ``outputs`` what cannot be written, and ``tracebacks`` shows mistakes in the user's code.

Names are imported when they are used: Lightning takes seconds to import, and most commands do not need it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .entry import main
from .errors import UsageError
from .invocation import Invocation
from .presets import find_config, presets

if TYPE_CHECKING:
    from .checkpoints import find_checkpoint
    from .optim_cli import OptimCLI
    from .parser import OptimArgumentParser, PresetOrFile
    from .record import RecordSettings
    from .train import CommandLine

__all__ = [
    "CommandLine",
    "Invocation",
    "OptimArgumentParser",
    "OptimCLI",
    "PresetOrFile",
    "RecordSettings",
    "UsageError",
    "find_checkpoint",
    "find_config",
    "main",
    "presets",
]

_LATE = {
    "CommandLine": "train",
    "OptimArgumentParser": "parser",
    "OptimCLI": "optim_cli",
    "PresetOrFile": "parser",
    "RecordSettings": "record",
    "find_checkpoint": "checkpoints",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(importlib.import_module(f".{_LATE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
