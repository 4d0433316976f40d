"""The solver against what defines its result, and against the published coefficients."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_optim.polar.minimax import Coefficients, best_quintic, evaluate, minimax

#: As published with nanochat and dion: five steps, safety and cushion 0.02.
PE5 = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
#: The first seven of eight or more by the authors' code for safety 0.01, cushion 0.02.
PE_SAFETY_1 = [
    (8.2373124905, -23.1577474146, 16.6805684114),
    (4.0824419991, -2.8930477353, 0.5252849257),
    (3.9263479923, -2.8547468035, 0.5318022423),
    (3.2982187133, -2.4245419810, 0.4863200836),
    (2.2970369435, -1.6366255813, 0.4002628456),
    (1.8763805351, -1.2347896578, 0.3589188750),
    (1.8564423486, -1.2132449881, 0.3568003488),
]


def image(polynomials: tuple[Coefficients, ...], lower: float) -> np.ndarray:
    x = np.geomspace(lower, 1, 20001)
    for a, b, c in polynomials:
        x = x * (a + x**2 * (b + c * x**2))
    return x


def test_reproduces_the_published_sets() -> None:
    np.testing.assert_allclose(minimax(5, 1e-3, safety=0.02, cushion=0.02), PE5, rtol=0, atol=1e-9)
    np.testing.assert_allclose(minimax(8, 1e-3, safety=0.01, cushion=0.02)[:7], PE_SAFETY_1, rtol=0, atol=1e-9)


def test_the_last_polynomial_is_fitted_to_where_the_safety_leaves_the_others() -> None:
    """It is the sixth of eight without the division by 1.01, and closer to 1 than the sixth of the set without safety,
    which some tables join to the first five of this one."""
    *first, last = minimax(6, 1e-3, safety=0.01, cushion=0.02)
    a, b, c = PE_SAFETY_1[5]
    np.testing.assert_allclose(last, (a * 1.01, b * 1.01**3, c * 1.01**5), rtol=0, atol=1e-9)
    unsafe = minimax(6, 1e-3, cushion=0.02)[5]
    assert unsafe == pytest.approx((1.8906150375, -1.2672427340, 0.3767284129), abs=1e-9)
    error, mixed = (np.abs(1 - image((*first, p), 1e-3)).max() for p in (last, unsafe))
    assert error == pytest.approx(0.00162, abs=1e-5)
    assert mixed > 1.2 * error


@given(low=st.floats(1e-6, 0.999), high=st.floats(0.1, 10))
def test_the_best_quintic_alternates(low: float, high: float) -> None:
    """Four points of largest error with alternating signs: by Chebyshev's theorem nothing is closer."""
    p = best_quintic(low * high, high)
    x = np.linspace(low * high, high, 20001)
    error = 1 - np.array([evaluate(p, float(z)) for z in (x[0], x[-1])])
    largest = np.abs(1 - x * (p[0] + x**2 * (p[1] + p[2] * x**2)))
    # Rounding of sums whose terms are up to 20 times larger.
    assert error[0] == pytest.approx(-error[1], rel=1e-6, abs=1e-13)
    assert largest.max() <= abs(error[0]) * (1 + 1e-6) + 1e-13
    interior = 1 - x * (p[0] + x**2 * (p[1] + p[2] * x**2))
    # A grid of 20001 points misses an extremum by a relative 1e-4 at most where the polynomial is steep.
    assert interior.max() >= abs(error[0]) * (1 - 1e-2) - 1e-13
    assert interior.min() <= -abs(error[0]) * (1 - 1e-2) + 1e-13


@given(steps=st.integers(1, 8), lower=st.floats(1e-5, 0.9))
def test_the_composition_is_centred_and_improves(steps: int, lower: float) -> None:
    y = image(minimax(steps, lower), lower)
    error = np.abs(1 - y).max()
    # float64, amplified by the slope of the composition, which reaches 8.5**8.
    assert y.min() + y.max() == pytest.approx(2, abs=1e-7)
    assert np.abs(1 - image(minimax(steps + 1, lower), lower)).max() <= error + 1e-7


def test_safety_tolerates_values_above_one() -> None:
    """With safety s the first polynomials keep 1 + s inside; without, the same value leaves the interval."""
    above = 1.02
    safe, plain = minimax(5, 1e-3, safety=0.02), minimax(5, 1e-3)
    x, y = above, above
    for p, q in zip(safe, plain):
        x, y = evaluate(p, x), evaluate(q, y)
    assert abs(x - 1) < abs(y - 1)


def test_the_cushion_bounds_the_dip() -> None:
    """The ratio p(x) / x of every polynomial stays away from zero, where rounding could change its sign."""

    def dip(cushion: float) -> float:
        a, b, c = minimax(1, 1e-6, cushion=cushion)[0]
        x = np.linspace(1e-6, 1, 20001)
        return float((a + b * x**2 + c * x**4).min())

    assert dip(0.0) < dip(0.02) < dip(0.1)
    assert dip(0.02) > 0.1


@pytest.mark.parametrize(
    "arguments", [{"steps": 0}, {"steps": 1, "lower": 0.0}, {"steps": 1, "safety": -1}, {"steps": 1, "cushion": 2}]
)
def test_bad_arguments_are_named(arguments: dict[str, float]) -> None:
    name, value = list(arguments.items())[-1]
    with pytest.raises(ValueError, match=f"{name}={value}"):
        minimax(**arguments)  # type: ignore[arg-type]
