"""Runs that are killed at any moment go on from a whole checkpoint to the numbers of a run that was not.

The program writes a checkpoint at every step, slowly, so that many of the kills hit one that is being written.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_optim.checkpoint_io import look_at_checkpoint
from lightning_optim.cli import find_checkpoint

STEPS = 60
ARGS = [
    *("fit", "-c", "digits", "--model.backbone", "test_resnet", "--model.stem_stride", "2", "--model.mixup", "0.2"),
    *("--model.backbone_args", "null", "--optimizer", "NAMO", "--data.batch_size", "16", "--trainer.accelerator", "cpu"),
    *("--trainer.max_steps", str(STEPS), "--trainer.val_check_interval", "7", "--trainer.limit_val_batches", "1"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--trainer.callbacks", "RNGState", "--trainer.callbacks+", "ModelCheckpoint"),
    *("--trainer.callbacks.every_n_train_steps", "1", "--trainer.callbacks.save_last", "true"),
    *("--trainer.callbacks.filename", "step-{step}", "--diagnostics.every_n_steps", "4"),
]

# What the processes run. A pause within each write, with half of the file on the disk.
SLOW_DISK = """
import sys, time, torch
from lightning_optim.cli import main
save = torch.save
class Slow:
    def __init__(self, file): self.file, self.bytes = file, 0
    def write(self, data):
        self.bytes += len(data)
        if self.bytes > 20_000:
            self.file.flush(); time.sleep(0.01); self.bytes = 0
        return self.file.write(data)
    def __getattr__(self, name): return getattr(self.file, name)
torch.save = lambda content, file, *args, **kwargs: save(content, Slow(file), *args, **kwargs)
sys.argv = ["lightning-optim", *sys.argv[1:]]
main()
"""


def start(folder: Path, *args: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_DISK, *ARGS, "--trainer.default_root_dir", str(folder), *args],
        stdout=subprocess.DEVNULL,
        stderr=(folder.parent / "stderr").open("wb"),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def run(folder: Path, *args: str) -> None:
    process = start(folder, *args)
    assert process.wait(300) == 0, (folder.parent / "stderr").read_text()[-3000:]


def content(folder: Path) -> dict[str, Any]:
    return look_at_checkpoint(find_checkpoint("last", folder / "digits"))


def assert_same(a: Any, b: Any, path: str = "") -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), path
    else:
        assert a == b, path


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_ends_as_one_that_is_not(tmp_path: Path, kills: int) -> None:
    """One run is killed again and again; where it gets to its end before, another begins."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for folder in (straight, killed):
        folder.mkdir()
    run(straight)
    expected = content(straight)
    assert expected["global_step"] == STEPS
    pause = random.Random(kills)
    halves, done, finished = 0, 0, 0
    while done < kills:
        written = list(killed.rglob("*.ckpt"))
        process = start(killed, *(("--ckpt_path", "last") if written else ()))
        # From the first new checkpoint on, at a random moment; sometimes before there is one.
        since = time.time()
        while process.poll() is None and time.time() - since < 60:
            new = [path for path in killed.rglob("*.ckpt") if path.exists() and path.stat().st_mtime > since]
            if new or pause.random() < 0.001:
                break
            time.sleep(0.005)
        time.sleep(pause.uniform(0, 0.5))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            done += 1
        assert process.wait() in (0, -signal.SIGKILL), (tmp_path / "stderr").read_text()[-3000:]
        halves += bool(list(killed.rglob(".*.part")))
        for path in killed.rglob("*.ckpt"):
            look_at_checkpoint(path)  # Each is whole.
        if process.returncode == 0 and done < kills:
            assert_same(content(killed)["state_dict"], expected["state_dict"])
            finished += 1
            shutil.rmtree(killed)
            killed.mkdir()
    if list(killed.rglob("*.ckpt")):
        run(killed, "--ckpt_path", "last")
    else:
        run(killed)
    print(f"{done} kills, {halves} while a checkpoint was being written, {finished + 1} runs to the end")
    resumed = content(killed)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "rng"):
        assert_same(resumed[key], expected[key], key)
    for key, state in expected["callbacks"].items():
        if not key.startswith("ModelCheckpoint"):  # which holds paths
            assert_same(resumed["callbacks"][key], state, key)
