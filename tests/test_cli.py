"""The command line: flags, presets, messages, and runs that go on after an interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn

from lightning_optim import OptimizerMixin
from lightning_optim.cli import OptimCLI, find_checkpoint, main, presets
from lightning_optim.optimizers.hybrid import MatrixOptimizer
from lightning_optim.optimizers.registry import OPTIMIZERS

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
    import yaml

    with pytest.raises(SystemExit) as stop:
        main(["fit", *args, "--print_config"])
    assert stop.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)


# --- lists and presets ------------------------------------------------------------------------------------------


def test_list_as_json_has_every_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(OPTIMIZERS)
    for row in rows:
        assert set(row) == {"name", "kind", "description", "paper", "defaults"}
        assert row["defaults"]["lr"] >= 0


def test_list_as_a_table_and_of_presets(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("MVNGrad", "HVAdam"))
    main(["list", "--presets", "--json"])
    assert {"digits", "namo"} <= {row["name"] for row in json.loads(capsys.readouterr().out)}


@pytest.mark.parametrize("task", presets("tasks"))
def test_task_presets_parse(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = printed_config(capsys, "-c", task)
    assert config["model"]["class_path"].startswith("lightning_optim.models.")
    assert config["optimizer"]["class_path"].endswith("MVNGrad")


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
    }


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


def test_without_the_flag_a_module_keeps_its_own_optimizer() -> None:
    optimizers, _ = built()
    assert type(optimizers[0]) is torch.optim.SGD


@pytest.mark.parametrize(("flags", "shown"), [(["--optimizer.help", "NAMO"], "adaptive"), (["--help"], "--optimizer")])
def test_help(flags: list[str], shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *flags])
    assert stop.value.code in (0, None)
    assert shown in capsys.readouterr().out


# --- messages ---------------------------------------------------------------------------------------------------

WRONG = {
    "optimizer": (["fit", "--optimizer", "Namo"], ["Namo", "NAMO"]),
    "optimizer argument": (["fit", "--optimizer", "NAMO", "--optimizer.betta", "1"], ["betta", "betas"]),
    "optimizer range": (["fit", "--optimizer", "NAMO", "--optimizer.lr", "-1"], ["lr", "-1"]),
    "optimizer type": (["fit", "--optimizer", "NAMO", "--optimizer.lr", "fast"], ["lr", "fast"]),
    "fallback": (["fit", "--optimizer", "NAMO", "--optimizer.fallback", "Adamw"], ["Adamw", "AdamW"]),
    "schedule": (["fit", "--lr_scheduler", "WarmupCosin"], ["WarmupCosin", "WarmupCosine"]),
    "schedule range": (["fit", "--lr_scheduler.warmup", "1.5"], ["warmup", "1.5"]),
    "flag": (["fit", "--optimiser", "NAMO"], ["--optimiser", "--optimizer"]),
    "trainer flag": (["fit", "--trainer.max_epoch", "3"], ["max_epoch", "max_epochs"]),
    "preset": (["fit", "-c", "digit"], ["digit", "digits"]),
    "file": (["fit", "-c", "none.yaml"], ["none.yaml"]),
    "subcommand": (["fitt"], ["fitt", "fit"]),
    "checkpoint": (["fit", "--ckpt_path", "none.ckpt"], ["none.ckpt"]),
    "no checkpoint yet": (["fit", "--ckpt_path", "last"], ["last", "runs"]),
    "data set": (["fit", "--data.dataset", "digitz"], ["digitz", "digits"]),
    "data folder": (["fit", "-c", "imagefolder", "--data.root", "nowhere", "--trainer.precision", "32"], ["nowhere"]),
    "backbone": (["fit", "--model.backbone", "resnet81"], ["resnet81", "resnet18"]),
    "pattern": (["fit", "--grouping.lr_multipliers", "{nothing.*: 2.0}"], ["nothing.*"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_ends_in_one_message(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    args, parts = WRONG[case]
    with pytest.raises(SystemExit) as stop:
        main([*args, *(QUIET if args[0] == "fit" else [])])
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert "error:" in shown
    for part in parts:
        assert part in shown, shown


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
    """Puts new modules in the place of the old ones, as the Transformer Engine's plugin does."""

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
    project = Path(__file__).parent / "stock_cli_project"
    flags = ["--optimizer", "lightning_optim.NAMO", "--optimizer.lr", "0.01", "--trainer.max_epochs", "1", *QUIET]
    run = subprocess.run(
        [sys.executable, "train.py", "fit", *flags], cwd=project, capture_output=True, text=True, env=os.environ
    )
    (project / "config.yaml").unlink(missing_ok=True)
    assert run.returncode == 0, run.stderr
    assert "OPTIMIZER lightning_optim.optimizers.namo NAMO 0.01 True" in run.stdout


# --- runs -------------------------------------------------------------------------------------------------------


def test_a_run_says_where_to_look(capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", *SHORT])
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert "runs/digits/version_0" in last
    assert "tensorboard --logdir runs" in last
    folder = Path("runs/digits/version_0")
    assert list(folder.glob("events.*"))
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    assert (folder / "config.yaml").is_file()


@pytest.mark.slow
def test_the_default_run_classifies_digits(capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", *QUIET])
    main(["validate", "--ckpt_path", "best", *QUIET])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator("runs/digits/version_0", size_guidance={"scalars": 0}).Reload()
    assert events.Scalars("val/accuracy")[-1].value >= 0.96


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_other_subcommands_take_the_last_checkpoint(subcommand: str) -> None:
    main(["fit", *SHORT])
    main([subcommand, "--ckpt_path", "last", *QUIET])


def weights(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True, map_location="cpu")["state_dict"]


def text_run(name: str, root: Path, *more: str) -> list[str]:
    steps = ["--trainer.max_steps", "40", "--trainer.val_check_interval", "5", "--trainer.limit_val_batches", "1"]
    place = ["--trainer.default_root_dir", str(root), "--data.root", "data", "--trainer.accelerator", "cpu"]
    return [
        "fit",
        "-c",
        "stdlib-text",
        "--optimizer",
        name,
        "--model.dropout",
        "0.1",
        *TINY_TEXT,
        *steps,
        *place,
        *QUIET,
        *more,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_killed_and_resumed_is_bit_for_bit_the_same(name: str, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    main(text_run(name, straight))
    process = subprocess.Popen(
        [str(COMMAND), *text_run(name, killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(killed.rglob("last.ckpt")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = torch.load(find_checkpoint("last", killed / "stdlib-text"), weights_only=True)["global_step"]
    assert 0 < saved < 40, "it was to be killed in the middle"
    main(text_run(name, killed, "--ckpt_path", "last"))
    a = weights(find_checkpoint("last", straight / "stdlib-text"))
    b = weights(find_checkpoint("last", killed / "stdlib-text"))
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key
    assert issubclass(OPTIMIZERS[name].cls, MatrixOptimizer | torch.optim.Optimizer)
