"""AdaGram."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from ..references import Array, Reference, State
from ..row import Hyper, Row, leave_out, take


@dataclass
class AdaGramReference(Reference):
    """arXiv 2508.21106, the released AdagramPS: factors U S V^T, and an SVD before the first projection."""

    lr: float = 0.1
    eps: float = 1e-2
    max_rank: int | None = 5
    weight_decay: float = 0.0

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        n = g.size
        rank = n if self.max_rank is None else min(self.max_rank, n)
        x = g.reshape(-1)
        left, right = s["P"], s["Q"]
        if not isinstance(left, np.ndarray):
            left = right = np.zeros((n, 0))
        bar = (x - left @ (right.T @ x)) / math.sqrt(self.eps)
        sigma = float(bar @ bar)
        # alpha = (sqrt(1 + sigma) - 1) / sigma and beta = alpha / (1 + alpha sigma), without their cancellation
        beta = 1 / (math.sqrt(1 + sigma) + 1) / math.sqrt(1 + sigma)
        new = (1 - lr * self.weight_decay) * p - lr * (bar / math.sqrt(1 + sigma)).reshape(p.shape)
        other = bar - right @ (left.T @ bar)
        if left.shape[1] < rank:
            s["P"], s["Q"] = np.column_stack([left, beta * bar]), np.column_stack([right, other])
            return new
        u, values, vt = np.linalg.svd(left @ right.T)
        u, core, v = u[:, :rank], np.diag(values[:rank]), vt[:rank].T
        increment = beta * np.outer(bar, other)
        u1, s1 = np.linalg.qr(u @ core + increment @ v)
        s2 = s1 - u1.T @ increment @ v
        v1, s3 = np.linalg.qr(v @ s2.T + increment.T @ u1)
        s["P"], s["Q"] = u1 @ s3.T, v1
        return new


def golden(hp: Hyper, variant: str) -> Hyper:
    leave_out(hp, "an extra of the release, off by default", alpha=None)
    return take(hp, "lr", "eps", "max_rank")


RANKS = {"max_rank": st.sampled_from([None, 1, 2, 5])}

ROWS = [
    Row(
        "AdaGram",
        AdaGramReference,
        [{}, {"max_rank": 1, "weight_decay": 0.1}, {"max_rank": None}],
        golden={"adagram": golden},
        lr=0.1,
        trajectory=RANKS | {"eps": st.sampled_from([0.01, 0.5])},
        fuzz=RANKS,
        amplifies={"cancellation"},
    )
]
