"""How float32 results are stored in bfloat16 and float16 parameters.

A rule computes in float32. :func:`load` returns the float32 value of a parameter, :func:`store_` rounds one and writes
it back. The rounding follows from the arguments: the dtype of the *residual*, a state tensor of the parameter's shape
that keeps the rounding error, and whether there are random numbers.

All rounding is integer arithmetic on the bits of the float32 value, since bit patterns, as integers, grow with the
magnitude. Eager and compiled runs therefore give the same bits: a compiler may cancel a pair of conversions that
rounds, but not integer arithmetic.
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

#: Name of the state tensor that keeps the rounding errors of a parameter.
RESIDUAL = "residual"

#: Bits of float32's mantissa that the narrow dtypes lack.
_DROPPED = {torch.bfloat16: 16, torch.float16: 13}
_BYTES_2 = 0xFFFF
_BYTES_4 = 0xFFFFFFFF


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether a dtype has a lower precision than the float32 arithmetic on its parameters."""
    return dtype in _DROPPED


def residual_dtype(rounding: str, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype of a parameter's residual; ``None`` if it has none.

    Raises:
        ValueError: The rounding does not exist for the dtype.

    >>> residual_dtype("kahan", torch.float16), residual_dtype("split", torch.bfloat16)
    (torch.float16, torch.int16)
    >>> residual_dtype("split", torch.float32)
    """
    if rounding == "split" and dtype == torch.float16:
        raise ValueError(
            "rounding='split' stores a float32 value as a bfloat16 parameter and 16 more bits. There is a parameter in "
            "float16, whose exponent is shorter than float32's: use rounding='kahan'."
        )
    if rounding == "kahan" and is_narrow(dtype):
        return dtype
    return torch.int16 if rounding == "split" and is_narrow(dtype) else None


def prepare_residual(state: Any, p: Tensor, rounding: str) -> None:
    """Add the residual that a rounding needs to the state of a parameter, and drop one of another rounding.

    A new residual is zero: the run continues from the rounded parameter.
    """
    dtype, residual = residual_dtype(rounding, p.dtype), state.get(RESIDUAL)
    if dtype is None:
        state.pop(RESIDUAL, None)
    elif getattr(residual, "dtype", None) != dtype:
        state[RESIDUAL] = processes.zeros_like(p, dtype)
    elif residual.device != p.device:
        state[RESIDUAL] = residual.to(p.device)


def load(p: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The value of a parameter in a dtype, with its residual; ``p`` itself if it has that dtype and no residual."""
    if residual is None:
        return p if p.dtype == dtype else p.to(dtype)
    value = p.to(torch.float32)
    if residual.dtype != torch.int16:
        return value + residual.to(torch.float32) * torch.finfo(p.dtype).eps
    low = residual.to(torch.int32)
    # The user may have set the parameter to zero; no bit pattern lies below zero.
    low = torch.where(value == 0, low.clamp(min=0), low)
    return (value.view(torch.int32) + low).view(torch.float32)


def store_(
    p: Tensor, value: Tensor, residual: Tensor | None, noise: Tensor | None = None, finite: Tensor | None = None
) -> None:
    """Write a float32 value to a parameter in bfloat16 or float16, and to its residual.

    Args:
        p: The parameter, or a vector of elements of one or more.
        value: The value to store.
        residual: Its residual: of the parameter's dtype for Kahan summation, int16 for a split, ``None`` for neither.
        noise: Positions of the elements in the random stream, int64, for stochastic rounding.
        finite: ``None``, or a 0-d boolean tensor: where it is ``False`` nothing changes.
    """
    new_residual: Tensor | None = None
    if noise is not None:
        bits = random_bits(noise)
        if spare := 16 - _DROPPED[p.dtype]:
            bits = bits >> spare  # Keep the upper bits: the lower ones repeat sooner.
        value = rounded(value, p.dtype, bits)
    elif residual is not None and residual.dtype == torch.int16:
        bits = torch.where(value.isnan(), torch.nan, value).view(torch.int32)
        new_residual = ((bits + 0x8000) & _BYTES_2) - 0x8000
        value = (bits - new_residual).view(torch.float32)
    elif residual is not None:
        exact, half = value, 1 << (_DROPPED[p.dtype] - 1)
        value = rounded(value, p.dtype, half)
        # In units of eps, which makes it as large as the parameter, so that float16 does not underflow.
        new_residual = torch.where(value == exact, 0.0, (exact - value) / torch.finfo(p.dtype).eps)
    _write(p, value, finite)
    if residual is not None and new_residual is not None:
        _write(residual, new_residual, finite)


def _write(target: Tensor, value: Tensor, finite: Tensor | None) -> None:
    value = value.to(target.dtype)
    if finite is not None and not torch.compiler.is_compiling():
        torch.where(finite, value, target, out=target)  # One pass, which a compiler makes of the two below.
    else:
        target.copy_(value if finite is None else torch.where(finite, value, target))


def rounded(value: Tensor, dtype: torch.dtype, addend: Tensor | int) -> Tensor:
    """Round to a neighbour in ``dtype``: add to the bits that it lacks, then clear them.

    Adding half a unit in the last place rounds to nearest; adding a random fraction of a unit rounds up or down with
    the right odds. A value beyond the largest finite number stays as it is and is rounded by the conversion.
    """
    dropped = _DROPPED[dtype]
    inside = value.abs() <= torch.finfo(dtype).max
    x = torch.where(inside, value, 0.0)
    if dtype == torch.float16:
        # Subnormal numbers have the spacing of the smallest normal ones: shift them there.
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
# At step t an element uses the random number h + a t, modulo 1, where h is random. Each is uniform, so that every
# rounding is right in the mean. Successive numbers are evenly distributed (a low-discrepancy sequence), so that their
# rounding errors cancel: after many equal updates an element is less than a unit off, where independent numbers would
# make it a random walk. Updates with noise of their own still make one, half to three quarters as wide.
#
# h changes every few steps. Otherwise the errors of updates that oscillate exactly with the period of the numbers,
# 1 / a, would add up, and elements with nearly the same h would always be rounded in the same direction.

#: 2^16 a. It is odd, so that all 2^16 numbers occur before one repeats. It is the nearest such number to 2^16 over the
#: golden ratio whose continued fraction over 2^16 has no quotient above 3, so that multiples of a stay far from
#: integers.
_STRIDE = 40521
#: Steps from one h to the next.
_BLOCK = 1024


def stream_start(t: int, position: int, offset: int = 0) -> int:
    """Position of a parameter's first element in the random stream at one step; the other elements follow it.

    Args:
        t: The parameter's step.
        position: Its position among the optimizer's parameters.
        offset: Index in the parameter of this rank's first element, for shards.
    """
    x = t // _BLOCK * 2**32 + position
    for _ in range(2):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 + 0x9E3779B97F4A7C15) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    # The lower half selects h; the offset is added to it and may carry into the upper half.
    return (t * _STRIDE % 2**16 << 32) + x % 2**32 + offset


def stream_positions(first: int, start: int, stop: int, device: torch.device) -> Tensor:
    """Stream positions of elements ``start`` to ``stop`` of a parameter whose first element has position ``first``."""
    return torch.arange(start, stop, device=device).add_(first)


def joined_positions(firsts: Sequence[int], sizes: Sequence[int], device: torch.device) -> Tensor:
    """Stream positions of the elements of several parameters, one after another, without a kernel for each."""
    starts = [first - behind for first, behind in zip(firsts, accumulate(sizes, initial=0))]
    shifts, counts = (torch.tensor(x, device="cpu").to(device, non_blocking=True) for x in (starts, sizes))
    return shifts.repeat_interleave(counts, output_size=sum(sizes)).add_(torch.arange(sum(sizes), device=device))


def random_bits(position: Tensor) -> Tensor:
    """16 random bits for each stream position, a pure function of it.

    32 bits are mixed in 64-bit integers, so that no product overflows: the result of an overflow is undefined.
    """
    x = position & _BYTES_4
    for shift, constant in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        x = ((x ^ (x >> shift)) * constant) & _BYTES_4
    return (((x ^ (x >> 15)) + (position >> 32)) & _BYTES_2).to(torch.int32)
