"""What diagnostics cost: time of training with them over time without, in pairs.

    python -m benchmarks.diagnostics_overhead --json benchmarks/results/diagnostics-overhead.json

In each round the same model is trained for the same steps with every callback and without, in an order that is drawn
anew, in one process, with a TensorBoard logger. A ratio is the median over rounds of the time with over the time
without in the same round. Time is that of the process on the CPU, which other programs disturb less than time on the
wall. Beside our callbacks stands logging as Composer's OptimizerMonitor does it: norms of gradient, weight and update
of every parameter, each number fetched and logged by itself. The JSON file holds ``{"machine": ..., "rows": [{"model",
"callback", "interval", "ratio", "low", "high", "own", "step_ms", ...}]}`` with the smallest and largest ratio, and
``own``, the time that our callbacks take by their own clock over that of everything else: it leaves out what they do to
caches, and resolves what is lost in the noise of the ratio.
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
from pathlib import Path
from statistics import median
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
    """A small residual network (0.37M parameters, 47 tensors) on 64 images of CIFAR's size."""
    args = {"channels": [16, 32, 64, 128], "stem_width": 8}
    model = VisionClassifier(10, 3, backbone="resnet10t", backbone_args=args, stem_stride=1)
    return model, (torch.randn(64, 3, 32, 32), torch.randint(10, (64,)))


def gpt() -> tuple[pl.LightningModule, Sequence[torch.Tensor]]:
    """The network of the preset stdlib-text (0.4M parameters) on 16 sequences of 256 bytes."""
    tokens = torch.randint(256, (16, 257))
    return LanguageModel(vocab_size=256, sequence_length=256), (tokens[:, :-1], tokens[:, 1:])


MODELS: dict[str, Callable[[], tuple[pl.LightningModule, Sequence[torch.Tensor]]]] = {"cnn": cnn, "gpt": gpt}


class PerKeyLogging(pl.Callback):
    """What Composer's OptimizerMonitor logs, in the way it does: a norm, a host copy and a log call per key."""

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.before = None
        if trainer.global_step % self.every_n_steps == 0:
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


def train(model: str, optimizer: str, attached: list[pl.Callback], steps: int, folder: str) -> tuple[float, float]:
    """Seconds per step, the first ten steps left out, and the share that diagnostics say they take."""
    clock = _Clock(skip=10)
    pl.seed_everything(0, verbose=False)
    module, batch = MODELS[model]()
    module.optimizer = optimizer  # type: ignore[assignment]
    trainer = pl.Trainer(
        max_steps=steps + 10,
        accelerator="cpu",
        logger=TensorBoardLogger(folder),
        callbacks=[*attached, clock],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # One batch, again and again, so that data costs nothing.
    repeated: Any = [batch] * (steps + 10)
    trainer.fit(module, torch.utils.data.DataLoader(repeated, batch_size=1, collate_fn=_only))
    return clock.seconds / steps, StepRecorder.of(trainer).clock.share


def _only(batches: Any) -> Any:
    return batches[0]


class _Clock(pl.Callback):
    def __init__(self, skip: int) -> None:
        self.skip = skip

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.skip:
            self.start = time.process_time()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds = time.process_time() - getattr(self, "start", 0.0)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--callbacks", nargs="+", choices=list(contenders()), default=list(contenders()))
    parser.add_argument("--intervals", nargs="+", type=int, default=[1, 50])
    parser.add_argument("--optimizer", default="MVNGrad")
    parser.add_argument("--steps", type=int, default=50, help="steps of each run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(args)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    cells = [(name, interval) for name in options.callbacks for interval in options.intervals]
    rows: list[dict[str, Any]] = []
    with Progress(transient=True) as progress, tempfile.TemporaryDirectory() as folder:
        task = progress.add_task("rounds", total=len(options.models) * options.rounds * (len(cells) + 1))
        for model in options.models:
            train(model, options.optimizer, [], options.steps, folder)  # warms up
            seconds: dict[Any, list[float]] = {cell: [] for cell in [None, *cells]}
            own: dict[Any, list[float]] = {cell: [] for cell in seconds}
            for i in range(options.rounds):
                for cell in random.Random(i).sample(list(seconds), len(seconds)):
                    attached = [contenders()[cell[0]](cell[1])] if cell else []
                    measured = train(model, options.optimizer, attached, options.steps, folder)
                    seconds[cell].append(measured[0])
                    own[cell].append(measured[1])
                    progress.advance(task)
            for name, interval in cells:
                ratios = [x / y for x, y in zip(seconds[name, interval], seconds[None])]
                row = {"model": model, "callback": name, "interval": interval, "rounds": options.rounds}
                spread = {"ratio": median(ratios), "low": min(ratios), "high": max(ratios)}
                spread["own"] = median(own[name, interval])
                row |= {key: round(x, 4) for key, x in spread.items()}
                rows.append(row | {"step_ms": round(1e3 * median(seconds[None]), 2)})
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
