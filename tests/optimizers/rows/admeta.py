"""AdmetaR and AdmetaS."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..references import Array, Reference, State
from ..row import Hyper, Row, leave_out, take


class AdmetaReference(Reference):
    """arXiv 2307.00631: what both share, with the constants of the released code. Lookahead as Zhang et al. have it."""

    lam: float
    lookahead_steps: int
    weight_decay: float
    own_decay: ClassVar[bool] = True

    def step_from(self, p: Array, h: Array, s: State, lr: float) -> Array:
        """The parameter after the step, before the lookahead; h is the double average."""
        raise NotImplementedError

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        lam, t = self.lam, self.t
        if t == 1:
            s["phi"] = p
        p = (1 - self.rate(lr)) * p
        s["I"] = lam * s["I"] + g
        p = self.step_from(p, (10 / lam - 9) * g + (25 - 10 * (lam + 1 / lam)) * s["I"], s, lr)
        if t % self.lookahead_steps:
            return p
        eta = 0.8 * (1 + 1 / (0.1 * math.sqrt(t) + 3.8))
        s["phi"] = eta * p + (1 - eta) * s["phi"]
        return s["phi"]


@dataclass
class AdmetaRReference(AdmetaReference):
    """The step of RAdam (Liu et al.), plain while the variance is not tractable."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    lam: float = 0.2
    lookahead_steps: int = 6
    weight_decay: float = 0.0

    def step_from(self, p: Array, h: Array, s: State, lr: float) -> Array:
        (b1, b2), t = self.betas, self.t
        s["m"] = b1 * s["m"] + (1 - b1) * h
        s["v"] = b2 * s["v"] + (1 - b2) * h**2
        m = s["m"] / (1 - b1**t)
        most = 2 / (1 - b2) - 1
        rho = most - 2 * t * b2**t / (1 - b2**t)
        if rho <= 4:
            return p - lr * m
        r = math.sqrt((rho - 4) * (rho - 2) * most / ((most - 4) * (most - 2) * rho))
        return p - lr * r * m / (np.sqrt(s["v"] / (1 - b2**t)) + self.eps)


@dataclass
class AdmetaSReference(AdmetaReference):
    """The step of SGD, with an average in the place of heavy-ball momentum."""

    lr: float = 0.05
    momentum: float = 0.2
    lam: float = 0.9
    lookahead_steps: int = 6
    weight_decay: float = 0.0
    decay: str = "coupled"

    def step_from(self, p: Array, h: Array, s: State, lr: float) -> Array:
        s["m"] = self.momentum * s["m"] + (1 - self.momentum) * h
        return p - lr * s["m"]


def golden(hp: Hyper, variant: str) -> Hyper:
    why = "read literally, the figure starts the slow weights at 0, and synchronises one step early"
    leave_out(hp, why, sync="t % k", phi0="init", v_update="always")
    names = take(hp, "lr", "eps", "weight_decay", lam="lambda", lookahead_steps="k", momentum="beta")
    return names | ({"betas": (hp.pop("beta1"), hp.pop("beta2"))} if "beta1" in hp else {})


ROWS = [
    Row(
        "AdmetaR",
        AdmetaRReference,
        [{}, {"lam": 0.5, "lookahead_steps": 2, "weight_decay": 0.1}, {"weight_decay": 0.1, "decay": "coupled"}],
        golden={"admeta_r": golden},
        lr=0.01,
        proportional=True,
    ),
    Row(
        "AdmetaS",
        AdmetaSReference,
        [{}, {"lookahead_steps": 2, "weight_decay": 0.1}, {"weight_decay": 0.1, "decay": "decoupled"}],
        golden={"admeta_s": golden},
        lr=1e-3,
        proportional=True,
    ),
]
