"""Checkpoint files: written whole or not at all, read without executing anything that is in them."""

from __future__ import annotations

import errno
import os
import pickle
import platform
import re
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn

from .engine.checkpoint import CheckpointError
from .processes import private, shard_files

__all__ = [
    "SAFE_STRATEGIES",
    "CheckpointError",
    "SafeCheckpointIO",
    "SafeFSDPStrategy",
    "SafeModelParallelStrategy",
    "look_at_checkpoint",
    "read_checkpoint",
]

_OTHER = "Use another checkpoint of the run, which the command line does by itself for `--ckpt_path last`."


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written atomically and loaded safely.

    A local file is written beside its place under another name, flushed to disk and then renamed, so that there is no
    moment at which a killed process leaves half a checkpoint, or none where there was one. Lightning writes to the
    system's folder for temporary files first, from which a file is copied where that is another file system.

    Files are read with ``weights_only=True`` whatever the version of Lightning (before 2.6 it does not), and after
    their checksums have been compared, which ``torch.load`` does not do. That is one more pass over the file.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(plugins=[SafeCheckpointIO()], accelerator="cpu", logger=False)
    """

    def __init__(self) -> None:
        super().__init__()
        # The Trainer of `pytorch_lightning` asks for another class of that name.
        if (other := sys.modules.get("lightning_fabric.plugins")) is not None:
            other.CheckpointIO.register(type(self))

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint. Other places than local files are left to Lightning.

        Raises:
            OSError: It cannot be written, as when the disk is full. Nothing of it is left then, and a checkpoint that
                it was to replace is still there.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            part = _place_beside(path)
            with _removed_on_error(part):
                with part.open("wb") as file:
                    torch.save(checkpoint, file)
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            FileNotFoundError: There is no such file.
            CheckpointError: As for :func:`read_checkpoint`.
            ValueError: ``weights_only=False``.
        """
        if weights_only is False:
            raise ValueError(
                "weights_only=False: SafeCheckpointIO executes nothing. Use Lightning's TorchCheckpointIO for a "
                "checkpoint that holds other objects, if you trust it."
            )
        return read_checkpoint(path, map_location)


# --- folders of shards --------------------------------------------------------------------------------------------


class SafeModelParallelStrategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy (FSDP2) with checkpoints that are replaced as a whole and execute nothing.

    A folder is written beside its place and renamed. One that it replaces is put aside as ``NAME.replaced.ckpt`` for
    the moment between two renamings, so that one of the two is whole whenever the process is killed. Folders are read
    by :class:`~lightning_optim.processes.shard_files.ShardReader`, which executes nothing that is in them.

    Parameters that are frozen when a checkpoint is loaded, or were when it was written, get their state as it was
    saved. Lightning's strategy drops the state of the former without a word, and ends with a missing key for the
    latter.

    Args:
        args: Those of ModelParallelStrategy.

    Example:
        >>> strategy = SafeModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        folder = private.saves_distributed(self)
        _save(self, super().save_checkpoint, checkpoint, filepath, storage_options, folder)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = _path(self, checkpoint_path, weights_only)
        assert self.model is not None
        assert self.lightning_module is not None
        if not path.is_dir():
            saved = read_checkpoint(path, mmap=True).get("optimizer_states", ())
            with shard_files.requiring_gradients(self.model, shard_files.parameters_with_state(saved, self.model)):
                return super().load_checkpoint(path)
        with _damaged(path):
            reader = shard_files.ShardReader(path)
            strict = self.lightning_module.strict_loading
            shard_files.load_shards(reader, self.model, self.optimizers, strict, "state_dict")
        return look_at_checkpoint(path)


class SafeFSDPStrategy(FSDPStrategy):
    """Lightning's FSDPStrategy (FSDP1) with checkpoints as those of :class:`SafeModelParallelStrategy`.

    They are folders with ``state_dict_type="sharded"``.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        _save(self, super().save_checkpoint, checkpoint, filepath, storage_options, private.saves_sharded(self))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = _path(self, checkpoint_path, weights_only)
        assert self.model is not None
        assert self.lightning_module is not None
        if not path.is_dir():
            read_checkpoint(path, mmap=True)
            return super().load_checkpoint(path)
        with _damaged(path):
            optimizers = self.optimizers if self.lightning_module.trainer.state.fn == TrainerFn.FITTING else ()
            reader = shard_files.ShardReader(path)
            shard_files.load_flat_shards(reader, self.model, optimizers, self.lightning_module.strict_loading)
        return look_at_checkpoint(path)


#: What the command line uses in place of Lightning's strategies.
SAFE_STRATEGIES: dict[type[Strategy], type[Strategy]] = {
    ModelParallelStrategy: SafeModelParallelStrategy,
    FSDPStrategy: SafeFSDPStrategy,
}


def _path(strategy: Strategy, path: str | Path, weights_only: bool | None) -> Path:
    """The path of a checkpoint that all ranks read."""
    if weights_only is False:
        raise ValueError(
            f"weights_only=False: {type(strategy).__name__} executes nothing. Use Lightning's "
            f"{type(strategy).__mro__[1].__name__} for a checkpoint that holds other objects, if you trust it."
        )
    return Path(strategy.broadcast(path))


@contextmanager
def _damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except shard_files.ShardError as error:
        raise CheckpointError(
            f"{path} is damaged or holds other things than tensors and plain values ({error}), and was not loaded. "
            f"{_OTHER}"
        ) from error


def _save(
    strategy: Strategy,
    save: Callable[..., None],
    checkpoint: dict[str, Any],
    filepath: str | Path,
    storage_options: Any,
    folder: bool,
) -> None:
    """What ``save`` does, of folders beside their place."""
    if not folder or "://" in str(filepath):
        save(checkpoint, filepath, storage_options)
        return
    path, part = Path(filepath), Path()
    with _writing(path):
        if strategy.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = _place_beside(path)
        path, part = strategy.broadcast((path, part))
        with _removed_on_error(part):
            save(checkpoint, part, storage_options)
            strategy.barrier()
            if strategy.is_global_zero:
                _replace_folder(part, path)
        strategy.barrier()


def _replace_folder(part: Path, path: Path) -> None:
    aside = path.with_name(f"{path.stem}.replaced{path.suffix}")
    if path.exists():
        _remove(aside)
        path.rename(aside)
    part.rename(path)
    _remove(aside)


def _remove(path: Path) -> None:
    """Remove a checkpoint; of a folder first what makes it a whole one."""
    if path.is_dir():
        (path / "meta.pt").unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- what is being written ----------------------------------------------------------------------------------------

_DAY = 24 * 3600
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Names the checkpoint, the cause and the remedy where the file system refuses to write a checkpoint."""
    handled = sys.exc_info()[1]  # for which a checkpoint may be written, as of a run that an error ends
    try:
        yield
    except BaseException as error:  # torch's error of several ranks is not an Exception
        cause = None if isinstance(error, (KeyboardInterrupt, SystemExit)) else _os_error(error, handled)
        if cause is None:
            raise
        if cause.errno in _FULL:
            remedy = "Free some space, or keep fewer checkpoints (save_top_k of ModelCheckpoint)."
        else:
            remedy = "Choose another folder: default_root_dir of the Trainer, or dirpath of ModelCheckpoint."
        reason = cause.strerror or str(cause)
        raise type(cause)(
            cause.errno, f"The checkpoint {path} was not written, and nothing of it is left: {reason}. {remedy}"
        ) from error


def _os_error(error: BaseException | None, handled: BaseException | None) -> OSError | None:
    """What the file system said, which torch reports as an error of its own."""
    while error is not None and error is not handled:
        if isinstance(error, OSError):
            return error
        # Those of all ranks, where a folder of shards was written.
        for failure in getattr(error, "failures", {}).values():
            of_a_rank = failure[0] if isinstance(failure, tuple) else failure
            if isinstance(of_a_rank, BaseException) and (found := _os_error(of_a_rank, handled)):
                return found
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def _removed_on_error(part: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:  # Ctrl-C, too
        with suppress(OSError):
            _remove(part)
        raise


def _place_beside(path: Path) -> Path:
    """The path that this process writes to before it is renamed to ``path``. What killed processes left is removed."""
    for left in path.parent.glob(".*.part"):
        if _is_left(left):
            _remove(left)
    part = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.part")
    _remove(part)
    return part


def _is_left(part: Path) -> bool:
    """Whether no process writes there any more: it has ended, or, on another machine, has written nothing for a day."""
    found = re.fullmatch(rf"\..+\.{re.escape(platform.node())}-(\d+)\.part", part.name)
    if found and os.name == "posix":
        try:
            os.kill(int(found[1]), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False
    try:
        return time.time() - part.stat().st_mtime > _DAY
    except FileNotFoundError:  # It has just become a checkpoint.
        return False


# --- reading ------------------------------------------------------------------------------------------------------


def read_checkpoint(path: str | Path, map_location: Any = "cpu", *, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint file of Lightning without executing anything that is in it.

    Args:
        path: A file or an address that fsspec knows.
        map_location: As in :func:`torch.load`.
        mmap: As in :func:`torch.load`: leave the tensors of a local file there until they are used.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It is damaged, or not a checkpoint of Lightning, or holds more than tensors and plain values.
    """
    checkpoint = _load(path, map_location, mmap)
    if not isinstance(checkpoint.get("state_dict"), dict):
        raise CheckpointError(
            f"{path} is not a checkpoint of Lightning: it has no state_dict but {sorted(map(str, checkpoint))[:5]}. "
            "Weights alone are loaded by module.load_state_dict."
        )
    return checkpoint


def look_at_checkpoint(path: Path) -> dict[str, Any]:
    """What a local checkpoint holds, a folder of shards without its tensors.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        CheckpointError: As for :func:`read_checkpoint`, or a folder was not written to its end or is of something else.
    """
    if not path.is_dir():
        return read_checkpoint(path, mmap=True)
    last, others = path / "meta.pt", [path / shard_files.TABLE, *path.glob("*.distcp")]
    if not any(p.is_file() for p in (last, *others)):
        raise CheckpointError(f"{path} is a folder without a checkpoint's shards.")
    # Shards are written first, then the table of them, then what Lightning adds.
    if not all(p.is_file() for p in (last, others[0])):
        raise CheckpointError(f"{path} was not written to its end. {_OTHER}")
    with _damaged(path):
        shard_files.ShardReader(path)
    return _load(last, "cpu")


def _load(path: str | Path, map_location: Any, mmap: bool = False) -> dict[str, Any]:
    files = get_filesystem(path)
    if not files.isfile(str(path)):
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    with files.open(str(path), "rb") as file:
        _check_archive(file, path)
        file.seek(0)
        try:
            content = torch.load(path if mmap else file, map_location, weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            reason = str(error).partition("WeightsUnpickler error: ")[2].partition("\n")[0] or "not a pickle"
            raise CheckpointError(
                f"{path} holds other things than tensors and plain values ({reason}), and was not loaded. Keep such "
                "objects out of checkpoints; torch.load(..., weights_only=False) would execute what it says."
            ) from error
        except Exception as error:  # A made-up file can lead to any error.
            reason = str(error).partition("\n")[0]
            raise CheckpointError(
                f"{path} is not a checkpoint that torch.save has written ({reason}). {_OTHER}"
            ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a checkpoint of Lightning: it holds a {type(content).__name__}.")
    return content


def _check_archive(file: IO[bytes], path: str | Path) -> None:
    """Refuse files whose end is missing or whose contents do not agree with their checksums."""
    start = file.read(4)
    try:
        with zipfile.ZipFile(file) as archive:
            # torch takes an entry that is marked as a folder for one that needs no reading.
            folders = [entry.filename for entry in archive.infolist() if entry.is_dir() or entry.external_attr & 0x10]
            damaged = archive.testzip() or next(iter(folders), None)
    except Exception as error:  # as above
        if start == b"PK\x03\x04":
            raise CheckpointError(f"{path} is damaged or was not written to its end ({error}). {_OTHER}") from error
        raise CheckpointError(f"{path} is not a checkpoint: torch.save has not written it.") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: its entry {damaged} is not what was written. {_OTHER}")
