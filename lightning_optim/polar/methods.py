"""Polynomial iterations for the polar factor, and the exact one by singular value decomposition."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

Coefficients = tuple[float, float, float]

_KELLER_JORDAN: Coefficients = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True)
class Iteration:
    """An odd polynomial iteration ``X <- a X + (b A + c A^2) X`` with ``A = X X^T``.

    Args:
        coefficients: ``(a, b, c)`` of each step.
        schatten8: Divide by the Schatten-8 norm, a tight bound of the spectral norm, after the Frobenius norm.
        source: Where the coefficients are from.
    """

    coefficients: tuple[Coefficients, ...]
    source: str
    schatten8: bool = False


#: Iterations by name; ``"exact"`` is accepted beside them.
METHODS: dict[str, Iteration] = {
    "kj5": Iteration((_KELLER_JORDAN,) * 5, "Keller Jordan, Muon: five equal steps"),
    "kj5-schatten": Iteration(
        (_KELLER_JORDAN,) * 5, "kj5 behind the extra normalisation of DeVA's released code", schatten8=True
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
    "pe5": Iteration(
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        "Polar Express (arXiv 2505.16932), 5 steps, safety 0.02",
    ),
}


def orthogonalize(x: Tensor, method: str = "kj5") -> Tensor:
    """Orthogonalise a matrix or a stack of matrices.

    Args:
        x: Shape ``(..., m, n)``, float32 or float64.
        method: A name that :func:`find` knows, or ``"exact"``.

    Returns:
        The (approximate) polar factor, of the shape and dtype of ``x``. A zero matrix stays zero.

    Raises:
        ValueError: There is no such method.

    Example:
        >>> x = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.5, 0.0]])
        >>> orthogonalize(x, "exact")
        tensor([[1., 0., 0.],
                [0., 1., 0.]])
    """
    return exact_polar(x) if method == "exact" else iterate(x, find(method))


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
        return Iteration((_KELLER_JORDAN,) * int(match[1]), "Keller Jordan, Muon")
    raise ValueError(f"orthogonalizer={method!r} is not one of {', '.join(['exact', *METHODS])}, or kjN for N steps.")


def exact_polar(x: Tensor) -> Tensor:
    """``U V^T`` by a float64 singular value decomposition.

    Directions whose singular value is at most ``max(m, n) * eps`` of the largest one are left out, so that the
    factor of a rank-deficient matrix is unique (a partial isometry) and that of zero is zero.
    """
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    cutoff = max(x.shape[-2:]) * torch.finfo(torch.float64).eps * s[..., :1]
    return ((u * (s > cutoff).to(u.dtype).unsqueeze(-2)) @ vh).to(x.dtype)


def iterate(x: Tensor, iteration: Iteration) -> Tensor:
    """Run a polynomial iteration on ``x`` of shape ``(..., m, n)``; see :func:`orthogonalize`."""
    wide = x.shape[-2] <= x.shape[-1]
    y = x if wide else x.mT
    # By the largest entry first: the squares of tiny entries would underflow.
    y = y / y.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    y = y.to(_iteration_dtype(x))
    if iteration.schatten8:
        gram = y @ y.mT
        y = y / (gram @ gram).norm(dim=(-2, -1), keepdim=True).pow(0.25).clamp(min=torch.finfo(y.dtype).tiny)
    for a, b, c in iteration.coefficients:
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    y = y.to(x.dtype)
    return y if wide else y.mT


def _iteration_dtype(x: Tensor) -> torch.dtype:
    """bfloat16 on GPUs, as published; on CPUs without bfloat16 units it would be up to 500 times slower."""
    return torch.bfloat16 if x.device.type == "cuda" and x.dtype == torch.float32 else x.dtype
