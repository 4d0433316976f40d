"""Illnesses that the diagnosis does not name: whether what is recorded tells them from healthy runs that look alike.

    python -m benchmarks.undiagnosed --json benchmarks/results/undiagnosed.json

Each illness is provoked with two optimizers and three seeds, and stands beside runs that lack nothing and resemble it:
its cure, and recipes that are noisy, difficult or regularised. For each run a few numbers are computed from its
records, those by which a rule could be written. A number separates if all ill runs lie on one side of all healthy ones.
The JSON file holds ``{"machine": ..., "rows": [{"illness", "run", "ill", "optimizer", "seed", "loss", "numbers"}]}``,
in which ``loss`` is the last validation loss.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_optim.diagnostics.diagnosis import diagnose
from lightning_optim.diagnostics.evidence import Evidence

from .diagnosis import PostNorm, Recipe, mlp, quiet, recipe, train
from .machine import describe

Change = Callable[[Recipe], Recipe]


def _saturated(r: Recipe) -> Recipe:
    """Queries and keys that are four times as large at first, so that attention looks at one row only."""

    def net(r: Recipe) -> nn.Module:
        made = PostNorm(32)
        with torch.no_grad():
            for name, p in made.named_parameters():
                if name.endswith("in_proj_weight"):
                    p[:64] *= 4
        return made

    return replace(r, net=net)


def _attention(r: Recipe) -> Recipe:
    return replace(r, net=lambda r: PostNorm(32))


def _batch(size: int, factor: float = 1.0) -> Change:
    def change(r: Recipe) -> Recipe:
        rates = {k: v * factor for k, v in r.args.items() if k in ("lr", "fallback_lr")}
        # Few examples, so that there is an epoch, and with it validation, now and then.
        return replace(r, batch_size=size, args=r.args | rates, examples=400, steps=600)

    return change


def _mislabelled(r: Recipe) -> Recipe:
    def labels(y: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(r.seed + 1)
        wrong = torch.rand(y.shape, generator=generator) < 0.4
        return torch.where(wrong, torch.randint(10, y.shape, generator=generator), y)

    return replace(r, labels=labels)


def _dropout(r: Recipe) -> Recipe:
    return replace(r, net=lambda r: nn.Sequential(nn.Dropout(0.6), *mlp(r)))


def _smoothed(r: Recipe) -> Recipe:
    return replace(r, loss=lambda o, y, step: cross_entropy(o, y, label_smoothing=0.3))


def _blurred(r: Recipe) -> Recipe:
    def inputs(x: Tensor) -> Tensor:
        return x + 0.6 * torch.randn(x.shape, generator=torch.Generator().manual_seed(r.seed))

    return replace(r, inputs=inputs)


#: By illness: how it is provoked, what is healthy and looks like it, and with which optimizers.
ILLNESSES: dict[str, tuple[Change, dict[str, Change], tuple[str, ...]]] = {
    "attention logits sixteen times as large": (_saturated, {"usual logits": _attention}, ("AdamW", "LaProp")),
    "batch too small for the rate": (
        _batch(2, 4.0),
        {"small batch": _batch(2, 0.25), "a batch of 16": _batch(16, 1.0), "difficult inputs": _blurred},
        ("AdamW", "NAMO"),
    ),
    "two fifths of the labels wrong": (
        _mislabelled,
        {"dropout": _dropout, "label smoothing": _smoothed, "difficult inputs": _blurred},
        ("AdamW", "NAMO"),
    ),
}


def numbers(e: Evidence) -> dict[str, float]:
    """What a rule could look at, of one run."""
    start = max(3, e.length // 10)
    attention = [layer for layer in e.weights if "in_proj" in layer.name]
    noise = e.scalar("update_variance/online_share")[1]
    turns = e.scalar("update/cosine_to_previous")[1]
    validation = e.validation_loss[1] if e.validation_loss else np.array([math.nan])
    late = e.loss[-max(10, len(e.loss) // 4) :]
    reach = [layer.reach[layer.steps < start].max() for layer in e.weights if (layer.steps < start).any()]
    return {
        "peak of the first tenth over the first loss": float(np.max(e.smooth[:start]) / e.first_loss),
        "largest gradient of the first tenth over the usual": float(np.nanmax(e.norms[:start]) / np.nanmedian(e.norms)),
        "updates of the first tenth over first weights": float(np.median(reach)),
        "growth of queries, keys and values": max((float(np.nanmax(x.growth)) for x in attention), default=math.nan),
        "gradient of attention over that of other weights": _share(e, "in_proj"),
        "noise in updates": float(noise[-1]) if len(noise) else math.nan,
        "cosine to the update before": float(np.median(turns[-3:])) if len(turns) else math.nan,
        "scatter of the last losses over their mean": float(np.std(late) / np.mean(late)),
        "training over validation loss": float(e.last_loss / validation[-1]),
        "fall of the loss": e.fall,
    }


def _share(e: Evidence, name: str) -> float:
    sizes = {x.name: float(np.median(x.gradient)) for x in e.weights}
    these = [x for n, x in sizes.items() if name in n]
    return float(np.median(these) / np.median(list(sizes.values()))) if these else math.nan


def cases(seeds: int) -> Iterator[tuple[str, str, bool, Recipe]]:
    """Illness, what the run is, whether it is ill, and its recipe."""
    for (illness, (ill, healthy, optimizers)), seed in product(ILLNESSES.items(), range(seeds)):
        for optimizer in optimizers:
            yield illness, "ill", True, ill(recipe(optimizer, seed, True))
            for name, change in healthy.items():
                yield illness, name, False, change(recipe(optimizer, seed, True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many per illness and optimizer (default: 3)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args()
    quiet()
    rows: list[dict[str, Any]] = []
    for illness, name, ill, made in cases(options.seeds):
        run = train(made, name, every_n_steps=10)
        e = Evidence(run)
        loss = float(e.validation_loss[1][-1]) if e.validation_loss else math.nan
        found = {key: float(f"{x:.3g}") for key, x in numbers(e).items()}
        said = [finding.cause for finding in diagnose(run).findings]
        row = {"illness": illness, "run": name, "ill": ill, "optimizer": made.optimizer, "seed": made.seed}
        rows.append(row | {"loss": float(f"{loss:.3g}"), "said": said, "numbers": found})
        print(*row.values(), f"{loss:.3g}", *said, json.dumps(found), flush=True)
    if options.json:
        machine = describe(torch.device("cpu"), ("lightning",))
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
