"""OLion."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..references import Array, Reference, State, flatten
from ..row import Hyper, Row, iterations, leave_out, take


@dataclass
class OLionReference(Reference):
    """arXiv 2602.01105, as the released classes that orthogonalise: polar factor, sign, scale."""

    lr: float = 0.02
    betas: tuple[float, float] = (0.95, 0.98)
    nesterov: bool = True
    weight_decay: float = 0.0
    scale: Literal["rms", "original"] = "rms"
    orthogonalizer: str = "kj5"

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        b1, b2 = self.betas
        s["m"] = b2 * s["m"] + (1 - b2) * g
        mix = (1 - b1) * g + b1 * s["m"] if self.nesterov else s["m"]
        o = self.orthogonalize(flatten(mix))
        signs = np.sign(o) * (np.abs(o) >= 1e-6)
        m, n = o.shape
        # Released: first the norm of an orthogonal matrix, then a factor of the shape.
        factor = 0.2 * math.sqrt(max(m, n)) if self.scale == "rms" else math.sqrt(max(1, m / max(n, 1)))
        u = factor * math.sqrt(min(m, n)) * signs / max(np.linalg.norm(signs), 1)
        return (1 - lr * self.weight_decay) * p - lr * u.reshape(p.shape)


def golden(hp: Hyper, variant: str) -> Hyper:
    leave_out(hp, "the step would depend on the size of the matrix alone", use_scale=True)
    hp.pop("eps")  # Of the norm that the iteration divides by.
    betas = (hp.pop("momentum"), hp.pop("momentum_2"))
    scale = "rms" if hp.pop("rms_scale") else "original"
    return take(hp, "lr", "nesterov", "weight_decay") | {"betas": betas, "scale": scale} | iterations(hp)


ROWS = [
    Row(
        "OLion",
        OLionReference,
        [{}, {"scale": "original", "nesterov": False, "weight_decay": 0.1}],
        golden={"olion": golden},
        amplifies={"factor"},
    )
]
