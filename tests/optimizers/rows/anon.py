"""Anon."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hypothesis import strategies as st

from ..references import Array, Reference, State
from ..row import Hyper, Row, decay_form, leave_out, take


@dataclass
class AnonReference(Reference):
    """arXiv 2605.02317: momentum times a scale v that changes only when it is refreshed."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-16
    gamma: float = 0.0
    beta3: float = 0.5
    refresh: Literal["powers_of_two", "every_step"] = "powers_of_two"
    weight_decay: float = 0.0
    decay: str = "coupled"

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        (b1, b2), t = self.betas, self.t
        s["m"] = b1 * s["m"] + (1 - b1) * g
        s["s"] = b2 * s["s"] + (1 - b2) * g**2
        if self.refresh == "every_step" or math.log2(t).is_integer():
            sigma = s["s"] / (1 - b2 ** (t - s["refreshed_at"])) + self.eps
            if t == 1:
                s["v"] = sigma ** (-self.gamma / 2)
            else:
                s["v"] = (self.beta3 * s["v"] ** -2.0 + (1 - self.beta3) * sigma**self.gamma) ** -0.5
            s["s"] = 0.0
            s["refreshed_at"] = t
        return p - lr / (1 - b1**t) * s["m"] * s["v"]


def golden(hp: Hyper, variant: str) -> Hyper:
    leave_out(hp, "inherited from AdaBelief's file, used by no experiment", fixed_decay=False)
    schedule = {"steps 1,2,4,8,...": "powers_of_two", "every step": "every_step"}[hp.pop("refresh")]
    known = take(hp, "lr", "betas", "eps", "gamma", "beta3", "weight_decay") | decay_form(hp, "weight_decouple")
    return known | {"refresh": schedule}


ROWS = [
    Row(
        "Anon",
        AnonReference,
        [{}, {"gamma": 1.0, "weight_decay": 0.1}, {"gamma": -0.1, "refresh": "every_step", "decay": "decoupled"}],
        golden={"anon": golden},
        lr=0.1,
        trajectory={"gamma": st.floats(-1, 1.5), "beta3": st.floats(0, 0.9)},
        # Larger powers of extreme gradients leave the range of float64, in which the reference is.
        fuzz={"gamma": st.sampled_from([0.0, 0.5, 1.0]), "beta3": st.sampled_from([0.0, 0.5, 0.99])},
        amplifies={"powers"},
        proportional=True,
    )
]
