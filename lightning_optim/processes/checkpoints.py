"""Folders of shards, as ``torch.distributed.checkpoint`` writes them."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata


def check_shards(folder: Path) -> None:
    """Refuse shards that hold more than tensors and plain values, all of which torch would execute."""
    with (folder / ".metadata").open("rb") as file:
        table = _TableOfShards(file).load()
    for index, where in table.storage_data.items():
        if isinstance(table.state_dict_metadata[index.fqn], metadata.BytesStorageMetadata):
            with (folder / where.relative_path).open("rb") as shard:
                shard.seek(where.offset)
                torch.load(io.BytesIO(shard.read(where.length)), "cpu", weights_only=True)


class _TableOfShards(pickle.Unpickler):
    """Reads the table of contents that torch pickles beside shards, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if (module, name) in _IN_TABLES or module == "torch" else None
        if found is None or (module == "torch" and found is not torch.Size and not isinstance(found, torch.dtype)):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return found


_IN_TABLES = {
    *(
        (metadata.__name__, name)
        for name, x in vars(metadata).items()
        if getattr(x, "__module__", "") == metadata.__name__
    ),
    (filesystem.__name__, "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    *(("pathlib", name) for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
}
