"""Orthogonality of matrices against known answers and float64 singular value decompositions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_optim.devices import full_precision
from lightning_optim.diagnostics import factor_error, orthogonality, polar_error
from lightning_optim.diagnostics.orthogonality import gram
from lightning_optim.polar import exact_polar, orthogonalize

sizes = st.integers(1, 40)
scales = st.sampled_from([1e-30, 1e-6, 1.0, 1e12])
dtypes = st.sampled_from([torch.float32, torch.float64])
seeds = st.integers(0, 2**16)

# Rounding of Gram entries: 6e-8 in float32, times the root of how many are summed.
CLOSE = {torch.float32: 2e-6, torch.float64: 1e-14}


def gaussian(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_svd(u: Tensor) -> dict[str, Tensor]:
    s2 = torch.linalg.svdvals(u.double()).square()
    r = s2.shape[-1]
    return {
        "error": s2.std(-1, correction=0) / s2.square().mean(-1).sqrt() if r > 1 else torch.zeros(len(u)).double(),
        "stable_rank": s2.sum(-1) / s2.amax(-1),
        "spectral_norm": s2.amax(-1).sqrt(),
    }


@settings(deadline=None, max_examples=60)
@given(sizes, sizes, scales, dtypes, seeds)
def test_agrees_with_singular_values(m: int, n: int, scale: float, dtype: torch.dtype, seed: int) -> None:
    u = (gaussian(seed, 3, m, n) * scale).to(dtype)
    expected = by_svd(u)
    for name, x in orthogonality(u).items():
        assert x.dtype is dtype
        tolerance = 10 * CLOSE[dtype]
        torch.testing.assert_close(x.double(), expected[name], rtol=tolerance, atol=tolerance * (name == "error"))


@settings(deadline=None, max_examples=40)
@given(sizes, sizes, scales, dtypes, seeds)
def test_multiples_of_orthogonal_matrices_have_no_error(
    m: int, n: int, scale: float, dtype: torch.dtype, seed: int
) -> None:
    factor = exact_polar(gaussian(seed, 2, m, n))
    values = orthogonality((factor * scale).to(dtype))
    assert float(values["error"].max()) < CLOSE[dtype]
    assert values["stable_rank"].tolist() == pytest.approx([min(m, n)] * 2, rel=10 * CLOSE[dtype])
    assert float(factor_error(factor.to(dtype)).max()) < CLOSE[dtype]
    assert factor_error(2 * factor).tolist() == pytest.approx([3.0, 3.0])  # G = 4 I


@given(sizes, sizes, seeds)
@settings(deadline=None, max_examples=30)
def test_rank_one(m: int, n: int, seed: int) -> None:
    u = (gaussian(seed, 2, m, 1) @ gaussian(seed + 1, 2, 1, n)).float()
    values = orthogonality(u)
    assert values["error"].tolist() == pytest.approx([math.sqrt(1 - 1 / min(m, n))] * 2, abs=1e-5)
    assert values["stable_rank"].tolist() == pytest.approx([1.0, 1.0], rel=1e-5)


@pytest.mark.parametrize(("m", "n"), [(300, 300), (150, 600), (600, 150)])
def test_gaussian(m: int, n: int) -> None:
    """tr(G) is about m n, and tr(G^2) about m n (m + n), which makes the error sqrt(r / (r + max))."""
    values = orthogonality(gaussian(0, 1, m, n).float())
    r, longer = min(m, n), max(m, n)
    assert float(values["error"]) == pytest.approx(math.sqrt(r / (r + longer)), abs=0.01)  # fluctuates by about 1 / r
    assert float(values["spectral_norm"]) == pytest.approx(math.sqrt(m) + math.sqrt(n), rel=0.03)  # its edge's width


@pytest.mark.parametrize("deviation", [1e-1, 1e-3, 1e-5])
def test_small_errors_are_not_lost(deviation: float) -> None:
    """Where 1 - tr(G)^2 / (r tr(G^2)) would be rounding noise: in float32 anything below 3e-4."""
    u = exact_polar(gaussian(0, 4, 24, 48)) + deviation * gaussian(1, 4, 24, 48) / 7
    expected = by_svd(u)["error"]
    assert float(expected.max()) < 2 * deviation
    torch.testing.assert_close(orthogonality(u.float())["error"].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ends", [0.0, 0.5, 0.99, 1.0])
def test_spectral_norm_of_large_matrices(ends: float) -> None:
    """Beyond 32 dimensions the iteration is approximate, from below."""
    s = torch.linspace(1, ends, 400, dtype=torch.float64)
    u = exact_polar(gaussian(0, 1, 400, 400)) * s @ exact_polar(gaussian(1, 1, 400, 400))
    assert 0.999 < float(orthogonality(u)["spectral_norm"]) <= 1 + 1e-12


def test_zero_and_nonfinite_matrices_leave_the_others_alone() -> None:
    u = torch.eye(3).repeat(4, 1, 1)
    u[0], u[1, 0, 0], u[2, 2, 1] = 0, torch.nan, torch.inf
    values = orthogonality(u)
    assert values["error"].isnan().tolist() == [True, True, True, False]
    assert values["stable_rank"].isnan().tolist() == [True, True, True, False]
    assert values["spectral_norm"].isnan().tolist() == [False, True, True, False]
    assert polar_error(u, u).isnan().tolist() == [True, True, True, False]


def test_polar_error_tells_a_wrong_factor_from_a_right_one() -> None:
    x = gaussian(0, 2, 12, 20)
    right, wrong = exact_polar(x), exact_polar(gaussian(1, 2, 12, 20))
    assert float(factor_error(wrong).max()) < 1e-14  # its singular values are 1 all the same
    assert float(polar_error(wrong, x).min()) > 1
    assert float(polar_error(right, x).max()) < 1e-14
    assert 0.05 < float(polar_error(orthogonalize(x, "kj5"), x).max()) < 0.4


def test_products_are_exact_whatever_the_settings() -> None:
    x = gaussian(0, 2, 64, 64).float()
    expected = orthogonality(x)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert gram(x).dtype is torch.float32
            assert all(torch.equal(value, expected[name]) for name, value in orthogonality(x).items())
            with full_precision(x):
                assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
