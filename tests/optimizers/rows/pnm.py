"""PNM and AdaPNM."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from ..references import Array, Reference, State
from ..row import Hyper, Row, decay_form, take


def positive_negative_momentum(g: Array, s: State, t: int, beta1: float, beta0: float) -> Array:
    """arXiv 2103.17182: m_t decays from m_{t-2}; the difference to m_{t-1}, of the noise that one momentum has."""
    m = beta1**2 * s["m", t - 2] + (1 - beta1**2) * g
    s["m", t] = m
    return ((1 + beta0) * m - beta0 * s["m", t - 1]) / math.sqrt((1 + beta0) ** 2 + beta0**2)


@dataclass
class PNMReference(Reference):
    """arXiv 2103.17182, with the normalisation of the release."""

    lr: float = 1.0
    momentum: float = 0.9
    beta0: float = 1.0
    weight_decay: float = 0.0

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        p = (1 - lr * self.weight_decay) * p
        return p - lr * positive_negative_momentum(g, s, self.t, self.momentum, self.beta0)


@dataclass
class AdaPNMReference(Reference):
    """arXiv 2103.17182 as released: a maximum before the bias correction, which is that of plain momentum."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    beta0: float = 1.0
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = True

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        (b1, b2), t = self.betas, self.t
        p = (1 - lr * self.weight_decay) * p
        m = positive_negative_momentum(g, s, t, b1, self.beta0)
        s["v"] = b2 * s["v"] + (1 - b2) * g**2
        s["max"] = np.maximum(s["max"], s["v"])
        v = s["max"] if self.amsgrad else s["v"]
        return p - lr / (1 - b1**t) * m / (np.sqrt(v / (1 - b2**t)) + self.eps)


def pnm(hp: Hyper, variant: str) -> Hyper:
    momentum, beta0 = hp.pop("betas")
    return {"momentum": momentum, "beta0": beta0} | take(hp, "lr", "weight_decay") | decay_form(hp, "decoupled")


def adapnm(hp: Hyper, variant: str) -> Hyper:
    *betas, beta0 = hp.pop("betas")
    return (
        {"betas": betas, "beta0": beta0}
        | take(hp, "lr", "eps", "weight_decay", "amsgrad")
        | decay_form(hp, "decoupled")
    )


trajectory = {"beta0": st.floats(0, 2)}
ROWS = [
    Row(
        "PNM",
        PNMReference,
        [{}, {"beta0": 0.5, "weight_decay": 0.1, "decay": "coupled"}],
        golden={"pnm": pnm},
        lr=0.2,
        trajectory=trajectory,
        proportional=True,
    ),
    Row(
        "AdaPNM",
        AdaPNMReference,
        [{}, {"amsgrad": False, "beta0": 2.0, "weight_decay": 0.1, "decay": "coupled"}],
        golden={"adapnm": adapnm},
        lr=0.05,
        trajectory=trajectory,
    ),
]
