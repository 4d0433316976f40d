"""What diagnostics cost: the time of a measured step over that of the steps around it.

    python -m benchmarks.diagnostics_overhead --json benchmarks/results/diagnostics-overhead.json

A small model is trained with a callback that measures every fifth step, in one process, with a TensorBoard logger.
Every measured step makes a pair with the mean of the four unmeasured ones around it, so that whatever else the machine
does hits both; runs with and without callbacks, seconds apart, differ by more than most callbacks cost. A step lasts
from the start of one batch to that of the next, logging included, and time is that of the process on the CPU. The cost
at an interval ``n`` is the median ratio less one, over ``n``, and what callbacks take by their own clock at the median
step of a run in which they are attached and measure next to nothing, as a share of that step.

Beside our callbacks stands logging as Composer's OptimizerMonitor does it: norms of gradient, weight and update of
every parameter, each number fetched and logged by itself. The JSON file holds ``{"machine": ..., "rows": [{"model",
"callback", "interval", "ratio", "low", "high", "idle", "pairs", "step_ms"}]}``, with the quartiles over the pairs.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lightning_optim import callbacks
from lightning_optim.callbacks.recorder import StepRecorder
from lightning_optim.models import LanguageModel, VisionClassifier

from .machine import describe


def cnn() -> tuple[pl.LightningModule, Sequence[torch.Tensor]]:
    """A small residual network (0.31M parameters, 44 tensors) on 64 images of CIFAR's size."""
    args = {"channels": [16, 32, 64, 128], "stem_width": 8}
    model = VisionClassifier(10, 3, backbone="resnet10t", backbone_args=args, stem_stride=1)
    return model, (torch.randn(64, 3, 32, 32), torch.randint(10, (64,)))


def gpt() -> tuple[pl.LightningModule, Sequence[torch.Tensor]]:
    """The network of the preset stdlib-text (0.46M parameters) on 16 sequences of 256 bytes."""
    tokens = torch.randint(256, (16, 257))
    return LanguageModel(vocab_size=256, sequence_length=256), (tokens[:, :-1], tokens[:, 1:])


#: Runs measure every so many steps, or none, after some that warm up.
EVERY, NEVER, WARM_UP = 5, 10**9, 10

MODELS: dict[str, Callable[[], tuple[pl.LightningModule, Sequence[torch.Tensor]]]] = {"cnn": cnn, "gpt": gpt}


class PerKeyLogging(pl.Callback):
    """What Composer's OptimizerMonitor logs, in the way it does: a norm, a host copy and a log call per key."""

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.before = None
        if _is_measured(trainer.global_step, self.every_n_steps):
            self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if self.before is None:
            return
        for name, p in pl_module.named_parameters():
            pl_module.log(f"l2_norm/param/{name}", p.detach().norm().item())
            pl_module.log(f"l2_norm/grad/{name}", p.grad.norm().item())
            pl_module.log(f"l2_norm/update/{name}", (p.detach() - self.before[name]).norm().item())


def contenders() -> dict[str, Callable[[int], pl.Callback]]:
    """What can be attached, by name; each is built for an interval."""
    monitors = [getattr(callbacks, name) for name in callbacks.__all__]
    monitors = [cls for cls in monitors if issubclass(cls, callbacks.monitor.Monitor)]
    tiers = {f"Diagnostics({tier!r})": _tier(tier) for tier in ("light", "standard", "full")}
    return tiers | {cls.__name__: cls for cls in monitors} | {"per-key logging": PerKeyLogging}


def _tier(tier: Any) -> Callable[[int], pl.Callback]:
    return lambda interval: callbacks.Diagnostics(tier, every_n_steps=interval)


@dataclass
class Run:
    """The times of one run.

    Args:
        seconds: Each step.
        share: What our callbacks took of the median step by their own clock.
    """

    seconds: list[float]
    share: float

    def ratios(self) -> list[float]:
        """Of every measured step, its time over the mean of the unmeasured ones around it."""
        t, reach = self.seconds, EVERY // 2
        measured = [i for i in range(reach, len(t) - reach) if _is_measured(i, EVERY)]
        around = [mean([*t[i - reach : i], *t[i + 1 : i + 1 + reach]]) for i in measured]
        return [t[i] / other for i, other in zip(measured, around)]


def _is_measured(step: int, interval: int) -> bool:
    return (step + 1) % interval == 0


def train(model: str, optimizer: str, attached: pl.Callback, steps: int, folder: str, accelerator: str = "cpu") -> Run:
    """Train for some steps after the warm-up; on an accelerator wall-clock time is measured."""
    clock = _Clock(_now if accelerator == "cpu" else _now_on_gpu)
    pl.seed_everything(0, verbose=False)
    module, batch = MODELS[model]()
    module.optimizer = optimizer  # type: ignore[assignment]
    trainer = pl.Trainer(
        max_steps=WARM_UP + steps + 1,
        accelerator=accelerator,
        devices=1,
        logger=TensorBoardLogger(folder),
        callbacks=[attached, clock],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # One batch, again and again, so that data costs nothing.
    repeated: Any = [batch] * (WARM_UP + steps + 1)
    trainer.fit(module, torch.utils.data.DataLoader(repeated, batch_size=1, collate_fn=_only))
    seconds = [end - start for start, end in pairwise(clock.starts)]
    return Run(seconds[WARM_UP:], clock.share)


def _only(batches: Any) -> Any:
    return batches[0]


def _now() -> float:
    return time.process_time()


def _now_on_gpu() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


class _Clock(pl.Callback):
    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        #: At each batch, the seconds that callbacks and training have taken up to then.
        self.read: list[tuple[float, float]] = []
        self.starts: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.starts.append(self.now())
        clock: Any = StepRecorder.of(trainer).clock
        self.read.append((clock._own, clock._training))

    @property
    def share(self) -> float:
        """Of a step that is not measured, as nearly all are: what callbacks took by their own clock."""
        took = [(own - before, whole - earlier) for (before, earlier), (own, whole) in pairwise(self.read[WARM_UP:])]
        return median(own / whole if whole else 0.0 for own, whole in took)  # of others the clock knows nothing


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--callbacks", nargs="+", choices=list(contenders()), default=list(contenders()))
    parser.add_argument("--intervals", nargs="+", type=int, default=[1, 10, 50])
    parser.add_argument("--optimizer", default="MVNGrad")
    parser.add_argument("--steps", type=int, default=50, help="steps of each run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(args)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    rows: list[dict[str, Any]] = []
    with Progress(transient=True) as progress, tempfile.TemporaryDirectory() as folder:
        task = progress.add_task("runs", total=len(options.models) * (options.rounds + 1) * len(options.callbacks))

        def run(model: str, name: str, interval: int) -> Run:
            progress.advance(task)
            return train(model, options.optimizer, contenders()[name](interval), options.steps, folder)

        for model in options.models:
            # The run in which nothing is measured also warms up.
            idle = {name: run(model, name, NEVER) for name in options.callbacks}
            runs: dict[str, list[Run]] = {name: [] for name in options.callbacks}
            for i in range(options.rounds):
                for name in random.Random(i).sample(options.callbacks, len(options.callbacks)):
                    runs[name].append(run(model, name, EVERY))
            step = median(x for run in idle.values() for x in run.seconds)
            for name in options.callbacks:
                pairs = [ratio for run in runs[name] for ratio in run.ratios()]
                low, middle, high = quantiles(pairs, n=4, method="inclusive")
                for interval in options.intervals:
                    at = {"ratio": middle, "low": low, "high": high}
                    at = {key: round(1 + (x - 1) / interval + idle[name].share, 4) for key, x in at.items()}
                    row = {"model": model, "callback": name, "interval": interval, **at}
                    row |= {"idle": round(idle[name].share, 5), "pairs": len(pairs), "step_ms": round(1e3 * step, 2)}
                    rows.append(row)
    table = Table("model", "callback", *[f"every {interval}" for interval in options.intervals])
    for model in options.models:
        for name in options.callbacks:
            of_callback = [row for row in rows if (row["model"], row["callback"]) == (model, name)]
            table.add_row(model, name, *[f"{row['ratio']:.3f}" for row in of_callback])
    Console().print(table)
    if options.json:
        settings = {"optimizer": options.optimizer, "steps": options.steps, "threads": options.threads}
        result = {"machine": describe(torch.device("cpu")), "settings": settings, "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
