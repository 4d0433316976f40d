"""``lightning-optim fit|validate|test|predict``: :class:`OptimCLI` with this library's models, data and presets."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, Optional

import lightning.pytorch as pl
import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from .. import factory
from ..callbacks import Diagnostics, RescueCheckpoint, RNGState
from ..models import LanguageModel, VisionClassifier
from .errors import UsageError
from .invocation import DEFAULT_ROOT, Invocation
from .optim_cli import OptimCLI
from .presets import class_path, load_config
from .record import RecordOutcome, RecordSettings
from .run_folder import RunLogger, run_name

_GO_ON = "lightning-optim fit --ckpt_path {path}"

# What these models take from the data.
_LINKS = {
    VisionClassifier.__name__: ("num_classes", "in_chans", "image_size"),
    LanguageModel.__name__: ("vocab_size", "sequence_length", "bytes_per_token", "test_bytes_per_token"),
}


def run(invocation: Invocation) -> None:
    """Run a command of LightningCLI."""
    # The data of the presets is made faster in the training process than it is sent to it from another one.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    CommandLine(invocation)


class CommandLine(OptimCLI):
    """:class:`OptimCLI` with this library's models and data, resumable runs and a place for them."""

    def __init__(self, invocation: Invocation, run: bool = True) -> None:
        self.invocation = invocation
        super().__init__(
            run=run,
            args=invocation.args,
            seed_everything_default=1,
            trainer_defaults={"default_root_dir": DEFAULT_ROOT, "callbacks": [RNGState(), RescueCheckpoint(_GO_ON)]},
            parser_kwargs=_help(),
            save_config_callback=RecordSettings,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        with warnings.catch_warnings():
            # Of arguments beside those of the process, which these are, completed.
            warnings.filterwarnings("ignore", ".*LightningCLI's args parameter.*")
            super().parse_arguments(parser, args)

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        # RecordSettings logs them, and Lightning stops at names that model and data share.
        self.model._log_hyperparams = False
        if self.datamodule is not None:
            self.datamodule._log_hyperparams = False

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--threads",
            type=PositiveInt,
            help="CPU threads of torch. Small models are fastest with one. Default: torch's own choice.",
        )
        parser.add_argument(
            "--task",
            type=str,
            default=self.invocation.task,
            help="Folder of the run in trainer.default_root_dir. Default: the name of the preset, file or model.",
        )
        parser.add_argument(
            "--name",
            type=Optional[str],  # noqa: UP045
            help="Name of the run and of its folder, followed by -2, -3, ... where there is one. With --ckpt_path last "
            "or best, the run that goes on. Default: optimizer, learning rate and seed, as NAMO-lr0.012-s1.",
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
        if self._get(self.config, "resume.change_optimizer"):
            return
        begun = class_path(load_config(self.invocation.settings).get("optimizer"))
        now = self._get(self.config, "optimizer")
        if begun and now and factory.optimizer_class(begun) is not factory.optimizer_class(now.class_path):
            raise UsageError(
                f"--optimizer {now.class_path}: the checkpoint is from a run with {begun}. Add --optimizer {begun}, or "
                "leave -c and --model out to go on with all settings of that run, or add "
                "--resume.change_optimizer true to go on with the other optimizer."
            )

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        settings = self._get(self.config_init, "trainer")
        if settings.enable_checkpointing is False:  # The presets have a ModelCheckpoint, which Lightning then refuses.
            kwargs["callbacks"] = [x for x in settings.callbacks or () if not isinstance(x, Checkpoint)]
        if settings.logger in (None, True):
            run = self.invocation.run
            if run is None:
                kwargs["logger"] = RunLogger(settings.default_root_dir, self.invocation.task, self._run_name())
            else:
                kwargs["logger"] = RunLogger(run.parent.parent, run.parent.name, run.name, exists=True)
        trainer: Any = super().instantiate_trainer(**kwargs)
        if trainer.loggers:
            trainer.callbacks[:0] = [LearningRateMonitor(), RecordOutcome()]
        return trainer

    def _run_name(self) -> str:
        name = self._get(self.config, "name")
        if name:
            return name
        seed = self._get(self.config, "seed_everything")
        spec = self._get(self.config, "optimizer")
        if spec:
            return run_name(spec.class_path, spec.get("init_args", {}).get("lr"), seed)
        if isinstance(self.model, factory.OptimizerMixin):
            own = factory.config_of(factory.OptimizerConfig, "optimizer", self.model.optimizer)
            return run_name(own.name, own.args.get("lr"), seed)
        return run_name(type(self.model).__name__, None, seed)

    def before_fit(self) -> None:
        for logger in self.trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.version  # noqa: B018 (makes the folder, before processes are spawned that know of it)

    def after_fit(self) -> None:
        trainer: Any = self.trainer
        folder = trainer.log_dir  # a broadcast, which all ranks have to take part in
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        best = ""
        checkpoint = trainer.checkpoint_callback
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.best_model_score is not None:
            best = f" (best {checkpoint.monitor}: {checkpoint.best_model_score:.4f})"
        print(
            f"Logs and checkpoints{best}: {folder}   To look at them: tensorboard --logdir {trainer.default_root_dir}"
        )


def _take(name: str, data: pl.LightningDataModule) -> Any:
    if not hasattr(data, name):
        raise ValueError(f"The model takes {name} from the data, but {type(data).__name__} has no attribute {name!r}.")
    return getattr(data, name)


def _help() -> dict[str, Any]:
    options = "[-c PRESET|FILE]... [--optimizer NAME] [--optimizer.ARGUMENT VALUE]... [--OPTION VALUE]..."
    usage = {name: {"usage": f"lightning-optim {name} {options}"} for name in LightningCLI.subcommands()}
    return {"prog": "lightning-optim"} | usage
