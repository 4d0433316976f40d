"""Optimizers that have modes: the weights that they train are not those to validate, test and keep.

Schedule-free optimizers take gradients at one point and hand out the average of others. Their ``train()`` and
``eval()`` move the weights between the two; without them a run validates and saves the wrong ones, silently.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

__all__ = ["OptimizerModes", "attach_modes", "has_modes"]


def has_modes(optimizer: Any) -> bool:
    """Whether an optimizer has ``train()`` and ``eval()``."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


class OptimizerModes(Callback):
    """Calls ``train()`` and ``eval()`` of optimizers that have them, such as schedule-free ones.

    They are in training mode while batches are trained on, and otherwise in evaluation mode: in validation, after
    training, and in what a checkpoint holds. Validation changes nothing: the training weights are kept meanwhile, in a
    copy. A run that goes on from a checkpoint continues bit for bit as the one that wrote it, which after writing it
    goes on from what it has written. Optimizers without modes are left alone.

    :func:`lightning_optim.build_optimizer`, and all that builds on it, adds one to the Trainer where it is needed. Add
    it yourself for a module that makes such an optimizer in its own ``configure_optimizers``.

    The running statistics of BatchNorm are those of the training weights; a warning says so once.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(callbacks=[OptimizerModes()], logger=False, enable_checkpointing=False)
    """

    def __init__(self) -> None:
        self._training = False
        #: The training weights during an evaluation.
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._hook: Any = None
        self._told = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        with_modes = self._optimizers(trainer)
        if not with_modes:
            return
        if self._hook is None:
            self._hook = pl_module.register_state_dict_post_hook(
                lambda module, state_dict, prefix, metadata: self._on_state_dict(trainer, module, state_dict)
            )
        norms = [name for name, m in pl_module.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        if norms and not self._told:
            self._told = True
            rank_zero_warn(
                f"{type(with_modes[0]).__name__} evaluates at other weights than it trains at, and the running "
                f"statistics of {len(norms)} BatchNorm layers ({norms[0]}, ...) are those of the latter. Use layers "
                "without running statistics (GroupNorm), or recompute them before testing: torch.optim.swa_utils."
                "update_bn(dataloader, model)."
            )
        self._switch(trainer, training=True)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if self._training:
            params = [p for o in self._optimizers(trainer) for group in o.param_groups for p in group["params"]]
            self._kept = [(p, p.detach().clone()) for p in params]
        self._switch(trainer, training=False)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._switch(trainer, training=True)
            with torch.no_grad():
                for p, value in self._kept:
                    p.copy_(value)
        self._kept = []

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._switch(trainer, training=False)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Weights and state of one evaluation mode, from which a run goes on as this one does."""
        if not self._training:
            return
        self._switch(trainer, training=False)
        # Copies, because what a checkpoint holds is written after training mode has changed it again.
        checkpoint["state_dict"] = _copied(trainer.strategy.lightning_module_state_dict())
        states = [trainer.strategy.optimizer_state(optimizer) for optimizer in trainer.optimizers]
        checkpoint["optimizer_states"] = _copied(states)
        self._switch(trainer, training=True)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self._hook is not None:
            self._switch(trainer, training=False)
            self._hook.remove()
            self._hook = None

    def _on_state_dict(self, trainer: Any, module: nn.Module, state_dict: dict[str, Any]) -> None:
        """Checkpoints of weights alone, and everything else that asks the module for its weights while it trains."""
        if not self._training:
            return
        self._switch(trainer, training=False)
        for name, x in state_dict.items():
            state_dict[name] = _copied(x)
        self._switch(trainer, training=True)

    def _switch(self, trainer: Any, training: bool) -> None:
        self._training = training
        for optimizer in self._optimizers(trainer):
            optimizer.train() if training else optimizer.eval()

    def _optimizers(self, trainer: Any) -> list[Any]:
        return [optimizer for optimizer in trainer.optimizers if has_modes(optimizer)]


def attach_modes(optimizer: Optimizer, trainer: Any | None) -> None:
    """Add :class:`OptimizerModes` to a Trainer whose optimizer has modes, before callbacks that write checkpoints."""
    if trainer is None or not has_modes(optimizer):
        return
    if any(isinstance(callback, OptimizerModes) for callback in trainer.callbacks):
        return
    last = [any(cls.__name__ == "Checkpoint" for cls in type(callback).__mro__) for callback in trainer.callbacks]
    place = last.index(True) if True in last else len(last)
    # A new list: the old one may be iterated over.
    trainer.callbacks = [*trainer.callbacks[:place], OptimizerModes(), *trainer.callbacks[place:]]


def _copied(x: Any) -> Any:
    return tree_map_only(Tensor, lambda y: y.detach().clone(), x)
