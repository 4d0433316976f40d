"""Names of runs, where they lie, and what TensorBoard's page HPARAMS says of them."""

from __future__ import annotations

import math
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.demos.boring_classes import BoringModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

from lightning_optim.cli import main
from lightning_optim.cli.invocation import Invocation
from lightning_optim.cli.record import RecordOutcome
from lightning_optim.cli.run_folder import OUTCOMES, RunLogger, run_name

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
SHORT = [*QUIET, "--trainer.accelerator", "cpu", "--trainer.max_steps", "2", "--trainer.limit_val_batches", "1"]
TINY = ["--model.backbone", "test_resnet", "--model.stem_stride", "2", "--model.backbone_args", "null", *SHORT]
DEFAULT = "MVNGrad-lr0.003-s1"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-optim"])


def runs() -> list[str]:
    return sorted(str(path.relative_to("runs")) for path in Path("runs").glob("*/*"))


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "lr", "seed", "name"),
    [
        ("lightning_optim.NAMO", 0.012, 1, "NAMO-lr0.012-s1"),
        ("torch.optim.AdamW", 1e-5, 7, "AdamW-lr1e-05-s7"),
        ("SGD", 1, 0, "SGD-lr1-s0"),
        ("mine.Own", None, 3, "Own-s3"),
        ("mine.Own", None, False, "Own"),
        ("Regressor", True, None, "Regressor"),
    ],
)
def test_names(optimizer: str, lr: Any, seed: Any, name: str) -> None:
    assert run_name(optimizer, lr, seed) == name


def test_runs_of_one_name_get_folders_of_their_own_also_at_the_same_time(tmp_path: Path) -> None:
    loggers = [RunLogger(tmp_path, "task", "x") for _ in range(12)]
    threads = [threading.Thread(target=lambda logger=logger: logger.version) for logger in loggers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = ["x", *(f"x-{i}" for i in range(2, 13))]
    assert sorted(logger.version for logger in loggers) == sorted(expected)
    assert sorted(path.name for path in (tmp_path / "task").iterdir()) == sorted(expected)
    assert RunLogger(tmp_path, "task", "x-3", exists=True).version == "x-3"


def test_a_run_has_one_name_from_its_settings_to_its_continuation(capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", *TINY])
    main(["fit", *TINY, "--optimizer", "torch.optim.SGD", "--optimizer.lr", "0.1", "--seed_everything", "5"])
    assert runs() == [f"digits/{DEFAULT}", "digits/SGD-lr0.1-s5"]
    first = Path("runs/digits", DEFAULT)
    before = {path.name: path.read_bytes() for path in first.rglob("*") if path.is_file()}

    # The same again: another folder, and the first is as it was. A saved configuration stays in its task.
    main(["fit", "-c", str(first / "config.yaml")])
    assert runs() == [f"digits/{DEFAULT}", f"digits/{DEFAULT}-2", "digits/SGD-lr0.1-s5"]
    assert {path.name: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    shutil.copy(first / "config.yaml", "elsewhere.yaml")
    assert Invocation.of(["fit", "-c", "elsewhere.yaml"]).task == "digits"

    # The run of a name goes on, though it is not the newest, and in its folder.
    main(["fit", "--ckpt_path", "last", "--name", "SGD-lr0.1-s5", "--trainer.max_steps", "4"])
    assert len(runs()) == 3
    kept = torch.load("runs/digits/SGD-lr0.1-s5/checkpoints/last.ckpt", weights_only=True)
    assert kept["global_step"] == 4
    assert len(list(Path("runs/digits/SGD-lr0.1-s5").glob("events.*"))) == 2

    # A checkpoint with a new name begins another run from there.
    path = "runs/digits/SGD-lr0.1-s5/checkpoints/last.ckpt"
    capsys.readouterr()
    main(["fit", "--ckpt_path", path, "--name", "branch", "--trainer.max_steps", "5"])
    assert "runs/digits/branch" in capsys.readouterr().out
    branch = torch.load("runs/digits/branch/checkpoints/last.ckpt", weights_only=True)
    assert branch["global_step"] == 5
    assert torch.load(path, weights_only=True)["global_step"] == 4


def test_a_folder_of_an_older_version_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", *TINY])
    old = Path("runs/digits/version_0")
    Path("runs/digits", DEFAULT).rename(old)
    config = yaml.safe_load((old / "config.yaml").read_text())
    del config["task"], config["name"]
    (old / "config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--ckpt_path", "last", "--trainer.max_steps", "3"])
    assert runs() == ["digits/version_0"]
    assert Invocation.of(["fit", "-c", str(old / "config.yaml")]).task == "digits"


@pytest.mark.parametrize(
    ("args", "task"),
    [
        (["-c", "stdlib-text"], "stdlib-text"),
        (["-c", "digits", "--model", "mine.Net"], "Net"),
        (["-c", "digits", "--task", "sweep"], "sweep"),
        (["--task", "sweep"], "sweep"),
        (["-c", "namo"], "digits"),
        (["-c", "{model: mine.Net, task: other}"], "other"),
    ],
)
def test_tasks(args: list[str], task: str) -> None:
    assert Invocation.of(["fit", *args]).task == task


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--name", "a/b"], "--name 'a/b' is no name of a folder"),
        (["--task", ".."], "--task '..' is no name of a folder"),
        (["--name", " "], "--name ' ' is no name of a folder"),
        (["--name", "none", "--ckpt_path", "last"], "there is no checkpoint of a run none in runs yet"),
    ],
)
def test_mistakes(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *args])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_run_that_leaves_nothing_makes_no_folder() -> None:
    main(["fit", *TINY, "--trainer.fast_dev_run", "true"])
    assert not Path("runs/digits").exists()


# --- HPARAMS ------------------------------------------------------------------------------------------------------


def hparams(folder: Path) -> dict[str, Any]:
    """What the event files of a run say to the page HPARAMS, by the tag; the last of each."""
    found: dict[str, Any] = {}
    parse = {
        metadata.EXPERIMENT_TAG: metadata.parse_experiment_plugin_data,
        metadata.SESSION_START_INFO_TAG: metadata.parse_session_start_info_plugin_data,
        metadata.SESSION_END_INFO_TAG: metadata.parse_session_end_info_plugin_data,
    }
    for file in sorted(folder.glob("events.*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag in parse:
                    found[value.tag] = parse[value.tag](value.metadata.plugin_data.content)
    return found


def test_hparams_say_which_run_was_best() -> None:
    schedule = ["--lr_scheduler", "WarmupLinear", "--lr_scheduler.warmup", "1"]
    epochs = ["--trainer.max_epochs", "3", "--trainer.max_steps", "-1", "--trainer.limit_train_batches", "4"]
    main(
        [
            "fit",
            *TINY,
            *epochs,
            "--optimizer",
            "NAMO",
            "--optimizer.lr",
            "0.02",
            *schedule,
            "--trainer.log_every_n_steps",
            "1",
        ]
    )
    folder = Path("runs/digits/NAMO-lr0.02-s1")
    found = hparams(folder)
    columns = found[metadata.EXPERIMENT_TAG].hparam_infos
    first = [info.name for info in columns if info.differs]
    assert first[0] == "optimizer"
    # TensorBoard shows the first five unless told otherwise.
    assert first[1:5] == ["optimizer lr", "optimizer lr of fallback", "optimizer schedule", "optimizer weight decay"]
    # TensorBoard orders columns by whether runs differ in them, and by name.
    assert first == sorted(first) == [info.name for info in columns][: len(first)]
    settings = found[metadata.SESSION_START_INFO_TAG].hparams
    assert settings["optimizer"].string_value == "NAMO"
    assert settings["optimizer lr"].number_value == 0.02
    assert settings["optimizer schedule"].string_value == "WarmupLinear"
    assert settings["validation_metric"].string_value == "val/accuracy"
    scalars = EventAccumulator(str(folder)).Reload()
    assert "hp_metric" not in scalars.Tags()["scalars"]
    metrics = [info.name.tag for info in found[metadata.EXPERIMENT_TAG].metric_infos]
    assert metrics == list(OUTCOMES)
    of = {tag: [event.value for event in scalars.Scalars(tag)] for tag in [*metrics, "val/accuracy"]}
    assert of["outcome/validation_best"][-1] == max(of["val/accuracy"])
    assert of["outcome/validation_last"][-1] == of["val/accuracy"][-1]
    # One after each of the three validations, and one at the end.
    assert len(of["outcome/steps_per_second"]) == 4
    assert all(value > 0 for value in of["outcome/steps_per_second"] + of["outcome/train_loss"])
    assert found[metadata.SESSION_END_INFO_TAG].status == api_pb2.STATUS_SUCCESS
    for tag in ["train/loss", "val/accuracy", "lr-NAMO/matrix", *metrics]:
        words = scalars.SummaryMetadata(tag).summary_description
        assert words.endswith("."), tag


def test_all_runs_have_the_same_first_columns() -> None:
    for i, optimizer in enumerate(("NAMO", "torch.optim.SGD")):
        main(["fit", *TINY, "--optimizer", optimizer, "--optimizer.lr", "0.01", "--name", f"run{i}"])
    first = [
        [info.name for info in hparams(Path("runs/digits", f"run{i}"))[metadata.EXPERIMENT_TAG].hparam_infos][:9]
        for i in range(2)
    ]
    assert first[0] == first[1]


class Falling(BoringModel):
    """Its validation loss is what the test says."""

    losses = (3.0, 1.0, 2.0)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.layer(batch).sum() * 0 + 5.0}

    def on_validation_epoch_end(self) -> None:
        self.log("valid_loss", self.losses[self.current_epoch])


def fit(folder: Path, model: pl.LightningModule, **settings: Any) -> EventAccumulator:
    logger = RunLogger(folder, "task", "run")
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=3, limit_train_batches=4, limit_val_batches=1, logger=logger,
        callbacks=[RecordOutcome()], log_every_n_steps=1, **quiet, **settings,
    )  # fmt: skip
    try:
        trainer.fit(model)
    except ZeroDivisionError:
        logger.finalize("failed")
    return EventAccumulator(str(folder / "task" / "run")).Reload()


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_metric_of_a_module_that_names_none(tmp_path: Path, accumulated: int) -> None:
    events = fit(tmp_path, Falling(), enable_checkpointing=False, accumulate_grad_batches=accumulated)
    assert [event.value for event in events.Scalars("outcome/validation_best")] == [3.0, 1.0, 1.0, 1.0]
    assert [event.value for event in events.Scalars("outcome/validation_last")] == [3.0, 1.0, 2.0, 2.0]
    # What Lightning hands on is divided by the number of micro-batches.
    assert events.Scalars("outcome/train_loss")[-1].value == 5.0


def test_a_run_that_fails_says_so(tmp_path: Path) -> None:
    class Failing(Falling):
        def on_train_batch_end(self, *args: Any) -> None:
            if self.global_step == 6:
                raise ZeroDivisionError

    events = fit(tmp_path, Failing(), enable_checkpointing=False)
    assert events.Scalars("outcome/validation_best")[-1].value == 3.0
    assert hparams(tmp_path / "task" / "run") == {metadata.SESSION_END_INFO_TAG: hparams_failure()}
    assert not math.isnan(events.Scalars("outcome/train_loss")[-1].value)


def hparams_failure() -> Any:
    return plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_FAILURE)


def test_the_best_value_outlives_a_restart() -> None:
    first, second = RecordOutcome(), RecordOutcome()
    first._best = 0.25
    second.load_state_dict(first.state_dict())
    assert second._best == 0.25
