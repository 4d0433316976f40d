"""One step of a rule by hand, without the engine: what a rule is handed, and what it returns."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lightning_optim.engine.rule import (
    LIKE_PARAMETER,
    GroupRule,
    MatrixRule,
    ModelRule,
    Move,
    Polar,
    Rule,
    as_attributes,
    buffers_of,
    ignore,
    numbers_of,
)
from lightning_optim.polar import orthogonalize

Answer = tuple[Tensor, tuple[Tensor, ...]]


def hyperparameters(rule: type[Rule], arguments: dict[str, Any]) -> SimpleNamespace:
    """Defaults, and what a configuration says of them; what it says of the fallback is not this rule's."""
    return as_attributes({name: arguments.get(name, default) for name, default in rule.hyperparameters().items()})


@dataclass
class Held:
    """What one rank holds of a stack of tensors: their gradients and parameters come and go, the state stays.

    Args:
        rule: The rule.
        arguments: Hyperparameters that are not the defaults.
        shape: Shape of one whole tensor.
        rows: The rows that are here, of the first axis of each tensor.
    """

    rule: type[Rule]
    arguments: dict[str, Any]
    shape: tuple[int, ...]
    rows: slice
    host: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.h = hyperparameters(self.rule, self.arguments)
        self.buffers = buffers_of(self.rule, self.shape, self.h)
        mine = (len(range(*self.rows.indices(self.shape[0]))), *self.shape[1:])
        shapes = {name: mine if shape is LIKE_PARAMETER else shape for name, shape in self.buffers.items()}
        state = {name: torch.zeros(1, *shape, dtype=torch.float64) for name, shape in shapes.items()}
        if issubclass(self.rule, GroupRule):
            state |= {name: torch.tensor(x, dtype=torch.float64) for name, x in self.rule.group_state.items()}
        whole = torch.randn(1, *self.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.s = SimpleNamespace(**state, parameter=whole[:, self.rows])
        self.host = dict.fromkeys(self.rule.host_state, 0.0)

    def numbers(self, t: int) -> dict[str, Any]:
        """The numbers of step ``t``; to be asked for once, as they may keep some from step to step."""
        details: list[Any] = []
        if issubclass(self.rule, MatrixRule):
            details = [self.shape, *([0] if self.rule.phases(self.h) else [])]
        return numbers_of(self.rule, t, self.h, *details, *([self.host] if self.host else []))

    def update(self, g: Tensor, k: dict[str, Any]) -> Move | Generator[Polar, Answer, Move]:
        """Call ``update`` with a gradient ``(1, *shape)``; a group rule has this tensor only."""
        rule: Any = self.rule
        if issubclass(rule, MatrixRule):
            return rule.update(g, self.s, SimpleNamespace(**k), ignore)
        if issubclass(rule, GroupRule):
            known = k | {"loss": 1.0} if issubclass(rule, ModelRule) else k
            group_state, coefficients = rule.combine(
                rule.sums(g, self.s, SimpleNamespace(**k)), self.s, SimpleNamespace(**known)
            )
            vars(self.s).update(group_state)
            k = k | coefficients
        return rule.update(g, self.s, SimpleNamespace(**k))


def on_all(held: Sequence[Held], grads: Sequence[Tensor], numbers: dict[str, Any]) -> list[Move]:
    """One step of all ranks: what they yield is orthogonalised together, and what they ask to be summed is added up."""
    updates = [x.update(g, numbers) for x, g in zip(held, grads)]
    if not isinstance(updates[0], Generator):
        return [move for move in updates if isinstance(move, Move)]
    moves: list[Move] = []
    asked = [_next(update, moves) for update in updates]
    while not moves:
        polars = [polar for polar in asked if polar is not None]
        factors = orthogonalize(torch.cat([polar.matrices for polar in polars], 1), polars[0].method)
        totals = [sum(parts) for parts in zip(*(polar.sums for polar in polars))]
        pieces = factors.split([polar.matrices.shape[1] for polar in polars], 1)
        # Each rank has its own copies, and may change the sums.
        asked = [_next(u, moves, (f.clone(), tuple(x.clone() for x in totals))) for u, f in zip(updates, pieces)]
    return moves


def _next(update: Any, moves: list[Move], answer: Answer | None = None) -> Polar | None:
    try:
        return update.send(answer)
    except StopIteration as end:
        moves.append(end.value)
        return None
