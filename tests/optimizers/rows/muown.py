"""Muown."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..references import Array, Reference, State, flatten
from ..row import Row


@dataclass
class MuownReference(Reference):
    """arXiv 2605.10797, as its release for one process has it: V is kept, and W made of it."""

    lr: float = 3e-4
    momentum: float = 0.95
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    nesterov: bool = True
    weight_decay: float = 0.0
    orthogonalizer: str = "kj5"
    own_decay: ClassVar[bool] = True

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        b1, b2, mu, t = self.beta1, self.beta2, self.momentum, self.t
        w, g = flatten(p), flatten(g)
        turn = lr * 0.2 * math.sqrt(max(p.shape[:2]))
        if t == 1:
            s["norm"] = s["length"] = self.rows(w)
        zero = np.abs(s["norm"]) <= 1e-30
        norm, length = np.where(zero, 1, s["norm"]), np.where(zero, 1, s["length"])
        u = np.where(zero, 0, w / norm)
        of_norm = np.sum(g * u, axis=1, keepdims=True)
        across = g - of_norm * u
        if w.shape[1] == 1:  # A row of one element has no direction to turn to.
            across = np.where(zero, g, 0)
        across = np.where(self.rows(across) > 1e-5 * self.rows(g), across, 0)  # Else rounding errors.
        of_direction = norm / length * across
        s["m"] = mu * s["m"] + (1 - mu) * of_direction
        o = self.orthogonalize((1 - mu) * of_direction + mu * s["m"] if self.nesterov else s["m"])
        v = u * length - turn * o
        s["a"] = b1 * s["a"] + (1 - b1) * of_norm
        s["b"] = b2 * s["b"] + (1 - b2) * of_norm**2
        adam = s["a"] / (1 - b1**t) / (np.sqrt(s["b"] / (1 - b2**t)) + self.eps)
        s["length"] = self.rows(v)
        before, s["norm"] = s["norm"], np.where(zero, s["length"], s["norm"] - lr * adam)  # Of zeros: a step of Muon.
        new = s["norm"] * v / np.maximum(s["length"], 1e-30)
        still = (s["norm"] == before) & (turn * o == 0).all(1, keepdims=True)
        new = np.where(still, w, new) - self.rate(lr) * w
        if self.weight_decay and lr:
            s["norm"] = self.rows(new)
        return new.reshape(p.shape)

    def rows(self, x: Array) -> Array:
        return np.linalg.norm(x, axis=1, keepdims=True)


ROWS = [
    Row(
        "Muown",
        MuownReference,
        [{}, {"nesterov": False, "weight_decay": 0.1}],
        golden="no trajectory of the released code was recorded",
        lr=0.01,
        amplifies=("weights",),
    )
]
