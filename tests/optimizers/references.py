"""Plain float64 references of the optimizers, written from the published equations.

Slow and simple on purpose, to be read next to the paper: numpy only, one update per class, every buffer an
entry of `s` (the state of one tensor) that starts at zero. `t` counts steps from 1. All tensors form one
parameter group and all of them get the main rule. Where a released code and its paper differ, a docstring or
comment says which of the two this is. Arguments have the names and defaults of the optimizers under test.

What several need is here; the reference of an optimizer stands in its file in `rows`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lightning_optim.polar import METHODS

Array = NDArray[np.float64]
State = defaultdict[Any, Any]


# Linear algebra

Coefficients = Sequence[tuple[float, float, float]]
KELLER_JORDAN: Coefficients = [(3.4445, -4.7750, 2.0315)] * 5
NORM_FLOOR = 1e-7  #: As released; what is added to the norm of a matrix.


def polar_factor(x: Array) -> Array:
    """U V^T of the SVD, without the directions that are zero up to rounding; a zero matrix gives zero."""
    u, sigma, vt = np.linalg.svd(x, full_matrices=False)
    keep = sigma > max(x.shape) * np.finfo(np.float64).eps * sigma.max()
    return u[:, keep] @ vt[keep]


def newton_schulz(x: Array, coefficients: Coefficients = KELLER_JORDAN, extra_normalisation: bool = False) -> Array:
    """A quintic iteration, an approximate polar factor: Keller Jordan's, or another with other coefficients.

    `extra_normalisation` also divides by ||(X X^T)^2||_F^(1/4) in the first iteration, as DeVA's release
    does: a tighter bound of the largest singular value than the Frobenius norm.
    """
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.T, coefficients, extra_normalisation).T
    x = x / (np.linalg.norm(x) + NORM_FLOOR)
    for i, (a, b, c) in enumerate(coefficients):
        if extra_normalisation and i == 0:
            x = x / (np.sum((x @ x.T @ x @ x.T) ** 2) + 1e-20) ** 0.125
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def orthogonalize(x: Array, method: str) -> Array:
    """The polar factor of a matrix: "exact", "kj5", "kj5-schatten" with the extra normalisation, or "pe8"."""
    if method == "exact":
        return polar_factor(x)
    if method == "pe8":  # Its coefficients are the result of an optimisation, which has tests of its own.
        return newton_schulz(x, METHODS[method].coefficients)
    return newton_schulz(x, extra_normalisation={"kj5": False, "kj5-schatten": True}[method])


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
    """Counts steps and calls `update` for every tensor.

    `update` has the form of weight decay that is its optimizer's default, with the coefficient `weight_decay`. All
    other forms are here, from one step without weight decay. So are `cautious` and `norm_control`, which take a step
    apart: into what it makes of the parameter, and how far it goes.
    """

    params: list[np.ndarray]
    lr: float
    decay: str = field(default="decoupled", kw_only=True)
    cautious: bool = field(default=False, kw_only=True)
    norm_control: str = field(default="none", kw_only=True)
    lr_max: float | None = field(default=None, kw_only=True)  #: The highest rate of a schedule.

    decays_afterwards: ClassVar[bool] = False  #: Whether weight decay comes after the step.
    own_decay: ClassVar[bool] = False  #: Whether `update` has all forms but the coupled one, by `rate`.

    def __post_init__(self) -> None:
        self.params = [np.array(p, dtype=np.float64) for p in self.params]
        self.states: list[State] = [defaultdict(float) for _ in self.params]
        self.t = 0

    def step(self, grads: Sequence[np.ndarray], lr: float | None = None) -> None:
        """One step; `lr` is the schedule's value for this step, the constructor's otherwise."""
        self.t += 1
        lr = self.lr if lr is None else lr
        grads = [np.asarray(g, np.float64) for g in grads]
        if self.cautious or self.norm_control != "none":
            self.adjusted_step(grads, lr)
        else:
            self.plain_step(grads, lr)

    def adjusted_step(self, grads: Sequence[Array], lr: float) -> None:
        """A step that goes by signs of the gradient, or by norms."""
        before, weight_decay = self.params, getattr(self, "weight_decay", 0.0)
        if self.decay == "coupled":
            grads = [g + weight_decay * p for g, p in zip(grads, before)]
            vars(self)["weight_decay"] = 0.0
        other = deepcopy(self)
        other.plain_step(grads, lr)
        self.params = [np.zeros_like(p) for p in before]
        self.plain_step(grads, lr)
        steps, self.params = self.params, []
        for p, g, there, step in zip(before, grads, other.params, steps):
            mask = step * g < 0 if self.cautious else np.ones_like(step, bool)
            base = there - step  # With weight decay.
            if self.decay == "cautious":
                base = self.decayed(p, step * mask, self.rate(lr)) - step * mask
            grown = step.size / (mask.sum() + 1) if self.cautious else 1.0
            self.params.append(self.controlled(p, base, step * mask * grown, lr))
        if self.decay == "coupled":
            vars(self)["weight_decay"] = weight_decay

    def controlled(self, p: Array, base: Array, step: Array, lr: float) -> Array:
        """Where a step leads from `base`, which is `p` with weight decay."""
        if self.norm_control == "none" or p.ndim < 2:
            return base + step
        if self.norm_control == "hyperball":
            radius, length = np.linalg.norm(p), np.linalg.norm(step)
            moved = p + lr * radius * step / length if length else p
            return moved * radius / np.linalg.norm(moved)
        moved = base + step
        growth = np.linalg.norm(moved) - np.linalg.norm(base)
        return moved * (np.linalg.norm(base) + growth * (0.5 if growth > 0 else 1)) / np.linalg.norm(moved)

    def plain_step(self, grads: Sequence[Array], lr: float) -> None:
        """A step with any form of weight decay."""
        weight_decay = getattr(self, "weight_decay", 0.0)
        if not weight_decay or (self.decay != "coupled" and (self.own_decay or self.decay == type(self).decay)):
            self.move(grads, lr)
            return
        before, rate = self.params, self.rate(lr)
        self.weight_decay = 0.0
        if self.decay == "coupled":
            self.move([g + weight_decay * p for g, p in zip(grads, before)], lr)
        else:
            self.params = [np.zeros_like(p) for p in before]
            self.move(grads, lr)
            self.params = [self.decayed(p, moved, rate) for p, moved in zip(before, self.params)]
        self.weight_decay = weight_decay

    def move(self, grads: Sequence[Array], lr: float) -> None:
        """One step of all tensors."""
        for i, g in enumerate(grads):
            self.params[i] = self.update(self.params[i], g, self.states[i], lr)

    def rate(self, lr: float) -> float:
        """What weight decay takes of every element."""
        weight_decay = vars(self)["weight_decay"]
        if self.decay == "independent":
            return weight_decay if lr else 0.0
        if self.decay == "corrected" and self.lr_max:
            return lr * weight_decay * lr / self.lr_max
        return lr * weight_decay

    def decayed(self, p: Array, step: Array, rate: float) -> Array:
        """A tensor after a step, with weight decay."""
        if self.decay == "cautious":
            return p - rate * np.where(p * step <= 0, p, 0) + step  # The update is the negative step.
        return (1 - rate) * (p + step) if self.decays_afterwards else (1 - rate) * p + step

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        """The new parameter, from the parameter, its gradient and its state."""
        raise NotImplementedError

    def orthogonalize(self, x: Array) -> Array:
        """The polar factor of a matrix, by the method of the argument `orthogonalizer`."""
        return orthogonalize(x, vars(self)["orthogonalizer"])


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


# Matrix optimizers


def flatten(x: Array) -> Array:
    """A convolution kernel as the matrix (out, rest)."""
    return x.reshape(len(x), -1)


@dataclass
class EigenbasisReference(Reference):
    """What SOAP and spectral DeVA share: the bases, the order of the operations, bias correction, decay."""

    lr: float = 3e-3
    betas: tuple[float, float] = (0.95, 0.95)
    shampoo_beta: float | None = None
    eps: float = 1e-8
    weight_decay: float = 0.01
    precondition_frequency: int = 10
    stagger: bool = True  # Released: False, every basis is refreshed in the same step.
    max_precondition_dim: int = 10000
    correct_bias: bool = True
    decays_afterwards: ClassVar[bool] = True

    def decayed(self, p: Array, step: Array, rate: float) -> Array:
        return super().decayed(p, step, rate if self.t > 1 else 0.0)  # The first call moves nothing.

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
