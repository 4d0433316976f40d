"""Leon."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from ..references import Array, Reference, State, flatten
from ..row import Row


@dataclass
class LeonReference(Reference):
    """arXiv 2602.08232, the map of its linear losses, of gradients that are multiplied by powers of the momentum."""

    lr: float = 0.02
    momentum: float = 0.95
    gamma: float = 1e-8
    weight_decay: float = 0.0

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        x = flatten(g)
        x = x if x.shape[0] <= x.shape[1] else x.T
        s["S"] = self.momentum * s["S"] + x
        # L: all gradients side by side. The squared singular values of [S, L] are the eigenvalues of S S^T + L L^T.
        s["L"] = np.hstack([self.momentum * s["L"], x]) if isinstance(s["L"], np.ndarray) else x
        u, sigma, _ = np.linalg.svd(np.hstack([s["S"], s["L"]]), full_matrices=False)
        known = np.finfo(np.float64).eps * sigma.max(initial=0) ** 2
        update = (u / np.sqrt(np.maximum(sigma**2, known) + self.gamma**2)) @ u.T @ s["S"]
        update = update if flatten(g).shape[0] <= flatten(g).shape[1] else update.T
        return (1 - lr * self.weight_decay) * p - lr * update.reshape(p.shape)


ROWS = [
    Row(
        "Leon",
        LeonReference,
        [{}, {"momentum": 0.0, "weight_decay": 0.1}, {"gamma": 1.0}],
        golden="no code was released, and the paper's discounting and constants are not known",
        lr=0.02,
        amplifies={"mixing"},
        trajectory={"gamma": st.sampled_from([1e-8, 0.1, 1.0])},
    )
]
