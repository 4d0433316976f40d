"""Muon."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..references import Array, Reference, State, flatten
from ..row import Hyper, Row, iterations, take


@dataclass
class MuonReference(Reference):
    """Muon of Keller Jordan ("original") and of Moonlight, arXiv 2502.16982."""

    lr: float = 0.02
    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.0
    scale: Literal["original", "moonlight"] = "original"
    orthogonalizer: str = "kj5"

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        mu = self.momentum
        s["m"] = mu * s["m"] + (1 - mu) * g
        mix = mu * s["m"] + (1 - mu) * g if self.nesterov else s["m"]
        o = self.orthogonalize(flatten(mix)).reshape(p.shape)
        if self.scale == "original":
            factor = math.sqrt(max(1, p.shape[-2] / p.shape[-1]))
        else:
            factor = 0.2 * math.sqrt(max(p.shape[:2]))
        return (1 - lr * self.weight_decay) * p - lr * factor * o


def golden(hp: Hyper, variant: str) -> Hyper:
    scale = {"kellerjordan": "original", "moonlight": "moonlight"}[variant]
    decay = "wd" if "wd" in hp else "weight_decay"
    return take(hp, "lr", "momentum", "nesterov", weight_decay=decay) | {"scale": scale} | iterations(hp)


ROWS = [
    Row(
        "Muon",
        MuonReference,
        [{}, {"scale": "moonlight", "nesterov": False, "weight_decay": 0.1}, {"fallback": "HVAdam"}],
        golden={"muon": golden},
        lr=0.02,
    )
]
