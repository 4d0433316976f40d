"""Matrix products whose result is known to be symmetric."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_BANDS = 4
_LEAST = 192  # Rows from which it can pay to leave out multiplications.


def symmetric_product(
    x: Tensor,
    y: Tensor,
    plus: Tensor | None = None,
    beta: float = 1.0,
    alpha: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """``x @ y``, or ``beta * plus + alpha * x @ y``, which has to be symmetric, for stacks of matrices.

    Where it pays, three eighths of the multiplications are left out: each of four horizontal bands is computed up to
    the diagonal only, by one product, and mirrored.

    Args:
        x: Shape ``(k, m, n)``.
        y: Shape ``(k, n, m)``.
        plus: Shape ``(k, m, m)``, symmetric.
        beta: Its factor.
        alpha: Factor of the product that is added to it.
        out: Tensor for the result; it may be ``plus``.

    Example:
        >>> x = torch.tensor([[[1.0, 2.0], [0.0, 1.0]]])
        >>> symmetric_product(x, x.mT, plus=torch.eye(2)[None], beta=-1.0)
        tensor([[[4., 2.],
                 [2., 0.]]])
    """
    k, m, _ = x.shape
    if m < _LEAST or not _halving_pays(x):
        if plus is None:
            return torch.bmm(x, y, out=out)
        return torch.baddbmm(plus, x, y, beta=beta, alpha=alpha, out=out)
    result = x.new_empty(k, m, m) if out is None else out
    size = -(-m // _BANDS)
    for start in range(0, m, size):
        end = min(start + size, m)
        rows, columns = x[:, start:end], y[..., :end]
        if plus is None:
            band = torch.bmm(rows, columns)
        else:
            band = torch.baddbmm(plus[:, start:end, :end], rows, columns, beta=beta, alpha=alpha)
        result[:, start:end, :end] = band
        result[:, :start, start:end] = band[..., :start].mT
    return result


def symmetric_products(rows: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Functions like :func:`torch.bmm` and :func:`torch.baddbmm` for symmetric results with a number of rows."""
    return (torch.bmm, torch.baddbmm) if rows < _LEAST else (symmetric_product, _symmetric_baddbmm)


def _symmetric_baddbmm(
    plus: Tensor, x: Tensor, y: Tensor, *, beta: float = 1.0, alpha: float = 1.0, out: Tensor | None = None
) -> Tensor:
    return symmetric_product(x, y, plus, beta, alpha, out)


def _halving_pays(x: Tensor) -> bool:
    """Whether fewer multiplications outweigh that smaller products are less efficient.

    Time of the bands over that of the whole product, measured on a CPU with AVX2 and one thread: 1.3 for 64 matrices of
    64 x 64, 1.0 for 16 of 128 x 128, 0.9 for 7 of 192 x 192, 0.8 for 512 x 512, 0.67 for 2048 x 2048. With four threads
    0.9 for 24 of 192 x 192, 0.78 for 1024 x 1024.
    """
    k, m, n = x.shape
    return x.device.type == "cpu" and m >= _LEAST and k * m * m * n >= torch.get_num_threads() * 2**25
