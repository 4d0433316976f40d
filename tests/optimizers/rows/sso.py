"""SSO and MuonSphere."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from ..references import Array, Reference, State, flatten
from ..row import Hyper, Row, take


def largest_singular(w: Array, iterations: int) -> tuple[float, Array, Array]:
    """Power iteration from a vector of ones; zeros for a matrix of zeros."""
    scale = np.abs(w).max(initial=0)
    if scale <= 1e-30:
        return 0.0, np.zeros(len(w)), np.zeros(w.shape[1])
    w = w / scale
    v = np.ones(w.shape[1]) / math.sqrt(w.shape[1])
    for _ in range(iterations):
        u = w @ v
        u /= np.linalg.norm(u) or 1
        v = w.T @ u
        v /= np.linalg.norm(v) or 1
    return scale * float(u @ w @ v), u, v


@dataclass
class SSOReference(Reference):
    """arXiv 2601.08393; the order and the search are those of the released file."""

    lr: float = 5e-3
    momentum: float = 0.9
    nesterov: bool = True
    radius: float = 1.0
    tangent: bool = True
    power_iterations: int = 20
    tolerance: float = 1e-6
    max_tries: int = 31
    orthogonalizer: str = "pe8"

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        w, g, mu = flatten(p), flatten(g), self.momentum
        r = self.radius * math.sqrt(w.shape[0] / w.shape[1])
        s["m"] = mu * s["m"] + (1 - mu) * g
        m = (1 - mu) * g + mu * s["m"] if self.nesterov else s["m"]
        sigma, u, v = largest_singular(w, self.power_iterations)
        if sigma and lr:
            w = w * (r / sigma)
        phi = self.along_the_sphere(m, np.outer(u, v), s) if self.tangent else self.orthogonalize(m)
        return (w - lr * r * phi).reshape(p.shape)

    def along_the_sphere(self, m: Array, theta: Array, s: State) -> Array:
        """A bracket by doubling from the multiplier before, then bisection; the best that is met."""
        norm = np.linalg.norm(m)
        if norm <= 1e-30 or np.linalg.norm(m - np.sum(m * theta) * theta) <= 1e-5 * norm:
            s["lam"] = 0.0
            return np.zeros_like(m)  # The only way is along theta.
        tries: list[tuple[float, Array, float]] = []

        def product(lam: float) -> float:
            o = self.orthogonalize(m / norm + lam * theta)
            h = float(np.sum(theta * o))
            # Of two sides of a jump that are equal but for rounding, the first one stays.
            best = tries[-1][0] if tries else math.inf
            if abs(h) < (0.99 if h * best < 0 else 1) * abs(best) and abs(best) > self.tolerance:
                tries.append((h, o, lam))
            return h

        left = self.max_tries
        below, above = -math.inf, math.inf
        lam, step = float(s["lam"]), 1e-3
        while left and (not tries or abs(tries[-1][0]) > self.tolerance) and lam not in (below, above):
            left -= 1
            if product(lam) < 0:
                below = lam
            else:
                above = lam
            if math.isfinite(below) and math.isfinite(above):
                lam = (below + above) / 2
            else:
                lam = below + step if math.isfinite(below) else above - step
                step *= 2
        _, phi, s["lam"] = tries[-1]
        return phi


#: The product with a factor far from orthogonal, as kj5's, has no root to be found.
METHODS = st.sampled_from(["exact", "pe8"])


def golden(hp: Hyper, variant: str) -> Hyper:
    hp.pop("eps")  # Beside norms: below rounding.
    hp.pop("weight_decay")  # The retraction undoes it.
    names = take(hp, "lr", "momentum", "nesterov", radius="radius_scaler", power_iterations="power_iter_steps")
    names |= take(hp, tolerance="solver_tol") | {"max_tries": 11 + hp.pop("solver_max_iter")}
    return names | {"tangent": "muonsphere" not in variant, "orthogonalizer": f"pe{hp.pop('msign_steps')}"}


ROWS = [
    Row(
        "SSO",
        SSOReference,
        [{}, {"tangent": False, "radius": 2.0}, {"nesterov": False, "power_iterations": 5}],
        golden={"sso": golden},
        trajectory={
            "max_tries": st.just(60),
            "tolerance": st.just(1e-11),
            "power_iterations": st.sampled_from([5, 20]),
            "orthogonalizer": METHODS,
        },
        fuzz={"power_iterations": st.sampled_from([1, 5, 20]), "orthogonalizer": METHODS},
    )
]
