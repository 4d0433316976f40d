"""Finds the checkpoint that ``--ckpt_path`` names."""

from __future__ import annotations

import warnings
from pathlib import Path

from ..checkpoint_io import CheckpointError, look_at_checkpoint
from .errors import UsageError, nearest


def find_checkpoint(name: str, folder: Path) -> Path:
    """The path of a checkpoint that is named by its path, or as ``last`` or ``best`` of the newest run in a folder.

    One that is damaged or not written to its end is passed over with a warning.

    Raises:
        UsageError: There is none.
    """
    checkpoints = [path for path in folder.rglob("*/checkpoints/*.ckpt") if not path.is_symlink()]
    if name not in ("last", "best"):
        if "://" in name:
            return Path(name)
        try:
            look_at_checkpoint(Path(name))
        except (FileNotFoundError, CheckpointError) as error:
            raise UsageError(f"--ckpt_path: {error} {nearest(name, map(str, checkpoints), '')}") from error
        return Path(name)
    checkpoints.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for last in checkpoints:
        try:
            checkpoint = look_at_checkpoint(last)
            break
        except CheckpointError as error:
            warnings.warn(f"--ckpt_path {name} passes over a checkpoint: {error}", stacklevel=2)
    else:
        raise UsageError(f"--ckpt_path {name}: there is no checkpoint in {folder} yet. Leave it out to begin a run.")
    if name == "best":
        callbacks = checkpoint["callbacks"]
        best = [state["best_model_path"] for key, state in callbacks.items() if key.startswith("ModelCheckpoint")]
        return last.with_name(Path(best[0]).name) if best and best[0] else last
    return last
