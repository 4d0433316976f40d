"""The loss of a step and the running statistics of the model, for rules that may take a step back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import processes
from ..devices import widest
from ..processes import ProcessGroup


def loss_of(result: Any, maximize: set[bool], name: str) -> float:
    """The loss that a closure returned, as a number; infinite where it is not finite.

    Args:
        result: What the closure returned, or ``None``.
        maximize: The parameter groups' ``maximize``.
        name: The optimizer, for messages.

    Raises:
        ValueError: There is no loss, it is not one number, or it is below zero.
    """
    if result is None:
        raise ValueError(
            f"{name} needs the loss of every step: call step(closure) with a closure that returns it, in manual "
            "optimization step(lambda: loss). Lightning's automatic optimization does so at every precision but "
            "16-mixed, whose gradient scaler calls step() without one: use bf16-mixed or 32-true."
        )
    if len(maximize) > 1:
        raise ValueError(f"{name} follows one loss: maximize must be the same in all parameter groups.")
    try:
        loss = float(result.detach() if isinstance(result, Tensor) else result)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} needs a closure that returns the loss, one number; got {result!r}.") from error
    if not math.isfinite(loss):
        return math.inf
    loss = -loss if True in maximize else loss
    if loss < 0:
        raise ValueError(
            f"{name} compares losses by their ratio, so they must not be negative, got {float(result):g}"
            f"{' with maximize=True' if True in maximize else ''}; add a constant to the loss."
        )
    return loss


def mean_loss(loss: float, groups: Sequence[ProcessGroup], device: torch.device, name: str) -> float:
    """The mean of a loss over the ranks of some groups; infinite if it is on any.

    Args:
        loss: The loss of this rank.
        groups: The groups, each of which adds up what the one before has.
        device: A device on which these groups communicate.
        name: The optimizer, for messages.

    Raises:
        ValueError: There are several processes, and nothing says which of them train one model.
    """
    if not groups:
        if processes.world() is not None:
            raise ValueError(
                f"{name} needs the mean loss over all processes that train one model, and does not know which these "
                "are: build it with lightning_optim.build_optimizer(module, ..., trainer=trainer), or set "
                "optimizer.process_group, such as torch.distributed.group.WORLD."
            )
        return loss
    total = torch.tensor([loss, 1.0], dtype=widest(device), device=device)
    loss, count = processes.all_reduce_sum(total, groups).tolist()
    return loss / count


class RunningStatistics:
    """Statistics that a model updates in its forward passes, so that they can go back to what they were.

    Args:
        find: Returns the tensors, such as the means and variances of BatchNorm.
    """

    def __init__(self, find: Callable[[], list[Tensor]]) -> None:
        self.find = find
        self.kept: list[Tensor] | None = None

    def keep(self) -> None:
        """Keep them as they are now."""
        self.kept = [x.clone() for x in self.find()]

    def restore(self) -> None:
        """Bring them back to what was kept."""
        for x, old in zip(self.find(), self.kept or []):
            x.copy_(old)
