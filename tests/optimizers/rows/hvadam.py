"""HVAdam."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..references import Array, Reference, State
from ..row import Hyper, Row, decay_form, leave_out, take


@dataclass
class HVAdamReference(Reference):
    """arXiv 2511.20277 as released: an adaptive step, and a step along a hidden vector v."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-16
    gamma: float = 0.0
    weight_decay: float = 0.0
    decay: str = "coupled"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.start = True  # v has to be (re-)initialised
        self.exp_delta = 0.0  # smoothed cosine between v and the momentum
        self.count = 0

    def move(self, grads: Sequence[Array], lr: float) -> None:
        super().move(grads, lr)
        self.hidden_step(lr)

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        (b1, b2), t = self.betas, self.t
        s["m"] = b1 * s["m"] + (1 - b1) * g
        t1 = (g - s["v"]) ** 2
        t2 = (g - s["m"]) ** 2
        s["s"] = b2 * s["s"] + (1 - b2) * t1**2 / (t2 + self.gamma * t1 + self.eps) + self.eps
        denominator = np.sqrt(s["s"]) / math.sqrt(1 - b2**t) + self.eps
        return p - lr / (1 - b1**t) * s["m"] / denominator

    def hidden_step(self, lr: float) -> None:
        b1, b2 = self.betas
        mhat = [s["m"] / (1 - b1**self.t) for s in self.states]
        if self.start:
            self.start, self.exp_delta, self.count = False, 0.0, 0
            for s, m in zip(self.states, mhat):
                s["v"] = m
            return

        v = [s["v"] for s in self.states]
        mm = sum(float(np.sum(m * m)) for m in mhat)
        mv = sum(float(np.sum(m * w)) for m, w in zip(mhat, v))
        vv = sum(float(np.sum(w * w)) for w in v)
        # k v + (1-k) mhat is the point nearest to the origin on the line through v and mhat.
        distance = mm + vv - 2 * mv
        k = (mm - mv) / distance if distance != 0 else 0.0
        norm2 = abs(k**2 * vv + (1 - k) ** 2 * mm + 2 * k * (1 - k) * mv)
        if norm2 * mm == 0:  # no direction, no cosine: the release would divide by zero
            return
        delta = (k * mv + (1 - k) * mm) / math.sqrt(norm2 * mm)
        if abs(delta) > 1:  # rounding
            return
        self.exp_delta = b2 * self.exp_delta + (1 - b2) * delta
        self.count += 1
        if self.exp_delta / (1 - b2**self.count) < 0.1:
            self.start = True  # v stays as it is until the next step overwrites it
            return
        factor = 10 ** (6 * self.exp_delta - 3)  # of the cosine without bias correction
        for i, s in enumerate(self.states):
            s["v"] = k * v[i] + (1 - k) * mhat[i]
            self.params[i] = self.params[i] - lr * factor * s["v"]


def golden(hp: Hyper, variant: str) -> Hyper:
    inherited = "inherited from AdaBelief's file, used by no experiment"
    leave_out(hp, inherited, amsgrad=False, rectify=False, fixed_decay=False)
    hp.pop("degenerated_to_sgd", None)  # Only read by the rectified branch, which is left out.
    return take(hp, "lr", "betas", "eps", "gamma", "weight_decay") | decay_form(hp, "weight_decouple")


ROWS = [
    Row(
        "HVAdam",
        HVAdamReference,
        [{}, {"gamma": 0.5, "weight_decay": 0.1}, {"betas": (0.5, 0.5), "decay": "decoupled"}],
        golden={"hvadam": golden},
        amplifies={"hidden vector"},
    )
]
