"""NorMuon."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..references import Array, Reference, State, flatten
from ..row import Hyper, Row, take


@dataclass
class NorMuonReference(Reference):
    """arXiv 2510.05491. With nesterov=False and scale="rms" the published algorithm, else the released one.

    The release takes the statistics of kernels along their last axis; this has one for each output channel.
    """

    lr: float = 0.02
    momentum: float = 0.95
    beta2: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.0
    scale: Literal["original", "rms"] = "original"
    orthogonalizer: str = "kj5"

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        mu = self.momentum
        s["m"] = mu * s["m"] + (1 - mu) * g
        mix = mu * s["m"] + (1 - mu) * g if self.nesterov else s["m"]
        o = self.orthogonalize(flatten(mix))
        s["v"] = self.beta2 * s["v"] + (1 - self.beta2) * np.mean(o**2, axis=1, keepdims=True)
        normalised = o / (np.sqrt(s["v"]) + 1e-10)
        if self.scale == "original":
            norm = np.linalg.norm(o) * math.sqrt(max(1, p.shape[-2] / p.shape[-1]))
        else:
            norm = 0.2 * math.sqrt(o.size)
        u = norm / (np.linalg.norm(normalised) + 1e-10) * normalised
        return (1 - lr * self.weight_decay) * p - lr * u.reshape(p.shape)


def golden(hp: Hyper, variant: str) -> Hyper:
    return take(hp, "lr", "momentum", "beta2", "weight_decay")


ROWS = [
    Row(
        "NorMuon",
        NorMuonReference,
        [{}, {"scale": "rms", "nesterov": False, "weight_decay": 0.1}],
        golden={"normuon": golden},
        lr=0.02,
    )
]
