"""Every optimizer by name. CLI choices, the README's table, docs and shared tests are derived from here."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..engine.optimizer import RuleOptimizer
from ..engine.rule import Internal, gradient_to_variance
from .adabelief import AdaBelief
from .adamuon import AdaMuon
from .anon import Anon
from .deva import DeVA
from .deva_vector import DeVAVector
from .hvadam import HVAdam
from .laprop import LaProp
from .madam import LaMAdam, MAdam
from .muon import Muon
from .muon_vs import MuonNSR, MuonVS
from .mvn_grad import MVNGrad
from .namo import NAMO, NAMOD
from .normuon import NorMuon
from .pnm import PNM, AdaPNM
from .soap import SOAP


@dataclass(frozen=True)
class OptimizerInfo:
    """What there is to know about an optimizer without building it.

    Args:
        cls: The class.
        description: One line.
        paper: Where it was published.
    """

    cls: type[torch.optim.Optimizer]
    description: str
    paper: str

    @property
    def name(self) -> str:
        """The name it is asked for by, the class's own."""
        return self.cls.__name__

    @property
    def kind(self) -> str:
        """``"element-wise"``, ``"matrix"`` or ``"group"``, by what one update has to see."""
        return self.cls.rules[0].kind if issubclass(self.cls, RuleOptimizer) else "element-wise"

    @property
    def internals(self) -> Mapping[str, Internal]:
        """Scalars of its own that are worth watching, by name.

        >>> {name: internal.description for name, internal in OPTIMIZERS["Anon"].internals.items()}["refreshes"]
        'number of refreshes of the scale so far'
        """
        if issubclass(self.cls, RuleOptimizer):
            return self.cls.rules[0].internals
        return _TORCH_INTERNALS if issubclass(self.cls, torch.optim.Adam) else {}

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Hyperparameters and their defaults."""
        if issubclass(self.cls, RuleOptimizer):
            return self.cls.default_hyperparameters()
        parameters = inspect.signature(self.cls).parameters
        return {name: p.default for name, p in parameters.items() if name in _TORCH_HYPERPARAMETERS}


_TORCH_HYPERPARAMETERS = (
    "lr",
    "momentum",
    "dampening",
    "betas",
    "eps",
    "weight_decay",
    "nesterov",
    "amsgrad",
)

_TORCH_INTERNALS = {"gradient_to_variance": gradient_to_variance("exp_avg_sq")}


def internals_of(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> Mapping[str, Internal]:
    """The scalars worth watching of the rule that runs on a parameter group; none if the optimizer is unknown."""
    if isinstance(optimizer, RuleOptimizer):
        return optimizer.rule(group).internals
    return _TORCH_INTERNALS if isinstance(optimizer, torch.optim.Adam) else {}


OPTIMIZERS: dict[str, OptimizerInfo] = {
    info.name: info
    for info in (
        OptimizerInfo(MVNGrad, "momentum on variance-normalised gradients", "arXiv 2602.10204"),
        OptimizerInfo(DeVA, "decoupled variance adaptation, spectral form", "arXiv 2602.06880"),
        OptimizerInfo(DeVAVector, "decoupled variance adaptation, vector form", "arXiv 2602.06880"),
        OptimizerInfo(NAMO, "orthogonalised momentum with a norm-based adaptive scale", "arXiv 2602.17080"),
        OptimizerInfo(NAMOD, "orthogonalised momentum with column-wise adaptive scales", "arXiv 2602.17080"),
        OptimizerInfo(HVAdam, "Adam with a hidden vector", "arXiv 2511.20277"),
        OptimizerInfo(Anon, "tunable adaptivity with incremental delay update", "arXiv 2605.02317"),
        OptimizerInfo(AdaBelief, "variance around the momentum in place of the second moment", "arXiv 2010.07468"),
        OptimizerInfo(LaProp, "momentum of normalised gradients", "arXiv 2002.04839"),
        OptimizerInfo(PNM, "gradient descent with positive-negative momentum", "arXiv 2103.17182"),
        OptimizerInfo(AdaPNM, "Adam with positive-negative momentum", "arXiv 2103.17182"),
        OptimizerInfo(MAdam, "Adam with a second moment of maximum variance (MaxVA)", "arXiv 2006.11918"),
        OptimizerInfo(LaMAdam, "LaProp with a second moment of maximum variance (MaxVA)", "arXiv 2006.11918"),
        OptimizerInfo(Muon, "orthogonalised momentum", "Jordan et al. 2024; arXiv 2502.16982"),
        OptimizerInfo(NorMuon, "orthogonalised momentum with normalised rows", "arXiv 2510.05491"),
        OptimizerInfo(AdaMuon, "orthogonalised signs of momentum with second moments", "arXiv 2507.11005"),
        OptimizerInfo(MuonVS, "orthogonalised momentum over the gradients' deviation", "arXiv 2601.14603"),
        OptimizerInfo(MuonNSR, "orthogonalised momentum modulated by noise-to-signal ratios", "arXiv 2601.14603"),
        OptimizerInfo(SOAP, "Adam in the eigenbasis of Shampoo's preconditioner", "arXiv 2409.11321"),
        OptimizerInfo(torch.optim.SGD, "stochastic gradient descent with momentum (torch.optim)", "ICML 2013"),
        OptimizerInfo(torch.optim.Adam, "adaptive moments (torch.optim)", "arXiv 1412.6980"),
        OptimizerInfo(torch.optim.AdamW, "Adam with decoupled weight decay (torch.optim)", "arXiv 1711.05101"),
    )
}


def get(name: str) -> OptimizerInfo:
    """The optimizer of a name.

    Raises:
        ValueError: There is none; the message suggests the nearest.

    >>> get("NAMO").kind
    'matrix'
    >>> get("Namo")
    Traceback (most recent call last):
    ...
    ValueError: There is no optimizer 'Namo'. Did you mean NAMO, NAMOD, PNM?
    """
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    by_fold = {known.lower(): known for known in OPTIMIZERS}
    near = [by_fold[n] for n in difflib.get_close_matches(name.lower(), by_fold, n=3, cutoff=0.5)]
    hint = f"Did you mean {', '.join(near)}?" if near else f"Known: {', '.join(OPTIMIZERS)}."
    raise ValueError(f"There is no optimizer {name!r}. {hint}")


def table() -> str:
    """The optimizers as a Markdown table, for the README."""
    rows = [f"| `{o.name}` | {o.kind} | {o.description} | {o.paper} |" for o in OPTIMIZERS.values()]
    return "\n".join(["| name | kind | what it is | paper |", "|---|---|---|---|", *rows])
