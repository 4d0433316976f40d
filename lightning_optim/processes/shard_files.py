"""Folders of shards, as ``torch.distributed.checkpoint`` writes them, read without executing anything that is in them.

torch unpickles the table of contents (``.metadata``, or ``__0.metadata`` where that fails) and everything that is no
tensor with Python's unpickler, which executes what a file says. :class:`ShardReader` reads the table itself, checks it,
and passes the finished table and plain values to torch, which opens no file of the folder itself.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.futures import Future
from torch.optim import Optimizer

from ..names import clean_name

TABLE = ".metadata"


class ShardError(ValueError):
    """A folder of shards is damaged, incomplete, or holds more than tensors and plain values."""


# --- the table of contents -----------------------------------------------------------------------------------------


class _Record:
    """Stands for an object of the table: what it was made of, and what its attributes are to be."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    @property
    def fields(self) -> Mapping[str, Any]:
        """The attributes of an object whose state is a dictionary."""
        return _is(dict, self.state) if self.state is not None else {}


#: Classes whose objects torch writes into a table, by their names.
_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
}


class _TableUnpickler(pickle.Unpickler):
    """Makes records, tuples and dtypes. No class of torch is touched: each unpickler has classes of its own."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self._classes = {
            (module, name): type(name, (_Record,), {}) for module, names in _CLASSES.items() for name in names
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._classes:
            return self._classes[module, name]
        if module == "torch":
            if name == "Size":
                return tuple
            if isinstance(dtype := vars(torch).get(name), torch.dtype):
                return dtype
        raise ShardError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise ShardError("a reference to something outside of the file")


_T = TypeVar("_T")


def _is(cls: type[_T], x: Any, most: int | None = None) -> _T:
    if type(x) is not cls or (most is not None and not 0 <= x <= most):  # type: ignore[operator]
        raise ShardError(f"{x!r:.80} in the table of contents, where a {cls.__name__} belongs")
    return x


def _record(name: str, x: Any) -> _Record:
    if not (isinstance(x, _Record) and type(x).__name__ == name):
        raise ShardError(f"{x!r:.80} in the table of contents, where a {name} belongs")
    return x


#: Largest number that is taken for a length, an offset or an index: 1 EiB.
_MOST = 1 << 60


def _checked_size(x: Any) -> torch.Size:
    return torch.Size([_is(int, n, _MOST) for n in _is(tuple, x)])


def _checked_entry(x: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if isinstance(x, _Record) and type(x).__name__ == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _record("TensorStorageMetadata", x).fields
    dtype = _is(tuple, _record("TensorProperties", fields["properties"]).state)[0]
    chunks = [_record("ChunkStorageMetadata", chunk).fields for chunk in _is(list, fields["chunks"])]
    return TensorStorageMetadata(
        TensorProperties(dtype=_is(torch.dtype, dtype)),
        _checked_size(fields["size"]),
        [ChunkStorageMetadata(_checked_size(chunk["offsets"]), _checked_size(chunk["sizes"])) for chunk in chunks],
    )


def _checked_index(x: Any) -> MetadataIndex:
    fields = _record("MetadataIndex", x).fields
    offset, index = fields.get("offset"), fields.get("index")
    return MetadataIndex(
        _is(str, fields["fqn"]),
        None if offset is None else _checked_size(offset),
        None if index is None else _is(int, index, _MOST),
    )


def _key_path(x: Any) -> tuple[str | int, ...]:
    """Where in a nested state dict an entry is. Numbers are positions in lists, which torch makes that long."""
    return tuple(key if type(key) is str else _is(int, key, 1 << 16) for key in _is(tuple, x))


def _checked_place(x: Any) -> tuple[str, int, int]:
    """Where an entry is: name of the file, first byte, number of bytes."""
    fields = _record("_StorageInfo", x).fields
    if fields.get("transform_descriptors"):
        raise ShardError("compressed or otherwise transformed shards, which are not supported")
    name = _is(str, fields["relative_path"])
    if not re.fullmatch(r"[\w-][\w.-]*\.distcp", name):
        raise ShardError(f"{name!r:.80}, which is no name of a file of shards")
    return name, _is(int, fields["offset"], _MOST), _is(int, fields["length"], _MOST)


def _read_table(file: Any) -> tuple[Metadata, dict[MetadataIndex, tuple[str, int, int]]]:
    fields = _record("Metadata", _TableUnpickler(file).load()).fields
    if fields.get("storage_meta") is not None:
        _record("StorageMeta", fields["storage_meta"])
    entries = {_is(str, name): _checked_entry(x) for name, x in _is(dict, fields["state_dict_metadata"]).items()}
    paths = {_is(str, name): _key_path(x) for name, x in _is(dict, fields["planner_data"]).items()}
    places = {_checked_index(index): _checked_place(x) for index, x in _is(dict, fields["storage_data"]).items()}
    for index, (_, _, length) in places.items():
        entry = entries[index.fqn]
        if isinstance(entry, TensorStorageMetadata):
            sizes = [chunk.sizes for chunk in entry.chunks if index.offset is None or chunk.offsets == index.offset]
            if not sizes or sizes[0].numel() * entry.properties.dtype.itemsize > length:
                raise ShardError(f"{index.fqn} is larger than what is stored of it")
    return Metadata(entries, planner_data=paths, storage_meta=StorageMeta()), places


def _shard_error(error: Exception) -> ShardError:
    """A :class:`ShardError` from any error; a forged file can cause all kinds of them."""
    if isinstance(error, ShardError):
        return error
    reason = str(error).partition("WeightsUnpickler error: ")[2].partition("\n")[0]
    return ShardError(reason or f"{type(error).__name__}: {error}"[:200])


# --- the reader ----------------------------------------------------------------------------------------------------


class ShardReader(dcp.StorageReader):
    """Reads a folder of shards for ``torch.distributed.checkpoint.load``.

    The table of contents and all plain values are read and checked when the reader is made, tensors when they are
    loaded, after comparing their checksums.

    Args:
        folder: The folder.

    Raises:
        ShardError: A file is missing, damaged, shorter than the table says, or holds other things than tensors and
            plain values.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            with (folder / TABLE).open("rb") as file:
                self.table, self._places = _read_table(file)
            self._check_lengths()
            self._values = {
                index: torch.load(io.BytesIO(self._bytes(index)), "cpu", weights_only=True)
                for index in self._places
                if isinstance(self.table.state_dict_metadata[index.fqn], BytesStorageMetadata)
            }
        except Exception as error:
            raise _shard_error(error) from error

    def _check_lengths(self) -> None:
        ends: dict[str, int] = {}
        for name, offset, length in self._places.values():
            ends[name] = max(ends.get(name, 0), offset + length)
        for name, end in ends.items():
            path = self.folder / name
            if not path.is_file():
                raise ShardError(f"{name} is missing")
            if path.stat().st_size < end:
                raise ShardError(f"{name} has {path.stat().st_size} bytes instead of {end}")

    def _bytes(self, index: MetadataIndex) -> bytes:
        """What is stored of an entry, an archive of ``torch.save``."""
        name, offset, length = self._places[index]
        with (self.folder / name).open("rb") as file:
            file.seek(offset)
            content = file.read(length)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ShardError(f"{index.fqn} in {name} is damaged ({damaged})")
        return content

    def _tensor(self, index: MetadataIndex) -> Tensor:
        try:
            x = torch.load(io.BytesIO(self._bytes(index)), "cpu", weights_only=True)
        except Exception as error:
            raise _shard_error(error) from error
        if not isinstance(x, Tensor):
            raise ShardError(f"{index.fqn} is no tensor")
        return x

    # --- what torch calls -----------------------------------------------------------------------------------------

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to do: a reader is made for one folder."""

    def read_metadata(self) -> Metadata:
        """The table of contents."""
        return self.table

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what a plan asks for."""
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                # torch unpickles these bytes, so they are written here, from values that have been checked.
                buffer = io.BytesIO()
                torch.save(self._values[item.storage_index], buffer)
                buffer.seek(0)
                planner.load_bytes(item, buffer)
                continue
            x = self._tensor(item.storage_index)
            for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths)):
                x = x.narrow(dim, start, length)
            target = planner.resolve_tensor(item).detach()
            if target.shape != x.shape:
                raise ShardError(f"{item.storage_index.fqn} has the shape {tuple(x.shape)}, not {tuple(target.shape)}")
            target.copy_(x)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Whether a path can be read."""
        return Path(checkpoint_id).is_dir()

    # --- what is in it --------------------------------------------------------------------------------------------

    def parameters_with_state(self, optimizer: str) -> set[str]:
        """Names of the parameters of which an optimizer's state is in the folder."""
        paths = self.table.planner_data.values()
        return {str(path[2]) for path in paths if path[:2] == (optimizer, "state") and len(path) > 2}


# --- loading -------------------------------------------------------------------------------------------------------


def load_shards(
    reader: ShardReader, module: nn.Module, optimizers: Sequence[Optimizer], strict: bool, module_key: str
) -> None:
    """Load a module and optimizers under FSDP2 as Lightning does, and frozen parameters as they were saved.

    torch expects state of the parameters that require gradients when a checkpoint is loaded, and drops that of others.
    A run that freezes parameters when training starts, or in its course, has saved state of others. Here state is
    loaded of those parameters of which there is some.

    Args:
        reader: The folder.
        module: The module, with its parameters sharded.
        optimizers: Its optimizers.
        strict: Whether the module has to have the names of the folder.
        module_key: What the module is called in the folder.

    Raises:
        ShardError: A tensor is damaged.
    """
    state: dict[str, Any] = {module_key: get_model_state_dict(module)}
    _load(reader, state)
    module.load_state_dict(state[module_key], strict=strict)
    for i, optimizer in enumerate(optimizers):
        key = f"optimizer_{i}"
        with requiring_gradients(module, reader.parameters_with_state(key)):
            state = {key: get_optimizer_state_dict(module, optimizer)}
            _load(reader, state)
            options = StateDictOptions(cpu_offload=True)
            set_optimizer_state_dict(module, optimizer, optim_state_dict=state[key], options=options)


def parameters_with_state(states: Sequence[Mapping[str, Any]], module: nn.Module) -> set[str]:
    """Names of the parameters of which there is state in optimizers' state dicts, as Lightning writes them into files.

    Lightning names parameters by their position in the module.
    """
    names = [clean_name(name) for name, _ in module.named_parameters()]
    keys = {key for state in states for key in state["state"]}
    return {names[key] if isinstance(key, int) else clean_name(key) for key in keys}


@contextmanager
def requiring_gradients(module: nn.Module, names: set[str]) -> Iterator[None]:
    """Within this context exactly the parameters with these names require gradients."""
    before = {p: p.requires_grad for p in module.parameters()}
    try:
        for name, p in module.named_parameters():
            p.requires_grad_(clean_name(name) in names)
        yield
    finally:
        for p, requires_grad in before.items():
            p.requires_grad_(requires_grad)


def load_flat_shards(reader: ShardReader, module: nn.Module, optimizers: Sequence[Optimizer], strict: bool) -> None:
    """Load a module and optimizers under FSDP1 as Lightning does.

    Args:
        reader: The folder.
        module: The wrapped module.
        optimizers: Its optimizers.
        strict: Whether the module has to have the names of the folder.

    Raises:
        ShardError: A tensor is damaged.
    """
    from torch.distributed.checkpoint.optimizer import load_sharded_optimizer_state_dict
    from torch.distributed.fsdp import (
        FullyShardedDataParallel,
        ShardedOptimStateDictConfig,
        ShardedStateDictConfig,
        StateDictType,
    )

    sharded = FullyShardedDataParallel.state_dict_type(
        module,
        StateDictType.SHARDED_STATE_DICT,
        ShardedStateDictConfig(offload_to_cpu=True),
        ShardedOptimStateDictConfig(offload_to_cpu=True),
    )
    with sharded:
        state: dict[str, Any] = {"model": module.state_dict()}
        _load(reader, state)
        module.load_state_dict(state["model"], strict=strict)
        for i, optimizer in enumerate(optimizers):
            key = f"optimizer_{i}"
            with _shard_errors():
                found = load_sharded_optimizer_state_dict(state["model"], key, reader)
            optimizer.load_state_dict(
                FullyShardedDataParallel.optim_state_dict_to_load(module, optimizer, found[key])  # type: ignore[arg-type]
            )


def _load(reader: ShardReader, state: dict[str, Any]) -> None:
    with _shard_errors():
        dcp.load(state, storage_reader=reader)


@contextmanager
def _shard_errors() -> Iterator[None]:
    """torch collects the errors of all ranks in one of its own."""
    try:
        yield
    except CheckpointException as error:
        reasons = [failure[0] for failure in error.failures.values() if isinstance(failure[0], ShardError)]
        if not reasons:
            raise
        raise ShardError(str(reasons[0])) from error
