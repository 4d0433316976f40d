"""What diagnostics cost: time of training with them over time without, in pairs.

    python -m benchmarks.diagnostics_overhead --json benchmarks/results/diagnostics-overhead.json

Each pair trains the same model for the same steps twice, once with a callback and once without, in an order that
alternates, in one process, with a TensorBoard logger. The ratio is the median over pairs. Beside our callbacks stands
logging as Composer's OptimizerMonitor does it: norms of gradient, weight and update of every parameter, each number
fetched and logged by itself. The JSON file holds ``{"machine": ..., "rows": [{"model", "callback", "interval",
"ratio", "low", "high", "step_ms", ...}]}`` with the quartiles of the ratio.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lightning_optim import callbacks
from lightning_optim.models import LanguageModel, VisionClassifier

from .machine import describe


class Repeat(torch.utils.data.IterableDataset):
    """One batch, again and again, so that data costs nothing."""

    def __init__(self, batch: Sequence[torch.Tensor], times: int) -> None:
        self.batch, self.times = batch, times

    def __iter__(self) -> Any:
        return iter([self.batch] * self.times)


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


def train(model: str, optimizer: str, attached: list[pl.Callback], steps: int, folder: str) -> float:
    """Seconds per step, the first ten steps left out."""
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
    trainer.fit(module, torch.utils.data.DataLoader(Repeat(batch, steps + 10), batch_size=None))
    return clock.seconds / steps


class _Clock(pl.Callback):
    def __init__(self, skip: int) -> None:
        self.skip = skip

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.skip:
            self.start = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds = time.perf_counter() - getattr(self, "start", 0.0)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--callbacks", nargs="+", choices=list(contenders()), default=list(contenders()))
    parser.add_argument("--intervals", nargs="+", type=int, default=[1, 10, 50])
    parser.add_argument("--optimizer", default="MVNGrad")
    parser.add_argument("--steps", type=int, default=50, help="steps of each run")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(args)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    rows: list[dict[str, Any]] = []
    table = Table("model", "callback", *[f"every {interval}" for interval in options.intervals])
    cells = [(m, c) for m in options.models for c in options.callbacks]
    with Progress(transient=True) as progress, tempfile.TemporaryDirectory() as folder:
        task = progress.add_task("pairs", total=len(cells) * len(options.intervals) * options.pairs)
        for model in options.models:
            train(model, options.optimizer, [], options.steps, folder)  # warms up
        for model, name in cells:
            shown = []
            for interval in options.intervals:
                ratios, without = [], []
                for i in range(options.pairs):
                    progress.update(task, description=f"{model} {name} every {interval}")
                    both = [[], [contenders()[name](interval)]]
                    seconds = {
                        bool(a): train(model, options.optimizer, a, options.steps, folder)
                        for a in both[:: 1 - 2 * (i % 2)]
                    }
                    ratios.append(seconds[True] / seconds[False])
                    without.append(seconds[False])
                    progress.advance(task)
                low, _, high = quantiles(ratios) if len(ratios) > 1 else ratios * 3
                rows.append(
                    {
                        "model": model,
                        "callback": name,
                        "interval": interval,
                        "ratio": round(median(ratios), 4),
                        "low": round(low, 4),
                        "high": round(high, 4),
                        "step_ms": round(1e3 * median(without), 3),
                        "pairs": options.pairs,
                    }
                )
                shown.append(f"{median(ratios):.3f}")
            table.add_row(model, name, *shown)
    Console().print(table)
    if options.json:
        settings = {"optimizer": options.optimizer, "steps": options.steps, "threads": options.threads}
        result = {"machine": describe(torch.device("cpu")), "settings": settings, "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
