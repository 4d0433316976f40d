"""LightningCLI with optimizers that are built late."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Optional, cast

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from .. import factory
from ..callbacks import Resume
from ..checkpoint_io import SAFE_STRATEGIES, CheckpointError, SafeCheckpointIO, read_checkpoint
from ..data import DataError
from ..engine.hyperparameters import satisfies
from ..engine.optimizer import RuleOptimizer
from ..engine.two_rules import MatrixOptimizer, fallback_hyperparameters, fallbacks
from ..factory import Grouping, OptimizerConfig, OptimizerMixin, SchedulerConfig
from .errors import UsageError, explain_trainer, explained, import_class, missing_package, raised_in
from .invocation import help_for_optimizer
from .outputs import check_folder, explain_os_error
from .parser import OPTIMIZER_TYPES, SCHEDULER_TYPES, OptimArgumentParser, PresetOrFile, forgets_on_change
from .presets import class_path, given
from .tracebacks import root_causes, show_users_code, users_traceback
from .trust import check_hyperparameters, class_paths, names_class


class OptimCLI(LightningCLI):
    """LightningCLI whose optimizer is built when training starts, with names and modules in view.

    The stock LightningCLI builds the optimizer right after the model, from nameless parameters. It does not see what
    ``configure_model`` adds, keeps training parameters that a precision plugin has replaced, and cannot route
    matrices. This class takes the same arguments, can be extended by the same methods, and differs in the following:

    - ``--optimizer NAME`` is any of :data:`lightning_optim.OPTIMIZERS`, before torch's of the same name, or the
      dotted path of any torch optimizer. Another name drops the arguments of the one before.
    - ``--lr_scheduler NAME`` is any of :mod:`lightning_optim.schedules` or of torch, advanced every step unless
      ``--lr_scheduler_interval epoch`` is given.
    - ``--grouping.*`` are the fields of :class:`lightning_optim.Grouping`.
    - Without ``--optimizer``, the model's own ``configure_optimizers`` is used. With it, the model's own still says
      which parameters are trained, how the learning rates of its groups compare, and, without ``--lr_scheduler``, what
      course they take; see :class:`~lightning_optim.callbacks.OptimizerSwap`.
    - What a project registers with ``add_optimizer_args`` and ``add_lr_scheduler_args`` is used as by LightningCLI: one
      parameter group, a schedule that advances every epoch.
    - ``-c`` also takes the name of a preset: ``-c namo``.
    - Wrong input ends in one message with exit status 2.
    - ``--resume.override`` names the hyperparameters that a resumed run takes from the command line, and a warning
      says where the two differ otherwise; see :class:`~lightning_optim.callbacks.Resume`.
    - ``--model.ARGUMENT`` holds before the checkpoint's value, which Lightning (from 2.6) takes instead.
    - Local checkpoints are written and read by :class:`~lightning_optim.checkpoint_io.SafeCheckpointIO`.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> cli = OptimCLI(BoringModel, run=False, args=["--optimizer", "NAMO", "--optimizer.lr", "0.02"])
        >>> type(cli.model.configure_optimizers()["optimizer"]).__name__
        'NAMO'
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("args") is None:  # the program's own, and not those of a call from Python
            show_users_code()
        try:
            super().__init__(*args, **kwargs)
        except (UsageError, DataError) as error:
            self.parser.error(str(error), error)
        except Exception as error:
            message = self._explanation(error)
            if message is None or users_traceback(error) is not None:
                raise
            self.parser.error(message, error)

    def _explanation(self, error: Exception) -> str | None:
        """What Lightning, or a checkpoint, says is wrong with the arguments; ``None`` if it is something else."""
        if isinstance(error, MisconfigurationException):
            return None if isinstance(error, ProjectError) else str(error)
        if isinstance(error, ValueError) and not isinstance(error, CheckpointError) and "config" in vars(self):
            given = self._given_to_the_trainer()
            named = any(re.search(rf"\b{name}\b", str(error)) for name in given)
            return explain_trainer(str(error), given) if named and raised_in(error) == "lightning" else None
        if isinstance(error, ImportError):
            return missing_package(error, "--trainer")
        if isinstance(error, OSError):
            return explain_os_error(error, "--trainer.default_root_dir")
        if "config" not in vars(self):  # The arguments are not parsed yet.
            return None
        checkpoint = f"--ckpt_path {self._get(self.config, 'ckpt_path')}"
        if isinstance(error, CheckpointError):
            return f"{checkpoint}: {error}"
        if isinstance(error, KeyError) and "contains only the model" in str(error):
            return (
                f"{checkpoint} holds the model alone (save_weights_only), with which training cannot go on. Use "
                "another checkpoint."
            )
        if isinstance(error, RuntimeError) and "loading state_dict" in str(error):
            reasons = [line.strip(" \t.")[:300] for line in str(error).splitlines()[1:]]
            more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
            return (
                f"{checkpoint} is of another model: {'; '.join(reasons[:3])}{more}. Give --model and its arguments as "
                "in the run that wrote it."
            )
        return None

    # --- arguments --------------------------------------------------------------------------------------------------

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        if issubclass(OptimArgumentParser, self.parser_class):
            self.parser_class = OptimArgumentParser
        elif not issubclass(self.parser_class, OptimArgumentParser):  # a class of the project's own
            both = type(self.parser_class.__name__, (self.parser_class, OptimArgumentParser), {})
            self.parser_class = cast("type[LightningArgumentParser]", both)
        kwargs.setdefault("dump_header", [f"lightning.pytorch=={pl.__version__}"])
        parser = self.parser_class(**kwargs)
        what = "Name of a preset (`lightning-optim list --presets`), path of a YAML file, or YAML; may be repeated."
        parser.add_argument("-c", "--config", action=PresetOrFile, help=what)
        return parser

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_default_arguments_to_parser(parser)
        parser.add_lightning_class_args(Resume, "resume")
        if self.auto_configure_optimizers:
            parser.add_argument(
                "--lr_scheduler_interval",
                type=Optional[Literal["step", "epoch"]],  # noqa: UP045
                help="When the schedule advances. Default: every step, and ReduceLROnPlateau every epoch.",
            )
            parser.add_argument("--grouping", type=Grouping, default=Grouping())

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        self._args = [] if isinstance(args, (dict, Namespace)) else sys.argv[1:] if args is None else list(args)
        if shown := help_for_optimizer(self._args):
            print(shown)
            sys.exit()
        for each in (parser, *getattr(self, "_subcommand_parsers", {}).values()):
            each.arguments = self._args
        with forgets_on_change():
            super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        # Lightning 2.6 puts the checkpoint's hyperparameters of the model in place of all others. Here flags hold.
        subcommand = self.config.get("subcommand")
        if subcommand is None:
            return
        before = self.config.clone()
        path, ours = before[subcommand].get("ckpt_path"), class_path(before[subcommand].get("model"))
        if path and Path(path).is_file():
            hyperparameters = read_checkpoint(path, mmap=True).get("hyper_parameters")
            if not isinstance(hyperparameters, Mapping):
                return
            saved = hyperparameters.get("_class_path")
            if ours and any(given(self._args, "--model")) and saved and not names_class(saved, import_class(ours)):
                return  # A model that is named on purpose takes the weights alone.
            check_hyperparameters(path, hyperparameters, [before[subcommand].get("model"), *self._model_classes()])
        super()._parse_ckpt_path()
        saved = class_path(self.config[subcommand].get("model"))
        if ours and saved and import_class(ours) is not import_class(saved):
            raise UsageError(
                f"--ckpt_path {path} is of another model: {saved}, not {ours}. Leave -c out to go on with a run, or "
                "give the -c that belongs to it."
            )
        for arg in self._args:
            option = re.match(r"--model\.(?:init_args\.|dict_kwargs\.)?(\w+)", arg)
            for prefix in ("", "init_args.", "dict_kwargs."):
                key = f"{subcommand}.model.{prefix}{option[1]}" if option else ""
                if key and key in before:
                    self.config[key] = before[key]

    # --- model, optimizer, Trainer ----------------------------------------------------------------------------------

    def _model_classes(self) -> list[str]:
        """The class of the model where the program and not the command line names it."""
        cls = self.model_class
        return [f"{cls.__module__}.{cls.__qualname__}"] if isinstance(cls, type) else []

    def instantiate_classes(self) -> None:
        self._choose_safe_strategy()
        self._check_trainer()
        try:
            with explained():
                super().instantiate_classes()
        except ValueError as error:  # of jsonargparse, for what a class has raised
            for cause in root_causes(error):
                if users_traceback(cause) is not None:
                    break
                if isinstance(cause, ImportError):
                    raise UsageError(missing_package(cause, self._option_of(str(error)))) from error
            raise

    def _check_trainer(self) -> None:
        """Refuse what Lightning takes and what cannot work: a folder that cannot be written to, no batch in a step."""
        trainer = self._get(self.config, "trainer", default=Namespace())
        root = trainer.get("default_root_dir")
        writes = trainer.get("logger") is not False or trainer.get("enable_checkpointing") is not False
        if self.subcommand == "fit" and root and writes and not trainer.get("fast_dev_run"):
            check_folder("--trainer.default_root_dir", root)
        if (batches := trainer.get("accumulate_grad_batches", 1)) < 1:
            raise UsageError(
                f"--trainer.accumulate_grad_batches {batches}: give the number of batches of a step, from 1 on."
            )

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, TypeError, ValueError, RuntimeError, ImportError) as error:
            if users_traceback(error) is not None:
                raise
            message = missing_package(error, "it") if isinstance(error, ImportError) else str(error)
            raise UsageError(explain_trainer(message, self._given_to_the_trainer())) from error
        strategy = trainer.strategy
        if type(strategy.checkpoint_io) is TorchCheckpointIO:  # and not one that the user has chosen
            strategy.checkpoint_io = SafeCheckpointIO()
        return trainer

    def _option_of(self, message: str) -> str:
        """The option whose class a message of jsonargparse is about, and that class."""
        found = re.search(r"given class_path '([\w.]+)'|class_path='([\w.]+)'", message)
        path = (found[1] or found[2]) if found else ""
        settings = self._get(self.config, "trainer", default=Namespace())
        places = {name: list(class_paths(_plain(value))) for name, value in vars(settings).items()}
        option = next((f"--trainer.{name}" for name, paths in places.items() if path in paths), "")
        return f"{option} {path.rpartition('.')[2]}".strip()

    def _given_to_the_trainer(self) -> dict[str, Any]:
        """Arguments of the Trainer that are not its defaults."""
        settings = self._get(self.config, "trainer", default=Namespace())
        parameters = inspect.signature(pl.Trainer).parameters
        return {k: v for k, v in vars(settings).items() if k in parameters and v != parameters[k].default}

    def _choose_safe_strategy(self) -> None:
        """Name this library's strategies in place of those of Lightning that read checkpoints unchecked."""
        trainer = self._get(self.config, "trainer", default=Namespace())
        strategy = trainer.get("strategy")
        if isinstance(strategy, str) and strategy in StrategyRegistry:
            known = StrategyRegistry[strategy]
            cls, args = known["strategy"], Namespace(known["init_params"])
        elif not isinstance(strategy, Namespace):
            return
        else:
            cls, args = import_class(strategy.class_path), strategy.get("init_args", Namespace())
        if safe := SAFE_STRATEGIES.get(cls):
            trainer.strategy = Namespace(class_path=f"{safe.__module__}.{safe.__name__}", init_args=args)

    def _add_configure_optimizers_method_to_model(self, subcommand: str | None) -> None:
        """Give the model a ``configure_optimizers`` that builds what the arguments say when Lightning calls it."""
        if not self.auto_configure_optimizers:
            return
        parser = self._parser(subcommand)
        optimizer_key, types = _automatic(parser._optimizers)
        scheduler_key, scheduler_types = _automatic(parser._lr_schedulers)
        if not optimizer_key:
            return
        optimizer = self._spec(optimizer_key, types, OptimizerConfig)
        scheduler = self._spec(scheduler_key, scheduler_types, SchedulerConfig)
        chosen = self._get(self.config_init, "grouping")
        grouping = chosen if chosen != Grouping() else None
        interval = self._get(self.config, "lr_scheduler_interval")
        if scheduler is not None:
            scheduler.interval = interval
        if optimizer is not None:
            check_arguments(optimizer)
        model = self.model
        is_stock = types is OPTIMIZER_TYPES and self.configure_optimizers is LightningCLI.configure_optimizers
        if isinstance(model, OptimizerMixin):
            model.optimizer = optimizer or model.optimizer
            model.lr_scheduler = scheduler or model.lr_scheduler
            model.grouping = grouping or model.grouping
            configure: Callable[[], Any] = model.configure_optimizers
        elif optimizer is not None:
            own = model.configure_optimizers
            # There may be none (a project sets it to None), or a hook of the project's command line decides.
            if not callable(own) or (types is OPTIMIZER_TYPES and not is_stock):
                configure = partial(factory.configure_optimizers, model, optimizer, scheduler, grouping)
            elif types is OPTIMIZER_TYPES:
                configure = partial(
                    factory.replace_optimizers, model, own, optimizer, scheduler, grouping, said_by="--optimizer"
                )
            else:  # As the project has registered it: one group, a schedule of epochs.
                if is_overridden("configure_optimizers", model):
                    rank_zero_warn(
                        f"`{type(model).__name__}.configure_optimizers` will be overridden by "
                        f"`{type(self).__name__}.configure_optimizers`."
                    )
                if scheduler is not None and interval is None and scheduler_types is not SCHEDULER_TYPES:
                    scheduler.interval = "epoch"
                grouping = grouping or Grouping(no_decay=[])
                configure = partial(factory.configure_optimizers, model, optimizer, scheduler, grouping)
        elif scheduler is not None or grouping is not None:
            raise UsageError(
                f"{type(model).__name__} builds its own optimizer, to which --lr_scheduler and --grouping do not "
                "apply: add --optimizer."
            )
        else:
            return
        hook = None if is_stock else self.configure_optimizers
        # Not a function in here, which could not be pickled for processes that Lightning spawns.
        model.configure_optimizers = partial(_configure, model, configure, hook)  # type: ignore[method-assign]

    def _spec(self, key: str | None, types: Any, config_class: type) -> Any:
        """An optimizer's or schedule's configuration from what the parser makes of a class and arguments."""
        value = self._get(self.config, key) if key else None
        if key and not isinstance(types, tuple):  # One class, whose arguments follow the key.
            value = Namespace(class_path=f"{types.__module__}.{types.__name__}", init_args=value or Namespace())
        if not value:
            return None
        parameters = inspect.signature(import_class(value.class_path)).parameters
        args = vars(value.get("init_args") or Namespace())
        # The parser writes every default out. What is not given stays open, for the factory to decide.
        chosen = {name: arg for name, arg in args.items() if name not in parameters or arg != parameters[name].default}
        return config_class(value.class_path, chosen | dict(value.get("dict_kwargs", {})))


def _plain(value: Any) -> Any:
    """Settings as mappings and lists."""
    if isinstance(value, Namespace):
        return {key: _plain(x) for key, x in vars(value).items()}
    return [_plain(x) for x in value] if isinstance(value, (list, tuple)) else value


class ProjectError(MisconfigurationException):
    """A mistake in the code of a project's command line, and not in its arguments."""


def _automatic(registered: dict[str, tuple[Any, str]]) -> tuple[str | None, Any]:
    """The key and types of the one optimizer or schedule that is not linked to an argument of the model."""
    keys = [key for key, (_, link_to) in registered.items() if link_to == "AUTOMATIC"]
    if len(keys) > 1:
        raise ProjectError(
            f"At most one optimizer and one lr_scheduler can be 'AUTOMATIC', but found {keys}. Link them to arguments "
            "of the model with link_to, and use those in its configure_optimizers."
        )
    return (keys[0], registered[keys[0]][0]) if keys else (None, None)


def check_arguments(config: OptimizerConfig) -> None:
    """Check the arguments of an optimizer of this library before data and model are prepared.

    Those of others are checked by their own constructors, when they are built.

    Raises:
        UsageError: An argument is out of range.
    """
    with explained("--optimizer: "):
        cls = factory.optimizer_class(config.name)
        if not issubclass(cls, RuleOptimizer):
            return
        bounds = {name: field.constraint for name, field in {**cls.fields, **cls.arguments}.items()}
        args = dict(config.args)
        if issubclass(cls, MatrixOptimizer):
            fallback = args.get("fallback", cls.arguments["fallback"].default)
            fallback_hyperparameters(fallback, args)
            bounds |= {f"fallback_{name}": field.constraint for name, field in fallbacks()[fallback].fields.items()}
        for name, value in args.items():
            if name in bounds and value is not None and not satisfies(bounds[name], value):
                raise UsageError(
                    f"--optimizer: {cls.__name__}: {name} must be {bounds[name][1]}, got {name}={value!r}."
                )


def _configure(model: pl.LightningModule, configure: Callable[[], Any], hook: Callable[..., Any] | None) -> Any:
    """What the model's ``configure_optimizers`` does.

    Args:
        model: The model.
        configure: Builds the optimizer and the schedule.
        hook: ``configure_optimizers`` of the command line, which gets them, or ``None``.
    """
    with explained("--optimizer: ", by=("lightning_optim", "torch")):
        configured = configure()
    if hook is None or not isinstance(configured, dict):
        return configured
    optimizer, schedule = configured["optimizer"], configured.get("lr_scheduler")
    if hook is LightningCLI.configure_optimizers:
        return configured if schedule else optimizer
    scheduler: Any = schedule["scheduler"] if schedule else None
    if schedule and schedule.get("monitor"):
        scheduler.monitor = schedule["monitor"]  # as Lightning's own ReduceLROnPlateau has it
    return hook(model, optimizer=optimizer, lr_scheduler=scheduler)
