"""The command line, ``lightning-optim fit|validate|test|predict|list|diagnostics|spike``, and its
parts for other projects.

:class:`OptimCLI` is LightningCLI with optimizer flags that are built when Lightning asks for the optimizer. It takes
the place of LightningCLI in an existing project:

    from lightning_optim.cli import OptimCLI

    OptimCLI(MyModel, MyData)

:func:`main` is that with this library's models, data and presets.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NoReturn, Optional

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import ActionConfigFile, DefaultHelpFormatter, Namespace, set_parsing_settings
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    ReduceLROnPlateau,
    SaveConfigCallback,
)
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from . import factory, schedules
from .callbacks import Diagnostics, RescueCheckpoint, Resume, RNGState
from .checkpoint_io import CheckpointError, SafeCheckpointIO, look_at_checkpoint, make_safe
from .commands import spike
from .data import DataError
from .factory import Grouping, OptimizerConfig, OptimizerMixin, SchedulerConfig
from .models import LanguageModel, VisionClassifier
from .optimizers.registry import OPTIMIZERS

__all__ = ["OptimCLI", "main"]

set_parsing_settings(docstring_parse_attribute_docstrings=True)

# A bare name is looked up in the first type that has it, so ours come before torch's of the same name.
_OPTIMIZER_TYPES = (*(info.cls for info in OPTIMIZERS.values()), torch.optim.Optimizer)
_SCHEDULER_TYPES = (
    *(getattr(schedules, name) for name in schedules.__all__),
    ReduceLROnPlateau,
    LRScheduler,
)


# --- LightningCLI with optimizers that are built late ---------------------------------------------------------


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
    - Without ``--optimizer``, the model's own ``configure_optimizers`` is used.
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
            self.config = parser.parse_args(_forget_on_change(self._args))

    def _parse_ckpt_path(self) -> None:
        # Lightning 2.6 puts the checkpoint's hyperparameters of the model in place of all others. Here flags hold.
        subcommand = self.config.get("subcommand")
        if subcommand is None or any(_given(self._args, "--model")):
            return
        given = self.config[subcommand].get("model")
        super()._parse_ckpt_path()
        ours, saved = _class_path(given), _class_path(self.config[subcommand].get("model"))
        if ours and saved and _import_class(ours) is not _import_class(saved):
            raise UsageError(
                f"--ckpt_path {self.config[subcommand].ckpt_path} is of another model: {saved}, not {ours}. Leave -c "
                "out to go on with a run, or give the -c that belongs to it."
            )
        for arg in self._args:
            option = re.match(r"--model\.(?:init_args\.)?(\w+)", arg)
            for prefix in ("", "init_args."):
                if option and prefix + option[1] in given:
                    self.config[subcommand].model[prefix + option[1]] = given[prefix + option[1]]

    def instantiate_classes(self) -> None:
        with _explained():
            super().instantiate_classes()
        # RecordSettings logs them, and Lightning stops at names that model and data share.
        self.model._log_hyperparams = False
        if self.datamodule is not None:
            self.datamodule._log_hyperparams = False
        self._configure_late()

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        strategy = trainer.strategy
        make_safe(strategy)
        if type(strategy.checkpoint_io) is TorchCheckpointIO:  # and not one that the user has chosen
            strategy.checkpoint_io = SafeCheckpointIO()
        return trainer

    def _configure_late(self) -> None:
        model = self.model
        optimizer = _spec(self._get(self.config, "optimizer"), OptimizerConfig)
        scheduler = _spec(self._get(self.config, "lr_scheduler"), SchedulerConfig)
        if scheduler is not None:
            scheduler.interval = self._get(self.config, "lr_scheduler_interval")
        grouping = self._get(self.config_init, "grouping")
        if optimizer is not None:
            # Wrong arguments show now and not after the data has been prepared.
            with _explained("--optimizer: ", by=("lightning_optim", "torch")):
                factory.build_optimizer(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), optimizer)
        if isinstance(model, OptimizerMixin):
            model.optimizer = optimizer or model.optimizer
            model.lr_scheduler = scheduler or model.lr_scheduler
            model.grouping = grouping if grouping != Grouping() else model.grouping
            configure = model.configure_optimizers
        elif optimizer is not None:
            configure = partial(factory.configure_optimizers, model, optimizer, scheduler, grouping)
        elif scheduler is not None or grouping != Grouping():
            raise UsageError(
                f"{type(model).__name__} builds its own optimizer, to which --lr_scheduler and --grouping do not "
                "apply: add --optimizer."
            )
        else:
            return
        # Not a function in here, which could not be pickled for processes that Lightning spawns.
        model.configure_optimizers = partial(_configure_optimizers, configure)  # type: ignore[method-assign]


class PresetOrFile(ActionConfigFile):
    """The argument ``--config``."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        super().__call__(parser, namespace, find_config(values), option_string)


class RecordSettings(SaveConfigCallback):
    """Writes the configuration of a run into its folder, and the settings that matter to its loggers.

    Those of a run that goes on are replaced when training starts, and not before: a checkpoint that is refused leaves
    the run with the settings that it had, and so does a resumption that does not take the hyperparameters it is given.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A resumed run goes on in the folder of the first.
        super().__init__(*args, **({"overwrite": True} | kwargs))
        # What is said about one resumption does not hold for the next.
        self.config = self.config.clone()
        self.config.resume.override = None
        if "ckpt_path" in self.config:  # Without a subcommand there is none.
            self.config.ckpt_path = None
        # Written under another name and renamed, so that a killed run leaves no half of it.
        self.final_name, self.config_filename = self.config_filename, f".{self.config_filename}.part"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        recorded = (Path(trainer.log_dir or "") / self.final_name).is_file()
        if stage == "fit" and not trainer.strategy.broadcast(recorded):
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, Resume) and callback.kept for callback in callbacks):
            super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        folder = Path(trainer.log_dir or "")
        (folder / self.config_filename).replace(folder / self.final_name)
        config = yaml.safe_load(self.parser.dump(self.config, skip_link_targets=False))
        settings: dict[str, Any] = {"seed": config.get("seed_everything")}
        for key in ("optimizer", "lr_scheduler", "grouping", "model", "data"):
            value = config.get(key) or {}
            if "class_path" in value:
                settings[key] = value["class_path"].rpartition(".")[2]
                value = value.get("init_args", {})
            settings |= {f"{key}/{name}": setting for name, setting in value.items()}
        for logger in trainer.loggers:
            logger.log_hyperparams(settings)


def _spec(value: Any, config_class: type) -> Any:
    """An :class:`OptimizerConfig` or :class:`SchedulerConfig` from what the parser makes of a class and arguments."""
    if not value:
        return None
    cls = _import_class(value.class_path)
    parameters = inspect.signature(cls).parameters
    args = vars(value.get("init_args") or Namespace())
    # The parser writes every default out. What is not given stays open, for the factory to decide.
    given = {name: arg for name, arg in args.items() if name not in parameters or arg != parameters[name].default}
    return config_class(value.class_path, given | value.get("dict_kwargs", {}))


def _import_class(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _configure_optimizers(configure: Callable[[], Any]) -> Any:
    with _explained(by=("lightning_optim", "torch")):
        return configure()


# --- what is wrong ----------------------------------------------------------------------------------------------


class UsageError(Exception):
    """A setting that the user has to change. Its message is all that is shown."""


@contextmanager
def _explained(what: str = "", by: tuple[str, ...] = ("lightning_optim", "lightning")) -> Iterator[None]:
    """Turns a ValueError that one of these packages raises about a setting into a :class:`UsageError`.

    Others are mistakes in code and pass.
    """
    try:
        yield
    except ValueError as error:
        cause: BaseException | None = error
        while cause and _raised_in(cause) == "jsonargparse":  # which instantiates classes and follows links
            cause = cause.__cause__
        if isinstance(cause, (ValueError, DataError)) and _raised_in(cause) in by:
            message = what + str(cause)
            if found := re.search(r"'([^']+)' is not one of ([^.]+)", message):
                message += f" {_nearest(found[1], found[2].split(', '), '')}"
            raise UsageError(message) from error
        raise


def _raised_in(error: BaseException) -> str:
    """The top-level package of the function that raised an error."""
    traceback = error.__traceback__
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    return traceback.tb_frame.f_globals["__name__"].partition(".")[0] if traceback else ""


def _exit(message: str) -> NoReturn:
    sys.stderr.write(f"lightning-optim: error: {' '.join(message.split())}\n")
    sys.exit(2)


class OptimArgumentParser(LightningArgumentParser):
    """Says what is wrong in one message, instead of all options and the inner workings of types."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **({"allow_abbrev": False} | kwargs))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        _exit(_explain(message, getattr(ex, "subcommand_parser", None) or self))


def _explain(message: str, parser: argparse.ArgumentParser) -> str:
    """What an error message of argparse or jsonargparse comes down to, with the nearest valid input.

    A message that is not understood stays as it is.
    """
    if found := re.search(r"[Uu]nrecognized arguments: (.*)", message):
        words = found[1].split()
        option = next((word for word in words if word.startswith("-")), words[0])
        return _unknown_option(option.partition("=")[0], parser)
    if found := re.search(r"does not accept (?:option|nested key) '([\w.]+)'", message):
        return _unknown_option(f"--{found[1]}", parser)
    if found := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
        known = [*re.findall(r"[\w-]+", found[2]), *_COMMANDS]
        return f"There is no subcommand {found[1]!r}. {_nearest(found[1], known)}"
    if not (found := re.search(r'Parser key "([\w.]+)"', message)):
        return message
    key, reason, of = found[1], message, ""
    option = f"--{key}"
    if found := re.search(r"Problem with given class_path '([\w.]+)':\n(.*)", message, re.DOTALL):
        path, reason = found[1], re.split(r"\n +- |\n *Given value", found[2])[0]
        name = path.rpartition(".")[2]
        if found := re.search(r"(?:Option|Key) '([\w.]+)' is not (?:accepted|expected)", reason):
            return f"{name} has no argument {found[1]!r}: {option}.{found[1]}. {_nearest(found[1], _arguments(path))}"
        if found := re.search(r'Parser key "([\w.]+)"', reason):
            option += f".{found[1]}"
        of = f" of {name}"
    given = re.findall(r"(?:Got value|Given value): (.*)", reason)
    if not given:
        return f"{option}{of}: {reason.strip()}"
    value = given[-1]
    if key in _CLASSES and "Expected a dot import path string" in reason:
        return f"{option} {value}: there is no such class. {_nearest(value, _subclasses(_CLASSES[key]))}"
    types = [_type_name(t) for t in re.findall(r"Expected an? (.*?)(?:\. Got value.*)?$", reason, re.MULTILINE)]
    near = _nearest(value, re.findall(r"'([^']+)'", " ".join(types)), "")
    return f"{option}{of}: expected {' or '.join(dict.fromkeys(types))}, got {value!r}. {near}"


_CLASSES: dict[str, type] = {
    "model": pl.LightningModule,
    "data": pl.LightningDataModule,
    "trainer.callbacks": pl.Callback,
    "trainer.logger": Logger,
}


def _subclasses(cls: type) -> list[str]:
    names: list[str] = []
    subclass: type
    for subclass in cls.__subclasses__():
        names += [subclass.__name__, *_subclasses(subclass)]
    return names


def _type_name(text: str) -> str:
    name = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", text)
    return re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", name).replace("NoneType", "null")


def _arguments(path: str) -> list[str]:
    return [name for name in inspect.signature(_import_class(path)).parameters if name not in ("params", "optimizer")]


def _unknown_option(option: str, parser: argparse.ArgumentParser) -> str:
    known = [name for action in parser._actions for name in action.option_strings]
    known = [name for name in known if name.startswith("--") and not name.endswith((".help", "+"))]
    return f"There is no option {option}. {_nearest(option, known, 'Add --help to see all.')}"


def _nearest(name: str, known: Iterable[str], otherwise: str | None = None) -> str:
    by_fold = {k.lower(): k for k in sorted(known)}
    near = [by_fold[n] for n in difflib.get_close_matches(name.lower(), by_fold, n=3, cutoff=0.6)]
    if near:
        return f"Did you mean {', '.join(near)}?"
    return f"Known: {', '.join(by_fold.values())}." if otherwise is None else otherwise


# --- presets and arguments ----------------------------------------------------------------------------------------


def presets(kind: Literal["tasks", "optimizers"]) -> dict[str, Path]:
    """The packaged configuration files of a kind, by name."""
    folder = Path(str(resources.files("lightning_optim.configs"))) / kind
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(name: str) -> str:
    """The path of a preset or of a file.

    Raises:
        UsageError: There is neither.
    """
    known = presets("tasks") | presets("optimizers")
    if name in known:
        return str(known[name])
    if Path(name).is_file() or "://" in name:
        return name
    raise UsageError(f"-c {name}: there is no such preset or file. {_nearest(name, known)}")


def _load(path: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(Path(path).read_text()) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"-c {path} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"-c {path} does not hold settings but {config!r}")
    return config


def _given(args: Sequence[str], *options: str) -> Iterator[tuple[int, str, str]]:
    """Where options occur in arguments, and their values."""
    for i, token in enumerate(args):
        option, has_value, value = token.partition("=")
        if option in options and (has_value or i + 1 < len(args)):
            yield i, option, value if has_value else args[i + 1]


def _class_path(spec: Any) -> str | None:
    path = spec.get("class_path") if isinstance(spec, (dict, Namespace)) else spec
    return path if isinstance(path, str) else None


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
    for i, option, value in _given(args, "-c", "--config", "--optimizer", "--lr_scheduler"):
        if option in ("-c", "--config"):
            config = _load(find_config(value))
        else:
            config = {option[2:]: _load(value) if Path(value).is_file() else yaml.safe_load(value)}
        completed += args[done:i]
        done = i
        for key in config.keys() & classes.keys():
            if path := _class_path(config[key]):
                with _explained(f"--{key}: "):
                    new = classes[key](path)
                if current.setdefault(key, new) is not new:
                    completed += [f"--{key}", "null"]
                    current[key] = new
    return completed + args[done:]


# --- lightning-optim ------------------------------------------------------------------------------------------

_DEFAULT_TASK = "digits"
_DEFAULT_ROOT = "runs"

# What these models take from the data.
_LINKS = {
    VisionClassifier.__name__: ("num_classes", "in_chans", "image_size"),
    LanguageModel.__name__: ("vocab_size", "sequence_length", "bytes_per_token", "test_bytes_per_token"),
}


def main(args: Sequence[str] | None = None) -> None:
    """The command ``lightning-optim``.

    Args:
        args: Its arguments. Default: those of the process.
    """
    args = list(sys.argv[1:] if args is None else args)
    if args and args[0] in _COMMANDS:
        _COMMANDS[args[0]](args[1:])
        return
    # So that `--model mine.Model` finds mine.py here, as it would with `python -m`.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    # The data of the presets is made faster in the training process than it is sent to it from another one.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    try:
        invocation = Invocation.of(args)
    except UsageError as error:
        _exit(str(error))
    CommandLine(invocation)


@dataclass(frozen=True)
class Invocation:
    """What a command line asks for, as far as it has to be known before it is parsed.

    Args:
        args: The complete arguments.
        model: Name of the model's class.
        task: Name of the folder of the runs.
        run: Folder of the run that goes on, if one does.
        settings: Configuration file of that run.
    """

    args: list[str]
    model: str | None = None
    task: str = _DEFAULT_TASK
    run: Path | None = None
    settings: str | None = None

    @classmethod
    def of(cls, args: list[str]) -> Invocation:
        """Complete arguments.

        A checkpoint ``last`` or ``best`` becomes its path. Where no model is named, the settings are those of the run
        that the checkpoint is from, or of the preset ``digits``.
        """
        if not args or args[0] not in LightningCLI.subcommands() or {"-h", "--help"} & set(args):
            return cls(args)
        subcommand, *args = args
        model, task, root = None, "", _DEFAULT_ROOT
        for _, option, value in _given(args, "-c", "--config", "--model"):
            if option == "--model":
                model = task = value.rpartition(".")[2]
                continue
            config = _load(find_config(value))
            if path := _class_path(config.get("model")):
                model, task = path.rpartition(".")[2], Path(value).stem
            root = (config.get("trainer") or {}).get("default_root_dir") or root
        for _, _, value in _given(args, "--trainer.default_root_dir"):
            root = value
        run, settings = None, None
        for _, _, value in list(_given(args, "--ckpt_path")):
            checkpoint = find_checkpoint(value, Path(root) / task)
            args += ["--ckpt_path", str(checkpoint)]
            if checkpoint.parent.name == "checkpoints":
                run = checkpoint.parent.parent
        if run is not None:
            task = run.parent.name
            if (run / "config.yaml").is_file():
                settings = str(run / "config.yaml")
        if model is None:
            base = settings or find_config(_DEFAULT_TASK)
            args = ["-c", base, *args]
            path = _class_path(_load(base).get("model")) or ""
            model, task = path.rpartition(".")[2], task or _DEFAULT_TASK
        return cls([subcommand, *args], model, task, run, settings)


def find_checkpoint(name: str, folder: Path) -> Path:
    """The path of a checkpoint that is named by its path, or as ``last`` or ``best`` of the newest run in a folder.

    One that is damaged or not written to its end is passed over with a warning.

    Raises:
        UsageError: There is none.
    """
    checkpoints = [path for path in folder.rglob("*/checkpoints/*.ckpt") if not path.is_symlink()]
    if name not in ("last", "best"):
        if "://" in name:
            return Path(name)
        try:
            look_at_checkpoint(Path(name))
        except (FileNotFoundError, CheckpointError) as error:
            raise UsageError(f"--ckpt_path: {error} {_nearest(name, map(str, checkpoints), '')}") from error
        return Path(name)
    checkpoints.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for last in checkpoints:
        try:
            checkpoint = look_at_checkpoint(last)
            break
        except CheckpointError as error:
            warnings.warn(f"--ckpt_path {name} passes over a checkpoint: {error}", stacklevel=2)
    else:
        raise UsageError(f"--ckpt_path {name}: there is no checkpoint in {folder} yet. Leave it out to begin a run.")
    if name == "best":
        callbacks = checkpoint["callbacks"]
        best = [state["best_model_path"] for key, state in callbacks.items() if key.startswith("ModelCheckpoint")]
        return last.with_name(Path(best[0]).name) if best and best[0] else last
    return last


class CommandLine(OptimCLI):
    """:class:`OptimCLI` with this library's models and data, resumable runs and a place for them."""

    def __init__(self, invocation: Invocation) -> None:
        self.invocation = invocation
        super().__init__(
            args=invocation.args,
            seed_everything_default=1,
            trainer_defaults={"default_root_dir": _DEFAULT_ROOT, "callbacks": [RNGState(), RescueCheckpoint()]},
            parser_kwargs=_help(),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--threads",
            type=PositiveInt,
            help="CPU threads of torch. Small models are fastest with one. Default: torch's own choice.",
        )
        parser.add_lightning_class_args(Diagnostics, "diagnostics")
        for name in _LINKS.get(self.invocation.model or "", ()):
            link = partial(_take, name)
            link.__name__ = name  # type: ignore[attr-defined]
            parser.link_arguments("data", f"model.init_args.{name}", compute_fn=link, apply_on="instantiate")

    def before_instantiate_classes(self) -> None:
        if threads := self._get(self.config, "threads"):
            torch.set_num_threads(threads)
        if self.subcommand != "fit" or not self.invocation.settings:
            return
        begun = _class_path(_load(self.invocation.settings).get("optimizer"))
        now = self._get(self.config, "optimizer")
        if begun and now and factory.optimizer_class(begun) is not factory.optimizer_class(now.class_path):
            raise UsageError(
                f"--optimizer {now.class_path}: the checkpoint is from a run with {begun}. Add --optimizer {begun}, or "
                "leave -c and --model out to go on with all settings of that run."
            )

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        settings = self._get(self.config_init, "trainer")
        if settings.logger in (None, True):
            run = self.invocation.run
            if run is None:
                place = {"save_dir": settings.default_root_dir, "name": self.invocation.task}
            else:
                place = {"save_dir": str(run.parent.parent), "name": run.parent.name, "version": run.name}
            kwargs["logger"] = TensorBoardLogger(**place)
        trainer: Any = super().instantiate_trainer(**kwargs)
        if trainer.loggers:
            trainer.callbacks.insert(0, LearningRateMonitor())
        return trainer

    def after_fit(self) -> None:
        trainer: Any = self.trainer
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        best = ""
        checkpoint = trainer.checkpoint_callback
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.best_model_score is not None:
            best = f" (best {checkpoint.monitor}: {checkpoint.best_model_score:.4f})"
        print(
            f"Logs and checkpoints{best}: {trainer.log_dir}   To look at them: "
            f"tensorboard --logdir {trainer.default_root_dir}"
        )


def _take(name: str, data: pl.LightningDataModule) -> Any:
    if not hasattr(data, name):
        raise ValueError(f"The model takes {name} from the data, but {type(data).__name__} has no attribute {name!r}.")
    return getattr(data, name)


_EXAMPLES = """examples:
  lightning-optim fit                                                digits with MVNGrad, no network needed
  lightning-optim fit --optimizer NAMO --optimizer.lr 0.012          another optimizer
  lightning-optim fit -c stdlib-text -c namo                         presets of a task and of an optimizer
  lightning-optim fit --ckpt_path last                               go on with the run that was begun last
  lightning-optim test --ckpt_path best                              test the best checkpoint of that run
  lightning-optim fit --optimizer.help NAMO                          the arguments of an optimizer
  lightning-optim list [--json]                                      all optimizers
  lightning-optim list --presets                                     all presets
  lightning-optim diagnostics runs [--out FIG.png]                   what the diagnostics of runs say
  lightning-optim spike --optimizers MVNGrad AdamW --out spike.png   what a gradient spike does to optimizers
"""


def _help() -> dict[str, Any]:
    usage = (
        "lightning-optim {} [-c PRESET|FILE]... [--optimizer NAME] [--optimizer.ARGUMENT VALUE]... [--OPTION VALUE]..."
    )
    return {
        "prog": "lightning-optim",
        "usage": "lightning-optim {fit,validate,test,predict,list,diagnostics,spike} ...",
        "description": "Train and evaluate models with the optimizers of recent papers.",
        "epilog": _EXAMPLES,
        "formatter_class": _HelpFormatter,
    } | {name: {"usage": usage.format(name)} for name in LightningCLI.subcommands()}


class _HelpFormatter(DefaultHelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text == _EXAMPLES else super()._fill_text(text, width, indent)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _exit(_explain(message, self))


def _list(args: Sequence[str]) -> None:
    parser = _Parser("lightning-optim list", description="Show every optimizer.")
    parser.add_argument("--json", action="store_true", help="as a JSON list of objects")
    parser.add_argument("--presets", action="store_true", help="show the presets for -c instead")
    options = parser.parse_args(args)
    rows: list[dict[str, Any]]
    if options.presets:
        rows = [
            {"name": name, "kind": kind.removesuffix("s"), "description": path.read_text().splitlines()[0].lstrip("# ")}
            for kind in ("tasks", "optimizers")
            for name, path in presets(kind).items()
        ]
    else:
        rows = [
            {
                "name": info.name,
                "kind": info.kind,
                "description": info.description,
                "paper": info.paper,
                "defaults": dict(info.defaults),
                "internals": {name: internal.description for name, internal in info.internals.items()},
            }
            for info in OPTIMIZERS.values()
        ]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    columns = [key for key in rows[0] if key not in ("defaults", "internals")]
    table = Table(*columns, box=box.SIMPLE)
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    Console().print(table)
    if not options.presets:
        print("Arguments and their defaults: lightning-optim fit --optimizer.help NAME")


def _diagnostics(args: Sequence[str]) -> None:
    from . import report

    report.main(args, _Parser)


def _spike(args: Sequence[str]) -> None:
    parser = _Parser("lightning-optim spike", description=spike.DESCRIPTION)
    spike.add_arguments(parser)
    options = parser.parse_args(args)
    try:
        with _explained():
            spike.run(options)
    except UsageError as error:
        _exit(str(error))


#: Commands beside those of LightningCLI.
_COMMANDS = {"list": _list, "diagnostics": _diagnostics, "spike": _spike}
