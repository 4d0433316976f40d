"""How close each iteration comes to the polar factor, and what it costs.

    python -m benchmarks.polar_quality [--size M N] [--dtypes float32 bfloat16 ...] [--json FILE] [--plot FILE]

For each method, spectrum and dtype of the products: the relative error ``|X - U V^T| / |U V^T|`` against a float64
singular value decomposition, the range of the singular values of ``X``, the median time of a call and its ratio to
that of ``kj5`` in the same dtype. Timings are taken in turns within one process. On a processor that multiplies a half
precision more slowly than float32 its products are emulated and not timed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_optim.polar import METHODS, orthogonalize

if TYPE_CHECKING:  # `benchmarks.gpu` uses this file, and does without.
    from rich.table import Table

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class EmulatedProducts(TorchFunctionMode):
    """Matrix products of half precision as matrix units make them: sums in float32, rounded once."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.bmm, torch.baddbmm) and args[0].dtype in (torch.float16, torch.bfloat16):
            kwargs = dict(kwargs or {})
            out = kwargs.pop("out", None)
            result = func(*(x.float() for x in args), **kwargs).to(args[0].dtype)
            return result if out is None else out.copy_(result)
        return func(*args, **(kwargs or {}))


def multiplies_slowly(dtype: torch.dtype, device: str) -> bool:
    """Whether products in ``dtype`` take longer than in float32."""

    def seconds(x: Tensor) -> float:
        start = time.perf_counter()
        x @ x
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    wide = torch.ones(256, 256, device=device)
    narrow = wide.to(dtype)
    return dtype.itemsize < 4 and min(seconds(narrow) for _ in range(5)) > min(seconds(wide) for _ in range(5))


def spectra(m: int, n: int) -> dict[str, Tensor]:
    """Matrices ``(m, n)`` in float64: Gaussian; rank min(m, n) / 32 plus 2 % of noise; and three whose singular
    values fall from 1 to 1e-2, 1e-3 and 1e-4 in equal ratios.

    >>> list(spectra(32, 32))
    ['gaussian', 'low-rank', 'spread-1e-2', 'spread-1e-3', 'spread-1e-4']
    """
    generator = torch.Generator().manual_seed(0)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    short = min(m, n)
    rank = max(1, short // 32)
    matrices = {
        "gaussian": gaussian(m, n),
        "low-rank": gaussian(m, rank) @ gaussian(rank, n) / rank**0.5 + 0.02 * gaussian(m, n),
    }
    u, _, vh = torch.linalg.svd(gaussian(m, n), full_matrices=False)
    for digits in (2, 3, 4):
        matrices[f"spread-1e-{digits}"] = (u * torch.logspace(0, -digits, short, dtype=torch.float64)) @ vh
    return matrices


def polar_error(x: Tensor, method: str, dtype: torch.dtype, exact: Tensor) -> tuple[float, Tensor]:
    """Relative error and singular values of the factor of ``x`` by ``method``."""
    source = x if dtype == torch.float64 else x.float()
    factor = orthogonalize(source, method, dtype).double()
    return ((factor - exact).norm() / exact.norm()).item(), torch.linalg.svdvals(factor)


def call_times(x: Tensor, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Median milliseconds of one call of each method on ``x``."""
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(repeats + 1):
        for method, taken in times.items():
            start = time.perf_counter()
            orthogonalize(x, method, dtype)
            if x.is_cuda:
                torch.cuda.synchronize()
            taken.append(1e3 * (time.perf_counter() - start))
    return {method: statistics.median(taken[1:]) for method, taken in times.items()}


def measure(m: int, n: int, dtypes: list[str], device: str, repeats: int) -> list[dict[str, Any]]:
    matrices = {name: x.to(device) for name, x in spectra(m, n).items()}
    exact = {name: orthogonalize(x, "exact") for name, x in matrices.items()}
    rows = []
    for dtype in dtypes:
        emulated = multiplies_slowly(DTYPES[dtype], device)
        like = torch.float64 if dtype == "float64" else torch.float32
        times = {} if emulated else call_times(matrices["gaussian"].to(like), DTYPES[dtype], repeats)
        for method in METHODS:
            cost: dict[str, Any] = {"median_ms": None, "ratio_to_kj5": None}
            if times:
                cost = {"median_ms": times[method], "ratio_to_kj5": times[method] / times["kj5"]}
            for name, x in matrices.items():
                with EmulatedProducts() if emulated else nullcontext():
                    error, values = polar_error(x, method, DTYPES[dtype], exact[name])
                rows.append({
                    "method": method, "steps": len(METHODS[method].coefficients), "spectrum": name, "dtype": dtype,
                    "emulated": emulated, "m": m, "n": n, "error": error, "smallest": values.min().item(),
                    "largest": values.max().item(), **cost,
                })  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    columns = ("method", "spectrum", "dtype", "error", "smallest", "largest", "median_ms", "ratio_to_kj5")
    result = Table(*columns)
    for row in rows:
        result.add_row(*(f"{row[c]:.4f}" if isinstance(row[c], float) else row[c] or "" for c in columns))
    return result


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """The scalar map of each method, and its error by spectrum in float32."""
    import matplotlib.pyplot as plt
    import numpy as np

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    x = np.geomspace(1e-4, 1, 1000)
    for method, iteration in METHODS.items():
        if iteration.rescale is None:
            y = x
            for a, b, c in iteration.coefficients:
                y = y * (a + y**2 * (b + c * y**2))
            left.semilogx(x, y, label=method)
        mine = [row for row in rows if row["method"] == method and row["dtype"] == "float32"]
        right.semilogy([row["spectrum"] for row in mine], [row["error"] for row in mine], "o-", label=method)
    left.set(xlabel="singular value, relative to the Frobenius norm", ylabel="singular value after the iteration")
    right.set(ylabel="relative error of the polar factor, float32")
    left.legend()
    right.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 1024), metavar=("M", "N"))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    m, n = args.size
    rows = measure(m, n, args.dtypes, args.device, args.repeats)
    from rich.console import Console

    Console().print(table(rows))
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor()
    machine = {
        "device": name or platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(row) for row in rows)
        args.json.write_text(f'{{"machine": {json.dumps(machine)}, "rows": [\n{lines}\n]}}\n')
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
