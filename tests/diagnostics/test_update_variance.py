"""Estimates of the variance of updates, against closed forms; Theorem 3.1 of the MVN-Grad paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lightning_optim as lo
from lightning_optim.diagnostics import VirtualOptimizer, conditional_variance
from lightning_optim.diagnostics.update_variance import conditional_sums, online_sums, running_moments


@given(st.integers(2, 40), st.sampled_from([0.0, 0.5, 0.9, 0.99]), st.integers(0, 1000))
def test_running_moments_are_the_weighted_ones(count: int, decay: float, seed: int) -> None:
    xs = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 3
    means, moments = [torch.zeros(5, dtype=torch.float64)], torch.zeros(1, 3, dtype=torch.float64)
    for x in xs:
        means, moments = running_moments([x], means, moments, decay)
    weights = torch.tensor([decay**i for i in range(count)], dtype=torch.float64).flip(0)
    weights /= weights.sum()
    expected = weights @ xs
    # Rounding of at most 40 steps in float64.
    torch.testing.assert_close(means[0], expected, rtol=1e-12, atol=1e-12)
    spread = (weights * (xs - expected).square().sum(1)).sum()
    torch.testing.assert_close(moments[0, 1:], torch.stack([weights.square().sum(), spread]), rtol=1e-10, atol=1e-12)


def test_online_estimates_are_unbiased() -> None:
    # Average over many independent runs of 8 updates N(mu, s^2) of 10 elements: variance 10 s^2, |mean|^2 10 mu^2.
    mu, s, runs = 0.5, 2.0, 4000
    xs = mu + s * torch.randn(8, runs, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means, moments = [torch.zeros(10, dtype=torch.float64)] * runs, torch.zeros(runs, 3, dtype=torch.float64)
    for x in xs:
        means, moments = running_moments(list(x), means, moments, 0.8)
    sums = online_sums(means, moments)
    for estimate, truth in ((sums["variance"], 10 * s**2), (sums["mean_sq"], 10 * mu**2)):
        standard_error = estimate.std() / runs**0.5
        assert abs(estimate.mean() - truth) < 4 * standard_error
        assert standard_error < truth / 10  # so that it says something: without the corrections it is off by more


def test_conditional_estimates_are_unbiased() -> None:
    mu, s, runs, batches = 1.0, 2.0, 4000, 4
    xs = mu + s * torch.randn(batches, runs, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # One "parameter" per run.
    sums = conditional_sums([list(x) for x in xs])
    mean_sq = sums["biased_mean_sq"] - sums["variance"] / batches
    for estimate, truth in ((sums["variance"], 10 * s**2), (mean_sq, 10 * mu**2)):
        assert abs(estimate.mean() - truth) < 4 * estimate.std() / runs**0.5
    values = conditional_variance(**sums)
    torch.testing.assert_close(values["conditional"], sums["variance"])
    ratio = sums["variance"] / mean_sq
    torch.testing.assert_close(values["conditional_ratio"][mean_sq > 0], ratio[mean_sq > 0])
    assert values["conditional_ratio"][mean_sq <= 0].isnan().all()


def test_cosine_spread_of_one_direction_and_of_none() -> None:
    same = [[torch.tensor([1.0, 2.0]) * k] for k in (1, 2, 3)]
    # Cosines of float32 vectors are right to a few units of 6e-8.
    assert abs(float(conditional_variance(**conditional_sums(same))["cosine_spread"])) < 1e-6
    orthogonal = [[x] for x in torch.eye(4)]
    spread = float(conditional_variance(**conditional_sums(orthogonal))["cosine_spread"])
    assert spread == pytest.approx(1 - 1 / 4**0.5, abs=1e-6)


# --- Theorem 3.1 --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(
    mu=st.floats(-3, 3),
    sigma=st.floats(0.1, 3),
    v=st.floats(0.01, 2),
    b1=st.sampled_from([0.1, 0.5, 0.9, 0.99]),
    b2=st.sampled_from([0.5, 0.9, 0.999]),
)
def test_normalising_before_momentum_has_less_variance_by_the_gap_of_theorem_3_1(
    mu: float, sigma: float, v: float, b1: float, b2: float
) -> None:
    # From one state, whose momentum is the mean of the gradient, both optimizers make a step with each of many
    # gradients mu + noise (one per element). Noise comes in pairs +x, -x, for which the theorem's expectations of odd
    # functions vanish exactly, so its gap holds for the sample: b1 (2 - b1) mu^2 Var(1 / sqrt(v_t)).
    noise = sigma * torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradient = mu + torch.cat([noise, -noise])
    full = torch.full_like(gradient, 1.0)
    settled = torch.tensor(1e5)  # steps after which nothing is left of the bias corrections
    variance: dict[str, Tensor] = {}
    scales = []
    for name, optimizer_class, options, extra in (  # whose eps is far below rounding
        ("before", lo.MVNGrad, {"eps": 1e-18, "eps_s": 0.0}, {"u": 0.7 * full}),
        ("after", lo.AdaBelief, {"eps": 1e-18, "rectify": False}, {}),
    ):
        cls: Any = optimizer_class
        w = nn.Parameter(torch.zeros_like(gradient))
        optimizer = cls([w], lr=1.0, betas=(b1, b2), weight_decay=0.0, **options)
        w.grad = gradient.clone()
        optimizer.step()
        state = optimizer.state[w]
        second = "v" if "v" in state else "s"
        state.update({"m": mu * full, second: v * full, "step": settled.clone()} | extra)
        update = VirtualOptimizer(optimizer).step({w: gradient})[w]
        variance[name] = update.var(correction=0)
        optimizer.step()
        scales.append(optimizer.state[w][second].rsqrt())
    torch.testing.assert_close(scales[0], scales[1], rtol=1e-12, atol=0)  # the same v_t
    gap = b1 * (2 - b1) * mu**2 * scales[0].var(correction=0)
    # The difference of variances loses digits of float64.
    torch.testing.assert_close(variance["after"] - variance["before"], gap, rtol=1e-9, atol=1e-12)
