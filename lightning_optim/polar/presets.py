"""The polynomial iterations by name, with their sources."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from .minimax import Coefficients, minimax

_KELLER_JORDAN: Coefficients = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True)
class Iteration:
    r"""An odd polynomial iteration :math:`X \leftarrow a X + (b A + c A^2) X` with :math:`A = X X^\top`.

    Args:
        coefficients: ``(a, b, c)`` of each step.
        source: Where the coefficients are from.
        rescale: What is done, beyond dividing by the Frobenius norm, before the first step; both use its Gram
            matrix :math:`A`. ``"schatten8"`` divides by the Schatten-8 norm :math:`\|A^2\|_F^{1/4}`, a much tighter
            bound of the largest singular value. ``"aol"`` divides row :math:`i` by :math:`\sqrt{\sum_j |A_{ij}|}`
            ("almost orthogonal"), which also bounds it by 1, but changes the polar factor that is converged to.
    """

    coefficients: tuple[Coefficients, ...]
    source: str
    rescale: Literal["schatten8", "aol"] | None = None


def _keller_jordan(steps: int) -> Iteration:
    return Iteration((_KELLER_JORDAN,) * steps, f"Keller Jordan, Muon: {steps} equal steps")


def _polar_express(steps: int, safety: float) -> Iteration:
    source = f"Polar Express (arXiv 2505.16932): minimax({steps}, lower=1e-3, safety={safety}, cushion=0.02)"
    return Iteration(minimax(steps, lower=1e-3, safety=safety, cushion=0.02), source)


#: Iterations by name; ``"exact"`` is accepted as well.
METHODS: dict[str, Iteration] = {
    "kj5": _keller_jordan(5),
    "kj5-schatten": Iteration(
        (_KELLER_JORDAN,) * 5, "kj5 behind the extra normalisation of DeVA's released code", "schatten8"
    ),
    "you5": Iteration(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        "You Jiacheng, five optimized steps",
    ),
    "pe5": _polar_express(5, safety=0.02),
    "pe6": _polar_express(6, safety=0.01),
    "pe8": _polar_express(8, safety=0.01),
    "cans5": Iteration(
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
        "CANS (arXiv 2506.10935), Chebyshev-optimal steps; no margin for rounding, so not for bfloat16",
    ),
    "aol4": Iteration(
        (
            (4.0098, -7.0585, 2.4635),
            (3.4585, -5.5479, 2.5959),
            (2.7573, -3.2939, 1.4254),
            (2.7215, -3.0494, 1.3169),
        ),
        "Turbo-Muon (arXiv 2512.04632), four steps behind a row rescaling; for flat spectra only: the first step "
        "reverses singular values above 0.88 of the bound, as of a matrix of nearly rank one",
        "aol",
    ),
    "dsv4": Iteration(
        (_KELLER_JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2, "DeepSeek-V4: eight steps of Keller Jordan's, two to settle"
    ),
}


def find(method: str) -> Iteration:
    """The iteration of a name: one in :data:`METHODS`, or ``"kjN"`` for N of Keller Jordan's steps.

    Raises:
        ValueError: There is no such iteration.

    >>> len(find("kj7").coefficients)
    7
    """
    if method in METHODS:
        return METHODS[method]
    if match := re.fullmatch(r"kj([1-9]\d?)", method):
        return _keller_jordan(int(match[1]))
    raise ValueError(f"orthogonalizer={method!r} is not one of {', '.join(['exact', *METHODS])}, or kjN for N steps.")
