"""Ctrl-C, SIGTERM and SLURM's requeue signal leave a checkpoint, a status and a line that says how to go on."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.environments import SLURMEnvironment

from lightning_optim.callbacks import RescueCheckpoint, Resume

ARGS = [
    *("fit", "--model.backbone_args", "{channels: [4, 8, 8, 8], stem_width: 4}", "--model.stem_stride", "2"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--data.batch_size", "16"),
    *("--trainer.limit_val_batches", "1", "--trainer.enable_model_summary", "false"),
]
COMMAND = [str(Path(sys.executable).with_name("lightning-optim"))]


class Signalling(BoringModel):
    """Gets signals amid training steps or validations."""

    def __init__(self, signals: dict[int, list[int]], within: str = "training") -> None:
        super().__init__()
        self.signals, self.within = signals, within
        self.steps: list[int] = []

    def act(self, within: str) -> None:
        if within == self.within:
            for number in self.signals.pop(self.trainer.global_step, ()):
                signal.raise_signal(number)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.act("training")
        self.steps.append(self.trainer.global_step)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.act("validation")
        return super().validation_step(batch, batch_idx)


def fit(model: BoringModel, folder: Path, *, ckpt_path: Any = None, **options: Any) -> pl.Trainer:
    options = {"callbacks": [Resume(), RescueCheckpoint(), ModelCheckpoint(folder)], "max_steps": 12} | options
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=-1, limit_val_batches=2, limit_train_batches=6, num_sanity_val_steps=0,
        logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, **options,
    )  # fmt: skip
    trainer.fit(model, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.filterwarnings("ignore:.*does not continue exactly:UserWarning")
@pytest.mark.parametrize("within", ["training", "validation"])
@pytest.mark.parametrize(
    ("signals", "status"),
    [([signal.SIGTERM], 143), ([signal.SIGINT], 130), ([signal.SIGINT, signal.SIGINT], 1)],
    ids=["SIGTERM", "Ctrl-C", "Ctrl-C twice"],
)
def test_in_a_script(
    signals: list[int], status: int, within: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as ended:
        fit(Signalling({6: signals}, within), tmp_path)
    assert ended.value.code == status
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    path = re.findall(r'^To go on: trainer\.fit\(model, ckpt_path="(.+)"\)$', capsys.readouterr().out, re.MULTILINE)[0]
    step = torch.load(path, weights_only=True)["global_step"]
    # Amid a step, one that Ctrl-C lets end is in the checkpoint.
    assert step == (7 if within == "training" and len(signals) == 1 else 6)
    resumed = Signalling({})
    fit(resumed, tmp_path, ckpt_path=path)
    assert resumed.steps == list(range(step, 12))


def test_nothing_is_written_before_training_or_without_checkpoints(tmp_path: Path) -> None:
    early = BoringModel()
    early.on_fit_start = lambda: signal.raise_signal(signal.SIGINT)  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        fit(early, tmp_path)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning leaves it ignored.
    with pytest.raises(SystemExit):
        fit(Signalling({3: [signal.SIGINT]}), tmp_path, callbacks=[RescueCheckpoint()], enable_checkpointing=False)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Variables of a SLURM job, and a ``scontrol`` that notes down what it is asked for."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "scontrol").write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked\n")
    (bin_ / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    variables = {"JOB_ID": "77", "JOB_NAME": "train", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in (variables | {"NODELIST": "localhost"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return tmp_path / "asked"


@pytest.mark.filterwarnings("ignore:.*does not continue exactly:UserWarning")
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2], ids=["SIGUSR1", "SIGUSR2"])
@pytest.mark.parametrize("within", ["training", "validation"])
def test_slurm_requeues(number: signal.Signals, within: str, job: Path, tmp_path: Path) -> None:
    def environment() -> list[Any]:
        return [SLURMEnvironment(auto_requeue=True, requeue_signal=number)]

    # SLURM ends the job some time later.
    with pytest.raises(SystemExit):
        fit(
            Signalling({6: [number], 9: [signal.SIGTERM]}, within),
            tmp_path,
            plugins=environment(),
            val_check_interval=1,
        )
    assert job.read_text() == "requeue 77\n"
    saved = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    assert saved["global_step"] == (7 if within == "training" else 6)
    assert not saved["position"]["within_step"]
    # The requeued job runs the same command.
    resumed = Signalling({})
    fit(resumed, tmp_path, plugins=environment())
    assert resumed.steps == list(range(saved["global_step"], 12))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_the_command_line(number: signal.Signals, status: int, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        [*COMMAND, *ARGS, "--trainer.max_steps", "100000", "--trainer.max_epochs", "-1"],
        cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        # A shell in the background has its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    end = time.monotonic() + 600
    while not list(tmp_path.rglob("*.ckpt")) and time.monotonic() < end:
        time.sleep(0.1)
    run.send_signal(number)
    output = run.communicate(timeout=120)[0]
    assert run.returncode == status, output
    assert "Traceback" not in output
    assert "does not continue exactly" not in output
    line = re.findall(r"^To go on: (.*)$", output, re.MULTILINE)[0]
    step = int(re.findall(r"rescue-step=(\d+)", line)[0])
    program, *args = shlex.split(line)
    assert program == "lightning-optim"
    args += ["--trainer.max_steps", str(step + 3)]
    done = subprocess.run([*COMMAND, *args], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    newest = max(tmp_path.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    assert torch.load(newest, weights_only=True)["global_step"] == step + 3
