"""From the settings of one optimizer to those that another one can start from."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..factory import OptimizerConfig, build_optimizer
from .design import Contender, rounded

__all__ = ["Suggestion", "suggest", "update_sizes"]

_STEPS = 30
_BURN_IN = 10  # steps until moments are typical


@dataclass(frozen=True)
class Suggestion:
    """Settings to start from.

    Args:
        optimizer: The optimizer.
        lr: Its learning rate.
        fallback_lr: That of its fallback rule, if it has one.
        weight_decay: Its decoupled weight decay.
        reasons: How each of them was found.
    """

    optimizer: str
    lr: float
    fallback_lr: float | None
    weight_decay: float
    reasons: tuple[str, ...]

    @property
    def options(self) -> str:
        """As options of ``lightning-optim fit``."""
        values = {"lr": self.lr, "fallback_lr": self.fallback_lr, "weight_decay": self.weight_decay}
        named = [f"--optimizer.{name} {value:g}" for name, value in values.items() if value is not None]
        return " ".join([f"--optimizer {self.optimizer}", *named])


def suggest(
    source: str,
    target: str,
    lr: float,
    weight_decay: float = 0.0,
    module: nn.Module | None = None,
    loss: Callable[[nn.Module], Tensor] | None = None,
    steps: int = _STEPS,
) -> Suggestion:
    r"""Say which settings of one optimizer correspond to those of another.

    The learning rate is the one with which updates are as large, in the root mean square over all entries:

    .. math:: \eta_\mathrm{target} = \eta_\mathrm{source} \, r_\mathrm{source} / r_\mathrm{target},

    where ``r`` is the size of an update at a learning rate of 1, over the hidden matrices, and likewise over the rest
    for a fallback rule. Decoupled weight decay is given such that a step shrinks the weights by as much.

    The sizes are measured on a module in a few steps, in which both optimizers get the same gradients and the source
    trains. Without a module, they are those for independent normal gradients.

    Args:
        source: The optimizer whose settings are known, a name or a dotted path.
        target: The other one.
        lr: Learning rate of the source.
        weight_decay: Decoupled weight decay of the source.
        module: The module to measure on; a copy is trained.
        loss: The loss of the next batch, given the copy of the module.
        steps: Number of steps.

    Example:
        >>> suggestion = suggest("AdamW", "Muon", lr=1e-3, weight_decay=0.1)
        >>> 0.003 < suggestion.lr < 0.1, suggestion.fallback_lr
        (True, 0.001)
    """
    if not lr > 0:
        raise ValueError(f"lr={lr!r} must be above 0.")
    if module is None:
        module, loss, where = _Synthetic(), None, "for independent normal gradients of a 256 x 128 matrix"
    else:
        where = f"measured on {type(module).__name__} in {steps} steps"
    contender = Contender.of(target, 0.0, "decoupled")
    sizes = update_sizes(module, loss, {source: lr, target: contender.start}, steps)
    mine, theirs = sizes[source], sizes[target]
    whole = "matrix" if "matrix" in theirs and contender.fallback_ratio is not None else "all"
    new = rounded(lr * mine[whole] / theirs[whole])
    over = "hidden matrices" if whole == "matrix" else "all parameters"
    reasons = [
        f"lr {new:g}: updates of {over} are as large as {source}'s at {lr:g} (RMS per unit of learning rate "
        f"{mine[whole]:.3g} and {theirs[whole]:.3g}, {where})."
    ]
    fallback = None
    if contender.fallback_ratio is not None and "rest" in theirs:
        fallback = rounded(lr * mine["rest"] / theirs["rest"])
        reasons.append(
            f"fallback_lr {fallback:g}: likewise for the parameters that are no hidden matrices "
            f"({mine['rest']:.3g} and {theirs['rest']:.3g})."
        )
    decay = rounded(weight_decay * lr / new)
    if weight_decay:
        reasons.append(f"weight_decay {decay:g}: a step shrinks the weights by the same lr x weight_decay.")
    return Suggestion(target, new, fallback, decay, tuple(reasons))


def update_sizes(
    module: nn.Module, loss: Callable[[nn.Module], Tensor] | None, rates: Mapping[str, float], steps: int = _STEPS
) -> dict[str, dict[str, float]]:
    """Root mean squares of updates per unit of learning rate.

    Args:
        module: The module. Copies of it are used.
        loss: The loss of the next batch, given the module; ``None`` for independent normal gradients.
        rates: Optimizers and their learning rates. The first trains; the others follow its weights and gradients.
        steps: Number of steps.

    Returns:
        For each optimizer the median over the steps after a few first ones, over ``all`` parameters, over hidden
        matrices (``matrix``) and over the ``rest``, where there are such.
    """
    from ..routing import clean_name, route

    generator = torch.Generator().manual_seed(0)
    trained = copy.deepcopy(module)
    hidden = {clean_name(r.name) for r in route(trained).values() if r.role == "matrix"}
    copies = {name: trained if i == 0 else copy.deepcopy(module) for i, name in enumerate(rates)}
    optimizers = {name: _unit(copies[name], name, rates[name]) for name in rates}
    found: dict[str, dict[str, list[float]]] = {name: {} for name in rates}
    for step in range(steps):
        trained.zero_grad()
        if loss is None:
            for p in trained.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
        else:
            loss(trained).backward()
        before = {name: p.detach().clone() for name, p in trained.named_parameters()}
        gradients = {name: p.grad for name, p in trained.named_parameters()}
        for name, optimizer in optimizers.items():
            for key, p in copies[name].named_parameters():
                if copies[name] is not trained:
                    p.data.copy_(before[key])
                    gradient = gradients[key]
                    p.grad = None if gradient is None else gradient.clone()
            optimizer.step()
            squares: dict[str, list[float]] = {}
            for key, p in copies[name].named_parameters():
                if gradients[key] is None:
                    continue
                square = float((p.detach() - before[key]).double().square().sum())
                for part in ("all", "matrix" if clean_name(key) in hidden else "rest"):
                    entry = squares.setdefault(part, [0.0, 0.0])
                    entry[0] += square
                    entry[1] += p.numel()
            if step >= min(_BURN_IN, steps // 2):
                for part, (total, count) in squares.items():
                    found[name].setdefault(part, []).append(math.sqrt(total / count) / rates[name])
    return {name: {part: median(values) for part, values in parts.items()} for name, parts in found.items()}


def _unit(module: nn.Module, name: str, lr: float) -> Optimizer:
    """An optimizer with one learning rate for all parameters, and no weight decay."""
    contender = Contender.of(name, 0.0, "decoupled")
    args: dict[str, Any] = contender.arguments({"lr": lr})
    if "fallback_lr" in args:
        args["fallback_lr"] = lr
    return build_optimizer(module, OptimizerConfig(contender.optimizer, args))


class _Synthetic(nn.Module):
    """A hidden matrix, and what is none."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(128, 256)
        self.norm = nn.LayerNorm(256)
        self.head = nn.Linear(256, 10)
