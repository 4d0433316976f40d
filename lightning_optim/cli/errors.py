"""What is wrong with an argument, in one message."""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import NoReturn


class UsageError(Exception):
    """A setting that the user has to change. Its message is all that is shown."""


@contextmanager
def explained(what: str = "", by: tuple[str, ...] = ("lightning_optim", "lightning")) -> Iterator[None]:
    """Turns a ValueError that one of these packages raises about a setting into a :class:`UsageError`.

    Others are mistakes in code and pass.
    """
    try:
        yield
    except ValueError as error:
        cause: BaseException | None = error
        while cause and _raised_in(cause) == "jsonargparse":  # which instantiates classes and follows links
            cause = cause.__cause__
        if (
            cause is not None
            and _is_about_a_setting(cause)
            and _raised_in(cause) in by
            and users_traceback(cause) is None
        ):
            message = what + str(cause)
            if found := re.search(r"'([^']+)' is not one of ([^.]+)", message):
                message += f" {nearest(found[1], found[2].split(', '), '')}"
            raise UsageError(message) from error
        raise


def _is_about_a_setting(error: BaseException) -> bool:
    data = sys.modules.get("lightning_optim.data")  # not imported for this, which takes seconds
    return isinstance(error, ValueError) or (data is not None and isinstance(error, data.DataError))


def _raised_in(error: BaseException) -> str:
    """The top-level package of the function that raised an error."""
    traceback = error.__traceback__
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    return traceback.tb_frame.f_globals["__name__"].partition(".")[0] if traceback else ""


_INFRASTRUCTURE = {
    *("lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "lightning_optim"),
    *("jsonargparse", "torch", "torchmetrics", "fsspec", *sys.stdlib_module_names),
} - {"__main__"}


def users_traceback(error: BaseException) -> TracebackType | None:
    """The part of an error's traceback that begins in the user's code, if it passes through any."""
    traceback = error.__traceback__
    while traceback and traceback.tb_frame.f_globals.get("__name__", "").partition(".")[0] in _INFRASTRUCTURE:
        traceback = traceback.tb_next
    return traceback


def fault_in_module(message: str) -> BaseException | None:
    """What is wrong with the user's module in which a class was looked up, if it cannot be imported.

    That there is no such module is not meant, for that is a mistake in the argument.
    """
    for path in re.findall(r"(?:Given value|Got value)[^\n]*?'?\b((?:\w+\.)+\w+)", message):
        module = path.rpartition(".")[0]
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                return error
        except Exception as error:
            return error
    return None


def exit_with(message: str, program: str = "lightning-optim") -> NoReturn:
    """End the process with a message and exit status 2."""
    sys.stderr.write(f"{program}: error: {' '.join(message.split())}\n")
    sys.exit(2)


def explain(message: str, parser: argparse.ArgumentParser) -> str:
    """What an error message of argparse or jsonargparse comes down to, with the nearest valid input.

    A message that is not understood stays as it is.
    """
    if found := re.search(r"[Uu]nrecognized arguments: (.*)", message):
        words = found[1].split()
        option = next((word for word in words if word.startswith("-")), words[0])
        return _unknown_option(option.partition("=")[0], parser)
    if found := re.search(r"does not accept (?:option|nested key) '([\w.]+)'", message):
        return _unknown_option(f"--{found[1]}", parser)
    if found := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
        known = re.findall(r"[\w-]+", found[2])
        return f"There is no subcommand {found[1]!r}. {nearest(found[1], known)}"
    if not (found := re.search(r'Parser key "([\w.]+)"', message)):
        return message
    key, reason, of = found[1], message, ""
    option = f"--{key}"
    if found := re.search(r"Problem with given class_path '([\w.]+)':\n(.*)", message, re.DOTALL):
        path, reason = found[1], re.split(r"\n +- |\n *Given value", found[2])[0]
        name = path.rpartition(".")[2]
        if found := re.search(r"(?:Option|Key) '([\w.]+)' is not (?:accepted|expected)", reason):
            return f"{name} has no argument {found[1]!r}: {option}.{found[1]}. {nearest(found[1], _arguments(path))}"
        if found := re.search(r'Parser key "([\w.]+)"', reason):
            option += f".{found[1]}"
        of = f" of {name}"
    given = re.findall(r"(?:Got value|Given value): (.*)", reason)
    if not given:
        return f"{option}{of}: {reason.strip()}"
    value = given[-1]
    if key in (classes := _classes()) and "Expected a dot import path string" in reason:
        names = [cls.__name__ for cls in _subclasses(classes[key])]
        return f"{option} {value}: there is no such class. {nearest(value, names)}"
    types = [_type_name(t) for t in re.findall(r"Expected an? (.*?)(?:\. Got value.*)?$", reason, re.MULTILINE)]
    near = nearest(value, re.findall(r"'([^']+)'", " ".join(types)), "")
    return f"{option}{of}: expected {' or '.join(dict.fromkeys(types))}, got {value!r}. {near}"


def _classes() -> dict[str, type]:
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import Logger
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    return {
        "model": pl.LightningModule,
        "data": pl.LightningDataModule,
        "trainer.callbacks": pl.Callback,
        "trainer.logger": Logger,
        "optimizer": Optimizer,
        "lr_scheduler": LRScheduler,
    }


def _arguments_of_any(key: str) -> set[str]:
    """The arguments of the classes that an option takes."""
    names: set[str] = set()
    for cls in _subclasses(_classes()[key]):
        with suppress(ValueError, TypeError):  # Some classes have no signature.
            names |= inspect.signature(cls).parameters.keys()
    return names


def _subclasses(cls: type) -> list[type]:
    found: list[type] = []
    subclass: type
    for subclass in cls.__subclasses__():
        found += [subclass, *_subclasses(subclass)]
    return found


def _type_name(text: str) -> str:
    name = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", text)
    return re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", name).replace("NoneType", "null")


def _arguments(path: str) -> list[str]:
    return [name for name in inspect.signature(import_class(path)).parameters if name not in ("params", "optimizer")]


def _unknown_option(option: str, parser: argparse.ArgumentParser) -> str:
    known = [name for action in parser._actions for name in action.option_strings]
    known = [name for name in known if name.startswith("--") and not name.endswith((".help", "+"))]
    if "lightning.pytorch" in sys.modules:  # and so a parser of Lightning's
        inner = [f"--{key}.{name}" for key in _classes() if f"--{key}" in known for name in _arguments_of_any(key)]
        if ends := [name for name in {*known, *inner} if name.endswith(f".{option.removeprefix('--')}")]:
            return f"There is no option {option}. Did you mean {' or '.join(sorted(ends))}?"
    return f"There is no option {option}. {nearest(option, known, 'Add --help to see all.')}"


def nearest(name: str, known: Iterable[str], otherwise: str | None = None) -> str:
    by_fold = {k.lower(): k for k in sorted(known)}
    near = [by_fold[n] for n in difflib.get_close_matches(name.lower(), by_fold, n=3, cutoff=0.6)]
    if near:
        return f"Did you mean {', '.join(near)}?"
    return f"Known: {', '.join(by_fold.values())}." if otherwise is None else otherwise


def import_class(path: str) -> type:
    """The class of a dotted path."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


class Parser(argparse.ArgumentParser):
    """A parser of argparse that says what is wrong in one message."""

    def error(self, message: str) -> NoReturn:
        exit_with(explain(message, self))
