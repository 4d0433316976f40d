"""The machine that figures were measured on, and the two limits of it that they are compared with."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def describe(device: torch.device, packages: Iterable[str] = ()) -> dict[str, Any]:
    """Processor, accelerator, threads, versions, and how busy the machine was.

    Args:
        device: Where tensors live.
        packages: Distributions whose versions matter; ``None`` stands for one that is not installed.
    """
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {name: installed_version(name) for name in packages},
    }


def installed_version(package: str) -> str | None:
    """The version of a distribution, or ``None`` where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def limits(device: torch.device) -> dict[str, Any]:
    """Memory bandwidth in GB/s and rates of matrix products in GFLOP/s, with the threads that are set.

    Bandwidth is the best of four loops over arrays of 256 MB: dot ``a b``, which only reads, copy ``a = b``, triad
    ``a = b + s c`` (both counted as in STREAM, without the reads that stores cause) and in-place triad ``a += s b``,
    the pattern of an optimizer. Matrix products are of one large matrix with itself, by torch's settings, which leave
    TF32 out for float32 on a GPU.
    """
    n = 2**26
    a, b, c = (torch.ones(n, device=device) for _ in range(3))
    loops: dict[str, tuple[int, Callable[[], Any]]] = {
        "dot": (2, lambda: b.dot(c)),
        "copy": (2, lambda: a.copy_(b)),
        "triad": (3, lambda: torch.add(b, c, alpha=0.5, out=a)),
        "in_place_triad": (3, lambda: a.add_(b, alpha=1e-9)),
    }
    rates = {name: streams * 4 * n / _best(loop, device) / 1e9 for name, (streams, loop) in loops.items()}
    rates["best"] = max(rates.values())
    large, small = (8192, 8192) if device.type == "cuda" else (2048, 256)
    products = {"float32": _product_rate(torch.float32, large, device)}
    products["bfloat16"] = _product_rate(torch.bfloat16, small, device)
    if products["bfloat16"] > products["float32"] and small != large:
        products["bfloat16"] = _product_rate(torch.bfloat16, large, device)
    return {
        "bandwidth_gb_per_s": {name: round(rate, 2) for name, rate in rates.items()},
        "matmul_gflop_per_s": {name: round(rate, 2) for name, rate in products.items()},
    }


def _product_rate(dtype: torch.dtype, n: int, device: torch.device) -> float:
    x = torch.randn(n, n, device=device, dtype=dtype)  # Constant entries draw less power, and so are faster on a GPU.
    return 2 * n**3 / _best(lambda: x @ x, device) / 1e9


def _best(work: Callable[[], Any], device: torch.device, repeats: int = 15) -> float:
    """Seconds of the fastest repetition; on a GPU without the time that a launch takes the host."""
    measure = _seconds_on_gpu if device.type == "cuda" else _seconds
    return min([measure(work) for _ in range(repeats + 1)][1:])


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _seconds_on_gpu(work: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
