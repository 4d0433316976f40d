"""LaProp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..references import Array, Reference, State
from ..row import Hyper, Row, leave_out, take


@dataclass
class LaPropReference(Reference):
    """arXiv 2002.04839 as released: lr inside the momentum; decay after the step, not multiplied by lr."""

    lr: float = 4e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-15
    weight_decay: float = 0.0
    centered: bool = False
    decay: str = "independent"
    decays_afterwards: ClassVar[bool] = True

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        (b1, b2), t = self.betas, self.t
        s["v"] = b2 * s["v"] + (1 - b2) * g**2
        s["weight"] = b2 * s["weight"] + (1 - b2)
        s["mean"] = b2 * s["mean"] + (1 - b2) * g
        variance = s["v"] - s["mean"] ** 2 if self.centered and t > 10 else s["v"]
        normalised = g / (np.sqrt(np.maximum(variance, 0) / s["weight"]) + self.eps)
        s["m"] = b1 * s["m"] + (1 - b1) * lr * normalised
        s["lr"] = b1 * s["lr"] + (1 - b1) * lr
        if lr > 0:  # the limit lr -> 0 makes no step; the release would leave the momentum uncorrected there
            p = (1 - self.weight_decay) * (p - lr / s["lr"] * s["m"])
        return p


def golden(hp: Hyper, variant: str) -> Hyper:
    leave_out(hp, "used by no experiment", amsgrad=False)
    return take(hp, "lr", "betas", "eps", "weight_decay", "centered")


ROWS = [Row("LaProp", LaPropReference, [{}, {"centered": True, "weight_decay": 1e-3}], golden={"laprop": golden})]
