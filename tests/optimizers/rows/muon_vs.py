"""Muon-VS and Muon-NSR."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from ..references import Array, Reference, State, flatten
from ..row import Hyper, Row, iterations, take


@dataclass
class MuonVSReference(Reference):
    """arXiv 2601.14603, variance-scaled, as released: eps outside of the root."""

    lr: float = 0.02
    momentum: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.01
    orthogonalizer: str = "kj5"

    def adapted(self, m: Array, variance: Array) -> Array:
        return m / (np.sqrt(variance) + self.eps)

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        beta, t = self.momentum, self.t
        s["v"] = beta * s["v"] + beta * (1 - beta) * (s["m"] - g) ** 2
        s["m"] = beta * s["m"] + (1 - beta) * g
        look_ahead = g + beta / (1 - beta) * s["m"] / (1 - beta**t)
        adapted = self.adapted(look_ahead, s["v"] / (1 - beta**t))
        o = self.orthogonalize(flatten(adapted)).reshape(p.shape)
        return (1 - lr * self.weight_decay) * p - lr * 0.2 * math.sqrt(max(p.shape[:2])) * o


@dataclass
class MuonNSRReference(MuonVSReference):
    """arXiv 2601.14603, modulated by the noise-to-signal ratio, as released: eps outside of the root."""

    gamma: float = 10.0

    def adapted(self, m: Array, variance: Array) -> Array:
        return m / (np.sqrt(m**2 + self.gamma * variance) + self.eps)


def golden(hp: Hyper, variant: str) -> Hyper:
    return take(hp, "lr", "momentum", "eps", "weight_decay", gamma="alpha") | iterations(hp)


ROWS = [
    Row(
        "MuonVS",
        MuonVSReference,
        [{}, {"momentum": 0.8, "eps": 1e-3, "weight_decay": 0.1}],
        golden={"muon_vs": golden},
        lr=0.02,
        trajectory={"momentum": st.floats(0.1, 0.99)},  # Without momentum there is no variance.
        amplifies={"signs"},
    ),
    Row(
        "MuonNSR",
        MuonNSRReference,
        [{}, {"gamma": 0.5, "weight_decay": 0.1}],
        golden={"muon_nsr": golden},
        lr=0.02,
        trajectory={"momentum": st.floats(0.1, 0.99), "gamma": st.floats(0.1, 20)},
        amplifies={"signs"},
    ),
]
