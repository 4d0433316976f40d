"""DeVA."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from hypothesis import strategies as st

from ..references import Array, EigenbasisReference, State, flatten
from ..row import EIGENBASIS_FUZZ, EIGENBASIS_TRAJECTORY, Hyper, Row, eigenbasis_golden, leave_out, take


@dataclass
class DeVAReference(EigenbasisReference):
    """arXiv 2602.06880, S_inf form and its three relatives in the release."""

    nesterov: bool = True
    form: Literal["momentum", "sign", "instantaneous", "efficient"] = "momentum"
    orthogonalizer: str = "kj5-schatten"

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
        o = self.orthogonalize(mix)
        return 0.2 * math.sqrt(max(g.shape)) * o * gamma

    def second_moment(self, axis: int) -> str:
        return ("rows", "columns")[axis] if self.form == "efficient" else "v"


def golden(form: str) -> Callable[[Hyper, str], Hyper]:
    def adapter(hp: Hyper, variant: str) -> Hyper:
        leave_out(hp, "inherited from SOAP's file, used by no experiment", normalize_grads=False)
        leave_out(hp, "the released class takes matrices only, which have nothing to merge", merge_dims=False)
        hp.pop("precondition_1d", None)  # The released class takes matrices only.
        hp.pop("variance_adaption", None)  # Never read by the released class.
        return eigenbasis_golden(hp) | take(hp, "nesterov") | {"form": form, "orthogonalizer": "kj5-schatten"}

    return adapter


#: The signs of the other two turn rounding errors into jumps; the golden cases hold them.
form = st.sampled_from(["momentum", "instantaneous"])
ROWS = [
    Row(
        "DeVA",
        DeVAReference,
        [
            {"precondition_frequency": 2},
            *({"form": form, "precondition_frequency": 2} for form in ("sign", "instantaneous", "efficient")),
            {"max_precondition_dim": 5, "weight_decay": 0.1},
        ],
        golden={
            f"deva_sinf{suffix}": golden(form)
            for suffix, form in {"": "momentum", "_sign": "sign", "_efficient": "efficient"}.items()
        },
        lr=0.02,
        trajectory=EIGENBASIS_TRAJECTORY | {"form": form},
        fuzz=EIGENBASIS_FUZZ | {"form": form},
        amplifies={"bases"},
    )
]
