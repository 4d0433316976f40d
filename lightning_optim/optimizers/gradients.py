"""The look at the gradients before a step: are they finite, and are their squares?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .execution import compute_dtype
from .rule import largest_gradient


def inspect_gradients(grads: list[Tensor]) -> tuple[bool | Tensor, list[float] | list[Tensor]]:
    """Whether all gradients are finite, and the factor that keeps the squares of each so.

    The factor is 1 unless the largest entry exceeds ``finfo.max ** 0.4`` of the arithmetic's precision, to which it is
    scaled down then.

    Returns:
        The verdict and a factor for each gradient: plain values for gradients on the CPU, and 0-d tensors, which the
        host does not wait for, on an accelerator.

    Example:
        >>> inspect_gradients([torch.ones(3), torch.tensor([0.0, float("nan")])])
        (False, [1.0, 1.0])
    """
    if _known_on_host(grads):
        # Nearly every step ends here: no entry exceeds the norm.
        if _largest_norm(grads) <= _bound(torch.float32):
            return True, [1.0] * len(grads)
        largest = [peak.item() for peak in torch._foreach_norm(grads, math.inf)]
        bounds = [_bound(g.dtype) for g in grads]
        finite = [math.isfinite(x) for x in largest]
        return all(finite), [b / x if ok and x > b else 1.0 for b, x, ok in zip(bounds, largest, finite)]
    verdicts: list[Tensor] = []
    factors: dict[int, Tensor] = {}
    kinds = {(g.device, g.dtype) for g in grads}
    for device, dtype in kinds:
        indices = [i for i, g in enumerate(grads) if (g.device, g.dtype) == (device, dtype)]
        peaks = torch.stack(torch._foreach_norm([grads[i] for i in indices], math.inf)).to(compute_dtype(dtype))
        verdicts.append(peaks.isfinite())
        factor = torch.where(verdicts[-1], (_bound(dtype) / peaks).clamp(max=1.0), 1.0)
        factors |= dict(zip(indices, factor.unbind()))
    home = grads[0].device
    return torch.cat([v.to(home) for v in verdicts]).all(), [factors[i] for i in range(len(grads))]


def _bound(dtype: torch.dtype) -> float:
    return largest_gradient(compute_dtype(dtype))


def _known_on_host(grads: list[Tensor]) -> bool:
    return all(g.is_cpu for g in grads)


def _largest_norm(grads: list[Tensor]) -> float:
    """The largest Euclidean norm; infinite or NaN if any entry is, or if squares overflow."""
    wide = [g for g in grads if g.dtype in (torch.float32, torch.float64)]
    narrow = [g for g in grads if g.dtype not in (torch.float32, torch.float64)]
    norms = torch._foreach_norm(wide) if wide else ()
    norms += torch._foreach_norm(narrow, dtype=torch.float32) if narrow else ()
    return float(torch.stack(norms).max())
