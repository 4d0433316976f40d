"""Tensors that released code treats otherwise than the optimizers here, on purpose: one table.

The golden trajectories of such tensors are compared with the released formula instead, so that nothing else hides
behind a difference; docstrings and ``docs/optimizers.md`` say each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .references import Array, Reference, State
from .rows.adamuon import AdaMuonReference
from .rows.muon import MuonReference
from .rows.normuon import NorMuonReference


@dataclass(frozen=True)
class Difference:
    """One kind of tensors of some optimizers.

    Args:
        optimizers: The optimizers.
        tensors: Which tensors.
        released: What released code does with them.
        here: What happens here.
        differs: Whether an optimizer with some arguments treats a parameter of some shape otherwise. Never, where the
            difference is in what the optimizer is given, rather than in what it does with it.
        formulas: The released formulas, by optimizer.
    """

    optimizers: Sequence[str]
    tensors: str
    released: str
    here: str
    differs: Callable[[tuple[int, ...], Mapping[str, Any]], bool] = lambda shape, arguments: False
    formulas: Mapping[str, type[Reference]] | None = None

    def row(self) -> str:
        """Its line in the documentation."""
        names = ", ".join(f"`{name}`" for name in self.optimizers)
        return f"| {names} | {self.tensors} | {self.released} | {self.here} |"


def slices(x: Array) -> Array:
    """A tensor as a stack of matrices over its last two axes."""
    return x.reshape(-1, *x.shape[-2:])


def factor(self: Reference, x: Array) -> Array:
    """Kernels of four axes are orthogonalised as matrices (out, rest), tensors of three axes as stacks of matrices."""
    if x.ndim == 4:
        return self.orthogonalize(x.reshape(len(x), -1)).reshape(x.shape)
    return np.stack([self.orthogonalize(part) for part in slices(x)]).reshape(x.shape)


def look_ahead(self: Any, g: Array, s: State) -> Array:
    """The momentum that is orthogonalised."""
    mu = self.momentum
    s["m"] = mu * s["m"] + (1 - mu) * g
    return mu * s["m"] + (1 - mu) * g if self.nesterov else s["m"]


@dataclass
class ReleasedMuon(MuonReference):
    """github.com/KellerJordan/Muon."""

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        o = factor(self, look_ahead(self, g, s))
        return (1 - lr * self.weight_decay) * p - lr * math.sqrt(max(1, p.shape[-2] / p.shape[-1])) * o


@dataclass
class ReleasedAdaMuon(AdaMuonReference):
    """github.com/Chongjie-Si/AdaMuon: the norm of an update is that of its shortest and longest axis."""

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        mu = self.momentum
        o = factor(self, np.sign(look_ahead(self, g, s)))
        s["v"] = mu * s["v"] + (1 - mu) * o**2
        normalised = o / (np.sqrt(s["v"]) + self.eps)
        norm = 0.2 * math.sqrt(min(p.shape) * max(p.shape))
        return (1 - lr * self.weight_decay) * p - lr * norm / (np.linalg.norm(normalised) + self.eps) * normalised


@dataclass
class ReleasedNorMuon(NorMuonReference):
    """github.com/zichongli5/NorMuon: rows and norms of the matrices over the last two axes."""

    def update(self, p: Array, g: Array, s: State, lr: float) -> Array:
        o = slices(factor(self, look_ahead(self, g, s)))
        s["v"] = self.beta2 * s["v"] + (1 - self.beta2) * np.mean(o**2, axis=-1, keepdims=True)
        normalised = o / (np.sqrt(s["v"]) + 1e-10)
        norms, before = (np.linalg.norm(x, axis=(-2, -1), keepdims=True) for x in (normalised, o))
        u = before / (norms + 1e-10) * normalised * math.sqrt(max(1, p.shape[-2] / p.shape[-1]))
        return (1 - lr * self.weight_decay) * p - lr * u.reshape(p.shape)


DIFFERENCES = (
    Difference(
        ("AdaMuon",),
        "convolution kernels of four axes",
        "updates have the norm 0.2 sqrt(shortest x longest axis)",
        "0.2 sqrt(m n) of the matrix (m, n), 13.9 times as much for 64 x 64 x 3 x 3: the RMS of all other matrices",
        lambda shape, arguments: len(shape) == 4,
        {"AdaMuon": ReleasedAdaMuon},
    ),
    Difference(
        ("NorMuon",),
        "convolution kernels of four axes",
        "a mean square for each row of each k x k slice, and a norm for each slice",
        "one mean square for each output channel, and one norm",
        lambda shape, arguments: len(shape) == 4 and arguments.get("scale", "original") == "original",
        {"NorMuon": ReleasedNorMuon},
    ),
    Difference(
        ("Muon", "AdaMuon", "NorMuon"),
        "kernels of three axes (1-d convolutions)",
        "a stack of matrices (in, k), one for each output channel, which are orthogonalised by themselves",
        "one matrix (out, in * k), as of kernels with four axes",
        lambda shape, arguments: len(shape) == 3 and arguments.get("scale", "original") == "original",
        {"Muon": ReleasedMuon, "AdaMuon": ReleasedAdaMuon, "NorMuon": ReleasedNorMuon},
    ),
    Difference(
        ("Muon", "AdaMuon", "NorMuon", "NAMO", "NAMOD", "MuonVS", "MuonNSR", "SOAP", "DeVA"),
        "packed projections (q, k, v), gates, experts, grouped and transposed convolutions",
        "one matrix, as the parameter is stored",
        "each projection, gate, expert or group is a tensor (out, in, ...) of its own; `blocks=1, transposed=False` in "
        "a parameter group is the release",
    ),
    Difference(
        ("SOAP", "AdaGram"),
        "vectors, embeddings and heads",
        "trained by the same rule (SOAP: as Adam, without bases)",
        'trained by the fallback rule; with `role="matrix"` vectors get the released treatment',
    ),
    Difference(
        ("NAMO", "NAMOD"),
        "parameters that are no matrices",
        "AdamW with the learning rate of matrices, and with eps added to the root before its bias is corrected",
        "the fallback rule with its own learning rate, and AdamW as in torch",
    ),
)


def difference(optimizer: str, shape: Sequence[int], arguments: Mapping[str, Any]) -> Difference | None:
    """The entry of the table for a parameter, if there is one."""
    found = [x for x in DIFFERENCES if optimizer in x.optimizers and x.differs(tuple(shape), arguments)]
    return found[0] if found else None
