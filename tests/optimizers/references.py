"""Plain float64 references of the optimizers, written from the published equations.

Slow and simple on purpose, to be read next to the paper: numpy only, one update per class, every buffer an
entry of `s` (the state of one tensor) that starts at zero. `t` counts steps from 1. All tensors form one
parameter group and all of them get the main rule. Where a released code and its paper differ, a docstring or
comment says which of the two this is. Arguments have the names and defaults of the optimizers under test.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
State = defaultdict[str, Any]
Orthogonalizer = Literal["exact", "kj5"]


# Linear algebra

NORM_FLOOR = 1e-7  #: As released; what is added to the norm of a matrix.


def polar_factor(x: Array) -> Array:
    """U V^T of the SVD, without the directions that are zero up to rounding; a zero matrix gives zero."""
    u, sigma, vt = np.linalg.svd(x, full_matrices=False)
    keep = sigma > max(x.shape) * np.finfo(np.float64).eps * sigma.max()
    return u[:, keep] @ vt[keep]


def newton_schulz(x: Array, steps: int = 5, extra_normalisation: bool = False) -> Array:
    """Keller Jordan's quintic iteration, an approximate polar factor.

    `extra_normalisation` also divides by ||(X X^T)^2||_F^(1/4) in the first iteration, as DeVA's release
    does: a tighter bound of the largest singular value than the Frobenius norm.
    """
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.T, steps, extra_normalisation).T
    x = x / (np.linalg.norm(x) + NORM_FLOOR)
    for i in range(steps):
        if extra_normalisation and i == 0:
            x = x / (np.sum((x @ x.T @ x @ x.T) ** 2) + 1e-20) ** 0.125
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def orthogonalize(x: Array, method: Orthogonalizer, extra_normalisation: bool = False) -> Array:
    return polar_factor(x) if method == "exact" else newton_schulz(x, extra_normalisation=extra_normalisation)


def outer_product(g: Array, axis: int) -> Array:
    """G G^T of the tensor unfolded along `axis`: contracts every other axis."""
    unfolded = np.moveaxis(g, axis, 0).reshape(g.shape[axis], -1)
    return unfolded @ unfolded.T


def rotate(x: Array, bases: Sequence[Array | None]) -> Array:
    """Coordinates of x in the bases: Q_1^T x Q_2 for a matrix. None leaves the axis as it is."""
    for axis, q in enumerate(bases):
        if q is not None:
            x = np.moveaxis(np.tensordot(x, q, axes=(axis, 0)), -1, axis)
    return x


def rotate_back(x: Array, bases: Sequence[Array | None]) -> Array:
    """Inverse of rotate: Q_1 x Q_2^T for a matrix."""
    return rotate(x, [None if q is None else q.T for q in bases])


# Element-wise optimizers


@dataclass
class Reference:
    """Counts steps and calls `update` for every tensor."""

    params: list[np.ndarray]
    lr: float

    def __post_init__(self) -> None:
        self.params = [np.array(p, dtype=np.float64) for p in self.params]
        self.states: list[State] = [defaultdict(float) for _ in self.params]
        self.t = 0

    def step(self, grads: Sequence[np.ndarray], lr: float | None = None) -> None:
        """One step; `lr` is the schedule's value for this step, the constructor's otherwise."""
        self.t += 1
        lr = self.lr if lr is None else lr
        for i, g in enumerate(grads):
            self.params[i] = self.update(self.params[i], np.asarray(g, np.float64), self.states[i], lr)

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        """The new parameter, from the parameter, its gradient and its state."""
        raise NotImplementedError


def decay(p: Array, g: Array, lr: float, weight_decay: float, decoupled: bool) -> tuple[Array, Array]:
    """Weight decay before the step, of the parameter (decoupled) or in the gradient (coupled)."""
    return ((1 - lr * weight_decay) * p, g) if decoupled else (p, g + weight_decay * p)


@dataclass
class AdamWReference(Reference):
    """Loshchilov & Hutter, Decoupled weight decay regularization, in torch's formulation."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        (b1, b2), t = self.betas, self.t
        p = p - lr * self.weight_decay * p
        s["m"] = b1 * s["m"] + (1 - b1) * g
        s["v"] = b2 * s["v"] + (1 - b2) * g**2
        return p - lr / (1 - b1**t) * s["m"] / (np.sqrt(s["v"]) / math.sqrt(1 - b2**t) + self.eps)


@dataclass
class MVNGradReference(Reference):
    """arXiv 2602.10204, Algorithm 1: the gradient, divided by its standard deviation, is averaged."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    eps_s: float = 1e-12
    weight_decay: float = 0.0
    decoupled: bool = True

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        (b1, b2), t = self.betas, self.t
        p, g = decay(p, g, lr, self.weight_decay, self.decoupled)
        s["m"] = b1 * s["m"] + (1 - b1) * g
        s["v"] = b2 * s["v"] + (1 - b2) * (g - s["m"]) ** 2 + self.eps_s
        z = g / (np.sqrt(s["v"] / (1 - b2**t)) + self.eps)
        s["u"] = b1 * s["u"] + (1 - b1) * z
        return p - lr * s["u"] / (1 - b1**t)


@dataclass
class DeVAVectorReference(Reference):
    """arXiv 2602.06880, l_inf form, as released: second moment of the momentum, no bias correction."""

    lr: float = 0.02
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    nesterov: bool = False

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        b1, b2 = self.betas
        p = (1 - lr * self.weight_decay) * p
        s["m"] = b1 * s["m"] + (1 - b1) * g
        s["v"] = b2 * s["v"] + (1 - b2) * s["m"] ** 2
        gamma = np.sqrt(s["m"] ** 2 / (s["v"] + 1e-5))
        direction = b1 * s["m"] + (1 - b1) * g if self.nesterov else s["m"]
        return p - lr * gamma * np.sign(direction)


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
    decoupled: bool = False

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        (b1, b2), t = self.betas, self.t
        p, g = decay(p, g, lr, self.weight_decay, self.decoupled)
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


@dataclass
class AdaBeliefReference(Reference):
    """arXiv 2010.07468 as released: eps is added to the variance buffer in every step, so it accumulates."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-16
    weight_decay: float = 0.0
    decoupled: bool = True
    rectify: bool = True
    amsgrad: bool = False

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        (b1, b2), t = self.betas, self.t
        p, g = decay(p, g, lr, self.weight_decay, self.decoupled)
        s["m"] = b1 * s["m"] + (1 - b1) * g
        s["s"] = b2 * s["s"] + (1 - b2) * (g - s["m"]) ** 2 + self.eps
        s["max"] = np.maximum(s["max"], s["s"])
        step = lr / (1 - b1**t) * s["m"]
        if self.rectify:
            # RAdam (arXiv 1908.03265); the release does not use the amsgrad maximum here.
            rho_inf = 2 / (1 - b2) - 1
            rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
            if rho < 5:
                return p - step
            r = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
            return p - r * math.sqrt(1 - b2**t) * step / (np.sqrt(s["s"]) + self.eps)
        variance = s["max"] if self.amsgrad else s["s"]
        return p - step / (np.sqrt(variance) / math.sqrt(1 - b2**t) + self.eps)


@dataclass
class LaPropReference(Reference):
    """arXiv 2002.04839 as released: lr inside the momentum; decay after the step, not multiplied by lr."""

    lr: float = 4e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-15
    weight_decay: float = 0.0
    centered: bool = False

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        (b1, b2), t = self.betas, self.t
        s["v"] = b2 * s["v"] + (1 - b2) * g**2
        s["weight"] = b2 * s["weight"] + (1 - b2)
        s["mean"] = b2 * s["mean"] + (1 - b2) * g
        variance = s["v"] - s["mean"] ** 2 if self.centered and t > 10 else s["v"]
        normalised = g / (np.sqrt(np.maximum(variance, 0) / s["weight"]) + self.eps)
        s["m"] = b1 * s["m"] + (1 - b1) * lr * normalised
        s["lr"] = b1 * s["lr"] + (1 - b1) * lr
        if lr > 0:  # the limit lr -> 0 makes no step; the release would leave the momentum uncorrected there
            p = (1 - self.weight_decay) * (p - lr / s["lr"] * s["m"])
        return p


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
    decoupled: bool = True

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        p, g = decay(p, g, lr, self.weight_decay, self.decoupled)
        return p - lr * positive_negative_momentum(g, s, self.t, self.momentum, self.beta0)


@dataclass
class AdaPNMReference(Reference):
    """arXiv 2103.17182 as released: a maximum before the bias correction, which is that of plain momentum."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    beta0: float = 1.0
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = True
    amsgrad: bool = True

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        (b1, b2), t = self.betas, self.t
        p, g = decay(p, g, lr, self.weight_decay, self.decoupled)
        m = positive_negative_momentum(g, s, t, b1, self.beta0)
        s["v"] = b2 * s["v"] + (1 - b2) * g**2
        s["max"] = np.maximum(s["max"], s["v"])
        v = s["max"] if self.amsgrad else s["v"]
        return p - lr / (1 - b1**t) * m / (np.sqrt(v / (1 - b2**t)) + self.eps)


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
    decoupled: bool = True
    amsgrad: bool = False

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        (b1, b2), t = self.betas, self.t
        p, g = decay(p, g, lr, self.weight_decay, self.decoupled)
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
    decoupled: bool = False

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        b1, b2 = self.betas
        p, g = decay(p, g, lr, self.weight_decay, self.decoupled)
        normalised = g / (np.sqrt(maximum_variance_second_moment(g, s, self.t, self.beta_min, b2)) + self.eps)
        s["m"] = b1 * s["m"] + (1 - b1) * lr * normalised
        s["lr"] = b1 * s["lr"] + (1 - b1) * lr
        return p - lr / s["lr"] * s["m"] if lr > 0 else p  # as LaProp


# HVAdam: inner products over the whole group


@dataclass
class HVAdamReference(Reference):
    """arXiv 2511.20277 as released: an adaptive step, and a step along a hidden vector v."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-16
    gamma: float = 0.0
    weight_decay: float = 0.0
    decoupled: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.start = True  # v has to be (re-)initialised
        self.exp_delta = 0.0  # smoothed cosine between v and the momentum
        self.count = 0

    def step(self, grads: Sequence[np.ndarray], lr: float | None = None) -> None:
        lr = self.lr if lr is None else lr
        super().step(grads, lr)
        self.hidden_step(lr)

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        (b1, b2), t = self.betas, self.t
        p, g = decay(p, g, lr, self.weight_decay, self.decoupled)
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


# Matrix optimizers


def flatten(x: Array) -> Array:
    """A convolution kernel as the matrix (out, rest)."""
    return x.reshape(len(x), -1)


@dataclass
class MuonReference(Reference):
    """Muon of Keller Jordan ("original") and of Moonlight, arXiv 2502.16982."""

    lr: float = 0.02
    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.0
    scale: Literal["original", "moonlight"] = "original"
    orthogonalizer: Orthogonalizer = "kj5"

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        mu = self.momentum
        s["m"] = mu * s["m"] + (1 - mu) * g
        mix = mu * s["m"] + (1 - mu) * g if self.nesterov else s["m"]
        o = orthogonalize(flatten(mix), self.orthogonalizer).reshape(p.shape)
        if self.scale == "original":
            factor = math.sqrt(max(1, p.shape[-2] / p.shape[-1]))
        else:
            factor = 0.2 * math.sqrt(max(p.shape[:2]))
        return (1 - lr * self.weight_decay) * p - lr * factor * o


@dataclass
class NorMuonReference(Reference):
    """arXiv 2510.05491. With nesterov=False and scale="rms" the published algorithm, else the released one.

    The release takes the statistics of kernels along their last axis; this has one for each output channel.
    """

    lr: float = 0.02
    momentum: float = 0.95
    beta2: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.0
    scale: Literal["original", "rms"] = "original"
    orthogonalizer: Orthogonalizer = "kj5"

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        mu = self.momentum
        s["m"] = mu * s["m"] + (1 - mu) * g
        mix = mu * s["m"] + (1 - mu) * g if self.nesterov else s["m"]
        o = orthogonalize(flatten(mix), self.orthogonalizer)
        s["v"] = self.beta2 * s["v"] + (1 - self.beta2) * np.mean(o**2, axis=1, keepdims=True)
        normalised = o / (np.sqrt(s["v"]) + 1e-10)
        if self.scale == "original":
            norm = np.linalg.norm(o) * math.sqrt(max(1, p.shape[-2] / p.shape[-1]))
        else:
            norm = 0.2 * math.sqrt(o.size)
        u = norm / (np.linalg.norm(normalised) + 1e-10) * normalised
        return (1 - lr * self.weight_decay) * p - lr * u.reshape(p.shape)


@dataclass
class AdaMuonReference(Reference):
    """arXiv 2507.11005. With nesterov=False the published algorithm, else the released one."""

    lr: float = 0.02
    momentum: float = 0.95
    eps: float = 1e-8
    nesterov: bool = True
    weight_decay: float = 0.01
    orthogonalizer: Orthogonalizer = "kj5"

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        mu = self.momentum
        s["m"] = mu * s["m"] + (1 - mu) * g
        mix = mu * s["m"] + (1 - mu) * g if self.nesterov else s["m"]
        o = orthogonalize(np.sign(flatten(mix)), self.orthogonalizer)
        s["v"] = mu * s["v"] + (1 - mu) * o**2
        normalised = o / (np.sqrt(s["v"]) + self.eps)
        u = 0.2 * math.sqrt(o.size) / (np.linalg.norm(normalised) + self.eps) * normalised
        return (1 - lr * self.weight_decay) * p - lr * u.reshape(p.shape)


@dataclass
class MuonVSReference(Reference):
    """arXiv 2601.14603, variance-scaled, as released: eps outside of the root."""

    lr: float = 0.02
    momentum: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.01
    orthogonalizer: Orthogonalizer = "kj5"

    def adapted(self, m: Array, variance: Array) -> Array:
        return m / (np.sqrt(variance) + self.eps)

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        beta, t = self.momentum, self.t
        s["v"] = beta * s["v"] + beta * (1 - beta) * (s["m"] - g) ** 2
        s["m"] = beta * s["m"] + (1 - beta) * g
        look_ahead = g + beta / (1 - beta) * s["m"] / (1 - beta**t)
        adapted = self.adapted(look_ahead, s["v"] / (1 - beta**t))
        o = orthogonalize(flatten(adapted), self.orthogonalizer).reshape(p.shape)
        return (1 - lr * self.weight_decay) * p - lr * 0.2 * math.sqrt(max(p.shape[:2])) * o


@dataclass
class MuonNSRReference(MuonVSReference):
    """arXiv 2601.14603, modulated by the noise-to-signal ratio, as released: eps outside of the root."""

    gamma: float = 10.0

    def adapted(self, m: Array, variance: Array) -> Array:
        return m / (np.sqrt(m**2 + self.gamma * variance) + self.eps)


@dataclass
class NAMOReference(Reference):
    """arXiv 2602.17080. With scale=None and nesterov=False the published algorithm, else the released one."""

    lr: float = 0.01
    betas: tuple[float, float] = (0.95, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.1
    nesterov: bool = True
    scale: float | None = 0.2
    orthogonalizer: Orthogonalizer = "kj5"

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
        o = orthogonalize(mix, self.orthogonalizer)
        eta = lr * self.adaptive_scale(g, mix, s)
        if self.scale is None:
            w = w - eta * (o + self.weight_decay * w)
        else:
            w = w * np.maximum(1 - self.weight_decay * np.minimum(eta, 1), 0)
            w = w - np.minimum(eta * self.scale * math.sqrt(max(p.shape[:2])), 1) * o
        return w.reshape(p.shape)


@dataclass
class NAMODReference(NAMOReference):
    """NAMO with one scale for each column, kept near their mean."""

    clamp: float = 0.75

    def norm(self, x: Array) -> Array:
        return np.sqrt(np.sum(x**2, axis=0, keepdims=True))

    def adaptive_scale(self, g: Array, mix: Array, s: State) -> Array:
        d = super().adaptive_scale(g, mix, s)
        return np.clip(d, self.clamp * d.mean(), d.mean() / self.clamp)


def merged_shape(shape: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """SOAP's merge_dims: from the left, join neighbouring axes while their product is at most `limit`."""
    merged = []
    current = 1
    for length in shape:
        if current * length <= limit:
            current *= length
        elif current > 1:
            merged.append(current)
            current = length
        else:
            merged.append(length)
    if current > 1 or not merged:
        merged.append(current)
    return tuple(merged)


@dataclass
class EigenbasisReference(Reference):
    """What SOAP and spectral DeVA share: the bases, the order of the operations, bias correction, decay."""

    lr: float = 3e-3
    betas: tuple[float, float] = (0.95, 0.95)
    shampoo_beta: float | None = None
    eps: float = 1e-8
    weight_decay: float = 0.01
    precondition_frequency: int = 10
    stagger: bool = False  # Released: every basis is refreshed in the same step.
    max_precondition_dim: int = 10000
    correct_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for i, s in enumerate(self.states):
            s["position"] = i

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        b1, b2 = self.betas
        beta = b2 if self.shampoo_beta is None else self.shampoo_beta
        t = self.t - 1  # the first call does not count
        shape = p.shape
        p, g = self.view(p), self.view(g)
        axes = [axis for axis in range(g.ndim) if self.has_basis(shape, g.shape[axis])]

        if t == 0:  # bases only: no step, no decay
            s["L"] = {axis: (1 - beta) * outer_product(g, axis) for axis in axes}
            s["Q"] = [None] * g.ndim
            for axis in axes:
                s["Q"][axis] = np.linalg.eigh(s["L"][axis])[1][:, ::-1]  # largest eigenvalue first
            return p.reshape(shape)

        g_rotated = rotate(g, s["Q"])
        s["m"] = b1 * s["m"] + (1 - b1) * g_rotated  # lives in the rotated basis
        u = rotate_back(self.direction(g_rotated, s), s["Q"])
        correction = math.sqrt(1 - b2**t) / (1 - b1**t) if self.correct_bias else 1.0
        p = p - lr * correction * u
        p = p - lr * self.weight_decay * p

        for axis in axes:
            s["L"][axis] = beta * s["L"][axis] + (1 - beta) * outer_product(g, axis)
        if (t + (s["position"] if self.stagger else 0)) % self.precondition_frequency == 0:
            m = rotate_back(s["m"], s["Q"])
            for axis in axes:
                left, q = s["L"][axis], s["Q"][axis]
                order = np.argsort(-np.diag(q.T @ left @ q), kind="stable")
                moment = self.second_moment(axis)
                s[moment] = np.take(s[moment], order, axis)  # follows the order of the basis, is not rotated
                s["Q"][axis] = np.linalg.qr(left @ q[:, order])[0]
            s["m"] = rotate(m, s["Q"])
        return p.reshape(shape)

    def view(self, x: Array) -> Array:
        """The tensor whose axes get a basis."""
        return x

    def has_basis(self, shape: tuple[int, ...], length: int) -> bool:
        """Whether an axis of that length of a parameter of that shape gets a basis."""
        return length <= self.max_precondition_dim

    def direction(self, g: Array, s: State) -> Array:
        """The update before lr, in the rotated basis; s["m"] is up to date."""
        raise NotImplementedError

    def second_moment(self, axis: int) -> str:
        """The entry of the state that holds the second moment along the axis."""
        return "v"


@dataclass
class SOAPReference(EigenbasisReference):
    """arXiv 2409.11321 as released: Adam in the eigenbasis of Shampoo's preconditioner."""

    merge_dims: bool = False
    precondition_1d: bool = False

    def view(self, x: Array) -> Array:
        return x.reshape(merged_shape(x.shape, self.max_precondition_dim)) if self.merge_dims else x

    def has_basis(self, shape: tuple[int, ...], length: int) -> bool:
        return super().has_basis(shape, length) and (len(shape) > 1 or self.precondition_1d)

    def direction(self, g: Array, s: State) -> Array:
        b2 = self.betas[1]
        s["v"] = b2 * s["v"] + (1 - b2) * g**2
        return s["m"] / (np.sqrt(s["v"]) + self.eps)


@dataclass
class DeVAReference(EigenbasisReference):
    """arXiv 2602.06880, S_inf form and its three relatives in the release."""

    nesterov: bool = True
    form: Literal["momentum", "sign", "instantaneous", "efficient"] = "momentum"
    orthogonalizer: Orthogonalizer = "kj5"  # with the release's extra normalisation

    def view(self, x: Array) -> Array:
        return flatten(x)

    def direction(self, g: Array, s: State) -> Array:
        b1, b2 = self.betas
        m = s["m"]
        if self.form == "efficient":
            s["rows"] = b2 * s["rows"] + (1 - b2) * np.sum(g**2, axis=1, keepdims=True)
            s["columns"] = b2 * s["columns"] + (1 - b2) * np.sum(g**2, axis=0, keepdims=True)
            row = np.linalg.norm(m, axis=1, keepdims=True) / np.sqrt(s["rows"] + self.eps)
            column = np.linalg.norm(m, axis=0, keepdims=True) / np.sqrt(s["columns"] + self.eps)
            gamma = np.sqrt(row) * np.sqrt(column)
        else:
            x = g if self.form == "instantaneous" else m
            rc = np.linalg.norm(x, axis=1, keepdims=True) * np.linalg.norm(x, axis=0, keepdims=True)
            s["v"] = b2 * s["v"] + (1 - b2) * rc
            gamma = np.sqrt(rc / (s["v"] + self.eps))
        mix = b1 * m + (1 - b1) * g if self.nesterov else m
        if self.form in ("sign", "efficient"):
            mix = np.sign(mix)
        o = orthogonalize(mix, self.orthogonalizer, extra_normalisation=True)
        return 0.2 * math.sqrt(max(g.shape)) * o * gamma

    def second_moment(self, axis: int) -> str:
        return ("rows", "columns")[axis] if self.form == "efficient" else "v"


REFERENCES: dict[str, type] = {
    "AdamW": AdamWReference,
    "MVNGrad": MVNGradReference,
    "DeVAVector": DeVAVectorReference,
    "Anon": AnonReference,
    "AdaBelief": AdaBeliefReference,
    "LaProp": LaPropReference,
    "PNM": PNMReference,
    "AdaPNM": AdaPNMReference,
    "MAdam": MAdamReference,
    "LaMAdam": LaMAdamReference,
    "HVAdam": HVAdamReference,
    "Muon": MuonReference,
    "NorMuon": NorMuonReference,
    "AdaMuon": AdaMuonReference,
    "MuonVS": MuonVSReference,
    "MuonNSR": MuonNSRReference,
    "NAMO": NAMOReference,
    "NAMOD": NAMODReference,
    "SOAP": SOAPReference,
    "DeVA": DeVAReference,
}
