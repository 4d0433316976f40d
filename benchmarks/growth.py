"""How the time of a step grows with the number of parameters, and with the number of tensors that hold them.

    python -m benchmarks.growth --json benchmarks/results/growth.json

Two sweeps, timed as in :mod:`benchmarks.step_time`: 16 matrices of 256 rows that get longer, from 1e5 to 1e8
parameters; and 2^22 parameters in 1 to 4096 square matrices. All of them are hidden matrices to NAMO. Timed are
torch's fused AdamW, an element-wise rule of ours in two ways of running beside the same rule in another package, and a
matrix rule of ours. The JSON file holds the rows of ``step_time``, with ``"sweep"``, ``"parameters"`` or ``"tensors"``,
in the place of the model.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.progress import Progress
from torch import nn

from .contenders import Contender, contenders, installed
from .step_time import describe_and_measure, parser, save, time_steps
from .workload import Workload

ELEMENTWISE, MATRIX, PEER = "LaProp", "NAMO", "pytorch_optimizer"
LARGEST = 1e8


def _matrices(count: int, rows: int, columns: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(columns, rows, bias=False) for _ in range(count)))


def sweeps(largest: float) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """The points of both sweeps: the sweep's name; number, rows and columns of the matrices.

    Args:
        largest: Leave out points with more parameters.
    """
    for exponent in range(10, 17):
        columns = round(10 ** (exponent / 2) / (16 * 256))
        if 16 * 256 * columns <= largest:
            yield "parameters", (16, 256, columns)
    for side in (2048, 1024, 512, 256, 128, 64, 32):
        if largest >= 2**22:
            yield "tensors", (2**22 // side**2, side, side)


def timed() -> list[Contender]:
    """The contenders, including the peer if it is installed."""
    peers = [PEER] if installed(PEER) else []
    # The way of running makes no difference to matrices alone.
    return [*contenders([ELEMENTWISE], ["chunked", "compiled"], peers), *contenders([MATRIX], ["auto"], [])[1:]]


def main() -> None:
    arguments = parser(__doc__, rounds=20, seconds=4)
    arguments.add_argument("--largest", type=float, default=LARGEST, help="most parameters")
    options = arguments.parse_args()
    console = Console()
    machine = describe_and_measure(options)
    rows = []
    with Progress(console=console) as progress:
        for sweep, sizes in progress.track(list(sweeps(options.largest)), description="sizes"):
            with options.device:
                work = Workload(_matrices(*sizes), matrix=("*",))
            found = time_steps(work, timed(), options.rounds, options.seconds, options.limit, machine, progress)
            rows += [{"sweep": sweep} | row for row in found]
            times = ", ".join(f"{row['optimizer']} {row['implementation']} {row['median_ms']:.3g} ms" for row in found)
            console.print(f"{work.size:.3g} parameters in {len(work.parameters)} tensors: {times}")
    save(options, machine, rows)


if __name__ == "__main__":
    main()
