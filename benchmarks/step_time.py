"""How long one step of every optimizer takes, beside other implementations and the limits of the machine.

    python -m benchmarks.step_time --models vit-tiny d512 --json benchmarks/results/step-time.json
    python -m benchmarks.step_time --models gpt2-124m --optimizers LaProp MVNGrad --backends compiled --rounds 10

All steps of one model are interleaved in one process, on the same parameters and gradients, in a random order in every
round, so that other load on the machine affects all alike and none has warm caches. The ratio to torch's fused AdamW is
the median of the ratios within rounds. Slow implementations take part in fewer rounds. On a GPU ours are also timed as
CUDA graphs, whose matrix products are not counted.

The JSON file holds ``{"machine": ..., "settings": ..., "rows": [{"model", "optimizer", "implementation", "backend",
"median_ms", ...}]}``; :data:`COLUMNS` says what every number is.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import mean, quantiles
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lightning_optim.engine.rounding import ROUNDINGS
from lightning_optim.registry import OPTIMIZERS

from .contenders import BACKENDS, PACKAGES, PEERS, Contender, Stepper, contenders, installed
from .machine import describe, limits, synchronize
from .workload import MODELS, Workload

if TYPE_CHECKING:  # `benchmarks.gpu` uses this file, and does without.
    from rich.progress import Progress
    from rich.table import Table

#: The entries of a row. All but the first two are ``None`` where a note says why nothing was timed.
COLUMNS = {
    "parameters": "parameters of the model",
    "tensors": "tensors they lie in",
    "first_step_s": "seconds of the first step, which allocates state and compiles what the process has not yet",
    "samples": "timed steps",
    "min_ms": "fastest step",
    "median_ms": "median step",
    "q1_ms": "lower quartile",
    "q3_ms": "upper quartile",
    "mean_ms": "mean step, over whole periods where the work of a step is periodic",
    "ratio": "median over rounds of the time over that of torch's fused AdamW in the same round",
    "mean_ratio": "mean_ms over the mean of torch's fused AdamW in the same rounds",
    "state_bytes_per_parameter": "state, without anything that is not a tensor",
    "peak_extra_bytes": "most memory in use during a step beyond parameters, gradients and state",
    "bandwidth_fraction": "bytes that a step must move at least (gradient once, parameter and state twice) over "
    "median_ms, as a fraction of the measured bandwidth",
    "matmul_fraction": "operations of matrix products over mean_ms, as a fraction of the measured peak",
}

FEWEST_SAMPLES = 3
#: Steps before the timed ones, fewer where they take long.
WARM_UP_STEPS, WARM_UP_SECONDS = 8, 5.0
_MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


@dataclass
class Entry:
    """A contender and its measurements."""

    contender: Contender
    steppers: list[Stepper]
    work: Workload
    first_step_s: float = 0.0
    peak_extra_bytes: int = 0
    flops: float = 0.0
    steps: int = 0
    rounds: set[int] = field(default_factory=set)
    seconds: dict[int, float] = field(default_factory=dict)

    def step(self) -> float:
        """Seconds of one step."""
        self.work.load(self.steps)
        self.steps += 1
        synchronize(self.work.device)
        start = time.perf_counter()
        for stepper in self.steppers:
            stepper.step()
        synchronize(self.work.device)
        return time.perf_counter() - start

    def state_bytes(self) -> int:
        """Bytes of all state tensors, each storage once."""
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self._state_tensors()}
        return sum(storages.values())

    def _state_tensors(self) -> Iterable[Tensor]:
        remaining: list[Any] = [stepper.state for stepper in self.steppers]
        while remaining:
            x = remaining.pop()
            if isinstance(x, Tensor):
                yield x
            elif isinstance(x, Mapping):
                remaining += x.values()
            elif isinstance(x, (list, tuple)):
                remaining += x

    def warm_up(self, rounds: int, seconds: float) -> None:
        """Take the first step, and one period of steps under the memory profiler; choose the rounds to take part in.

        Args:
            rounds: Rounds there are.
            seconds: About how long all timed steps may take.
        """
        left, _, _ = _profiled(lambda: setattr(self, "first_step_s", self.step()), self.work.device, flops=False)
        # What the first step leaves behind and is not state: buffers that every later step keeps.
        buffers = max(0, left - self.state_bytes())
        # Some rules change their form after a few steps, and compile again.
        spent = 0.0
        while self.steps < WARM_UP_STEPS and spent < WARM_UP_SECONDS:
            spent += self.step()
        period = self.contender.period
        times: list[float] = []
        _, peak, flops = _profiled(
            lambda: times.extend(self.step() for _ in range(period)), self.work.device, flops=True
        )
        self.peak_extra_bytes = buffers + peak
        self.flops = flops / period
        count = min(rounds, max(FEWEST_SAMPLES, int(seconds / mean(times))))
        count = max(count // period * period, period)
        self.rounds = {i * max(rounds, count) // count for i in range(count)}


def _profiled(work: Callable[[], Any], device: torch.device, flops: bool) -> tuple[int, int, int]:
    """Run something; returns the bytes that it leaves allocated, the most it had, and its matrix products' flops.

    Operations are counted from recorded shapes. Nothing may be compiled during that time: recording a symbolic shape
    would fix it.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # It reports a missing GPU as an error.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, with_flops=flops) as recorded:
        work()
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    counted = sum(event.flops() for event in events if event.name() in _MATRIX_PRODUCTS)
    if device.type == "cuda":
        left, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        return left - before, peak - before, counted
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    levels = list(accumulate((size for _, size in changes), initial=0))
    return levels[-1], max(levels), counted


def time_steps(
    work: Workload,
    who: Sequence[Contender],
    rounds: int,
    seconds: float,
    limit: float,
    machine: Mapping[str, Any],
    progress: Progress | Any,
) -> list[dict[str, Any]]:
    """Time one step of every contender, interleaved.

    Args:
        work: Parameters and gradients.
        who: The contenders; the others are compared with the first.
        rounds: How often, at most.
        seconds: About how long in all, warm-up excluded; each is timed at least three times.
        limit: Leave out contenders whose step would take longer, judged by the machine's rate of bfloat16 products.
        machine: Holds the machine's :func:`~.machine.limits`.
        progress: Where to show how far it is.

    Returns:
        A row for each contender.
    """
    # glibc returns memory, which then has to be paged in again, until it has seen large blocks freed, as in training.
    torch.zeros(31 * 2**18)
    rate = machine["matmul_gflop_per_s"]["bfloat16"] * 1e9
    notes = {}
    for contender in who:
        if contender.bfloat16 and (expected := work.iteration_flops / rate) > limit:
            notes[contender] = (
                f"left out, bfloat16 matrix products alone take about {expected:.2g} s a step on this machine"
            )
    timed = [contender for contender in who if contender not in notes]
    task = progress.add_task("warm-up", total=len(timed))
    entries = []
    for contender in timed:
        progress.update(task, description=f"warm-up: {contender.optimizer} {contender.implementation}")
        entry = Entry(contender, contender.build(work), work)
        entry.warm_up(rounds, seconds / len(timed))
        entries.append(entry)
        progress.advance(task)
    reference = entries[0]
    total = max(max(entry.rounds) for entry in entries) + 1
    reference.rounds = set(range(total))
    progress.reset(task, total=total, description="rounds")
    order = random.Random(0)
    for i in range(total):
        for entry in order.sample(entries, len(entries)):
            if i in entry.rounds:
                entry.seconds[i] = entry.step()
        progress.advance(task)
    progress.remove_task(task)
    measured = {entry.contender: _row(entry, reference, machine) for entry in entries}
    rows = []
    for contender in who:
        row: dict[str, Any] = {"optimizer": contender.optimizer, "implementation": contender.implementation}
        row |= {"backend": contender.backend} | dict.fromkeys(COLUMNS)
        row |= {"parameters": work.size, "tensors": len(work.parameters), "note": notes.get(contender)}
        rows.append(row | measured.get(contender, {}))
    return rows


def _row(entry: Entry, reference: Entry, machine: Mapping[str, Any]) -> dict[str, Any]:
    times = list(entry.seconds.values())
    q1, median, q3 = quantiles(times, n=4, method="inclusive")
    size = entry.work.size
    state = entry.state_bytes()
    moved = sum(p.nbytes for p in entry.work.parameters) * 3 + 2 * state
    together = [reference.seconds[i] for i in entry.seconds]
    return {
        "first_step_s": round(entry.first_step_s, 3),
        "samples": len(times),
        "min_ms": _milliseconds(min(times)),
        "median_ms": _milliseconds(median),
        "q1_ms": _milliseconds(q1),
        "q3_ms": _milliseconds(q3),
        "mean_ms": _milliseconds(mean(times)),
        "ratio": round(quantiles([a / b for a, b in zip(times, together)], n=2, method="inclusive")[0], 3),
        "mean_ratio": round(mean(times) / mean(together), 3),
        "state_bytes_per_parameter": round(state / size, 3),
        "peak_extra_bytes": entry.peak_extra_bytes,
        "bandwidth_fraction": round(moved / median / 1e9 / machine["bandwidth_gb_per_s"]["best"], 3),
        "matmul_fraction": round(entry.flops / mean(times) / 1e9 / max(machine["matmul_gflop_per_s"].values()), 3),
    }


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 4)


#: The columns that are shown, besides the contender's name: title and format.
SHOWN: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "median ms (quartiles)": lambda row: f"{row['median_ms']:.3g} ({row['q1_ms']:.3g}-{row['q3_ms']:.3g})",
    "mean ms": lambda row: f"{row['mean_ms']:.3g}",
    "over AdamW": lambda row: f"{row['ratio']:.2f}",
    "mean over AdamW": lambda row: f"{row['mean_ratio']:.2f}",
    "state B/parameter": lambda row: f"{row['state_bytes_per_parameter']:.2f}",
    "extra MB": lambda row: f"{row['peak_extra_bytes'] / 1e6:.2f}",
    "first step s": lambda row: f"{row['first_step_s']:.2f}",
    "bandwidth": lambda row: f"{row['bandwidth_fraction']:.0%}",
    "matmul": lambda row: f"{row['matmul_fraction']:.0%}" if row["matmul_fraction"] else "",
}


def cells(row: Mapping[str, Any]) -> list[str]:
    """A timed row as it is shown."""
    return [row["optimizer"], row["implementation"], *(show(row) for show in SHOWN.values())]


def left_out(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The contenders that were not timed, and why."""
    notes: dict[str, list[str]] = {}
    for row in rows:
        if row["note"]:
            notes.setdefault(row["note"], []).append(f"{row['optimizer']} {row['implementation']}")
    return [f"{', '.join(names)}: {note}" for note, names in notes.items()]


def table(model: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of one model as a table."""
    from rich.table import Table

    shown = Table("optimizer", "implementation", *SHOWN, title=model, caption="\n".join(left_out(rows)))
    for row in rows:
        if not row["note"]:
            shown.add_row(*cells(row))
    return shown


# --- command line ---------------------------------------------------------------------------------------------------


def at_least(least: float, kind: type[Any]) -> Callable[[str], Any]:
    """An argument that must be a number of at least some size."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def device(text: str) -> torch.device:
    """An argument that must be an available device."""
    try:
        found = torch.device(text)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"there is no device {text!r} here") from error
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"device must be cpu or cuda, got {text!r}")
    return found


def parser(description: str | None, rounds: int, seconds: float) -> argparse.ArgumentParser:
    """The arguments that all timing commands share."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--threads", type=at_least(1, int), default=os.cpu_count(), help="default: all cores")
    made.add_argument("--device", type=device, default="cpu")
    made.add_argument("--rounds", type=at_least(FEWEST_SAMPLES, int), default=rounds, help="most samples of a step")
    made.add_argument(
        "--seconds", type=at_least(0, float), default=seconds, help="about how long to time each workload"
    )
    made.add_argument("--limit", type=at_least(0, float), default=10, help="leave out slower steps, in seconds")
    made.add_argument("--json", type=Path, help="write the figures to this file")
    return made


def describe_and_measure(options: argparse.Namespace) -> dict[str, Any]:
    """Set the number of threads; returns a description of the machine and its limits."""
    torch.set_num_threads(options.threads)
    return describe(options.device, PACKAGES) | limits(options.device)


def save(options: argparse.Namespace, machine: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the figures, if ``--json`` was given."""
    if options.json:
        settings = {name: getattr(options, name) for name in ("rounds", "seconds", "limit")}
        content = {"machine": machine, "settings": settings, "rows": rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    arguments = parser(__doc__, rounds=60, seconds=30)
    arguments.add_argument("--models", nargs="+", default=["cnn-small", "vit-tiny", "d512"], choices=MODELS)
    arguments.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS)
    arguments.add_argument("--backends", nargs="*", default=["plain", "chunked", "compiled"], choices=BACKENDS)
    arguments.add_argument(
        "--peers", nargs="*", default=PEERS[:-1], choices=PEERS, help="default: all but heavyball, which compiles long"
    )
    arguments.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of parameters")
    arguments.add_argument(
        "--roundings", nargs="+", default=["nearest"], choices=ROUNDINGS, help="of ours, in bfloat16"
    )
    options = arguments.parse_args()
    from rich.console import Console
    from rich.progress import Progress

    console = Console()
    console = console if console.is_terminal else Console(width=160)
    peers = [peer for peer in options.peers if installed(peer)]
    if missing := [peer for peer in options.peers if peer not in peers]:
        console.print(f"Left out, since not installed: {', '.join(missing)} (pip install 'lightning-optim\\[bench]').")
    machine = describe_and_measure(options)
    console.print_json(data=machine)
    rows: list[dict[str, Any]] = []
    with Progress(console=console) as progress:
        for model in progress.track(options.models, description="models"):
            with options.device:
                work = Workload(MODELS[model]().to(getattr(torch, options.dtype)))
            graphs = options.device.type == "cuda"
            who = contenders(options.optimizers, options.backends, peers, options.roundings, graphs)
            found = time_steps(work, who, options.rounds, options.seconds, options.limit, machine, progress)
            title = model if options.dtype == "float32" else f"{model} in {options.dtype}"
            rows += [{"model": title} | row for row in found]
            console.print(table(title, found))
    save(options, machine, rows)


if __name__ == "__main__":
    main()
