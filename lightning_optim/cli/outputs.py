"""Folders and files that cannot be written: said before the work is done, and otherwise in one line."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterable
from pathlib import Path

from .errors import UsageError

#: The disk is full, or the user's share of it, or the file is too large for it.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def check_folder(option: str, folder: str | Path) -> None:
    """Refuse a folder in which nothing can be written.

    Args:
        option: The option that names it.
        folder: The folder, or an address, which is not looked at. It need not be there yet.

    Raises:
        UsageError: It is a file, or cannot be made or written to.
    """
    if "://" in str(folder):
        return
    path = Path(folder).expanduser().absolute()
    there = next(place for place in (path, *path.parents) if place.exists())
    if not there.is_dir():
        raise UsageError(f"{option} {folder}: {there} is a file. Choose another folder.")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UsageError(
            f"{option} {folder}: nothing can be written to {there} ({error.strerror}). Choose another folder."
        ) from error


def check_file(option: str, file: str | Path) -> None:
    """Refuse a file that cannot be written.

    Args:
        option: The option that names it.
        file: The file.

    Raises:
        UsageError: It is a folder, or its folder is not there, or it cannot be written.
    """
    path = Path(file)
    if path.is_dir():
        raise UsageError(f"{option} {file}: that is a folder. Name a file in it.")
    if not path.parent.is_dir():
        raise UsageError(f"{option} {file}: there is no folder {path.parent}. Make it, or choose another place.")
    check_folder(option, path.parent)
    try:
        if path.exists():
            path.open("r+b").close()
    except OSError as error:
        raise UsageError(f"{option} {file}: it cannot be written ({error.strerror}). Choose another file.") from error


def check_figure(option: str, file: str | Path) -> None:
    """:func:`check_file` for a figure, whose ending has to be one that matplotlib can save."""
    from matplotlib.backend_bases import FigureCanvasBase  # here, because it takes long

    kinds: Iterable[str] = FigureCanvasBase.get_supported_filetypes()
    ending = Path(file).suffix
    if not Path(file).is_dir() and ending.removeprefix(".").lower() not in kinds:
        raise UsageError(
            f"{option} {file}: a figure cannot be saved as {ending or 'a file without an ending'}. Known: "
            f"{', '.join(sorted(kinds))}."
        )
    check_file(option, file)


def explain_os_error(error: OSError, option: str) -> str | None:
    """What to do where the disk is full or a file may not be used; ``None`` if the error is about something else.

    Args:
        error: What the system, or this library, says.
        option: The option that names another place.
    """
    if error.errno not in (*_FULL, *_REFUSED):
        return None
    said = (error.strerror or str(error)).rstrip(".")
    if error.filename is None and ". " in said:  # It says all itself, as of a checkpoint.
        return f"{said}."
    place = f"{error.filename}: " if error.filename is not None else ""
    remedy = "Free some space, or choose another place" if error.errno in _FULL else "Choose a place that you may use"
    return f"{place}{said}. {remedy} by {option}."
