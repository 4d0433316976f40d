"""Random numbers that go on after a restart as if nothing had happened."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from lightning_optim.processes import all_gather_object, world


class RNGState(pl.Callback):
    """Continues the random numbers of Python, NumPy and torch where the checkpoint was written.

    Without it, a resumed run starts its dropout and mixup from the seed again, and differs from a run that was
    never interrupted. torch's numbers are those of the CPU and of the accelerator that the process uses (CUDA, MPS,
    XPU, ...). Each rank of a distributed run has its own state in the checkpoint; one that is resumed on more ranks
    seeds the additional ones afresh.

    A data loader that shuffles with torch's global generator, as torch's own does, is continued exactly from
    checkpoints written at the end of an epoch. Within an epoch the loader itself has to be resumable, as those of
    :mod:`lightning_optim.data` are.

    Example:
        >>> trainer = pl.Trainer(callbacks=[RNGState()], accelerator="cpu", logger=False)
    """

    def __init__(self) -> None:
        self._resumed: dict[str, Any] | None = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["rng"] = {"states": all_gather_object(_state(), world()), "within_epoch": not trainer.is_last_batch}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._resumed = checkpoint.get("rng")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The next thing to draw numbers in the interrupted run was the iterator of the next epoch ...
        self._restore(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # ... or, within an epoch, the next batch: what making an iterator has drawn by now does not count.
        if self._resumed and self._resumed["within_epoch"]:
            self._restore(trainer)
        self._resumed = None

    def _restore(self, trainer: pl.Trainer) -> None:
        if self._resumed and trainer.global_rank < len(self._resumed["states"]):
            _set_state(self._resumed["states"][trainer.global_rank])


def _state() -> dict[str, Any]:
    # Tensors and plain containers only, which torch.load(weights_only=True) takes.
    numpy: dict[str, Any] = np.random.get_state(legacy=False)  # noqa: NPY002 (the global generator is the point)
    numpy["state"]["key"] = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
    return {
        "python": random.getstate(),
        "numpy": numpy,
        "torch": torch.get_rng_state(),
        "accelerator": {kind: device.get_rng_state() for kind, device in _accelerator()},
    }


def _accelerator() -> list[tuple[str, Any]]:
    """Name and module of the accelerator (``"cuda"``, ``"mps"``, ``"xpu"``, ...), if this process uses one.

    The generator is that of the current device only. To ask an accelerator that is not in use would claim memory on it.
    """
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return []
    device = torch.get_device_module(kind)
    in_use = getattr(device, "is_initialized", device.is_available)()
    return [(kind.type, device)] if in_use and hasattr(device, "get_rng_state") else []


def _set_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    generator = state["numpy"]["state"]
    key = generator["key"].numpy().astype(np.uint32)
    np.random.set_state(state["numpy"] | {"state": generator | {"key": key}})  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    saved = state.get("accelerator", {"cuda": state.get("cuda")})  # Version 0.1.0 knew CUDA only.
    for kind, device in _accelerator():
        if saved.get(kind) is not None:
            device.set_rng_state(saved[kind])
