"""``lightning-optim completion SHELL``: completion of commands, options, presets and optimizers in a shell."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, get_args, get_type_hints

import shtab

DESCRIPTION = (
    "Print a script that completes commands, options, presets and optimizers in a shell. Write it to a file that the "
    "shell reads when it starts: lightning-optim completion bash > "
    "~/.local/share/bash-completion/completions/lightning-optim, or for zsh into a file _lightning-optim in a folder "
    "of $fpath."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help="which shell")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    print(shtab.complete(_parser(), options.shell))


def _parser() -> argparse.ArgumentParser:
    """A parser of argparse with the commands, options and choices of ``lightning-optim``.

    That of jsonargparse holds all classes that are known for each option, and a script from it has 120 MB.
    """
    from ..entry import command_names, load_command
    from ..invocation import OPTIONS, TRAINER_COMMANDS

    parser = argparse.ArgumentParser("lightning-optim")
    parser.add_argument("--version", action="store_true")
    subparsers = parser.add_subparsers()
    choices = _choices()
    for name in command_names():
        command = subparsers.add_parser(name, help="")  # Without a help it would be left out.
        load_command(name).add_arguments(command)
        for action in command._actions:
            if action.metavar == "NAME":
                action.choices = choices["--optimizer"]
    options = {*(f"--{name}" for name in OPTIONS if name != "help"), *choices}
    for name in TRAINER_COMMANDS:
        command = subparsers.add_parser(name, help="")
        command.add_argument("-c", choices=choices["--config"])
        for option in sorted(options):
            if option == "--print_config":
                command.add_argument(option, action="store_true")
            else:
                command.add_argument(option, choices=choices.get(option) or None)
    return parser


def _choices() -> dict[str, list[str]]:
    """The choices for options of the commands that train; none where anything goes."""
    import lightning.pytorch as pl

    from ... import schedules
    from ...callbacks import Diagnostics, Resume
    from ...data import TextData, VisionData
    from ...factory import Grouping
    from ...models import LanguageModel, VisionClassifier
    from ...registry import OPTIMIZERS
    from ..presets import presets

    classes: dict[str, list[Any]] = {
        "trainer": [pl.Trainer],
        "model": [VisionClassifier, LanguageModel],
        "data": [VisionData, TextData],
        "optimizer": [info.cls for info in OPTIMIZERS.values()],
        "lr_scheduler": [getattr(schedules, name) for name in schedules.__all__],
        "grouping": [Grouping],
        "diagnostics": [Diagnostics],
        "resume": [Resume],
    }
    choices: dict[str, list[str]] = {}
    for key, some in classes.items():
        for cls in some:
            for name, values in _arguments(cls):
                known = choices.setdefault(f"--{key}.{name}", [])
                known += [value for value in values if value not in known]
    names = {key: [cls.__name__ for cls in classes[key]] for key in ("model", "data", "lr_scheduler")}
    return choices | {
        "--config": [*presets("tasks"), *presets("optimizers")],
        "--optimizer": list(OPTIMIZERS),
        "--optimizer.help": list(OPTIMIZERS),
        "--lr_scheduler.help": names["lr_scheduler"],
        "--lr_scheduler_interval": ["step", "epoch"],
        "--ckpt_path": ["last", "best"],
        **{f"--{key}": some for key, some in names.items()},
    }


def _arguments(cls: Any) -> Iterator[tuple[str, list[str]]]:
    """The arguments of a class, and the values of those that take only certain ones."""
    hints: dict[str, Any] = {}
    with suppress(NameError):  # of a name that is imported for type checkers only
        hints = get_type_hints(cls.__init__)
    for name, parameter in inspect.signature(cls).parameters.items():
        if name not in ("params", "optimizer") and parameter.kind not in _MANY:
            yield name, ["true", "false"] if hints.get(name) is bool else list(_literals(hints.get(name)))


_MANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _literals(hint: Any) -> Iterator[str]:
    for arg in get_args(hint):
        if isinstance(arg, str):
            yield arg
        else:
            yield from _literals(arg)
