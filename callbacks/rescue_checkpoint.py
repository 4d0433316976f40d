"""A checkpoint of a run that ends before its end."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_optim.optimizers import NonFiniteGradientsError
from lightning_optim.trainer import is_lightning

from . import run_position


class RescueCheckpoint(pl.Callback):
    """Writes a checkpoint when a run is ended by Ctrl-C, by SIGTERM or by its optimizer, and prints how to continue.

    The checkpoint lies beside those of the Trainer's ``ModelCheckpoint``, as ``rescue-step=N.ckpt``; without a
    ``ModelCheckpoint`` there is none. With :class:`Resume` or :class:`RNGState` a run continues from it exactly.

    - Ctrl-C lets the step that is under way end, and the process ends with status 130. A second Ctrl-C ends it at once.
      On several ranks, which Ctrl-C does not stop at the same step, Lightning ends the run without a checkpoint.
    - SIGTERM lets the step end, as always with Lightning, and the process ends with status 143 instead of 0.
    - The signal of SLURM on which Lightning writes ``hpc_ckpt_N.ckpt`` and requeues the job
      (``SLURMEnvironment(auto_requeue=True)``) is acted upon when the step, or the batch of a validation, has ended,
      and not amid it.
    - Optimizers of this library end a run by :class:`lightning_optim.NonFiniteGradientsError` after
      ``max_consecutive_skips`` steps whose gradients were NaN or infinite. Parameters and state are then those of the
      last step that was made.

    ``ModelCheckpoint(save_on_exception=True)`` of Lightning 2.6 writes one on every exception. Put this callback behind
    others that change what a checkpoint holds, such as ``WeightAveraging``.

    Args:
        command: What is printed, with the checkpoint's path in place of ``{path}``.

    Example:
        >>> trainer = pl.Trainer(callbacks=[RescueCheckpoint()], accelerator="cpu", logger=False)
    """

    def __init__(self, command: str = 'trainer.fit(model, ckpt_path="{path}")') -> None:
        self.command = command
        self._training = False
        self._interrupted = False
        self._pending: list[tuple[Any, int, Any]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._training, self._interrupted, self._pending = True, False, []
        if threading.current_thread() is not threading.main_thread():
            return
        # Lightning puts all handlers back when the run ends.
        if trainer.world_size == 1 and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupt)
        requeue = run_position.requeue_signal(trainer)
        if requeue is not None and callable(handler := signal.getsignal(requeue)):
            signal.signal(requeue, lambda signum, frame: self._pending.append((handler, signum, frame)))

    def _interrupt(self, signum: int, frame: Any) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        print("\nStopping when this step has ended. Ctrl-C again stops at once.", flush=True)
        signal.raise_signal(signal.SIGTERM)  # for which Lightning ends a run between two steps

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._act()

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._act()

    def _act(self) -> None:
        while self._pending:
            handler, signum, frame = self._pending.pop(0)
            handler(signum, frame)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._training = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if is_lightning(exception, "SIGTERMException") and isinstance(exception, SystemExit):
            exception.code = 128 + (signal.SIGINT if self._interrupted else signal.SIGTERM)
        elif not isinstance(exception, (NonFiniteGradientsError, KeyboardInterrupt)):
            return
        training, self._training = self._training, False
        checkpoints: Any = trainer.checkpoint_callback
        if not training or trainer.fast_dev_run or not is_lightning(checkpoints, "ModelCheckpoint"):  # type: ignore[attr-defined]
            return
        if isinstance(exception, KeyboardInterrupt) and trainer.world_size > 1:
            rank_zero_warn(
                "No checkpoint is written: Ctrl-C does not stop several ranks at the same step. SIGTERM does."
            )
            return
        if checkpoints.dirpath is None:
            return
        path = Path(checkpoints.dirpath) / f"rescue-step={trainer.global_step}.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            print(f"The run was ended ({_why(exception)}); its last state is in {path}", flush=True)
            print(f"To go on: {self.command.format(path=path)}", flush=True)


def _why(exception: BaseException) -> str:
    if isinstance(exception, SystemExit):
        return "Ctrl-C" if exception.code == 128 + signal.SIGINT else "SIGTERM"
    return "Ctrl-C" if isinstance(exception, KeyboardInterrupt) else "by its optimizer"
