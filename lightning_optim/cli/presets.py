"""Packaged configuration files, and what arguments say before they are parsed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from .errors import UsageError, nearest


def presets(kind: Literal["tasks", "optimizers"]) -> dict[str, Path]:
    """The packaged configuration files of a kind, by name."""
    folder = Path(str(resources.files("lightning_optim.configs"))) / kind
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(name: str) -> str:
    """The path of a preset or of a file; YAML stays as it is.

    Raises:
        UsageError: There is neither.
    """
    known = presets("tasks") | presets("optimizers")
    if name in known:
        return str(known[name])
    if not re.fullmatch(r"[\w.~/\\-]+", name) or Path(name).is_file():
        return name
    raise UsageError(f"-c {name}: there is no such preset or file. {nearest(name, known)}")


def load_config(path: str) -> dict[str, Any]:
    """The settings in a YAML file, or in YAML itself.

    Raises:
        UsageError: It holds something else.
    """
    try:
        config = yaml.safe_load(Path(path).read_text() if len(path) < 256 and Path(path).is_file() else path) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"-c {path} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"-c {path} does not hold settings but {config!r}")
    return config


def given(args: Sequence[str], *options: str) -> Iterator[tuple[int, str, str]]:
    """Where options occur in arguments, and their values."""
    for i, token in enumerate(args):
        option, has_value, value = token.partition("=")
        if option in options and (has_value or i + 1 < len(args)):
            yield i, option, value if has_value else args[i + 1]


def class_path(spec: Any) -> str | None:
    """The class that a setting names, which is a string or has a ``class_path``."""
    path = spec if isinstance(spec, str) or spec is None else spec.get("class_path")
    return path if isinstance(path, str) else None
