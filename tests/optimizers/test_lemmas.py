"""Two lemmas of NAMO's paper, for the optimizers themselves and any gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lightning_optim

#: The paper's algorithm, with exact polar factors.
PAPER = {"nesterov": False, "scale": None, "max_step": None, "orthogonalizer": "exact", "weight_decay": 0.0}

shapes = pytest.mark.parametrize("shape", [(5, 3), (4, 4)])


def gradients(seed: int, shape: tuple[int, int], count: int = 12) -> list[Tensor]:
    """Heavy-tailed in time and over the columns, so that bounds are approached."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return [normal(*shape) * (2 * normal(shape[1])).exp() for _ in range(count)]


@shapes
@pytest.mark.parametrize("name", ["NAMO", "NAMOD"])
@given(mu1=st.floats(0.0, 0.99), extra=st.floats(0, 1), seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_scales_are_bounded(name: str, shape: tuple[int, int], mu1: float, extra: float, seed: int) -> None:
    """Lemma 7: for mu1 <= mu2 no scale exceeds sqrt((1 - mu1) / (1 - mu2))."""
    mu2 = mu1 + extra * (0.999 - mu1)
    w = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    groups = [{"params": [w], "role": "matrix"}]
    optimizer = getattr(lightning_optim, name)(groups, lr=1.0, betas=(mu1, mu2), eps=1e-18, **PAPER)
    for g in gradients(seed, shape):
        before = w.detach().clone()
        w.grad = g
        optimizer.step()
        # The columns of the polar factor of a tall matrix have norm 1, so those of the step have the scales.
        scales = (w.detach() - before).norm(dim=0)
        assert scales.max() <= math.sqrt((1 - mu1) / (1 - mu2)) * (1 + 1e-6)  # rounding, times ill-conditioned momenta


@shapes
@given(clamp=st.floats(0.05, 1), seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_the_direction_descends(shape: tuple[int, int], clamp: float, seed: int) -> None:
    """Lemma 11: <M, O D> >= d_min ||M||_*, with d_min >= c^2 d_max by the clamp."""
    w = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = lightning_optim.NAMOD([{"params": [w], "role": "matrix"}], lr=1.0, clamp=clamp, **PAPER)  # type: ignore[arg-type]
    for g in gradients(seed, shape):
        before = w.detach().clone()
        w.grad = g
        optimizer.step()
        direction = before - w.detach()
        d = direction.norm(dim=0)
        m = optimizer.state[w]["m"].reshape(shape)
        assert (m * direction).sum() >= d.min() * torch.linalg.matrix_norm(m, "nuc") * (1 - 1e-6)
        assert d.min() >= clamp**2 * d.max() * (1 - 1e-6)
