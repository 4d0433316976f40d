"""A task that is a formula, and processes that are none."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from lightning_optim.compare.design import Run


def outcome(score: float | None, steps: int = 100, status: str = "") -> dict[str, Any]:
    """A result with everything that reports read."""
    curve = {"steps": [steps // 2, steps], "values": [3.0, score if score is not None else 3.0]}
    return {
        "status": status or ("diverged" if score is None else "ok"),
        "score": score,
        "metric": "val/loss",
        "metrics": {"val/loss": score} if score is not None else {},
        "curve": curve,
        "train": curve,
        "steps": steps,
        "step_ms": 1.0,
        "train_seconds": 0.1,
        "state_bytes": 1000,
        "parameter_bytes": 500,
        "peak_bytes": 10_000,
        "peak_of": "process",
        "weights": "w",
        "data": "d",
        "lr_end": 0.0,
        "diagnostics": {"update/rms": {"steps": [10, 20], "values": [1e-3, 2e-3]}},
        "findings": [],
        "groups": [],
        "seconds": 1.0,
    }


#: The best learning rate and the lowest cost of each optimizer.
BEST = {"AdamW": (0.001, 1.0), "MVNGrad": (0.03, 0.8), "NAMO": (0.01, 1.0), "torch.optim.RMSprop": (0.01, 2.0)}


class Formula:
    """The cost is a parabola of the logarithm of the learning rate, with noise of the seed; high rates diverge.

    Args:
        noise: Its standard deviation.
        seconds: How long a run takes.
    """

    name = "formula"

    def __init__(self, noise: float = 0.01, seconds: float = 0.0, version: str = "1") -> None:
        self.noise, self.seconds, self.version = noise, seconds, version

    def describe(self) -> dict[str, Any]:
        return {"noise": self.noise, "fingerprint": self.version}

    def train(self, run: Run) -> dict[str, Any]:
        time.sleep(self.seconds)
        best, lowest = BEST[run.optimizer]
        distance = math.log10(run.args["lr"] / best)
        # Numbers that look drawn, and are the same every time.
        noise = self.noise * math.sin(1e5 * run.seed + 1e3 * distance + 77 * len(run.optimizer))
        return outcome(None if distance > 1.2 else lowest + distance**2 + noise, run.steps or 100)


class Inline:
    """Makes runs at once, in this process."""

    jobs = 2

    def __init__(self, task: Any, made: list[Run], fail: Callable[[Run], None] = lambda run: None) -> None:
        self.task, self.made, self.fail = task, made, fail

    def _answer(self, function: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)
        return future

    def describe(self) -> Future[dict[str, Any]]:
        return self._answer(self.task.describe)

    def train(self, run: Run) -> Future[dict[str, Any]]:
        def make() -> dict[str, Any]:
            self.made.append(run)
            self.fail(run)
            return self.task.train(run)

        return self._answer(make)


def inline(made: list[Run], fail: Callable[[Run], None] = lambda run: None) -> Any:
    """In place of ``executor``."""

    @contextmanager
    def executor(kind: str, task: Any, jobs: int, logs: Any) -> Iterator[Inline]:
        yield Inline(task, made, fail)

    return executor
