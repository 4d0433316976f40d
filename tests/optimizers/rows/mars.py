"""MARS and MARS-M."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from hypothesis import strategies as st
from torch import Tensor

from ..references import Array, Reference, State, flatten
from ..row import Hyper, Row, iterations, leave_out, take


def corrected(g: Array, s: State, beta: float, gamma: float) -> Array:
    """The gradient with its change, in the approximate form: the gradient before is that of the last step."""
    c = g + gamma * beta / (1 - beta) * (g - s["last"])
    s["last"] = g
    return c / max(1, np.linalg.norm(c))


@dataclass
class MARSReference(Reference):
    """arXiv 2411.10438, three forms, as released."""

    lr: float = 3e-3
    betas: tuple[float, float] = (0.95, 0.99)
    gamma: float = 0.025
    eps: float = 1e-8
    weight_decay: float = 0.0
    form: Literal["adamw", "lion", "shampoo"] = "adamw"
    orthogonalizer: str = "kj5"

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        (b1, b2), t = self.betas, self.t
        c = corrected(g, s, b1, self.gamma)
        s["m"] = b1 * s["m"] + (1 - b1) * c
        if self.form == "adamw":
            s["v"] = b2 * s["v"] + (1 - b2) * c**2
            u = s["m"] / (1 - b1**t) / (np.sqrt(s["v"] / (1 - b2**t)) + self.eps)
        elif self.form == "lion":
            u = np.sign(s["m"])
        else:
            m, n = flatten(p).shape
            u = math.sqrt(max(1, m / max(n, 1))) * self.orthogonalize(flatten(s["m"])).reshape(p.shape)
        return (1 - lr * self.weight_decay) * p - lr * u


@dataclass
class MARSMReference(Reference):
    """arXiv 2510.21800, as released, and the release's memory-efficient class."""

    lr: float = 1e-3
    momentum: float = 0.95
    gamma: float = 0.025
    weight_decay: float = 0.1
    memory_efficient: bool = False
    orthogonalizer: str = "kj5"

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        beta, gamma = self.momentum, self.gamma
        if self.memory_efficient:
            s["s"] = beta * s["s"] + (1 - gamma) * (1 - beta) * g
            m = s["s"] + gamma * g
        else:
            m = s["m"] = beta * s["m"] + (1 - beta) * corrected(g, s, beta, gamma)
        o = self.orthogonalize(flatten(m)).reshape(p.shape)
        return (1 - lr * self.weight_decay) * p - lr * 0.2 * math.sqrt(max(p.shape[:2])) * o


def golden(hp: Hyper, variant: str) -> Hyper:
    leave_out(hp, "used by no experiment", amsgrad=False)
    leave_out(hp, "the exact form needs two gradients per step", is_approx=True)
    everywhere = hp.pop("optimize_1d")

    def role(p: Tensor) -> str:
        return "matrix" if everywhere or p.ndim == 2 else "fallback"

    names = take(
        hp, "lr", "betas", "eps", "gamma", "weight_decay", fallback_lr="lr_1d", fallback_betas="betas_1d",
        fallback_weight_decay="weight_decay_1d",
    )  # fmt: skip
    form = hp.pop("mars_type").removeprefix("mars-")
    return names | {"form": form, "fallback_eps": names["eps"], "role": role}


def golden_m(hp: Hyper, variant: str) -> Hyper:
    efficient = {"released": False, "released, memory-efficient": True}[variant]
    names = take(hp, "lr", "momentum", "gamma", weight_decay="wd")
    return names | {"memory_efficient": efficient} | iterations(hp)


ROWS = [
    Row(
        "MARS",
        MARSReference,
        [{}, {"form": "lion", "weight_decay": 0.1}, {"form": "shampoo", "gamma": 0.1}],
        golden={"mars": golden},
    ),
    Row(
        "MARSM",
        MARSMReference,
        [{}, {"memory_efficient": True, "gamma": 0.05}],
        golden={"mars_m": golden_m},
        lr=0.02,
        # Of a large gradient between small ones the corrections are opposite. A momentum that forgets nothing adds them
        # up to nothing, whose polar factor is that of rounding errors.
        fuzz={"momentum": st.sampled_from([0.0, 0.5, 0.95])},
    ),
]
