"""From names and settings to the optimizer and the schedule that Lightning asks for.

Everything here runs when Lightning calls ``configure_optimizers``: after ``configure_model``, after the
precision plugin has replaced modules, and with names and modules in view. :func:`configure_optimizers` is one
line inside an existing LightningModule, :class:`OptimizerMixin` is that line as a base class, and
:class:`lightning_optim.callbacks.OptimizerSwap` does the same to a LightningModule that cannot be edited.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.optimizer import _default_to_fused_or_foreach

from . import registry, schedules
from .engine.checkpoint import matched
from .engine.optimizer import RuleOptimizer
from .engine.rule import GroupRule
from .engine.two_rules import MatrixOptimizer
from .processes import placements, strategies
from .routing import Route, clean_name, route, routing_table

__all__ = [
    "Grouping",
    "OptimizerConfig",
    "OptimizerMixin",
    "SchedulerConfig",
    "build_optimizer",
    "configure_optimizers",
]


# --- settings -----------------------------------------------------------------------------------------------


@dataclass
class OptimizerConfig:
    """Which optimizer, with which arguments."""

    name: str = "MVNGrad"
    """Name of an optimizer of this library, SGD, Adam, AdamW, or the dotted path of any torch optimizer."""

    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the optimizer, without `params`."""


@dataclass
class SchedulerConfig:
    """Which learning-rate schedule, with which arguments."""

    name: str
    """Name of a schedule of this library or of torch, or the dotted path of any torch scheduler."""

    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the schedule, without `optimizer`. A missing `total_steps` comes from the Trainer."""

    interval: Literal["step", "epoch"] | None = None
    """When the schedule advances. Default: every step, and ReduceLROnPlateau every epoch."""

    monitor: str | None = None
    """The logged metric that ReduceLROnPlateau watches."""

    def __post_init__(self) -> None:
        if self.interval not in (None, "step", "epoch"):
            raise ValueError(f"lr_scheduler.interval must be 'step' or 'epoch', got {self.interval!r}")


#: Kinds of parameter in :func:`lightning_optim.routing.route` that can go without weight decay.
Kind: TypeAlias = Literal["norm", "bias", "vector", "embedding", "positional", "token", "head"]


@dataclass
class Grouping:
    """Which parameters get other hyperparameters than the rest.

    Patterns are shell-style and match whole parameter names, such as `model.blocks.0.*` or `*.bias`. Where
    several patterns of one setting match a name, the first wins. A pattern that applies to nothing is an
    error.
    """

    no_decay: list[Kind] = field(default_factory=lambda: ["norm", "bias", "vector", "embedding", "positional", "token"])
    """Kinds of parameter, as in the routing table, without weight decay. `embedding` includes tied ones."""

    lr_multipliers: dict[str, float] = field(default_factory=dict)
    """For each pattern, a factor of the learning rate."""

    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    """For each pattern, hyperparameters in place of the optimizer's: `{"*.scale": {"weight_decay": 0.0}}`."""

    layer_decay: float | None = None
    """Factor of the learning rate from each layer of a timm model to the layer below it, in (0, 1]."""

    matrix: list[str] = field(default_factory=list)
    """Patterns of parameters that an optimizer with a matrix rule must treat as hidden matrices."""

    fallback: list[str] = field(default_factory=list)
    """Patterns of parameters that an optimizer with a matrix rule must leave to its fallback rule."""

    def __post_init__(self) -> None:
        for kind in self.no_decay:
            if kind not in get_args(Kind):
                raise ValueError(f"grouping.no_decay: {kind!r} is not one of {', '.join(get_args(Kind))}")
        for pattern, factor in self.lr_multipliers.items():
            if not 0.0 <= factor < math.inf:
                raise ValueError(f"grouping.lr_multipliers[{pattern!r}] must be a number >= 0, got {factor}")
        if self.layer_decay is not None and not 0.0 < self.layer_decay <= 1.0:
            raise ValueError(f"grouping.layer_decay must be in (0, 1], got {self.layer_decay}")


OptimizerLike: TypeAlias = OptimizerConfig | str | Mapping[str, Any]
SchedulerLike: TypeAlias = SchedulerConfig | str | Mapping[str, Any]
GroupingLike: TypeAlias = Grouping | Mapping[str, Any]

_Config = TypeVar("_Config", OptimizerConfig, SchedulerConfig)


def _config(cls: type[_Config], flag: str, value: _Config | str | Mapping[str, Any]) -> _Config:
    """A configuration from itself, a name, its fields, or LightningCLI's ``{class_path, init_args}``."""
    if isinstance(value, str):
        return cls(name=value)
    if not isinstance(value, Mapping):
        return value
    given = _given(cls, flag, value, {"class_path": "name", "init_args": "args"})
    if "name" not in given:
        raise ValueError(f"{flag}={dict(value)} names no class: add 'name' or 'class_path'.")
    return cls(**given)


def _grouping(value: GroupingLike | None) -> Grouping:
    """A grouping from itself or its fields."""
    if isinstance(value, Mapping):
        return Grouping(**_given(Grouping, "grouping", value, {}))
    return value or Grouping()


def _given(cls: type[Any], flag: str, value: Mapping[str, Any], synonyms: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a configuration that a mapping sets."""
    settings = {synonyms.get(key, key): setting for key, setting in value.items()}
    known = {f.name for f in fields(cls)}
    for key in settings:
        if key not in known:
            raise ValueError(f"{flag} has no setting {key!r}. {_hint(key, known | synonyms.keys())}")
    return {key: setting for key, setting in settings.items() if setting is not None}  # An empty line of YAML is None.


# --- the optimizer ------------------------------------------------------------------------------------------


def build_optimizer(
    module: nn.Module, optimizer: OptimizerLike = "MVNGrad", grouping: GroupingLike | None = None
) -> Optimizer:
    """Build an optimizer for the trainable parameters of a module.

    Each trainable parameter goes to exactly one group. Groups have readable, unique names, which Lightning's
    ``LearningRateMonitor`` logs, and an order that depends on the module and the settings alone. Optimizers
    with a matrix rule get the groups that :func:`lightning_optim.routing.route` finds in the module. ``SGD``,
    ``Adam`` and ``AdamW`` are torch's, with fused kernels where torch has them, but not at mixed precision, where
    Lightning refuses to clip the gradients of fused optimizers. HVAdam takes its inner products over one group:
    ``Grouping(no_decay=[])`` keeps all parameters in one when there is weight decay.

    The optimizer is told how the Trainer's strategy spreads parameters over processes: under DDP those of a node share
    the work of orthogonalisation.

    Args:
        module: The module to train, usually a LightningModule.
        optimizer: A name, an :class:`OptimizerConfig`, or a mapping with the keys ``name`` and ``args``, or
            ``class_path`` and ``init_args``. Bare names are those of :data:`lightning_optim.OPTIMIZERS`; a
            dotted path may name any torch optimizer.
        grouping: Hyperparameters by kind, name and layer of the parameters, a :class:`Grouping` or a mapping of its
            fields. By default norms, biases, other vectors, embeddings, positional parameters and tokens get no
            weight decay.

    Returns:
        The optimizer.

    Raises:
        ValueError: A name or an argument is unknown, a pattern applies to nothing, the module has no
            trainable parameter, ``layer_decay`` is set and there is no timm model, or an optimizer with a matrix
            rule is to train flattened parameters (FSDPStrategy, DeepSpeedStrategy).

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 4))
        >>> muon = OptimizerConfig("Muon", {"lr": 0.02, "fallback_lr": 0.001})
        >>> for group in build_optimizer(net, muon, Grouping(lr_multipliers={"3.*": 0.5})).param_groups:
        ...     print(group["name"], group["lr"], group["weight_decay"], group["param_names"])
        matrix 0.02 0.0 ['0.weight', '2.weight']
        fallback/no_decay 0.001 0.0 ['0.bias', '1.weight', '1.bias', '2.bias']
        fallback/3.* 0.0005 0.01 ['3.weight']
        fallback/3.*/no_decay 0.0005 0.0 ['3.bias']
    """
    config = _config(OptimizerConfig, "optimizer", optimizer)
    cls = optimizer_class(config.name)
    trainable: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(f"{type(module).__name__} has no trainable parameter: it is empty or frozen.")
    args = dict(config.args)
    if cls in (SGD, Adam, AdamW) and args.get("fused") is None and args.get("foreach") is None:
        fused, _ = _default_to_fused_or_foreach(trainable, args.get("differentiable", False), use_fused=True)
        # Otherwise None, with which torch chooses between the other two.
        # torch's fused SGD does not know sharded parameters.
        unknown = cls is SGD and any(placements(p) is not None for p in trainable)
        args["fused"] = True if fused and not unknown and not _is_mixed_precision(module) else None

    def construct(groups: list[dict[str, Any]]) -> Optimizer:
        return _construct(f"optimizer {config.name}", cls, groups, args)

    process_groups = _process_groups(module, cls)
    built = construct(_groups(module, _grouping(grouping), issubclass(cls, MatrixOptimizer), construct))
    if isinstance(built, RuleOptimizer):
        built.process_group, built.work_group, built.shard_group = process_groups
    else:  # The others check themselves what they load.
        built.register_load_state_dict_pre_hook(matched)
    if isinstance(built, MatrixOptimizer) and not any(group["role"] == "matrix" for group in built.param_groups):
        rank_zero_warn(
            f"{cls.__name__} gets no matrix of {type(module).__name__}: its fallback rule, "
            f"{built.param_groups[0]['rule']}, trains all parameters. grouping.matrix names those that are to count as "
            "hidden matrices; routing_table(route(module).values()) of lightning_optim.routing says what each is."
        )
    return built


def _process_groups(module: nn.Module, cls: type[Optimizer]) -> strategies.OptimizerGroups:
    """The process groups of the Trainer's strategy.

    Raises:
        ValueError: The optimizer has a matrix rule, and the strategy leaves no matrices; or it adds up over all
            parameters, and the strategy does not say over which ranks.
    """
    trainer = _trainer(module)
    if trainer is None:
        return strategies.OptimizerGroups()
    strategy = trainer.strategy
    if issubclass(cls, MatrixOptimizer) and strategies.flattens_parameters(strategy):
        raise ValueError(
            f"{cls.__name__} needs whole matrices, and {type(strategy).__name__} shards flattened parameters: use "
            "ModelParallelStrategy (FSDP2), DDPStrategy, or an optimizer with an element-wise rule."
        )
    if strategies.is_deepspeed(strategy):
        _check_deepspeed(strategy, cls)
    return strategies.optimizer_groups(strategy, trainer.num_devices)


def _check_deepspeed(strategy: Any, cls: type[Optimizer]) -> None:
    """Without ZeRO every rank may have all parameters, whose sums would be added up as if they were parts."""
    if not issubclass(cls, GroupRule):
        return
    if ((strategy.config or {}).get("zero_optimization") or {}).get("stage", 0) == 0:
        raise ValueError(
            f"{cls.__name__} needs inner products over all parameters, and DeepSpeed's stage 0 does not say which "
            "process has what: use stage 1 or 2, or DDPStrategy."
        )


def optimizer_class(name: str) -> type[Optimizer]:
    """The optimizer of a name in :data:`lightning_optim.OPTIMIZERS`, or of an import path.

    Raises:
        ValueError: There is none.

    >>> optimizer_class("NAMO") is optimizer_class("lightning_optim.NAMO")
    True
    """
    return _import("optimizer", name, Optimizer) if "." in name else registry.get(name).cls


def _is_mixed_precision(module: nn.Module) -> bool:
    trainer = _trainer(module)
    return trainer is not None and hasattr(trainer.precision_plugin, "scaler")


def _groups(
    module: nn.Module,
    grouping: Grouping,
    routed: bool,
    construct: Callable[[list[dict[str, Any]]], Optimizer],
) -> list[dict[str, Any]]:
    """Parameter groups, in the order in which the module holds the first parameter of each.

    Args:
        routed: Whether the optimizer has a matrix rule and a fallback rule.
        construct: Makes the optimizer from groups.
    """
    routes = route(module, grouping.matrix, grouping.fallback)
    multipliers = _first_match("lr_multipliers", grouping.lr_multipliers, routes)
    overrides = _first_match("overrides", grouping.overrides, routes)
    layer_decay = grouping.layer_decay or 1.0
    depths = _layers_below_the_top(module) if grouping.layer_decay else {}
    parameters = dict(module.named_parameters())

    def role_of(r: Route) -> str:
        return r.role if routed else "params"

    def structure(r: Route) -> dict[str, Any]:
        return {"role": r.role, "blocks": r.blocks, "transposed": r.transposed} if routed else {}

    def named(r: Route) -> tuple[str, nn.Parameter]:
        return clean_name(r.name), parameters[r.name]

    # An optimizer for one parameter of each role tells the hyperparameters that each role starts from.
    samples: dict[str, dict[str, Any]] = {}
    for r in routes.values():
        samples.setdefault(role_of(r), {"params": [named(r)], **structure(r)})
    defaults = dict(zip(samples, construct(list(samples.values())).param_groups))

    groups: dict[str, dict[str, Any]] = {}
    for r in routes.values():
        base = defaults[role_of(r)]
        settings: dict[str, Any] = {}
        factor = 1.0
        labels = [role_of(r)]
        if routed and r.blocks > 1:
            labels.append(f"blocks{r.blocks}")
        if routed and r.transposed:
            labels.append("transposed")
        if depth := depths.get(r.name):
            labels.append(f"layer-{depth}")
            factor *= layer_decay**depth
        if pattern := multipliers.get(r.name):
            labels.append(pattern)
            factor *= grouping.lr_multipliers[pattern]
        if pattern := overrides.get(r.name):
            labels.append(pattern)
            _check_override(pattern, grouping.overrides[pattern], r, base)
            settings |= grouping.overrides[pattern]
        exempt = r.kind.removeprefix("tied ") in grouping.no_decay
        if exempt and base.get("weight_decay") and "weight_decay" not in settings:
            labels.append("no_decay")
            settings["weight_decay"] = 0.0
        if factor != 1.0:
            settings["lr"] = settings.get("lr", base["lr"]) * factor
        name = "/".join(dict.fromkeys(labels))
        group = groups.setdefault(name, {"params": [], "name": name, **structure(r), **settings})
        group["params"].append(named(r))
    return list(groups.values())


def _check_override(pattern: str, override: Iterable[str], r: Route, base: Mapping[str, Any]) -> None:
    known = base.keys() - {"params", "param_names", "name", "rule", "role", "blocks", "transposed"}
    for key in override:
        if key not in known:
            raise ValueError(
                f"grouping.overrides[{pattern!r}]: {clean_name(r.name)!r} has no hyperparameter {key!r}. "
                + _hint(key, known)
            )


def _first_match(flag: str, patterns: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """The first pattern that matches each name, where one does."""
    matches = {}
    for name in names:
        spellings = (name, clean_name(name))
        pattern = next((p for p in patterns if any(fnmatchcase(s, p) for s in spellings)), None)
        if pattern is not None:
            matches[name] = pattern
    for pattern in patterns:
        if pattern not in matches.values():
            raise ValueError(
                f"grouping.{flag}: the pattern {pattern!r} gets no trainable parameter (first match wins). "
                f"{_hint(pattern, map(clean_name, names))}"
            )
    return matches


def _layers_below_the_top(module: nn.Module) -> dict[str, int]:
    """For each parameter of a timm model, how many of the model's layers lie above it."""
    from timm.models import group_parameters  # here, because it imports every model of timm

    depths: dict[str, int] = {}
    for prefix, model in module.named_modules():
        # By type: a compiled model passes on the attributes of the model in it but renames its parameters.
        if hasattr(type(model), "group_matcher"):
            layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
            for name, layer in layers.items():
                depths.setdefault(f"{prefix}.{name}".removeprefix("."), max(layers.values()) - layer)
    if not depths:
        raise ValueError(
            f"grouping.layer_decay needs a timm model, and {type(module).__name__} has none: leave it out or "
            "set grouping.lr_multipliers by name."
        )
    return depths


# --- the schedule -------------------------------------------------------------------------------------------

# What fast_dev_run runs are the first steps of a run of unknown length.
_FAST_DEV_RUN_LENGTH = 1_000_000


def configure_optimizers(
    module: nn.Module,
    optimizer: OptimizerLike = "MVNGrad",
    scheduler: SchedulerLike | None = None,
    grouping: GroupingLike | None = None,
    total_steps: int | None = None,
) -> dict[str, Any]:
    """Build an optimizer and a learning-rate schedule, in the form that Lightning wants.

    With an optimizer that has a matrix rule, the routing table goes to TensorBoard as the text
    ``optimizer/routing``.

    Args:
        module: The LightningModule to train.
        optimizer: As for :func:`build_optimizer`.
        scheduler: A name, a :class:`SchedulerConfig`, or a mapping with the keys ``name`` and ``args``, or
            ``class_path`` and ``init_args``. Bare names are those of :mod:`lightning_optim.schedules` and of
            :mod:`torch.optim.lr_scheduler`; a dotted path may name any torch scheduler. Default: none.
        grouping: As for :func:`build_optimizer`.
        total_steps: Length of the run in steps of the schedule, for schedules that take a ``total_steps`` and
            are given none. Default: the Trainer's estimate.

    Returns:
        ``{"optimizer": ..., "lr_scheduler": {"scheduler": ..., "interval": ...}}``, the latter with a
        ``"monitor"`` if it is ReduceLROnPlateau and not at all if there is none.

    Raises:
        ValueError: As for :func:`build_optimizer`; or the schedule needs the length of the run, which is not
            known, or a metric to monitor, which is not named.

    Example:
        >>> schedule = {"name": "WarmupCosine", "args": {"warmup": 0.1}}
        >>> configured = configure_optimizers(nn.Linear(4, 2), "AdamW", schedule, total_steps=100)
        >>> configured["lr_scheduler"]["interval"], configured["lr_scheduler"]["scheduler"].warmup
        ('step', 10)
    """
    built = build_optimizer(module, optimizer, grouping)
    if isinstance(built, MatrixOptimizer):
        _log_routing(module, _grouping(grouping))
    if scheduler is None:
        return {"optimizer": built}
    config = _config(SchedulerConfig, "lr_scheduler", scheduler)
    cls = scheduler_class(config.name)
    on_plateau = issubclass(cls, ReduceLROnPlateau)
    interval = config.interval or ("epoch" if on_plateau else "step")
    args = dict(config.args)
    takes_length = "total_steps" in inspect.signature(cls).parameters
    if takes_length and args.get("total_steps") is None and args.get("steps_per_epoch") is None:
        args["total_steps"] = total_steps or _run_length(module, interval)
    entry: dict[str, Any] = {
        "scheduler": _construct(f"lr_scheduler {config.name}", cls, built, args),
        "interval": interval,
    }
    if on_plateau:
        entry["monitor"] = config.monitor or args.get("monitor")
        if entry["monitor"] is None:
            raise ValueError(f"lr_scheduler {config.name} needs lr_scheduler.monitor, a metric that is logged.")
    return {"optimizer": built, "lr_scheduler": entry}


def scheduler_class(name: str) -> type[LRScheduler]:
    """The schedule of a name in :mod:`lightning_optim.schedules` or ``torch.optim.lr_scheduler``, or of an import path.

    Raises:
        ValueError: There is none.

    >>> scheduler_class("StepLR") is torch.optim.lr_scheduler.StepLR
    True
    """
    if "." in name:
        return _import("lr_scheduler", name, LRScheduler)
    known = {n: getattr(torch.optim.lr_scheduler, n) for n in torch.optim.lr_scheduler.__all__}
    known |= {n: getattr(schedules, n) for n in schedules.__all__}
    if name not in known:
        raise ValueError(f"There is no learning-rate schedule {name!r}. {_hint(name, known)}")
    return known[name]


def _run_length(module: nn.Module, interval: str) -> int | None:
    """The number of steps or epochs that the module's Trainer will make, if it knows."""
    trainer = _trainer(module)
    if trainer is None:
        return None
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return _FAST_DEV_RUN_LENGTH
    length = _number_of_steps(trainer) if interval == "step" else trainer.max_epochs
    # -1 and inf stand for training without end.
    return int(length) if length is not None and 0 < length < math.inf else None


def _number_of_steps(trainer: pl.Trainer) -> int | float:
    """The Trainer's estimate, for which it builds the training data loaders."""
    loop = trainer.fit_loop
    were_built = loop._combined_loader is not None
    length = trainer.estimated_stepping_batches
    if trainer.ckpt_path and not were_built:
        # It gives loaders their place in the epoch from the checkpoint when it builds them, which is to come.
        loop._combined_loader = None
    return length


def _trainer(module: nn.Module) -> pl.Trainer | None:
    try:
        trainer = module.trainer
    except (AttributeError, RuntimeError):  # not a LightningModule, or without a Trainer
        return None
    return trainer if isinstance(trainer, pl.Trainer) else None


def _log_routing(module: nn.Module, grouping: Grouping) -> None:
    trainer = _trainer(module)
    for logger in trainer.loggers if trainer else []:
        if isinstance(logger, TensorBoardLogger):
            table = routing_table(route(module, grouping.matrix, grouping.fallback).values())
            logger.experiment.add_text("optimizer/routing", table)


# --- names and arguments ------------------------------------------------------------------------------------

_T = TypeVar("_T")


def _import(flag: str, path: str, base: type[_T]) -> type[_T]:
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"{flag} {path}: cannot import {module_name} ({error}).") from error
    if not hasattr(module, name):
        known = [n for n, x in vars(module).items() if isinstance(x, type) and issubclass(x, base)]
        hint = f" {_hint(name, known)}" if known else ""
        raise ValueError(f"{flag} {path}: {module_name} has no {name}.{hint}")
    cls = getattr(module, name)
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ValueError(f"{flag} {path} is not a {base.__module__}.{base.__name__}.")
    return cls


def _construct(what: str, cls: Callable[..., _T], first: Any, args: Mapping[str, Any]) -> _T:
    """``cls(first, **args)``; arguments that do not fit raise a ValueError that says what was being built."""
    parameters = inspect.signature(cls).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        known = list(parameters)[1:]
        for name in args:
            if name not in known:
                raise ValueError(f"{what} has no argument {name!r}. {_hint(name, known)}")
    try:
        return cls(first, **args)
    except TypeError as error:
        raise ValueError(f"{what}: {error}.") from error


def _hint(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"Did you mean {', '.join(near)}?" if near else f"Known: {', '.join(known[:20])}."


# --- for LightningModules -----------------------------------------------------------------------------------


class OptimizerMixin:
    """Trains a LightningModule with the optimizer, the schedule and the grouping in its attributes.

    They can be set on the class or on an instance until training starts.

    Example:
        >>> class Classifier(OptimizerMixin, pl.LightningModule):
        ...     optimizer = "NAMO"
        ...     lr_scheduler = {"name": "WarmupCosine", "args": {"warmup": 0.05}}
    """

    optimizer: OptimizerLike = "MVNGrad"
    """What to train with; see :func:`build_optimizer`."""

    lr_scheduler: SchedulerLike | None = None
    """The learning-rate schedule; see :func:`configure_optimizers`."""

    grouping: Grouping | None = None
    """Hyperparameters by kind, name and layer of the parameters."""

    def configure_optimizers(self) -> Any:
        """Called by Lightning when training starts."""
        assert isinstance(self, nn.Module)
        return configure_optimizers(self, self.optimizer, self.lr_scheduler, self.grouping)
