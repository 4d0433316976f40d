"""``lightning-optim fit|validate|test|predict``: :class:`OptimCLI` with this library's models, data and presets."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import DefaultHelpFormatter
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from .. import factory
from ..callbacks import Diagnostics, RescueCheckpoint, RNGState
from ..models import LanguageModel, VisionClassifier
from .checkpoints import find_checkpoint
from .errors import UsageError, exit_with
from .optim_cli import OptimCLI
from .presets import class_path, find_config, given, load_config

_DEFAULT_TASK = "digits"
_DEFAULT_ROOT = "runs"

# What these models take from the data.
_LINKS = {
    VisionClassifier.__name__: ("num_classes", "in_chans", "image_size"),
    LanguageModel.__name__: ("vocab_size", "sequence_length", "bytes_per_token", "test_bytes_per_token"),
}


def main(args: list[str]) -> None:
    """The commands of LightningCLI.

    Args:
        args: The command and its arguments.
    """
    # So that `--model mine.Model` finds mine.py here, as it would with `python -m`.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    # The data of the presets is made faster in the training process than it is sent to it from another one.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    try:
        invocation = Invocation.of(args)
    except UsageError as error:
        exit_with(str(error))
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
        for _, option, value in given(args, "-c", "--config", "--model"):
            if option == "--model":
                model = task = value.rpartition(".")[2]
                continue
            config = load_config(find_config(value))
            if path := class_path(config.get("model")):
                model, task = path.rpartition(".")[2], Path(value).stem
            root = (config.get("trainer") or {}).get("default_root_dir") or root
        for _, _, value in given(args, "--trainer.default_root_dir"):
            root = value
        run, settings = None, None
        for _, _, value in list(given(args, "--ckpt_path")):
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
            path = class_path(load_config(base).get("model")) or ""
            model, task = path.rpartition(".")[2], task or _DEFAULT_TASK
        return cls([subcommand, *args], model, task, run, settings)


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
        begun = class_path(load_config(self.invocation.settings).get("optimizer"))
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
