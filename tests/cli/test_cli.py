"""The command line: flags, presets, messages, and runs that go on after an interruption."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.precision import Precision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch import nn

from lightning_optim import NonFiniteGradientsError, OptimizerMixin
from lightning_optim.cli import OptimCLI, find_checkpoint, main, presets
from lightning_optim.registry import OPTIMIZERS

COMMAND = Path(sys.executable).with_name("lightning-optim")
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
SHORT = [*QUIET, "--trainer.accelerator", "cpu", "--trainer.max_steps", "3", "--trainer.limit_val_batches", "1"]
TINY_TEXT = ["--model.layers", "1", "--model.width", "32", "--data.max_bytes", "50000", "--data.sequence_length", "32"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # LightningCLI warns when a process with arguments hands it others.
    monkeypatch.setattr(sys, "argv", ["lightning-optim"])


def printed_config(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *args, "--print_config"])
    assert stop.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)


# --- lists and presets ------------------------------------------------------------------------------------------


def test_list_as_json_has_every_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list", "--json"])
    rows = json.loads(capsys.readouterr().out)
    internals = {row["name"]: row["internals"] for row in rows}
    assert internals["Anon"]["refreshes"] == "number of refreshes of the scale so far"
    assert internals["SGD"] == {}
    assert [row["name"] for row in rows] == list(OPTIMIZERS)
    for row in rows:
        assert set(row) == {"name", "kind", "description", "paper", "idea", "experimental", "defaults", "internals"}
        assert row["defaults"]["lr"] >= 0


def test_list_as_a_table_and_of_presets(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("MVNGrad", "HVAdam"))
    main(["list", "--presets", "--json"])
    assert {"digits", "namo"} <= {row["name"] for row in json.loads(capsys.readouterr().out)}


def test_presets_have_names_of_their_own() -> None:
    assert not presets("tasks").keys() & presets("optimizers").keys()
    assert list(presets("optimizers")) == sorted(name.lower() for name in OPTIMIZERS)


# Replace a task's own data and sizes by ones that need no network and little time.
SMALL_DATA = ["--data.dataset", "digits", "--data.num_workers", "0"]
SMALL_MODEL = ["--model.backbone", "test_resnet"]
SMALL_VISION = [*SMALL_DATA, *SMALL_MODEL]
SMALL_TEXT = ["--data.dataset", "stdlib", "--data.tokenizer", "byte", "--data.batch_size", "4", "--model.size", "tiny"]


@pytest.mark.parametrize("task", presets("tasks"))
def test_task_presets_train_once_their_data_is_there(task: str) -> None:
    model = yaml.safe_load(presets("tasks")[task].read_text())["model"]["class_path"]
    small = SMALL_VISION if model.endswith("VisionClassifier") else [*SMALL_TEXT, *TINY_TEXT]
    if task == "digits":
        small = []
    elif task == "fashion-mnist":
        small = [*small, "--model.backbone_args", "null"]
    here = ["--trainer.devices", "1", "--trainer.precision", "32-true", "--trainer.accelerator", "cpu"]
    main(["fit", "-c", task, *small, *here, *QUIET, "--trainer.fast_dev_run", "1"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_presets_compose_and_train(name: str) -> None:
    """Over a task whose preset names another optimizer, of which nothing may be left."""
    main(["fit", "-c", "stdlib-text", "-c", name.lower(), *TINY_TEXT, *SHORT, "--trainer.logger", "false"])


def test_a_changed_optimizer_keeps_nothing_of_the_one_before(capsys: pytest.CaptureFixture[str]) -> None:
    config = printed_config(capsys, "-c", "digits", "-c", "namo", "--optimizer", "AdaBelief")
    assert config["optimizer"]["init_args"] == {
        **OPTIMIZERS["AdaBelief"].defaults,
        "betas": list(OPTIMIZERS["AdaBelief"].defaults["betas"]),
        "maximize": False,
        "skip_nonfinite": True,
        "max_consecutive_skips": 100,
        "backend": "auto",
        "rounding": "nearest",
        "state_dtype": "float32",
    }


def test_later_files_and_flags_win(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("optimizer:\n  class_path: Muon\n  init_args: {lr: 0.5}\ndata.batch_size: 7\n")
    config = printed_config(capsys, "-c", "digits", "-c", "namo", "--config=mine.yaml", "--optimizer.momentum", "0.5")
    assert config["optimizer"]["class_path"] == "lightning_optim.Muon"
    arguments = config["optimizer"]["init_args"]
    defaults = OPTIMIZERS["Muon"].defaults
    assert (arguments["lr"], arguments["momentum"], arguments["fallback_lr"]) == (0.5, 0.5, defaults["fallback_lr"])
    assert config["data"]["init_args"]["batch_size"] == 7


# --- flags ------------------------------------------------------------------------------------------------------


def built(*args: str, model: Any = BoringModel) -> Any:
    cli = OptimCLI(model, run=False, args=list(args), seed_everything_default=1)
    return cli.model.configure_optimizers()


def test_flags_reach_optimizer_fallback_and_schedule() -> None:
    entry = built(
        "--optimizer=NAMO", "--optimizer.lr=0.012", "--optimizer.fallback=MVNGrad", "--optimizer.fallback_lr=1e-3",
        "--lr_scheduler=WarmupCosine", "--lr_scheduler.warmup=2", "--lr_scheduler.total_steps=10",
        "--grouping.no_decay=[]", "--grouping.lr_multipliers={layer.bias: 0.5}", "--grouping.matrix=[layer.weight]",
    )  # fmt: skip
    optimizer, schedule = entry["optimizer"], entry["lr_scheduler"]
    roles = {group["role"]: group for group in optimizer.param_groups}
    assert type(optimizer).__name__ == "NAMO"
    assert (roles["matrix"]["initial_lr"], roles["fallback"]["initial_lr"]) == (0.012, 0.0005)
    assert roles["fallback"]["rule"] == "MVNGrad"
    assert (type(schedule["scheduler"]).__name__, schedule["interval"]) == ("WarmupCosine", "step")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bare_names_mean_ours(name: str) -> None:
    assert type(built("--optimizer", name)["optimizer"]) is OPTIMIZERS[name].cls


def test_dotted_paths_mean_what_they_say() -> None:
    assert type(built("--optimizer", "torch.optim.RAdam")["optimizer"]) is torch.optim.RAdam


def test_any_torch_schedule_by_class_path() -> None:
    path = "torch.optim.lr_scheduler.StepLR"
    entry = built("--optimizer=MVNGrad", f"--lr_scheduler={path}", "--lr_scheduler.step_size=5")
    assert entry["lr_scheduler"]["scheduler"].step_size == 5
    entry = built(
        "--optimizer=MVNGrad", f"--lr_scheduler={path}", "--lr_scheduler.step_size=5", "--lr_scheduler_interval=epoch"
    )
    assert entry["lr_scheduler"]["interval"] == "epoch"


def test_a_schedule_on_a_plateau_watches_a_metric_every_epoch() -> None:
    plateau = ["--lr_scheduler=ReduceLROnPlateau", "--lr_scheduler.monitor=x", "--lr_scheduler.patience=3"]
    entry = built("--optimizer=SGD", *plateau)["lr_scheduler"]
    assert (entry["monitor"], entry["interval"], entry["scheduler"].patience) == ("x", "epoch", 3)


@pytest.mark.filterwarnings("ignore:The checkpoint of step:UserWarning")
def test_a_schedule_finds_out_the_length_of_the_run() -> None:
    one_cycle = ["--lr_scheduler=torch.optim.lr_scheduler.OneCycleLR", "--lr_scheduler.max_lr=0.1"]
    args = ["fit", "--optimizer=Muon", *one_cycle, "--trainer.max_steps=5", "--trainer.logger=false", *QUIET]
    cli = OptimCLI(BoringModel, args=args, seed_everything_default=1)
    schedule = cli.trainer.lr_scheduler_configs[0]
    assert (schedule.interval, schedule.scheduler.total_steps, schedule.scheduler.last_epoch) == ("step", 5, 5)


@pytest.mark.filterwarnings("ignore:The checkpoint of step:UserWarning")
def test_a_model_from_the_folder_one_is_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    code = "from lightning.pytorch.demos.boring_classes import BoringModel\n\nclass Mine(BoringModel):\n    pass\n"
    Path("a_project_of_mine.py").write_text(code)
    main(["fit", "--model", "a_project_of_mine.Mine", "--optimizer", "NAMO", *SHORT])
    config = yaml.safe_load(Path("runs/Mine/NAMO-lr0.01-s1/config.yaml").read_text())
    assert config["optimizer"]["class_path"] == "lightning_optim.NAMO"


class Mixed(OptimizerMixin, BoringModel):
    optimizer = "AdamW"


def test_flags_replace_what_a_mixin_was_given_one_by_one() -> None:
    assert type(built(model=Mixed)["optimizer"]) is torch.optim.AdamW
    entry = built("--lr_scheduler=ConstantLR", model=Mixed)
    assert type(entry["optimizer"]) is torch.optim.AdamW
    assert type(entry["lr_scheduler"]["scheduler"]) is torch.optim.lr_scheduler.ConstantLR
    assert type(built("--optimizer=Anon", model=Mixed)["optimizer"]) is OPTIMIZERS["Anon"].cls


def test_without_the_flag_a_module_keeps_its_own_optimizer() -> None:
    optimizers, _ = built()
    assert type(optimizers[0]) is torch.optim.SGD


@pytest.mark.parametrize(("flags", "shown"), [(["--optimizer.help", "NAMO"], "adaptive"), (["--help"], "--optimizer")])
def test_help(flags: list[str], shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    with suppress(SystemExit):
        main(["fit", *flags])
    assert shown in capsys.readouterr().out


# --- diagnostics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--diagnostics.tier", "off"]])
def test_runs_carry_diagnostics_unless_told_not_to(flags: list[str]) -> None:
    main(["fit", *SHORT, "--diagnostics.first_n_steps", "1", *flags])
    events = EventAccumulator("runs/digits/MVNGrad-lr0.003-s1").Reload()
    assert ("update/rms" in events.Tags()["scalars"]) is not bool(flags)


def test_diagnostic_callbacks_by_flags() -> None:
    callback = ["--trainer.callbacks+=lightning_optim.callbacks.SignCollapse", "--trainer.callbacks.every_n_steps=1"]
    main(["fit", *SHORT, "--diagnostics.tier", "off", *callback])
    tags = EventAccumulator("runs/digits/MVNGrad-lr0.003-s1").Reload().Tags()["scalars"]
    assert "sign_collapse/index" in tags


# --- messages ---------------------------------------------------------------------------------------------------

WRONG = {
    "optimizer": (["fit", "--optimizer", "Namo"], ["Namo", "NAMO"]),
    "optimizer argument": (["fit", "--optimizer", "NAMO", "--optimizer.betta", "1"], ["betta", "betas"]),
    "optimizer path": (["fit", "--optimizer", "torch.optim.Adamm"], ["Adamm", "Adam"]),
    "not an optimizer": (["fit", "--optimizer", "torch.nn.Linear"], ["torch.nn.Linear"]),
    "optimizer in a file": (["fit", "-c", "optimizer.yaml"], ["NAMOO", "NAMO"]),
    "key in a file": (["fit", "-c", "key.yaml"], ["max_epoch", "max_epochs"]),
    "not YAML": (["fit", "-c", "broken.yaml"], ["broken.yaml"]),
    "not settings": (["fit", "-c", "words.yaml"], ["words.yaml"]),
    "torch optimizer range": (["fit", "--optimizer", "SGD", "--optimizer.lr", "-1"], ["--optimizer", "-1"]),
    "optimizer range": (["fit", "--optimizer", "NAMO", "--optimizer.lr", "-1"], ["lr", "-1"]),
    "optimizer type": (["fit", "--optimizer", "NAMO", "--optimizer.lr", "fast"], ["lr", "fast"]),
    "fallback": (["fit", "--optimizer", "NAMO", "--optimizer.fallback", "Adamw"], ["Adamw", "AdamW"]),
    "schedule": (["fit", "--lr_scheduler", "WarmupCosin"], ["WarmupCosin", "WarmupCosine"]),
    "schedule range": (["fit", "--lr_scheduler.warmup", "1.5"], ["warmup", "1.5"]),
    "schedule argument": (
        ["fit", "--lr_scheduler", "WarmupCosine", "--lr_scheduler.warmpu", "1"],
        ["warmpu", "warmup"],
    ),
    "missing argument": (["fit", "--lr_scheduler", "OneCycleLR"], ["OneCycleLR", "max_lr"]),
    "interval": (["fit", "--lr_scheduler_interval", "steps"], ["steps", "'step'"]),
    "flag": (["fit", "--optimiser", "NAMO"], ["--optimiser", "--optimizer"]),
    "trainer flag": (["fit", "--trainer.max_epoch", "3"], ["max_epoch", "max_epochs"]),
    "trainer type": (["fit", "--trainer.max_epochs", "few"], ["max_epochs", "int", "few"]),
    "callback": (["fit", "--trainer.callbacks+=ModelCheckpoit"], ["ModelCheckpoit", "ModelCheckpoint"]),
    "model": (["fit", "--model", "VisionClasifier"], ["VisionClasifier", "VisionClassifier"]),
    "model argument": (["fit", "--model.bakbone", "resnet18"], ["bakbone", "backbone"]),
    "model range": (["fit", "--model.label_smoothing", "2"], ["label_smoothing", "2"]),
    "data argument": (["fit", "--data.datase", "digits"], ["datase", "dataset"]),
    "data type": (["fit", "--data.batch_size", "big"], ["batch_size", "int", "big"]),
    "data range": (["fit", "--data.batch_size", "0"], ["batch_size", "0"]),
    "data of another kind": (["fit", "--data", "TextData"], ["TextData", "num_classes"]),
    "decay": (["fit", "--grouping.layer_decay", "2"], ["layer_decay", "2"]),
    "kind": (["fit", "--grouping.no_decay", "[norms]"], ["norms", "norm"]),
    "preset": (["fit", "-c", "digit"], ["digit", "digits"]),
    "file": (["fit", "-c", "none.yaml"], ["none.yaml"]),
    "subcommand": (["fitt"], ["fitt", "fit"]),
    "checkpoint": (["fit", "--ckpt_path", "none.ckpt"], ["none.ckpt"]),
    "not a checkpoint": (["fit", "--ckpt_path", "words.yaml"], ["words.yaml", "not a checkpoint"]),
    "no checkpoint yet": (["fit", "--ckpt_path", "last"], ["last", "runs"]),
    "data set": (["fit", "--data.dataset", "digitz"], ["digitz", "digits"]),
    "data folder": (["fit", "-c", "imagefolder", "--data.root", "nowhere", "--trainer.precision", "32"], ["nowhere"]),
    "backbone": (["fit", "--model.backbone", "resnet81"], ["resnet81", "resnet18"]),
    "tier": (["fit", "--diagnostics.tier", "fulll"], ["fulll", "'full'"]),
    "interval of diagnostics": (["fit", "--diagnostics.every_n_steps", "0"], ["every_n_steps", "0"]),
    "layers of diagnostics": (["fit", "--diagnostics.layers", "[no.such]", *SHORT], ["layers", "no.such"]),
    "pattern": (["fit", "--grouping.lr_multipliers", "{nothing.*: 2.0}"], ["nothing.*"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_ends_in_one_message(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    args, parts = WRONG[case]
    Path("optimizer.yaml").write_text("optimizer: NAMOO")
    Path("key.yaml").write_text("trainer: {max_epoch: 3}")
    Path("broken.yaml").write_text("trainer: [")
    Path("words.yaml").write_text("some words")
    with pytest.raises(SystemExit) as stop:
        main([*args, *(QUIET if args[0] == "fit" else [])])
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert shown.count("error:") == 1
    assert shown.splitlines()[-1].startswith("lightning-optim: error: ")
    for part in parts:
        assert part in shown, shown


def test_a_schedule_for_an_optimizer_that_is_not_ours_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        built("--lr_scheduler", "WarmupCosine")
    assert stop.value.code == 2
    assert "BoringModel" in capsys.readouterr().err


class WrongWhenMade(BoringModel):
    def __init__(self) -> None:
        raise ValueError("a mistake in a project")


class WrongWhenTrained(BoringModel):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise ValueError("a mistake in a project")


class WrongUseOfTorch(BoringModel):
    def __init__(self) -> None:
        super().__init__()
        torch.optim.SGD(self.parameters(), lr=-1.0)


@pytest.mark.parametrize("model", [WrongWhenMade, WrongWhenTrained, WrongUseOfTorch])
def test_mistakes_in_code_keep_their_traceback(model: type) -> None:
    with pytest.raises(ValueError, match=r"a mistake in a project|Invalid learning rate"):
        OptimCLI(model, args=["fit", "--optimizer", "NAMO", "--trainer.fast_dev_run", "1", *QUIET])


# --- built late -------------------------------------------------------------------------------------------------


class Late(OptimizerMixin, BoringModel):
    """Has no parameters before ``configure_model``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = None  # type: ignore[assignment]

    def configure_model(self) -> None:
        if self.layer is None:
            self.layer = nn.Linear(32, 2)


class Replacing(Precision):
    """Replaces modules by new ones, as the Transformer Engine's plugin does."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        module.layer = nn.Linear(32, 2)
        return module


@pytest.mark.parametrize(("model", "plugins"), [(Late, []), (BoringModel, [Replacing()])])
def test_parameters_that_come_late_are_trained(model: type, plugins: list[Any]) -> None:
    class Watch(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            self.before = [p.detach().clone() for p in pl_module.parameters()]

        def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            self.moved = [not torch.equal(p, q) for p, q in zip(pl_module.parameters(), self.before)]

    watch = Watch()
    OptimCLI(
        model,
        args=["fit", "--optimizer", "NAMO", "--optimizer.lr", "0.1", "--trainer.fast_dev_run", "2", *QUIET],
        trainer_defaults={"callbacks": [watch], "plugins": plugins, "accelerator": "cpu"},
        seed_everything_default=1,
    )
    assert watch.moved == [True, True]


def test_the_stock_command_line_of_another_project(tmp_path: Path) -> None:
    shutil.copytree(Path(__file__).parent / "stock_cli_project", tmp_path, dirs_exist_ok=True)
    flags = ["--optimizer", "lightning_optim.NAMO", "--optimizer.lr", "0.01", "--trainer.max_epochs", "1", *QUIET]
    run = subprocess.run([sys.executable, "train.py", "fit", *flags], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "OPTIMIZER lightning_optim.optimizers.namo NAMO 0.01 True" in run.stdout


# --- runs -------------------------------------------------------------------------------------------------------


def test_a_run_says_where_to_look(capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", *SHORT])
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert "runs/digits/MVNGrad-lr0.003-s1" in last
    assert "tensorboard --logdir runs" in last
    folder = Path("runs/digits/MVNGrad-lr0.003-s1")
    assert list(folder.glob("events.*"))
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    assert (folder / "config.yaml").is_file()


def events(folder: Path) -> list[Any]:
    return [
        value
        for file in folder.glob("events.*")
        for e in EventFileLoader(str(file)).Load()
        for value in e.summary.value
    ]


def test_a_run_records_its_settings() -> None:
    schedule = ["--lr_scheduler", "WarmupLinear", "--lr_scheduler.warmup", "1"]
    optimizer = ["--optimizer", "NAMO", "--optimizer.lr", "0.02"]
    main(["fit", *optimizer, *schedule, *SHORT, "--trainer.log_every_n_steps", "1"])
    folder = Path("runs/digits/NAMO-lr0.02-s1")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["optimizer"]["class_path"] == "lightning_optim.NAMO"
    assert config["lr_scheduler"]["init_args"]["warmup"] == 1
    settings = yaml.safe_load((folder / "hparams.yaml").read_text())
    assert (settings["optimizer"], settings["optimizer/lr"]) == ("NAMO", 0.02)
    assert (settings["lr_scheduler"], settings["model"], settings["data/dataset"]) == (
        "WarmupLinear",
        "VisionClassifier",
        "digits",
    )
    tags = [value.tag for value in events(folder)]
    assert tags.count("_hparams_/session_start_info") == 1
    assert "optimizer/routing/text_summary" in tags
    assert any(tag.startswith("lr-NAMO/") for tag in tags)


SPOILED = """
from pathlib import Path
from lightning_optim.models import VisionClassifier

class Spoiled(VisionClassifier):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if Path("spoiled").exists() and self.global_step >= 4 else loss
"""


def test_a_run_whose_gradients_stay_nan_ends_with_a_checkpoint_to_go_on_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("a_spoiled_project.py").write_text(SPOILED)
    Path("spoiled").touch()
    model = ["--model", "a_spoiled_project.Spoiled", *SMALL_MODEL, "--data", "VisionData", *SMALL_DATA]
    model += ["--model.num_classes", "10", "--model.in_chans", "1", "--model.image_size", "8"]
    args = [*model, *QUIET, "--trainer.accelerator", "cpu", "--trainer.limit_val_batches", "1"]
    args += ["--optimizer", "NAMO", "--optimizer.max_consecutive_skips", "5", "--diagnostics.every_n_steps", "1"]
    with pytest.raises(NonFiniteGradientsError, match="NAMO has skipped 5 steps in a row, all since its step 4"):
        main(["fit", *args, "--trainer.max_steps", "20"])
    folder = Path("runs/Spoiled/NAMO-lr0.01-s1")
    rescued = folder / "checkpoints/rescue-step=8.ckpt"
    assert find_checkpoint("last", Path("runs")) == rescued
    weights = last(Path("runs"))["state_dict"]
    assert all(x.isfinite().all() for x in weights.values())
    logged = EventAccumulator(str(folder)).Reload().Scalars("gradient/skipped_steps")
    assert [e.value for e in logged] == [0, 0, 0, 0, 5]

    Path("spoiled").unlink()
    main(["fit", *args, "--trainer.max_steps", "20", "--ckpt_path", "last"])
    assert [f.name for f in Path("runs/Spoiled").iterdir()] == ["NAMO-lr0.01-s1"]
    after = last(Path("runs"))
    assert after["global_step"] == 20
    states = after["optimizer_states"][0]["state"].values()
    # 20 less the 4 skipped ones that Lightning has counted; the fifth was never finished.
    assert {int(state["step"]) for state in states} == {16}
    assert any(not torch.equal(x, weights[name]) for name, x in after["state_dict"].items())


def test_a_run_in_bfloat16_with_another_rounding() -> None:
    args = [*SHORT, "--trainer.precision", "bf16-true", "--optimizer", "NAMO", "--optimizer.rounding", "split"]
    main(["fit", *args])
    states = last(Path("runs"))["optimizer_states"][0]["state"].values()
    assert {state["residual"].dtype for state in states} == {torch.int16}
    assert {x.dtype for x in last(Path("runs"))["state_dict"].values() if x.is_floating_point()} == {torch.bfloat16}
    main(["fit", *args, "--trainer.max_steps", "5", "--ckpt_path", "last"])
    assert last(Path("runs"))["global_step"] == 5


@pytest.mark.slow
def test_the_default_run_classifies_digits() -> None:
    main(["fit", *QUIET])
    scalars = EventAccumulator("runs/digits/MVNGrad-lr0.003-s1").Reload()
    assert scalars.Scalars("val/accuracy")[-1].value >= 0.96


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_other_subcommands_take_the_last_checkpoint(subcommand: str) -> None:
    main(["fit", *SHORT])
    main([subcommand, "--ckpt_path", "last", *QUIET])
    assert [folder.name for folder in Path("runs/digits").iterdir()] == ["MVNGrad-lr0.003-s1"]


def test_the_last_checkpoint_is_the_newest_that_is_whole(tmp_path: Path) -> None:
    for i, name in enumerate(["runs/a/version_0/checkpoints/x.ckpt", "runs/b/version_3/checkpoints/y.ckpt"]):
        Path(name).parent.mkdir(parents=True)
        torch.save({"callbacks": {}, "state_dict": {}}, name)
        os.utime(name, (i, i))
    whole = Path("runs/b/version_3/checkpoints/y.ckpt")
    Path("runs/b/version_3/checkpoints/last.ckpt").write_bytes(whole.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=r"last\.ckpt is damaged or was not written to its end"):
        assert find_checkpoint("last", Path("runs")) == whole
    assert find_checkpoint("last", Path("runs/a")) == Path("runs/a/version_0/checkpoints/x.ckpt")


def test_the_best_checkpoint_is_that_of_the_last_run() -> None:
    main(["fit", "--trainer.max_epochs", "2", "--trainer.limit_train_batches", "2", *QUIET])
    best = find_checkpoint("best", Path("runs"))
    assert best.name.startswith("best-")
    assert best.is_file()


def test_a_run_that_goes_on_has_its_own_settings_and_folder() -> None:
    steps = [*QUIET, "--trainer.limit_val_batches", "1", "--trainer.max_steps"]
    main(["fit", "-c", "stdlib-text", "--optimizer", "Muon", *TINY_TEXT, *steps, "2"])
    main(["fit", "--ckpt_path", "last", *steps, "4"])
    assert [str(folder) for folder in Path("runs").glob("*/*")] == ["runs/stdlib-text/Muon-lr0.02-s1"]
    config = yaml.safe_load(Path("runs/stdlib-text/Muon-lr0.02-s1/config.yaml").read_text())
    assert config["optimizer"]["class_path"] == "lightning_optim.Muon"
    assert last(Path("runs"))["global_step"] == 4


def test_a_run_does_not_go_on_with_another_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", *SHORT])
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--ckpt_path", "last", "--optimizer", "NAMO", *SHORT])
    assert stop.value.code == 2
    shown = capsys.readouterr().err.splitlines()[-1]
    assert "NAMO" in shown
    assert "MVNGrad" in shown


def last(folder: Path) -> dict[str, Any]:
    return torch.load(find_checkpoint("last", folder), weights_only=True)


# In `text` the checkpoints are written within epochs of 31 steps, in `images` at the end of each of three.
RUNS = {
    "text": [
        *("-c", "stdlib-text", "--model.dropout", "0.1", *TINY_TEXT, "--data.max_bytes", "18000"),
        *("--trainer.max_steps", "60", "--trainer.val_check_interval", "5", "--trainer.limit_val_batches", "1"),
    ],
    "images": [
        *("-c", "digits", "--model.backbone", "test_resnet", "--model.stem_stride", "2", "--model.mixup", "0.2"),
        *("--model.backbone_args", "null", "--trainer.max_epochs", "3"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(("run", "name"), [("text", "SOAP"), ("images", "MVNGrad")])
def test_killed_and_resumed_is_bit_for_bit_the_same(run: str, name: str) -> None:
    args = ["fit", *RUNS[run], "--optimizer", name, "--trainer.accelerator", "cpu", *QUIET]
    straight, killed = (["--trainer.default_root_dir", folder] for folder in ("straight", "killed"))
    main([*args, *straight])
    process = subprocess.Popen([str(COMMAND), *args, *killed], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(Path("killed").rglob("last.ckpt")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    expected = last(Path("straight"))
    assert 0 < last(Path("killed"))["global_step"] < expected["global_step"], "it was to be killed in the middle"
    main([*args, *killed, "--ckpt_path", "last"])
    resumed = last(Path("killed"))
    assert resumed["global_step"] == expected["global_step"]
    for key, weight in expected["state_dict"].items():
        assert torch.equal(resumed["state_dict"][key], weight), key
    assert len(list(Path("killed").glob("*/*"))) == 1
