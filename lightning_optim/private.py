"""Private interfaces of torch that the optimizers use, checked with torch 2.15.

Each has one name here, and a fallback for versions of torch without it. Those of distributed tensors and of Lightning
are in :mod:`.processes.private`, those of Inductor in :mod:`.engine.compile`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def flatten_fallback(xs: Sequence[Tensor]) -> Tensor:
    """One new vector of all elements of some contiguous tensors."""
    return torch.cat([x.reshape(-1) for x in xs])


def unflatten_fallback(vector: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    """Views of a vector, one after another, with the shapes of some tensors."""
    return [part.view(x.shape) for part, x in zip(vector.split([x.numel() for x in like]), like)]


def copy_fallback(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source to its target."""
    for target, source in zip(targets, sources):
        target.copy_(source)


def norms_fallback(xs: Sequence[Tensor], order: float = 2, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The vector norm of each tensor."""
    return [torch.linalg.vector_norm(x, order, dtype=dtype) for x in xs]


_bindings: Any = getattr(torch._C, "_nn", None)
#: These take one call for all tensors, however many there are.
flatten: Callable[[Sequence[Tensor]], Tensor] = getattr(_bindings, "flatten_dense_tensors", flatten_fallback)
unflatten: Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor]] = getattr(
    _bindings, "unflatten_dense_tensors", unflatten_fallback
)
copy_each_: Callable[[Sequence[Tensor], Sequence[Tensor]], None] = getattr(torch, "_foreach_copy_", copy_fallback)
norms: Callable[..., list[Tensor]] = getattr(torch, "_foreach_norm", norms_fallback)


def base(x: Tensor) -> Tensor | None:
    """The tensor that ``x`` is a view of; ``None`` without torch's attribute, so that views are made again."""
    return getattr(x, "_base", None)


def are_views(xs: Iterable[Tensor], starts: Iterable[int], vector: Tensor) -> bool:
    """Whether tensors are views of a vector which begin at some of its elements."""
    return all(base(x) is vector and x.storage_offset() == start for x, start in zip(xs, starts))


def has_matrix_tiles() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware (AMX); ``False`` if torch cannot tell."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported and supported())
