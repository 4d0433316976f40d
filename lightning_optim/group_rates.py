"""Learning rates and weight decays of parameter groups, whose ratios one value for all groups would lose.

Torch's schedules, Lightning's learning-rate finder and hand-written loops (``group["lr"] = lr``) know one learning
rate. An optimizer with two rules, ``lr_multipliers`` or ``layer_decay`` has several, and its fallback rule must not be
driven to the learning rate of the matrices. Loops that write ``group["weight_decay"]`` know one weight decay, and most
models have parameters that get none.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from numbers import Real
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import SWALR

from .trainer import is_searching_rate

#: Arguments of torch's schedules that are a learning rate, and may be a list with one for each group.
_RATES: dict[type[LRScheduler], tuple[str, ...]] = {
    OneCycleLR: ("max_lr",),
    CyclicLR: ("base_lr", "max_lr"),
    ReduceLROnPlateau: ("min_lr",),
    SWALR: ("swa_lr",),
}


def shares(optimizer: Optimizer) -> list[float]:
    """The learning rates of all groups over that of the optimizer."""
    lr = float(optimizer.defaults.get("lr") or 0.0)
    return [float(group["lr"]) / lr if lr else 1.0 for group in optimizer.param_groups]


def scale_rates(optimizer: Optimizer, lr: float) -> None:
    """Give an optimizer another learning rate; its groups keep their ratios."""
    for group, share in zip(optimizer.param_groups, shares(optimizer)):
        group["lr"] = lr * share
    optimizer.defaults["lr"] = lr


def rates_by_group(cls: type[LRScheduler], args: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """The arguments of a schedule, with one learning rate for all groups scaled by group."""
    ratios = shares(optimizer)
    if set(ratios) == {1.0}:
        return args
    names = [name for known, names in _RATES.items() if issubclass(cls, known) for name in names]
    scaled = {name: [args[name] * r for r in ratios] for name in names if isinstance(args.get(name), (int, float))}
    lowest = min(group["lr"] for group in optimizer.param_groups)
    if isinstance(eta_min := args.get("eta_min"), (int, float)) and eta_min > lowest:
        _warn(optimizer, f"{cls.__name__}(eta_min={eta_min:g})")
    return args | scaled


def watch_groups(optimizer: Optimizer, trainer: Any | None) -> None:
    """Notice when all groups of an optimizer are given one learning rate, or one weight decay, in place of several.

    Where Lightning's finder does so, each group gets its share of it, during the search and after. Of others a warning
    tells once.
    """
    ratios = shares(optimizer)
    if set(ratios) != {1.0}:
        watched = _WatchedRates(ratios, trainer)
        optimizer.register_step_pre_hook(watched.before_step)
        optimizer.register_step_post_hook(watched.after_step)
    decays = [float(group.get("weight_decay") or 0.0) for group in optimizer.param_groups]
    if len(set(decays)) > 1:
        optimizer.register_step_pre_hook(_WatchedDecays(decays))


class _WatchedRates:
    def __init__(self, ratios: list[float], trainer: Any | None) -> None:
        self.ratios = ratios
        self.trainer = (lambda: None) if trainer is None else weakref.ref(trainer)
        self.searched: float | None = None
        self.was_searching = False
        self.last: float | None = None  # the learning rate of all groups in the last step, if it was one
        self.warned = False

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        groups = optimizer.param_groups[: len(self.ratios)]
        lr = _one_value(group["lr"] for group in groups)
        trainer = self.trainer()
        searching = trainer is not None and is_searching_rate(trainer)
        if lr is not None and (searching or self.was_searching):
            for group, ratio in zip(groups, self.ratios):
                group["lr"] = lr * ratio
            self.searched = lr if searching else None
        elif not self.warned and len(set(self.ratios)) > 1 and (cause := self._one_rate(optimizer, groups)):
            self.warned = True
            _warn(optimizer, cause, self.ratios)
        self.last = lr
        self.was_searching = searching

    def _one_rate(self, optimizer: Optimizer, groups: list[dict[str, Any]]) -> str:
        """What gives all groups one learning rate, if something does."""
        lowest = float(optimizer.defaults["lr"]) * min(self.ratios)
        for key in ("lr", "max_lr", "swa_lr"):
            value = _one_value(group.get(key) for group in groups)
            # A schedule that begins or ends at one low rate for all, such as zero, is no mistake.
            follows = key == "lr" and value and self.last and value != self.last
            if value is not None and (value >= lowest or follows):
                return f'group["{key}"] = {value:g}'
        changes = [(group["lr"], group["initial_lr"]) for group in groups if "initial_lr" in group]
        if any(lr < 0.999 * initial for lr, initial in changes):
            for group, (lr, initial) in zip(groups, changes):
                if lr > 1.001 * initial:
                    name = group.get("name", "group")
                    return f"What raises the rate of {name} from {initial:g} to {lr:g} while others fall (eta_min?)"
        return ""

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.searched is not None:  # The finder wants to find what it has set.
            for group in optimizer.param_groups[: len(self.ratios)]:
                group["lr"] = self.searched
            self.searched = None


class _WatchedDecays:
    def __init__(self, decays: list[float]) -> None:
        self.decays = decays
        self.warned = False

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.warned:
            return
        groups = optimizer.param_groups[: len(self.decays)]
        decay = _one_value(group.get("weight_decay") for group in groups)
        if decay is None or decay <= min(self.decays):
            return
        self.warned = True
        built = [f"{group.get('name', i)} {d:g}" for i, (group, d) in enumerate(zip(groups, self.decays))]
        warnings.warn(
            f'group["weight_decay"] = {decay:g} is one weight decay for all parameter groups of '
            f"{type(optimizer).__name__}, which were built with {', '.join(built)}. Leave alone the groups that were "
            "built without weight decay, and scale it for the others.",
            stacklevel=2,
        )


def _one_value(values: Iterable[Any]) -> float | None:
    """The value that all of them have; ``None`` if they differ or are no plain numbers."""
    first, *others = values
    if not isinstance(first, Real) or any(isinstance(x, Tensor) or x != first for x in others):
        return None
    return float(first)


def _warn(optimizer: Optimizer, cause: str, ratios: list[float] | None = None) -> None:
    lr = float(optimizer.defaults["lr"])
    rates = [
        f"{group.get('name', i)} {lr * ratio:g}"
        for i, (group, ratio) in enumerate(zip(optimizer.param_groups, ratios or shares(optimizer)))
    ]
    warnings.warn(
        f"{cause} is one learning rate for all parameter groups of {type(optimizer).__name__}, which were built with "
        f"{', '.join(rates)}. Scale it by group: set group['lr'] to it times group['lr'] as built over {lr:g}, or give "
        "schedules a list with one rate for each group.",
        stacklevel=2,
    )
