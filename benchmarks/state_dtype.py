"""What states in low precision cost on a language task: final loss, and bytes per parameter.

    python -m benchmarks.state_dtype --json benchmarks/results/state-dtype.json

A small transformer reads bytes of the source of Python's standard library, on the CPU. Every optimizer runs with every
``state_dtype`` from the same seeds: from equal weights, on equal batches. The rows are ``{"optimizer", "state_dtype",
"seed", "loss", "bytes_per_parameter"}``, written after each run; what is in the file already is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_optim import OptimizerConfig, build_optimizer
from lightning_optim.data import TextData
from lightning_optim.engine.storage import STATE_DTYPES
from lightning_optim.models.networks import GPT, GPTConfig

from .machine import describe

#: Learning rates at which the optimizers train this model well; a step from the best in a factor of three or so.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "MVNGrad": {"lr": 3e-3},
    "LaProp": {"lr": 3e-3},
    "HVAdam": {"lr": 3e-3},
    "NAMO": {"lr": 0.03, "fallback_lr": 3e-3},
}
LENGTH, BATCH, WIDTH = 64, 16, 64


def train(data: TextData, name: str, state_dtype: str, seed: int, steps: int) -> dict[str, Any]:
    """One run: the loss on validation text after it, and the bytes of state."""
    torch.manual_seed(seed)
    model = GPT(data.vocab_size, LENGTH, GPTConfig(layers=2, heads=2, width=WIDTH))
    optimizer: Any = build_optimizer(model, OptimizerConfig(name, OPTIMIZERS[name] | {"state_dtype": state_dtype}))
    warmup = steps // 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / warmup, (steps - t) / (steps - warmup))
    )
    batches = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_on(model, data.train_set, torch.randint(len(data.train_set), (BATCH,), generator=batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        parts = torch.randperm(len(data.val_set), generator=torch.Generator().manual_seed(0))[:2048].split(64)
        loss = statistics.mean(float(loss_on(model, data.val_set, part)) for part in parts)
    state = [x for own in optimizer.state.values() for x in own.values() if isinstance(x, Tensor)]
    size = sum(x.numel() * x.element_size() for x in state) / sum(p.numel() for p in model.parameters())
    return {"optimizer": name, "state_dtype": state_dtype, "seed": seed, "loss": loss, "bytes_per_parameter": size}


def loss_on(model: GPT, windows: Any, indices: Tensor) -> Tensor:
    inputs, targets = windows.__getitems__(indices.tolist())
    return cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def missing(rows: list[dict[str, Any]], seeds: int) -> Iterator[tuple[int, str, str]]:
    done = {(row["seed"], row["optimizer"], row["state_dtype"]) for row in rows}
    wanted = ((seed, name, kind) for seed in range(seeds) for name in OPTIMIZERS for kind in STATE_DTYPES)
    return (run for run in wanted if run not in done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where the figures are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    if options.json and options.json.exists():
        rows = json.loads(options.json.read_text())["rows"]
    with tempfile.TemporaryDirectory() as folder:
        data = TextData("stdlib", folder, sequence_length=LENGTH, batch_size=BATCH)
        data.prepare_data()
        data.setup()
        for seed, name, state_dtype in missing(rows, options.seeds):
            rows.append(train(data, name, state_dtype, seed, options.steps))
            print(rows[-1], flush=True)
            if options.json:
                content = {
                    "machine": describe(torch.device("cpu")),
                    "settings": {"steps": options.steps, "batch": BATCH, "length": LENGTH, "width": WIDTH},
                    "rows": rows,
                }
                options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
