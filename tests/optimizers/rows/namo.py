"""NAMO and NAMO-D."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..references import Array, Reference, State, flatten
from ..row import Hyper, Row, iterations, take


@dataclass
class NAMOReference(Reference):
    """arXiv 2602.17080. The published algorithm with scale, max_step = None and nesterov=False, else the released."""

    lr: float = 0.01
    betas: tuple[float, float] = (0.95, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.1
    nesterov: bool = True
    scale: float | None = 0.2
    max_step: float | None = 1.0
    orthogonalizer: str = "kj5"
    decay: str = "adaptive"

    def norm(self, x: Array) -> Array:
        return np.sqrt(np.sum(x**2, keepdims=True))

    def adaptive_scale(self, g: Array, mix: Array, s: State) -> Array:
        (mu1, mu2), t = self.betas, self.t
        s["v"] = mu2 * s["v"] + (1 - mu2) * self.norm(g) ** 2
        return math.sqrt(1 - mu2**t) / (1 - mu1**t) * self.norm(mix) / (np.sqrt(s["v"]) + self.eps)

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        mu1 = self.betas[0]
        w, g = flatten(p), flatten(g)
        s["m"] = mu1 * s["m"] + (1 - mu1) * g
        mix = mu1 * s["m"] + (1 - mu1) * g if self.nesterov else s["m"]
        o = self.orthogonalize(mix)
        eta = lr * self.adaptive_scale(g, mix, s)
        factor = 1 if self.scale is None else self.scale * math.sqrt(max(p.shape[:2]))
        bound = math.inf if self.max_step is None else self.max_step
        w = self.keep(np.minimum(eta, bound)) * w - np.minimum(eta * factor, bound) * o
        return w.reshape(p.shape)

    def keep(self, eta: Array) -> Array:
        return 1 - self.weight_decay * eta


@dataclass
class NAMODReference(NAMOReference):
    """NAMO with one scale for each column, kept near their mean."""

    clamp: float | None = 0.75

    def norm(self, x: Array) -> Array:
        return np.sqrt(np.sum(x**2, axis=0, keepdims=True))

    def adaptive_scale(self, g: Array, mix: Array, s: State) -> Array:
        d = super().adaptive_scale(g, mix, s)
        if self.clamp is None:
            return d
        return np.clip(d, self.clamp * d.mean(), d.mean() / self.clamp)

    def keep(self, eta: Array) -> Array:
        keep = super().keep(eta)
        return keep if self.max_step is None else np.maximum(keep, 0)


def namo(hp: Hyper, variant: str) -> Hyper:
    if variant == "formula":
        betas = (hp.pop("mu1"), hp.pop("mu2"))
        paper = {"nesterov": False, "scale": None, "max_step": None, "betas": betas}
        return paper | take(hp, "eps", lr="eta", weight_decay="lambda")
    betas = (hp.pop("momentum"), hp.pop("mu2"))
    names = take(hp, "lr", "nesterov", weight_decay="wd", eps="adamnorm_eps", scale="scale_coeff")
    return names | {"betas": betas} | iterations(hp)


def namo_d(hp: Hyper, variant: str) -> Hyper:
    clamp = hp.pop("c") if variant == "formula" else hp.pop("col_state_clamp_c")
    return namo(hp, variant) | {"clamp": clamp if clamp is not None and 0 < clamp <= 1 else None}


paper = {"nesterov": False, "scale": None, "max_step": None, "orthogonalizer": "exact"}
ROWS = [
    Row("NAMO", NAMOReference, [{}, paper], golden={"namo": namo}),
    Row("NAMOD", NAMODReference, [{}, paper, {"clamp": None}], golden={"namo_d": namo_d}),
]
