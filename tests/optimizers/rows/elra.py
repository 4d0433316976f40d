"""ELRA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..references import Array, Reference
from ..row import Hyper, Row, take


@dataclass
class ELRAReference(Reference):
    """arXiv 2309.06274 as released in January 2024: one learning rate for all tensors, which are one vector.

    Tensors may have learning rates of their own, with which they are those of a model whose parameters are divided by
    their roots, at the learning rate 1.
    """

    lr: float = 1e-5
    form: str = "p2min"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.x = np.concatenate([p.ravel() for p in self.params] or [np.zeros(0)])
        self.alpha = 1.0  # In units of the learning rate.
        self.g_limit, self.e_limit = 855000.0, 500000.0
        self.noise = 0.0
        self.taken_back = 0

    def step(self, grads: Sequence[Array], lr: float | Sequence[float] | None = None, loss: float = 1.0) -> None:
        self.t += 1
        lr = self.lr if lr is None else lr
        rates = [lr] * len(grads) if isinstance(lr, (int, float)) else lr
        metric = np.concatenate([np.full(np.size(g), float(r)) for g, r in zip(grads, rates)])
        g = np.concatenate([np.ravel(np.asarray(g, np.float64)) for g in grads])
        self.x = np.concatenate([p.ravel() for p in self.params])
        if self.t == 1:
            self.y = self.m = self.d = g
            self.first = self.best = self.smooth = self.last = loss
        else:
            back = self.d * self.metric * self.alpha
            accepted = (self.c2min if self.form == "c2min" else self.p2min)(g, loss, metric)
            self.alpha = min(self.alpha, 1e11)
            if not accepted:
                self.taken_back += 1
                self.x = self.x + back
            self.best = loss if loss < self.best else 1.1 * self.best
        self.x = self.x - self.alpha * metric * self.d
        self.metric = metric
        ends = np.cumsum([np.size(g) for g in grads])[:-1]
        self.params = [part.reshape(p.shape) for part, p in zip(np.split(self.x, ends), self.params)]

    def c2min(self, g: Array, loss: float, metric: Array) -> bool:
        if not loss < 25 * self.best:
            self.alpha /= 3
            return False
        self.m = 0.8 * self.m + 0.2 * self.y
        norms = math.sqrt(g @ (metric * g)) * math.sqrt(self.y @ (metric * self.y))
        cosine = g @ (metric * self.y) / norms if norms else 0.0
        self.alpha *= 1 + (0.6 if cosine > 0 else 0.5) * cosine
        self.smooth = 0.9 * self.smooth + 0.1 * loss
        deviation = self.first / 2.35 * 1.5 * abs(loss / self.smooth - 1) if self.smooth else 0.0
        self.noise = min(max(0.9 * self.noise + 0.1 * min(1.06, deviation), 0.065), 1.06)
        beta = 0.85 - 0.8 * self.noise
        self.y, self.d = g, (1 - beta) * g + beta * self.m
        return True

    def p2min(self, g: Array, loss: float, metric: Array) -> bool:
        bound = self.best * (25 + (2500 + 71 * math.sqrt(self.best)) / (1 + math.sqrt(self.e_limit)))
        accepted = loss < 1.1 * self.first and loss < 1.1 * bound
        yy = self.y @ (metric * self.y)
        if accepted:
            self.g_limit /= 3.9
            r, h = 1e6 / (1 + self.g_limit), 1 - (g @ (metric * self.y) / yy if yy else 0.0)
            if r * h < 1:
                self.alpha *= r
            else:
                part = ((2.35 / self.first) ** 2 * self.best) ** 0.8 if self.first else 0.0
                self.alpha /= h * (1 - 0.14 * min(max(part, 0), 0.7))
        else:
            small = self.g_limit + 16 if self.g_limit <= 1 else 16 * self.g_limit
            self.g_limit = small if self.g_limit < 62500 else 855000.0
            descent = self.alpha * yy
            denominator = loss - self.last + descent
            self.alpha *= 0.5 * descent / denominator if denominator else 0.0
        self.alpha = max(self.alpha, 1e-3)
        if accepted and loss > self.last:
            raised = self.e_limit + 16 if self.e_limit < 1 else 16 * self.e_limit
            self.e_limit = raised if self.e_limit < 5e5 else 5e5
        else:
            self.e_limit /= 1.69
        if accepted:
            self.y = self.d = g
            self.last = loss
        return accepted


def golden(hp: Hyper, variant: str) -> Hyper:
    return take(hp, "lr") | {"form": variant.removeprefix("released, ")}


ROWS = [
    Row(
        "ELRA",
        ELRAReference,
        [{}, {"form": "c2min"}],
        golden={"elra": golden},
        lr=1e-3,
        amplifies={"cosine"},
    )
]
