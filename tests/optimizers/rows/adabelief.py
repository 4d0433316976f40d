"""AdaBelief."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..references import Array, Reference, State
from ..row import Hyper, Row, decay_form, leave_out, take


@dataclass
class AdaBeliefReference(Reference):
    """arXiv 2010.07468 as released: eps is added to the variance buffer in every step, so it accumulates."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-16
    weight_decay: float = 0.0
    rectify: bool = True
    amsgrad: bool = False

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        (b1, b2), t = self.betas, self.t
        p = (1 - lr * self.weight_decay) * p
        s["m"] = b1 * s["m"] + (1 - b1) * g
        s["s"] = b2 * s["s"] + (1 - b2) * (g - s["m"]) ** 2 + self.eps
        s["max"] = np.maximum(s["max"], s["s"])
        step = lr / (1 - b1**t) * s["m"]
        if self.rectify:
            # RAdam (arXiv 1908.03265); the release does not use the amsgrad maximum here.
            rho_inf = 2 / (1 - b2) - 1
            rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
            if rho < 5:
                return p - step
            r = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
            return p - r * math.sqrt(1 - b2**t) * step / (np.sqrt(s["s"]) + self.eps)
        variance = s["max"] if self.amsgrad else s["s"]
        return p - step / (np.sqrt(variance) / math.sqrt(1 - b2**t) + self.eps)


def golden(hp: Hyper, variant: str) -> Hyper:
    if not hp["rectify"]:
        hp.pop("degenerated_to_sgd", None)  # Read by the rectified branch only.
    leave_out(hp, "used by no experiment", fixed_decay=False)
    leave_out(hp, "False makes no step at all while the variance is intractable", degenerated_to_sgd=True)
    return take(hp, "lr", "betas", "eps", "weight_decay", "rectify", "amsgrad") | decay_form(hp, "weight_decouple")


ROWS = [
    Row(
        "AdaBelief",
        AdaBeliefReference,
        [{}, {"rectify": False, "weight_decay": 0.1}, {"rectify": False, "amsgrad": True, "decay": "coupled"}],
        golden={"adabelief": golden},
        lr=0.05,
    )
]
