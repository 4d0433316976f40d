"""How steps are made that depend on sums over whole matrices; see :mod:`.switches`.

Other chunks and other ranks may hold a part of a matrix. So such a step has three parts: :func:`displacement` and
:func:`sums_of` say where the rule goes and what is to be summed, the engine adds up the sums, and :func:`adjusted`
returns the move.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from .. import devices
from .arithmetic import shrink_aligned_
from .rule import Move

#: How much of the growth of a norm the radial brake leaves, as published.
OUTWARD = 0.5


def displacement(move: Move, g: Tensor, cautious: bool) -> Tensor:
    """How far a move goes, and where it is cautious, zero for elements whose gradient does not agree.

    >>> move = Move(torch.tensor([1.0, 2.0, 3.0]), step=0.5)
    >>> displacement(move, torch.tensor([0.1, -0.1, 0.0]), cautious=True)
    tensor([0.5000, 0.0000, 0.0000])
    """
    d = (move.direction if move.over is None else move.direction / move.over) * move.step
    # Products of the values themselves could underflow. NaN stays.
    return torch.where(d * g.sign() <= 0, 0.0, d) if cautious else d


@cache
def displacing(update: Callable[..., Move], cautious: bool) -> Callable[..., tuple[Tensor]]:
    """From the update of an element-wise or group rule, a function that updates state and returns the displacement."""

    def displace(g: Tensor, s: Any, k: Any) -> tuple[Tensor]:
        return (displacement(update(g, s, k), g, cautious),)

    return displace


def sums_of(d: Tensor, p: Tensor | None, keep: float | Tensor | None, k: Mapping[str, Any]) -> Tensor:
    """Sums over the elements of each of some displacements: a tensor ``(k, 5)``.

    How many elements there are, how many move, and the inner products of parameter and parameter, displacement and
    displacement, parameter and displacement. The parameter is the one after weight decay.

    Args:
        d: The displacements ``(k, ...)``.
        p: The parameters before the step; only needed where norms are controlled.
        keep: The factor of weight decay, if the rule's move says it.
        k: The numbers of the step, from :func:`.switches.adjusting`.
    """
    dtype = devices.widest(d.device)
    flat = _rows(d)
    moving = flat.count_nonzero(1).to(dtype)
    elements = torch.full_like(moving, flat.shape[1])
    if k["norm_control"] == "none":
        return torch.stack([elements, moving, *[torch.zeros_like(moving)] * 3], 1)
    assert p is not None
    p = _rows(_decayed(p, d, keep, k)).to(dtype)  # Squares of float32 could leave its range.
    flat = flat.to(dtype)
    products = [(x * y).sum(1) for x, y in ((p, p), (flat, flat), (p, flat))]
    return torch.stack([elements, moving, *products], 1)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(len(x), prod(x.shape[1:]))


def _decayed(p: Tensor, d: Tensor, keep: float | Tensor | None, k: Mapping[str, Any]) -> Tensor:
    if k["aligned"] is not None:
        p = shrink_aligned_(p.clone(), d, 1.0, k["aligned"])
    return p * decay_factor(keep, k)


def factors(sums: Tensor, k: Mapping[str, Any], dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """By what decayed parameters and displacements are multiplied: ``None`` for 1, or a vector; and a vector.

    Args:
        sums: Those of :func:`sums_of` over all elements.
        k: The numbers of the step.
        dtype: Their dtype, that of the displacements.
    """
    elements, moving, pp, dd, pd = sums.unbind(1)
    step = elements / (moving + 1) if k["cautious"] else torch.ones_like(elements)
    control = k["norm_control"]
    if control == "none":
        return None, step.to(dtype)
    if control == "hyperball":
        length = k["lr"] * (pp / dd).sqrt()
        # Zero has no direction, nor does what is so small that its factor is out of range: it consists of roundings.
        step = torch.where(pp > 0, torch.where((dd > 0) & (length <= torch.finfo(dtype).max), length, 0.0), step)
    before = pp.sqrt()
    after = (pp - 2 * step * pd + step.square() * dd).clamp(min=0).sqrt()
    if control == "hyperball":
        target = torch.where(before > 0, before, after)
    else:
        target = before + torch.where(after > before, OUTWARD, 1.0) * (after - before)
    kept = torch.where(after > 0, target / after, 1.0)
    return kept.to(dtype), (kept * step).to(dtype)


def adjusted(d: Tensor, sums: Tensor, keep: float | Tensor | None, k: Mapping[str, Any]) -> Move:
    """The move of some displacements ``(k, ...)``.

    Args:
        d: The displacements.
        sums: Those of :func:`sums_of` over all elements.
        keep: The factor of weight decay, if the rule's move says it.
        k: The numbers of the step, from :func:`.switches.adjusting`.
    """
    kept, step = factors(sums, k, d.dtype)
    shape = (len(d), *[1] * (d.ndim - 1))
    if kept is not None:
        keep = kept.view(shape) * decay_factor(keep, k)
    return Move(d, step.view(shape), keep=keep)


def decay_factor(keep: float | Tensor | None, k: Mapping[str, Any]) -> Any:
    """The factor of weight decay, in a step that the rule's move may say it for."""
    if k["norm_control"] == "hyperball":
        return 1.0
    return k["keep"] if keep is None else keep
