"""A task of :mod:`lightning_optim.compare` that is given by arguments of ``lightning-optim fit``."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..compare.design import Run, digest
from .invocation import Invocation

# Lightning is imported in the processes that train.


@dataclass
class CommandLineTask:
    """What arguments of the command line say, with other optimizers.

    Args:
        args: Arguments of ``lightning-optim fit``, without the optimizer.
        name: Its name.
    """

    args: list[str]
    name: str = field(init=False)

    def __post_init__(self) -> None:
        invocation = Invocation.of(["fit", *self.args])
        self.args = invocation.args[1:]
        self.name = invocation.task
        self._model = invocation.model

    def describe(self) -> dict[str, Any]:
        from ..compare.task import code_version

        cli = self.built(["--seed_everything", "1"])
        settings = yaml.safe_load(cli.parser.dump(cli.config, skip_link_targets=False))
        for key in ("optimizer", "seed_everything", "resume", "config", "threads"):
            settings.pop(key, None)
        return {**settings, "fingerprint": digest(settings, code_version())}

    def train(self, run: Run) -> dict[str, Any]:
        from ..compare.recording import Recorder, follow

        recorder = Recorder(run)
        optimizer = ["--optimizer", run.optimizer]
        for name, value in run.args.items():
            optimizer += [
                f"--optimizer.{name}",
                value if isinstance(value, str) else yaml.safe_dump(value).split("\n")[0],
            ]
        length = []
        if run.steps is not None:
            length = [f"--trainer.max_steps={run.steps}", "--trainer.max_epochs=-1"]
            length += [f"--diagnostics.every_n_steps={run.interval}"]
        cli = self.built(["--seed_everything", str(run.seed), *length, *optimizer], recorder)
        return follow(recorder, cli.trainer, cli.model, cli.datamodule)

    def built(self, more: list[str], recorder: Any = None) -> Any:
        """The command line with these arguments in addition, its ``model``, ``datamodule`` and ``trainer`` built."""
        from .train import CommandLine

        class Compared(CommandLine):
            """The command line without a command: it builds, and writes nothing."""

            def instantiate_trainer(self, **kwargs: Any) -> Any:
                from ..compare.recording import without_files

                settings = self._get(self.config_init, "trainer")
                callbacks = without_files(settings.callbacks)
                self.trainer_defaults["callbacks"] = [] if recorder is None else [recorder]
                quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
                logger = False if recorder is None else recorder.logger
                settings.logger = False
                self.save_config_callback = None
                return super().instantiate_trainer(callbacks=callbacks, logger=logger, **quiet, **kwargs)

        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        invocation = Invocation([*self.args, *more], self._model, self.name)
        return Compared(invocation, run=False)
