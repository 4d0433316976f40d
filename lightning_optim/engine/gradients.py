"""Checks of the gradients before a step: are they finite, and are their squares?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .. import private, processes
from ..processes import ProcessGroup
from .arithmetic import largest_gradient
from .elementwise import largest_entry
from .state import compute_dtype


def inspect_gradients(
    grads: list[Tensor], groups: Sequence[ProcessGroup] = (), alike: bool = True, backend: str = "chunked"
) -> tuple[bool | Tensor, list[float] | list[Tensor]]:
    """Whether all gradients are finite, and a factor for each that keeps its squares finite.

    The factor is 1, unless the largest magnitude of an entry exceeds ``finfo.max ** 0.4`` of the arithmetic's dtype;
    it then scales that entry down to this bound. Of sharded gradients, both are about the whole gradient.

    Args:
        grads: The gradients, or this rank's shards of them.
        groups: The process groups that hold the other shards.
        alike: Whether all ranks pass shards of the same gradients in the same order. If not, all gradients get one
            factor.
        backend: See :func:`.elementwise.largest_entry`.

    Returns:
        Whether all are finite, and the factors: plain values for gradients on the CPU; on an accelerator 0-d tensors,
        for which the host does not wait.

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
    # Filled on the device: a copy from the host would wait for it.
    bound = torch.cat([peaks.new_full((len(list(run)),), value) for value, run in groupby(bounds)])
    factors = torch.where(verdicts, (bound / peaks).clamp(max=1.0), 1.0).unbind()
    return verdicts.all(), [factor.to(g.device) for factor, g in zip(factors, grads)]


def _peaks(grads: list[Tensor], groups: Sequence[ProcessGroup], alike: bool) -> Tensor:
    """The largest magnitude in each gradient over all ranks, infinity for NaN, on the device of the first gradient."""
    device = grads[0].device
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    peaks = [torch.zeros((), dtype=dtype, device=device)] * len(grads)
    kinds: dict[Any, list[int]] = {}
    for i, g in enumerate(grads):
        if g.numel():
            kinds.setdefault((g.device, g.dtype), []).append(i)
    for indices in kinds.values():
        some = torch.stack(private.norms([grads[i] for i in indices], math.inf)).to(device, dtype)
        for i, peak in zip(indices, some.unbind()):
            peaks[i] = peak
    stacked = torch.stack(peaks)
    if not groups:
        return stacked
    stacked = stacked.nan_to_num_(nan=math.inf, posinf=math.inf)
    return processes.all_reduce_max(stacked if alike else stacked.max(), groups).expand(len(grads))


def _known_on_host(grads: list[Tensor]) -> bool:
    return all([g.is_cpu for g in grads])  # noqa: C419 - half the time that a generator takes


def _bound(dtype: torch.dtype) -> float:
    return largest_gradient(compute_dtype(dtype))


def _largest(grads: list[Tensor], groups: Sequence[ProcessGroup], backend: str) -> float:
    """The largest magnitude over all gradients and ranks; infinite or NaN if any is."""
    peak = largest_entry(grads, backend)
    if groups:
        known = torch.tensor(peak, dtype=torch.float32).nan_to_num_(nan=math.inf, posinf=math.inf)
        peak = float(processes.all_reduce_max(known, groups))
    return peak
