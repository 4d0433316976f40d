"""Documented uses of LightningCLI give the same with OptimCLI."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_optim.cli import OptimCLI

BOTH = [LightningCLI, OptimCLI]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
SHORT = [*QUIET, "--trainer.max_steps=1", "--trainer.enable_checkpointing=false", "--trainer.limit_val_batches=0"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])


class Plain(BoringModel):
    """Has no optimizer of its own."""

    configure_optimizers = None  # type: ignore[assignment]


class Wide(BoringModel):
    def __init__(self, width: int = 3, depth: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()


def registered(base: type[LightningCLI]) -> Any:
    class CLI(base):  # type: ignore[valid-type, misc]
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_optimizer_args(torch.optim.Adam)
            parser.add_lr_scheduler_args(torch.optim.lr_scheduler.StepLR)
            parser.set_defaults({"optimizer.lr": 0.25})

    args = ["fit", "--optimizer.weight_decay=0.5", "--lr_scheduler.step_size=7", *SHORT, "--trainer.logger=false"]
    trainer = CLI(BoringModel, args=args).trainer
    (optimizer,), (schedule,) = trainer.optimizers, trainer.lr_scheduler_configs
    group = {key: optimizer.param_groups[0][key] for key in ("lr", "weight_decay", "betas")}
    return type(optimizer), len(optimizer.param_groups), group, schedule.interval, schedule.scheduler.step_size


def registered_types(base: type[LightningCLI]) -> Any:
    class CLI(base):  # type: ignore[valid-type, misc]
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_optimizer_args((torch.optim.SGD, torch.optim.Adam))

    cli = CLI(Plain, run=False, args=["--optimizer=SGD", "--optimizer.lr=0.5"])
    optimizer = cli.model.configure_optimizers()
    return type(optimizer), optimizer.param_groups[0]["lr"]


def overridden_hook(base: type[LightningCLI]) -> Any:
    class CLI(base):  # type: ignore[valid-type, misc]
        @staticmethod
        def configure_optimizers(lightning_module: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
            return type(lightning_module), type(optimizer), type(lr_scheduler)

    assert CLI(BoringModel, run=False, args=["--optimizer=Adam"]).model.configure_optimizers()[2] is type(None)
    cli = CLI(Plain, run=False, args=["--optimizer=Adam", "--lr_scheduler=ConstantLR"])
    return cli.model.configure_optimizers()


def linked(base: type[LightningCLI]) -> Any:
    class Model(BoringModel):
        def __init__(self, batch_size: int = 0) -> None:
            super().__init__()
            self.batch_size = batch_size

    class Data(BoringDataModule):
        def __init__(self, batch_size: int = 8) -> None:
            super().__init__()

    class CLI(base):  # type: ignore[valid-type, misc]
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.link_arguments("data.batch_size", "model.batch_size")

    return CLI(Model, Data, run=False, args=["--data.batch_size=12"]).model.batch_size


def without_automatic(base: type[LightningCLI]) -> Any:
    cli = base(BoringModel, run=False, auto_configure_optimizers=False, args=[])
    return [key in cli.config for key in ("optimizer", "lr_scheduler")], type(cli.model.configure_optimizers())


def inline_config(base: type[LightningCLI]) -> Any:
    return base(BoringModel, run=False, args=["--config={trainer: {max_epochs: 3}}"]).trainer.max_epochs


def config_before_the_command(base: type[LightningCLI]) -> Any:
    config = json.dumps({"fit": {"trainer": {"max_steps": 1, "logger": False, "enable_checkpointing": False}}})
    return base(BoringModel, args=[f"--config={config}", "fit", *QUIET]).trainer.max_steps


def nested_file(base: type[LightningCLI]) -> Any:
    Path("opt.yaml").write_text("class_path: torch.optim.AdamW\ninit_args: {lr: 0.004}\n")
    Path("main.yaml").write_text("optimizer: opt.yaml\n")
    made = base(BoringModel, run=False, args=["--config", "main.yaml"]).config.optimizer
    return made.class_path, made.init_args.lr


def files_in_order(base: type[LightningCLI]) -> Any:
    Path("one.yaml").write_text("trainer: {max_epochs: 3, max_steps: 5}\n")
    Path("two.yaml").write_text("trainer: {max_epochs: 4}\n")
    trainer = base(BoringModel, run=False, args=["-c", "one.yaml", "-c", "two.yaml"]).trainer
    return trainer.max_epochs, trainer.max_steps


def dictionary(base: type[LightningCLI]) -> Any:
    return base(Wide, run=False, args={"model": {"width": 5}, "trainer": {"max_epochs": 2}}).model.hparams["width"]


def hparams(base: type[LightningCLI]) -> Any:
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"]
    cli = base(Wide, args=["fit", *SHORT, *logger, "--model.width=4"])
    return sorted(yaml.safe_load((Path(cli.trainer.log_dir) / "hparams.yaml").read_text()).items())


def hook_with_an_error(base: type[LightningCLI]) -> Any:
    class Model(BoringModel):
        def on_fit_start(self) -> None:
            raise MisconfigurationException("deep inside a project")

    return base(Model, args=["fit", *SHORT, "--trainer.logger=false"])


def config_of_another_run(base: type[LightningCLI]) -> Any:
    for seed in (1, 2):
        base(BoringModel, args=["fit", *SHORT, "--trainer.logger=false", f"--seed_everything={seed}"])


def header(base: type[LightningCLI]) -> Any:
    return base(BoringModel, run=False, args=["--print_config"])


def two_automatic(base: type[LightningCLI]) -> Any:
    class CLI(base):  # type: ignore[valid-type, misc]
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_optimizer_args(torch.optim.Adam, "first")
            parser.add_optimizer_args(torch.optim.SGD, "second")

    return CLI(BoringModel, run=False, args=[])


def own_parser(base: type[LightningCLI]) -> Any:
    class Parser(LightningArgumentParser):
        pass

    cli = base(BoringModel, run=False, parser_class=Parser, args=["--trainer.max_epochs=9"])
    return isinstance(cli.parser, Parser), cli.trainer.max_epochs


def callable_arguments(base: type[LightningCLI]) -> Any:
    class Model(BoringModel):
        def __init__(
            self,
            first: OptimizerCallable = torch.optim.Adam,
            second: OptimizerCallable = lambda p: torch.optim.SGD(p, lr=0.5),
            scheduler: LRSchedulerCallable = torch.optim.lr_scheduler.ConstantLR,
        ) -> None:
            super().__init__()
            self.made = first(self.parameters()), second(self.parameters())
            self.scheduler = scheduler(self.made[0])

    args = ["--model.first=Adagrad", "--model.scheduler=ExponentialLR", "--model.scheduler.gamma=0.3"]
    model = base(Model, run=False, auto_configure_optimizers=False, args=args).model
    return [type(made) for made in model.made], model.scheduler.gamma


class Deep(Wide):
    def __init__(self, gain: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)


def checkpoint_of_a_named_class(base: type[LightningCLI]) -> Any:
    """Its hyperparameters hold, however the class is written and whatever it is loaded for."""
    run = [*QUIET, *(f"--trainer.{name}=1" for name in ("max_epochs", "limit_train_batches", "limit_val_batches"))]
    made = ["--model.width=5", "--model.gain=0.5"]
    cli = base(Wide, subclass_mode_model=True, args=["fit", "--model=Deep", *made, *run])
    path = next(Path(cli.trainer.log_dir or "").glob("checkpoints/*.ckpt"))
    named = [("validate", "--model=Deep"), ("test", f"--model={__name__}.Deep"), ("test", "--model.class_path=Deep")]
    more = [f"--ckpt_path={path}", "--trainer.logger=false", *QUIET]
    options: dict[str, Any] = {"subclass_mode_model": True, "save_config_callback": None}
    found = [base(Wide, args=[command, model, *more], **options).model for command, model in named]
    return [(type(model), dict(model.hparams)) for model in found]


USES: list[Callable[[type[LightningCLI]], Any]] = [
    registered, registered_types, overridden_hook, linked, without_automatic, inline_config, config_before_the_command,
    nested_file, files_in_order, dictionary, hparams, hook_with_an_error, config_of_another_run, header, two_automatic,
    own_parser, callable_arguments, checkpoint_of_a_named_class,
]  # fmt: skip


def outcome(use: Callable[[type[LightningCLI]], Any], base: type[LightningCLI], capsys: Any) -> Any:
    folder = Path(base.__name__)
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        try:
            return use(base)
        except SystemExit:
            return capsys.readouterr().out.splitlines()[0]
        except Exception as error:
            return next(cls for cls in type(error).__mro__ if not cls.__module__.startswith("lightning_optim"))


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@pytest.mark.filterwarnings("ignore:.*will be overridden by")
def test_a_documented_use_gives_the_same(use: Any, capsys: pytest.CaptureFixture[str]) -> None:
    stock, ours = (outcome(use, base, capsys) for base in BOTH)
    assert ours == stock


NAMO = {"class_path": "lightning_optim.NAMO", "init_args": {"lr": 0.007, "betas": [0.5, 0.6], "weight_decay": 0.3}}


def by_set_defaults() -> Any:
    class CLI(OptimCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.set_defaults({"optimizer": NAMO})

    return CLI(Plain, run=False, args=["--optimizer", "MVNGrad"])


def by_default_file() -> Any:
    Path("namo.yaml").write_text(json.dumps({"optimizer": NAMO}))
    files = {"default_config_files": ["namo.yaml"]}
    return OptimCLI(Plain, run=False, args=["--optimizer", "MVNGrad"], parser_kwargs=files)


def by_environment() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_OPTIMIZER", json.dumps(NAMO))
        return OptimCLI(Plain, run=False, args=["--optimizer", "MVNGrad"], parser_kwargs={"default_env": True})


def by_file_and_inline() -> Any:
    Path("namo.yaml").write_text(json.dumps({"optimizer": NAMO}))
    return OptimCLI(Plain, run=False, args=["-c", "namo.yaml", "-c", "{optimizer: MVNGrad}"])


def by_flags() -> Any:
    flags = ["--optimizer", "NAMO", "--optimizer.lr", "0.007", "--optimizer.betas", "[0.5, 0.6]"]
    return OptimCLI(Plain, run=False, args=[*flags, "--optimizer", "MVNGrad"])


@pytest.mark.parametrize("source", [by_set_defaults, by_default_file, by_environment, by_file_and_inline, by_flags])
def test_another_optimizer_keeps_nothing_of_the_one_before(source: Callable[[], Any]) -> None:
    group = source().model.configure_optimizers()["optimizer"].param_groups[0]
    assert (group["lr"], tuple(group["betas"]), group["weight_decay"]) == (1e-3, (0.9, 0.999), 0.0)


def test_the_same_optimizer_by_another_path_keeps_its_arguments() -> None:
    flags = ["--optimizer", "lightning_optim.MVNGrad", "--optimizer.lr", "0.007", "--optimizer", "MVNGrad"]
    cli = OptimCLI(Plain, run=False, args=flags)
    assert cli.model.configure_optimizers()["optimizer"].param_groups[0]["lr"] == 0.007
