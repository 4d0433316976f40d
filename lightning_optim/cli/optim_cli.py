"""LightningCLI with optimizers that are built late."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Optional

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, ReduceLROnPlateau
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from .. import factory, schedules
from ..callbacks import Resume
from ..checkpoint_io import SAFE_STRATEGIES, CheckpointError, SafeCheckpointIO, read_checkpoint
from ..data import DataError
from ..factory import Grouping, OptimizerConfig, OptimizerMixin, SchedulerConfig
from ..registry import OPTIMIZERS
from .errors import UsageError, explained, import_class
from .invocation import help_for_optimizer
from .parser import OptimArgumentParser, PresetOrFile
from .presets import class_path, find_config, given, load_config
from .record import RecordSettings
from .trust import check_hyperparameters

# A bare name is looked up in the first type that has it, so ours come before torch's of the same name.
_OPTIMIZER_TYPES = (*(info.cls for info in OPTIMIZERS.values()), torch.optim.Optimizer)
_SCHEDULER_TYPES = (
    *(getattr(schedules, name) for name in schedules.__all__),
    ReduceLROnPlateau,
    LRScheduler,
)


class OptimCLI(LightningCLI):
    """LightningCLI whose optimizer is built when training starts, with names and modules in view.

    The stock LightningCLI builds the optimizer right after the model, from nameless parameters. It does not see what
    ``configure_model`` adds, keeps training parameters that a precision plugin has replaced, and cannot route
    matrices. This class differs in the following and takes the same arguments:

    - ``--optimizer NAME`` is any of :data:`lightning_optim.OPTIMIZERS`, before torch's of the same name, or the
      dotted path of any torch optimizer. Another name drops the arguments of the one before.
    - ``--lr_scheduler NAME`` is any of :mod:`lightning_optim.schedules` or of torch, advanced every step unless
      ``--lr_scheduler_interval epoch`` is given.
    - ``--grouping.*`` are the fields of :class:`lightning_optim.Grouping`.
    - Without ``--optimizer``, the model's own ``configure_optimizers`` is used. With it, the model's own still says
      which parameters are trained, how the learning rates of its groups compare, and, without ``--lr_scheduler``, what
      course they take; see :class:`~lightning_optim.callbacks.OptimizerSwap`.
    - ``-c`` also takes the name of a preset: ``-c namo``.
    - Wrong input ends in one message with exit status 2.
    - ``--resume.override`` names the hyperparameters that a resumed run takes from the command line, and a warning
      says where the two differ otherwise; see :class:`~lightning_optim.callbacks.Resume`.
    - ``--model.ARGUMENT`` holds before the checkpoint's value, which Lightning (from 2.6) takes instead.
    - Local checkpoints are written and read by :class:`~lightning_optim.checkpoint_io.SafeCheckpointIO`.
    - TensorBoard's hyperparameters hold optimizer, schedule and grouping beside model and data.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> cli = OptimCLI(BoringModel, run=False, args=["--optimizer", "NAMO", "--optimizer.lr", "0.02"])
        >>> type(cli.model.configure_optimizers()["optimizer"]).__name__
        'NAMO'
    """

    def __init__(
        self,
        model_class: type[pl.LightningModule] | Callable[..., pl.LightningModule] | None = None,
        datamodule_class: type[pl.LightningDataModule] | Callable[..., pl.LightningDataModule] | None = None,
        **kwargs: Any,
    ) -> None:
        defaults: dict[str, Any] = {
            "save_config_callback": RecordSettings,
            "auto_configure_optimizers": False,
        }
        try:
            super().__init__(model_class, datamodule_class, **(defaults | kwargs))
        except (UsageError, DataError, MisconfigurationException) as error:
            self.parser.error(str(error), error)
        except CheckpointError as error:
            self.parser.error(f"--ckpt_path {self._get(self.config, 'ckpt_path')}: {error}", error)
        except KeyError as error:
            if "contains only the model" not in str(error):
                raise
            self.parser.error(
                f"--ckpt_path {self._get(self.config, 'ckpt_path')} holds the model alone (save_weights_only), with "
                "which training cannot go on. Use another checkpoint.",
                error,
            )
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            reasons = [line.strip(" \t.")[:300] for line in str(error).splitlines()[1:]]
            more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
            self.parser.error(
                f"--ckpt_path {self._get(self.config, 'ckpt_path')} is of another model: {'; '.join(reasons[:3])}{more}"
                ". Give --model and its arguments as in the run that wrote it.",
                error,
            )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = OptimArgumentParser(**kwargs)
        what = "Name of a preset (`lightning-optim list --presets`) or path of a YAML file; may be repeated."
        parser.add_argument("-c", "--config", action=PresetOrFile, help=what)
        return parser

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_default_arguments_to_parser(parser)
        late: dict[str, Any] = {"as_group": False, "instantiate": False, "fail_untyped": False, "metavar": "NAME"}
        group = parser.add_argument_group("Optimizer and learning-rate schedule")
        group.add_subclass_arguments(
            _OPTIMIZER_TYPES,
            "optimizer",
            skip={"params"},
            help="Name or class path; `lightning-optim list` shows ours. Arguments follow as --optimizer.ARGUMENT.",
            **late,
        )
        group.add_subclass_arguments(
            _SCHEDULER_TYPES,
            "lr_scheduler",
            skip={"optimizer"},
            help="Name or class path. Arguments follow as --lr_scheduler.ARGUMENT; a missing total_steps is found out.",
            **late,
        )
        group.add_argument(
            "--lr_scheduler_interval",
            type=Optional[Literal["step", "epoch"]],  # noqa: UP045
            help="When the schedule advances. Default: every step, and ReduceLROnPlateau every epoch.",
        )
        parser.add_argument("--grouping", type=Grouping, default=Grouping())
        parser.add_lightning_class_args(Resume, "resume")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        self._args: list[str] = []
        if isinstance(args, (dict, Namespace)):
            self.config = parser.parse_object(args)
        else:
            self._args = sys.argv[1:] if args is None else list(args)
            if shown := help_for_optimizer(self._args):
                print(shown)
                sys.exit()
            self.config = parser.parse_args(_forget_on_change(self._args))

    def _parse_ckpt_path(self) -> None:
        # Lightning 2.6 puts the checkpoint's hyperparameters of the model in place of all others. Here flags hold.
        subcommand = self.config.get("subcommand")
        if subcommand is None or any(given(self._args, "--model")):
            return
        before = self.config[subcommand].get("model")
        self._check_ckpt_path(subcommand)
        super()._parse_ckpt_path()
        ours, saved = class_path(before), class_path(self.config[subcommand].get("model"))
        if ours and saved and import_class(ours) is not import_class(saved):
            raise UsageError(
                f"--ckpt_path {self.config[subcommand].ckpt_path} is of another model: {saved}, not {ours}. Leave -c "
                "out to go on with a run, or give the -c that belongs to it."
            )
        for arg in self._args:
            option = re.match(r"--model\.(?:init_args\.)?(\w+)", arg)
            for prefix in ("", "init_args."):
                if option and prefix + option[1] in before:
                    self.config[subcommand].model[prefix + option[1]] = before[prefix + option[1]]

    def _check_ckpt_path(self, subcommand: str) -> None:
        """Refuse hyperparameters of the model that name other code than the settings, before it is imported."""
        path = self.config[subcommand].get("ckpt_path")
        if path and Path(path).is_file():
            saved = read_checkpoint(path, mmap=True).get("hyper_parameters")
            if isinstance(saved, Mapping):
                check_hyperparameters(path, saved, [self.config[subcommand].get("model"), *self._model_classes()])

    def _model_classes(self) -> list[str]:
        """The class of the model where the program and not the command line names it."""
        cls = self.model_class
        return [f"{cls.__module__}.{cls.__qualname__}"] if isinstance(cls, type) else []

    def instantiate_classes(self) -> None:
        self._choose_safe_strategy()
        with explained():
            super().instantiate_classes()
        # RecordSettings logs them, and Lightning stops at names that model and data share.
        self.model._log_hyperparams = False
        if self.datamodule is not None:
            self.datamodule._log_hyperparams = False
        self._configure_late()

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        strategy = trainer.strategy
        if type(strategy.checkpoint_io) is TorchCheckpointIO:  # and not one that the user has chosen
            strategy.checkpoint_io = SafeCheckpointIO()
        return trainer

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

    def _configure_late(self) -> None:
        model = self.model
        optimizer = _spec(self._get(self.config, "optimizer"), OptimizerConfig)
        scheduler = _spec(self._get(self.config, "lr_scheduler"), SchedulerConfig)
        if scheduler is not None:
            scheduler.interval = self._get(self.config, "lr_scheduler_interval")
        grouping = self._get(self.config_init, "grouping")
        if optimizer is not None:
            # Wrong arguments show now and not after the data has been prepared.
            with explained("--optimizer: ", by=("lightning_optim", "torch")):
                factory.build_optimizer(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), optimizer)
        if isinstance(model, OptimizerMixin):
            model.optimizer = optimizer or model.optimizer
            model.lr_scheduler = scheduler or model.lr_scheduler
            model.grouping = grouping if grouping != Grouping() else model.grouping
            configure = model.configure_optimizers
        elif optimizer is not None:
            own, chosen = model.configure_optimizers, grouping if grouping != Grouping() else None
            configure = partial(
                factory.replace_optimizers, model, own, optimizer, scheduler, chosen, said_by="--optimizer"
            )
        elif scheduler is not None or grouping != Grouping():
            raise UsageError(
                f"{type(model).__name__} builds its own optimizer, to which --lr_scheduler and --grouping do not "
                "apply: add --optimizer."
            )
        else:
            return
        # Not a function in here, which could not be pickled for processes that Lightning spawns.
        model.configure_optimizers = partial(_configure_optimizers, configure)  # type: ignore[method-assign]


def _spec(value: Any, config_class: type) -> Any:
    """An :class:`OptimizerConfig` or :class:`SchedulerConfig` from what the parser makes of a class and arguments."""
    if not value:
        return None
    cls = import_class(value.class_path)
    parameters = inspect.signature(cls).parameters
    args = vars(value.get("init_args") or Namespace())
    # The parser writes every default out. What is not given stays open, for the factory to decide.
    given = {name: arg for name, arg in args.items() if name not in parameters or arg != parameters[name].default}
    return config_class(value.class_path, given | value.get("dict_kwargs", {}))


def _configure_optimizers(configure: Callable[[], Any]) -> Any:
    with explained(by=("lightning_optim", "torch")):
        return configure()


def _forget_on_change(args: list[str]) -> list[str]:
    """The arguments, with a reset of optimizer and schedule before each change to another class.

    jsonargparse would hand the new class all settings of the old one that it has too, such as its learning rate.

    Raises:
        UsageError: There is no such class.
    """
    classes = {"optimizer": factory.optimizer_class, "lr_scheduler": factory.scheduler_class}
    completed: list[str] = []
    current: dict[str, type] = {}
    done = 0
    for i, option, value in given(args, "-c", "--config", "--optimizer", "--lr_scheduler"):
        if option in ("-c", "--config"):
            config = load_config(find_config(value))
        else:
            config = {option[2:]: load_config(value) if Path(value).is_file() else yaml.safe_load(value)}
        completed += args[done:i]
        done = i
        for key in config.keys() & classes.keys():
            if path := class_path(config[key]):
                with explained(f"--{key}: "):
                    new = classes[key](path)
                if current.setdefault(key, new) is not new:
                    completed += [f"--{key}", "null"]
                    current[key] = new
    return completed + args[done:]
