"""State tensors in fewer bits than the arithmetic uses.

Rules compute in float32. Where ``state_dtype`` asks for it, the engine stores running averages in lower precision: it
converts those of a chunk or a stack to float32 before the rule's update (:func:`read`), and rounds the new values after
it (:func:`write_`). ``averages`` and ``squares`` of :class:`.rule.Rule` say which tensors these are; numbers,
eigenbases and everything else stay in float32. The dtype of a tensor says how it is stored:

- ``torch.bfloat16``: rounded;
- ``torch.int8``, of any sign: a code ``c`` stands for ``sign(c) (c / 127)^2`` times a scale;
- ``torch.uint8``, never negative: a code ``c`` stands for ``(c / 255)^4`` times a scale. Only zero is stored as zero:
  an update that is divided by the root of a second moment would otherwise be far too large.

Scales are the largest magnitudes of blocks, in a float32 tensor beside the codes. Powers make the distance of two codes
proportional to a root of the value, so that a small entry in a block with a large one keeps some precision. A second
moment has the fourth power where a momentum has the second, since its own root is what updates are divided by: the two
have the same relative precision then.

Blocks are successive elements of a row (all axes but the first), never of two, so that shards of a tensor along its
first axis have whole blocks: they store what one process stores, and checkpoints can be resumed on any number of ranks.

Rounding is stochastic: with :math:`\\beta = 0.999` a second moment changes by a thousandth in a step, less than the
distance of two codes, and would stand still if rounded to nearest. The random numbers are those of :mod:`.rounding`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Literal, TypeGuard, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from .layout import block_shape, is_split
from .rounding import rounded
from .rule import MatrixRule, Rule, Shape, averages_of, hyperparameters_of

StateDtype = Literal["float32", "bfloat16", "8bit"]
STATE_DTYPES: tuple[str, ...] = get_args(StateDtype)

#: Elements that share a scale, as in bitsandbytes (arXiv 2110.02861, whose blocks of 2048 later became 256).
BLOCK = 256
#: State of smaller parameters stays in float32, as in bitsandbytes and torchao: it takes no memory to speak of.
LEAST = 4096
#: State with shorter rows stays in float32 instead of 8 bits: scales would take more than a sixteenth of the codes.
SHORTEST_ROW = 64

#: For each dtype of codes, the largest code and the power that turns a code into a value.
_CODES = {torch.int8: (127, 2), torch.uint8: (255, 4)}
#: Added to the 16 random bits of an element for each of its state tensors, so that they are not all rounded alike:
#: 2^16 times the fractional part of the square root of 2, made odd.
_SHIFT = 27145
_NEAREST = 0x8000
_BYTES_2 = 0xFFFF


def scale_name(name: str) -> str:
    """Name of the scales that belong to a state tensor of codes."""
    return f"{name}_scale"


def is_low(x: Any) -> TypeGuard[Tensor]:
    """Whether a state tensor of a rule is stored in low precision."""
    return isinstance(x, Tensor) and (x.dtype == torch.bfloat16 or x.dtype in _CODES)


# --- which state ----------------------------------------------------------------------------------------------------


def row_axes(rule: type[Rule], shape: Sequence[int], group: Mapping[str, Any]) -> int:
    """How many leading axes count the rows of a parameter.

    One, but two of stacked matrices such as those of experts, (experts, out, in).
    """
    if not issubclass(rule, MatrixRule) or not shape:
        return 1
    return len(shape) - len(block_shape(shape, group)) + 1


def scale_shape(shape: Sequence[int], axes: int) -> Shape:
    """Shape of the scales of a tensor whose rows ``axes`` leading axes count.

    >>> scale_shape((64, 300), 1), scale_shape((8, 64, 3, 3), 1), scale_shape((0,), 2)
    ((64, 2), (8, 3), (0,))
    """
    if len(shape) < axes:  # State that another rank keeps is empty here.
        return (0,)
    return (*shape[:axes], -(-prod(shape[axes:]) // BLOCK))


def stored_dtypes(
    rule: type[Rule], shape: Sequence[int], group: Mapping[str, Any], state_dtype: str
) -> dict[str, torch.dtype]:
    """The state tensors of a parameter that are stored in low precision, and their dtypes.

    Args:
        rule: The rule of the parameter.
        shape: The shape of the parameter, of the whole if it is sharded.
        group: Its parameter group.
        state_dtype: One of :data:`STATE_DTYPES`.
    """
    if state_dtype == "float32" or prod(shape) < LEAST:
        return {}
    averages, squares = averages_of(rule, hyperparameters_of(rule, group))
    if state_dtype == "bfloat16":
        return dict.fromkeys((*averages, *squares), torch.bfloat16)
    cut = is_split(group) and group.get("transposed")  # Its matrices are parts of rows.
    if cut or prod(shape[row_axes(rule, shape, group) :]) < SHORTEST_ROW:
        return {}
    return dict.fromkeys(averages, torch.int8) | dict.fromkeys(squares, torch.uint8)


def may_be_low(rule: type[Rule], group: Mapping[str, Any]) -> dict[str, int]:
    """The state tensors that may be stored in low precision, and what is added to the random bits of an element."""
    averages, squares = averages_of(rule, hyperparameters_of(rule, group))
    return {name: i * _SHIFT & _BYTES_2 for i, name in enumerate((*averages, *squares), start=1)}


# --- values ---------------------------------------------------------------------------------------------------------


def read(stored: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The values of a state tensor in a dtype.

    >>> codes, scale = torch.tensor([[-127, 64, 0]], dtype=torch.int8), torch.tensor([[2.0]])
    >>> read(codes, scale, torch.float32)
    tensor([[-2.0000,  0.5079,  0.0000]])
    """
    if stored.dtype not in _CODES:
        return stored.to(dtype)
    assert scale is not None
    most, power = _CODES[stored.dtype]
    root = stored.to(dtype).div_(most)
    value = root * root.abs() if power == 2 else root.square_().square_()
    if not value.numel():
        return value
    return _out_of_blocks(_in_blocks(value, scale) * scale.reshape(-1, scale.shape[-1], 1), stored.shape)


def read_all(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a parameter, tensors in low precision as float32 and without their scales.

    Args:
        state: Local tensors by name, without the residual of :mod:`.rounding`.
    """
    low = [name for name, x in state.items() if is_low(x)]
    scales = set(map(scale_name, low))
    values = {name: read(state[name], state.get(scale_name(name)), torch.float32) for name in low}
    return {name: x for name, x in state.items() if name not in scales} | values


def write_(
    stored: Tensor, scale: Tensor | None, value: Tensor, bits: Tensor | None = None, finite: Tensor | None = None
) -> None:
    """Round values to a state tensor in low precision, and to its scales.

    Args:
        stored: The state tensor.
        scale: Its scales, if it holds codes.
        value: The values, of its shape.
        bits: 16 random bits for each, int32; ``None`` to round to nearest.
        finite: ``None``, or a 0-d boolean tensor: where it is ``False`` nothing changes.
    """
    if not value.numel():
        return
    if stored.dtype not in _CODES:
        value = rounded(value.to(torch.float32), stored.dtype, _NEAREST if bits is None else bits)
        _copy(stored, value.to(stored.dtype), finite)
        return
    assert scale is not None
    most, power = _CODES[stored.dtype]
    x = _in_blocks(value.to(torch.float32), scale)
    magnitude = x.abs()
    largest = magnitude.amax(-1)
    ratio = magnitude.div_(torch.where(largest > 0, largest, 1.0).unsqueeze(-1))
    root = ratio.sqrt() if power == 2 else ratio.sqrt().sqrt_()
    code = root.mul_(most).floor_().clamp_(max=most - 1)
    below, above = (_power((code + i).div_(most), power) for i in (0, 1))
    chance = (ratio - below).mul_(_BYTES_2 + 1)
    drawn = _NEAREST if bits is None else _in_blocks(bits, scale)
    code += chance > (above - below).mul_(drawn)
    if power == 4:
        code = torch.where(ratio > 0, code.clamp(min=1), code)
    else:
        code = torch.copysign(code, x)
    _copy(stored, _out_of_blocks(code, stored.shape).to(stored.dtype), finite)
    _copy(scale, largest.view(scale.shape), finite)


def _power(x: Tensor, power: int) -> Tensor:
    return x.square_() if power == 2 else x.square_().square_()


def _in_blocks(x: Tensor, scale: Tensor) -> Tensor:
    """Elements of a tensor as (rows, blocks, elements); the last block of a row is filled up with zeros."""
    x = x.reshape(prod(scale.shape[:-1]), -1)
    if missing := scale.shape[-1] * BLOCK - x.shape[1]:
        x = pad(x, (0, missing))
    return x.view(len(x), scale.shape[-1], BLOCK)


def _out_of_blocks(x: Tensor, shape: Shape) -> Tensor:
    """The inverse of :func:`_in_blocks`."""
    x = x.view(len(x), -1)
    return x[:, : prod(shape) // len(x)].reshape(shape)


def _copy(target: Tensor, value: Tensor, finite: Tensor | None) -> None:
    target.copy_(value if finite is None else torch.where(finite, value, target))
