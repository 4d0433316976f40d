"""What is known of a command line before Lightning is imported."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import UsageError, nearest
from .presets import class_path, find_config, given, load_config
from .trust import class_paths

#: The commands of LightningCLI.
TRAINER_COMMANDS = {
    "fit": "Train a model.",
    "validate": "Evaluate a model on the validation data.",
    "test": "Evaluate a model on the test data.",
    "predict": "Make predictions with a model.",
}

#: Options of these commands, or what stands before the first dot of them. A test compares them with the parser.
OPTIONS = (
    "ckpt_path",
    "config",
    "data",
    "diagnostics",
    "grouping",
    "help",
    "lr_scheduler",
    "lr_scheduler_interval",
    "model",
    "name",
    "optimizer",
    "print_config",
    "resume",
    "return_predictions",
    "seed_everything",
    "task",
    "threads",
    "trainer",
    "verbose",
    "weights_only",
)

DEFAULT_TASK = "digits"
DEFAULT_ROOT = "runs"


@dataclass(frozen=True)
class Invocation:
    """What a command line asks for, as far as it has to be known before it is parsed.

    Args:
        args: The complete arguments.
        model: Name of the model's class.
        task: Name of the folder of the runs.
        run: Folder of the run that goes on, if one does. Other runs get a folder of their own.
        settings: Configuration file of that run.
    """

    args: list[str]
    model: str | None = None
    task: str = DEFAULT_TASK
    run: Path | None = None
    settings: str | None = None

    @classmethod
    def of(cls, args: list[str]) -> Invocation:
        """Complete arguments.

        A checkpoint ``last`` or ``best`` becomes its path. Where no model is named, the settings are those of the run
        that the checkpoint is from, or of the preset ``digits``.
        """
        if not args or args[0] not in TRAINER_COMMANDS or {"-h", "--help"} & set(args):
            return cls(args)
        subcommand, *args = args
        check_options(args)
        model, task, root, name = None, "", DEFAULT_ROOT, ""
        for _, option, value in given(args, "-c", "--config", "--model"):
            if option == "--model":
                model = task = value.rpartition(".")[2]
                continue
            config = load_config(find_config(value))
            if path := class_path(config.get("model")):
                model, task = path.rpartition(".")[2], _task_of(value)
            task = config.get("task") or task
            root = (config.get("trainer") or {}).get("default_root_dir") or root
        for _, _, value in given(args, "--trainer.default_root_dir"):
            root = value
        for _, option, value in given(args, "--task", "--name"):
            if option == "--task":
                task = check_name(option, value)
            else:
                name = check_name(option, value)
        run, settings = None, None
        for _, _, value in list(given(args, "--ckpt_path")):
            from .checkpoints import find_checkpoint  # here, because it imports Lightning

            checkpoint = find_checkpoint(value, Path(root) / task, name)
            args += ["--ckpt_path", str(checkpoint)]
            if checkpoint.parent.name == "checkpoints":
                run = checkpoint.parent.parent
        if run is not None:
            task = run.parent.name
            if (run / "config.yaml").is_file():
                settings = str(run / "config.yaml")
                if not run.resolve().is_relative_to(Path(root).resolve()):
                    if model is None:
                        raise UsageError(_of_another(settings, root))
                    settings = None
        if model is None:
            base = settings or find_config(DEFAULT_TASK)
            if settings:
                print(f"With the settings of the run, {settings}: {_named(settings)}", file=sys.stderr)
            args = ["-c", base, *args]
            path = class_path(load_config(base).get("model")) or ""
            model, task = path.rpartition(".")[2], task or DEFAULT_TASK
        if name and run is not None and run.name != name:
            run = None  # Another run goes on from where that one was.
        return cls([subcommand, *args], model, task, run, settings)


def check_name(option: str, name: str) -> str:
    """A name of a task or run if it can be that of a folder.

    Raises:
        UsageError: It cannot.
    """
    if not name.strip(" .") or name != name.strip() or set(name) & set('/\\:*?"<>|'):
        raise UsageError(f"{option} {name!r} is no name of a folder: use letters, digits, and any of . _ - = +")
    return name


def _task_of(config: str) -> str:
    """The task of a configuration file that does not say it: the file's name, or the task of the run it is of."""
    path = Path(config)
    if path.name == "config.yaml" and (
        (path.parent / "checkpoints").is_dir() or any(path.parent.glob("events.out.tfevents.*"))
    ):
        return path.resolve().parent.parent.name
    return path.stem


def _of_another(settings: str, root: str) -> str:
    return (
        f"--ckpt_path: the settings beside the checkpoint, {settings}, are not used, since they are not those of a run "
        f"in {root}. They name {_named(settings)}. If you trust them, add -c {settings}; or name a model by --model or "
        "-c, or the folder of your runs by --trainer.default_root_dir."
    )


def _named(settings: str) -> str:
    return ", ".join(dict.fromkeys(class_paths(load_config(settings)))) or "no class"


def check_options(args: Iterable[str]) -> None:
    """Say at once what is wrong with an option that is spelled almost like another, before Lightning is imported.

    Others are left to the parser, which knows all of them.

    Raises:
        UsageError: There is no such option.
    """
    for arg in args:
        option = arg.partition("=")[0]
        name, dot, _ = option.removeprefix("--").partition(".")
        if not option.startswith("--") or not name or name.removesuffix("+") in OPTIONS:
            continue
        if not dot and _is_of_an_optimizer(name):
            raise UsageError(f"There is no option {option}. Did you mean --optimizer.{name}?")
        if near := nearest(f"--{name}", [f"--{known}" for known in OPTIONS], ""):
            raise UsageError(f"There is no option {option}. {near}")


def help_for_optimizer(args: Sequence[str]) -> str | None:
    """What ``--optimizer.help NAME`` shows of an optimizer of this library. Of torch's, Lightning's parser shows it."""
    for _, _, name in given(args, "--optimizer.help"):
        from ..registry import OPTIMIZERS  # here, because it imports torch
        from .optimizer_page import page

        info = OPTIMIZERS.get(name.removeprefix("lightning_optim."))
        if info and not info.cls.__module__.startswith("torch."):
            return page(info)
    return None


def _is_of_an_optimizer(argument: str) -> bool:
    from ..registry import OPTIMIZERS  # here, because it imports torch

    return any(argument in info.defaults for info in OPTIMIZERS.values())
