"""Where the text of ``TextData`` comes from: pieces of text, each of a split."""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_optim.data.cache import DataError, describe, download, locked

Pieces = Iterator[tuple[str, str]]  # (split, text); the splits are "train", "validation" and perhaps "test"

_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
# repository on the Hugging Face hub, configuration
_HUB = {
    "wikitext-2": ("Salesforce/wikitext", "wikitext-2-v1"),
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-v1"),
    "openwebtext": ("Skylion007/openwebtext", None),
    "fineweb": ("HuggingFaceFW/fineweb", "sample-10BT"),
}
_PIECE_BYTES = 2**24
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Text and its identity.

    Attributes:
        identity: What the text depends on, as JSON can hold it: equal identities mean equal text.
        pieces: Gives the text piece by piece, from the start at each call.
        has_documents: Whether each piece is a document of its own, to be closed by ``Tokenizer.end_of_text``.
    """

    identity: list[Any]
    pieces: Callable[[], Pieces]
    has_documents: bool = False


def standard_library(validation_fraction: float, max_bytes: int) -> Corpus:
    """The *.py files of Python's standard library, without its tests.

    They are taken in the order of a hash of their names, so that the first ``max_bytes`` and the last
    ``validation_fraction`` of them are fair samples, and much the same on every machine.
    """
    library = Path(sysconfig.get_path("stdlib"))
    names = []
    for folder, subfolders, files in os.walk(library):
        subfolders[:] = set(subfolders) - _NOT_LIBRARY
        sources = (Path(folder, file) for file in files if file.endswith(".py"))
        names += [source.relative_to(library).as_posix() for source in sources]
    if not names:
        raise DataError(
            f"This Python has no source files in {library}. Use another one, or dataset='files' with `files`."
        )
    names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    paths = [library / name for name in names]
    return _split_by_position(paths, validation_fraction, max_bytes, errors="replace")


def text_files(
    files: list[str], validation_files: list[str] | None, validation_fraction: float, max_bytes: int | None
) -> Corpus:
    """Any text files; the validation split is other files, or the end of the text."""
    paths = _find("files", files)
    if validation_files is None:
        return _split_by_position(paths, validation_fraction, max_bytes)
    held_out = _find("validation_files", validation_files)
    return _from_splits({"train": paths, "validation": held_out}, max_bytes)


def shakespeare(root: Path, validation_fraction: float, max_bytes: int | None) -> Corpus:
    """The file ``root/tinyshakespeare/input.txt``, downloaded unless it is there."""
    path = root / "tinyshakespeare" / "input.txt"
    if not path.exists():
        with locked(path):
            if not path.exists():
                download(_SHAKESPEARE_URL, path, _SHAKESPEARE_SHA256)
    if hashlib.sha256(path.read_bytes()).hexdigest() != _SHAKESPEARE_SHA256:
        raise DataError(f"{path} is damaged. Delete it to download it again, or use dataset='files'.")
    return _split_by_position([path], validation_fraction, max_bytes)


def wikitext(name: str, root: Path, max_bytes: int | None) -> Corpus:
    """WikiText with ``<unk>``, a paragraph a line: ``root/name/{train,valid,test}.txt``, or from the hub."""
    files = {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"}
    paths = {split: [root / name / file] for split, file in files.items()}
    missing = [str(path) for (path,) in paths.values() if not path.exists()]
    if not missing:
        return _from_splits(paths, max_bytes)
    if len(missing) < len(paths):
        raise DataError(f"Not found beside the others: {', '.join(missing)}. Add them, or delete the rest.")

    def pieces() -> Pieces:
        for split in files:
            size = 0
            for row in _hub_rows(name, split):
                text = row["text"] or " \n"  # the hub stores an empty line as ""
                size += len(text.encode())
                if split == "train" and max_bytes is not None and size > max_bytes:
                    break
                yield split, text

    return Corpus([*_HUB[name], max_bytes], pieces)


def web_text(name: str, validation_fraction: float, max_bytes: int | None) -> Corpus:
    """OpenWebText or FineWeb, streamed from the hub. Documents at regular intervals are for validation."""
    period = max(round(1 / validation_fraction), 2)

    def pieces() -> Pieces:
        size = 0
        for i, row in enumerate(_hub_rows(name, "train", streaming=True)):
            size += len(row["text"].encode())
            if max_bytes is not None and size > max_bytes:
                return
            yield ("train" if i % period else "validation"), row["text"]

    return Corpus([*_HUB[name], period, max_bytes], pieces, has_documents=True)


def _find(argument: str, patterns: list[str]) -> list[Path]:
    paths = []
    for pattern in patterns:
        matches = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        found = [Path(match) for match in matches if os.path.isfile(match)]
        if not found:
            raise DataError(f"{argument}: no file matches {pattern!r} in {Path.cwd()}. Correct the pattern.")
        paths += found
    return list(dict.fromkeys(paths))


def _split_by_position(
    paths: list[Path], validation_fraction: float, max_bytes: int | None, errors: str = "strict"
) -> Corpus:
    """The files one after another: the end is for validation."""
    total = sum(path.stat().st_size for path in paths)
    total = min(total, max_bytes or total)
    cut = int(total * (1 - validation_fraction))

    def pieces() -> Pieces:
        yield from (("train", text) for text in _read(paths, 0, cut, errors))
        yield from (("validation", text) for text in _read(paths, cut, total, errors))

    return Corpus([_contents(paths), cut, total, errors], pieces)


def _from_splits(splits: dict[str, list[Path]], max_bytes: int | None) -> Corpus:
    """Files that are each of one split; ``max_bytes`` limits the first, the training split."""

    def pieces() -> Pieces:
        for split, paths in splits.items():
            total = sum(path.stat().st_size for path in paths)
            stop = min(total, max_bytes or total) if split == "train" else total
            yield from ((split, text) for text in _read(paths, 0, stop))

    return Corpus([{split: _contents(paths) for split, paths in splits.items()}, max_bytes], pieces)


def _contents(paths: list[Path]) -> list[list[int | str]]:
    """What changes with the content of files, and only then: copying may keep a file's time, or change it."""
    described = []
    for path in paths:
        content = describe(path)
        if len(content) == 1:  # Too large to be read at every start, so that its place and time have to do.
            content += [str(path.resolve()), path.stat().st_mtime_ns]
        described.append(content)
    return described


def _read(paths: list[Path], start: int, stop: int, errors: str = "strict") -> Iterator[str]:
    """The text from byte ``start`` to ``stop`` of the files one after another, in pieces of whole lines."""
    for path in paths:
        size = path.stat().st_size
        first, last = max(start, 0), min(stop, size)
        start, stop = start - size, stop - size
        if first >= last:
            continue
        with path.open("rb") as file:
            last = _character_start(file, last)
            file.seek(_character_start(file, first))
            while (here := file.tell()) < last:
                piece = file.read(min(_PIECE_BYTES, last - here))
                piece += file.readline(last - file.tell())
                try:
                    yield piece.decode(errors=errors)
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path} is not UTF-8 text, at byte {here + error.start}. Convert it "
                        "(iconv -f latin1 -t utf-8), or leave it out."
                    ) from error


def _character_start(file: Any, position: int) -> int:
    """The first start of a UTF-8 character at or after ``position``."""
    file.seek(position)
    following = file.read(3)
    return position + next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), len(following))


def _hub_rows(name: str, split: str, streaming: bool = False) -> Iterator[dict[str, Any]]:
    repository, configuration = _HUB[name]
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f'dataset={name!r} needs the package datasets: pip install "lightning-optim[text]". '
            "dataset='stdlib' needs nothing."
        ) from error
    try:
        yield from datasets.load_dataset(repository, configuration, split=split, streaming=streaming)
    except Exception as error:  # the errors of its network libraries have no common class
        raise DataError(
            f"Could not get dataset={name!r} ({repository} on the Hugging Face hub): {error}. "
            "Check the network; dataset='stdlib' and 'files' need none."
        ) from error
