"""Every example of Lightning's documentation on configuring from the command line, with LightningCLI and OptimCLI.

The examples are written anew, by page. What both classes make of them is compared. Differences that docs/cli.md lists
are taken out, at the place where they occur.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import Namespace, lazy_instance
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    LRSchedulerCallable,
    OptimizerCallable,
    SaveConfigCallback,
)
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel, DemoModel
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_optim.callbacks import Resume

from .test_drop_in import BOTH, SHORT, Plain, outcome

Base = type[LightningCLI]
NO_LOGS = [*SHORT, "--trainer.logger=false"]
_ran: list[Any] = []


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["main.py"])
    _ran.clear()


def made(cli: LightningCLI) -> Any:
    """What the model's configure_optimizers gives, in one form: class, learning rates and schedule."""
    made = cli.model.configure_optimizers()
    if isinstance(made, dict):
        optimizer, schedule = made["optimizer"], made.get("lr_scheduler")
    elif isinstance(made, tuple):
        optimizer, schedule = made[0][0], made[1][0]
    else:
        optimizer, schedule = made, None
    schedule = schedule["scheduler"] if isinstance(schedule, dict) else schedule
    return type(optimizer), {group["lr"] for group in optimizer.param_groups}, type(schedule)


def shown(cli: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> str:
    """What a call prints that ends the process."""
    with pytest.raises(SystemExit) as stop:
        cli()
    assert stop.value.code in (0, None)
    return capsys.readouterr().out


class Data(BoringDataModule):
    def __init__(self, data_dir: str = "./") -> None:
        super().__init__()
        self.data_dir = data_dir


# --- implementing one, training, options ------------------------------------------------------------------------------


def two_classes(base: Base) -> Any:
    cli = base(DemoModel, BoringDataModule, args=["fit", *NO_LOGS])
    return type(cli.model), type(cli.datamodule), cli.trainer.global_step, made(cli)


def options_of_the_model(base: Base) -> Any:
    cli = base(
        DemoModel, BoringDataModule, args=["fit", *NO_LOGS, "--model.out_dim=10", "--model.learning_rate", "0.1"]
    )
    return cli.model.l1.out_features, cli.model.learning_rate, cli.trainer.global_step


def options_of_model_data_and_trainer(base: Base) -> Any:
    args = ["fit", *NO_LOGS, "--model.out_dim", "2", "--model.learning_rate", "0.1", "--data.data_dir", "~/"]
    cli = base(DemoModel, Data, args=args)
    return cli.datamodule.data_dir, cli.trainer.loggers, cli.config.fit.model.out_dim


def each_command(base: Base) -> Any:
    steps = ["--trainer.limit_predict_batches=1", "--trainer.limit_test_batches=1"]
    for command in ("validate", "test", "predict"):
        cli = base(BoringModel, BoringDataModule, args=[command, *NO_LOGS, *steps], save_config_callback=None)
        _ran.append((command, cli.subcommand, cli.trainer.state.fn, cli.trainer.state.status))
    return list(_ran)


# --- several models, data modules, optimizers, schedules --------------------------------------------------------------


class Model1(DemoModel):
    def configure_optimizers(self) -> Any:
        _ran.append("Model1")
        return super().configure_optimizers()


class Model2(DemoModel):
    def configure_optimizers(self) -> Any:
        _ran.append("Model2")
        return super().configure_optimizers()


class FakeDataset1(BoringDataModule):
    def train_dataloader(self) -> Any:
        _ran.append("FakeDataset1")
        return torch.utils.data.DataLoader(self.random_train)


class FakeDataset2(FakeDataset1):
    def train_dataloader(self) -> Any:
        _ran.append("FakeDataset2")
        return torch.utils.data.DataLoader(self.random_train)


class LitAdam(torch.optim.Adam):
    def step(self, closure: Any = None) -> Any:
        _ran.append("LitAdam")
        return super().step(closure)


class LitLRScheduler(torch.optim.lr_scheduler.CosineAnnealingLR):
    def step(self, epoch: int | None = None) -> None:
        _ran.append("LitLRScheduler")
        super().step()


def several_models(base: Base) -> Any:
    for name in ("Model1", "Model2"):
        args = ["fit", *NO_LOGS, "--model", name]
        base(datamodule_class=BoringDataModule, args=args, save_config_callback=None)
    return list(_ran)


def several_data_modules(base: Base) -> Any:
    for name in ("FakeDataset1", "FakeDataset2"):
        base(DemoModel, args=["fit", *NO_LOGS, "--data", name], save_config_callback=None)
    return list(_ran)


def by_import_path(base: Base) -> Any:
    cli = base(run=False, args=["--model", f"{__name__}.Model1", "--data", f"{__name__}.FakeDataset2"])
    return type(cli.model), type(cli.datamodule)


def models_of_a_base_class(base: Base) -> Any:
    cli = base(DemoModel, BoringDataModule, subclass_mode_model=True, subclass_mode_data=True, run=False,
               args=["--model=Model2", "--model.out_dim=3", "--data=FakeDataset1"])  # fmt: skip
    with pytest.raises(SystemExit):
        base(DemoModel, subclass_mode_model=True, run=False, args=["--model=BoringModel"])
    return type(cli.model), cli.model.l1.out_features, type(cli.datamodule)


def an_optimizer_of_torch(base: Base) -> Any:
    return [
        made(base(BoringModel, run=False, args=[f"--optimizer={name}"])) for name in ("AdamW", "Adagrad", "RMSprop")
    ]


def an_optimizer_with_an_argument(base: Base) -> Any:
    return made(base(Plain, run=False, args=["--optimizer", "SGD", "--optimizer.lr=0.01"]))


def an_optimizer_of_the_project(base: Base) -> Any:
    base(DemoModel, BoringDataModule, args=["fit", *NO_LOGS, "--optimizer", "LitAdam"])
    return list(_ran)


def a_schedule_of_torch(base: Base) -> Any:
    args = ["--optimizer=Adam", "--lr_scheduler=CosineAnnealingLR", "--lr_scheduler.T_max=5"]
    return made(base(BoringModel, run=False, args=args))


def a_plateau(base: Base) -> Any:
    args = ["--optimizer=Adam", "--lr_scheduler=ReduceLROnPlateau", "--lr_scheduler.monitor=train_loss"]
    entry = base(BoringModel, run=False, args=args).model.configure_optimizers()["lr_scheduler"]
    return type(entry["scheduler"]), entry["monitor"]


def a_schedule_of_the_project(base: Base) -> Any:
    every_epoch = [] if base is LightningCLI else ["--lr_scheduler_interval=epoch"]  # listed
    schedule = ["--optimizer=Adam", "--lr_scheduler", "LitLRScheduler", "--lr_scheduler.T_max=5", *every_epoch]
    base(DemoModel, BoringDataModule, args=["fit", *NO_LOGS, *schedule])
    return list(_ran)


# --- configuration files ----------------------------------------------------------------------------------------------


def a_file_and_an_option(base: Base) -> Any:
    Path("config.yaml").write_text("trainer: {max_epochs: 10, min_epochs: 2}\nmodel: {out_dim: 5}\n")
    cli = base(DemoModel, run=False, args=["--config", "config.yaml", "--trainer.max_epochs", "100"])
    return cli.trainer.max_epochs, cli.trainer.min_epochs, cli.model.l1.out_features


def the_saved_settings_again(base: Base) -> Any:
    cli = base(DemoModel, BoringDataModule, args=["fit", *SHORT, "--model.out_dim=7", "--trainer.logger=CSVLogger",
                                                  "--trainer.logger.save_dir=logs"])  # fmt: skip
    saved = Path(cli.trainer.log_dir or "") / "config.yaml"
    again = base(DemoModel, BoringDataModule, args=["fit", "--config", str(saved)])
    return again.model.l1.out_features, again.trainer.max_steps, Path(again.trainer.log_dir or "").name


def another_name_of_the_saved_settings(base: Base) -> Any:
    base(DemoModel, args=["fit", *NO_LOGS], datamodule_class=BoringDataModule,
         save_config_kwargs={"config_filename": "name.yaml"})  # fmt: skip
    return sorted(path.name for path in Path().glob("*.yaml"))


def no_saved_settings(base: Base) -> Any:
    base(DemoModel, BoringDataModule, args=["fit", *NO_LOGS], save_config_callback=None)
    return list(Path().glob("*.yaml"))


class Recorded(SaveConfigCallback):
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        _ran.append((stage, yaml.safe_load(self.parser.dump(self.config, skip_none=False))["model"]))


def a_callback_of_ones_own_for_them(base: Base) -> Any:
    for kwargs in ({}, {"save_to_log_dir": False}):
        base(DemoModel, BoringDataModule, args=["fit", *NO_LOGS], save_config_callback=Recorded,
             save_config_kwargs={"overwrite": True, **kwargs})  # fmt: skip
    return list(_ran)


class Criterion(LightningModule):
    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.criterion = criterion


def a_class_as_an_argument(base: Base) -> Any:
    Path("config.yaml").write_text(
        "model: {criterion: {class_path: torch.nn.CrossEntropyLoss, init_args: {reduction: sum}}}"
    )
    criterion: Any = base(Criterion, run=False, args=["--config=config.yaml"]).model.criterion
    return type(criterion), criterion.reduction


def arguments_that_are_not_checked(base: Base) -> Any:
    profiler = "{class_path: lightning.pytorch.profilers.PyTorchProfiler, dict_kwargs: {profile_memory: true}}"
    Path("config.yaml").write_text(f"trainer: {{profiler: {profiler}}}")
    made: Any = base(BoringModel, run=False, args=["-c", "config.yaml"]).trainer
    return type(made.profiler), made.profiler._profiler_kwargs["profile_memory"]


def files_by_group(base: Base) -> Any:
    Path("trainer.yaml").write_text("max_epochs: 10\n")
    Path("model.yaml").write_text("out_dim: 7\n")
    Path("data.yaml").write_text("data_dir: ./data\n")
    args = ["--trainer", "trainer.yaml", "--model", "model.yaml", "--data", "data.yaml"]
    cli = base(DemoModel, Data, run=False, args=args)
    return cli.trainer.max_epochs, cli.model.l1.out_features, cli.datamodule.data_dir


def settings_by_command(base: Base) -> Any:
    Path("config.yaml").write_text(
        "fit: {trainer: {max_steps: 3, logger: false}}\ntest: {trainer: {limit_test_batches: 2, logger: false}}\n"
    )
    short = ["--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false", "--trainer.accelerator=cpu"]
    fit = base(BoringModel, args=["--config", "config.yaml", "fit", *short, "--trainer.limit_val_batches=0"],
               save_config_callback=None)  # fmt: skip
    test = base(BoringModel, args=["--config", "config.yaml", "test", *short], save_config_callback=None)
    return fit.trainer.global_step, test.trainer.limit_test_batches


# --- the environment and defaults -------------------------------------------------------------------------------------


def settings_in_the_environment(base: Base) -> Any:
    args = ["--trainer", '{"max_epochs": 4}', "--model", '{"out_dim": 5}']
    cli = base(DemoModel, run=False, args=args)
    return cli.trainer.max_epochs, cli.model.l1.out_features


def options_from_the_environment(base: Base) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_FIT__MODEL__LEARNING_RATE", "0.01")
        patch.setenv("PL_FIT__MODEL__OUT_DIM", "5")
        cli = base(DemoModel, BoringDataModule, args=["fit", *NO_LOGS], parser_kwargs={"default_env": True})
    return cli.model.learning_rate, cli.model.l1.out_features


def default_files(base: Base) -> Any:
    Path("all.yaml").write_text("model: {out_dim: 4}\n")
    Path("fit.yaml").write_text("model: {out_dim: 6}\n")
    files = {"default_config_files": ["all.yaml"]}
    of_all = base(DemoModel, run=False, args=[], parser_kwargs=files).model.l1.out_features
    by_command = {"fit": {"default_config_files": ["fit.yaml"]}}
    of_fit = base(DemoModel, BoringDataModule, args=["fit", *NO_LOGS], parser_kwargs=by_command)
    return of_all, of_fit.model.l1.out_features


def order_of_what_is_given(base: Base) -> Any:
    """Defaults in code, default files, a file from the environment, a variable, and options, each over the last."""
    found = []
    Path("default.yaml").write_text("model: {out_dim: 4}\n")
    Path("whole.yaml").write_text("model: {out_dim: 5}\n")
    with pytest.MonkeyPatch.context() as patch:
        for variable, value, args in (
            ("UNUSED", "", []),
            ("PL_CONFIG", "whole.yaml", []),
            ("PL_MODEL__OUT_DIM", "6", []),
            ("UNUSED", "", ["--model.out_dim=7"]),
            ("UNUSED", "", ["--model.out_dim=7", "--config=whole.yaml"]),
        ):
            patch.setenv(variable, value)
            kwargs = {"default_env": True, "default_config_files": ["default.yaml"]}
            found.append(base(DemoModel, run=False, args=args, parser_kwargs=kwargs).model.l1.out_features)
    return found


def interpolation(base: Base) -> Any:
    pytest.importorskip("omegaconf")
    Path("config.yaml").write_text("model: {first: 12, second: '${model.first}'}\n")

    class Two(BoringModel):
        def __init__(self, first: int = 1, second: int = 2) -> None:
            super().__init__()
            self.both = first, second

    cli = base(Two, run=False, args=["-c", "config.yaml"], parser_kwargs={"parser_mode": "omegaconf"})
    return cli.model.both


# --- classes ----------------------------------------------------------------------------------------------------------


def instantiation_only(base: Base) -> Any:
    class NoFit(Trainer):
        def fit(self, *args: Any, **kwargs: Any) -> None:
            _ran.append("fit")

    cli = base(BoringModel, run=False, trainer_class=NoFit, args=[])
    cli.trainer.fit(cli.model)
    return type(cli.trainer).__name__, list(_ran)


def callbacks_in_a_file(base: Base) -> Any:
    config = {
        "trainer": {
            "callbacks": [
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_weights_only": True}},
                {"class_path": "LearningRateMonitor", "init_args": {"logging_interval": "epoch"}},
            ]
        }
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    callbacks = callbacks_of(base(BoringModel, run=False, args=["-c", "config.yaml"]))
    (checkpoint,) = [x for x in callbacks if isinstance(x, ModelCheckpoint)]
    (monitor,) = [x for x in callbacks if isinstance(x, LearningRateMonitor)]
    return checkpoint.save_weights_only, monitor.logging_interval, listed(callbacks)


def callbacks_of(cli: LightningCLI) -> Any:
    trainer: Any = cli.trainer
    return trainer.callbacks


def listed(callbacks: Any) -> list[str]:
    return sorted(type(callback).__name__ for callback in callbacks if not isinstance(callback, Resume))


def callbacks_by_options(base: Base) -> Any:
    args = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=x", "--trainer.callbacks.patience=5",
            "--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks.logging_interval=epoch"]  # fmt: skip
    callbacks = callbacks_of(base(BoringModel, run=False, args=args))
    (stopping,) = [x for x in callbacks if isinstance(x, EarlyStopping)]
    return stopping.patience, listed(callbacks)


class Coder(nn.Module):
    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.layers = layers


THREE: Any = lazy_instance(Coder, layers=3)


class MainModel(BoringModel):
    def __init__(self, encoder: nn.Module, decoder: nn.Module = THREE) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder


def submodules(base: Base) -> Any:
    encoder = {"class_path": f"{__name__}.Coder", "init_args": {"layers": 9}}
    Path("config.yaml").write_text(yaml.safe_dump({"model": {"encoder": encoder}}))
    model: Any = base(MainModel, run=False, args=["-c", "config.yaml"]).model
    return model.encoder.layers, model.decoder.layers


def a_fixed_optimizer(base: Base) -> Any:
    class CLI(base):  # type: ignore[valid-type, misc]
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_optimizer_args(torch.optim.Adam)
            parser.add_lr_scheduler_args(torch.optim.lr_scheduler.ExponentialLR)

    Path("config.yaml").write_text("optimizer: {lr: 0.01}\nlr_scheduler: {gamma: 0.2}\n")
    by_file = CLI(BoringModel, run=False, args=["-c", "config.yaml"])
    by_option = CLI(BoringModel, run=False, args=["--optimizer.lr=0.01", "--lr_scheduler.gamma=0.2"])
    return made(by_file), made(by_option)


class TwoOptimizers(BoringModel):
    def __init__(self, optimizer1: OptimizerCallable, optimizer2: OptimizerCallable = torch.optim.Adam) -> None:
        super().__init__()
        self.optimizers1 = optimizer1, optimizer2

    def configure_optimizers(self) -> Any:
        return [make(self.parameters()) for make in self.optimizers1]


def two_optimizers(base: Base) -> Any:
    args = ["--model.optimizer1=Adam", "--model.optimizer1.lr=0.01", "--model.optimizer2=AdamW",
            "--model.optimizer2.lr=0.0001"]  # fmt: skip
    optimizers = base(TwoOptimizers, run=False, auto_configure_optimizers=False, args=args).model.configure_optimizers()
    return [(type(optimizer), optimizer.param_groups[0]["lr"]) for optimizer in optimizers]


class Injected(BoringModel):
    def __init__(
        self,
        optimizer: OptimizerCallable = lambda p: torch.optim.SGD(p, lr=0.01),
        scheduler: LRSchedulerCallable = torch.optim.lr_scheduler.ConstantLR,
    ) -> None:
        super().__init__()
        self.optimizer, self.scheduler = optimizer, scheduler

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer)}


def injected(base: Base) -> Any:
    kwargs: dict[str, Any] = {"run": False, "auto_configure_optimizers": False}
    # With its rate: another class keeps that of the one before with LightningCLI alone, as is listed.
    changed = [
        "--model.optimizer=Adam",
        "--model.optimizer.lr=0.02",
        "--model.scheduler=ExponentialLR",
        "--model.scheduler.gamma=0.5",
    ]
    return [made(base(Injected, args=args, **kwargs)) for args in ([], changed)]


def linked_to_an_argument(base: Base) -> Any:
    class CLI(base):  # type: ignore[valid-type, misc]
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_optimizer_args(torch.optim.Adam, "first", link_to="model.first")
            parser.add_lr_scheduler_args(
                (torch.optim.lr_scheduler.StepLR, torch.optim.lr_scheduler.ExponentialLR),
                "schedule", link_to="model.schedule",
            )  # fmt: skip

    class Model(BoringModel):
        def __init__(self, first: dict, schedule: dict) -> None:
            super().__init__()
            self.given = first, schedule

    args = ["--first.lr=0.3", "--schedule=ExponentialLR", "--schedule.gamma=0.7"]
    first, schedule = CLI(Model, run=False, args=args).model.given
    return first["class_path"], first["init_args"]["lr"], schedule["class_path"], schedule["init_args"]["gamma"]


def from_python(base: Base) -> Any:
    def main(args: ArgsType = None) -> LightningCLI:
        return base(DemoModel, run=False, args=args)

    given = main(["--trainer.max_epochs=100", "--model.out_dim=24"]), main({"trainer": {"max_epochs": 2}, "model": {}})
    namespace = main(Namespace(trainer=Namespace(max_epochs=5)))
    return [(cli.trainer.max_epochs, cli.model.l1.out_features) for cli in (*given, namespace)]


# --- one's own class --------------------------------------------------------------------------------------------------


def before_and_after(base: Base) -> Any:
    class CLI(base):  # type: ignore[valid-type, misc]
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_argument("--notification_email", default="will@email.com")

        def before_fit(self) -> None:
            _ran.append((self.config["fit"]["notification_email"], self.trainer.global_step))

        def after_fit(self) -> None:
            _ran.append((self.config["fit"]["notification_email"], self.trainer.global_step))

        def before_instantiate_classes(self) -> None:
            _ran.append(self.config["fit"]["trainer"]["max_steps"])

    CLI(BoringModel, args=["fit", *NO_LOGS, "--notification_email=a@b"])
    return list(_ran)


def forced_callbacks(base: Base) -> Any:
    class CLI(base):  # type: ignore[valid-type, misc]
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_lightning_class_args(EarlyStopping, "my_early_stopping")
            parser.set_defaults({"my_early_stopping.monitor": "val_loss", "my_early_stopping.patience": 5})

    callbacks = callbacks_of(CLI(BoringModel, run=False, args=["--my_early_stopping.patience=6"]))
    (stopping,) = [x for x in callbacks if isinstance(x, EarlyStopping)]
    return stopping.patience, stopping.monitor, listed(callbacks)


def defaults_of_class_types(base: Base) -> Any:
    by_dictionary = {"class_path": f"{__name__}.Coder", "init_args": {"layers": 24}}
    found = []
    for default in (by_dictionary, lazy_instance(Coder, layers=24)):

        class CLI(base):  # type: ignore[valid-type, misc]
            chosen: Any = default

            def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
                parser.set_defaults({"model.encoder": self.chosen})

        model: Any = CLI(MainModel, run=False, args=[]).model
        found.append((type(model.encoder), model.encoder.layers))
    return found


def defaults_of_the_trainer(base: Base) -> Any:
    logger = lazy_instance(CSVLogger, save_dir="logs")
    trainer = base(BoringModel, run=False, args=[], trainer_defaults={"max_epochs": 3, "logger": logger}).trainer
    return trainer.max_epochs, type(trainer.logger)


class Classes(BoringModel):
    def __init__(self, num_classes: int, batch_size: int = 1) -> None:
        super().__init__()
        self.given = num_classes, batch_size


class ClassesData(LightningDataModule):
    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.num_classes = 5


def linked_when_made(base: Base) -> Any:
    class CLI(base):  # type: ignore[valid-type, misc]
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
            parser.link_arguments("data.batch_size", "model.batch_size", compute_fn=lambda size: 2 * size)

    return CLI(Classes, ClassesData, run=False, args=["--data.batch_size=3"]).model.given


def a_seed(base: Base) -> Any:
    for args in (["--seed_everything=7"], ["--seed_everything", "false"], []):
        cli = base(BoringModel, run=False, args=args, seed_everything_default=3)
        _ran.append((cli.config.seed_everything, cli.model.layer.weight[0, 0].item() if args[:1] != args[1:] else None))
    return [seed for seed, _ in _ran], _ran[0]


def errors_while_developing(base: Base) -> Any:
    """With JSONARGPARSE_DEBUG set a mistake in an argument is an exception and not the end of the process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JSONARGPARSE_DEBUG", "true")
        return base(BoringModel, run=False, args=["--trainer.max_epochs=few"])


def errors_by_exception(base: Base) -> Any:
    return base(BoringModel, run=False, args=["--trainer.max_epochs=few"], parser_kwargs={"exit_on_error": False})


USES: list[Callable[[Base], Any]] = [
    value
    for value in list(vars(sys.modules[__name__]).values())
    if getattr(value, "__annotations__", {}).get("base") == "Base"
]


@pytest.mark.slow
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@pytest.mark.filterwarnings("ignore")
def test_a_documented_use_gives_the_same(use: Any, capsys: pytest.CaptureFixture[str]) -> None:
    stock = outcome(use, BOTH[0], capsys)
    _ran.clear()
    ours = outcome(use, BOTH[1], capsys)
    assert ours == stock
    if not use.__name__.startswith("errors"):
        assert not (isinstance(stock, type) and issubclass(stock, Exception)), "the example itself fails"


HELP = [
    ["fit", "--help"],
    ["--help"],
    ["fit", "--model.help", "Model1"],
    ["fit", "--data.help", "FakeDataset2"],
    ["fit", "--optimizer.help", "Adagrad"],
    ["fit", "--optimizer.help", "Adam"],
    ["fit", "--lr_scheduler.help", "StepLR"],
    ["fit", "--trainer.logger.help", "CSVLogger"],
]


@pytest.mark.slow
@pytest.mark.parametrize("args", HELP, ids=" ".join)
def test_help_says_what_lightnings_says(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Every option and argument of its help is in ours, which has more."""
    stock, ours = (shown(partial(base, args=args), capsys) for base in BOTH)
    options = {word.rstrip(",]") for word in stock.replace("[", " ").split() if word.startswith("--")}
    assert len(options) > (0 if args == ["--help"] else 2)
    assert options <= {word.rstrip(",]") for word in ours.replace("[", " ").split()}


@pytest.mark.slow
@pytest.mark.parametrize("args", [[], ["--model", "DemoModel"], ["--optimizer=Adam", "--lr_scheduler=StepLR"]])
def test_the_printed_settings_have_lightnings_keys(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    settings = (shown(partial(base, args=["fit", *args, "--print_config"]), capsys) for base in BOTH)
    stock, ours = map(yaml.safe_load, settings)
    assert {key: ours[key] for key in stock} == stock
    assert set(ours) - set(stock) <= {"resume", "grouping", "lr_scheduler_interval"}
