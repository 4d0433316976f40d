"""A LightningModule's own optimizers and schedules, and what another optimizer keeps of them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from .grouping import ParameterSettings

# What another optimizer keeps, and what says how torch computes.
_KEPT = {"lr", "weight_decay", "maximize", "foreach", "fused", "capturable", "differentiable"}


@dataclass
class OwnOptimizer:
    """An optimizer that ``configure_optimizers`` of a module returned, and its schedules.

    Args:
        optimizer: The optimizer. It makes no step; its schedules go on changing its learning rates.
        schedules: Its schedules, as Lightning's dictionaries with the key ``scheduler``.
    """

    optimizer: Optimizer
    schedules: list[dict[str, Any]] = field(default_factory=list)

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that it trains."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def settings(self) -> dict[Any, ParameterSettings]:
        """What it says of each of its parameters."""
        groups = self.optimizer.param_groups
        rates, decays = self.rates(), [group.get("weight_decay") for group in groups]
        lr_factors = self._factors(rates, "lr")
        decay_factors: list[float | None] = [None] * len(groups)
        if self._says_weight_decay(decays):
            decay_factors = [*self._factors([float(decay or 0.0) for decay in decays], "weight_decay")]
        settings = {}
        for i, group in enumerate(groups):
            label = str(group.get("name", f"group-{i}")) if len(groups) > 1 else ""
            for p in group["params"]:
                settings[p] = ParameterSettings(label, lr_factors[i], decay_factors[i])
        return settings

    def rates(self) -> list[float]:
        """Of each group, the learning rate that its schedules start from, or rise to."""
        rates = []
        for i, group in enumerate(self.optimizer.param_groups):
            rate = group.get("max_lr", group.get("initial_lr", group["lr"]))
            for entry in self.schedules:
                scheduler = entry["scheduler"]
                if peaks := getattr(scheduler, "max_lrs", None):  # CyclicLR
                    rate = peaks[i]
                if isinstance(scheduler, LambdaLR):
                    rate = float(rate) * _highest(scheduler.lr_lambdas[i])
            rates.append(float(rate))
        return rates

    def lost(self) -> list[str]:
        """Hyperparameters that were chosen and that another optimizer does not keep."""
        standard = _defaults(type(self.optimizer))
        chosen = {
            key: value
            for key, value in self.optimizer.defaults.items()
            if key in standard and key not in _KEPT and value != standard[key]
        }
        lost = [f"{key}={value}" for key, value in chosen.items()]
        for key in standard.keys() - _KEPT:
            if len({str(group.get(key)) for group in self.optimizer.param_groups}) > 1:
                lost.append(f"{key} by group")
        if any(getattr(entry["scheduler"], "cycle_momentum", False) for entry in self.schedules):
            lost.append("the schedule's cycle of momentum")
        return lost

    def _says_weight_decay(self, decays: list[Any]) -> bool:
        """Whether the module has chosen its weight decay, and does not only have what its optimizer's class has."""
        standard = _defaults(type(self.optimizer)).get("weight_decay", 0.0)
        return any(decay is not None and decay != standard for decay in decays)

    def _factors(self, values: list[float], key: str) -> list[float]:
        """Values of the groups over that of the optimizer. The two rules of a hybrid have a value each."""
        groups = self.optimizer.param_groups
        factors = [1.0] * len(values)
        for role in {group.get("role") for group in groups}:
            mine = [i for i, group in enumerate(groups) if group.get("role") == role]
            standard = self.optimizer.defaults.get(key)
            known = standard is not None and any(math.isclose(values[i], float(standard)) for i in mine)
            reference = float(standard) if known and standard else max(values[i] for i in mine)
            for i in mine:
                factors[i] = values[i] / reference if reference else (1.0 if key == "lr" else 0.0)
        return factors


def own_optimizers(configured: Any) -> list[OwnOptimizer]:
    """What ``configure_optimizers`` returned, in any of Lightning's forms.

    Raises:
        ValueError: It has another form.
    """
    if configured is None:
        return []
    if isinstance(configured, dict):
        configured = [configured]
    entries: list[Any]
    loose: list[Any] = []
    if isinstance(configured, (list, tuple)) and len(configured) == 2 and isinstance(configured[0], (list, tuple)):
        optimizers, schedulers = configured
        entries = [{"optimizer": optimizer} for optimizer in optimizers]
        loose = list(schedulers) if isinstance(schedulers, (list, tuple)) else [schedulers]
    else:
        entries = list(configured) if isinstance(configured, (list, tuple)) else [configured]
        entries = [entry if isinstance(entry, dict) else {"optimizer": entry} for entry in entries]
    if not all(hasattr(entry.get("optimizer"), "param_groups") for entry in entries):
        raise ValueError(
            f"configure_optimizers returned {configured!r}, which is none of the forms that Lightning takes"
        )
    owns = [OwnOptimizer(entry["optimizer"]) for entry in entries]
    for entry in entries:
        if (scheduler := entry.get("lr_scheduler")) is not None:
            loose.append(_as_dict(scheduler, entry.get("monitor")))
    for own in owns:
        for scheduler in map(_as_dict, loose):
            if scheduler["scheduler"].optimizer is own.optimizer:
                own.schedules.append(scheduler)
    return owns


class FollowingSchedule(LRScheduler):
    """Gives an optimizer the course of another one's schedule, relative to the learning rates that the two start from.

    Args:
        optimizer: The optimizer, with the learning rates that correspond to the highest of the followed schedule.
        followed: The schedule of ``own``, any torch schedule or an object with the same methods.
        own: The optimizer that the followed schedule belongs to.
        sources: For each group of ``optimizer``, the number of the group of ``own`` that it follows.
    """

    def __init__(self, optimizer: Optimizer, followed: Any, own: OwnOptimizer, sources: list[int]) -> None:
        self.followed = followed
        self._own = own.optimizer
        self._rates = own.rates()
        self._sources = sources
        # The schedule asks whether its optimizer has made a step, which it never does.
        self._own._opt_called = True  # type: ignore[attr-defined]
        super().__init__(optimizer)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Advance the followed schedule, with its arguments, and follow."""
        if self.last_epoch >= 0:  # not in the constructor
            self.followed.step(*args, **kwargs)
        super().step()

    def get_lr(self) -> list[float | Tensor]:
        groups = self._own.param_groups
        factors = [float(g["lr"]) / rate if rate else 1.0 for g, rate in zip(groups, self._rates)]
        rates = [base * factors[source] for base, source in zip(self.base_lrs, self._sources)]
        later = self.optimizer.param_groups[len(rates) :]  # added since
        return rates + [group["lr"] for group in later]

    def state_dict(self) -> dict[str, Any]:
        """The progress of the followed schedule, and its learning rates."""
        mine = {key: self.__dict__[key] for key in ("base_lrs", "last_epoch", "_step_count", "_last_lr")}
        lrs = [float(group["lr"]) for group in self._own.param_groups]
        return mine | {"followed": self.followed.state_dict(), "lrs": lrs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a schedule has stopped."""
        state = dict(state_dict)
        self.followed.load_state_dict(state.pop("followed"))
        for group, lr in zip(self._own.param_groups, state.pop("lrs")):
            group["lr"] = lr
        super().load_state_dict(state)


def _as_dict(scheduler: Any, monitor: Any = None) -> dict[str, Any]:
    entry = dict(scheduler) if isinstance(scheduler, dict) else {"scheduler": scheduler}
    if monitor is not None:
        entry.setdefault("monitor", monitor)
    return entry


def _defaults(cls: type[Optimizer]) -> dict[str, Any]:
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _highest(factor: Any, steps: Iterable[int] = (*range(1000), *range(1000, 100_000, 500))) -> float:
    """The highest factor of a LambdaLR: 1 for most, but less where it makes the learning rate itself."""
    values = [1e-30]
    with suppress(Exception):  # a function that ends with the run
        for step in steps:
            values.append(abs(float(factor(step))))
    return max(values)
