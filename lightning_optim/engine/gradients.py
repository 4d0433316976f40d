"""The look at the gradients before a step: are they finite, and are their squares?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .. import private, processes
from ..processes import Group
from .arithmetic import largest_gradient
from .elementwise import largest
from .state import compute_dtype


def inspect_gradients(
    grads: list[Tensor], groups: Sequence[Group] = (), alike: bool = True, backend: str = "chunked"
) -> tuple[bool | Tensor, list[float] | list[Tensor]]:
    """Whether all gradients are finite, and the factor that keeps the squares of each so.

    The factor is 1 unless the largest entry exceeds ``finfo.max ** 0.4`` of the arithmetic's precision, to which it is
    scaled down then. Where processes hold parts of the gradients, both are those of the whole.

    Args:
        grads: The gradients, or what this process has of them.
        groups: The process groups that hold other parts.
        alike: Whether they hold parts of the same gradients in the same order. Otherwise all get one factor.
        backend: How to look; see :func:`.elementwise.largest`.

    Returns:
        The verdict and a factor for each gradient: plain values for gradients on the CPU, and 0-d tensors, which the
        host does not wait for, on an accelerator.

    Example:
        >>> inspect_gradients([torch.ones(3), torch.tensor([0.0, float("nan")])])
        (False, [1.0, 1.0])
    """
    on_cpu = _known_on_host(grads)
    # Nearly every step on a CPU ends here.
    if on_cpu and _largest(grads, groups, backend) <= _bound(torch.float32):
        return True, [1.0] * len(grads)
    bounds = [_bound(g.dtype) for g in grads]
    if on_cpu:
        on_host = _peaks(grads, groups, alike).tolist()
        finite = [math.isfinite(x) for x in on_host]
        return all(finite), [b / x if ok and x > b else 1.0 for b, x, ok in zip(bounds, on_host, finite)]
    peaks = _peaks(grads, groups, alike)
    verdicts = peaks.isfinite()
    # Filled on the device: to copy them there would wait for it.
    bound = torch.cat([peaks.new_full((len(list(run)),), value) for value, run in groupby(bounds)])
    factors = torch.where(verdicts, (bound / peaks).clamp(max=1.0), 1.0).unbind()
    return verdicts.all(), [factor.to(g.device) for factor, g in zip(factors, grads)]


def _peaks(grads: list[Tensor], groups: Sequence[Group], alike: bool) -> Tensor:
    """The largest entry of each gradient over all processes, infinite where there is NaN, on the first one's device."""
    home = grads[0].device
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    peaks = [torch.zeros((), dtype=dtype, device=home)] * len(grads)
    kinds: dict[Any, list[int]] = {}
    for i, g in enumerate(grads):
        if g.numel():
            kinds.setdefault((g.device, g.dtype), []).append(i)
    for indices in kinds.values():
        some = torch.stack(private.norms([grads[i] for i in indices], math.inf)).to(home, dtype)
        for i, peak in zip(indices, some.unbind()):
            peaks[i] = peak
    stacked = torch.stack(peaks)
    if not groups:
        return stacked
    stacked = stacked.nan_to_num_(nan=math.inf, posinf=math.inf)
    return processes.all_reduce_max(stacked if alike else stacked.max(), groups).expand(len(grads))


def _known_on_host(grads: list[Tensor]) -> bool:
    return all([g.is_cpu for g in grads])  # noqa: C419 - half the time of a generator


def _bound(dtype: torch.dtype) -> float:
    return largest_gradient(compute_dtype(dtype))


def _largest(grads: list[Tensor], groups: Sequence[Group], backend: str) -> float:
    """The largest entry on all processes; infinite or NaN if any is."""
    peak = largest(grads, backend)
    if groups:
        known = torch.tensor(peak, dtype=torch.float32).nan_to_num_(nan=math.inf, posinf=math.inf)
        peak = float(processes.all_reduce_max(known, groups))
    return peak
