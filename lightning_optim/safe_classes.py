"""This library's own classes in checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_T = TypeVar("_T", bound=type)


def safe_in_checkpoints(*former_paths: str) -> Callable[[_T], _T]:
    """Let objects of a dataclass be loaded with ``weights_only=True``, as hyperparameters of a LightningModule are.

    They are made anew from what the file says of their fields, which are checked as always.

    Args:
        former_paths: Dotted paths that the class had in earlier versions.

    Example:
        >>> import dataclasses, io
        >>> from lightning_optim import Grouping
        >>> file = io.BytesIO()
        >>> torch.save({"grouping": Grouping(layer_decay=0.75)}, file)
        >>> _ = file.seek(0)
        >>> torch.load(file, weights_only=True)["grouping"].layer_decay
        0.75
    """

    def register(cls: _T) -> _T:
        def __setstate__(self: Any, state: dict[str, Any]) -> None:
            self.__init__(**state)

        cls.__setstate__ = __setstate__  # type: ignore[attr-defined]
        torch.serialization.add_safe_globals([cls, *((cls, path) for path in former_paths)])
        return cls

    return register
