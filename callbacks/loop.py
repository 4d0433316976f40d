"""Where diagnostics run: what they ask of Lightning's Trainer, and what any other training loop says in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.trainer import is_lightning

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(eq=False)
class Loop:
    """A training loop without Lightning's Trainer: the attributes of a Trainer that diagnostics read, named as there.

    Args:
        model: The model as it is called, in its wrapper where there is one.
        optimizers: The optimizers, without wrappers.
        loggers: Where values go; empty on all ranks but the first.
        accumulate_grad_batches: Micro-batches per step.
        scaler: The loss scaler, if there is one.
        max_steps: Steps that the run is to have; -1 where that is not known.
        precision: What the record of the run calls its precision.
        is_global_zero: Whether this is the first rank.
        world_size: Number of ranks.
    """

    model: nn.Module
    optimizers: list[Optimizer]
    loggers: Sequence[Any] = ()
    accumulate_grad_batches: int = 1
    scaler: Any = None
    max_steps: int = -1
    precision: str = ""
    is_global_zero: bool = True
    world_size: int = 1
    #: Steps made before the one that is being made, or was made last.
    global_step: int = 0
    callback_metrics: dict[str, Tensor] = field(default_factory=dict)
    enable_validation: bool = False
    gradient_clip_val: float | None = None
    num_training_batches: float = float("inf")
    callbacks: Sequence[Any] = ()

    # A loop of one's own has no other stage, and logs nothing through a module.
    sanity_checking = False
    state = SimpleNamespace(fn="fit")
    logged_metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def strategy(self) -> nn.Module:
        """What says how ranks share parameters and gradients: the model's wrapper."""
        return self.model


#: Lightning's Trainer, or what stands in its place.
Place: TypeAlias = "pl.Trainer | Loop"


def steps_made(place: Place) -> int:
    """The step of what is logged now: that which Lightning gives to what the LightningModule logs in this batch."""
    return place.global_step if isinstance(place, Loop) else place.fit_loop.epoch_loop._batches_that_stepped


def scaler_of(place: Place) -> Any:
    """The loss scaler of 16-mixed precision, or ``None``."""
    return place.scaler if isinstance(place, Loop) else getattr(place.precision_plugin, "scaler", None)


def loss_scale(place: Place, optimizer: Optimizer) -> float:
    """What gradients are still multiplied by when the optimizer gets them: 1, unless it unscales them itself."""
    if isinstance(place, Loop):
        scale = getattr(optimizer, "grad_scale", None)  # which torch's scaler sets for the time of such a step
        return 1.0 if scale is None else float(scale)
    scaler = scaler_of(place)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return scaler.get_scale()


def unscaled_loss(place: Place, loss: Tensor) -> Tensor:
    """The mean loss of a micro-batch, from what hooks are given: divided by accumulation, by Lightning also scaled."""
    scaler = None if isinstance(place, Loop) else scaler_of(place)
    loss = loss.detach()
    if scaler is None and place.accumulate_grad_batches == 1:
        return loss
    loss = loss.float() * place.accumulate_grad_batches
    return loss if scaler is None else loss / scaler.get_scale()  # which has been halved to 0 where all overflows


def is_automatic(place: Place) -> bool:
    """Whether each step follows from one loss, which hooks are given, with nothing in between that they do not see."""
    return isinstance(place, Loop) or place.lightning_module.automatic_optimization


def device_of(module: nn.Module) -> torch.device:
    """The device that a module is on."""
    if is_lightning(module, "LightningModule"):
        return module.device  # type: ignore[return-value]
    return next((p.device for p in module.parameters()), torch.device("cpu"))
