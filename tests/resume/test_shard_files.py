"""Folders of shards: whole or not at all, read without executing anything, however they were copied."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_optim import OptimizerMixin
from lightning_optim.checkpoint_io import (
    CheckpointError,
    SafeFSDPStrategy,
    SafeModelParallelStrategy,
    look_at_checkpoint,
)
from lightning_optim.cli import OptimCLI
from lightning_optim.processes import shard_files

from .test_files import QUIET, Bomb


class Sharded(OptimizerMixin, BoringModel):
    optimizer = "AdamW"

    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(self.layer.weight, DTensor):
            fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])


def trainer(steps: int = 1) -> pl.Trainer:
    strategy = SafeModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    return pl.Trainer(
        accelerator="cpu", devices=1, strategy=strategy, max_steps=steps, enable_checkpointing=False,
        limit_val_batches=1, **QUIET,
    )  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards that a run has written."""
    folder = tmp_path_factory.mktemp("saved") / "a.ckpt"
    run = trainer()
    run.fit(Sharded())
    run.save_checkpoint(folder)
    run.save_checkpoint(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["a.ckpt"], "it is replaced as a whole"
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "a.ckpt"))


def table_of(folder: Path) -> Metadata:
    return pickle.loads((folder / ".metadata").read_bytes())


def write_table(folder: Path, table: Any) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(table))


def edited(edit: Callable[[Metadata, Path], Any]) -> Callable[[Path, Path], None]:
    """An attack that changes the table of contents."""

    def attack(folder: Path, marker: Path) -> None:
        table = table_of(folder)
        edit(table, marker)
        write_table(folder, table)

    return attack


def entry(folder: Path, kind: type) -> tuple[MetadataIndex, Any]:
    """An entry of the table that is a tensor, or that is not."""
    table = table_of(folder)
    is_tensor = kind is torch.Tensor
    return next(
        (index, place)
        for index, place in table.storage_data.items()
        if isinstance(table.state_dict_metadata[index.fqn], TensorStorageMetadata) is is_tensor
    )


def in_place_of(kind: type, content: Callable[[Path, Path], bytes]) -> Callable[[Path, Path], None]:
    """An attack that puts other bytes in place of an entry."""

    def attack(folder: Path, marker: Path) -> None:
        index, _ = entry(folder, kind)
        evil = content(folder, marker)
        (folder / "__7_0.distcp").write_bytes(evil)
        table = table_of(folder)
        table.storage_data[index] = filesystem._StorageInfo("__7_0.distcp", 0, len(evil))
        write_table(folder, table)

    return attack


def torch_saved(x: Any, folder: Path, **how: Any) -> bytes:
    torch.save(x, folder / "temporary", **how)
    content = (folder / "temporary").read_bytes()
    (folder / "temporary").unlink()
    return content


def script(folder: Path) -> bytes:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), folder / "temporary")
    content = (folder / "temporary").read_bytes()
    (folder / "temporary").unlink()
    return content


def fallback(folder: Path, marker: Path) -> None:
    """A table that the check takes and torch does not: it reads the next file instead."""
    table = table_of(folder)
    table.storage_meta = torch.Size([])
    write_table(folder, table)
    (folder / "__0.metadata").write_bytes(pickle.dumps(Bomb(marker)))


def no_table(folder: Path, marker: Path) -> None:
    (folder / ".metadata").unlink()
    (folder / "__0.metadata").write_bytes(pickle.dumps(Bomb(marker)))


def place(**changes: Any) -> Callable[[Path, Path], None]:
    def edit(table: Metadata, marker: Path) -> None:
        for info in table.storage_data.values():
            vars(info).update(changes)

    return edited(edit)


def key_paths(path: Any) -> Callable[[Path, Path], None]:
    return edited(lambda table, marker: table.planner_data.update(dict.fromkeys(table.planner_data, path)))


def outside(name: str) -> Callable[[Path, Path], None]:
    def attack(folder: Path, marker: Path) -> None:
        for path in folder.glob("*.distcp"):
            shutil.copy(path, folder.parent / "outside.distcp")
        place(relative_path=name.format(parent=folder.parent))(folder, marker)

    return attack


def raw_table(content: Callable[[Path], bytes]) -> Callable[[Path, Path], None]:
    def attack(folder: Path, marker: Path) -> None:
        (folder / ".metadata").write_bytes(content(marker))

    return attack


def short(text: str) -> bytes:
    """A text as protocol 4 of pickle has it."""
    return b"\x8c" + bytes([len(text)]) + text.encode()


def call(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls a function by its dotted name."""
    return b"\x80\x04" + short(module) + short(name) + b"\x93" + short(argument) + b"\x85R."


def patched_class(marker: Path) -> bytes:
    """Sets an attribute of the class that torch makes entries of: a state of slots goes through ``setattr``."""
    index = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n"
    return b"\x80\x04" + index + b"N}" + short("__hash__") + b"Ns\x86b."


class Persistent(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return "evil" if isinstance(obj, str) else None


def persistent(folder: Path, marker: Path) -> None:
    table = table_of(folder)
    with (folder / ".metadata").open("wb") as file:
        Persistent(file).dump(table)


def larger(table: Metadata, marker: Path) -> None:
    for meta in table.state_dict_metadata.values():
        if isinstance(meta, TensorStorageMetadata):
            meta.size = torch.Size([1 << 40])
            meta.chunks[0].sizes = torch.Size([1 << 40])


def fifo(folder: Path, marker: Path) -> None:
    (path,) = folder.glob("*.distcp")
    path.unlink()
    os.mkfifo(path)


def device(folder: Path, marker: Path) -> None:
    (path,) = folder.glob("*.distcp")
    path.unlink()
    path.symlink_to("/dev/zero")


def bare(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb(marker)))


def shortened(folder: Path, marker: Path) -> None:
    (path,) = folder.glob("*.distcp")
    path.write_bytes(path.read_bytes()[:-1])


ATTACKS: dict[str, Callable[[Path, Path], None]] = {
    "table": lambda folder, marker: write_table(folder, Bomb(marker)),
    "the table torch falls back to": fallback,
    "only the table torch falls back to": no_table,
    "storage_meta": edited(lambda table, marker: setattr(table, "planner_data", Bomb(marker))),
    "an entry of the table": edited(lambda table, marker: table.state_dict_metadata.update(x=Bomb(marker))),
    "key of the table": edited(lambda table, marker: table.planner_data.update({"x": (Bomb(marker),)})),
    "size in the table": edited(lambda table, marker: [vars(x).update(size=Bomb(marker)) for x in tensors(table)]),
    "os.system": raw_table(lambda marker: call("os", "system", f"touch {marker}")),
    "a function of a module of torch": raw_table(lambda marker: call("torch", "serialization.os.system", "true")),
    "torch.load": raw_table(lambda marker: call("torch", "load", str(marker))),
    "builtins.exec": raw_table(lambda marker: call("builtins", "exec", f"open({str(marker)!r}, 'w')")),
    "attribute of a class": raw_table(patched_class),
    "extension code": raw_table(lambda marker: b"\x80\x04\x82\x01."),
    "persistent object": persistent,
    "deep table": raw_table(lambda marker: b"\x80\x04" + b"]" * 20_000 + b"a" * 19_999 + b"."),
    "no pickle": raw_table(lambda marker: b"import os"),
    "plain value": in_place_of(dict, lambda folder, marker: torch_saved(Bomb(marker), folder)),
    "plain value, old format": in_place_of(
        dict, lambda folder, marker: torch_saved(Bomb(marker), folder, _use_new_zipfile_serialization=False)
    ),
    "plain value, bare pickle": in_place_of(dict, lambda folder, marker: pickle.dumps(Bomb(marker))),
    "plain value, TorchScript": in_place_of(dict, lambda folder, marker: script(folder)),
    "tensor": in_place_of(torch.Tensor, lambda folder, marker: torch_saved(Bomb(marker), folder)),
    "tensor, old format": in_place_of(
        torch.Tensor, lambda folder, marker: torch_saved(Bomb(marker), folder, _use_new_zipfile_serialization=False)
    ),
    "tensor that is a list": in_place_of(torch.Tensor, lambda folder, marker: torch_saved([torch.ones(9)] * 9, folder)),
    "meta.pt": lambda folder, marker: torch.save(Bomb(marker), folder / "meta.pt"),
    "meta.pt, bare pickle": lambda folder, marker: bare(folder / "meta.pt", marker),
    "shard beside the folder": outside("../outside.distcp"),
    "shard by its absolute path": outside("{parent}/outside.distcp"),
    "shard behind a detour": outside("x/../../outside.distcp"),
    "shard that is the table": place(relative_path=".metadata"),
    "shard with a transformation": place(transform_descriptors=["zstd"]),
    "negative offset": place(offset=-1),
    "length beyond the end": place(length=1 << 40),
    "float for a length": place(length=1e300),
    "tensor larger than its file": edited(larger),
    "list with a gigantic index": key_paths(("optimizer_0", 1 << 40)),
    "negative index": key_paths(("optimizer_0", -1)),
    "entry without a key": edited(lambda table, marker: table.state_dict_metadata.clear()),
    "pipe in place of a shard": fifo,
    "device in place of a shard": device,
    "shortened shard": shortened,
}  # fmt: skip


def tensors(table: Metadata) -> list[TensorStorageMetadata]:
    return [x for x in table.state_dict_metadata.values() if isinstance(x, TensorStorageMetadata)]


def load(folder: Path) -> None:
    """As the strategy does, without a Trainer."""
    module = torch.nn.ModuleDict({"layer": torch.nn.Linear(32, 2)})
    optimizer = torch.optim.AdamW(module.parameters())
    shard_files.load_shards(shard_files.ShardReader(folder), module, [optimizer], True, "state_dict")
    look_at_checkpoint(folder)


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_is_executed(attack: str, folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    before = MetadataIndex.__hash__
    ATTACKS[attack](folder, marker)
    if not attack.startswith("tensor"):  # Tensors are read when they are loaded.
        with pytest.raises(CheckpointError):
            look_at_checkpoint(folder)
    with pytest.raises((CheckpointError, shard_files.ShardError)) as caught:
        load(folder)
    assert not marker.exists()
    assert MetadataIndex.__hash__ is before
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("call", ["fit", "validate"])
@pytest.mark.parametrize("attack", ["table", "the table torch falls back to", "plain value", "tensor", "meta.pt"])
def test_a_trainer_executes_nothing(attack: str, call: str, folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    ATTACKS[attack](folder, marker)
    with pytest.raises(CheckpointError):
        getattr(trainer(2), call)(Sharded(), ckpt_path=folder)
    assert not marker.exists()


def test_the_bombs_would_go_off(folder: Path, tmp_path: Path) -> None:
    """By torch's own reader, in the table that it falls back to."""
    marker = tmp_path / "executed"
    fallback(folder, marker)
    with suppress(Exception, CheckpointException):
        dcp.load({"state_dict": {"layer.weight": torch.ones(2, 32)}}, checkpoint_id=folder)
    assert marker.exists()


def test_weights_only_false_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="executes nothing"):
        trainer().strategy.load_checkpoint(folder, weights_only=False)


# --- whole folders -------------------------------------------------------------------------------------------------


def copied(how: str, saved: Path, to: Path) -> None:
    if how == "cp -r":
        subprocess.run(["cp", "-r", saved, to], check=True)
        return
    names = sorted(path.name for path in saved.iterdir())
    if how == "by name, reversed":
        names.reverse()
    if how == "meta.pt first":
        names.sort(key=lambda name: name != "meta.pt")
    to.mkdir()
    for age, name in enumerate(names):
        shutil.copyfile(saved / name, to / name)
        os.utime(to / name, (1e9 + age, 1e9 + age))


@pytest.mark.parametrize("how", ["cp -r", "by name", "by name, reversed", "meta.pt first"])
def test_a_copy_is_whole(how: str, saved: Path, tmp_path: Path) -> None:
    copied(how, saved, tmp_path / "copy.ckpt")
    assert look_at_checkpoint(tmp_path / "copy.ckpt")["global_step"] == 1
    again = trainer(2)
    again.fit(Sharded(), ckpt_path=tmp_path / "copy.ckpt")
    assert again.global_step == 2


@pytest.mark.parametrize("missing", ["meta.pt", ".metadata", "__0_0.distcp"])
def test_a_part_of_a_folder_is_refused(missing: str, folder: Path) -> None:
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match=r"not written to its end|is missing"):
        look_at_checkpoint(folder)


def test_a_damaged_tensor_is_refused(folder: Path) -> None:
    _, info = entry(folder, torch.Tensor)
    path = folder / info.relative_path
    content = bytearray(path.read_bytes())
    at = content.index(b"PK", info.offset + info.length // 2) - 64  # within the numbers
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        trainer(2).fit(Sharded(), ckpt_path=folder)


# --- which strategies do so -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ("fsdp", SafeFSDPStrategy),
        ("lightning.pytorch.strategies.ModelParallelStrategy", SafeModelParallelStrategy),
        ("lightning.pytorch.strategies.FSDPStrategy", SafeFSDPStrategy),
        ("lightning.pytorch.strategies.DDPStrategy", None),
        ("auto", None),
    ],
)
def test_the_command_line_chooses_them(given: str, chosen: type | None) -> None:
    class Noted(OptimCLI):
        def instantiate_trainer(self, **kwargs: Any) -> Any:
            return None

    value = f"{{class_path: {given}}}" if "." in given else given
    cli = Noted(BoringModel, run=False, args=["--trainer.strategy", value])
    strategy = cli.config.trainer.strategy
    path = strategy if isinstance(strategy, str) else strategy.class_path
    assert path == (given if chosen is None else f"lightning_optim.checkpoint_io.{chosen.__name__}")
    built = cli.config_init.trainer.strategy
    assert chosen is None or type(built) is chosen
