"""How far parameters in bfloat16 get from a run in float32, with each way of rounding.

    python -m benchmarks.rounding TEXT_FILE [--steps 300] [--seeds 3] [--json FILE]

Distances are relative to the float32 run's parameters, in the Euclidean norm, and stand beside the least that there
can be, which is that of the float32 run's parameters rounded once. First, updates that are the same for all: 1000 equal
ones of 1e-4 of each weight, 1000 random ones, and those of a small transformer that trains in float32. Second,
trainings of it that go their own ways: their distance says how far, and their validation loss whether it matters.
Parameters and gradients are in bfloat16 there, products in float32, so that storage is all that differs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from lightning_optim import LaProp
from lightning_optim.engine import rounding
from lightning_optim.engine.rounding import residual_dtype
from lightning_optim.models.networks import GPT, GPTConfig

from . import machine

#: The fourth is "stochastic" with independent random numbers for every step, for comparison.
WAYS = ("nearest", "stochastic", "kahan", "independent", "split")
_NAMES = {"independent": "stochastic"}
_LENGTH, _BATCH = 64, 16


@contextmanager
def _numbers_of(way: str) -> Iterator[None]:
    with mock.patch.object(rounding, "_BLOCK", 1 if way == "independent" else rounding._BLOCK):
        yield


class Copies:
    """Copies of the same parameters, stored in each way, that get the same updates."""

    def __init__(self, initial: Iterable[Tensor]) -> None:
        self.parameters = {way: [x.to(torch.bfloat16) for x in initial] for way in WAYS}
        self.residuals: dict[str, list[Tensor | None]] = {}
        for way, params in self.parameters.items():
            dtype = residual_dtype(_NAMES.get(way, way), torch.bfloat16)
            self.residuals[way] = [None if dtype is None else torch.zeros_like(p, dtype=dtype) for p in params]

    def add(self, t: int, updates: Iterable[Tensor]) -> None:
        """Step ``t``."""
        for i, update in enumerate(updates):
            for way in WAYS:
                p, residual, noise = self.parameters[way][i], self.residuals[way][i], None
                if _NAMES.get(way, way) == "stochastic":
                    with _numbers_of(way):
                        first = rounding.stream_start(t, i)
                        noise = rounding.stream_positions(first, 0, p.numel(), p.device).view(p.shape)
                rounding.store_(p, rounding.load(p, residual, torch.float32) + update, residual, noise)

    def rows(self, experiment: str, wide: list[Tensor]) -> Iterator[dict[str, Any]]:
        """Distances from parameters in float32."""
        for way, params in self.parameters.items():
            exact = [rounding.load(p, x, torch.float32) for p, x in zip(params, self.residuals[way])]
            yield row(experiment, way, wide, params, exact)
        yield row(experiment, "floor", wide, [x.to(torch.bfloat16) for x in wide], wide)


def row(experiment: str, way: str, wide: list[Tensor], params: list[Tensor], exact: list[Tensor]) -> dict[str, Any]:
    return {
        "experiment": experiment,
        "way": way,
        "distance": distance(params, wide),
        "exact_distance": distance(exact, wide),
    }


def distance(params: Iterable[Tensor], wide: Iterable[Tensor]) -> float:
    """The distance of parameters from others, relative to the norm of those.

    >>> distance([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 1.0])])
    0.7071067811865475
    """
    x, y = (torch.cat([p.detach().double().flatten() for p in some]) for some in (params, wide))
    return float((x - y).norm() / y.norm())


def same_updates(experiment: str, update: Callable[[Tensor], Tensor], steps: int = 1000) -> Iterator[dict[str, Any]]:
    """Weights between 1 and 2 of either sign, and updates of them."""
    weights = torch.rand(2**14, generator=torch.Generator().manual_seed(0)) + 1
    initial = torch.where(torch.arange(len(weights)) % 2 == 0, weights, -weights).to(torch.bfloat16).float()
    copies, wide = Copies([initial]), initial.clone()
    for t in range(1, steps + 1):
        u = update(initial)
        wide += u
        copies.add(t, [u])
    yield from copies.rows(experiment, [wide])


class Training:
    """A small transformer that learns the characters of a text."""

    def __init__(self, text: str, seed: int, dtype: torch.dtype, way: str, steps: int) -> None:
        torch.manual_seed(seed)
        characters = sorted(set(text))
        data = torch.tensor([characters.index(c) for c in text])
        self.train, self.validation = data[: -len(data) // 10], data[-len(data) // 10 :]
        self.model = GPT(len(characters), _LENGTH, GPTConfig(layers=2, heads=2, width=64))
        self.params = {
            name: nn.Parameter(p.detach().to(torch.bfloat16).to(dtype)) for name, p in self.model.named_parameters()
        }
        rounding: Any = _NAMES.get(way, way)
        self.optimizer = LaProp(self.params.values(), lr=2e-3, rounding=rounding)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.batches = torch.Generator().manual_seed(seed)

    def loss(self, data: Tensor, count: int, generator: torch.Generator) -> Tensor:
        starts = torch.randint(len(data) - _LENGTH, (count,), generator=generator)
        tokens = data[starts[:, None] + torch.arange(_LENGTH + 1)]
        logits = functional_call(self.model, {name: p.float() for name, p in self.params.items()}, tokens[:, :-1])
        return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss(self.train, _BATCH, self.batches).backward()
        self.optimizer.step()
        self.schedule.step()

    @torch.no_grad()
    def validation_loss(self) -> float:
        generator = torch.Generator().manual_seed(0)
        return statistics.mean(float(self.loss(self.validation, 64, generator)) for _ in range(20))


def trainings(text: str, seed: int, steps: int) -> Iterator[dict[str, Any]]:
    """One run in float32, whose updates also go to copies stored in each way, and one run in each way."""
    reference = Training(text, seed, torch.float32, "nearest", steps)
    wide = [p.data for p in reference.params.values()]
    copies = Copies(wide)
    for t in range(1, steps + 1):
        before = [p.clone() for p in wide]
        reference.step()
        copies.add(t, [p - old for p, old in zip(wide, before)])
    yield from copies.rows("updates of a training", wide)
    yield {"experiment": "training", "way": "floor", "loss": reference.validation_loss(), "distance": 0.0}
    for way in WAYS:
        with _numbers_of(way):
            training = Training(text, seed, torch.bfloat16, way, steps)
            for _ in range(steps):
                training.step()
        params: list[Tensor] = list(training.params.values())
        exact = [training.optimizer.exact(p) for p in params]
        yield row("training", way, wide, params, exact) | {"loss": training.validation_loss()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="what the transformer reads, such as tinyshakespeare's input.txt")
    parser.add_argument("--steps", type=int, default=300, help="of the trainings")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()

    generator = torch.Generator().manual_seed(1)
    rows = [
        *same_updates("equal updates", lambda x: -1e-4 * x),
        *same_updates("random updates", lambda x: 1e-4 * x * torch.randn(x.shape, generator=generator)),
    ]
    text = options.text.read_text()
    for seed in track(range(options.seeds)):
        rows += [{**found, "seed": seed} for found in trainings(text, seed, options.steps)]
    for found in rows:
        print(found)
    if options.json:
        settings = {"text": options.text.name, "steps": options.steps, "seeds": options.seeds}
        content = {"machine": machine.describe(torch.device("cpu")), "settings": settings, "rows": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
