"""Every optimizer by name. CLI choices, the README's table, docs and shared tests are derived from here."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .engine.optimizer import RuleOptimizer
from .engine.rule import Internal, gradient_to_variance
from .optimizers import ALGORITHMS


@dataclass(frozen=True)
class OptimizerInfo:
    """What there is to know about an optimizer without building it.

    Args:
        cls: The class.
        description: One line.
        paper: Where it was published.
        idea: What it has in common with others, in two or three words.
        experimental: What its sources leave open, so that it had to be derived; empty where they leave nothing open.
    """

    cls: type[torch.optim.Optimizer]
    description: str
    paper: str
    idea: str = ""
    experimental: str = ""

    @property
    def name(self) -> str:
        """The name it is asked for by, the class's own."""
        return self.cls.__name__

    @property
    def summary(self) -> str:
        """The description, and whether it is experimental."""
        return f"{self.description} (experimental)" if self.experimental else self.description

    @property
    def kind(self) -> str:
        """``"element-wise"``, ``"matrix"`` or ``"group"``, by what one update has to see."""
        return self.cls.kind if issubclass(self.cls, RuleOptimizer) else "element-wise"

    @property
    def internals(self) -> Mapping[str, Internal]:
        """Scalars that it offers to diagnostics, by name.

        >>> {name: internal.description for name, internal in OPTIMIZERS["Anon"].internals.items()}["refreshes"]
        'number of refreshes of the scale so far'
        """
        if issubclass(self.cls, RuleOptimizer):
            return self.cls.internals
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
    """The scalars that the rule of a parameter group offers to diagnostics; none if the optimizer is unknown."""
    if isinstance(optimizer, RuleOptimizer):
        return optimizer.rule(group).internals
    return _TORCH_INTERNALS if isinstance(optimizer, torch.optim.Adam) else {}


#: Every optimizer by name: this library's, then those of torch that are offered as well.
OPTIMIZERS: dict[str, OptimizerInfo] = {
    info.name: info
    for info in (
        *(OptimizerInfo(cls, cls.about, cls.paper, cls.idea, cls.experimental) for cls in ALGORITHMS.values()),
        OptimizerInfo(
            torch.optim.SGD, "stochastic gradient descent with momentum (torch.optim)", "ICML 2013", "momentum"
        ),
        OptimizerInfo(torch.optim.Adam, "adaptive moments (torch.optim)", "arXiv 1412.6980", "adaptive moments"),
        OptimizerInfo(
            torch.optim.AdamW, "Adam with decoupled weight decay (torch.optim)", "arXiv 1711.05101", "adaptive moments"
        ),
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
    rows = [f"| `{o.name}` | {o.kind} | {o.summary} | {o.paper} |" for o in OPTIMIZERS.values()]
    return "\n".join(["| name | kind | what it is | paper |", "|---|---|---|---|", *rows])


def stub() -> str:
    """The exports of ``optimizers/__init__.py`` as a stub, for type checkers and editors, which run no code."""
    modules: dict[str, list[str]] = {}
    for name, cls in ALGORITHMS.items():
        modules.setdefault(cls.__module__.rpartition(".")[2], []).append(name)
    lines = ["# Made by `python docs/generate.py` from the files of this folder.", "from typing import Any", ""]
    lines += [
        "from ..engine.cuda_graphs import capture_step as capture_step",
        "from ..engine.optimizer import NonFiniteGradientsError as NonFiniteGradientsError",
    ]
    for module, names in sorted(modules.items()):
        lines += [f"from .{module} import {name} as {name}" for name in sorted(names)]
    lines += ["", "ALGORITHMS: dict[str, Any]", "", "__all__ = ["]
    exported = [*ALGORITHMS, "NonFiniteGradientsError", "capture_step"]
    exported.sort(key=lambda name: (not name.isupper(), name.islower(), name))  # As linters sort `__all__`.
    return "\n".join([*lines, *(f'    "{name}",' for name in exported), "]"]) + "\n"
