"""The polar factor of a matrix: by polynomial iteration, or exactly by singular value decomposition."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import private
from .minimax import Coefficients
from .presets import Iteration, find
from .products import symmetric_product

_SHORT_GRAM = 3  # Steps on one Gram matrix; more lose small singular values, as eigenvalues of A are their squares.
_LONG = 2  # Aspect ratio from which iterating on the Gram matrix pays.


def orthogonalize(x: Tensor, method: str = "pe6", dtype: torch.dtype | None = None) -> Tensor:
    r"""The (approximate) polar factor :math:`U V^\top` of every matrix :math:`U S V^\top`.

    A zero matrix stays zero, and so do, with ``"exact"``, the null directions of a singular one; an iteration scales
    directions of small singular values up as far as its slope at zero goes. The scale of a matrix does not matter,
    from the smallest subnormal numbers to the largest finite ones. A matrix that holds NaN or infinity becomes NaN,
    without effect on the others of its stack.

    Args:
        x: Shape ``(..., m, n)``, any floating dtype.
        method: A name in :data:`METHODS`, ``"kjN"`` for N of Keller Jordan's steps, or ``"exact"``. The default has the
            fewest steps after which rounding limits the error, for singular values above a hundredth of the largest.
        dtype: Precision of the products; ``None`` for :func:`iteration_dtype`. Norms are taken in float32 at least.

    Returns:
        A new tensor of the shape and dtype of ``x``.

    Raises:
        ValueError: There is no such method.

    Example:
        >>> x = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.5, 0.0]])
        >>> orthogonalize(x, "exact")
        tensor([[1., 0., 0.],
                [0., 1., 0.]])
        >>> orthogonalize(x, "pe8")
        tensor([[1.0000, 0.0000, 0.0000],
                [0.0000, 1.0000, 0.0000]])
    """
    if method == "exact":
        return exact_polar(x)
    iteration = find(method)
    if x.numel() == 0:
        return x.clone()
    stack = x.reshape(-1, *x.shape[-2:])
    factors = [_iterate(part, iteration, dtype or iteration_dtype(x)) for part in stack.split(_stack_size(stack))]
    return (factors[0] if len(factors) == 1 else torch.cat(factors)).to(x.dtype).view(x.shape)


def exact_polar(x: Tensor) -> Tensor:
    """``U V^T`` by a float64 singular value decomposition.

    Directions whose singular value is at most ``max(m, n) * eps`` of the largest one are left out, so that the
    factor of a rank-deficient matrix is unique (a partial isometry) and that of zero is zero. That of a matrix that
    holds NaN or infinity is NaN.
    """
    finite = x.isfinite().all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    u, s, vh = torch.linalg.svd(torch.where(finite, x.double(), 0.0), full_matrices=False)
    cutoff = max(x.shape[-2:]) * torch.finfo(torch.float64).eps * s[..., :1]
    factor = (u * (s > cutoff).to(u.dtype).unsqueeze(-2)) @ vh
    return torch.where(finite, factor, torch.nan).to(x.dtype)


def iteration_dtype(x: Tensor) -> torch.dtype:
    """Precision in which the products of an iteration on ``x`` are made.

    float64 stays float64. On CUDA it is float16, which is as fast as bfloat16, needs no newer card, and after the
    float32 normalisation is as accurate (five steps) or several times more accurate (six and more). A CPU takes
    bfloat16 where it has matrix units for it and the matrix is large enough to gain from them, else float32.
    """
    if x.dtype == torch.float64:
        return torch.float64
    if x.device.type == "cuda":
        return torch.float16
    if x.device.type == "cpu" and min(x.shape[-2:]) >= 256 and private.has_matrix_tiles():
        return torch.bfloat16
    return torch.float32


def _stack_size(x: Tensor) -> int:
    """How many matrices of the stack ``x`` to work on at once: few enough to stay in cache, enough for all threads."""
    m, n = x.shape[-2:]
    if x.device.type != "cpu":
        return 1 if min(m, n) >= 2048 else max(1, 2**24 // (m * n))
    return torch.get_num_threads() * max(1, 2**20 // (m * n * x.element_size()))


def _iterate(x: Tensor, iteration: Iteration, dtype: torch.dtype) -> Tensor:
    """Run ``iteration`` on a stack ``(k, m, n)``."""
    tall = x.shape[-2] > x.shape[-1]
    y = _normalize(x).to(dtype)
    gram = _gram(y, tall)
    if iteration.rescale is not None:
        y, gram = _rescale(y, gram, tall, iteration.rescale)
    short, long = sorted(y.shape[-2:])
    wide_precision = dtype in (torch.float32, torch.float64)
    span = _SHORT_GRAM if wide_precision and long >= _LONG * short else 1
    for i in range(0, len(iteration.coefficients), span):
        if i > 0:
            gram = _gram(y, tall)
        y = _advance(y, gram, tall, iteration.coefficients[i : i + span])
    return y


def _normalize(x: Tensor) -> Tensor:
    """Divide by the Frobenius norm; by the largest entry first, as squares of tiny or huge ones leave the range."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    tiny = torch.finfo(y.dtype).tiny
    # vector_norm(inf) is not vectorised on a CPU.
    largest = torch.maximum(y.amax(dim=(-2, -1), keepdim=True), -y.amin(dim=(-2, -1), keepdim=True))
    y = y / largest.clamp_(min=tiny)
    return y.div_(torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True).clamp_(min=tiny))


def _gram(y: Tensor, tall: bool) -> Tensor:
    return symmetric_product(y.mT, y) if tall else symmetric_product(y, y.mT)


def _rescale(y: Tensor, gram: Tensor, tall: bool, rescale: str) -> tuple[Tensor, Tensor]:
    """Divide ``y`` as :class:`Iteration` says, and its Gram matrix with it, which saves making that again."""
    wide = gram.to(torch.promote_types(gram.dtype, torch.float32))
    tiny = torch.finfo(wide.dtype).tiny
    if rescale == "schatten8":
        norm = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True).clamp_(min=tiny)
        unit = (wide / norm).to(gram.dtype)  # The squares of the entries themselves would underflow in float16.
        fourth = torch.linalg.vector_norm(torch.bmm(unit, unit), dim=(-2, -1), keepdim=True, dtype=wide.dtype)
        square = (norm * fourth.sqrt_()).clamp_(min=tiny)
        return (y / square.sqrt()).to(y.dtype), (wide / square).to(gram.dtype)
    rows = wide.abs().sum(-1, keepdim=True).clamp_(min=tiny).rsqrt_()
    return (y * (rows.mT if tall else rows)).to(y.dtype), (wide * rows * rows.mT).to(gram.dtype)


def _advance(y: Tensor, gram: Tensor, tall: bool, steps: tuple[Coefficients, ...]) -> Tensor:
    """Make ``steps`` from ``y`` and its Gram matrix, all but the last on the Gram matrix alone.

    One step multiplies ``y`` by the symmetric ``F = a I + b A + c A^2``, so it takes the Gram matrix to ``F A F``.
    All these matrices commute. ``m^2 n`` products are needed for the last multiplication only.
    """
    total: Tensor | None = None
    for a, b, c in steps[:-1]:
        q = symmetric_product(gram, gram, gram, beta=b, alpha=c)
        half = symmetric_product(q, gram, gram, beta=a)
        gram = symmetric_product(half, q, half, beta=a)
        if total is None:
            total = q
            total.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            total = symmetric_product(q, total, total, beta=a)
    a, b, c = steps[-1]
    q = symmetric_product(gram, gram, gram, beta=b, alpha=c)
    if total is None:
        return torch.baddbmm(y, y, q, beta=a) if tall else torch.baddbmm(y, q, y, beta=a)
    total = symmetric_product(q, total, total, beta=a)
    return torch.bmm(y, total) if tall else torch.bmm(total, y)
