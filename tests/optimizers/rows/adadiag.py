"""AdaDiag and AdaDiag++."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from hypothesis import strategies as st

from ..references import Array, Reference, State, flatten, rotate, rotate_back
from ..row import Hyper, Row, take


def singular_bases(g: Array) -> tuple[Array, Array, Array]:
    """Full bases P and Q of the SVD of a matrix with the largest entry of each left vector positive, and P^T G Q."""
    p, sigma, qt = np.linalg.svd(g, full_matrices=False)
    sigma = np.where(sigma > max(g.shape) * np.finfo(np.float64).eps * sigma.max(initial=0), sigma, 0)
    signs = np.sign(p[np.abs(p).argmax(0), np.arange(p.shape[1])])
    middle = np.zeros(g.shape)
    np.fill_diagonal(middle, sigma)
    return complete(p * signs, sigma), complete(qt.T * signs, sigma), middle


def complete(x: Array, sigma: Array) -> Array:
    """The columns of nonzero singular values, and eigenvectors of a falling diagonal matrix on the space they leave."""
    known = x[:, sigma > 0]
    d, r = known.shape
    rest = np.eye(d) - known @ known.T
    q = np.linalg.eigh(rest @ np.diag(np.linspace(2, 1, d)) @ rest)[1][:, ::-1][:, : d - r]
    return np.hstack([known, q * np.sign(q[np.abs(q).argmax(0), np.arange(d - r)])])


@dataclass
class AdaDiagReference(Reference):
    """arXiv 2502.07488: Adam in the singular basis of the shorter side of a gradient."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    precondition_frequency: int = 200
    stagger: bool = True

    both: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for i, s in enumerate(self.states):
            s["position"] = i

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        (b1, b2), t = self.betas, self.t
        g = flatten(g)
        if t == 1 or (t - 1 + (s["position"] if self.stagger else 0)) % self.precondition_frequency == 0:
            left, right, rotated = singular_bases(g)
            left_only = not self.both and g.shape[0] <= g.shape[1]
            right_only = not self.both and not left_only
            s["Q"] = [None if right_only else left, None if left_only else right]
            # P^T G = Sigma Q^T: as a product, in which rounding leaves nothing where there is nothing.
            rotated = rotated @ right.T if left_only else left @ rotated if right_only else rotated
        else:
            rotated = rotate(g, s["Q"])
        s["m"] = b1 * s["m"] + (1 - b1) * rotated
        s["v"] = b2 * s["v"] + (1 - b2) * rotated**2
        u = s["m"] / (1 - b1**t) / (np.sqrt(s["v"] / (1 - b2**t)) + self.eps)
        return p - lr * self.weight_decay * p - lr * rotate_back(u, s["Q"]).reshape(p.shape)


@dataclass
class AdaDiagPPReference(AdaDiagReference):
    """The same with both bases."""

    both: ClassVar[bool] = True


def golden(hp: Hyper, variant: str) -> Hyper:
    return take(hp, "lr", "betas", "eps", "weight_decay", precondition_frequency="T") | {"stagger": False}


PERIODS = {"precondition_frequency": st.sampled_from([2, 3, 200])}

ROWS = [
    Row(
        name,
        reference,
        [{"precondition_frequency": 2}, {"precondition_frequency": 3, "stagger": False, "weight_decay": 0.1}],
        golden={file: golden},
        trajectory=PERIODS,
        fuzz=PERIODS,
        amplifies={"bases"},
    )
    for name, reference, file in (
        ("AdaDiag", AdaDiagReference, "adadiag"),
        ("AdaDiagPP", AdaDiagPPReference, "adadiag_pp"),
    )
]
