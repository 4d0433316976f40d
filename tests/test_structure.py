"""Imports point down, and the map of folders in CONTRIBUTING is what is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: Rooms from the top to the bottom: each imports those that its line names, and itself. Those that are not packages of
#: their own are listed by their modules.
MAY_IMPORT: dict[str, set[str]] = {
    "cli": {"callbacks", "checkpoint_io", "configs", "data", "factory", "models", "diagnostics", "engine", "processes"},
    "callbacks": {"diagnostics", "processes", "checkpoint_io", "factory", "engine", "data"},
    "models": {"factory", "data"},
    "checkpoint_io": {"processes", "engine"},
    "factory": {"optimizers", "engine", "processes"},
    "diagnostics": {"engine", "optimizers", "processes", "polar"},
    "data": {"processes"},
    "optimizers": {"engine", "polar"},
    "engine": {"processes", "polar"},
    "processes": set(),
    "polar": set(),
    "configs": set(),
}
