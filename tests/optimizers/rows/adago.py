"""AdaGO."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..references import Array, Reference, State, flatten
from ..row import Hyper, Row, take


@dataclass
class AdaGOReference(Reference):
    """arXiv 2509.02981."""

    lr: float = 0.05
    momentum: float = 0.95
    gamma: float = 1.0
    v0: float = 1.0
    eps: float = 1e-6
    weight_decay: float = 0.0
    orthogonalizer: str = "kj5"

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        s["m"] = self.momentum * s["m"] + (1 - self.momentum) * g
        norm = min(np.linalg.norm(g), self.gamma)
        s["sum"] += norm**2
        alpha = max(self.eps if lr else 0, lr * norm / math.sqrt(self.v0**2 + s["sum"]))  # Rate 0: frozen.
        o = self.orthogonalize(flatten(s["m"])).reshape(p.shape)
        return (1 - lr * self.weight_decay) * p - alpha * o


def golden(hp: Hyper, variant: str) -> Hyper:
    return take(hp, "gamma", "eps", "v0", lr="eta", momentum="mu")


ROWS = [
    Row(
        "AdaGO",
        AdaGOReference,
        [{}, {"gamma": 10.0, "v0": 1e-3, "eps": 5e-4, "weight_decay": 0.1}],
        golden={"adago": golden},
        lr=0.05,
    )
]
