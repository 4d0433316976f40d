"""Hyperparameters that are given anew when a run is resumed."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from lightning_optim.engine.carry_over import carried
from lightning_optim.engine.checkpoint import LABELS, SCHEDULED, STRUCTURE
from lightning_optim.peers import declared_arguments

from .exact_resume import ExactResume

# How torch's optimizers compute, not what.
_IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")


class Resume(ExactResume):
    """Decides between the checkpoint's hyperparameters and those that the optimizer is built with at resume.

    A resumed optimizer has the checkpoint's learning rate, betas, weight decay and so on, whatever it was built with.
    This callback warns where the two differ, and goes on with the new values of the hyperparameters in ``override``,
    in all parameter groups: for ``"lr"`` that includes the fallback rule's learning rate, multipliers and overrides by
    name.

    A schedule goes on at its position: a new learning rate scales the current one, as the schedule and reductions
    on plateaus have left it, by new over old, and is what the rest of the schedule is relative to. Absolute values
    in a schedule's own arguments, such as OneCycleLR's ``max_lr``, are taken anew with ``"lr"``, too.

    Its other arguments (``T_max``, ``step_size``, ``gamma``, ``total_steps``, ...) a torch schedule has from the
    checkpoint, too, as far as it keeps them; the same warning names them, and ``override`` takes them: those of
    OneCycleLR and CyclicLR all together. (:mod:`lightning_optim.schedules` always have the new ones.)

    A checkpoint of another optimizer, or of other parameter groups, is refused unless ``change_optimizer`` is set. Then
    state of the same meaning is kept and the rest begins anew, as :func:`~lightning_optim.carry_over` does, and a
    message says which. Hyperparameters are those of the new optimizer, and the schedule goes on at its position.

    Works with any torch optimizer. Without a checkpoint it does nothing.

    Args:
        override: A hyperparameter or several by name, as in the optimizer's parameter groups: ``lr``, ``betas``,
            ``weight_decay``, ...; or arguments of the schedule.
        change_optimizer: Whether the run may go on with another optimizer than that of its checkpoint.

    Raises:
        MisconfigurationException: When training starts, if no optimizer has such a hyperparameter, and no schedule such
            an argument.

    Example:
        >>> trainer = pl.Trainer(callbacks=[Resume(override=["lr", "weight_decay"])], accelerator="cpu", logger=False)
    """

    def __init__(self, override: list[str] | str | None = None, change_optimizer: bool = False) -> None:
        super().__init__()
        self.override = [override] if isinstance(override, str) else override or []
        self.change_optimizer = change_optimizer
        #: Hyperparameters whose new values were not taken at the last resumption.
        self.kept: list[str] = []
        self._built: list[_Built] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        # Optimizers and schedules are there; the checkpoint's state of them is loaded after this.
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self._built = [_Built(optimizer, schedulers) for optimizer in trainer.optimizers]
        known = {name for built in self._built for name in built.names}
        for name in self.override:
            if name not in known:
                raise MisconfigurationException(
                    f"resume.override: no parameter group has {name!r}, nor has a schedule. "
                    f"Known: {', '.join(sorted(known))}."
                )
        if self.change_optimizer:
            for built in self._built:
                built.take_over(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        differences = [difference for built in self._built for difference in built.differences()]
        for built in self._built:
            built.take([*self.override, "lr"] if built.changed else self.override)
        self._built = []
        new = [text for name, text in differences if name in self.override]
        if new:
            rank_zero_info(f"Resumed with hyperparameters given anew: {'; '.join(new)}.")
        old = [text for name, text in differences if name not in self.override]
        self.kept = list(dict.fromkeys(name for name, _ in differences if name not in self.override))
        if old:
            names = ",".join([*self.override, *self.kept])
            rank_zero_warn(
                f"The run goes on with hyperparameters of its checkpoint, not with those it is given now: "
                f"{'; '.join(old)}. To take the new ones, add --resume.override '[{names}]', in Python the callback "
                f"lightning_optim.callbacks.Resume(override={names.split(',')})."
            )


class _Built:
    """What an optimizer and its schedules were built with."""

    def __init__(self, optimizer: Optimizer, schedulers: Iterable[Any]) -> None:
        self.optimizer = optimizer
        #: Whether it has taken over the state of another optimizer.
        self.changed = False
        self._hook: Any = None
        self.schedulers = [scheduler for scheduler in schedulers if scheduler.optimizer is optimizer]
        self.groups = [dict(group) for group in optimizer.param_groups]
        # What else an optimizer keeps in its groups from the start, such as counters, is its own.
        self._own = {*optimizer.defaults} - {*declared_arguments(type(optimizer))}
        self.schedules = [
            (schedule, _state(schedule)) for scheduler in self.schedulers for schedule in _with_parts(scheduler)
        ]

    def take_over(self, module: pl.LightningModule) -> None:
        """Have the optimizer take over what it can when it loads the state of another one."""

        def convert(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            state, said = carried(optimizer, state_dict, module)
            if said:
                self.changed = True
                rank_zero_info(said)
            return state

        # Before what checks the checkpoint.
        self._hook = self.optimizer.register_load_state_dict_pre_hook(convert, prepend=True)

    @property
    def names(self) -> Iterator[str]:
        """What can be given anew."""
        for group in self.groups:
            yield from self._hyperparameters(group)
        for schedule, state in self.schedules:
            yield from _arguments(schedule, state)

    def _hyperparameters(self, group: dict[str, Any]) -> list[str]:
        others = {*LABELS, *STRUCTURE, *SCHEDULED, *_IMPLEMENTATION, *self._own}
        return [name for name in group if name not in others]

    def differences(self) -> Iterator[tuple[str, str]]:
        """Hyperparameters that are not those of the checkpoint, and how they differ."""
        values: dict[tuple[str, str, str], list[str]] = {}
        for i, (built, loaded) in enumerate(zip(self.groups, self.optimizer.param_groups)):
            for name in self._hyperparameters(built):
                ours, saved = _value(built, name), _value(loaded, name)
                if ours != saved:
                    values.setdefault((name, f"{ours}", f"{saved}"), []).append(repr(built.get("name", i)))
        for (name, ours, saved), groups in values.items():
            yield name, f"{name}={ours} now, {saved} in the checkpoint (group {', '.join(groups)})"
        for schedule, state in self.schedules:
            now = _arguments(schedule, _state(schedule))
            for name, given in _arguments(schedule, state).items():
                if given != now.get(name):
                    yield name, f"{name}={given} now, {now.get(name)} in the checkpoint ({type(schedule).__name__})"

    def take(self, names: Iterable[str]) -> None:
        """Replace hyperparameters of the checkpoint."""
        if self._hook is not None:  # It holds for one resumption.
            self._hook.remove()
        begins = any(scheduler.last_epoch == 0 for scheduler in self.schedulers)
        for built, loaded in zip(self.groups, self.optimizer.param_groups):
            for name in names:
                if name == "lr":
                    old, new, position = _value(loaded, "lr"), _value(built, "lr"), loaded["lr"]
                    loaded["lr"] = built["lr"] if begins or not old else position * (new / old)
                    loaded.update({key: built[key] for key in ("initial_lr", "max_lr", "min_lr") if key in built})
                elif name == "betas" and _is_cycled(loaded):
                    loaded["betas"] = (loaded["betas"][0], *built["betas"][1:])
                elif name in built and not (name == "momentum" and _is_cycled(loaded)):
                    loaded[name] = built[name]
            # Most schedules note it down, but not ReduceLROnPlateau. From here it goes into checkpoints.
            if "lr" in loaded:
                loaded.setdefault("initial_lr", built.get("initial_lr", loaded["lr"]))
        for schedule, state in self.schedules:
            taken = {"base_lrs", "max_lrs"} if "lr" in names else set()
            for name in set(names) & _arguments(schedule, state).keys():
                taken |= {name, f"_{name}", *_TIMETABLE}
            vars(schedule).update({key: state[key] for key in taken & state.keys()})
            if "lr" in names:
                schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def _value(group: dict[str, Any], name: str) -> Any:
    """A hyperparameter without what a schedule makes of it."""
    if name == "lr":
        return group.get("initial_lr", group["lr"])
    value: Any = group.get(name)
    if name in ("betas", "momentum") and _is_cycled(group):
        value = value[1:] if name == "betas" else None
    return list(value) if isinstance(value, tuple) else value


def _is_cycled(group: dict[str, Any]) -> bool:
    """Whether OneCycleLR or CyclicLR moves the momentum, the first of the betas."""
    return "max_momentum" in group


#: What OneCycleLR and CyclicLR make of their arguments.
_TIMETABLE = ("total_steps", "_schedule_phases", "_anneal_func_type", "total_size", "step_ratio")


def _state(schedule: Any) -> dict[str, Any]:
    """A copy of what a schedule is made of, without the optimizer, functions and other schedules."""
    plain = (bool, int, float, str, list, dict)
    return {
        key: copy.copy(value)
        for key, value in vars(schedule).items()
        if isinstance(value, plain) and key not in ("_schedulers", "lr_lambdas")
    }


def _arguments(schedule: Any, state: dict[str, Any]) -> dict[str, Any]:
    """A schedule's own arguments by name, as far as its state tells them."""
    names = [name for name in inspect.signature(type(schedule)).parameters if name != "last_epoch"]
    arguments = {name: state[key] for name in names for key in (name, f"_{name}") if key in state}
    if phases := state.get("_schedule_phases"):
        arguments["pct_start"] = round((phases[0]["end_step"] + 1) / state["total_steps"], 9)
        arguments["three_phase"] = len(phases) == 3
        arguments["anneal_strategy"] = state["_anneal_func_type"]
    if "total_size" in state:
        arguments["step_size_up"] = round(state["total_size"] * state["step_ratio"])
        arguments["step_size_down"] = round(state["total_size"] * (1 - state["step_ratio"]))
    return {name: sorted(x) if isinstance(x, dict) else x for name, x in arguments.items()}


def _with_parts(scheduler: Any) -> Iterator[Any]:
    """A scheduler and those that it is made of, as SequentialLR is."""
    yield scheduler
    for part in getattr(scheduler, "_schedulers", ()):
        yield from _with_parts(part)
