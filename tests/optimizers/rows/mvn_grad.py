"""MVN-Grad."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from ..references import Array, Reference, State
from ..row import Hyper, Row, decay_form, take


@dataclass
class MVNGradReference(Reference):
    """arXiv 2602.10204, Algorithm 1: the gradient, divided by its standard deviation, is averaged."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    eps_s: float = 1e-12
    weight_decay: float = 0.0

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        (b1, b2), t = self.betas, self.t
        p = (1 - lr * self.weight_decay) * p
        s["m"] = b1 * s["m"] + (1 - b1) * g
        s["v"] = b2 * s["v"] + (1 - b2) * (g - s["m"]) ** 2 + self.eps_s
        z = g / (np.sqrt(s["v"] / (1 - b2**t)) + self.eps)
        s["u"] = b1 * s["u"] + (1 - b1) * z
        return p - lr * s["u"] / (1 - b1**t)


def golden(hp: Hyper, variant: str) -> Hyper:
    return take(hp, "lr", "betas", "eps", "eps_s", "weight_decay") | decay_form(hp, "decoupled")


ROWS = [
    Row(
        "MVNGrad",
        MVNGradReference,
        [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decay": "coupled"}],
        golden={"mvn_grad": golden},
        trajectory={"eps_s": st.sampled_from([0.0, 1e-6])},
    )
]
