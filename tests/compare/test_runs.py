"""Real runs: of a project that knows nothing of this library, of the default task, and of several processes at once."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_optim.cli.compared import CommandLineTask
from lightning_optim.compare import compare
from lightning_optim.compare.design import Design, Run, contenders
from lightning_optim.compare.ledger import Ledger
from lightning_optim.compare.result import Comparison
from lightning_optim.compare.search import Tuning
from lightning_optim.compare.task import ModuleTask

from .foreign.shapes import Points, Regression

FOREIGN = Path(__file__).parent / "foreign"
COMMAND = [sys.executable, "-c", "from lightning_optim.cli import main; main()", "compare"]


def run(optimizer: str, seed: int = 1, lr: float = 0.01, **more: Any) -> Run:
    return Run(optimizer, optimizer, {"lr": lr}, seed, more.pop("steps", 12), "tuning", **more)


def foreign_task(**trainer: Any) -> ModuleTask:
    return ModuleTask(Regression, Points, {"accelerator": "cpu", **trainer})


# --- one run ----------------------------------------------------------------------------------------------------------


def test_pairs_share_weights_and_data_and_ends_are_compared() -> None:
    task = foreign_task()
    results = {name: task.train(run(name)) for name in ("AdamW", "NAMO", "SOAP", "torch.optim.RMSprop")}
    other = task.train(run("AdamW", seed=2))
    assert len({(x["weights"], x["data"]) for x in results.values()}) == 1
    assert other["weights"] != results["AdamW"]["weights"]
    assert other["data"] != results["AdamW"]["data"]
    for x in results.values():
        assert x["status"] == "ok"
        assert x["steps"] == 12  # In the middle of an epoch of six.
        assert x["curve"]["steps"] == [6, 12]
        assert x["metric"] == "val_loss"
        assert x["score"] == pytest.approx(x["curve"]["values"][-1], rel=1e-5)
        assert x["lr_end"] < 0.05  # the module's own schedule, scaled to the run
        assert x["state_bytes"] > 0
        assert {"update/rms", "gradient/norm"} <= x["diagnostics"].keys()
    # The ratio of the module's own groups is kept.
    groups = results["AdamW"]["groups"]
    rates = sorted({group["initial_lr"] / groups[0]["initial_lr"] for group in groups})
    assert rates[0] == pytest.approx(0.1) or rates[-1] == pytest.approx(10)
    # The same run is the same result.
    assert task.train(run("NAMO"))["score"] == results["NAMO"]["score"]


def test_a_setting_is_set_on_a_module() -> None:
    d = Design(tuple(contenders(["NAMO"], 0.01, "decoupled")), seeds=1)
    tunings = [Tuning(c, tried=[{"lr": 0.02}], costs={(("lr", 0.02),): 1.0}) for c in d.contenders]
    result = Comparison.of("t", d, tunings, [], {})
    module = Regression()
    result.apply(module, "NAMO")
    trainer = pl.Trainer(fast_dev_run=True, accelerator="cpu", enable_model_summary=False)
    trainer.fit(module, datamodule=Points())
    rates = {group["name"]: group["initial_lr"] for group in trainer.optimizers[0].param_groups}
    assert rates["matrix/group-0"] == 0.02
    assert rates["fallback/group-1"] == pytest.approx(0.0002)  # a tenth for the fallback, and a tenth for the head
    with pytest.raises(ValueError, match="no setting"):
        Comparison.of("t", d, [Tuning(c) for c in d.contenders], [], {}).apply(module, "NAMO")


def test_the_last_step_is_measured_wherever_it_lies() -> None:
    result = foreign_task().train(run("AdamW", steps=9))
    assert (result["steps"], result["curve"]["steps"]) == (9, [6, 9])


class Exploding(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (math.nan if self.trainer.global_step >= 20 else 1)


def test_a_diverged_run_ends_early() -> None:
    result = ModuleTask(Exploding, Points, {"accelerator": "cpu", "min_steps": 190}).train(run("AdamW", steps=200))
    assert (result["status"], result["score"]) == ("diverged", None)
    assert result["steps"] < 60


def test_what_would_end_or_write_a_run_is_left_out(tmp_path: Path) -> None:
    callbacks = [EarlyStopping("val_loss", patience=0), ModelCheckpoint(str(tmp_path))]
    result = foreign_task(callbacks=callbacks, default_root_dir=str(tmp_path)).train(run("AdamW", lr=1e-12, steps=30))
    assert result["steps"] == 30
    assert [*tmp_path.iterdir()] == []


def test_wrong_tasks() -> None:
    for model in (Regression(), 3):
        with pytest.raises(ValueError, match="model must be a class or a function that makes one"):
            ModuleTask(model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'accuracy' is not logged in validation\. Logged are: fit_loss, val_loss"):
        foreign_task().train(run("AdamW", metric="accuracy"))
    assert foreign_task().train(run("AdamW", metric="fit_loss"))["metric"] == "fit_loss"


class Silent(pl.LightningModule):
    """Logs nothing and has its own data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).square().mean()

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.randn(64, 4), 4, shuffle=True)


def test_without_validation_the_end_of_the_training_loss_counts() -> None:
    result = ModuleTask(Silent, trainer={"accelerator": "cpu"}).train(run("AdamW", steps=40))
    assert result["metric"] == "train loss"
    assert 0 < result["score"] < result["train"]["values"][0]


def test_the_fingerprint_is_of_task_and_code() -> None:
    prints = [
        ModuleTask(model, data).describe()["fingerprint"]
        for model, data in (
            (Regression, Points),
            (Regression, Points),
            (partial(Regression, width=8), Points),
            (Regression, partial(Points, count=128)),
            (lambda: Regression(4), Points),
            (Exploding, Points),
        )
    ]
    assert prints[0] == prints[1]
    assert len({*prints}) == 5


def test_arguments_of_fit_say_what_is_trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    task = CommandLineTask(["-c", "digits", "--trainer.accelerator", "cpu"])
    described = task.describe()
    assert task.name == "digits"
    assert described["model"]["init_args"]["backbone"] == "resnet10t"
    results = [task.train(run(name, steps=4)) for name in ("AdamW", "NAMO")]
    assert {x["metric"] for x in results} == {"val/loss"}
    assert len({(x["weights"], x["data"]) for x in results}) == 1
    assert results[0]["score"] != results[1]["score"]
    assert [*tmp_path.iterdir()] == []  # Runs write nothing.


# --- the command ------------------------------------------------------------------------------------------------------


def command(*args: str, cwd: Path, timeout: float = 560, start: bool = False) -> Any:
    environment = {**os.environ, "PYTHONPATH": str(FOREIGN), "COLUMNS": "200"}
    if start:
        return subprocess.Popen([*COMMAND, *args], cwd=cwd, env=environment, stderr=subprocess.DEVNULL)
    ended = subprocess.run([*COMMAND, *args], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended


SMALL = ["--steps", "12", "--trials", "3", "--seeds", "3", "--tuning_seeds", "2", "--jobs", "2"]
TASK = ["--model", "shapes.Regression", "--data", "shapes.Points", "--trainer.accelerator", "cpu"]


def table(folder: Path) -> Any:
    """What does not depend on how long a run took."""
    kept = json.loads((folder / "study.json").read_text())
    return [(s["name"], s["chosen"], s["tried"], s["scores"], s["words"]) for s in kept["standings"]], kept["noise"]


@pytest.mark.slow
def test_a_foreign_module_by_one_command_and_from_python(tmp_path: Path) -> None:
    optimizers = ["NAMO", "torch.optim.RMSprop"]
    ended = command(*TASK, *SMALL, "--optimizers", *optimizers, cwd=tmp_path)
    folder = tmp_path / "comparisons" / "Regression"
    assert "AdamW" in ended.stdout
    assert "torch.optim.RMSprop" in (folder / "report.html").read_text()
    assert "Checked: all runs of a seed had the same initial weights" in ended.stdout
    result = compare(
        Regression,
        Points,
        optimizers,
        steps=12,
        trials=3,
        seeds=3,
        tuning_seeds=2,
        jobs=2,
        study=tmp_path / "python",
        trainer={"accelerator": "cpu"},
        quiet=True,
    )
    # The command line gives the seed to Lightning as a function call does; runs are the same.
    assert table(tmp_path / "python") == table(folder)
    assert [s.name for s in result.standings] == ["AdamW", *optimizers]


def kill_after(process: subprocess.Popen[bytes], log: Path, count: int) -> None:
    """End a study the hard way once so many runs are kept, whatever it is at."""
    while process.poll() is None and not (log.is_file() and log.read_bytes().count(b'"outcome"') >= count):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_killed_three_times_it_ends_with_the_same_table(tmp_path: Path) -> None:
    command(*TASK, *SMALL, "--study", "whole", cwd=tmp_path)
    for count in (1, 8, 20):
        process = command(*TASK, *SMALL, "--study", "killed", cwd=tmp_path, start=True)
        kill_after(process, tmp_path / "killed" / "study.log", count)
    ended = command(*TASK, *SMALL, "--study", "killed", cwd=tmp_path)
    assert "The study goes on" in ended.stderr
    assert table(tmp_path / "killed") == table(tmp_path / "whole")


FORMULA = """
import sys
from pathlib import Path
from lightning_optim.compare.design import Design, contenders
from lightning_optim.compare.study import run_study
from tests.compare.fakes import Formula
folder, where, url, seconds = [*sys.argv[1:], *["", "local", "", "0.02"][len(sys.argv) - 1 :]]
design = Design(tuple(contenders(["MVNGrad", "NAMO"], 0.01, "decoupled")))
run_study(Formula(seconds=float(seconds)), design, Path(folder), url or None, jobs=2, where=where)
"""


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """The same with runs of no length, so that the kills fall between them, too."""
    root = Path(__file__).parents[2]
    start = [sys.executable, "-c", FORMULA]
    assert subprocess.run([*start, str(tmp_path / "whole")], cwd=root, timeout=560).returncode == 0
    for count in (1, 17, 40):
        process = subprocess.Popen([*start, str(tmp_path / "killed")], cwd=root)
        kill_after(process, tmp_path / "killed" / "study.log", count)
    assert subprocess.run([*start, str(tmp_path / "killed")], cwd=root, timeout=560).returncode == 0
    assert table(tmp_path / "killed") == table(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "sqlite"])
def test_two_processes_share_a_study(tmp_path: Path, kind: str) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}" if kind == "sqlite" else ""
    root = Path(__file__).parents[2]
    start = [sys.executable, "-c", FORMULA, str(tmp_path / "shared"), "local", url, "0.5"]
    others = [subprocess.Popen(start, cwd=root) for _ in range(2)]
    assert [other.wait(560) for other in others] == [0, 0]
    place = (url, str(tmp_path / "shared")) if url else (str(tmp_path / "shared" / "study.log"), "compare")
    trials = [t for t in Ledger(*place)._study.get_trials() if "outcome" in t.user_attrs]
    keys = [trial.user_attrs["key"] for trial in trials]
    assert len(keys) == len({*keys})  # No run was made twice,
    assert len({trial.user_attrs["owner"] for trial in trials}) == 2  # and both made some.
    kept = json.loads((tmp_path / "shared" / "study.json").read_text())
    assert len(keys) == len(kept["runs"])


@pytest.mark.slow
def test_ray_gives_the_same_table(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    root = Path(__file__).parents[2]
    for kind in ("local", "ray"):
        start = [sys.executable, "-c", FORMULA, str(tmp_path / kind), kind]
        assert subprocess.run(start, cwd=root, timeout=560).returncode == 0
    assert table(tmp_path / "ray") == table(tmp_path / "local")


@pytest.mark.slow
def test_the_command_alone(tmp_path: Path) -> None:
    """Digits and three optimizers, with a report and a verdict. The time it takes is measured elsewhere."""
    ended = command(cwd=tmp_path)
    for name in ("AdamW", "MVNGrad", "NAMO"):
        assert name in ended.stdout
    assert "Noise: between 5 seeds" in ended.stdout
    assert (tmp_path / "comparisons" / "digits" / "report.html").is_file()
