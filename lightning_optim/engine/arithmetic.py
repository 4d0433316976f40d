"""The arithmetic that rules are written in.

Operations whose coefficients may be floats or 0-d tensors. Eager steps pass floats, which need no temporaries; compiled
kernels and CUDA graphs pass tensors, so that they do not depend on the values.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def largest_gradient(dtype: torch.dtype) -> float:
    """The largest gradient whose powers, as rules compute them, stay finite in a dtype."""
    return torch.finfo(dtype).max ** 0.4


def shrink_(p: Tensor, keep: Any) -> Tensor:
    """``p *= keep``"""
    return p if is_exactly(keep, 1.0) else p.mul_(keep)


def shrink_aligned_(p: Tensor, direction: Tensor, step: Any, rate: Any) -> Tensor:
    """``p *= 1 - rate``, where a step along ``-step * direction`` does not move an element away from zero."""
    agreement = direction.sign().mul_(p.sign())  # Products of the values themselves could underflow.
    if isinstance(step, Tensor):
        agreement = agreement * step.sign()
    elif step < 0:
        agreement = -agreement
    return p.mul_(1 - rate * (agreement >= 0).to(p.dtype))


def regularize(g: Tensor, p: Tensor, l2: Any) -> Tensor:
    """``g + l2 * p``, clamped to the bound of gradients; ``g`` where ``l2`` is ``None``."""
    if l2 is None:
        return g
    limit = largest_gradient(g.dtype)
    return plus(g, p, l2).clamp_(-limit, limit)


# --- in-place operations on tensors with coefficients that are floats or 0-d tensors ---------------------------------


def is_exactly(coefficient: Any, value: float) -> bool:
    """Whether a coefficient is a number on the host and equals ``value``."""
    return isinstance(coefficient, (int, float)) and coefficient == value


def add_(x: Tensor, y: Tensor, factor: Any) -> Tensor:
    """``x += factor * y``"""
    return x.add_(factor * y) if isinstance(factor, Tensor) else x.add_(y, alpha=factor)


def plus(x: Tensor, y: Tensor, factor: Any) -> Tensor:
    """``x + factor * y``"""
    return x + factor * y if isinstance(factor, Tensor) else torch.add(x, y, alpha=factor)


def ema(x: Tensor, y: Tensor, beta: Any) -> Tensor:
    """``beta * x + (1 - beta) * y``"""
    return beta * x + (1 - beta) * y if isinstance(beta, Tensor) else torch.lerp(x, y, 1 - beta)


def ema_(x: Tensor, y: Tensor, beta: Any) -> Tensor:
    """``x = beta * x + (1 - beta) * y``"""
    return x.mul_(beta).add_((1 - beta) * y) if isinstance(beta, Tensor) else x.lerp_(y, 1 - beta)


def ema_product_(x: Tensor, y: Tensor, z: Tensor, beta: Any) -> Tensor:
    """``x = beta * x + (1 - beta) * y * z``"""
    x.mul_(beta)
    if isinstance(beta, Tensor):
        return x.add_((1 - beta) * y * z)
    return x.addcmul_(y, z, value=1 - beta)


def add_quotient_(p: Tensor, x: Tensor, y: Tensor, factor: Any) -> Tensor:
    """``p += factor * x / y``"""
    return p.add_(factor * x / y) if isinstance(factor, Tensor) else p.addcdiv_(x, y, value=factor)


def mix(g: Tensor, m: Tensor, beta: Any) -> Tensor:
    """Nesterov's look-ahead ``(1 - beta) * g + beta * m``."""
    return torch.lerp(m, g, 1 - beta)  # Takes the small weight 1 - beta: float32 resolves it better than beta near 1.


def squared_difference(x: Tensor, y: Tensor) -> Tensor:
    """``(x - y) ** 2``, with one temporary."""
    difference = x - y
    return difference.mul_(difference)


def squared_norm(x: Tensor, axes: tuple[int, ...] = (-2, -1)) -> Tensor:
    """Sum of squares over some of the last two axes, which are kept with size 1."""
    if -1 in axes:  # Row by row: no temporary of the size of ``x``, and no long sums.
        rows = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        return rows.sum(-2, keepdim=True) if -2 in axes else rows
    return x.square().sum(-2, keepdim=True)
