"""How float32 results are stored in parameters of bfloat16 and float16.

A rule computes in float32. :func:`load` makes the float32 value of a parameter, :func:`store_` writes one back, in one
of the ways of :data:`Rounding`. Which one it is follows from what is there: the dtype of the *residual*, a state tensor
of the parameter's shape that holds what the parameter cannot, and whether there are random numbers.

All rounding is integer arithmetic on the bits of the float32 value, whose bit patterns grow with its magnitude: eager
and compiled runs give the same bits, and no compiler may leave out the pair of conversions that makes a rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .. import processes

Rounding = Literal["nearest", "stochastic", "kahan", "split"]
ROUNDINGS: tuple[str, ...] = get_args(Rounding)

#: Name of the state tensor that holds what a parameter cannot.
RESIDUAL = "residual"

#: Bits of float32's mantissa that the narrow dtypes lack.
_DROPPED = {torch.bfloat16: 16, torch.float16: 13}
_BYTES_2 = 0xFFFF
_BYTES_4 = 0xFFFFFFFF


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether parameters of a dtype hold less than the arithmetic on them."""
    return dtype in _DROPPED


def residual_dtype(rounding: str, dtype: torch.dtype) -> torch.dtype | None:
    """Of what the residual of a parameter is made, ``None`` if it has none.

    Raises:
        ValueError: There is no such way for the dtype.

    >>> residual_dtype("kahan", torch.float16), residual_dtype("split", torch.bfloat16)
    (torch.float16, torch.int16)
    >>> residual_dtype("split", torch.float32)
    """
    if rounding == "split" and dtype == torch.float16:
        raise ValueError(
            "rounding='split' makes float32 of a bfloat16 parameter and 16 more bits, and there is a parameter in "
            "float16, whose exponent is another: use rounding='kahan'."
        )
    if rounding == "kahan" and is_narrow(dtype):
        return dtype
    return torch.int16 if rounding == "split" and is_narrow(dtype) else None


def prepare_residual(state: Any, p: Tensor, rounding: str) -> None:
    """See to it that the state of a parameter holds the residual that a way of rounding needs, and no other.

    A new one is zero: the run goes on from the parameter as it is.
    """
    dtype, residual = residual_dtype(rounding, p.dtype), state.get(RESIDUAL)
    if dtype is None:
        state.pop(RESIDUAL, None)
    elif getattr(residual, "dtype", None) != dtype:
        state[RESIDUAL] = processes.zeros_like(p, dtype)
    elif residual.device != p.device:
        state[RESIDUAL] = residual.to(p.device)


def load(p: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The value of a parameter in the precision of the arithmetic; ``p`` itself if it has that."""
    if residual is None:
        return p.to(dtype)
    value = p.to(torch.float32)
    if residual.dtype != torch.int16:
        return value + residual.to(torch.float32) * torch.finfo(p.dtype).eps
    low = residual.to(torch.int32)
    # Somebody may have set the parameter to zero, below which there is no bit pattern.
    low = torch.where(value == 0, low.clamp(min=0), low)
    return (value.view(torch.int32) + low).view(torch.float32)


def store_(
    p: Tensor, value: Tensor, residual: Tensor | None, noise: Tensor | None = None, finite: Tensor | None = None
) -> None:
    """Write a float32 value to a parameter in bfloat16 or float16, and to its residual.

    Args:
        p: The parameter or a part of some.
        value: What to store.
        residual: Of the parameter; in its dtype for Kahan's compensation, int16 for a split, ``None`` for neither.
        noise: Numbers of the elements in a stream of random numbers, for stochastic rounding.
        finite: ``None``, or a 0-d boolean tensor: where it is ``False`` nothing changes.
    """
    new_residual: Tensor | None = None
    if noise is not None:
        bits = random_bits(noise)
        if spare := 16 - _DROPPED[p.dtype]:
            bits = bits >> spare  # Its upper ones: the lower ones repeat sooner.
        value = _round(value, p.dtype, bits)
    elif residual is not None and residual.dtype == torch.int16:
        bits = torch.where(value.isnan(), torch.nan, value).view(torch.int32)
        new_residual = ((bits + 0x8000) & _BYTES_2) - 0x8000
        value = (bits - new_residual).view(torch.float32)
    elif residual is not None:
        exact, half = value, 1 << (_DROPPED[p.dtype] - 1)
        value = _round(value, p.dtype, half)
        # In units of eps: as large as the parameter, so that float16 does not underflow.
        new_residual = torch.where(value == exact, 0.0, (exact - value) / torch.finfo(p.dtype).eps)
    _write(p, value, finite)
    if residual is not None and new_residual is not None:
        _write(residual, new_residual, finite)


def _write(target: Tensor, value: Tensor, finite: Tensor | None) -> None:
    value = value.to(target.dtype)
    target.copy_(value if finite is None else torch.where(finite, value, target))


def _round(value: Tensor, dtype: torch.dtype, addend: Tensor | int) -> Tensor:
    """The neighbour in ``dtype`` that is left of adding to the bits below its last one and cutting them off.

    Half of the unit in the last place rounds to nearest, a random part of it up or down with the right odds.
    Everything beyond the largest number stays as it is, to be rounded as in any conversion.
    """
    dropped = _DROPPED[dtype]
    inside = value.abs() <= torch.finfo(dtype).max
    x = torch.where(inside, value, 0.0)
    if dtype == torch.float16:
        # Subnormal numbers are as far apart as the smallest normal ones, among which this puts them.
        smallest = torch.finfo(dtype).smallest_normal
        shift = torch.where(x.abs() < smallest, torch.copysign(torch.full_like(x, smallest), x), 0.0)
        x = x + shift
    bits = (x.view(torch.int32) + addend) & -(1 << dropped)
    x = bits.view(torch.float32)
    if dtype == torch.float16:
        x = x - shift
    return torch.where(inside, x, value)


# --- random numbers ---------------------------------------------------------------------------------------------
#
# At step t an element has the number h + a t, modulo 1, where h is random. Each is uniform, so that every rounding is
# right in the mean. And a few in succession are spread evenly, so that what one step rounds up too much the next ones
# round up too little: after many equal updates an element is less than a unit off, where with independent numbers it
# wanders. What differs at random from one update to the next makes it wander still, half to three quarters as far.
#
# Every so many steps there is another h. Otherwise updates that swing exactly with the period of the numbers, 1 / a,
# would go ever further astray, and elements with nearly the same h would for ever be rounded in the same way.

#: 2^16 a: odd, so that all numbers come up before one comes again; and the nearest to 2^16 over the golden ratio whose
#: continued fraction over 2^16 has no quotient above 3, so that multiples of a stay away from integers.
_STRIDE = 40521
#: Steps from one h to the next.
_BLOCK = 1024


def first_number(t: int, position: int, offset: int = 0) -> int:
    """The number of a parameter's first element in the stream of random numbers, at one step.

    The numbers of the elements that follow it follow.

    Args:
        t: The parameter's step.
        position: Its position among the optimizer's parameters.
        offset: Index in the parameter of the first element that is here, for shards.
    """
    x = t // _BLOCK * 2**32 + position
    for _ in range(2):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 + 0x9E3779B97F4A7C15) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    # The lower half says which h, where what is carried over adds to it.
    return (t * _STRIDE % 2**16 << 32) + x % 2**32 + offset


def numbers(first: int, start: int, stop: int, device: torch.device) -> Tensor:
    """The numbers of elements ``start`` to ``stop`` of a parameter whose first element has the given one."""
    return torch.arange(start, stop, device=device).add_(first)


def joined_numbers(firsts: Sequence[int], sizes: Sequence[int], device: torch.device) -> Tensor:
    """The numbers of the elements of several parameters, one after another, without a launch for each."""
    starts = [first - behind for first, behind in zip(firsts, accumulate(sizes, initial=0))]
    shifts, counts = (torch.tensor(x, device="cpu").to(device, non_blocking=True) for x in (starts, sizes))
    return shifts.repeat_interleave(counts, output_size=sum(sizes)).add_(torch.arange(sum(sizes), device=device))


def random_bits(number: Tensor) -> Tensor:
    """16 random bits for each number: the same ones always, whoever asks and in whatever order.

    32 bits are mixed, in 64 so that no product overflows: what that gives is nobody's promise.
    """
    x = number & _BYTES_4
    for shift, constant in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        x = ((x ^ (x >> shift)) * constant) & _BYTES_4
    return (((x ^ (x >> 15)) + (number >> 32)) & _BYTES_2).to(torch.int32)
