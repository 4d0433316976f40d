"""``lightning-optim COMMAND ...``: finds the file that runs a command."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from typing import Protocol, cast

from . import commands
from .errors import Parser, UsageError, exit_with

#: The commands of LightningCLI.
TRAINER_COMMANDS = {
    "fit": "Train a model.",
    "validate": "Evaluate a model on the validation data.",
    "test": "Evaluate a model on the test data.",
    "predict": "Make predictions with a model.",
}


class Command(Protocol):
    """What a file in ``commands`` defines."""

    DESCRIPTION: str  # Its first sentence stands in the list of commands.

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments."""

    def run(self, options: argparse.Namespace) -> None:
        """Run the command.

        Raises:
            UsageError: An argument is wrong.
        """


def command_names() -> list[str]:
    """The commands beside those of LightningCLI."""
    return sorted(module.name for module in pkgutil.iter_modules(commands.__path__))


def load_command(name: str) -> Command:
    """The file of a command."""
    return cast(Command, importlib.import_module(f"{commands.__name__}.{name}"))


def main(args: Sequence[str] | None = None) -> None:
    """The command ``lightning-optim``.

    Args:
        args: Its arguments. Default: those of the process.
    """
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] not in command_names():
        from . import train

        train.main(args)
        return
    command = load_command(args[0])
    parser = Parser(f"lightning-optim {args[0]}", description=command.DESCRIPTION)
    command.add_arguments(parser)
    try:
        command.run(parser.parse_args(args[1:]))
    except UsageError as error:
        exit_with(str(error))
