"""Checkpoint files: whole or not at all, and read without executing anything."""

from __future__ import annotations

import errno
import os
import pickle
import platform
import shutil
import subprocess
import sys
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.distributed.checkpoint.api import CheckpointException

from lightning_optim import checkpoint_io
from lightning_optim.checkpoint_io import (
    CheckpointError,
    SafeCheckpointIO,
    look_at_checkpoint,
    read_checkpoint,
)
from lightning_optim.cli import OptimCLI, find_checkpoint, main

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def checkpoint() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(17, generator=generator) for name in "ab"}
    return {"state_dict": weights, "epoch": 3, "callbacks": {"x": {"best": float("inf"), "names": ["y"]}}}


def written(path: Path, content: Any = None) -> bytes:
    SafeCheckpointIO().save_checkpoint(checkpoint() if content is None else content, path)
    return path.read_bytes()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written(tmp_path / "folder" / "a.ckpt")
    assert same(SafeCheckpointIO().load_checkpoint(tmp_path / "folder" / "a.ckpt"), checkpoint())
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["a.ckpt"]


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever the writing stops, what was there before is there; the next attempt leaves no rest of the last."""
    path = tmp_path / "last.ckpt"
    before = written(path)
    seen: list[bytes] = []

    def stops(content: Any, file: Any) -> None:
        file.write(b"half")
        file.flush()
        seen.append(path.read_bytes())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", stops)
        with pytest.raises(KeyboardInterrupt):
            SafeCheckpointIO().save_checkpoint({}, path)
    assert seen == [before]
    assert path.read_bytes() == before
    written(path, checkpoint() | {"epoch": 4})
    assert read_checkpoint(path)["epoch"] == 4
    assert os.listdir(tmp_path) == ["last.ckpt"]


# --- a disk that is full ----------------------------------------------------------------------------------------------


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to write more than so many bytes to a file, as it does where the disk is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.skipif(resource is None, reason="the system has no such limit")
@pytest.mark.parametrize("elements", [262_000, 300_000, 3_000_000])  # Refused at the end, in the middle, at the start.
def test_a_full_disk_leaves_the_file_before_and_nothing_else(elements: int, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    before = written(path)
    with largest_file(2**20), pytest.raises(OSError, match=r"last\.ckpt was not written.* Free some space") as raised:
        SafeCheckpointIO().save_checkpoint({"state_dict": {"a": torch.ones(elements), "b": torch.ones(9)}}, path)
    assert raised.value.errno == errno.EFBIG
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.ckpt"]


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def of_torch() -> Exception:
    error = RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos")
    error.__context__ = full()
    return error


REFUSALS: dict[str, tuple[Callable[[], BaseException], type[BaseException], str]] = {
    "full": (full, OSError, "No space left on device. Free some space"),
    "full, as torch says it": (of_torch, OSError, "No space left on device. Free some space"),
    "full on another rank": (
        lambda: CheckpointException("write", {1: (full(), traceback.StackSummary())}),
        OSError,
        "No space left on device. Free some space",
    ),
    "share used up": (lambda: OSError(errno.EDQUOT, "Quota"), OSError, "Quota. Free some space"),
    "read-only": (lambda: OSError(errno.EROFS, "Read-only"), OSError, "Read-only. Choose another folder"),
    "forbidden": (lambda: PermissionError(errno.EACCES, "Denied"), PermissionError, "Denied. Choose another folder"),
    "a mistake in code": (lambda: TypeError("cannot pickle"), TypeError, "cannot pickle"),
    "Ctrl-C": (KeyboardInterrupt, KeyboardInterrupt, ""),
}


@pytest.mark.parametrize("why", REFUSALS)
@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_cannot_be_written_leaves_the_one_before_and_nothing_else(
    why: str, there: bool, tmp_path: Path
) -> None:
    raised, kind, message = REFUSALS[why]
    path = tmp_path / "last.ckpt"
    if there:
        whole_folder(path, 3)

    def save(checkpoint: dict[str, Any], part: Path, options: Any) -> None:
        whole_folder(part, 4)
        raise raised()

    strategy: Any = SimpleNamespace(is_global_zero=True, broadcast=lambda x: x, barrier=lambda: None)
    with pytest.raises(kind, match=message):
        checkpoint_io._save(strategy, save, {}, path, None, folder=True)
    assert os.listdir(tmp_path) == ["last.ckpt"] * there
    assert not there or look_at_checkpoint(path)["epoch"] == 3


def test_the_error_for_which_a_checkpoint_is_written_is_not_its_own(tmp_path: Path) -> None:
    """A run that a missing file ends may write a checkpoint, and that may fail for another reason."""
    try:
        raise FileNotFoundError(errno.ENOENT, "no data")
    except FileNotFoundError:
        with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
            SafeCheckpointIO().save_checkpoint({"f": lambda: 0}, tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == []


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_files_are_refused_or_read_right(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Cut anywhere, and with any byte changed: a clear error, or what was written, never anything else."""
    path = tmp_path_factory.mktemp("damaged") / "a.ckpt"
    content = bytearray(written(path))
    if data.draw(st.booleans(), label="cut"):
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        with pytest.raises(CheckpointError, match=r"a\.ckpt is (damaged|not a checkpoint)"):
            read_checkpoint(path)
        return
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with suppress(CheckpointError):
        assert same(read_checkpoint(path), checkpoint())


def zip_of_something_else(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<xml/>")


FOREIGN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a text": (lambda path: path.write_text("model: x"), "is not a checkpoint"),
    "nothing": (lambda path: path.write_bytes(b""), "is not a checkpoint"),
    "a zip of something else": (zip_of_something_else, "is not a checkpoint"),
    "a pickle": (lambda path: torch.save({}, path, _use_new_zipfile_serialization=False), "is not a checkpoint"),
    "a tensor": (lambda path: torch.save(torch.zeros(2), path), "holds a Tensor"),
    "weights": (lambda path: torch.save({"layer.weight": torch.zeros(2)}, path), "no state_dict but ['layer.weight']"),
    "an optimizer": (lambda path: torch.save({"state": {}, "param_groups": []}, path), "no state_dict"),
    "objects": (lambda path: torch.save({"state_dict": {}, "args": Fraction(1, 2)}, path), "Fraction"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_files_are_refused(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write, message = FOREIGN[what]
    path = tmp_path / "foreign.ckpt"
    write(path)
    with pytest.raises(CheckpointError) as caught:
        SafeCheckpointIO().load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--ckpt_path", str(path)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("place", ["state_dict", "optimizer_states", "hyper_parameters", "anything"])
def test_the_command_line_executes_nothing(
    subcommand: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    marker = tmp_path / "executed"
    path = tmp_path / "runs" / "digits" / "version_0" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save(checkpoint() | {place: Bomb(marker)}, path)
    with pytest.raises(SystemExit) as stop:
        main([subcommand, "--ckpt_path", str(path)])
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert "last.ckpt" in shown
    assert "getattr" in shown, "it names what was not executed"
    with pytest.raises(SystemExit), pytest.warns(UserWarning, match="passes over a checkpoint"):
        main([subcommand, "--ckpt_path", "last"])
    assert not marker.exists()


@pytest.mark.parametrize("call", ["fit", "validate", "test", "predict"])
def test_a_trainer_with_it_executes_nothing(call: str, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    trainer = pl.Trainer(
        plugins=[SafeCheckpointIO()], accelerator="cpu", max_steps=1, default_root_dir=tmp_path, **QUIET
    )
    trainer.fit(BoringModel())
    good = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)  # type: ignore[union-attr]
    torch.save(good | {"extra": Bomb(marker)}, tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError, match=r"bad\.ckpt holds other things"):
        getattr(trainer, call)(BoringModel(), ckpt_path=str(tmp_path / "bad.ckpt"))
    assert not marker.exists()


def test_the_bomb_would_go_off(tmp_path: Path) -> None:
    torch.save({"x": Bomb(tmp_path / "executed")}, tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert (tmp_path / "executed").exists()


def test_weights_only_false_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="TorchCheckpointIO"):
        SafeCheckpointIO().load_checkpoint(tmp_path / "a.ckpt", weights_only=False)


def whole_folder(path: Path, epoch: int) -> None:
    dcp.save({"weight": torch.full((3,), float(epoch))}, checkpoint_id=path)
    torch.save({"epoch": epoch}, path / "meta.pt")


def test_a_folder_is_there_at_every_moment_of_being_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before any call that replaces it, the old or the new one is found, and the next attempt is clean."""
    folder = tmp_path / "run" / "checkpoints"
    path = folder / "last.ckpt"
    whole_folder(path, 0)
    calls = 0

    def counted(call: Callable[..., Any], stop_at: int) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise KeyboardInterrupt
            return call(*args, **kwargs)

        return counting

    for epoch in range(1, 20):
        part = checkpoint_io._place_beside(path)
        whole_folder(part, epoch)
        calls, stopped = 0, True
        with monkeypatch.context() as patch:
            for owner, name in ((os, "rename"), (os, "unlink"), (os, "rmdir"), (shutil, "rmtree"), (Path, "rename")):
                patch.setattr(owner, name, counted(getattr(owner, name), epoch))
            try:
                checkpoint_io._replace_folder(part, path)
                stopped = False
            except KeyboardInterrupt:
                pass
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it passes over what is half removed
            assert look_at_checkpoint(find_checkpoint("last", tmp_path))["epoch"] in (epoch - 1, epoch)
        whole_folder(part, epoch)
        checkpoint_io._replace_folder(part, path)
        assert look_at_checkpoint(path)["epoch"] == epoch
        assert [found.name for found in folder.iterdir()] == ["last.ckpt"]
        if not stopped:
            break
    assert epoch > 4


def test_processes_do_not_write_to_the_same_place(tmp_path: Path) -> None:
    """What is left by one that is dead goes, what another writes stays."""
    path = tmp_path / "last.ckpt"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    node = platform.node()
    left = tmp_path / f".epoch=1.ckpt.{node}-{dead.pid}.part"
    written_by_another = tmp_path / f".last.ckpt.{node}-{os.getppid()}.part"
    elsewhere, forgotten = (tmp_path / f".last.ckpt.another-{i}.part" for i in (1, 2))
    for file in (left, written_by_another, elsewhere, forgotten):
        file.write_bytes(b"half")
    os.utime(forgotten, (0, 0))
    written(path)
    assert sorted(os.listdir(tmp_path)) == sorted([path.name, written_by_another.name, elsewhere.name])
    assert written_by_another.read_bytes() == b"half"


def test_the_command_line_uses_it_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(TorchCheckpointIO):
        pass

    monkeypatch.setattr(sys, "argv", ["program"])
    for plugins, expected in (([], SafeCheckpointIO), ([Own()], Own)):
        cli = OptimCLI(BoringModel, run=False, args=[], trainer_defaults={"plugins": plugins, "accelerator": "cpu"})
        assert type(cli.trainer.strategy.checkpoint_io) is expected
