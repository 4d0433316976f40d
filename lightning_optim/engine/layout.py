"""The matrices inside parameters.

A parameter holds ``blocks`` equal matrices, stacked along its first axis, and each of these may be split along its rows
(its output axis) into several of its own sizes, as in a fused projection with more query than key heads. The matrices
of one entry of ``split``, one in each block, are a :class:`Part`: equal matrices, which run as if they were a parameter
of their own. Four entries of a parameter group say this: ``blocks``, ``transposed``, and where there is a
split ``split`` and ``interleaved``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

from torch import Tensor

from .rule import Shape


def block_shape(shape: Sequence[int], group: Mapping[str, Any]) -> Shape:
    """Shape ``(out, in, ...)`` of one of the ``blocks`` tensors that a parameter of the given shape holds.

    >>> block_shape((12, 4), {"blocks": 3, "transposed": False})  # a packed query, key and value projection
    (4, 4)
    >>> block_shape((6, 2, 3, 3), {"blocks": 1, "transposed": True})  # a transposed convolution
    (2, 6, 3, 3)
    >>> block_shape((8, 16, 32), {"blocks": 8, "transposed": False})  # eight experts
    (16, 32)
    >>> block_shape((8, 16, 32), {"blocks": 16, "transposed": False})  # gate and up projections of eight experts
    (8, 32)
    """
    rows, *rest = shape
    if group["blocks"] > rows and len(rest) > 1:
        rows, *rest = rows * rest[0], *rest[1:]
    rows //= group["blocks"]
    if group["blocks"] > 1 and rows == 1 and len(rest) > 1:
        rows, *rest = rest
    if group["transposed"]:
        rows, rest[0] = rest[0], rows
    return (rows, *rest)


def to_blocks(x: Tensor, group: Mapping[str, Any]) -> Tensor:
    """View (a copy where no view exists) of ``x`` as ``(blocks, *block_shape)``."""
    blocks = group["blocks"]
    if blocks == 1:
        y = x.unsqueeze(0)
    else:
        if blocks > x.shape[0] and x.ndim > 2:
            x = x.flatten(0, 1)
        y = x.reshape(blocks, x.shape[0] // blocks, *x.shape[1:])
        if y.shape[1] == 1 and y.ndim > 3:
            y = y.squeeze(1)
    return y.transpose(1, 2) if group["transposed"] else y


def from_blocks(y: Tensor, shape: Sequence[int], group: Mapping[str, Any]) -> Tensor:
    """Inverse of :func:`to_blocks`."""
    block = (group["blocks"], *block_shape(shape, group))
    y = y.reshape(block)
    return (y.transpose(1, 2) if group["transposed"] else y).reshape(tuple(shape))


def is_split(group: Mapping[str, Any]) -> bool:
    """Whether the blocks of a parameter group are split."""
    return bool(group.get("split"))


def without_split(group: Mapping[str, Any]) -> Mapping[str, Any]:
    """The group of a part: its matrices are equal."""
    return {key: x for key, x in group.items() if key not in ("split", "interleaved")} if is_split(group) else group


def layout_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a parameter group that say where its matrices are."""
    keys = ("blocks", "transposed", "split", "interleaved")
    return {key: group[key] for key in keys if key in group}


@dataclass(frozen=True)
class Part:
    """Equal matrices of a parameter, one in each of its blocks, or all of them where nothing is split.

    Attributes:
        first: Index of the first of them among the parameter's matrices, which are counted part by part.
        shape: Their shape, ``(out, in, ...)``.
        blocks: How many they are.
        start: The row of a block at which they begin.
        step: The distance of their rows, more than one in an interleaved split.
        transposed: Whether blocks are stored (in, out, ...).
        whole: Whether they are all of the parameter.
    """

    first: int
    shape: Shape
    blocks: int
    start: int = 0
    step: int = 1
    transposed: bool = False
    whole: bool = True

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape of each as a matrix."""
        return self.shape[0], prod(self.shape[1:])

    @property
    def indices(self) -> range:
        """Their indices among the parameter's matrices."""
        return range(self.first, self.first + self.blocks)

    def of(self, x: Tensor) -> Tensor:
        """A view of them in a tensor of the parameter's shape."""
        if self.whole:
            return x
        if self.blocks > 1 and (x.ndim < 3 or x.shape[0] != self.blocks):
            x = x.unflatten(0, (self.blocks, -1))
        axis = (self.blocks > 1) + self.transposed
        if self.step == 1:
            return x.narrow(axis, self.start, self.shape[0])
        return x.unflatten(axis, (self.shape[0], self.step)).select(axis + 1, self.start)

    @property
    def offset(self) -> int:
        """Index of their first element among all of the parameter."""
        return self.start * prod(self.shape[2:] if self.transposed else self.shape[1:])


def parts_of(shape: Sequence[int], group: Mapping[str, Any]) -> tuple[Part, ...]:
    """The parts of a parameter of the given shape.

    >>> for part in parts_of((8, 4), {"blocks": 1, "transposed": False, "split": (4, 2, 2)}):
    ...     print(part.indices, part.shape, part.start)
    range(0, 1) (4, 4) 0
    range(1, 2) (2, 4) 4
    range(2, 3) (2, 4) 6
    """
    split = tuple(group.get("split") or ())
    return _parts(tuple(shape), group["blocks"], group["transposed"], split, group.get("interleaved", False))


@lru_cache(maxsize=4096)
def _parts(shape: Shape, blocks: int, transposed: bool, split: tuple[int, ...], interleaved: bool) -> tuple[Part, ...]:
    _, *rest = block = block_shape(shape, {"blocks": blocks, "transposed": transposed})
    if not split:
        return (Part(0, block, blocks, transposed=transposed),)
    parts = []
    for j, rows in enumerate(split):
        start, step = (j, len(split)) if interleaved else (sum(split[:j]), 1)
        parts.append(Part(j * blocks, (rows, *rest), blocks, start, step, transposed, whole=False))
    return tuple(parts)


def matrices_in(x: Tensor, group: Mapping[str, Any]) -> list[Tensor]:
    """The matrices ``(k, m, n)`` of each part of a tensor of a parameter's shape."""
    return [to_blocks(part.of(x), without_split(group)).flatten(2) for part in parts_of(x.shape, group)]


def misfit(shape: Sequence[int], group: Mapping[str, Any]) -> str | None:
    """What does not fit in the layout of a parameter, if anything does not."""
    blocks, split = group["blocks"], group.get("split") or ()
    stacked = shape[0] * shape[1] if blocks > shape[0] and len(shape) > 2 else shape[0]
    if stacked % blocks:
        return f"blocks={blocks} does not divide the first axis of {tuple(shape)}"
    rows = block_shape(shape, group)[0]
    if split and sum(split) != rows:
        return f"split={tuple(split)} adds up to {sum(split)}, and a matrix of {tuple(shape)} has {rows} rows"
    if split and group.get("interleaved") and len(set(split)) > 1:
        return f"split={tuple(split)} is interleaved, and its parts are not equal"
    return None


# --- state of another shape than the parameter's ----------------------------------------------------------------


def joint_shape(shapes: Sequence[tuple[Part, Shape]]) -> Shape:
    """Shape of a state tensor that holds one of the given shape for each matrix of the given parts."""
    if len(shapes) == 1 and shapes[0][0].whole:
        part, shape = shapes[0]
        return (part.blocks, *shape)
    return (1, sum(part.blocks * prod(shape) for part, shape in shapes))


def state_of_part(x: Tensor, shapes: Sequence[tuple[Part, Shape]], part: Part) -> Tensor:
    """A view ``(blocks, *shape)`` of what a state tensor of :func:`joint_shape` holds for a part."""
    if part.whole:
        return x
    start = 0
    for other, shape in shapes:
        size = part.blocks * prod(shape)
        if other == part:
            return x.view(-1)[start : start + size].view(part.blocks, *shape)
        start += size
    raise LookupError(f"{part} has no such state.")
