"""``lightning-optim COMMAND ...``: finds the file that runs a command."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Protocol, cast

from . import commands
from .errors import Parser, UsageError, exit_with, nearest
from .invocation import TRAINER_COMMANDS, Invocation, help_for_optimizer
from .tracebacks import show_users_code


class Command(Protocol):
    """What a file in ``commands`` defines."""

    DESCRIPTION: str  # Its first sentence stands in the list of commands.
    # A command may set TAKES_OTHERS = True and find the arguments that it has not added in `options.others`.

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
    if args is None:  # the program, and not a call from Python
        show_users_code()
    args = list(sys.argv[1:] if args is None else args)
    name = args[0] if args else "--help"
    try:
        if name in ("-h", "--help"):
            print(overview())
        elif name == "--version":
            print(*(f"{package} {version(package)}" for package in ("lightning-optim", "torch", "lightning")))
        elif name in command_names():
            _run(name, args[1:])
        elif name in TRAINER_COMMANDS or name.startswith("-"):
            _train(args)
        else:
            raise UsageError(f"There is no command {name!r}. {nearest(name, [*TRAINER_COMMANDS, *command_names()])}")
    except UsageError as error:
        exit_with(str(error))
    except BrokenPipeError:  # as from `lightning-optim list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(name: str, args: list[str]) -> None:
    command = load_command(name)
    parser = Parser(f"lightning-optim {name}", description=command.DESCRIPTION)
    command.add_arguments(parser)
    options, others = parser.parse_known_args(args)
    if others and not getattr(command, "TAKES_OTHERS", False):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    options.others = others
    command.run(options)


def _train(args: list[str]) -> None:
    # So that `--model mine.Model` finds mine.py here, as it would with `python -m`.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    if shown := help_for_optimizer(args):
        print(shown)
        return
    invocation = Invocation.of(args)
    from . import train  # here, because it imports Lightning

    train.run(invocation)


_EXAMPLES = """examples:
  lightning-optim fit                                                digits with MVNGrad, no network needed
  lightning-optim fit --optimizer NAMO --optimizer.lr 0.012          another optimizer
  lightning-optim fit -c stdlib-text -c namo                         presets of a task and of an optimizer
  lightning-optim fit --ckpt_path last                               go on with the newest run
  lightning-optim test --ckpt_path best                              test the best checkpoint of that run
  lightning-optim list [--json]                                      all optimizers
  lightning-optim list NAMO                                          equations and arguments of an optimizer
  lightning-optim list --presets                                     all presets
  lightning-optim diagnostics runs [--out report.html]               what the diagnostics of runs say
  lightning-optim compare --optimizers AdamW NAMO                    which optimizer is better on a model
  lightning-optim route mine.Model --batch mine.batch                which rule trains which parameter
  lightning-optim spike --optimizers MVNGrad AdamW --out spike.png   what a gradient spike does to optimizers"""


def overview() -> str:
    """What ``lightning-optim --help`` shows."""
    about = TRAINER_COMMANDS | {name: load_command(name).DESCRIPTION.partition(". ")[0] for name in command_names()}
    width = max(map(len, about)) + 2
    return "\n".join(
        [
            "usage: lightning-optim COMMAND ...",
            "",
            "Train and evaluate models with the optimizers of recent papers.",
            "",
            "commands (add --help to see their options):",
            *(f"  {name:<{width}}{text.rstrip('.')}" for name, text in about.items()),
            "",
            "  -h, --help  show this",
            "  --version   show the versions of lightning-optim, torch and lightning",
            "",
            _EXAMPLES,
        ]
    )
