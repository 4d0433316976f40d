"""Finds the checkpoint that ``--ckpt_path`` names."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from ..checkpoint_io import CheckpointError, look_at_checkpoint
from .errors import UsageError, nearest


def find_checkpoint(name: str, folder: Path, run: str = "") -> Path:
    """The path of a checkpoint that is named by its path, or as ``last`` or ``best`` of the newest run in a folder.

    Args:
        name: ``last``, ``best`` or a path.
        folder: Folder of runs, or of folders of runs.
        run: Name of the only run to look at, or nothing.

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
    if run:
        checkpoints = [path for path in checkpoints if path.parent.parent.name == run]
    checkpoints.sort(key=_age, reverse=True)
    for last in checkpoints:
        try:
            checkpoint = look_at_checkpoint(last)
            break
        except CheckpointError as error:
            warnings.warn(f"--ckpt_path {name} passes over a checkpoint: {error}", stacklevel=2)
    else:
        of = f" of a run {run}" if run else ""
        raise UsageError(
            f"--ckpt_path {name}: there is no checkpoint{of} in {folder} yet. Leave it out to begin a run."
        )
    if name == "best":
        callbacks = checkpoint["callbacks"]
        best = [state["best_model_path"] for key, state in callbacks.items() if key.startswith("ModelCheckpoint")]
        return last.with_name(Path(best[0]).name) if best and best[0] else last
    return last


def _age(path: Path) -> tuple[Any, ...]:
    """What orders checkpoints by age, from their contents: a copy of a run has other file times.

    Those of :class:`.RecordSettings` say when they were written. Others are ordered by run, epoch and step. What cannot
    be read comes last, so that it is passed over with a warning.
    """
    run = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path.parent))]
    try:
        file = path / "meta.pt" if path.is_dir() else path
        content = torch.load(file, "cpu", weights_only=True, mmap=True)
        return (
            float(content.get("saved_at", 0.0)),
            run,
            int(content.get("epoch", 0)),
            int(content.get("global_step", 0)),
        )
    except Exception:  # A made-up file can lead to any error.
        return math.inf, run, 0, 0
