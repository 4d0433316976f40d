"""What a checkpoint, or a configuration beside one, may name.

Both are data, and data does not decide which code runs: a class that they name is imported if the settings of the run
name it, too. Otherwise it has to be a network, an optimizer or a schedule of a module that is loaded already.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import yaml

from .errors import UsageError

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def class_paths(config: Any) -> Iterator[str]:
    """All classes that a configuration names by ``class_path``."""
    if isinstance(config, Mapping):
        if isinstance(path := config.get("class_path"), str):
            yield path
        for value in config.values():
            yield from class_paths(value)
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from class_paths(value)


def check_hyperparameters(path: str, hyperparameters: Mapping[str, Any], settings: Any) -> None:
    """Refuse hyperparameters of a checkpoint that would have other code imported than the settings of the run.

    Args:
        path: The checkpoint, for the message.
        hyperparameters: Those of its model.
        settings: What command line and configuration files say of the model.

    Raises:
        UsageError: One is the dotted name of something that the settings do not name and that is no class of a loaded
            module for networks, optimizers or schedules, or the path of a configuration file.
    """
    known = set(_strings(settings))
    # Lightning notes down by what function the model was made, and leaves it out when it reads the rest.
    hyperparameters = {name: value for name, value in hyperparameters.items() if name != "_instantiator"}
    for text in dict.fromkeys(_strings(hyperparameters)):
        if text in known or not _names_code(text):
            continue
        remedy = f"--model {text}" if text == hyperparameters.get("_class_path") else "-c with the settings of its run"
        raise UsageError(
            f"--ckpt_path {path} names {text}, which the settings of this run do not name, so it was not loaded. If "
            f"you trust it, add {remedy}."
        )


def names_class(path: str, cls: type) -> bool:
    """Whether a dotted path names a class. Nothing is imported for it but modules of this library."""
    return path == f"{cls.__module__}.{cls.__qualname__}" or (_own(path) or _loaded(path)) is cls


def _strings(x: Any) -> Iterator[str]:
    """All texts in a value."""
    seen, left = set(), [x]
    while left:
        x = left.pop()
        if isinstance(x, str):
            yield x
        elif id(x) not in seen:  # YAML may refer to itself.
            seen.add(id(x))
            if isinstance(x, Mapping):
                left += reversed([*x.values()])
            elif isinstance(x, (list, tuple)):
                left += reversed(x)
            elif hasattr(x, "__dict__") and not isinstance(x, type):  # a Namespace, or a configuration class of ours
                left += reversed([*vars(x).values()])


def _names_code(text: str) -> bool:
    """Whether a text is the dotted name of code, or what the parser of the command line would find one in.

    That is YAML, which it reads in texts, a file, or a reference to other settings.
    """
    if _would_import(text.strip()) or "${" in text or _is_configuration(text):
        return True
    if re.fullmatch(r"[\w./-]+", text):
        return False
    try:
        found = yaml.safe_load(text)
        return not isinstance(found, str) and any(_names_code(part) for part in _strings(found))
    except RecursionError:
        return True
    except (yaml.YAMLError, ValueError):
        return False


def _would_import(text: str) -> bool:
    """Whether a text is the dotted name of code that is not loaded yet, or of something else than a harmless class."""
    if not _DOTTED.fullmatch(text):
        return False
    found = _own(text) or _loaded(text)
    if found is None:
        top = text.partition(".")[0]
        loaded = getattr(sys.modules.get(top), "__file__", None) is not None
        return top in sys.builtin_module_names or loaded or _has_code(text)
    return callable(found) and not _is_harmless(found)


def _has_code(text: str) -> bool:
    """Whether there is code to import for a dotted name. A folder of any kind is a package to Python, without code."""
    folders = None
    name = ""
    for part in text.split("."):
        name = f"{name}.{part}" if name else part
        spec = PathFinder.find_spec(name, folders)
        if spec is None:
            return False
        if spec.origin is not None:
            return True
        folders = spec.submodule_search_locations
    return False


def _own(text: str) -> Any:
    """What a dotted name stands for in this library, whose code may be loaded."""
    module, _, name = text.rpartition(".")
    if module.partition(".")[0] != "lightning_optim":
        return None
    with suppress(ImportError):
        return getattr(import_module(module), name, None)
    return None


def _loaded(text: str) -> Any:
    """What a dotted name stands for in the modules that are loaded. Nothing is imported."""
    parts = text.split(".")
    for i in range(len(parts) - 1, 0, -1):
        if (module := sys.modules.get(".".join(parts[:i]))) is not None:
            found: Any = module
            for part in parts[i:]:
                found = vars(found).get(part) if hasattr(found, "__dict__") else None
            return found
    return None


def _is_harmless(x: Any) -> bool:
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    own = getattr(x, "__module__", "").startswith("lightning_optim.")
    return isinstance(x, type) and (own or issubclass(x, (nn.Module, Optimizer, LRScheduler)))


def _is_configuration(text: str) -> bool:
    """Whether a text is the path of a file that the parser would read settings from, whatever its name ends with."""
    try:
        path = Path(text)
        if not path.is_file():
            return False
        if path.suffix in (".yaml", ".yml", ".json"):
            return True
        with path.open("rb") as file:
            content = file.read(_READ).decode(errors="strict" if path.stat().st_size <= _READ else "ignore")
        return "\0" not in content and (path.stat().st_size > _READ or _names_code(content))
    except (OSError, ValueError):  # Too long for a path, or with a zero byte; or no text.
        return False


_READ = 2**20  # A text file with more bytes counts as one with settings.
