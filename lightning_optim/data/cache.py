"""Prepared data on disk: made once, complete or absent, safe when several processes start together."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

_MANIFEST = "manifest.json"
# Of a larger file only the size is compared: reading all of it at every start costs more than it protects.
_HASHED_SIZE = 2**30


class DataError(RuntimeError):
    """Data that are missing, corrupt or out of reach. The message says which, where, and what to do."""


def cached(folder: Path, build: Callable[[Path], None]) -> Path:
    """Returns ``folder`` with the files that ``build`` writes, building it only where it is not there intact.

    ``build`` writes into an empty scratch folder, which is renamed once complete: a killed process leaves
    nothing half made. Processes that start together wait for the first. Beside the files stands a manifest of
    their sizes and SHA-256 digests: a truncated or altered file makes the whole folder be built again.

    Args:
        folder: Where the files belong. Its name identifies its content.
        build: Writes the files into the (existing, empty) folder it is given.

    Raises:
        DataError: If the folder cannot be written.

    Example:
        >>> import tempfile
        >>> def build(scratch):
        ...     print("building")
        ...     _ = (scratch / "greeting.txt").write_text("hello")
        >>> with tempfile.TemporaryDirectory() as root:
        ...     folder = cached(Path(root, "greeting"), build)
        ...     folder = cached(Path(root, "greeting"), build)
        ...     (folder / "greeting.txt").read_text()
        building
        'hello'
    """
    if _is_intact(folder):
        return folder
    with locked(folder):
        if not _is_intact(folder):
            scratch = folder.with_name(folder.name + ".partial")
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            build(scratch)
            manifest = {path.name: describe(path) for path in scratch.iterdir()}
            (scratch / _MANIFEST).write_text(json.dumps(manifest, indent=1))
            shutil.rmtree(folder, ignore_errors=True)
            scratch.rename(folder)
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other processes from work on ``path``. When its holder dies, however it dies, the lock is free."""
    guard = FileLock(path.with_name(path.name + ".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        guard.acquire()
    except OSError as error:
        raise DataError(
            f"Cannot write to {path.parent}: {error}. "
            "Set `root`, or `cache` for prepared text, to a folder that you may write to."
        ) from error
    try:
        yield
    finally:
        guard.release()


def download(url: str, path: Path, sha256: str) -> None:
    """Downloads ``url`` to ``path``, which appears only once its content is known to be right.

    Raises:
        DataError: If the network does not give the file, or gives another one.
    """
    remedy = f"Check the network, or put the file there by hand: {path}"
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            content = response.read()
    except OSError as error:  # URLError, a time-out, a reset connection
        raise DataError(f"Could not download {url}: {error}. {remedy}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{url} gave {len(content)} bytes that are not the expected file. {remedy}")
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def describe(path: Path) -> list[int | str]:
    """Size and, unless the file is very large, SHA-256 digest."""
    size = path.stat().st_size
    if size > _HASHED_SIZE:
        return [size]
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return [size, digest.hexdigest()]


def _is_intact(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        return all(describe(folder / name) == described for name, described in manifest.items())
    except (OSError, ValueError):
        return False
