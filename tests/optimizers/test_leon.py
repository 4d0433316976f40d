"""What is said of Leon: its closed form where there is one, and its relation to Muon."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import lightning_optim as lo

F64 = torch.float64


def gradients(shape: tuple[int, int], steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=F64) + 0.3 for _ in range(steps)]


def moves(grads: list[Tensor], momentum: float, gamma: float = 1e-8) -> list[Tensor]:
    """What each step subtracts from the parameter, at a learning rate of 1."""
    w = torch.nn.Parameter(torch.zeros_like(grads[0]))
    optimizer = lo.Leon([{"params": [w], "role": "matrix"}], lr=1.0, momentum=momentum, gamma=gamma)
    found = []
    for g in grads:
        before = w.detach().clone()
        w.grad = g.clone()
        optimizer.step()
        found.append(before - w.detach())
    return found


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1)])
@pytest.mark.parametrize("gamma", [1e-8, 0.7])
def test_of_a_vector_it_is_a_quotient_of_norms(shape: tuple[int, int], gamma: float) -> None:
    grads, total, squares = gradients(shape, 10), torch.zeros(shape, dtype=F64), 0.0
    for g, move in zip(grads, moves(grads, 0.8, gamma)):
        total = 0.8 * total + g
        squares = 0.64 * squares + float(g.square().sum())
        expected = total / math.sqrt(float(total.square().sum()) + squares + gamma**2)
        torch.testing.assert_close(move, expected, rtol=1e-10, atol=1e-12)


def test_of_two_by_two_matrices_the_root_has_a_closed_form() -> None:
    """The root of a 2 x 2 matrix A is (A + sqrt(det A) I) / sqrt(tr A + 2 sqrt(det A))."""
    grads, total = gradients((2, 2), 10), torch.zeros(2, 2, dtype=F64)
    outer = torch.zeros(2, 2, dtype=F64)
    for g, move in zip(grads, moves(grads, 0.9)):
        total = 0.9 * total + g
        outer = 0.81 * outer + g @ g.T
        a = total @ total.T + outer
        d = torch.linalg.det(a).sqrt()
        root = (a + d * torch.eye(2, dtype=F64)) / (a.trace() + 2 * d).sqrt()
        torch.testing.assert_close(move, torch.linalg.solve(root, total), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_of_equal_gradients_it_becomes_muons_step(shape: tuple[int, int]) -> None:
    g = gradients(shape, 1)[0]
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    last = moves([g] * 400, 0.95)[-1]
    # S = G / (1 - b) and A = G G^T / (1 - b^2), so every singular value is 1 / sqrt(1 + (1 - b) / (1 + b)).
    torch.testing.assert_close(last, u @ vh / math.sqrt(1 + 0.05 / 1.95), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.95])
def test_singular_values_stay_below_the_learning_rate(momentum: float) -> None:
    for scale in (1e-3, 1.0, 1e5):
        for move in moves([scale * g for g in gradients((4, 6), 20)], momentum):
            assert float(torch.linalg.matrix_norm(move, 2)) < 1
