"""From names and settings to the optimizer and the schedule that Lightning asks for.

Everything here runs when Lightning calls ``configure_optimizers``: after ``configure_model``, after the
precision plugin has replaced modules, and with names and modules in view. :func:`configure_optimizers` is one
line inside an existing LightningModule, :class:`OptimizerMixin` is that line as a base class, and
:class:`lightning_optim.callbacks.OptimizerSwap` does the same to a LightningModule that cannot be edited.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.optimizer import _default_to_fused_or_foreach

from . import registry, schedules
from .added_groups import AddedGroups
from .engine.checkpoint import matched
from .engine.losses import RunningStatistics
from .engine.optimizer import RuleOptimizer
from .engine.plain_values import plain
from .engine.rule import GroupRule, ModelRule
from .engine.two_rules import MatrixOptimizer
from .group_rates import rates_by_group, scale_rates, watch_groups
from .grouping import Grouping, ParameterSettings, parameter_groups, suggestion
from .modes import attach_modes
from .own_optimizers import FollowingSchedule, OwnOptimizer, own_optimizers
from .peers import check_peer, declared_arguments, entry_of_role
from .processes import local, placements, strategies
from .routing import Route, clean_name, routing_table, shares_line
from .safe_classes import safe_in_checkpoints
from .seen import attach_check
from .trainer import (
    is_default_hook,
    is_lightning,
    run_length,
    trainer_of,
    unfreezes_later,
    validation_interval,
    why_unknown,
)

__all__ = [
    "Grouping",
    "OptimizerConfig",
    "OptimizerMixin",
    "SchedulerConfig",
    "build_optimizer",
    "configure_optimizers",
    "replace_optimizers",
]


# --- settings -----------------------------------------------------------------------------------------------


@safe_in_checkpoints()
@dataclass
class OptimizerConfig:
    """Which optimizer, with which arguments."""

    name: str = "MVNGrad"
    """Name of an optimizer of this library, SGD, Adam, AdamW, or the dotted path of any torch optimizer."""

    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the optimizer, without `params`."""

    def __post_init__(self) -> None:
        self.args = plain(self.args)


@safe_in_checkpoints()
@dataclass
class SchedulerConfig:
    """Which learning-rate schedule, with which arguments."""

    name: str
    """Name of a schedule of this library or of torch, or the dotted path of any torch scheduler."""

    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the schedule, without `optimizer`. A missing `total_steps` comes from the Trainer."""

    interval: Literal["step", "epoch"] | None = None
    """When the schedule advances; by default every step, and every epoch for ReduceLROnPlateau."""

    monitor: str | None = None
    """The logged metric that ReduceLROnPlateau watches."""

    frequency: int | None = None
    """The schedule advances every so many steps (batches of an epoch) or epochs. Default: 1; for ReduceLROnPlateau as
    often as the Trainer validates."""

    strict: bool | None = None
    """Whether it is an error that the monitored metric is not there when the schedule advances. Default: it is."""

    log_name: str | None = None
    """What Lightning's ``LearningRateMonitor`` calls the learning rate; ``name`` in a mapping with a ``class_path``."""

    reduce_on_plateau: bool | None = None
    """Whether the schedule is given the monitored metric. Default: only ReduceLROnPlateau is."""

    def __post_init__(self) -> None:
        self.args, self.frequency = plain(self.args), plain(self.frequency)
        if self.interval not in (None, "step", "epoch"):
            raise ValueError(f"lr_scheduler.interval must be 'step' or 'epoch', got {self.interval!r}")
        if self.frequency is not None and not (isinstance(self.frequency, int) and self.frequency >= 1):
            raise ValueError(f"lr_scheduler.frequency must be a whole number >= 1, got {self.frequency!r}")


OptimizerLike: TypeAlias = OptimizerConfig | str | Mapping[str, Any]
SchedulerLike: TypeAlias = SchedulerConfig | str | Mapping[str, Any]
GroupingLike: TypeAlias = Grouping | Mapping[str, Any]

_Config = TypeVar("_Config", OptimizerConfig, SchedulerConfig)


def config_of(cls: type[_Config], flag: str, value: Any, args: Mapping[str, Any] | None = None) -> _Config:
    """A configuration from itself, a name, its fields, or LightningCLI's ``{class_path, init_args}``.

    Args:
        cls: Class of the configuration.
        flag: What messages call it.
        value: What was given.
        args: Further arguments of the optimizer or the schedule.
    """
    given = value if isinstance(value, cls) else plain(value)
    config = cls(name=given) if isinstance(given, str) else given
    if not isinstance(config, cls):
        if not isinstance(given, dict):
            raise ValueError(
                f"{flag} must be a name such as {'NAMO' if cls is OptimizerConfig else 'WarmupCosine'!r}, a dictionary "
                f"with 'name' and 'args', or {cls.__name__}, got {value!r}."
            )
        given = _given(cls, flag, given, {"class_path": "name", "init_args": "args"})
        if "name" not in given:
            raise ValueError(f"{flag}={given} names no class: add 'name' or 'class_path'.")
        config = cls(**given)
    more = plain(args or {})
    for name in more.keys() & config.args.keys():
        raise ValueError(f"{flag} {config.name}: {name} is given twice, as {config.args[name]!r} and {more[name]!r}.")
    return replace(config, args=config.args | more)


def _grouping(value: GroupingLike | None) -> Grouping:
    """A grouping from itself or its fields."""
    if value is None:
        return Grouping()
    settings = vars(value) if isinstance(value, Grouping) else _given(Grouping, "grouping", plain(value), {})
    return Grouping(**settings)


def _given(cls: type[Any], flag: str, value: Mapping[str, Any], synonyms: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a configuration that a mapping sets."""
    known = {f.name for f in fields(cls)}
    if "class_path" in value and "log_name" in known:
        synonyms = {**synonyms, "name": "log_name"}  # as in Lightning's own dictionary
    settings = {synonyms.get(key, key): setting for key, setting in value.items()}
    for key in settings:
        if key not in known:
            raise ValueError(f"{flag} has no setting {key!r}. {suggestion(key, known | synonyms.keys())}")
    return {key: setting for key, setting in settings.items() if setting is not None}  # An empty line of YAML is None.


# --- the optimizer ------------------------------------------------------------------------------------------


def build_optimizer(
    module: nn.Module,
    optimizer: OptimizerLike = "MVNGrad",
    grouping: GroupingLike | None = None,
    *,
    trainer: Any | None = None,
    **args: Any,
) -> Optimizer:
    """Build an optimizer for the trainable parameters of a module.

    Each trainable parameter goes to exactly one group. Groups have readable, unique names, which Lightning's
    ``LearningRateMonitor`` logs, and an order that depends on the module and the settings alone. Optimizers
    with a matrix rule get the groups that :func:`lightning_optim.routing.route` finds in the module. ``SGD``,
    ``Adam`` and ``AdamW`` are torch's, with fused kernels where torch has them, but not at mixed precision with a loss
    scaler or where gradients are clipped, since Lightning refuses to clip those of fused optimizers there. If you
    write gradients yourself whose memory is laid out otherwise than the parameter's (a transpose, a slice), say
    ``fused=False``: torch's fused kernels on a CPU mix up their elements (torch 2.15). HVAdam takes
    its inner products over one group: ``Grouping(no_decay=[])`` keeps all parameters in one when there is weight decay.

    The optimizer is told which ranks hold equal parameters under the Trainer's strategy: under DDP those of a node
    share the work of orthogonalisation.

    Where groups have several learning rates or weight decays and something outside sets one for all of them, such as a
    loop that writes ``group["lr"]``, a warning says so once. During the search of Lightning's learning-rate finder and
    after it, groups keep their ratios.

    Args:
        module: The module to train, usually a LightningModule.
        optimizer: A name, an :class:`OptimizerConfig`, or a mapping with the keys ``name`` and ``args``, or
            ``class_path`` and ``init_args``. Bare names are those of :data:`lightning_optim.OPTIMIZERS`; a
            dotted path may name any torch optimizer.
        grouping: Hyperparameters by kind, name and layer of the parameters, a :class:`Grouping` or a mapping of its
            fields. By default norms, biases, other vectors, embeddings, positional parameters and tokens get no
            weight decay, nor do parameters that are marked so.
        trainer: The Trainer that trains the module. Default: that of the LightningModule, or for a part of one the
            Trainer that is calling ``configure_optimizers``.
        args: Arguments of the optimizer, as in ``build_optimizer(module, "NAMO", lr=0.01)``.

    Returns:
        The optimizer.

    Raises:
        ValueError: A name or an argument is unknown, a pattern applies to nothing, the module has no
            trainable parameter, ``layer_decay`` is set and there is no timm model, or an optimizer with a matrix
            rule is to train flattened parameters (FSDPStrategy, DeepSpeedStrategy).

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 4))
        >>> grouping = Grouping(lr_multipliers={"3.*": 0.5})
        >>> muon = build_optimizer(net, "Muon", grouping, lr=0.02, fallback_lr=0.001, weight_decay=0.01)
        >>> for group in muon.param_groups:
        ...     print(group["name"], group["lr"], group["weight_decay"], group["param_names"])
        matrix 0.02 0.01 ['0.weight', '2.weight']
        fallback/no_decay 0.001 0.0 ['0.bias', '1.weight', '1.bias', '2.bias']
        fallback/3.* 0.0005 0.01 ['3.weight']
        fallback/3.*/no_decay 0.0005 0.0 ['3.bias']
    """
    config = config_of(OptimizerConfig, "optimizer", optimizer, args)
    return _build(module, config, _grouping(grouping), trainer or trainer_of(module))


def _build(
    module: nn.Module,
    config: OptimizerConfig,
    grouping: Grouping,
    trainer: Any | None,
    own: Mapping[Any, ParameterSettings] | None = None,
) -> Optimizer:
    """Build an optimizer for the trainable parameters, or those of the module's own optimizer."""
    cls = optimizer_class(config.name)
    only = None if own is None else set(own)
    routes = grouping.route(module, only, trained=only)
    if not routes:
        raise ValueError(f"{type(module).__name__} has no trainable parameter: it is empty or frozen.")
    args = dict(config.args)
    if cls in (SGD, Adam, AdamW) and args.get("fused") is None and args.get("foreach") is None:
        trained: list[Tensor] = [p for name, p in nn.Module.named_parameters(module) if name in routes]
        fused, _ = _default_to_fused_or_foreach(trained, args.get("differentiable", False), use_fused=True)
        # Otherwise None, with which torch chooses between the other two.
        # torch's fused SGD does not know sharded parameters.
        unknown = cls is SGD and any(placements(p) is not None for p in trained)
        fused = fused and all(map(_is_dense, trained))
        args["fused"] = True if fused and not unknown and not _may_clip_fused(trainer) else None

    def construct(groups: list[dict[str, Any]]) -> Optimizer:
        return _construct(f"optimizer {config.name}", cls, groups, args)

    def defaults_of(groups: list[dict[str, Any]]) -> Sequence[Mapping[str, Any]]:
        # One that is not ours is built once, and not to ask it: it may add hooks to parameters, or refuse some.
        return (
            construct(groups).param_groups
            if issubclass(cls, RuleOptimizer)
            else [declared_arguments(cls) | args] * len(groups)
        )

    process_groups = _process_groups(trainer, cls)
    ours = issubclass(cls, RuleOptimizer)
    if not ours:
        check_peer(cls, routes.values())
    entry = None if ours else entry_of_role(cls)
    groups = parameter_groups(module, routes, grouping, issubclass(cls, MatrixOptimizer), defaults_of, own, entry)
    if not issubclass(cls, RuleOptimizer) and unfreezes_later(trainer):
        # The callback adds parameters without names, which torch refuses beside parameters with names.
        groups = [group | {"params": [p for _, p in group["params"]]} for group in groups]
    built = construct(groups)
    if isinstance(built, RuleOptimizer):
        built.process_group, built.work_group, built.shard_group = process_groups
        built.check_shard_group()
        built.router = AddedGroups(built, module, grouping)
        if issubclass(cls, ModelRule):
            built.statistics = RunningStatistics(partial(_running_statistics, module))
    else:  # The others check themselves what they load.
        built.register_load_state_dict_pre_hook(matched)
    if isinstance(built, MatrixOptimizer):
        _say_what_rules_get(built, module, list(routes.values()), grouping)
        rules = {group["role"]: group["rule"] for group in built.param_groups}
        rank_zero_info(f"{cls.__name__}: {shares_line(routes.values(), rules)}")
        if trainer is not None and "lr" in args and args.get("fallback_lr") is None:
            rates = {group["role"]: f"{group['lr']:g}" for group in reversed(built.param_groups)}
            if len(rates) == 2:
                rank_zero_info(
                    f"{cls.__name__}: lr={args['lr']:g} is the learning rate of matrices. The fallback rule has its "
                    f"own, {rates['fallback']}; fallback_lr sets it."
                )
    attach_modes(built, trainer)
    attach_check(built, trainer)
    watch_groups(built, trainer)
    return built


def _running_statistics(module: nn.Module) -> list[Tensor]:
    """What the normalisations of a module average over its forward passes."""
    layers = [layer for layer in module.modules() if isinstance(layer, _NormBase)]
    return [x for layer in layers for x in layer.buffers(recurse=False)]


def _say_what_rules_get(built: MatrixOptimizer, module: nn.Module, routes: list[Route], grouping: Grouping) -> None:
    """Warn of an optimizer with a matrix rule that gets no matrix, or may not get those that hold the parameters."""
    rules = {group["role"]: group["rule"] for group in built.param_groups}
    unknown = [r for r in routes if r.role == "fallback" and r.kind == "other" and not _matches(r, grouping.fallback)]
    share = sum(math.prod(r.shape) for r in unknown) / sum(math.prod(r.shape) for r in routes)
    if share > 0.05:
        names = ", ".join(clean_name(r.name) for r in unknown[:3]) + (" ..." if len(unknown) > 3 else "")
        rank_zero_warn(
            f"{type(built).__name__} leaves {share:.0%} of the parameters of {type(module).__name__} to its fallback "
            f"rule, {rules['fallback']}, because their modules do not say whether they are matrices: {len(unknown)} "
            f"tensors of kind 'other' ({names}). grouping.matrix names those that are, grouping.fallback the others."
        )
    if suspects := [r for r in routes if r.kind.endswith("?")]:
        names = ", ".join(clean_name(r.name) for r in suspects[:3])
        rank_zero_warn(
            f"{type(built).__name__} takes {len(suspects)} tensors of {type(module).__name__} for one matrix each that "
            "are called like fused projections, because their modules do not say the sizes of the parts: "
            f"{names}{' ...' if len(suspects) > 3 else ''}. Give the rows of each, as in "
            f"grouping.split={{'{_pattern(suspects[0])}': [64, 32, 32]}}; all rows as one if it is one matrix."
        )
    if "matrix" not in rules and share <= 0.05:
        rank_zero_warn(
            f"{type(built).__name__} gets no matrix of {type(module).__name__}: its fallback rule, "
            f"{rules['fallback']}, trains all parameters. grouping.matrix names those that are to count as "
            "hidden matrices; routing_table(route(module).values()) of lightning_optim.routing says what each is."
        )


def _pattern(r: Route) -> str:
    """A pattern for a route's module wherever it is."""
    *_, module, _ = ("", "", *clean_name(r.name).split("."))
    return f"*.{module}"


def _matches(r: Route, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in (r.name, clean_name(r.name)))


def _process_groups(trainer: Any | None, cls: type[Optimizer]) -> strategies.OptimizerGroups:
    """The process groups of the Trainer's strategy.

    Raises:
        ValueError: The optimizer has a matrix rule, and the strategy leaves no matrices; or it adds up over all
            parameters, and the strategy does not say over which ranks.
    """
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


def _is_dense(p: Tensor) -> bool:
    """Whether a parameter fills its memory without gaps, as a view of every other column does not.

    torch's fused kernels on a CPU go through the memory of a parameter, its gradient and its state side by side (torch
    2.15). Autograd and ``zeros_like`` lay these out as the parameter only if it is dense; else wrong elements meet.
    """
    p = local(p.detach())
    return torch.empty_like(p, device="meta").stride() == p.stride()


def _may_clip_fused(trainer: Any | None) -> bool:
    """Whether Lightning may refuse a fused optimizer: at mixed precision, where something clips its gradients.

    With a loss scaler fused optimizers unscale gradients themselves, so that others would see scaled ones.
    """
    if trainer is None or not hasattr(trainer.precision_plugin, "scaler"):
        return False
    module = trainer.lightning_module
    if module is None:  # A Trainer that has not been given a module yet.
        return True
    # The methods of a module that clips itself call clip_gradients.
    own = not is_default_hook(module.configure_gradient_clipping) or not module.automatic_optimization
    return trainer.precision_plugin.scaler is not None or bool(trainer.gradient_clip_val) or own


# --- the schedule -------------------------------------------------------------------------------------------


def configure_optimizers(
    module: nn.Module,
    optimizer: OptimizerLike = "MVNGrad",
    scheduler: SchedulerLike | None = None,
    grouping: GroupingLike | None = None,
    total_steps: int | None = None,
    *,
    trainer: Any | None = None,
    **args: Any,
) -> dict[str, Any]:
    """Build an optimizer and a learning-rate schedule, in the form that Lightning wants.

    With an optimizer that has a matrix rule, the routing table goes to TensorBoard as the text
    ``optimizer/routing``. Where groups have several learning rates, one ``max_lr``, ``base_lr``, ``min_lr`` or
    ``swa_lr`` in the arguments of a torch schedule is that of the optimizer, and each group has its share of it.

    Args:
        module: The LightningModule to train, or a part of it.
        optimizer: As for :func:`build_optimizer`.
        scheduler: A name, a :class:`SchedulerConfig`, or a mapping with its fields, or with ``class_path`` and
            ``init_args``. Bare names are those of :mod:`lightning_optim.schedules` and of
            :mod:`torch.optim.lr_scheduler`; a dotted path may name any torch scheduler. Default: none.
        grouping: As for :func:`build_optimizer`.
        total_steps: Length of the run in steps of the schedule, for schedules that take a ``total_steps`` and
            are given none. Default: the Trainer's estimate.
        trainer: As for :func:`build_optimizer`.
        args: Arguments of the optimizer, as in ``configure_optimizers(self, "NAMO", lr=0.01)``.

    Returns:
        ``{"optimizer": ..., "lr_scheduler": {"scheduler": ..., "interval": ...}}``, the latter with further keys as
        Lightning defines them, and not at all if there is no schedule.

    Raises:
        ValueError: As for :func:`build_optimizer`; or the schedule needs the length of the run, which is not
            known, or a metric to monitor, which is not named.

    Example:
        >>> schedule = {"name": "WarmupCosine", "args": {"warmup": 0.1}}
        >>> configured = configure_optimizers(nn.Linear(4, 2), "AdamW", schedule, total_steps=100, lr=3e-4)
        >>> configured["lr_scheduler"]["interval"], configured["lr_scheduler"]["scheduler"].warmup
        ('step', 10)
    """
    trainer = trainer or trainer_of(module)
    built = build_optimizer(module, optimizer, grouping, trainer=trainer, **args)
    return _with_schedule(built, module, scheduler, grouping, total_steps, trainer)


def _with_schedule(
    built: Optimizer,
    module: nn.Module,
    scheduler: SchedulerLike | None,
    grouping: GroupingLike | None,
    total_steps: int | None,
    trainer: Any | None,
) -> dict[str, Any]:
    if isinstance(built, MatrixOptimizer):
        _log_routing(module, _grouping(grouping), trainer)
    if scheduler is None:
        return {"optimizer": built}
    config = config_of(SchedulerConfig, "lr_scheduler", scheduler)
    return {"optimizer": built, "lr_scheduler": _schedule(built, module, config, total_steps, trainer)}


def _schedule(
    built: Optimizer, module: nn.Module, config: SchedulerConfig, total_steps: int | None, trainer: Any | None
) -> dict[str, Any]:
    """A schedule as Lightning's dictionary."""
    cls = scheduler_class(config.name)
    args, total_steps = dict(config.args), plain(total_steps)
    entry: dict[str, Any] = {"strict": config.strict, "name": config.log_name}
    entry = {key: value for key, value in entry.items() if value is not None}
    on_plateau = issubclass(cls, ReduceLROnPlateau) if config.reduce_on_plateau is None else config.reduce_on_plateau
    interval = entry["interval"] = config.interval or ("epoch" if on_plateau else "step")
    if monitor := config.monitor or (args.get("monitor") if on_plateau else None):
        entry["monitor"] = monitor
    if on_plateau:
        entry["reduce_on_plateau"] = True
        if monitor is None:
            raise ValueError(f"lr_scheduler {config.name} needs lr_scheduler.monitor, a metric that is logged.")
    frequency = config.frequency or (validation_interval(trainer, interval) if on_plateau and trainer else 1)
    if frequency != 1:
        entry["frequency"] = frequency

    takes_length = "total_steps" in inspect.signature(cls).parameters
    unknown = ""
    if takes_length and args.get("total_steps") is None and args.get("steps_per_epoch") is None:
        length = run_length(trainer, interval) if trainer and not total_steps else None
        args["total_steps"] = total_steps or (None if length is None else max(length // frequency, 1))
        unknown = "" if args["total_steps"] else why_unknown(trainer, module)
    args = rates_by_group(cls, args, built)
    try:
        entry["scheduler"] = _construct(f"lr_scheduler {config.name}", cls, built, args)
    except ValueError as error:
        if not unknown:
            raise
        raise ValueError(f"{error}. {unknown}") from error
    return entry


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
        raise ValueError(f"There is no learning-rate schedule {name!r}. {suggestion(name, known)}")
    return known[name]


def _log_routing(module: nn.Module, grouping: Grouping, trainer: Any | None) -> None:
    for logger in trainer.loggers if trainer else []:
        if is_lightning(logger, "TensorBoardLogger"):
            table = routing_table(grouping.route(module).values())
            logger.experiment.add_text("optimizer/routing", table)


# --- in place of a module's own -----------------------------------------------------------------------------


def replace_optimizers(
    module: nn.Module,
    configure: Callable[[], Any],
    optimizer: OptimizerLike,
    scheduler: SchedulerLike | None = None,
    grouping: GroupingLike | None = None,
    *,
    lr: float | None = None,
    said_by: str = "OptimizerSwap",
) -> Any:
    """Build an optimizer in place of each that a module's own ``configure_optimizers`` returns.

    Kept are which parameters each optimizer trains, the ratios of learning rates and weight decays of its groups, and
    the course of its schedules. The learning rate itself belongs to the module's own rule and is not kept. A line says
    which one is used, and a warning what is lost.

    Args:
        module: The LightningModule.
        configure: Its own ``configure_optimizers``.
        optimizer: As for :func:`build_optimizer`.
        scheduler: As for :func:`configure_optimizers`, in place of the module's own schedules. Default: those.
        grouping: As for :func:`build_optimizer`. Default: the weight decays of the module's own groups, or where it
            does not choose any :class:`Grouping`'s.
        lr: Learning rate that replaces the optimizer's; groups keep their ratios.
        said_by: What messages begin with.

    Returns:
        Optimizers and schedules in the form that Lightning wants.

    Raises:
        ValueError: As for :func:`configure_optimizers`.

    Example:
        >>> net = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 2)})
        >>> own = lambda: torch.optim.AdamW([{"params": net.body.parameters(), "lr": 1e-5},
        ...                                  {"params": net.head.parameters()}], lr=1e-4)
        >>> replaced = replace_optimizers(net, own, {"name": "NAMO", "args": {"lr": 0.02}})
        >>> for group in replaced["optimizer"].param_groups:
        ...     print(group["name"], group["lr"])
        matrix/group-0 0.002
        fallback/group-0/no_decay 0.0001
        fallback/group-1 0.001
        fallback/group-1/no_decay 0.001
    """
    trainer = trainer_of(module)
    config = config_of(OptimizerConfig, "optimizer", optimizer)
    try:
        owns = [] if is_default_hook(configure) else own_optimizers(configure())
    except Exception as error:
        rank_zero_warn(
            f"{said_by}: the configure_optimizers of {type(module).__name__} fails ({type(error).__name__}: {error}), "
            f"so {config.name} trains all trainable parameters, and no schedule of the module is kept."
        )
        owns = []
    if not owns:
        built = _build(module, config, _grouping(grouping), trainer)
        if lr is not None:
            scale_rates(built, lr)
        return _with_schedule(built, module, scheduler, grouping, None, trainer)
    made = [_replace(module, own, config, scheduler, grouping, trainer, lr, said_by) for own in owns]
    optimizers = [built for built, _ in made]
    entries = [entry for _, schedules in made for entry in schedules]
    if len(optimizers) == 1 and len(entries) < 2:
        return {"optimizer": optimizers[0], **({"lr_scheduler": entries[0]} if entries else {})}
    return optimizers, entries


def _replace(
    module: nn.Module,
    own: OwnOptimizer,
    config: OptimizerConfig,
    scheduler: SchedulerLike | None,
    grouping: GroupingLike | None,
    trainer: Any | None,
    lr: float | None,
    said_by: str,
) -> tuple[Optimizer, list[dict[str, Any]]]:
    """An optimizer in place of one of a module's own, and its schedules."""
    settings = own.settings()
    inside = set(module.parameters())
    outside = [p for p in settings if p not in inside]
    if len(outside) == len(settings):
        rank_zero_warn(
            f"{said_by} leaves an {type(own.optimizer).__name__} as it is: its {len(outside)} tensors are not "
            f"parameters of {type(module).__name__}."
        )
        return own.optimizer, own.schedules
    if grouping is None and any(said.decay_factor is not None for said in settings.values()):
        grouping = Grouping(no_decay=[])
    if own.optimizer.defaults.get("maximize"):
        config = replace(config, args={"maximize": True} | config.args)
    built = _build(module, config, _grouping(grouping), trainer, {p: settings[p] for p in settings if p in inside})
    if outside:
        named = [(f"outside.{i}", p) for i, p in enumerate(outside)]
        role = {"role": "fallback"} if isinstance(built, MatrixOptimizer) else {}
        built.add_param_group({"params": named, "name": "outside", **role})
        group = built.param_groups[-1]
        group["lr"] *= settings[outside[0]].lr_factor
    if lr is not None:
        scale_rates(built, lr)

    rates = [f"{group['name']} {group['lr']:g}" for group in built.param_groups]
    trained, trainable = (sum(p.requires_grad for p in params) for params in (settings, module.parameters()))
    kept = [type(entry["scheduler"]).__name__ for entry in own.schedules] if scheduler is None else []
    rank_zero_info(
        f"{said_by}: {type(built).__name__} replaces {type(own.optimizer).__name__} for {trained} of {trainable} "
        f"parameter tensors, with the learning rates {', '.join(rates)}"
        + (f" and the course of {', '.join(kept)}" if kept else "")
        + (
            f". The own learning rate, {max(own.rates()):g}, belongs to another rule and is not used; lr=... sets one."
            if lr is None
            else f". lr={lr:g} is what the learning-rate finder has found."
        )
    )
    if lost := own.lost():
        rank_zero_warn(
            f"{said_by}: {type(built).__name__} does not keep {', '.join(lost)} of the module's own optimizer."
        )
    if isinstance(built, MatrixOptimizer):
        _log_routing(module, _grouping(grouping), trainer)
    if scheduler is not None:
        schedule = config_of(SchedulerConfig, "lr_scheduler", scheduler)
        return built, [_schedule(built, module, schedule, None, trainer)]
    number = {p: i for i, group in enumerate(own.optimizer.param_groups) for p in group["params"]}
    sources = [number[group["params"][0]] for group in built.param_groups]
    automatic = getattr(module, "automatic_optimization", True)
    entries = []
    for entry in own.schedules:
        entry = entry | {"scheduler": FollowingSchedule(built, entry["scheduler"], own, sources)}
        if automatic and isinstance(entry["scheduler"].followed, ReduceLROnPlateau):
            entry.setdefault("reduce_on_plateau", True)
        entries.append(entry)
    return built, entries


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
        hint = f" {suggestion(name, known)}" if known else ""
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
                raise ValueError(f"{what} has no argument {name!r}. {suggestion(name, known)}")
    try:
        return cls(first, **args)
    except TypeError as error:
        raise ValueError(f"{what}: {error}.") from error


# --- for LightningModules -----------------------------------------------------------------------------------


class OptimizerMixin:
    """Trains a LightningModule with the optimizer, the schedule and the grouping in its attributes.

    They can be set on the class or on an instance until training starts.

    Example:
        >>> import lightning.pytorch as pl
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

    lr: float | None = None
    """Learning rate that replaces the one in `optimizer`; groups keep their ratios. Lightning's learning-rate finder
    sets it."""

    def configure_optimizers(self) -> Any:
        """Called by Lightning when training starts."""
        assert isinstance(self, nn.Module)
        trainer = trainer_of(self)
        built = build_optimizer(self, self.optimizer, self.grouping, trainer=trainer)
        if self.lr is not None:
            scale_rates(built, self.lr)
        return _with_schedule(built, self, self.lr_scheduler, self.grouping, None, trainer)
