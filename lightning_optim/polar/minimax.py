"""Optimal coefficients of polynomial iterations: which odd quintics, composed, come closest to the sign function."""

from __future__ import annotations

from math import sqrt
from typing import TypeAlias

import numpy as np

#: ``(a, b, c)`` of the odd quintic ``a x + b x^3 + c x^5``.
Coefficients: TypeAlias = tuple[float, float, float]

#: Above this ratio of the interval's ends Newton-Schulz's own quintic is the best one: its error is below 1e-11.
_POINT = 1 - 1e-4


def minimax(steps: int, lower: float = 1e-3, safety: float = 0.0, cushion: float = 0.0) -> tuple[Coefficients, ...]:
    r"""Coefficients of the composition :math:`p_n \circ\dots\circ p_1` of odd quintics that is closest to 1 on
    :math:`[\ell, 1]` in the maximum norm.

    The greedy choice is the optimal one (`arXiv 2505.16932 <https://arxiv.org/abs/2505.16932>`_): :math:`p_1` is the
    best quintic on :math:`[\ell, 1]`, which it maps to :math:`[\ell', 2-\ell']`, :math:`p_2` the best one on that
    interval, and so on. Two changes make the result fit for low precision, as in the paper's code:

    - ``safety``: every polynomial but the last is evaluated at :math:`x/(1+s)`, so that singular values that
      rounding has pushed beyond the interval's upper end do not leave the region where the iteration converges. The
      next one is fitted to the interval that the polynomial with this change arrives at.
    - ``cushion``: a polynomial is fitted to :math:`[\max(\ell, \kappa u), u]` instead of :math:`[\ell, u]` and then
      scaled so that the image of :math:`[\ell, u]` is centred at 1. That keeps it from dipping towards zero in the
      middle of a long interval, where a rounded Gram matrix would turn the dip into a change of sign.

    Args:
        steps: Number of polynomials :math:`n`, at least 1.
        lower: Smallest singular value :math:`\ell` to serve, relative to the largest, in (0, 1].
        safety: :math:`s`.
        cushion: :math:`\kappa`, in [0, 1].

    Returns:
        ``(a, b, c)`` of each polynomial :math:`a x + b x^3 + c x^5`, in the order in which they are applied.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> (a, b, c), last = minimax(2, lower=0.1)
        >>> round(a, 4), round(b, 4), round(c, 4)
        (5.6037, -13.8837, 9.7334)
    """
    if steps < 1 or not 0 < lower <= 1 or safety < 0 or not 0 <= cushion <= 1:
        raise ValueError(
            "minimax needs steps >= 1, lower in (0, 1], safety >= 0 and cushion in [0, 1], "
            f"got {steps=}, {lower=}, {safety=}, {cushion=}."
        )
    low, high = lower, 1.0
    polynomials: list[Coefficients] = []
    for step in range(1, steps + 1):
        p = best_quintic(max(low, cushion * high), high)
        centre = (evaluate(p, low) + evaluate(p, high)) / 2 if cushion * high > low else 1.0
        shrink = 1 + safety if step < steps else 1.0
        a, b, c = p
        p = (a / centre / shrink, b / centre / shrink**3, c / centre / shrink**5)
        polynomials.append(p)
        low = evaluate(p, low)
        high = 2 - low
    return tuple(polynomials)


def evaluate(p: Coefficients, x: float) -> float:
    """The quintic at ``x``.

    >>> evaluate((1.0, 2.0, 3.0), 2.0)
    114.0
    """
    a, b, c = p
    return x * (a + x**2 * (b + c * x**2))


def best_quintic(low: float, high: float) -> Coefficients:
    """The odd quintic that is closest to 1 on ``[low, high]`` in the maximum norm, by the Remez algorithm.

    Its error attains its maximum with alternating signs at the two ends and at its two stationary points between
    them. Each round fits the polynomial whose error alternates at the current points, and moves the inner two to the
    stationary points of the fit.

    >>> a, b, c = best_quintic(0.5, 1.0)
    >>> errors = [1 - evaluate((a, b, c), x) for x in (0.5, 1.0)]
    >>> round(errors[0] + errors[1], 12)  # equal, of opposite sign
    0.0
    """
    ratio = low / high
    if ratio > _POINT:
        a, b, c = 15 / 8, -10 / 8, 3 / 8
    else:
        # On [ratio, 1]: the problem does not change with the unit of x.
        points = np.array([ratio, (3 * ratio + 1) / 4, (ratio + 3) / 4, 1.0])
        signs = np.array([1.0, -1.0, 1.0, -1.0])
        error, previous = float("inf"), 0.0
        while abs(error - previous) > 1e-14:
            previous = error
            system = np.stack([points, points**3, points**5, signs], axis=1)
            a, b, c, error = (float(x) for x in np.linalg.solve(system, np.ones(4)))
            # a + 3 b x^2 + 5 c x^4 = 0, by the form without cancellation; b < 0 < c.
            larger = (-3 * b + sqrt(max(0.0, 9 * b * b - 20 * a * c))) / (10 * c)
            points[1:3] = sqrt(a / (5 * c * larger)), sqrt(larger)
    return a / high, b / high**3, c / high**5
