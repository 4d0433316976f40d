"""What a device can do, which is found out by asking it, and where to compute what it cannot.

Apple's GPUs have no float64 and, depending on torch's version, no decompositions; some of Intel's have no float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

_CPU = torch.device("cpu")


@cache
def has(kind: str, dtype: torch.dtype, function: Callable[[Tensor], Any] = torch.neg) -> bool:
    """Whether a kind of device computes a function of matrices of a dtype. Asked once, with a matrix of four numbers.

    >>> has("cpu", torch.float64), has("cpu", torch.float64, torch.linalg.eigh)
    (True, True)
    """
    try:
        function(torch.eye(2, dtype=dtype, device=kind))
    except (NotImplementedError, RuntimeError, TypeError):
        return False
    return True


def forget() -> None:
    """Ask all devices anew."""
    has.cache_clear()
    multiplies_float64_slowly.cache_clear()
    _has_events.cache_clear()


def widest(device: torch.device) -> torch.dtype:
    """The dtype for sums over many tensors: float64 where the device has it, otherwise float32.

    >>> widest(torch.device("cpu"))
    torch.float64
    """
    return torch.float64 if has(device.type, torch.float64) else torch.float32


def able(x: Tensor, function: Callable[[Tensor], Any], dtype: torch.dtype | None = None) -> Tensor:
    """``x`` in a dtype (its own by default), on its own device if that computes the function, otherwise on the CPU.

    Decompositions of small matrices cost little there compared with a run that ends. Results go back with
    ``.to(x.device)`` or by ``copy_``.

    >>> able(torch.eye(2), torch.linalg.eigh, torch.float64).dtype
    torch.float64
    """
    dtype = dtype or x.dtype
    return x.to(x.device if has(x.device.type, dtype, function) else _CPU).to(dtype)


@cache
def multiplies_float64_slowly(device: torch.device) -> bool:
    """Whether an accelerator multiplies matrices in float64 more than eight times as slowly as in float32.

    GPUs made for computing take twice as long, others 32 to 64 times. Asked once, by two products; the host waits.

    >>> multiplies_float64_slowly(torch.device("cpu"))
    False
    """
    if device.type == "cpu" or not has(device.type, torch.float64):
        return False
    return _seconds_of_product(device, torch.float64) > 8 * _seconds_of_product(device, torch.float32)


def _seconds_of_product(device: torch.device, dtype: torch.dtype) -> float:
    """Seconds that a product of two matrices takes, which is long beside a launch; the fastest of three."""
    x = torch.ones(1024, 1024, dtype=dtype, device=device)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        (x @ x)[0, 0].item()
        times.append(time.perf_counter() - start)
    return min(times[1:])


@cache
def _has_events(kind: str) -> bool:
    try:
        start, end = (torch.Event(kind, enable_timing=True) for _ in range(2))
        start.record()
        end.record()
        end.synchronize()
        start.elapsed_time(end)
    except (NotImplementedError, RuntimeError, TypeError):
        return False
    return True


def read_later(x: Tensor) -> Callable[[], Any]:
    """Start to copy a tensor with one element to the host; the function that is returned gives its value.

    The copy is queued behind the work that the device has now. Called after as much work again, the function does not
    wait. Devices that have no events are waited for here, and not there.

    >>> read_later(torch.tensor(True))()
    True
    """
    if x.is_cpu:
        return x.item
    if not _has_events(x.device.type):
        return x.cpu().item
    host, event = x.to("cpu", non_blocking=True), torch.Event(x.device)
    event.record()

    def read() -> Any:
        event.synchronize()
        return host.item()

    return read


def stopwatch(device: torch.device) -> Callable[[], Callable[[], float | None]] | None:
    """Start to time the work that is given to a device from now on, without waiting for it.

    Returns:
        ``None`` if the device has no events, as the CPU. Otherwise a function that stops, and returns a function: the
        seconds between, or ``None`` as long as the device is not through with the work.

    >>> stopwatch(torch.device("cpu")) is None
    True
    """
    if device.type == "cpu" or not _has_events(device.type):
        return None
    start = torch.Event(device, enable_timing=True)
    start.record()

    def stop() -> Callable[[], float | None]:
        end = torch.Event(device, enable_timing=True)
        end.record()
        return lambda: start.elapsed_time(end) / 1e3 if end.query() else None

    return stop


@contextmanager
def full_precision(x: Tensor) -> Iterator[None]:
    """Matrix products in the precision of their factors, whatever autocast and settings like TF32 say.

    torch has an older and a newer interface to these settings, and refuses to read the older where they disagree. Both
    are the same inside, and as they were afterwards.
    """
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # They disagree already.
        older = None
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(x.device.type, enabled=False):
            yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for setting, precision in zip(settings, before):
            setting.fp32_precision = precision
