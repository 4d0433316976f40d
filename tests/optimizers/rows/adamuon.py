"""AdaMuon."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..references import Array, Reference, State, flatten
from ..row import Hyper, Row, iterations, take


@dataclass
class AdaMuonReference(Reference):
    """arXiv 2507.11005. With nesterov=False the published algorithm, else the released one."""

    lr: float = 0.02
    momentum: float = 0.95
    eps: float = 1e-8
    nesterov: bool = True
    weight_decay: float = 0.01
    orthogonalizer: str = "kj5"

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        mu = self.momentum
        s["m"] = mu * s["m"] + (1 - mu) * g
        mix = mu * s["m"] + (1 - mu) * g if self.nesterov else s["m"]
        o = self.orthogonalize(np.sign(flatten(mix)))
        s["v"] = mu * s["v"] + (1 - mu) * o**2
        normalised = o / (np.sqrt(s["v"]) + self.eps)
        u = 0.2 * math.sqrt(o.size) / (np.linalg.norm(normalised) + self.eps) * normalised
        return (1 - lr * self.weight_decay) * p - lr * u.reshape(p.shape)


def golden(hp: Hyper, variant: str) -> Hyper:
    return take(hp, "lr", "momentum", "eps", "weight_decay", "nesterov") | iterations(hp)


ROWS = [
    Row(
        "AdaMuon",
        AdaMuonReference,
        [{}, {"nesterov": False, "weight_decay": 0.1, "orthogonalizer": "exact"}],
        golden={"adamuon": golden},
        lr=0.02,
        amplifies={"factor"},
    )
]
