"""What each optimizer reaches on a task of the command line, and how long the run takes.

    python -m benchmarks.tasks stdlib-text --json benchmarks/results/stdlib-text.json
    python -m benchmarks.tasks fashion-mnist --presets -- --data.root DIR

Each run is a process of its own, one after another, so that times compare. What stands after ``--`` is handed to
``lightning-optim fit``. The JSON file holds ``{"machine": ..., "rows": [{"optimizer", "seconds", "first_loss",
"last_loss", ...metrics}]}``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_optim.registry import OPTIMIZERS

from .machine import describe

COMMAND = Path(sys.executable).with_name("lightning-optim")


def run(task: str, optimizer: str, presets: bool, threads: int, extra: list[str]) -> dict[str, Any]:
    """Train once, then test the last weights.

    Args:
        task: Name of a task preset.
        optimizer: Name of an optimizer.
        presets: Whether to take the optimizer's preset instead of its defaults.
        threads: Threads of the process.
        extra: Further arguments of ``fit``.

    Returns:
        Seconds of the whole process, first and last training loss, and the last value of every other metric.
    """
    choice = ["-c", optimizer.lower()] if presets else ["--optimizer", optimizer]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        root = ["--trainer.default_root_dir", folder]
        start = time.perf_counter()
        fit = [str(COMMAND), "fit", "-c", task, *choice, *root, "--trainer.enable_progress_bar", "false", *extra]
        subprocess.run(fit, env=environment, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        test = [str(COMMAND), "test", "-c", task, *choice, *root, "--ckpt_path", "last", *extra]
        subprocess.run(test, env=environment, check=True, capture_output=True, text=True)
        metrics = read(Path(folder))
    losses = metrics.pop("train/loss")
    row: dict[str, Any] = {"optimizer": optimizer, "seconds": round(seconds, 1)}
    row |= {"first_loss": losses[0], "last_loss": sum(losses[-5:]) / len(losses[-5:])}
    return row | {name: values[-1] for name, values in metrics.items() if name.startswith(("val/", "test/"))}


def read(folder: Path) -> dict[str, list[float]]:
    """All scalars below a folder, in the order of their steps."""
    scalars: dict[str, list[tuple[float, float]]] = {}
    for file in folder.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            scalars.setdefault(tag, []).extend((event.wall_time, event.value) for event in events.Scalars(tag))
    return {tag: [value for _, value in sorted(events)] for tag, events in scalars.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="a task preset, see `lightning-optim list --presets`")
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument("--presets", action="store_true", help="take the optimizers' presets, not their defaults")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, extra = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    rows = [
        run(options.task, name, options.presets, options.threads, extra)
        for name in track(options.optimizers, f"{options.task} with")
    ]
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    machine = describe(torch.device("cpu"), ("lightning",)) | {"threads": options.threads}
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
