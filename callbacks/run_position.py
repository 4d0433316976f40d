"""Where in a run a checkpoint was written, and how Lightning's loops continue from there.

Lightning infers from counters of epochs and batches at which moment a checkpoint was written, which goes wrong at
several: with ``max_steps``, a checkpoint from the end of an epoch skips the next epoch; a run that stopped within an
epoch skips the rest of it; a validation that was due is not made, or one that was made is repeated. So the moment is
written into the checkpoint here, and the loops are told where to continue.

All that resuming needs of Lightning's private interfaces is in this file. Checked with Lightning 2.6.6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl

#: What has been done at a position, in this order. After a batch: it is ``trained``, a validation that was due is
#: made, all else is ``finished`` (schedulers that wait for validation, step counters). Between two epochs: the hooks of
#: the epoch's end have run (``ended``), schedulers that wait for them have been updated (``finished``).
Stage = Literal["trained", "validated", "ended", "finished"]


@dataclass(frozen=True)
class Position:
    """A place in a run that trains without a stop.

    Args:
        epoch: Number of epochs that are over.
        batches: Number of batches of the next epoch that are over; 0 is the place between two epochs.
        last: Whether these are all batches of that epoch.
        stage: What has been done there.
        earlier: Whether the run was already beyond this position when the checkpoint was written: amid a step or a
            validation, or after a stop within an epoch, which adds a validation and the hooks of an epoch's end.
        within_step: Whether that was amid a step.
    """

    epoch: int
    batches: int = 0
    last: bool = False
    stage: Stage = "finished"
    earlier: bool = False
    within_step: bool = False


def find(loops: dict[str, Any], after_batch: Stage, validating: bool, running: bool) -> Position:
    """The position from the state of Lightning's ``fit_loop`` in a checkpoint.

    Args:
        loops: That state.
        after_batch: What has been done since the last batch ended, as far as that is not in the state.
        validating: Whether a validation has begun and not ended.
        running: Whether the run was under way, not over.
    """
    epochs = loops["epoch_progress"]["current"]
    progress = loops["epoch_loop.batch_progress"]
    batches, last = progress["current"], progress["is_last_batch"]
    if epochs["processed"] == epochs["ready"]:  # No epoch is under way.
        if last or not batches["ready"]:
            ended = running and epochs["completed"] < epochs["processed"]
            return Position(epochs["processed"], stage="ended" if ended else "finished", earlier=not running)
        return Position(epochs["processed"] - 1, batches["processed"], False, after_batch, earlier=True)
    epoch = epochs["processed"]
    if epochs["started"] < epochs["ready"]:
        return Position(epoch)
    if batches["ready"] > batches["processed"]:
        return Position(epoch, batches["processed"], False, after_batch, earlier=True, within_step=True)
    if batches["processed"] > batches["completed"]:
        return Position(epoch, batches["processed"], last, "trained")
    return Position(epoch, batches["processed"], last, after_batch, earlier=validating)


def rewrite(loops: dict[str, Any], position: Position) -> None:
    """Put the counters of a checkpoint at a position, so that Lightning's own guesses do not move them."""
    epochs, progress = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    over = epochs["total"]["processed"] - epochs["current"]["processed"] + position.epoch
    begun = position.batches > 0
    for counts, done in ((epochs["current"], position.epoch), (epochs["total"], over)):
        counts.update(ready=done + begun, started=done + begun, processed=done, completed=done)
    for counts in (progress["current"], progress["total"]):
        counts.update(dict.fromkeys(("ready", "started", "completed"), counts["processed"]))
    progress["is_last_batch"] = position.last
    if not begun or position.last:
        # A loader that was saved at its end would give nothing in the next epoch, or the rest of all that it has.
        loops["state_dict"].pop("combined_loader", None)


def continue_at(trainer: pl.Trainer, position: Position, restore: Callable[[], None]) -> None:
    """Have the loops continue at a position. To be called in ``on_train_start``.

    Args:
        trainer: Whose loops stand where :func:`rewrite` has put them.
        position: Where they continue.
        restore: Called right before the first thing that the run does there.
    """
    fit: Any = trainer.fit_loop
    loop: Any = fit.epoch_loop

    def begin_epoch() -> None:
        _as_if_not_resumed(fit)
        restore()
        if position.stage == "ended":
            fit.epoch_progress.current.completed -= 1  # The schedulers' frequency counts epochs that are over.
            loop._update_learning_rates(interval="epoch", update_plateau_schedulers=True)
            fit.epoch_progress.current.completed += 1
        fit.on_advance_start()

    def finish_batch(data_fetcher: Any) -> None:
        _as_if_not_resumed(fit)
        restore()
        # The loop goes on with what follows every batch, which includes a validation that is due.
        if position.stage == "trained":
            return
        if position.stage == "validated":
            loop._skip_next_val = True
            return
        if position.last:
            raise StopIteration
        loop.advance(data_fetcher)

    if position.batches == 0:
        _replace_once(fit, "on_advance_start", begin_epoch)
        return
    if fit._combined_loader_states_to_load:
        # The loaders were made before the checkpoint was read: by ``trainer.estimated_stepping_batches``.
        for loader in fit._combined_loader.flattened:
            for sampler in (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
                if set_epoch := getattr(sampler, "set_epoch", None):
                    set_epoch(position.epoch)
        fit._load_combined_loader_states()
        iter(fit._data_fetcher)
    _replace_once(loop, "advance", finish_batch)


def _replace_once(loop: Any, method: str, other: Callable[..., None]) -> None:
    """Have the next call of a method call another function."""

    def call(*args: Any) -> None:
        del vars(loop)[method]
        other(*args)

    vars(loop)[method] = call


def _as_if_not_resumed(fit: Any) -> None:
    """From here the loops do what they do in a run that was not interrupted, the making of iterators included."""
    fit.epoch_loop.restarting = False  # and its children's
    fit._restarting = False  # The property would not allow it with ``max_steps``.
    fit._loaded_from_state_dict = fit._resuming_from_checkpoint = False
    fit.reset_restart_stage()
    fit.epoch_loop.reset_restart_stage()
    fit.epoch_loop.val_loop.reset_restart_stage()


# --- what the callbacks ask ---------------------------------------------------------------------------------------


def is_validating(trainer: pl.Trainer) -> bool:
    return trainer.state.stage == "validate"


def validation_has_ended(trainer: pl.Trainer) -> bool:
    """Whether the last batch of the validation that is under way is over."""
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    return bool(progress.is_last_batch and progress.current.completed == progress.current.ready)


def validation_is_due(trainer: pl.Trainer) -> bool:
    """Whether the batch that is over is followed by a validation also where training does not stop."""
    fit: Any = trainer.fit_loop
    if trainer.should_stop:
        if getattr(trainer, "_val_check_time_interval", None) is not None:
            return False
        trainer.should_stop = False
        try:
            return bool(fit.epoch_loop._should_check_val_fx(fit._data_fetcher))
        finally:
            trainer.should_stop = True
    return True


def is_accumulating(trainer: pl.Trainer) -> bool:
    """Whether the last batch has left gradients to which the next one adds."""
    return bool(trainer.fit_loop._should_accumulate())


def steps_logged(trainer: pl.Trainer) -> int:
    """The count by which loggers number steps; it grows when all that follows a step is done."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def training_loaders(trainer: pl.Trainer) -> list[Any]:
    return _flattened(trainer.fit_loop._combined_loader)


def validation_loaders(trainer: pl.Trainer) -> list[Any]:
    return _flattened(trainer.fit_loop.epoch_loop.val_loop._combined_loader)


def _flattened(combined: Any) -> list[Any]:
    return [] if combined is None else list(combined.flattened)


def states_of_loaders(loops: dict[str, Any], loaders: list[Any]) -> list[dict[str, Any]]:
    """The states of loaders in a checkpoint, as it holds them; put there where Lightning has not."""
    states: list[dict[str, Any]] = loops["state_dict"].setdefault("combined_loader", [])
    if not states:
        states += [loader.state_dict() for loader in loaders]
    return states


def requeue_signal(trainer: pl.Trainer) -> int | None:
    """The signal of SLURM on which Lightning writes a checkpoint and requeues the job, if it does."""
    environment: Any = trainer._accelerator_connector.cluster_environment
    return environment.requeue_signal if getattr(environment, "auto_requeue", False) else None
