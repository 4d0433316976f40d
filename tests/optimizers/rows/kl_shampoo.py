"""KL-Shampoo and KL-SOAP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..references import Array, Reference, State, flatten
from ..row import EIGENBASIS_FUZZ, EIGENBASIS_TRAJECTORY, Row

NO_GOLDEN = "the released code was compared with by hand: its license is not stated, so no trajectories are kept"


@dataclass
class KLShampooReference(Reference):
    """arXiv 2509.03378 as released, in matrices: S_a = mean of G S_b^-1 G^T / n, and S_b alike."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.98)
    shampoo_beta: float | None = None
    eps: float = 1e-8
    weight_decay: float = 0.01
    precondition_frequency: int = 10
    stagger: bool = True  # Released: False.
    max_precondition_dim: int = 10000  # Released: no limit.
    initial_eigenvalue: float = 0.1
    decays_afterwards: ClassVar[bool] = True

    def decayed(self, p: Array, step: Array, rate: float) -> Array:
        return super().decayed(p, step, rate if self.t > 1 else 0.0)  # The first call moves nothing.

    def __post_init__(self) -> None:
        super().__post_init__()
        for i, s in enumerate(self.states):
            s["position"] = i

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        shape, beta = p.shape, self.betas[1] if self.shampoo_beta is None else self.shampoo_beta
        p, g = flatten(p), flatten(g)
        m, n = p.shape
        left, right = m <= self.max_precondition_dim, n <= self.max_precondition_dim
        if self.t == 1:
            s["A"], s["B"] = (1 - beta) / n * g @ g.T, (1 - beta) / m * g.T @ g
            s["P"] = np.linalg.eigh(s["A"])[1][:, ::-1] if left else np.eye(m)
            s["Q"] = np.linalg.eigh(s["B"])[1][:, ::-1] if right else np.eye(n)
            s["a"] = np.full(m, self.initial_eigenvalue) if left else np.ones(m)
            s["b"] = np.full(n, self.initial_eigenvalue) if right else np.ones(n)
            return p.reshape(shape)

        step = s["P"] @ self.direction(g, s) @ s["Q"].T
        p = (1 - lr * self.weight_decay) * (p - lr * step)

        inverse_a = s["P"] @ np.diag(1 / s["a"]) @ s["P"].T
        inverse_b = s["Q"] @ np.diag(1 / s["b"]) @ s["Q"].T
        seen_a, seen_b = g @ inverse_b @ g.T / n, g.T @ inverse_a @ g / m
        s["A"], s["B"] = beta * s["A"] + (1 - beta) * seen_a, beta * s["B"] + (1 - beta) * seen_b
        if left:
            s["a"] = beta * s["a"] + (1 - beta) * np.diag(s["P"].T @ seen_a @ s["P"])
            s["a"] = np.maximum(s["a"], max(10, min(m, 4000)) ** -2)
        if right:
            s["b"] = beta * s["b"] + (1 - beta) * np.diag(s["Q"].T @ seen_b @ s["Q"])
            s["b"] = np.maximum(s["b"], max(10, min(n, 4000)) ** -2)
        if (self.t - 1 + (s["position"] if self.stagger else 0)) % self.precondition_frequency == 0:
            new_p = np.linalg.qr(s["A"] @ s["P"])[0] if left else s["P"]
            new_q = np.linalg.qr(s["B"] @ s["Q"])[0] if right else s["Q"]
            self.carry(s, new_p, new_q)
            s["P"], s["Q"] = new_p, new_q
        return p.reshape(shape)

    def direction(self, g: Array, s: State) -> Array:
        """The step in the bases."""
        b1 = self.betas[0]
        s["m"] = b1 * s["m"] + (1 - b1) * g
        return (s["P"].T @ s["m"] @ s["Q"]) / (np.sqrt(np.outer(s["a"], s["b"])) + self.eps)

    def carry(self, s: State, p: Array, q: Array) -> None:
        """What changes with the bases: nothing."""


@dataclass
class KLSOAPReference(KLShampooReference):
    """The same with Adam's step in these bases."""

    def direction(self, g: Array, s: State) -> Array:
        b1, b2 = self.betas
        g = s["P"].T @ g @ s["Q"]
        s["m"] = b1 * s["m"] + (1 - b1) * g
        s["v"] = b2 * s["v"] + (1 - b2) * g**2
        return s["m"] / (np.sqrt(s["v"]) + self.eps)

    def carry(self, s: State, p: Array, q: Array) -> None:
        s["m"] = p.T @ (s["P"] @ s["m"] @ s["Q"].T) @ q


CONFIGURATIONS = [
    {"precondition_frequency": 2},
    {"precondition_frequency": 3, "max_precondition_dim": 12, "shampoo_beta": 0.8, "fallback": "MVNGrad"},
    {"initial_eigenvalue": 1.0, "stagger": False, "precondition_frequency": 3},
]

ROWS = [
    Row(
        name,
        reference,
        CONFIGURATIONS,
        golden=NO_GOLDEN,
        trajectory=EIGENBASIS_TRAJECTORY,
        fuzz=EIGENBASIS_FUZZ,
        amplifies={"bases"},
    )
    for name, reference in (("KLShampoo", KLShampooReference), ("KLSOAP", KLSOAPReference))
]
