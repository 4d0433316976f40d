"""What is said of AdaGram: its relation to full-matrix AdaGrad, and its bounds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_optim as lo

F64 = torch.float64


def gradients(n: int, steps: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator, dtype=F64) + 0.3 for _ in range(steps)]


def moves(grads: list[Tensor], shape: tuple[int, ...], lr: float = 0.1, **arguments: Any) -> list[Tensor]:
    """What each step adds to the parameter, as a vector."""
    w = torch.nn.Parameter(torch.zeros(shape, dtype=F64))
    optimizer = lo.AdaGram([{"params": [w], "role": "matrix"}], lr=lr, **arguments)
    found = []
    for g in grads:
        before = w.detach().clone()
        w.grad = g.view(shape).clone()
        optimizer.step()
        found.append((w.detach() - before).flatten())
    return found


@pytest.mark.parametrize(("shape", "steps"), [((2, 3), 5), ((6,), 5), ((2, 2, 3), 30), ((3, 1), 9)])
def test_at_full_rank_a_step_is_as_long_as_full_matrix_adagrads(shape: tuple[int, ...], steps: int) -> None:
    n, eps = math.prod(shape), 0.05
    grads = gradients(n, steps)
    total = eps * torch.eye(n, dtype=F64)
    for g, move in zip(grads, moves(grads, shape, eps=eps, max_rank=None)):
        total += torch.outer(g, g)
        values, vectors = torch.linalg.eigh(total)
        adagrad = 0.1 * vectors @ ((vectors.T @ g) / values.sqrt())
        # The inverse of L is a difference that cancels to a root of eps over the sum of all squares.
        torch.testing.assert_close(move.norm(), adagrad.norm(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("max_rank", [None, 1, 7])
def test_of_one_number_it_is_adagrad(max_rank: int | None) -> None:
    grads, total = gradients(1, 12), 0.01
    for g, move in zip(grads, moves(grads, (1, 1), eps=0.01, max_rank=max_rank)):
        total += float(g) ** 2
        torch.testing.assert_close(move, -0.1 * g / math.sqrt(total), rtol=1e-10, atol=0)


@pytest.mark.parametrize("max_rank", [None, 1, 2, 5])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_no_step_is_longer_than_lr(scale: float, max_rank: int | None) -> None:
    found = moves([scale * g for g in gradients(12, 40)], (3, 4), lr=0.3, max_rank=max_rank)
    # Not even beyond the last digit.
    assert max(float(move.norm()) for move in found) <= 0.3 * (1 + 1e-12)
    assert min(float(move.norm()) for move in found) > 0


@pytest.mark.parametrize("max_rank", [1, 3, None])
def test_rotated_parameters_take_rotated_steps(max_rank: int | None) -> None:
    q = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=F64)).Q
    grads = gradients(8, 15)
    plain = moves(grads, (2, 4), eps=0.1, max_rank=max_rank)
    rotated = moves([q @ g for g in grads], (2, 4), eps=0.1, max_rank=max_rank)
    for a, b in zip(plain, rotated):
        torch.testing.assert_close(q @ a, b, rtol=1e-9, atol=1e-12)


def test_every_gradient_counts() -> None:
    """The released SVD form leaves every second gradient out of its factors."""
    other = gradients(6, 8)
    other[4] = -2 * other[4] + 1
    last = [moves(grads, (2, 3), max_rank=2)[-1] for grads in (gradients(6, 8), other)]
    assert (last[0] - last[1]).norm() > 1e-3 * last[0].norm()
    other = gradients(6, 8)
    other[5] = -2 * other[5] + 1
    last = [moves(grads, (2, 3), max_rank=2)[-1] for grads in (gradients(6, 8), other)]
    assert (last[0] - last[1]).norm() > 1e-3 * last[0].norm()
