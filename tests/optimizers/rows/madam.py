"""MAdam and LaMAdam."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from ..references import Array, Reference, State
from ..row import Hyper, Row, decay_form, leave_out, take


def maximum_variance_second_moment(g: Array, s: State, t: int, beta_min: float, beta_max: float) -> Array:
    """arXiv 2006.11918: the average square of all gradients, whose weights decay as makes their variance largest.

    From the definition: weights of every gradient so far, and moments by them. 1e-16 is the release's.
    """
    gradients, weights = s["gradients"] or [], s["weights"] or []
    beta = np.full_like(g, beta_max)
    if t > 1:
        w = sum(weights)
        mean = sum(a * x for a, x in zip(weights, gradients)) / w
        variance = sum(a * (x - mean) ** 2 for a, x in zip(weights, gradients)) / w
        d = (g - mean) ** 2
        beta = (d + variance) / (w * (d - variance) + d + variance + 1e-16)
        beta = np.minimum(np.maximum(beta, beta_min), beta_max)
    s["gradients"] = [*gradients, g]
    s["weights"] = [*(beta * a for a in weights), 1 - beta]
    return sum(a * x**2 for a, x in zip(s["weights"], s["gradients"])) / sum(s["weights"])


@dataclass
class MAdamReference(Reference):
    """arXiv 2006.11918, MAdam as released: the maximum of amsgrad is that of the denominator."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    beta_min: float = 0.5
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        (b1, b2), t = self.betas, self.t
        p = (1 - lr * self.weight_decay) * p
        s["m"] = b1 * s["m"] + (1 - b1) * g
        denominator = np.sqrt(maximum_variance_second_moment(g, s, t, self.beta_min, b2)) + self.eps
        s["max"] = np.maximum(s["max"], denominator)
        return p - lr / (1 - b1**t) * s["m"] / (s["max"] if self.amsgrad else denominator)


@dataclass
class LaMAdamReference(Reference):
    """arXiv 2006.11918, LaMAdam as released: lr inside the momentum, coupled decay."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    beta_min: float = 0.5
    eps: float = 1e-15
    weight_decay: float = 0.0
    decay: str = "coupled"

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        b1, b2 = self.betas
        normalised = g / (np.sqrt(maximum_variance_second_moment(g, s, self.t, self.beta_min, b2)) + self.eps)
        s["m"] = b1 * s["m"] + (1 - b1) * lr * normalised
        s["lr"] = b1 * s["lr"] + (1 - b1) * lr
        return p - lr / s["lr"] * s["m"] if lr > 0 else p  # as LaProp


def madam(hp: Hyper, variant: str) -> Hyper:
    leave_out(hp, "used by no experiment", nesterov=False)
    beta_min, beta_max = hp.pop("beta2_range")
    names = take(hp, "lr", "eps", "weight_decay", "amsgrad") | decay_form(hp, "adamw")
    return names | {"betas": (hp.pop("beta1"), beta_max), "beta_min": beta_min}


def lamadam(hp: Hyper, variant: str) -> Hyper:
    hp.pop("amsgrad", None)  # Never takes effect.
    names = take(hp, "lr", "beta_min", "eps", "weight_decay") | decay_form(hp, "use_adamw")
    return names | {"betas": (hp.pop("momentum"), hp.pop("beta"))}


trajectory = {"beta_min": st.floats(0, 0.9)}
ROWS = [
    Row(
        "MAdam",
        MAdamReference,
        [{}, {"amsgrad": True, "weight_decay": 0.1}, {"betas": (0.9, 0.9), "beta_min": 0.2, "decay": "coupled"}],
        golden={"madam": madam},
        trajectory=trajectory,
    ),
    Row(
        "LaMAdam",
        LaMAdamReference,
        [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decay": "decoupled"}],
        golden={"lamadam": lamadam},
        trajectory=trajectory,
    ),
]
