"""What is wrong with an argument, in one message."""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile
from typing import Any, NoReturn

from .tracebacks import users_traceback


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
        while cause and raised_in(cause) == "jsonargparse":  # which instantiates classes and follows links
            cause = cause.__cause__
        if (
            cause is not None
            and _is_about_a_setting(cause)
            and raised_in(cause) in by
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


def raised_in(error: BaseException) -> str:
    """The top-level package of the function that raised an error."""
    traceback = error.__traceback__
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    return traceback.tb_frame.f_globals["__name__"].partition(".")[0] if traceback else ""


# --- from Lightning and the system ---------------------------------------------------------------------------------


def explain_trainer(message: str, settings: Mapping[str, Any]) -> str:
    """What Lightning says is wrong with the Trainer's arguments, with those that it means and a remedy.

    Args:
        message: What it says.
        settings: Arguments of the Trainer that are not its defaults.
    """
    words = set(re.findall(r"[\w.-]+", message.replace("-", "_")))
    named = [name for name in settings if name in words]
    texts = {name: value.replace("-", "_") for name, value in settings.items() if isinstance(value, str)}
    named = named or [name for name, value in texts.items() if value in words]
    shown = {name: settings[name] for name in named if not re.search(r"Namespace|<", str(settings[name]))}
    given = " ".join(f"--trainer.{name} {shown.get(name, '')}".strip() for name in named) or "--trainer"
    remedies = [_REMEDIES[name] for name in named if name in _REMEDIES]
    return " ".join([f"{given}: {message.strip().rstrip('.!')}.", *remedies])


_REMEDIES = {
    "devices": "Give the number of devices (on a CPU: of processes), or auto for all that this machine has.",
    "accelerator": "Use auto for what this machine has.",
}


def missing_package(error: ImportError, option: str) -> str:
    """What to install, and for what.

    Args:
        error: What the import has raised.
        option: What needs the package.
    """
    text = " ".join(str(error).split())
    quoted = r"[`'\"]?([A-Za-z][\w.\[\]-]*(?:[<>=!~]=?[\w.]+)?)[`'\"]?"
    said = (rf"pip install (?:-\w+ )*{quoted}", rf"{quoted} (?:is not|to be|must be) installed", rf"requires? {quoted}")
    found = next(filter(None, (re.search(words, text) for words in said)), None)
    package = found[1] if found else (error.name or "").partition(".")[0]
    if not package:
        return f"{option}: {text}"
    name = re.split(r"[<>=!~]", package)[0]
    return f"{option} needs the package {name}, which is not installed: pip install '{package}'"


def exit_with(message: str, program: str = "lightning-optim") -> NoReturn:
    """End the process with a message and exit status 2."""
    sys.stderr.write(f"{program}: error: {' '.join(message.split())}\n")
    sys.exit(2)


def explain(message: str, parser: argparse.ArgumentParser, args: Sequence[str] = ()) -> str:
    """What an error message of argparse or jsonargparse comes down to, with the nearest valid input.

    A message that is not understood stays as it is.

    Args:
        message: The message.
        parser: The parser that it comes from.
        args: What was parsed.
    """
    if found := re.search(r"[Uu]nrecognized arguments: (.*)", message):
        words = found[1].split()
        option = next((word for word in words if _is_option(word)), words[0])
        if not _is_option(option) and (owner := _option_before(option, args)):
            return f"{owner} takes one value. Several are written in brackets: {_in_brackets(owner, option, args)}"
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
    hint = nearest(value, re.findall(r"'([^']+)'", " ".join(types)), "")
    if "a list" in types and not value.startswith("["):
        hint = f"Write it in brackets: {_in_brackets(option, value, args)}"
    return f"{option}{of}: expected {' or '.join(dict.fromkeys(types))}, got {value!r}. {hint}"


def _is_option(word: str) -> bool:
    return re.match(r"--?[A-Za-z]", word) is not None


def _option_before(word: str, args: Sequence[str]) -> str | None:
    """The option that has a value already and is followed by another one."""
    for i, arg in enumerate(args):
        if arg == word and i > 0 and not (_is_option(args[i - 1]) and "=" not in args[i - 1]):
            options = [before for before in args[:i] if _is_option(before)]
            return options[-1].partition("=")[0] if options else None
    return None


def _in_brackets(option: str, value: str, args: Sequence[str]) -> str:
    """What should have been written where the values of a list were given one by one."""
    values = [value]
    for i, arg in enumerate(args):
        name, equals, first = arg.partition("=")
        if name == option or name.rstrip("+") == option:
            values = [first] * bool(equals) + list(takewhile(lambda word: not _is_option(word), args[i + 1 :]))
    parts = [part for text in values for part in re.split(r"[,\s]+", text.strip("()")) if part]
    return f"{option} '[{', '.join(parts)}]'"


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
    if re.match(r"(typing\.|collections\.abc\.)?(list|tuple|set|sequence|iterable)\b", name, re.IGNORECASE):
        return "a list"
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
