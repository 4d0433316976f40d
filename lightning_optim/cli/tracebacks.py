"""Errors in the user's code: found among the calls of libraries, and shown from the user's line on."""

from __future__ import annotations

import importlib
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from types import FrameType, TracebackType

_LIBRARIES = {
    *("lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "lightning_optim"),
    *("jsonargparse", "torch", "torchmetrics", "fsspec", "yaml"),
}
_STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"] + os.sep


def users_traceback(error: BaseException) -> TracebackType | None:
    """The part of an error's traceback that begins in the user's code, if it passes through any.

    The program that calls the command line is not meant, but what is called from there.
    """
    part = error.__traceback__
    before = [_module(frame) for frame, _ in traceback.walk_tb(part)]
    command_line = [i for i, name in enumerate(before) if name.startswith("lightning_optim.cli")]
    for _ in range(command_line[0] if command_line else 0):
        part = part.tb_next if part else None
    while part and not _is_users(part.tb_frame):
        part = part.tb_next
    return part


def _module(frame: FrameType) -> str:
    return frame.f_globals.get("__name__") or ""


def _is_users(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    if _module(frame).partition(".")[0] in _LIBRARIES or file.startswith("<frozen"):
        return False
    return not file.startswith(_STANDARD_LIBRARY) or "site-packages" in file


def show_users_code() -> None:
    """Have Python show errors of the user's code without the calls of libraries that led to it.

    What others have put in the place of Python's own way to show errors stays.
    """
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _show


def _show(kind: type[BaseException], error: BaseException, calls: TracebackType | None) -> None:
    for found in root_causes(error):
        if part := users_traceback(found):
            left_out = len(list(traceback.walk_tb(found.__traceback__))) - len(list(traceback.walk_tb(part)))
            if left_out:
                sys.stderr.write(f"({left_out} calls of libraries, which led here, are left out.)\n")
            traceback.print_exception(type(found), found, part)
            return
    if isinstance(error, SyntaxError):  # It names file and line itself.
        traceback.print_exception(kind, error, None)
    else:
        sys.__excepthook__(kind, error, calls)


def root_causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what has led to it, also where jsonargparse has tried several types for one value."""
    while error is not None:
        yield error
        for tried in _tried(error):
            yield from root_causes(tried)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _tried(error: BaseException) -> Iterator[BaseException]:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if frames and _module(frames[-1]).startswith("jsonargparse."):
        # It keeps the first one alone as the cause. A private detail, without which the others are not found.
        for tried in frames[-1].f_locals.get("exceptions", ()):
            if isinstance(tried, BaseException) and tried is not error.__cause__:
                yield tried


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
