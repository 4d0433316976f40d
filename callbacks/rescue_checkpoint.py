"""A checkpoint of a run that its optimizer ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_optim.optimizers import NonFiniteGradientsError
from lightning_optim.trainer import is_lightning


class RescueCheckpoint(pl.Callback):
    """Writes a checkpoint when an optimizer of ours gives up, so that the run can go on once the cause is mended.

    Optimizers end a run by :class:`lightning_optim.NonFiniteGradientsError` after ``max_consecutive_skips`` steps whose
    gradients were NaN or infinite. Parameters and state are then those of the last step that was made, of which there
    may be no other checkpoint. This one lies beside those of the Trainer's ``ModelCheckpoint``, as
    ``rescue-step=N.ckpt``; without a ``ModelCheckpoint`` there is none. ``ModelCheckpoint(save_on_exception=True)`` of
    Lightning 2.6 does so on every exception, also on one in the middle of a step.

    Example:
        >>> trainer = pl.Trainer(callbacks=[RescueCheckpoint()], accelerator="cpu", logger=False)
    """

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        checkpoints: Any = trainer.checkpoint_callback
        if not isinstance(exception, NonFiniteGradientsError) or not is_lightning(checkpoints, "ModelCheckpoint"):
            return
        if trainer.fast_dev_run or checkpoints.dirpath is None:  # type: ignore[attr-defined]
            return
        path = Path(checkpoints.dirpath) / f"rescue-step={trainer.global_step}.ckpt"
        trainer.save_checkpoint(path)
        rank_zero_info(f"The run has come to its optimizer's limit; its last state is in {path}")
