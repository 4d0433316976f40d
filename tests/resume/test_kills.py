"""Runs that are killed at any moment go on from a whole checkpoint to the numbers of a run that was not.

The program writes a checkpoint at every step, slowly, so that many of the kills hit one that is being written.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.distributed.fsdp import fully_shard

from lightning_optim.checkpoint_io import CheckpointError, SafeModelParallelStrategy, look_at_checkpoint
from lightning_optim.cli import find_checkpoint, main

STEPS, KILLS = 20, 50
KILLS_OF_FOLDERS = 10
ARGS = [
    *("fit", "-c", "digits", "--model.backbone_args", "{channels: [4, 8, 8, 8], stem_width: 4}"),
    *("--model.mixup", "0.2", "--model.stem_stride", "2", "--optimizer", "NAMO", "--data.batch_size", "16"),
    *("--trainer.accelerator", "cpu"),
    *("--trainer.max_steps", str(STEPS), "--trainer.val_check_interval", "7", "--trainer.limit_val_batches", "1"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--trainer.callbacks", "RNGState", "--trainer.callbacks+", "ModelCheckpoint"),
    *("--trainer.callbacks.every_n_train_steps", "1", "--trainer.callbacks.save_last", "true"),
    *("--trainer.callbacks.filename", "step-{step}", "--diagnostics.every_n_steps", "4"),
]


class SlowFile:
    """Pauses while it is written, so that a kill finds half of it on the disk."""

    def __init__(self, file: Any) -> None:
        self.file, self.pending = file, 0

    def write(self, data: Any) -> int:
        self.pending += len(data)
        if self.pending > 10_000:
            self.file.flush()
            time.sleep(0.003)
            self.pending = 0
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def train(folder: Path, *args: str) -> None:
    """What the processes do."""
    save = torch.save
    torch.save = lambda what, file: save(what, SlowFile(file))
    torch.set_num_threads(1)
    sys.argv = ["lightning-optim", *ARGS, "--trainer.default_root_dir", str(folder), *args]
    with (folder / "output").open("w") as output, redirect_stdout(output), redirect_stderr(output):
        main()


class Sharded(BoringModel):
    def configure_model(self) -> None:
        fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]


def slowly(call: Any, *args: Any, **kwargs: Any) -> Any:
    time.sleep(0.02)
    return call(*args, **kwargs)


def train_sharded(folder: Path, port: int) -> None:
    """Overwrites one folder of shards at every step, slowly."""
    os.environ["MASTER_PORT"] = str(port)
    for owner, name in ((os, "rename"), (os, "unlink"), (os, "rmdir"), (torch, "save")):
        setattr(owner, name, partial(slowly, getattr(owner, name)))
    torch.set_num_threads(1)
    last = folder / "run" / "checkpoints" / "last.ckpt"
    with (folder / "output").open("w") as output, redirect_stdout(output), redirect_stderr(output):
        pl.Trainer(
            accelerator="cpu",
            devices=1,
            strategy=SafeModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1),
            max_steps=10**6,
            max_epochs=-1,
            callbacks=[ModelCheckpoint(last.parent, save_last=True, save_top_k=0, every_n_train_steps=1)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(Sharded(), ckpt_path=last if last.exists() else None)


# Its processes are forked from one that has imported everything, which takes longer than the runs.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["lightning_optim.cli.train"])


def start(folder: Path, *args: Any, target: Any = train) -> Any:
    process = processes.Process(target=target, args=(folder, *args))
    process.start()
    return process


def run(folder: Path, *args: str) -> None:
    process = start(folder, *args)
    process.join(300)
    assert process.exitcode == 0, (folder / "output").read_text()[-3000:]


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
        assert a == b or (a != a and b != b), path  # NaN


@pytest.mark.slow
def test_a_run_that_is_killed_ends_as_one_that_is_not(tmp_path: Path) -> None:
    """One run is killed again and again; where it gets to its end before, another begins."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for folder in (straight, killed):
        folder.mkdir()
    run(straight)
    expected = content(straight)
    assert expected["global_step"] == STEPS
    halves, done, finished = 0, 0, 0
    while done < KILLS:
        before = {path: path.stat().st_mtime_ns for path in killed.rglob("*.ckpt")}
        process = start(killed, *(("--ckpt_path", "last") if before else ()))
        # At a random moment after its first checkpoint, and now and then before that.
        early = random.random() < 0.2
        while process.is_alive() and not early:
            if any(path.stat().st_mtime_ns != before.get(path) for path in killed.rglob("last.ckpt")):
                break
            time.sleep(0.005)
        time.sleep(random.uniform(0, 1.5 if early else 0.8))
        if process.is_alive():
            process.kill()
            done += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), (killed / "output").read_text()[-3000:]
        halves += bool(list(killed.rglob(".*.part")))
        for path in killed.rglob("*.ckpt"):
            look_at_checkpoint(path)  # Each is whole.
        if process.exitcode == 0 and done < KILLS:
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


@pytest.mark.slow
def test_a_folder_that_is_being_overwritten_is_not_lost(tmp_path: Path) -> None:
    """However often it is killed, a run goes on from no earlier than the last step that was on the disk."""
    folder = tmp_path / "run" / "checkpoints"
    step, amid, between = 0, 0, 0
    for kill in range(KILLS_OF_FOLDERS):
        process = start(tmp_path, 29600 + kill, target=train_sharded)
        seen = step
        while process.is_alive() and seen < step + 2:
            with suppress(CheckpointError, FileNotFoundError, RuntimeError):  # It is read while it is replaced.
                seen = look_at_checkpoint(folder / "last.ckpt")["global_step"]
        time.sleep(random.uniform(0, 0.5))
        assert process.is_alive(), (tmp_path / "output").read_text()[-3000:]
        process.kill()
        process.join()
        amid += bool(list(folder.glob(".*.part")))
        between += not (folder / "last.ckpt").exists()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it passes over what is half removed
            found = find_checkpoint("last", tmp_path)
        assert look_at_checkpoint(found)["global_step"] >= seen
        if found.name != "last.ckpt":
            found.rename(folder / "last.ckpt")
        step = look_at_checkpoint(folder / "last.ckpt")["global_step"]
    print(f"{KILLS_OF_FOLDERS} kills, {amid} with a folder half written, {between} between the renamings")
    assert amid
