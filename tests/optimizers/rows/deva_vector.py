"""DeVA, vector form."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..references import Array, Reference, State
from ..row import Hyper, Row, take


@dataclass
class DeVAVectorReference(Reference):
    """arXiv 2602.06880, l_inf form, as released: second moment of the momentum, no bias correction."""

    lr: float = 0.02
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    nesterov: bool = False

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        b1, b2 = self.betas
        p = (1 - lr * self.weight_decay) * p
        s["m"] = b1 * s["m"] + (1 - b1) * g
        s["v"] = b2 * s["v"] + (1 - b2) * s["m"] ** 2
        gamma = np.sqrt(s["m"] ** 2 / (s["v"] + 1e-5))
        direction = b1 * s["m"] + (1 - b1) * g if self.nesterov else s["m"]
        return p - lr * gamma * np.sign(direction)


def golden(hp: Hyper, variant: str) -> Hyper:
    return take(hp, "lr", "betas", "weight_decay", nesterov="nestrov")


ROWS = [
    Row(
        "DeVAVector",
        DeVAVectorReference,
        [{}, {"nesterov": True, "weight_decay": 0.1}],
        golden={"deva_linf": golden},
        lr=1e-3,  # Its first steps are 1 / sqrt(1 - betas[1]) times lr.
    )
]
