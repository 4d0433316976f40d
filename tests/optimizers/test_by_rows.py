"""Rules that say they run on rows of a matrix move them as they move the whole matrix.

Every matrix rule with ``by_rows`` is checked in every configuration of its row, without processes. There is nothing to
check for the others: the engine hands them whole tensors, wherever these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim.engine.arithmetic import ema_, squared_norm
from lightning_optim.engine.rule import LIKE_PARAMETER, RULES, MatrixRule, Move, Polar

from .by_hand import Held, on_all
from .rows import CONFIGURATIONS, MATRIX, label

SHAPE = (7, 4)
#: How many rows each rank has: two or three uneven parts, and one that has none.
PARTS = [(5, 2), (1, 4, 2), (7, 0)]
CASES = [
    pytest.param(RULES[name], arguments, id=f"{name}-{label(arguments)}")
    for name in MATRIX
    if issubclass(rule := RULES[name], MatrixRule) and rule.by_rows
    for arguments in CONFIGURATIONS[name]
]


def check(rule: type[MatrixRule], arguments: dict[str, Any], parts: Sequence[int]) -> None:
    """Move and state of every step, on the whole matrix and on its rows."""
    ends = [sum(parts[: i + 1]) for i in range(len(parts))]
    slices = [slice(end - n, end) for end, n in zip(ends, parts)]
    whole = Held(rule, arguments, SHAPE, slice(None))
    held = [Held(rule, arguments, SHAPE, rows) for rows in slices]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1, *SHAPE, generator=generator, dtype=torch.float64)
    p, pieces = start.clone(), [start[:, rows].clone() for rows in slices]
    for t in range(1, 7):
        g = torch.randn(1, *SHAPE, generator=generator, dtype=torch.float64) + 0.5
        k = whole.numbers(t)
        (move,) = on_all([whole], [g.clone()], k)
        moves = on_all(held, [g[:, rows].clone() for rows in slices], k)
        move.apply_(p, k["keep"])
        for piece, part in zip(pieces, moves):
            assert isinstance(part.step, Tensor) == isinstance(move.step, Tensor)
            part.apply_(piece, k["keep"])
        close(torch.cat(pieces, 1), p, f"parameters after step {t}")
        for name, shape in whole.buffers.items():
            found = [getattr(x.s, name) for x in held]
            if shape is LIKE_PARAMETER:
                found = [torch.cat(found, 1)]
            for x in found:
                close(x, getattr(whole.s, name), f"state {name!r} after step {t}")


def close(found: Tensor, expected: Tensor, what: str) -> None:
    # Float64: sums of 28 elements in another order, 1e-16 each, through some steps of divisions by norms.
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=lambda message: f"{what}: {message}")


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize(("rule", "arguments"), CASES)
def test_rows_move_as_the_whole_matrix_does(
    rule: type[MatrixRule], arguments: dict[str, Any], parts: Sequence[int]
) -> None:
    check(rule, arguments, parts)


class Wrong(MatrixRule):
    """Divides by a norm of the rows that are here."""

    lr: float = 0.1
    momentum: float = 0.9
    by_rows = True
    buffers = ("m",)

    @staticmethod
    def update(g, s, k, observe):
        ema_(s.m, g, k.momentum)
        o, _ = yield Polar(s.m, "kj5")
        return Move(o, k.lr * squared_norm(g).sqrt())


class WrongState(Wrong):
    """Keeps a norm of the rows that are here, which moves nothing for two steps."""

    @staticmethod
    def buffers(shape, h):
        return {"m": None, "v": (1, 1)}

    @staticmethod
    def update(g, s, k, observe):
        ema_(s.m, g, k.momentum)
        o, _ = yield Polar(s.m, "kj5")
        s.v.add_(squared_norm(g))
        return Move(o, k.lr)


class WrongMean(Wrong):
    """A mean over the rows that are here is not the mean over all."""

    @staticmethod
    def update(g, s, k, observe):
        ema_(s.m, g - g.mean(-2, keepdim=True), k.momentum)
        o, _ = yield Polar(s.m, "kj5")
        return Move(o, k.lr)


class Right(Wrong):
    """As it should be."""

    @staticmethod
    def update(g, s, k, observe):
        ema_(s.m, g, k.momentum)
        o, (gg,) = yield Polar(s.m, "kj5", (squared_norm(g),))
        return Move(o, k.lr * gg.sqrt())


@pytest.mark.parametrize("rule", [Wrong, WrongState, WrongMean])
def test_the_check_finds_sums_over_the_rows_that_are_here(rule: type[MatrixRule]) -> None:
    with pytest.raises(AssertionError, match="after step 1"):
        check(rule, {}, (5, 2))
    check(Right, {}, (5, 2))
