"""One call of a rule's function: the code that runs eagerly is the code that is compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .arithmetic import regularize
from .rounding import RESIDUAL, load, store_
from .rule import Move
from .state import compute_dtype


def call(
    function: Callable[..., Any],
    p: Tensor,
    g: Tensor,
    grad_scale: float | Tensor,
    finite: Tensor | None,
    state: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
    noise: Tensor | None = None,
) -> Any:
    """Call ``function(grad_scale * g + l2 * p, state, scalars)``, in float32 or float64, and apply its move.

    Args:
        function: Updates the state in place and returns a :class:`.rule.Move` or something else.
        p: A parameter, or a vector of elements of one or more, of any floating-point dtype.
        g: The gradient.
        grad_scale: What the gradient is multiplied by.
        finite: ``None``, or a 0-d boolean tensor: where it is ``False`` nothing changes.
        state: State tensors of the parameter's size.
        scalars: The numbers of the step; see :func:`.rule.numbers_of`.
        noise: See :func:`.rounding.store_`.

    Returns:
        The function's result if that is not a move, else ``None``.
    """
    dtype, residual = compute_dtype(p.dtype), state.get(RESIDUAL)
    work = load(p, residual, dtype)
    if residual is not None:
        state = {name: x for name, x in state.items() if name != RESIDUAL}
    if finite is not None:
        written = [*state.values(), *([work] if p.dtype == dtype else [])]
        before = [x.clone() for x in written]
    if g.dtype != dtype:
        g = g.to(dtype)
    g = regularize(g if isinstance(grad_scale, float) and grad_scale == 1.0 else g * grad_scale, work, scalars["l2"])
    result = function(g, SimpleNamespace(**state, parameter=work), SimpleNamespace(**scalars))
    moves = isinstance(result, Move)
    if moves:
        result.apply_(work, scalars["keep"], scalars["aligned"])
    if finite is not None:
        for x, old in zip(written, before):
            x.copy_(torch.where(finite, x, old))
    if moves and p.dtype != dtype:
        store_(p, work, residual, noise, finite)
    return None if moves else result


def move_tensor_(
    p: Tensor,
    move: Move,
    scalars: Mapping[str, Any],
    residual: Tensor | None,
    noise: Tensor | None,
    finite: Tensor | None,
) -> None:
    """Move a tensor of any floating-point dtype; for the last three arguments see :func:`.rounding.store_`."""
    value = load(p, residual, compute_dtype(p.dtype))
    if value is p and finite is not None:
        value = p.clone()
    move.apply_(value, scalars["keep"], scalars["aligned"])
    if value is not p:
        store_(p, value, residual, noise, finite)
