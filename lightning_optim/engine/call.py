"""One call of a rule's function, as it is run eagerly and as it is compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .rounding import RESIDUAL, load, store_
from .state import compute_dtype


def call(
    function: Callable[..., Any],
    p: Tensor,
    g: Tensor,
    gain: float | Tensor,
    finite: Tensor | None,
    state: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
    noise: Tensor | None = None,
    writes: bool = True,
) -> Any:
    """``function(p, gain * g, **state, **scalars)`` in the precision of the arithmetic.

    Args:
        function: Updates ``p`` and the state in place.
        p: A parameter or a part of some, of any precision.
        g: The gradient.
        gain: What the gradient is multiplied by.
        finite: ``None``, or a 0-d boolean tensor: where it is ``False`` nothing changes.
        state: State tensors of the parameter's size.
        scalars: Keyword arguments that are not per element.
        noise: See :func:`.rounding.store_`.
        writes: Whether the function changes ``p`` and the state; otherwise it only returns something.

    Returns:
        What the function returned.
    """
    dtype, residual = compute_dtype(p.dtype), state.get(RESIDUAL)
    work = load(p, residual, dtype)
    state = {name: x for name, x in state.items() if name != RESIDUAL}
    written = [*state.values(), *([work] if p.dtype == dtype else [])]
    before = [x.clone() for x in written] if finite is not None else []
    g = g.to(dtype)
    result = function(work, g if isinstance(gain, float) and gain == 1.0 else g * gain, **state, **scalars)
    for x, old in zip(written, before):
        x.copy_(torch.where(finite, x, old))  # type: ignore[arg-type]
    if writes and p.dtype != dtype:
        store_(p, work, residual, noise, finite)
    return result
