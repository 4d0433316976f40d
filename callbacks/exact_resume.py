"""Runs that continue from a checkpoint as if they had not stopped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.optimizers import NonFiniteGradientsError
from lightning_optim.processes import all_gather_object, strategies, world
from lightning_optim.trainer import is_lightning

from . import run_position
from .random_numbers import RandomNumbers
from .run_position import Position, Stage


class ExactResume(pl.Callback):
    """Continues a run exactly where its checkpoint was written: what ``RNGState`` and ``Resume`` have in common.

    It adds to a checkpoint: the position in the run, the random numbers of every process, the generators of loaders,
    the gradients of an accumulation that is under way, and the metrics that schedulers and callbacks wait for. Where
    that is not enough, a warning says so when the checkpoint is written. Of several in one Trainer, the first one does
    the work.
    """

    def __init__(self) -> None:
        self._resumed: _Resumed | None = None
        self._warned: set[str] = set()
        self._forget()

    def _forget(self) -> None:
        self._running = False
        self._exception: BaseException | None = None
        # What has been done after the last batch, and the number of logged steps when it ended.
        self._stage: Stage = "trained"
        self._steps_logged = 0
        # Random numbers where the last batch, or a validation that was due after it, ended.
        self._numbers: RandomNumbers | None = None
        # Whether a validation was made that is not due, but made because the run stops.
        self._extra_validation = False
        # The training loaders, which Lightning forgets when it validates after the fit.
        self._loaders: list[Any] = []
        # How far the step under way is, and the number of optimizer steps when it began.
        self._within: str | None = None
        self._steps = 0
        self._generators: list[Tensor] = []

    # --- following the run ------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._forget()
        self._warned = set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._running = True
        self._loaders = run_position.training_loaders(trainer)
        if resumed := self._resumed:
            self._resumed = None
            self._stage = resumed.position.stage
            self._numbers = resumed.numbers(trainer)
            run_position.continue_at(trainer, resumed.position, lambda: self._restore(trainer, pl_module, resumed))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._numbers = RandomNumbers.now()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._generators:
            # Whatever a resumed loader has drawn to find its place does not count.
            _set_generators(self._loaders, self._generators)
            self._generators = []
        self._within, self._steps = "forward", trainer.global_step

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._within = "backward"

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._within = "step"

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._within = None
        self._extra_validation = False
        self._stage = "trained"
        self._steps_logged = run_position.steps_logged(trainer)
        self._numbers = RandomNumbers.now()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._running:
            return
        self._extra_validation = not run_position.validation_is_due(trainer)
        if not self._extra_validation:
            self._stage = "validated"
            self._numbers = RandomNumbers.now()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_last_batch and not self._extra_validation:
            self._numbers = RandomNumbers.now()
        self._running = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._exception = exception

    # --- writing ----------------------------------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not self._works(trainer):
            return
        position = self._position(trainer, checkpoint["loops"]["fit_loop"])
        reasons = list(self._rewind_loaders(trainer, position, checkpoint["loops"]["fit_loop"]))
        gradients, reason = self._accumulated(trainer, pl_module, position)
        now = RandomNumbers.now() if self._numbers is None or not position.earlier else self._numbers
        validation = run_position.validation_loaders(trainer)
        checkpoint["rng"] = {"states": all_gather_object(now.state(), world())}
        checkpoint["position"] = asdict(position) | {
            "gradients": gradients,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "generators": {
                "training": [generator.get_state() for generator in _generators(self._loaders)],
                "validation": [generator.get_state() for generator in _generators(validation)],
            },
            "frozen": [name for name, p in pl_module.named_parameters() if not p.requires_grad],
            "metrics": {name: x.detach().clone() for name, x in trainer.callback_metrics.items()},
        }
        self._warn(
            trainer, [*reasons, *reason, *self._half_done(pl_module, position), *_not_restored(trainer.strategy)]
        )

    def _works(self, trainer: pl.Trainer) -> bool:
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return next(callback for callback in callbacks if isinstance(callback, ExactResume)) is self

    def _position(self, trainer: pl.Trainer, loops: dict[str, Any]) -> Position:
        stage = self._stage
        validating = run_position.is_validating(trainer)
        if validating and run_position.validation_has_ended(trainer) and self._exception is None:
            if run_position.validation_is_due(trainer):
                stage, validating = "validated", False
        elif not validating and run_position.steps_logged(trainer) != self._steps_logged:
            stage = "finished"
        position = run_position.find(loops, stage, validating, self._running)
        failed = self._exception is not None and not is_lightning(self._exception, "SIGTERMException")
        if failed or self._extra_validation:
            position = replace(position, earlier=True)
        return position

    def _rewind_loaders(self, trainer: pl.Trainer, position: Position, loops: dict[str, Any]) -> Iterator[str]:
        """Why the loaders' places in the data are not those of a position within an epoch; mends what can be."""
        if position.batches == 0 or position.last:
            return
        self._loaders = run_position.training_loaders(trainer) or self._loaders
        states = iter(run_position.states_of_loaders(loops, [x for x in self._loaders if _has_state(x)]))
        for loader in self._loaders:
            name = type(loader).__name__
            if not _has_state(loader):
                yield (
                    f"it lies within an epoch, and {name} has no state_dict, so that a resumed run begins the data of "
                    "that epoch again. Save at the end of an epoch, or use a loader with state_dict and "
                    "load_state_dict, such as lightning_optim.data.loading.ResumableLoader"
                )
                continue
            state = next(states)
            if not hasattr(loader, "__len__"):
                yield f"it lies within an epoch, and Lightning has taken one batch ahead from {name}, without a length"
            elif position.within_step:
                if hasattr(loader, "rewind"):
                    loader.rewind(state)
                else:
                    yield f"it was written amid a step, whose batch {name} will not give again"

    def _accumulated(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, position: Position
    ) -> tuple[list[dict[str, Tensor]], list[str]]:
        """Each process's gradients of an accumulation under way; why they are not what they were at the position."""
        none: list[dict[str, Tensor]] = []
        if position.batches == 0 or position.last:
            return none, []
        if position.within_step and pl_module.automatic_optimization:
            begun = position.batches % trainer.accumulate_grad_batches != 0
            if begun and self._within in ("backward", "step"):
                return none, ["it was written within the last step of an accumulation, when gradients were added"]
        elif pl_module.automatic_optimization:
            begun = run_position.is_accumulating(trainer)
        else:
            begun = self._steps == trainer.global_step
        if not begun:
            return none, []
        found = {name: p.grad.detach() for name, p in pl_module.named_parameters() if p.grad is not None}
        if not found and pl_module.automatic_optimization:
            return none, ["it lies within an accumulation, whose gradients have been cleared since"]
        if is_lightning(trainer.strategy, "DDPStrategy"):
            return all_gather_object({name: gradient.cpu() for name, gradient in found.items()}, world()), []
        if found and not is_lightning(trainer.strategy, "SingleDeviceStrategy"):
            strategy = type(trainer.strategy).__name__
            return none, [f"it lies within an accumulation, whose gradients are not saved with {strategy}"]
        return [found], []

    def _half_done(self, pl_module: pl.LightningModule, position: Position) -> Iterator[str]:
        if not position.within_step or self._within is None:
            return
        if isinstance(self._exception, NonFiniteGradientsError):
            return  # The optimizer has moved nothing.
        if self._within == "step" or not pl_module.automatic_optimization:
            yield "it was written amid an optimizer step, which may have moved some of the parameters"
        elif any(True for _ in pl_module.buffers()):
            yield "it was written amid a step, which may have changed buffers of the model, such as BatchNorm's"

    def _warn(self, trainer: pl.Trainer, reasons: list[str]) -> None:
        new = [reason for reason in dict.fromkeys(reasons) if reason not in self._warned]
        self._warned.update(new)
        if new:
            rank_zero_warn(
                f"The checkpoint of step {trainer.global_step} does not continue exactly: {'; '.join(new)}. "
                "(This is said once.)"
            )

    # --- resuming ---------------------------------------------------------------------------------------------------

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != "fit" or not self._works(trainer) or "loops" not in checkpoint:
            return
        loops = checkpoint["loops"]["fit_loop"]
        fields = Position.__dataclass_fields__
        saved = checkpoint.get("position", {})
        if saved:
            position = Position(**{name: saved[name] for name in fields})
        else:  # Written without this callback. Within an epoch most are written where a validation ends.
            position = run_position.find(loops, "validated", False, False)
        run_position.rewrite(loops, position)
        self._resumed = _Resumed(position, checkpoint.get("rng", {}).get("states", []), saved)

    def _restore(self, trainer: pl.Trainer, pl_module: pl.LightningModule, resumed: _Resumed) -> None:
        trainer.callback_metrics.update(resumed.saved.get("metrics", {}))
        generators = resumed.saved.get("generators", {})
        _set_generators(run_position.validation_loaders(trainer), generators.get("validation", []))
        if resumed.position.batches == 0 or resumed.position.last:
            _set_generators(self._loaders, generators.get("training", []))
        else:
            self._generators = generators.get("training", [])
        self._steps_logged = run_position.steps_logged(trainer)
        if resumed.position.batches and "accumulate_grad_batches" in resumed.saved:
            # GradientAccumulationScheduler sets it at the start of an epoch, which is over.
            trainer.accumulate_grad_batches = resumed.saved["accumulate_grad_batches"]
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if "frozen" in resumed.saved and any(is_lightning(callback, "BaseFinetuning") for callback in callbacks):
            # It freezes again when a run is resumed, and does not thaw what it had thawed.
            for name, p in pl_module.named_parameters():
                p.requires_grad_(name not in resumed.saved["frozen"])
        gradients = resumed.saved.get("gradients", [])
        if len(gradients) == trainer.world_size:
            parameters = dict(pl_module.named_parameters())
            for name, gradient in gradients[trainer.global_rank].items():
                p = parameters[name]
                p.grad = gradient.to(p.device, p.dtype, copy=True)
        elif gradients:
            rank_zero_warn(
                f"The checkpoint lies within an accumulation of {len(gradients)} processes, which {trainer.world_size} "
                "cannot continue: its gradients are left out."
            )
        if self._numbers is not None:
            self._numbers.set()


@dataclass(frozen=True)
class _Resumed:
    """What the checkpoint says that a run continues."""

    position: Position
    states: list[dict[str, Any]]
    saved: dict[str, Any]

    def numbers(self, trainer: pl.Trainer) -> RandomNumbers | None:
        rank = trainer.global_rank
        return RandomNumbers.of(self.states[rank]) if rank < len(self.states) else None


def _not_restored(strategy: Any) -> Iterator[str]:
    """Why a strategy does not restore what it saves to the last bit."""
    if strategies.saves_flat_file(strategy):
        yield (
            "FSDPStrategy does not restore the state of optimizers from a file to the last bit, but does from a folder "
            'of shards, which state_dict_type="sharded" writes'
        )


def _has_state(loader: Any) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def _generators(loaders: list[Any]) -> list[torch.Generator]:
    """Those that loaders and their samplers own."""
    found: dict[int, torch.Generator] = {}
    for loader in loaders:
        batches = getattr(loader, "batch_sampler", None)
        for owner in (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())


def _set_generators(loaders: list[Any], states: list[Tensor]) -> None:
    found = _generators(loaders)
    if len(found) == len(states):
        for generator, state in zip(found, states):
            generator.set_state(state)
