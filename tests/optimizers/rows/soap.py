"""SOAP."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from ..references import Array, EigenbasisReference, State
from ..row import EIGENBASIS_FUZZ, EIGENBASIS_TRAJECTORY, Hyper, Row, eigenbasis_golden, leave_out, take


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


def golden(hp: Hyper, variant: str) -> Hyper:
    leave_out(hp, "used by no experiment", normalize_grads=False)
    return eigenbasis_golden(hp) | take(hp, "merge_dims", "precondition_1d")


ROWS = [
    Row(
        "SOAP",
        SOAPReference,
        [
            {"precondition_frequency": 2},
            {"precondition_frequency": 3, "merge_dims": True, "correct_bias": False, "max_precondition_dim": 12},
            {"precondition_1d": True, "shampoo_beta": 0.8, "fallback": "MVNGrad"},
        ],
        golden={"soap": golden},
        # The first outer product of a vector is singular.
        trajectory=EIGENBASIS_TRAJECTORY | {"precondition_1d": st.just(False), "merge_dims": st.just(False)},
        fuzz=EIGENBASIS_FUZZ,
        amplifies={"bases"},
    )
]
